"""Cost of a step: FLOPs against the formula, measured times that sum to the step, and operation names."""

import json

import jax
import jax.numpy as jnp
import pytest
from conftest import BASE, overrides, plan, tiny_config

from gptjax.planning import costs
from gptjax.training.monitoring import metrics

TOKENS = 4 * 16  # of the tiny recipe's batch


def table(**changes):
    return {row["part"]: row for row in costs.rows(costs.plan(tiny_config(**changes)))}


@pytest.mark.parametrize("kernels", ["plain", "cpu"])
def test_flops_and_parameters_of_each_part_follow_the_formula(kernels):
    D, T, V, L = 16, 16, 257, 2
    rows = table(model_kernels=kernels)
    assert list(rows) == [
        "tokens", "positions", "block_0 attention", "block_0 mlp", "block_0 norms & residual",
        "block_1 attention", "block_1 mlp", "block_1 norms & residual", "final_norm", "head", "total",
    ]  # fmt: skip
    gflop = {name: round(row["gflop"] * 1e9) for name, row in rows.items()}
    for block in ("block_0", "block_1"):
        assert gflop[f"{block} attention"] == TOKENS * (6 * 4 * D * D + 12 * D * T)
        assert gflop[f"{block} mlp"] == TOKENS * 6 * 8 * D * D
        assert rows[f"{block} mlp"]["parameters"] == 8 * D * D
        assert rows[f"{block} norms & residual"]["parameters"] == 2 * D
    assert gflop["head"] == TOKENS * 6 * V * D and rows["head"]["parameters"] == 0
    assert rows["tokens"]["parameters"] == V * D and gflop["tokens"] == 0
    # The means of a norm are products too, with a vector of constants, on a CPU.
    means = sum(flops for name, flops in gflop.items() if "norm" in name)
    assert (means > 0) == (kernels == "cpu")
    norms = (2 * L + 1) * D
    found = costs.plan(tiny_config())
    by_convention = metrics.flops_per_token(found.params, found.config.model, T)
    assert gflop["total"] - means == TOKENS * (by_convention - 6 * norms)
    assert rows["total"]["parameters"] == V * D + T * D + L * 12 * D * D + norms


@pytest.mark.parametrize(
    "changes",
    [dict(model_scan_layers=True), dict(train_grad_accumulation=2), dict(model_positions="rotary", model_dropout=0.1)],
)
def test_what_is_scanned_counts_as_often_as_it_runs(changes):
    assert table(**changes)["total"]["gflop"] == table()["total"]["gflop"]


def test_recomputation_counts():
    plain, again = table(), table(model_remat="full")
    assert again["block_0 attention"]["gflop"] > 1.2 * plain["block_0 attention"]["gflop"]
    assert again["head"]["gflop"] == plain["head"]["gflop"]


def test_of_a_mixture_the_chosen_experts_count():
    D, F, E, k = 16, 64, 4, 2
    rows = table(model_mlp="experts", model_experts=E, model_experts_per_token=k)
    assert round(rows["block_1 mlp"]["gflop"] * 1e9) == TOKENS * (6 * k * 2 * D * F + 6 * D * E)


LARGER = dict(model_width=64, model_heads=2, model_context=64)  # so that operations last longer than their events


def measured(call, *arguments, **changes):
    result = call(plan, f"--config={BASE}", *overrides(**LARGER | changes), "--measure", "--steps=3", *arguments)
    assert result.code == 0, result.err
    return result


@pytest.mark.slow
def test_measured_times_add_up_and_no_part_is_without(call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = measured(call, "--json", data_path="absent.txt")
    *rows, total = [json.loads(line) for line in result.out.splitlines()]
    assert total["part"] == "total" and total["mfu"] is None and "6N + 12" in total["mfu_convention"]
    assert sum(row["forward_ms"] + row["backward_ms"] for row in rows) == pytest.approx(total["step_ms"])
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert total["tokens_per_second"] == pytest.approx(4 * 64 / total["step_ms"] * 1e3)
    by_part = {row["part"]: row for row in rows}
    for block in ("block_0", "block_1"):
        for part in ("attention", "mlp", "norms & residual"):
            row = by_part[f"{block} {part}"]
            assert row["forward_ms"] > 0 and row["backward_ms"] > 0
    mlp = by_part["block_0 mlp"]
    seconds = (mlp["forward_ms"] + mlp["backward_ms"]) / 1e3
    assert mlp["gflop_per_second"] == pytest.approx(mlp["gflop"] / seconds)
    assert by_part["loss"]["forward_ms"] > 0  # which makes the gradient too
    assert by_part["optimizer"]["forward_ms"] > 0 and by_part["optimizer"]["backward_ms"] == 0
    assert by_part["everything else"]["share"] < 0.05
    assert not list(tmp_path.iterdir()), "no run is written"


@pytest.mark.slow
def test_a_scanned_model_has_one_set_of_rows_and_a_known_device_an_mfu(call, monkeypatch):
    monkeypatch.setitem(metrics.PEAK_FLOPS, "cpu", 1e12)
    out = measured(call, model_scan_layers=True, train_grad_accumulation=2).out
    for part in ("attention", "mlp", "norms & residual"):
        (line,) = [line for line in out.splitlines() if line.startswith(f"blocks (x 2) {part} ")]
        assert float(line.split()[-3 if part.startswith("norms") else -4]) > 0
    assert "block_0" not in out and "accumulation" in out and "between blocks" in out
    rate = float(out.split(" ms a step, ")[1].split(" tokens/s")[0].replace(",", ""))
    found = costs.plan(tiny_config(**LARGER))
    mfu = rate * metrics.flops_per_token(found.params, found.config.model, 64) / 1e12
    assert f"mfu {mfu:.1%} (6N + 12*L*D*T" in out


def test_a_cached_program_of_other_names_is_not_used():
    def named(name):
        def f(x, y):
            with jax.named_scope(name):
                return jnp.sin(x) @ y

        return costs.compile_with_names(jax.jit(f), jnp.ones((3, 3)), jnp.ones((3, 3))).as_text()

    assert "/first/" in named("first")
    assert "/second/" in named("second")
    assert not jax.config.jax_compilation_cache_include_metadata_in_key


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--steps=3"], "--steps must be at least 1, and needs --measure"),
        (["--measure", "--steps=0"], "--steps must be at least 1"),
        (["--measure", "--config.data.tokenizer=chars"], "'chars' depends on the text; give --config.model.vocab"),
        (["--config.data.tokenizer=bert"], "unknown tokenizer 'bert'"),
        (["--config.model.vocabulary=100"], "model.vocabulary=100 is smaller than the tokenizer's 4096 (bpe:4096)"),
        (["--config.model.heads=5"], "model.heads=5 does not divide model.width=128"),
        (["--config.init_from=nowhere"], "nowhere is not a run: it has no config.json"),
        (["--config.init_from=hf:gpt2"], "a plan needs a run, but init_from=hf:gpt2: python -m gptjax.convert"),
    ],
)
def test_refusals(call, flags, expected):
    assert expected in call(plan, f"--config={BASE}", *flags).refusal()


def test_a_run_that_begins_with_another_has_its_model(trained, call):
    out = call(plan, f"--config={BASE}", f"--config.init_from={trained}", "--json").out
    assert json.loads(out.splitlines()[-1])["parameters"] == table()["total"]["parameters"]
