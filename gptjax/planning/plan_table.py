"""What gptjax.planning.compiled_plan and .meshes found, as plain text for a person and as objects for a program."""

import math
from collections import defaultdict
from typing import Any

from gptjax.planning import chips, collectives
from gptjax.planning.chips import Chip
from gptjax.planning.compiled_plan import Measured, Memory, Scaled
from gptjax.planning.meshes import Candidate
from gptjax.sharding import AXES
from gptjax.training.monitoring import metrics

MEMORY = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "batch": "batch",
    "temporaries": "activations, gradients",
}


def as_object(found: Scaled, measured: Measured | None = None) -> dict[str, Any]:
    """All that is known of a step; bytes are of one device, and `sent_bytes` of a step."""
    c, f = found.config, found.forecast
    told = {
        "mesh": found.mesh,
        "devices": math.prod(found.mesh.values()),
        "chip": found.chip._asdict(),
        "batch_size": c.data.batch_size,
        "context": c.data.context,
        "grad_accumulation": c.train.grad_accumulation,
        "dtype": c.train.dtype,
        "kernels": c.model.kernels,
        "parameters": found.parameters,
        "memory": found.memory._asdict() | {"total": found.memory.total},
        "fits": found.memory.total <= found.chip.memory,
        "flops": found.flops,
        "collectives": exchanged(found),
        "predicted": f._asdict() | {"mfu_convention": metrics.MFU_CONVENTION, "model": model(found.chip)},
        "compile_seconds": found.compile_seconds,
    }
    if measured:
        told["measured"] = measured._asdict()
        told["error"] = {
            "step": _error(f.step, measured.step),
            "bytes": _error(found.memory.total, measured.bytes),
        }
    return told


def _error(foreseen: float, measured: float) -> float | None:
    return foreseen / measured - 1 if measured else None


def exchanged(found: Scaled) -> list[dict[str, Any]]:
    """The collectives, those of one kind over the same axes together, those that take longest first."""
    kinds = defaultdict(list)
    for one in found.collectives:
        kinds[one.op, one.axes, collectives.link(one.group, found.chip)].append(one)
    listed = []
    for (op, axes, (where, bandwidth)), ones in kinds.items():
        sent = sum(one.sent * one.times for one in ones)
        times = sum(one.times for one in ones)
        listed.append(
            {"op": op, "axes": axes, "devices": len(ones[0].group), "link": where, "times": times}
            | {"sent_bytes": sent, "seconds": sent / bandwidth}
        )
    return sorted(listed, key=lambda row: -row["seconds"])


def model(chip: Chip) -> str:
    """The roofline, in one line."""
    rate = f"products at {chip.products / 1e12:.3g} TFLOP/s"
    if chip.is_measured():
        return f"step = {rate} and other instructions at {chip.bandwidth / 1e9:.3g} GB/s, as measured here, + waits"
    return (
        f"step = {rate} ({chips.OF_PEAK:.0%} of the bf16 peak) + optimizer through memory + waits (tensor, context, "
        f"expert) + what products do not hide of data, fsdp; links at {chips.OF_LINK:.0%} of the data sheet"
    )


def as_text(found: Scaled, measured: Measured | None = None) -> str:
    """A table for a person."""
    c, chip, f = found.config, found.chip, found.forecast
    devices = math.prod(found.mesh.values())
    slices = f" in {c.train.grad_accumulation} slices" if c.train.grad_accumulation > 1 else ""
    lines = [
        f"{found.parameters:,} parameters, {c.train.dtype}, {said(found.mesh)}: {devices:,} x {chip.kind}",
        f"{c.data.batch_size:,} x {c.data.context:,} tokens a step{slices}, {found.flops / 1e15:,.4g} PFLOP with what "
        f"is computed again; compiled in {found.compile_seconds:.0f} s",
        "",
        *_memory_lines(found.memory, chip),
        "",
        f"{'collective':20} {'over':14} {'devices':>8} {'link':>5} {'times':>7} {'GB sent':>10} {'ms':>10}",
    ]
    for row in exchanged(found):
        over = "+".join(row["axes"])
        lines.append(
            f"{row['op']:20} {over:14} {row['devices']:8,} {row['link']:>5} {row['times']:7,} "
            f"{row['sent_bytes'] / 1e9:10.3f} {row['seconds'] * 1e3:10.2f}"
        )
    mfu = "not known, as this device's peak is not" if f.mfu is None else f"{f.mfu:.1%}"
    lines += [
        "",
        f"{'predicted':30} {'ms':>10}",
        *(
            f"  {label:28} {seconds * 1e3:10,.2f}"
            for label, seconds in (
                ("products", f.products),
                ("other instructions" if chip.is_measured() else "optimizer", f.elsewhere),
                ("waits for collectives", f.waited),
                (f"not hidden of {f.hidden * 1e3:,.1f} ms", max(0.0, f.hidden - f.products)),
                ("step", f.step),
            )
        ),
        f"{f.tokens_per_second:,.0f} tokens/s, mfu {mfu}",
        f"mfu: {metrics.MFU_CONVENTION}",
        model(chip),
    ]
    return "\n".join(lines + (_measured_lines(found, measured) if measured else []))


def said(mesh: dict[str, int]) -> str:
    """data=8,fsdp=64: the axes with several devices."""
    return ",".join(f"{axis}={mesh[axis]}" for axis in AXES if mesh[axis] > 1) or "one device"


def _memory_lines(memory: Memory, chip: Chip) -> list[str]:
    share = memory.total / chip.memory
    fits = f"{'fits' if share <= 1 else 'does NOT fit'} {chip.memory / 1e9:,.1f} GB: {share:.0%}"
    lines = [f"{'bytes on a device':30} {'GB':>10}"]
    lines += [f"  {label:28} {getattr(memory, name) / 1e9:10.3f}" for name, label in MEMORY.items()]
    return [*lines, f"  {'total':28} {memory.total / 1e9:10.3f}  {fits}"]


def _measured_lines(found: Scaled, measured: Measured) -> list[str]:
    pairs = (
        ("step, ms", found.forecast.step * 1e3, measured.step * 1e3, "the mean"),
        ("GB on a device", found.memory.total / 1e9, measured.bytes / 1e9, measured.how),
    )
    lines = ["", f"{'run here':30} {'predicted':>10} {'measured':>10} {'error':>8}"]
    for label, foreseen, seen, how in pairs:
        error = _error(foreseen, seen)
        told = "" if error is None else f"{error:+.1%}"
        lines.append(f"  {label:28} {foreseen:10.3f} {seen:10.3f} {told:>8}  ({how})")
    return lines


def candidate_object(one: Candidate) -> dict[str, Any]:
    """A mesh that was not compiled."""
    slices = one.config.train.grad_accumulation
    memory = one.memory._asdict() | {"total": one.memory.total}
    return {"mesh": one.config.mesh.to_dict(), "grad_accumulation": slices, "memory": memory} | {
        "estimated": one.forecast._asdict()
    }


def ranking(ranked: list[Candidate], shown: int) -> str:
    """The best of the meshes, before any is compiled."""
    lines = [f"meshes that fit: {len(ranked)}; by estimates from shapes, before any is compiled:"]
    lines.append(f"{'mesh':44} {'slices':>7} {'GB/device':>10} {'step ms':>11} {'mfu':>7}")
    for one in ranked[:shown]:
        mfu = "" if one.forecast.mfu is None else f"{one.forecast.mfu:.1%}"
        lines.append(
            f"{said(one.config.mesh.to_dict()):44} {one.config.train.grad_accumulation:7} "
            f"{one.memory.total / 1e9:10.2f} {one.forecast.step * 1e3:11,.1f} {mfu:>7}"
        )
    return "\n".join(lines)
