"""What the tests share: a tiny recipe, a text to train it on, commands run in this process, and real data's places."""

import os
import random
import tempfile
from importlib.metadata import version
from pathlib import Path
from zlib import crc32

# Programs that several tests compile are compiled once; a user's own cache is left alone, and so is another process's.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.join(tempfile.gettempdir(), f"gptjax-tests-{os.getuid()}"))
os.environ["JAX_COMPILATION_CACHE_DIR"] += os.environ.get("PYTEST_XDIST_WORKER", "")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
# What gptjax keeps in its cache (packings, downloads) is the tests' own.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="gptjax-tests-cache-")
# Tiny models compile for longer than they run. What .ci/run does after the tests is compiled as a user's run is.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# XLA's older emitters, which jax 0.11 has no more, compile in three fifths of the time.
os.environ.setdefault("XLA_FLAGS", "" if version("jax") >= "0.11" else "--xla_cpu_use_fusion_emitters=false")
# The processes of pytest-xdist share an accelerator's memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# Steps of tiny models are too short to wait for actively.
os.environ.setdefault("GPTJAX_WAKEFUL", "0")

import jax
import pytest

from gptjax import evaluate, generate, plan, train
from gptjax.core import arguments
from gptjax.runs import config as configs

ROOT = Path(__file__).resolve().parent.parent
BASE = str(ROOT / "configs" / "base.py")
SHARED = ROOT.parent / "shared"
# What has a command, and what has `jax.jit`, compile as a user's does.
AS_USERS_RUN = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "0", "XLA_FLAGS": ""}
AS_USERS_COMPILE = {"xla_cpu_use_fusion_emitters": True} if "emitters" in os.environ["XLA_FLAGS"] else {}

TINY = {
    "model.layers": 2,
    "model.heads": 2,
    "model.width": 16,
    "model.context": 16,
    "data.source": "text",
    "data.tokenizer": "bytes",
    "data.batch_size": 4,
    "data.held_out": 0.1,
    "schedule.warmup_steps": 2,
    "train.steps": 8,
    "eval.every_steps": 4,
    "eval.batches": 2,
    "checkpoint.every_steps": 4,
    "log.every_steps": 2,
    "sample.max_tokens": 5,
}


KEYS = {key.replace(".", "_"): key for key in configs.SCHEMA}


def overrides(**changes):
    """Flags for the tiny recipe with some keys changed; `data_path` stands for data.path."""
    values = TINY | {KEYS.get(name, name.replace("_", ".", 1)): value for name, value in changes.items()}
    return [f"--config.{key}={value}" for key, value in values.items()]


def tiny_config(**changes):
    """The tiny recipe as a resolved config."""
    return configs.resolve(configs.read(BASE, overrides(**changes)))


def shared(path):
    """A path in the folder of real data beside the checkout; the test is skipped where it is absent."""
    found = SHARED / path
    if not found.exists():
        pytest.skip(f"needs {found}, which is absent")
    return found


@pytest.fixture(scope="session")
def text_file(tmp_path_factory):
    """A file of 20,000 characters in words of a small vocabulary, always the same."""
    rng = random.Random(0)
    words = ["the", "a", "model", "reads", "text", "and", "writes", "ünïcode", "again", "softly"]
    text = ""
    while len(text) < 20_000:
        text += " ".join(rng.choices(words, k=8)) + ".\n"
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text)
    return path


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Of a test that is `thorough` all cases but the first are slow; of slow ones GPTJAX_SHARE=0/2 keeps half."""
    seen = set()
    for item in items:
        if item.get_closest_marker("thorough"):
            test = item.nodeid.partition("[")[0]
            if test in seen:
                item.add_marker(pytest.mark.slow)
            seen.add(test)
    share, shares = map(int, os.environ.get("GPTJAX_SHARE", "0/1").split("/"))
    parts = {True: [], False: []}
    for item in items:
        parts[not item.get_closest_marker("slow") or crc32(item.nodeid.encode()) % shares == share].append(item)
    items[:] = parts[True]
    config.hook.pytest_deselected(items=parts[False])


@pytest.fixture(scope="module", autouse=True)
def no_programs_left():
    """Each compiled program keeps three memory maps; Linux gives a process 65,530, and XLA crashes without one."""
    yield
    jax.clear_caches()


class Result:
    """How a command ended: exit code and what it printed."""

    def __init__(self, code, out, err):
        self.code, self.out, self.err = code, out, err

    def refusal(self):
        """The one line on stderr of a command that exits with 2; nothing else may have been printed."""
        assert self.code == 2, (self.code, self.out, self.err)
        assert self.out == ""
        assert self.err.startswith("gptjax: ") and self.err.count("\n") == 1, self.err
        return self.err.removeprefix("gptjax: ").strip()


@pytest.fixture
def call(capsys, monkeypatch):
    """`call(train, "--flag", ...)` runs a command's main in this process, errors handled as on the command line."""

    def run(module, *flags):
        monkeypatch.setattr("sys.argv", ["gptjax", *map(str, flags)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as leaving:
            arguments.run(module.main)
        captured = capsys.readouterr()
        return Result(leaving.value.code, captured.out, captured.err)

    return run


@pytest.fixture
def call_train(call):
    """`call_train(workdir, key=value...)` trains the tiny recipe."""

    def run(workdir, *flags, **changes):
        return call(train, f"--config={BASE}", f"--workdir={workdir}", *overrides(**changes), *flags)

    return run


@pytest.fixture(scope="session")
def trained(tmp_path_factory, text_file):
    """The directory of a finished tiny run."""
    from gptjax.training import loop

    workdir = tmp_path_factory.mktemp("runs") / "tiny"
    loop.train(tiny_config(data_path=text_file), workdir)
    return workdir


__all__ = ["BASE", "ROOT", "TINY", "evaluate", "generate", "overrides", "plan", "shared", "tiny_config", "train"]
