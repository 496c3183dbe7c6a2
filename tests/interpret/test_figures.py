"""Figures can be saved, and show the given labels and values."""

import io

import numpy as np

from gptjax.data.tokenizers import tokenizers
from gptjax.interpret import figures
from gptjax.interpret.lens import Predictions

WORDS = figures.token_labels(tokenizers.build("bytes", []), list(b"a cat\n"))


def saved(figure):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return len(buffer.getvalue())


def test_words_can_be_seen():
    assert WORDS == ["a", "␣", "c", "a", "t", "⏎"]
    shown = figures.labels_with_values(tokenizers.build("bytes", []), list(b"a b"), [0.5, 1, 2], ".1f")
    assert shown == "a 0.5  ␣ 1.0  b 2.0"


def test_places_are_shown_behind_what_comes_before_them():
    ids_BT = [list(b"a cat"), list(b"a dog")]
    shown = figures.examples(tokenizers.build("bytes", []), ids_BT, [1, 0], [4, 1], before=2)
    assert shown == "do[g] | a[␣]"


def test_each_picture_is_drawn_with_labels():
    rng = np.random.default_rng(0)
    T, table = len(WORDS), rng.random((3, len(WORDS)))
    drawn = [
        figures.attention(rng.random((6, T, T)), WORDS, "layer 0"),
        figures.grid(table - 0.5, ["a", "b", "c"], WORDS, "measure"),
        figures.heads(table, "score"),
        figures.lens(Predictions(np.zeros((3, T), int), table), [WORDS] * 3, WORDS),
        figures.losses(table[0], WORDS),
        figures.curves({"one": ([1, 2], [3.0, 4.0]), "two": ([1], [2.0])}, "step", "loss", scale="log"),
        figures.bars({"one": 0.25, "two": -1.0}, "share"),
        figures.spectra({"one": np.array([3.0, 2, 1]), "two": np.array([1.0, 0.1])}),
        figures.histogram({"one": rng.normal(size=100), "none": np.zeros(3)}),
    ]
    for figure in drawn:
        axes = figure.axes[0]
        assert axes.get_xlabel() and (axes.get_ylabel() or [label.get_text() for label in axes.get_yticklabels()])
        assert saved(figure) > 3000
    assert [label.get_text() for label in drawn[0].axes[0].get_yticklabels()] == WORDS
    bars = drawn[6].axes[0]
    assert [text.get_text() for text in bars.texts] == ["0.25", "-1"] and bars.yaxis_inverted()
    assert "".join(text.get_text() for text in drawn[3].axes[0].texts) == "".join(WORDS * 3)
