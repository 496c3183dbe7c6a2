"""Elastic weight consolidation: the Fisher information against references, the penalty, and whole runs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BASE, overrides, tiny_config, train
from safetensors.numpy import load_file

import gptjax
from gptjax import data, models, objectives
from gptjax.core import rng
from gptjax.finetune import fisher, paths
from gptjax.optim import update_rules
from gptjax.runs import directory as workdirs
from gptjax.training import ewc, loop

ROWS = 6


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def linear(params, batch, rng):
    """A linear softmax's loss, summed by weight."""
    logp_BTV = jax.nn.log_softmax(batch["x_BTD"] @ params["kernel"])
    said_BT = jnp.take_along_axis(logp_BTV, batch["y_BT"][..., None], -1)[..., 0]
    return -(batch["weights_BT"] * said_BT).sum(), {}


def test_fisher_of_a_linear_softmax_vs_numpy():
    rng, (B, T, D, V) = np.random.default_rng(0), (7, 3, 4, 5)
    w_DV, x_BTD = rng.normal(size=(D, V)), rng.normal(size=(B, T, D))
    y_BT, weights_BT = rng.integers(V, size=(B, T)), rng.integers(2, size=(B, T)).astype("f")
    error_BTV = weights_BT[..., None] * (softmax(x_BTD @ w_DV) - np.eye(V)[y_BT])
    grads_BDV = np.einsum("btd,btv->bdv", x_BTD, error_BTV)
    arrays = {"x_BTD": x_BTD.astype("f"), "y_BT": y_BT, "weights_BT": weights_BT}
    cut = [{name: x[part] for name, x in arrays.items()} for part in (slice(0, 4), slice(4, 7))]
    seen = []
    found = fisher.diagonal(linear, {"kernel": w_DV.astype("f")}, cut, advance=seen.append)
    np.testing.assert_allclose(found["kernel"], (grads_BDV**2).mean(0), rtol=1e-4)
    assert seen == [4, 3]
    with pytest.raises(ValueError, match="no rows"):
        fisher.diagonal(linear, {"kernel": w_DV.astype("f")}, [])


def by_hand(origin, count=ROWS, params=None, seed=0):
    """The mean over single rows of a run's text of the squared gradient, by path."""
    run = gptjax.load(origin)
    loaded = data.load(run.config.data, run.tokenizer)
    rows = loaded.rows(run.config.data, rng.integer(seed, "finetune"))(data.TEXT, run.config.data.context)
    model = models.build(run.config.model)
    grad = jax.jit(jax.grad(lambda params, row: objectives.loss(run.config, model)(params, row, None)[0]))
    total = None
    for index in range(count):
        row = {name: value[None] for name, value in rows[index].items()}
        squares = jax.tree.map(jnp.square, grad(run.params if params is None else params, row))
        total = squares if total is None else jax.tree.map(jnp.add, total, squares)
    return {path: np.asarray(leaf) / count for path, leaf in paths.flat(total).items()}


def test_ewc_is_the_gradient_of_its_penalty():
    rng = np.random.default_rng(1)
    draw = lambda: {"a": {"kernel": jnp.asarray(rng.normal(size=(2, 3)), jnp.float32)}, "b": jnp.ones(2)}
    start, now, grads = draw(), draw(), draw()
    known = {"a/kernel": jnp.asarray(rng.uniform(size=(2, 3)), jnp.float32)}  # nothing of b

    def penalty(params):
        return 0.3 / 2 * (known["a/kernel"] * (params["a"]["kernel"] - start["a"]["kernel"]) ** 2).sum()

    pull = update_rules.ewc(0.3)
    state = update_rules.with_fisher((pull.init(start), "of another"), known)
    assert state[1] == "of another"
    out, after = pull.update(grads, state[0], now)
    wanted = jax.tree.map(jnp.add, grads, jax.grad(penalty)(now))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5), out, wanted)
    assert after is state[0]


@pytest.fixture(scope="module")
def other_text(text_file, tmp_path_factory):
    """A text of the same letters in another order."""
    path = tmp_path_factory.mktemp("text") / "other.txt"
    path.write_text("\n".join(line[::-1] for line in text_file.read_text().splitlines()))
    return path


@pytest.fixture(scope="module")
def tune(trained, other_text, tmp_path_factory):
    """`tune(origin, key=value...)`: the directory of a run tuned from another, made once."""
    made = {}

    def run(origin=trained, **changes):
        name = str((origin, sorted(changes.items())))
        if name not in made:
            made[name] = tmp_path_factory.mktemp("tuned") / "run"
            loop.train(config_of(origin, other_text, **changes), made[name])
        return made[name]

    return run


def config_of(origin, text, **changes):
    keys = {"finetune_fisher_rows": ROWS, "finetune_rank": 2, "optimizer_learning_rate": 1e-2} | changes
    config = tiny_config(data_path=text, **keys)
    with config.unlocked():
        config.init_from = str(origin)
    return config


def read(workdir):
    return load_file(workdir / ewc.FISHER)


def same(found, wanted):
    assert found.keys() == wanted.keys()
    for path, leaf in wanted.items():
        np.testing.assert_allclose(found[path], leaf, rtol=1e-3, atol=1e-5 * leaf.max(), err_msg=path)


@pytest.mark.slow
def test_fisher_is_estimated_on_the_text_of_the_base(tune, trained):
    same(read(tune(finetune_ewc=1.0)), by_hand(trained))
    assert not (tune() / ewc.FISHER).exists()


@pytest.mark.slow
def test_important_parameters_move_less(tune, trained):
    start, matters = paths.flat(gptjax.load(trained).params), by_hand(trained)
    among = np.concatenate([matters[path].ravel() for path in start])
    least, most = among <= np.quantile(among, 0.1), among >= np.quantile(among, 0.9)

    def moved(**changes):
        now = paths.flat(gptjax.load(tune(train_steps=30, optimizer_weight_decay=0.0, **changes)).params)
        by = np.concatenate([np.abs(np.asarray(now[path] - start[path])).ravel() for path in start])
        return by[most].mean(), by[least].mean()

    (held, aside), (free, freely) = moved(finetune_ewc=1e4), moved()
    assert held < free / 10 and aside > freely / 2, (held, free, aside, freely)


@pytest.mark.slow
def test_interrupted_run_resumes_exactly_with_its_estimate(tune, trained, other_text, tmp_path, monkeypatch):
    whole = paths.flat(gptjax.load(tune(finetune_ewc=100.0)).params)

    class Cut(Exception):
        pass

    def stop(line):
        if line["step"] == 6:
            raise Cut

    config = config_of(trained, other_text, finetune_ewc=100.0)
    with pytest.raises(Cut):
        loop.train(config, tmp_path / "run", on_line=stop)
    monkeypatch.setattr(fisher, "diagonal", None)
    loop.train(config, tmp_path / "run")
    for path, leaf in paths.flat(gptjax.load(tmp_path / "run").params).items():
        np.testing.assert_array_equal(leaf, whole[path])


@pytest.mark.slow
def test_fisher_of_the_base_is_added_in_any_layout(tune, trained):
    first = tune(finetune_ewc=1.0)
    wanted = {path: leaf + read(first)[path] for path, leaf in by_hand(first).items()}
    same(read(tune(first, finetune_ewc=1.0)), wanted)
    stacked = read(tune(first, finetune_ewc=1.0, model_scan_layers=True, train_steps=2))
    for name in ("attention/qkv/kernel", "mlp/up/kernel"):
        both = np.stack([wanted[f"block_{i}/{name}"] for i in range(2)])
        np.testing.assert_allclose(stacked[f"blocks/{name}"], both, rtol=1e-3, atol=1e-5 * both.max())


@pytest.mark.slow
def test_fisher_of_scalars(tune, text_file, tmp_path):
    base = tmp_path / "base"
    loop.train(tiny_config(data_path=text_file, model_value_residual=True), base)
    first = tune(base, finetune_ewc=1.0, train_steps=2, model_value_residual=True)
    after = read(tune(first, finetune_ewc=1.0, train_steps=2, model_value_residual=True))
    for path, leaf in paths.flat(gptjax.load(base).params).items():
        assert read(first)[path].shape == after[path].shape == leaf.shape, path


@pytest.mark.slow
def test_fisher_covers_trained_parameters_of_the_base_only(tune, trained):
    wanted = by_hand(trained)
    own = {path: leaf for path, leaf in wanted.items() if path.startswith(("block_1/", "final_norm/"))}
    same(read(tune(finetune_ewc=1.0, finetune_method="top", finetune_top_layers=1)), own)
    also = read(tune(finetune_ewc=1.0, finetune_method="lora", finetune_also="final_norm"))
    same(also, {"final_norm/scale": wanted["final_norm/scale"]})
    rule = tune(finetune_ewc=1.0, finetune_method="rule", finetune_rule="block_0/mlp")
    same(read(rule), {path: leaf for path, leaf in wanted.items() if path.startswith("block_0/mlp")})
    assert read(tune(finetune_ewc=1.0, finetune_method="lora")) == {}
    # What a part had to remember is remembered by all of it.
    after = read(tune(rule, finetune_ewc=1.0, train_steps=2))
    same(after, {path: leaf + read(rule).get(path, 0) for path, leaf in by_hand(rule).items()})


@pytest.mark.thorough
@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["finetune.ewc=1.0"], "uses the text of another run; give --config.init_from=RUN"),
        (["finetune.fisher_rows=0"], "finetune.fisher_rows is 0; it must be at least 1"),
        (["finetune.ewc=1.0", "init_from=IMPORTED"], "was imported or merged and has none"),
        (["finetune.ewc=1.0", "init_from=CHANGED"], "was trained on has changed since"),
    ],
)
def test_invalid_config_is_refused_in_one_line(call, trained, text_file, tmp_path, flags, told):
    own = tmp_path / "own.txt"
    own.write_text(text_file.read_text())
    changed, imported = tmp_path / "changed", tmp_path / "imported"
    if "CHANGED" in flags[-1]:
        loop.train(tiny_config(data_path=own, train_steps=1), changed)
        own.write_text(own.read_text().upper())
    if "IMPORTED" in flags[-1]:
        run = gptjax.load(trained)
        facts = {"fingerprints": None, "imported": "hf:somewhere"}
        workdirs.create(imported, run.config, run.tokenizer, facts)
    flags = [f"--config.{flag}".replace("CHANGED", str(changed)).replace("IMPORTED", str(imported)) for flag in flags]
    plain = [flag for flag in overrides(data_path=text_file) if "model." not in flag and "tokenizer" not in flag]
    assert told in call(train, f"--config={BASE}", f"--workdir={tmp_path / 'run'}", *plain, *flags).refusal()
    assert not (tmp_path / "run").exists()
