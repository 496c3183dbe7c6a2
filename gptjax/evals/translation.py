"""How well an encoder-decoder translates: its texts for a split's sources, and BLEU and chrF against the targets.

The figures are sacrebleu's own, each with the signature by which others can repeat it.
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
from gptjax.data import layouts, pairs
from gptjax.data.augment import Augment
from gptjax.data.pairs import Pair
from gptjax.decode import generate as decoding
from gptjax.decode.beam import Beams
from gptjax.decode.settings import SamplingParams
from gptjax.evals import held_out

if TYPE_CHECKING:
    from gptjax.runs.run import Run

ROWS = 32  # sentences that are searched at once

# By sacrebleu's names: languages that write no spaces are compared by characters. All others as the WMT campaigns do.
TOKENIZE = {"zh": "zh", "ja": "char", "th": "char", "lo": "char", "km": "char", "my": "char"}


class Score(NamedTuple):
    """A figure, 0 to 100, and how sacrebleu came to it."""

    value: float
    signature: str


def scores(hypotheses: Sequence[str], references: Sequence[str], language: str) -> dict[str, Score]:
    """BLEU (P02-1040, arXiv 1804.08771) and chrF (W15-3049) of a whole test set.

    Args:
      hypotheses: translations, plain text.
      references: one for each.
      language: of both, such as "de"; Chinese is compared by characters.

    Raises:
      ConfigError: sacrebleu is not installed.
    """
    check_installed()
    from sacrebleu.metrics import BLEU, CHRF

    base = language.lower().replace("-", "_").split("_")[0]
    found = {}
    for name, metric in (("bleu", BLEU(tokenize=TOKENIZE.get(base, "13a"))), ("chrf", CHRF())):
        score = metric.corpus_score(list(hypotheses), [list(references)])
        found[name] = Score(score.score, str(metric.get_signature()))
    return found


def check_installed() -> None:
    """Raises ConfigError where sacrebleu is not there; for those who decode for minutes before they need it."""
    try:
        import sacrebleu  # noqa: F401
    except ImportError as error:
        raise ConfigError("BLEU and chrF are sacrebleu's: pip install 'gptjax[translation]'") from error


def check_translates(of: "Run") -> None:
    """Raises ConfigError for a run that cannot be asked to translate."""
    if models.kind(of.model) != "seq2seq":
        raise ConfigError(
            f"{of.workdir} cannot translate: its model ({of.config.model.arch}) has no encoder; "
            "configs/translate.py trains one that has"
        )
    if not of.config.data.languages:
        raise ConfigError(
            f"{of.workdir} was not trained on parallel text (data.languages), so there is none to test on"
        )


def translated(of: "Run", sources: Sequence[str], beams: Beams, rows: int = ROWS) -> list[str]:
    """A translation of each source, by beam search; of one beam: greedy. Sources that are too long are cut.

    Args:
      of: an encoder-decoder.
      sources: plain text.
      beams: how to search.
      rows: how many are searched at once.
    """
    context = of.config.data.context
    requests = []
    for source in sources:
        ids = pairs.source_ids(of.tokenizer, source)
        whole = ids if len(ids) <= context else [*ids[: context - 1], ids[-1]]
        requests.append(decoding.Request(tuple(whole), SamplingParams(max_tokens=context), jax.random.key(0)))
    # Those of like lengths together: fewer shapes are compiled, and little is padded.
    order = sorted(range(len(requests)), key=lambda number: len(requests[number].prompt))
    found = [""] * len(requests)
    generation = decoding.GenerationConfig(rows=rows, beams=beams)
    with console.bar("translating", len(requests)) as advance:
        for place, sample in of.answers([requests[number] for number in order], generation):
            found[order[place]] = " ".join(sample.text.split())
            advance(1)
    return found


def evaluate(
    of: "Run", split: str = pairs.HELD_OUT, files: Sequence[Path] = (), beams: Beams | None = None
) -> dict[str, Any]:
    """Loss, BLEU and chrF of a run on a split of its parallel text, or on two files; writes what it translated.

    Args:
      of: an encoder-decoder that was trained on parallel text.
      split: such as "val" or "test_2016_flickr".
      files: instead of a split: of sources and of their translations.
      beams: how to search; None: 4 beams, scores divided by length.

    Returns:
      The figures of `held_out.quality_of`, and bleu, chrf, their signatures, split, sentences, beams, length_penalty,
      seconds (of translating) and file: the translations, a line each, in the run's directory.

    Raises:
      ConfigError: no encoder-decoder, or no sacrebleu.
      DataError: no such split, or files that are not alike.
    """
    check_translates(of)
    check_installed()
    config, beams = of.config.data, beams or Beams()
    beams.check()
    if files and len(files) != 2:
        raise ConfigError(f"--data has {len(files)} files; of an encoder-decoder it takes two, sources and targets")
    these = pairs.read_aligned(*files) if files else pairs.read(config, split)
    name = "-".join(path.name for path in files) if files else split
    tokens = pairs.to_token_set(of.tokenizer, these, f"encoding {name}", name)
    rows = layouts.EVAL_LAYOUTS["pairs"](tokens, config.context, 0, Augment(), _fingerprint(these))
    figures: dict[str, Any] = dict(held_out.over_rows(of, rows))
    started = time.monotonic()
    texts = translated(of, [pair.source for pair in these], beams)
    seconds = time.monotonic() - started
    for kind, score in scores(texts, [pair.target for pair in these], config.languages[1]).items():
        figures |= {kind: score.value, f"{kind}_signature": score.signature}
    file = of.workdir / f"translations_{name}.txt"
    write_atomic(file, "".join(text + "\n" for text in texts))
    return figures | {
        "split": name,
        "sentences": len(these),
        "beams": beams.beams,
        "length_penalty": beams.length_penalty,
        "seconds": round(seconds, 1),
        "file": str(file),
    }


def _fingerprint(these: Sequence[Pair]) -> str:
    from gptjax.data.sources import fingerprint

    return fingerprint(pairs.corpus(these, []))


def as_text(figures: dict[str, Any]) -> str:
    """The figures, for a person."""
    return f"""loss            {figures["loss"]:.4f} nats per token
BLEU            {figures["bleu"]:.2f}   {figures["bleu_signature"]}
chrF            {figures["chrf"]:.2f}   {figures["chrf_signature"]}
over            {figures["sentences"]:,} sentences of {figures["split"]}, {figures["beams"]} beams, \
length penalty {figures["length_penalty"]:g}, {figures["seconds"]:.0f} s
translations    {figures["file"]}"""
