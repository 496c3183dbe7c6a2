"""Examples of a task: records with named fields, their splits, and token sets of them.

gptjax.data.records reads the files, gptjax.data.task_formats turns a record into ids and loss weights, and
gptjax.data.layouts makes rows.
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

# File names of each split; any other split is called by its own name.
SPLITS = {"train": ("train",), "val": ("val", "valid", "validation", "dev"), "test": ("test",)}
EXTENSIONS = ("jsonl", "json", "csv", "tsv", "parquet", "ndjson")


def read(config: Any, split: str) -> list[Record]:
    """Reads the records of a split.

    A directory has a file for each split; a single file, or a directory without one for "val", is split by hash of the
    record. If `examples.shots` is set, that many records per label are sampled from "train".

    Args:
      config: `config.data` of a run.
      split: "train", "val", "test", or the name of another file.

    Raises:
      ConfigError: a file needs pyarrow, which is not installed.
      DataError: there is no such split, a file cannot be read, or a label has fewer than `examples.shots` records.
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
            available = ", ".join(sorted(file.name for file in path.iterdir())) if path.is_dir() else path.name
            raise DataError(f"{path} has no examples for {split!r}; there is {available or 'nothing'}")
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
    """Samples `options.shots` records per label, or in total without labels, with seed `options.shot_seed`.

    Raises:
      DataError: a label has fewer records.
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
    """Returns the text of each record, for training a tokenizer."""
    form = TASK_FORMATS[config.examples.form]
    return ["".join(piece for piece, _ in form.pieces(example, config.examples, None)) for example in examples]


def corpus(train: Sequence[Record], held_out: Sequence[Record]) -> Corpus:
    """Returns both splits as documents, for `gptjax.data.sources.fingerprint`."""
    return Corpus(
        *([Document(str(i), _to_json(record)) for i, record in enumerate(side)] for side in (train, held_out))
    )


def to_token_set(tokenizer: Tokenizer, examples: Sequence[Record], config: Any, label: str, name: str) -> TokenSet:
    """Encodes records as a token set in memory, with their loss weights or labels in `TokenSet.arrays`.

    Args:
      tokenizer: tokenizer of the run.
      examples: records.
      config: `config.data`, resolved; `examples.too_long` decides about records longer than its context.
      label: label of the progress bar.
      name: name of the set, for messages.

    Raises:
      DataError: a record lacks a field, has an unknown label, or is too long and `examples.too_long` refuses it.
    """
    if config.layout == "pairs":
        return pairs.to_token_set(
            tokenizer, [task_formats.to_pair(example, config.examples) for example in examples], label, name
        )
    c, form = config.examples, TASK_FORMATS[config.examples.form]
    delimiters = token_sets.delimiters_of(tokenizer)
    if form.objective:  # without next-token targets, the id after a text is not read
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
        console.say(f"examples   {count:,} {note.unit}{'s'[: count > 1]} of {name} {note.message}")
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
    prompts_M = np.full(len(sequences), len(delimiters.prefix))  # the prefix is not predicted
    return TokenSet(
        [Part(np.concatenate(sequences), ends_M, prompts_M)],
        delimiters.closing,
        name,
        arrays,
        len(groups[0]),
        repeated_prefix,
    )


def _with_delimiters(key: str, example: TokenizedExample, delimiters: Delimiters, in_loss: bool) -> np.ndarray:
    """Extends a per-token array to the delimiters around a text.

    Weights of learned tokens move to the position that predicts them, one earlier.
    """
    array, before, after = example.arrays[key], len(delimiters.prefix), len(delimiters.suffix)
    if key == "types_BT":
        return np.pad(array, (before, after), mode="edge")
    if not in_loss:
        return np.pad(array, (before, after))
    weights = np.concatenate([np.zeros(before), array, np.full(after or 1, example.ends)]).astype(np.float32)
    return weights[1:] if not after else np.append(weights[1:], np.float32(0))


def balance_labels(tokens: TokenSet) -> TokenSet:
    """Weights texts so that every label has the same total weight, and the mean weight is 1."""
    labels_M = tokens.arrays["labels_B"]
    counts = np.bincount(labels_M)
    weights_M = len(labels_M) / (np.count_nonzero(counts) * counts[labels_M])
    arrays = tokens.arrays | {"weights_B": weights_M.astype(np.float32)}
    return TokenSet(
        tokens.document_parts(), tokens.closing, tokens.name, arrays, tokens.choices_per_row, tokens.repeated_prefix
    )


def check_labels(examples: Sequence[Record], config: Any) -> None:
    """Raises DataError if a label of `examples.labels` has no training example."""
    c = config.examples
    if c.form == "classes":
        present = {fields.label_of(example, c) for example in examples}
        if missing := [label for label in c.labels if label not in present]:
            raise DataError(
                f"{config.path} has no example to learn the label {missing[0]!r} of data.examples.labels from"
            )
