"""python -m gptjax.train --config=configs/base.py: trains a model, or goes on where it was cut short.

Flags in, gptjax.training.loop.train called, its summary printed.
"""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax import config
from gptjax.config.errors import ConfigError
from gptjax.core import arguments, runtime

if TYPE_CHECKING:
    from ml_collections import ConfigDict

EPILOG = """every key of the recipe can be set with --config.KEY=VALUE, as in --config.train.steps=2000;
configs/base.py lists them, each with its meaning and unit"""


def main(argv: Sequence[str]) -> None:
    """Trains as the flags say."""
    started = time.monotonic()
    parser = arguments.Parser(prog="python -m gptjax.train", description="Trains a model.", epilog=EPILOG)
    parser.add_argument("--config", metavar="RECIPE", required=True, help="Python file such as configs/base.py")
    parser.add_argument("--workdir", type=Path, help="the run's directory; default: runs/ and the recipe's name")
    several = parser.add_argument_group("several processes, where neither SLURM nor Open MPI starts them")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="of the first process")
    several.add_argument("--processes", type=arguments.number(least=1), metavar="N", help="how many there are")
    several.add_argument("--process", type=arguments.number(least=0), metavar="I", help="which one this is, from 0")
    several.add_argument(
        "--heartbeat",
        type=arguments.number(least=1),
        metavar="SECONDS",
        default=60,
        help="of silence: dead; default: 60",
    )
    flags, overrides = parser.parse_known_args(argv)
    chosen = config.read(flags.config, overrides)
    runtime.start()
    from gptjax.sharding import processes
    from gptjax.training import loop

    processes.start(processes.Place(flags.coordinator, flags.processes, flags.process), flags.heartbeat)
    workdir = flags.workdir or Path("runs") / run_name(flags.config)
    check_model_flags(overrides, chosen, workdir)
    on_line = _print_json if flags.json and processes.is_first() else lambda line: None
    summary = loop.train(chosen, workdir, on_line, started)
    if not processes.is_first():
        return
    if flags.json:
        _print_json(summary)
    else:
        print(_readable(workdir, summary))


def check_model_flags(overrides: Sequence[str], chosen: "ConfigDict", workdir: Path) -> None:
    """Raises an error for a flag that would change a model which comes from elsewhere.

    Raises:
      ConfigError: there is such a flag.
      CheckpointError: the model's run does not exist.
    """
    from gptjax.runs import directory as workdirs
    from gptjax.runs import pretrained
    from gptjax.training.loop import IMPORT_OVERRIDES, PRETRAINED_OVERRIDES

    pretrained.check_exists(chosen, workdir)
    origin = workdirs.origin(chosen, workdir)
    free = IMPORT_OVERRIDES if origin == workdir else PRETRAINED_OVERRIDES
    for flag in overrides if origin else ():
        key = flag.split("=", 1)[0].removeprefix("--config.")
        if key.startswith("model.") and key.removeprefix("model.") not in free:
            where = workdir if origin == workdir else chosen.init_from
            raise ConfigError(f"{key} is decided by {where}, where the model comes from; leave the flag out")


def run_name(recipe: str) -> str:
    """A directory's name for what is made by a recipe."""
    path, _, argument = recipe.partition(":")
    return "-".join(filter(None, [Path(path).stem, argument.replace("/", "-")]))


def _print_json(line: Any) -> None:
    print(json.dumps(line), flush=True)


def _readable(workdir: Path, summary: dict[str, Any]) -> str:
    from gptjax.core.console import duration
    from gptjax.core.files import read_text
    from gptjax.runs.directory import read_config

    rate, prompt = summary["tokens_per_second"], read_config(workdir).sample.prompt
    sample = read_text(workdir / "samples.txt").rstrip()
    shown = f"{'-- sample ':-<70}\n{sample}\n{'':-<70}\n" if sample else ""
    writes, flag = sample and "val_accuracy" not in summary, f"--workdir={shlex.quote(str(workdir))}"
    goes_on = f"generate {flag} --prompt={shlex.quote(prompt)}" if writes else f"evaluate {flag}"
    return f"""
{shown}held-out loss   {summary["val_loss"]:.4f}{" nats per token" if "val_bits_per_byte" in summary else ""}
{_quality(summary)}trained         {summary["steps"]:,} steps in {duration(summary["seconds"])}, {rate:,.0f} tokens/s
time            {_times(summary)}
parameters      {summary["parameters"]:,}
files           {workdir}/ config.json metrics.jsonl summary.json loss.png samples.txt tokenizer/ checkpoints/
go on with      python -m gptjax.{goes_on}"""


def _quality(summary: dict[str, Any]) -> str:
    """The other figures of held-out text, a line each."""
    if "gzip_bits_per_byte" not in summary:
        own = {name.removeprefix("val_"): value for name, value in summary.items() if name.startswith("val_")}
        return "".join(f"{name:<15} {value:.4f}\n" for name, value in own.items() if name != "loss")
    bits, gzip, xz = (summary[f"{name}_bits_per_byte"] for name in ("val", "gzip", "xz"))
    order = "fewer" if bits < xz else "more"
    beside = f"gzip -9: {gzip:.3f}, xz -9: {xz:.3f}; {abs(1 - bits / xz):.0%} {order} than xz"
    return f"bits per byte   {bits:.3f}   ({beside})\n"


def _times(summary: dict[str, Any]) -> str:
    """Where the time went: kinds of a second or more."""
    from gptjax.core.console import duration
    from gptjax.training.monitoring.goodput import ALIVE, DOWN

    if "goodput" not in summary:
        return "not recorded"

    def each(kind: str) -> str:
        seconds = summary[f"time/{kind}"]
        share = f" ({summary['goodput']:.0%})" if kind == "step" else ""
        return f"{kind} {f'{seconds:.0f} s' if seconds < 60 else duration(seconds)}{share}"

    return ", ".join(each(kind) for kind in (*ALIVE, DOWN) if kind == "step" or summary[f"time/{kind}"] >= 1)


if __name__ == "__main__":
    arguments.run(main)
