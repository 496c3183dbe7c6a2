"""Grokking of addition modulo a prime: pairs are known by heart long before the rule is, and Fourier shows the rule.

python experiments/grokking/addition.py
python experiments/grokking/addition.py --redraw

The experiment of arXiv 2301.05217 (after 2201.02177) by the ordinary train command: the pairs become a .jsonl in which
each number is one character, and the answer alone is learnt. Accuracies of both sides are measured afterwards, of the
checkpoints that the run has kept. Keys of the config go as to gptjax.train (--config.KEY=VALUE). A run that was cut
short goes on; results.json and the figures are written to --out.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gptjax.config.errors import DataError
from gptjax.core import arguments, console, runtime
from gptjax.core.files import write_atomic

ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).resolve().parent
FIRST = 0x4E00  # the character of the number 0; one for each number, so that the tokenizer chars has an id for each
GENERALISES = 0.99  # accuracy from which on a side counts as solved
KEY_FREQUENCIES = 5  # as many as arXiv 2301.05217 finds in its model
SETTINGS: dict[str, Any] = {
    "model.layers": 1, "model.heads": 4, "model.width": 128, "model.context": 3, "model.activation": "relu",
    "model.tied_head": False,
    "data.tokenizer": "chars", "data.layout": "examples", "data.examples.form": "text",
    "data.examples.template": "{a}{b}=", "data.examples.answer": "{c}",
    "optimizer.learning_rate": 1e-3, "optimizer.weight_decay": 1.0, "optimizer.beta2": 0.98,
    "schedule.name": "constant", "schedule.warmup_steps": 10,
    "eval.batches": 1, "checkpoint.keep": 1, "log.every_steps": 10,
    "sample.max_tokens": 1, "sample.prompt": chr(FIRST) * 2 + "=",
}  # fmt: skip


# The pairs.


def letters(numbers: np.ndarray) -> list[str]:
    """One character for each number."""
    return [chr(FIRST + int(number)) for number in numbers]


def sides(p: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Pairs to learn from and the others, each [N, 3] of a, b and (a + b) mod p.

    Args:
      p: the modulus.
      share: of the p * p pairs, to learn from.
      seed: by which they are drawn.
    """
    a, b = np.divmod(np.random.default_rng(seed).permutation(p * p), p)
    whole = np.stack([a, b, (a + b) % p], axis=1)
    cut = round(share * p * p)
    return whole[:cut], whole[cut:]


def write_pairs(folder: Path, train: np.ndarray, held_out: np.ndarray) -> None:
    """A directory of examples as gptjax.train reads it: train.jsonl and val.jsonl."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, side in (("train", train), ("val", held_out)):
        rows = [dict(zip("abc", letters(row), strict=True)) for row in side]
        write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


# Training and measuring.


def recipe(folder: Path, pairs: int, steps: int, overrides: Sequence[str]) -> Any:
    """The config: all pairs to learn from in each batch, and a checkpoint kept for every fiftieth of the way."""
    from gptjax.runs import config as configs

    every = max(steps // 50, 1)
    keys = SETTINGS | {"data.path": folder, "data.batch_size": pairs, "train.steps": steps}
    keys |= {"eval.every_steps": every, "checkpoint.every_steps": 0, "checkpoint.keep_every": every}
    flags = [f"--config.{key}={value}" for key, value in keys.items()]
    return configs.read(str(ROOT / "configs" / "base.py"), [*flags, *overrides])


def measured(workdir: Path, both: Sequence[np.ndarray]) -> list[dict[str, float]]:
    """Accuracy and loss of the answer on the sides, of each checkpoint that is there, by step."""
    import gptjax
    from gptjax.data.tokenizers import tokenizers
    from gptjax.runs import checkpoint_dir

    found = []
    steps = sorted(checkpoint_dir.steps(workdir / "checkpoints"))
    first = gptjax.load(workdir, steps[0])
    texts = [["".join(letters(row[:2])) + "=" for row in side] for side in both]
    ids = [np.array([tokenizers.encode(first.tokenizer, text) for text in side], np.int32) for side in texts]
    answers = [np.array([tokenizers.encode(first.tokenizer, one)[0] for one in letters(side[:, 2])]) for side in both]
    with console.bar("checkpoints", len(steps)) as advance:
        for step in steps:
            run, line = gptjax.load(workdir, step), {"step": float(step)}
            for name, ids_BT, right_B in zip(("train", "held_out"), ids, answers, strict=True):
                logits_BV = np.asarray(first._apply(run.params, {"ids_BT": ids_BT}))[:, -1]
                line |= {f"{name}/{key}": value for key, value in quality(logits_BV, right_B).items()}
            found.append(line)
            advance(1)
    return found


def quality(logits_BV: np.ndarray, right_B: np.ndarray) -> dict[str, float]:
    """Accuracy, and loss in nats per answer."""
    top_B = logits_BV.max(-1)
    log_sum_B = top_B + np.log(np.exp(logits_BV - top_B[:, None]).sum(-1))
    loss_B = log_sum_B - logits_BV[np.arange(len(right_B)), right_B]
    return {"accuracy": float((logits_BV.argmax(-1) == right_B).mean()), "loss": float(loss_B.mean())}


def spectrum(table_PD: np.ndarray) -> np.ndarray:
    """The norm of each frequency 1 .. (p - 1) / 2 in the embedding of the numbers (arXiv 2301.05217, section 4.1).

    Args:
      table_PD: their rows in order.

    Returns:
      [(p - 1) / 2], of unit vectors cos(2 pi k a / p) and sin(2 pi k a / p) over a, both together.
    """
    p = len(table_PD)
    return np.sqrt(2 / p) * np.linalg.norm(np.fft.rfft(table_PD, axis=0)[1 : (p + 1) // 2], axis=-1)


def concentration(norms_K: np.ndarray) -> float:
    """The share of the squared norms that the greatest few frequencies have."""
    squares = np.sort(norms_K**2)[::-1]
    return float(squares[:KEY_FREQUENCIES].sum() / squares.sum())


def embedding(workdir: Path, step: int, p: int) -> np.ndarray:
    """[p, D]: the rows of the numbers in the token embedding of a checkpoint."""
    import gptjax
    from gptjax.data.tokenizers import tokenizers

    run = gptjax.load(workdir, step)
    rows = tokenizers.encode(run.tokenizer, "".join(letters(np.arange(p))))
    return np.asarray(run.params["tokens"]["embedding"])[rows]


def measure(flags: argparse.Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Trains the run, or finds it finished, and measures its checkpoints."""
    runtime.start()
    from gptjax.training import loop

    both = sides(flags.p, flags.share, flags.seed)
    write_pairs(flags.runs / "pairs", *both)
    config = recipe(flags.runs / "pairs", len(both[0]), flags.steps, overrides)
    workdir = flags.runs / "run"
    summary = loop.train(config, workdir)
    looks = measured(workdir, both)
    shown = {"early": int(looks[0]["step"]), "late": int(looks[-1]["step"])}
    norms = {when: spectrum(embedding(workdir, step, flags.p)) for when, step in shown.items()}
    return {
        "p": flags.p, "share": flags.share, "pairs": [len(side) for side in both], "overrides": [*overrides],
        "parameters": summary["parameters"], "seconds": summary["seconds"],
        "known_by_heart": reached(looks, "train"), "generalises": reached(looks, "held_out"),
        "concentration": {when: concentration(own) for when, own in norms.items()},
        "key_frequencies": sorted(int(k) + 1 for k in np.argsort(norms["late"])[::-1][:KEY_FREQUENCIES]),
        "looks": looks, "shown": shown, "norms": {when: own.tolist() for when, own in norms.items()},
    }  # fmt: skip


def reached(looks: Sequence[dict[str, float]], side: str) -> int | None:
    """The first step that was looked at from which on the side's accuracy stays at GENERALISES; None: it never does."""
    good = [look[f"{side}/accuracy"] >= GENERALISES for look in looks]
    from_end = next((i for i, one in enumerate(reversed(good)) if not one), len(good))
    return int(looks[len(good) - from_end]["step"]) if from_end else None


# Results.


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


def plot(found: dict[str, Any], out: Path) -> None:
    """accuracy.png: accuracy and loss by step; fourier.png: norms of the embedding's frequencies, early and late."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [look["step"] for look in found["looks"]]
    names = {"train": "pairs learnt from", "held_out": "held-out pairs"}
    figure, panels = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for axes, kind in zip(panels, ("accuracy", "loss"), strict=True):
        for side, label in names.items():
            axes.plot(steps, [look[f"{side}/{kind}"] for look in found["looks"]], label=label)
        axes.set(xscale="log", xlabel="step", ylabel=kind if kind == "accuracy" else "loss (nats per answer)")
        axes.grid(alpha=0.3)
    panels[1].set_yscale("log")
    panels[0].legend()
    figure.suptitle(f"a + b mod {found['p']}, {found['share']:.0%} of the pairs learnt from", fontsize=11)
    figure.savefig(out / "accuracy.png", dpi=110)
    plt.close(figure)

    figure, panels = plt.subplots(2, 1, figsize=(8, 5), layout="constrained", sharex=True)
    for axes, (when, norms) in zip(panels, found["norms"].items(), strict=True):
        axes.bar(np.arange(1, len(norms) + 1), norms, color="tab:blue")
        share = found["concentration"][when]
        title = f"after step {found['shown'][when]:,}: {share:.0%} of the squares in {KEY_FREQUENCIES} frequencies"
        axes.set_title(title, fontsize=11)
        axes.set_ylabel("norm")
        axes.grid(alpha=0.3, axis="y")
    panels[-1].set_xlabel(f"frequency k of cos and sin(2πka / {found['p']}) in the embedding of a")
    figure.savefig(out / "fourier.png", dpi=110)
    plt.close(figure)


def said(found: dict[str, Any]) -> str:
    """The result in a few lines."""
    rows = []
    for side, name, key in (
        ("train", "pairs learnt from", "known_by_heart"),
        ("held_out", "held-out pairs", "generalises"),
    ):
        from_step, last = found[key], found["looks"][-1][f"{side}/accuracy"]
        until = f"{GENERALISES:.0%} right from step {from_step:,} on" if from_step else f"{last:.1%} right at the end"
        rows.append(f"{name:<19} {until}")
    early, late = (f"{found['concentration'][when]:.0%}" for when in ("early", "late"))
    keys = ", ".join(map(str, found["key_frequencies"]))
    rows.append(f"{'frequencies':<19} {KEY_FREQUENCIES} have {early} of the squares early, {late} late: {keys}")
    return "\n".join(rows)


def main(argv: Sequence[str]) -> None:
    """Trains and measures, or reads what is there, and draws it."""
    parser = arguments.Parser(description=__doc__)
    parser.add_argument("--p", type=int, default=59, help="the modulus, a prime")
    parser.add_argument("--share", type=float, default=0.35, help="of the pairs, to learn from")
    parser.add_argument("--seed", type=int, default=0, help="by which these are drawn")
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "grokking", help="where pairs and run go")
    parser.add_argument("--out", type=Path, default=HERE, help="where results.json and the figures go")
    parser.add_argument("--redraw", action="store_true", help="the figures of the results that are there")
    flags, overrides = parser.parse_known_args(argv)
    flags.out.mkdir(parents=True, exist_ok=True)
    found = read(flags.out) if flags.redraw else measure(flags, overrides)
    if not flags.redraw:
        write_atomic(flags.out / "results.json", json.dumps(found) + "\n")
    plot(found, flags.out)
    shown = {key: value for key, value in found.items() if key not in ("looks", "norms")}
    print(json.dumps(shown) if flags.json else said(found))


if __name__ == "__main__":
    arguments.run(main)
