"""Special ids of objectives: masks, separators, sentinels. Those of the tokenizer, or new ids after its last.

The tokenizer does not change: ids that it lacks follow its last one in a fixed order, so that an id means the same in
every run with that tokenizer, whatever its objective.
"""

from collections.abc import Collection, Sequence
from itertools import groupby
from typing import NamedTuple

from gptjax.config.errors import DataError
from gptjax.data.tokenizers.tokenizers import Tokenizer, special_tokens

# Names of special tokens in common vocabularies; the first one is used for new ids.
COMMON_NAMES = {
    "mask": ("[MASK]", "<mask>", "<|mask|>"),
    "class": ("[CLS]", "<s>", "<cls>"),
    "separator": ("[SEP]", "</s>", "<sep>"),
    "fim_prefix": ("<|fim_prefix|>", "<fim_prefix>", "<fim-prefix>", "<PRE>"),
    "fim_suffix": ("<|fim_suffix|>", "<fim_suffix>", "<fim-suffix>", "<SUF>"),
    "fim_middle": ("<|fim_middle|>", "<fim_middle>", "<fim-middle>", "<MID>"),
}
SENTINEL = "<extra_id_{}>"  # T5's


class SpecialIds(NamedTuple):
    """Special ids that a run uses."""

    ids: dict[str, int]  # by purpose, a key of COMMON_NAMES
    sentinels: tuple[int, ...]  # ids of masked spans, in order
    vocabulary: int  # vocabulary size of a model: ids of the tokenizer, and the new ones


def lookup_special_ids(tokenizer: Tokenizer, names: Collection[str], sentinels: int = 0) -> SpecialIds:
    """Looks up special ids in a tokenizer, and assigns new ids for those that it lacks.

    Args:
      tokenizer: tokenizer of the run.
      names: keys of COMMON_NAMES that are needed; "end" only requires that the tokenizer has an end.
      sentinels: number of sentinels that are needed.

    Returns:
      ids, of which those from `tokenizer.n_vocab` on are new.

    Raises:
      DataError: the tokenizer has no end.
    """
    if "end" in names and tokenizer.end is None:
        raise DataError(f"the tokenizer {tokenizer.name} has no end of text, which targets need; take bytes or bpe:N")
    present, missing = special_tokens(tokenizer), _missing(tokenizer)
    first = tokenizer.n_vocab
    ids = {
        name: first + missing.index(name)
        if name in missing
        else next(present[alias] for alias in COMMON_NAMES[name] if alias in present)
        for name in names
        if name in COMMON_NAMES
    }
    present_sentinels = tuple(present[SENTINEL.format(i)] for i in range(_count_sentinels(present)))[:sentinels]
    added = range(first + len(missing), first + len(missing) + sentinels - len(present_sentinels))
    highest = max([first - 1, *ids.values(), *added])
    return SpecialIds(ids, (*present_sentinels, *added), highest + 1)


def special_name(tokenizer: Tokenizer, token: int) -> str:
    """Returns the name of a new id, after those of the tokenizer."""
    missing, index = _missing(tokenizer), token - tokenizer.n_vocab
    if index < len(missing):
        return COMMON_NAMES[missing[index]][0]
    return SENTINEL.format(index - len(missing) + _count_sentinels(special_tokens(tokenizer)))


def decode_with_specials(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Decodes ids, writing new ids by name; ids of a tuned prompt have no text."""
    texts = (token for token in ids if token not in tokenizer.prompt)
    runs = groupby(texts, lambda token: token >= tokenizer.n_vocab)
    return "".join(
        "".join(special_name(tokenizer, token) for token in run) if beyond else tokenizer.decode(list(run))
        for beyond, run in runs
    )


def _missing(tokenizer: Tokenizer) -> list[str]:
    present = special_tokens(tokenizer)
    return [name for name, aliases in COMMON_NAMES.items() if not any(alias in present for alias in aliases)]


def _count_sentinels(present: dict[str, int]) -> int:
    count = 0
    while SENTINEL.format(count) in present:
        count += 1
    return count
