"""A pretrained base on real tasks: every way to tune it, beside the same network from scratch and simple baselines.

python experiments/finetune/tasks.py sst2 --base=runs/novels
python experiments/finetune/tasks.py bbc --base=runs/novels --ways=full,lora --seeds=0,1
python experiments/finetune/tasks.py sst2 --redraw            # the table and the plot from results/sst2.json alone

Runs that are finished are not trained again: cut short, the same command goes on. `scratch` is the base's network with
parameters drawn anew, and `base` the base itself, taken one step at a learning rate of 0.
"""

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent


class Task(NamedTuple):
    """One of TASKS.

    Attributes:
      recipe: in configs/finetune.
      ways: that are tried, in the table's order.
      score: of what `measure` asks of gptjax.evaluate.
      measure: flags of gptjax.evaluate.
      more: whether more of it is better.
      scale: that the table multiplies scores with.
    """

    recipe: str
    ways: tuple[str, ...]
    score: str
    measure: tuple[str, ...] = ()
    more: bool = True
    scale: float = 100.0


PARTS = ("full", "top", "lora", "adalora", "adapter", "prefix", "prompt")
TASKS = {
    "sst2": Task("sst2", ("words", "scratch", *PARTS), "accuracy", ("--test=test",)),
    "hotels": Task("hotels", ("words", "scratch", "full", "lora"), "accuracy"),
    "dialogue": Task("dialogue", ("base", "scratch", "full", "lora"), "loss", ("--test=test",), False, 1.0),
    "alpaca": Task("alpaca", ("base", "scratch", "full", "lora"), "loss", (), False, 1.0),
    "bbc": Task("bbc", ("lead", "full", "lora"), "rougeL", ("--rouge",), scale=1.0),
}


def trained(task: Task, way: str, seed: int, base: Path, runs: Path, flags: Sequence[str]) -> dict[str, Any]:
    """One row's run of a seed as processes of its own, or what there is of it: its figures."""
    from gptjax.runs.directory import read_config

    recipe = f"configs/finetune/{task.recipe}.py:{way if way not in ('scratch', 'base') else 'full'}"
    origin = from_scratch(base, runs / f"scratch-{seed}", seed) if way == "scratch" else base
    workdir = runs / f"{task.recipe}-{way}-{seed}"
    still = ["train.steps=1", "optimizer.learning_rate=0.0", "model.dropout=0.0"] if way == "base" else []
    keys = [f"seed={seed}", f"init_from={origin}", "log.every_steps=1", *still]
    own = [f"--config={recipe}", f"--workdir={workdir}", *(f"--config.{key}" for key in keys), *flags]
    summary = said([sys.executable, "-m", "gptjax.train", "--json", *own])
    figures = said([sys.executable, "-m", "gptjax.evaluate", "--json", f"--workdir={workdir}", *task.measure])
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    return {
        "score": figures[task.score],
        "figures": {name: value for name, value in figures.items() if name != "file"},
        "minutes": round(summary["seconds"] / 60, 2),
        "trained": 0 if way == "base" else tuned(read_config(workdir), origin),
        "sample": (workdir / "samples.txt").read_text(encoding="utf-8"),
        "looks": [[line["step"], line["val/loss"]] for line in lines if "val/loss" in line],
    }


def said(command: list[str]) -> dict[str, Any]:
    """The last object that a command prints; what it tells a person goes to the person."""
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, encoding="utf-8", check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tuned(config: Any, base: Path) -> int:
    """How many parameters a run of this config that begins with a base trains."""
    import jax

    from gptjax import models
    from gptjax.finetune import methods
    from gptjax.runs import pretrained

    shapes = models.shapes(methods.build_model(config))
    part = pretrained.partition_shapes(base, config, shapes).tuned if pretrained.is_partial(config) else shapes
    return sum(leaf.size for leaf in jax.tree.leaves(part))


def from_scratch(base: Path, workdir: Path, seed: int) -> Path:
    """A run of the base's network and tokenizer with parameters drawn by that seed; made once."""
    import jax

    import gptjax
    from gptjax import models
    from gptjax.core import rng
    from gptjax.interop import convert_run

    if not workdir.exists():
        run = gptjax.load(base)
        params = jax.jit(lambda: models.init(run.model, rng.key(seed, "init")))()
        convert_run.new_run(run, params, workdir, "scratch")
    return workdir


def words(task: Task, flags: Sequence[str]) -> dict[str, Any]:
    """Logistic regression on counts of words and pairs of words, of Chinese on letters; C by the held-out split."""
    import time

    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.linear_model import LogisticRegression

    from gptjax.data import examples, task_formats
    from gptjax.runs import config as configs

    started = time.monotonic()
    c = configs.resolve(configs.read(str(ROOT / f"configs/finetune/{task.recipe}.py"), list(flags))).data
    by_split = {split: examples.read(c, split) for split in ("train", "val", *(["test"] if task.measure else []))}
    texts = {split: examples.texts(c, found) for split, found in by_split.items()}
    labels = {split: [task_formats.label_of(one, c.examples) for one in found] for split, found in by_split.items()}
    letters = {"analyzer": "char"} if task.recipe == "hotels" else {"token_pattern": r"(?u)\S+"}
    counts = CountVectorizer(ngram_range=(1, 2), min_df=2, **letters)
    read = {split: counts.fit_transform(x) if split == "train" else counts.transform(x) for split, x in texts.items()}
    weight = "balanced" if c.examples.balanced else None
    models = [
        LogisticRegression(C=C, max_iter=2000, class_weight=weight).fit(read["train"], labels["train"])
        for C in (0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    ]
    best = max(models, key=lambda model: model.score(read["val"], labels["val"]))
    split = "test" if task.measure else "val"
    return {
        "score": float(best.score(read[split], labels[split])),
        "minutes": round((time.monotonic() - started) / 60, 2),
        "trained": len(counts.vocabulary_) + 1,
    }


ONCE = ("words", "lead", "base")  # draw nothing, so one seed is enough


def lead(rows: Sequence[dict[str, Any]], task: Task) -> list[dict[str, Any]]:
    """The row of copying the first sentences, which every run on summaries measures beside its own."""
    key = f"lead3_{task.score}"
    found = [one["figures"][key] for one in rows if key in one.get("figures", {})]
    return [{"way": "lead", "seed": 0, "score": found[0], "minutes": 0.0, "trained": 0}] if found else []


def table(rows: Sequence[dict[str, Any]], task: Task) -> str:
    """The rows as Markdown: of each way the mean and the spread over seeds."""
    lines = []
    for way in task.ways:
        own = [one for one in rows if one["way"] == way]
        if own:
            scores = [task.scale * one["score"] for one in own]
            each = ", ".join(f"{score:.2f}" for score in scores)
            spread = f"{statistics.stdev(scores):.2f}" if len(scores) > 1 else ""
            minutes = statistics.median(one["minutes"] for one in own)
            lines.append(
                f"| {way} | {statistics.mean(scores):.2f} | {spread} | {each} | {minutes:.1f} | {own[0]['trained']:,} |"
            )
    head = f"| method | {task.score} | deviation | seeds | minutes | trained |\n|---|---|---|---|---|---|"
    return "\n".join([head, *lines])


def plot(rows: Sequence[dict[str, Any]], task: Task, path: Path) -> None:
    """A point for each seed of each way, and a line at the simple baseline."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    ways = [way for way in task.ways if any(one["way"] == way for one in rows)]
    figure, axes = plt.subplots(figsize=(8, 0.6 + 0.4 * len(ways)), layout="constrained")
    for place, way in enumerate(ways):
        scores = [task.scale * one["score"] for one in rows if one["way"] == way]
        axes.plot(scores, [place] * len(scores), "o", alpha=0.7, color="C0")
        axes.plot([statistics.mean(scores)], [place], "|", markersize=18, color="C1")
        if way in ONCE:
            axes.axvline(scores[0], color="C2", linewidth=1, linestyle=":")
    axes.set_yticks(range(len(ways)), ways)
    axes.set_ylim(len(ways) - 0.5, -0.5)
    unit = " (nats per token)" if task.score == "loss" else ""
    axes.set(xlabel=f"{task.score}{unit}, {'more' if task.more else 'less'} is better; a dot a seed, a bar their mean")
    axes.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Trains what is asked for, row by row, and writes what came out after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--base", type=Path, default=ROOT / "runs" / "novels", help="a pretrained run")
    parser.add_argument("--ways", help="some of the task's, with commas; default: all")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "finetune", help="where the runs go")
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where TASK.json and TASK.png go")
    parser.add_argument("--redraw", action="store_true", help="train nothing")
    flags, overrides = parser.parse_known_args()
    task, base, runs = TASKS[flags.task], flags.base.resolve(), flags.runs.resolve()
    file = flags.out / f"{flags.task}.json"
    rows = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else []
    chosen = flags.ways.split(",") if flags.ways else [way for way in task.ways if way != "lead"]
    wanted = [(way, int(seed)) for seed in flags.seeds.split(",") for way in chosen]
    for way, seed in [] if flags.redraw else wanted:
        known = {(one["way"], one["seed"]) for one in rows}
        if (way, seed) in known or (way in ONCE and way in {name for name, _ in known}):
            continue
        print(f"{flags.task}: {way}, seed {seed}", file=sys.stderr, flush=True)
        found = words(task, overrides) if way == "words" else trained(task, way, seed, base, runs, overrides)
        rows.append(found | {"way": way, "seed": seed})
        flags.out.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    rows = [one for one in rows if one["way"] != "lead"] + lead(rows, task)
    print(table(rows, task))
    plot(rows, task, flags.out / f"{flags.task}.png")


if __name__ == "__main__":
    main()
