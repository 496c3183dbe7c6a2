"""Sharding of a run: one mesh, one table of rules, and the shardings of state and batches.

No other file names a mesh axis, but for plans, which compare meshes (gptjax.planning.meshes, roofline).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.models.logical_axes import Layout, parameter_axes, use_layout

LossFn = Callable[[Any, Any, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]

# Mesh axes, those with the most communication last, so that neighbouring devices share them.
AXES = ("data", "fsdp", "expert", "context", "tensor")

# Mesh axes that shard an array's axis, by its letter (gptjax.models): of stored parameters,
STORED = {
    "D": ("fsdp",),  # gathered for each use (arXiv 1910.02054, 2304.11277)
    "V": ("tensor",),
    "G": ("tensor",),
    "H": ("tensor",),
    "F": ("tensor",),
    "E": ("expert",),
}
# and of activations (arXiv 1909.08053 for `tensor`, 2006.16668 for `expert`, 2407.21783 3.3.2 for `context`).
COMPUTED = {
    "B": ("data", "fsdp", "expert"),
    "T": ("context",),
    "V": ("tensor",),
    "G": ("tensor",),
    "H": ("tensor",),
    "F": ("tensor",),
    "E": ("expert",),
}


def mesh_sizes(mesh: Mapping[str, int], devices: int) -> dict[str, int]:
    """Returns the number of devices along each mesh axis, in the order of AXES.

    Args:
      mesh: `config.mesh`; one axis may be -1, for all devices that the others leave.
      devices: number of devices.
    """
    fixed = math.prod(size for size in mesh.values() if size != -1)
    return {axis: max(devices // fixed, 1) if mesh.get(axis, 1) == -1 else mesh.get(axis, 1) for axis in AXES}


def make_mesh(**mesh: int) -> Mesh:
    """Builds a mesh of these sizes, see `mesh_sizes`. By default batches are sharded over all devices."""
    sizes = mesh_sizes(mesh or {"data": -1}, jax.device_count())
    # Auto, because Linen fails under jax.make_mesh's default of Explicit axes.
    axis_types, devices = (AxisType.Auto,) * len(AXES), jax.devices()[: math.prod(sizes.values())]
    return jax.make_mesh(tuple(sizes.values()), AXES, axis_types=axis_types, devices=devices)


def layout(mesh: Mesh) -> Layout:
    """Returns the sharding rules on this mesh."""
    return Layout(mesh, STORED, COMPUTED)


def sharded_dimensions(mesh: Mesh) -> set[str]:
    """Returns the dimensions that are sharded besides rows: "sequences", and the columns of "products"."""
    axes = {"sequences": COMPUTED["T"], "products": COMPUTED["F"]}
    return {name for name, mesh_axes in axes.items() if layout(mesh).is_sharded(mesh_axes)}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """Returns the XLA options for programs on this mesh."""
    # On CPU, XLA promotes all-reduces of bfloat16 to float32, and fails if they are in a shard_map.
    on_cpu = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return {"xla_disable_hlo_passes": "all-reduce-promotion"} if on_cpu else {}


def replicated(mesh: Mesh) -> NamedSharding:
    """Returns the sharding of arrays that are replicated on every device."""
    return NamedSharding(mesh, P())


def batch_shardings(mesh: Mesh, batch: Mapping[str, Any], leading: int = 0) -> dict[str, NamedSharding]:
    """Returns the shardings of a batch's arrays, by the letters that their names end in: over rows and positions.

    Args:
      mesh: mesh of the run.
      batch: arrays or their shapes; several texts of one row, [B, C, T], have a name for [B, T].
      leading: number of axes before B, which are not sharded.
    """
    rules = layout(mesh)

    def array_sharding(name: str, shape: Sequence[int]) -> NamedSharding:
        letters = name.rpartition("_")[2].replace("S", "T")  # sources are sharded as targets are
        letters = letters[0] + "C" * (len(shape) - len(letters)) + letters[1:]
        return NamedSharding(mesh, P(*(None,) * leading, *rules.spec(letters, shape, COMPUTED, AXES)))

    return {name: array_sharding(name, array.shape[leading:]) for name, array in batch.items()}


def state_shardings(mesh: Mesh, tree: Any) -> Any:
    """Returns the shardings of a train state, or of parameters alone.

    Args:
      mesh: mesh of the run.
      tree: arrays or their shapes; arrays under a parameter's path have its axes, and all others are replicated.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _param_specs(layout(mesh), tree, AXES))


def _param_specs(rules: Layout, tree: Any, mesh_axes: Sequence[str]) -> Any:
    def leaf_spec(path: Any, leaf: Any) -> P:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return rules.spec(parameter_axes(names, len(leaf.shape)), leaf.shape, rules.stored, mesh_axes)

    return jax.tree_util.tree_map_with_path(leaf_spec, tree)


def shard_rows(objective: LossFn, mesh: Mesh) -> LossFn:
    """Shards an objective over the rows of a batch: each device computes its own rows.

    The result is the sum over devices; its gradient has the shardings of the parameters. Each shard of rows draws its
    own dropout, so that dropout differs between meshes.

    Args:
      objective: weighted sums, see gptjax.objectives.
      mesh: mesh of the run; on one device the objective is returned as it is.
    """
    if mesh.size == 1:
        return objective
    rules = layout(mesh)

    def local(params: Any, batch: Any, rng: jax.Array | None) -> Any:
        local_rng = None if rng is None else jax.random.fold_in(rng, jax.lax.axis_index(rules.rows))
        with use_layout(rules):
            return jax.lax.psum(objective(params, batch, local_rng), rules.rows)

    def sharded(params: Any, batch: Any, rng: jax.Array | None) -> Any:
        if not rules.rows:  # XLA's partitioner takes no sum over one device
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), use_layout(rules):
                return objective(params, batch, rng)
        # check_vma=False: JAX's check of varying axes rejects loops over constants.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_param_specs(rules, params, rules.rows), P(rules.rows), P()),
            out_specs=P(),
            axis_names=set(rules.rows),
            check_vma=False,
        )(params, batch, rng)

    return sharded


def member_sharding(count: int) -> NamedSharding:
    """Returns the sharding of arrays [M, ...] of a population: each member on one device, equally many on each."""
    return NamedSharding(_member_mesh(count), P("member"))


def shared_sharding(count: int) -> NamedSharding:
    """Returns the sharding of arrays that all members of a population share."""
    return NamedSharding(_member_mesh(count), P())


def shard_members(f: Callable[..., Any], count: int, shared: Sequence[int] = ()) -> Callable[..., Any]:
    """Shards a function of arrays [M, ...] over members: each device computes its own.

    Args:
      f: function of the members of one device, without communication between devices.
      count: number of members, M.
      shared: indices of the arguments that all members share.
    """
    mesh = _member_mesh(count)
    if mesh.size == 1:
        return f

    def sharded(*arguments: Any) -> Any:
        specs = tuple(P() if i in shared else P("member") for i in range(len(arguments)))
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("member"), check_vma=False)(*arguments)

    return sharded


def _member_mesh(count: int) -> Mesh:
    """Builds a mesh of the largest number of devices that divides the number of members."""
    devices = max(size for size in range(1, jax.device_count() + 1) if count % size == 0)
    return jax.make_mesh((devices,), ("member",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def place_batch(
    batch: Mapping[str, Any], mesh: Mesh, start: int = 0, end: int = 1, parts: int = 1
) -> dict[str, jax.Array]:
    """Places a batch on the devices.

    Args:
      batch: the whole batch; or, of `parts` equal parts of its rows, those from `start` to `end` (exclusive), which
        include all rows of this process's devices: see `local_rows`.
      mesh: mesh of the run.
      start, end, parts: the parts that `batch` has.
    """
    shapes = {
        name: jax.ShapeDtypeStruct((len(array) * parts // (end - start), *array.shape[1:]), array.dtype)
        for name, array in batch.items()
    }
    shardings = batch_shardings(mesh, shapes)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), shardings)

    def put(name: str) -> jax.Array:
        array, rows = batch[name], shapes[name].shape[0]
        first = rows * start // parts

        def shard(index: Any) -> Any:
            row_slice, *others = index
            return array[(slice((row_slice.start or 0) - first, (row_slice.stop or rows) - first), *others)]

        return jax.make_array_from_callback(shapes[name].shape, shardings[name], shard)

    return {name: put(name) for name in batch}


def local_rows(mesh: Mesh) -> tuple[int, int, int]:
    """Returns (start, end, parts): of a batch's `parts` equal parts, this process's devices hold start to end - 1."""
    parts = layout(mesh).devices(COMPUTED["B"])
    indices = NamedSharding(mesh, P(COMPUTED["B"])).addressable_devices_indices_map((parts,))
    local = sorted(index[0].start or 0 for index in indices.values() if index)
    return local[0], local[-1] + 1, parts
