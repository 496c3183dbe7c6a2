"""Task formats: a record as a text with an answer, a dialogue, or a text with labels.

A format tokenizes a record and makes the arrays that a batch gets of it, by name: loss weights of its text
(`weights_BT`), or targets of a task head (`labels_B`, ...).
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from gptjax.config.errors import DataError
from gptjax.data import chat, dialogues
from gptjax.data.dialogues import Note
from gptjax.data.fields import (
    as_text,
    choice_of,
    choices_of,
    field,
    fill_template,
    label_of,
    match_label,
    template_fields,
    value_of,
)
from gptjax.data.pairs import Pair
from gptjax.data.records import Record, strings
from gptjax.data.tokenizers.tokenizers import Tokenizer, encode, encode_special, special_tokens

Pieces = list[tuple[str, bool]]  # pieces of a text in order; True: in the loss


class TokenizedExample(NamedTuple):
    """Tokenized text.

    Attributes:
      ids: its ids, without the delimiters around texts.
      arrays: arrays by name in a batch; `_BT` has an entry for each id, the others belong to the record.
      ends: True if the id that ends the text is in the loss.
    """

    ids: list[int]
    arrays: dict[str, np.ndarray]
    ends: bool = False


class TaskFormat(NamedTuple):
    """Task format, an entry of TASK_FORMATS.

    Attributes:
      pieces: `(record, options, tokenizer) -> pieces` of all of the text of a record.
      tokenize: `(record, options, tokenizer, max_length) -> (texts, is_long)`: several texts for choices, none if the
        text or the answer is empty; each has at most `max_length` ids, and `is_long` is True if any was truncated.
      arrays: names of the arrays that it makes.
      objective: objective that learns from the targets of a task head; "": next tokens are learned.
      labelled: True if labels have names, which `examples.labels` lists.
      notes: `(record, options, tokenizer) -> notes` on the parts of a record that are not used.
    """

    pieces: Callable[[Record, Any, Tokenizer | None], Pieces]
    tokenize: Callable[[Record, Any, Tokenizer, int], tuple[list[TokenizedExample], bool]]
    arrays: tuple[str, ...] = ("weights_BT",)
    objective: str = ""
    labelled: bool = False
    notes: Callable[[Record, Any, Tokenizer], Sequence[Note]] = lambda record, c, tokenizer: ()


def shorten_fields(
    record: Record, names: Sequence[str], size: Callable[[Record], int], max_length: int
) -> tuple[Record, bool]:
    """Truncates the longest fields of a record until it fits.

    Args:
      record: record, which is not modified.
      names: fields that may be truncated; if they become empty, the record is returned although it is too long.
      size: returns the number of ids of a record.
      max_length: largest number of ids.

    Returns:
      the record, and True if it was truncated.
    """
    count, is_long = size(record), False
    while count > max_length:
        is_long = True
        texts = {name: record.fields[name] for name in names if isinstance(record.fields.get(name), str)}
        longest = max(texts, key=lambda name: len(texts[name]), default="")
        if not longest or not texts[longest]:
            break
        letters = max(1, int(sum(map(len, texts.values())) / count * (count - max_length)))
        record = record._replace(fields=record.fields | {longest: texts[longest][:-letters]})
        count = size(record)
    return record, is_long


# Texts with answers.


def text(record: Record, c: Any, tokenizer: Tokenizer | None = None) -> Pieces:
    """Returns `template`, not in the loss, and `answer`, in the loss; without an answer all is in the loss."""
    prompt = fill_template(c.template, record, "template")
    return [(prompt, False), (fill_template(c.answer, record, "answer"), True)] if c.answer else [(prompt, True)]


ALPACA_PROMPT = "### Instruction:\n{instruction}\n\n### Response:\n"
ALPACA_INPUT_PROMPT = "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"


def instructions(record: Record, c: Any, tokenizer: Tokenizer | None = None) -> Pieces:
    """Returns Alpaca's fields: instruction, optional input, and output (github.com/tatsu-lab/stanford_alpaca)."""
    template = ALPACA_INPUT_PROMPT if record.fields.get("input") else ALPACA_PROMPT
    return [
        (fill_template(template, record, "form=instructions"), False),
        (fill_template("{output}", record, "form=instructions"), True),
    ]


def tokenize_pieces(pieces: Pieces, encode: Callable[[str], list[int]]) -> TokenizedExample:
    """Tokenizes pieces, each on its own, as prompts are; `ends` is True if the last piece is in the loss."""
    ids, in_loss = list[int](), list[bool]()
    for piece, trained in pieces:
        piece_ids = encode(piece)
        ids, in_loss = ids + piece_ids, in_loss + [trained] * len(piece_ids)
    return TokenizedExample(ids, {"weights_BT": np.array(in_loss, np.float32)}, bool(pieces) and pieces[-1][1])


def truncate(example: TokenizedExample, max_length: int) -> TokenizedExample:
    """Truncates to `max_length` ids; a truncated text does not end."""
    arrays = {name: x[:max_length] if name.endswith("_BT") else x for name, x in example.arrays.items()}
    return example if len(example.ids) <= max_length else TokenizedExample(example.ids[:max_length], arrays)


def generation_format(pieces: Callable[..., Pieces], names: Callable[[Any], list[str]]) -> TaskFormat:
    """Returns a format of next-token targets; `names(options)` are the fields that are truncated if it is too long."""

    def tokenize_record(
        record: Record, c: Any, tokenizer: Tokenizer, max_length: int
    ) -> tuple[list[TokenizedExample], bool]:
        def ids_of(record: Record) -> TokenizedExample:
            return tokenize_pieces(pieces(record, c), lambda text: encode(tokenizer, text))

        record, is_long = shorten_fields(record, names(c), lambda record: len(ids_of(record).ids), max_length)
        example = truncate(ids_of(record), max_length)
        return ([example] if example.arrays["weights_BT"].any() else []), is_long

    return TaskFormat(pieces, tokenize_record)


def to_pair(record: Record, c: Any) -> Pair:
    """Returns a record as a source and a target, for an encoder-decoder."""
    pieces = TASK_FORMATS[c.form].pieces(record, c, None)
    return Pair(*("".join(piece for piece, in_loss in pieces if in_loss == is_target) for is_target in (False, True)))


# Dialogues.


def read_dialogue(record: Record, c: Any, tokenizer: Tokenizer) -> dialogues.Dialogue:
    """Reads the dialogue of a record in the form that the chat template renders."""
    return dialogues.read(record, chat.get_template(c.chat_template, tokenizer).text)


def dialogue(record: Record, c: Any, tokenizer: Tokenizer | None = None) -> Pieces:
    """Renders a dialogue by `chat_template` with assistant turns in the loss; without a tokenizer, only its texts."""
    if tokenizer is None:
        return [(message["content"] + "\n", False) for message in dialogues.read(record, "").messages]
    parsed, special = read_dialogue(record, c, tokenizer), special_tokens(tokenizer)
    contents = [
        (f"what the {message['role']} says", [message["content"], message.get("tool_calls")])
        for message in parsed.messages
    ]
    for origin, value in [*contents, ("a tool", parsed.tools)]:
        texts = list(strings(value))
        if name := next((name for name in special if any(name in text for text in texts)), None):
            raise DataError(f"{record.where}: {origin} has the special token {name} in it")
    template = chat.get_template(c.chat_template, tokenizer)
    try:
        return chat.render_turns(template, parsed.messages, tokenizer, parsed.in_loss, parsed.tools)
    except DataError as error:
        raise DataError(f"{record.where}: {error}") from error


def tokenize_dialogue(
    record: Record, c: Any, tokenizer: Tokenizer, max_length: int
) -> tuple[list[TokenizedExample], bool]:
    """Tokenizes a dialogue; one that is too long loses its end."""
    example = tokenize_pieces(dialogue(record, c, tokenizer), lambda text: encode_special(tokenizer, text))
    begin = list(tokenizer.begin[len(tokenizer.prompt) :]) or separator_ids(tokenizer)
    if example.ids[: len(begin)] == begin:  # some templates render the begin ids themselves
        example = TokenizedExample(
            example.ids[len(begin) :], {"weights_BT": example.arrays["weights_BT"][len(begin) :]}, example.ends
        )
    truncated = truncate(example, max_length)
    return ([truncated] if truncated.arrays["weights_BT"].any() else []), len(example.ids) > max_length


# Texts with labels.


def labelled_text(record: Record, c: Any, tokenizer: Tokenizer | None = None) -> Pieces:
    """Returns `template`, and `second` if there is one."""
    pieces = [fill_template(c.template, record, "template"), fill_template(c.second, record, "second")]
    return [(piece, False) for piece in pieces if piece]


def separator_ids(tokenizer: Tokenizer) -> list[int]:
    """Returns the ids between two texts that are read together: the end of the tokenizer, or a newline."""
    return encode(tokenizer, "\n") if tokenizer.end is None else [tokenizer.end]


def join_texts(pieces: Pieces, tokenizer: Tokenizer) -> TokenizedExample:
    """Tokenizes one text, or two, where `types_BT` is 1 in the second."""
    first, *rest = [encode(tokenizer, piece) for piece, _ in pieces] or [[]]
    ids = first + (separator_ids(tokenizer) + rest[0] if rest else [])
    types = np.arange(len(ids)) > len(first) if rest else np.zeros(len(ids))
    return TokenizedExample(ids, {"types_BT": types.astype(np.int32)})


def labelled_format(
    name: str, answer: Callable[[Record, Any], Any], dtype: str, objective: str, has_names: bool
) -> TaskFormat:
    """Returns a format with one answer per text, the array `name` of a batch, and weights_B."""

    def tokenize_record(
        record: Record, c: Any, tokenizer: Tokenizer, max_length: int
    ) -> tuple[list[TokenizedExample], bool]:
        targets = {name: np.array(answer(record, c), dtype), "weights_B": np.array(1, np.float32)}

        def joined(record: Record) -> TokenizedExample:
            return join_texts(labelled_text(record, c), tokenizer)

        names = template_fields(c.template + c.second)
        record, is_long = shorten_fields(record, names, lambda record: len(joined(record).ids), max_length)
        example = truncate(joined(record), max_length)
        return ([example._replace(arrays=example.arrays | targets)] if example.ids else []), is_long

    return TaskFormat(labelled_text, tokenize_record, (name, "weights_B", "types_BT"), objective, has_names)


def label_id(record: Record, c: Any) -> int:
    """Returns the index of the label of a record."""
    index: int = c.labels.index(label_of(record, c))
    return index


def choices(record: Record, c: Any, tokenizer: Tokenizer | None = None) -> Pieces:
    """Returns the text and all choices."""
    return [
        (fill_template(c.template, record, "template"), False),
        *((f" {choice}", False) for choice in choices_of(record, c)),
    ]


def tokenize_choices(
    record: Record, c: Any, tokenizer: Tokenizer, max_length: int
) -> tuple[list[TokenizedExample], bool]:
    """Tokenizes the text followed by each choice; one that is too long loses the end of the text."""
    targets = {"labels_B": np.array(choice_of(record, c), np.int32), "weights_B": np.array(1, np.float32)}
    choice_ids = [encode(tokenizer, f" {choice}") for choice in choices_of(record, c)]
    text_ids = encode(tokenizer, fill_template(c.template, record, "template"))
    space = [max(max_length - len(ids), 0) for ids in choice_ids]
    sequences = [(text_ids[:limit] + ids)[:max_length] for limit, ids in zip(space, choice_ids, strict=True)]
    return [TokenizedExample(ids, targets) for ids in sequences], min(space) < len(text_ids)


def tags(record: Record, c: Any, tokenizer: Tokenizer | None = None) -> Pieces:
    """Returns the words, a list in the field that `template` names."""
    values = field(record, next(iter(template_fields(c.template)), ""), "template")
    if not isinstance(values, list):
        raise DataError(f"{record.where} has words that are not a list, which data.examples.form=tags needs")
    words = [as_text(word, record, "words") for word in values]
    return [(f" {word}" if i else word, False) for i, word in enumerate(words)]


def tokenize_tags(record: Record, c: Any, tokenizer: Tokenizer, max_length: int) -> tuple[list[TokenizedExample], bool]:
    """Tokenizes words; the label of a word is at its first id, and its other ids have weight 0.

    Raises:
      DataError: there are not as many labels as words.
    """
    words, word_labels = tags(record, c), field(record, c.label, "label")
    if not isinstance(word_labels, list) or len(word_labels) != len(words):
        raise DataError(f"{record.where} has {len(words)} words, and {c.label!r} is not a list of as many labels")
    ids, labels, weights = list[int](), list[int](), list[int]()
    for (word, _), label in zip(words, word_labels, strict=True):
        word_ids = encode(tokenizer, word)
        number = c.labels.index(match_label(label, record, c))
        ids, labels = ids + word_ids, labels + [number] * len(word_ids)
        weights = weights + [1, *[0] * len(word_ids)][: len(word_ids)]
    arrays = {"labels_BT": np.array(labels, np.int32), "weights_BT": np.array(weights, np.float32)}
    example = truncate(TokenizedExample(ids, arrays), max_length)
    return ([example] if example.arrays["weights_BT"].any() else []), len(ids) > max_length


def tokenize_span(record: Record, c: Any, tokenizer: Tokenizer, max_length: int) -> tuple[list[TokenizedExample], bool]:
    """Tokenizes a question and a passage; one that is too long loses its end, and is dropped with its answer.

    The answer begins at character `label`, from 0, of `second`, and its text is `answer`.

    Raises:
      DataError: the answer is not there, or the ids do not decode to the bytes of the passage.
    """
    question, passage = fill_template(c.template, record, "template"), fill_template(c.second, record, "second")
    answer_text, start = fill_template(c.answer, record, "answer"), field(record, c.label, "label")
    if (
        type(start) is not int
        or start < 0
        or not answer_text
        or passage[start : start + len(answer_text)] != answer_text
    ):
        raise DataError(
            f"{record.where}: the answer {answer_text!r} does not begin at {start!r} of data.examples.second"
        )
    ids = encode(tokenizer, passage)
    ends = np.cumsum([len(tokenizer.decode_single_token_bytes(token)) for token in ids])
    if not len(ends) or ends[-1] != len(passage.encode()):
        raise DataError(
            f"the tokenizer {tokenizer.name} does not keep a text's bytes, which data.examples.form=spans needs"
        )
    first, last = len(passage[:start].encode()), len(passage[: start + len(answer_text)].encode()) - 1
    joined = join_texts([(question, False), (passage, False)], tokenizer)
    span = len(joined.ids) - len(ids) + np.searchsorted(ends, [first, last], side="right")
    if span[1] >= max_length:
        return [], True
    arrays = {"spans_B2": span.astype(np.int32), "weights_B": np.array(1, np.float32)}
    example = truncate(joined, max_length)
    return [example._replace(arrays=example.arrays | arrays)], len(joined.ids) > max_length


def with_placeholder_answer(record: Record, c: Any) -> Record:
    """Adds a placeholder answer to a record, so that it can be tokenized; replaces that of spans."""
    placeholder: dict[str, Any]
    if c.form == "tags":
        placeholder = {c.label: [c.labels[0]] * len(tags(record, c))}
    elif c.form == "spans":
        first_letter = fill_template(c.second, record, "second")[:1]
        placeholder = dict.fromkeys(template_fields(c.answer), first_letter) | {c.label: 0}
    else:
        placeholder = {c.label: c.labels[0] if c.labels else 0}
    return record._replace(fields=record.fields | placeholder)


TASK_FORMATS: dict[str, TaskFormat] = {
    "text": generation_format(text, lambda c: template_fields(c.template)),
    "instructions": generation_format(instructions, lambda c: ["instruction", "input"]),
    "chat": TaskFormat(
        dialogue, tokenize_dialogue, notes=lambda record, c, tokenizer: read_dialogue(record, c, tokenizer).notes
    ),
    "classes": labelled_format("labels_B", label_id, "i4", "classification", True),
    "values": labelled_format("values_B", value_of, "f4", "regression", False),
    "choices": TaskFormat(choices, tokenize_choices, ("labels_B", "weights_B"), "choice"),
    "tags": TaskFormat(tags, tokenize_tags, ("labels_BT", "weights_BT"), "tagging", True),
    "spans": TaskFormat(labelled_text, tokenize_span, ("spans_B2", "weights_B", "types_BT"), "span"),
}
