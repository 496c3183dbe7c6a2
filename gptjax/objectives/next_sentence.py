"""Next-sentence prediction: whether the second of two stretches of text followed the first."""

import numpy as np

from gptjax.objectives import rows
from gptjax.objectives.objective import Arrays, RowContext

LABELS = ("next", "other")


def next_sentence(row: Arrays, context: RowContext, rng: np.random.Generator) -> Arrays:
    """A row of `class A separator B separator` of the row's text, `types_BT` 1 for B (arXiv 1810.04805 section 3.1).

    The text is cut at a place drawn evenly. Every second time B is what followed A (label 0), else as much of another
    text of the set (label 1). The row asks for no tokens.
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
        drawn = context.other_text(row["inputs_BT"][rows.text_slices(row)[0]], len(second), rng)
        second = drawn[context.is_text_V[drawn]]
    opening, closing = ([context.specials[name]] for name in ("class", "separator"))
    of_first = np.concatenate([opening, first, closing])
    ids = np.concatenate([of_first, second, closing])
    places = np.arange(size)
    return {
        "inputs_BT": rows.pad(ids, size),
        "types_BT": ((places >= len(of_first)) & (places < len(ids))).astype(np.int32),
        "segments_BT": (places < len(ids)).astype(np.int32),
        "labels_B": np.array(label, np.int32),
        "weights_B": np.array(1, np.float32),
    }
