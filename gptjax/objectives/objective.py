"""Definition of an objective: the transform of its rows of text, on the host, and the loss of a model."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

# (params, batch, rng) -> (loss, metrics)
Loss = Callable[[Any, Any, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


class RowContext(NamedTuple):
    """Tokenizer and token set as row transforms read them; see gptjax.objectives.row_context."""

    specials: Mapping[str, int]  # special ids by purpose
    sentinels: Sequence[int]  # ids that replace removed spans, in order
    begin: tuple[int, ...]  # ids that documents begin with
    end: int | None  # the id that ends a document
    is_text_V: np.ndarray  # True for ids that stand for text, bool; as the next two of the size of the vocabulary
    begins_word_V: np.ndarray  # True for ids that a word begins with
    ends_sentence_V: np.ndarray  # True for ids that a sentence ends with
    other_text: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]  # see gptjax.objectives.row_context
    options: Any  # `config.objective`


# A row as the layout gives it (a gptjax.data.layouts.Batch without B); the transformed row may have other keys. The
# generator depends on seed, epoch and the row's index alone, so that a row does too.
Arrays = dict[str, np.ndarray]
Row = Callable[[Arrays, RowContext, np.random.Generator], Arrays]


class Objective(NamedTuple):
    """A row of gptjax.objectives.OBJECTIVES.

    Attributes:
      loss: builds the loss of a model, with the options in `config.objective`.
      kinds: kinds of models that it can train; see gptjax.models.kind.
      row: transform of a row of text; None: rows stay as the layout gives them.
      specials: special ids that it needs: keys of gptjax.data.tokenizers.specials.COMMON_NAMES, "sentinels", "end".
      tasks: task heads (`config.model.task`) that it trains; empty: none.
      layouts: layouts whose rows it reads; empty: any.
      after: objectives whose row transforms it can be combined with; theirs are applied first.
      weights: name of the batch's weights that its sums are weighted by.
      options: dataclass of its own keys, `config.objective.NAME`; None: it has none.
    """

    loss: Callable[[nn.Module, Any], Loss]
    kinds: frozenset[str] = frozenset({"decoder"})
    row: Row | None = None
    specials: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    weights: str = "weights_BT"
    options: type | None = None


ONE_TEXT = ("flat", "examples")  # layouts of which a row is one text


def weighted_sum(losses: Mapping[str, Loss], factors: Mapping[str, float]) -> Loss:
    """Returns the sum of several losses, each times its factor: multi-task learning.

    Metrics get the name of their loss as a prefix; "loss" is the sum of the "loss" metrics, each times its factor. A
    single loss with the factor 1 is returned as it is.

    Args:
      losses: losses by name.
      factors: factors by name.
    """
    if list(factors.values()) == [1.0]:
        return next(iter(losses.values()))

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        # All with the same key: what two losses share is computed once.
        outputs = {name: loss_fn(params, batch, rng) for name, loss_fn in losses.items()}
        prefixed = {f"{name}_{key}": value for name, (_, metrics) in outputs.items() for key, value in metrics.items()}
        total, total_metric = jnp.zeros(()), jnp.zeros(())
        for name, (value, metrics) in outputs.items():
            total, total_metric = total + factors[name] * value, total_metric + factors[name] * metrics["loss"]
        return total, {"loss": total_metric} | prefixed

    return loss
