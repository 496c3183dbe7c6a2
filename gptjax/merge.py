"""python -m gptjax.merge --runs runs/a runs/b --how=ties --base=runs/base --to=runs/ab: several runs become one.

Flags in, gptjax.finetune.merging called, what was made printed.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gptjax.config.errors import ConfigError
from gptjax.core import arguments, runtime

if TYPE_CHECKING:
    from gptjax.runs.run import Run

EPILOG = """RUN@STEP is a run's checkpoint of that step: runs/a@800 runs/a@900 runs/a averages a run's last ones.
arithmetic and ties add what runs have learnt to the base that they began from."""


def main(argv: Sequence[str]) -> None:
    """Combines as the flags say."""
    parser = arguments.Parser(prog="python -m gptjax.merge", description="Several runs become one.", epilog=EPILOG)
    parser.add_argument("--runs", nargs="+", required=True, metavar="RUN[@STEP]", help="of one shape")
    parser.add_argument("--how", default="mean", choices=("mean", "arithmetic", "ties"), help="default: mean")
    parser.add_argument("--base", default="", metavar="RUN", help="of arithmetic and ties: where they began")
    parser.add_argument(
        "--scale", type=arguments.number(float), default=1.0, help="of arithmetic and ties: times what is added (1)"
    )
    parser.add_argument(
        "--kept",
        type=arguments.number(float),
        default=0.2,
        help="of ties: share of each run's changes that count (0.2)",
    )
    parser.add_argument("--to", required=True, metavar="RUN", help="a new run's directory")
    flags = parser.parse_args(argv)
    if (flags.how == "mean") == bool(flags.base):
        raise ConfigError("--how=arithmetic and --how=ties need --base=RUN, and mean has none")
    if not 0 < flags.kept <= 1:
        raise ConfigError(f"--kept is {flags.kept}; it must be more than 0 and at most 1")
    runtime.start()
    from gptjax.finetune import merging, methods
    from gptjax.interop import convert_run

    runs = [load_run(name) for name in flags.runs]
    base = load_run(flags.base) if flags.base else runs[0]
    trees = [methods.merge(one.params, one.config.finetune) for one in (base, *runs)]
    for name, tree in zip(flags.runs, trees[1:], strict=True):
        check_same_shapes(flags.base or flags.runs[0], trees[0], name, tree)
    params = merging.MERGE_METHODS[flags.how](trees[0], trees[1:], flags.scale, flags.kept)
    made = convert_run.new_run(base, params, Path(flags.to), flags.how)
    if flags.json:
        print(json.dumps({"runs": flags.runs, "to": flags.to, "how": flags.how, "parameters": made["parameters"]}))
    else:
        print(f"{flags.how:10} of {', '.join(flags.runs)}: {made['parameters']:,} parameters in {flags.to}")


def load_run(name: str) -> "Run":
    """The run of RUN or RUN@STEP."""
    from gptjax.runs import run

    workdir, at, step = name.rpartition("@")
    if not at:
        return run.load(Path(name).expanduser())
    if step != "best" and not step.isdigit():
        raise ConfigError(f"{name}: behind @ stands a step, or best, not {step!r}")
    return run.load(Path(workdir).expanduser(), int(step) if step.isdigit() else step)


def check_same_shapes(first: str, tree: Any, name: str, other: Any) -> None:
    """Raises ConfigError for parameters of other names or shapes."""
    from gptjax.finetune import paths

    shapes, others = ({path: leaf.shape for path, leaf in paths.flat(t).items()} for t in (tree, other))
    differing = sorted(path for path in shapes.keys() | others.keys() if shapes.get(path) != others.get(path))
    if differing:
        raise ConfigError(
            f"{name} is not of {first}'s shape: {differing[0]} is {others.get(differing[0], 'absent')} there, "
            f"{shapes.get(differing[0], 'absent')} here"
        )


if __name__ == "__main__":
    arguments.run(main)
