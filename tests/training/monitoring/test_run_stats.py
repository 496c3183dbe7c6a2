"""Norms of parameters and updates, compared with those of the states before and after."""

import jax
import numpy as np
import pytest
from conftest import tiny_config
from tiny_steps import batch_of, setting

from gptjax.models.stacking import unstack
from gptjax.runs.writers import read_metrics
from gptjax.training import loop
from gptjax.training.monitoring import run_stats
from gptjax.training.step import jit_step, train_step


@pytest.mark.parametrize("scanned", [False, True])
def test_norms_are_those_of_the_states(scanned):
    objective, optimizer, mesh, state = setting(model_scan_layers=scanned)
    step = jit_step(train_step(objective, optimizer, mesh, 0, statistics_every=2), mesh, state)
    states, said = [jax.device_get(state.params)], []
    for _ in range(2):
        state, metrics = step(state, batch_of())
        states.append(jax.device_get(state.params))
        said.append({name: float(x) for name, x in metrics.items() if name.startswith("statistics/")})
    before, after = (unstack(params)["block_1"]["mlp"] for params in states[1:])
    size = np.sqrt(sum(np.sum(x**2) for x in jax.tree.leaves(before)))
    move = np.sqrt(sum(np.sum((x - y) ** 2) for x, y in zip(*map(jax.tree.leaves, (after, before)), strict=True)))
    found = [said[1][f"statistics/block_1/mlp/{name}"] for name in run_stats.NAMES]
    np.testing.assert_allclose(found, [size, move, move / size], rtol=1e-3)
    assert set(said[0].values()) == {0.0}, "nothing is computed at the first"
    groups = {name.removeprefix("statistics/").rpartition("/")[0] for name in said[0]}
    parts = {f"block_{i}/{part}" for i in range(2) for part in ("attention", "attention_norm", "mlp", "mlp_norm")}
    assert groups == parts | {"tokens", "positions", "final_norm"}


def test_lines_have_statistics_when_they_are_due(tmp_path, text_file):
    loop.train(tiny_config(data_path=text_file, log_statistics=4), tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "statistics/tokens/ratio" in line] == [4, 8]
    assert len(lines) == 4 and not any(name.startswith("train/statistics") for line in lines for name in line)
    assert 0 < lines[-1]["statistics/block_0/mlp/ratio"] < 1
