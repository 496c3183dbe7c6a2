"""Files of documents: each format, compressed or not, gives its documents; errors are reported with their position."""

import csv
import gzip
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config.errors import DataError
from gptjax.data import formats
from gptjax.data.formats import ReadOptions, Text

TEXTS = ["first\nline", "第二个文档 🤖", 'with "quotes", commas\tand tabs', "last"]


def read(path, **how):
    reading = ReadOptions(**how)
    return [formats.parse(path, item, reading) for item in formats.items(path, reading)]


def texts(path, **how):
    return [text.text for text in read(path, **how)]


def write(path, texts):
    """The texts as a file of the format that its name says, with a prompt each."""
    records = [{"text": text, "question": f"q{i}", "extra": f"e{i}"} for i, text in enumerate(texts)]
    name = path.name.removesuffix(".gz").removesuffix(".zst")
    if name.endswith(".jsonl"):
        raw = "".join(json.dumps(record, ensure_ascii=i % 2 == 0) + "\n" for i, record in enumerate(records)).encode()
    elif name.endswith(".json"):
        raw = json.dumps(records, indent=4).encode()
    elif name.endswith(".parquet"):
        pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pyarrow.Table.from_pylist(records), path)
        return path
    else:
        with open(path, "w", newline="") as file:
            rows = csv.DictWriter(file, list(records[0]))
            rows.writeheader()
            rows.writerows(records)
        raw = path.read_bytes()
    if path.suffix == ".gz":
        raw = gzip.compress(raw)
    if path.suffix == ".zst":
        zstandard = pytest.importorskip("zstandard")
        half = len(raw) // 2  # in two frames, as compressors that work in parallel write
        raw = zstandard.compress(raw[:half]) + zstandard.compress(raw[half:])
    path.write_bytes(raw)
    return path


NAMES = ["a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"]


@pytest.mark.parametrize("name", NAMES)
def test_each_format_gives_its_documents_and_pairs(tmp_path, name):
    path = write(tmp_path / name, TEXTS)
    assert texts(path) == TEXTS
    pairs = read(path, prompt_key="question,extra", prompt_ending=" -> ")
    assert pairs[1] == Text("q1\ne1 -> ", TEXTS[1])


@pytest.mark.parametrize("name", NAMES)
def test_missing_field_is_reported_with_the_available_ones(tmp_path, name):
    path = write(tmp_path / name, TEXTS)
    with pytest.raises(DataError, match=r"has no (column )?'body'.*it has text, question, extra"):
        texts(path, text_key="body")


@pytest.mark.parametrize("name", NAMES)
def test_all_bytes_of_a_file_are_counted_once(tmp_path, name):
    path, counted = write(tmp_path / name, TEXTS * 50), []
    assert len(list(formats.items(path, ReadOptions(), counted.append))) == 200
    assert sum(counted) == path.stat().st_size


@pytest.mark.parametrize("name", [name for name in NAMES if name != "a.json"])
def test_truncated_file_is_damaged_or_not_json(tmp_path, name):
    path = write(tmp_path / name, TEXTS * 50)
    if name == "a.csv":
        return  # a table may end anywhere
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(DataError, match="is damaged|is not JSON|not 3"):
        texts(path)


def test_text_is_one_document_or_many(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("= One =\ntext\n\n = Two = \nmore\n= Three =")
    assert texts(path) == ["= One =\ntext\n\n = Two = \nmore\n= Three ="]
    assert texts(path, document_start=r" ?= \w+ = ?$") == ["= One =\ntext\n\n", " = Two = \nmore\n", "= Three ="]
    path.write_text("a\nb\n<|endoftext|>\nc\n<|endoftext|>\n\nd")
    assert texts(path, separator="<|endoftext|>") == ["a\nb\n", "c\n", "\nd"]


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab=\n", max_size=40))
def test_splitting_a_text_by_headings_loses_nothing(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("t") / "a.txt"
    path.write_text(text)
    assert "".join(texts(path, document_start="=")) == text


def test_tables_without_a_header_and_with_tabs(tmp_path):
    path = tmp_path / "a.tsv"
    path.write_text('Hi.\t嗨。\nHe said "no\t不\n')
    pairs = read(path, prompt_key="0", text_key="1", prompt_ending="\t")
    assert pairs == [Text("Hi.\t", "嗨。"), Text('He said "no\t', "不")]
    path = path.rename(tmp_path / "a.txt")
    assert read(path, format="tsv", prompt_key="0", text_key="1", prompt_ending="\t") == pairs


def test_invalid_utf8_is_repaired_and_reported(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    assert read(tmp_path / "a.txt") == [Text("", "caf\ufffd", True)]
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    assert read(tmp_path / "a.jsonl") == [Text("", "caf\ufffd", True)]
    (tmp_path / "a.csv").write_bytes(b"text\ncaf\xe9\n")
    assert read(tmp_path / "a.csv") == [Text("", "caf\ufffd", True)]


@pytest.mark.parametrize(
    "name, content, expected",
    [
        ("a.txt", b"text\0more", r"a.txt, document 1, is not text: it has a zero byte at 4"),
        ("a.jsonl", b'{"text": "a"}\n\n{"text": ', r"a.jsonl, line 3 is not JSON"),
        ("a.jsonl", b'["a"]\n', "a.jsonl, line 1 is not an object with fields"),
        ("a.jsonl", b'{"text": 3}\n', "has 'text' that is int and not text"),
        ("a.json", b'{"text": "a"}', "is not a list of objects"),
        ("a.json", b"[", "a.json is not JSON"),
        ("a.csv", b"text,b\nonly\n", "a.csv, line 2 has 1 fields and not the 2 "),
        ("a.parquet", b"PAR1", "a.parquet is damaged"),
        ("a.jsonl.gz", b"not gzip", "a.jsonl.gz is damaged"),
    ],
)
def test_errors_are_reported_with_their_position(tmp_path, name, content, expected):
    if name.endswith(".parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=expected):
        texts(tmp_path / name)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.json", "a.csv"])
def test_a_document_larger_than_the_budget_is_refused_before_it_is_read(tmp_path, name):
    path = tmp_path / name
    if name == "a.txt":
        path.write_text("x" * 2000)
    else:
        write(path, ["x" * 2000])
    with pytest.raises(DataError, match=r"a\.\S+ has (a document of )?more than 1,000 bytes"):
        texts(path, max_document=1000)
    if name == "a.txt":
        path.write_text("x\n" * 2000)
        assert len(texts(path, max_document=1000, document_start="x")) == 2000
        with pytest.raises(DataError, match="has a document of more than 1,000 bytes"):
            texts(path, max_document=1000, document_start="y")


def test_formats_of_file_names():
    from pathlib import Path

    found = {
        name: formats.format_of(Path(name)) for name in ("a.txt", "b.JSONL.gz", "c", "d.py", "e.ndjson", "f.csv.zst")
    }
    assert found == {
        "a.txt": "txt", "b.JSONL.gz": "jsonl", "c": "txt", "d.py": "txt", "e.ndjson": "jsonl", "f.csv.zst": "csv",
    }  # fmt: skip
    assert formats.has_known_format(Path("a.txt.gz")) and not formats.has_known_format(Path("d.py"))
