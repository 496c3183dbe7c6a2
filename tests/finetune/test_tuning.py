"""Fine-tuning runs: what they train, save and load; adapters as folders; invalid configs."""

import json

import jax
import numpy as np
import pytest
from conftest import BASE, overrides, plan, tiny_config, train

import gptjax
from gptjax import convert, models, optim
from gptjax.config.errors import CheckpointError, ConfigError, DataError
from gptjax.core import rng
from gptjax.finetune import methods, paths
from gptjax.runs import adapters, pretrained
from gptjax.runs.checkpoints import Checkpoints
from gptjax.runs.train_state import init_from_base


def from_run(origin, **changes):
    """The tiny recipe of a run tuned from another."""
    config = tiny_config(**changes)
    with config.unlocked():
        config.init_from = str(origin)
    return config


@pytest.fixture(scope="module")
def tune(trained, text_file, tmp_path_factory):
    """`tune(method, key=value...)`: the directory of a run tuned from the tiny one, made once."""
    made = {}

    def run(method, **changes):
        name = method + "".join(f"-{key}{value}" for key, value in changes.items())
        if name not in made:
            from gptjax.training import loop

            made[name] = tmp_path_factory.mktemp("tuned") / "run"
            changes = {f"finetune_{key}": value for key, value in changes.items()}
            config = from_run(trained, data_path=text_file, finetune_method=method, finetune_rank=2, **changes)
            loop.train(config, made[name])
        return made[name]

    return run


@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "top", "adapter", "prefix"])
def test_frozen_parameters_are_the_base_and_others_are_trained(tune, trained, method):
    changes = {"top_layers": 1} if method == "top" else {}
    base, run = gptjax.load(trained), gptjax.load(tune(method, **changes))
    there, now = paths.flat(base.params), paths.flat(run.params)
    own = set(paths.flat(gptjax.load(tune(method, **changes)).params)) - set(there)
    moved = {path for path in there if not np.array_equal(there[path], now[path])}
    if method == "top":
        assert moved and not own and all(path.startswith(("block_1/", "final_norm/")) for path in moved)
    else:
        assert own and not moved
        first = paths.flat(methods.partition(base.params, run.config, rng.key(0, "finetune"), base.params).tuned)
        assert any(not np.array_equal(first[path], now[path]) for path in own)
    assert run.generate("the ", temperature=0.0, max_tokens=5).text


@pytest.mark.slow
def test_checkpoints_and_optimizer_state_exclude_frozen_parameters(tune, trained):
    run = gptjax.load(tune("lora"))
    tuned = {path: leaf for path, leaf in paths.flat(run.params).items() if "lora_" in path}
    shapes = jax.eval_shape(
        lambda base: init_from_base(base, run.model, optim.optimizer(run.config), run.config),
        gptjax.load(trained).params,
    )
    count = sum(leaf.size for leaf in tuned.values())
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes.opt_state)) <= 2 * count + 8
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes.params)) == count
    folder = tune("lora") / "checkpoints" / "8"
    whole = trained / "checkpoints" / "8"
    bytes_of = lambda folder: sum(path.stat().st_size for path in folder.rglob("d/*") if path.is_file())
    assert bytes_of(folder) < bytes_of(whole) / 2


@pytest.mark.slow
def test_interrupted_run_resumes_exactly(tune, trained, text_file, tmp_path):
    from gptjax.training import loop

    whole = gptjax.load(tune("lora"))
    config = from_run(trained, data_path=text_file, finetune_method="lora", finetune_rank=2)

    class Cut(Exception):
        pass

    def stop(line):
        if line["step"] == 6:
            raise Cut

    with pytest.raises(Cut):
        loop.train(config, tmp_path / "run", on_line=stop)
    assert Checkpoints(tmp_path / "run").latest() == 4
    loop.train(config, tmp_path / "run")
    for path, leaf in paths.flat(gptjax.load(tmp_path / "run").params).items():
        np.testing.assert_array_equal(leaf, paths.flat(whole.params)[path])


@pytest.mark.slow
def test_adapter_loads_on_its_base_only(tune, trained, tmp_path):
    base, run, ids = gptjax.load(trained), gptjax.load(tune("lora")), np.arange(10)[None]
    facts = adapters.save(run, tmp_path / "adapter")
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == ["adapter.json", "adapter.safetensors"]
    assert facts["parameters"] == sum(leaf.size for path, leaf in paths.flat(run.params).items() if "lora_" in path)
    adapters.save(gptjax.load(tune("adapter")), tmp_path / "other")
    one, other = (adapters.load(base, tmp_path / name) for name in ("adapter", "other"))
    np.testing.assert_array_equal(one.logits(ids), run.logits(ids))
    np.testing.assert_array_equal(other.logits(ids), gptjax.load(tune("adapter")).logits(ids))
    assert one.params["tokens"]["embedding"] is other.params["tokens"]["embedding"], "they share the base"
    with pytest.raises(ConfigError, match="was tuned on other parameters than"):
        adapters.load(gptjax.load(tune("top", top_layers=1)), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapter.safetensors").write_bytes(b"no")
    with pytest.raises(DataError, match="is damaged"):
        adapters.load(base, tmp_path / "adapter")
    with pytest.raises(DataError, match="is no adapter"):
        adapters.load(base, tmp_path)
    with pytest.raises(ConfigError, match="tuned all parameters of its model"):
        adapters.save(base, tmp_path / "third")


def test_changed_base_is_refused(tune, trained):
    workdir = tune("lora")
    facts = json.loads((workdir / "data.json").read_text())
    assert facts["base"] == pretrained.fingerprint(gptjax.load(trained).params)
    (workdir / "data.json").write_text(json.dumps(facts | {"base": "0" * 64}))
    try:
        with pytest.raises(CheckpointError, match="its parameters have changed since"):
            gptjax.load(workdir)
    finally:
        (workdir / "data.json").write_text(json.dumps(facts))


@pytest.mark.slow
def test_tuning_of_a_tuned_run(tune, trained, text_file, tmp_path):
    from gptjax.training import loop

    first = tune("lora")
    config = from_run(first, data_path=text_file, finetune_method="ia3", train_steps=2, model_scan_layers=True)
    loop.train(config, tmp_path / "run")
    run, before, ids = gptjax.load(tmp_path / "run"), gptjax.load(first), np.arange(10)[None]
    assert "blocks" in run.params
    merged = methods.merge_additions(before.params, before.model.attached)
    plain = models.logits(models.build(before.config.model), merged, ids)
    np.testing.assert_allclose(plain, before.logits(ids), atol=1e-5)
    assert np.abs(np.asarray(run.logits(ids)) - plain).max() < 0.5, "it began there"


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["finetune.method=lora"], "fine-tunes the model of another run; give --config.init_from=RUN"),
        (["finetune.method=lore", "init_from=RUN"], "finetune.method has no choice 'lore'; did you mean lora?"),
        (["finetune.method=rule", "finetune.rule=nowhere", "init_from=RUN"], "matches no parameter; there are"),
        (
            ["finetune.method=lora", "finetune.targets=block_7", "init_from=RUN"],
            "targets='block_7' matches no",
        ),
        (["finetune.method=rule", "finetune.rule=(", "init_from=RUN"], "is not a regular expression"),
        (["finetune.method=top", "finetune.top_layers=3", "init_from=RUN"], "it must be 1 to 2"),
        (["finetune.method=bitfit", "init_from=RUN"], "this model has none (model.use_bias)"),
        (["finetune.rank=0"], "finetune.rank is 0; it must be at least 1"),
        (["finetune.rates=(1, 2)"], "it must be like (('head', 1.0), ('block_0/', 0.1))"),
    ],
)
def test_invalid_config_is_refused_in_one_line(call, trained, text_file, tmp_path, flags, told):
    flags = [f"--config.{flag}".replace("RUN", str(trained)) for flag in flags]
    own = [flag for flag in overrides(data_path=text_file) if "model." not in flag and "tokenizer" not in flag]
    done = call(train, f"--config={BASE}", f"--workdir={tmp_path / 'run'}", *own, *flags)
    assert told in done.refusal()
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_convert_to_an_adapter_or_a_merged_run(call, tune, trained, tmp_path):
    workdir, ids = tune("lora"), np.arange(10)[None]
    adapter, merged, again = (tmp_path / name for name in ("adapter", "merged", "again"))
    assert "32" not in call(convert, f"--from={workdir}", f"--to=adapter:{adapter}").err
    assert json.loads(call(convert, f"--from={workdir}", f"--to={merged}", "--merge", "--json").out)["method"] == "lora"
    assert call(convert, f"--from=adapter:{adapter}", f"--base={trained}", f"--to={again}", "--merge").code == 0
    theirs, back = tmp_path / "peft", tmp_path / "back"
    assert call(convert, f"--from={workdir}", f"--to=peft:{theirs}").code == 0
    assert call(convert, f"--from=peft:{theirs}", f"--base={trained}", f"--to=adapter:{back}").code == 0
    there = gptjax.load(workdir).logits(ids)
    np.testing.assert_allclose(adapters.load(gptjax.load(trained), back).logits(ids), there, atol=1e-5)
    for made in (merged, again):
        run = gptjax.load(made)
        assert set(paths.flat(run.params)) == set(paths.flat(gptjax.load(trained).params))
        np.testing.assert_allclose(run.logits(ids), there, atol=1e-5)
    assert "exists; give another --to" in call(convert, f"--from={workdir}", f"--to={merged}", "--merge").refusal()
    refused = call(convert, f"--from={tune('adapter')}", f"--to={tmp_path / 'x'}", "--merge").refusal()
    assert "adapters, prefixes and prompts cannot be merged" in refused and not (tmp_path / "x").exists()
    assert "give --from=RUN --to=adapter:FOLDER" in call(convert, f"--from={workdir}", "--to=x", "--base=y").refusal()


def test_new_task_head_is_trained_by_every_method(trained, text_file):
    config = from_run(trained, data_path=text_file, finetune_method="lora")
    with config.unlocked():
        config.model = gptjax.load(trained).config.model.copy_and_resolve_references().unlock()
        config.model.update(task="classification", labels=3)
    tuned, frozen = pretrained.partition_shapes(trained, config, models.shapes(methods.build_model(config)))
    assert {path for path in paths.flat(tuned) if path.startswith("task/")} == {"task/kernel", "task/bias"}
    assert "tokens/embedding" in paths.flat(frozen)


@pytest.mark.slow
def test_plans_count_additions_and_not_frozen_parameters(call, trained):
    asked = (plan, f"--config={BASE}", f"--config.init_from={trained}", "--json")
    method = "--config.finetune.method=lora"
    own, more = (json.loads(call(*asked, *flags).out.splitlines()[-1]) for flags in ((), (method,)))
    assert more["part"] == "total" and more["parameters"] > own["parameters"]
    mesh = ("--mesh=data=1", "--chip=h100")
    whole, tuned = (json.loads(call(*asked, *mesh, *flags).out) for flags in ((), (method,)))
    assert tuned["parameters"] == more["parameters"]
    assert tuned["memory"]["optimizer"] < whole["memory"]["optimizer"]


@pytest.mark.slow
def test_adapter_of_stacked_layers_on_separate_ones(trained, text_file, tmp_path):
    from gptjax.training import loop

    changes = dict(finetune_method="lora", train_steps=2, model_scan_layers=True)
    loop.train(from_run(trained, data_path=text_file, **changes), tmp_path / "run")
    run, ids = gptjax.load(tmp_path / "run"), np.arange(10)[None]
    adapters.save(run, tmp_path / "adapter")
    taken = adapters.load(gptjax.load(trained), tmp_path / "adapter")
    assert "blocks" in taken.params and "block_0" not in taken.params
    np.testing.assert_array_equal(taken.logits(ids), run.logits(ids))


@pytest.mark.slow
def test_adapter_includes_scalars(text_file, tmp_path):
    from gptjax.training import loop

    changes = dict(data_path=text_file, train_steps=2, model_value_residual=True)
    loop.train(tiny_config(**changes), tmp_path / "base")
    rule = dict(finetune_method="rule", finetune_rule="first_value_share")
    loop.train(from_run(tmp_path / "base", **changes, **rule), tmp_path / "run")
    run, ids = gptjax.load(tmp_path / "run"), np.arange(10)[None]
    assert adapters.save(run, tmp_path / "adapter")["parameters"] == 1  # the second layer's: the first mixes nothing
    taken = adapters.load(gptjax.load(tmp_path / "base"), tmp_path / "adapter")
    np.testing.assert_array_equal(taken.logits(ids), run.logits(ids))
    assert taken.params["block_1"]["attention"]["first_value_share"].shape == ()
