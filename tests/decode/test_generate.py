"""Generation: `Run.generate`, what it refuses, and the command."""

import io
import json
import re

import jax
import jsonschema
import pytest
from conftest import generate
from test_engine import generator

import gptjax
from gptjax.config.errors import ConfigError, DataError
from gptjax.decode import constraints
from gptjax.decode import generate as decoding
from gptjax.decode.beam import BeamSearchParams
from gptjax.decode.contrastive import ContrastiveSearchParams
from gptjax.decode.drafting import SpeculativeConfig
from gptjax.decode.engine import Sample
from gptjax.decode.generate import GenerationConfig, Request
from gptjax.decode.settings import SamplingParams
from gptjax.decode.watermark import Watermark, detect
from gptjax.training import loop


@pytest.fixture(scope="module")
def run(trained):
    return gptjax.load(trained)


@pytest.fixture(scope="module")
def chars(tmp_path_factory, text_file):
    """The directory of a run whose tokenizer has no end token."""
    from conftest import tiny_config

    workdir = tmp_path_factory.mktemp("runs") / "chars"
    loop.train(tiny_config(data_path=text_file, data_tokenizer="chars", train_steps=1, sample_prompt="the"), workdir)
    return workdir


def test_seeds_determine_texts(run):
    texts = [run.generate("the", max_tokens=12, temperature=1.0, seed=seed, index=i).text for seed, i in
             ((1, 0), (1, 0), (2, 0), (1, 1))]  # fmt: skip
    assert texts[0] == texts[1] and len(set(texts)) == 3


def test_an_empty_prompt_begins_a_document(run):
    assert run.generate("", max_tokens=3, temperature=0).ids == run.generate("", max_tokens=3, temperature=0).ids
    (sample,) = dict(
        run.generate_batch([Request((256,), SamplingParams(max_tokens=3, temperature=0), jax.random.key(0))])
    ).values()
    assert sample.ids == run.generate("", max_tokens=3, temperature=0).ids


def test_text_is_streamed(run):
    pieces = []
    sample = run.generate("the", max_tokens=60, sliding_context=True, on_text=pieces.append, temperature=1.5, top_k=0)
    assert "".join(pieces) == sample.text and len(pieces) > 1


@pytest.mark.parametrize("speculation", [SpeculativeConfig(3, ngram=2), SpeculativeConfig(4)])
def test_speculation_gives_the_same_text(run, speculation):
    options = {"draft": run.generator} if not speculation.ngram else {}
    for prompt in ("", "the model", "a"):
        plain = run.generate(prompt, temperature=0)
        quick = run.generate(prompt, temperature=0, speculation=speculation, **options)
        assert (quick.ids, quick.text, quick.finish) == (plain.ids, plain.text, plain.finish)


def test_a_watermark_is_detected_where_there_is_one(run):
    mark = Watermark(key=7, delta=5.0)
    options = dict(max_tokens=200, sliding_context=True, temperature=1.5, top_k=0, logit_bias={256: -1e6})
    assert detect(run.generate("the", **options, watermark=mark).ids, mark).z > 6
    assert abs(detect(run.generate("the", **options).ids, mark).z) < 4


SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 4},
        "ok": {"type": "boolean"},
        "n": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 2},
    },
    "required": ["name", "ok", "n"],
    "additionalProperties": False,
}


def constrained(grammar, prompt="x", n=1000, max_tokens=110):
    """Samples of an untrained model with a context of 128."""
    from test_engine import BYTES

    requests = [
        Request(prompt, SamplingParams(max_tokens, top_k=0, temperature=1.0), jax.random.key(i)) for i in range(n)
    ]
    of = generator(BYTES, model_context=128, model_layers=1)
    return [sample for _, sample in decoding.generate(of, requests, GenerationConfig(batch_size=64, grammar=grammar))]


@pytest.mark.slow
def test_a_thousand_texts_under_a_schema_all_validate():
    pytest.importorskip("llguidance", reason="the constraints extra is not installed")
    samples = constrained(constraints.json_schema(SCHEMA))
    assert {sample.finish for sample in samples} == {"end"}
    for sample in samples:
        jsonschema.validate(json.loads(sample.text), SCHEMA)
    assert len({sample.text for sample in samples}) > 500


@pytest.mark.slow
def test_a_thousand_texts_under_a_pattern_all_match():
    pytest.importorskip("llguidance", reason="the constraints extra is not installed")
    pattern = r"[A-Z]{1,3}-(red|green|né)(, [0-9]{2,4}){0,2}!"
    samples = constrained(constraints.regex(pattern))
    assert {sample.finish for sample in samples} == {"end"}
    assert all(re.fullmatch(pattern, sample.text) for sample in samples)
    assert len({sample.text for sample in samples}) > 300


def objects(result):
    assert result.code == 0, result.err
    return [json.loads(line) for line in result.out.splitlines()]


def test_the_command_prints_texts_in_order_and_objects(trained, call):
    flags = [f"--workdir={trained}", "--prompt=the ", "--max_tokens=9", "--seed=1", "--samples=3", "--batch_size=2"]
    plain, samples = call(generate, *flags), objects(call(generate, *flags, "--json"))
    assert plain.out == "\n\n".join("the " + s["text"] for s in samples) + "\n"
    assert [s["index"] for s in samples] == [0, 1, 2] and all(len(s["ids"]) == len(s["logprobs"]) for s in samples)
    assert all(p <= 0 for s in samples for p in s["logprobs"]) and "score" not in samples[0]
    tokens = sum(len(s["ids"]) for s in samples)
    assert re.search(rf"{tokens} tokens in \d+\.\d s, [\d,.]+ tokens/s; the first text after \d+\.\d\d s", plain.err)


def test_texts_are_printed_when_they_end(trained, call, monkeypatch, capsys):
    shown = []

    def generate_batch(self, requests, generation, on_text, stride):
        for number in range(2):
            on_text(number, f"{number}")
            yield number, Sample(f"{number}", [1], [0.0], "end", [])
            shown.append(capsys.readouterr().out)

    monkeypatch.setattr("gptjax.runs.run.Run.generate_batch", generate_batch)
    call(generate, f"--workdir={trained}", "--prompt=a", "--samples=2")
    assert shown == ["a0\n\n", "a1\n"]


@pytest.mark.slow
def test_prompts_of_a_file_of_stdin_and_of_json(trained, call, tmp_path, monkeypatch):
    lines = 'the\n\n"a \\n b"\n{"prompt": "model", "id": 3}\n17\n'
    path = tmp_path / "prompts.txt"
    path.write_text(lines)
    flags = [f"--workdir={trained}", "--max_tokens=4", "--json", "--samples=2"]
    from_file = objects(call(generate, *flags, f"--prompts={path}"))
    assert [(one["prompt"], one["index"]) for one in from_file] == [
        (prompt, index) for prompt in ("the", "a \n b", "model", "17") for index in (0, 1)
    ]
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    assert objects(call(generate, *flags, "--prompts=-", "--batch_size=8")) == from_file
    # A row's seed is its own: another file has the same text for the same prompt.
    path.write_text("model\n")
    assert objects(call(generate, *flags, f"--prompts={path}", "--batch_size=8"))[1]["ids"] == from_file[5]["ids"]


@pytest.mark.slow
def test_searches_and_alternatives_by_flags(trained, call, run):
    flags = [f"--workdir={trained}", "--prompt=the", "--max_tokens=5", "--json"]
    best = objects(call(generate, *flags, "--beams=4", "--best=2", "--length_penalty=0.5"))
    assert len(best) == 2 and best[0]["score"] >= best[1]["score"]
    assert best[0]["ids"] == run.generate("the", max_tokens=5, beams=BeamSearchParams(4, length_penalty=0.5)).ids
    (found,) = objects(call(generate, *flags, "--contrastive_k=3", "--contrastive_alpha=0.5"))
    assert found["ids"] == run.generate("the", max_tokens=5, contrastive=ContrastiveSearchParams(k=3, alpha=0.5)).ids
    (told,) = objects(call(generate, *flags, "--logprobs=2", "--temperature=0"))
    assert [place[0][0] for place in told["alternatives"]] == told["ids"]
    assert [place[0][1] for place in told["alternatives"]] == pytest.approx(told["logprobs"])
    assert all(len(place) == 2 for place in told["alternatives"])


def test_constraints_by_flags(trained, call, tmp_path):
    pytest.importorskip("llguidance", reason="the constraints extra is not installed")
    flags = [f"--workdir={trained}", "--prompt=x", "--json"]
    assert re.fullmatch("[0-9]{3}", objects(call(generate, *flags, "--regex=[0-9]{3}"))[0]["text"])
    assert objects(call(generate, *flags, "--choice=yes", "--choice=no"))[0]["text"] in ("yes", "no")
    path = tmp_path / "schema.json"
    path.write_text('{"type": "boolean"}')
    for schema in (path, path.read_text()):
        assert objects(call(generate, *flags, f"--json_schema={schema}"))[0]["text"] in ("true", "false")


def test_a_watermark_by_flags(trained, call, tmp_path):
    flags = [f"--workdir={trained}", "--watermark=5", "--watermark_delta=8"]
    wanted = [
        "--max_tokens=150",
        "--sliding_context",
        "--temperature=1.5",
        "--top_k=0",
        "--logit_bias=256=-1000",
        "--json",
    ]
    # Only bytes that are text by themselves come back as the same tokens.
    wanted += [f"--logit_bias={byte}=-1000" for byte in range(128, 256)]
    (sample,) = objects(call(generate, *flags, "--prompt=the", *wanted))
    path = tmp_path / "text"
    path.write_text(sample["text"], newline="")
    assert call(generate, *flags, f"--detect={path}").out.startswith("watermarked: ")
    path.write_text("the model reads text and writes ünïcode again softly. " * 3)
    assert call(generate, *flags, f"--detect={path}").out.startswith("no watermark found: ")
    assert objects(call(generate, *flags, f"--detect={path}", "--json"))[0]["watermarked"] is False


REFUSED = [
    (["--prompt=" + "x" * 16], "the prompt has 16 tokens, and the model's context is 16, the new ones included"),
    (["--prompt=" + "x" * 40], "or give --sliding_context"),
    (["--temperature=-1"], "temperature is -1.0; it must be at least 0"),
    (["--temperature=nan"], "--temperature: it must be a finite number, not nan"),
    (["--max_tokens=0"], "max_tokens is 0; it must be at least 1"),
    (["--top_k=-3"], "top_k is -3"),
    (["--temperature=0", "--top_p=0.9"], "top_p=0.9 does nothing at temperature 0"),
    (["--temperature=0", "--top_k=5"], "top_k=5 does nothing at temperature 0"),
    (["--beams=2", "--temperature=1"], "temperature does nothing in a search by beams or contrast"),
    (["--beams=2", "--top_p=0.5"], "top_p does nothing in a search"),
    (["--beams=2", "--contrastive_k=3"], "beams and contrastive cannot be used together"),
    (["--beams=2", "--sliding_context"], "sliding_context"),
    (["--beams=2", "--samples=2"], "--samples does nothing in a search"),
    (["--groups=2"], "--groups does nothing without --beams"),
    (["--contrastive_alpha=0.5"], "--contrastive_alpha does nothing without --contrastive_k"),
    (["--detect=x"], "--detect does nothing without --watermark"),
    (["--combine=token"], "--combine does nothing without --ensemble"),
    (["--watermark=0", "--watermark_gamma=2"], "gamma is 2.0; it must be more than 0"),
    (["--logit_bias=5"], "--logit_bias=5 is not ID=NATS, such as 50=-2.5"),
    (["--logit_bias=999=1"], "logit_bias has the id 999; ids are whole numbers in 0 to 256"),
    (["--prompts=nowhere.txt"], "nowhere.txt"),
    (["--prompts=x", "--prompt=x"], "--prompt and --prompts cannot be used together"),
    (["--regex=(["], "the regular expression cannot be used: "),
    (["--regex="], "the regular expression allows no text but the empty one"),
    (["--json_schema={"], "the JSON schema is no JSON"),
    (["--json_schema=nowhere.json"], "nowhere.json"),
    (["--regex=a", "--choice=b"], "--regex and --choice cannot be used together"),
    (["--ngram=2", "--guidance=2"], "speculation and guidance cannot be used together"),
    (["--ngram=2", "--draft_tokens=20"], "20 tokens of speculation are too many for a context of 16"),
    (["--draft_tokens=3"], "nothing proposes tokens"),
    (["--negative_prompt=x"], "a negative prompt does nothing without guidance"),
    (["--guidance=0"], "guidance is 0.0; it must be a number above 0"),
    (["--stop="], "stop has an empty string"),
    (["--min_tokens=9", "--max_tokens=3"], "min_tokens is 9, more than the 3 of max_tokens"),
    (["--logprobs=999", "--json"], "alternatives is 999; it must be 0 to 257"),
    (["--batch_size=-1"], "batch_size is -1"),
]


@pytest.mark.parametrize("flags, expected", REFUSED, ids=[" ".join(flags)[:40] for flags, _ in REFUSED])
def test_invalid_flags_are_refused_in_one_line(trained, call, flags, expected):
    if any("regex" in flag or "schema" in flag for flag in flags):
        pytest.importorskip("llguidance", reason="the constraints extra is not installed")
    assert expected in call(generate, f"--workdir={trained}", *flags).refusal()


def test_unsuitable_runs_are_refused_in_one_line(trained, chars, call, tmp_path):
    assert "no token to begin with; give --prompt" in call(generate, f"--workdir={chars}").refusal()
    assert "they must share one vocabulary" in call(generate, f"--workdir={trained}", f"--draft={chars}").refusal()
    assert "must have one tokenizer" in call(generate, f"--workdir={trained}", f"--ensemble={chars}").refusal()
    empty = tmp_path / "empty.txt"
    empty.write_text("\n \n")
    assert (
        "has no prompts; write one per line" in call(generate, f"--workdir={trained}", f"--prompts={empty}").refusal()
    )


def test_unknown_options_and_ids_are_refused(run):
    with pytest.raises(ConfigError, match="unknown option topk; options are max_tokens, temperature, top_k"):
        run.generate("x", topk=3)
    for ids, expected in (((), "the prompt is empty"), ((3, 257), "they must lie in 0 to 256"), ((-1,), "0 to 256")):
        with pytest.raises(DataError, match=expected):
            next(run.generate_batch([Request(ids, SamplingParams(), jax.random.key(0))]))


@pytest.mark.slow
@pytest.mark.parametrize(
    "search", [dict(beams=BeamSearchParams(3, best=2)), dict(contrastive=ContrastiveSearchParams(0.5, 3))], ids=str
)
def test_searches_of_several_prompts_are_those_of_each(run, search):
    wanted = [("the", 4), ("a", 4), ("model reads", 4), ("the", 6)]
    requests = [Request(prompt, SamplingParams(max_tokens), jax.random.key(0)) for prompt, max_tokens in wanted]
    found = list(run.generate_batch(requests, GenerationConfig(batch_size=2, **search)))
    alone = [
        (n, sample)
        for n, request in enumerate(requests)
        for _, sample in run.generate_batch([request], GenerationConfig(**search))
    ]
    assert [(n, sample.ids) for n, sample in found] == [(n, sample.ids) for n, sample in alone]
    assert len(found) == 4 * (2 if "beams" in search else 1)


def test_a_dialogue_on_the_command_line(trained, call, monkeypatch, tmp_path):
    pytest.importorskip("jinja2", reason="the chat extra is not installed")
    template = tmp_path / "chat.jinja"
    template.write_text("{% for m in messages %}{{ m.content }}\n{% endfor %}")
    lines = iter(["the", "a", "/reset", "the", "x" * 30, "/exit", "not read"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(lines))
    flags = [f"--workdir={trained}", "--chat", f"--chat_template={template}", "--max_tokens=4", "--temperature=0"]
    result = call(generate, *flags, "--top_k=0")
    assert result.code == 0, result.err
    first = gptjax.load(trained).generate("the\n", max_tokens=4, temperature=0, top_k=0).text
    # After /reset the same question has the same answer; the third, which does not fit, has none.
    assert result.out.startswith(first + "\n") and result.out.endswith(first + "\n")
    assert "shorten it" in result.err and next(lines) == "not read"
    for more in (["--json"], ["--samples=2"], ["--beams=2"], ["--prompt=x"], ["--sliding_context"]):
        assert "cannot be used together" in call(generate, f"--workdir={trained}", "--chat", *more).refusal()
    assert "has no chat template" in call(generate, f"--workdir={trained}", "--chat").refusal()
    assert "--system does nothing without --chat" in call(generate, f"--workdir={trained}", "--system=x").refusal()


def test_the_cache_may_be_bfloat16(run, trained, call):
    wanted = dict(max_tokens=9, temperature=0, top_k=0)
    exact, rounded = (run.generate("the", **wanted, cache_dtype=dtype) for dtype in ("float32", "bfloat16"))
    assert exact == run.generate("the", **wanted)
    assert rounded.logprobs[0] == pytest.approx(exact.logprobs[0], abs=0.05) and rounded.logprobs != exact.logprobs
    flags = [f"--workdir={trained}", "--prompt=the", "--max_tokens=9", "--temperature=0", "--json"]
    (told,) = objects(call(generate, *flags, "--cache_dtype=bfloat16"))
    assert told["logprobs"] == rounded.logprobs
    with pytest.raises(ConfigError, match="it must be float32 or bfloat16"):
        run.generate("the", cache_dtype="int8")


def test_flags_and_files_without_effect_are_refused(trained, call, tmp_path):
    for flags, expected in (
        (["--logprobs=2"], "--logprobs does nothing without --json"),
        (["--prompt_logprobs"], "--prompt_logprobs does nothing without --json"),
        ([f"--json_schema={tmp_path / 'absent'}"], "absent"),
    ):
        assert expected in call(generate, f"--workdir={trained}", *flags).refusal()
