"""A scan for recurrences: what multiplies the state at every step gets its gradient by one product after the loop.

`jax.lax.scan` alone adds up an operand's gradient step by step: as many small products, each followed by a pass over
the whole sum. Nothing here holds parameters or knows a model.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

Product = Callable[[str, jax.Array], jax.Array]


class Loop(NamedTuple):
    """What a scan does; static.

    Attributes:
      step: `(product, constants, carry, x) -> (carry, y)`. `product(name, a)`, once a name in every step, is `a` times
        the operand of that name, and what is to be added to it in this step.
      equations: of each operand as `jnp.einsum` takes it, `a` first, such as {"state": "bd,dp->bp"}; rows are b, and
        each axis of the operand is in `a` or in what comes out.
      dtype: of the products' operands; they are summed up in float32.
      reverse: whether it goes from the last step to the first.
    """

    step: Callable[[Product, Any, Any, Any], tuple[Any, Any]]
    equations: Mapping[str, str]
    dtype: str
    reverse: bool = False


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def scan(loop: Loop, operands: Any, addends: Any, constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    """The last carry, and each step's y, as `jax.lax.scan` gives them.

    Args:
      loop: what is done.
      operands: of its products by name, float32 or the loop's dtype, as their gradients are; exactly the loop's.
      addends: what is added to a product in each step, by name, float32, time first; names may be missing.
      constants: what else every step reads.
      carry: at first.
      xs: what else each step reads, time first.
    """
    return _run(loop, operands, addends, constants, carry, xs, {})[0]


def _run(loop: Loop, operands: Any, addends: Any, constants: Any, carry: Any, xs: Any, taps: Any) -> tuple[Any, Any]:
    """What `scan` gives, and what the products of each step read."""
    cast = {name: operands[name].astype(loop.dtype) for name in loop.equations}

    def body(carry: Any, given: Any) -> tuple[Any, Any]:
        x, addend, tap = given
        reads = {}

        def product(name: str, a: jax.Array) -> jax.Array:
            reads[name] = a = a.astype(loop.dtype)
            added = name in addend
            return _product(loop.equations[name], added, a, cast[name], addend[name] if added else tap.get(name))

        carry, y = loop.step(product, constants, carry, x)
        return carry, (y, reads)

    carry, (ys, reads) = jax.lax.scan(body, carry, (xs, addends, taps), reverse=loop.reverse)
    return (carry, ys), reads


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(equation: str, added: bool, a: jax.Array, operand: jax.Array, other: jax.Array | None) -> jax.Array:
    """The product, and `other` where it is to be added. What would be the operand's gradient is made of `other`'s."""
    return _product_forward(equation, added, a, operand, other)[0]


def _product_forward(equation: str, added: bool, a: Any, operand: Any, other: Any) -> tuple[jax.Array, jax.Array]:
    product = jnp.einsum(equation, a, operand, preferred_element_type=jnp.float32)
    return product + other if added and other is not None else product, operand


def _product_backward(equation: str, added: bool, operand: jax.Array, dy: jax.Array) -> tuple[Any, ...]:
    of_a, of_operand, of_y = _axes(equation)
    da = jnp.einsum(f"{of_y},{of_operand}->{of_a}", dy.astype(operand.dtype), operand)
    return da, None, dy


_product.defvjp(_product_forward, _product_backward)


def _axes(equation: str) -> tuple[str, str, str]:
    """("bd", "dp", "bp") of "bd,dp->bp"."""
    reads, gives = equation.split("->")
    of_a, of_operand = reads.split(",")
    return of_a, of_operand, gives


def _forward(loop: Loop, operands: Any, addends: Any, constants: Any, carry: Any, xs: Any) -> tuple[Any, Any]:
    T, B = len(jax.tree.leaves((addends, xs))[0]), len(jax.tree.leaves(carry)[0])

    def tap(name: str) -> jax.Array:
        _, of_operand, of_y = _axes(loop.equations[name])
        sizes = {"b": B} | dict(zip(of_operand, operands[name].shape, strict=True))
        return jnp.zeros((T, *(sizes[axis] for axis in of_y)), jnp.float32)

    taps = {name: tap(name) for name in loop.equations if name not in addends}
    run = partial(_run, loop, operands)
    said, pull, reads = jax.vjp(run, addends, constants, carry, xs, taps, has_aux=True)
    return said, (pull, reads, operands)


def _backward(loop: Loop, saved: Any, dsaid: Any) -> tuple[Any, ...]:
    pull, reads, operands = saved
    doperands = {}
    daddends, dconstants, dcarry, dxs, dtaps = pull(dsaid)
    for name, equation in loop.equations.items():
        of_a, of_operand, of_y = _axes(equation)
        dy = (daddends | dtaps)[name].astype(loop.dtype)
        over_all = f"t{of_a},t{of_y}->{of_operand}"
        gradient = jnp.einsum(over_all, reads[name], dy, preferred_element_type=jnp.float32)
        doperands[name] = gradient.astype(operands[name].dtype)
    return doperands, daddends, dconstants, dcarry, dxs


scan.defvjp(_forward, _backward)
