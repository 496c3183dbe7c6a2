"""Parameters of a run from its checkpoints; if it trains a part of a base, merged with the base's."""

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
from gptjax.finetune import methods, paths, quantization
from gptjax.models.stacking import stack, unstack
from gptjax.runs import directory as workdirs
from gptjax.runs.checkpoints import Checkpoints, shapes_on
from gptjax.runs.directory import read_config, read_data_facts, write_data_facts
from gptjax.sharding import processes


def check_exists(config: ConfigDict, workdir: Path) -> None:
    """Raises CheckpointError if the run of `init_from` or `objective.teacher` does not exist."""
    if workdirs.is_run(workdir):
        return
    named = {"objective.teacher": config.objective.teacher}
    if not is_foreign(config.init_from):
        named["init_from"] = config.init_from
    for key, name in named.items():
        if name and not workdirs.is_run(Path(name).expanduser()):
            raise CheckpointError(f"{key}={name} is not a run: it has no config.json")
    folder = config.init_from.removeprefix("hf:")
    if is_foreign(config.init_from) and folder.startswith((".", "/", "~")) and not Path(folder).expanduser().is_dir():
        raise CheckpointError(f"init_from={config.init_from}: there is no folder {folder}")


def load_params(workdir: Path, mesh: Mesh | None = None, step: int | str | None = None) -> Any:
    """Loads all parameters of a run, in the layout of its config.

    Args:
      workdir: directory of the run.
      mesh: to shard them over; None: one device.
      step: of the checkpoint, as in `Checkpoints.restore_params`.

    Raises:
      CheckpointError: no run, no such checkpoint, all are damaged, or the base is missing or has changed.
      ConfigError: the library that quantizes the base is not installed.
    """
    config = read_config(workdir)
    shapes = models.shapes(methods.build_model(config))
    if not is_partial(config):
        return Checkpoints(workdir).restore_params(place_shapes(shapes, mesh), step)
    origin = workdirs.base(config, workdir)
    base = base_params(origin, config, mesh)
    check_base(workdir, base)
    tuned, frozen = partition_shapes(origin, config, shapes)
    base_leaves = paths.flat(base)
    frozen_params = paths.nested({path: base_leaves[path] for path in paths.flat(frozen)})
    frozen_params = quantization.quantize_dequantize(frozen_params, config.finetune.quantise)
    return paths.union(frozen_params, Checkpoints(workdir).restore_params(place_shapes(tuned, mesh), step))


def is_partial(config: ConfigDict) -> bool:
    """Returns True if checkpoints of this config have only the tuned parameters, without the base."""
    return bool(config.init_from) and config.finetune.method != "full"


def base_params(origin: Path, config: ConfigDict, mesh: Mesh | None = None) -> Any:
    """Loads the base parameters for a run of this config, in its layout, with the base's own additions merged.

    Raises:
      CheckpointError: see `load_params`.
      ConfigError: the additions cannot be merged.
    """
    params = methods.merge(load_params(origin, mesh), read_config(origin).finetune)
    return stack(params) if config.model.scan_layers else unstack(params)


def base_shapes(origin: Path, config: ConfigDict) -> Any:
    """Shapes of `base_params`; reads only the config of the base."""
    return models.shapes(models.build(base_model(origin, config)))


def base_model(origin: Path, config: ConfigDict) -> ConfigDict:
    """The `config.model` of `base_params`."""
    model = read_config(origin).model.copy_and_resolve_references()
    with model.unlocked():
        model.scan_layers = config.model.scan_layers
    return model


def partition_shapes(origin: Path, config: ConfigDict, fresh: Any) -> methods.Partition:
    """Shapes of the tuned and of the frozen parameters of a run of this config.

    Args:
      origin: the base.
      config: of the run.
      fresh: shapes of the parameters of the run's model.

    Raises:
      ConfigError: see gptjax.finetune.methods.partition.
    """
    key = rng.key(config.seed, "finetune")
    partition: methods.Partition = jax.eval_shape(
        lambda base, fresh: methods.partition(base, config, key, fresh), base_shapes(origin, config), fresh
    )
    return partition


def place_shapes(shapes: Any, mesh: Mesh | None) -> Any:
    """Adds shardings to shapes: those of a train state on a mesh, or one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return shapes_on(shapes, device if mesh is None else sharding.state_shardings(mesh, shapes))


def fingerprint(params: Mapping[str, Any]) -> str:
    """SHA-256 of a model's parameters: of paths, shapes and float32 values, with blocks unstacked."""
    digest = hashlib.sha256()
    for path, leaf in sorted(paths.flat(unstack(dict(params))).items()):
        values = np.ascontiguousarray(leaf, np.float32)
        digest.update(f"{path} {values.shape}\n".encode())
        digest.update(values.data)
    return digest.hexdigest()


def check_base(workdir: Path, base: Any) -> None:
    """Raises CheckpointError if the base of a run is not the one that it was tuned on."""
    if read_data_facts(workdir).get("base") != fingerprint(processes.gather(base)):
        origin = workdirs.base(read_config(workdir), workdir)
        raise CheckpointError(f"{origin} is not what {workdir} was tuned on: its parameters have changed since")


def record_base(workdir: Path, base: Any) -> None:
    """Records the fingerprint of the base when a run starts; when it resumes, calls `check_base`."""
    facts = read_data_facts(workdir)
    if "base" in facts:
        check_base(workdir, base)
    else:
        digest = fingerprint(processes.gather(base))
        processes.run_on_first(lambda: write_data_facts(workdir, facts | {"base": digest}), "the base is recorded")
