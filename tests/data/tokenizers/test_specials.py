"""Special ids: those of the tokenizer if it has them, otherwise the same new ids in every run."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config.errors import DataError
from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.specials import COMMON_NAMES, decode_with_specials, lookup_special_ids, special_name

BYTES = tokenizers.bytes_encoding()


def with_names(*names):
    """A tokenizer of bytes that has these special tokens."""
    ranks = {bytes([value]): value for value in range(256)}
    special = {name: 256 + i for i, name in enumerate(names)}
    return tokenizers.Encoding("own", pat_str=r"[\s\S]", mergeable_ranks=ranks, special_tokens=special)


def test_special_tokens_of_the_tokenizer_are_used():
    own = with_names("<s>", "</s>", "<mask>", "<extra_id_0>", "<extra_id_1>", "<fim-suffix>")
    found = lookup_special_ids(own, ["mask", "class", "separator", "fim_suffix", "sentinels"], 2)
    assert found.ids == {"mask": 258, "class": 256, "separator": 257, "fim_suffix": 261}
    assert found.sentinels == (259, 260) and found.vocabulary == own.n_vocab


@given(st.sets(st.sampled_from(sorted(COMMON_NAMES))), st.integers(0, 5))
def test_new_ids_do_not_depend_on_the_requested_names(names, sentinels):
    all_of_them = lookup_special_ids(BYTES, list(COMMON_NAMES), 5)
    found = lookup_special_ids(BYTES, names, sentinels)
    assert found.ids == {name: all_of_them.ids[name] for name in names}
    assert found.sentinels == all_of_them.sentinels[:sentinels]
    used = [*found.ids.values(), *found.sentinels]
    assert found.vocabulary == max([BYTES.n_vocab - 1, *used]) + 1
    assert len({*all_of_them.ids.values(), *all_of_them.sentinels}) == len(COMMON_NAMES) + 5
    assert min([BYTES.n_vocab, *used]) >= BYTES.n_vocab


def test_additional_sentinels_follow_the_other_new_ids():
    own = with_names("<extra_id_0>", "[MASK]")
    found = lookup_special_ids(own, ["mask"], 3)
    assert found.sentinels == (256, 258 + len(COMMON_NAMES) - 1, 259 + len(COMMON_NAMES) - 1)
    assert [special_name(own, token) for token in found.sentinels[1:]] == ["<extra_id_1>", "<extra_id_2>"]


def test_decoding_writes_new_ids_by_name():
    found = lookup_special_ids(BYTES, ["mask", "fim_middle"], 2)
    ids = [*b"a", found.ids["mask"], *"ü".encode(), found.sentinels[1], found.ids["fim_middle"]]
    assert decode_with_specials(BYTES, ids) == "a[MASK]ü<extra_id_1><|fim_middle|>"
    assert decode_with_specials(BYTES, []) == ""


def test_a_tokenizer_without_an_end_is_refused_where_one_is_needed():
    with pytest.raises(DataError, match=r"the tokenizer chars has no end of text"):
        lookup_special_ids(tokenizers.chars_encoding(["abc"]), ["end"])
    lookup_special_ids(BYTES, ["end"])
