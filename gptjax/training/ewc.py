"""What a run is to remember of the one that it begins with: which parameters that run's own text depends on.

Elastic weight consolidation (arXiv 1612.00796). The Fisher information is estimated once, when a run begins, on the
text of its origin, and what the origin had to remember itself is added, so that a sequence of runs remembers all its
texts (arXiv 1805.06370 section 4, with the factor 1). It is kept in the run's directory, and the pull to the first
parameters (gptjax.optim.update_rules.elastic) has it in its state.
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
from gptjax.training.teacher import Teach, teaching

FISHER = "fisher.safetensors"  # by path, of what a run trains of its base, in the layout of its own config
MOST_ROWS = 16  # of a batch


class Memory(NamedTuple):
    """What the Fisher information is estimated on: the origin's text as the origin read it."""

    origin: Path
    config: ConfigDict  # the origin's
    rows: int
    size: int  # of a batch
    batches: Batches
    teach: Teach

    def every_batch(self) -> Iterator[Any]:
        """Batches of all the rows."""
        for index in range(self.rows // self.size):
            batch: Any = self.batches[index]
            yield self.teach(batch)


def memory(config: ConfigDict, origin: Path, mesh: Mesh) -> Memory:
    """Opens the text of a run's origin.

    Args:
      config: of the run, resolved.
      origin: the run that it begins with.
      mesh: where its parameters lie.

    Raises:
      ConfigError: the origin has no text.
      DataError: the text is gone, or has changed since.
    """
    if workdirs.is_untrained(origin):
        asked = f"finetune.ewc={config.finetune.ewc} remembers the text that init_from was trained on"
        raise ConfigError(f"{asked}, and {config.init_from} was imported or made of others and has none")
    theirs, tokenizer = workdirs.read_config(origin), tokenizers.load(origin / "tokenizer")
    loaded = data.load(theirs.data, tokenizer)
    workdirs.check_same_text(origin, loaded.fingerprints)
    rows = loaded.rows(theirs.data, rng.integer(config.seed, "finetune"), objectives.preparing(theirs, tokenizer))
    count = config.finetune.fisher_rows
    size = math.gcd(count, MOST_ROWS)
    read = Batches(rows, [Stage(0, size, theirs.data.context)], [MixtureStage(0, loaded.shares)])
    return Memory(origin, theirs, count, size, read, teaching(theirs, tokenizer, mesh))


def remembered(known: Memory, config: ConfigDict, base: Any, trained: Any, workdir: Path, mesh: Mesh) -> Flat:
    """The Fisher information of each parameter that trains and is the base's, by path; written to the directory.

    Args:
      known: as `memory` gives it.
      config: of the run.
      base: all parameters that it begins with, in its layout.
      trained: what of them and besides them trains, or its shapes.
      workdir: of the run.
      mesh: where the base lies.
    """
    leaves = paths.flat(base)
    own = [path for path, leaf in paths.flat(trained).items() if path in leaves and leaf.shape == leaves[path].shape]
    found: Flat = {}
    if own:
        before = of_predecessors(known.origin, config)
        estimated = paths.flat(estimate(known, config, base, own, mesh))
        found = {path: leaf + like(before[path], leaf) if before else leaf for path, leaf in estimated.items()}
    count, among = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (found, trained))
    console.say(f"ewc        {count:,} of {among:,} numbers that train are held by {known.rows:,} rows of text")
    whole = {path: np.asarray(leaf, np.float32, order="C") for path, leaf in processes.by_all(found).items()}
    processes.first_does(lambda: write_atomic(workdir / FISHER, save(whole)), "what is remembered is written")
    return found


def estimate(known: Memory, config: ConfigDict, base: Any, own: list[str], mesh: Mesh) -> Any:
    """The diagonal Fisher information of the parameters at some paths, as a tree; see gptjax.finetune.fisher."""
    theirs = known.config
    objective = objectives.loss(theirs, models.build(pretrained.base_model(known.origin, config), theirs.train.dtype))
    options = kernels.compiler_options(theirs.model, theirs.train.dtype) | sharding.compiler_options(mesh)
    tuned, frozen = paths.divided(base, own)
    with console.bar("estimating the Fisher information", known.rows) as advance:
        return fisher.diagonal(objective, tuned, known.every_batch(), frozen, options, advance)


def of_predecessors(origin: Path, config: ConfigDict) -> Flat:
    """What the origin had to remember itself, by path, in the layout of a run of this config; 0 where it says nothing.

    Nothing at all where it had nothing to remember.

    Raises:
      CheckpointError: its file is damaged.
    """
    if not (origin / FISHER).exists():
        return {}
    try:
        there = load_file(origin / FISHER)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{origin / FISHER} is damaged: {str(error).splitlines()[0][:200]}") from error
    shapes = paths.flat(pretrained.base_shapes(origin, workdirs.read_config(origin)))
    whole = {path: there.get(path, np.zeros(shape.shape, np.float32)) for path, shape in shapes.items()}
    laid_out = (stack if config.model.scan_layers else unstack)(paths.nested(whole))
    return {path: np.asarray(leaf) for path, leaf in paths.flat(laid_out).items()}


def like(values: np.ndarray, leaf: jax.Array) -> jax.Array:
    """An array of the host, lying on the devices as another one does."""
    return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda where: values[where])
