"""Each optimizer but AdamW against NumPy in float64, written from its paper's algorithm, and against torch's own."""

import jax
import numpy as np
import optax
import pytest
from conftest import tiny_config
from flax.traverse_util import flatten_dict, unflatten_dict

from gptjax import optim
from gptjax.models.stacking import stack

LAYER = {
    "up/kernel": (128, 130),  # large enough for Adafactor's rows and columns
    "up/bias": (130,),
    "experts/kernel": (2, 4, 6),  # a batch of matrices
    "norm/scale": (4,),
}
SHAPES = {f"block_0/{name}": shape for name, shape in LAYER.items()}
SHAPES |= {"block_0/tall/kernel": (12, 4), "tokens/embedding": (12, 4), "head/kernel": (4, 12)}
PEAK, WARMUP = 0.1, 2


def config_of(name, **changes):
    settings = dict(optimizer_learning_rate=PEAK, optimizer_clip_norm=0, optimizer_name=name, train_steps=20)
    return tiny_config(**settings | dict(schedule_name="constant", schedule_warmup_steps=WARMUP) | changes)


def random_leaves(count, shapes=SHAPES):
    rng = np.random.default_rng(0)
    return [{name: rng.normal(size=shape).astype("f") for name, shape in shapes.items()} for _ in range(count)]


def updated(config, start, gradients, objective=None):
    """The parameters and the optimizer's state after a step with each gradient."""
    optimizer = optim.optimizer(config)
    state = optimizer.init(start)
    update = jax.jit(lambda grads, state, params: optimizer.update(grads, state, params, obj_fn=objective))
    for grads in gradients:
        updates, state = update(grads, state, start)
        start = optax.apply_updates(start, updates)
    return start, state


def nested(leaves):
    return unflatten_dict(leaves, sep="/")


def rate_at(t, peak=PEAK):
    """At the t-th step, from 1."""
    return peak * min(1, (t - 1) / WARMUP)


def decay_of(name, c):
    return c.weight_decay if name.endswith(("kernel", "embedding")) else 0.0


def newton_schulz(m):
    """Jordan 2024, `newtonschulz5`: singular values go to about 1."""
    wide = m.T if m.shape[0] > m.shape[1] else m
    x = wide / np.linalg.norm(wide)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.T if m.shape[0] > m.shape[1] else x


def adam(name, p, g, s, t, c):
    s["m"] = c.beta1 * s.get("m", 0) + (1 - c.beta1) * g
    s["v"] = c.beta2 * s.get("v", 0) + (1 - c.beta2) * g**2
    return s["m"] / (1 - c.beta1**t) / (np.sqrt(s["v"] / (1 - c.beta2**t)) + c.epsilon)


def muon(name, p, g, s, t, c):
    """Jordan 2024, with the scale of arXiv 2502.16982 eq. 4 and optax's Nesterov mean, whose parts are unbiased."""
    if not name.endswith("kernel") or name.startswith("head"):
        return adam(name, p, g, s, t, c)
    b = c.muon.momentum
    s["m"] = b * s.get("m", 0) + (1 - b) * g
    mean = b * s["m"] / (1 - b ** (t + 1)) + (1 - b) * g / (1 - b**t)
    each = [newton_schulz(matrix) for matrix in mean.reshape(-1, *mean.shape[-2:])]
    return 0.2 * np.sqrt(max(g.shape[-2:])) * np.reshape(each, g.shape)


def lion(name, p, g, s, t, c):
    """arXiv 2302.06675, program 1."""
    m = s.get("m", 0)
    s["m"] = c.beta2 * m + (1 - c.beta2) * g
    return np.sign(c.beta1 * m + (1 - c.beta1) * g)


def adafactor(name, p, g, s, t, c):
    """arXiv 1804.04235, algorithms 4 and 5."""
    b = 1 - t**-0.8
    square = g**2 + 1e-30
    if name.endswith("up/kernel"):
        s["r"] = b * s.get("r", 0) + (1 - b) * square.mean(-1, keepdims=True)
        s["c"] = b * s.get("c", 0) + (1 - b) * square.mean(-2, keepdims=True)
        v = s["r"] * s["c"] / s["r"].mean()
    else:
        v = s["v"] = b * s.get("v", 0) + (1 - b) * square
    u = g / np.sqrt(v)
    rms = lambda x: np.sqrt((x**2).mean())
    return max(1e-3, rms(p)) * u / max(1, rms(u))


def curvature(name):
    """The diagonal of a made-up Hessian, some of it negative."""
    rng = np.random.default_rng(len(name))
    return rng.uniform(-2, 20, SHAPES[name]).astype("f")


def bowl(params):
    """A loss with that Hessian and nothing off its diagonal, so that every estimate of it is exact."""
    return sum((curvature(name) * p**2).sum() / 2 for name, p in flatten_dict(params, sep="/").items())


def sophia(name, p, g, s, t, c):
    """arXiv 2305.14342, algorithm 3, with optax's unbiased mean, and its Hessian that counts from the next step on."""
    s["m"] = c.beta1 * s.get("m", 0) + (1 - c.beta1) * g
    h = s.get("h", np.zeros_like(p))
    if (t - 1) % c.sophia.hessian_every_steps == 0:
        s["h"] = c.beta2 * h + (1 - c.beta2) * curvature(name)
    return np.clip(s["m"] / (1 - c.beta1**t) / np.maximum(c.sophia.gamma * h, c.epsilon), -1, 1)


def sgd(name, p, g, s, t, c):
    """Sutskever et al. 2013, with the learning rate outside the running sum."""
    s["m"] = c.sgd.momentum * s.get("m", 0) + g
    return g + c.sgd.momentum * s["m"] if c.sgd.nesterov else s["m"]


def rmsprop(name, p, g, s, t, c):
    """Tieleman and Hinton 2012, and centered by arXiv 1308.0850 eq. 38-45, with epsilon outside the root."""
    b = c.rmsprop.decay
    s["v"] = b * s.get("v", 0) + (1 - b) * g**2
    s["mean"] = b * s.get("mean", 0) + (1 - b) * g if c.rmsprop.centered else 0
    s["m"] = c.rmsprop.momentum * s.get("m", 0) + g / (np.sqrt(s["v"] - s["mean"] ** 2) + c.epsilon)
    return s["m"]


def adagrad(name, p, g, s, t, c):
    """Duchi et al. 2011, figure 1, with epsilon outside the root."""
    s["v"] = s.get("v", c.adagrad.initial) + g**2
    return g / (np.sqrt(s["v"]) + c.epsilon)


CASES = [
    (muon, dict(optimizer_muon_adam_learning_rate=0.03)),
    (lion, {}),
    (adagrad, dict(optimizer_adagrad_initial=0.1)),
    (rmsprop, {}),
    (rmsprop, dict(optimizer_rmsprop_momentum=0.8, optimizer_rmsprop_centered=True)),
    (sgd, {}),
    (sgd, dict(optimizer_sgd_momentum=0.8, optimizer_sgd_nesterov=True)),
    (adafactor, {}),
    (sophia, dict(optimizer_sophia_gamma=1.0, optimizer_sophia_hessian_every_steps=2)),
]


@pytest.mark.parametrize(("rule", "changes"), CASES)
def test_optimizer_vs_reference(rule, changes):
    config = config_of(rule.__name__, **changes)
    c = config.optimizer
    start, *gradients = random_leaves(7)
    got, _ = updated(config, nested(start), map(nested, gradients), bowl)
    for leaf, first in start.items():
        p, state = first.astype(np.float64), {}
        hidden = leaf.endswith("kernel") and leaf != "head/kernel"
        peak = PEAK if hidden else c.muon.adam_learning_rate or PEAK
        for t, grads in enumerate(gradients, 1):
            g = grads[leaf].astype(np.float64)
            p -= rate_at(t, peak) * (rule(leaf, p, g, state, t, c) + decay_of(leaf, c) * p)
        np.testing.assert_allclose(flatten_dict(got, sep="/")[leaf], p, rtol=1e-4, atol=1e-5, err_msg=leaf)


def test_schedule_free_vs_reference():
    """arXiv 2405.15682, algorithm 1: y is trained, x is evaluated."""
    config = config_of("schedule_free")
    c = config.optimizer
    start, *gradients = random_leaves(7)
    trained, state = updated(config, nested(start), map(nested, gradients))
    answers = flatten_dict(optim.eval_params(state, trained), sep="/")
    for leaf, first in start.items():
        x = z = y = first.astype(np.float64)
        v = total = 0.0
        for t, grads in enumerate(gradients, 1):
            g = grads[leaf].astype(np.float64)
            v = c.beta2 * v + (1 - c.beta2) * g**2
            direction = g / (np.sqrt(v / (1 - c.beta2**t)) + c.epsilon)
            z = z - rate_at(t) * (direction + decay_of(leaf, c) * y)
            total += rate_at(t) ** 2
            share = rate_at(t) ** 2 / total if total else 0.0
            x = (1 - share) * x + share * z
            y = (1 - c.beta1) * z + c.beta1 * x
        np.testing.assert_allclose(flatten_dict(trained, sep="/")[leaf], y, rtol=1e-4, atol=1e-5, err_msg=leaf)
        np.testing.assert_allclose(answers[leaf], x, rtol=1e-4, atol=1e-5, err_msg=leaf)
        assert np.abs(x - y).max() > 0.01


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_only_schedule_free_has_eval_params(name):
    params = nested(random_leaves(1)[0])
    state = jax.eval_shape(optim.optimizer(config_of(name)).init, params)
    assert optim.has_eval_params(state) == (name == "schedule_free")
    assert name == "schedule_free" or optim.eval_params(state, params) is params


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_stacked_layers_are_updated_as_separate_ones(name):
    """For optimizers whose update of an element depends on others."""
    shapes = {f"block_{i}/{leaf}": shape for i in (0, 1) for leaf, shape in LAYER.items()}
    leaves = random_leaves(4, shapes)
    for tree in leaves:
        tree["block_1/up/kernel"] *= 10
    start, *gradients = map(nested, leaves)
    apart, _ = updated(config_of(name), start, gradients)
    together, _ = updated(config_of(name), stack(start), map(stack, gradients))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), stack(apart), together)


def torch_steps(make, start, gradients):
    """Parameters after steps of a torch optimizer, which `make` builds from a list of parameters."""
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    theirs = {leaf: torch.nn.Parameter(torch.tensor(p)) for leaf, p in start.items()}
    peer = make(torch.optim, list(theirs.values()))
    for grads in gradients:
        for leaf, p in theirs.items():
            p.grad = torch.tensor(grads[leaf])
        peer.step()
    return {leaf: p.detach().numpy() for leaf, p in theirs.items()}


PEERS = {
    "adagrad": (dict(optimizer_epsilon=1e-10), lambda torch, params: torch.Adagrad(params, lr=PEAK)),
    "rmsprop": ({}, lambda torch, params: torch.RMSprop(params, lr=PEAK)),
    "sgd": ({}, lambda torch, params: torch.SGD(params, lr=PEAK, momentum=0.9)),
    "adafactor": ({}, lambda torch, params: torch.Adafactor(params, lr=PEAK, weight_decay=0.0)),
}


@pytest.mark.parametrize("name", PEERS)
def test_optimizer_vs_torch(name):
    changes, make = PEERS[name]
    config = config_of(name, schedule_warmup_steps=0, optimizer_weight_decay=0.0, **changes)
    start, *gradients = random_leaves(6, {"up/kernel": (128, 130), "up/bias": (130,)})
    theirs = torch_steps(make, start, gradients)
    ours, _ = updated(config, nested(start), map(nested, gradients))
    for leaf, p in flatten_dict(ours, sep="/").items():
        np.testing.assert_allclose(p, theirs[leaf], rtol=1e-4, atol=1e-5)


def test_muons_first_step_vs_torch():
    """The first, because torch's mean is not made unbiased; within a few percent, because it computes in bfloat16."""
    config = config_of("muon", schedule_warmup_steps=0)
    start, gradient = random_leaves(2, {"wide/kernel": (16, 40), "tall/kernel": (40, 16)})
    make = lambda torch, params: torch.Muon(params, lr=PEAK, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    theirs = torch_steps(make, start, [gradient])
    ours, _ = updated(config, nested(start), [nested(gradient)])
    for leaf, p in flatten_dict(ours, sep="/").items():
        step = p - start[leaf]
        assert np.linalg.norm(p - theirs[leaf]) < 0.03 * np.linalg.norm(step)
