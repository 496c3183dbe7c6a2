"""Runs a command in this process on spoilt copies of valid inputs, and says what must hold however they are spoilt."""

import collections
import contextlib
import faulthandler
import hashlib
import io
import json
import os
import shutil
import signal
import sys
import traceback

from gptjax.core import arguments

SECONDS = 180  # of wall time, after which a command counts as hung; a busy machine takes long for a short one
COUNTS = collections.defaultdict(collections.Counter)  # outcomes by command
KINDS = {0: "ok", 2: "refused", 3: "diverged"}


class Hung(BaseException):
    """A command took too long."""


class Broken(AssertionError):
    """A command did what it must not; `signature` is the same for the same bug."""

    def __init__(self, signature, told):
        super().__init__(f"{signature}\n{told}")
        self.signature = signature


@contextlib.contextmanager
def guarded():
    """Raises Hung in the block when it takes too long; where Python is not asked any more the process says where."""

    def hung(number, frame):
        raise Hung

    before = signal.signal(signal.SIGALRM, hung)
    signal.alarm(SECONDS)
    faulthandler.dump_traceback_later(2 * SECONDS, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        signal.alarm(0)
        faulthandler.cancel_dump_traceback_later()
        signal.signal(signal.SIGALRM, before)


def run(main, flags):
    """Exit code, stdout and stderr of a command's `main`; Broken where it raises anything but SystemExit or hangs."""
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = ["gptjax", *flags]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), guarded():
            arguments.run(main)
    except SystemExit as leaving:
        return leaving.code, out.getvalue(), err.getvalue()
    except Hung:
        place = signature_of(sys.exc_info()[2])
        raise Broken(f"hangs at {place}", traceback.format_exc()[-3000:]) from None
    except BaseException as error:
        raise Broken(
            f"{type(error).__name__} at {signature_of(error.__traceback__)}", traceback.format_exc()[-6000:]
        ) from None
    finally:
        sys.argv = argv
    raise Broken("no exit", "")


def signature_of(trace):
    """File and line of the innermost frame of gptjax."""
    frames = [
        frame
        for frame in traceback.extract_tb(trace)
        if "/gptjax/" in frame.filename or "/experiments/" in frame.filename
    ]
    frame = (frames or traceback.extract_tb(trace))[-1]
    return f"{os.path.basename(frame.filename)}:{frame.name}: {frame.line}"


def digests(folder):
    """What is in a folder: SHA-256 of each file, and each link, pipe and folder, by path."""
    found = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            if os.path.islink(path):
                found[path] = os.readlink(path)
            elif os.path.isfile(path):
                with open(path, "rb") as file:
                    found[path] = hashlib.sha256(file.read()).hexdigest()
            else:
                found[path] = "folder" if os.path.isdir(path) else "other"
    return found


def check(name, main, arguments, folder, may_write=()):
    """Runs a command and checks what must hold; returns its exit code.

    Args:
      name: under which it is counted.
      main: the command's.
      arguments: its command line.
      folder: what lies there may not change where the command refuses, nor where it is done, but for `may_write`.
      may_write: names in it that a command which is done, or has diverged, may change.
    """
    before, home = digests(folder), os.getcwd()
    os.chdir(folder)
    try:
        code, _, err = run(main, arguments)
    finally:
        os.chdir(home)
    if code not in KINDS:
        raise Broken(f"exit code {code}", err)
    lines = [line for line in err.splitlines() if line.startswith("gptjax: ")]
    if len(lines) != (code != 0) or (code and not err.endswith(f"{lines[-1]}\n")):
        raise Broken(f"{len(lines)} lines of error", err)
    if "Traceback" in err:
        raise Broken("a traceback on stderr", err)
    after = digests(folder)
    allowed = tuple(os.path.join(folder, one) for one in may_write) if code != 2 else ()
    lost = [
        path
        for path, digest in before.items()
        if after.get(path) != digest and not (allowed and path.startswith(allowed))
    ]
    if lost:
        raise Broken(f"changed with exit code {code}: {os.path.relpath(lost[0], folder)}", f"{lost}\n{err}")
    COUNTS[name][KINDS[code]] += 1
    return code


def table():
    """A line of JSON for each command: how many examples there were, and how they ended."""
    return [json.dumps({"command": name, "examples": sum(of.values()), **of}) for name, of in sorted(COUNTS.items())]


def renew(template, folder):
    """Makes a folder the same as its template once more."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(template, folder, symlinks=True, ignore=shutil.ignore_patterns("pipe"))
    os.mkfifo(folder / "pipe")
