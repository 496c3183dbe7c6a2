"""Quantization of a frozen base: qwix's values against NumPy, bytes, and runs that train, resume and load."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BASE, ROOT, overrides, plan, tiny_config, train

import gptjax
from gptjax import convert, optim, sharding
from gptjax.config.errors import ConfigError
from gptjax.finetune import methods, paths, quantization
from gptjax.objectives.causal import causal
from gptjax.runs import adapters
from gptjax.runs.checkpoints import Checkpoints
from gptjax.runs.train_state import init_from_base
from gptjax.training import loop
from gptjax.training.step import jit_step, train_step

pytest.importorskip("qwix", reason="the quant extra is not installed")
HOWS = ("int8", "nf4")
# arXiv 2305.14314, appendix E.
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def kernel(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("f")


def one(x, how):
    """A quantized matrix, and its dequantized values."""
    kept = quantization.quantize({"up": {"kernel": jnp.asarray(x)}}, how)
    return kept["up"]["kernel"], np.asarray(quantization.dequantize(kept)["up"]["kernel"])


@pytest.mark.parametrize("shape", [(128, 5), (3, 16, 6), (2, 3, 8, 4)])
def test_int8_vs_reference(shape):
    x = kernel(*shape)
    kept, back = one(x, "int8")
    scale = np.abs(x).max(-2, keepdims=True) / np.float32(127)
    whole = np.rint(x / scale)
    assert kept.qvalue.dtype == jnp.int8 and kept.scale.shape == scale.shape
    np.testing.assert_array_equal(kept.qvalue, whole)
    np.testing.assert_allclose(back, whole * scale, rtol=1e-6)
    assert np.abs(back - x).max() <= scale.max() * 0.51


@pytest.mark.parametrize(("shape", "block"), [((128, 5), 64), ((3, 192, 6), 64), ((100, 4), 50), ((67, 2), 67)])
def test_nf4_vs_reference(shape, block):
    x = kernel(*shape)
    kept, back = one(x, "nf4")
    *leading, D, F = shape
    blocks = x.reshape(*leading, D // block, block, F)
    scale = np.abs(blocks).max(-2, keepdims=True)
    index = np.abs(LEVELS - (blocks / scale)[..., None]).argmin(-1)
    assert kept.pairs.dtype == jnp.uint8 and kept.pairs.shape == (*leading, (D + 1) // 2, F)
    assert kept.scale.shape == (*leading, D // block, F)
    np.testing.assert_array_equal(quantization.unpack(kept).qvalue, index.reshape(shape))
    np.testing.assert_array_equal(back, (LEVELS[index] * scale).reshape(shape))


def test_blocks_divide_columns():
    assert {rows: quantization.block_size(rows) for rows in (8, 16, 48, 64, 768, 1000, 1018)} == {
        8: 8, 16: 16, 48: 48, 64: 64, 768: 64, 1000: 50, 1018: 1018,
    }  # fmt: skip


@pytest.mark.parametrize(("how", "share"), [("int8", 1 / 4 + 1 / 768), ("nf4", 1 / 8 + 1 / 64)])
def test_the_bytes_at_rest(how, share):
    """Including XLA's layout of them."""
    tree = {"block_0": {"up": {"kernel": kernel(768, 512)}}}
    kept = quantization.quantize(tree, how)
    held = jax.jit(lambda tree: tree).lower(kept).compile().memory_analysis().argument_size_in_bytes
    counted = sum(leaf.nbytes for leaf in jax.tree.leaves(kept))
    assert held / (768 * 512 * 4) == pytest.approx(share, rel=1e-3)
    assert counted == pytest.approx(held, rel=1e-3)


def qlora(trained, text_file, how, **changes):
    settings = dict(data_path=text_file, finetune_method="lora", finetune_rank=2, finetune_quantise=how)
    config = tiny_config(**settings | changes)
    with config.unlocked():
        config.init_from = str(trained)
    return config


@pytest.fixture(scope="module")
def tuned(trained, text_file, tmp_path_factory):
    """`tuned(how)`: (the directory of a run, the parameters that it ended with), made once."""
    made = {}

    def run(how):
        if how not in made:
            made[how] = ended(qlora(trained, text_file, how), tmp_path_factory.mktemp("tuned") / "run")
        return made[how]

    return run


def ended(config, workdir):
    """A run, and all parameters that it ends with."""
    found = []
    with pytest.MonkeyPatch.context() as patch:
        finish = loop.finish
        patch.setattr(
            loop, "finish", lambda population, state, done: found.append(state) or finish(population, state, done)
        )
        loop.train(config, workdir)
    return workdir, jax.device_get(found[0].eval_params())


def equal(a, b):
    assert paths.flat(a).keys() == paths.flat(b).keys()
    for path, leaf in paths.flat(a).items():
        np.testing.assert_array_equal(leaf, paths.flat(b)[path], err_msg=path)


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
def test_only_hidden_matrices_are_quantized_and_stay_frozen(how, trained):
    base = gptjax.load(trained)
    config = qlora(trained, "", how, schedule_name="constant").copy_and_resolve_references()
    config.model = base.config.model
    model, optimizer, mesh = methods.build_model(config), optim.optimizer(config), sharding.make_mesh()
    there = sharding.replicated(mesh)
    state = jax.jit(lambda base: init_from_base(base, model, optimizer, config), out_shardings=there)(base.params)
    leaves = paths.flat(state.frozen)
    of_few = {path for path, leaf in leaves.items() if not isinstance(leaf, jax.Array)}
    inside = ("attention/out", "attention/qkv", "mlp/down", "mlp/up")
    assert of_few == {f"block_{i}/{name}/kernel" for i in (0, 1) for name in inside}
    assert {path.rsplit("/")[-1] for path in leaves.keys() - of_few} == {"embedding", "scale"}
    first, before = jax.device_get((state.frozen, state.params))
    ids = np.random.default_rng(0).integers(0, 9, (4, 17))
    batch = {"inputs_BT": ids[:, :-1], "targets_BT": ids[:, 1:], "weights_BT": np.ones((4, 16), "f")}
    step, losses = jit_step(train_step(causal(model), optimizer, mesh, 0), mesh, state), []
    for _ in range(12):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    jax.tree.map(np.testing.assert_array_equal, state.frozen, first)
    assert not np.array_equal(*(paths.flat(tree)["block_0/mlp/up/lora_b"] for tree in (state.params, before)))
    assert losses[-1] < losses[0] - 0.02


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
def test_loaded_parameters_are_those_of_training(how, tuned, trained):
    workdir, params = tuned(how)
    run, base = gptjax.load(workdir), gptjax.load(trained)
    equal(run.params, params)
    ids = np.arange(10)[None]
    np.testing.assert_array_equal(run.logits(ids), dataclasses.replace(run, params=params).logits(ids))
    there, now = paths.flat(base.params), paths.flat(run.params)
    changed = {path for path in there if not np.array_equal(there[path], now[path])}
    assert changed == {path for path in there if quantization.is_quantizable(path)}
    for path in changed:
        np.testing.assert_array_equal(now[path], one(there[path], how)[1])


@pytest.mark.slow
def test_interrupted_run_resumes_exactly(tuned, trained, text_file, tmp_path):
    def stop(line):
        if line["step"] == 6:
            raise KeyboardInterrupt

    config = qlora(trained, text_file, "nf4")
    with pytest.raises(KeyboardInterrupt):
        loop.train(config, tmp_path / "run", on_line=stop)
    assert Checkpoints(tmp_path / "run").latest() == 4
    equal(ended(config, tmp_path / "run")[1], tuned("nf4")[1])


@pytest.mark.slow
@pytest.mark.parametrize("how", HOWS)
def test_adapter_records_the_quantization_of_its_base(how, tuned, trained, tmp_path):
    run, base, ids = gptjax.load(tuned(how)[0]), gptjax.load(trained), np.arange(10)[None]
    facts = adapters.save(run, tmp_path / "adapter")
    assert facts["parameters"] == sum(leaf.size for path, leaf in paths.flat(run.params).items() if "lora_" in path)
    taken = adapters.load(base, tmp_path / "adapter")
    equal(taken.params, run.params)
    np.testing.assert_array_equal(taken.logits(ids), run.logits(ids))
    assert taken.params["tokens"]["embedding"] is base.params["tokens"]["embedding"]


def test_merged_run_gives_the_same_outputs(call, tuned, tmp_path):
    workdir, _ = tuned("nf4")
    assert call(convert, f"--from={workdir}", f"--to={tmp_path / 'merged'}", "--merge").code == 0
    ids = np.arange(10)[None]
    there = gptjax.load(tmp_path / "merged").logits(ids)
    np.testing.assert_allclose(there, gptjax.load(workdir).logits(ids), atol=1e-5)


@pytest.mark.slow
def test_plans_count_the_same_parameters_in_fewer_bytes(call, trained, text_file):
    asked = (plan, f"--config={BASE}", f"--config.init_from={trained}", "--config.finetune.method=lora", "--json")
    asked += ("--mesh=data=1", "--chip=h100")
    plain, small = (json.loads(call(*asked, f"--config.finetune.quantise={how}").out) for how in ("none", "nf4"))
    assert small["parameters"] == plain["parameters"]
    assert small["memory"]["parameters"] < plain["memory"]["parameters"]


@pytest.mark.slow
def test_sharded_run_is_the_same(tuned, trained, text_file, tmp_path):
    """Columns and rows of matrices sharded over four of eight devices."""
    flags = [flag for flag in overrides(data_path=text_file) if "model." not in flag and "tokenizer" not in flag]
    flags += [f"--config.init_from={trained}", "--config.finetune.method=lora", "--config.finetune.rank=2"]
    flags += [
        "--config.finetune.quantise=nf4",
        "--config.mesh.data=1",
        "--config.mesh.fsdp=2",
        "--config.mesh.tensor=2",
    ]
    command = [sys.executable, "-m", "gptjax.train", f"--config={BASE}", f"--workdir={tmp_path / 'run'}", *flags]
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "donated" not in done.stderr
    there, here = (paths.flat(gptjax.load(workdir).params) for workdir in (tmp_path / "run", tuned("nf4")[0]))
    for path, leaf in here.items():
        if "lora_" in path:
            np.testing.assert_allclose(there[path], leaf, atol=2e-3, err_msg=path)
        else:
            np.testing.assert_array_equal(there[path], leaf, err_msg=path)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["finetune.quantise=nf5", "finetune.method=lora"], "finetune.quantise has no choice 'nf5'; did you mean nf4?"),
        (
            ["finetune.quantise=nf4"],
            "is for methods that add to a frozen base, such as lora; with finetune.method=full",
        ),
        (["finetune.quantise=nf4", "finetune.method=top"], "with finetune.method=top leave it out"),
    ],
)
def test_invalid_config_is_refused_in_one_line(call, trained, text_file, tmp_path, flags, told):
    own = [flag for flag in overrides(data_path=text_file) if "model." not in flag and "tokenizer" not in flag]
    own += [f"--config.{flag}" for flag in (*flags, f"init_from={trained}")]
    assert told in call(train, f"--config={BASE}", f"--workdir={tmp_path / 'run'}", *own).refusal()
    assert not (tmp_path / "run").exists()


def test_missing_qwix_is_one_line(call, tuned, trained, text_file, tmp_path, monkeypatch):
    workdir = tuned("nf4")[0]
    monkeypatch.setitem(sys.modules, "qwix", None)
    own = [flag for flag in overrides(data_path=text_file) if "model." not in flag and "tokenizer" not in flag]
    own += [f"--config.init_from={trained}", "--config.finetune.method=lora", "--config.finetune.quantise=nf4"]
    told = "finetune.quantise=nf4 needs qwix: pip install 'gptjax[quant]'"
    assert call(train, f"--config={BASE}", f"--workdir={tmp_path / 'run'}", *own).refusal() == told
    assert not (tmp_path / "run").exists()
    quantization._round_trip.cache_clear()
    with pytest.raises(ConfigError, match="needs qwix"):
        gptjax.load(workdir)
