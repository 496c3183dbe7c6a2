"""Examples of a task: records with named fields; which of them are learnt from, and their ids.

Files are read by gptjax.data.records. How a record is read and what is learnt of it is gptjax.data.task_formats' part;
rows of a batch are gptjax.data.layouts'.
"""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.errors import DataError
from gptjax.core import console
from gptjax.data import dialogues, fields, pairs, records, sources, streams, task_formats, token_sets
from gptjax.data.dialogues import Note
from gptjax.data.records import Record, RecordOptions
from gptjax.data.sources import Corpus, Document
from gptjax.data.task_formats import TASK_FORMATS, TaskFormat, TokenizedExample
from gptjax.data.token_sets import Delimiters, Part, TokenSet
from gptjax.data.tokenizers.tokenizers import Tokenizer

# What files of a split may be called; any other split by its own name.
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
EXTENSIONS = ("jsonl", "json", "csv", "tsv", "parquet", "ndjson")


def read(config: Any, split: str) -> list[Record]:
    """The records of a split of what `config` (a run's `config.data`) names.

    A directory has a file for each split; a single file, or a directory without one for "val", is divided by hash of
    the record. Of "train", as many of each label as `examples.shots` says are drawn, if it says so.

    Args:
      config: `config.data`.
      split: "train", "val", "test", or what another file is called.

    Raises:
      ConfigError: pyarrow is not installed, and a file needs it.
      DataError: nothing there, a file that cannot be read, or fewer of a label than are asked for.
    """
    if not config.path:
        raise DataError("--config.data.path is empty; give a file of examples, or a directory of train, val and test")
    path, names = Path(config.path), tuple(config.examples.fields)
    if not path.exists():
        raise DataError(f"there is no {path}")
    file_of_split = _file_of(path, split) if path.is_dir() else None
    if file_of_split:
        needs_split = split == "train" and not _file_of(path, "val")
    else:
        file_of_split, needs_split = (_file_of(path, "train") if path.is_dir() else path), True
        if file_of_split is None or split not in ("train", "val"):
            there = ", ".join(sorted(file.name for file in path.iterdir())) if path.is_dir() else path.name
            raise DataError(f"{path} has no examples for {split!r}; there is {there or 'nothing'}")
    result = list(records.read(file_of_split, RecordOptions(names)))
    if needs_split:
        result = [
            record for record in result if sources.is_held_out(_to_json(record), config.held_out) == (split != "train")
        ]
    if not result:
        raise DataError(f"{file_of_split} has no examples for {split!r}")
    return sample_per_label(result, config.examples) if split == "train" and config.examples.shots else result


def _file_of(folder: Path, split: str) -> Path | None:
    names = [
        f"{name}.{suffix}{packed}"
        for name in SPLITS.get(split, (split,))
        for suffix in EXTENSIONS
        for packed in ("", *(f".{name}" for name in streams.COMPRESSED))
    ]
    return next((folder / name for name in names if sources.exists(folder / name)), None)


def _to_json(record: Record) -> str:
    try:
        return json.dumps(record.fields, sort_keys=True, ensure_ascii=False, default=str)
    except RecursionError as error:
        raise DataError(f"{record.where} is nested too deeply") from error


def sample_per_label(examples: Sequence[Record], options: Any) -> list[Record]:
    """`options.shots` records of each label, or of all where there are no labels, drawn by `options.shot_seed`.

    Raises:
      DataError: there are fewer.
    """
    by_label: dict[str, list[Record]] = {label: [] for label in options.labels} or {"": []}
    for example in examples:
        label = fields.label_of(example, options) if options.labels else ""
        by_label[label].append(example)
    sampled = list[Record]()
    for label, candidates in by_label.items():
        if len(candidates) < options.shots:
            condition = f" with the label {label!r}" if label else ""
            raise DataError(f"data.examples.shots={options.shots}, and there are {len(candidates)} examples{condition}")
        order = np.random.default_rng(options.shot_seed).permutation(len(candidates))[: options.shots]
        sampled += [candidates[i] for i in sorted(order)]
    return sampled


def texts(config: Any, examples: Sequence[Record]) -> list[str]:
    """The text of each record, as a tokenizer is trained on it."""
    form = TASK_FORMATS[config.examples.form]
    return ["".join(piece for piece, _ in form.pieces(example, config.examples, None)) for example in examples]


def corpus(train: Sequence[Record], held_out: Sequence[Record]) -> Corpus:
    """Both sides as documents, for `gptjax.data.sources.fingerprint`."""
    return Corpus(
        *([Document(str(i), _to_json(record)) for i, record in enumerate(side)] for side in (train, held_out))
    )


def to_token_set(tokenizer: Tokenizer, examples: Sequence[Record], config: Any, label: str, name: str) -> TokenSet:
    """The records as a token set in memory, with what is learnt of each (`TokenSet.arrays`).

    Args:
      tokenizer: that texts are encoded with.
      found: records.
      config: `config.data`, resolved; what is longer than its context is dealt with as `examples.too_long` says.
      label: of the progress bar.
      name: of the set, for messages.

    Raises:
      DataError: a record lacks a field, has a label that is not known, or is too long and that is refused.
    """
    if config.layout == "pairs":
        return pairs.to_token_set(
            tokenizer, [task_formats.to_pair(example, config.examples) for example in examples], label, name
        )
    c, form = config.examples, TASK_FORMATS[config.examples.form]
    delimiters = token_sets.delimiters_of(tokenizer)
    if form.objective:  # what follows a text is not read where no next token is asked for
        delimiters = delimiters._replace(closing=())
    max_length = config.context + (not form.objective) - sum(map(len, delimiters))
    result, over_length, empty, notes = list[list[TokenizedExample]](), list[Record](), 0, Counter[Note]()
    with console.bar(label, len(examples)) as advance:
        for example in examples:
            tokenized, is_long = form.tokenize(example, c, tokenizer, max_length)
            notes.update(form.notes(example, c, tokenizer))
            over_length += [example] if is_long else []
            empty += not (tokenized or is_long)
            result += [tokenized] if tokenized and not (is_long and c.too_long == "leave_out") else []
            advance(1)
    if over_length:
        _report_long(over_length, examples, config, name)
    for note, count in notes.items():
        console.say(f"examples   {count:,} {note.unit}{'s'[: count > 1]} of {name} {note.what}")
    if empty:
        console.say(f"examples   {empty:,} of {len(examples):,} of {name} are without text or answer and are left out")
    if not result:
        reason = dialogues.missing_assistant_reason(examples) if c.form == "chat" else ""
        message = f"{name}: nothing is left of {len(examples):,} examples"
        raise DataError(f"{message}; {reason}" if reason else f"{message} within data.context={config.context} tokens")
    if len({len(choices) for choices in result}) > 1:
        raise DataError(f"{name}: some have {len(result[0])} choices and others more or fewer; all need as many")
    return _to_token_set(result, delimiters, form, name, delimiters.prefix if tokenizer.prompt else ())


def _report_long(over_length: Sequence[Record], examples: Sequence[Record], config: Any, name: str) -> None:
    summary = f"{len(over_length):,} of {len(examples):,} of {name} are longer than {config.context} tokens"
    c = config.examples
    if c.too_long == "refuse":
        raise DataError(
            f"{summary} (data.context), the first in {over_length[0].where}; data.examples.too_long=cut shortens them"
        )
    console.say(f"examples   {summary} and are {'cut' if c.too_long == 'cut' else 'left out'}")


def _to_token_set(
    groups: list[list[TokenizedExample]],
    delimiters: Delimiters,
    form: TaskFormat,
    name: str,
    repeated_prefix: Sequence[int],
) -> TokenSet:
    examples = [example for group in groups for example in group]
    sequences = [np.array([*delimiters.prefix, *example.ids, *delimiters.suffix], np.int32) for example in examples]
    arrays = dict[str, np.ndarray]()
    for key in form.arrays:
        if key.endswith("_BT"):
            arrays[key] = np.concatenate(
                [_with_delimiters(key, example, delimiters, not form.objective) for example in examples]
            )
        else:
            arrays[key] = np.stack([group[0].arrays[key] for group in groups])
    if "spans_B2" in arrays:
        arrays["spans_B2"] = arrays["spans_B2"] + len(delimiters.prefix)
    ends_M = np.cumsum([len(ids) for ids in sequences], dtype=np.int64)
    prompts_M = np.full(len(sequences), len(delimiters.prefix))  # of which none is predicted
    return TokenSet(
        [Part(np.concatenate(sequences), ends_M, prompts_M)],
        delimiters.closing,
        name,
        arrays,
        len(groups[0]),
        repeated_prefix,
    )


def _with_delimiters(key: str, example: TokenizedExample, delimiters: Delimiters, in_loss: bool) -> np.ndarray:
    """An array of a number an id, with those of what stands around a text.

    Weights of what is learnt become those of the position that predicts it, one before.
    """
    array, before, after = example.arrays[key], len(delimiters.prefix), len(delimiters.suffix)
    if key == "types_BT":
        return np.pad(array, (before, after), mode="edge")
    if not in_loss:
        return np.pad(array, (before, after))
    weights = np.concatenate([np.zeros(before), array, np.full(after or 1, example.ends)]).astype(np.float32)
    return weights[1:] if not after else np.append(weights[1:], np.float32(0))


def balance_labels(tokens: TokenSet) -> TokenSet:
    """The set with labels' weights such that all of them weigh the same together, and a text 1 on average."""
    labels_M = tokens.arrays["labels_B"]
    counts = np.bincount(labels_M)
    weights_M = len(labels_M) / (np.count_nonzero(counts) * counts[labels_M])
    arrays = tokens.arrays | {"weights_B": weights_M.astype(np.float32)}
    return TokenSet(
        tokens.document_parts(), tokens.closing, tokens.name, arrays, tokens.choices_per_row, tokens.repeated_prefix
    )


def check_labels(examples: Sequence[Record], config: Any) -> None:
    """Raises DataError where a label that `examples.labels` names is none of a text to learn from."""
    c = config.examples
    if c.form == "classes":
        present = {fields.label_of(example, c) for example in examples}
        if missing := [label for label in c.labels if label not in present]:
            raise DataError(
                f"{config.path} has no example to learn the label {missing[0]!r} of data.examples.labels from"
            )
