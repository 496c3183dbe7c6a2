"""Formats the results of gptjax.planning.compiled_plan and .meshes as text and as JSON objects."""

import math
from collections import defaultdict
from typing import Any

from gptjax.planning import chips, collectives
from gptjax.planning.chips import Chip
from gptjax.planning.compiled_plan import CompiledPlan, Measured, Memory
from gptjax.planning.meshes import Candidate
from gptjax.sharding import AXES
from gptjax.training.monitoring import metrics

MEMORY = {
    "parameters": "parameters",
    "optimizer": "optimizer",
    "batch": "batch",
    "temporaries": "activations, gradients",
}


def as_dict(plan: CompiledPlan, measured: Measured | None = None) -> dict[str, Any]:
    """Returns the plan as a JSON object; bytes are per device, and `sent_bytes` per step."""
    c, f = plan.config, plan.forecast
    result = {
        "mesh": plan.mesh,
        "devices": math.prod(plan.mesh.values()),
        "chip": plan.chip._asdict(),
        "batch_size": c.data.batch_size,
        "context": c.data.context,
        "grad_accumulation": c.train.grad_accumulation,
        "dtype": c.train.dtype,
        "kernels": c.model.kernels,
        "parameters": plan.parameters,
        "memory": plan.memory._asdict() | {"total": plan.memory.total},
        "fits": plan.memory.total <= plan.chip.memory,
        "flops": plan.flops,
        "collectives": collective_rows(plan),
        "predicted": f._asdict() | {"mfu_convention": metrics.MFU_CONVENTION, "model": cost_model(plan.chip)},
        "compile_seconds": plan.compile_seconds,
    }
    if measured:
        result["measured"] = measured._asdict()
        result["error"] = {
            "step": _error(f.step, measured.step),
            "bytes": _error(plan.memory.total, measured.bytes),
        }
    return result


def _error(predicted: float, measured: float) -> float | None:
    return predicted / measured - 1 if measured else None


def collective_rows(plan: CompiledPlan) -> list[dict[str, Any]]:
    """Returns the collectives, grouped by operation and axes, sorted by time."""
    kinds = defaultdict(list)
    for one in plan.collectives:
        kinds[one.op, one.axes, collectives.link(one.group, plan.chip)].append(one)
    rows = []
    for (op, axes, (where, bandwidth)), ones in kinds.items():
        sent = sum(one.sent * one.times for one in ones)
        times = sum(one.times for one in ones)
        rows.append(
            {"op": op, "axes": axes, "devices": len(ones[0].group), "link": where, "times": times}
            | {"sent_bytes": sent, "seconds": sent / bandwidth}
        )
    return sorted(rows, key=lambda row: -row["seconds"])


def cost_model(chip: Chip) -> str:
    """Returns the roofline model in one line."""
    rate = f"products at {chip.products / 1e12:.3g} TFLOP/s"
    if chip.is_measured():
        return f"step = {rate} and other instructions at {chip.bandwidth / 1e9:.3g} GB/s, as measured here, + waits"
    return (
        f"step = {rate} ({chips.PEAK_FRACTION:.0%} of the bf16 peak) + optimizer's memory traffic + waits (tensor, "
        f"context, expert) + data and fsdp beyond products; links at {chips.LINK_FRACTION:.0%} of the data sheet"
    )


def as_text(plan: CompiledPlan, measured: Measured | None = None) -> str:
    """Returns the plan as a table in plain text."""
    c, chip, f = plan.config, plan.chip, plan.forecast
    devices = math.prod(plan.mesh.values())
    slices = f" in {c.train.grad_accumulation} slices" if c.train.grad_accumulation > 1 else ""
    lines = [
        f"{plan.parameters:,} parameters, {c.train.dtype}, {format_mesh(plan.mesh)}: {devices:,} x {chip.kind}",
        f"{c.data.batch_size:,} x {c.data.context:,} tokens a step{slices}, {plan.flops / 1e15:,.4g} PFLOP with "
        f"rematerialization; compiled in {plan.compile_seconds:.0f} s",
        "",
        *_memory_lines(plan.memory, chip),
        "",
        f"{'collective':20} {'over':14} {'devices':>8} {'link':>5} {'times':>7} {'GB sent':>10} {'ms':>10}",
    ]
    for row in collective_rows(plan):
        over = "+".join(row["axes"])
        lines.append(
            f"{row['op']:20} {over:14} {row['devices']:8,} {row['link']:>5} {row['times']:7,} "
            f"{row['sent_bytes'] / 1e9:10.3f} {row['seconds'] * 1e3:10.2f}"
        )
    mfu = "unknown, as is this device's peak" if f.mfu is None else f"{f.mfu:.1%}"
    lines += [
        "",
        f"{'predicted':30} {'ms':>10}",
        *(
            f"  {label:28} {seconds * 1e3:10,.2f}"
            for label, seconds in (
                ("products", f.products),
                ("other instructions" if chip.is_measured() else "optimizer", f.elsewhere),
                ("waits for collectives", f.waited),
                (f"not overlapped of {f.hidden * 1e3:,.1f} ms", max(0.0, f.hidden - f.products)),
                ("step", f.step),
            )
        ),
        f"{f.tokens_per_second:,.0f} tokens/s, mfu {mfu}",
        f"mfu: {metrics.MFU_CONVENTION}",
        cost_model(chip),
    ]
    return "\n".join(lines + (_measured_lines(plan, measured) if measured else []))


def format_mesh(mesh: dict[str, int]) -> str:
    """Formats a mesh as data=8,fsdp=64, without axes of size 1."""
    return ",".join(f"{axis}={mesh[axis]}" for axis in AXES if mesh[axis] > 1) or "one device"


def _memory_lines(memory: Memory, chip: Chip) -> list[str]:
    share = memory.total / chip.memory
    fits = f"{'fits' if share <= 1 else 'does NOT fit'} {chip.memory / 1e9:,.1f} GB: {share:.0%}"
    lines = [f"{'bytes on a device':30} {'GB':>10}"]
    lines += [f"  {label:28} {getattr(memory, name) / 1e9:10.3f}" for name, label in MEMORY.items()]
    return [*lines, f"  {'total':28} {memory.total / 1e9:10.3f}  {fits}"]


def _measured_lines(plan: CompiledPlan, measured: Measured) -> list[str]:
    pairs = (
        ("step, ms", plan.forecast.step * 1e3, measured.step * 1e3, "the mean"),
        ("GB on a device", plan.memory.total / 1e9, measured.bytes / 1e9, measured.how),
    )
    lines = ["", f"{'run here':30} {'predicted':>10} {'measured':>10} {'error':>8}"]
    for label, predicted, actual, how in pairs:
        error = _error(predicted, actual)
        relative = "" if error is None else f"{error:+.1%}"
        lines.append(f"  {label:28} {predicted:10.3f} {actual:10.3f} {relative:>8}  ({how})")
    return lines


def candidate_dict(candidate: Candidate) -> dict[str, Any]:
    """Returns an estimated mesh as a JSON object."""
    slices = candidate.config.train.grad_accumulation
    memory = candidate.memory._asdict() | {"total": candidate.memory.total}
    return {"mesh": candidate.config.mesh.to_dict(), "grad_accumulation": slices, "memory": memory} | {
        "estimated": candidate.forecast._asdict()
    }


def ranking(candidates: list[Candidate], limit: int) -> str:
    """Returns a table of the best meshes by estimated step time."""
    lines = [f"meshes that fit: {len(candidates)}; by estimates from shapes, before compilation:"]
    lines.append(f"{'mesh':44} {'slices':>7} {'GB/device':>10} {'step ms':>11} {'mfu':>7}")
    for one in candidates[:limit]:
        mfu = "" if one.forecast.mfu is None else f"{one.forecast.mfu:.1%}"
        lines.append(
            f"{format_mesh(one.config.mesh.to_dict()):44} {one.config.train.grad_accumulation:7} "
            f"{one.memory.total / 1e9:10.2f} {one.forecast.step * 1e3:11,.1f} {mfu:>7}"
        )
    return "\n".join(lines)
