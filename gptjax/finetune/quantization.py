"""A frozen base's matrices in few bits, as QLoRA keeps them (arXiv 2305.14314): qwix's arrays in place of float32 ones.

Trees of parameters in, trees out. At rest a matrix is a `qwix.QArray`, or `Packed`; whoever computes with it asks
`dequantised`, which gives the same float32 numbers each time. What trains is never in such a tree.
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

BLOCK = 64  # of nf4: numbers that share a scale (arXiv 2305.14314 section 3)
MIN_BLOCK = 16  # of fewer the scales, of four bytes each, would take half as much as their numbers, or more


def int8_options(shape: Sequence[int]) -> dict[str, Any]:
    """int8: q = round(w / s) in -127 ... 127, s = max|w| / 127 of each column (arXiv 2305.14314 eq. 1)."""
    # qwix's own 127.5 would put each column's largest number on the border between two roundings.
    longest = f"absmax,{127.5 / 127!r}"
    return {"qtype": "int8", "channelwise_axes": channelwise_axes(shape), "calibration_method": longest}


def nf4_options(shape: Sequence[int]) -> dict[str, Any]:
    """NF4: the nearest of the 16 levels of arXiv 2305.14314 appendix E to w / s, s = max|w| of a block of a column.

    The scales are float32, 4 bytes for 64 numbers; section 3 of the paper quantises them once more.
    """
    rows = len(shape) - 2
    return {"qtype": "nf4", "channelwise_axes": channelwise_axes(shape), "tiled_axes": {rows: block_size(shape[rows])}}


def channelwise_axes(shape: Sequence[int]) -> list[int]:
    """The axes of matrices [..., D, F] but D, along which a product sums."""
    return [axis for axis in range(len(shape)) if axis != len(shape) - 2]


def block_size(rows: int) -> int:
    """How many of a column's numbers share a scale: 64, or where that does not divide them the largest divisor below
    it, or all of them where there is none of 16 or more.
    """
    divisors = [size for size in range(MIN_BLOCK, min(BLOCK, rows) + 1) if rows % size == 0]
    return max(divisors, default=rows)


# `finetune.quantise`: what qwix is told, by the shape of matrices [..., D, F].
QUANTIZERS: dict[str, Callable[[Sequence[int]], dict[str, Any]] | None] = {
    "none": None,
    "int8": int8_options,
    "nf4": nf4_options,
}


class Packed(flax.struct.PyTreeNode):
    """A QArray of four bits, two numbers a byte: compiled programs refuse arrays of four bits on some devices.

    Attributes:
      pairs: uint8 [..., (D + 1) // 2, F]: rows 0, 2, ... in the low bits, rows 1, 3, ... in the high ones.
      scale: float32 [..., D / block, F].
      rows: D.
    """

    pairs: jax.Array
    scale: jax.Array
    rows: int = flax.struct.field(pytree_node=False)


def pack(array: Any) -> Packed:
    """A QArray [..., D, F] of nf4, packed."""
    D = array.shape[-2]
    padding = [(0, 0)] * (array.ndim - 2) + [(0, D % 2), (0, 0)]
    numbers = jnp.pad(array.qvalue.astype(jnp.uint8), padding)
    return Packed(numbers[..., ::2, :] | numbers[..., 1::2, :] << 4, array.scale, D)


def unpack(array: Packed) -> Any:
    """The other way round; its qvalue is uint8."""
    *leading, _, F = array.pairs.shape
    numbers = jnp.stack([array.pairs & 15, array.pairs >> 4], -2).reshape(*leading, -1, F)
    return import_qwix("nf4").QArray(numbers[..., : array.rows, :], array.scale, None, "nf4")


def import_qwix(how: str) -> Any:
    """qwix.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        import qwix
    except ImportError as error:
        raise ConfigError(f"finetune.quantise={how} needs qwix: pip install 'gptjax[quant]'") from error
    return qwix


def is_quantizable(path: str) -> bool:
    """Whether a parameter is a matrix, or several, of the model's inside: no table, norm, bias, router or head."""
    return path.endswith("/kernel") and not EXCLUDED_MODULES.search(path)


def quantize(tree: Any, how: str) -> Any:
    """The tree with its matrices inside the model [..., D, F] as they are kept.

    Args:
      tree: float32 parameters, nested dictionaries.
      how: `finetune.quantise`. int8: QArrays, `qvalue` int8 [..., D, F], `scale` float32 [..., 1, F]; nf4: `Packed`;
        none: the tree itself.

    Raises:
      ConfigError: qwix is not installed.
    """
    if QUANTIZERS[how] is None:
        return tree
    return paths.nested(
        {path: quantize_matrix(x, how) if is_quantizable(path) else x for path, x in paths.flat(tree).items()}
    )


@partial(jax.jit, static_argnums=1)
def quantize_matrix(matrix: jax.Array, how: str) -> Any:
    """One of them, int8 or nf4. Compiled always: the same operations one by one round otherwise."""
    told = QUANTIZERS[how]
    assert told is not None
    found = import_qwix(how).quantize(matrix, **told(matrix.shape))
    # Else XLA moves factors of the scales into products with them, which gives other bits than in another program.
    found = jax.lax.optimization_barrier(found)
    return pack(found) if how == "nf4" else found


def dequantize(tree: Any) -> Any:
    """The tree with float32 arrays in place of what `quantised` made, each where its numbers lie; all others are the
    tree's own.
    """
    return paths.nested({path: _dequantize(leaf) for path, leaf in paths.flat(tree).items()})


def quantize_dequantize(tree: Any, how: str) -> Any:
    """What `dequantised` gives of the tree when it is `quantised`, leaf by leaf; to the bit what a run computes with.

    Args:
      tree: parameters, nested dictionaries of arrays.
      how: `finetune.quantise`; none: the tree itself.

    Raises:
      ConfigError: qwix is not installed.
    """
    if QUANTIZERS[how] is None:
        return tree
    import_qwix(how)
    return paths.nested(
        {
            path: _round_trip(how, _sharding_of(x))(x) if is_quantizable(path) else x
            for path, x in paths.flat(tree).items()
        }
    )


def dequantize_matrix(array: Any) -> jax.Array:
    """float32 [..., D, F] of one matrix as it is kept."""
    whole = unpack(array) if isinstance(array, Packed) else array
    return import_qwix("int8").dequantize(whole)


def _dequantize(leaf: Any) -> Any:
    if isinstance(leaf, Packed):
        return _jit_dequantize(_sharding_of(leaf.pairs))(leaf)
    return _jit_dequantize(_sharding_of(leaf.qvalue))(leaf) if hasattr(leaf, "qvalue") else leaf


def _sharding_of(x: Any) -> Any:
    """Where an array lies; None of what is traced, and of what lies on no device."""
    return x.sharding if isinstance(x, jax.Array) and not isinstance(x, jax.core.Tracer) else None


@cache
def _jit_dequantize(there: Any) -> Any:
    return jax.jit(dequantize_matrix, out_shardings=there)


@cache
def _round_trip(how: str, there: Any) -> Any:
    return jax.jit(lambda matrix: dequantize_matrix(quantize_matrix(matrix, how)), out_shardings=there)
