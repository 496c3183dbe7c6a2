"""How a run lies on devices: one mesh, one table of rules, and where state and batches go.

No file elsewhere names a mesh axis, but for plans, which compare meshes (gptjax.planning.meshes, roofline).
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gptjax.models.logical_axes import Layout, parameter_axes, use_layout

# The axes of a mesh, neighbours last: what is divided along the last ones is exchanged most often.
Objective = Callable[[Any, Any, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]
AXES = ("data", "fsdp", "expert", "context", "tensor")

# Which mesh axes divide an array's axis, by its letter (gptjax.models): of parameters, as they are kept,
STORED = {
    "D": ("fsdp",),  # gathered for each use (arXiv 1910.02054, 2304.11277)
    "V": ("tensor",),
    "G": ("tensor",),
    "H": ("tensor",),
    "F": ("tensor",),
    "E": ("expert",),
}
# and of what is computed (arXiv 1909.08053 for `tensor`, 2006.16668 for `expert`, 2407.21783 3.3.2 for `context`).
COMPUTED = {
    "B": ("data", "fsdp", "expert"),
    "T": ("context",),
    "V": ("tensor",),
    "G": ("tensor",),
    "H": ("tensor",),
    "F": ("tensor",),
    "E": ("expert",),
}


def sizes(mesh: Mapping[str, int], devices: int) -> dict[str, int]:
    """How many devices each axis of a mesh has, in the order of AXES.

    Args:
      mesh: `config.mesh`; one axis may be -1, for all devices that the others leave.
      devices: how many there are.
    """
    known = math.prod(size for size in mesh.values() if size != -1)
    return {axis: max(devices // known, 1) if mesh.get(axis, 1) == -1 else mesh.get(axis, 1) for axis in AXES}


def make_mesh(**mesh: int) -> Mesh:
    """The mesh of a run, of these sizes; see `sizes`. By default all devices share each batch."""
    found = sizes(mesh or {"data": -1}, jax.device_count())
    # Auto, because Linen fails under jax.make_mesh's default of Explicit axes.
    kinds, devices = (AxisType.Auto,) * len(AXES), jax.devices()[: math.prod(found.values())]
    return jax.make_mesh(tuple(found.values()), AXES, axis_types=kinds, devices=devices)


def layout(mesh: Mesh) -> Layout:
    """The rules on this mesh."""
    return Layout(mesh, STORED, COMPUTED)


def divided(mesh: Mesh) -> set[str]:
    """What is divided among devices besides rows: "sequences", and the columns of "products"."""
    axes = {"sequences": COMPUTED["T"], "products": COMPUTED["F"]}
    return {what for what, of_mesh in axes.items() if layout(mesh).is_sharded(of_mesh)}


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """What XLA is told for programs on this mesh."""
    # On CPU it would compute sums of bfloat16 between devices in float32, and fails where they are within a shard_map.
    on_cpu = mesh.size > 1 and mesh.devices.flat[0].platform == "cpu"
    return {"xla_disable_hlo_passes": "all-reduce-promotion"} if on_cpu else {}


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, P())


def of_batch(mesh: Mesh, batch: Mapping[str, Any], leading: int = 0) -> dict[str, NamedSharding]:
    """Shardings of a batch's arrays by the letters that their names end in: rows, and of each the positions.

    Args:
      mesh: of the run.
      batch: arrays or their shapes; several texts of one row, [B, C, T], also go by the name of [B, T].
      leading: how many axes before B are whole on each device.
    """
    there = layout(mesh)

    def of_array(name: str, shape: Sequence[int]) -> NamedSharding:
        letters = name.rpartition("_")[2].replace("S", "T")  # sources lie as targets do
        letters = letters[0] + "C" * (len(shape) - len(letters)) + letters[1:]
        return NamedSharding(mesh, P(*(None,) * leading, *there.spec(letters, shape, COMPUTED, AXES)))

    return {name: of_array(name, array.shape[leading:]) for name, array in batch.items()}


def of_state(mesh: Mesh, tree: Any) -> Any:
    """Where each array of a state goes, or of parameters alone.

    Args:
      mesh: of the run.
      tree: arrays or their shapes; what lies under a parameter's path has its axes, and all else is whole everywhere.
    """
    return jax.tree.map(lambda spec: NamedSharding(mesh, spec), _stored(layout(mesh), tree, AXES))


def _stored(there: Layout, tree: Any, among: Sequence[str]) -> Any:
    def of_leaf(path: Any, leaf: Any) -> P:
        names = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)]
        return there.spec(parameter_axes(names, len(leaf.shape)), leaf.shape, there.stored, among)

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def over_rows(objective: Objective, mesh: Mesh) -> Objective:
    """The objective of whole batches, of which each device works on its own rows.

    What it gives is the sum over the devices; its gradient by the parameters lies as they do. Dropout is drawn apart
    for each part of the rows, so that it differs between meshes.

    Args:
      objective: sums by weight, see gptjax.objectives.
      mesh: on one device it stays as it is.
    """
    if mesh.size == 1:
        return objective
    there = layout(mesh)

    def local(params: Any, batch: Any, rng: jax.Array | None) -> Any:
        own = None if rng is None else jax.random.fold_in(rng, jax.lax.axis_index(there.rows))
        with use_layout(there):
            return jax.lax.psum(objective(params, batch, own), there.rows)

    def whole(params: Any, batch: Any, rng: jax.Array | None) -> Any:
        if not there.rows:  # XLA's partitioner takes no sum over one device
            with jax.sharding.use_abstract_mesh(mesh.abstract_mesh), use_layout(there):
                return objective(params, batch, rng)
        # Without JAX's own account of what differs between devices, which loops over constants do not pass.
        return jax.shard_map(
            local,
            mesh=mesh,
            in_specs=(_stored(there, params, there.rows), P(there.rows), P()),
            out_specs=P(),
            axis_names=set(there.rows),
            check_vma=False,
        )(params, batch, rng)

    return whole


def of_members(count: int) -> NamedSharding:
    """Of arrays [M, ...] of a population's members: each lies on one device, which has as many as the others."""
    return NamedSharding(_member_mesh(count), P("member"))


def of_all_members(count: int) -> NamedSharding:
    """Of what all members of such a population read."""
    return NamedSharding(_member_mesh(count), P())


def over_members(f: Callable[..., Any], count: int, shared: Sequence[int] = ()) -> Callable[..., Any]:
    """A function of arrays [M, ...] of all members, of which each device works on its own members.

    Args:
      f: of the members of one device; nothing in it may want another device.
      count: M.
      shared: which of its arguments all members have.
    """
    mesh = _member_mesh(count)
    if mesh.size == 1:
        return f

    def whole(*arguments: Any) -> Any:
        specs = tuple(P() if i in shared else P("member") for i in range(len(arguments)))
        return jax.shard_map(f, mesh=mesh, in_specs=specs, out_specs=P("member"), check_vma=False)(*arguments)

    return whole


def _member_mesh(count: int) -> Mesh:
    """As many devices as divide the members evenly."""
    devices = max(size for size in range(1, jax.device_count() + 1) if count % size == 0)
    return jax.make_mesh((devices,), ("member",), axis_types=(AxisType.Auto,), devices=jax.devices()[:devices])


def place(batch: Mapping[str, Any], mesh: Mesh, start: int = 0, end: int = 1, parts: int = 1) -> dict[str, jax.Array]:
    """A batch on the devices.

    Args:
      batch: all of it, or of so many equal `parts` of its rows those from `start` to before `end`, among which are all
        that this process's devices hold: see `own_rows`.
      mesh: of the run.
      start, end, parts: which rows they are.
    """
    shapes = {
        name: jax.ShapeDtypeStruct((len(given) * parts // (end - start), *given.shape[1:]), given.dtype)
        for name, given in batch.items()
    }
    there = of_batch(mesh, shapes)
    if jax.process_count() == 1:
        return jax.device_put(dict(batch), there)

    def put(name: str) -> jax.Array:
        given, rows = batch[name], shapes[name].shape[0]
        first = rows * start // parts

        def of_device(where: Any) -> Any:
            of_rows, *others = where
            return given[(slice((of_rows.start or 0) - first, (of_rows.stop or rows) - first), *others)]

        return jax.make_array_from_callback(shapes[name].shape, there[name], of_device)

    return {name: put(name) for name in batch}


def own_rows(mesh: Mesh) -> tuple[int, int, int]:
    """(start, end, parts): of a batch cut into that many equal parts, this process's devices hold these in a row."""
    parts = layout(mesh).devices(COMPUTED["B"])
    where = NamedSharding(mesh, P(COMPUTED["B"])).addressable_devices_indices_map((parts,))
    held = sorted(index[0].start or 0 for index in where.values() if index)
    return held[0], held[-1] + 1, parts
