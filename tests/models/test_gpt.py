"""The decoder as a whole: causality, loss at initialization, learning, number of parameters."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, tiny_config
from flax import linen as nn

from gptjax import models
from gptjax.models.stacking import stack, unstack
from gptjax.objectives.causal import causal
from gptjax.runs import config as configs


def initialised(vocabulary=257, dtype="float32", **changes):
    """A model and its initial parameters."""
    model, _ = build(vocabulary, dtype, **changes)
    return model, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]


def build(vocabulary=257, dtype="float32", **changes):
    """A model with parameters of the usual scale, drawn by NumPy, which compiles nothing."""
    model = models.build(configs.with_vocabulary(tiny_config(**changes), vocabulary).model, dtype)
    rng = np.random.default_rng(0)
    centre = {"scale": 1.0, "first_value_share": 0.5}

    def draw(path, leaf):
        return jnp.asarray(centre.get(path[-1].key, 0.0) + 0.05 * rng.normal(size=leaf.shape), jnp.float32)

    return model, jax.tree_util.tree_map_with_path(draw, models.shapes(model))


def logits_of(model, params, ids):
    return jax.jit(functools.partial(models.logits, model))(params, ids)


LLAMA = dict(model_positions="rotary", model_norm="rmsnorm", model_activation="swiglu", model_kv_heads=1)
MODERN = dict(
    model_positions="rotary", model_norm="rmsnorm", model_activation="relu2", model_qk_norm="head",
    model_windows="(3,0)", model_value_residual=True, model_logit_softcap=15.0, model_tied_head=False,
)  # fmt: skip
MEMBERS = {
    "gpt2": {},
    "gpt1": dict(model_norm_position="post", model_use_bias=True),
    "llama": LLAMA,
    "modern": MODERN,
    "alibi": dict(model_positions="alibi", model_head_width=5),
    "sinusoidal": dict(model_positions="sinusoidal", model_activation="geglu"),
    "no positions": dict(model_positions="none", model_tied_head=False),
    "experts": dict(model_mlp="experts", model_experts=4, model_use_bias=True),
}


@pytest.mark.thorough
@pytest.mark.parametrize("changes", MEMBERS.values(), ids=MEMBERS)
def test_causality_through_gradients(changes):
    model, params = build(**changes)
    table = params["tokens"]["embedding"]
    ids = jnp.arange(12)[None]

    def output_at(t, table_in):
        # The lookup alone is differentiated: a tied head reads the untouched table.
        shift = table_in - table

        def interceptor(next_method, args, kwargs, context):
            out = next_method(*args, **kwargs)
            at_lookup = context.module.name == "tokens" and context.method_name == "__call__"
            return out + shift[args[0]] if at_lookup else out

        with nn.intercept_methods(interceptor):
            return model.apply({"params": params}, ids)[0, t].sum()

    gradient = jax.jit(jax.grad(lambda table_in, t: output_at(t, table_in)))
    for t in (0, 5, 11):
        grad = np.abs(gradient(table, t)).sum(-1)[:12]
        assert (grad[: t + 1] > 0).all(), "each position sees itself and all before it"
        assert (grad[t + 1 :] == 0).all(), "no position sees a later one"


@pytest.mark.parametrize("member", ["gpt2", "llama", "modern"])
@pytest.mark.slow
def test_a_new_model_knows_nothing(member):
    for vocabulary in (257, 5000):
        model, params = initialised(vocabulary, **MEMBERS[member], model_width=64)
        ids = jax.random.randint(jax.random.key(1), (8, 16), 0, vocabulary)
        targets = jax.random.randint(jax.random.key(2), (8, 16), 0, vocabulary)
        logits_of = models.forward(model, params, {"ids_BT": ids})
        loss = models.cross_entropy(model, logits_of, targets, jnp.full((8, 16), 1 / 128))
        assert abs(float(loss) / math.log(vocabulary) - 1) < 0.02


@pytest.mark.slow
def test_one_repeated_batch_is_learnt_by_heart():
    model, params = initialised(model_width=32)
    rng = np.random.default_rng(0)
    batch = {
        "inputs_BT": rng.integers(0, 257, (4, 16)),
        "targets_BT": rng.integers(0, 257, (4, 16)),
        "weights_BT": np.ones((4, 16), "f"),
    }
    objective, optimizer = causal(model), optax.adam(3e-3)

    @jax.jit
    def step(params, state):
        loss, grads = jax.value_and_grad(lambda p: objective(p, batch, None)[0] / 64)(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state, loss

    state = optimizer.init(params)
    for _ in range(300):
        params, state, loss = step(params, state)
    assert float(loss) < 0.02


# Exact where the makers' own numbers are known, and the parameters of table D.1 of arXiv 2005.14165 for GPT-3, where
# table 2.1 has them rounded to one or two figures (350M for 356M, 2.7B for 2,650M).
PUBLISHED = {
    "gpt1": 116_534_784,
    "gpt2:small": 124_439_808,
    "gpt2:medium": 354_823_168,
    "gpt2:large": 774_030_080,
    "gpt2:xl": 1_557_611_200,
    "llama:1b": 1_235_814_400,
    "llama:8b": 8_030_261_248,
    "llama:70b": 70_553_706_496,
}
GPT3_MILLIONS = {
    "small": 125, "medium": 356, "large": 760, "xl": 1320, "2.7b": 2650, "6.7b": 6660, "13b": 12_850, "175b": 174_600,
}  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize(
    "recipe, count, tolerance",
    [(recipe, count, 0) for recipe, count in PUBLISHED.items()]
    + [(f"gpt3:{size}", millions * 1e6, 0.01) for size, millions in GPT3_MILLIONS.items()],
)
def test_recipes_have_the_published_number_of_parameters(recipe, count, tolerance):
    name, _, size = recipe.partition(":")
    config = configs.resolve(configs.read(str(ROOT / "configs" / f"{name}.py") + (size and f":{size}")))
    shapes = models.shapes(models.build(config.model))
    assert sum(math.prod(s.shape) for s in jax.tree.leaves(shapes)) == pytest.approx(count, rel=tolerance, abs=0)


def loss_and_gradients(params, layout=lambda params: params, **changes):
    """Loss and gradients of one batch, in the layout of `params`, and the program that computes them."""
    model, _ = build(**changes, model_kernels="plain")  # others scan and compute again of their own accord
    ids = np.random.default_rng(0).integers(0, 257, (2, 17))
    batch = {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": np.ones((2, 16), "f")}

    def loss(params):
        return causal(model)(layout(params), batch, None)[0] / 32

    program = str(jax.make_jaxpr(jax.grad(loss))(params))
    return *jax.jit(jax.value_and_grad(loss))(params), program


@functools.cache
def without_scan_or_remat(member):
    changes = MEMBERS[member] | {"model_layers": 3}
    _, params = build(**changes)
    return changes, params, *loss_and_gradients(params, **changes)


@pytest.mark.parametrize("remat", ["full", "dots"])
@pytest.mark.parametrize("scan_layers", [False, True])
@pytest.mark.parametrize("member", ["gpt2", "modern", "experts"])
@pytest.mark.slow
def test_scan_and_remat_change_neither_loss_nor_gradients(member, scan_layers, remat):
    changes, params, loss, grads, plain = without_scan_or_remat(member)
    settings = dict(model_scan_layers=scan_layers, model_remat=remat)
    their_loss, their_grads, program = loss_and_gradients(
        params, stack if scan_layers else lambda p: p, **changes, **settings
    )
    # The programs are what they are said to be, so that the two sides are not the same thing twice.
    assert "remat" not in plain and "checkpoint" not in plain and "length=3" not in plain
    assert "remat" in program or "checkpoint" in program
    assert ("length=3" in program) == scan_layers
    np.testing.assert_allclose(their_loss, loss, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), their_grads, grads)


@pytest.mark.slow
def test_remat_saves_memory_the_more_the_less_it_keeps():
    def temporary(remat):
        # Stacked: on CPU, XLA undoes the recomputation of blocks that are not in a loop.
        model, params = build(model_remat=remat, model_layers=8, model_scan_layers=True, model_context=64)
        ids = jnp.zeros((16, 64), jnp.int32)
        grad = jax.jit(jax.grad(lambda p, ids: models.logits(model, p, ids).sum()))
        return grad.lower(params, ids).compile().memory_analysis().temp_size_in_bytes

    nothing, products, everything = (temporary(remat) for remat in ("none", "dots", "full"))
    assert 3 * everything < 2 * products < nothing


def test_stacking_blocks_and_back_is_bit_exact():
    _, params = build(model_layers=11)
    again = unstack(stack(params))
    assert again.keys() == params.keys()
    jax.tree.map(np.testing.assert_array_equal, again, params)
    stacked, model = stack(params), build(model_layers=11, model_scan_layers=True)[0]
    assert jax.tree.map(jnp.shape, stacked) == jax.tree.map(lambda s: s.shape, models.shapes(model))


@pytest.mark.thorough
@pytest.mark.parametrize("windows, reach", [((3,), 4), ((4, 2), 4), ((1, 1), 0), ((2, 0), 99)])
@pytest.mark.parametrize("scan_layers", [False, True])
def test_windows_bound_how_far_a_layer_reaches(windows, reach, scan_layers):
    """The receptive field of two layers is 2 * (window - 1)."""
    changes = dict(model_positions="rotary", model_windows=str(windows), model_scan_layers=scan_layers)
    model, params = build(**changes)
    ids = jax.random.randint(jax.random.key(1), (1, 12), 0, 257)
    changed = jnp.concatenate([ids, jnp.stack([ids[0].at[t].add(1) for t in range(11)])])
    last = np.asarray(logits_of(model, params, changed))[:, 11]
    seen = [not np.array_equal(last[0], other) for other in last[1:]]
    assert seen == [11 - t <= reach for t in range(11)]


def test_positions_matter_unless_there_are_none():
    ids, swapped = jnp.array([[5, 9, 2, 7]]), jnp.array([[9, 5, 2, 7]])
    for positions in ("learned", "sinusoidal", "rotary", "alibi", "none"):
        # One layer: more of them tell positions even without, because each query sees what is before it alone.
        model, params = build(model_positions=positions, model_layers=1)
        differ = float(jnp.abs(logits_of(model, params, ids) - logits_of(model, params, swapped))[0, -1].max())
        assert (differ > 1e-6) == (positions != "none"), positions


def test_zero_initialised_blocks_begin_as_the_identity():
    model, params = initialised(**MODERN, model_residual_init="zero")
    ids = jnp.arange(8)[None]
    x = params["tokens"]["embedding"][ids]
    x = x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    expected = 15 * jnp.tanh(x @ params["head"]["kernel"] / 15)
    np.testing.assert_allclose(logits_of(model, params, ids), expected, rtol=1e-4, atol=1e-5)


def test_capped_logits_stay_below_the_cap_and_keep_their_order():
    plain, params = build(model_tied_head=False)
    params["head"]["kernel"] = 20 * params["head"]["kernel"]
    capped, _ = build(model_tied_head=False, model_logit_softcap=5.0)
    ids = jnp.arange(8)[None]
    free, held = logits_of(plain, params, ids), logits_of(capped, params, ids)
    np.testing.assert_allclose(held, 5 * np.tanh(free / 5), rtol=1e-4)
    assert float(jnp.abs(free).max()) > 5 >= float(jnp.abs(held).max())


def test_the_value_residual_mixes_in_the_first_layers_values():
    """A coefficient of 0 disables the value residual; with 1 later layers use the first layer's values alone."""
    changes = dict(model_value_residual=True)
    model, params = build(**changes)
    plain, without = build()
    ids = jnp.arange(8)[None]

    def with_share(params, share):
        return jax.tree_util.tree_map_with_path(
            lambda path, p: jnp.full_like(p, share) if path[-1].key == "first_value_share" else p, params
        )

    none = {name: value for name, value in jax.tree_util.tree_map(lambda p: p, params).items()}
    for i in range(2):
        attention = {k: v for k, v in params[f"block_{i}"]["attention"].items() if k != "first_value_share"}
        none[f"block_{i}"] = params[f"block_{i}"] | {"attention": attention}
    assert jax.tree.structure(none) == jax.tree.structure(without)
    np.testing.assert_allclose(logits_of(model, with_share(params, 0.0), ids), logits_of(plain, none, ids), atol=1e-6)
    whole = with_share(params, 1.0)
    kernel = whole["block_1"]["attention"]["qkv"]["kernel"]
    whole["block_1"]["attention"]["qkv"]["kernel"] = kernel.reshape(16, 2, 3, 8).at[:, :, 2].set(9.0).reshape(16, 48)
    np.testing.assert_allclose(logits_of(model, whole, ids), logits_of(model, with_share(params, 1.0), ids), atol=1e-6)
    assert not np.allclose(logits_of(model, params, ids), logits_of(plain, none, ids), atol=1e-6)


@pytest.mark.slow
def test_projections_to_the_residual_stream_start_smaller():
    _, params = initialised(model_width=128, model_layers=8)
    block = params["block_0"]
    assert np.std(block["mlp"]["up"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    for part in (block["mlp"]["down"], block["attention"]["out"]):
        assert np.std(part["kernel"]) == pytest.approx(0.02 / math.sqrt(16), rel=0.05)


@pytest.mark.parametrize("member", ["gpt2", "modern", "experts"])
def test_bfloat16_is_close_to_float32_and_gives_float32_logits(member):
    model, params = build(**MEMBERS[member], model_width=64)
    low, _ = build(**MEMBERS[member], model_width=64, dtype="bfloat16")
    ids = jnp.arange(16)[None]
    exact, rounded = logits_of(model, params, ids), logits_of(low, params, ids)
    assert rounded.dtype == jnp.float32
    assert 0 < float(jnp.abs(exact - rounded).max()) < 0.05 * float(jnp.abs(exact).max())


def test_dropout_acts_only_in_training_and_depends_on_its_key():
    model, params = build(model_dropout=0.5)
    ids = jnp.arange(16)[None]

    def run(seed=None):
        rngs = None if seed is None else {"dropout": jax.random.key(seed)}
        return model.apply({"params": params}, ids, deterministic=seed is None, rngs=rngs)

    np.testing.assert_array_equal(run(), run())
    np.testing.assert_array_equal(run(1), run(1))
    assert not np.allclose(run(1), run(2)) and not np.allclose(run(1), run())
