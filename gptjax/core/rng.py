"""Random streams: each is `config.seed` folded with a constant of its own, and with a step where it has one."""

import jax
import numpy as np

STREAMS = {"init": 0, "batches": 1, "dropout": 2, "sample": 3, "hessian": 4, "finetune": 5, "evolution": 6}


def key(seed: int, stream: str, step: int | jax.Array | None = None) -> jax.Array:
    """The key of a named stream, at a step where it is given."""
    folded = jax.random.fold_in(jax.random.key(seed), STREAMS[stream])
    return folded if step is None else jax.random.fold_in(folded, step)


def integer(seed: int, stream: str) -> int:
    """The same for what wants a plain integer, below 2^32."""
    return int(np.random.SeedSequence((seed, STREAMS[stream])).generate_state(1)[0])
