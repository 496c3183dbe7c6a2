"""python -m gptjax.plan --config=configs/base.py --measure: what a train step costs, part by part of the model.

Flags in, gptjax.inspect.costs.plan called, its table printed.
"""

import json
from collections.abc import Sequence

from gptjax import command, config, runtime
from gptjax.config import ConfigError

EPILOG = """without --measure only what follows from shapes is printed, and nothing is compiled; no text is read and no
run is written; every key of the recipe can be set with --config.KEY=VALUE"""


def main(argv: Sequence[str]) -> None:
    """Plans as the flags say."""
    about = "Tells what a train step costs: parameters, FLOPs and, measured on this machine, time."
    parser = command.Parser(prog="python -m gptjax.plan", description=about, epilog=EPILOG)
    parser.add_argument("--config", metavar="RECIPE", required=True, help="Python file such as configs/base.py")
    parser.add_argument("--measure", action="store_true", help="run some steps on random tokens and tell their time")
    parser.add_argument("--steps", type=int, metavar="N", help="steps to time, and as many again to trace; default: 5")
    flags, overrides = parser.parse_known_args(argv)
    if flags.steps is not None and (flags.steps < 1 or not flags.measure):
        raise ConfigError("--steps must be at least 1, and goes with --measure")
    chosen = config.read(flags.config, overrides)
    runtime.start()
    from gptjax.inspect import costs

    found = costs.plan(chosen, (flags.steps or 5) if flags.measure else 0)
    if flags.json:
        for row in costs.rows(found):
            print(json.dumps(row))
    else:
        print(costs.as_text(found))


if __name__ == "__main__":
    command.run(main)
