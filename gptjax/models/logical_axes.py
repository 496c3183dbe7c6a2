"""Names of axes: by them modules say which of an array's axes may be divided among devices. Names no mesh axis itself.

Axes have the letters of gptjax.models, and `_` where one is never divided. A caller that has several devices traces the
model within `placed`: each device then sees its own rows of a batch (XLA's manual partitioning), while axes inside a
row are divided by XLA's partitioner as `constrain` asks. Elsewhere nothing here does anything.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh
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
    (r"(input|state|feed|query|key|mix|readout|begin)/kernel", "D_"),  # of recurrent layers
    (r"head/kernel", "DV"),
)


class Layout(NamedTuple):
    """How arrays lie on the devices of a mesh."""

    mesh: Mesh
    stored: Table  # of parameters, and of what optimizers keep of them
    computed: Table  # of everything else, parameters on their way through a product too

    @property
    def rows(self) -> tuple[str, ...]:
        """The mesh axes that divide the rows of a batch."""
        return tuple(axis for axis in self.computed["B"] if self.mesh.shape[axis] > 1)

    @property
    def inner(self) -> tuple[str, ...]:
        """The mesh axes that divide what is inside a row."""
        of_rows = self.computed["B"]
        return tuple(axis for axis in self.mesh.axis_names if axis not in of_rows and self.mesh.shape[axis] > 1)

    @property
    def others(self) -> tuple[str, ...]:
        """The mesh axes besides `rows`, those of one device too."""
        return tuple(axis for axis in self.mesh.axis_names if axis not in self.rows)

    def is_divided(self, mesh_axes: Sequence[str]) -> bool:
        """Whether one of these axes of the mesh has several devices."""
        return self.devices(mesh_axes) > 1

    def spec(self, letters: str, shape: Sequence[int], table: Table, among: Sequence[str]) -> P:
        """Where an array goes, along some axes of the mesh; what these do not divide evenly stays whole."""

        def divided(letter: str, size: int) -> tuple[str, ...] | None:
            wanted = tuple(axis for axis in table.get(letter, ()) if axis in among)
            return wanted if wanted and size % self.devices(wanted) == 0 else None

        return P(*map(divided, letters, shape))

    def devices(self, mesh_axes: Sequence[str]) -> int:
        """How many devices, along these axes of the mesh, an axis would be divided among."""
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes)

    def parts(self, letter: str, size: int) -> int:
        """In how many parts devices have an axis of that size, of what is computed."""
        devices = self.devices(self.computed[letter])
        return devices if size % devices == 0 else 1

    def per_device(
        self,
        f: Callable[..., Any],
        letters: Any,
        *arrays: Any,
        out: tuple[str, Sequence[int]] | None = None,
        among: Sequence[str] | None = None,
    ) -> Any:
        """`f` of what each device has of the arrays, axes inside a row included: so collectives leave those alone.

        Args:
          f: of as many arrays.
          letters: the axes of each argument, a tree like them.
          arrays: its arguments.
          out: (letters, shape) of what it gives; None: as of its first argument.
          among: the mesh axes, besides `rows`, along which arrays are a device's own; None: those inside a row.
        """
        axes = self.inner if among is None else among
        if not axes:
            return f(*arrays)

        def spec(letters: str, array: jax.Array) -> P:
            return self.spec(letters, array.shape, self.computed, axes)

        specs = jax.tree.map(spec, letters, arrays)
        there = self.spec(out[0], out[1], self.computed, axes) if out else specs[0]
        return jax.shard_map(f, in_specs=specs, out_specs=there, axis_names=set(axes), check_vma=False)(*arrays)


_placed: ContextVar[Layout | None] = ContextVar("placed", default=None)


@contextmanager
def placed(layout: Layout) -> Iterator[None]:
    """What is traced in the block, within a `jax.shard_map` over `layout.rows` (if any), lies as `layout` says."""
    before = _placed.set(layout)
    try:
        yield
    finally:
        _placed.reset(before)


def current() -> Layout | None:
    """The layout of the innermost `placed`, or None."""
    return _placed.get()


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """The array, with axes inside a row divided as their names say."""
    layout = current()
    if layout is None or not layout.inner:
        return x
    return jax.lax.with_sharding_constraint(x, layout.spec(letters, x.shape, layout.computed, layout.inner))


def embedding_lookup(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """table_VD[ids_BT], [B, T, D]; where devices divide the words among them, each adds those that it has."""
    layout = current()
    if layout is None or not layout.inner:
        return table_VD[ids_BT]
    (V, D), among = table_VD.shape, layout.computed["V"]

    def own(table_vD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        v = table_vD.shape[0]
        if v == V:
            return table_vD[ids_BT]
        ids_BT = ids_BT - v * jax.lax.axis_index(among)
        here = (ids_BT >= 0) & (ids_BT < v)
        return jax.lax.psum(jnp.where(here[..., None], table_vD[jnp.clip(ids_BT, 0, v - 1)], 0), among)

    return layout.per_device(own, ("VD", "BT"), table_VD, ids_BT, out=("BTD", (*ids_BT.shape, D)))


def mean_of_rows(x: jax.Array) -> jax.Array:
    """The mean over the devices that have rows of their own, each with as many."""
    layout = current()
    return jax.lax.pmean(x, layout.rows) if layout and layout.rows else x


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


def parameter(
    module: nn.Module, name: str, init: Callable[..., jax.Array], shape: tuple[int, ...], dtype: str | None = None
) -> jax.Array:
    """A parameter of a module, as a product reads it: whole but for what products themselves divide.

    On several devices it is gathered where it is used, in the dtype of the arithmetic, and its gradient is summed up to
    where it is stored (arXiv 1910.02054, section 5.3): over rows in float32, over what is inside a row by the product.

    Args:
      module: whose it is.
      name: within the module.
      init: `(key, shape, dtype) -> values` at first.
      shape: of the whole.
      dtype: of the arithmetic that reads it; None: float32, which it is stored in.
    """
    layout = current()
    if layout is None:
        return module.param(name, init, shape, jnp.float32)
    value: jax.Array = module.get_variable("params", name)  # which has a part of the shape that Linen would insist on
    letters = _of_one_layer((*module.path, name), len(shape))
    for axis, letter in enumerate(letters):
        apart = set(layout.stored.get(letter, ())) - set(layout.computed.get(letter, ()))
        for mesh_axis in layout.mesh.axis_names:
            if mesh_axis in apart and layout.is_divided((mesh_axis,)):
                gather = partial(jax.lax.all_gather, axis_name=mesh_axis, axis=axis, tiled=True)
                scatter = partial(jax.lax.psum_scatter, axis_name=mesh_axis, scatter_dimension=axis, tiled=True)
                moves = (partial(layout.per_device, move, (letters,)) for move in (gather, scatter))
                value = _gathered(value, *moves, dtype or "float32")
    return constrain(value, letters)


Move = Callable[[jax.Array], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gathered(parameter: jax.Array, gather: Move, scatter: Move, dtype: str) -> jax.Array:
    return _forward(parameter, gather, scatter, dtype)[0]


def _forward(parameter: jax.Array, gather: Move, scatter: Move, dtype: str) -> tuple[jax.Array, None]:
    return gather(parameter.astype(dtype)), None


def _backward(gather: Move, scatter: Move, dtype: str, saved: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (scatter(gradient.astype(jnp.float32)),)


_gathered.defvjp(_forward, _backward)
