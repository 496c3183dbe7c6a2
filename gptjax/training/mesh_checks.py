"""Which configs a mesh can carry, told before anything is compiled."""

import math
from collections.abc import Iterator

from ml_collections import ConfigDict

from gptjax.config.checks import is_recurrent
from gptjax.objectives.denoising import sizes_of_rows
from gptjax.sharding import COMPUTED, sizes


def lengths(config: ConfigDict, context: int) -> tuple[int, ...]:
    """How long source and target are that an objective makes of rows of a context; none where it leaves them so."""
    options = config.objective
    valid = options.mean_span >= 1 and 0 < options.mask_rate < 1  # else gptjax.objectives refuses it
    if "denoising" not in config.train.objective or options.corruption != "spans" or not valid:
        return ()
    return sizes_of_rows(context, options)


def problems(config: ConfigDict, devices: int) -> Iterator[str]:
    """Why a run of this config cannot be divided as its mesh says; nothing where it can.

    Args:
      config: resolved.
      devices: how many there are.
    """
    mesh, model = config.mesh, config.model
    said = ", ".join(f"mesh.{axis}={size}" for axis, size in mesh.items() if size != 1)
    if any(size < 1 and size != -1 for size in mesh.values()) or list(mesh.values()).count(-1) > 1:
        yield f"{said}: sizes must be at least 1, but for one of -1, which takes what the others leave (mesh.data=1?)"
        return
    found = sizes(mesh, devices)
    taken = math.prod(found.values())
    if taken > devices or (-1 in mesh.values() and devices % taken):
        yield f"{said} does not fit the {devices} devices here; -1 fills one"
        return
    rows, slices = math.prod(found[axis] for axis in COMPUTED["B"]), config.train.grad_accumulation
    batches = {f"data.stages: batch_size {stage[1]}": stage[1] for stage in config.data.stages}
    batches[f"data.batch_size={config.data.batch_size}"] = config.data.batch_size
    times = f" in {slices} slices (train.grad_accumulation)" if slices > 1 else ""
    for what, size in batches.items():
        if size % (rows * slices):
            yield f"{what} cannot be split over {rows} devices{times}; take a multiple of {rows * slices}"
    tensor, context, expert = found["tensor"], found["context"], found["expert"]
    if is_recurrent(model) and tensor * context > 1:
        yield f"{said} cannot divide recurrent layers; divide rows alone, by mesh.data or mesh.fsdp"
    for key in ("kv_heads", "mlp_width"):
        if model[key] % tensor:
            yield f"mesh.tensor={tensor} does not divide model.{key}={model[key]}"
    if model.width % found["fsdp"]:
        yield f"mesh.fsdp={found['fsdp']} does not divide model.width={model.width}"
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
