"""Conversion of BERT, BART, Marian and T5 to runs and back: bit-exact, with tokenizers, readable by transformers."""

import json

import jax
import numpy as np
import pytest
from conftest import tiny_config
from safetensors.numpy import load_file, save_file
from test_convert_run import equal

import gptjax
from gptjax import convert, models
from gptjax.config.errors import ConfigError, DataError
from gptjax.data.tokenizers import specials, tokenizers
from gptjax.interop import convert_run, families
from gptjax.models.stacking import stack
from gptjax.runs import config as configs
from gptjax.runs.run import Run

ENCODER = dict(
    model_arch="encoder", model_use_bias=True, model_norm_position="post", model_embedding_norm=True, model_types=2,
    model_activation="gelu",
)  # fmt: skip
MASKED = ENCODER | dict(model_head_transform=True, model_head_bias=True)
POST = dict(
    model_arch="seq2seq", model_use_bias=True, model_norm_position="post", model_head_bias=True, model_encoder_layers=1,
    model_activation="relu",
)  # fmt: skip
T5 = dict(
    model_arch="seq2seq", model_norm="rmsnorm", model_positions="relative", model_attention_scale=1.0,
    model_head_width=6, model_norm_epsilon=1e-6, **{"model_relative.buckets": 8},
)  # fmt: skip
# What each class of transformers' is as a run: keys of its config, and its objective.
RUNS = {
    "BertForMaskedLM": MASKED,
    "BertForPreTraining": MASKED | dict(
        model_task="classification", model_pooling="pooler", train_objective="masked + 0.5*next_sentence",
    ),
    "BertForSequenceClassification": ENCODER | dict(
        model_task="classification", model_pooling="pooler", model_labels=3, train_objective="classification",
    ),
    "BertForTokenClassification": ENCODER | dict(model_task="tagging", model_labels=5, train_objective="tagging"),
    "BertForQuestionAnswering": ENCODER | dict(model_task="span", train_objective="span"),
    "BertForMultipleChoice": ENCODER | dict(
        model_task="choice", model_pooling="pooler", train_objective="choice",
    ),
    "BertModel": ENCODER,
    "BartForConditionalGeneration": POST | dict(model_embedding_norm=True, model_forced_first=3),
    "MarianMTModel": POST | dict(
        model_positions="sinusoidal_halves", model_embedding_scale=4.0, model_suppress_tokens="(7,)", model_start=7,
    ),
    "T5ForConditionalGeneration": T5 | dict(model_logit_scale=0.25, model_activation="relu", model_start=0),
}  # fmt: skip
RUNS["T5ForConditionalGeneration, 1.1"] = T5 | dict(model_tied_head=False, model_activation="geglu_tanh")


def random_run(workdir, **changes):
    """Returns a run with random parameters without a directory."""
    config = configs.with_vocabulary(tiny_config(**changes), 260)
    rng, model = np.random.default_rng(0), models.build(config.model)
    params = jax.tree.map(lambda s: rng.normal(size=s.shape).astype("f"), models.shapes(model))
    return Run(workdir, config, model, params, tokenizers.bytes_encoding())


def read_of(run):
    ids = np.arange(8).reshape(2, 4)
    return {"ids_BT": ids} | ({"source_BS": ids + 9} if run.config.model.arch == "seq2seq" else {})


@pytest.mark.slow
@pytest.mark.parametrize("kind", RUNS)
def test_export_and_import_are_bit_exact(kind, tmp_path):
    run = random_run(tmp_path, **RUNS[kind])
    made = convert_run.export_run(run, tmp_path / "hf", shard_bytes=30_000)
    assert made["architecture"] == kind.split(",")[0] and not made["remark"]
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["architectures"] == [made["architecture"]]
    convert_run.import_run(str(tmp_path / "hf"), tmp_path / "run")
    again = gptjax.load(tmp_path / "run")
    equal(again.params, run.params)
    there, here = (families.canonical(one.config.model.to_dict()) for one in (run, again))
    if "start" in there:
        assert here["start"] == (256 if there["start"] is None else there["start"])
    assert {**there, "start": 0} == {**here, "start": 0}
    assert ("next_sentence" in again.config.train.objective) == ("next_sentence" in run.config.train.objective)


@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.thorough
def test_transformers_loads_what_is_exported_and_says_the_same(kind, tmp_path):
    torch = pytest.importorskip("torch", reason="the parity extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the parity extra is not installed")
    run = random_run(tmp_path, **RUNS[kind])
    made = convert_run.export_run(run, tmp_path / "hf")
    loaded = getattr(transformers, made["architecture"])
    model, told = loaded.from_pretrained(tmp_path / "hf", output_loading_info=True)
    missing = {name for name in told["missing_keys"] if "pooler" not in name}
    assert not missing and not told["unexpected_keys"] and not told["mismatched_keys"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer("ab").input_ids == [*b"ab", 256], "a text ends as encoders read it"
    read = {name: torch.tensor(array) for name, array in read_of(run).items()}
    with torch.no_grad():
        if "source_BS" in read:
            theirs = model.eval()(input_ids=read["source_BS"], decoder_input_ids=read["ids_BT"]).logits
        elif kind == "BertForMultipleChoice":
            theirs = model.eval()(read["ids_BT"][None]).logits[0]
        else:
            said = model.eval()(read["ids_BT"])
            theirs = said.prediction_logits if kind == "BertForPreTraining" else said[0]
            theirs = torch.stack([said.start_logits, said.end_logits], -1) if "Question" in kind else theirs
    if kind == "BertModel":
        ours = run.model.apply({"params": run.params}, **read_of(run), method="features")
    else:
        answers = run.config.model.task != "none" and kind != "BertForPreTraining"
        ours = (run.answer if answers else run.logits)(**read_of(run))
    theirs = theirs.numpy()
    np.testing.assert_allclose(ours, theirs, atol=1e-4 * float(np.abs(theirs).max()))


def test_what_has_no_place_beside_a_tasks_head_is_left_out_with_a_word(tmp_path):
    tuned = MASKED | dict(model_task="classification", model_pooling="mean", train_objective="classification")
    with pytest.raises(ConfigError, match="bert is nearest, without .*pooling mean"):
        convert_run.export_run(random_run(tmp_path, **tuned), tmp_path / "hf")
    made = convert_run.export_run(random_run(tmp_path, **tuned | dict(model_pooling="pooler")), tmp_path / "hf")
    assert made["architecture"] == "BertForSequenceClassification" and "model head is left out" in made["remark"]
    embedding = ENCODER | dict(model_task="embedding", model_pooling="mean", train_objective="contrastive")
    made = convert_run.export_run(random_run(tmp_path, **embedding), tmp_path / "vectors")
    assert made["architecture"] == "BertModel" and "pooling (mean)" in made["remark"]


def test_a_scanned_encoder_decoder_is_written_layer_by_layer(tmp_path):
    run = random_run(tmp_path, **RUNS["MarianMTModel"])
    config = run.config.copy_and_resolve_references()
    with config.unlocked():
        config.model.scan_layers = True
    stacked = Run(tmp_path, config, models.build(config.model), stack(run.params), run.tokenizer)
    convert_run.export_run(run, tmp_path / "one")
    convert_run.export_run(stacked, tmp_path / "other")
    equal(*(load_file(tmp_path / name / "model.safetensors") for name in ("one", "other")))


@pytest.mark.slow
def test_old_names_copies_and_what_nothing_reads_are_understood(tmp_path):
    """Tensor names as in bert-base-uncased and in facebook/bart-base, which is a base model."""
    for kind in ("BertForPreTraining", "BartForConditionalGeneration"):
        run = random_run(tmp_path, **RUNS[kind])
        folder = tmp_path / kind
        convert_run.export_run(run, folder)
        found = load_file(folder / "model.safetensors")
        if kind == "BertForPreTraining":
            settings = json.loads((folder / "config.json").read_text())
            settings["architectures"] = ["BertForMaskedLM"]  # as bert-base-uncased has it, with both heads
            (folder / "config.json").write_text(json.dumps(settings))
            old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
            for name in list(found):
                for today, before in old.items():
                    if name.endswith(today):
                        found[name.replace(today, before)] = found.pop(name)
            found["bert.embeddings.position_ids"] = np.arange(16)[None]
            found["cls.predictions.decoder.weight"] = found["bert.embeddings.word_embeddings.weight"]
            found["cls.predictions.decoder.bias"] = found["cls.predictions.bias"]
            copy = "cls.predictions.decoder.weight"
        else:
            del found["final_logits_bias"]  # and it is zero
            run.params["head_bias"][:] = 0
            found = {name.removeprefix("model."): array for name, array in found.items()}
            found["decoder.embed_tokens.weight"] = found["shared.weight"]
            copy = "decoder.embed_tokens.weight"
        save_file(found, folder / "model.safetensors")
        convert_run.import_run(str(folder), tmp_path / f"{kind}-run")
        equal(gptjax.load(tmp_path / f"{kind}-run").params, run.params)
        found[copy] = found[copy] + 1
        save_file(found, folder / "model.safetensors")
        with pytest.raises(DataError, match=f"{copy} differs from .*, which config.json ties it to"):
            convert_run.import_run(str(folder), tmp_path / "none")


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["bert", "bart", "marian", "t5"])
def test_a_familys_tokenizer_frames_texts_as_transformers_does(family, tmp_path):
    import pairs_of_models

    made = pairs_of_models.write_tokenizer(family, tmp_path)
    from gptjax.data.tokenizers import from_hf as hf_tokenizers

    ours, _ = hf_tokenizers.read(tmp_path)
    for text in ("the cat is here, again", "Where did it go?", ""):
        framed = [*ours.begin, *tokenizers.encode(ours, text), ours.end]
        assert framed == made.encode(text).ids
    ids = tokenizers.encode(ours, "the cats ran")
    assert b"".join(ours.decode_single_token_bytes(token) for token in ids).strip() == b"the cats ran"
    found = specials.lookup_special_ids(ours, [] if family in ("marian", "t5") else ["mask", "class", "separator"], 2)
    if family == "t5":
        assert found.sentinels == (made.token_to_id("<extra_id_0>"), made.token_to_id("<extra_id_1>"))
    else:
        assert all(token < ours.n_vocab for token in found.ids.values())
    tokenizers.save(ours, tmp_path / "kept")
    again = tokenizers.load(tmp_path / "kept")
    assert (again.begin, again.end, tokenizers.encode(again, "a dog")) == (
        ours.begin, ours.end, tokenizers.encode(ours, "a dog"),
    )  # fmt: skip


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["bert", "bart", "marian", "t5"])
def test_a_converted_run_says_what_the_model_that_it_came_from_says(family, tmp_path):
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    import pairs_of_models
    from make_hf_encoders import answers

    changes = {"bad_words_ids": [[30]]} if family == "marian" else {}
    workdir, model = pairs_of_models.pair(family, "masked" if family == "bert" else "golden", tmp_path, **changes)
    run = gptjax.load(workdir)
    texts = ["the cat ran over the hill", "a dog"]
    rows = [[*run.tokenizer.begin, *tokenizers.encode(run.tokenizer, text), run.tokenizer.end] for text in texts]
    longest = max(map(len, rows))
    ids, segments = (
        np.array([[*row, *[0] * (longest - len(row))] for row in side]) for side in (rows, [[1] * len(r) for r in rows])
    )
    if family == "bert":
        read = {"ids_BT": ids, "segments_BT": segments, "types_BT": np.zeros_like(ids)}
    else:
        c = model.config
        first = [c.decoder_start_token_id, *([0] if family == "bart" else []), 5]
        assert run.config.model.start == first[0]
        assert run.config.model.forced_first == (0 if family == "bart" else None)
        assert run.config.model.suppress_tokens == ((30,) if family == "marian" else ())
        read = {"ids_BT": np.array([first] * 2), "source_BS": ids, "source_segments_BS": segments}
    real = read["segments_BT"] > 0 if family == "bert" else ...
    np.testing.assert_allclose(run.logits(**read)[real], answers(model, read)["logits"][real], atol=1e-4)


def test_berts_vocabulary_file_alone_is_a_tokenizer(tmp_path):
    import pairs_of_models

    from gptjax.data.tokenizers import from_hf as hf_tokenizers

    made = pairs_of_models.write_tokenizer("bert", tmp_path / "whole")
    by_id = sorted(made.get_vocab().items(), key=lambda item: item[1])
    (tmp_path / "vocab.txt").write_text("".join(f"{token}\n" for token, _ in by_id))
    ours, _ = hf_tokenizers.read(tmp_path)
    text = "The cat, again! Ünd 猫"
    assert [*ours.begin, *tokenizers.encode(ours, text), ours.end] == made.encode(text).ids
    (tmp_path / "vocab.txt").write_text("a\nb\n")
    with pytest.raises(DataError, match=r"vocab.txt lacks the unk_token \[UNK\]"):
        hf_tokenizers.read(tmp_path)


def test_marians_sentencepiece_models_are_refused_in_one_line(tmp_path):
    convert_run.export_run(random_run(tmp_path, **RUNS["MarianMTModel"]), tmp_path / "hf")
    (tmp_path / "hf" / "tokenizer.json").unlink()
    for name in ("source.spm", "target.spm", "vocab.json"):
        (tmp_path / "hf" / name).write_text("{}")
    with pytest.raises(DataError, match="two models of sentencepiece.*put a tokenizer.json"):
        convert_run.import_run(str(tmp_path / "hf"), tmp_path / "run")


def test_convert_there_and_back_on_the_command_line(call, tmp_path):
    run = random_run(tmp_path, **RUNS["BartForConditionalGeneration"])
    convert_run.export_run(run, tmp_path / "hf")
    made = json.loads(call(convert, f"--from=hf:{tmp_path / 'hf'}", f"--to={tmp_path / 'run'}", "--json").out)
    assert made["family"] == "bart" and made["tokenizer_kind"].startswith("tiktoken.Encoding, exact")
    assert (
        "BartForConditionalGeneration" in call(convert, f"--from={tmp_path / 'run'}", f"--to=hf:{tmp_path / 'b'}").out
    )
    equal(*(load_file(tmp_path / name / "model.safetensors") for name in ("hf", "b")))
    assert json.loads((tmp_path / "b" / "generation_config.json").read_text()) == {
        "decoder_start_token_id": 256, "forced_bos_token_id": 3, "bos_token_id": 256, "eos_token_id": 256,
        "pad_token_id": 256,
    }  # fmt: skip


@pytest.mark.parametrize(
    "kind, arrays, words",
    [
        ("BertForMaskedLM", dict(ids_BT=[1, 2]), r"ids must be whole numbers of shape \[B, T\]"),
        ("BertForMaskedLM", dict(ids_BT=[[1, 2]], types_BT=[[0, 2]]), "types must lie in 0 to 1"),
        (
            "BertForMaskedLM",
            dict(ids_BT=[[1, 2]], segments_BT=[[1]]),
            r"segments_BT has the shape \(1, 1\), and ids_BT",
        ),
        (
            "BertForMaskedLM",
            dict(ids_BT=[[1]], source_BS=[[1]]),
            "source_BS is no input of models of kind encoder",
        ),
        ("BertForMaskedLM", dict(), "models of kind encoder need ids_BT"),
        ("MarianMTModel", dict(ids_BT=[[1, 2]]), "models of kind seq2seq need source_BS"),
        ("MarianMTModel", dict(ids_BT=[[1, 2]], source_BS=[[1], [2]]), "source_BS has 2 rows, and ids_BT 1"),
        ("MarianMTModel", dict(ids_BT=[[1, 2]], source_BS=[[260]]), "source must lie in 0 to 259"),
        (
            "MarianMTModel",
            dict(ids_BT=[[1]], source_BS=[[1] * 17]),
            "17 tokens are more than the model's context of 16",
        ),
    ],
)
def test_what_a_model_cannot_read_is_refused(kind, arrays, words, tmp_path):
    with pytest.raises(DataError, match=words):
        random_run(tmp_path, **RUNS[kind]).logits(**arrays)


@pytest.mark.slow
def test_padding_and_packed_texts_do_not_change_what_is_said_of_a_text(tmp_path):
    run = random_run(tmp_path, **RUNS["T5ForConditionalGeneration"])
    ids, source = np.array([[0, 5, 6]]), np.array([[9, 8, 7, 6]])
    alone = run.logits(ids, source)
    padded = run.logits(ids, np.pad(source, ((0, 0), (0, 3))), np.array([[1, 1, 1, 1, 0, 0, 0]]))
    np.testing.assert_allclose(padded, alone, atol=1e-4)
    twice = [np.tile(one, 2) for one in (ids, source)]
    segments = [np.repeat([[1, 2]], one.shape[1], axis=1) for one in (source, ids)]
    packed = run.logits(*twice, *segments)
    np.testing.assert_allclose(packed, np.tile(alone, (1, 2, 1)), atol=1e-4)


def test_an_id_that_is_never_said_is_none_of_what_decoding_reads(tmp_path):
    run = random_run(tmp_path, **RUNS["MarianMTModel"])
    _, params = models.for_decoding(run.model, run.params)
    assert np.argmin(params["head_bias"]) == 7 and params["head_bias"][7] < -1e8 < params["head_bias"][8]
    assert run.params["head_bias"][7] > -10
    with pytest.raises(ConfigError, match=r"model.suppress_tokens is \(7,\); it needs model.head_bias"):
        configs.check(tiny_config(model_suppress_tokens="(7,)"))
