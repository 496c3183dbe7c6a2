"""Checks that a config can be sharded over its mesh, before anything is compiled."""

import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from gptjax.models.options import is_recurrent
from gptjax.objectives.denoising import row_lengths
from gptjax.sharding import COMPUTED, mesh_sizes


def lengths(config: ConfigDict, context: int) -> tuple[int, ...]:
    """Lengths of source and target that the objective makes of rows of `context` tokens; empty if it keeps them."""
    options = config.objective
    valid = options.mean_span >= 1 and 0 < options.mask_rate < 1  # otherwise gptjax.objectives reports it
    if "denoising" not in config.train.objective or options.corruption != "spans" or not valid:
        return ()
    return row_lengths(context, options)


def problems(config: ConfigDict, devices: int) -> Iterator[str]:
    """Yields the reasons why a run of this config cannot be sharded over its mesh.

    Args:
      config: resolved.
      devices: number of devices.
    """
    mesh, model = config.mesh, config.model
    setting = ", ".join(f"mesh.{axis}={size}" for axis, size in mesh.items() if size != 1)
    if any(size < 1 and size != -1 for size in mesh.values()) or list(mesh.values()).count(-1) > 1:
        yield f"{setting}: sizes must be at least 1, or -1 once for the remaining devices (mesh.data=1?)"
        return
    sizes_by_axis = mesh_sizes(mesh, devices)
    total = math.prod(sizes_by_axis.values())
    if total > devices or (-1 in mesh.values() and devices % total):
        yield f"{setting} does not fit the {devices} devices here; -1 takes the remaining ones"
        return
    rows, slices = math.prod(sizes_by_axis[axis] for axis in COMPUTED["B"]), config.train.grad_accumulation
    batches = {f"data.stages: batch_size {stage[1]}": stage[1] for stage in config.data.stages}
    batches[f"data.batch_size={config.data.batch_size}"] = config.data.batch_size
    times = f" in {slices} slices (train.grad_accumulation)" if slices > 1 else ""
    for setting_of_size, size in batches.items():
        if size % (rows * slices):
            yield f"{setting_of_size} cannot be split over {rows} devices{times}; take a multiple of {rows * slices}"
    tensor, context, expert = sizes_by_axis["tensor"], sizes_by_axis["context"], sizes_by_axis["expert"]
    if is_recurrent(model) and tensor * context > 1:
        yield f"{setting} cannot shard recurrent layers; use mesh.data or mesh.fsdp, which shard the batch"
    for key in ("kv_heads", "mlp_width"):
        if model[key] % tensor:
            yield f"mesh.tensor={tensor} does not divide model.{key}={model[key]}"
    if model.width % sizes_by_axis["fsdp"]:
        yield f"mesh.fsdp={sizes_by_axis['fsdp']} does not divide model.width={model.width}"
    for length in sorted({stage[2] for stage in config.data.stages} | {config.data.context}):
        divided = {length: f"sequences of {length} tokens (data.context)"}
        divided |= {
            size: f"rows of {size} tokens, which train.objective makes of {length}" for size in lengths(config, length)
        }
        yield from (
            f"mesh.context={context} does not divide {what}" for size, what in divided.items() if size % context
        )
    if expert > 1 and (model.mlp != "experts" or model.experts % expert):
        yield f"mesh.expert={expert} needs model.mlp=experts, and a multiple of {expert} as model.experts"
