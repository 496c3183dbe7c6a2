"""Next-sentence prediction: classifies whether the second of two segments follows the first."""

import numpy as np

from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, RowContext

LABELS = ("next", "other")


def next_sentence(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """Returns a row `class A separator B separator` of the row's text, `types_BT` 1 for B (arXiv 1810.04805, 3.1).

    The text is split at a uniformly drawn position. With probability 1/2, B is the text that follows A (label 0), else
    as much of another text of the set (label 1). The row has no target tokens.
    """
    size = len(row["inputs_BT"])
    text = rows.text_ids(row, context)[: size - 3]
    blank = np.zeros(size, np.int32)
    if len(text) < 2:
        return {
            "inputs_BT": blank,
            "types_BT": blank,
            "segments_BT": blank,
            "labels_B": np.array(0, np.int32),
            "weights_B": np.array(0, np.float32),
        }
    cut = int(rng.integers(1, len(text)))
    first, second, label = text[:cut], text[cut:], int(rng.integers(2))
    if label:
        other = context.other_text(row["inputs_BT"][rows.text_slices(row)[0]], len(second), rng)
        second = other[context.is_text_V[other]]
    opening, closing = ([context.specials[name]] for name in ("class", "separator"))
    start = np.concatenate([opening, first, closing])
    ids = np.concatenate([start, second, closing])
    positions = np.arange(size)
    return {
        "inputs_BT": rows.pad(ids, size),
        "types_BT": ((positions >= len(start)) & (positions < len(ids))).astype(np.int32),
        "segments_BT": (positions < len(ids)).astype(np.int32),
        "labels_B": np.array(label, np.int32),
        "weights_B": np.array(1, np.float32),
    }
