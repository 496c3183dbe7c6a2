"""What every command shares: its parser, one-line errors with their exit codes, and the start of the machinery.

Exit codes: 0 done, 2 the user can mend it, 3 training diverged, 130 or 143 interrupted (SIGINT, SIGTERM). Imports
nothing heavy, so that a misspelt flag is answered at once.
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
from gptjax.core.files import disk_trouble


class Parser(argparse.ArgumentParser):
    """An argument parser that knows `--json` and answers a mistake with one line and exit code 2."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **kwargs)
        self.add_argument("--json", action="store_true", help="print objects, one a line, and nothing else on stdout")

    def error(self, message: str) -> NoReturn:
        """Prints the message and leaves."""
        raise UserError(f"{message} (--help lists the flags)")


def number(
    kind: type[int] | type[float] = int, least: float | None = None, most: float | None = None
) -> Callable[[str], int | float]:
    """A type for a flag that is a number, as `add_argument` takes it.

    Args:
      kind: int or float.
      least, most: both included; by default what int32 has room for, or float32.
    """

    def read(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"invalid {kind.__name__} value: {text[:40]!r}") from None
        wrong = limits.fault(value, least, most)
        if wrong:
            raise argparse.ArgumentTypeError(f"{wrong}, not {text[:40]}")
        return value

    return read


def add_step(parser: Parser) -> None:
    """Adds --step, the checkpoint that a command reads."""
    text = "of the checkpoint, or best: the one with the least held-out loss; default: the newest"
    parser.add_argument("--step", type=_step, help=text)


def _step(text: str) -> int | str:
    if text != "best" and not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is neither a step nor best")
    return text if text == "best" else int(number(int, 0)(text))


def run(main: Callable[[Sequence[str]], None]) -> NoReturn:
    """Runs a command's `main(argv)` and leaves with its exit code; what a person can mend is one line on stderr."""
    open_closed_streams()
    code: Any = 0
    message = ""
    try:
        with interruptible():
            try:
                main(sys.argv[1:])
            except SystemExit as leaving:  # of --help
                code = leaving.code
            sys.stdout.flush()
    except UserError as error:
        code, message = 2, str(error)
    except Diverged as error:
        code, message = 3, str(error)
    except KeyboardInterrupt as error:
        interrupted = Interrupted.after(error, str(error) or "interrupted")
        code, message = 128 + interrupted.number, str(interrupted)
    except BrokenPipeError:
        pass  # whoever read our output has gone; there is nobody to tell
    except Exception as error:
        message = machine_trouble(error) or memory_trouble(error)
        if not message:
            raise
        code = 2
    if message:
        with suppress(OSError):
            print(f"gptjax: {' '.join(message.split())}", file=sys.stderr)
    for name in ("stdout", "stderr"):
        try:
            getattr(sys, name).flush()
        except OSError:  # that is told where it can be, and Python would try once more and leave with another code
            setattr(sys, name, None)
    sys.exit(code)


def open_closed_streams() -> None:
    """Makes the standard streams ones that can be used: the null device where whoever started us has closed one.

    Without it the first file that is opened would get a closed stream's number, and what is printed. Input is UTF-8
    whatever the locale says, and what the output's encoding lacks is written as a question mark.
    """
    for number, (name, mode) in enumerate({"stdin": "r", "stdout": "w", "stderr": "w"}.items()):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)  # gets the least number that is free
            stream = open(number, mode, encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
            setattr(sys, name, stream)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(encoding="utf-8", errors="replace")
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")


@contextmanager
def interruptible() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted during the block, even where whoever started us has them ignored."""

    def leave(number: int, frame: Any) -> NoReturn:
        raise Interrupted(number)

    before = {number: signal.signal(number, leave) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def machine_trouble(error: BaseException) -> str:
    """One line for a failure of the file system, wherever in the chain of causes it is; "" for any other.

    That is every OSError about a path, and a path that no system call takes.
    """
    trouble = disk_trouble(error)
    if trouble:
        return f"{trouble} and run the same command again: what was saved is whole"
    seen: BaseException | None = error
    while seen is not None:
        match seen:
            case OSError(strerror=str() as what, filename=str() | bytes() as name):
                return f"{what}: {os.fsdecode(name)}"
            case FileNotFoundError(filename=None):
                return "the working directory is gone; change to another one"
            case ValueError() if str(seen).startswith("embedded null"):
                return "a path has a zero byte in it, which no path can have"
            case UnicodeEncodeError() if seen.encoding == sys.getfilesystemencoding() != "utf-8":
                return f"this locale has no file names with {seen.object[seen.start]!r}; set PYTHONUTF8=1"
        seen = seen.__cause__ or seen.__context__
    return ""


# What Python, C++ and XLA say where memory runs out.
EXHAUSTED = re.compile(r"RESOURCE_EXHAUSTED|out of memory|std::bad_alloc|failed to allocate", re.IGNORECASE)


def memory_trouble(error: BaseException) -> str:
    """One line for memory that ran out, wherever in the chain of causes that is; "" for any other failure."""
    seen: BaseException | None = error
    while seen is not None:
        wanted = re.search(r"allocat\w* (\d+) bytes", str(seen))
        if isinstance(seen, MemoryError) or (isinstance(seen, RuntimeError) and EXHAUSTED.search(str(seen))):
            size = f" ({int(wanted[1]) / 2**30:,.1f} GiB more were asked for)" if wanted else ""
            return (
                f"out of memory{size}; make a batch (data.batch_size, --batch_size), the context or the model smaller, "
                "or train with more train.grad_accumulation or --config.model.remat=full"
            )
        seen = seen.__cause__ or seen.__context__
    return ""
