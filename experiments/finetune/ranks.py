"""AdaLoRA's budget over a run, and how many ranks each matrix has at its end: two panels of one picture.

python -m gptjax.train --config=configs/finetune/sst2.py:adalora --config.init_from=runs/novels \\
    --config.checkpoint.keep_every=5 --workdir=runs/ranks
python experiments/finetune/ranks.py --workdir=runs/ranks

The line is the schedule (arXiv 2303.10512 eq. 12). A dot is what a checkpoint has: numbers in the middle that are
not 0, which is the budget exactly where ranks were just chosen, and more in between, where others may grow again.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).resolve().parent


def middles(workdir: Path, step: int) -> dict[str, int]:
    """How many ranks of each matrix are not 0 at a step."""
    from gptjax.finetune import paths
    from gptjax.runs import pretrained

    leaves = paths.flat(pretrained.load_params(workdir, step=step))
    own = {path.removesuffix("/lora_e"): leaf for path, leaf in leaves.items() if path.endswith("/lora_e")}
    return {name: int(np.count_nonzero(leaf)) for name, leaf in own.items()}


def read(workdir: Path) -> dict[str, Any]:
    """The schedule of a run, what its checkpoints have, and the ranks at its end."""
    from gptjax.optim.update_rules import rank_budget
    from gptjax.runs.checkpoint_dir import steps
    from gptjax.runs.directory import read_config

    config = read_config(workdir)
    c, last_step = config.finetune.adalora, config.train.steps
    saved = sorted(steps(workdir / "checkpoints"))
    found = {step: middles(workdir, step) for step in saved}
    matrices = len(found[saved[-1]])
    first, last = matrices * c.first_rank, matrices * config.finetune.rank
    curve = [int(rank_budget(t, first, last, c.warmup_steps, c.final_steps, last_step)) for t in range(last_step + 1)]
    chosen = [c.warmup_steps <= t <= last_step - c.final_steps and t % c.every_steps == 0 for t in saved]
    return {
        "schedule": curve,
        "checkpoints": [[step, sum(found[step].values()), at] for step, at in zip(saved, chosen, strict=True)],
        "ranks": found[saved[-1]],
    }


def plot(facts: dict[str, Any], path: Path) -> None:
    """Both panels."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    left.plot(facts["schedule"], color="C0", label="budget")
    for at, label, marker in ((True, "ranks just chosen", "o"), (False, "in between, and final", ".")):
        points = [(step, count) for step, count, chosen in facts["checkpoints"] if chosen == at]
        left.plot(*zip(*points, strict=True), marker, color="C1" if at else "C2", markersize=5, label=label)
    left.set(xlabel="step", ylabel="ranks of all matrices together", ylim=(0, None))
    left.legend()
    left.grid(alpha=0.3)
    blocks = sorted({name.split("/")[0] for name in facts["ranks"]}, key=lambda name: int(name.split("_")[1]))
    kinds = sorted({name.split("/", 1)[1] for name in facts["ranks"]})
    table = np.array([[facts["ranks"].get(f"{block}/{kind}", 0) for kind in kinds] for block in blocks])
    right.imshow(table, cmap="Blues", vmin=0, aspect="auto")
    for (row, column), count in np.ndenumerate(table):
        dark = count > 0.6 * table.max()
        right.text(column, row, str(count), ha="center", va="center", color="white" if dark else "black")
    right.set_xticks(range(len(kinds)), kinds, rotation=20)
    right.set_yticks(range(len(blocks)), blocks)
    right.set_title(f"ranks at the end, {table.sum()} in all", fontsize=11)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def main() -> None:
    """Reads a run, or the facts of an earlier reading, and draws them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--workdir", type=Path, help="a run with finetune.method=adalora; default: read ranks.json again"
    )
    parser.add_argument("--out", type=Path, default=HERE / "results", help="where ranks.json and ranks.png go")
    flags = parser.parse_args()
    file = flags.out / "ranks.json"
    flags.out.mkdir(parents=True, exist_ok=True)
    if flags.workdir:
        file.write_text(json.dumps(read(flags.workdir)) + "\n", encoding="utf-8")
    facts = json.loads(file.read_text(encoding="utf-8"))
    plot(facts, flags.out / "ranks.png")
    kept = facts["ranks"]
    print(f"{sum(kept.values())} ranks of {facts['schedule'][0]} in {len(kept)} matrices; {flags.out / 'ranks.png'}")


if __name__ == "__main__":
    main()
