"""Names of axes: by them modules say which of an array's axes may be divided among devices. Names no mesh axis itself.

Axes have the letters of gptjax.models, and `_` where one is never divided. A caller that has several devices traces the
model within `placed`; elsewhere nothing here does anything.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

Table = Mapping[str, tuple[str, ...]]  # axes of a mesh by letter; a letter that is absent is never divided

# The axes of each parameter, by the end of its path. Experts' have E in front, stacked layers' L.
PARAMETERS = (
    (r"tokens/embedding", "VD"),
    (r"positions/embedding", "_D"),
    (r"[qk]_norm/scale", "K"),
    (r"norm/(scale|bias)", "D"),
    (r"qkv/kernel", "DG"),
    (r"qkv/bias", "G"),
    (r"attention/out/kernel", "HD"),
    (r"(up|gate)/kernel", "DF"),
    (r"(up|gate)/bias", "F"),
    (r"down/kernel", "FD"),
    (r"(out|down)/bias", "D"),
    (r"router/kernel", "D_"),
    (r"head/kernel", "DV"),
)


class Layout(NamedTuple):
    """How arrays lie on the devices of a mesh."""

    mesh: Mesh
    stored: Table  # of parameters, and of what optimizers keep of them
    computed: Table  # of everything else, parameters on their way through a product too

    def sharding(self, letters: str, shape: Sequence[int], table: Table) -> NamedSharding:
        """Where an array goes; an axis whose length the devices do not divide stays whole."""

        def axes(letter: str, size: int) -> tuple[str, ...] | None:
            wanted = table.get(letter, ())
            return wanted if wanted and size % self.devices(wanted) == 0 else None

        return NamedSharding(self.mesh, P(*map(axes, letters, shape)))

    def devices(self, mesh_axes: Sequence[str]) -> int:
        """How many devices, along these axes of the mesh, an axis would be divided among."""
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes)


_placed: ContextVar[Layout | None] = ContextVar("placed", default=None)


@contextmanager
def placed(layout: Layout) -> Iterator[None]:
    """What is traced in the block lies as `layout` says; on one device that means nothing."""
    before = _placed.set(layout if layout.mesh.size > 1 else None)
    try:
        yield
    finally:
        _placed.reset(before)


def current() -> Layout | None:
    """The layout of the innermost `placed`; None where there is none, or one device."""
    return _placed.get()


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """The array, laid out as its axes' names say."""
    layout = current()
    if layout is None:
        return x
    return jax.lax.with_sharding_constraint(x, layout.sharding(letters, x.shape, layout.computed))


def of_parameter(path: Sequence[str], ndim: int) -> str:
    """The axes of a parameter by the path of its modules and its name, or of something in an optimizer by the same.

    Args:
      path: ("block_0", "mlp", "up", "kernel").
      ndim: of the array; where the parameter of that name has other axes, none of them is divided.
    """
    stacked = "blocks" in path and ndim > 0
    return "L" + _of_one_layer(path, ndim - 1) if stacked else _of_one_layer(path, ndim)


def _of_one_layer(path: Sequence[str], ndim: int) -> str:
    ending = "/".join(path)
    letters = next((letters for pattern, letters in PARAMETERS if re.search(rf"(^|/|_){pattern}$", ending)), "")
    return {len(letters): letters, len(letters) + 1: f"E{letters}"}.get(ndim, "_" * ndim) if letters else "_" * ndim


def used(parameter: jax.Array, path: Sequence[str], dtype: Any = None) -> jax.Array:
    """A parameter as a product reads it: whole but for what products themselves divide, its gradient as it is stored.

    So it is gathered where it is used, in the dtype of the arithmetic, and gradients are summed up to where they are
    needed (arXiv 1910.02054, section 5.3).

    Args:
      parameter: of one layer.
      path: of its modules, and its name.
      dtype: of the arithmetic; None: as it is.
    """
    layout = current()
    if layout is None:
        return parameter
    letters = _of_one_layer(path, parameter.ndim)
    home, away = (layout.sharding(letters, parameter.shape, table) for table in (layout.stored, layout.computed))
    return _gathered(parameter, away, home, str(dtype or parameter.dtype), str(parameter.dtype))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _gathered(parameter: jax.Array, away: NamedSharding, home: NamedSharding, dtype: str, own: str) -> jax.Array:
    # At home first: else the parameter could be gathered before it is cast.
    cast = jax.lax.with_sharding_constraint(parameter.astype(dtype), home)
    return jax.lax.with_sharding_constraint(cast, away)


def _forward(
    parameter: jax.Array, away: NamedSharding, home: NamedSharding, dtype: str, own: str
) -> tuple[jax.Array, None]:
    return _gathered(parameter, away, home, dtype, own), None


def _backward(
    away: NamedSharding, home: NamedSharding, dtype: str, own: str, saved: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (jax.lax.with_sharding_constraint(gradient, home).astype(own),)


_gathered.defvjp(_forward, _backward)
