"""Loss, perplexity and bits per byte of a model on held-out text, and those of general-purpose compressors."""

import gzip
import lzma
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptjax import data, objectives, sharding
from gptjax.config.errors import ConfigError, DataError
from gptjax.core import console
from gptjax.data import batches, examples, records, sources, token_sets
from gptjax.data.augment import Augment
from gptjax.data.layouts import EVAL_LAYOUTS, Rows, packed, preprocess_rows, sequential
from gptjax.data.records import RecordOptions
from gptjax.data.tokenizers import tokenizers
from gptjax.models import kernels
from gptjax.objectives.objective import Loss
from gptjax.runs import directory

if TYPE_CHECKING:
    from gptjax.runs.run import Run


COUNT_METRICS = ("tokens", "examples", "bytes", "perplexity")  # sizes of the data, or a function of another metric

EvalStep = Callable[[Any, Any], dict[str, jax.Array]]


def eval_step(config: ConfigDict, objective: Loss, mesh: Mesh) -> EvalStep:
    """Returns the compiled `(params, batch) -> metrics`, weighted sums without dropout, of a run of this config."""
    sharded = sharding.shard_rows(objective, mesh)
    options = kernels.compiler_options(config.model, config.train.dtype) | sharding.compiler_options(mesh)
    step = jax.jit(
        lambda params, batch: sharded(params, batch, None)[1],
        out_shardings=sharding.replicated(mesh),
        compiler_options=options or None,
    )
    return lambda params, batch: step(params, sharding.place_batch(batch, mesh))


def evaluate(
    step: EvalStep,
    params: Any,
    batches: Iterable[Any],
    objective: str,
    bytes_V: np.ndarray,
    advance: Callable[..., None] = lambda: None,
) -> dict[str, float]:
    """Evaluates a model's objective over batches.

    Args:
      step: see `eval_step`.
      params: parameters of the model.
      batches: see gptjax.data.batches.
      objective: `config.train.objective`.
      bytes_V: number of bytes of text of each id.
      advance: called after each batch.

    Returns:
      The objective's metrics as means, such as loss (nats per token), and the number of tokens or examples. With
      accuracy also majority_accuracy, that of always predicting the most common target. For the causal objective also
      perplexity, bits_per_byte and bytes.

    Raises:
      DataError: the batches have no targets.
    """
    weight_names = {objectives.OBJECTIVES[name].weights for name, _ in objectives.parse_objective(objective)}
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    length, targets = 0, Counter[int]()
    for batch in batches:
        for name, value in step(params, batch).items():
            sums[name] += float(value)
        for name in weight_names:
            weights[name] += float(batch[name].sum())
        if "accuracy" in sums:
            targets.update(batch_targets(batch))
        if objective == "causal":
            length += int(bytes_V[batch["targets_BT"][batch["weights_BT"] > 0]].sum())
        advance()
    if not any(weights.values()) or (objective == "causal" and not length):
        raise DataError("the text to evaluate on is empty")
    metrics = objectives.mean_metrics(objective, sums, weights)
    metrics |= {{"weights_BT": "tokens"}.get(name, "examples"): int(value) for name, value in weights.items()}
    if targets:
        metrics["majority_accuracy"] = targets.most_common(1)[0][1] / targets.total()
    if objective == "causal":
        bits = sums["loss"] / math.log(2) / length
        metrics |= {"perplexity": math.exp(min(metrics["loss"], 700.0)), "bits_per_byte": bits, "bytes": length}
    return metrics


def batch_targets(batch: Any) -> list[int]:
    """Returns the labels, or else the target tokens, of a batch as a list; empty if it has neither."""
    for name, weights in (("labels_B", "weights_B"), ("labels_BT", "weights_BT"), ("targets_BT", "weights_BT")):
        if name in batch and weights in batch:
            targets: list[int] = np.asarray(batch[name])[np.asarray(batch[weights]) > 0].tolist()
            return targets
    return []


def evaluate_run(run: "Run", files: Sequence[Path] | None = None, split: str | None = None) -> dict[str, float]:
    """Evaluates a run on its held-out split, on another split of its examples, or on files of text or examples.

    Returns:
      See `evaluate`.

    Raises:
      ConfigError: a split is given, and the run was not trained on examples.
      DataError: a file is missing, empty or of the wrong format, or the run's text has changed since training.
    """
    c = run.config
    prepare = objectives.set_transform(c, run.tokenizer)
    if c.data.examples.form and (files or split):
        options = RecordOptions(tuple(c.data.examples.fields))
        examples_read = [record for path in files or () for record in records.read(path, options)]
        examples_read = examples_read or examples.read(c.data, split or "val")
        tokens = examples.to_token_set(run.tokenizer, examples_read, c.data, "encoding the examples", "the examples")
        rows = preprocess_rows(
            EVAL_LAYOUTS[c.data.layout](tokens, c.data.context, 0, Augment(), ""), prepare(tokens), 0
        )
    elif split:
        raise ConfigError(f"{run.workdir} was not trained on examples, which have splits; leave --test out")
    elif files:
        texts = [sources.read_text(path) for path in files]
        tokens = token_sets.from_texts(run.tokenizer, texts, "tokens")
        # Windows of a stream do not begin with a tuned prompt; packed rows do.
        layout, text = packed if tokens.repeated_prefix else sequential, "".join(texts)
        rows = preprocess_rows(layout(tokens, c.data.context, 0, Augment(), text), prepare(tokens), 0)
    else:
        directory.check_has_text(run.workdir)
        loaded = data.load(c.data, run.tokenizer)
        directory.check_same_text(run.workdir, loaded.fingerprints)
        rows = loaded.held_out_rows(c.data, prepare)
    return evaluate_rows(run, rows)


def evaluate_rows(run: "Run", rows: Rows) -> dict[str, float]:
    """Evaluates a run on an epoch of rows; see `evaluate`.

    Raises:
      DataError: the rows have no targets.
    """
    c = run.config
    # As many devices as divide a batch: this machine may have other devices than the one that trained.
    mesh = sharding.make_mesh(data=math.gcd(jax.device_count(), c.data.batch_size))
    step = eval_step(c, objectives.loss(c, run.model), mesh)
    if not rows.per_epoch:
        raise DataError("the text to evaluate on is empty")
    eval_batches = batches.EvalBatches(rows, c.data.batch_size)
    with console.bar("evaluating", len(eval_batches)) as advance:
        epoch = (eval_batches[i] for i in range(len(eval_batches)))
        bytes_V = tokenizers.token_bytes(run.tokenizer)
        return evaluate(step, run.params, epoch, c.train.objective, bytes_V, advance)


def compressors(text: bytes) -> dict[str, float]:
    """Computes the bits per byte that `gzip -9` and `xz -9` need for the text as one file."""
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
