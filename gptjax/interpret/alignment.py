"""Alignment: attention weights of an encoder-decoder from target tokens to source tokens.

Plots them as arXiv 1409.0473, figure 3 does.
"""

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jax.numpy as jnp
import numpy as np

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.data import pairs
from gptjax.data.tokenizers.specials import decode_with_specials
from gptjax.interpret import attention

if TYPE_CHECKING:
    from gptjax.runs.run import Run


class Alignment(NamedTuple):
    """Attention weights by layer and head, and the tokens of their axes."""

    weights_LHTS: np.ndarray  # sum to one over S
    target: list[str]  # T, the token predicted at each position
    source: list[str]  # S


def alignment(run: "Run", source: str, target: str | None = None) -> Alignment:
    """Computes the attention weights of a run from a target to its source.

    Args:
      run: a run of an encoder-decoder.
      source: plain text.
      target: plain text; None generates it greedily.

    Raises:
      ConfigError: the model is not an encoder-decoder.
      DataError: the tokenizer cannot encode a text.
    """
    if models.kind(run.model) != "seq2seq":
        raise ConfigError(f"{run.workdir} has no encoder whose tokens its decoder could attend to")
    if target is None:
        target = run.generate(source, temperature=0.0, max_tokens=run.config.data.context).text
    source_ids, target_ids = pairs.source_ids(run.tokenizer, source), pairs.target_ids(run.tokenizer, target)
    start = run.tokenizer.end if run.config.model.start is None else run.config.model.start
    ids_1T, source_1S = (jnp.asarray([ids], jnp.int32) for ids in ([start, *target_ids[:-1]], source_ids))
    arrays = {"ids_BT": ids_1T, "source_BS": source_1S, "source_segments_BS": jnp.ones_like(source_1S)}
    weights = [np.asarray(leaf)[0] for leaf in attention.weights(run.model, run.params, arrays, "weights_BHTS")]

    def labels(ids: list[int]) -> list[str]:
        return ["end" if token == run.tokenizer.end else decode_with_specials(run.tokenizer, [token]) for token in ids]

    return Alignment(np.stack(weights), labels(target_ids), labels(source_ids))


def plot(result: Alignment, path: Path, each_layer: bool = False) -> None:
    """Plots weights as a heat map of target by source: the mean over layers and heads, or one panel per layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_layer = result.weights_LHTS.mean(1)
    panels = list(by_layer) if each_layer else [by_layer.mean(0)]
    T, S = panels[0].shape
    size = (len(panels) * (1.5 + 0.3 * S), 1.5 + 0.3 * T)
    figure, all_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for number, (axes, weights_TS) in enumerate(zip(all_axes[0], panels, strict=True)):
        axes.imshow(weights_TS, cmap="gray", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(S), result.source, rotation=90)
        axes.set_yticks(range(T), result.target)
        axes.xaxis.tick_top()
        if each_layer:
            axes.set_xlabel(f"layer {number}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
