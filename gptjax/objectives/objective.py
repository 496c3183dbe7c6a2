"""What an objective is: how rows of text are prepared for it on the host, and the loss that a model is asked for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

# (params, batch, rng) -> (loss, metrics)
Loss = Callable[[Any, Any, jax.Array | None], tuple[jax.Array, dict[str, jax.Array]]]


class RowContext(NamedTuple):
    """What rows are prepared with; gptjax.objectives.row_context makes it."""

    specials: Mapping[str, int]  # ids that stand for no text, by what they are for
    sentinels: Sequence[int]  # ids that stand for spans that are left out, in order
    begin: tuple[int, ...]  # ids that documents begin with
    end: int | None  # the id that ends a document
    is_text_V: np.ndarray  # whether an id stands for text, bool; the three are as long as there are ids
    begins_word_V: np.ndarray  # whether a word begins with that id
    ends_sentence_V: np.ndarray  # whether a sentence ends with that id
    elsewhere: Callable[[np.ndarray, int, np.random.Generator], np.ndarray]  # ids of a text with other ids, so many
    options: Any  # `config.objective`


# A row as the layout gives it (a gptjax.data.layouts.Batch without B); other keys may come back. What draws is a
# function of seed, epoch and the row's number, so that a row is one too.
Arrays = dict[str, np.ndarray]
Row = Callable[[Arrays, RowContext, np.random.Generator], Arrays]


class Objective(NamedTuple):
    """One of gptjax.objectives.OBJECTIVES.

    Attributes:
      loss: the loss of a model, with the options in `config.objective`.
      kinds: of models that it can train; see gptjax.models.kind.
      row: how a row of text is prepared; None: as the layout gives it.
      specials: which ids it needs besides text's: keys of gptjax.data.tokenizers.specials.COMMON_NAMES, "sentinels",
      "end".
      tasks: which task heads (`config.model.task`) it asks; empty: none.
      layouts: which layouts' rows it reads; empty: any.
      after: with which other objectives' rows its own go together; they are prepared first.
      weights: the batch's weights that its sums are by.
    """

    loss: Callable[[nn.Module, Any], Loss]
    kinds: frozenset[str] = frozenset({"decoder"})
    row: Row | None = None
    specials: tuple[str, ...] = ()
    tasks: tuple[str, ...] = ()
    layouts: tuple[str, ...] = ()
    after: tuple[str, ...] = ()
    weights: str = "weights_BT"


ONE_TEXT = ("flat", "examples")  # layouts of which a row is one text


def weighted_sum(losses: Mapping[str, Loss], factors: Mapping[str, float]) -> Loss:
    """The sum of several losses by their factors: multi-task learning.

    Metrics of each have its name before them; "loss" is the sum of theirs by the same factors. Of a single loss with
    the factor 1 nothing changes.

    Args:
      losses: by name.
      factors: of each.
    """
    if list(factors.values()) == [1.0]:
        return next(iter(losses.values()))

    def loss(params: Any, batch: Any, rng: jax.Array | None) -> tuple[jax.Array, dict[str, jax.Array]]:
        # All with the same key: where two losses ask a model the same, it is computed once.
        found = {name: one(params, batch, rng) for name, one in losses.items()}
        own = {f"{name}_{key}": value for name, (_, metrics) in found.items() for key, value in metrics.items()}
        lowered, judged = jnp.zeros(()), jnp.zeros(())
        for name, (one, metrics) in found.items():
            lowered, judged = lowered + factors[name] * one, judged + factors[name] * metrics["loss"]
        return lowered, {"loss": judged} | own

    return loss
