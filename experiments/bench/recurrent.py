"""Times forward and backward pass of a recurrent language model: ours and torch.nn's, in turns on the same shape.

    python experiments/bench/recurrent.py --cell=lstm
    python experiments/bench/recurrent.py --cell=gru --layers=2 --json

Both embed the same ids, go through the same layers, biases included, and end in the cross-entropy of an untied head.
A figure is the median of a side's steps; the first steps of a turn are not timed. The last line of --json has `ratio`,
the peer's time by ours.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

from gptjax.core import runtime

REPO = Path(__file__).resolve().parents[2]
UNTIMED, TIMED = 2, 5  # steps of a turn


def ours(flags: argparse.Namespace, ids: object) -> Callable[[], float]:
    """A step of our side, which gives the loss."""
    import jax
    import jax.numpy as jnp

    from gptjax import models
    from gptjax.models import kernels
    from gptjax.runs import config as configs

    config = configs.read(str(REPO / "configs" / "base.py"))
    config.model.update(arch="recurrent", use_bias=True, tied_head=False, heads=1, vocabulary=flags.vocab)
    config.model.update({key: getattr(flags, key) for key in ("cell", "layers", "width", "context")})
    config = configs.resolve(config)
    model = models.build(config.model, flags.dtype)
    params = jax.jit(lambda: models.init(model, jax.random.key(0)))()
    inputs_BT, targets_BT = jnp.asarray(ids)[:, :-1], jnp.asarray(ids)[:, 1:]
    weights_BT = jnp.full(inputs_BT.shape, 1 / inputs_BT.size)

    def loss(params: object) -> jax.Array:
        said = models.forward(model, params, {"ids_BT": inputs_BT})
        return models.cross_entropy(model, said, targets_BT, weights_BT)

    options = kernels.compiler_options(config.model, flags.dtype)
    step = jax.jit(jax.value_and_grad(loss)).lower(params).compile(compiler_options=options)
    return lambda: float(jax.block_until_ready(step(params))[0])


def peer(flags: argparse.Namespace, ids: object) -> Callable[[], float]:
    """The same of torch's."""
    import torch

    layers = getattr(torch.nn, flags.cell.upper())(flags.width, flags.width, flags.layers, batch_first=True)
    embedding, head = torch.nn.Embedding(flags.vocab, flags.width), torch.nn.Linear(flags.width, flags.vocab, False)
    torch.nn.init.normal_(embedding.weight, std=0.02)
    torch.nn.init.normal_(head.weight, std=0.02)
    every = torch.nn.ModuleList([embedding, layers, head])
    inputs_BT, targets_BT = (torch.tensor(part).long() for part in (ids[:, :-1], ids[:, 1:]))  # type: ignore[index]

    def step() -> float:
        every.zero_grad(set_to_none=True)
        logits = head(layers(embedding(inputs_BT))[0])
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())
        loss.backward()
        return loss.item()

    return step


def main() -> None:
    """Prints both sides' medians and their ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cell", default="lstm", choices=("rnn", "gru", "lstm"))
    for name, value in dict(layers=1, width=256, context=64, batch=32, vocab=65, rounds=7).items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32", help="of ours; the peer is in float32")
    parser.add_argument("--json", action="store_true")
    flags = parser.parse_args()
    runtime.start()
    import numpy as np

    ids = np.random.default_rng(0).integers(0, flags.vocab, (flags.batch, flags.context + 1), np.int32)
    sides = {"ours": ours(flags, ids), "peer": peer(flags, ids)}
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(flags.rounds):
        for name, step in sides.items():
            for i in range(UNTIMED + TIMED):
                start = time.perf_counter()
                step()
                if i >= UNTIMED:
                    times[name].append(time.perf_counter() - start)
    figures = {f"{name}_ms": round(1e3 * statistics.median(found), 2) for name, found in times.items()}
    figures["ratio"] = round(figures["peer_ms"] / figures["ours_ms"], 3)
    print(json.dumps(vars(flags) | figures) if flags.json else figures)


if __name__ == "__main__":
    main()
