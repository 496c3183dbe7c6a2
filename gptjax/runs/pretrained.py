"""What a run's checkpoints answer with: its own parameters, and where it trains a part of a base, the base's too."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptjax import models, sharding
from gptjax.config import is_foreign
from gptjax.config.errors import CheckpointError
from gptjax.core import rng
from gptjax.finetune import methods, paths, quantised
from gptjax.models.stacking import stack, unstack
from gptjax.runs import directory as workdirs
from gptjax.runs.checkpoints import Checkpoints, shapes_on
from gptjax.runs.directory import read_config, read_data_facts, write_data_facts
from gptjax.sharding import processes


def check_exists(config: ConfigDict, workdir: Path) -> None:
    """Raises CheckpointError where a run is to begin with another one, or to learn from one, that does not exist."""
    if workdirs.is_run(workdir):
        return
    named = {"objective.teacher": config.objective.teacher}
    if not is_foreign(config.init_from):
        named["init_from"] = config.init_from
    for key, name in named.items():
        if name and not workdirs.is_run(Path(name).expanduser()):
            raise CheckpointError(f"{key}={name} is no run: it has no config.json")
    folder = config.init_from.removeprefix("hf:")
    if is_foreign(config.init_from) and folder.startswith((".", "/", "~")) and not Path(folder).expanduser().is_dir():
        raise CheckpointError(f"init_from={config.init_from}: there is no folder {folder}")


def load_params(workdir: Path, mesh: Mesh | None = None, step: int | str | None = None) -> Any:
    """All parameters of a run, in the layout of its own config.

    Args:
      workdir: its directory.
      mesh: where they go; None: to one device.
      step: of the checkpoint, as of `Checkpoints.restore_params`.

    Raises:
      CheckpointError: no run, no such checkpoint, none that is not damaged, or its base is gone or another one.
      ConfigError: its base was quantised, and what does that is not installed.
    """
    config = read_config(workdir)
    shapes = models.shapes(methods.model_of(config))
    if not is_partial(config):
        return Checkpoints(workdir).restore_params(place_shapes(shapes, mesh), step)
    origin = workdirs.base(config, workdir)
    base = base_params(origin, config, mesh)
    check_base(workdir, base)
    tuned, frozen = partition_shapes(origin, config, shapes)
    known = paths.flat(base)
    kept = paths.nested({path: known[path] for path in paths.flat(frozen)})
    kept = quantised.as_kept(kept, config.finetune.quantise)
    return paths.union(kept, Checkpoints(workdir).restore_params(place_shapes(tuned, mesh), step))


def is_partial(config: ConfigDict) -> bool:
    """Whether the checkpoints of a run of this config hold what was tuned alone."""
    return bool(config.init_from) and config.finetune.method != "full"


def base_params(origin: Path, config: ConfigDict, mesh: Mesh | None = None) -> Any:
    """The parameters of a run that one of this config begins with, in the latter's layout, additions made part of them.

    Raises:
      CheckpointError: as `saved`.
      ConfigError: what was added to them cannot be made part of them.
    """
    params = methods.merged(load_params(origin, mesh), read_config(origin).finetune)
    return stack(params) if config.model.scan_layers else unstack(params)


def base_shapes(origin: Path, config: ConfigDict) -> Any:
    """The shapes of what `base_of` gives; nothing is read but the base's config."""
    return models.shapes(models.build(base_model(origin, config)))


def base_model(origin: Path, config: ConfigDict) -> ConfigDict:
    """The `config.model` of what `base_of` gives the parameters of."""
    theirs = read_config(origin).model.copy_and_resolve_references()
    with theirs.unlocked():
        theirs.scan_layers = config.model.scan_layers
    return theirs


def partition_shapes(origin: Path, config: ConfigDict, fresh: Any) -> methods.Partition:
    """The shapes of what a run of this config tunes of a base, and of the rest; `fresh`: of its model's parameters.

    Raises:
      ConfigError: as of gptjax.finetune.methods.partition.
    """
    key = rng.key(config.seed, "finetune")
    found: methods.Partition = jax.eval_shape(
        lambda base, fresh: methods.partition(base, config, key, fresh), base_shapes(origin, config), fresh
    )
    return found


def place_shapes(shapes: Any, mesh: Mesh | None) -> Any:
    """The shapes, with where each lies: on a mesh as a run's state does, else on one device."""
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return shapes_on(shapes, here if mesh is None else sharding.of_state(mesh, shapes))


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 of a model's parameters: of their paths, shapes and float32 values, blocks one by one."""
    digest = hashlib.sha256()
    for path, leaf in sorted(paths.flat(unstack(dict(params))).items()):
        values = np.ascontiguousarray(leaf, np.float32)
        digest.update(f"{path} {values.shape}\n".encode())
        digest.update(values.data)
    return digest.hexdigest()


def check_base(workdir: Path, base: Any) -> None:
    """Raises CheckpointError where the base of a run is not the one that it was tuned on."""
    if read_data_facts(workdir).get("base") != fingerprint(processes.by_all(base)):
        origin = workdirs.base(read_config(workdir), workdir)
        raise CheckpointError(f"{origin} is not what {workdir} was tuned on: its parameters have changed since")


def record_base(workdir: Path, base: Any) -> None:
    """Writes down what a run tunes when it begins, and is `check_base` when it goes on."""
    facts = read_data_facts(workdir)
    if "base" in facts:
        check_base(workdir, base)
    else:
        found = fingerprint(processes.by_all(base))
        processes.first_does(lambda: write_data_facts(workdir, facts | {"base": found}), "the base is known")
