"""How well a model predicts text: loss, perplexity and bits per byte, and what general compressors make of it."""

import gzip
import lzma
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from gptjax import console, data, sharding, workdir
from gptjax.config import DataError
from gptjax.data import batches, sources, token_sets, tokenizers
from gptjax.data.augment import Augment
from gptjax.data.layouts import in_order
from gptjax.models import kernels
from gptjax.objectives import OBJECTIVES
from gptjax.objectives.causal import Objective

if TYPE_CHECKING:
    from gptjax.run import Run


def eval_step(config: ConfigDict, objective: Objective, mesh: Mesh) -> Callable[[Any, Any], jax.Array]:
    """Compiled `(params, batch) -> summed loss` in nats, without dropout, for a run of this config."""
    whole = sharding.over_rows(objective, mesh)
    options = kernels.compiler_options(config.model, config.train.dtype) | sharding.compiler_options(mesh)
    loss = jax.jit(
        lambda params, batch: whole(params, batch, None)[1]["loss"],
        in_shardings=(None, sharding.of_batch(mesh)),  # parameters lie where they are kept
        out_shardings=sharding.replicated(mesh),
        compiler_options=options or None,
    )
    return lambda params, batch: loss(params, sharding.place(batch, mesh))


def loss_of(
    eval_step: Callable[[Any, Any], Any],
    params: Any,
    batches: Iterable[Any],
    bytes_V: np.ndarray,
    advance: Callable[..., None] = lambda: None,
) -> dict[str, float]:
    """Loss per token and per byte over batches of text.

    Args:
      eval_step: `(params, batch) -> summed loss` in nats.
      params: of the model.
      batches: see gptjax.data.batches.
      bytes_V: bytes of text that each id stands for.
      advance: called after each batch.

    Returns:
      loss (nats per token), perplexity, bits_per_byte, tokens, bytes.

    Raises:
      DataError: the batches have no text.
    """
    nats, tokens, length = 0.0, 0.0, 0
    for batch in batches:
        nats += float(eval_step(params, batch))
        counted = batch["weights_BT"] > 0
        tokens += float(batch["weights_BT"].sum())
        length += int(bytes_V[batch["targets_BT"][counted]].sum())
        advance()
    if not length:
        raise DataError("the text to evaluate on is empty")
    return {
        "loss": nats / tokens,
        "perplexity": math.exp(min(nats / tokens, 700.0)),
        "bits_per_byte": nats / math.log(2) / length,
        "tokens": int(tokens),
        "bytes": length,
    }


def evaluate(of: "Run", files: Sequence[Path] | None = None) -> dict[str, float]:
    """Loss of a run on its held-out split, or on files of text; see `loss_of`.

    Raises:
      DataError: a file that is missing, empty or not text, or the run's own text has changed since.
    """
    c = of.config
    if files:
        texts = [sources.read_text(path) for path in files]
        tokens = token_sets.encoded(of.tokenizer, texts, "tokens")
        rows = in_order(tokens, c.data.context, 0, Augment(), "")
    else:
        workdir.check_has_text(of.workdir)
        loaded = data.load(c.data, of.tokenizer)
        workdir.check_same_text(of.workdir, loaded.fingerprints)
        rows = loaded.held_out_rows(c.data)
    # As many devices as divide a batch: this machine need not be the one that trained.
    mesh = sharding.make_mesh(data=math.gcd(jax.device_count(), c.data.batch_size))
    step = eval_step(c, OBJECTIVES[c.train.objective](of.model), mesh)
    if not rows.per_epoch:
        raise DataError("the text to evaluate on is empty")
    whole = batches.EvalBatches(rows, c.data.batch_size)
    with console.bar("evaluating", len(whole)) as advance:
        every = (whole[i] for i in range(len(whole)))
        return loss_of(step, of.params, every, tokenizers.token_bytes(of.tokenizer), advance)


def compressors(text: bytes) -> dict[str, float]:
    """Bits per byte that `gzip -9` and `xz -9` need for the text as one file."""
    return {
        "gzip_bits_per_byte": 8 * len(gzip.compress(text, 9)) / len(text),
        "xz_bits_per_byte": 8 * len(lzma.compress(text, preset=9)) / len(text),
    }
