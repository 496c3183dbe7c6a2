"""Parallel text: files, pairs and packed rows with each pair whole and once an epoch; errors in files are one line."""

import gzip
import json

import numpy as np
import pytest
from conftest import shared, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import data, prepare
from gptjax.config.errors import ConfigError, DataError
from gptjax.data import layouts, packing, pairs
from gptjax.data.augment import Augment
from gptjax.data.batches import EvalBatches
from gptjax.data.pairs import Pair
from gptjax.data.token_sets import Part, TokenSet
from gptjax.data.tokenizers import tokenizers
from gptjax.runs import config as configs

BYTES = tokenizers.bytes_encoding()
END = BYTES.end
WORDS = ["ein", "Hund", "läuft", "durch", "den", "Schnee", "und", "bellt"]


def files(folder, **texts):
    """A directory of parallel text; `train_en` is train.en."""
    folder.mkdir(exist_ok=True)
    for name, text in texts.items():
        split, language = name.rsplit("_", 1)
        (folder / f"{split}.{language}").write_text(text)
    return folder


def settings_of(path, languages=("en", "de"), **more):
    flags = {"data_path": path, "data_languages": languages, "data_layout": "pairs", **more}
    return tiny_config(**flags).data


def some_pairs(count, seed=0):
    """Pairs that all differ, of one to eight words."""
    rng = np.random.default_rng(seed)
    texts = [[" ".join(rng.choice(WORDS, n)) for n in rng.integers(1, 9, 2)] for _ in range(count)]
    return [Pair(f"{i} {source}", f"{i} {target}") for i, (source, target) in enumerate(texts)]


def set_of(some):
    return pairs.to_token_set(BYTES, some, "encoding", "some pairs")


def read_back(row, decode=BYTES.decode):
    """Returns the pairs in a row, after checking its arrays."""
    found = []
    for number in range(1, int(row["segments_BT"].max()) + 1):
        source = row["source_BS"][row["source_segments_BS"] == number].tolist()
        here = row["segments_BT"] == number
        inputs, targets = row["inputs_BT"][here].tolist(), row["targets_BT"][here].tolist()
        assert source.pop() == END and targets.pop() == END and inputs == [END, *targets]
        found.append(Pair(decode(source), decode(targets)))
    padding = row["segments_BT"] == 0
    assert np.array_equal(row["weights_BT"], ~padding) and not row["targets_BT"][padding].any()
    return found


# Files


def test_directories_are_read_in_either_direction_plain_and_gz(tmp_path):
    folder = files(
        tmp_path / "c", train_en="a dog\na cat\n", train_de="ein Hund\r\neine Katze", val_en="x\n", val_de="y"
    )
    (folder / "train.de.gz").write_bytes(gzip.compress((folder / "train.de").read_bytes()))
    (folder / "train.de").unlink()
    assert pairs.read(settings_of(folder), "train") == [Pair("a dog", "ein Hund"), Pair("a cat", "eine Katze")]
    assert pairs.read(settings_of(folder, ("de", "en")), "val") == [Pair("y", "x")]


def test_only_line_feeds_end_lines(tmp_path):
    folder = files(tmp_path / "c", train_en="\ufeffa\u2028b\x0cc\nd\n", train_de="1\u00852\n3\n")
    assert pairs.read(settings_of(folder), "train") == [Pair("a\u2028b\x0cc", "1\u00852"), Pair("d", "3")]


def test_one_file_is_split_by_its_sources_in_either_direction(tmp_path):
    path = tmp_path / "pairs.tsv"
    path.write_text("".join(f"{i // 2}\tz{i}\tlicence\n" for i in range(400)))
    there = settings_of(path, data_columns=(0, 1))
    back = settings_of(path, ("zh", "en"), data_columns=(1, 0))
    train, held_out = (pairs.read(there, split) for split in ("train", "val"))
    assert sorted(train + held_out) == sorted(Pair(str(i // 2), f"z{i}") for i in range(400))
    assert 20 <= len(held_out) <= 60 and not {p.source for p in train} & {p.source for p in held_out}
    assert pairs.read(back, "train")[0].target == "0" and pairs.read(back, "train")[0].source.startswith("z")


def test_pairs_with_an_empty_side_are_dropped_and_reported(tmp_path, capsys):
    folder = files(tmp_path / "c", train_en="a\n\nb\n \n", train_de="1\n2\n\n\n")
    assert pairs.read(settings_of(folder), "train") == [Pair("a", "1")]
    assert "3 of 4 pairs have an empty side and are left out" in capsys.readouterr().err
    (tmp_path / "p.tsv").write_text("a\t1\n\nb\t\n\t2\n")
    assert pairs.read_pair_file(tmp_path / "p.tsv", (0, 1), ("en", "de")) == [Pair("a", "1")]


@pytest.mark.parametrize(
    "texts, message",
    [
        (
            {"train_en": "a\nb\nc\n", "train_de": "1\n"},
            "train.en has 3 lines and train.de has 1: line 2 of train.en has no partner",
        ),
        ({"train_en": "a\n", "train_de": "1\n2\n3"}, "train.en has 1 .*train.de has 3.*line 2 of train.de"),
        ({"val_en": "a", "train_en": "b", "train_fr": "c"}, r"no train.de .*train \(en fr\), val \(en\)"),
        ({"test_2016_de": "a"}, r"no train.en .*test_2016 \(de\)"),
        ({"train_en": "", "train_de": ""}, "no pairs in 'train'"),
    ],
)
def test_directories_that_cannot_be_read_are_one_line(tmp_path, texts, message):
    with pytest.raises(DataError, match=message) as refused:
        pairs.read(settings_of(files(tmp_path / "c", **texts)), "train")
    assert "\n" not in str(refused.value)


def test_damaged_files_are_one_line(tmp_path):
    folder = files(tmp_path / "c", train_en="a\n" * 9)
    (folder / "train.de").write_bytes("gut\nschön\n".encode("latin-1"))
    with pytest.raises(DataError, match=r"train.de is not UTF-8 text: byte 0xf6 in line 2"):
        pairs.read(settings_of(folder), "train")
    (folder / "train.de").unlink()
    whole = gzip.compress(b"1\n" * 9)
    for damaged in (whole[:-9], b"1\n2\n", whole[:12] + b"\xff" + whole[13:]):
        (folder / "train.de.gz").write_bytes(damaged)
        with pytest.raises(DataError, match=r"train.de.gz is damaged"):
            pairs.read(settings_of(folder), "train")
    with pytest.raises(DataError, match="there is no .*elsewhere"):
        pairs.read(settings_of(tmp_path / "elsewhere"), "train")


def test_lines_without_the_columns_are_reported_by_number(tmp_path):
    path = tmp_path / "p.tsv"
    path.write_text("a\t1\nb 2\n")
    with pytest.raises(DataError, match="line 2 has 1 fields and not the 2 that line 1 has"):
        pairs.read(settings_of(path), "train")
    path.write_text("a\t1\tx\nb\t2\n")
    with pytest.raises(DataError, match="line 2 has 2 fields and not the 3"):
        pairs.read(settings_of(path, data_columns=(0, 2)), "train")
    path.write_text("a\t1\n")
    with pytest.raises(DataError, match=r"no split 'test'; there are train, val"):
        pairs.read(settings_of(path), "test")


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"data_languages": ("en",)}, "data.languages is"),
        ({"data_layout": "packed"}, "data.layout=pairs"),
        ({"data_columns": (1, 1)}, "data.columns is"),
        ({"data_augment.swap": 0.1}, "data.augment does nothing"),
    ],
)
def test_configs_that_cannot_be_are_refused(changes, message):
    config = tiny_config(**({"data_languages": ("en", "de"), "data_layout": "pairs"} | changes))
    with pytest.raises(ConfigError, match=message):
        configs.check(config)


# Token sets


def test_a_pair_is_a_record_whose_prompt_is_the_source():
    tokens = set_of([Pair("ab", "c"), Pair("d", "ef")])
    assert tokens.read(0, 99).tolist() == [*b"ab", END, *b"c", END, *b"d", END, *b"ef", END]
    assert tokens.prompts().tolist() == [3, 2] and tokens.closing == ()
    assert packing.pair_lengths(tokens).tolist() == [[3, 2], [2, 3]]
    with pytest.raises(DataError, match="no end of text"):
        pairs.to_token_set(tokenizers.chars_encoding(["abc"]), [Pair("a", "b")], "x", "x")


def test_a_run_reads_both_sides_into_one_vocabulary(tmp_path):
    texts = {"train_en": "the dog runs\n" * 9, "train_de": "der Hund rennt\n" * 9, "val_en": "a\n", "val_de": "ü\n"}
    config = settings_of(files(tmp_path / "c", **texts), data_tokenizer="bpe:270")
    loaded = data.load(config)
    merged = set(loaded.tokenizer._mergeable_ranks) - {bytes([b]) for b in range(256)}
    assert any(token in b"the dog runs" for token in merged) and any(token in b"der Hund rennt" for token in merged)
    assert loaded.held_out_text.decode() == "ü" and loaded.train["text"].documents == 9
    (tmp_path / "c" / "val.de").write_text("other")
    assert data.load(config).fingerprints != loaded.fingerprints


# Rows


def rows_of(tokens, context, seed=0):
    return layouts.pairs(tokens, context, seed, Augment(), f"{hash(tokens.read(0, len(tokens)).tobytes())}")


@settings(max_examples=20, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 12), st.integers(1, 12)), min_size=1, max_size=60))
def test_pairs_are_packed_within_both_limits(lengths):
    lengths_P2 = np.array(lengths)
    row_P = packing.best_fit_pairs(lengths_P2, 12)
    assert sorted(set(row_P.tolist())) == list(range(row_P.max() + 1))
    for side in (0, 1):
        assert np.bincount(row_P, lengths_P2[:, side]).max() <= 12


def test_rows_give_every_pair_once_an_epoch_in_changing_combinations():
    some = [Pair(f"{i} {'x' * (i % 7)}", f"{i} {'y' * (i % 5)}") for i in range(1000, 3000)]
    rows = rows_of(set_of(some), 64)
    read = [[read_back(rows.row(epoch, k)) for k in range(rows.per_epoch)] for epoch in (0, 1)]
    for epoch in read:
        assert sorted(pair for row in epoch for pair in row) == sorted(some)
    together = [{frozenset((a, b)) for row in epoch for a in row for b in row if a < b} for epoch in read]
    assert len(together[0] & together[1]) < 0.1 * len(together[0])
    again = rows_of(set_of(some), 64)
    assert all(np.array_equal(value, again.row(1, 3)[key]) for key, value in rows.row(1, 3).items())


def test_rows_are_more_than_nine_tenths_full():
    some = some_pairs(2000)
    rows = rows_of(set_of(some), 128)
    full = [
        (rows.row(0, k)[key] > 0).mean() for k in range(rows.per_epoch) for key in ("segments_BT", "source_segments_BS")
    ]
    assert max(np.mean(full[::2]), np.mean(full[1::2])) > 0.9


def test_long_pairs_are_truncated_and_reported(capsys):
    rows = rows_of(set_of([Pair("abcdefgh", "1"), Pair("a", "123456789")]), 5)
    batch = {key: np.stack([rows.row(0, k)[key] for k in range(2)]) for key in rows.row(0, 0)}
    assert "2 of 2 of some pairs are longer than 5 tokens and are cut" in capsys.readouterr().err
    long_source = int(np.flatnonzero(batch["source_BS"][:, 2])[0])
    assert batch["source_BS"][long_source].tolist() == [*b"abcd", END]
    assert batch["targets_BT"][1 - long_source].tolist() == [*b"12345"]  # and it is not said that the text ends there
    assert batch["inputs_BT"][1 - long_source].tolist() == [END, *b"1234"]


def test_held_out_rows_are_all_there():
    some = some_pairs(50)
    whole = EvalBatches(rows_of(set_of(some), 128), 4)
    rows = [{key: value[b] for key, value in batch.items()} for batch in whole for b in range(4)]
    assert sorted(pair for row in rows for pair in read_back(row)) == sorted(some)


@pytest.mark.parametrize("begin", [(), (300,)])
def test_prepared_prompts_are_sources(begin):
    """Records as gptjax.data.prepare.documents makes them, with the delimiters of each kind of tokenizer."""
    prefix, suffix, closing = (begin, (END,), ()) if begin else ((END,), (), (END,))
    records = [[*prefix, *b"ab", *b"c", *suffix], [*prefix, *b"d", *b"ef", *suffix]]
    prompts = np.array([len(prefix) + 2, len(prefix) + 1])
    part = Part(np.array([*records[0], *records[1]]), np.cumsum([len(r) for r in records]), prompts)
    row = rows_of(TokenSet([part], closing), 10).row(0, 0)
    found = {
        tuple(row["source_BS"][row["source_segments_BS"] == n].tolist()): row["targets_BT"][
            row["segments_BT"] == n
        ].tolist()
        for n in (1, 2)
    }
    assert found == {(*begin, *b"ab", END): [*b"c", END], (*begin, *b"d", END): [*b"ef", END]}


def test_sets_without_prompts_are_refused():
    with pytest.raises(DataError, match="no pairs of a source .* and a target"):
        rows_of(TokenSet([Part(np.arange(20), np.array([10, 20]))]), 8)


def test_a_prepared_set_of_prompts_gives_pairs(tmp_path, call):
    some = some_pairs(40)
    text = "".join(json.dumps({"prompt": p.source, "text": p.target}) + "\n" for p in some)
    (tmp_path / "pairs.jsonl").write_text(text)
    flags = [f"--input={tmp_path / 'pairs.jsonl'}", f"--output={tmp_path / 'set'}", "--tokenizer=bytes"]
    assert call(prepare, *flags, "--prompt_key=prompt", "--prompt_ending=", "--held_out=0.2", "--workers=1").code == 0
    config = tiny_config(data_path=tmp_path / "set", data_layout="pairs", data_context=128, model_context=128).data
    rows = data.load(config).rows(config, 0)(str(tmp_path / "set"), 128)
    found = {pair for k in range(40) for pair in read_back(rows[k])}
    assert found and found <= set(some)


def test_real_captions():
    folder = shared("data/multi30k")
    found = pairs.read(settings_of(folder), "train")
    assert len(found) == 29_000 and found[0].target.startswith("Zwei junge weiße Männer")
    assert len(pairs.read(settings_of(folder, ("de", "en")), "test_2016_flickr")) == 1000
    rows = rows_of(set_of(found[:3000]), 256)
    assert sorted(p for k in range(rows.per_epoch) for p in read_back(rows.row(2, k))) == sorted(found[:3000])


def test_real_chinese():
    config = settings_of(shared("data/tatoeba_en_zh/cmn.txt"), ("en", "zh"))
    train, held_out = (pairs.read(config, split) for split in ("train", "val"))
    assert len(train) + len(held_out) == 20_133 and Pair("Hi.", "嗨。") in train + held_out
