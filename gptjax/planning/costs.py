"""What one train step costs, part by part of the model: parameters, FLOPs of matrix products, and measured time.

Parameters and FLOPs follow from shapes and cost nothing. Time is measured: the step that training repeats is compiled
and run on random tokens, once without a profiler for the length of a step, and once with it for how that length
divides among the parts. A part's milliseconds are its share of the traced steps times the untraced step, so that they
add up to the time that passes in a run; gptjax.planning.profile_trace says how an instant is shared by what runs in it.
"""

import shlex
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import linen as nn
from ml_collections import ConfigDict

from gptjax import config as configs
from gptjax import models, objectives, optim, sharding
from gptjax.config.errors import ConfigError
from gptjax.core import console, rng
from gptjax.data.tokenizers import tokenizers
from gptjax.finetune import methods
from gptjax.planning import matmuls, modules, profile_trace
from gptjax.planning.modules import Place
from gptjax.runs import directory as workdirs
from gptjax.runs.train_state import TrainState, starting_from
from gptjax.training import memory
from gptjax.training.loop import FREE_OF_ORIGIN
from gptjax.training.monitoring import metrics, profiler
from gptjax.training.setup import check
from gptjax.training.step import of_config

WARM_UP = 2  # steps before the clock starts: the first ones touch memory that later ones find there


class Times(NamedTuple):
    """What was measured: seconds of a step, and the share of it that each place has, together 1."""

    step: float
    shares: Mapping[Place, float]


class Plan(NamedTuple):
    """What a step costs; everything but `times` is known without running one."""

    config: ConfigDict  # resolved, with its vocabulary
    devices: int
    params: Any  # the tree's shapes
    flops: Mapping[Place, int]  # of one step
    times: Times | None = None


def plan(config: ConfigDict, steps: int = 0) -> Plan:
    """What a train step of a config costs. Reads no text and writes no run.

    Args:
      config: as gptjax.config.read gives it.
      steps: how many to time, and again how many to trace; 0 measures nothing.

    Raises:
      ConfigError: a config that cannot be, or one whose vocabulary only its text would tell.
      CheckpointError: `init_from` is no run.
    """
    config = planned(config)
    mesh = sharding.make_mesh(**config.mesh)
    model = methods.model_of(config, sharding.divided(mesh))
    start = start_of(config, model)
    shapes = jax.eval_shape(start)
    step = of_config(config, objectives.loss(config, model), optim.optimizer(config), mesh, shapes)
    batch = random_batch(config)
    counted = matmuls.flops_by_place(step.trace(shapes, batch).jaxpr)
    found = Plan(config, mesh.size, shapes.eval_shapes(), counted)
    if not steps:
        return found
    memory.check(memory.exact(config, shapes), mesh.size)
    state = jax.jit(start, out_shardings=sharding.of_state(mesh, shapes))()
    return found._replace(times=measure(step, state, sharding.place(batch, mesh), steps))


def start_of(config: ConfigDict, model: nn.Module) -> Callable[[], TrainState]:
    """A function that makes the first state of such a run, of random parameters; where it tunes, of a random base."""

    def start() -> TrainState:
        base = models.init(model, rng.key(config.seed, "init"))
        return starting_from(base, model, optim.optimizer(config), config)

    return start


def planned(config: ConfigDict) -> ConfigDict:
    """The config as its run would have it: with the model it begins with, checked, with its vocabulary.

    Raises:
      ConfigError, CheckpointError: as `plan`.
    """
    if configs.is_foreign(config.init_from):
        raise ConfigError(
            f"to be planned, init_from={config.init_from} has to be a run: python -m gptjax.convert "
            f"--from={shlex.quote(config.init_from)} --to=RUN"
        )
    if config.init_from:
        origin = workdirs.origin(config, Path(config.init_from))
        config = workdirs.with_model_of(origin or Path(), config, FREE_OF_ORIGIN)
    config = configs.resolve(config)
    check(config)
    if config.init_from:
        return config
    size = tokenizers.vocab_size_of(config.data.tokenizer) or config.model.vocabulary
    if not size:
        name = config.data.tokenizer
        raise ConfigError(f"how many tokens {name!r} has depends on the text; give --config.model.vocabulary=N")
    return configs.with_vocabulary(config, size)


def batch_shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays of a batch; of an encoder-decoder, sources as long as targets.

    Raises:
      ConfigError: the objective asks for labels, of which nothing is known here.
    """
    for name, _ in objectives.parts(config.train.objective):
        if objectives.OBJECTIVES[name].tasks:
            raise ConfigError(f"no batch can be made up for train.objective={name}; plan the model with another one")
    shape = config.data.batch_size, config.data.context
    dtypes = {"inputs_BT": "int32", "targets_BT": "int32", "weights_BT": "float32"}
    if models.MODELS[config.model.arch].kind == "seq2seq":
        dtypes |= {"segments_BT": "int32", "source_BS": "int32", "source_segments_BS": "int32"}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def random_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """Random tokens in the shape of a batch, all of one document and of the same weight."""
    rng = np.random.default_rng(config.seed)

    def of(name: str, wanted: jax.ShapeDtypeStruct) -> np.ndarray:
        if "segments" in name or "weights" in name:
            return np.ones(wanted.shape, wanted.dtype)
        return rng.integers(0, config.model.vocabulary, wanted.shape, np.int32)

    return {name: of(name, wanted) for name, wanted in batch_shapes(config).items()}


def measure(step: jax.stages.Wrapped, state: TrainState, batch: Any, steps: int) -> Times:
    """Compiles a step, times `steps` of it, and traces as many.

    Args:
      step: as gptjax.training.step.of_config gives it.
      state: is used up.
      batch: on the devices.
      steps: at least 1.
    """
    began = time.monotonic()
    compiled = compile_with_names(step, state, batch)
    console.say(f"compiled   in {time.monotonic() - began:.1f} s")
    with console.bar("measuring", WARM_UP + 2 * steps) as advance, TemporaryDirectory() as folder:
        state, _ = repeat(compiled, state, batch, WARM_UP, advance)
        state, seconds = repeat(compiled, state, batch, steps, advance)
        with jax.profiler.trace(folder, profiler_options=profiler.options()):
            repeat(compiled, state, batch, steps, advance)
        return Times(seconds / steps, shares(compiled.as_text() or "", Path(folder)))


def compile_with_names(step: jax.stages.Wrapped, state: TrainState, batch: Any) -> jax.stages.Compiled:
    """The compiled step, with this program's own names in it.

    A program from the compilation cache may have been compiled when the same operations had other names.
    """
    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        return step.lower(state, batch).compile()
    finally:
        jax.config.update(name, before)


def repeat(step: Any, state: TrainState, batch: Any, count: int, advance: Callable[..., None]) -> tuple[Any, float]:
    """Takes steps one after the other, as training does: each is handed over while the one before runs.

    Returns:
      the state after them, and the seconds they took.
    """
    jax.block_until_ready(state)
    began, before = time.perf_counter(), None
    for _ in range(count):
        state, values = step(state, batch)
        jax.block_until_ready(before)
        before = values
        advance(1)
    jax.block_until_ready((state, before))
    return state, time.perf_counter() - began


def shares(text: str, folder: Path) -> dict[Place, float]:
    """The share of the traced time that each place has.

    Args:
      text: of the compiled program.
      folder: of the profile.
    """
    module = text.removeprefix("HloModule ").split(",", 1)[0].strip()
    executed = profile_trace.events(folder, module)
    seconds = profile_trace.seconds_by_place(executed, profile_trace.places(text), profile_trace.containers(text))
    whole = sum(seconds.values())
    return {where: value / whole for where, value in seconds.items()} if whole else {Place(modules.ELSE, False): 1.0}


def parameters_by_part(params: Any) -> Counter[str]:
    """How many numbers each part has, of a tree of arrays or shapes."""
    total: Counter[str] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total[modules.part_of(jax.tree_util.keystr(path, simple=True, separator="/"))] += leaf.size
    return total


def rows(found: Plan) -> list[dict[str, Any]]:
    """The table, a dictionary a part, in the order in which a token meets them, and last the part "total".

    Each has `parameters` and `gflop` (matrix products of one step, forward and backward). Where times were measured
    each has `forward_ms`, `backward_ms`, `share` (of the step, 0 to 1) and `gflop_per_second` (None where there are no
    products), and the total `step_ms`, `tokens_per_second`, and `mfu` by `mfu_convention` (None on a device whose peak
    is not known). What is of neither pass, from the optimizer on, counts as forward.
    """
    own = parameters_by_part(found.params)
    timed = found.times.shares if found.times else {}
    names = modules.in_order({*own, *(at.part for at in found.flops), *(at.part for at in timed)})
    table = []
    for name in names:
        flops = sum(found.flops.get(Place(name, backward), 0) for backward in (False, True))
        line = {"part": name, "parameters": own[name], "gflop": flops / 1e9}
        if found.times:
            each = [found.times.step * timed.get(Place(name, backward), 0.0) for backward in (False, True)]
            line |= _speeds(flops, each[0], each[1], found.times.step)
        table.append(line)
    return [*table, total(found, table)]


def _speeds(flops: float, forward: float, backward: float, step: float) -> dict[str, float | None]:
    seconds = forward + backward
    return {
        "forward_ms": forward * 1e3,
        "backward_ms": backward * 1e3,
        "share": seconds / step,
        "gflop_per_second": flops / 1e9 / seconds if flops and seconds else None,
    }


def total(found: Plan, table: list[dict[str, Any]]) -> dict[str, Any]:
    """The last row of the table: sums, and how fast the step is."""
    line: dict[str, Any] = {"part": "total"}
    line |= {key: sum(row[key] for row in table) for key in ("parameters", "gflop")}
    if not found.times:
        return line
    sums = {key: sum(row[key] for row in table) for key in ("forward_ms", "backward_ms")}
    c, kind, seconds = found.config, jax.devices()[0].device_kind, found.times.step
    rate = c.data.batch_size * c.data.context / seconds
    flops = metrics.flops_per_token(found.params, c.model, c.data.context)
    line |= _speeds(line["gflop"] * 1e9, sums["forward_ms"] / 1e3, sums["backward_ms"] / 1e3, seconds)
    line |= {"step_ms": seconds * 1e3, "tokens_per_second": rate, "device": kind, "devices": found.devices}
    return line | {"mfu": metrics.mfu(rate, flops, kind, found.devices), "mfu_convention": metrics.MFU_CONVENTION}


def as_text(found: Plan) -> str:
    """The table in plain text, with what its numbers mean below it."""
    table, c = rows(found), found.config
    stacked = {"blocks": f"blocks (x {c.model.layers})"} if c.model.scan_layers else {}
    heads = [f"{'part':28}", f"{'parameters':>14}", f"{'GFLOP':>10}"]
    heads += ["forward ms", "backward ms", "   share", "GFLOP/s"] if found.times else []
    lines = ["  ".join(heads)]
    for row in table:
        first, _, rest = row["part"].partition(" ")
        cells = [f"{' '.join(filter(None, [stacked.get(first, first), rest])):28}"]
        cells += [f"{row['parameters']:14,}", f"{row['gflop']:10.3f}"]
        if found.times:
            cells += [f"{row['forward_ms']:10.2f}", f"{row['backward_ms']:11.2f}", f"{row['share']:8.1%}"]
            cells += ["" if row["gflop_per_second"] is None else f"{row['gflop_per_second']:7.1f}"]
        lines.append("  ".join(cells).rstrip())
    batch = f"{c.data.batch_size} x {c.data.context} tokens a step, {c.train.dtype}"
    lines += ["", f"{batch}; GFLOP: matrix products of a step, forward and backward"]
    return "\n".join(lines + (_speed_lines(table[-1]) if found.times else []))


def _speed_lines(row: Mapping[str, Any]) -> list[str]:
    on = f"{row['devices']} {row['device']} device{'s' * (row['devices'] > 1)}"
    mfu = "not known, as this device's peak is not" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return [
        f"{row['step_ms']:.1f} ms a step, {row['tokens_per_second']:,.0f} tokens/s on {on}",
        f"mfu {mfu} ({row['mfu_convention']})",
        "ms: wall time of the step, shared out by what a profile saw running; threads that run at once share equally",
    ]
