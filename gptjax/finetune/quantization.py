"""Quantization of a frozen base's matrices, as in QLoRA (arXiv 2305.14314): qwix arrays in place of float32 ones.

Functions of parameter trees. A matrix is stored as a `qwix.QArray` or `Packed`; `dequantize` gives the same float32
values each time. Trainable parameters are never quantized.
"""

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from gptjax.config.errors import ConfigError
from gptjax.finetune import paths
from gptjax.finetune.methods import EXCLUDED_MODULES

BLOCK = 64  # block size of nf4: elements that share a scale (arXiv 2305.14314 section 3)
MIN_BLOCK = 16  # below it the scales, of four bytes each, would take more than half the memory of the elements


def int8_options(shape: Sequence[int]) -> dict[str, Any]:
    """int8: q = round(w / s) in -127 ... 127, s = max|w| / 127 of each column (arXiv 2305.14314 eq. 1)."""
    # qwix's own 127.5 would put each column's largest element on the boundary between two roundings.
    calibration = f"absmax,{127.5 / 127!r}"
    return {"qtype": "int8", "channelwise_axes": channelwise_axes(shape), "calibration_method": calibration}


def nf4_options(shape: Sequence[int]) -> dict[str, Any]:
    """NF4: the nearest of the 16 levels of arXiv 2305.14314 appendix E to w / s, s = max|w| of a block of a column.

    The scales are float32, 4 bytes for 64 elements; section 3 of the paper quantizes them too.
    """
    rows = len(shape) - 2
    return {"qtype": "nf4", "channelwise_axes": channelwise_axes(shape), "tiled_axes": {rows: block_size(shape[rows])}}


def channelwise_axes(shape: Sequence[int]) -> list[int]:
    """Returns the axes of matrices [..., D, F] but D, which a product sums over."""
    return [axis for axis in range(len(shape)) if axis != len(shape) - 2]


def block_size(rows: int) -> int:
    """Returns the number of a column's elements that share a scale: the largest divisor of `rows` from 16 to 64, or
    `rows` if there is none.
    """
    divisors = [size for size in range(MIN_BLOCK, min(BLOCK, rows) + 1) if rows % size == 0]
    return max(divisors, default=rows)


# Choices of `finetune.quantise`: qwix's arguments by the shape of matrices [..., D, F].
QUANTIZERS: dict[str, Callable[[Sequence[int]], dict[str, Any]] | None] = {
    "none": None,
    "int8": int8_options,
    "nf4": nf4_options,
}


class Packed(flax.struct.PyTreeNode):
    """A 4-bit QArray, two elements a byte: some devices do not support 4-bit arrays in compiled programs.

    Attributes:
      pairs: uint8 [..., (D + 1) // 2, F]: rows 0, 2, ... in the low bits, rows 1, 3, ... in the high ones.
      scale: float32 [..., D / block, F].
      rows: D.
    """

    pairs: jax.Array
    scale: jax.Array
    rows: int = flax.struct.field(pytree_node=False)


def pack(array: Any) -> Packed:
    """Packs a QArray [..., D, F] of nf4."""
    D = array.shape[-2]
    padding = [(0, 0)] * (array.ndim - 2) + [(0, D % 2), (0, 0)]
    numbers = jnp.pad(array.qvalue.astype(jnp.uint8), padding)
    return Packed(numbers[..., ::2, :] | numbers[..., 1::2, :] << 4, array.scale, D)


def unpack(array: Packed) -> Any:
    """Unpacks to a QArray, whose qvalue is uint8."""
    *leading, _, F = array.pairs.shape
    numbers = jnp.stack([array.pairs & 15, array.pairs >> 4], -2).reshape(*leading, -1, F)
    return import_qwix("nf4").QArray(numbers[..., : array.rows, :], array.scale, None, "nf4")


def import_qwix(quantizer: str) -> Any:
    """Imports qwix.

    Raises:
      ConfigError: qwix is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ConfigError(f"finetune.quantise={quantizer} needs qwix: pip install 'gptjax[quant]'") from error
    return qwix


def is_quantizable(path: str) -> bool:
    """Returns True for hidden matrices: no embedding, norm, bias, router or head."""
    return path.endswith("/kernel") and not EXCLUDED_MODULES.search(path)


def quantize(tree: Any, quantizer: str) -> Any:
    """Quantizes the hidden matrices [..., D, F] of a tree.

    Args:
      tree: float32 parameters, nested dictionaries.
      quantizer: `finetune.quantise`. int8 gives QArrays, `qvalue` int8 [..., D, F], `scale` float32 [..., 1, F]; nf4
        gives `Packed`; none gives the tree itself.

    Raises:
      ConfigError: qwix is not installed.
    """
    if QUANTIZERS[quantizer] is None:
        return tree
    return paths.nested(
        {path: quantize_matrix(x, quantizer) if is_quantizable(path) else x for path, x in paths.flat(tree).items()}
    )


@partial(jax.jit, static_argnums=1)
def quantize_matrix(matrix: jax.Array, quantizer: str) -> Any:
    """Quantizes one matrix to int8 or nf4. Always compiled: eager operations round differently."""
    options = QUANTIZERS[quantizer]
    assert options is not None
    array = import_qwix(quantizer).quantize(matrix, **options(matrix.shape))
    # Otherwise XLA moves factors of the scales into products with them, and the bits depend on the program.
    array = jax.lax.optimization_barrier(array)
    return pack(array) if quantizer == "nf4" else array


def dequantize(tree: Any) -> Any:
    """Replaces the quantized arrays of a tree by float32 arrays of the same sharding; other leaves stay."""
    return paths.nested({path: _dequantize(leaf) for path, leaf in paths.flat(tree).items()})


def quantize_dequantize(tree: Any, quantizer: str) -> Any:
    """Quantizes and dequantizes a tree, leaf by leaf, to the very values that a run computes with.

    Args:
      tree: parameters, nested dictionaries of arrays.
      quantizer: `finetune.quantise`; none gives the tree itself.

    Raises:
      ConfigError: qwix is not installed.
    """
    if QUANTIZERS[quantizer] is None:
        return tree
    import_qwix(quantizer)
    return paths.nested(
        {
            path: _round_trip(quantizer, _sharding_of(x))(x) if is_quantizable(path) else x
            for path, x in paths.flat(tree).items()
        }
    )


def dequantize_matrix(array: Any) -> jax.Array:
    """Dequantizes one matrix, to float32 [..., D, F]."""
    whole = unpack(array) if isinstance(array, Packed) else array
    return import_qwix("int8").dequantize(whole)


def _dequantize(leaf: Any) -> Any:
    if isinstance(leaf, Packed):
        return _jit_dequantize(_sharding_of(leaf.pairs))(leaf)
    return _jit_dequantize(_sharding_of(leaf.qvalue))(leaf) if hasattr(leaf, "qvalue") else leaf


def _sharding_of(x: Any) -> Any:
    """Returns an array's sharding; None for tracers and host arrays."""
    return x.sharding if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) else None


@cache
def _jit_dequantize(sharding: Any) -> Any:
    return jax.jit(dequantize_matrix, out_shardings=sharding)


@cache
def _round_trip(quantizer: str, sharding: Any) -> Any:
    return jax.jit(lambda matrix: dequantize_matrix(quantize_matrix(matrix, quantizer)), out_shardings=sharding)
