"""Merging of models against NumPy, and the command."""

import json

import jax
import numpy as np
import pytest
from conftest import tiny_config

import gptjax
from gptjax import merge
from gptjax.finetune import merging, paths


def trees(count, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {"a": {"kernel": rng.normal(size=(4, 5)).astype("f")}, "b": rng.normal(size=7).astype("f")}
        for _ in range(count)
    ]


def whole(tree):
    return np.concatenate([np.asarray(leaf, np.float64).ravel() for leaf in jax.tree.leaves(tree)])


def test_mean_and_arithmetic_vs_reference():
    base, *models = trees(4)
    np.testing.assert_allclose(whole(merging.mean(models)), np.mean([whole(m) for m in models], 0), rtol=1e-5)
    wanted = whole(base) + 0.4 * sum(whole(m) - whole(base) for m in models)
    np.testing.assert_allclose(whole(merging.task_arithmetic(base, models, 0.4)), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kept", [0.2, 0.5, 1.0])
def test_ties_vs_reference(kept):
    base, *models = trees(4, seed=1)
    vectors = []
    for model in models:
        vector = whole(model) - whole(base)
        least = np.sort(np.abs(vector))[-max(round(kept * len(vector)), 1)]
        vectors.append(np.where(np.abs(vector) >= least, vector, 0))
    wanted = []
    for numbers in np.stack(vectors, 1):
        sign = np.sign(numbers.sum())
        own = [n for n in numbers if n != 0 and np.sign(n) == sign]
        wanted.append(np.mean(own) if own else 0.0)
    found = whole(merging.ties(base, models, 0.7, kept))
    np.testing.assert_allclose(found, whole(base) + 0.7 * np.array(wanted), rtol=1e-4, atol=1e-5)


def test_arithmetic_of_one_task():
    base, model = trees(2)
    np.testing.assert_allclose(whole(merging.task_arithmetic(base, [model])), whole(model), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole(merging.ties(base, [model], 1.0, 1.0)), whole(model), rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_merge_command(call, trained, text_file, tmp_path):
    from gptjax.training import loop

    steps = [gptjax.load(trained, step).params for step in (4, 8)]
    done = call(merge, "--runs", f"{trained}@4", trained, f"--to={tmp_path / 'mean'}", "--json")
    assert json.loads(done.out)["how"] == "mean", done.err
    found = gptjax.load(tmp_path / "mean")
    for path, leaf in paths.flat(found.params).items():
        np.testing.assert_allclose(leaf, (paths.flat(steps[0])[path] + paths.flat(steps[1])[path]) / 2, atol=1e-6)
    assert found.generate("the ", temperature=0.0, max_tokens=3).text
    out = f"--to={tmp_path / 'x'}"
    assert "need --base=RUN" in call(merge, "--runs", trained, "--method=ties", out).refusal()
    assert "after @ comes a step" in call(merge, "--runs", f"{trained}@last", out).refusal()
    assert "--density is 2.0" in call(merge, "--runs", trained, "--density=2", out).refusal()
    loop.train(tiny_config(data_path=text_file, model_width=8, train_steps=1), tmp_path / "other")
    assert "has other shapes than" in call(merge, "--runs", trained, tmp_path / "other", out).refusal()
    assert "exists; give another --to" in call(merge, "--runs", trained, f"--to={trained}").refusal()
    assert not (tmp_path / "x").exists()
