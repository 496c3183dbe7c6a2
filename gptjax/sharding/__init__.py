"""How a run lies on devices: one mesh, and where state and batches go on it. No other file names a mesh axis."""

from collections.abc import Mapping

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def make_mesh(data: int = -1) -> Mesh:
    """The mesh of a run: `data` devices, -1 for all, that share each batch."""
    devices = jax.devices()
    count = len(devices) if data == -1 else data
    # Auto, because Linen fails under jax.make_mesh's default of Explicit axes.
    return jax.make_mesh((count,), ("data",), axis_types=(AxisType.Auto,), devices=devices[:count])


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device: the state."""
    return NamedSharding(mesh, P())


def by_row(mesh: Mesh) -> NamedSharding:
    """Rows divided among the devices: a batch."""
    return NamedSharding(mesh, P("data"))


def by_row_of_slices(mesh: Mesh) -> NamedSharding:
    """As `by_row`, for a batch cut into slices for gradient accumulation: [A, B/A, ...]."""
    return NamedSharding(mesh, P(None, "data"))


def place(batch: Mapping[str, object], mesh: Mesh) -> dict[str, jax.Array]:
    """The batch on the devices; of several processes each gives its own rows."""
    rows = by_row(mesh)
    if jax.process_count() == 1:
        return jax.device_put(batch, rows)
    return jax.tree.map(lambda own: jax.make_array_from_process_local_data(rows, own), dict(batch))
