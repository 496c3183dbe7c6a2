"""Population-based training compared with NumPy, and a population that evolves, also when interrupted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BASE, overrides

import gptjax
from gptjax.config.errors import ConfigError
from gptjax.runs import config as configs
from gptjax.training import loop
from gptjax.training.population import evolution
from gptjax.training.population.evolution import Evolution


def test_selection_vs_rules():
    """The worst fifth copies states of the best fifth, with its values times 0.8 or 1.2; the others do not change."""
    M = 10
    rng = np.random.default_rng(0)
    losses, rates = rng.random(M).astype("f"), rng.random(M).astype("f")
    losses[3] = np.nan
    values = {"optimizer.learning_rate": jnp.array(rates), "seed": jnp.arange(M, dtype=jnp.uint32)}
    states = {"w": jnp.arange(M * 3.0).reshape(M, 3)}
    now, moved, source = evolution.exploit_and_explore(
        Evolution(5), jax.random.key(0), jnp.array(losses), values, states
    )
    order = np.argsort(np.where(np.isnan(losses), np.inf, losses))
    best, worst = set(order[:2].tolist()), set(order[-2:].tolist())
    assert 3 in worst
    for m in range(M):
        at = int(source[m])
        assert (at in best) if m in worst else at == m
        np.testing.assert_array_equal(moved["w"][m], states["w"][at])
        ratio = float(now["optimizer.learning_rate"][m]) / rates[at]
        expected = (0.8, 1.2) if m in worst else (1.0,)
        assert any(ratio == pytest.approx(one, rel=1e-5) for one in expected)
    np.testing.assert_array_equal(now["seed"], np.arange(M))


def test_betas_stay_below_one():
    values = {"optimizer.beta2": jnp.full(5, 0.99)}
    for seed in range(8):
        now, _, _ = evolution.exploit_and_explore(Evolution(1), jax.random.key(seed), jnp.arange(5.0), values, {})
        assert float(now["optimizer.beta2"].max()) < 1


@pytest.mark.parametrize(
    ("changes", "values", "said"),
    [
        (dict(every_steps=0), {"optimizer.learning_rate": 0}, "1 or more"),
        (dict(share=0.9), {"optimizer.learning_rate": 0}, "up to 0.5"),
        ({}, {"seed": 0}, "sweep a key"),
    ],
)
def test_bad_evolution(changes, values, said):
    with pytest.raises(ConfigError, match=said):
        evolution.check(Evolution(**{"every_steps": 5} | changes), values, 4)


@pytest.mark.slow
def test_a_population_evolves_and_resumes(text_file, tmp_path):
    """A bad rate is replaced by a good one; interrupted after a selection, the results are the same."""
    flags = overrides(
        data_path=text_file, train_steps=12, log_every_steps=1, checkpoint_every_steps=3, eval_every_steps=6
    )
    made = [configs.read(BASE, [*flags, f"--config.optimizer.learning_rate={rate}"]) for rate in (1e-2, 8e-3, 1e-7)]
    where = [tmp_path / str(m) for m in range(3)]

    class Killed(Exception):
        pass

    def kill(member, line):
        if line["step"] == 8:
            raise Killed

    with pytest.raises(Killed):
        loop.train_population(made, where, kill, evolution=Evolution(5))
    loop.train_population(made, where, evolution=Evolution(5))
    whole = [tmp_path / f"whole-{m}" for m in range(3)]
    summaries = loop.train_population(made, whole, evolution=Evolution(5))
    for one, other in zip(where, whole, strict=True):
        jax.tree.map(np.testing.assert_array_equal, gptjax.load(one).params, gptjax.load(other).params)
    assert evolution.lines(whole[2])[0]["step"] == 5
    alone = loop.train_population(made, [tmp_path / f"alone-{m}" for m in range(3)])
    assert summaries[2]["val_loss"] < alone[2]["val_loss"] - 0.1
