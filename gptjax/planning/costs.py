"""Cost of a train step by part of the model: parameters, FLOPs of matrix products, and measured time.

Parameters and FLOPs follow from shapes. Time is measured: the train step is compiled and run on random tokens, first
without a profiler for the time of a step, then with it for the share of each part. A part's milliseconds are its share
of the traced steps times the untraced step time, so that they add up to wall time. gptjax.planning.profile_trace
defines how concurrent operations share time.
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

from gptjax import models, objectives, optim, sharding
from gptjax.config.errors import ConfigError
from gptjax.core import console, rng
from gptjax.data.tokenizers import tokenizers
from gptjax.finetune import methods
from gptjax.planning import matmuls, modules, profile_trace
from gptjax.planning.modules import Scope
from gptjax.runs import config as configs
from gptjax.runs import directory as workdirs
from gptjax.runs.train_state import TrainState, init_from_base
from gptjax.training import memory
from gptjax.training.monitoring import metrics, profiler
from gptjax.training.setup import PRETRAINED_OVERRIDES, check
from gptjax.training.step import make_train_step

WARM_UP = 2  # untimed steps; the first ones touch new memory


class Times(NamedTuple):
    """Measured seconds of a step, and the share of each scope; the shares sum to 1."""

    step: float
    shares: Mapping[Scope, float]


class Plan(NamedTuple):
    """Cost of a step; all but `times` is known without running one."""

    config: ConfigDict  # resolved, with its vocabulary
    devices: int
    params: Any  # tree of shapes
    flops: Mapping[Scope, int]  # of one step
    times: Times | None = None


def plan(config: ConfigDict, steps: int = 0) -> Plan:
    """Returns the cost of a train step. Reads no text and writes no run.

    Args:
      config: result of gptjax.runs.config.read.
      steps: number of steps to time, and to trace; 0: no measurement.

    Raises:
      ConfigError: an invalid config, or one whose vocabulary size depends on the text.
      CheckpointError: `init_from` is not a run.
    """
    config = resolve(config)
    mesh = sharding.make_mesh(**config.mesh)
    model = methods.build_model(config, sharding.sharded_dimensions(mesh))
    init = init_fn(config, model)
    shapes = jax.eval_shape(init)
    step = make_train_step(config, objectives.loss(config, model), optim.optimizer(config), mesh, shapes)
    batch = random_batch(config)
    flops = matmuls.flops_by_scope(step.trace(shapes, batch).jaxpr)
    result = Plan(config, mesh.size, shapes.eval_shapes(), flops)
    if not steps:
        return result
    memory.check(memory.from_state(config, shapes), mesh.size)
    state = jax.jit(init, out_shardings=sharding.state_shardings(mesh, shapes))()
    return result._replace(times=measure(step, state, sharding.place_batch(batch, mesh), steps))


def init_fn(config: ConfigDict, model: nn.Module) -> Callable[[], TrainState]:
    """Returns a function that initializes the state with random parameters; for fine-tuning, on a random base."""

    def init() -> TrainState:
        base = models.init(model, rng.key(config.seed, "init"))
        return init_from_base(base, model, optim.optimizer(config), config)

    return init


def resolve(config: ConfigDict) -> ConfigDict:
    """Returns the resolved and checked config of a run, with the model of `init_from` and the vocabulary size.

    Raises:
      ConfigError, CheckpointError: the errors of `plan`.
    """
    if configs.is_foreign(config.init_from):
        raise ConfigError(
            f"a plan needs a run, but init_from={config.init_from}: python -m gptjax.convert "
            f"--from={shlex.quote(config.init_from)} --to=RUN"
        )
    if config.init_from:
        origin = workdirs.origin(config, Path(config.init_from))
        config = workdirs.with_model_of(origin or Path(), config, PRETRAINED_OVERRIDES)
    config = configs.resolve(config)
    check(config)
    if config.init_from:
        return config
    size = tokenizers.vocab_size_of(config.data.tokenizer) or config.model.vocabulary
    if not size:
        name = config.data.tokenizer
        raise ConfigError(f"the vocabulary size of {name!r} depends on the text; give --config.model.vocabulary=N")
    return configs.with_vocabulary(config, size)


def batch_shapes(config: ConfigDict) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a batch; an encoder-decoder's sources are as long as its targets.

    Raises:
      ConfigError: the objective needs labels.
    """
    for name, _ in objectives.parse_objective(config.train.objective):
        if objectives.OBJECTIVES[name].tasks:
            raise ConfigError(f"train.objective={name} needs labels; plan the model with another objective")
    shape = config.data.batch_size, config.data.context
    dtypes = {"inputs_BT": "int32", "targets_BT": "int32", "weights_BT": "float32"}
    if models.MODELS[config.model.arch].kind == "seq2seq":
        dtypes |= {"segments_BT": "int32", "source_BS": "int32", "source_segments_BS": "int32"}
    return {name: jax.ShapeDtypeStruct(shape, dtype) for name, dtype in dtypes.items()}


def random_batch(config: ConfigDict) -> dict[str, np.ndarray]:
    """Returns a batch of random tokens of a single document, with equal weights."""
    rng = np.random.default_rng(config.seed)

    def array(name: str, shape: jax.ShapeDtypeStruct) -> np.ndarray:
        if "segments" in name or "weights" in name:
            return np.ones(shape.shape, shape.dtype)
        return rng.integers(0, config.model.vocabulary, shape.shape, np.int32)

    return {name: array(name, shape) for name, shape in batch_shapes(config).items()}


def measure(step: jax.stages.Wrapped, state: TrainState, batch: Any, steps: int) -> Times:
    """Compiles a step, times `steps` executions, and traces as many.

    Args:
      step: result of gptjax.training.step.of_config.
      state: initial state, which is donated.
      batch: batch on the devices.
      steps: at least 1.
    """
    start = time.monotonic()
    compiled = compile_with_names(step, state, batch)
    console.say(f"compiled   in {time.monotonic() - start:.1f} s")
    with console.bar("measuring", WARM_UP + 2 * steps) as advance, TemporaryDirectory() as folder:
        state, _ = run_steps(compiled, state, batch, WARM_UP, advance)
        state, seconds = run_steps(compiled, state, batch, steps, advance)
        with jax.profiler.trace(folder, profiler_options=profiler.options()):
            run_steps(compiled, state, batch, steps, advance)
        return Times(seconds / steps, shares(compiled.as_text() or "", Path(folder)))


def compile_with_names(step: jax.stages.Wrapped, state: TrainState, batch: Any) -> jax.stages.Compiled:
    """Compiles a step with this program's operation names.

    A program from the compilation cache may have the names of an earlier version of the code.
    """
    name = "jax_compilation_cache_include_metadata_in_key"
    before = getattr(jax.config, name)
    jax.config.update(name, True)
    try:
        return step.lower(state, batch).compile()
    finally:
        jax.config.update(name, before)


def run_steps(step: Any, state: TrainState, batch: Any, count: int, advance: Callable[..., None]) -> tuple[Any, float]:
    """Runs steps as training does: each is dispatched while the previous one runs.

    Returns:
      The final state, and the seconds taken.
    """
    jax.block_until_ready(state)
    start, before = time.perf_counter(), None
    for _ in range(count):
        state, values = step(state, batch)
        jax.block_until_ready(before)
        before = values
        advance(1)
    jax.block_until_ready((state, before))
    return state, time.perf_counter() - start


def shares(text: str, folder: Path) -> dict[Scope, float]:
    """Returns the share of the traced time of each scope.

    Args:
      text: text of the compiled program.
      folder: folder of the profile.
    """
    module = text.removeprefix("HloModule ").split(",", 1)[0].strip()
    executed = profile_trace.events(folder, module)
    seconds = profile_trace.seconds_by_scope(executed, profile_trace.scopes(text), profile_trace.containers(text))
    total = sum(seconds.values())
    return {scope: value / total for scope, value in seconds.items()} if total else {Scope(modules.OTHER, False): 1.0}


def parameters_by_part(params: Any) -> Counter[str]:
    """Counts the parameters of each part in a tree of arrays or shapes."""
    total: Counter[str] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        total[modules.part_of(jax.tree_util.keystr(path, simple=True, separator="/"))] += leaf.size
    return total


def rows(plan: Plan) -> list[dict[str, Any]]:
    """Returns the table, a dictionary per part in the order of the forward pass, with the part "total" last.

    Each has `parameters` and `gflop` (matrix products of a step, forward and backward). If times were measured, each
    has `forward_ms`, `backward_ms`, `share` (of the step, 0 to 1) and `gflop_per_second` (None without products), and
    the total has `step_ms`, `tokens_per_second`, and `mfu` by `mfu_convention` (None if the device's peak is unknown).
    What belongs to neither pass, such as the optimizer, counts as forward.
    """
    parameters = parameters_by_part(plan.params)
    shares = plan.times.shares if plan.times else {}
    names = modules.sort_parts({*parameters, *(scope.part for scope in plan.flops), *(scope.part for scope in shares)})
    table = []
    for name in names:
        flops = sum(plan.flops.get(Scope(name, backward), 0) for backward in (False, True))
        line = {"part": name, "parameters": parameters[name], "gflop": flops / 1e9}
        if plan.times:
            each = [plan.times.step * shares.get(Scope(name, backward), 0.0) for backward in (False, True)]
            line |= _speeds(flops, each[0], each[1], plan.times.step)
        table.append(line)
    return [*table, total_row(plan, table)]


def _speeds(flops: float, forward: float, backward: float, step: float) -> dict[str, float | None]:
    seconds = forward + backward
    return {
        "forward_ms": forward * 1e3,
        "backward_ms": backward * 1e3,
        "share": seconds / step,
        "gflop_per_second": flops / 1e9 / seconds if flops and seconds else None,
    }


def total_row(plan: Plan, table: list[dict[str, Any]]) -> dict[str, Any]:
    """Returns the last row of the table: sums and speeds."""
    line: dict[str, Any] = {"part": "total"}
    line |= {key: sum(row[key] for row in table) for key in ("parameters", "gflop")}
    if not plan.times:
        return line
    sums = {key: sum(row[key] for row in table) for key in ("forward_ms", "backward_ms")}
    c, kind, seconds = plan.config, jax.devices()[0].device_kind, plan.times.step
    rate = c.data.batch_size * c.data.context / seconds
    flops = metrics.flops_per_token(plan.params, c.model, c.data.context)
    line |= _speeds(line["gflop"] * 1e9, sums["forward_ms"] / 1e3, sums["backward_ms"] / 1e3, seconds)
    line |= {"step_ms": seconds * 1e3, "tokens_per_second": rate, "device": kind, "devices": plan.devices}
    return line | {"mfu": metrics.mfu(rate, flops, kind, plan.devices), "mfu_convention": metrics.MFU_CONVENTION}


def as_text(plan: Plan) -> str:
    """Returns the table as plain text, with a legend below."""
    table, c = rows(plan), plan.config
    stacked = {"blocks": f"blocks (x {c.model.layers})"} if c.model.scan_layers else {}
    heads = [f"{'part':28}", f"{'parameters':>14}", f"{'GFLOP':>10}"]
    heads += ["forward ms", "backward ms", "   share", "GFLOP/s"] if plan.times else []
    lines = ["  ".join(heads)]
    for row in table:
        first, _, rest = row["part"].partition(" ")
        cells = [f"{' '.join(filter(None, [stacked.get(first, first), rest])):28}"]
        cells += [f"{row['parameters']:14,}", f"{row['gflop']:10.3f}"]
        if plan.times:
            cells += [f"{row['forward_ms']:10.2f}", f"{row['backward_ms']:11.2f}", f"{row['share']:8.1%}"]
            cells += ["" if row["gflop_per_second"] is None else f"{row['gflop_per_second']:7.1f}"]
        lines.append("  ".join(cells).rstrip())
    batch = f"{c.data.batch_size} x {c.data.context} tokens a step, {c.train.dtype}"
    lines += ["", f"{batch}; GFLOP: matrix products of a step, forward and backward"]
    return "\n".join(lines + (_speed_lines(table[-1]) if plan.times else []))


def _speed_lines(row: Mapping[str, Any]) -> list[str]:
    on = f"{row['devices']} {row['device']} device{'s' * (row['devices'] > 1)}"
    mfu = "unknown, as is this device's peak" if row["mfu"] is None else f"{row['mfu']:.1%}"
    return [
        f"{row['step_ms']:.1f} ms a step, {row['tokens_per_second']:,.0f} tokens/s on {on}",
        f"mfu {mfu} ({row['mfu_convention']})",
        "ms: wall time of the step, divided by a profile of what ran; concurrent threads share equally",
    ]
