"""Logical axis names, by which modules declare how arrays may be sharded. Names no mesh axis.

Axes have the letters of gptjax.models, and `_` for an axis that is never sharded. With several devices the model is
traced within `use_layout`: each device then sees its own rows of a batch (manual partitioning), while axes inside a row
are partitioned by XLA under the constraints of `constrain`. Without a layout the functions of this module do nothing.
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

AxisRules = Mapping[str, tuple[str, ...]]  # mesh axes by letter; a letter without an entry is never sharded

# The axes of each parameter, by the end of its path. Those of experts have a leading E, stacked layers a leading L.
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
    (r"(input|state|feed|query|key|mix|readout|begin)/kernel", "D_"),  # recurrent layers
    (r"head/kernel", "DV"),
)


class Layout(NamedTuple):
    """The sharding of arrays over the devices of a mesh."""

    mesh: Mesh
    stored: AxisRules  # of parameters and optimizer state
    computed: AxisRules  # of everything else, including parameters gathered for a product

    @property
    def rows(self) -> tuple[str, ...]:
        """The mesh axes that shard the rows of a batch."""
        return tuple(axis for axis in self.computed["B"] if self.mesh.shape[axis] > 1)

    @property
    def inner(self) -> tuple[str, ...]:
        """The mesh axes that shard axes inside a row."""
        batch_axes = self.computed["B"]
        return tuple(axis for axis in self.mesh.axis_names if axis not in batch_axes and self.mesh.shape[axis] > 1)

    @property
    def others(self) -> tuple[str, ...]:
        """The mesh axes besides `rows`, including those of size one."""
        return tuple(axis for axis in self.mesh.axis_names if axis not in self.rows)

    def is_sharded(self, mesh_axes: Sequence[str]) -> bool:
        """Returns True if one of the given mesh axes has several devices."""
        return self.devices(mesh_axes) > 1

    def spec(self, letters: str, shape: Sequence[int], table: AxisRules, among: Sequence[str]) -> P:
        """The `PartitionSpec` of an array over some mesh axes; an axis that does not divide evenly is not sharded."""

        def mesh_axes(letter: str, size: int) -> tuple[str, ...] | None:
            axes = tuple(axis for axis in table.get(letter, ()) if axis in among)
            return axes if axes and size % self.devices(axes) == 0 else None

        return P(*map(mesh_axes, letters, shape))

    def devices(self, mesh_axes: Sequence[str]) -> int:
        """The number of devices along the given mesh axes."""
        return math.prod(self.mesh.shape[axis] for axis in mesh_axes)

    def parts(self, letter: str, size: int) -> int:
        """The number of shards of a computed axis of the given size."""
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
        """Applies `f` to the local shards of arrays, axes inside a row included (`jax.shard_map`).

        Args:
          f: a function of the arrays.
          letters: the axes of each argument, a tree of the same structure.
          arrays: its arguments.
          out: (letters, shape) of its result; None: those of its first argument.
          among: the mesh axes to map over, besides `rows`; None: those inside a row.
        """
        axes = self.inner if among is None else among
        if not axes:
            return f(*arrays)

        def spec(letters: str, array: jax.Array) -> P:
            return self.spec(letters, array.shape, self.computed, axes)

        specs = jax.tree.map(spec, letters, arrays)
        out_specs = self.spec(out[0], out[1], self.computed, axes) if out else specs[0]
        return jax.shard_map(f, in_specs=specs, out_specs=out_specs, axis_names=set(axes), check_vma=False)(*arrays)


_layout: ContextVar[Layout | None] = ContextVar("layout", default=None)


@contextmanager
def use_layout(layout: Layout) -> Iterator[None]:
    """Shards arrays as `layout` says in code traced within this context, in a `jax.shard_map` over `layout.rows`."""
    before = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(before)


def current() -> Layout | None:
    """Returns the layout of the innermost `use_layout`, or None."""
    return _layout.get()


def constrain(x: jax.Array, letters: str) -> jax.Array:
    """Constrains the sharding of axes inside a row by their names."""
    layout = current()
    if layout is None or not layout.inner:
        return x
    return jax.lax.with_sharding_constraint(x, layout.spec(letters, x.shape, layout.computed, layout.inner))


def embedding_lookup(table_VD: jax.Array, ids_BT: jax.Array) -> jax.Array:
    """Looks up table_VD[ids_BT], [B, T, D]; with a sharded vocabulary the devices' partial results are summed."""
    layout = current()
    if layout is None or not layout.inner:
        return table_VD[ids_BT]
    (V, D), among = table_VD.shape, layout.computed["V"]

    def local(table_vD: jax.Array, ids_BT: jax.Array) -> jax.Array:
        v = table_vD.shape[0]
        if v == V:
            return table_vD[ids_BT]
        ids_BT = ids_BT - v * jax.lax.axis_index(among)
        is_local = (ids_BT >= 0) & (ids_BT < v)
        return jax.lax.psum(jnp.where(is_local[..., None], table_vD[jnp.clip(ids_BT, 0, v - 1)], 0), among)

    return layout.per_device(local, ("VD", "BT"), table_VD, ids_BT, out=("BTD", (*ids_BT.shape, D)))


def batch_mean(x: jax.Array) -> jax.Array:
    """The mean over the devices that shard the rows of a batch."""
    layout = current()
    return jax.lax.pmean(x, layout.rows) if layout and layout.rows else x


def parameter_axes(path: Sequence[str], ndim: int) -> str:
    """The axes of a parameter, or of optimizer state of the same path.

    Args:
      path: such as ("block_0", "mlp", "up", "kernel").
      ndim: of the array; if it differs from the parameter's, no axis is sharded.
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
    """Declares a parameter of a module, and gathers it for products, except for axes that products shard themselves.

    On several devices it is all-gathered where it is used, in the dtype of the arithmetic, and its gradient is
    reduce-scattered to where it is stored (arXiv 1910.02054, section 5.3): over rows in float32, over axes inside a row
    by the product.

    Args:
      module: the module that owns it.
      name: within the module.
      init: initializer, `(key, shape, dtype) -> values`.
      shape: of the whole parameter.
      dtype: of the arithmetic; None: float32, in which it is stored.
    """
    layout = current()
    if layout is None:
        return module.param(name, init, shape, jnp.float32)
    value: jax.Array = module.get_variable("params", name)  # a shard, whose shape Linen would reject
    letters = _of_one_layer((*module.path, name), len(shape))
    for axis, letter in enumerate(letters):
        gathered = set(layout.stored.get(letter, ())) - set(layout.computed.get(letter, ()))
        for mesh_axis in layout.mesh.axis_names:
            if mesh_axis in gathered and layout.is_sharded((mesh_axis,)):
                gather = partial(jax.lax.all_gather, axis_name=mesh_axis, axis=axis, tiled=True)
                scatter = partial(jax.lax.psum_scatter, axis_name=mesh_axis, scatter_dimension=axis, tiled=True)
                collectives = (partial(layout.per_device, f, (letters,)) for f in (gather, scatter))
                value = _gather(value, *collectives, dtype or "float32")
    return constrain(value, letters)


Collective = Callable[[jax.Array], jax.Array]


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(parameter: jax.Array, gather: Collective, scatter: Collective, dtype: str) -> jax.Array:
    return _forward(parameter, gather, scatter, dtype)[0]


def _forward(parameter: jax.Array, gather: Collective, scatter: Collective, dtype: str) -> tuple[jax.Array, None]:
    return gather(parameter.astype(dtype)), None


def _backward(
    gather: Collective, scatter: Collective, dtype: str, saved: None, gradient: jax.Array
) -> tuple[jax.Array]:
    return (scatter(gradient.astype(jnp.float32)),)


_gather.defvjp(_forward, _backward)
