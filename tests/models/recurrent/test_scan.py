"""The scan with gradients computed after its loop against `jax.lax.scan`: results and all gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.extend.core import jaxprs_in_params

from gptjax.models.recurrent.scan import Loop, scan

B, D, P, S, T = 2, 3, 4, 5, 6
EQUATIONS = {"kernel": "bd,dp->bp", "turned": "bd,pd->bp", "rows": "bd,bsd->bs"}


def step(product, constants, carry, x):
    """A step with each kind of product: one with an addend, two without, one of these on the step's input."""
    read = jnp.tanh(product("kernel", carry) + product("turned", x) * constants)
    return jnp.sin(read[:, :D] + x), (read, product("rows", carry))


def by_lax(operands, addends, constants, carry, xs, reverse):
    def body(carry, given):
        x, added = given

        def product(name, a):
            return jnp.einsum(EQUATIONS[name], a, operands[name]) + (added if name == "kernel" else 0.0)

        return step(product, constants, carry, x)

    return jax.lax.scan(body, carry, (xs, addends["kernel"]), reverse=reverse)


def arrays():
    rng = np.random.default_rng(0)
    shapes = {"kernel": (D, P), "turned": (P, D), "rows": (B, S, D)}
    operands = {name: rng.normal(size=shape).astype("f") for name, shape in shapes.items()}
    others = [rng.normal(size=shape).astype("f") for shape in ((T, B, P), (P,), (B, D), (T, B, D))]
    return operands, {"kernel": others[0]}, *others[1:]


def total(output):
    return sum(jnp.sum(jnp.cos(leaf + i)) for i, leaf in enumerate(jax.tree.leaves(output)))


@pytest.mark.parametrize("reverse", [False, True])
def test_equals_a_plain_scan_and_so_do_all_gradients(reverse):
    loop = Loop(step, EQUATIONS, "float32", reverse)
    mine, expected = jax.jit(lambda given: (scan(loop, *given), by_lax(*given, reverse)))(arrays())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), mine, expected)
    mine = jax.jit(jax.grad(lambda given: total(scan(loop, *given))))(arrays())
    expected = jax.jit(jax.grad(lambda given: total(by_lax(*given, reverse))))(arrays())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), mine, expected)


@pytest.mark.parametrize("order", ["forward over reverse", "reverse over reverse"])
def test_so_do_second_derivatives(order):
    given = arrays()
    along = jax.tree.map(jnp.cos, given)

    def second(run):
        gradient = jax.grad(lambda given: total(run(given)))
        if order == "forward over reverse":
            return jax.jvp(gradient, (given,), (along,))[1]
        return jax.grad(lambda given: optax.tree.vdot(gradient(given), along))(given)

    mine = jax.jit(lambda: second(lambda given: scan(Loop(step, EQUATIONS, "float32"), *given)))()
    expected = jax.jit(lambda: second(lambda given: by_lax(*given, False)))()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-4, rtol=1e-4), mine, expected)


def test_an_operand_of_the_loops_dtype_gets_a_gradient_of_it():
    operands, *rest = arrays()
    operands["rows"] = operands["rows"].astype("bfloat16")

    def last(operands, *rest):
        return total(scan(Loop(step, EQUATIONS, "bfloat16"), operands, *rest))

    gradient = jax.jit(jax.grad(last))(operands, *rest)
    assert {name: g.dtype.name for name, g in gradient.items()} == {
        "kernel": "float32", "turned": "float32", "rows": "bfloat16"
    }  # fmt: skip
    exact = jax.jit(jax.grad(lambda *given: total(by_lax(*given, False))))(arrays()[0], *rest)
    for name, g in gradient.items():
        assert np.linalg.norm(g.astype("f") - exact[name]) < 0.05 * np.linalg.norm(exact[name]), name


def products(jaxpr, loops=()):
    """(shape of the result, number of enclosing loops) of each product, including those of nested programs."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape, len(loops)
        within = (*loops, equation) if equation.primitive.name == "scan" else loops
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner, within)


def test_an_operands_gradient_is_one_product_outside_the_loop():
    def last(given):
        return scan(Loop(step, EQUATIONS, "float32"), *given)[0].sum()

    result = list(products(jax.make_jaxpr(jax.grad(last))(arrays()).jaxpr))
    assert ((D, P), 0) in result and ((D, P), 1) not in result
    assert ((B, D), 1) in result  # what goes back through the state is in the loop
