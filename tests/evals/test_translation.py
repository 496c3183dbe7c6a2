"""Translation: sacrebleu's scores and signatures, the command, and its refusals."""

import builtins
import json

import pytest
from conftest import evaluate, shared, tiny_config

from gptjax.config.errors import ConfigError
from gptjax.decode.beam import BeamSearchParams
from gptjax.evals import translation
from gptjax.runs import run

sacrebleu = pytest.importorskip("sacrebleu")

GERMAN = ["Zwei junge Männer sind im Freien.", "Ein Hund läuft durch den Schnee.", "Mehrere Frauen lachen."]
CHINESE = ["我喜欢音乐。", "他在看书。", "今天天气很好。"]


def test_german_is_scored_as_sacrebleu_scores_it():
    worse = [GERMAN[0], "Ein Hund rennt durch den Schnee.", "Mehrere Männer lachen laut."]
    found = translation.scores(worse, GERMAN, "de")
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(worse, [GERMAN]).score)
    assert found["chrf"].value == pytest.approx(sacrebleu.corpus_chrf(worse, [GERMAN]).score)
    assert "tok:13a" in found["bleu"].signature and "nc:6" in found["chrf"].signature
    assert translation.scores(GERMAN, GERMAN, "de")["bleu"].value == pytest.approx(100)
    assert found["bleu"].value != pytest.approx(translation.scores(GERMAN, worse, "de")["bleu"].value, abs=1e-3)


@pytest.mark.parametrize("language", ["zh", "zh_CN", "zh-TW"])
def test_chinese_is_scored_by_characters(language):
    worse = ["我喜欢音乐！", "她在看书。", "今天天气不好。"]
    found = translation.scores(worse, CHINESE, language)
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(worse, [CHINESE], tokenize="zh").score)
    assert "tok:zh" in found["bleu"].signature and found["bleu"].value > 20


def test_real_captions_against_sacrebleu():
    from gptjax.data import pairs

    folder = shared("data/multi30k")
    config = tiny_config(data_path=folder, data_languages=("en", "de"), data_layout="pairs").data
    targets = [pair.target for pair in pairs.read(config, "test_2016_flickr")]
    hypotheses = [" ".join(text.split()[:-1]) for text in targets]
    found = translation.scores(hypotheses, targets, "de")
    assert found["bleu"].value == pytest.approx(sacrebleu.corpus_bleu(hypotheses, [targets]).score)
    assert 60 < found["bleu"].value < 95


def test_missing_sacrebleu_names_what_to_install(monkeypatch):
    real = builtins.__import__

    def absent(name, *rest, **more):
        if name.startswith("sacrebleu"):
            raise ImportError(name)
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ConfigError, match=r"pip install 'gptjax\[translation\]'"):
        translation.scores(["a"], ["a"], "de")


@pytest.fixture(scope="module")
def translator(tmp_path_factory):
    """A run of a tiny encoder-decoder trained to copy sources of one letter."""
    from gptjax.training import loop

    folder = tmp_path_factory.mktemp("corpus")
    for split, times in (("train", 20), ("val", 1), ("test_a", 2)):
        for language in ("en", "de"):
            (folder / f"{split}.{language}").write_text("a\nb\nc\nd\n" * times)
    more = {"data_path": folder, "data_languages": ("en", "de"), "data_layout": "pairs", "train_objective": "seq2seq"}
    more |= {"model_arch": "seq2seq", "model_layers": 1, "model_init_std": 0.2, "train_steps": 30}
    more |= {"optimizer_learning_rate": 0.03, "schedule_warmup_steps": 5, "eval_every_steps": 30}
    workdir = tmp_path_factory.mktemp("runs") / "translator"
    loop.train(tiny_config(**more), workdir)
    return workdir


@pytest.mark.slow
def test_the_command_prints_metrics_and_writes_translations(translator, call):
    result = call(evaluate, f"--workdir={translator}", "--test=test_a", "--beams=2", "--json")
    assert result.code == 0, result.err
    figures = json.loads(result.out)
    lines = (translator / "translations_test_a.txt").read_text().splitlines()
    assert (figures["sentences"], figures["beams"], len(lines)) == (8, 2, 8)
    assert set(lines) == set("abcd") and figures["chrf"] == pytest.approx(100)
    assert figures["loss"] < 0.3 and "nrefs:1" in figures["bleu_signature"]


@pytest.mark.slow
def test_the_default_is_the_held_out_split_and_files_can_be_given(translator, call, tmp_path):
    result = call(evaluate, f"--workdir={translator}")
    assert result.code == 0 and "4 sentences of val, 4 beams, length penalty 1" in result.out
    (tmp_path / "a").write_text("b\na\n")
    (tmp_path / "b").write_text("b\nb\n")
    result = call(evaluate, f"--workdir={translator}", "--beams=1", "--data", tmp_path / "a", tmp_path / "b")
    assert result.code == 0 and "2 sentences of a-b, 1 beams" in result.out
    assert (translator / "translations_a-b.txt").read_text() == "b\na\n"


@pytest.mark.slow
def test_translations_are_in_order_and_long_sources_are_truncated(translator):
    of = run.load(translator)
    found = translation.translate(of, ["d", "a" * 40, "c", "b"], BeamSearchParams(beams=1), rows=2)
    assert [found[0], *found[2:]] == ["d", "c", "b"]


@pytest.mark.slow
def test_invalid_runs_are_refused_in_one_line(translator, trained, call):
    assert "leave --test out" in call(evaluate, f"--workdir={trained}", "--test=test_a").refusal()
    assert "has no encoder" in call(evaluate, f"--workdir={trained}", "--beams=4").refusal()
    assert "there are test_a (de en)" in call(evaluate, f"--workdir={translator}", "--test=test_b").refusal()
    assert "beams" in call(evaluate, f"--workdir={translator}", "--beams=0").refusal()
    assert "takes two" in call(evaluate, f"--workdir={translator}", f"--data={__file__}").refusal()
