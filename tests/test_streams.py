"""Commands whose standard streams are closed, full, or of an encoding that lacks a character; and odd paths."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from gptjax.config.errors import DataError
from gptjax.core import arguments, files

# A command that prints, after it has opened a file and read what stdin has.
PRINTS = """
import sys
from gptjax.core import arguments
from gptjax.config.errors import DataError
def main(argv):
    with open(argv[0], "w", encoding="utf-8") as file:
        read = sys.stdin.read()
        print("ünï 漢 \\udcff", len(read))
        print("to a person", file=sys.stderr)
        if "refuse" in argv:
            raise DataError("it cannot be: ü \\udcff")
        file.write("whole")
arguments.run(main)
"""
HELPS = "from gptjax.core import arguments\narguments.run(lambda argv: arguments.Parser().parse_args(['--help']))"


def shell(redirection, place, *arguments, code=PRINTS, **environment):
    """The result of the command in a shell that redirects its streams."""
    line = f'exec "$0" -c "$1" "${{@:2}}" {redirection}'
    return subprocess.run(
        ["bash", "-c", line, sys.executable, code, place, *arguments],
        env={key: value for key, value in os.environ.items() if key != "PYTHONUNBUFFERED"} | environment,
        capture_output=True,
        input=b"four",
        check=False,
    )


@pytest.mark.parametrize(
    "redirection, code, told",
    [
        ("", 0, "to a person"),
        (">&-", 0, "to a person"),
        ("2>&-", 0, ""),
        ("<&- >&- 2>&-", 0, ""),
        (">/dev/full", 2, "to a person\ngptjax: no space left on the disk; make room"),
        ("2>/dev/full", 0, ""),
        (">/dev/full 2>/dev/full", 2, ""),
    ],
)
def test_a_stream_that_cannot_be_used(tmp_path, redirection, code, told):
    if "2>/dev/full" in redirection:  # what the command itself says is its own to say
        source = PRINTS.replace(
            'print("to a person", file=sys.stderr)', 'from gptjax.core import console; console.say("to")'
        )
    else:
        source = PRINTS
    done = shell(redirection, tmp_path / "file", code=source)
    assert (done.returncode, done.stderr.decode()[: len(told)]) == (code, told), done
    assert "Exception ignored" not in done.stderr.decode() and "Traceback" not in done.stderr.decode()
    assert (tmp_path / "file").read_text() == "whole", "nothing else was written there"


@pytest.mark.parametrize("redirection", ["", ">&-", "2>&-", ">/dev/full", "2>/dev/full"])
def test_a_refusal_with_streams_that_cannot_be_used_has_its_exit_code(tmp_path, redirection):
    done = shell(redirection, tmp_path / "file", "refuse", code=PRINTS.replace('print("to', '0 and print("to'))
    assert done.returncode == 2
    if "2>" not in redirection:
        assert done.stderr == "gptjax: it cannot be: ü \\udcff\n".encode()


def test_help_that_cannot_be_written_is_a_line():
    done = shell(">/dev/full", "", code=HELPS)
    assert done.returncode == 2 and done.stderr.startswith(b"gptjax: no space left") and done.stderr.count(b"\n") == 1
    assert shell("", "", code=HELPS).returncode == 0


@pytest.mark.parametrize(
    "encoding, expected",
    [("ascii", b"?n? ? ? 4\n"), ("latin-1", b"\xfcn\xef ? ? 4\n"), ("utf-8", "ünï 漢 ? 4\n".encode())],
)
def test_what_the_outputs_encoding_lacks_is_a_question_mark(tmp_path, encoding, expected):
    done = shell("", tmp_path / "file", PYTHONIOENCODING=encoding)
    assert (done.returncode, done.stdout) == (0, expected), done.stderr


C_LOCALE = dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")


def test_a_prepared_set_is_the_same_in_a_locale_without_letters(tmp_path):
    (tmp_path / "text.txt").write_text("ünïcode, 漢字\n\n" * 50, encoding="utf-8")

    def prepared(name, **locale):
        line = ["prepare", "--input=text.txt", f"--output={name}", "--tokenizer=chars", "--workers=1", "--held_out=0"]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("LC_", "LANG"))}
        done = subprocess.run(
            [sys.executable, "-m", "gptjax." + line[0], *line[1:]],
            env=environment | {"PYTHONPATH": str(ROOT)} | locale,
            cwd=tmp_path,
            capture_output=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return {path.name: path.read_bytes() for path in (tmp_path / name).rglob("*") if path.is_file()}

    assert prepared("c", **C_LOCALE) == prepared("utf8", PYTHONUTF8="1")


@pytest.mark.parametrize(
    "error, expected",
    [
        (OSError(errno.ENAMETOOLONG, "File name too long", "xxx"), "File name too long: xxx"),
        (
            OSError(errno.ELOOP, "Too many levels of symbolic links", b"x\xff"),
            "Too many levels of symbolic links: x\udcff",
        ),
        (OSError(errno.EISDIR, "Is a directory", Path("x")), ""),
        (ValueError("embedded null byte"), "a path has a zero byte in it"),
        (FileNotFoundError(errno.ENOENT, "No such file"), "the working directory is gone"),
        (OSError(errno.EROFS, "Read-only file system", "x"), "the file system is read-only; make it writable"),
        (OSError(errno.EBADF, "Bad file descriptor"), ""),
        (ValueError("a bug of ours"), ""),
        (UnicodeEncodeError("utf-8", "\ud800", 0, 1, "surrogates not allowed"), ""),
    ],
)
def test_what_is_the_machines_trouble(error, expected):
    found = arguments.system_error_message(error)
    assert found.startswith(expected) and bool(found) == bool(expected)


@pytest.mark.parametrize(
    "name", ["pipe", "/dev/zero", "/dev/full", "loop", "x" * 300, "folder", "a\0b", "absent", "below/file"]
)
def test_what_cannot_be_read_to_its_end_is_refused(tmp_path, name):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "folder").mkdir()
    (tmp_path / "below").write_text("")
    with pytest.raises(DataError, match="cannot read"):
        files.read_bytes(tmp_path / name)


def test_the_shells_own_pipes_and_the_null_device_are_read():
    reading = (
        "from gptjax.core import files; from pathlib import Path; import sys; print(files.read_text(Path(sys.argv[1])))"
    )
    line = 'exec "$0" -c "$1" <(echo "ü")'
    done = subprocess.run(["bash", "-c", line, sys.executable, reading], capture_output=True, check=True)
    assert done.stdout.decode() == "ü\n\n"
    assert files.read_bytes(Path("/dev/null")) == b""
