"""What a model forgets of the texts before when it learns one text after another, and what EWC keeps of them.

python experiments/finetune/forgetting.py --base=runs/base --tasks novels=novels.txt notes='notes/*.md' --ewc=0,1,30
python experiments/finetune/forgetting.py --out=runs/forgetting --redraw

Each task's run begins with the one before, the first with the base, once for each finetune.ewc and seed; other keys go
as to gptjax.train (--config.KEY=VALUE). After every run bits per byte of every text's held-out part are measured, the
base's own included. Writes results.json, table.md and forgetting.png; what is finished is not done again.
"""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.errors import ConfigError, DataError
from gptjax.core import arguments, runtime
from gptjax.core.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
BASE = "base"  # what the base's own text is called
SETTINGS = {
    "optimizer.learning_rate": 1e-3,
    "optimizer.weight_decay": 0.0,  # which would pull to 0 what EWC pulls to where it was
    "checkpoint.keep": 1,
    "sample.max_tokens": 50,
}
Score = dict[str, float]  # bits per byte, by text


# Runs.


def recipe(base: Path, data: str, steps: int, overrides: Sequence[str]) -> Any:
    """The config of a task's run, unlocked: batches as the base's."""
    from gptjax.runs import config as configs
    from gptjax.runs import directory

    theirs = directory.read_config(base).data
    keys = SETTINGS | {"data.path": data, "data.context": theirs.context, "data.batch_size": theirs.batch_size}
    keys |= {"train.steps": steps, "schedule.warmup_steps": steps // 10}
    keys |= {"eval.every_steps": max(steps // 4, 1), "checkpoint.every_steps": max(steps // 2, 1)}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return configs.read(str(ROOT / "configs" / "base.py"), [*flags, *overrides]).copy_and_resolve_references().unlock()


def train(config: Any, origin: Path, ewc: float, seed: int, workdir: Path) -> None:
    """Trains a task's run, or finds it finished."""
    from gptjax.training import loop

    config.init_from, config.finetune.ewc, config.seed = str(origin), ewc, seed
    loop.train(config.lock(), workdir)


def scorer(base: Path, tasks: dict[str, str], steps: int, overrides: Sequence[str]) -> Callable[[Path], Score]:
    """`run's directory -> bits per byte` of the held-out part of each text, all of which are read once.

    Raises:
      ConfigError: the base predicts no next tokens, or has no text of its own.
    """
    import gptjax
    from gptjax import data, objectives
    from gptjax.data.tokenizers import tokenizers
    from gptjax.evals import held_out
    from gptjax.runs import config as configs
    from gptjax.runs import directory

    theirs = directory.read_config(base)
    if theirs.train.objective != "causal" or directory.is_untrained(base):
        raise ConfigError(f"{base} must have been trained on a text of its own, with train.objective=causal")
    tokenizer = tokenizers.load(base / "tokenizer")
    given = {name: configs.resolve(recipe(base, path, steps, overrides)).data for name, path in tasks.items()}
    texts = {name: (one, data.load(one, tokenizer)) for name, one in ({BASE: theirs.data} | given).items()}

    def scored(folder: Path) -> Score:
        run = gptjax.load(folder)
        prepare = objectives.set_transform(run.config, tokenizer)
        rows = {name: text.held_out_rows(one, prepare) for name, (one, text) in texts.items()}
        return {name: held_out.evaluate_rows(run, of_text)["bits_per_byte"] for name, of_text in rows.items()}

    return scored


def measure(flags: argparse.Namespace, tasks: dict[str, str], overrides: Sequence[str]) -> dict[str, Any]:
    """Trains and measures what is not there yet; results.json grows run by run."""
    runtime.start()
    of_run = scorer(flags.base, tasks, flags.steps, overrides)
    settings = {"base": str(flags.base), "tasks": tasks, "steps": flags.steps, "overrides": [*overrides]}
    found = begun(flags.out, settings)
    if not found["base"]:
        found["base"] = of_run(flags.base)
        keep(flags.out, found)
    sequences = [(ewc, seed) for ewc in flags.ewc for seed in flags.seeds]
    total, number = len(sequences) * len(tasks), 0
    for ewc, seed in sequences:
        name, origin, before = f"ewc={ewc:g} seed={seed}", flags.base, found["base"]
        scores = found["sequences"].setdefault(name, {"ewc": ewc, "seed": seed, "scores": []})["scores"]
        for stage, (task, path) in enumerate(tasks.items()):
            workdir = flags.out / "runs" / f"ewc-{ewc:g}" / f"seed-{seed}" / f"{stage + 1}-{task}"
            if len(scores) <= stage:
                train(recipe(flags.base, path, flags.steps, overrides), origin, ewc, seed, workdir)
                scores.append(of_run(workdir))
                keep(flags.out, found)
            number, origin = number + 1, workdir
            print(f"[{number}/{total}] {name}, {task}: {changes(before, scores[stage])}", flush=True)
            before = scores[stage]
    return found


def changes(before: Score, now: Score) -> str:
    """Bits per byte of each text, and how they have changed."""
    return ", ".join(f"{name} {value:.3f} ({value - before[name]:+.3f})" for name, value in now.items())


# Results.


def begun(out: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """The results so far.

    Raises:
      ConfigError: they are of other settings.
    """
    if not (out / "results.json").exists():
        return {"settings": settings, "base": {}, "sequences": {}}
    found: dict[str, Any] = read(out)
    differing = [key for key, value in settings.items() if found["settings"][key] != value]
    if differing:
        raise ConfigError(f"{out} has results of another choice of {', '.join(differing)}; give another --out")
    return found


def read(out: Path) -> dict[str, Any]:
    """results.json.

    Raises:
      DataError: it is not there, or damaged.
    """
    try:
        found: dict[str, Any] = json.loads((out / "results.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{out / 'results.json'} cannot be read: {error}") from error
    return found


def keep(out: Path, found: dict[str, Any]) -> None:
    """Writes results.json."""
    out.mkdir(parents=True, exist_ok=True)
    write_atomic(out / "results.json", json.dumps(found, indent=2) + "\n")


def matrices(found: dict[str, Any]) -> dict[float, np.ndarray]:
    """[seeds, stages, texts] bits per byte by ewc, of finished sequences; stage 0 and text 0 are the base's."""
    texts, by_ewc = [*found["base"]], dict[float, list[Any]]()
    for one in found["sequences"].values():
        if len(one["scores"]) == len(texts) - 1:
            rows = [[score[name] for name in texts] for score in (found["base"], *one["scores"])]
            by_ewc.setdefault(one["ewc"], []).append(rows)
    return {ewc: np.array(of_seeds) for ewc, of_seeds in sorted(by_ewc.items())}


def backward_transfer(R: np.ndarray) -> np.ndarray:
    """Mean over the earlier texts j of R[T, j] - R[j, j] (arXiv 1706.08840 eq. 3); of bits per byte: what is forgotten.

    Args:
      R: [..., stages, texts], row i after text i was learnt.
    """
    own = np.diagonal(R, axis1=-2, axis2=-1)
    return (R[..., -1, :-1] - own[..., :-1]).mean(-1)


def spread(values: np.ndarray, sign: str = "") -> str:
    """The mean, and of several seeds the standard deviation."""
    mean = format(values.mean(), f"{sign}.3f")
    return f"{mean} ± {values.std(ddof=1):.3f}" if len(values) > 1 else mean


def table(found: dict[str, Any]) -> str:
    """Each ewc's matrix, then what of it is forgotten, as Markdown."""
    texts, by_ewc = [*found["base"]], matrices(found)
    lines = [f"| ewc | bits per byte after | {' | '.join(texts)} |", "|---" * (len(texts) + 2) + "|"]
    for ewc, R in by_ewc.items():
        for stage, name in enumerate(texts):
            cells = " | ".join(spread(R[:, stage, j]) for j in range(len(texts)))
            lines.append(f"| {ewc:g} | {name} | {cells} |")
    lines += ["", "| ewc | backward transfer (more is worse) | mean of all texts at the end |", "|---|---|---|"]
    for ewc, R in by_ewc.items():
        lines.append(f"| {ewc:g} | {spread(backward_transfer(R), '+')} | {spread(R[:, -1].mean(-1))} |")
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """A panel per text: bits per byte over the stages, a line for each ewc, seeds' least to greatest as a band."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    texts, by_ewc = [*found["base"]], matrices(found)
    stages = np.arange(len(texts))
    figure, panels = plt.subplots(1, len(texts), figsize=(3.4 * len(texts), 3.6), layout="constrained")
    for j, (axes, name) in enumerate(zip(panels, texts, strict=True)):
        axes.axvline(j, color="gray", linestyle=":", linewidth=1)  # where it is learnt
        for ewc, R in by_ewc.items():
            (line,) = axes.plot(stages, R[:, :, j].mean(0), marker="o", markersize=3, label=f"ewc {ewc:g}")
            axes.fill_between(stages, R[:, :, j].min(0), R[:, :, j].max(0), color=line.get_color(), alpha=0.2)
        axes.set_xticks(stages, [BASE, *(f"+ {task}" for task in texts[1:])])
        axes.set_title("the base's own text" if name == BASE else name, fontsize=11)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("held-out bits per byte")
    panels[0].legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


# The command.


def named(given: Sequence[str]) -> dict[str, str]:
    """{name: path} of NAME=PATH.

    Raises:
      ConfigError: one is not of that form, or a name is taken.
    """
    tasks: dict[str, str] = {}
    for one in given:
        name, _, path = one.partition("=")
        if not name or not path or "/" in name or name in (*tasks, BASE):
            raise ConfigError(f"--tasks has {one!r}; it must be NAME=PATH, each name once, none of them {BASE}")
        tasks[name] = path
    if not tasks:
        raise ConfigError("give --base=RUN and --tasks NAME=PATH NAME=PATH ...")
    return tasks


def numbers(of: type) -> Callable[[str], list[Any]]:
    """Reads a list such as 0,1,2."""
    return lambda text: [of(one) for one in text.split(",")]


def main(argv: Sequence[str]) -> None:
    """Trains and measures what is not there yet, and draws it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--base", type=Path, help="the run that the first task's begins with")
    parser.add_argument("--tasks", nargs="+", default=[], metavar="NAME=PATH", help="texts, in order")
    parser.add_argument("more", nargs="*", metavar="NAME=PATH", help="further ones, after --tasks=NAME=PATH")
    parser.add_argument("--steps", type=int, default=200, help="of each task's run")
    parser.add_argument("--ewc", type=numbers(float), default=[0.0, 1.0, 30.0], help="finetune.ewc: 0,1,30")
    parser.add_argument("--seeds", type=numbers(int), default=[0, 1, 2], help="0,1,2")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "forgetting", help="where all of it goes")
    parser.add_argument("--redraw", action="store_true", help="table and figure of the results that are there")
    flags, overrides = parser.parse_known_args(argv)
    tasks = {} if flags.redraw else named([*flags.tasks, *flags.more])
    if tasks and not flags.base:
        raise ConfigError("--base=RUN is missing: the run that the first task's begins with")
    found = read(flags.out) if flags.redraw else measure(flags, tasks, overrides)
    write_atomic(flags.out / "table.md", table(found) + "\n")
    plot(found, flags.out / "forgetting.png")
    print(table(found))


if __name__ == "__main__":
    arguments.run(main)
