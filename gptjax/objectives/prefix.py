"""Prefix language modelling: the beginning of a text is read as a whole, and what follows it is predicted."""

import numpy as np

from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, RowContext


def prefix(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """The row with `bidirectional_BT` 1 on the prefix of each text, whose tokens are not predicted (arXiv 1910.10683
    sections 3.2.1 and 3.3.1).

    A text is cut at a place drawn evenly; where it has a prompt, that is its prefix.
    """
    ahead, weights = np.zeros(len(row["inputs_BT"]), np.int32), row["weights_BT"].copy()
    for text in rows.text_slices(row):
        prompt = int(np.argmax(weights[text] > 0))
        length = prompt + 1 if prompt else int(rng.integers(1, text.stop - text.start + 1))
        ahead[text.start : text.start + length] = 1
        weights[text.start : text.start + length - 1] = 0  # the last of the prefix is asked what follows it
    return row | {"bidirectional_BT": ahead, "weights_BT": weights}
