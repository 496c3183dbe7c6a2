"""Ragged matrix product of a mixture of experts on TPUs, in tiles that fit a core's vector memory (VMEM).

By default XLA's tiles grow with the maximum number of rows of an expert, and from some thousands on they do not fit:
"Mosaic failed to compile TPU kernel", or "CompileTimeScopedVmemOom". The tiling of a `ragged_dot` does not carry over
to the gradient that JAX derives, so both gradients are explicit products here.
"""

from typing import Any

import jax
from jax.experimental.xla_metadata import set_xla_metadata

ROWS, COLUMNS = 512, 1024  # of a bfloat16 tile: double-buffered operands and float32 sums take 10 of 16 MiB of VMEM
LANES = 128  # of a vector register

_ROWS_OF_AN_EXPERT = jax.lax.RaggedDotDimensionNumbers((((1,), (1,)), ((), ())), (0,), (0,))
_OVER_ROWS = jax.lax.RaggedDotDimensionNumbers((((0,), (0,)), ((), ())), (0,), ())


def tile(size: int, most: int) -> int:
    """The largest multiple of LANES up to `most` that divides a size; 0 if there is none."""
    return next((n for n in range(most - most % LANES, 0, -LANES) if size % n == 0), 0)


def tiling(x_MK: jax.Array, N: int) -> dict[str, str]:
    """XLA metadata with the tiling of a product of x and [K, N]; empty if no tile divides the shapes."""
    (M, K), columns = x_MK.shape, COLUMNS * 2 // max(x_MK.dtype.itemsize, 2)
    tiles = tile(M, ROWS), tile(K, columns), tile(N, columns)
    return {"ragged_dot_tiling": ",".join(map(str, tiles))} if all(tiles) else {}


@jax.custom_vjp
def ragged_product(x_MD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> jax.Array:
    """Same as gptjax.models.kernels.reference.ragged_product, for operands of one dtype."""
    with set_xla_metadata(**tiling(x_MD, kernel_EDF.shape[-1])):
        return jax.lax.ragged_dot_general(x_MD, kernel_EDF, sizes_E, _ROWS_OF_AN_EXPERT)


def _forward(x_MD: jax.Array, kernel_EDF: jax.Array, sizes_E: jax.Array) -> tuple[jax.Array, Any]:
    return ragged_product(x_MD, kernel_EDF, sizes_E), (x_MD, kernel_EDF, sizes_E)


def _backward(saved: Any, dy_MF: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    x_MD, kernel_EDF, sizes_E = saved
    dx_MD = ragged_product(dy_MF, kernel_EDF.swapaxes(1, 2), sizes_E)
    with set_xla_metadata(**tiling(x_MD, dy_MF.shape[-1])):
        return dx_MD, jax.lax.ragged_dot_general(x_MD, dy_MF, sizes_E, _OVER_ROWS), None


ragged_product.defvjp(_forward, _backward)
