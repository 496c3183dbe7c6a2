"""The watermark: green lists are what they should be, marked text is found, and nothing else is."""

import re
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from gptjax.config.errors import ConfigError, DataError
from gptjax.data.tokenizers import tokenizers
from gptjax.decode import watermark as wm
from gptjax.decode.watermark import Watermark

V = 500
SECRET = Watermark(key=0x1234_5678_9ABC_DEF0)


def green_ids(previous, watermark, vocabulary=V):
    """The device's green ids after some: those whose logit 0 became delta."""
    logits = wm.apply_watermark(jnp.zeros((1, vocabulary)), jnp.array([previous]), watermark)
    return np.flatnonzero(np.asarray(logits[0]) == watermark.delta)


def watermarked(rows, length, watermark, seed=0):
    """ids [rows, length] that an untrained model, whose logits are noise, writes with a watermark."""

    @jax.jit
    def step(previous_Bw, key):
        noise, draw = jax.random.split(key)
        logits_BV = jax.random.normal(noise, (rows, V))
        ids_B = jax.random.categorical(draw, wm.apply_watermark(logits_BV, previous_Bw, watermark))
        return jnp.concatenate([previous_Bw[:, 1:], ids_B[:, None]], axis=1), ids_B

    keys = jax.random.split(jax.random.key(seed), length)
    return np.asarray(jax.lax.scan(step, jnp.zeros((rows, watermark.width), int), keys)[1]).T


@pytest.mark.parametrize("gamma", [0.1, 0.25, 0.5, 0.9])
def test_gamma_of_the_ids_are_green(gamma):
    rows = np.random.default_rng(0).integers(0, 50_257, (400, 1), np.uint32)
    green = wm.is_green(np.arange(2000, dtype=np.uint32)[None], rows[:, None], Watermark(7, gamma))
    assert green.mean() == pytest.approx(gamma, abs=4 * (gamma * (1 - gamma) / green.size) ** 0.5)
    # Each list as large, and each id as often green, as independent coins would have it: the variance says.
    for axis in (0, 1):
        spread = green.mean(axis).var() / (gamma * (1 - gamma) / green.shape[axis])
        assert spread == pytest.approx(1, abs=0.35)


def test_green_lists_of_neighbours_are_independent():
    before = np.arange(300, dtype=np.uint32)[:, None]
    keys = [
        wm.is_green(np.arange(4000, dtype=np.uint32)[None], before[:, None], Watermark(k, 0.5)) for k in (0, 1, 1 << 40)
    ]
    signs = np.concatenate([green * 2.0 - 1 for green in keys])
    correlation = signs @ signs.T / 4000
    off = correlation[~np.eye(len(signs), dtype=bool)]
    assert np.abs(off).max() < 6 / 4000**0.5
    shifted = [(signs[:300, lag:] * signs[:300, :-lag]).mean() for lag in (1, 2, 3, 16, 256)]
    assert np.abs(shifted).max() < 5 / (300 * 4000) ** 0.5


@pytest.mark.parametrize("width", [1, 2, 4])
def test_the_device_and_the_detector_agree(width):
    mark, rng = Watermark(2**63 + 5, 0.3, 1.5, width), np.random.default_rng(1)
    previous = rng.integers(0, 50_257, (16, width))
    logits = rng.normal(size=(16, 50_257)).astype("f")
    found = np.asarray(jax.jit(wm.apply_watermark, static_argnums=2)(logits, previous, mark))
    tokens = np.arange(50_257, dtype=np.uint32)[None]
    green = wm.is_green(tokens, previous.astype(np.uint32)[:, None], mark)
    np.testing.assert_array_equal(found, np.where(green, logits + np.float32(1.5), logits))
    alone = np.asarray(wm.apply_watermark(jnp.array(logits[3:4]), jnp.array(previous[3:4]), mark))
    np.testing.assert_array_equal(alone[0], found[3])
    if width > 1:  # every one of the ids before counts, and their order
        lists = {tuple(green_ids(p, mark)) for p in ([1] * width, [2] + [1] * (width - 1), [1] * (width - 1) + [2])}
        assert len(lists) == 3


def test_z_equals_the_papers_equation():
    """Equation 3 by hand: only the first of two equal pairs counts."""
    green = green_ids([9], SECRET)
    red = np.setdiff1d(np.arange(V), green)
    ids = [9, green[0], 9, green[1], 9, red[0], 9, green[0]]
    pairs = {*pairwise(ids)}
    hits = sum(b in green_ids([a], SECRET) for a, b in pairs)
    found = wm.detect(ids, SECRET)
    assert (found.tokens, found.green) == (len(pairs), hits) == (6, hits) and hits >= 2
    assert found.z == pytest.approx((hits - 0.25 * 6) / (6 * 0.25 * 0.75) ** 0.5)
    assert found.p_value == pytest.approx(stats.norm.sf(found.z))


@pytest.mark.parametrize("width", [1, 3])
def test_text_without_a_watermark_has_a_normal_z(width):
    rng = np.random.default_rng(0)
    z = [wm.detect(ids, Watermark(99, 0.5, width=width)).z for ids in rng.integers(0, 50_257, (1000, 400))]
    # 400 tokens, half of them green by chance: z comes in steps of 0.1.
    assert stats.kstest(z + rng.uniform(-0.05, 0.05, 1000), "norm").pvalue > 0.01
    assert max(z) < 4.5


@pytest.mark.parametrize("mark", [SECRET, SECRET._replace(gamma=0.5, width=2)])
def test_a_watermark_is_detected_with_the_key_alone(mark):
    texts = watermarked(24, 200, mark)
    assert min(wm.detect(ids, mark).z for ids in texts) > 4
    for other in (mark._replace(key=mark.key + 1), mark._replace(key=mark.key ^ 1 << 63)):
        assert max(wm.detect(ids, other).z for ids in texts) < 4
    assert max(wm.detect(ids, mark).z for ids in watermarked(24, 200, mark._replace(delta=0.0))) < 4


def test_a_watermark_is_detected_in_truncated_and_edited_text():
    rng = np.random.default_rng(0)
    for ids in watermarked(20, 400, SECRET):
        kept = ids[50:350]
        kept = np.where(rng.random(300) < 0.2, rng.integers(0, V, 300), kept)
        assert wm.detect([*rng.integers(0, V, 40), *kept], SECRET).z > 4


def test_a_watermark_is_detected_in_text():
    tokenizer = tokenizers.chars_encoding(["".join(map(chr, range(0x4E00, 0x4E00 + V)))])
    [ids] = watermarked(1, 200, SECRET)
    text = tokenizer.decode(ids.tolist())
    assert wm.detect_text(text, tokenizer, SECRET) == wm.detect(ids.tolist(), SECRET)


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"gamma": 0.0}, "the watermark's gamma is 0.0; it must be more than 0 and less than 1"),
        ({"gamma": 1.0}, "gamma is 1.0"),
        ({"gamma": float("nan")}, "gamma is nan"),
        ({"delta": -0.1}, "the watermark's delta is -0.1; it must be at least 0, and finite"),
        ({"delta": float("nan")}, "delta is nan"),
        ({"width": 0}, "the watermark's width is 0; it must be at least 1"),
        ({"key": -1}, "the watermark's key is -1; it must be 0 to 2^64 - 1"),
        ({"key": 2**64}, "key is 18446744073709551616"),
    ],
)
def test_invalid_values_are_refused(changes, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)):
        SECRET._replace(**changes).check()


def test_too_short_a_text_is_refused():
    with pytest.raises(DataError, match="the text has 2 tokens; a watermark of width 2 needs at least 3"):
        wm.detect([1, 2], SECRET._replace(width=2))
