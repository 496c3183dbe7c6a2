"""Stop strings and text from tokens, against references that have the whole text."""

import pytest
import tokenizers as library
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config.errors import ConfigError
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.hf_tokenizer import HFTokenizer
from gptjax.decode.detokenize import Detokenized, State, check_stop_strings, detokenize, flush

BYTES = tokenizers.bytes_encoding()
TEXT = ["the né中🤖 abc\n\nUser: "] * 9


def sentencepiece():
    """A vocabulary of Llama's kind: `▁` for a space, bytes as tokens of their own."""
    split = ["<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"▁ab", "ab", "▁ab", "b▁"]
    made = library.Tokenizer(
        library.models.BPE({p: i for i, p in enumerate(split)}, [("a", "b"), ("▁", "ab"), ("b", "▁")])
    )
    fallback, fuse = library.decoders.ByteFallback(), library.decoders.Fuse()
    made.decoder = library.decoders.Sequence([library.decoders.Metaspace(), fallback, fuse])
    made.add_special_tokens(["<s>", "</s>"])
    return HFTokenizer(made.to_str(), "llama", begin=(0,), end=1)


TOKENIZERS = [BYTES, tokenizers.bpe_encoding(TEXT, 275), tokenizers.chars_encoding(["aé中 b\n"]), sentencepiece()]


def reference(text, strings):
    """(text, stop): cut where, character by character, the text first ends with a stop string."""
    for end in range(1, len(text) + 1):
        whole = [string for string in strings if text[:end].endswith(string)]
        if whole:
            stop = max(whole, key=len)
            return text[: end - len(stop)], stop
    return text, None


def held(text, strings):
    """The longest end of a text that a stop string begins with."""
    ends = [text[at:] for at in range(len(text))]
    return next((end for end in ends if any(string.startswith(end) and string != end for string in strings)), "")


def split(ids, sizes):
    """The ids in lists of these sizes, the last ones together."""
    for size in sizes:
        yield ids[:size]
        ids = ids[size:]
    yield ids


some_text = st.text("aaabé中 \n", max_size=12)
some_stops = st.lists(st.text("aabé中 \n", min_size=1, max_size=4), max_size=4)


@pytest.mark.slow
@settings(max_examples=400, deadline=None)
@given(st.sampled_from(TOKENIZERS), st.data(), some_stops, st.lists(st.integers(0, 3), max_size=12))
def test_every_stream_of_tokens_vs_reference(tokenizer, data, strings, sizes):
    """Any tokens, also ones that no encoder would write, in lists of any length; bytes that are no characters."""
    usual = [ids for text in data.draw(st.lists(some_text, max_size=3)) for ids in tokenizer.encode_ordinary(text)]
    odd = st.lists(st.integers(0, tokenizer.n_vocab - 1).filter(lambda token: not tokenizer.is_special_token(token)))
    ids = data.draw(st.permutations(usual)) if data.draw(st.booleans()) else usual + data.draw(odd)
    strings = check_stop_strings(strings)
    whole = b"".join(map(tokenizer.decode_single_token_bytes, ids)).decode(errors="replace")
    expected, stop = reference(whole, strings)

    state, shown, read, found = State(), "", [], None
    for some in split(ids, sizes):
        state, text, used, found = detokenize(state, some, tokenizer, strings)
        shown, read = shown + text, read + some[:used]
        assert expected.startswith(shown)  # no part of a stop string is ever seen
        if state.ended:
            break
        assert used == len(some)
        known = b"".join(map(tokenizer.decode_single_token_bytes, read))[: -len(state.pending) or None]
        assert shown + state.held == known.decode(errors="replace")
        assert state.held == held(shown + state.held, strings)  # and nothing is held back without need
    if not state.ended:
        state, text, _, found = flush(state, strings)
        shown += text
    assert (shown, found, state.ended) == (expected, stop, "stop" if stop else "end")
    # The last token that was read is the one with which the stop string is whole.
    assert stop is None or reference(spelt(tokenizer, read), strings)[1] == stop
    assert stop is None or "\ufffd" in whole or reference(spelt(tokenizer, read[:-1]), strings)[1] is None


def spelt(tokenizer, ids):
    """The text of ids, the beginnings of characters at its end too."""
    return b"".join(map(tokenizer.decode_single_token_bytes, ids)).decode(errors="replace")


def stream(text, *strings, tokenizer=BYTES):
    """Returns the text of each token up to the end, and the last result."""
    state, shown = State(), []
    for token in tokenizer.encode_ordinary(text):
        result = detokenize(state, [token], tokenizer, check_stop_strings(strings))
        state = result.state
        shown.append(result.text)
        if state.ended:
            break
    return shown, result


def test_the_beginning_of_a_stop_string_is_held_and_output():
    shown, result = stream("abaabab.", "abab!", "b.")
    assert shown == ["", "", "", "aba", "", "", "", "aba"] and result.stop == "b."


def test_the_earliest_end_wins_and_then_the_longest():
    assert stream("xabcd", "abcd", "bc")[1].stop == "bc"
    shown, result = stream("xabc", "c", "abc", "bc")
    assert result.stop == "abc" and "".join(shown) == "x"


def test_a_stop_string_within_tokens_counts_the_used_tokens():
    bpe = TOKENIZERS[1]
    ids = bpe.encode_ordinary("the né abc\n\nUser: the")
    assert len(ids) < len("the né abc\n\nUser: the")
    result = detokenize(State(), ids, bpe, check_stop_strings(["\n\nUser:"]))
    assert result.text == "the né abc" and result.stop == "\n\nUser:"
    assert "\n\nUser:" in bpe.decode(ids[: result.used]) and "\n\nUser:" not in bpe.decode(ids[: result.used - 1])
    assert detokenize(result.state, ids, bpe) == Detokenized(result.state, "", 0)


def test_characters_are_output_whole():
    shown, _ = stream("é中🤖")
    assert shown == ["", "é", "", "", "中", "", "", "", "🤖"]
    state = detokenize(State(), list("a中".encode()[:-1]), BYTES)
    assert state.text == "a" and flush(state.state).text == "\ufffd"


def test_the_end_token_and_ids_without_a_token_end_a_text():
    for token in (256, 257, 999):
        result = detokenize(State(), [97, 0xE4, token, 98], BYTES, check_stop_strings(["ab"]))
        assert result == Detokenized(State(ended="end"), "a\ufffd", 3)
    assert flush(result.state) == Detokenized(result.state, "", 0)


def test_held_text_is_output_at_the_end():
    result = detokenize(State(), list(b"xab"), BYTES, check_stop_strings(["abc"]))
    assert (result.text, result.state.held) == ("x", "ab")
    assert flush(result.state, check_stop_strings(["abc"])) == Detokenized(State(ended="end"), "ab", 0)


def test_a_library_tokenizers_spaces_and_bytes():
    llama = TOKENIZERS[-1]
    ids = [llama.library.token_to_id(piece) for piece in ("▁ab", "b▁", "<0xC3>", "<0xA9>", "ab", "▁")]
    result = detokenize(State(), ids, llama, check_stop_strings(["éa"]))
    assert (result.text, result.used) == (" abb ", 5)


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match="a stop string is empty; leave it out"):
        check_stop_strings(["a", ""])
    assert check_stop_strings("ab") == ("ab",) and check_stop_strings([]) == ()
