"""Update rules of fine-tuning against NumPy: rates by path, penalties, AdaLoRA's budget."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import tiny_config

from gptjax.finetune import paths
from gptjax.optim import update_rules

LEAVES = ("tokens/embedding", "block_0/mlp/up/kernel", "block_1/mlp/up/kernel", "final_norm/scale", "task/kernel")


def tree_of(value, leaves=LEAVES):
    return paths.nested({path: jnp.full((2, 3), value) for path in leaves})


def taken(transformation, grads, params, steps=1):
    """The updates of the last of some steps."""
    state = transformation.init(params)
    for _ in range(steps):
        out, state = transformation.update(grads, state, params)
    return {path: float(leaf.reshape(-1)[0]) for path, leaf in paths.flat(out).items()}


def test_layer_decay_towards_the_embedding():
    options = tiny_config(finetune_layer_decay=0.5).finetune
    found = taken(update_rules.scale_by_path(options), tree_of(1.0), tree_of(0.0))
    assert found == dict(zip(LEAVES, (0.25, 0.5, 1.0, 1.0, 1.0), strict=True))


def test_first_matching_rule_sets_the_rate():
    options = tiny_config(finetune_rates="(('block_1/', 3.0), ('kernel', 0.1))").finetune
    found = taken(update_rules.scale_by_path(options), tree_of(1.0), tree_of(0.0))
    assert found == pytest.approx(dict(zip(LEAVES, (1.0, 0.1, 3.0, 1.0, 0.1), strict=True)))


def test_lora_plus_rate():
    options = tiny_config(finetune_b_rate=16.0).finetune
    leaves = ("block_0/mlp/up/lora_a", "block_0/mlp/up/lora_b")
    found = taken(update_rules.scale_by_path(options), tree_of(1.0, leaves), tree_of(0.0, leaves))
    assert found == dict(zip(leaves, (1.0, 16.0), strict=True))


@pytest.mark.parametrize(("steps", "moving"), [(1, LEAVES[2:]), (3, LEAVES[2:]), (4, LEAVES[1:]), (7, LEAVES)])
def test_gradual_unfreezing(steps, moving):
    options = tiny_config(finetune_unfreeze_every=3).finetune
    found = taken(update_rules.scale_by_path(options), tree_of(1.0), tree_of(0.0), steps)
    assert {path for path, value in found.items() if value} == set(moving)


def test_identity_without_options():
    transformation = update_rules.scale_by_path(tiny_config().finetune)
    assert transformation.init(tree_of(0.0)) == optax.EmptyState()


def test_l2_sp_is_the_gradient_of_its_penalty():
    start, there = tree_of(1.0), tree_of(1.5)
    pull = update_rules.l2_sp(0.2)
    out, _ = pull.update(tree_of(2.0), pull.init(start), there)
    np.testing.assert_allclose(jax.tree.leaves(out)[0], 2.0 + 0.2 * 0.5, rtol=1e-6)


def lora(seed, r=4, modules=("block_0/a", "block_1/b"), D=5, F=6):
    rng = np.random.default_rng(seed)
    leaves = {}
    for name in modules:
        leaves |= {f"{name}/lora_a": rng.normal(size=(D, r)), f"{name}/lora_b": rng.normal(size=(r, F))}
        leaves[f"{name}/lora_e"] = rng.normal(size=r)
    return paths.nested({path: jnp.asarray(leaf, jnp.float32) for path, leaf in leaves.items()})


def test_orthogonality_penalty_vs_reference():
    params = lora(0)
    zeros = jax.tree.map(jnp.zeros_like, params)
    out, _ = update_rules.orthogonality_penalty(0.1).update(zeros, optax.EmptyState(), params)
    for path, leaf in paths.flat(params).items():
        p, found = np.asarray(leaf, np.float64), paths.flat(out)[path]
        wanted = np.zeros_like(p)
        if path.endswith("lora_a"):
            wanted = 0.1 * 4 * p @ (p.T @ p - np.eye(p.shape[1]))
        elif path.endswith("lora_b"):
            wanted = 0.1 * 4 * (p @ p.T - np.eye(p.shape[0])) @ p
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


def plain_adalora(params, grads, c, rank, steps, rate):
    """Algorithm 1 of arXiv 2303.10512 with gradient descent in NumPy: (parameters, number of ranks) of each step."""
    flat = {path: np.asarray(leaf, np.float64) for path, leaf in paths.flat(params).items()}
    mean, unsure = ({path: np.zeros_like(leaf) for path, leaf in flat.items()} for _ in range(2))
    names = [path.removesuffix("lora_e") for path in flat if path.endswith("lora_e")]
    first, last = c.first_rank * len(names), rank * len(names)
    mask = {name: np.ones(c.first_rank, bool) for name in names}
    for t in range(1, steps + 1):
        for path, leaf in flat.items():
            now = np.abs(leaf * grads[t - 1][path])
            mean[path] = c.beta1 * mean[path] + (1 - c.beta1) * now
            unsure[path] = c.beta2 * unsure[path] + (1 - c.beta2) * np.abs(now - mean[path])
        flat_new = {path: leaf - rate * grads[t - 1][path] for path, leaf in flat.items()}
        s = {path: mean[path] * unsure[path] for path in flat}
        scores = {n: s[n + "lora_e"] + s[n + "lora_a"].mean(0) + s[n + "lora_b"].mean(1) for n in names}
        share = np.clip((t - c.warmup_steps) / (steps - c.warmup_steps - c.final_steps), 0, 1)
        left = int(np.round(last + (first - last) * (1 - share) ** 3))
        ends = steps - c.final_steps
        if (c.warmup_steps <= t < ends and t % c.every_steps == 0) or t == ends:
            order = np.argsort(-np.concatenate([scores[n] for n in names]), kind="stable")[:left]
            whole = np.zeros(first, bool)
            whole[order] = True
            mask = dict(zip(names, np.split(whole, len(names)), strict=True))
            masks = True
        else:
            masks = t > ends
        if masks:
            for n in names:
                flat_new[n + "lora_e"] = np.where(mask[n], flat_new[n + "lora_e"], 0)
        flat = flat_new
        yield flat, sum(m.sum() for m in mask.values())


def test_adalora_vs_reference():
    steps, rate = 40, 0.05
    changes = {"first_rank": 4, "warmup_steps": 5, "final_steps": 10, "every_steps": 3}
    config = tiny_config(finetune_rank=2, **{f"finetune_adalora.{key}": value for key, value in changes.items()})
    c, params = config.finetune, lora(1)
    rng = np.random.default_rng(2)
    grads = [{p: rng.normal(size=leaf.shape) for p, leaf in paths.flat(params).items()} for _ in range(steps)]
    transformation = update_rules.adalora(optax.with_extra_args_support(optax.sgd(rate)), c, steps)
    state, update = transformation.init(params), jax.jit(transformation.update)
    wanted = list(plain_adalora(params, grads, c.adalora, c.rank, steps, rate))
    for t in range(steps):
        own = paths.nested({path: jnp.asarray(g, jnp.float32) for path, g in grads[t].items()})
        out, state = update(own, state, params)
        params = optax.apply_updates(params, out)
        for path, leaf in paths.flat(params).items():
            np.testing.assert_allclose(leaf, wanted[t][0][path], rtol=1e-4, atol=1e-5, err_msg=f"step {t + 1} {path}")
        assert sum(int(kept.sum()) for kept in state.kept.values()) == wanted[t][1]
    there = [leaf for path, leaf in paths.flat(params).items() if path.endswith("lora_e")]
    assert sum(int((leaf != 0).sum()) for leaf in there) == 4, "rank 2 of each of two matrices, on average"
