"""Packed documents: each one's logits and gradients are those of the document alone."""

import functools

import jax
import numpy as np
import pytest
from test_gpt import MODERN, build

from gptjax import models
from gptjax.models.kernels.reference import unembed
from gptjax.models.positions import POSITIONS
from gptjax.models.stacking import stack

KERNELS = ("plain", "cpu")
GROUPED = dict(model_kv_heads=1, model_head_width=8)
NEAR = GROUPED | dict(model_layers=1, model_windows="(3,)")
MEMBERS = {positions: NEAR | dict(model_positions=positions) for positions in POSITIONS}
MEMBERS["modern"] = MODERN | dict(model_kv_heads=1)
MEMBERS["long"] = GROUPED | dict(model_positions="alibi", model_windows="(70,0)", model_context=150)
MEMBERS["one window"] = GROUPED | dict(model_windows="(4,4)")

SCAN = dict(model_scan_layers=True)
CASES = [(positions, dict(model_kernels=kernels)) for positions in POSITIONS for kernels in KERNELS] + [
    ("modern", dict(model_kernels="cpu", model_remat="dots")),
    ("modern", dict(model_kernels="cpu", model_remat="full") | SCAN),  # one program for several windows: plain
    ("one window", dict(model_kernels="cpu") | SCAN),
    ("long", dict(model_kernels="cpu")),  # several blocks of queries, and documents in more than one
]


def lengths(member):
    """Lengths of the documents of two rows; the rest of a row is padding."""
    return ((50, 60, 30), (100, 1, 40)) if member == "long" else ((5, 1, 7), (3, 6, 2))


def position_info(member="rotary"):
    """The row, number and positions of each document."""
    for row, documents in enumerate(lengths(member)):
        for number, (n, end) in enumerate(zip(documents, np.cumsum(documents).tolist(), strict=True), 1):
            yield row, number, slice(end - n, end)


def batches(member="rotary"):
    """Rows of packed documents, and the same documents one per row without segments."""
    rng, T = np.random.default_rng(0), 150 if member == "long" else 16

    def empty(rows):
        return {name: np.zeros((rows, T), "f" if name == "weights_BT" else "i") for name in names}

    names = ("inputs_BT", "targets_BT", "weights_BT")
    packed, alone = empty(2) | {"segments_BT": np.zeros((2, T), "i")}, empty(6)
    for i, (row, number, span) in enumerate(position_info(member)):
        n = span.stop - span.start
        drawn = rng.integers(0, 257, n), rng.integers(0, 257, n), rng.integers(1, 3, n)
        for name, values in zip(names, drawn, strict=True):
            packed[name][row, span] = alone[name][i, :n] = values
        packed["segments_BT"][row, span] = number
    return packed, alone


def logits_and_gradients(model, params, batch):
    @functools.partial(jax.grad, has_aux=True)
    def gradients_and_logits(params):
        output = models.forward(model, params, models.select_inputs(model, batch))
        logits = unembed(output.x_BTD, output.unembedding_VD, model.config.logit_softcap)
        return models.cross_entropy(model, output, batch["targets_BT"], batch["weights_BT"]), logits

    gradients, logits = jax.device_get(jax.jit(gradients_and_logits)(params))
    return logits, gradients


@functools.cache
def each_alone(member):
    """Parameters, logits and gradients; padding follows a document and does not affect it."""
    model, params = build(**MEMBERS[member], model_kernels="plain")
    return params, *logits_and_gradients(model, params, batches(member)[1])


@pytest.mark.thorough
@pytest.mark.parametrize("member, changes", CASES, ids=["-".join([m, *map(str, c.values())]) for m, c in CASES])
def test_packed_documents_equal_each_alone(member, changes):
    params, expected, expected_gradients = each_alone(member)
    layout = jax.jit(stack) if "model_scan_layers" in changes else lambda tree: tree
    model, _ = build(**MEMBERS[member] | changes)
    logits, gradients = logits_and_gradients(model, layout(params), batches(member)[0])
    for i, (row, _, span) in enumerate(position_info(member)):
        close(logits[row, span], expected[i, : span.stop - span.start], 1e-5)
    assert np.isfinite(logits).all()
    jax.tree.map(functools.partial(close, tolerance=1e-4), gradients, layout(expected_gradients))


def close(actual, reference_value, tolerance):
    np.testing.assert_allclose(actual, reference_value, rtol=tolerance, atol=tolerance * np.abs(reference_value).max())


@pytest.mark.parametrize(
    "member, kernels, dtype, dropout",
    [
        ("learned", "plain", "float32", 0.0),
        ("learned", "cpu", "float32", 0.0),
        ("modern", "cpu", "bfloat16", 0.0),
        ("alibi", "cpu", "float32", 0.5),
    ],
)
def test_a_changed_token_changes_its_own_document_alone(member, kernels, dtype, dropout):
    model, params = build(dtype=dtype, **MEMBERS[member], model_kernels=kernels, model_dropout=dropout)
    batch, _ = batches()
    key = jax.random.key(0) if dropout else None

    def x_BTD(ids):
        return models.forward(model, params, models.select_inputs(model, batch | {"inputs_BT": ids}), dropout=key).x_BTD

    read = jax.jit(x_BTD)
    before = np.asarray(read(batch["inputs_BT"]), "f")
    for row, _, span in position_info():
        ids = batch["inputs_BT"].copy()
        ids[row, span.start] += 1
        differs = (np.asarray(read(ids), "f") != before).any(-1)
        assert differs[row, span.start], "it is read"
        differs[row, span] = False
        assert not differs.any(), "and by nobody else"


@pytest.mark.slow
def test_bfloat16_is_close_to_float32():
    params, expected, _ = each_alone("modern")
    model, _ = build(dtype="bfloat16", **MEMBERS["modern"], model_kernels="cpu")
    batch, _ = batches("modern")
    logits = np.asarray(
        jax.jit(functools.partial(models.logits, model))(params, batch["inputs_BT"], batch["segments_BT"])
    )
    assert logits.dtype == np.float32
    for i, (row, _, span) in enumerate(position_info("modern")):
        own = expected[i, : span.stop - span.start]
        assert 0 < np.abs(logits[row, span] - own).max() < 0.05 * np.abs(own).max()


@pytest.mark.parametrize("positions", POSITIONS)
def test_without_segments_positions_are_one_row_and_sliced(positions):
    model, params = build(model_positions=positions, model_kernels="cpu")
    batch, _ = batches()

    def program(*segments):
        return str(jax.make_jaxpr(lambda ids: models.logits(model, params, ids, *segments))(batch["inputs_BT"]))

    without, packed = program(), program(batch["segments_BT"])
    assert without == program(None)
    assert (without.count("cummax"), packed.count("cummax")) == (0, 1)
    added = POSITIONS[positions].add is not None
    assert packed.count("= gather[") - without.count("= gather[") == added
    turned = "f32[2,16,4]"  # cosines and sines of each row
    assert turned not in without and (turned in packed) == (positions == "rotary")
