"""Deduplication: signatures, the index across restarts and kills, and detection in real novels."""

import json
import os
import pickle
import random
import re
import signal
import sqlite3
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, shared
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config.errors import ConfigError, DataError
from gptjax.data.prepare import dedup
from gptjax.data.prepare.cleaning import CleaningOptions
from gptjax.data.prepare.dedup import DuplicateIndex, exact_signature, near_signature, shingle_hashes

datasketch = pytest.importorskip("datasketch")
OPTIONS = CleaningOptions()
VOCABULARY = [f"word{i}" for i in range(3000)]


def document(seed, words=120):
    return " ".join(random.Random(seed).choices(VOCABULARY, k=words))


def edited(text, seed, changes=3):
    words, rng = text.split(), random.Random(seed)
    for _ in range(changes):
        words[rng.randrange(len(words))] = "changed"
    return " ".join(words)


def jaccard(a, b, size):
    a, b = ({tuple(text.split()[i : i + size]) for i in range(len(text.split()) - size + 1)} for text in (a, b))
    return len(a & b) / len(a | b)


# -- signatures


def test_exact_signatures_are_sha256_of_any_text():
    assert exact_signature("abc").hex().startswith("ba7816bf8f01cfea")
    assert len({exact_signature(text) for text in ("", " ", "a", "A", "\ud800", "\ud801")}) == 6


def test_near_signatures_stay_as_they_are():
    """A file of signatures has to mean the same to any process and any version of numpy."""
    signature = near_signature("The quick brown fox jumps over the lazy dog again and again", OPTIONS)
    assert (signature.dtype, signature.shape) == (np.uint32, (128,))
    assert signature[:3].tolist() == [15284351, 935914144, 640787525]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 25), st.integers(1, 8))
def test_equal_numbers_estimate_the_share_of_common_shingles(seed, changes, size):
    options = CleaningOptions(near_permutations=512, near_shingle=size)
    a = document(seed)
    b = edited(a, seed, changes)
    estimate = np.mean(near_signature(a, options) == near_signature(b, options))
    assert estimate == pytest.approx(jaccard(a, b, size), abs=0.12)  # five standard deviations


def test_case_punctuation_and_space_are_ignored():
    text = "One two, three; four - five six. Seven eight nine ten!"
    for same in (text.upper(), text.replace(" ", "\n  "), re.sub(r"[^\w\s]", "", text), f'"{text}"'):
        assert (near_signature(text, OPTIONS) == near_signature(same, OPTIONS)).all()
    assert np.mean(near_signature(text, OPTIONS) == near_signature(text + " eleven twelve", OPTIONS)) < 1


def test_a_shingle_is_so_many_words_or_characters():
    assert len(shingle_hashes("one two three four five six", 5)) == 2
    assert len(shingle_hashes("今天的天气很好，我们去公园。", 5)) == 12 - 4
    assert len(shingle_hashes("one two", 5)) == len(shingle_hashes("", 5)) == len(shingle_hashes("!!!", 5)) == 1
    assert len(np.unique(shingle_hashes(document(1, 3000), 5))) > 2990


def test_texts_without_words_are_not_duplicates():
    signs = ["", "!!!", "?!", "🎉", "\ud800", "…"]
    signatures = [near_signature(text, OPTIONS) for text in signs]
    assert len({signature.tobytes() for signature in signatures}) == len(signs)


def test_a_large_document_is_taken_in_chunks():
    text = document(5, 5000)
    whole = datasketch.MinHash(128, seed=1, scheme="affine32", hashfunc=lambda x: x)
    whole.update_batch(shingle_hashes(text, 5).tolist())
    assert (near_signature(text, OPTIONS) == whole.hashvalues).all()


def test_chinese_near_duplicates(tmp_path):
    text = "今天的天气很好，我们一起去公园散步，然后在湖边的小店里喝了一杯热茶，聊了很久以前的事情。" * 2
    with DuplicateIndex(tmp_path / "seen", OPTIONS) as seen:
        assert seen.near(0, near_signature(text, OPTIONS)) is None
        assert seen.near(1, near_signature("转载：" + text.replace("，", " "), OPTIONS)) == 0
        assert seen.near(2, near_signature("房间很大，服务员态度也不错，就是早餐种类少了一点。" * 2, OPTIONS)) is None


# -- what is remembered


def test_query_returns_the_earlier_document_and_adds_only_kept_ones(tmp_path):
    a, b = document(1), document(2)
    with DuplicateIndex(tmp_path / "seen", OPTIONS) as seen:
        assert [seen.exact(i, exact_signature(text)) for i, text in enumerate([a, b, a, b, a])] == [None, None, 0, 1, 0]
        found = [
            seen.near(i, near_signature(t, OPTIONS)) for i, t in enumerate([a, b, edited(a, 1, 1), edited(b, 2, 1), a])
        ]
        assert found == [None, None, 0, 1, 0]
        assert not {2, 3, 4} & set(remembered(seen))


def remembered(seen):
    return [row[0] for row in seen._run("SELECT document FROM near UNION SELECT document FROM exact")]


def test_query_returns_the_most_similar_document(tmp_path):
    a = document(1, 400)
    with DuplicateIndex(tmp_path / "seen", CleaningOptions(near_threshold=0.5)) as seen:
        for number, text in enumerate([document(9), edited(a, 1, 20), edited(a, 2, 1), document(8)]):
            assert seen.near(number, near_signature(text, OPTIONS)) is None or number == 2
        assert seen.near(4, near_signature(edited(a, 2, 2), OPTIONS)) in (1, 2)


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_duplicates_reach_the_threshold(tmp_path, threshold):
    """Constructed signatures: a given number of 128 entries equal those of the first."""
    options = CleaningOptions(near_threshold=threshold)
    count, rows = dedup.bands(threshold, 128)
    first = np.arange(128, dtype=np.uint32)
    limit = int(np.ceil(threshold * 128))
    for number, equal in enumerate((limit - 1, limit)):
        with DuplicateIndex(tmp_path / str(number), options) as seen:
            assert seen.near(0, first) is None
            other = np.where(np.arange(128) < equal, first, first + 1000).astype(np.uint32)
            assert rows <= equal and seen.near(1, other) == (0 if equal == limit else None)
    assert count * rows <= 128


def test_bands_detect_similar_documents():
    """The chance that a band is shared, 1 - (1 - s^rows)^count, at the threshold and above; measured: 79 %, 98.5 %."""
    count, rows = dedup.bands(0.7, 128)
    assert [1 - (1 - s**rows) ** count > least for s, least in ((0.7, 0.75), (0.8, 0.98), (0.9, 0.999))] == [True] * 3
    first, other = np.arange(128, dtype=np.uint32), np.arange(128, dtype=np.uint32)
    other[rows * 3] += 1
    keys = [dedup.band_keys(one, count, rows) for one in (first, other)]
    assert [a == b for a, b in zip(*keys, strict=True)] == [band != 3 for band in range(count)]
    assert len(set(dedup.band_keys(np.zeros(128, np.uint32) + 7, count, rows))) == count


# -- restarts


def stream(count=300):
    """Documents of which every third is an exact and every fifth a near duplicate of an earlier one."""
    texts = []
    for i in range(count):
        fresh = document(i)
        if i % 3 == 2:
            fresh = texts[random.Random(i).randrange(i)]
        elif i % 5 == 4:
            fresh = edited(texts[random.Random(i).randrange(i)], i)
        texts.append(fresh)
    return [(i, exact_signature(text), near_signature(text, OPTIONS)) for i, text in enumerate(texts)]


def answers(seen, documents):
    return [(seen.exact(i, exact), seen.near(i, near)) for i, exact, near in documents]


def contents(path):
    with sqlite3.connect(path) as database:
        return [
            database.execute(f"SELECT * FROM {table} ORDER BY 1, 2").fetchall() for table in ("exact", "near", "bands")
        ]


@pytest.fixture(scope="module")
def documents():
    return stream()


@pytest.fixture(scope="module")
def uninterrupted(documents, tmp_path_factory):
    path = tmp_path_factory.mktemp("seen") / "seen"
    with DuplicateIndex(path, OPTIONS) as seen:
        found = answers(seen, documents)
    assert sum(exact is not None for exact, _ in found) > 90 and sum(near is not None for _, near in found) > 120
    return found, contents(path)


@pytest.mark.parametrize("at, end", [(0, 300), (1, 150), (120, 200), (299, 300)])
def test_results_after_delete_from_are_the_same(tmp_path, documents, uninterrupted, at, end):
    path = tmp_path / "seen"
    with DuplicateIndex(path, OPTIONS) as seen:
        answers(seen, documents[:end])
    with DuplicateIndex(path, OPTIONS) as seen:
        seen.delete_from(at)
        assert answers(seen, documents[at:]) == uninterrupted[0][at:]
    assert contents(path) == uninterrupted[1]


def test_exception_rolls_back_to_the_last_commit(tmp_path, documents, uninterrupted):
    path = tmp_path / "seen"
    with pytest.raises(KeyboardInterrupt), DuplicateIndex(path, OPTIONS) as seen:
        answers(seen, documents[:100])
        seen.commit()
        answers(seen, documents[100:150])
        raise KeyboardInterrupt
    with DuplicateIndex(path, OPTIONS) as seen:
        assert max(remembered(seen)) < 100
        assert answers(seen, documents[100:]) == uninterrupted[0][100:]


KILLED = """
import os, pickle, signal, sys
from pathlib import Path
from gptjax.data.prepare.cleaning import CleaningOptions
from gptjax.data.prepare import dedup
from gptjax.data.prepare.dedup import DuplicateIndex
dedup._CACHE_KB = 20  # so that much of what is not committed is in the file already
documents = pickle.load(open(sys.argv[2], "rb"))
seen = DuplicateIndex(Path(sys.argv[1]), CleaningOptions())
for i, exact, near in documents:
    seen.exact(i, exact), seen.near(i, near)
    if i % 70 == 69:
        seen.commit()
    if i == 200:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_kill_leaves_a_sound_file(tmp_path, documents, uninterrupted):
    path, texts = tmp_path / "seen", tmp_path / "documents"
    texts.write_bytes(pickle.dumps(documents))
    result = subprocess.run(
        [sys.executable, "-c", KILLED, path, texts], cwd=ROOT, check=False, env=os.environ | {"PYTHONPATH": ""}
    )
    assert result.returncode == -signal.SIGKILL
    with DuplicateIndex(path, OPTIONS) as seen:
        assert seen._run("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert 139 >= max(remembered(seen)) > 130
        seen.delete_from(130)
        assert answers(seen, documents[130:]) == uninterrupted[0][130:]
    assert contents(path) == uninterrupted[1]


# -- what is refused


def test_a_file_is_for_one_run_and_one_set_of_options(tmp_path):
    path = tmp_path / "seen"
    with DuplicateIndex(path, OPTIONS), pytest.raises(DataError, match="seen is in use by another run"):
        DuplicateIndex(path, OPTIONS)
    with pytest.raises(ConfigError, match=r"was made with near_threshold=0.7, near_shingle=5, .* begin with another"):
        DuplicateIndex(path, CleaningOptions(near_threshold=0.8))
    with DuplicateIndex(path, CleaningOptions(min_words=3)):
        pass


def test_files_that_cannot_be_used_are_refused(tmp_path):
    (tmp_path / "text").write_text("text, and no database\n" * 100)
    with pytest.raises(DataError, match="text: file is not a database"):
        DuplicateIndex(tmp_path / "text", OPTIONS)
    with pytest.raises(DataError, match="cannot open .*seen: unable to open database file"):
        DuplicateIndex(tmp_path / "no" / "seen", OPTIONS)


def test_datasketch_is_needed_for_near_duplicates_alone(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasketch", None)
    with DuplicateIndex(tmp_path / "seen", OPTIONS) as seen:
        seen.delete_from(0)
        assert seen.exact(0, exact_signature("a")) is None
    with pytest.raises(ConfigError, match=re.escape("near duplicates need datasketch: pip install 'gptjax[data]'")):
        near_signature("a", OPTIONS)
    with pytest.raises(ConfigError, match="need datasketch"):
        dedup.check(CleaningOptions(near_threshold=0.123))


# -- real text


def passages(text):
    """Cut at paragraph ends, about 2,000 characters each; what is left at the end of a book goes."""
    pieces = []
    for line in text.removeprefix("\ufeff").split("\n"):
        if not pieces or len(pieces[-1]) >= 2000:
            pieces.append("")
        pieces[-1] += line + "\n"
    return [piece for piece in pieces if len(piece) >= 1000]


def change_words(text, rng):
    pieces = re.split(r"(\s+)", text)  # every other one is a word
    for _ in range(rng.randint(1, 6)):
        pieces[2 * rng.randrange(len(pieces) // 2)] = rng.choice(["altered", "word", "other", "thing"])
    return "".join(pieces)


def change_case(text, rng):
    return rng.choice([str.upper, str.lower, str.title, str.swapcase])(text)


def change_punctuation(text, rng):
    changes = [lambda t: re.sub("[,;]", "", t), lambda t: t.replace(".", " !"), lambda t: t.replace('"', "\u201c")]
    return rng.choice(changes)(text)


def remove_sentence(text, rng):
    sentences = re.split(r"(?<=[.!?])\s+", text)
    del sentences[rng.randrange(1, len(sentences))]
    return " ".join(sentences)


def change_space(text, rng):
    changes = [lambda t: t.replace(" ", "  "), lambda t: t.replace(" ", "\n"), lambda t: re.sub("(.{65}) ", r"\1\n", t)]
    return rng.choice(changes)(text)


def add_header(text, rng):
    return f"Downloaded from library {rng.randrange(99)}, on page {rng.randrange(99)}, all rights reserved.\n\n{text}"


EDITS = [change_words, change_case, change_punctuation, remove_sentence, change_space, add_header]


def plant(originals, rng):
    """(originals, edited copies of a tenth of them): texts with the number of what each is a copy of."""
    planted = []
    for number in rng.sample(range(len(originals)), len(originals) // 10):
        text = originals[number]
        for edit in rng.sample(EDITS, rng.randint(1, 3)):
            text = edit(text, rng)
        planted.append((number, text))
    return planted


def check_novels(files, folder):
    """Returns (fraction of planted copies that are detected, number of other passages dropped)."""
    originals = [passage for path in files for passage in passages(path.read_text(encoding="utf-8"))]
    planted = plant(originals, random.Random(0))
    with DuplicateIndex(folder / "seen", OPTIONS) as seen:
        dropped = [n for n, text in enumerate(originals) if seen.near(n, near_signature(text, OPTIONS)) is not None]
        found = [seen.near(len(originals) + n, near_signature(text, OPTIONS)) for n, (_, text) in enumerate(planted)]
    right = sum(answer == number for answer, (number, _) in zip(found, planted, strict=True))
    print(json.dumps({"passages": len(originals), "planted": len(planted), "found": right, "dropped": len(dropped)}))
    assert sum(answer is not None for answer in found) - right <= 2
    assert right >= 0.95 * len(planted)
    assert len(dropped) < 0.001 * len(originals)


def novels():
    return sorted(path for path in shared("data/english_novels").glob("*.txt") if path.name != "SOURCE.txt")


@pytest.mark.slow
def test_edited_passages_of_novels_are_found(tmp_path):
    check_novels(novels()[::6], tmp_path)


@pytest.mark.slow
def test_edited_passages_of_all_novels_are_found(tmp_path):
    check_novels(novels(), tmp_path)
