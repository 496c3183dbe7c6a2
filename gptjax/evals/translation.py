"""Evaluation of translation: translates a split's sources, and computes BLEU and chrF against the targets.

The scores are sacrebleu's, each with the signature that makes it reproducible.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.core import console
from gptjax.core.files import write_atomic
from gptjax.data import layouts, pairs, sources
from gptjax.data.augment import Augment
from gptjax.data.pairs import Pair
from gptjax.decode import generate as decoding
from gptjax.decode.beam import BeamSearchParams
from gptjax.decode.settings import SamplingParams
from gptjax.evals import held_out

if TYPE_CHECKING:
    from gptjax.runs.run import Run

ROWS = 32  # sentences in a batch of the beam search

# sacrebleu's tokenizers for languages without spaces between words; for all others the default of WMT, 13a.
TOKENIZE = {"zh": "zh", "ja": "char", "th": "char", "lo": "char", "km": "char", "my": "char"}


class Score(NamedTuple):
    """A score, 0 to 100, and its sacrebleu signature."""

    value: float
    signature: str


def scores(hypotheses: Sequence[str], references: Sequence[str], language: str) -> dict[str, Score]:
    """Computes corpus BLEU (P02-1040, arXiv 1804.08771) and chrF (W15-3049).

    Args:
      hypotheses: translations, plain text.
      references: one reference for each hypothesis.
      language: language of both, such as "de"; it chooses sacrebleu's tokenizer.

    Raises:
      ConfigError: sacrebleu is not installed.
    """
    check_installed()
    from sacrebleu.metrics import BLEU, CHRF

    base = language.lower().replace("-", "_").split("_")[0]
    results = {}
    for name, metric in (("bleu", BLEU(tokenize=TOKENIZE.get(base, "13a"))), ("chrf", CHRF())):
        score = metric.corpus_score(list(hypotheses), [list(references)])
        results[name] = Score(score.score, str(metric.get_signature()))
    return results


def check_installed() -> None:
    """Raises ConfigError if sacrebleu is not installed, before minutes of decoding."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise ConfigError("BLEU and chrF need sacrebleu: pip install 'gptjax[translation]'") from error


def check_translates(run: "Run") -> None:
    """Raises ConfigError if a run cannot translate."""
    if models.kind(run.model) != "seq2seq":
        raise ConfigError(
            f"{run.workdir} cannot translate: its model ({run.config.model.arch}) has no encoder; "
            "configs/translate.py trains one that has"
        )
    if not run.config.data.languages:
        raise ConfigError(
            f"{run.workdir} was not trained on parallel text (data.languages), so there is none to test on"
        )


def translate(run: "Run", sources: Sequence[str], beams: BeamSearchParams, rows: int = ROWS) -> list[str]:
    """Translates sources by beam search, greedily with one beam. Sources that are too long are truncated.

    Args:
      run: an encoder-decoder.
      sources: plain text.
      beams: settings of the beam search.
      rows: number of sources in a batch.
    """
    context = run.config.data.context
    requests = []
    for source in sources:
        ids = pairs.source_ids(run.tokenizer, source)
        prompt = ids if len(ids) <= context else [*ids[: context - 1], ids[-1]]
        requests.append(decoding.Request(tuple(prompt), SamplingParams(max_tokens=context), jax.random.key(0)))
    # Sorted by length: fewer shapes are compiled, and less is padded.
    order = sorted(range(len(requests)), key=lambda number: len(requests[number].prompt))
    translations = [""] * len(requests)
    generation = decoding.GenerationConfig(batch_size=rows, beams=beams)
    with console.bar("translating", len(requests)) as advance:
        for index, sample in run.generate_batch([requests[number] for number in order], generation):
            translations[order[index]] = " ".join(sample.text.split())
            advance(1)
    return translations


def evaluate(
    run: "Run", split: str = pairs.HELD_OUT, files: Sequence[Path] = (), beams: BeamSearchParams | None = None
) -> dict[str, Any]:
    """Evaluates loss, BLEU and chrF of a run on a split of its parallel text, or on two files; writes the translations.

    Args:
      run: an encoder-decoder that was trained on parallel text.
      split: such as "val" or "test_2016_flickr".
      files: instead of a split: the sources and their translations.
      beams: settings of the beam search; None: 4 beams, scores divided by length.

    Returns:
      The metrics of `held_out.evaluate`, and bleu, chrf, their signatures, split, sentences, beams, length_penalty,
      seconds (of translating) and file: the translations, one a line, in the run's directory.

    Raises:
      ConfigError: the run is no encoder-decoder, or sacrebleu is not installed.
      DataError: there is no such split, or the files differ in their number of lines.
    """
    check_translates(run)
    check_installed()
    config, beams = run.config.data, beams or BeamSearchParams()
    beams.check()
    if files and len(files) != 2:
        raise ConfigError(f"--data has {len(files)} files; of an encoder-decoder it takes two, sources and targets")
    sentence_pairs = pairs.read_aligned(*files) if files else pairs.read(config, split)
    name = "-".join(path.name for path in files) if files else split
    tokens = pairs.to_token_set(run.tokenizer, sentence_pairs, f"encoding {name}", name)
    rows = layouts.EVAL_LAYOUTS["pairs"](tokens, config.context, 0, Augment(), _fingerprint(sentence_pairs))
    metrics: dict[str, Any] = dict(held_out.evaluate_rows(run, rows))
    started = time.monotonic()
    texts = translate(run, [pair.source for pair in sentence_pairs], beams)
    seconds = time.monotonic() - started
    for kind, score in scores(texts, [pair.target for pair in sentence_pairs], config.languages[1]).items():
        metrics |= {kind: score.value, f"{kind}_signature": score.signature}
    file = run.workdir / f"translations_{name}.txt"
    write_atomic(file, "".join(text + "\n" for text in texts))
    return metrics | {
        "split": name,
        "sentences": len(sentence_pairs),
        "beams": beams.beams,
        "length_penalty": beams.length_penalty,
        "seconds": round(seconds, 1),
        "file": str(file),
    }


def _fingerprint(sentence_pairs: Sequence[Pair]) -> str:
    return sources.fingerprint(pairs.corpus(sentence_pairs, []))


def as_text(metrics: dict[str, Any]) -> str:
    """Formats the metrics as text."""
    return f"""loss            {metrics["loss"]:.4f} nats per token
BLEU            {metrics["bleu"]:.2f}   {metrics["bleu_signature"]}
chrF            {metrics["chrf"]:.2f}   {metrics["chrf_signature"]}
over            {metrics["sentences"]:,} sentences of {metrics["split"]}, {metrics["beams"]} beams, \
length penalty {metrics["length_penalty"]:g}, {metrics["seconds"]:.0f} s
translations    {metrics["file"]}"""
