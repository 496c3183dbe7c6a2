"""The experiment on forgetting does what it says with tiny models: chains of runs, what is measured, and resuming."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT

import gptjax
from gptjax.config.errors import ConfigError, DataError
from gptjax.evals import held_out
from gptjax.training import loop


@pytest.fixture(scope="module")
def forgetting():
    sys.path.append(str(ROOT / "experiments" / "finetune"))
    import forgetting

    yield forgetting
    sys.path.remove(str(ROOT / "experiments" / "finetune"))


@pytest.fixture(scope="module")
def asked(trained, text_file, tmp_path_factory):
    """The flags, for two texts of other words."""
    folder = tmp_path_factory.mktemp("texts")
    lines = text_file.read_text().splitlines()
    (folder / "shouted.txt").write_text("\n".join(lines).upper())
    (folder / "reversed.txt").write_text("\n".join(line[::-1] for line in lines))
    tasks = [f"--tasks=loud={folder / 'shouted.txt'}", f"back={folder / 'reversed.txt'}"]
    flags = [*tasks, f"--base={trained}", "--steps=4", f"--out={folder / 'out'}", "--ewc=0,1000"]
    return [*flags, "--config.finetune.fisher_rows=4", "--config.optimizer.learning_rate=0.01"], folder / "out"


@pytest.fixture(scope="module")
def done(forgetting, asked):
    flags, out = asked
    forgetting.main([*flags, "--seeds=0"])
    return out


@pytest.mark.slow
def test_each_run_begins_with_the_one_before_and_is_measured_on_every_text(done, trained, asked):
    found = json.loads((done / "results.json").read_text())
    assert [*found["base"]] == ["base", "loud", "back"]
    assert found["base"]["base"] == pytest.approx(held_out.evaluate_run(gptjax.load(trained))["bits_per_byte"])
    for ewc in ("0", "1000"):
        first, second = (done / "runs" / f"ewc-{ewc}" / "seed-0" / name for name in ("1-loud", "2-back"))
        configs = [gptjax.load(workdir).config for workdir in (first, second)]
        assert [config.init_from for config in configs] == [str(trained), str(first)]
        assert {config.finetune.ewc for config in configs} == {float(ewc)}
        scores = found["sequences"][f"ewc={ewc} seed=0"]["scores"]
        for workdir, name, score in zip((first, second), ("loud", "back"), scores, strict=True):
            assert score[name] == pytest.approx(held_out.evaluate_run(gptjax.load(workdir))["bits_per_byte"])
    held = [found["sequences"][f"ewc={ewc} seed=0"]["scores"][0]["base"] for ewc in ("0", "1000")]
    assert held[0] > held[1] + 0.05, "less of the base's text is forgotten"


@pytest.mark.slow
def test_what_is_finished_is_not_done_again(forgetting, done, asked, monkeypatch, capsys):
    before, train = (done / "results.json").read_bytes(), loop.train
    trained_now = []
    monkeypatch.setattr(loop, "train", lambda config, workdir: trained_now.append(workdir) or train(config, workdir))
    forgetting.main([*asked[0], "--seeds=0"])
    assert not trained_now and (done / "results.json").read_bytes() == before
    told = capsys.readouterr().out
    assert "[4/4] ewc=1000 seed=0, back: base " in told and "| ewc | bits per byte after | base | loud | back |" in told
    (done / "forgetting.png").unlink()
    monkeypatch.setattr(forgetting, "measure", None)
    forgetting.main([f"--out={done}", "--redraw"])
    assert (done / "forgetting.png").stat().st_size > 10_000 and (done / "table.md").read_text() in told


@pytest.mark.slow
def test_cut_short_it_goes_on_with_the_next_run(forgetting, done, asked, tmp_path, monkeypatch):
    flags = [*asked[0], "--seeds=0", f"--out={tmp_path}", "--ewc=0"]
    train = loop.train
    monkeypatch.setattr(
        loop, "train", lambda config, workdir: train(config, workdir) if "1-" in workdir.name else 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        forgetting.main(flags)
    begun = []
    monkeypatch.setattr(loop, "train", lambda config, workdir: begun.append(workdir.name) or train(config, workdir))
    forgetting.main(flags)
    assert begun == ["2-back"]
    whole, again = (forgetting.read(out)["sequences"]["ewc=0 seed=0"] for out in (done, tmp_path))
    assert whole == again


@pytest.mark.slow
def test_backward_transfer_and_the_table_vs_numbers_by_hand(forgetting):
    scores = [{"base": 2.5, "a": 1.5, "b": 4.5}, {"base": 3.0, "a": 2.5, "b": 1.0}]
    other = [{"base": 2.7, "a": 1.5, "b": 4.5}, {"base": 3.2, "a": 2.7, "b": 1.2}]
    found = {
        "base": {"base": 2.0, "a": 5.0, "b": 5.0},
        "sequences": {
            "x": {"ewc": 0.0, "seed": 0, "scores": scores},
            "y": {"ewc": 0.0, "seed": 1, "scores": other},
            "z": {"ewc": 7.0, "seed": 0, "scores": scores[:1]},
        },
    }
    (R,) = forgetting.matrices(found).values()
    np.testing.assert_allclose(forgetting.backward_transfer(R), [(1.0 + 1.0) / 2, (1.2 + 1.2) / 2])
    lines = forgetting.table(found).splitlines()
    assert lines[4] == "| 0 | b | 3.100 ± 0.141 | 2.600 ± 0.141 | 1.100 ± 0.141 |"
    assert lines[-1] == "| 0 | +1.100 ± 0.141 | 2.267 ± 0.141 |"


@pytest.mark.slow
def test_what_cannot_be_is_refused(forgetting, asked, done, tmp_path):
    flags = asked[0]
    for wrong, told in [
        (["--base=x"], "give --base=RUN and --tasks"),
        (["--tasks", "a=b"], "--base=RUN is missing"),
        (["--base=x", "--tasks", "a=b", "a=c"], "each name once"),
        (["--base=x", "--tasks", "base=b"], "none of them base"),
        ([*flags, "--steps=5"], "has results of another choice of steps; give another --out"),
    ]:
        with pytest.raises(ConfigError, match=told):
            forgetting.main(wrong)
    with pytest.raises(DataError, match="results.json cannot be read"):
        forgetting.main([f"--out={tmp_path}", "--redraw"])
