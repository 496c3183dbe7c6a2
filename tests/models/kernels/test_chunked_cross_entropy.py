"""Chunked cross-entropy against the reference, which JAX differentiates."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compare import close, compare, normal
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from gptjax.models.kernels import KERNELS, chunked_cross_entropy, reference
from gptjax.models.kernels.chunked_cross_entropy import Chunking


def draw(seed, B, T, V, D=6, scale=1.0, dtype="float32"):
    """Hidden states, unembedding, targets, and weights of which some are 0."""
    rng = np.random.default_rng(seed)
    x, table = normal(rng, B, T, D, scale=scale, dtype=dtype), normal(rng, V, D)
    return x, table, jnp.asarray(rng.integers(0, V, (B, T))), jnp.asarray(rng.integers(0, 3, (B, T)), jnp.float32)


# Slices are as many as T has room for: a prime T is cut into single tokens or not at all.
@pytest.mark.slow
@settings(max_examples=2, deadline=None)
@given(
    B=st.integers(1, 3),
    T=st.sampled_from([1, 6, 7, 13]),
    V=st.integers(1, 40),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    cap=st.sampled_from([0.0, 5.0]),
    rows_at_once=st.sampled_from([1, 4, 100]),
    multiple=st.sampled_from([1, 16]),
    seed=st.integers(0, 99),
)
@example(B=2, T=13, V=33, scale=1.0, cap=5.0, rows_at_once=4, multiple=16, seed=0)
@example(B=2, T=6, V=32, scale=1.0, cap=0.0, rows_at_once=4, multiple=16, seed=1)
@example(B=1, T=6, V=11, scale=30.0, cap=0.0, rows_at_once=100, multiple=16, seed=2)
def test_cross_entropy_vs_reference(B, T, V, scale, cap, rows_at_once, multiple, seed):
    # Far beyond a cap its derivative, 1 - tanh^2, is a difference of equal numbers: rounding, in either formula.
    assume(not cap or scale < 30.0)
    x, table, targets, weights = draw(seed, B, T, V, scale=scale)
    chunking = Chunking(logit_bytes=4 * V * rows_at_once, multiple=multiple)

    def actual(x, table):
        return chunked_cross_entropy.cross_entropy(x, table, targets, weights, cap, chunking)

    def expected(x, table):
        return reference.cross_entropy(x, table, targets, weights, cap)

    compare(actual, expected, x, table)
    # Without a gradient another program runs.
    close(jax.jit(actual)(x, table), expected(x, table), 1e-5)


@pytest.mark.parametrize("name", ["cpu", "gpu"])
def test_the_kernels_own_slicing_vs_reference(name):
    x, table, targets, weights = draw(0, 2, 6, 33)
    compare(
        lambda x, table: KERNELS[name].cross_entropy(x, table, targets, weights, 0.0),
        lambda x, table: reference.cross_entropy(x, table, targets, weights, 0.0),
        x,
        table,
    )


def test_a_target_out_of_reach_of_a_wide_cap_has_the_plain_gradient():
    """exp(logit - largest) of the target underflows to 0 in float32, while its logit is at the cap."""
    x, table = jnp.ones((1, 1, 1)), jnp.array([[-200.0], [200.0]])
    targets, weights = jnp.zeros((1, 1), jnp.int32), jnp.ones((1, 1))
    for multiple in (1, 4):
        compare(
            lambda x, table, m=multiple: chunked_cross_entropy.cross_entropy(
                x, table, targets, weights, 100.0, Chunking(99, m)
            ),
            lambda x, table: reference.cross_entropy(x, table, targets, weights, 100.0),
            x,
            table,
        )


def test_an_untied_table_and_a_gradient_of_either_alone():
    x, kernel, targets, weights = draw(0, 2, 6, 20)
    kernel = kernel.T  # as an untied head has it

    def both(f, *more):
        def loss(x, kernel):
            return f(x, kernel.T, targets, weights, 3.0, *more)

        return [jax.jit(jax.grad(loss, argnums=argument))(x, kernel) for argument in (0, 1)]

    for actual, expected in zip(
        both(chunked_cross_entropy.cross_entropy, Chunking(160, 1)), both(reference.cross_entropy), strict=True
    ):
        assert actual.shape == expected.shape
        close(actual, expected, 1e-4)


def test_a_gradient_is_times_what_comes_from_above():
    x, table, targets, weights = draw(0, 2, 6, 20)
    compare(
        lambda x, table: chunked_cross_entropy.cross_entropy(x, table, targets, weights, 0.0, Chunking(160, 1)) ** 2,
        lambda x, table: reference.cross_entropy(x, table, targets, weights, 0.0) ** 2,
        x,
        table,
    )


def test_bfloat16_is_close_to_float32():
    x, table, targets, weights = draw(0, 2, 6, 40, D=16, dtype="bfloat16")
    value, (dx, dtable) = jax.jit(
        jax.value_and_grad(
            lambda *xs: chunked_cross_entropy.cross_entropy(*xs, 0.0, Chunking(2 * 2 * 40 * 4, 16)), argnums=(0, 1)
        )
    )(x, table, targets, weights)
    exact, (their_dx, their_dtable) = jax.value_and_grad(reference.cross_entropy, argnums=(0, 1))(
        x.astype("float32"), table, targets, weights, 0.0
    )
    assert value.dtype == dtable.dtype == jnp.float32 and dx.dtype == jnp.bfloat16
    close(value, exact, 0.01)
    close(dx, their_dx, 0.03)
    close(dtable, their_dtable, 0.03)


def test_slices_are_few_and_fit():
    assert chunked_cross_entropy.num_chunks(2, 12, 10, 4 * 2 * 12 * 10) == 1
    assert chunked_cross_entropy.num_chunks(2, 12, 10, 4 * 2 * 12 * 10 - 1) == 2
    assert (
        chunked_cross_entropy.num_chunks(2, 12, 10, 4 * 2 * 5 * 10) == 3
    )  # the least divisor of 12 that leaves 5 tokens or fewer
    assert chunked_cross_entropy.num_chunks(2, 13, 10, 4 * 2 * 12 * 10) == 13
    assert chunked_cross_entropy.num_chunks(2, 12, 10, 1) == 12  # none fits


def test_the_logits_never_exist_whole():
    B, T, V = 4, 64, 2000
    x, table, targets, weights = draw(0, B, T, V)

    def program(f):
        return jax.jit(jax.value_and_grad(f, argnums=(0, 1))).lower(x, table).compile()

    whole = program(lambda x, table: reference.cross_entropy(x, table, targets, weights, 0.0))
    sliced = program(
        lambda x, table: chunked_cross_entropy.cross_entropy(
            x, table, targets, weights, 0.0, Chunking(4 * B * V * T // 16, 1)
        )
    )
    logits = 4 * B * T * V
    assert whole.memory_analysis().temp_size_in_bytes >= logits
    assert sliced.memory_analysis().temp_size_in_bytes < logits / 3
    sizes = [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"f32\[([\d,]+)\]", sliced.as_text())]
    assert max(sizes) < B * T * V / 8
