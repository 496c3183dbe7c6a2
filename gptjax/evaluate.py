"""python -m gptjax.evaluate --workdir=runs/base: loss, perplexity and bits per byte on held-out or other text.

For a run that was trained on examples it computes loss and accuracy on any of their splits; for an encoder-decoder
trained on parallel text also BLEU and chrF. Parses the flags, calls gptjax.evals.held_out, translation or writing, and
prints the metrics.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.config.errors import ConfigError
from gptjax.core import arguments, runtime

if TYPE_CHECKING:
    from gptjax.runs.run import Run


def main(argv: Sequence[str]) -> None:
    """Evaluates a run."""
    parser = arguments.Parser(prog="python -m gptjax.evaluate", description="Evaluates a trained model on text.")
    parser.add_argument("--workdir", type=Path, required=True, help="a run's directory")
    arguments.add_step(parser)
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="text; default: the run's held-out split")
    parser.add_argument("--test", metavar="SPLIT", help="split of its examples or parallel text, such as test (val)")
    parser.add_argument(
        "--predict",
        type=Path,
        metavar="FILE",
        help="file of records: prints the task head's prediction for each, one a line",
    )
    parser.add_argument("--rouge", action="store_true", help="for a run that was trained to write answers: their ROUGE")
    translation_flags = parser.add_argument_group("for an encoder-decoder that translates")
    translation_flags.add_argument(
        "--beams", type=arguments.number(), metavar="N", help="beams of the search; 1: greedy (4)"
    )
    translation_flags.add_argument(
        "--length_penalty", type=arguments.number(float), metavar="X", help="scores are divided by length ** X (1)"
    )
    flags = parser.parse_args(argv)
    runtime.start()
    from gptjax import models
    from gptjax.data import records
    from gptjax.data.records import RecordOptions
    from gptjax.evals import held_out, translation, writing
    from gptjax.runs import run

    loaded = run.load(flags.workdir, flags.step)
    if sum(bool(flag) for flag in (flags.test, flags.data, flags.predict)) > 1:
        raise ConfigError("--test, --data and --predict each name a text; give one of them")
    if flags.predict:
        options = RecordOptions(tuple(loaded.config.data.examples.fields))
        inputs = [record.fields for record in records.read(flags.predict, options)]
        print("\n".join(json.dumps(prediction, ensure_ascii=False) for prediction in loaded.predict(inputs)))
        return
    if flags.rouge:
        figures = writing.evaluate(loaded, flags.test or "val", flags.data or ())
        print(json.dumps(figures) if flags.json else rouge_as_text(figures))
        return
    has_beam_flags = any(flag is not None for flag in (flags.beams, flags.length_penalty))
    if has_beam_flags or (models.kind(loaded.model) == "seq2seq" and loaded.config.data.languages):
        figures = translate(loaded, flags)
        text = translation.as_text(figures)
    else:
        figures = held_out.evaluate_run(loaded, flags.data, flags.test)
        text = as_text(figures)
    print(json.dumps(figures) if flags.json else text)


def translate(run: "Run", flags: Any) -> dict[str, Any]:
    """Evaluates a run's translations.

    Raises:
      ConfigError: the run has no encoder, or the flags are invalid.
    """
    from gptjax.decode.beam import BeamSearchParams
    from gptjax.evals import translation

    options = {"beams": flags.beams, "length_penalty": flags.length_penalty}
    beams = BeamSearchParams(**{name: value for name, value in options.items() if value is not None})
    return translation.evaluate(run, flags.test or "val", flags.data or (), beams)


def rouge_as_text(figures: dict[str, Any]) -> str:
    """Formats the metrics of gptjax.evals.writing as text."""
    names = [name for name in figures if name.startswith("rouge")]
    lines = [f"{name:<15} {figures[name]:.2f}   (first sentences: {figures[f'lead3_{name}']:.2f})" for name in names]
    return "\n".join([*lines, f"{'over':<15} {figures['examples']:,} examples", f"{'texts':<15} {figures['file']}"])


def as_text(figures: dict[str, float]) -> str:
    """Formats the metrics of gptjax.evals.held_out as text."""
    units = {"loss": "nats per token" if "tokens" in figures else "", "perplexity": "per token"}
    decimals = {"perplexity": 3}
    counts = [f"{int(figures[name]):,} {name}" for name in ("tokens", "examples", "bytes") if name in figures]
    metrics = {name: value for name, value in figures.items() if name not in ("tokens", "examples", "bytes")}
    lines = [
        f"{name.replace('_', ' '):<15} {value:.{decimals.get(name, 4)}f} {units.get(name, '')}".rstrip()
        for name, value in metrics.items()
    ]
    return "\n".join([*lines, f"{'over':<15} {', '.join(counts)}"])


if __name__ == "__main__":
    arguments.run(main)
