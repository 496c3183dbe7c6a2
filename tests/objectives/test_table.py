"""Every objective with a tiny model on its own rows; adversarial attacks on them; invalid configs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from row_fixtures import draws, make_context, options, row_of

from gptjax import models, objectives
from gptjax.config.errors import ConfigError
from gptjax.data.batches import stack
from gptjax.objectives import OBJECTIVES, normalize_weights
from gptjax.objectives.adversarial import adversarial, project, worst_perturbation
from gptjax.objectives.next_sentence import LABELS
from gptjax.runs import config as configs

CONTEXT = 32
KINDS = {"decoder": "gpt", "encoder": "encoder", "seq2seq": "seq2seq"}


def built(kind, **changes):
    """A tiny model of a kind with all special ids, and parameters that are not small."""
    vocabulary = max(*make_context().specials.values(), *make_context().sentinels) + 1
    settings = dict(model_layers=1, model_context=CONTEXT, model_arch=KINDS[kind], model_norm_position="post") | changes
    config = configs.with_vocabulary(tiny_config(**settings), vocabulary)
    model = models.build(config.model)
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda s: jnp.asarray(0.3 * rng.normal(size=s.shape), "f"), models.shapes(model))


def batch_of(name, layout="examples", rows=4, **changes):
    """A batch of an objective's rows."""
    row_context, prepare = make_context(**changes), OBJECTIVES[name].row or (lambda row, row_context, rng: row)
    return stack([prepare(row_of(layout, k, CONTEXT), row_context, draws(k=k)) for k in range(rows)])


def nats(logits, targets):
    logits = np.asarray(logits, np.float64)
    log_z = np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1)) + logits.max(-1)
    return log_z - np.take_along_axis(logits, np.asarray(targets)[..., None], -1)[..., 0]


TOKENS = [("prefix", "decoder", {}), ("fim", "decoder", {"fim_rate": 1.0}), ("masked", "encoder", {})]
TOKENS += [("denoising", "seq2seq", {}), ("denoising", "seq2seq", {"corruption": "infilling"})]


@pytest.mark.parametrize(
    "name, kind, changes", TOKENS, ids=[f"{n}-{''.join(c.values())}" if n == "denoising" else n for n, _, c in TOKENS]
)
def test_loss_of_a_model_vs_reference(name, kind, changes):
    model, params = built(kind)
    batch = batch_of(name, **changes)
    loss = jax.jit(OBJECTIVES[name].loss(model, options()))
    found, metrics = loss(params, batch, None)
    read = models.select_inputs(model, batch)
    logits = np.asarray(jax.jit(lambda params: models.logits(model, params, **read))(params))
    weights = batch["weights_BT"]
    expected = (nats(logits, batch["targets_BT"]) * weights).sum()
    np.testing.assert_allclose([found, metrics["loss"]], expected, rtol=1e-4)
    np.testing.assert_allclose(
        metrics["accuracy"], ((logits.argmax(-1) == batch["targets_BT"]) * weights).sum(), rtol=1e-5
    )
    # What weighs nothing may have any target.
    other = dict(batch, targets_BT=np.where(weights > 0, batch["targets_BT"], 5))
    np.testing.assert_allclose(loss(params, other, None)[0], found, rtol=1e-6)
    # What is read has what the objective says: a prefix ahead, a source, no padding.
    needed = {
        "prefix": {"bidirectional_BT"},
        "masked": {"segments_BT"},
        "denoising": {"source_BS", "source_segments_BS"},
    }
    assert needed.get(name, set()) <= read.keys()


def test_padding_of_masked_rows_is_not_read():
    model, params = built("encoder")
    batch = batch_of("masked")
    assert (batch["segments_BT"] == 0).any()
    loss = jax.jit(OBJECTIVES["masked"].loss(model, options()))
    other = dict(batch, inputs_BT=np.where(batch["segments_BT"] > 0, batch["inputs_BT"], 7))
    np.testing.assert_allclose(loss(params, other, None)[0], loss(params, batch, None)[0], rtol=1e-6)


def labelled(name, rng):
    batch = batch_of("contrastive") | {"weights_B": np.array([1, 1, 0, 1], "f")}
    labels = {
        "classification": {"labels_B": rng.integers(0, 3, 4)},
        "regression": {"values_B": rng.normal(size=4).astype("f")},
        "span": {"spans_B2": np.sort(rng.integers(0, 5, (4, 2)))},
        "tagging": {
            "labels_BT": rng.integers(0, 3, (4, CONTEXT)),
            "weights_BT": (batch["segments_BT"] * rng.integers(0, 2, (4, CONTEXT))).astype("f"),
        },
        "choice": {"labels_B": rng.integers(0, 2, 4)},
        "contrastive": {},
    }[name]
    if name == "choice":  # two choices a row
        batch |= {key: np.stack([batch[key], np.roll(batch[key], 1, 0)], 1) for key in ("inputs_BT", "segments_BT")}
    return batch | labels


@pytest.mark.thorough
@pytest.mark.parametrize("name", ["classification", "tagging", "span", "choice", "regression", "contrastive"])
def test_task_losses_ignore_rows_of_weight_zero(name):
    task = {"contrastive": "embedding"}.get(name, name)
    model, params = built("encoder", model_task=task, model_labels=3, model_pooling="mean")
    batch = labelled(name, np.random.default_rng(0))
    loss = jax.jit(jax.value_and_grad(OBJECTIVES[name].loss(model, options()), has_aux=True))
    (found, metrics), grads = loss(params, batch, None)
    assert np.isfinite(found) and np.isclose(found, metrics["loss"]) and optimum(grads) > 0
    if name == "tagging":
        other = dict(batch, labels_BT=np.where(batch["weights_BT"] > 0, batch["labels_BT"], 1))
    else:
        inputs = batch["inputs_BT"].copy()
        inputs[2] = 9
        other = dict(batch, inputs_BT=inputs)
    (same, _), same_grads = loss(params, other, None)
    np.testing.assert_allclose(same, found, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * optimum(grads)), grads, same_grads)
    inputs = batch["inputs_BT"].copy()
    inputs[0, ..., 0] = 9
    assert not np.isclose(loss(params, dict(batch, inputs_BT=inputs), None)[0][0], found, rtol=1e-5)


def optimum(tree):
    """The largest entry."""
    return max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(tree))


def test_dropout_makes_a_second_view():
    model, params = built("encoder", model_task="embedding", model_dropout=0.3)
    loss = jax.jit(OBJECTIVES["contrastive"].loss(model, options()))
    batch = normalize_weights(batch_of("contrastive"))
    noisy, still = loss(params, batch, jax.random.key(0))[0], loss(params, batch, None)[0]
    assert noisy > still + 1e-3
    # With a source, this is the partner.
    other = np.roll(batch["inputs_BT"], 1, 0)
    paired = batch | {"source_BS": other, "source_segments_BS": np.roll(batch["segments_BT"], 1, 0)}
    assert loss(params, paired, None)[0] > still + 1e-2


def test_masked_and_next_sentence_are_trained_together():
    model, params = built("encoder", model_task="classification", model_labels=len(LABELS), model_types=2)
    config = tiny_config(train_objective="masked + 0.5*next_sentence")
    rows = [
        objectives.row_transform(config)(row_of("examples", k, CONTEXT), make_context(), draws(k=k)) for k in range(4)
    ]
    batch = normalize_weights(stack(rows))
    both, metrics = jax.jit(objectives.loss(config, model))(params, batch, None)
    parts = [metrics["masked_loss"], metrics["next_sentence_loss"]]
    np.testing.assert_allclose(both, parts[0] + 0.5 * parts[1], rtol=1e-5)
    assert np.all(np.array(parts) > 0)
    blank = dict(batch, types_BT=np.zeros_like(batch["types_BT"]))
    assert jax.jit(objectives.loss(config, model))(params, blank, None)[1]["next_sentence_loss"] != parts[1]


# Attacks


def reference_shift(gradient, shape, epsilon, steps):
    """Gradient ascent within a ball, row by row, in float64."""
    shift, length = np.zeros(shape), epsilon if steps == 1 else 2.5 * epsilon / steps
    for _ in range(steps):
        of_all = np.asarray(gradient(jnp.asarray(shift, jnp.float32)), np.float64)
        for i, own in enumerate(of_all):
            norm = np.linalg.norm(own)
            shift[i] += length * own / norm if norm else 0
            shift[i] *= min(1, epsilon / max(np.linalg.norm(shift[i]), 1e-30))
    return shift


@pytest.mark.parametrize(
    "kind, name, attack, steps", [("decoder", "causal", "pgd", 3), ("seq2seq", "denoising", "fgm", 1)]
)
@pytest.mark.slow
def test_attack_vs_reference(kind, name, attack, steps):
    model, params = built(kind)
    batch = normalize_weights(batch_of(name))
    key, shape = models.perturbation_spec(model, batch)
    plain = OBJECTIVES[name].loss(model, options())
    chosen = options(adversarial=attack, epsilon=0.7, adversarial_steps=3)
    loss = jax.jit(jax.value_and_grad(adversarial(plain, model, chosen), has_aux=True))
    (found, metrics), grads = loss(params, batch, None)

    def under(params, shift):
        return plain(params, {**batch, key: shift}, None)[0]

    gradient = jax.jit(lambda shift: jax.grad(under, argnums=1)(params, shift))
    shift = jnp.asarray(reference_shift(gradient, shape, 0.7, steps), jnp.float32)
    np.testing.assert_allclose(np.sqrt((shift**2).sum((1, 2))), 0.7, rtol=1e-4)
    clean, told = plain(params, batch, None)
    hurt, of_hurt = jax.jit(jax.value_and_grad(under))(params, shift)
    np.testing.assert_allclose([found, metrics["adversarial_loss"]], [clean + hurt, hurt], rtol=1e-4)
    assert float(metrics["loss"]) == pytest.approx(float(told["loss"])) and hurt > clean
    # The shift is taken as it is: its own way of depending on parameters has no share in the gradient.
    of_clean = jax.jit(jax.grad(lambda params: plain(params, batch, None)[0]))(params)
    expected = jax.tree.map(jnp.add, of_clean, of_hurt)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-3 * optimum(expected)), grads, expected)
    # Rows that others have, as on another mesh, are shifted as before.
    halves = [{key: np.concatenate([x[i : i + 2]] * 2) for key, x in batch.items()} for i in (0, 2)]
    np.testing.assert_allclose(sum(float(loss(params, half, None)[0][0]) for half in halves), 2 * found, rtol=1e-4)


def test_normalize_of_zero_and_tiny_rows():
    gradient = jnp.stack([jnp.zeros((2, 3)), jnp.full((2, 3), 1e-30), -jnp.ones((2, 3))])
    for steps in (1, 4):
        shift = np.asarray(worst_perturbation(lambda shift: gradient, (3, 2, 3), 0.5, steps))
        assert not shift[0].any()
        np.testing.assert_allclose(np.linalg.norm(shift.reshape(3, -1), axis=1)[1:], 0.5, rtol=1e-5)
        assert (shift[1] > 0).all() and (shift[2] < 0).all()
    np.testing.assert_allclose(np.linalg.norm(project(jnp.array([[3.0, 4.0], [0.3, 0.4]]), 1.0), axis=1), [1, 0.5])


def test_without_attack_the_loss_is_unchanged():
    loss = OBJECTIVES["causal"].loss
    assert adversarial(loss, None, options()) is loss


# Configs


def problems(objective, kind="decoder", **changes):
    config = tiny_config(train_objective=objective, model_arch=KINDS[kind], **changes)
    return list(objectives.problems(config, kind))


@pytest.mark.parametrize(
    "objective, kind, changes, expected",
    [
        ("mask", "encoder", {}, "train.objective has no choice 'mask'; did you mean masked?"),
        (
            "masked",
            "decoder",
            {},
            "train.objective=masked is for encoder models, and gpt is a kind of decoder",
        ),
        (
            "classification",
            "encoder",
            {},
            "train.objective=classification needs a task head, and model.task is none, not classification",
        ),
        (
            "denoising",
            "seq2seq",
            {"data_layout": "packed"},
            "train.objective=denoising reads rows of one text, data.layout=flat or examples, not packed",
        ),
        ("causal + causal", "decoder", {}, "train.objective is 'causal + causal'; it names an objective twice"),
        ("prefix + fim", "decoder", {}, "train.objective='prefix + fim': prefix and fim each want rows of their own"),
        ("causal", "decoder", {"objective_mask_rate": 1.0}, "objective.mask_rate is 1.0; it must be less than 1"),
        ("causal", "decoder", {"objective_fim_rate": 1.5}, "objective.fim_rate is 1.5; it must be at most 1"),
        ("causal", "decoder", {"objective_temperature": 0.0}, "objective.temperature is 0.0; it must be more than 0"),
        ("causal", "decoder", {"objective_mean_span": 0.5}, "objective.mean_span is 0.5; spans have 1 token or more"),
        (
            "contrastive",
            "encoder",
            {"model_task": "embedding"},
            "train.objective=contrastive tells two views of a text apart by dropout; set model.dropout, or give pairs",
        ),
        (
            "denoising",
            "seq2seq",
            {"data_context": 7},
            "data.context=7 is too short for train.objective=denoising; give 8 tokens or more",
        ),
    ],
)
def test_invalid_config_gives_one_line(objective, kind, changes, expected):
    assert problems(objective, kind, **changes)[0] == expected


def test_valid_configs_have_no_problems():
    assert not problems("causal") and not problems("0.5*multi_token + prefix")
    found = {"model_task": "classification"}
    assert not problems("masked + next_sentence", "encoder", **found)
    assert not problems("contrastive", "encoder", model_task="embedding", model_dropout=0.1)


def test_malformed_objective_is_refused():
    with pytest.raises(ConfigError, match="must be like causal, or masked"):
        objectives.parse_objective("masked, causal")
