"""Prefix language modelling: attention to the beginning of a text is bidirectional, and the rest is predicted."""

import numpy as np

from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, RowContext


def prefix(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """Sets `bidirectional_BT` to 1 on the prefix of each text, whose tokens are not predicted (arXiv 1910.10683
    sections 3.2.1 and 3.3.1).

    The length of the prefix is drawn uniformly; a text with a prompt has that as its prefix.
    """
    bidirectional, weights = np.zeros(len(row["inputs_BT"]), np.int32), row["weights_BT"].copy()
    for text in rows.text_slices(row):
        prompt = int(np.argmax(weights[text] > 0))
        length = prompt + 1 if prompt else int(rng.integers(1, text.stop - text.start + 1))
        bidirectional[text.start : text.start + length] = 1
        weights[text.start : text.start + length - 1] = 0  # the prefix's last token predicts the one after it
    return row | {"bidirectional_BT": bidirectional, "weights_BT": weights}
