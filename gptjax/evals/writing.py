"""What a run writes for examples, and how much of the right answer is in it: ROUGE, by the rouge-score library.

Beside it stands what copying the first sentences of the text gives.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.core import console
from gptjax.core.files import write_atomic
from gptjax.data import examples, fields, records, task_formats, token_sets
from gptjax.data.records import Record, RecordOptions
from gptjax.data.task_formats import TASK_FORMATS
from gptjax.data.tokenizers import tokenizers
from gptjax.decode import generate as decoding
from gptjax.decode.settings import SamplingParams

if TYPE_CHECKING:
    from gptjax.runs.run import Run

KINDS = ("rouge1", "rouge2", "rougeL")
LEAD = 3  # sentences


def evaluate(of: "Run", split: str = "val", files: Sequence[Path] = (), rows: int = 16) -> dict[str, Any]:
    """ROUGE of what a run writes for the examples of a split, or of files, and writes down what that was.

    Args:
      of: a decoder, or an encoder-decoder, that learnt to write answers (form "text" or "instructions").
      split: of its examples.
      files: instead of a split.
      rows: texts that are written at once.

    Returns:
      rouge1, rouge2 and rougeL, F-measures in percent, means over examples (aclanthology.org/W04-1013); the same of the
      first three sentences of the first field that the template has, as lead3_...; examples, and file.

    Raises:
      ConfigError: the run learnt no answers by writing, or rouge-score is not installed.
      DataError: no such split, or records that lack a field.
    """
    scorer, c = _scorer(), of.config.data
    if c.examples.form not in ("text", "instructions") or models.kind(of.model) == "encoder":
        raise ConfigError(f"{of.workdir} did not learn to write answers: its data.examples.form is {c.examples.form!r}")
    options = RecordOptions(tuple(c.examples.fields))
    found = [one for path in files for one in records.read(path, options)] or examples.read(c, split)
    right = [task_formats.to_pair(one, c.examples).target for one in found]
    texts = written(of, found, rows)
    figures = rouge(scorer, texts, right)
    name = next(iter(fields.template_fields(c.examples.template)), "") if c.examples.form == "text" else "input"
    leads = [lead(fields.as_text(one.fields.get(name, ""), one, name)) for one in found]
    figures |= {f"lead{LEAD}_{kind}": value for kind, value in rouge(scorer, leads, right).items()}
    file = of.workdir / f"written_{split if not files else files[0].stem}.jsonl"
    each = zip(texts, right, strict=True)
    lines = [json.dumps({"written": text, "right": answer}, ensure_ascii=False) for text, answer in each]
    write_atomic(file, "\n".join(lines) + "\n")
    return figures | {"examples": len(found), "file": str(file)}


def written(of: "Run", found: Sequence[Record], rows: int = 16) -> list[str]:
    """What a run writes for each record, greedily; half of data.context is for that, and what is longer is cut."""
    c, opening = of.config.data, token_sets.delimiters_of(of.tokenizer).opening
    room = c.context // 2
    requests = []
    for one in found:
        prompt = prompt_of(one, c.examples, of.tokenizer, room - len(opening))
        ids = (*opening, *prompt) if models.kind(of.model) == "decoder" else (*of.tokenizer.begin, *prompt, *_end(of))
        requests.append(
            decoding.Request(ids, SamplingParams(max_tokens=c.context - room, temperature=0.0), jax.random.key(0))
        )
    order = sorted(range(len(requests)), key=lambda number: len(requests[number].prompt))
    texts = [""] * len(requests)
    with console.bar("writing", len(requests)) as advance:
        for place, sample in of.answers([requests[number] for number in order], decoding.GenerationConfig(rows=rows)):
            texts[order[place]] = sample.text.strip()
            advance(1)
    return texts


def _end(of: "Run") -> tuple[int, ...]:
    return () if of.tokenizer.end is None else (of.tokenizer.end,)


def prompt_of(record: Record, options: Any, tokenizer: Any, room: int) -> list[int]:
    """The ids of what is read of a record before its answer, shortened to that room as an example is."""

    def ids_of(record: Record) -> list[int]:
        read = (piece for piece, learnt in TASK_FORMATS[options.form].pieces(record, options, None) if not learnt)
        return tokenizers.encode(tokenizer, "".join(read))

    names = fields.template_fields(options.template) if options.form == "text" else ["instruction", "input"]
    short, _ = task_formats.shorten_fields(record, names, lambda record: len(ids_of(record)), room)
    return ids_of(short)[:room]


def lead(text: str) -> str:
    """The first sentences of a text."""
    return " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[:LEAD])


def rouge(scorer: Any, texts: Sequence[str], right: Sequence[str]) -> dict[str, float]:
    """ROUGE's F-measures of texts, in percent, means over all."""
    scores = [scorer.score(answer, text) for text, answer in zip(texts, right, strict=True)]
    return {kind: 100 * sum(one[kind].fmeasure for one in scores) / len(scores) for kind in KINDS}


def _scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ConfigError("ROUGE is rouge-score's: pip install 'gptjax[summaries]'") from error
    return rouge_scorer.RougeScorer(KINDS, use_stemmer=True)
