"""Prepared sets on disk: records are read back as written; damage is detected and reported."""

import json
import shutil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config.errors import DataError
from gptjax.data import shards
from gptjax.data.token_sets import Part, TokenSet, concatenate, delimiters_of, from_texts
from gptjax.data.tokenizers import tokenizers


def records(lengths, first=0):
    lengths = np.array(lengths)
    return shards.Records(np.arange(first, first + lengths.sum()), lengths, lengths // 2, lengths * 3)


def write_set(folder, per_shard=((3, 4), (5,)), tokenizer=None):
    """A set of the given record lengths, shard by shard, train only but for one document."""
    tokenizer = tokenizer or tokenizers.bytes_encoding()
    folder.mkdir()
    tokenizers.save(tokenizer, folder / "tokenizer")
    splits, first = {"train": [], "held_out": []}, 0
    for split, each in (("train", per_shard), ("held_out", ((6,),))):
        for number, lengths in enumerate(each):
            writer = shards.ShardWriter(folder, split, number, np.uint16, with_prompts=True)
            for length in lengths:
                writer.append(records([length], first))
                first += length
            splits[split].append(writer.close())
    made_with = {"name": tokenizer.name, "n_vocab": tokenizer.n_vocab, "closing": delimiters_of(tokenizer).closing}
    shards.write_index(folder, {"tokenizer": made_with | {"sha256": tokenizers.sha256(tokenizer)}, "splits": splits})
    return folder


@pytest.fixture
def folder(tmp_path):
    return write_set(tmp_path / "set")


def test_written_records_are_read_back_as_one_stream(folder):
    opened = shards.open_set(folder)
    assert opened.train.read(0, 100).tolist() == [*range(12), 256]
    assert opened.train.records().tolist() == [[0, 3], [3, 7], [7, 12]]
    assert opened.train.prompts().tolist() == [1, 2, 2] and opened.train.documents == 3
    assert opened.held_out.read(2, 5).tolist() == [14, 15, 16]
    assert isinstance(opened.train.parts[0].tokens_N, np.memmap) and opened.train.parts[0].tokens_N.dtype == np.uint16
    assert shards.verify(folder) == 9
    assert np.array_equal(np.load(folder / "train_00000.npy"), range(7)), "an ordinary .npy file"


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 5), min_size=1, max_size=4), min_size=1, max_size=5),
    st.integers(0, 60),
    st.integers(0, 60),
    st.booleans(),
)
def test_reading_across_parts_is_slicing(parts, start, count, closing):
    every, pieces, at = [], [], 0
    for lengths in parts:
        ids = np.arange(at, at + sum(lengths))
        pieces.append(Part(ids.astype(np.uint16), np.cumsum(lengths)))
        every += ids.tolist()
        at += sum(lengths)
    every += [7] * closing
    tokens = TokenSet(pieces, (7,) * closing)
    assert len(tokens) == len(every)
    if start < len(every):
        assert tokens.read(start, start + count).tolist() == every[start : start + count]
    if every:
        assert tokens.read_ring(start, count).tolist() == [every[(start + i) % len(every)] for i in range(count)]
    flat = [length for lengths in parts for length in lengths]
    assert (tokens.records()[:, 1] - tokens.records()[:, 0]).tolist() == flat


def test_concatenated_sets_have_one_closing(tmp_path):
    a, b = (shards.open_set(write_set(tmp_path / name)).train for name in "ab")
    both = concatenate([a, b], "both")
    assert both.read(0, 100).tolist() == [*range(12), *range(12), 256]
    assert len(both.records()) == 6


@pytest.mark.parametrize(
    "tokenizer, stream, closing",
    [
        (tokenizers.bytes_encoding(), [256, 97, 256, 98], [256]),
        (tokenizers.chars_encoding(["ab"]), [0, 1], []),
    ],
)
def test_documents_are_between_delimiters(tokenizer, stream, closing):
    tokens = from_texts(tokenizer, ["a", "b"], "encoding")
    assert tokens.read(0, 99).tolist() == stream + closing
    assert tokens.records().tolist() == [[0, len(stream) // 2], [len(stream) // 2, len(stream)]]


# Damage


def damaged(folder, name, change):
    path = folder / name
    raw = path.read_bytes()
    path.write_bytes(change(raw))


@pytest.mark.parametrize(
    "name, change, expected",
    [
        ("train_00000.npy", lambda raw: raw[:-1], "train_00000.npy has 141 bytes, not the 142 of its index"),
        ("train_00001.ends.npy", lambda raw: b"", "train_00001.ends.npy has 0 bytes"),
        ("held_out_00000.npy", lambda raw: b"x" * len(raw), "held_out_00000.npy is damaged"),
        ("index.json", lambda raw: raw[:100], "index.json is damaged"),
        ("index.json", lambda raw: raw.replace(b'"format": 1', b'"format": 9'), "has format 9, not 1"),
        ("index.json", lambda raw: raw.replace(b'"tokens": 7', b'"tokens": 8'), "does not hold what the index says"),
    ],
)
def test_damage_is_found_at_opening(folder, name, change, expected):
    damaged(folder, name, change)
    with pytest.raises(DataError, match=expected):
        shards.open_set(folder)


def test_a_missing_shard_and_a_missing_set_are_found_at_opening(folder, tmp_path):
    (folder / "train_00001.npy").unlink()
    with pytest.raises(DataError, match=r"train_00001.npy is missing"):
        shards.open_set(folder)
    with pytest.raises(DataError, match="is not a prepared set"):
        shards.open_set(tmp_path / "none")


def test_unfinished_preparation_is_not_a_set(tmp_path):
    (tmp_path / "set.unfinished").mkdir()
    for path in (tmp_path / "set", tmp_path / "set.unfinished"):
        assert shards.is_prepared(path)
        with pytest.raises(DataError, match=r"set.unfinished is an unfinished preparation"):
            shards.open_set(path)


def test_every_flipped_byte_is_found_by_verifying(folder):
    names = [path.name for path in folder.glob("*.npy")]
    for name in names:
        size = (folder / name).stat().st_size
        for at in (0, 20, 100, 127, 128, size - 1):
            damaged(folder, name, lambda raw, at=at: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
            with pytest.raises(DataError, match=name):
                shards.verify(folder)
            damaged(folder, name, lambda raw, at=at: raw[:at] + bytes([raw[at] ^ 1]) + raw[at + 1 :])
    assert shards.verify(folder) == len(names)


def test_other_tokenizer_is_detected_when_loading(folder, tmp_path):
    shutil.rmtree(folder / "tokenizer")
    tokenizers.save(tokenizers.chars_encoding(["abc"]), folder / "tokenizer")
    with pytest.raises(DataError, match=r"was made with another tokenizer \(bytes, 257 ids\) than this run's \(chars"):
        shards.open_set(folder).tokenizer()


def test_hash_of_a_tokenizer_depends_on_all_that_changes_ids():
    texts = ["some text to merge pairs of, some more text"]
    made = [
        tokenizers.bytes_encoding(),
        tokenizers.chars_encoding(["ab"]),
        tokenizers.chars_encoding(["ac"]),
        tokenizers.bpe_encoding(texts, 260),
        tokenizers.bpe_encoding(texts, 261),
    ]
    assert len({tokenizers.sha256(one) for one in made}) == len(made)
    assert tokenizers.sha256(tokenizers.bpe_encoding(texts, 260)) == tokenizers.sha256(made[3])


def test_aborted_shard_leaves_no_file(tmp_path):
    writer = shards.ShardWriter(tmp_path, "train", 0, np.uint16, True)
    writer.append(records([3]))
    writer.abort()
    assert list(tmp_path.iterdir()) == []
    assert shards.ShardWriter(tmp_path, "train", 0, np.uint16, True).close() is None
    assert list(tmp_path.iterdir()) == []


def test_the_fingerprint_follows_the_index(folder, tmp_path):
    again = write_set(tmp_path / "again")
    assert shards.open_set(folder).fingerprint == shards.open_set(again).fingerprint
    facts = json.loads((again / "index.json").read_text())
    facts["splits"]["train"][0]["files"][0]["sha256"] = "0" * 64
    (again / "index.json").write_text(json.dumps(facts))
    assert shards.open_set(folder).fingerprint != shards.open_set(again).fingerprint
