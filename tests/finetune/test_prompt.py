"""Prompt tuning: ids after the vocabulary that every text begins with, trained, saved and never generated."""

import itertools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import evaluate, generate, tiny_config

import gptjax
import gptjax.decode.beam
from gptjax import convert, models, optim
from gptjax.config.errors import ConfigError, DataError
from gptjax.core import rng
from gptjax.data import layouts, pairs, token_sets
from gptjax.data.augment import Augment
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.specials import SpecialIds
from gptjax.decode import scoring
from gptjax.decode.generate import Request
from gptjax.decode.settings import SamplingParams
from gptjax.finetune import methods, paths, prompts
from gptjax.objectives.row_context import make_row_context
from gptjax.runs import adapters, chat
from gptjax.runs.train_state import init_from_base
from gptjax.training.loop import train
from gptjax.training.setup import check

P, V = 3, 257
MODELS = {
    "decoder": dict(model_use_bias=True),
    "rotary": dict(model_positions="rotary", model_embedding_scale=4.0, model_scan_layers=True),
    "encoder": dict(model_arch="encoder"),
    "seq2seq": dict(model_arch="seq2seq", model_tied_head=False),
    "lstm": dict(model_arch="recurrent"),
}
TEXTS = ["a short text", "", "b", "another one that is longer than a row of this context", "and the last"]


def tuning(origin="", **changes):
    """The tiny recipe of a run that tunes a prompt of another."""
    changes = dict(finetune_method="prompt", finetune_length=P, data_layout="packed") | changes
    config = tiny_config(**changes)
    with config.unlocked():
        config.init_from = str(origin)
    return config


def built(name):
    """(parameters with a prompt, their model, the same parameters with a longer table, their model)."""
    config = tuning(**MODELS[name], model_vocabulary=V, model_context=32)
    plain = models.build(config.model)
    fresh = models.init(plain, jax.random.key(1))
    base = jax.tree.map(lambda leaf: leaf + 0.1 * jax.random.normal(jax.random.key(2), leaf.shape), fresh)
    tuned, frozen = methods.partition(base, config, jax.random.key(3), fresh)
    assert list(paths.flat(tuned)) == ["tokens/prompt"] and set(paths.flat(frozen)) == set(paths.flat(base))
    table = base["tokens"]["embedding"]
    at_first = paths.flat(tuned)["tokens/prompt"]
    assert at_first.shape == (P, table.shape[1])
    assert all((row == table).all(1).any() for row in at_first), "the embeddings of ids of the vocabulary"
    tuned = jax.tree.map(lambda leaf: leaf + 0.3 * jax.random.normal(jax.random.key(4), leaf.shape), tuned)
    longer = paths.union(base, {"tokens": {"embedding": jnp.concatenate([table, tuned["tokens"]["prompt"]])}})
    wide = config.model.copy_and_resolve_references()
    with wide.unlocked():
        wide.vocabulary = V + P
        if not wide.tied_head:
            kernel = base["head"]["kernel"]
            longer = paths.union(longer, {"head": {"kernel": jnp.pad(kernel, [(0, 0), (0, P)])}})
    return paths.union(frozen, tuned), methods.build_model(config), longer, models.build(wide)


def read_by(model, length=9):
    """Inputs that begin with the prompt, an encoder-decoder's in the source."""
    ids = jax.random.randint(jax.random.key(0), (2, length), 0, V)
    with_prompt = jnp.concatenate([jnp.tile(jnp.arange(V, V + P), (2, 1)), ids], axis=1)
    if models.kind(model) != "seq2seq":
        return {"ids_BT": with_prompt}
    return {"ids_BT": ids, "source_BS": with_prompt, "source_segments_BS": jnp.ones_like(with_prompt)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_prompt_is_read_as_rows_of_a_longer_table_would_be(name):
    params, model, longer, reference = built(name)
    read = read_by(model)
    found = models.logits(model, params, **read)
    assert found.shape[-1] == V and jnp.isfinite(found).all()
    np.testing.assert_allclose(found, models.logits(reference, longer, **read)[..., :V], atol=1e-6, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["decoder", "rotary", "seq2seq", "lstm"])
def test_cached_decoding_reads_the_prompt(name):
    params, model, _, _ = built(name)
    read = read_by(model)
    whole, ids = models.logits(model, params, **read), read["ids_BT"]
    few, own = models.for_decoding(model, params)
    cache = models.init_cache(few, 2, 16, 2, "float32")
    if name == "seq2seq":
        cache = models.encode_source(few, own, read["source_BS"], read["source_segments_BS"], cache)
    for start in range(0, ids.shape[1], 2):
        x, table, cache = models.extend(few, own, ids[:, start : start + 2], cache)
        np.testing.assert_allclose(models.next_logits(few, x, table), whole[:, start : start + 2], atol=2e-5, rtol=1e-4)


def seen(end=True, **changes):
    """A tokenizer with a prompt."""
    plain = tokenizers.bytes_encoding() if end else tokenizers.chars_encoding(TEXTS)
    return prompts.with_prompt(plain, tuning(model_vocabulary=V, **changes))


def test_texts_begin_with_the_prompt_and_decoding_leaves_it_out():
    plain, own = tokenizers.bytes_encoding(), seen()
    assert (own.prompt, own.begin) == ((257, 258, 259), (257, 258, 259, 256))
    assert (plain.prompt, plain.begin) == ((), ())
    assert seen(model_arch="seq2seq").begin == (257, 258, 259), "sources begin with no end"
    assert seen(end=False).begin == (257, 258, 259)
    assert own.decode([*own.begin[:3], 97, 98]) == "ab" and tokenizers.sha256(own) != tokenizers.sha256(plain)
    assert pairs.source_ids(seen(model_arch="seq2seq"), "a") == [257, 258, 259, 97, 256]
    assert token_sets.from_texts(own, ["a"], "").read(0, 9).tolist() == [257, 258, 259, 256, 97, 256]


def joined(lists):
    return list(itertools.chain.from_iterable(lists))


@pytest.mark.parametrize("layout", ["packed", "examples"])
@pytest.mark.parametrize("end", [True, False])
def test_no_position_asks_for_the_prompt_and_every_text_begins_with_it(layout, end):
    own, context = seen(end), 16
    texts = [text for text in TEXTS if text or end]
    tokens = token_sets.from_texts(own, texts, "")
    rows = layouts.LAYOUTS[layout](tokens, context, 0, Augment(), f"prompt {end}")
    opening, said = list(own.begin), []
    for k in range(rows.per_epoch):
        row = rows.row(0, k)
        inputs, targets, weights = (row[f"{name}_BT"] for name in ("inputs", "targets", "weights"))
        assert (targets < V).all() and (targets[weights == 0] == 0).all()
        segments = row.get("segments_BT", np.ones(context, int))
        for number in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == number)
            assert inputs[here][: len(opening)].tolist() == opening
            counts = np.flatnonzero(weights[here])
            assert counts[0] >= len(opening) - 1 and (np.diff(counts) == 1).all()
            assert (inputs[here][counts[1:]] == targets[here][counts[:-1]]).all()
            said.append(targets[here][counts].tolist())
    ending = [256] if end else []
    if layout == "packed":
        # Each id of a text is asked for once.
        assert sorted(joined(said)) == sorted(joined(own.encode_ordinary(text) + ending for text in texts))
    else:
        room = context + 1 - len(opening)
        assert sorted(said) == sorted((own.encode_ordinary(text) + ending)[:room] for text in texts)


def test_a_packed_prompt_of_a_records_own_weighs_nothing():
    ids = np.arange(2, 30, dtype=np.int32)
    tokens = token_sets.TokenSet([token_sets.Part(ids, np.array([5, 28]), np.array([3, 11], np.int32))])
    rows = layouts.packed(tokens, 8, 0, Augment(), "prompts of records")
    asked = [rows.row(0, k) for k in range(rows.per_epoch)]
    found = np.concatenate([row["targets_BT"][row["weights_BT"] > 0] for row in asked])
    assert sorted(found.tolist()) == [5, 6, *range(18, 30)]


def test_masking_knows_the_prompts_ids():
    own, known = seen(), SpecialIds({}, (), V)
    facts = make_row_context(own, known, None, token_sets.from_texts(own, TEXTS, ""))
    assert not facts.is_text_V[list(own.begin)].any() and len(facts.is_text_V) == V + P


@pytest.fixture(scope="module")
def base_run(text_file, tmp_path_factory):
    """A run trained enough for a prompt to matter."""
    workdir = tmp_path_factory.mktemp("base") / "run"
    train(tiny_config(data_path=text_file, train_steps=300, eval_every_steps=150), workdir)
    return workdir


@pytest.fixture(scope="module")
def lines_file(tmp_path_factory):
    """Short texts of two of the words that the base has read."""
    folder = tmp_path_factory.mktemp("lines")
    for number in range(60):
        (folder / f"{number}.txt").write_text(" ".join(["the", "text"][(number >> i) % 2] for i in range(5)) + ".")
    return folder


@pytest.fixture(scope="module")
def tuned(base_run, lines_file, tmp_path_factory):
    """A run that tuned a prompt."""
    workdir = tmp_path_factory.mktemp("tuned") / "run"
    train(tuning(base_run, data_path=lines_file, train_steps=60, optimizer_learning_rate=0.1), workdir)
    return workdir


@pytest.mark.slow
def test_training_lowers_the_loss_and_changes_the_prompt_alone(tuned, base_run):
    lines = [json.loads(line) for line in (tuned / "metrics.jsonl").read_text().splitlines()]
    losses = [line["val/loss"] for line in lines if "val/loss" in line]
    assert np.isfinite(losses).all() and losses[-1] < losses[0] - 0.1
    run, base = gptjax.load(tuned), gptjax.load(base_run)
    now, before = paths.flat(run.params), paths.flat(base.params)
    assert set(now) - set(before) == {"tokens/prompt"}
    assert all(np.array_equal(now[path], before[path]) for path in before)
    first = methods.partition(base.params, run.config, rng.key(0, "finetune"), base.params).tuned
    assert (np.asarray(now["tokens/prompt"]) != first["tokens"]["prompt"]).all()
    state = jax.eval_shape(
        lambda params: init_from_base(params, run.model, optim.optimizer(run.config), run.config), base.params
    )
    large = [leaf.shape for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert large == [(P, 16), (P, 16)] and [leaf.shape for leaf in jax.tree.leaves(state.params)] == [(P, 16)]


@pytest.mark.slow
def test_what_it_writes_follows_the_prompt_and_never_has_it(call, tuned, lines_file):
    run = gptjax.load(tuned)
    assert json.loads((tuned / "tokenizer" / "facts.json").read_text())["begin"] == [], "the plain one is kept"
    context, ids = run.config.model.context, list(run.tokenizer.begin)
    assert ids == [257, 258, 259, 256]
    sample = run.generate("", temperature=0.0, max_tokens=6)
    for token in sample.ids:  # as without a cache
        assert token == run.logits(np.array([ids]))[0, -1].argmax()
        ids.append(token)
    options = dict(repetition_penalty=1.3, no_repeat_ngram=2, frequency_penalty=0.5, logit_bias={97: 2.0})
    requests = [
        Request(text, SamplingParams(max_tokens=7, **options), jax.random.key(i))
        for i, text in enumerate(["", "the", "a "])
    ]
    for _, one in run.generate_batch(requests):
        assert one.ids and max(one.ids) < V and np.isfinite(one.logprobs).all()
    assert np.isfinite(run.generate("the", beams=gptjax.decode.beam.BeamSearchParams(beams=2), max_tokens=5).score)
    with pytest.raises(DataError, match="longer than the context|the model's context is"):
        run.generate("x" * (context - 4))
    flags = (f"--workdir={tuned}", "--prompt=the", "--logprobs=2", "--prompt_logprobs", "--json", "--max_tokens=4")
    line = json.loads(call(generate, *flags).out.splitlines()[0])
    assert line["prompt_logprobs"][: P - 1] == [0] * (P - 1) and all(np.isfinite(line["prompt_logprobs"]))
    whole = run.logits(np.array([[*run.tokenizer.begin, *b"the"]]))[0]
    expected = [jax.nn.log_softmax(whole[4 + i - 1])[token] for i, token in enumerate(b"the")]
    np.testing.assert_allclose(line["prompt_logprobs"][-3:], expected, atol=1e-4)
    with pytest.raises(DataError, match="tuned prompt is longer"):
        scoring.score_text(run.generator.decoder, [*run.tokenizer.begin, *b"a" * 30], stride=4)
    with pytest.raises(DataError, match="must lie in 0 to 259"):
        run.logits(np.array([[260]]))


@pytest.mark.slow
def test_it_is_evaluated_on_its_own_and_on_other_text(call, tuned, lines_file):
    own = json.loads(call(evaluate, f"--workdir={tuned}", "--json").out)
    summary = json.loads((tuned / "summary.json").read_text())
    np.testing.assert_allclose(own["loss"], summary["val_loss"], rtol=1e-4)
    file = lines_file / "3.txt"
    text = file.read_text()
    other = json.loads(call(evaluate, f"--workdir={tuned}", f"--data={file}", "--json").out)
    assert other["tokens"] == len(text.encode()) + 1 and np.isfinite(other["loss"])


def test_a_dialogue_begins_with_the_prompt_once():
    template = chat.Template("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    found = chat.prompt_ids(template, [dict(role="user", content="hi")], seen())
    assert found == [257, 258, 259, *b"hi\n"]


@pytest.mark.slow
def test_an_adapter_of_it_goes_beside_its_base(tuned, base_run, tmp_path):
    run, base = gptjax.load(tuned), gptjax.load(base_run)
    assert adapters.save(run, tmp_path / "adapter")["parameters"] == P * 16
    beside, ids = adapters.load(base, tmp_path / "adapter"), np.array([[257, 258, 259, 256, 97]])
    np.testing.assert_array_equal(beside.logits(ids), run.logits(ids))
    assert beside.generate("a", temperature=0.0, max_tokens=4) == run.generate("a", temperature=0.0, max_tokens=4)
    assert base.tokenizer.begin == () and beside.tokenizer.begin == run.tokenizer.begin


@pytest.mark.slow
@pytest.mark.parametrize(
    ("objective", "arch", "layout"), [("masked", "encoder", "packed"), ("denoising", "seq2seq", "examples")]
)
def test_objectives_that_corrupt_text_leave_the_prompt_alone(lines_file, tmp_path, objective, arch, layout):
    given = dict(data_path=lines_file, model_arch=arch, data_layout=layout, train_objective=objective, train_steps=4)
    given |= dict(objective_corruption="infilling", sample_prompt="the")
    train(tiny_config(**given), tmp_path / "base")
    train(tuning(tmp_path / "base", **given), tmp_path / "run")
    run, base = (gptjax.load(tmp_path / name) for name in ("run", "base"))
    V = run.config.model.vocabulary
    assert run.tokenizer.prompt == (V, V + 1, V + 2)
    first = methods.partition(base.params, run.config, rng.key(0, "finetune"), base.params).tuned
    now = np.asarray(run.params["tokens"]["prompt"])
    assert np.isfinite(now).all() and (now != first["tokens"]["prompt"]).any(1).all(), "all of it is read"
    if arch == "encoder":
        filled = run.fill("the [MASK]ext")
        assert filled.text.startswith("the ") and len(filled.masks) == 1


@pytest.mark.slow
def test_translation_reads_it_before_the_source(tmp_path):
    for split, count in (("train", 24), ("val", 4)):
        for language, offset in (("en", 0), ("de", 1)):
            lines = [f"{'abcd'[(i + offset) % 4]} x\n" for i in range(count)]
            (tmp_path / f"{split}.{language}").write_text("".join(lines))
    given = dict(data_path=tmp_path, data_layout="pairs", train_objective="seq2seq", train_steps=3, sample_prompt="a x")
    base = tiny_config(model_arch="seq2seq", **given)
    with base.unlocked():
        base.data.languages = ("en", "de")
    train(base, tmp_path / "base")
    config = tuning(tmp_path / "base", model_arch="seq2seq", **given)
    with config.unlocked():
        config.data.languages = ("en", "de")
    train(config, tmp_path / "run")
    run, before = (gptjax.load(tmp_path / name) for name in ("run", "base"))
    assert run.generator.decoder.is_encoder_decoder and run.generate("a x", temperature=0.0, max_tokens=4).ids
    now, first = paths.flat(run.params), paths.flat(before.params)
    assert set(now) - set(first) == {"tokens/prompt"}
    source = np.array([[257, 258, 259, *b"a x", 256]])
    assert np.isfinite(run.logits(np.array([[256]]), source)).all()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        (dict(data_layout="flat"), "begin where texts do: data.layout=packed or examples, not flat"),
        (dict(data_layout="pairs"), "data.layout=packed or examples, not pairs"),
        (dict(data_layout="packed", model_arch="seq2seq", train_objective="seq2seq"), "pairs or examples, not packed"),
        (dict(data_layout="pairs", model_arch="seq2seq", train_objective="seq2seq"), "give data.languages"),
        (dict(train_objective="fim"), "train.objective=fim builds its own rows"),
        (dict(train_objective="prefix"), "train.objective=prefix builds its own rows"),
        (dict(finetune_length=15), "finetune.length=15 leaves no room in 16 tokens"),
    ],
)
def test_invalid_config_is_refused_in_one_line(changes, told):
    with pytest.raises(ConfigError, match=told) as refused:
        check(tuning("somewhere", **changes))
    assert "\n" not in str(refused.value)


@pytest.mark.slow
def test_what_would_disturb_the_prompt_is_refused(call, tuned, tmp_path, monkeypatch):
    config = tuning("somewhere")
    with config.unlocked():
        config.data.augment.insert = 0.1
    with pytest.raises(ConfigError, match="could insert ids of the prompt"):
        check(config)
    merged = call(convert, f"--from={tuned}", f"--to={tmp_path / 'merged'}", "--merge").refusal()
    assert "prompts cannot be merged" in merged
    monkeypatch.setattr("gptjax.data.shards.is_prepared", lambda folder: True)
    with pytest.raises(ConfigError, match="is a prepared set, without a prompt"):
        prompts.check_raw(tuning("somewhere", data_path=tmp_path))
    assert "was tuned by prompt" in call(convert, f"--from={tuned}", f"--to=peft:{tmp_path / 'peft'}").refusal()
