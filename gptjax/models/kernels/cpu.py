"""Kernels for CPU, with gradients that XLA's CPU backend runs well: few passes over memory, no unnecessary copies.

experiments/bench measures each of them. They have no advantage on other platforms.
"""

import itertools
import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.models.kernels import chunked_cross_entropy, reference
from gptjax.models.kernels.reference import AttentionSpec, Elementwise

BLOCK = 64  # queries per block, which share the keys that one of them attends to
FEW = 128  # up to this many tokens a single block is faster


# Products


def dot(x: jax.Array, y: jax.Array, transpose_x: bool = False, transpose_y: bool = False) -> jax.Array:
    """x @ y of two matrices, either transposed first, with float32 accumulation.

    For bfloat16, XLA on CPU computes only products without transposition in bfloat16, three times as fast as float32;
    it converts others to float32, and fails at run time on a transposed result.
    """
    if x.dtype == jnp.bfloat16:
        x, y = transpose(x) if transpose_x else x, transpose(y) if transpose_y else y
    else:
        x, y = x.T if transpose_x else x, y.T if transpose_y else y
    return jnp.dot(x, y, preferred_element_type=jnp.float32)


def product(x: jax.Array, kernel_DF: jax.Array, dtype: str, out_dtype: str) -> jax.Array:
    """Same as gptjax.models.kernels.reference.product.

    Reshapes to two dimensions, because XLA transposes the weight gradient of a product with more in memory.
    """
    x_ND = x.reshape(-1, x.shape[-1])
    if dtype == "bfloat16":
        y_NF = _bfloat16_product(x_ND.astype(dtype), kernel_DF).astype(out_dtype)
    else:
        y_NF = reference.product(x_ND, kernel_DF, dtype, out_dtype)
    return y_NF.reshape(*x.shape[:-1], -1)


@jax.custom_vjp
def _bfloat16_product(x_ND: jax.Array, kernel_DF: jax.Array) -> jax.Array:
    return _product_and_operands(x_ND, kernel_DF)[0]


def transpose(x: jax.Array) -> jax.Array:
    """Transposes a matrix in memory.

    In three dimensions, because XLA fuses a transposition of two into the product; the barrier computes x first,
    because XLA does not vectorize a loop that computes and transposes.
    """
    rows, columns = x.shape
    group = math.gcd(rows, 64)
    x = jax.lax.optimization_barrier(x).reshape(rows // group, group, columns)
    return jax.lax.optimization_barrier(x.transpose(2, 0, 1)).reshape(columns, rows)


def _product_and_operands(x_ND: jax.Array, kernel_DF: jax.Array) -> tuple[jax.Array, Any]:
    return dot(x_ND, kernel_DF.astype(x_ND.dtype)), (x_ND, kernel_DF)


def _product_back(saved: Any, dy_NF: jax.Array) -> tuple[jax.Array, jax.Array]:
    x_ND, kernel_DF = saved
    dy_NF = dy_NF.astype(x_ND.dtype)
    dx_ND = dot(dy_NF, kernel_DF.astype(x_ND.dtype), transpose_y=True).astype(x_ND.dtype)
    return dx_ND, dot(x_ND, dy_NF, transpose_x=True)


_bfloat16_product.defvjp(_product_and_operands, _product_back)


# Activations


def activate(f: Elementwise) -> Elementwise:
    """Same as gptjax.models.kernels.reference.activate, in float32 and with rematerialization.

    Recomputing the function in the backward pass takes fewer passes over memory. In bfloat16 XLA on CPU would round
    after each operation, which takes longer than the operation.
    """

    def in_float32(*xs: jax.Array) -> jax.Array:
        return f(*(x.astype(jnp.promote_types(x.dtype, jnp.float32)) for x in xs)).astype(xs[0].dtype)

    return jax.checkpoint(in_float32)


# Norms


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def normalize(x: jax.Array, scale_D: jax.Array, epsilon: float, center: bool) -> jax.Array:
    """Same as gptjax.models.kernels.reference.normalize.

    Means are products with a constant vector, which are multithreaded, while XLA's reductions over rows are not.
    """
    return _normalize_forward(x, scale_D, epsilon, center)[0]


def _row_means(x: jax.Array) -> jax.Array:
    return (x @ jnp.full((x.shape[-1],), 1 / x.shape[-1], x.dtype))[..., None]


def _normalize_forward(x: jax.Array, scale_D: jax.Array, epsilon: float, center: bool) -> tuple[jax.Array, Any]:
    mean = _row_means(x) if center else jnp.zeros((*x.shape[:-1], 1), x.dtype)
    centered = x - mean
    inverse = jax.lax.rsqrt(_row_means(centered * centered) + epsilon)
    return centered * inverse * scale_D, (x, scale_D, mean, inverse)


def _normalize_backward(epsilon: float, center: bool, saved: Any, dy: jax.Array) -> tuple[jax.Array, jax.Array]:
    x, scale_D, mean, inverse = saved
    unit = (x - mean) * inverse
    dunit = dy * scale_D
    dx = dunit - unit * _row_means(dunit * unit)
    if center:
        dx -= _row_means(dunit)
    rows = (dy * unit).reshape(-1, x.shape[-1])
    return dx * inverse, jnp.ones((rows.shape[0],), rows.dtype) @ rows


normalize.defvjp(_normalize_forward, _normalize_backward)


# Loss


CHUNKING = chunked_cross_entropy.Chunking(logit_bytes=2**28, multiple=1, dot=dot)
cross_entropy = partial(chunked_cross_entropy.cross_entropy, chunking=CHUNKING)
token_loss = partial(chunked_cross_entropy.token_loss, chunking=CHUNKING)


# Attention


class Span(NamedTuple):
    """A block of queries [first, end), and the keys [key, end) that one of them attends to."""

    first: int
    end: int
    key: int


def spans(T: int, window: int) -> list[Span]:
    """Splits a sequence into blocks of queries."""
    size = T if T <= FEW else BLOCK * -(-T // (4 * BLOCK))  # about four
    return [Span(t, min(t + size, T), max(0, t - window + 1) if window else 0) for t in range(0, T, size)]


def attend(q_BTHK: jax.Array, k_BTGK: jax.Array, v_BTGK: jax.Array, spec: AttentionSpec) -> jax.Array:
    """Same as gptjax.models.kernels.reference.attend, in blocks of queries; falls back to it with dropout, or with a
    window that is not static."""
    if spec.needs_reference or spec.drop is not None or not isinstance(spec.window, int):
        return reference.attend(q_BTHK, k_BTGK, v_BTGK, spec)
    B, T, H, K = q_BTHK.shape
    G = k_BTGK.shape[2]
    # One three-dimensional product per block: with more dimensions XLA copies its operands first.
    q = q_BTHK.reshape(B, T, G, H // G, K).transpose(0, 2, 1, 3, 4).reshape(B * G, T * (H // G), K)
    k, v = (x.transpose(0, 2, 1, 3).reshape(B * G, T, K) for x in (k_BTGK, v_BTGK))
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    # Without the barrier XLA fuses the transposition into every product that uses it.
    q, k, v = jax.lax.optimization_barrier((q, k, v))
    slopes_NJ = None if spec.slopes_H is None else jnp.tile(spec.slopes_H.reshape(G, H // G), (B, 1))
    segments_NT = None if spec.segments_BT is None else jnp.repeat(spec.segments_BT, G, axis=0)
    scale = 1 / math.sqrt(K) if spec.scale is None else spec.scale
    out = _attend(q, k, v, slopes_NJ, segments_NT, scale, spec.window)
    return out.reshape(B, G, T, H // G, K).transpose(0, 2, 1, 3, 4).reshape(B, T, H, K).astype(q_BTHK.dtype)


# N is batch times key heads; a row of R = T * J is the query of one token and one of the J heads that share a key head.
# All arrays are float32.


@partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
    q_NRK: jax.Array,
    k_NSK: jax.Array,
    v_NSK: jax.Array,
    slopes_NJ: jax.Array | None,
    segments_NT: jax.Array | None,
    scale: float,
    window: int,
) -> jax.Array:
    return _forward(q_NRK, k_NSK, v_NSK, slopes_NJ, segments_NT, scale, window)[0]


def _product(x: jax.Array, y: jax.Array, over_x: int, over_y: int) -> jax.Array:
    return jax.lax.dot_general(x, y, (((over_x,), (over_y,)), ((0,), (0,))))


def _weights(
    q_NrK: jax.Array,
    k_NsK: jax.Array,
    slopes_NJ: jax.Array | None,
    segments_NT: jax.Array | None,
    span: Span,
    J: int,
    window: int,
) -> jax.Array:
    scores_Nrs = _product(q_NrK, k_NsK, 2, 2)
    distance_rs = jnp.repeat(jnp.arange(span.first, span.end), J)[:, None] - jnp.arange(span.key, span.end)
    if slopes_NJ is not None:
        scores_Nrs -= jnp.tile(slopes_NJ, (1, span.end - span.first))[..., None] * distance_rs
    mask = (distance_rs >= 0) & (distance_rs < window) if window else distance_rs >= 0
    if segments_NT is not None:
        queries_Nr = jnp.repeat(segments_NT[:, span.first : span.end], J, axis=1)
        mask = mask & reference.segment_mask(queries_Nr, segments_NT[:, span.key : span.end])
    scores_Nrs = jnp.where(mask, scores_Nrs, -jnp.inf)
    e_Nrs = jnp.exp(scores_Nrs - scores_Nrs.max(-1, keepdims=True))
    return e_Nrs / e_Nrs.sum(-1, keepdims=True)


def _forward(
    q_NRK: Any, k_NSK: Any, v_NSK: Any, slopes_NJ: Any, segments_NT: Any, scale: float, window: int
) -> tuple[jax.Array, Any]:
    T = k_NSK.shape[1]
    J = q_NRK.shape[1] // T
    q_NRK = q_NRK * scale
    weights, mixed = [], []
    for span in spans(T, window):
        q_NrK, keys = q_NRK[:, span.first * J : span.end * J], slice(span.key, span.end)
        p_Nrs = _weights(q_NrK, k_NSK[:, keys], slopes_NJ, segments_NT, span, J, window)
        weights.append(p_Nrs)
        mixed.append(_product(p_Nrs, v_NSK[:, keys], 2, 1))
    return _concatenate(mixed), (q_NRK, k_NSK, v_NSK, weights)


def _backward(scale: float, window: int, saved: Any, dout_NRK: jax.Array) -> tuple[Any, Any, Any, None, None]:
    q_NRK, k_NSK, v_NSK, weights = saved  # the queries times scale
    T = k_NSK.shape[1]
    J = q_NRK.shape[1] // T
    dqs, dks, dvs = [], [], []
    blocks = spans(T, window)
    for span, p_Nrs in zip(blocks, weights, strict=True):
        rows, keys = slice(span.first * J, span.end * J), slice(span.key, span.end)
        do_NrK = dout_NRK[:, rows]
        dp_Nrs = _product(do_NrK, v_NSK[:, keys], 2, 2)
        ds_Nrs = p_Nrs * (dp_Nrs - (p_Nrs * dp_Nrs).sum(-1, keepdims=True))
        dqs.append(_product(ds_Nrs, k_NSK[:, keys], 2, 1) * scale)
        dks.append(_product(ds_Nrs, q_NRK[:, rows], 1, 1))
        dvs.append(_product(p_Nrs, do_NrK, 1, 1))
    return _concatenate(dqs), _sum_overlapping(dks, blocks), _sum_overlapping(dvs, blocks), None, None


_attend.defvjp(_forward, _backward)


def _concatenate(parts: list[jax.Array]) -> jax.Array:
    return jnp.concatenate(parts, axis=1) if len(parts) > 1 else parts[0]


def _sum_overlapping(parts: list[jax.Array], blocks: list[Span]) -> jax.Array:
    """Sums the gradients of keys over blocks of overlapping keys; each key is written once."""
    edges = sorted({edge for span in blocks for edge in (span.key, span.end)})
    pieces = []
    for start, end in itertools.pairwise(edges):
        overlapping = [
            part[:, start - span.key : end - span.key]
            for part, span in zip(parts, blocks, strict=True)
            if span.key <= start and end <= span.end
        ]
        pieces.append(sum(overlapping[1:], start=overlapping[0]))
    return _concatenate(pieces)


def attention_plan(config: Any, dtype: str, packed: bool) -> str:
    """Describes in one line what computes attention."""
    if config.dropout:
        return "plain: dropout of attention weights is drawn by JAX (model.dropout)"
    if not reference.static_windows(config):
        return "plain: scanned layers have windows of different lengths"
    return "in blocks of queries, with a custom gradient"


# XLA


def compiler_options(dtype: str) -> dict[str, str]:
    """The fastest options in experiments/bench: elementwise loops with AVX-512, and float32 products by Eigen, not by
    YNNPACK, which keeps the reductions."""
    wide = {"xla_cpu_prefer_vector_width": "512"}
    if dtype != "float32":
        return wide
    return wide | {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE"}
