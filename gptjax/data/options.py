"""Options of `config.data`."""

from dataclasses import dataclass
from typing import Any

from gptjax.config.options import option, section


@dataclass(frozen=True)
class ExamplesOptions:
    """`config.data.examples`: records with fields at data.path: .jsonl, .json, .csv, .tsv or .parquet, or a directory with train, val (dev) and test."""

    form: str = option(
        "",
        "text, instructions (Alpaca) or chat; for task heads: classes, values, choices, tags or spans",
    )
    template: str = option("{text}", "input text, with the fields of the record in braces")
    second: str = option("", "template of a second input text; spans: of the text that contains the answer")
    answer: str = option(
        "{label}",
        "text: template of the completion to learn; \"\": learn the template; spans: template of the answer",
    )
    label: str = option("label", "field of the class, value, tags or correct choice; spans: of the answer's start")
    labels: tuple[Any, ...] = option(
        (),
        "classes and tags: label names in the data, model.labels of them, in the order of the head",
    )
    choices: str = option("choices", "field of the list of choices")
    fields: tuple[Any, ...] = option((), "column names of a .csv or .tsv file without a header")
    chat_template: str = option("plain", "chat: plain, chatml, llama3 or the path of a Jinja template")
    too_long: str = option(
        "cut",
        "examples longer than data.context: cut, leave_out or refuse; their number is reported",
    )
    balanced: bool = option(False, "weight labels equally, whatever their number of examples")
    shots: int = option(0, "number of training examples per label, or in total if there are no labels; 0: all")
    shot_seed: int = option(0, "seed of the choice of shots", most=4294967295)


@dataclass(frozen=True)
class AugmentOptions:
    """`config.data.augment`: fractions of training tokens that are changed, sampled anew each epoch (arXiv 1901.11196)."""

    insert: float = option(0.0, "followed by a random token of the data set", most=1)
    delete: float = option(0.0, "deleted", most=1)
    swap: float = option(0.0, "swapped with another token", most=1)
    replace: float = option(0.0, "replaced by a random token of the data set", most=1)


@dataclass(frozen=True)
class DataOptions:
    """`config.data`: ."""

    source: str = option(
        "stdlib",
        "key of gptjax.data.sources.SOURCES: Python's standard library, or \"text\", which data.path sets",
    )
    path: str = option("", "file, directory of .txt files, glob, http(s) address or prepared data set")
    mixture: tuple[Any, ...] = option(
        (),
        "instead of path: prepared sets and their weights, ((path, weight), ...); None: their number of "
        "tokens",
    )
    temperature: float = option(
        1.0,
        "mixture: weights are raised to 1 / temperature; above 1 they are more even",
        above=0,
    )
    sha256: str = option("", "expected hash of the file at an http(s) address; \"\": not checked")
    held_out: float = option(
        0.05,
        "validation fraction, by the hash of file names; with few files the end of the text",
        above=0,
        below=1,
    )
    tokenizer: str = option(
        "bpe:4096",
        "bytes, chars, bpe:N (trained on the text) or a tiktoken name; a prepared set has its own",
    )
    layout: str = option(
        "flat",
        "flat (windows of the token stream), packed (whole documents), examples (one document a row) or pairs "
        "(encoder-decoder: prompts as sources and completions as targets)",
    )
    languages: tuple[Any, ...] = option(
        (),
        "parallel text at data.path: source and target, such as (\"en\", \"de\"), as in the file names",
    )
    columns: tuple[Any, ...] = option(
        (0, 1),
        "parallel text in one table without a header: indices of the source and target columns",
    )
    examples: ExamplesOptions = section(ExamplesOptions, "records with fields at data.path: .jsonl, .json, .csv, .tsv or .parquet, or a directory with train, val (dev) and test")
    seed: int | None = option(
        None,
        "seed of the order and the random choices of batches; None: same as config.seed",
        most=4294967295,
    )
    batch_size: int = option(16, "sequences per optimizer step over all devices", above=0)
    context: int | None = option(
        None,
        "tokens per sequence, at most model.context; None: same as model.context",
        above=0,
    )
    augment: AugmentOptions = section(AugmentOptions, "fractions of training tokens that are changed, sampled anew each epoch (arXiv 1901.11196)")
    prefetch: int = option(2, "batches prepared ahead in threads; 0: none", most=1000)
    stages: tuple[Any, ...] = option(
        (),
        "curriculum before batch_size and context apply: ((steps, batch_size, context), ...)",
    )
