"""Tokenizers are lossless, can be saved, and equal the library that trained them."""

import json
import pickle
import random

import numpy as np
import pytest
import tokenizers as library
from conftest import ROOT, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config.errors import CheckpointError, ConfigError, DataError
from gptjax.data import token_sets
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.hf_tokenizer import HFTokenizer

TEXT = ["def read(self):\n    return 'naïve' + \"再见\" * 3\n\n\n", "class A:\n\tx = 12345  # ☃ and 🤖\r\n"] * 30


@pytest.fixture(scope="module")
def bpe():
    return tokenizers.bpe_encoding(TEXT, 300)


def test_bpe_has_the_requested_size_and_compresses(bpe):
    assert bpe.n_vocab == 300 and bpe.end == 299
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
            assert encoding.end not in ids


@pytest.mark.thorough
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


def varied_strings(count):
    """Strings of many kinds: words, code, Chinese, emoji with joiners, spaces, any code points, broken UTF-8."""
    rng = random.Random(0)
    pools = [
        ["the", "model", "reads", "text", "and", "don't", "we'll", "I'M", "café", "naïve", "Straße", ""],
        ["def f(x):\n", "    return ", "\t", "x_1", "==", "()", "\r\n", "# ", "0x1F", '"""'],
        list("今天的天气很好我们去公园散步他说你好吗,。!?「」 \u3000"),
        ["👩‍👩‍👧‍👦", "🤖", "🏳️‍🌈", "👍🏽", "e\u0301", "\u200d", "\u200b", "Ａ", "ﬁ", "İ", "ß", "\ufeff", "नमस्ते", "عربى"],
        [" ", "  ", "\n", "\n\n", "\t", "\u00a0", "\r", "\x0b", "\x00", "\u2028"],
        [str(n) for n in range(0, 100_000, 977)],
    ]
    for number in range(count):
        match number % 4:
            case 0:
                yield "".join(rng.choices(rng.choice(pools), k=rng.randrange(1, 20)))
            case 1:
                yield "".join(rng.choice(rng.choice(pools)) for _ in range(rng.randrange(1, 30)))
            case 2:
                codes = [
                    rng.choice([rng.randrange(0x110000), rng.randrange(0x3000), rng.randrange(128)]) for _ in "twelve"
                ]
                yield "".join(chr(code) for code in codes if not 0xD800 <= code < 0xE000)
            case _:
                yield rng.randbytes(rng.randrange(1, 24)).decode("utf-8", "replace")


def test_10_000_varied_strings_have_the_ids_that_the_library_gives_them():
    texts = list(varied_strings(3000))
    peer, ours = tokenizers.train_bpe(texts, 999), tokenizers.bpe_encoding(texts, 1000)
    strings = list(varied_strings(10_000))
    for string, theirs in zip(strings, peer.encode_batch(strings), strict=True):
        assert tokenizers.encode(ours, string) == theirs.ids == tokenizers.encode_array(ours, string).tolist(), string
        assert ours.decode(theirs.ids) == string


def test_chars_are_nanogpts_on_shakespeare():
    text = shared("data/tinyshakespeare/input.txt").read_text()
    encoding = tokenizers.chars_encoding([text])
    order = sorted(set(text))
    assert encoding.n_vocab == 65 and tokenizers.encode(encoding, text[:5000]) == [order.index(c) for c in text[:5000]]


def test_chars_refuse_an_unknown_character():
    encoding = tokenizers.chars_encoding(["añb再"])
    assert encoding.decode(tokenizers.encode(encoding, "再ñ")) == "再ñ"
    with pytest.raises(DataError, match="the character 'z' is not among the 4 of this tokenizer"):
        tokenizers.encode(encoding, "abz")


def sentencepiece():
    """A tokenizer like Llama's first: `▁` for a space, bytes for characters that it lacks, `<s>` first, `</s>` last."""
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abelo", "▁a", "be", "ll"]
    merges = [("▁", "a"), ("b", "e"), ("l", "l")]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    made = library.Tokenizer(library.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    first, spaces = library.normalizers.Prepend("▁"), library.normalizers.Replace(" ", "▁")
    made.normalizer = library.normalizers.Sequence([first, spaces])
    to_text = library.decoders
    made.decoder = to_text.Sequence(
        [to_text.Replace("▁", " "), to_text.ByteFallback(), to_text.Fuse(), to_text.Strip(" ", 1, 0)]
    )
    made.add_special_tokens(special)
    return made


@pytest.fixture(scope="module")
def llama():
    return HFTokenizer(sentencepiece().to_str(), "llama", begin=(1,), end=2)


def test_the_librarys_ids_and_text(llama):
    peer = sentencepiece()
    for text in ("a bell", "é再🤖\n", "", "  bell a"):
        ids = llama.encode_ordinary(text)
        assert ids == peer.encode(text, add_special_tokens=False).ids and llama.decode(ids) == peer.decode(ids) == text
        joined = b"".join(llama.decode_single_token_bytes(token) for token in ids)
        assert joined.decode() == (" " + text if text else "")
        assert tokenizers.token_bytes(llama)[ids].sum() == len(joined)
    assert llama.n_vocab == 268 and tokenizers.token_bytes(llama)[:3].tolist() == [0, 0, 0]
    assert llama.encode_ordinary("\ud83e") == llama.encode_ordinary("\ufffd")
    with pytest.raises(KeyError):
        llama.decode_single_token_bytes(268)


def test_names_of_special_tokens_are_text_to_the_library_too(llama):
    assert llama.decode(llama.encode_ordinary("a</s>")) == "a</s>" and 2 not in llama.encode_ordinary("a</s>")


def test_a_byte_of_a_byte_level_token_is_a_byte():
    made = library.Tokenizer(library.models.BPE({"Ã": 0, "©": 1, "Ġ": 2}, []))
    made.pre_tokenizer, made.decoder = (
        library.pre_tokenizers.ByteLevel(add_prefix_space=False),
        library.decoders.ByteLevel(),
    )
    made.add_tokens(["é é", "éè"])
    tokenizer = HFTokenizer(made.to_str(), "x")
    ids = tokenizer.encode_ordinary(" éé é")
    assert ids == [2, 0, 1, 3]
    assert [tokenizer.decode_single_token_bytes(token) for token in ids] == [b" ", b"\xc3", b"\xa9", "é é".encode()]
    assert tokenizer.decode_single_token_bytes(4) == "éè".encode()  # an added token is text, whatever its letters


def test_a_length_to_cut_or_fill_to_is_ignored():
    made = sentencepiece()
    made.enable_truncation(2)
    made.enable_padding(length=9)
    assert len(HFTokenizer(made.to_str(), "x").encode_ordinary("a bell")) == 4


@pytest.mark.parametrize("name", ["bytes", "chars", "bpe:300"])
def test_a_saved_tokenizer_is_the_same(tmp_path, name):
    made = tokenizers.build(name, TEXT)
    tokenizers.save(made, tmp_path)
    (tmp_path / "hf").mkdir()
    for again in (tokenizers.load(tmp_path), pickle.loads(pickle.dumps(made))):
        assert isinstance(again, tokenizers.Encoding)
        assert (again.name, again.n_vocab, again.begin, again.end) == (made.name, made.n_vocab, (), made.end)
        assert tokenizers.encode(again, TEXT[0]) == tokenizers.encode(made, TEXT[0])


def test_a_saved_tokenizer_of_the_library_is_the_same(tmp_path, llama):
    tokenizers.save(llama, tmp_path)
    again = tokenizers.load(tmp_path)
    assert (again.name, again.n_vocab, again.begin, again.end) == ("llama", 268, (1,), 2)
    assert again.encode_ordinary("a bell é</s>") == llama.encode_ordinary("a bell é</s>")


def test_tiktokens_own_by_name_and_saved(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    gpt2 = tokenizers.build("gpt2", [])
    assert tokenizers.encode(gpt2, "Hello world") == [15496, 995] and gpt2.end == 50256
    tokenizers.save(gpt2, tmp_path)
    assert tokenizers.encode(tokenizers.load(tmp_path), "Hello world") == [15496, 995]


def test_vocabulary_size_by_name(monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
    text = "some text about texts, and words in other words. " * 20
    for name in ("bytes", "bpe:260", "gpt2", "cl100k_base", "o200k_base"):
        assert tokenizers.vocab_size_of(name) == tokenizers.build(name, [text]).n_vocab
    assert tokenizers.vocab_size_of("chars") is None
    assert tokenizers.TIKTOKEN_SIZES.keys() == set(tokenizers.tiktoken.list_encoding_names())
    with pytest.raises(ConfigError, match="unknown tokenizer"):
        tokenizers.vocab_size_of("bert")


def test_failed_vocabulary_download_is_one_line(tmp_path, monkeypatch):
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


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"name": "x"}', b'{"kind": "tiktoken", "name": "x"}', b"\xff"])
@pytest.mark.parametrize("file", ["facts.json", "vocabulary.tiktoken", "tokenizer.json"])
def test_a_damaged_tokenizer_is_refused(tmp_path, llama, file, damage):
    tokenizers.save(llama if file == "tokenizer.json" else tokenizers.bytes_encoding(), tmp_path)
    (tmp_path / file).write_bytes(damage)
    with pytest.raises(CheckpointError, match="cannot be read"):
        tokenizers.load(tmp_path)


def test_an_id_of_two_tokens_is_refused(tmp_path):
    tokenizers.save(tokenizers.bytes_encoding(), tmp_path)
    with (tmp_path / "vocabulary.tiktoken").open("a") as file:
        file.write("YWI= 7\n")
    with pytest.raises(CheckpointError, match="two tokens have the same id"):
        tokenizers.load(tmp_path)


def stream(tokenizer, documents):
    tokens = token_sets.from_texts(tokenizer, documents, "encoding")
    return tokens.read(0, len(tokens))


def test_documents_are_joined_by_end_of_text():
    encoding = tokenizers.bytes_encoding()
    ids = stream(encoding, ["ab", "c"])
    assert ids.tolist() == [256, 97, 98, 256, 99, 256] and ids.dtype == np.int32
    assert stream(tokenizers.chars_encoding(["abc"]), ["ab", "c"]).tolist() == [0, 1, 2]
    assert json.dumps(encoding._special_tokens) == '{"<|endoftext|>": 256}'


def test_documents_begin_and_end_where_the_tokenizer_says(llama):
    a = llama.encode_ordinary("a")
    assert stream(llama, ["a", ""]).tolist() == [1, *a, 2, 1, 2]
    endless = HFTokenizer(llama.text, "x", begin=(1,))
    assert stream(endless, ["a", "a"]).tolist() == [1, *a, 1, *a]


def test_ids_without_a_token_have_no_bytes():
    encoding = tokenizers.Encoding("x", pat_str=".", mergeable_ranks={b"a": 0, b"bc": 3}, special_tokens={"<s>": 5})
    assert tokenizers.token_bytes(encoding).tolist() == [1, 0, 0, 2, 0, 0]
