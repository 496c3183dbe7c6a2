"""Tokenizers of Hugging Face folders: tiktoken if its ids are the same on every text, else the tokenizers library."""

import json
from itertools import product

import numpy as np
import pytest
import tokenizers as library
from conftest import shared
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config.errors import ConfigError, DataError
from gptjax.data.tokenizers import exactness, tokenizers
from gptjax.data.tokenizers import from_hf as hf
from gptjax.data.tokenizers.hf_tokenizer import ALPHABET, HFTokenizer, to_bytes
from gptjax.decode import detokenize, prompts

TEXT = ["def read(self):\n    return 'naïve' + \"再见\" * 3\n\n\n", "class A:\n\tx = 12345  # ☃ and 🤖\r\n"] * 30
PIECES = [
    "def ",
    "read(",
    "\n    ",
    "naïve",
    "再见",
    " 🤖",
    "12345",
    "\r\n",
    " ",
    "\u3000",
    "it's I'LL",
    "<|endoftext|>",
]
texts = st.builds(lambda text, pieces: text + "".join(pieces), st.text(), st.lists(st.sampled_from(PIECES)))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """Returns GPT-2's encoding and the folder that it was written to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(shared("tiktoken_cache")))
        encoding = tokenizers.build("gpt2", [])
    folder = tmp_path_factory.mktemp("gpt2")
    hf.write(encoding, folder)
    return encoding, folder


def same_ids(encoding, folder, texts):
    """Checks that the tokenizer of the folder and the library give the encoding's ids."""
    again, why = hf.read(folder)
    assert why == "tiktoken.Encoding, exact: every merge agrees"
    assert isinstance(again, tokenizers.Encoding)
    assert (again.n_vocab, again.begin, again.end) == (encoding.n_vocab, encoding.begin, encoding.end)
    peer = library.Tokenizer.from_file(str(folder / "tokenizer.json"))
    peer.encode_special_tokens = True

    @settings(max_examples=200, deadline=None)
    @given(texts)
    def check(text):
        ids = tokenizers.encode(encoding, text)
        assert tokenizers.encode(again, text) == ids == peer.encode(text, add_special_tokens=False).ids
        assert again.decode(ids) == text == peer.decode(ids, skip_special_tokens=False)

    check()


@pytest.mark.parametrize("name", ["bytes", "chars", "bpe:300"])
def test_our_own_go_there_and_back(tmp_path, name):
    encoding = tokenizers.build(name, TEXT)
    hf.write(encoding, tmp_path)
    same_ids(encoding, tmp_path, texts if name != "chars" else st.text(sorted(set("".join(TEXT)))))


def test_an_alphabet_still_refuses_a_stranger(tmp_path):
    hf.write(tokenizers.chars_encoding(["añ"]), tmp_path)
    again, _ = hf.read(tmp_path)
    with pytest.raises(DataError, match="the character 'z' is not among the 2"):
        tokenizers.encode(again, "az")


def test_gpt2_goes_there_and_back(gpt2):
    same_ids(*gpt2, texts)


@pytest.mark.slow
def test_gpt2s_own_files(gpt2, tmp_path):
    encoding, written = gpt2
    model = json.loads((written / "tokenizer.json").read_text())["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "".join(f"{left} {right}\n" for left, right in model["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + merges)
    again, why = hf.read(tmp_path)
    assert isinstance(again, tokenizers.Encoding) and why.startswith("tiktoken.Encoding, exact")
    assert again._mergeable_ranks == encoding._mergeable_ranks and again.end == 50256
    text = "".join(PIECES) + "Hello  world, it's 2025.\n"
    assert again.encode_ordinary(text) == encoding.encode_ordinary(text)


def test_transformers_reads_what_is_written(tmp_path):
    transformers = pytest.importorskip("transformers")
    plain = tokenizers.bpe_encoding(TEXT, 300)
    for begin in ((), (299,)):
        plain.begin = begin
        hf.write(plain, tmp_path)
        peer = transformers.AutoTokenizer.from_pretrained(tmp_path)
        for text in (*TEXT[:2], "it's  再见\n"):
            assert peer(text)["input_ids"] == [*begin, *plain.encode_ordinary(text)]
            assert peer.decode(plain.encode_ordinary(text), clean_up_tokenization_spaces=False) == text
        assert peer.eos_token_id == 299
        assert peer.bos_token_id == (299 if begin else None)


def byte_level(merges=(), extra=(), ignore_merges=False):
    """A byte-level BPE like GPT-2's: 256 bytes, a token per merge, and tokens that no merge makes."""
    pieces = [*ALPHABET, *dict.fromkeys(left + right for left, right in merges), *extra]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    made = library.Tokenizer(library.models.BPE(vocabulary, list(merges), ignore_merges=ignore_merges))
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = library.decoders.ByteLevel()
    return made


AB_BC = [("a", "b"), ("b", "c"), ("ab", "c")]


def composed():
    made = byte_level(AB_BC)
    made.normalizer = library.normalizers.NFC()
    return made


def prefixed():
    made = byte_level(AB_BC)
    made.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=True)
    return made


def cutting():
    made = byte_level(AB_BC)
    made.add_tokens(["<tool>"])
    return made


def by_words():
    made = byte_level(AB_BC)
    made.pre_tokenizer = library.pre_tokenizers.Split(library.Regex(r"\w+|\W"), "isolated")
    made.pre_tokenizer = library.pre_tokenizers.Sequence(
        [made.pre_tokenizer, library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    return made


def out_of_order():
    vocabulary = {piece: token for token, piece in enumerate([*ALPHABET, "ab", "bc"])}
    made = byte_level()
    made.model = library.models.BPE(vocabulary, [("b", "c"), ("a", "b")])
    return made


def sentencepiece():
    special = ["<unk>", "<s>", "</s>"]
    pieces = [*special, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abelo", "▁a", "be", "ll"]
    vocabulary = {piece: token for token, piece in enumerate(pieces)}
    merges = [("▁", "a"), ("b", "e"), ("l", "l")]
    made = library.Tokenizer(library.models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    made.pre_tokenizer = library.pre_tokenizers.Metaspace()
    fallback, fuse = library.decoders.ByteFallback(), library.decoders.Fuse()
    made.decoder = library.decoders.Sequence([library.decoders.Metaspace(), fallback, fuse])
    made.add_special_tokens(special)
    made.post_processor = library.processors.TemplateProcessing("<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)])
    return made


INEXACT = {
    composed: "the normalizer NFC has no counterpart in tiktoken",
    prefixed: "it puts a space before each text",
    cutting: "its added token '<tool>' is cut out of ordinary text",
    by_words: "tiktoken cuts .* in other places",
    out_of_order: "its merges are not in the order of their ids: 'a' and 'b'|'b' and 'c'",
    sentencepiece: "the pre-tokenizer Metaspace has no counterpart in tiktoken",
}


def save(made, folder, **settings):
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.json").write_text(made.to_str())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.mark.parametrize("make", INEXACT, ids=lambda make: make.__name__)
def test_what_tiktoken_would_get_wrong_stays_with_the_library(tmp_path, make):
    peer = make()
    tokenizer, why = hf.read(save(peer, tmp_path / "a"))
    assert isinstance(tokenizer, HFTokenizer)
    with pytest.raises(AssertionError, match=INEXACT[make]):
        raise AssertionError(why)
    hf.write(tokenizer, tmp_path / "b")
    again, _ = hf.read(tmp_path / "b")
    assert (again.begin, again.end, again.text) == (tokenizer.begin, tokenizer.end, tokenizer.text)
    some = st.lists(st.sampled_from(["abc", "bc ", "a", "<tool>", "e\u0301", "²", *PIECES])).map("".join)

    @settings(max_examples=100, deadline=None)
    @given(st.one_of(some, st.text()))
    def check(text):
        ids = peer.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode_ordinary(text) == ids == again.encode_ordinary(text)
        assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=False)

    check()


def test_merges_out_of_order_do_give_other_ids():
    made = out_of_order()
    ranks = {to_bytes(piece): token for piece, token in made.get_vocab().items()}
    tiktokens = tokenizers.Encoding("x", pat_str=exactness.GPT2_PATTERN, mergeable_ranks=ranks, special_tokens={})
    assert tiktokens.encode_ordinary("abc") != made.encode("abc").ids


@pytest.mark.parametrize("ignore_merges", [False, True])
def test_a_word_that_no_merge_makes(tmp_path, ignore_merges):
    """tiktoken looks up whole pieces before merging; so does the library with `ignore_merges`."""
    peer = byte_level([("a", "b")], extra=["xyz"], ignore_merges=ignore_merges)
    tokenizer, why = hf.read(save(peer, tmp_path))
    assert isinstance(tokenizer, tokenizers.Encoding) == ignore_merges, why
    assert tokenizer.encode_ordinary("xyz xyz ab") == peer.encode("xyz xyz ab").ids
    assert ignore_merges or "tiktoken looks up the whole word 'xyz'" in why


def test_a_special_token_that_merges_make_is_not_tiktokens(tmp_path):
    peer = byte_level(AB_BC)
    peer.add_special_tokens(["abc"])
    tokenizer, why = hf.read(save(peer, tmp_path))
    assert "it merges ordinary text into the special token 'abc'" in why
    peer.encode_special_tokens = True
    assert tokenizer.encode_ordinary("xabc") == peer.encode("xabc").ids


def test_a_special_token_that_is_a_word_of_the_text_is_not_tiktokens(tmp_path):
    peer = byte_level(AB_BC, extra=["xyz"], ignore_merges=True)
    peer.add_special_tokens(["xyz"])
    tokenizer, why = hf.read(save(peer, tmp_path))
    assert isinstance(tokenizer, HFTokenizer) and "it takes the text 'xyz' for a special token" in why


@pytest.mark.parametrize(
    "behavior, invert, kind", [("isolated", False, HFTokenizer), ("removed", True, tokenizers.Encoding)]
)
def test_text_that_the_pattern_leaves_out(tmp_path, behavior, invert, kind):
    """tiktoken drops it; the library splits it, or drops it too."""
    peer = byte_level(AB_BC)
    cut = library.pre_tokenizers.Split(library.Regex(r"\p{L}+"), behavior, invert)
    peer.pre_tokenizer = library.pre_tokenizers.Sequence(
        [cut, library.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer, why = hf.read(save(peer, tmp_path))
    assert isinstance(tokenizer, kind), why
    assert tokenizer.encode_ordinary("abc 1 再") == peer.encode("abc 1 再").ids


@pytest.mark.slow
def test_a_possessive_count(tmp_path):
    """`{1,3}+` is possessive to tiktoken, and one or more times `{1,3}` to the library."""
    ranks = {bytes([value]): value for value in range(256)} | {b"34": 256, b"12": 257, b"123": 258}
    facts = {"mergeable_ranks": ranks, "special_tokens": {}}
    encoding = tokenizers.Encoding("x", pat_str=r"\p{N}{1,3}+|\P{N}+", **facts)
    hf.write(encoding, tmp_path)
    peer = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert peer.encode("1234 34").ids == encoding.encode_ordinary("1234 34") == [258, ord("4"), ord(" "), 256]


def test_every_string_of_random_vocabularies():
    """If the merges are equivalent, all strings of two letters up to a length have the same ids."""
    rng = np.random.default_rng(0)
    strings = ["".join(letters) for n in range(1, 8) for letters in product("ab", repeat=n)]
    strings += ["".join(rng.choice(["a", "b"], length)) for length in (50, 600) for _ in range(5)]
    exact, differing = 0, 0
    for trial in range(200):
        pieces, merges = ["a", "b"], []
        for _ in range(rng.integers(1, 9)):
            left, right = rng.choice(pieces, 2)
            if left + right not in pieces:
                pieces.append(str(left + right))
                merges.append((str(left), str(right)))
        made = byte_level(merges, ignore_merges=bool(trial % 2))
        if trial % 4 == 2:
            rng.shuffle(merges)
        made.model = library.models.BPE(made.get_vocab(), merges, ignore_merges=bool(trial % 2))
        peer = HFTokenizer(made.to_str(), "x")
        try:
            encoding = exactness.exact_encoding(peer)
        except exactness.Inexact:
            differing += 1
            continue
        exact += 1
        for string in strings:
            assert encoding.encode_ordinary(string) == peer.encode_ordinary(string), (merges, string)
    assert exact > 50 and differing > 30


@pytest.fixture(scope="module")
def gpt1(tmp_path_factory):
    """Returns a folder like GPT-1's and transformers' tokenizer of it."""
    made = library.Tokenizer(library.models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    made.normalizer = library.normalizers.BertNormalizer(lowercase=True)
    made.pre_tokenizer = library.pre_tokenizers.BertPreTokenizer()
    made.decoder = library.decoders.BPEDecoder(suffix="</w>")
    trainer = library.trainers.BpeTrainer(
        vocab_size=120, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    )
    made.train_from_iterator(TEXT, trainer)
    folder = tmp_path_factory.mktemp("gpt1")
    made.model.save(str(folder))
    (folder / "config.json").write_text('{"model_type": "openai-gpt"}')
    return made, folder


def test_gpt1s_own_files(gpt1):
    peer, folder = gpt1
    tokenizer, why = hf.read(folder)
    assert why == "tokenizers library: the normalizer BertNormalizer has no counterpart in tiktoken"
    for text in ("Class A: return self", "naïve, 再见 ☃", "zzz Ω"):
        ids = tokenizer.encode_ordinary(text)
        assert ids == peer.encode(text).ids
        assert tokenizer.decode(ids) == peer.decode(ids, skip_special_tokens=False)
        joined = b"".join(tokenizer.decode_single_token_bytes(token) for token in ids).decode()
        assert joined.removesuffix(" ") == tokenizer.decode(ids)
    assert (tokenizer.begin, tokenizer.end) == ((), None)


def test_text_of_a_library_tokenizer_comes_in_whole_characters(tmp_path):
    tokenizer, _ = hf.read(save(sentencepiece(), tmp_path, eos_token="</s>"))
    ids = tokenizer.encode_ordinary("a bell é再🤖")
    pieces, state = [], detokenize.State()
    for token in [*ids, 2]:
        state, text, used, _ = detokenize.detokenize(state, [token], tokenizer)
        pieces.append(text)
        assert used == 1
    assert "".join(pieces) == " " + tokenizer.decode(ids) == " a bell é再🤖"
    assert state.ended == "end" and "🤖" in pieces
    # A row beyond the vocabulary has no text to go on with.
    assert detokenize.detokenize(detokenize.State(), [ids[0], 268, 0], tokenizer).used == 2


def test_a_prompt_begins_as_the_folder_says(tmp_path):
    tokenizer, _ = hf.read(save(sentencepiece(), tmp_path))
    assert prompts.prompt_ids(tokenizer, "a", 9) == (1, *tokenizer.encode_ordinary("a"))
    assert prompts.prompt_ids(tokenizer, "", 9) == (1,)


@pytest.mark.parametrize(
    "settings, config, begin, end",
    [
        ({"eos_token": "</s>"}, {}, (1,), 2),
        ({"eos_token": {"content": "</s>", "lstrip": False}, "add_bos_token": False}, {}, (), 2),
        ({"eos_token": None}, {"eos_token_id": [265, 2]}, (1,), 265),
        ({"eos_token": "absent"}, {"eos_token_id": 50256}, (1,), None),
        ({"add_bos_token": True}, {"eos_token_id": None}, (1,), None),
    ],
)
def test_where_documents_begin_and_end(tmp_path, settings, config, begin, end):
    save(sentencepiece(), tmp_path / "a", **settings)
    (tmp_path / "a" / "config.json").write_text(json.dumps(config))
    tokenizer, _ = hf.read(tmp_path / "a")
    assert (tokenizer.begin, tokenizer.end) == (begin, end)
    hf.write(tokenizer, tmp_path / "b")
    again, _ = hf.read(tmp_path / "b")
    assert (again.begin, again.end) == (begin, end)


def test_a_begin_that_only_the_settings_ask_for(tmp_path):
    made = byte_level(AB_BC)
    made.add_special_tokens(["<s>", "<|endoftext|>"])
    save(made, tmp_path / "a", add_bos_token=True, bos_token="<s>")
    tokenizer, _ = hf.read(tmp_path / "a")
    assert isinstance(tokenizer, tokenizers.Encoding)
    assert (tokenizer.begin, tokenizer.end) == ((259,), 260)
    hf.write(tokenizer, tmp_path / "b")
    assert library.Tokenizer.from_file(str(tmp_path / "b" / "tokenizer.json")).encode("ab").ids == [259, 256]
    again, _ = hf.read(tmp_path / "b")
    assert (again.begin, again.end, again._special_tokens) == ((259,), 260, {"<s>": 259, "<|endoftext|>": 260})


def test_ids_with_holes(tmp_path):
    ranks = {bytes([value]): value for value in range(256)} | {b"ab": 300, b"abc": 400}
    facts = {"pat_str": tokenizers.BPE_PATTERN, "mergeable_ranks": ranks, "special_tokens": {"<s>": 500, "<e>": 350}}
    hf.write(tokenizers.Encoding("x", **facts, begin=(500,), end=350), tmp_path)
    again, _ = hf.read(tmp_path)
    assert (again.n_vocab, again.begin, again.end) == (501, (500,), 350)
    assert again.encode_ordinary("abcab") == [400, 300]
    peer = library.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert peer.encode("abcab<e>").ids == [500, 400, 300, 350]


@pytest.mark.parametrize(
    "facts, expected",
    [
        ({"special_tokens": {"a": 256}}, "'a' is both a special token and ordinary"),
        ({"pat_str": r"\w+|\W"}, "tiktoken cuts"),
        ({"pat_str": r"(?s:.)"}, "undefined group option"),
        ({"mergeable_ranks": {b"a": 0, b"bc": 1}}, "its vocabulary lacks some of the 256 bytes"),
    ],
)
def test_what_the_library_would_get_wrong_is_not_written(tmp_path, facts, expected):
    ranks = {bytes([value]): value for value in range(256)}
    common = {"pat_str": tokenizers.BPE_PATTERN, "mergeable_ranks": ranks, "special_tokens": {}}
    with pytest.raises(ConfigError, match=expected):
        hf.write(tokenizers.Encoding("x", **common | facts), tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_folder_without_a_tokenizer(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert hf.read(tmp_path) is None


GOOD = json.dumps({piece: token for token, piece in enumerate([*ALPHABET, "ab"])})


@pytest.mark.parametrize(
    "files, expected",
    [
        ({"tokenizer.model": "x"}, "only as tokenizer.model; let transformers write .* or give --tokenizer=NAME"),
        ({"tokenizer.json": ""}, "cannot be read"),
        ({"tokenizer.json": "[1]"}, "cannot be read"),
        ({"tokenizer.json": '{"model": {"type": "BPE", "vocab": {}, "merges": ["a b"]}}'}, "out of vocabulary"),
        ({"tokenizer_config.json": "{"}, "tokenizer_config.json is damaged"),
        ({"tokenizer_config.json": "[]"}, "tokenizer_config.json is damaged: it holds no object"),
        ({"vocab.json": "{", "merges.txt": "a b\n"}, "vocab.json is damaged"),
        ({"vocab.json": '{"a": "b"}', "merges.txt": "a b\n"}, "its ids are not all whole numbers"),
        ({"vocab.json": '{"a": 0}', "merges.txt": "a b\n"}, "lacks some of the 256 bytes"),
        ({"vocab.json": GOOD, "merges.txt": "a b\na b c\n"}, "merges.txt is damaged: 'a b c' is not a pair"),
        ({"vocab.json": GOOD, "merges.txt": "a c\n"}, "cannot be read"),
        ({"vocab.json": GOOD}, "only as vocab.json"),
    ],
)
def test_damage_is_one_line(tmp_path, files, expected):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=expected) as caught:
        hf.read(tmp_path)
    assert "\n" not in str(caught.value)
