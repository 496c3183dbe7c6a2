"""The ragged product of TPUs against JAX's, and its tiling."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import compare, normal

from gptjax.models.kernels import reference, tpu


@pytest.mark.parametrize("D, F", [(128, 256), (24, 40)], ids=["tiled", "no tile divides it"])
def test_values_and_gradients_are_plain_ones(D, F):
    rng, sizes = np.random.default_rng(0), jnp.array([100, 0, 60, 40])
    actual, expected = (lambda x, w, f=f: f(x, w, sizes) for f in (tpu.ragged_product, reference.ragged_product))
    compare(actual, expected, normal(rng, 256, D), normal(rng, 4, D, F))


@pytest.mark.parametrize(
    "M, K, N, dtype, message",
    [
        (65536, 768, 3072, "bfloat16", "512,768,1024"),
        (65536, 768, 3072, "float32", "512,384,512"),
        (384, 128, 256, "bfloat16", "384,128,256"),
        (120, 768, 3072, "bfloat16", None),
        (512, 100, 128, "bfloat16", None),
    ],
)
def test_tiles_divide_the_product(M, K, N, dtype, message):
    assert tpu.tiling(jax.ShapeDtypeStruct((M, K), dtype), N).get("ragged_dot_tiling") == message
