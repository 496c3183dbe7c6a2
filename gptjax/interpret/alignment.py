"""Where an encoder-decoder looks while it writes: attention of each token of a target to those of its source.

The picture of arXiv 1409.0473, figure 3. Reads a run; trains nothing and writes only the picture.
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
    """Attention by layer and head, and the tokens that its axes stand for."""

    weights_LHTS: np.ndarray  # each row of S adds up to one
    target: list[str]  # T, what is written where the row of weights is read
    source: list[str]  # S


def alignment(of: "Run", source: str, target: str | None = None) -> Alignment:
    """How a run attends to a source while it writes a target.

    Args:
      of: a run of an encoder-decoder.
      source: plain text.
      target: the same; None: what the run itself writes, greedily.

    Raises:
      ConfigError: no encoder-decoder.
      DataError: a text that its tokenizer cannot encode.
    """
    if models.kind(of.model) != "seq2seq":
        raise ConfigError(f"{of.workdir} has no encoder whose tokens its decoder could attend to")
    if target is None:
        target = of.generate(source, temperature=0.0, max_tokens=of.config.data.context).text
    read, said = pairs.source_ids(of.tokenizer, source), pairs.target_ids(of.tokenizer, target)
    start = of.tokenizer.end if of.config.model.start is None else of.config.model.start
    ids_1T, source_1S = (jnp.asarray([ids], jnp.int32) for ids in ([start, *said[:-1]], read))
    arrays = {"ids_BT": ids_1T, "source_BS": source_1S, "source_segments_BS": jnp.ones_like(source_1S)}
    weights = [np.asarray(leaf)[0] for leaf in attention.weights(of.model, of.params, arrays, "weights_BHTS")]

    def words(ids: list[int]) -> list[str]:
        return ["end" if token == of.tokenizer.end else decode_with_specials(of.tokenizer, [token]) for token in ids]

    return Alignment(np.stack(weights), words(said), words(read))


def plot(found: Alignment, path: Path, each_layer: bool = False) -> None:
    """Draws weights as shades, source across and target down: the mean over layers and heads, or a picture a layer."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    by_layer = found.weights_LHTS.mean(1)
    pictures = list(by_layer) if each_layer else [by_layer.mean(0)]
    T, S = pictures[0].shape
    size = (len(pictures) * (1.5 + 0.3 * S), 1.5 + 0.3 * T)
    figure, all_axes = plt.subplots(1, len(pictures), figsize=size, layout="constrained", squeeze=False)
    for number, (axes, weights_TS) in enumerate(zip(all_axes[0], pictures, strict=True)):
        axes.imshow(weights_TS, cmap="gray", vmin=0, vmax=1, aspect="auto")
        axes.set_xticks(range(S), found.source, rotation=90)
        axes.set_yticks(range(T), found.target)
        axes.xaxis.tick_top()
        if each_layer:
            axes.set_xlabel(f"layer {number}")
    figure.savefig(path, dpi=110)
    plt.close(figure)
