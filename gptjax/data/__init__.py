"""Reads text or prepared sets into token sets (`load`), of which batches are made; each step has its own file."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from gptjax.config.errors import DataError
from gptjax.data import examples, mixtures, pairs, shards, sources, token_sets
from gptjax.data.augment import Augment
from gptjax.data.token_sets import TokenSet
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer

if TYPE_CHECKING:
    import grain
    from ml_collections import ConfigDict

    from gptjax.data.layouts import Rows

TEXT = "text"  # name of a set made of raw text
MAX_COMPARED_TOKENS = 4_000_000  # most held-out tokens that general compressors are given


Preprocess = Callable[[TokenSet], Callable[[Any, Any], Any] | None]


def no_preprocessing(tokens: TokenSet) -> None:
    """Leaves rows as the layout gives them."""


class Data(NamedTuple):
    """Training and held-out data of a run."""

    tokenizer: Tokenizer
    train: dict[str, TokenSet]  # by name: TEXT, or the folder of a prepared set
    shares: dict[str, int]  # rows of each set per sum(shares) rows
    held_out: TokenSet  # of all sets, concatenated
    held_out_text: bytes  # its text, for comparison with general compressors; only the beginning where it is long
    fingerprints: dict[str, str]  # of the text of each set

    def tokens(self) -> int:
        """Returns the number of training tokens."""
        return sum(map(len, self.train.values()))

    def rows(self, config: Any, seed: int, preprocess: Preprocess = no_preprocessing) -> "partial[grain.MapDataset]":
        """Returns a function `(name of a set, context) -> endless rows` in the layout `config.layout`.

        Args:
          config: `config.data` of the run.
          seed: seed of every random draw.
          preprocess: maps a set to the function `(row, rng) -> row` that preprocesses its rows, or None for no
            preprocessing.
        """
        return partial(self._rows, config.layout, Augment(**config.augment.to_dict()), seed, preprocess)

    def held_out_rows(self, config: Any, preprocess: Preprocess = no_preprocessing) -> "Rows":
        """Returns the held-out documents as rows in the layout of `config.data`: once, in order.

        Raises:
          DataError: the held-out documents contain nothing to predict.
        """
        from gptjax.data import layouts

        fingerprint = " ".join(self.fingerprints.values())
        rows = layouts.EVAL_LAYOUTS[config.layout](self.held_out, config.context, 0, Augment(), fingerprint)
        return layouts.preprocess_rows(rows, preprocess(self.held_out), 0)

    def _rows(
        self, layout: str, augment: Augment, seed: int, preprocess: Preprocess, name: str, context: int
    ) -> "grain.MapDataset":
        from gptjax.data import layouts  # imports jax, which preparing does not need

        rows = layouts.LAYOUTS[layout](self.train[name], context, seed, augment, self.fingerprints[name])
        return layouts.shuffle_and_repeat(layouts.preprocess_rows(rows, preprocess(self.train[name]), seed), seed)


def prepared_folders(config: Any) -> list[Path]:
    """Returns the folders of the prepared sets that `config` (`config.data`) names, or [] if it names text."""
    if config.mixture:
        return [Path(path) for path, _ in config.mixture]
    return [Path(config.path)] if config.path and shards.is_prepared(Path(config.path)) else []


def with_tokenizer_of_sets(config: "ConfigDict") -> "ConfigDict":
    """Sets `data.tokenizer` to the tokenizer of the prepared sets of the config, if it names any.

    Raises:
      DataError: a prepared set cannot be opened.
    """
    folders = prepared_folders(config.data)
    if not folders:
        return config
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.tokenizer = shards.open_set(folders[0]).metadata["tokenizer"]["name"]
    return config.lock()


def load(config: Any, tokenizer: Tokenizer | None = None) -> Data:
    """Reads the text, or opens the prepared sets, that `config` names.

    Args:
      config: `config.data` of a run.
      tokenizer: tokenizer of the run; None uses that of the prepared sets, or builds `config.tokenizer`.

    Raises:
      ConfigError: the tokenizer is unknown.
      DataError: text is missing, is not text, or is shorter than a window; a set is missing, damaged or was made with
        another tokenizer.
    """
    folders = prepared_folders(config)
    if folders:
        loaded = _load_prepared(config, folders, tokenizer)
    else:
        kind = "examples" if config.examples.form else "pairs" if config.languages else "text"
        loaded = _load_text(config, tokenizer, READERS[kind])
    if len(loaded.held_out) < 2:
        origin = config.path or "the mixture"
        raise DataError(f"{origin} has no held-out documents; prepare it with a larger --held_out")
    return loaded


class Reader(NamedTuple):
    """Reader of one kind of data: reads the training and held-out lists and makes token sets of them.

    Attributes:
      read_splits: `config.data -> (training list, held-out list)`.
      texts: `(config.data, list) -> texts` that a tokenizer is trained on.
      encode: `(tokenizer, list, config.data, label of the progress bar, name) -> token set`.
      target_text: `(config.data, list) -> text` to be predicted.
      corpus: `(training list, held-out list) -> corpus`, for the fingerprint.
      reweight: `(token set, config.data) -> token set` with the weights used in training.
    """

    read_splits: Callable[[Any], tuple[list[Any], list[Any]]]
    texts: Callable[[Any, list[Any]], list[str]]
    encode: Callable[[Tokenizer, list[Any], Any, str, str], TokenSet]
    target_text: Callable[[Any, list[Any]], str]
    corpus: Callable[[list[Any], list[Any]], sources.Corpus]
    reweight: Callable[[TokenSet, Any], TokenSet] = lambda tokens, config: tokens


def _read_examples(config: Any) -> tuple[list[Any], list[Any]]:
    train = examples.read(config, "train")
    examples.check_labels(train, config)
    return train, examples.read(config, "val")


READERS = {
    "text": Reader(
        sources.read,
        lambda config, documents: [document.text for document in documents],
        lambda tokenizer, documents, config, label, name: token_sets.from_texts(
            tokenizer, [document.text for document in documents], label, name
        ),
        lambda config, documents: "".join(document.text for document in documents),
        sources.Corpus,
    ),
    "pairs": Reader(
        lambda config: (pairs.read(config, pairs.TRAIN), pairs.read(config, pairs.HELD_OUT)),
        lambda config, side: [text for pair in side for text in pair],  # one vocabulary for both languages
        lambda tokenizer, side, config, label, name: pairs.to_token_set(tokenizer, side, label, name),
        lambda config, side: "\n".join(pair.target for pair in side),
        pairs.corpus,
    ),
    "examples": Reader(
        _read_examples,
        examples.texts,
        examples.to_token_set,
        lambda config, records: "\n".join(examples.texts(config, records)),
        examples.corpus,
        lambda tokens, config: examples.balance_labels(tokens) if config.examples.balanced else tokens,
    ),
}


def _load_text(config: Any, tokenizer: Tokenizer | None, reader: Reader) -> Data:
    if tokenizer is None:
        tokenizers.check_name(config.tokenizer)
    train, held_out = reader.read_splits(config)
    if tokenizer is None:
        # A character vocabulary has to cover the held-out text too; merges are learned from the training text alone.
        tokenizer_side = train + held_out if config.tokenizer == "chars" else train
        tokenizer = tokenizers.build(config.tokenizer, reader.texts(config, tokenizer_side))
    train_set = reader.encode(tokenizer, train, config, "encoding the training text", "the training text")
    return Data(
        tokenizer=tokenizer,
        train={TEXT: reader.reweight(train_set, config)},
        shares={TEXT: 1},
        held_out=reader.encode(tokenizer, held_out, config, "encoding the held-out text", "the held-out text"),
        held_out_text=reader.target_text(config, held_out).encode(),
        fingerprints={TEXT: sources.fingerprint(reader.corpus(train, held_out))},
    )


def _load_prepared(config: Any, folders: list[Path], tokenizer: Tokenizer | None) -> Data:
    sets = {str(folder): shards.open_set(folder) for folder in folders}
    tokenizer = tokenizer or next(iter(sets.values())).tokenizer()
    for prepared_set in sets.values():
        shards.check_tokenizer(prepared_set.folder, prepared_set.metadata, tokenizer)
    weights = [weight for _, weight in config.mixture] or [1]
    if None in weights:
        weights = [len(prepared_set.train) for prepared_set in sets.values()]
    held_out = token_sets.concatenate(
        [prepared_set.held_out for prepared_set in sets.values()], "the held-out documents"
    )
    ids = held_out.read(0, MAX_COMPARED_TOKENS)
    text_ids = ids[tokenizers.token_bytes(tokenizer)[ids] > 0].tolist()
    return Data(
        tokenizer=tokenizer,
        train={name: prepared_set.train for name, prepared_set in sets.items()},
        shares=dict(zip(sets, mixtures.shares(weights, config.temperature), strict=True)),
        held_out=held_out,
        held_out_text=tokenizer.decode(text_ids).encode(),
        fingerprints={name: prepared_set.fingerprint for name, prepared_set in sets.items()},
    )
