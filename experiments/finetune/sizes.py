"""What each way to fine-tune a GPT-2 small trains and keeps: parameters, optimizer bytes, a checkpoint's, frozen ones.

python experiments/finetune/sizes.py --out=experiments/finetune/sizes.json

The states are really made, of random parameters, and the checkpoints really written, into a folder that is removed.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from gptjax import models, optim
from gptjax.core import rng
from gptjax.finetune.methods import METHODS, build_model
from gptjax.runs import config as configs
from gptjax.runs.checkpoints import Checkpoints
from gptjax.runs.train_state import TrainState, init_from_base, parameter_count

ROOT = Path(__file__).resolve().parents[2]
OPTIONS = {"rule": {"rule": "attention/"}, "top": {"top_layers": 2}}
ROWS = [(method, "none") for method in METHODS] + [("lora", "int8"), ("lora", "nf4")]


def state_of(config: Any, base: Any) -> TrainState:
    """The state of a run that tunes the base; what is 0 at first is drawn, since zeros take no room on disk."""
    model, key = build_model(config), rng.key(0, "sample")
    state = jax.jit(lambda base: init_from_base(base, model, optim.optimizer(config), config))(base)

    def drawn(leaf: jax.Array) -> jax.Array:
        return jax.random.normal(key, leaf.shape, leaf.dtype) if leaf.ndim and leaf.dtype == jnp.float32 else leaf

    own, opt_state = jax.jit(lambda *trees: jax.tree.map(drawn, trees))(state.params, state.opt_state)
    return state.replace(params=own, opt_state=opt_state)


def measured(method: str, quantise: str, recipe: str, base: Any) -> dict[str, Any]:
    """One row of the table."""
    flags = [f"--config.finetune.quantise={quantise}"]
    flags += [f"--config.finetune.{key}={value}" for key, value in OPTIONS.get(method, {}).items()]
    config = configs.resolve(configs.read(recipe, [f"--config.finetune.method={method}", *flags]))
    config = configs.with_vocabulary(config, 50257)
    state = state_of(config, base)
    with tempfile.TemporaryDirectory() as folder:
        with Checkpoints(Path(folder), keep=1) as checkpoints:
            checkpoints.save(1, state)
            checkpoints.finish(state)
        written = sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())
    return {
        "method": method,
        "quantise": quantise,
        "trained": parameter_count(state.params),
        "frozen": parameter_count(state.eval_shapes()) - parameter_count(state.params),
        "frozen_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.frozen)),
        "optimizer_bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(state.opt_state)),
        "checkpoint_bytes": written,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    whole = rows[0]["trained"]
    lines = [
        f"| {named(row)} | {row['trained']:,} | {row['trained'] / whole:.2%} | {row['optimizer_bytes'] / 1e6:,.1f} "
        f"| {row['checkpoint_bytes'] / 1e6:,.1f} | {row['frozen_bytes'] / 1e6:,.1f} |"
        for row in rows
    ]
    head = "| finetune.method | trained | of full | optimizer, MB | checkpoint, MB | frozen, MB |"
    return "\n".join([head, "|---|---|---|---|---|---|", *lines])


def named(row: dict[str, Any]) -> str:
    """A row's method, and how its base is kept where that is in few bits."""
    return row["method"] + ("" if row["quantise"] == "none" else f", {row['quantise']}")


def main() -> None:
    """Measures them all and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default=str(ROOT / "configs" / "gpt2.py"), help="the base's recipe")
    parser.add_argument("--out", type=Path, help="a JSON file")
    flags = parser.parse_args()
    config = configs.with_vocabulary(configs.resolve(configs.read(flags.config)), 50257)
    model = models.build(config.model)
    base = jax.jit(lambda: models.init(model, rng.key(0, "init")))()
    rows = [measured(*row, flags.config, base) for row in ROWS]
    if flags.out:
        flags.out.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
