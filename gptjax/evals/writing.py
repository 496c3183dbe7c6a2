"""Evaluation of generated answers against references: ROUGE, by the rouge-score library.

The baseline is to copy the first sentences of the text.
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

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
LEAD_SENTENCES = 3


def evaluate(run: "Run", split: str = "val", files: Sequence[Path] = (), rows: int = 16) -> dict[str, Any]:
    """Evaluates the ROUGE of a run's answers for the examples of a split, or of files; writes the answers to a file.

    Args:
      run: a decoder, or an encoder-decoder, that was trained to write answers (form "text" or "instructions").
      split: split of its examples.
      files: instead of a split.
      rows: number of answers in a batch.

    Returns:
      rouge1, rouge2 and rougeL, F-measures in percent, means over examples (aclanthology.org/W04-1013); the same of the
      first three sentences of the template's first field, as lead3_...; examples, and file.

    Raises:
      ConfigError: the run was not trained to write answers, or rouge-score is not installed.
      DataError: there is no such split, or records lack a field.
    """
    scorer, c = _scorer(), run.config.data
    if c.examples.form not in ("text", "instructions") or models.kind(run.model) == "encoder":
        raise ConfigError(
            f"{run.workdir} was not trained to write answers: its data.examples.form is {c.examples.form!r}"
        )
    options = RecordOptions(tuple(c.examples.fields))
    inputs = [record for path in files for record in records.read(path, options)] or examples.read(c, split)
    references = [task_formats.to_pair(record, c.examples).target for record in inputs]
    texts = write_answers(run, inputs, rows)
    metrics = rouge(scorer, texts, references)
    name = next(iter(fields.template_fields(c.examples.template)), "") if c.examples.form == "text" else "input"
    leads = [lead_sentences(fields.as_text(record.fields.get(name, ""), record, name)) for record in inputs]
    metrics |= {f"lead{LEAD_SENTENCES}_{kind}": value for kind, value in rouge(scorer, leads, references).items()}
    file = run.workdir / f"written_{split if not files else files[0].stem}.jsonl"
    lines = [
        json.dumps({"written": text, "right": reference}, ensure_ascii=False)
        for text, reference in zip(texts, references, strict=True)
    ]
    write_atomic(file, "\n".join(lines) + "\n")
    return metrics | {"examples": len(inputs), "file": str(file)}


def write_answers(run: "Run", inputs: Sequence[Record], rows: int = 16) -> list[str]:
    """Decodes an answer for each record, greedily. Prompts are shortened to half of data.context."""
    c, prefix = run.config.data, token_sets.delimiters_of(run.tokenizer).prefix
    prompt_length = c.context // 2
    params = SamplingParams(max_tokens=c.context - prompt_length, temperature=0.0)
    requests = []
    for record in inputs:
        prompt = prompt_ids(record, c.examples, run.tokenizer, prompt_length - len(prefix))
        is_decoder = models.kind(run.model) == "decoder"
        ids = (*prefix, *prompt) if is_decoder else (*run.tokenizer.begin, *prompt, *_end(run))
        requests.append(decoding.Request(ids, params, jax.random.key(0)))
    order = sorted(range(len(requests)), key=lambda number: len(requests[number].prompt))
    texts = [""] * len(requests)
    with console.bar("writing", len(requests)) as advance:
        for index, sample in run.generate_batch(
            [requests[number] for number in order], decoding.GenerationConfig(batch_size=rows)
        ):
            texts[order[index]] = sample.text.strip()
            advance(1)
    return texts


def _end(run: "Run") -> tuple[int, ...]:
    return () if run.tokenizer.end is None else (run.tokenizer.end,)


def prompt_ids(record: Record, options: Any, tokenizer: Any, max_length: int) -> list[int]:
    """Encodes a record's prompt, all that comes before its answer, shortened to `max_length` ids as examples are."""

    def encode(record: Record) -> list[int]:
        prompt = (
            piece for piece, is_target in TASK_FORMATS[options.form].pieces(record, options, None) if not is_target
        )
        return tokenizers.encode(tokenizer, "".join(prompt))

    names = fields.template_fields(options.template) if options.form == "text" else ["instruction", "input"]
    short, _ = task_formats.shorten_fields(record, names, lambda record: len(encode(record)), max_length)
    return encode(short)[:max_length]


def lead_sentences(text: str) -> str:
    """Returns the first sentences of a text."""
    return " ".join(re.split(r"(?<=[.!?])\s+", text.strip())[:LEAD_SENTENCES])


def rouge(scorer: Any, texts: Sequence[str], references: Sequence[str]) -> dict[str, float]:
    """Computes the mean ROUGE F-measures of texts, in percent."""
    scores = [scorer.score(reference, text) for text, reference in zip(texts, references, strict=True)]
    return {kind: 100 * sum(one[kind].fmeasure for one in scores) / len(scores) for kind in ROUGE_TYPES}


def _scorer() -> Any:
    try:
        from rouge_score import rouge_scorer
    except ImportError as error:
        raise ConfigError("ROUGE needs rouge-score: pip install 'gptjax[summaries]'") from error
    return rouge_scorer.RougeScorer(ROUGE_TYPES, use_stemmer=True)
