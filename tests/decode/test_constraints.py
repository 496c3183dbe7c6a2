"""Constraints: what random logits write under them always matches, in the tokens of every kind of tokenizer."""

import json
import re
import sys

import jax
import jax.numpy as jnp
import jsonschema
import numpy as np
import pytest
import tokenizers as library
from conftest import shared

from gptjax.config.errors import ConfigError
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.hf_tokenizer import HFTokenizer
from gptjax.decode import constraints

CLOSED = {"additionalProperties": False}
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": -3, "maximum": 120},
        "code": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{1,3}$"},
        "tags": {"type": "array", "items": {"enum": ["a", "né", None, "中🤖"]}, "minItems": 1, "maxItems": 3},
        "inner": {"anyOf": [{"type": "boolean"}, {"type": "object", "properties": {"x": {"const": 7}}} | CLOSED]},
    },
    "required": ["name", "age", "tags"],
} | CLOSED
# Compact, as samples are; every character that the schema itself needs.
TEXT = [
    json.dumps(
        {"name": "the né\n", "age": 120, "code": "AB-123", "tags": ["中🤖", None, "a"], "inner": True},
        ensure_ascii=False,
    )
] * 9


def sentencepiece():
    """A BPE of Llama's kind: `▁` for a space, bytes as tokens of their own, two ids that spell the same."""
    pieces = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{byte:02X}>" for byte in range(256)),
        "▁",
        "a",
        "b",
        "ab",
        "▁ab",
        '"',
        "né",
    ]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    model = library.models.BPE(vocabulary, [("a", "b"), ("▁", "ab")], unk_token="<unk>", byte_fallback=True)
    made = library.Tokenizer(model)
    made.pre_tokenizer = library.pre_tokenizers.Metaspace()
    fallback, fuse = library.decoders.ByteFallback(), library.decoders.Fuse()
    made.decoder = library.decoders.Sequence([library.decoders.Metaspace(), fallback, fuse])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    return HFTokenizer(made.to_str(), "llama", begin=(1,), end=2)


TOKENIZERS = {
    "bytes": tokenizers.bytes_encoding(),
    "chars": tokenizers.chars_encoding([*TEXT, "\n", "".join(map(chr, range(32, 127)))]),
    "bpe": tokenizers.bpe_encoding(TEXT, 300),
    "llama": sentencepiece(),
}


@jax.jit
def greedy(logits_BV, allowed_BW):
    return jnp.argmax(constraints.apply_bitmask(logits_BV, allowed_BW), axis=-1)


def samples(grammar, tokenizer, rows, seed=0, padding=9, limit=400):
    """(matcher, ids) of each row. The logits are noise, for padding too: each allowed id is as likely as another."""
    vocabulary = tokenizer.n_vocab + padding
    constraint = constraints.compile_grammar(grammar, tokenizer, vocabulary)
    matchers, texts = [constraint.start() for _ in range(rows)], [[] for _ in range(rows)]
    rng = np.random.default_rng(seed)
    for _ in range(limit):
        if all(matcher.is_done for matcher in matchers):
            break
        logits_BV = rng.gumbel(size=(rows, vocabulary)).astype("f")
        ids = greedy(logits_BV, constraints.batched_bitmask(matchers, vocabulary))
        for matcher, text, token in zip(matchers, texts, np.asarray(ids).tolist(), strict=True):
            if not matcher.is_done:
                text.append(token)
                matcher.advance(token)
    return list(zip(matchers, texts, strict=True))


def spelt(tokenizer, ids):
    """The text of ids that may end with the end token: strict UTF-8, no id without a token."""
    ids = ids[:-1] if ids and ids[-1] == tokenizer.end else ids
    assert not any(map(tokenizer.is_special_token, ids))
    return b"".join(map(tokenizer.decode_single_token_bytes, ids)).decode()


@pytest.mark.thorough
@pytest.mark.parametrize("name, rows", [("bytes", 100), ("chars", 100), ("bpe", 1000), ("llama", 100)])
def test_random_samples_under_a_schema_all_validate(name, rows):
    seen, validator = set(), jsonschema.Draft202012Validator(SCHEMA)
    for matcher, ids in samples(constraints.json_schema(SCHEMA), TOKENIZERS[name], rows):
        assert matcher.is_done and matcher.is_complete and matcher.problem is None
        text = spelt(TOKENIZERS[name], ids)
        validator.validate(json.loads(text))
        seen.add(text)
    assert len(seen) > 0.9 * rows  # a constraint, not a fixed text


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("pattern", [r"(ab|né ){1,4}x?|[0-7]{3}", r"a{2,5}(中|🤖)[^a-z]?", '[ab"]*<\\|endoftext\\|>?'])
def test_random_samples_under_a_pattern_all_match(name, pattern):
    for matcher, ids in samples(constraints.regex(pattern), TOKENIZERS[name], 60):
        text = spelt(TOKENIZERS[name], ids)
        assert re.fullmatch(pattern, text) if matcher.is_done else TOKENIZERS[name].end is None and len(ids) == 400


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_choice_is_reached_and_nothing_else(name):
    texts = ["a", "n", "né", "néb", "中", "🤖", 'b"\n{', "the né"]
    found = [spelt(TOKENIZERS[name], ids) for _, ids in samples(constraints.choices(texts), TOKENIZERS[name], 300)]
    # Without an end token a text that another goes on from cannot end.
    endless = {"n", "né"} if TOKENIZERS[name].end is None else set()
    assert set(found) == set(texts) - endless


def test_a_character_of_several_tokens_is_whole_or_unfinished():
    tokenizer = TOKENIZERS["bytes"]
    matcher = constraints.compile_grammar(constraints.regex("[é中🤖]x?"), tokenizer, 257).start()
    for byte in "🤖".encode():
        assert not matcher.is_complete and not matcher.is_done
        matcher.advance(byte)
    assert matcher.is_complete and not matcher.is_done
    assert allowed(matcher) == {ord("x"), tokenizer.end}
    matcher.advance(tokenizer.end)
    assert matcher.is_complete and matcher.is_done


def allowed(matcher):
    """The ids whose bits are set."""
    return set(np.flatnonzero(np.unpackbits(matcher.allowed_W.view(np.uint8), bitorder="little")).tolist())


def test_forced_text_has_the_tokenizers_ids():
    """A model has learnt to read `a bcd`, which the merges give, and not `ab c d`, which the longest tokens give."""
    merged = {bytes([value]): value for value in range(256)} | {b"bc": 256, b"bcd": 257, b"ab": 258}
    tokenizer = tokenizers.Encoding(
        "x", pat_str=r"[\s\S]+", mergeable_ranks=merged, special_tokens={"<e>": 259}, end=259
    )
    matcher = constraints.compile_grammar(constraints.json_schema({"const": {"abcd": "é"}}), tokenizer, 260).start()
    ids = []
    while not matcher.is_done:
        [token] = allowed(matcher)
        ids.append(token)
        matcher.advance(token)
    assert ids == tokenizer.encode_ordinary('{"abcd":"é"}') and 257 in ids


def test_tokens_that_spell_the_same_are_both_allowed():
    tokenizer = TOKENIZERS["llama"]
    twins = [token for token in range(tokenizer.n_vocab) if tokenizer.decode_single_token_bytes(token) == b"a"]
    assert len(twins) == 2 and set(twins) <= allowed(
        constraints.compile_grammar(constraints.regex("[ax]+"), tokenizer, 270).start()
    )


@pytest.mark.parametrize("vocabulary", [257, 288, 300, 1024])
@pytest.mark.parametrize("name", ["bytes", "chars"])
def test_ids_without_a_token_are_never_allowed(name, vocabulary):
    tokenizer = TOKENIZERS[name]
    matcher = constraints.compile_grammar(constraints.regex(r"(?s:.*)"), tokenizer, vocabulary).start()
    assert len(matcher.allowed_W) == constraints.bitmask_words(vocabulary)
    assert max(allowed(matcher)) == tokenizer.n_vocab - 1  # with the end token, where there is one


def test_the_device_reads_the_bits():
    rng = np.random.default_rng(0)
    for V in (1, 31, 32, 33, 1000):
        logits, kept = rng.normal(size=(3, V)).astype("f"), rng.random((3, V)) < 0.5
        bits = np.packbits(np.pad(kept, ((0, 0), (0, -V % 32))), axis=1, bitorder="little").view("<u4")
        found = np.asarray(constraints.apply_bitmask(jnp.array(logits), jnp.array(bits)))
        np.testing.assert_array_equal(found, np.where(kept, logits, -np.inf))


def test_a_copy_is_independent():
    matcher = constraints.compile_grammar(constraints.choices(["ab", "ac"]), TOKENIZERS["bytes"], 257).start()
    matcher.advance(ord("a"))
    other = matcher.copy()
    other.advance(ord("c"))
    assert other.is_done and not matcher.is_done and allowed(matcher) == {ord("b"), ord("c")}
    matcher.advance(ord("b"))
    assert matcher.is_done and matcher.is_complete


def test_tokens_that_are_not_allowed_are_refused():
    matcher = constraints.compile_grammar(constraints.regex("a{1,2}"), TOKENIZERS["bytes"], 257).start()
    with pytest.raises(ValueError, match="token 98 is not allowed here"):
        matcher.advance(98)
    matcher.advance(97)
    matcher.advance(97)
    assert matcher.is_done and matcher.is_complete
    with pytest.raises(ValueError, match="token 97 is not allowed"):
        matcher.advance(97)


def test_truncated_text_is_not_complete():
    [(matcher, ids)] = samples(constraints.regex("[ab]{40}"), TOKENIZERS["bytes"], 1, limit=10)
    assert len(ids) == 10 and not matcher.is_done and not matcher.is_complete


def test_unbounded_text_ends_or_is_reported_as_incomplete():
    schema = {"type": "array", "items": {"type": "string"}}
    ends = set()
    for matcher, ids in samples(constraints.json_schema(schema), TOKENIZERS["bpe"], 50, limit=60):
        assert matcher.is_done == matcher.is_complete == _is_json(spelt_so_far(TOKENIZERS["bpe"], ids))
        ends.add(matcher.is_done)
    assert ends == {True, False}


def spelt_so_far(tokenizer, ids):
    """The text of ids that may stop within a character."""
    return b"".join(map(tokenizer.decode_single_token_bytes, ids)).decode(errors="ignore")


def _is_json(text):
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def test_a_pattern_that_turns_out_too_complex_ends_its_row():
    pattern = r"\w{1,400}(é|[^a]{3,300}){40}"
    for matcher, ids in samples(constraints.regex(pattern), TOKENIZERS["bpe"], 2, limit=150):
        assert matcher.is_done and not matcher.is_complete and 0 < len(ids) < 150
        assert matcher.problem.startswith("lexer error")


def test_a_character_that_the_tokenizer_lacks():
    poor = tokenizers.chars_encoding(["ab"])
    with pytest.raises(ConfigError, match="the list of choices cannot be met with the tokenizer chars: it has"):
        constraints.compile_grammar(constraints.choices(["é", "z"]), poor, 2)
    assert {spelt(poor, ids) for _, ids in samples(constraints.choices(["a", "bé", "bb"]), poor, 50)} == {"a", "bb"}
    for matcher, ids in samples(constraints.regex("b[ab]é"), poor, 5):
        assert len(ids) == 2 and matcher.is_done and not matcher.is_complete
        assert matcher.problem == "it has no token that can follow"
    assert all(m.is_done and m.is_complete for m, _ in samples(constraints.regex("abé?"), poor, 2))


def test_rows_without_a_constraint_and_rows_that_ended_are_free():
    constraint = constraints.compile_grammar(constraints.regex("a"), TOKENIZERS["bytes"], 257)
    done, going = constraint.start(), constraint.start()
    done.advance(97)
    allowed_BW = constraints.batched_bitmask([None, done, going], 257)
    assert (allowed_BW[:2] == 0xFFFFFFFF).all() and np.bitwise_count(allowed_BW[2]).sum() == 1


@pytest.mark.parametrize(
    "make, expected",
    [
        (lambda: constraints.regex("(a"), "the regular expression cannot be used: unclosed group"),
        (lambda: constraints.regex("a(?=b)"), "look-around, including look-ahead and look-behind, is not supported"),
        (lambda: constraints.regex(r"a\b"), "the regular expression cannot be used: lookarounds not supported"),
        (lambda: constraints.json_schema("{nope"), "the JSON schema is no JSON: Expecting property name"),
        (lambda: constraints.json_schema({"a": {1}}), "the JSON schema is no JSON: Object of type set"),
        (lambda: constraints.json_schema("3"), 'the JSON schema must be an object, such as {"type": "object"}'),
        (lambda: constraints.json_schema({"type": "strin"}), "the JSON schema cannot be used: Invalid type: strin"),
        (
            lambda: constraints.json_schema({"type": "array", "uniqueItems": True}),
            'Unimplemented keys: ["uniqueItems"]',
        ),
        (lambda: constraints.json_schema({"enum": []}), "the JSON schema cannot be used: Unsatisfiable schema"),
        (lambda: constraints.choices([]), "choices must be a list of one text or more"),
        (lambda: constraints.choices("ab"), "choices must be a list of one text or more"),
    ],
)
def test_invalid_grammars_are_refused_in_one_line(make, expected):
    with pytest.raises(ConfigError, match=re.escape(expected)) as raised:
        make()
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 260


def test_llguidance_is_needed(monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(ConfigError, match=re.escape("constraints need llguidance: pip install 'gptjax[constraints]'")):
        constraints.regex("a")


def test_gpt2s_own_vocabulary(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    gpt2 = tokenizers.build("gpt2", [])
    for matcher, ids in samples(constraints.json_schema(SCHEMA), gpt2, 8, padding=47):
        assert matcher.is_complete
        jsonschema.validate(json.loads(spelt(gpt2, ids)), SCHEMA)
