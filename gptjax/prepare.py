"""python -m gptjax.prepare --input=DIR --output=SET --tokenizer=bpe:8192: tokenizes text into shards.

Parses the flags, calls gptjax.data.prepare.pipeline, and prints its report. The same command resumes an interrupted
preparation.
"""

import argparse
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gptjax.config.errors import ConfigError, Interrupted
from gptjax.core import arguments

if TYPE_CHECKING:
    from gptjax.data.prepare.pipeline import Settings

MOST_WORKERS, MOST_BYTES = 1000, 1e18
DESCRIPTION = """Tokenizes text into shards that training reads with --config.data.path=SET.

Reads .txt .json .jsonl .csv .tsv .parquet, and .gz or .zst of text; the same flags resume an interrupted preparation;
--verify=SET verifies the checksums of a set."""


def main(argv: Sequence[str]) -> None:
    """Runs the command."""
    flags = parser().parse_args(argv)
    if flags.verify:
        from gptjax.data import shards

        count = shards.verify(flags.verify)
        print(json.dumps({"verified": count}) if flags.json else f"{count} files are as they were written")
        return
    if not flags.input or not flags.output:
        raise ConfigError("--input and --output are needed (--help lists the flags)")
    from gptjax.data.prepare import pipeline, report

    workers = flags.workers or os.cpu_count() or 1
    try:
        summary = pipeline.prepare(settings(flags), flags.output, workers, flags.restart)
    except KeyboardInterrupt as error:
        raise Interrupted.after(error, "interrupted; the same command resumes after the newest shard") from None
    if flags.json:
        print(json.dumps(summary))
        return
    print("\n".join(report.table(summary)))
    path = shlex.quote(str(flags.output))
    print(f"\ntrain with      python -m gptjax.train --config=configs/base.py --config.data.path={path}")


def parser() -> arguments.Parser:
    """Returns the parser of the flags."""
    from gptjax.data.formats import FORMATS, ReadOptions
    from gptjax.data.prepare.cleaning import NAMES, CleaningOptions
    from gptjax.data.prepare.pipeline import Settings

    reading, options, defaults = ReadOptions(), CleaningOptions(), Settings._field_defaults
    result = arguments.Parser(prog="python -m gptjax.prepare", description=DESCRIPTION)
    add, number = result.add_argument, arguments.number
    add("--input", nargs="+", default=[], metavar="PATH", help="files, directories, globs")
    add("--output", type=Path, metavar="SET", help="folder of the prepared set, which must not exist")
    add(
        "--tokenizer",
        default="bpe:8192",
        help="bytes, chars, bpe:N (trained on the text), tiktoken's, or a run's folder",
    )
    held_out = "fraction of documents held out for validation, by hash of the text (%(default)s)"
    add("--held_out", type=number(float), default=0.05, help=held_out)
    add("--clean", default="nfc,control", metavar="STEPS", help=f"in order, of {','.join(NAMES)} (%(default)s)")
    add("--workers", type=number(most=MOST_WORKERS), default=0, help="processes; default: one per processor")
    add("--shard_tokens", type=_amount, default=defaults["shard_tokens"], metavar="N", help="tokens per shard (100M)")
    add("--restart", action="store_true", help="discard an unfinished preparation with other flags")
    add("--verify", type=Path, metavar="SET", help="only verify the checksums of a set")
    add = result.add_argument_group("documents in files").add_argument
    add("--format", choices=FORMATS, default="", help="format of all files; default: by their names")
    add("--text_key", default=reading.text_key, help="field of the text, or number of its column (%(default)s)")
    add("--prompt_key", default="", help="for pairs: fields of the prompt, separated by commas")
    add("--prompt_ending", type=_unescaped, default=reading.prompt_ending, help="between prompt and text (a newline)")
    add("--separator", type=_unescaped, default="", help="for .txt: line that separates documents")
    add("--document_start", default="", metavar="REGEX", help="for .txt: lines that begin a document")
    add("--max_document", type=_amount, default=reading.max_document, metavar="BYTES", help="largest size (256M)")
    sample = "bytes of text that a tokenizer is trained on (100M)"
    add("--tokenizer_bytes", type=_amount, default=defaults["tokenizer_bytes"], metavar="N", help=sample)
    add = result.add_argument_group("options of cleaning steps").add_argument
    add("--min_words", type=number(), default=options.min_words, help="length: fewest words (%(default)s)")
    add("--max_words", type=number(), default=options.max_words, help="length: most words (%(default)s)")
    add("--keep_scripts", type=_names, default=(), help="script: scripts to keep, such as latin,han")
    add("--drop_scripts", type=_names, default=(), help="script: scripts to drop")
    add("--blocklist", default="", metavar="FILE", help="blocklist: file with one term per line")
    evaluation = "decontaminate: evaluation data that must not be trained on"
    add("--evaluation", nargs="*", default=[], metavar="FILE", help=evaluation)
    similarity = "near: Jaccard similarity of duplicates (%(default)s)"
    add("--near_threshold", type=number(float), default=options.near_threshold, help=similarity)
    return result


def settings(flags: argparse.Namespace) -> "Settings":
    """Returns the settings of gptjax.data.prepare.pipeline for the flags.

    Raises:
      ConfigError: a value is invalid.
    """
    from gptjax.data.formats import ReadOptions
    from gptjax.data.prepare.cleaning import CleaningOptions
    from gptjax.data.prepare.documents import Task
    from gptjax.data.prepare.pipeline import Settings

    if not 0 <= flags.held_out < 1:
        raise ConfigError(f"--held_out={flags.held_out} must be at least 0 and less than 1")
    for name in ("shard_tokens", "max_document"):
        if getattr(flags, name) < 1:
            raise ConfigError(f"--{name} must be at least 1")
    if flags.workers < 0:
        raise ConfigError(f"--workers={flags.workers} cannot be negative")
    try:
        re.compile(flags.document_start)
    except re.error as error:
        raise ConfigError(f"--document_start is not a regular expression: {error}") from error
    reading = ReadOptions(**{name: getattr(flags, name) for name in ReadOptions._fields})
    options = CleaningOptions(
        min_words=flags.min_words,
        max_words=flags.max_words,
        keep_scripts=flags.keep_scripts,
        drop_scripts=flags.drop_scripts,
        blocklist=flags.blocklist,
        evaluation=tuple(flags.evaluation),
        near_threshold=flags.near_threshold,
    )
    task = Task(reading, _names(flags.clean), options, flags.held_out)
    return Settings(tuple(flags.input), flags.tokenizer, task, flags.shard_tokens, flags.tokenizer_bytes)


def _names(text: str) -> tuple[str, ...]:
    return tuple(name.strip() for name in text.split(",") if name.strip())


def _unescaped(text: str) -> str:
    return text.replace("\\n", "\n").replace("\\t", "\t")


def _amount(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([KMG]?)B?", text.strip(), re.IGNORECASE)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount such as 500000, 100M or 2G")
    amount = float(match[1]) * 1000 ** " KMG".index(match[2].upper() or " ")
    if amount > MOST_BYTES:
        raise argparse.ArgumentTypeError(f"it must be at most {MOST_BYTES:g}, not {text[:40]}")
    return int(amount)


if __name__ == "__main__":
    arguments.run(main)
