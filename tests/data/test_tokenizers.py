"""Tokenizers: lossless, saved whole, equal to the library that trained them."""

import json

import numpy as np
import pytest
from conftest import ROOT, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import CheckpointError, ConfigError, DataError
from gptjax.data import tokenizers

TEXT = ["def read(self):\n    return 'naïve' + \"再见\" * 3\n\n\n", "class A:\n\tx = 12345  # ☃ and 🤖\r\n"] * 30


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.bpe_encoding(TEXT, 300)


def test_bpe_has_the_size_asked_for_and_compresses(bpe):
    assert bpe.n_vocab == 300 and tokenizers.end_of_text(bpe) == 299
    ids = tokenizers.encode(bpe, TEXT[0])
    assert len(ids) < len(TEXT[0].encode()) / 2 and bpe.decode(ids) == TEXT[0]


@settings(max_examples=300, deadline=None)
@given(st.text(), st.lists(st.sampled_from(["def ", "read(", "\n    ", "naïve", "再见", " 🤖", "12345", "\r\n", " "])))
def test_every_tokenizer_of_bytes_is_lossless(bpe, text, pieces):
    for encoding in (bpe, tokenizers.bytes_encoding()):
        for string in (text, "".join(pieces), text + tokenizers.END_OF_TEXT):
            ids = tokenizers.encode(encoding, string)
            assert encoding.decode(ids) == string
            assert tokenizers.token_bytes(encoding)[ids].sum() == len(string.encode())
            assert tokenizers.end_of_text(encoding) not in ids


@pytest.mark.parametrize("source", ["words", "random", "code"])
def test_bpe_equals_the_library_that_trained_it(source):
    rng = np.random.default_rng(0)
    texts = {
        "words": TEXT,
        "random": ["".join(rng.choice(list("abc \n"), 400)) for _ in range(50)],
        "code": [path.read_text() for path in sorted((ROOT / "gptjax").rglob("*.py"))],
    }[source]
    size = {"words": 310, "random": 600, "code": 2000}[source]
    peer, ours = tokenizers.train_bpe(texts, size - 1), tokenizers.bpe_encoding(texts, size)
    words = ["def ", "abc", "b c", "\n\n  ", "再见", "🤖", "\t", "12345", "'s", "\r\n", "self."]
    strings = [*texts, *("".join(rng.choice(words, 20)) for _ in range(500))]
    for string in strings:
        assert tokenizers.encode(ours, string) == peer.encode(string).ids


def test_chars_are_nanogpts_on_shakespeare():
    text = shared("data/tinyshakespeare/input.txt").read_text()
    encoding = tokenizers.chars_encoding([text])
    order = sorted(set(text))
    assert encoding.n_vocab == 65 and tokenizers.encode(encoding, text[:5000]) == [order.index(c) for c in text[:5000]]


def test_chars_refuse_a_stranger():
    encoding = tokenizers.chars_encoding(["añb再"])
    assert encoding.decode(tokenizers.encode(encoding, "再ñ")) == "再ñ"
    with pytest.raises(DataError, match="the character 'z' is not among the 4 of this tokenizer"):
        tokenizers.encode(encoding, "abz")


@pytest.mark.parametrize("name", ["bytes", "chars", "bpe:300"])
def test_a_saved_tokenizer_is_the_same(tmp_path, name):
    made = tokenizers.build(name, TEXT)
    tokenizers.save(made, tmp_path)
    again = tokenizers.load(tmp_path)
    assert (again.name, again.n_vocab) == (made.name, made.n_vocab)
    assert tokenizers.encode(again, TEXT[0]) == tokenizers.encode(made, TEXT[0])


def test_tiktokens_own_by_name_and_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    gpt2 = tokenizers.build("gpt2", [])
    assert tokenizers.encode(gpt2, "Hello world") == [15496, 995] and tokenizers.end_of_text(gpt2) == 50256
    tokenizers.save(gpt2, tmp_path)
    assert tokenizers.encode(tokenizers.load(tmp_path), "Hello world") == [15496, 995]


def test_a_vocabulary_that_cannot_be_fetched_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr("tiktoken.load.read_file", lambda path: (_ for _ in ()).throw(OSError("no network")))
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    with pytest.raises(DataError, match="tiktoken cannot get its vocabulary p50k_base"):
        tokenizers.build("p50k_base", [])


@pytest.mark.parametrize(
    "name, expected",
    [("bert", "unknown tokenizer 'bert'; there are bytes, chars, bpe:N"), ("bpe:99", "at least bpe:257")],
)
def test_unknown_names_are_refused(name, expected):
    with pytest.raises(ConfigError, match=expected):
        tokenizers.check_name(name)


def test_too_little_text_for_a_vocabulary_is_refused():
    with pytest.raises(DataError, match="ask for fewer"):
        tokenizers.bpe_encoding(["abc"], 4096)


@pytest.mark.parametrize("damage", [b"", b"{", b'{"name": "x"}'])
def test_a_damaged_tokenizer_is_refused(tmp_path, damage):
    tokenizers.save(tokenizers.bytes_encoding(), tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(damage)
    with pytest.raises(CheckpointError, match="cannot be read"):
        tokenizers.load(tmp_path)


def test_documents_are_joined_by_end_of_text():
    encoding = tokenizers.bytes_encoding()
    ids = tokenizers.encode_documents(encoding, ["ab", "c"], "tokens")
    assert ids.tolist() == [256, 97, 98, 256, 99, 256] and ids.dtype == np.int32
    assert tokenizers.encode_documents(tokenizers.chars_encoding(["abc"]), ["ab", "c"], "x").tolist() == [0, 1, 2]
    assert json.dumps(encoding._special_tokens) == '{"<|endoftext|>": 256}'
