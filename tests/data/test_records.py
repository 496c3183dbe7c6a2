"""Records are the same from every file format, in prepare and in train; unreadable ones are refused by line."""

import csv
import gzip
import io
import json
import os
from functools import partial
from pathlib import Path

import pytest
from conftest import shared, tiny_config
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import prepare
from gptjax.config.errors import DataError
from gptjax.data import examples, formats, pairs, records, sources
from gptjax.data.formats import ReadOptions
from gptjax.data.prepare import cleaning, pipeline
from gptjax.data.records import RecordOptions
from gptjax.data.tokenizers import tokenizers
from gptjax.decode import prompt_files

ZSTD = pytest.importorskip("zstandard", reason="the data extra is not installed")
PYARROW = pytest.importorskip("pyarrow", reason="the data extra is not installed")
GZIP = partial(gzip.compress, mtime=0)  # names of tests are the same in every process
FORMATS = ["json", "jsonl", "csv", "tsv", "parquet"]
PACKINGS = {"": bytes, ".gz": GZIP, ".zst": ZSTD.compress}


def raw_of(format, fields):
    """Records as the bytes of a file, by the standard library and pyarrow."""
    text = io.StringIO(newline="")
    match format:
        case "json":
            return json.dumps(fields, indent=1).encode()
        case "jsonl":
            lines = [json.dumps(one, ensure_ascii=i % 2 == 0) for i, one in enumerate(fields)]
            return "\r\n".join(lines).encode()
        case "csv":
            rows = csv.DictWriter(text, list(fields[0]), quoting=csv.QUOTE_ALL)
            rows.writeheader()
            rows.writerows(fields)
            return text.getvalue().encode()
        case "tsv":
            rows = [list(fields[0]), *(one.values() for one in fields)]
            return "\n".join("\t".join(row) for row in rows).encode()
        case "parquet":
            from pyarrow import parquet

            table = io.BytesIO()
            parquet.write_table(PYARROW.Table.from_pylist(fields), table)
            return table.getvalue()


def file_of(folder, name, raw):
    (folder / name).write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return folder / name


def trained_on(path):
    return [one.fields for one in records.read(path)]


def prepared_from(path, **how):
    reading = ReadOptions(**how)
    return [formats.parse(path, item, reading) for item in formats.items(path, reading)]


# Texts that a line can hold: everything but line feeds, tabs, zero bytes and halves of surrogate pairs.
LINE = st.text(st.characters(codec="utf-8", exclude_characters="\0\n\t"), max_size=12)
TRICKY = st.sampled_from(
    ["a\u2028b", "\x0b\x0c\x85", "lone\rreturn", '"quoted", 5"', " ", "\ufeff", "#", "\\ud83d", "🤖"]
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(LINE | TRICKY, LINE | TRICKY), min_size=1, max_size=4))
def test_records_are_the_same_from_every_file(tmp_path_factory, rows):
    folder = tmp_path_factory.mktemp("records")
    fields = [{"text": text.rstrip("\r") + ".", "label": label.rstrip("\r") + "."} for text, label in rows]
    for format in FORMATS:
        for packing, pack in PACKINGS.items():
            path = file_of(folder, f"a.{format}{packing}", pack(raw_of(format, fields)))
            assert trained_on(path) == fields, path.name
            found = [(one.prompt, one.text, one.repaired) for one in prepared_from(path, prompt_key="label")]
            assert found == [(one["label"] + "\n", one["text"], False) for one in fields], path.name


CASES = [
    # a file, what training reads of it, what preparing does; a text that a DataError says where it is refused
    ("a.csv", b"\xef\xbb\xbftext,label\none,1\n\n  \ntwo,2\n\n", ["one", "two"]),
    ("a.csv", b'\xef\xbb\xbf"text",label\r\n"one\r\ntwo",1\r\n', ["one\r\ntwo"]),
    ("a.csv", b"text,b\n\xe2\x80\xa8,1\n\x0b\x0c,1\n\xc2\x85.,1\na\rb,1\n", ["\u2028", "\x0b\x0c", "\x85.", "a\rb"]),
    ("a.csv", b'text\n"un""der"\n', ['un"der']),
    ("a.csv", b"text,label\n1,hello, world\n2,b", "a.csv, line 2 has 3 fields and not the 2"),
    ("a.csv", b"text,label\n\na,b\nonly\n", "a.csv, line 4 has 1 fields and not the 2"),
    ("a.csv", b'id,text\n1,"hello\n2,second\n', "a.csv, line 2 has a field whose quote is never closed"),
    ("a.csv", b'id,text\n1,"a\nb"\n2,"x" y\n', "a.csv, line 4 has text behind a closing quote"),
    ("a.csv", b'id,text\n1,"hello\n2,"second"\n', "line 3 .of the record from line 2 on. has text behind a closing"),
    ("a.csv", b"text,b,text\na,b,c\n", "a.csv has two columns called 'text'"),
    ("a.csv", b"text,,\na,b,c\n", ["a"]),
    ("a.csv", b"text\0,b\na,b\n", "a.csv is not text: it has a zero byte in line 1"),
    ("a.csv", "text,b\nä,b\n".encode("utf-16"), "a.csv is not text: it has a zero byte in line 1"),
    ("a.csv", b"text,b\ncaf\xe9,b\n\xef\xbf\xbd,b\n", ["caf\ufffd", "\ufffd"]),
    ("a.tsv", b'\xef\xbb\xbftext\tb\n\n"a\t1\r\n\n', ['"a']),
    ("a.tsv", b"text\tb\na\n", "a.tsv, line 2 has 1 fields and not the 2"),
    ("a.tsv", b"text\ttext\na\tb\n", "a.tsv has two columns called 'text'"),
    ("a.jsonl", b'\xef\xbb\xbf{"text": "one"}\r\n\n{"text": "a\xe2\x80\xa8b"}', ["one", "a\u2028b"]),
    ("a.jsonl", b'{"text": "a\\ud83d"}\n{"text": "\\ud83d\\ud83d\\ude00 \\\\ud83d"}', ["a\ufffd", "\ufffd😀 \\ud83d"]),
    ("a.jsonl", b'{"text": "caf\xe9"}\n{"text": "\xed\xa0\xbd"}', ["caf\ufffd", "\ufffd\ufffd\ufffd"]),
    ("a.jsonl", b'{"text": "a\\u0000b", "x": NaN}', ["a\0b"]),
    ("a.jsonl", b'{"text": "a"}\n{"text": \n', "a.jsonl, line 2 is not JSON"),
    ("a.jsonl", b'{"text": "a"}\n\n[1]', "a.jsonl, line 3 is not an object with fields"),
    ("a.jsonl", b'{"text": "a"}\n\0\n', "a.jsonl is not text: it has a zero byte in line 2"),
    ("a.jsonl", b'{"text": "a"}\n' + b'{"x":' * 9000, "a.jsonl, line 2 is nested too deeply"),
    ("a.json", b'\xef\xbb\xbf[{"text": "a\\uDC00"}, {"text": "b"}]', ["a\ufffd", "b"]),
    ("a.json", b'[{"text": "a"}, 3]', "a.json, record 2 is not an object with fields"),
    ("a.json", b"[" * 9000, "a.json is nested too deeply"),
    ("a.json", b'{"text": "a"}', "a.json is not a list of objects"),
    ("a.parquet", b"PAR1", "a.parquet is damaged"),
    ("a.jsonl.gz", GZIP(b'{"text": "a"}\n' * 99)[:-9], "a.jsonl.gz is damaged"),
    ("a.jsonl.gz", GZIP(b"text")[:12] + b"\xff\xff\xff\xff", "a.jsonl.gz is damaged"),
    ("a.jsonl.zst", ZSTD.compress(b'{"text": "a"}\n' * 99)[:-2], "a.jsonl.zst is damaged"),
    ("a.jsonl.zst", ZSTD.compress(b'{"text": "a"}\n') + ZSTD.compress(b'{"text": "b"}\n'), ["a", "b"]),
    ("a.jsonl.zst", b"x\n", "a.jsonl.zst is damaged"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "raw", "expected"), CASES)
def test_training_and_preparing_read_or_refuse_a_file_alike(tmp_path, capsys, name, raw, expected):
    path = file_of(tmp_path, name, raw)
    for read in (lambda: [one["text"] for one in trained_on(path)], lambda: [one.text for one in prepared_from(path)]):
        if isinstance(expected, str):
            with pytest.raises(DataError, match=expected) as refused:
                read()
            assert "\n" not in str(refused.value)
        else:
            assert read() == expected
    repaired = sum("\ufffd" in text for text in expected) - (b"\xef\xbf\xbd" in raw)
    says = f"records    {repaired} of {len(expected)} of {path} are not UTF-8 and are repaired"
    assert isinstance(expected, str) or (says in capsys.readouterr().err) == (repaired > 0)


def test_damage_is_found_wherever_a_packed_file_is_cut(tmp_path):
    """A truncated file never passes for a shorter one, not even at the end of a line."""
    lines = b"".join(b'{"text": "%d"}\n' % i for i in range(5000))
    for packing in (".gz", ".zst"):
        whole = PACKINGS[packing](lines)
        for end in range(1, len(whole), 811):
            path = file_of(tmp_path, f"a.jsonl{packing}", whole[:end])
            with pytest.raises(DataError, match="is damaged"):
                trained_on(path)


def test_parquet_of_every_shape_is_repaired(tmp_path):
    from pyarrow import parquet

    def broken(kind):
        return PYARROW.array([b"caf\xe9", None, b"whole"], PYARROW.binary()).view(kind)

    inner = broken(PYARROW.string())
    columns = {
        "text": inner,
        "nested": PYARROW.StructArray.from_arrays([inner], ["role"]),
        "list": PYARROW.ListArray.from_arrays([0, 2, 2, 3], inner),
        "number": PYARROW.array([1, 2, None]),
    }
    parquet.write_table(PYARROW.table(columns), tmp_path / "a.parquet")
    assert trained_on(tmp_path / "a.parquet") == [
        {"text": "caf\ufffd", "nested": {"role": "caf\ufffd"}, "list": ["caf\ufffd", None], "number": 1},
        {"text": None, "nested": {"role": None}, "list": [], "number": 2},
        {"text": "whole", "nested": {"role": "whole"}, "list": ["whole"], "number": None},
    ]
    found = list(records.read(tmp_path / "a.parquet"))
    assert [one.repaired for one in found] == [True, False, False]
    table = PYARROW.Table.from_arrays([PYARROW.array(["a"]), PYARROW.array(["b"])], names=["text", "text"])
    parquet.write_table(table, tmp_path / "b.parquet")
    for read in (trained_on, prepared_from):
        with pytest.raises(DataError, match=r"b.parquet has two columns called 'text'"):
            read(tmp_path / "b.parquet")


# Parallel text


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("format", ["json", "jsonl", "csv", "tsv", "parquet", "nested"])
def test_pairs_come_from_every_file(tmp_path, format, packing):
    fields = [{"en": f"a {i}", "de": f"ein {i}"} for i in range(4)]
    expected = [pairs.Pair(*one.values()) for one in fields]
    if format in records.ROWS:
        rows = [fields[0] | {}, *fields][1:]
        raw = raw_of(format, rows).split(b"\n", 1)[1]  # pairs have no header
    elif format == "nested":
        raw = raw_of("jsonl", [{"translation": one} for one in fields])
    else:
        raw = raw_of(format, fields)
    path = file_of(tmp_path, f"p.{'jsonl' if format == 'nested' else format}{packing}", PACKINGS[packing](raw))
    assert pairs.read_pair_file(path, (0, 1), ("en", "de")) == expected
    back = [pairs.Pair(*reversed(one)) for one in expected]
    assert pairs.read_pair_file(path, (1, 0), ("de", "en")) == back
    if format not in records.ROWS:
        with pytest.raises(DataError, match="(line|record) 1 has (en, de|de, en); texts en and fr are read"):
            pairs.read_pair_file(path, (0, 1), ("en", "fr"))


def test_aligned_files_may_be_packed_by_zst(tmp_path):
    for language, text in (("en", "a\n"), ("de", "b\n")):
        file_of(tmp_path, f"train.{language}.zst", ZSTD.compress(text.encode()))
    config = tiny_config(data_path=tmp_path, data_languages=("en", "de"), data_layout="pairs").data
    assert pairs.read(config, "train") == [pairs.Pair("a", "b")]
    assert pairs.splits(tmp_path) == {"train": ["de", "en"]}


# Prompts


@pytest.mark.parametrize(
    ("name", "raw", "expected"),
    [
        ("p.txt", "a\u2028b\r\n\n \n\x0bc\x85d\ne\rf", ["a\u2028b", "\x0bc\x85d", "e\rf"]),
        ("p.txt", b'\xef\xbb\xbf"a \\n b"\n{"prompt": "c", "id": 3}\n17\n[1]\n', ["a \n b", "c", "17", "[1]"]),
        ("p.txt", 'def f(\n{"a": 1,\n{ int x\n"open', ["def f(", '{"a": 1,', "{ int x", '"open']),
        ("p.txt", "[" * 3000, ["[" * 3000]),
        ("p.txt", 'a\n{"text": "b"}', "p.txt, line 2 has no text 'prompt'; it has text"),
        ("p.txt", '{"prompt": 5}', "p.txt, line 1 has no text 'prompt'; it has prompt"),
        ("p.txt", "{}", "line 1 has no text 'prompt'; it has nothing"),
        ("p.txt", '\n{"a":' * 1 + '{"a":' * 9000, "p.txt, line 2 is nested too deeply"),
        ("p.txt", "a\n\0", "p.txt is not text: it has a zero byte in line 2"),
        ("p.txt", b"caf\xe9\nb", ["caf\ufffd", "b"]),
        ("p.jsonl", '{"prompt": "a\\ud800"}\nplain', ["a\ufffd", "plain"]),
        ("p.jsonl", '{"prompt": "a"', "p.jsonl, line 1 is not JSON"),
        ("p.jsonl.gz", GZIP(b'{"prompt": "a"}'), ["a"]),
        ("p.csv", 'prompt,id\n"a\nb",1\n', ["a\nb"]),
        ("p.tsv", "text\na\n", "p.tsv, line 2 has no text 'prompt'; it has text"),
        ("p.json", '[{"prompt": "a"}, {"prompt": null}]', "p.json, record 2 has no text 'prompt'"),
    ],
)  # fmt: skip
def test_prompts_of_a_file(tmp_path, capsys, name, raw, expected):
    path = file_of(tmp_path, name, raw)
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            list(prompt_files.read(str(path)))
    else:
        assert list(prompt_files.read(str(path))) == expected
        assert ("repaired with U+FFFD" in capsys.readouterr().err) == any("\ufffd" in text for text in expected)


@pytest.mark.parametrize("tokenizer", ["bytes", "bpe"])
def test_half_of_a_surrogate_pair_is_encoded_as_the_replacement_character(tokenizer):
    made = tokenizers.bytes_encoding() if tokenizer == "bytes" else tokenizers.bpe_encoding(["some text " * 20], 260)
    for half, whole in (("a\ud83d", "a\ufffd"), ("\udc00\ud83d\ude00", "\ufffd😀")):
        for encode in (tokenizers.encode, tokenizers.encode_special, tokenizers.encode_array):
            assert list(encode(made, half)) == list(encode(made, whole))


# Files that cannot be read


def links(folder):
    """A folder with files, one below, a link to a folder outside, and one that leads back up."""
    outside = folder / "outside"
    for path in (
        folder / "in" / "a.txt",
        folder / "in" / "b" / "c.txt",
        folder / "in" / ".d" / "e.txt",
        outside / "f.txt",
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("text")
    (folder / "in" / "0out").symlink_to(outside)
    (folder / "in" / "b" / "up").symlink_to(folder / "in")
    return folder / "in"


def test_folders_are_read_once_and_links_are_followed(tmp_path):
    root = links(tmp_path)
    found = [path.relative_to(root).as_posix() for path in sources.files_below(root)]
    assert found == [".d/e.txt", "0out/f.txt", "a.txt", "b/c.txt"]


def test_patterns_name_what_pythons_glob_names(tmp_path, monkeypatch):
    import glob

    root = links(tmp_path)
    (root / "b" / "up").unlink()
    monkeypatch.chdir(tmp_path)
    for pattern in ("**/*.txt", "*/*.txt", "**", "in/*", "in/**/c.txt", "in/[ab]*", "i?/.d/*", "none/*", "*/b/c.txt",
                    "in/.*/*", "in/a.txt", f"{tmp_path}/**/*.txt", "in/**/b/**/*.txt", "in/a.txt/*"):  # fmt: skip
        expected = {Path(p).resolve() for p in glob.glob(pattern, recursive=True) if Path(p).is_file()}
        assert {p.resolve() for p in sources.files_matching(Path(pattern))} == expected, pattern


def refuse(monkeypatch, name, function):
    """Makes a call of the system fail for one name, as it does for whoever may not do that; root may."""
    real = getattr(os, function)

    def call(path, *arguments, **named):
        if os.path.basename(os.fspath(path)) == name:
            raise PermissionError(13, "Permission denied", path)
        return real(path, *arguments, **named)

    monkeypatch.setattr(os, function, call)


READERS = {
    "text": lambda root: sources.read(tiny_config(data_path=root).data),
    "text by a glob": lambda root: sources.read(tiny_config(data_path=f"{root}/**/*.txt").data),
    "prepare": lambda root: pipeline.find_inputs([str(root)]),
    "prepare by a glob": lambda root: pipeline.find_inputs([f"{root}/**/*.txt"]),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("fault", ["closed folder", "broken link", "circle"])
def test_unreadable_files_are_refused_and_never_skipped(tmp_path, monkeypatch, reader, fault):
    root = links(tmp_path)
    if fault == "closed folder":
        refuse(monkeypatch, "b", "listdir")
        says = r"cannot list .*/b: Permission denied"
    else:
        where = root / "b" / "gone.txt"
        where.symlink_to("nowhere" if fault == "broken link" else "gone.txt")
        says = r"cannot read .*/gone.txt: " + ("No such file" if fault == "broken link" else "Too many levels")
    with pytest.raises(DataError, match=says):
        READERS[reader](root)


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet", "a.txt", "a.jsonl.gz"])
def test_file_without_permission_is_refused(tmp_path, monkeypatch, name):
    path = file_of(tmp_path, name, b"text")

    def closed(self, *arguments, **named):
        raise PermissionError(13, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", closed)
    reads = [lambda: prepared_from(path)] + [lambda: trained_on(path)] * (name != "a.txt")
    for read in reads:
        with pytest.raises(DataError, match=f"cannot read .*{name}: Permission denied"):
            read()


def test_a_split_behind_a_broken_link_is_not_divided_instead(tmp_path):
    file_of(tmp_path, "train.jsonl", '{"text": "a"}\n' * 9)
    (tmp_path / "val.jsonl").symlink_to("gone")
    config = tiny_config(data_path=tmp_path, data_layout="examples")
    with config.unlocked():
        config.data.examples.form = "text"
    with pytest.raises(DataError, match=r"cannot read .*val.jsonl: No such file"):
        examples.read(config.data, "train")


def test_evaluation_files_are_read_as_records_are(tmp_path):
    found = list(cleaning.evaluation_items(str(file_of(tmp_path, "a.csv", b'\xef\xbb\xbf"a",b\n\n"c\nd",e\n'))))
    assert found == ["a", "b", "c\nd", "e"]
    for name, raw, says in (
        ("a.jsonl", "1\n" + "[" * 9000, "a.jsonl, line 2 is nested too deeply"),
        ("a.csv", 'a\n"b', "line 2 has a field whose quote is never closed"),
        ("a.txt", b"caf\xe9", "a.txt is not UTF-8 text"),
    ):
        with pytest.raises(DataError, match=says):
            list(cleaning.evaluation_items(str(file_of(tmp_path, name, raw))))
    packed = file_of(tmp_path, "a.json.gz", GZIP(b'[{"a": ["x", {"b": "y"}]}, "z"]'))
    assert list(cleaning.evaluation_items(str(packed))) == ["x", "y", "z"]
    path = file_of(tmp_path, "a.parquet", raw_of("parquet", [{"q": "x"}]))
    assert list(cleaning.evaluation_items(str(path))) == ["x"]


# Files that once failed, and real ones


RIGHT = {
    "prepare_csv_bom/a.csv": ["one", "two"],
    "prepare_tsv_bom/a.tsv": ["one"],
    "prepare_jsonl_bom/a.jsonl": ["one", "two"],
    "prepare_csv_blank_line_end/a.csv": ["one", "two"],
    "prepare_csv_blank_line_mid/a.csv": ["one", "two"],
    "prepare_tsv_blank/a.tsv": ["hello"],
    "prepare_csv_ragged_more/a.csv": "a.csv, line 2 has 3 fields and not the 2",
    "prepare_csv_unbalanced/a.csv": "a.csv, line 2 has a field whose quote is never closed",
    "prepare_csv_dup_header/a.csv": "a.csv has two columns called 'text'",
    "prepare_pq_dup_cols/a.parquet": "a.parquet has two columns called 'text'",
    "prepare_json_deep/a.json": "a.json is nested too deeply",
    "prepare_jsonl_deep/a.jsonl": "a.jsonl, line 1 is nested too deeply",
    "prepare_pq_invalid_utf8/a.parquet": ["caf\ufffd"],
    "zst_damaged/a.txt.zst": "a.txt.zst is damaged",
}


@pytest.mark.parametrize("case", RIGHT)
def test_cases_for_preparing(tmp_path, call, case):
    path, expected = shared(f"cases/{case}"), RIGHT[case]
    if isinstance(expected, str):
        flags = [f"--input={path}", f"--output={tmp_path / 'set'}", "--tokenizer=bytes", "--workers=1"]
        assert expected in call(prepare, *flags).refusal()
        assert [one.name for one in tmp_path.iterdir() if not one.name.endswith(".unfinished")] == []
    else:
        assert [one.text for one in prepared_from(path)] == expected
        assert [one["text"] for one in trained_on(path)] == expected


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ("prompts_u2028/p.jsonl", ["a\u2028b", "c\x85d", "form\x0cfeed"]),
        ("prompts_key/p.jsonl", "p.jsonl, line 1 has no text 'prompt'; it has text"),
        ("prompts_deep/p.txt", 1),
    ],
)
def test_cases_for_prompts(case, expected):
    path = shared(f"cases/{case}")
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            list(prompt_files.read(str(path)))
    else:
        found = list(prompt_files.read(str(path)))
        assert found == expected or len(found) == expected


REAL = {
    "ag_news_test/test.csv": 7600,
    "alpaca_5000/alpaca_5000.json": 5000,
    "crows_pairs/crows_pairs_anonymized.csv": 1508,
    "chnsenticorp_htl/ChnSentiCorp_htl_all.csv": 7766,
    "llamafactory_demo/c4_demo.jsonl": 300,
    "humaneval/HumanEval.jsonl.gz": 164,
}


@pytest.mark.parametrize("name", REAL)
def test_real_files(name):
    path = shared(f"data/{name}")
    options = RecordOptions(numbered=True) if name.startswith("ag_news") else RecordOptions()
    found = list(records.read(path, options))
    assert len(found) == REAL[name] and not any(one.repaired for one in found)
