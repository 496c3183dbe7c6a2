"""Random streams: each folds a constant, and optionally a step, into `config.seed`."""

import jax
import numpy as np

STREAMS = {"init": 0, "batches": 1, "dropout": 2, "sample": 3, "hessian": 4, "finetune": 5, "evolution": 6}


def key(seed: int, stream: str, step: int | jax.Array | None = None) -> jax.Array:
    """Returns the key of a named stream, optionally at a step."""
    folded = jax.random.fold_in(jax.random.key(seed), STREAMS[stream])
    return folded if step is None else jax.random.fold_in(folded, step)


def integer(seed: int, stream: str) -> int:
    """Returns the seed of a named stream as an integer below 2^32."""
    return int(np.random.SeedSequence((seed, STREAMS[stream])).generate_state(1)[0])
