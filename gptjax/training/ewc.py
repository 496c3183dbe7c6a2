"""Elastic weight consolidation (arXiv 1612.00796): keeps the parameters that the origin's text depends on.

The diagonal Fisher information is estimated once, when a run starts, on the text of its origin. The Fisher information
of the origin's own predecessors is added, so that a sequence of runs remembers all its texts (arXiv 1805.06370 section
4, with factor 1). It is saved in the run's directory and is part of the optimizer state of the penalty
(gptjax.optim.update_rules.ewc).
"""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from gptjax import data, models, objectives, sharding
from gptjax.config.errors import CheckpointError, ConfigError
from gptjax.core import console, rng
from gptjax.core.files import write_atomic
from gptjax.data.batches import Batches, MixtureStage, Stage
from gptjax.data.tokenizers import tokenizers
from gptjax.finetune import fisher, paths
from gptjax.finetune.paths import Flat
from gptjax.models import kernels
from gptjax.models.stacking import stack, unstack
from gptjax.runs import directory as workdirs
from gptjax.runs import pretrained
from gptjax.sharding import processes
from gptjax.training.teacher import TeacherFn, make_teacher_fn

FISHER = "fisher.safetensors"  # by path, of the trained parameters of the base, in the layout of the run's config
MOST_ROWS = 16  # per batch


class FisherData(NamedTuple):
    """The data on which the Fisher information is estimated: the origin's text as the origin read it."""

    origin: Path
    config: ConfigDict  # of the origin
    rows: int
    size: int  # rows per batch
    batches: Batches
    teacher_fn: TeacherFn

    def every_batch(self) -> Iterator[Any]:
        """Yields the batches of all rows."""
        for index in range(self.rows // self.size):
            batch: Any = self.batches[index]
            yield self.teacher_fn(batch)


def fisher_data(config: ConfigDict, origin: Path, mesh: Mesh) -> FisherData:
    """Opens the text of a run's origin.

    Args:
      config: of the run, resolved.
      origin: the run that it starts from.
      mesh: of its parameters.

    Raises:
      ConfigError: the origin has no text.
      DataError: the text is missing or has changed.
    """
    if workdirs.is_untrained(origin):
        option = f"finetune.ewc={config.finetune.ewc} needs the text that init_from was trained on"
        raise ConfigError(f"{option}; {config.init_from} was imported or merged and has none")
    base_config, tokenizer = workdirs.read_config(origin), tokenizers.load(origin / "tokenizer")
    loaded = data.load(base_config.data, tokenizer)
    workdirs.check_same_text(origin, loaded.fingerprints)
    rows = loaded.rows(
        base_config.data, rng.integer(config.seed, "finetune"), objectives.set_transform(base_config, tokenizer)
    )
    count = config.finetune.fisher_rows
    size = math.gcd(count, MOST_ROWS)
    batches = Batches(rows, [Stage(0, size, base_config.data.context)], [MixtureStage(0, loaded.shares)])
    return FisherData(origin, base_config, count, size, batches, make_teacher_fn(base_config, tokenizer, mesh))


def fisher_information(
    fisher_data: FisherData, config: ConfigDict, base: Any, trained: Any, workdir: Path, mesh: Mesh
) -> Flat:
    """Estimates the Fisher information of the trained parameters of the base, by path, and writes it to the directory.

    Args:
      fisher_data: of the run's origin.
      config: of the run.
      base: all parameters of the base, in the layout of the run.
      trained: the parameters that train, or their shapes.
      workdir: of the run.
      mesh: of the base parameters.
    """
    leaves = paths.flat(base)
    shared = [path for path, leaf in paths.flat(trained).items() if path in leaves and leaf.shape == leaves[path].shape]
    fisher_by_path: Flat = {}
    if shared:
        before = previous_fisher(fisher_data.origin, config)
        estimated = paths.flat(estimate(fisher_data, config, base, shared, mesh))
        fisher_by_path = {
            path: leaf + place_like(before[path], leaf) if before else leaf for path, leaf in estimated.items()
        }
    count, total = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (fisher_by_path, trained))
    console.say(
        f"ewc        {count:,} of {total:,} trained parameters are consolidated on {fisher_data.rows:,} rows of text"
    )
    whole = {path: np.asarray(leaf, np.float32, order="C") for path, leaf in processes.gather(fisher_by_path).items()}
    processes.run_on_first(lambda: write_atomic(workdir / FISHER, save(whole)), "the Fisher information is written")
    return fisher_by_path


def estimate(fisher_data: FisherData, config: ConfigDict, base: Any, selected: list[str], mesh: Mesh) -> Any:
    """Estimates the diagonal Fisher information of the selected paths, as a tree; see gptjax.finetune.fisher."""
    base_config = fisher_data.config
    model = models.build(pretrained.base_model(fisher_data.origin, config), base_config.train.dtype)
    objective = objectives.loss(base_config, model)
    options = kernels.compiler_options(base_config.model, base_config.train.dtype) | sharding.compiler_options(mesh)
    tuned, frozen = paths.split(base, selected)
    with console.bar("estimating the Fisher information", fisher_data.rows) as advance:
        return fisher.diagonal(objective, tuned, fisher_data.every_batch(), frozen, options, advance)


def previous_fisher(origin: Path, config: ConfigDict) -> Flat:
    """Loads the Fisher information that the origin was trained with, by path, in the layout of this config.

    Parameters without any get 0; the result is empty if the origin was trained without elastic weight consolidation.

    Raises:
      CheckpointError: the file is damaged.
    """
    if not (origin / FISHER).exists():
        return {}
    try:
        saved = load_file(origin / FISHER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{origin / FISHER} is damaged: {str(error).splitlines()[0][:200]}") from error
    shapes = paths.flat(pretrained.base_shapes(origin, workdirs.read_config(origin)))
    whole = {path: saved.get(path, np.zeros(shape.shape, np.float32)) for path, shape in shapes.items()}
    laid_out = (stack if config.model.scan_layers else unstack)(paths.nested(whole))
    return {path: np.asarray(leaf) for path, leaf in paths.flat(laid_out).items()}


def place_like(values: np.ndarray, leaf: jax.Array) -> jax.Array:
    """Places an array of the host on the devices with the sharding of `leaf`."""
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: values[index])
