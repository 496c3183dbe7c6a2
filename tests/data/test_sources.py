"""Sources of text, their splits, and refused inputs."""

import pytest
from conftest import shared, tiny_config
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config.errors import DataError
from gptjax.data import sources


def read(path, **changes):
    return sources.read(tiny_config(data_path=path, **changes).data)


def test_the_standard_library_is_text_without_its_tests():
    corpus = sources.read(tiny_config(data_source="stdlib", data_held_out=0.05).data)
    names = [d.name for side in corpus for d in side]
    assert "typing.py" in names and len(names) == len(set(names)) > 400
    assert not any("test" in name.split("/")[:-1] or "site-packages" in name for name in names)
    size, held = (sum(len(d.text) for d in side) for side in corpus)
    assert 0.01 < held / (size + held) < 0.15


@given(st.text(min_size=1), st.floats(0, 1))
def test_a_documents_side_depends_on_its_name_alone_and_grows_with_the_fraction(name, fraction):
    assert sources.is_held_out(name, fraction) == sources.is_held_out(name, fraction)
    if sources.is_held_out(name, fraction):
        assert sources.is_held_out(name, min(1, fraction + 0.1))
    assert not sources.is_held_out(name, 0) and sources.is_held_out(name, 1)


def test_many_files_are_split_by_name_and_few_by_their_tails(tmp_path):
    documents = [sources.Document(f"{i}.txt", "x" * 10) for i in range(2000)]
    train, held_out = sources.split(documents, 0.1)
    assert 140 < len(held_out) < 260 and {d.name for d in train}.isdisjoint(d.name for d in held_out)
    (tmp_path / "one.txt").write_text("abcdefghij" * 10)
    train, held_out = read(tmp_path / "one.txt")
    assert (train[0].text + held_out[0].text, len(held_out[0].text)) == ("abcdefghij" * 10, 10)


def test_shakespeare_is_cut_where_nanogpt_cuts_it():
    train, held_out = read(shared("data/tinyshakespeare/input.txt"))
    assert (len(train[0].text), len(held_out[0].text)) == (1_003_854, 111_540)


def test_a_path_may_be_a_directory_or_a_glob(tmp_path):
    for name in ("a.txt", "deep/b.txt", "deep/c.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{name} says this")
    assert sorted({d.name for d in read(tmp_path).train}) == ["a.txt", "deep/b.txt"]
    assert sorted({d.name for d in read(f"{tmp_path}/**/*.py").train}) == ["deep/c.py"]
    assert sorted({d.name for d in read(f"{tmp_path}/deep/[bc].*").train}) == ["b.txt", "c.py"]


def test_line_ends_survive(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\n" * 10)
    assert "".join(side[0].text for side in read(tmp_path / "a.txt")).encode() == b"one\r\ntwo\n" * 10


@pytest.mark.parametrize(
    "content, expected",
    [
        (None, "there is no file"),
        (b"", "is empty: there is nothing to train on"),
        (b"text\0more", "is not text: it has a zero byte at 4"),
        (b"caf\xe9 au lait", "is not UTF-8 text: byte 0xe9 in line 1"),
    ],
)
def test_files_that_cannot_be_used_are_refused(tmp_path, content, expected):
    path = tmp_path / "input.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=expected):
        read(path)


def test_a_directory_without_text_and_an_empty_path_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"holds no .txt files"):
        read(tmp_path)
    with pytest.raises(DataError, match="data.path is empty"):
        read("")


def test_fingerprint_depends_on_every_part():
    def of(*documents):
        return sources.fingerprint(sources.Corpus(list(documents[:1]), list(documents[1:])))

    a, b = sources.Document("a", "text"), sources.Document("b", "more")
    assert of(a, b) == of(a, b)
    changed = [of(b, a), of(a), of(a._replace(text="texT"), b), of(sources.Document("at", "ext"), b)]
    assert len({of(a, b), *changed}) == 5
