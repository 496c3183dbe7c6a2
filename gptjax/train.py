"""python -m gptjax.train --config=configs/base.py: trains a model, or resumes an interrupted run.

Parses flags, calls gptjax.training.loop.train, and prints its summary.
"""

import json
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.config.errors import ConfigError
from gptjax.core import arguments, runtime

if TYPE_CHECKING:
    from ml_collections import ConfigDict

EPILOG = """any key of the recipe can be set with --config.KEY=VALUE, for example --config.train.steps=2000;
docs/configuration.md lists all keys with their meaning and unit"""


def main(argv: Sequence[str]) -> None:
    """Trains a model with the given flags."""
    started = time.monotonic()
    parser = arguments.Parser(prog="python -m gptjax.train", description="Trains a model.", epilog=EPILOG)
    parser.add_argument("--config", metavar="RECIPE", required=True, help="Python file such as configs/base.py")
    parser.add_argument("--workdir", type=Path, help="directory of the run; default: runs/ and the name of the recipe")
    several = parser.add_argument_group("several processes, unless SLURM or Open MPI starts them")
    several.add_argument("--coordinator", metavar="HOST:PORT", help="address of the first process")
    several.add_argument("--processes", type=arguments.number(least=1), metavar="N", help="number of processes")
    several.add_argument("--process", type=arguments.number(least=0), metavar="I", help="index of this process, from 0")
    several.add_argument(
        "--heartbeat",
        type=arguments.number(least=1),
        metavar="SECONDS",
        default=60,
        help="a process silent for this long counts as dead; default: 60",
    )
    flags, overrides = parser.parse_known_args(argv)
    runtime.start()
    from gptjax.runs import config
    from gptjax.sharding import processes
    from gptjax.training import loop

    recipe = config.read(flags.config, overrides)
    processes.start(processes.ProcessInfo(flags.coordinator, flags.processes, flags.process), flags.heartbeat)
    workdir = flags.workdir or Path("runs") / run_name(flags.config)
    check_model_flags(overrides, recipe, workdir)
    on_line = _print_json if flags.json and processes.is_first() else lambda line: None
    summary = loop.train(recipe, workdir, on_line, started)
    if not processes.is_first():
        return
    if flags.json:
        _print_json(summary)
    else:
        print(_readable(workdir, summary))


def check_model_flags(overrides: Sequence[str], recipe: "ConfigDict", workdir: Path) -> None:
    """Checks that no flag changes a model that comes from another run or an import.

    Raises:
      ConfigError: a flag changes it.
      CheckpointError: the run that the model comes from does not exist.
    """
    from gptjax.runs import directory as workdirs
    from gptjax.runs import pretrained
    from gptjax.training.setup import IMPORT_OVERRIDES, PRETRAINED_OVERRIDES

    pretrained.check_exists(recipe, workdir)
    origin = workdirs.origin(recipe, workdir)
    free = IMPORT_OVERRIDES if origin == workdir else PRETRAINED_OVERRIDES
    for flag in overrides if origin else ():
        key = flag.split("=", 1)[0].removeprefix("--config.")
        if key.startswith("model.") and key.removeprefix("model.") not in free:
            source = workdir if origin == workdir else recipe.init_from
            raise ConfigError(f"{key} is decided by {source}, where the model comes from; leave the flag out")


def run_name(recipe: str) -> str:
    """Directory name for the run of a recipe."""
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
    sample_text = f"{'-- sample ':-<70}\n{sample}\n{'':-<70}\n" if sample else ""
    writes, flag = sample and "val_accuracy" not in summary, f"--workdir={shlex.quote(str(workdir))}"
    next_command = f"generate {flag} --prompt={shlex.quote(prompt)}" if writes else f"evaluate {flag}"
    return f"""
{sample_text}held-out loss   {summary["val_loss"]:.4f}{" nats per token" if "val_bits_per_byte" in summary else ""}
{_quality(summary)}trained         {summary["steps"]:,} steps in {duration(summary["seconds"])}, {rate:,.0f} tokens/s
time            {_times(summary)}
parameters      {summary["parameters"]:,}
files           {workdir}/ config.json metrics.jsonl summary.json loss.png samples.txt tokenizer/ checkpoints/
next            python -m gptjax.{next_command}"""


def _quality(summary: dict[str, Any]) -> str:
    """Formats the other metrics on held-out text, one per line."""
    if "gzip_bits_per_byte" not in summary:
        metrics = {name.removeprefix("val_"): value for name, value in summary.items() if name.startswith("val_")}
        return "".join(f"{name:<15} {value:.4f}\n" for name, value in metrics.items() if name != "loss")
    bits, gzip, xz = (summary[f"{name}_bits_per_byte"] for name in ("val", "gzip", "xz"))
    order = "fewer" if bits < xz else "more"
    comparison = f"gzip -9: {gzip:.3f}, xz -9: {xz:.3f}; {abs(1 - bits / xz):.0%} {order} than xz"
    return f"bits per byte   {bits:.3f}   ({comparison})\n"


def _times(summary: dict[str, Any]) -> str:
    """Formats the wall time by kind, for kinds of a second or more."""
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
