"""python -m gptjax.evaluate --workdir=runs/base: loss, perplexity and bits per byte on held-out or other text.

Of a run that learnt from examples its loss and accuracy on any split of them; of an encoder-decoder trained on parallel
text BLEU and chrF, too. Flags in, gptjax.evals.held_out
or gptjax.evals.translation called, its figures printed.
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
    """Evaluates as the flags say."""
    parser = arguments.Parser(prog="python -m gptjax.evaluate", description="Measures a trained model on text.")
    parser.add_argument("--workdir", type=Path, required=True, help="a run's directory")
    arguments.add_step(parser)
    parser.add_argument("--data", type=Path, nargs="+", metavar="FILE", help="text; default: the run's held-out split")
    parser.add_argument("--test", metavar="SPLIT", help="of its examples or parallel text, such as test (val)")
    parser.add_argument(
        "--predict", type=Path, metavar="FILE", help="of records: what the task head says of each, a line"
    )
    parser.add_argument(
        "--rouge", action="store_true", help="of a run that learnt to write answers: ROUGE of what it writes"
    )
    translating = parser.add_argument_group("of an encoder-decoder, which translates")
    translating.add_argument(
        "--beams", type=arguments.number(), metavar="N", help="kept at each step of the search; 1: greedy (4)"
    )
    translating.add_argument(
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
        raise ConfigError("--test, --data and --predict are of different texts; give one of them")
    if flags.predict:
        options = RecordOptions(tuple(loaded.config.data.examples.fields))
        found = [one.fields for one in records.read(flags.predict, options)]
        print("\n".join(json.dumps(one, ensure_ascii=False) for one in loaded.predict(found)))
        return
    if flags.rouge:
        figures = writing.evaluate(loaded, flags.test or "val", flags.data or ())
        print(json.dumps(figures) if flags.json else of_writing(figures))
        return
    asked = any(flag is not None for flag in (flags.beams, flags.length_penalty))
    if asked or (models.kind(loaded.model) == "seq2seq" and loaded.config.data.languages):
        figures = translate(loaded, flags)
        text = translation.as_text(figures)
    else:
        figures = held_out.evaluate_run(loaded, flags.data, flags.test)
        text = as_text(figures)
    print(json.dumps(figures) if flags.json else text)


def translate(of: "Run", flags: Any) -> dict[str, Any]:
    """The figures of a run's translations.

    Raises:
      ConfigError: it has no encoder, or flags that cannot be.
    """
    from gptjax.decode.beam import Beams
    from gptjax.evals import translation

    named = {"beams": flags.beams, "length_penalty": flags.length_penalty}
    beams = Beams(**{name: value for name, value in named.items() if value is not None})
    return translation.evaluate(of, flags.test or "val", flags.data or (), beams)


def of_writing(figures: dict[str, Any]) -> str:
    """What gptjax.evals.writing found, for a person."""
    names = [name for name in figures if name.startswith("rouge")]
    lines = [f"{name:<15} {figures[name]:.2f}   (first sentences: {figures[f'lead3_{name}']:.2f})" for name in names]
    return "\n".join([*lines, f"{'over':<15} {figures['examples']:,} examples", f"{'texts':<15} {figures['file']}"])


def as_text(figures: dict[str, float]) -> str:
    """What gptjax.evals.held_out found, for a person."""
    units = {"loss": "nats per token" if "tokens" in figures else "", "perplexity": "per token"}
    places = {"perplexity": 3}
    counts = [f"{int(figures[name]):,} {name}" for name in ("tokens", "examples", "bytes") if name in figures]
    own = {name: value for name, value in figures.items() if name not in ("tokens", "examples", "bytes")}
    lines = [
        f"{name.replace('_', ' '):<15} {value:.{places.get(name, 4)}f} {units.get(name, '')}".rstrip()
        for name, value in own.items()
    ]
    return "\n".join([*lines, f"{'over':<15} {', '.join(counts)}"])


if __name__ == "__main__":
    arguments.run(main)
