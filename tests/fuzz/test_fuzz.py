"""Every command on spoilt inputs and odd flags: no traceback, no hang, one line of error, and nothing written over.

    pytest tests/fuzz                                 a few examples of each command, always the same
    pytest tests/fuzz -m slow                         three minutes of them, always the same
    GPTJAX_FUZZ_SECONDS=3600 pytest tests/fuzz -s     an hour of others, by a seed that is printed; all that fail are listed

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
NAMES = ["prepare", "train", "generate", "evaluate", "convert", "plan", "combine", "sweep", "compare"]
FEW, MANY = 4, 40


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """The material, which an example copies to the place where it was made, and the commands."""
    folder = tmp_path_factory.mktemp("fuzz") / "here"
    folder.mkdir()
    material.make(folder)
    template = folder.rename(folder.with_name("template"))
    harness.renew(template, folder)
    yield template, folder, material.commands(folder)
    print("", *harness.table(), sep="\n")


def examples_of(fuzzed):
    """Strategy of a command line of some, and one to three changes of it and of what it reads."""
    changes = st.lists(st.one_of(mutations.of_files(fuzzed.files)), min_size=1, max_size=2)
    names = sorted({one.split("=", 1)[0] for line in fuzzed.lines for one in line if one.startswith("--")})
    flags = mutations.of_flags(names, fuzzed.also)
    both = st.one_of(st.tuples(changes, st.none()), st.tuples(st.just([]), flags), st.tuples(changes, flags))
    return st.tuples(st.sampled_from(fuzzed.lines), both)


def try_one(name, made, example):
    """Runs a command on an example; Broken where it did what it must not."""
    template, folder, commands = made
    line, (changes, flag) = example
    harness.renew(template, folder)
    for file, change in changes:
        if (folder / file).is_file():
            mutations.spoil_file(folder, file, change)
    line = mutations.spoil_flags(line, flag, folder) if flag else line
    harness.check(name, commands[name].main, line, folder, commands[name].may_write)


def fuzz(name, made, count, number=None):
    """Tries so many examples, by a seed or always the same."""

    @settings(max_examples=count, deadline=None, database=None, derandomize=number is None,
              suppress_health_check=list(HealthCheck), print_blob=False)
    @given(examples_of(made[2][name]))
    def examples(example):
        try_one(name, made, example)

    (examples if number is None else seed(number)(examples))()


def survey(name, made, seconds):
    """Tries examples for so long; all bugs, each with the first example that showed it."""
    end, bugs = time.monotonic() + seconds, {}
    strategy = examples_of(made[2][name])
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


@pytest.mark.parametrize("name", NAMES)
def test_a_command_refuses_what_is_spoilt(made, name):
    if SECONDS:
        assert not survey(name, made, SECONDS / len(NAMES))
    else:
        fuzz(name, made, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_command_refuses_what_is_spoilt_in_many_ways(made, name):
    fuzz(name, made, MANY)
