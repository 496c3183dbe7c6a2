"""Argument parsing, one-line errors and exit codes, shared by all commands.

Exit codes: 0 success, 2 user error, 3 training diverged, 130 or 143 interrupted (SIGINT, SIGTERM). This module imports
no heavy library, so that `--help` and misspelt flags are fast.
"""

import argparse
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NoReturn

from gptjax.config import limits
from gptjax.config.errors import Diverged, Interrupted, UserError
from gptjax.core.files import disk_error


class Parser(argparse.ArgumentParser):
    """An argument parser with `--json` that reports errors in one line with exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)
        self.add_argument("--json", action="store_true", help="print objects, one a line, and nothing else on stdout")

    def error(self, message: str) -> NoReturn:
        """Raises UserError with the message."""
        raise UserError(f"{message} (--help lists the flags)")


def number(
    kind: type[int] | type[float] = int, least: float | None = None, most: float | None = None
) -> Callable[[str], int | float]:
    """Returns a `type` for `add_argument` that parses a number and checks its range.

    Args:
      kind: int or float.
      least, most: inclusive bounds; by default the range of int32 or float32.
    """

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text[:40]!r}") from None
        problem = limits.range_problem(value, least, most)
        if problem:
            raise argparse.ArgumentTypeError(f"{problem}, not {text[:40]}")
        return value

    return parse


def add_step(parser: Parser) -> None:
    """Adds --step, which selects a checkpoint."""
    text = "step of the checkpoint, or best: the one with the lowest validation loss; default: the newest"
    parser.add_argument("--step", type=_step, help=text)


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor best")
    return text if text == "best" else int(number(int, 0)(text))


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a command's `main(argv)` and exits with its code; user errors are one line on stderr."""
    open_closed_streams()
    code: Any = 0
    message = ""
    try:
        with interruptible():
            try:
                main(sys.argv[1:])
            except SystemExit as exit_:  # of --help
                code = exit_.code
            sys.stdout.flush()
    except UserError as error:
        code, message = 2, str(error)
    except Diverged as error:
        code, message = 3, str(error)
    except KeyboardInterrupt as error:
        interrupted = Interrupted.after(error, str(error) or "interrupted")
        code, message = 128 + interrupted.number, str(interrupted)
    except BrokenPipeError:
        pass  # the reader of our output has gone
    except Exception as error:
        message = system_error_message(error) or memory_error_message(error)
        if not message:
            raise
        code = 2
    if message:
        with suppress(OSError):
            print(f"gptjax: {' '.join(message.split())}", file=sys.stderr)
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:  # already reported if possible; Python would retry at exit and change the exit code
            setattr(sys, name, None)
    sys.exit(code)


def open_closed_streams() -> None:
    """Opens the null device for each standard stream that the parent process has closed.

    Otherwise the first file that is opened would get the stream's descriptor, and the printed text. Input is read as
    UTF-8 in any locale, and characters that the output's encoding lacks are written as question marks.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor
            stream = open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def interruptible() -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise Interrupted in the block, even if the parent process ignored them."""

    def interrupt(number: int, frame: Any) -> NoReturn:
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def system_error_message(error: BaseException) -> str:
    """Returns one line for a file system error in the chain of causes; "" for any other.

    These are OSErrors with a path, and invalid paths.
    """
    disk = disk_error(error)
    if disk:
        return f"{disk} and run the same command again: what was saved is intact"
    cause: BaseException | None = error
    while cause is not None:
        match cause:
            case OSError(strerror=str() as what, filename=str() | bytes() as name):
                return f"{what}: {os.fsdecode(name)}"
            case FileNotFoundError(filename=None):
                return "the working directory is gone; change to another one"
            case ValueError() if str(cause).startswith("embedded null"):
                return "a path has a zero byte in it, which no path can have"
            case UnicodeEncodeError() if cause.encoding == sys.getfilesystemencoding() != "utf-8":
                return f"this locale has no file names with {cause.object[cause.start]!r}; set PYTHONUTF8=1"
        cause = cause.__cause__ or cause.__context__
    return ""


# Messages of Python, C++ and XLA when memory is exhausted.
OUT_OF_MEMORY = re.compile(r"RESOURCE_EXHAUSTED|out of memory|std::bad_alloc|failed to allocate", re.IGNORECASE)


def memory_error_message(error: BaseException) -> str:
    """Returns one line for an out-of-memory error in the chain of causes; "" for any other."""
    cause: BaseException | None = error
    while cause is not None:
        allocation = re.search(r"allocat\w* (\d+) bytes", str(cause))
        if isinstance(cause, MemoryError) or (isinstance(cause, RuntimeError) and OUT_OF_MEMORY.search(str(cause))):
            size = f" (allocating {int(allocation[1]) / 2**30:,.1f} GiB)" if allocation else ""
            return (
                f"out of memory{size}; use a smaller batch (data.batch_size, --batch_size), context or model, "
                "more train.grad_accumulation, or --config.model.remat=full"
            )
        cause = cause.__cause__ or cause.__context__
    return ""
