"""Sweeps keys of a config: a run for each choice, a table of what became of them, and the best as a recipe.

python experiments/sweep.py --config=configs/base.py --set optimizer.learning_rate=1e-4,3e-4,1e-3 --set seed=0,1,2
python experiments/sweep.py --config=configs/base.py --set optimizer.learning_rate=log:1e-4..1e-2 --random=20
python experiments/sweep.py --config=configs/base.py --files=small.json,configs/modern.py --set seed=0,1
python experiments/sweep.py --config=configs/base.py --set optimizer.learning_rate=log:1e-4..1e-2 --optuna=50
python experiments/sweep.py --config=configs/base.py --set optimizer.learning_rate=1e-3,3e-3,1e-2,3e-2 --vmap
python experiments/sweep.py --config=configs/base.py --set optimizer.learning_rate=log:1e-4..1e-1 --random=9 --evolve=50

Other keys go as to gptjax.train (--config.KEY=VALUE) and are all trials'. A trial is an ordinary run in the sweep's
trials/. The same command goes on where a sweep was cut short, and repeats nothing; with --optuna several processes, on
one host or many, work on one study when they are given the same --storage and --study. With --vmap all trials are one
compiled program, spread over the devices there are; they may differ in numbers that change no shape (rates, decays,
betas, warm-up, clipping, dropout, seeds). --evolve is population-based training (arXiv 1711.09846) in that program.
--json prints an object for each trial as it ends and then one for the sweep.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gptjax.config.errors import ConfigError
from gptjax.config.limits import SEED
from gptjax.core import arguments, runtime
from gptjax.sweeps import space
from gptjax.sweeps.results import Result, as_object
from gptjax.sweeps.trials import Search
from gptjax.train import check_model_flags, run_name

MOST_TRIALS = 100_000


def searched(flags: argparse.Namespace, overrides: Sequence[str]) -> Search:
    """What the flags ask for.

    Raises:
      ConfigError: flags that do not go together, or a space that cannot be.
    """
    asked = {"random": flags.random, "files": flags.files, "optuna": flags.optuna}
    ways = [name for name, given in asked.items() if given is not None]
    if len(ways) > 1:
        raise ConfigError(f"--{ways[0]} and --{ways[1]} do not go together; give one of them")
    method = ways[0] if ways else "grid"
    if method != "optuna" and (flags.storage or flags.study):
        raise ConfigError("--storage and --study are for --optuna=N")
    n_trials = flags.optuna or flags.random or 0
    found = space.read(flags.set, flags.config, overrides)
    files = flags.files or ()
    return Search(flags.config, overrides, found, method, n_trials, flags.sweep_seed, files)


def train(search: Search, folder: Path, flags: argparse.Namespace) -> list[Result]:
    """Trains what is not trained yet."""
    runtime.start()
    from gptjax.sweeps import sweep, training

    check_model_flags([f"--config.{key}" for key in search.space] + [*search.overrides], search.config(), folder)
    tell = (lambda result: print_json(as_object(result))) if flags.json else lambda result: None
    if search.method == "optuna":
        if flags.vmap or flags.evolve:
            raise ConfigError("--optuna chooses a trial by those before it; leave --vmap and --evolve out")
        storage = sweep.Storage(flags.storage or "", flags.study or folder.name)
        return sweep.run_study(search, folder, storage, tell)
    if flags.vmap or flags.evolve:
        runtime.processors_as_devices()  # members lie side by side on them
    backend = training.vmapped_backend(flags.evolve or 0) if flags.vmap or flags.evolve else training.SEQUENTIAL
    return sweep.run(search, folder, backend, tell)


def print_json(found: Any) -> None:
    """One object, on a line of its own."""
    print(json.dumps(found), flush=True)


def listed(text: str) -> list[str]:
    """A flag's list of files."""
    if not text or not all(text.split(",")):
        raise argparse.ArgumentTypeError("the list is empty, or a file in it is")
    return text.split(",")


def main(argv: Sequence[str]) -> None:
    """Trains, and reports."""
    parser = arguments.Parser(prog="python experiments/sweep.py", description=__doc__)
    parser.add_argument("--config", metavar="RECIPE", required=True, help="Python file such as configs/base.py")
    about = "what is swept: a list, or log:LOW..HIGH, lin:LOW..HIGH, int:LOW..HIGH; may be given again"
    parser.add_argument("--set", metavar="KEY=VALUES", action="append", default=[], help=about)
    parser.add_argument("--workdir", type=Path, help="the sweep's directory; default: sweeps/ and the recipe's name")
    chosen = parser.add_argument_group("how trials are chosen; default: every combination of the lists")
    trials = arguments.number(least=1, most=MOST_TRIALS)
    chosen.add_argument("--random", type=trials, metavar="N", help="N draws")
    chosen.add_argument("--files", type=listed, metavar="A,B", help="JSON objects of key: value, or recipes")
    chosen.add_argument("--optuna", type=trials, metavar="N", help="N trials by TPE; ASHA stops the worse ones")
    chosen.add_argument(
        "--sweep-seed",
        type=arguments.number(least=0, most=SEED),
        default=0,
        metavar="SEED",
        help="of --random and --optuna; default: 0",
    )
    chosen.add_argument("--storage", help="of Optuna: a journal file or a database's URL; default: in the workdir")
    chosen.add_argument("--study", help="of Optuna: the study's name there; default: the workdir's")
    together = parser.add_argument_group("all trials at once")
    together.add_argument("--vmap", action="store_true", help="as one compiled program")
    every = "the same, in which every N steps the worst take the best ones' places and vary their values"
    together.add_argument("--evolve", type=arguments.number(least=1), metavar="N", help=every)
    flags, overrides = parser.parse_known_args(argv)
    folder = flags.workdir or Path("sweeps") / run_name(flags.config)
    search = searched(flags, overrides)
    results = train(search, folder, flags)
    from gptjax.sweeps import report

    summary = report.write(folder, search, results)
    print_json(summary) if flags.json else print(report.as_text(folder, results))


if __name__ == "__main__":
    arguments.run(main)
