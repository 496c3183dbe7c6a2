"""A scan for recurrences that computes the gradients of its matrices by one product each after the loop.

`jax.lax.scan` accumulates such a gradient step by step: one small product per step, each followed by a pass over the
whole sum. Independent of parameters and models.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Product = Callable[[str, jax.Array], jax.Array]


class Loop(NamedTuple):
    """Static description of a scan.

    Attributes:
      step: `(product, constants, carry, x) -> (carry, y)`. `product(name, a)`, called once per name in every step,
        multiplies `a` by the operand of that name and adds the step's addend.
      equations: `jnp.einsum` subscripts by operand, `a` first, such as {"state": "bd,dp->bp"}; rows are b, and each
        axis of the operand is in `a` or in the result.
      dtype: of the products' operands; accumulation is in float32.
      reverse: True to run from the last step to the first.
    """

    step: Callable[[Product, Any, Any, Any], tuple[Any, Any]]
    equations: Mapping[str, str]
    dtype: str
    reverse: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(loop: Loop, operands: Any, addends: Any, constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """Runs a loop and returns the last carry and the stacked outputs, as `jax.lax.scan` does.

    Args:
      loop: the step and its products.
      operands: matrices of the products by name, float32 or the loop's dtype, which their gradients share.
      addends: arrays added to a product in each step, by name, float32, time first; optional for each name.
      constants: other inputs of every step.
      carry: the initial carry.
      xs: other inputs of each step, time first.
    """
    return _run(loop, operands, addends, constants, carry, xs, {})[0]


def _run(loop: Loop, operands: Any, addends: Any, constants: Any, carry: Any, xs: Any, taps: Any) -> tuple[Any, Any]:
    """Returns the results of `scan`, and the inputs `a` of the products of each step."""
    cast = {name: operands[name].astype(loop.dtype) for name in loop.equations}

    def body(carry: Any, step_inputs: Any) -> tuple[Any, Any]:
        x, addend, tap = step_inputs
        inputs = {}

        def product(name: str, a: jax.Array) -> jax.Array:
            inputs[name] = a = a.astype(loop.dtype)
            added = name in addend
            return _product(loop.equations[name], added, a, cast[name], addend[name] if added else tap.get(name))

        carry, y = loop.step(product, constants, carry, x)
        return carry, (y, inputs)

    carry, (ys, inputs) = jax.lax.scan(body, carry, (xs, addends, taps), reverse=loop.reverse)
    return (carry, ys), inputs


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, added: bool, a: jax.Array, operand: jax.Array, other: jax.Array | None) -> jax.Array:
    """The product, plus `other` if it is added. The operand's gradient is computed later, from that of `other`."""
    return _product_forward(equation, added, a, operand, other)[0]


def _product_forward(equation: str, added: bool, a: Any, operand: Any, other: Any) -> tuple[jax.Array, jax.Array]:
    product = jnp.einsum(equation, a, operand, preferred_element_type=jnp.float32)
    return product + other if added and other is not None else product, operand


def _product_backward(equation: str, added: bool, operand: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
    axes_a, axes_operand, axes_y = _axes(equation)
    da = jnp.einsum(f"{axes_y},{axes_operand}->{axes_a}", dy.astype(operand.dtype), operand)
    return da, None, dy


_product.defvjp(_product_forward, _product_backward)


def _axes(equation: str) -> tuple[str, str, str]:
    """Splits "bd,dp->bp" into ("bd", "dp", "bp")."""
    inputs, axes_y = equation.split("->")
    axes_a, axes_operand = inputs.split(",")
    return axes_a, axes_operand, axes_y


def _forward(loop: Loop, operands: Any, addends: Any, constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    T, B = len(jax.tree.leaves((addends, xs))[0]), len(jax.tree.leaves(carry)[0])

    def tap(name: str) -> jax.Array:
        _, axes_operand, axes_y = _axes(loop.equations[name])
        sizes = {"b": B} | dict(zip(axes_operand, operands[name].shape, strict=True))
        return jnp.zeros((T, *(sizes[axis] for axis in axes_y)), jnp.float32)

    taps = {name: tap(name) for name in loop.equations if name not in addends}
    run = partial(_run, loop, operands)
    outputs, vjp, inputs = jax.vjp(run, addends, constants, carry, xs, taps, has_aux=True)
    return outputs, (vjp, inputs, operands)


def _backward(loop: Loop, saved: Any, doutputs: Any) -> tuple[Any, ...]:
    vjp, inputs, operands = saved
    doperands = {}
    daddends, dconstants, dcarry, dxs, dtaps = vjp(doutputs)
    for name, equation in loop.equations.items():
        axes_a, axes_operand, axes_y = _axes(equation)
        dy = (daddends | dtaps)[name].astype(loop.dtype)
        over_time = f"t{axes_a},t{axes_y}->{axes_operand}"
        gradient = jnp.einsum(over_time, inputs[name], dy, preferred_element_type=jnp.float32)
        doperands[name] = gradient.astype(operands[name].dtype)
    return doperands, daddends, dconstants, dcarry, dxs


scan.defvjp(_forward, _backward)
