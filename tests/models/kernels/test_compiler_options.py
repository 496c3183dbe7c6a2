"""XLA options of a train step: by platform and dtype, never overriding XLA_FLAGS, and accepted by XLA."""

import jax
import jax.numpy as jnp
import pytest
from conftest import tiny_config

from gptjax.models import kernels

WIDTH, LIBRARY = "xla_cpu_prefer_vector_width", "xla_cpu_experimental_ynn_fusion_type"


def options(dtype="float32", name="cpu"):
    return kernels.compiler_options(tiny_config(model_kernels=name).model, dtype)


def test_by_kernels_and_dtype(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert options().keys() == {WIDTH, LIBRARY}
    assert options("bfloat16").keys() == {WIDTH}
    assert options(name="plain") == options(name="gpu") == {}


def test_a_users_own_flag_stays(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", f"--{WIDTH}=256 --xla_dump_to=/x")
    assert options().keys() == {LIBRARY}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_xla_takes_them(dtype):
    x = jnp.ones((8, 8), dtype)
    product = jax.jit(lambda x: x @ x, compiler_options=kernels.KERNELS["cpu"].compiler_options(dtype))
    assert float(product(x)[0, 0]) == 8


def test_float32_products_are_left_to_eigen():
    """Also if a product is fused with a reshape of its result."""
    given = kernels.KERNELS["cpu"].compiler_options("float32")
    product = jax.jit(lambda x, w: (x @ w).reshape(4, 16, 32), compiler_options=given)
    text = product.lower(jnp.ones((64, 16)), jnp.ones((16, 32))).compile().as_text()
    assert "ynn" not in text and " dot(" in text
