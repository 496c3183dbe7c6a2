"""How well a model predicts text: loss, perplexity and bits per byte, and what general compressors make of it."""

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


COUNTS = ("tokens", "examples", "bytes", "perplexity")  # of what was read, or said by another figure too

EvalStep = Callable[[Any, Any], dict[str, jax.Array]]


def eval_step(config: ConfigDict, objective: Loss, mesh: Mesh) -> EvalStep:
    """Compiled `(params, batch) -> metrics`, summed by weight, without dropout, for a run of this config."""
    whole = sharding.over_rows(objective, mesh)
    options = kernels.compiler_options(config.model, config.train.dtype) | sharding.compiler_options(mesh)
    look = jax.jit(
        lambda params, batch: whole(params, batch, None)[1],
        out_shardings=sharding.replicated(mesh),
        compiler_options=options or None,
    )
    return lambda params, batch: look(params, sharding.place(batch, mesh))


def evaluate(
    look: EvalStep,
    params: Any,
    batches: Iterable[Any],
    objective: str,
    bytes_V: np.ndarray,
    advance: Callable[..., None] = lambda: None,
) -> dict[str, float]:
    """How well a model does what its objective asks, over batches.

    Args:
      look: as `eval_step` gives it.
      params: of the model.
      batches: see gptjax.data.batches.
      objective: `config.train.objective`.
      bytes_V: bytes of text that each id stands for.
      advance: called after each batch.

    Returns:
      the objective's metrics as means, such as loss (nats per token); how many tokens or examples there were; beside
      the accuracy of guessed tokens that of guessing the commonest one always; where the objective is to predict all of
      a text: perplexity, bits_per_byte and bytes.

    Raises:
      DataError: the batches have nothing to predict.
    """
    own = {objectives.OBJECTIVES[name].weights for name, _ in objectives.parts(objective)}
    sums: dict[str, float] = defaultdict(float)
    weights: dict[str, float] = defaultdict(float)
    length, said = 0, Counter[int]()
    for batch in batches:
        for name, value in look(params, batch).items():
            sums[name] += float(value)
        for name in own:
            weights[name] += float(batch[name].sum())
        if "accuracy" in sums:
            said.update(asked_for(batch))
        if objective == "causal":
            length += int(bytes_V[batch["targets_BT"][batch["weights_BT"] > 0]].sum())
        advance()
    if not any(weights.values()) or (objective == "causal" and not length):
        raise DataError("the text to evaluate on is empty")
    found = objectives.means(objective, sums, weights)
    found |= {{"weights_BT": "tokens"}.get(name, "examples"): int(value) for name, value in weights.items()}
    if said:
        found["majority_accuracy"] = said.most_common(1)[0][1] / said.total()
    if objective == "causal":
        bits = sums["loss"] / math.log(2) / length
        found |= {"perplexity": math.exp(min(found["loss"], 700.0)), "bits_per_byte": bits, "bytes": length}
    return found


def asked_for(batch: Any) -> list[int]:
    """The labels, or else the tokens, that a batch asks for, one after another; none of what is neither."""
    for name, weights in (("labels_B", "weights_B"), ("labels_BT", "weights_BT"), ("targets_BT", "weights_BT")):
        if name in batch and weights in batch:
            found: list[int] = np.asarray(batch[name])[np.asarray(batch[weights]) > 0].tolist()
            return found
    return []


def evaluate_run(of: "Run", files: Sequence[Path] | None = None, split: str | None = None) -> dict[str, float]:
    """What a run does on its held-out split, on another split of its examples, or on files of text or of examples.

    Returns:
      see `quality_of`.

    Raises:
      ConfigError: a split is asked for, and the run learnt from no examples.
      DataError: a file that is missing, empty or not what it should be, or the run's own text has changed since.
    """
    c = of.config
    prepare = objectives.preparing(c, of.tokenizer)
    if c.data.examples.form and (files or split):
        options = RecordOptions(tuple(c.data.examples.fields))
        found = [one for path in files or () for one in records.read(path, options)]
        found = found or examples.read(c.data, split or "val")
        tokens = examples.to_token_set(of.tokenizer, found, c.data, "encoding the examples", "the examples")
        rows = preprocess_rows(
            EVAL_LAYOUTS[c.data.layout](tokens, c.data.context, 0, Augment(), ""), prepare(tokens), 0
        )
    elif split:
        raise ConfigError(f"{of.workdir} learnt from no examples, which have splits; leave --test out")
    elif files:
        texts = [sources.read_text(path) for path in files]
        tokens = token_sets.from_texts(of.tokenizer, texts, "tokens")
        # A stream's windows do not begin with a tuned prompt, and packed rows all do.
        layout, known = packed if tokens.repeated_prefix else sequential, "".join(texts)
        rows = preprocess_rows(layout(tokens, c.data.context, 0, Augment(), known), prepare(tokens), 0)
    else:
        directory.check_has_text(of.workdir)
        loaded = data.load(c.data, of.tokenizer)
        directory.check_same_text(of.workdir, loaded.fingerprints)
        rows = loaded.held_out_rows(c.data, prepare)
    return over_rows(of, rows)


def over_rows(of: "Run", rows: Rows) -> dict[str, float]:
    """What a run does on an epoch of rows; see `quality_of`.

    Raises:
      DataError: there is nothing in them.
    """
    c = of.config
    # As many devices as divide a batch: this machine need not be the one that trained.
    mesh = sharding.make_mesh(data=math.gcd(jax.device_count(), c.data.batch_size))
    step = eval_step(c, objectives.loss(c, of.model), mesh)
    if not rows.per_epoch:
        raise DataError("the text to evaluate on is empty")
    whole = batches.EvalBatches(rows, c.data.batch_size)
    with console.bar("evaluating", len(whole)) as advance:
        every = (whole[i] for i in range(len(whole)))
        bytes_V = tokenizers.token_bytes(of.tokenizer)
        return evaluate(step, of.params, every, c.train.objective, bytes_V, advance)


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz -9` need for the text as one file."""
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
