"""python -m gptjax.merge --runs runs/a runs/b --method=ties --base=runs/base --to=runs/ab: merges runs into one.

Parses the flags, calls gptjax.finetune.merging and prints the result.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.config.errors import ConfigError
from gptjax.core import arguments, runtime

if TYPE_CHECKING:
    from gptjax.runs.run import Run

EPILOG = """RUN@STEP is a run's checkpoint of that step: runs/a@800 runs/a@900 runs/a averages a run's last checkpoints.
arithmetic and ties add the runs' task vectors to the base that they were tuned from."""


def main(argv: Sequence[str]) -> None:
    """Merges runs into one."""
    parser = arguments.Parser(prog="python -m gptjax.merge", description="Merges runs into one.", epilog=EPILOG)
    parser.add_argument("--runs", nargs="+", required=True, metavar="RUN[@STEP]", help="runs of the same shape")
    parser.add_argument("--method", default="mean", choices=("mean", "arithmetic", "ties"), help="default: mean")
    parser.add_argument(
        "--base", default="", metavar="RUN", help="for arithmetic and ties: the run that they were tuned from"
    )
    parser.add_argument(
        "--scale", type=arguments.number(float), default=1.0, help="for arithmetic and ties: factor of the sum (1)"
    )
    parser.add_argument(
        "--density",
        type=arguments.number(float),
        default=0.2,
        help="for ties: share of each run's changes that is kept (0.2)",
    )
    parser.add_argument("--to", required=True, metavar="RUN", help="a new run's directory")
    flags = parser.parse_args(argv)
    if (flags.method == "mean") == bool(flags.base):
        raise ConfigError("--method=arithmetic and --method=ties need --base=RUN, and mean has none")
    if not 0 < flags.density <= 1:
        raise ConfigError(f"--density is {flags.density}; it must be more than 0 and at most 1")
    runtime.start()
    from gptjax.finetune import merging, methods
    from gptjax.interop import convert_run

    runs = [load_run(name) for name in flags.runs]
    base = load_run(flags.base) if flags.base else runs[0]
    trees = [methods.merge(one.params, one.config.finetune) for one in (base, *runs)]
    for name, tree in zip(flags.runs, trees[1:], strict=True):
        check_same_shapes(flags.base or flags.runs[0], trees[0], name, tree)
    params = merging.MERGE_METHODS[flags.method](trees[0], trees[1:], flags.scale, flags.density)
    made = convert_run.new_run(base, params, Path(flags.to), flags.method)
    if flags.json:
        print(json.dumps({"runs": flags.runs, "to": flags.to, "how": flags.method, "parameters": made["parameters"]}))
    else:
        print(f"{flags.method:10} of {', '.join(flags.runs)}: {made['parameters']:,} parameters in {flags.to}")


def load_run(name: str) -> "Run":
    """Loads the run of RUN or RUN@STEP."""
    from gptjax.runs import run

    workdir, separator, step = name.rpartition("@")
    if not separator:
        return run.load(Path(name).expanduser())
    if step != "best" and not step.isdigit():
        raise ConfigError(f"{name}: after @ comes a step, or best, not {step!r}")
    return run.load(Path(workdir).expanduser(), int(step) if step.isdigit() else step)


def check_same_shapes(first: str, tree: Any, name: str, other: Any) -> None:
    """Raises ConfigError if the parameters' names or shapes differ."""
    from gptjax.finetune import paths

    shapes, others = ({path: leaf.shape for path, leaf in paths.flat(t).items()} for t in (tree, other))
    differing = sorted(path for path in shapes.keys() | others.keys() if shapes.get(path) != others.get(path))
    if differing:
        raise ConfigError(
            f"{name} has other shapes than {first}: {differing[0]} is {others.get(differing[0], 'absent')} there, "
            f"{shapes.get(differing[0], 'absent')} here"
        )


if __name__ == "__main__":
    arguments.run(main)
