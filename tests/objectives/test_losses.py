"""Losses against NumPy; entries of weight 0 have no effect."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from row_fixtures import options

from gptjax import models
from gptjax.objectives import tokens
from gptjax.objectives.contrastive import info_nce
from gptjax.objectives.distillation import TEACHER, distillation, divergence
from gptjax.objectives.multi_token import multi_token
from gptjax.objectives.objective import weighted_sum
from gptjax.objectives.task_losses import label_cross_entropy, span_cross_entropy, squared_error
from gptjax.objectives.unlikelihood import SMALLEST, unlikelihood


class Model:
    """A head alone, whose input is a parameter."""

    class config:
        kernels, logit_softcap = "plain", 0.0

    extra_inputs = ()


@pytest.fixture
def heads(monkeypatch):
    """A model whose forward pass returns its parameters: x_BTD, unembedding_VD and the inputs of later heads."""

    def forward(model, params, reads, dropout=None):
        return models.Output(params["x"], params["table"], jnp.float32(0.5), {"told": jnp.float32(2)}, params["ahead"])

    monkeypatch.setattr(models, "forward", forward)
    rng = np.random.default_rng(0)
    x, *ahead = rng.normal(size=(3, 2, 7, 4)).astype("f")
    weights = rng.integers(0, 3, (2, 7)).astype("f") / 8
    ids, targets = rng.integers(0, 11, (2, 2, 7))
    batch = {"inputs_BT": ids, "targets_BT": targets, "weights_BT": weights}
    return Model(), {"x": x, "table": rng.normal(size=(11, 4)).astype("f"), "ahead": tuple(ahead)}, batch


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def nats(logits, targets):
    return -np.take_along_axis(log_softmax(logits), np.asarray(targets)[..., None], -1)[..., 0]


def smoothed(logits, targets, share):
    return (1 - share) * nats(logits, targets) - share * log_softmax(logits).mean(-1)


def unmoved(f, x, weights):
    """Asserts that a loss has no gradient at entries of weight 0, and one at others; `weights` has x's first axes."""
    gradient = np.asarray(jax.grad(f)(x))
    there = np.asarray(weights) > 0
    assert not there.all() and not gradient[~there].any() and gradient[there].any()
    moved = np.where(there.reshape(there.shape + (1,) * (x.ndim - there.ndim)), x, x + 7)
    np.testing.assert_allclose(f(moved), f(x), rtol=1e-6)


def test_token_prediction_vs_reference(heads):
    model, params, batch = heads
    soft = options(label_smoothing=0.1, z_loss=0.01)
    loss, metrics = tokens.token_prediction(model, soft)(params, batch, None)
    logits, weights, targets = params["x"] @ params["table"].T, batch["weights_BT"], batch["targets_BT"]
    log_z = np.log(np.exp(logits).sum(-1))
    expected = (smoothed(logits, targets, 0.1) + 0.01 * log_z**2 + 0.5) * weights
    np.testing.assert_allclose(loss, expected.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (nats(logits, targets) * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], ((logits.argmax(-1) == targets) * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["told"], 2 * weights.sum(), rtol=1e-5)
    unmoved(lambda x: tokens.token_prediction(model, soft)(params | {"x": x}, batch, None)[0], params["x"], weights)


@pytest.mark.parametrize("packed", [False, True])
def test_multi_token_vs_reference(heads, packed):
    model, params, batch = heads
    segments = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 3, 3, 0, 0]])
    batch["weights_BT"] = np.where(segments > 0, 1, 0).astype("f") if packed else batch["weights_BT"]
    batch |= {"segments_BT": segments} if packed else {}
    loss, metrics = multi_token(model, options())(params, batch, None)
    targets, weights = batch["targets_BT"], batch["weights_BT"]
    sums, asked = [], []
    for distance, x in enumerate((params["x"], *params["ahead"])):
        logits, total = x @ params["table"].T, 0.0
        there = np.zeros((2, 7))
        for b in range(2):
            for t in range(7 - distance):
                if not packed or segments[b, t] == segments[b, t + distance]:
                    there[b, t] = weights[b, t + distance]
                    total += there[b, t] * nats(logits[b, t], targets[b, t + distance])
        sums.append(total)
        asked.append(there)
    np.testing.assert_allclose(loss, sum(sums) + 0.5 * weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], sums[0], rtol=1e-5)
    np.testing.assert_allclose(metrics["ahead_loss"], sum(sums[1:]), rtol=1e-5)
    for n in range(2):

        def by(x, n=n):
            ahead = tuple(x if i == n else other for i, other in enumerate(params["ahead"]))
            return multi_token(model, options())(params | {"ahead": ahead}, batch, None)[0]

        unmoved(by, params["ahead"][n], asked[n + 1])


def test_distillation_vs_reference(heads):
    model, params, batch = heads
    rng = np.random.default_rng(1)
    teacher, weights, temperature = rng.normal(size=(2, 7, 11)).astype("f"), batch["weights_BT"], 3.0
    student = params["x"] @ params["table"].T
    p, q = log_softmax(teacher / temperature), log_softmax(student / temperature)
    expected = temperature**2 * ((np.exp(p) * (p - q)).sum(-1) * weights).sum()
    student_loss = distillation(model, options(teacher_temperature=temperature, teacher_share=0.25))
    alone, own = student_loss(params, batch, None)
    loss, metrics = student_loss(params, batch | {TEACHER: jnp.asarray(teacher)}, None)
    np.testing.assert_allclose(metrics["divergence"], expected, rtol=1e-5)
    assert metrics["loss"] == own["loss"] and "divergence" not in own
    np.testing.assert_allclose(loss, 0.25 * expected + 0.75 * alone, rtol=1e-5)
    unmoved(lambda x: divergence(x, teacher, weights, temperature), jnp.asarray(student), weights)
    assert abs(float(divergence(teacher, teacher, weights, temperature))) < 1e-6


def test_distillation_vs_torch():
    torch = pytest.importorskip("torch")
    student, teacher = np.random.default_rng(0).normal(size=(2, 1, 5, 9)).astype("f")
    log_q, p = (torch.tensor(x / 2.0).log_softmax(-1) for x in (student, teacher))
    expected = 4 * torch.nn.functional.kl_div(log_q, p, log_target=True, reduction="sum").item()
    np.testing.assert_allclose(divergence(student, teacher, np.ones((1, 5), "f"), 2.0), expected, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(5,), (3, 4)], ids=["rows", "tokens"])
def test_classification_vs_reference(shape):
    rng = np.random.default_rng(0)
    logits, labels = rng.normal(size=(*shape, 6)).astype("f"), rng.integers(0, 6, shape)
    weights = rng.integers(0, 2, shape).astype("f") / 3
    loss, metrics = label_cross_entropy(logits, labels, weights, 0.2)
    np.testing.assert_allclose(loss, (smoothed(logits, labels, 0.2) * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], (nats(logits, labels) * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], ((logits.argmax(-1) == labels) * weights).sum(), rtol=1e-5)
    unmoved(lambda x: label_cross_entropy(x, labels, weights, 0.2)[0], jnp.asarray(logits), weights)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_span_vs_reference(smoothing):
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(4, 9, 2)).astype("f")
    lengths, weights = [9, 5, 3, 0], np.array([0.5, 0.25, 0, 0], "f")
    segments = (np.arange(9) < np.array(lengths)[:, None]).astype("i")
    spans = np.array([[2, 8], [0, 4], [1, 1], [0, 0]])
    spans[0] = logits[0].argmax(0)
    expected, hits, own = 0.0, 0.0, 0.0
    for b in range(3):
        for end in range(2):
            some = logits[b, : lengths[b], end]
            expected += weights[b] / 2 * smoothed(some, spans[b, end], smoothing)
            own += weights[b] / 2 * nats(some, spans[b, end])
        hits += weights[b] * all(logits[b, : lengths[b]].argmax(0) == spans[b])
    loss, metrics = span_cross_entropy(logits, spans, weights, segments, smoothing)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], own, rtol=1e-5)
    assert float(metrics["accuracy"]) == hits >= 0.5

    def lost(x):
        return span_cross_entropy(x, spans, weights, segments, smoothing)[0]

    unmoved(lost, jnp.asarray(logits), weights)
    unmoved(lost, jnp.asarray(logits), (segments > 0) & (weights > 0)[:, None])


def test_regression_vs_reference():
    said, values, weights = np.array([1.0, 2, 3], "f"), np.array([1.5, 2, 9], "f"), np.array([0.5, 0.5, 0], "f")
    assert float(squared_error(said, values, weights)[0]) == 0.125
    unmoved(lambda x: squared_error(x, np.zeros(3), weights)[0], jnp.asarray(said), weights)


@pytest.mark.slow
def test_info_nce_vs_reference():
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 5, 4)).astype("f")
    weights, temperature = np.array([0.25, 0.5, 0, 0.25, 0], "f"), 0.2
    rows = np.flatnonzero(weights)
    expected, hits = 0.0, 0.0
    for i in rows:
        cosines = [first[i] @ second[j] / np.linalg.norm(first[i]) / np.linalg.norm(second[j]) for j in rows]
        own = list(rows).index(i)
        expected += weights[i] * nats(np.array(cosines) / temperature, own)
        hits += weights[i] * (np.argmax(cosines) == own)
    loss, accuracy = info_nce(first, second, weights, temperature)
    np.testing.assert_allclose([loss, accuracy], [expected, hits], rtol=1e-4)
    unmoved(lambda x: info_nce(x, second, weights, temperature)[0], jnp.asarray(first), weights)
    unmoved(lambda x: info_nce(first, x, weights, temperature)[0], jnp.asarray(second), weights)
    # A row that is all zeros, such as one that fills up a batch, stays finite.
    assert np.isfinite(jax.grad(lambda x: info_nce(x, second, weights, 0.2)[0])(jnp.zeros((5, 4)))).all()


def test_weighted_sum_of_losses():
    def loss_of(factor):
        def loss(params, batch, rng):
            return factor * params + 1, {"loss": factor * params, "accuracy": params}

        return loss

    one, other = loss_of(2.0), loss_of(3.0)
    assert weighted_sum({"one": one}, {"one": 1.0}) is one
    loss, metrics = weighted_sum({"one": one, "other": other}, {"one": 1.0, "other": 0.5})(4.0, {}, None)
    assert (float(loss), float(metrics.pop("loss"))) == (2 * 4 + 1 + 0.5 * (3 * 4 + 1), 2 * 4 + 0.5 * 3 * 4)
    assert metrics == {"one_loss": 8.0, "one_accuracy": 4.0, "other_loss": 12.0, "other_accuracy": 4.0}
    halved, _ = weighted_sum({"one": one}, {"one": 0.5})(4.0, {}, None)
    assert float(halved) == 4.5


@pytest.mark.parametrize("segments", [None, [[1, 1, 1, 2, 2, 2, 2], [1, 1, 2, 2, 2, 3, 3]]], ids=["one", "packed"])
def test_unlikelihood_vs_reference(heads, segments):
    """arXiv 1908.04319 eq. 3 and 5, token by token."""
    model, params, batch = heads
    ids = np.random.default_rng(1).integers(0, 4, (2, 7))
    targets = np.roll(ids, -1, axis=1)
    batch |= {"inputs_BT": ids, "targets_BT": targets} | (
        {} if segments is None else {"segments_BT": np.array(segments)}
    )
    _, found = unlikelihood(model, options(unlikelihood={"alpha": 0.7}))(params, batch, None)
    p = np.exp(log_softmax(params["x"] @ params["table"].T))
    expected = 0.0
    for b, t in np.ndindex(2, 7):
        begin = 0 if segments is None else segments[b].index(segments[b][t])
        candidates = set(ids[b, begin : t + 1]) - {targets[b, t]}
        expected -= batch["weights_BT"][b, t] * sum(np.log(max(1 - p[b, t, c], SMALLEST)) for c in candidates)
    assert expected > 0.05
    assert float(found["unlikelihood"]) == pytest.approx(expected, rel=1e-5)


def test_unlikelihood_adds_to_the_cross_entropy(heads):
    model, params, batch = heads
    losses = [unlikelihood(model, options(unlikelihood={"alpha": alpha})) for alpha in (0.0, 0.7)]
    (plain, _), (total, found) = (loss(params, batch, None) for loss in losses)
    text_loss, metrics = tokens.token_prediction(model, options())(params, batch, None)
    assert float(plain) == pytest.approx(float(text_loss)) and float(found["loss"]) == float(metrics["loss"])
    assert float(total) == pytest.approx(float(text_loss) + 0.7 * float(found["unlikelihood"]), rel=1e-6)
