"""Every command on spoilt inputs and odd flags: no traceback, no hang, one line of error, and nothing written over.

    pytest tests/fuzz                                    a few examples of some commands, always the same
    pytest tests/fuzz -m slow                            about three minutes of all, always the same
    GPTJAX_FUZZ_SECONDS=3600 pytest tests/fuzz -m slow -s    an hour of others by seeds that are printed; lists all bugs

A line of JSON for each command says at the end how many examples there were and how they ended.
"""

import os
import random
import time

import harness
import material
import mutations
import pytest
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("GPTJAX_FUZZ_SECONDS", "0"))
NAMES = ["prepare", "train", "generate", "evaluate", "convert", "plan", "merge", "sweep", "compare"]
FEW, MANY = 4, 16


QUICK = ["prepare", "generate", "plan", "merge", "compare"]  # in the default suite, with these pieces alone
PIECES = ["run", "other"]


class Made:
    """The material of some pieces: its template, the place where it was made and examples are tried, the commands."""

    def __init__(self, root, pieces):
        self.folder, self.template = root / "here", root / "template"
        self.folder.mkdir()
        material.begin(self.folder)
        for piece in pieces:
            material.PIECES[piece](self.folder)
        self.folder.rename(self.template)
        harness.renew(self.template, self.folder)
        self.commands = material.commands(self.folder)


@pytest.fixture(scope="session", autouse=True)
def counts():
    """Prints them at the end."""
    yield
    print("", *harness.table(), sep="\n")


@pytest.fixture(scope="session")
def few(tmp_path_factory):
    """What is made soon."""
    return Made(tmp_path_factory.mktemp("fuzz"), PIECES)


@pytest.fixture(scope="session")
def everything(tmp_path_factory):
    """All pieces."""
    return Made(tmp_path_factory.mktemp("fuzz"), material.PIECES)


def examples_of(fuzzed):
    """Strategy of a command line of some, a change of what it reads or of a flag, seldom several."""
    change = mutations.of_files(fuzzed.files)
    names = sorted({one.split("=", 1)[0] for line in fuzzed.lines for one in line if one.startswith("--")})
    flag, one = mutations.of_flags(names, fuzzed.also), change.map(lambda only: [only])
    several = st.tuples(st.lists(change, min_size=1, max_size=2), flag)
    changes = st.one_of(st.tuples(one, st.none()), st.tuples(one, st.none()), st.tuples(st.just([]), flag), several)
    return st.tuples(st.sampled_from(fuzzed.lines), changes)


def try_one(name, made, example):
    """Runs a command on an example; Broken where it did what it must not."""
    line, (changes, flag) = example
    folder, command = made.folder, made.commands[name]
    harness.renew(made.template, folder)
    for file, change in changes:
        if (folder / file).is_file():
            mutations.spoil_file(folder, file, change)
    line = mutations.spoil_flags(line, flag, folder) if flag else line
    harness.check(name, command.main, line, folder, command.may_write)


def fuzz(name, made, count, number=None):
    """Tries so many examples, by a seed or always the same."""

    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        derandomize=number is None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(examples_of(made.commands[name]))
    def examples(example):
        try_one(name, made, example)

    (examples if number is None else seed(number)(examples))()


def survey(name, made, seconds):
    """Tries examples for so long; all bugs, each with the first example that showed it."""
    end, bugs = time.monotonic() + seconds, {}
    strategy = examples_of(made.commands[name])
    while time.monotonic() < end:
        number = random.SystemRandom().randrange(2**32)
        print(f"{name}: seed {number}", flush=True)

        @seed(number)
        @settings(max_examples=25, deadline=None, database=None, suppress_health_check=list(HealthCheck))
        @given(strategy)
        def examples(example):
            if time.monotonic() > end:
                return
            try:
                try_one(name, made, example)
            except harness.Broken as broken:
                harness.COUNTS[name]["broken"] += 1
                if broken.signature not in bugs:
                    bugs[broken.signature] = f"{example!r}\n{broken}"
                    print(f"== {name}: {example!r}\n{broken}", flush=True)

        examples()
    return bugs


@pytest.mark.parametrize("name", QUICK)
def test_a_command_refuses_what_is_spoilt(few, name):
    fuzz(name, few, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_command_refuses_what_is_spoilt_in_many_ways(everything, name):
    if SECONDS:
        assert not survey(name, everything, SECONDS / len(NAMES))
    else:
        fuzz(name, everything, MANY)
