"""README.md and docs/: every path and link exists, and every command parses as its program would parse it."""

import argparse
import ast
import importlib
import importlib.util
import itertools
import re
import shlex
import sys
import tomllib
from pathlib import Path

import pytest

from gptjax.config import recipes
from gptjax.config.errors import UserError
from gptjax.runs import config as configs
from gptjax.runs import reference

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SUBJECTS = {
    "quickstart", "configuration", "data", "architectures", "objectives", "finetuning", "generation", "scaling",
    "fault-tolerance", "profiling", "sweeps", "interpretability", "huggingface", "extending", "evidence", "glossary",
}  # fmt: skip
IN_REPOSITORY = re.compile(r"(gptjax|configs|experiments|tests|docs|\.ci)/[\w.{},/*-]*")
PROGRAMS = ("python", "pytest", "pip", "sbatch", "bash")
SEPARATORS = {";", "&&", "||", "|", "&"}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SPAN = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


class ParsedError(BaseException):
    """Leaves a command once its flags are parsed; no command catches it."""

    def __init__(self, flags, overrides):
        super().__init__()
        self.flags, self.overrides = flags, overrides


def spans(page):
    """The code spans of a page outside its code blocks."""
    return SPAN.findall(FENCE.sub("", page.read_text(encoding="utf-8")))


def braces(text):
    """["a1", "a2"] of "a{1,2}", as a shell expands it."""
    parts = [part.split(",") if i % 2 else [part] for i, part in enumerate(re.split(r"\{([^{}]*)\}", text))]
    return ["".join(chosen) for chosen in itertools.product(*parts)]


def command_lines(page):
    """The shell commands of a page as lists of words, aliases applied, without redirections."""
    blocks = [body for language, body in FENCE.findall(page.read_text(encoding="utf-8")) if language == "bash"]
    inline = [span for span in spans(page) if re.match(rf"(\w+=\S* )*({'|'.join(PROGRAMS)}) ", span)]
    for block in (*blocks, *inline):
        aliases = {}
        for line in block.replace("\\\n", " ").splitlines():
            lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
            lexer.whitespace_split = True
            for is_end, group in itertools.groupby(lexer, SEPARATORS.__contains__):
                words = list(group)
                if words[0] == "alias":
                    name, _, value = words[1].partition("=")
                    aliases[name] = shlex.split(value)
                elif not is_end:
                    words = list(itertools.takewhile(lambda word: word not in ("<", ">", ">>"), words))
                    yield [*aliases.get(words[0], words[:1]), *words[1:]]


def commands():
    """Every distinct command that gptjax, Python, pytest, pip or a scheduler is started with."""
    seen = {}
    for page in PAGES:
        for line in command_lines(page):
            words = list(itertools.dropwhile(re.compile(r"[A-Z_]+=\S*").fullmatch, line))  # without its environment
            if words and words[0] in PROGRAMS:
                seen.setdefault(shlex.join(words), words)
    return [pytest.param(words, id=line) for line, words in seen.items()]


def parse(main, argv, monkeypatch):
    """The flags that a command would act on, and those it would give to its recipe."""
    original = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, args=None, namespace=None):
        raise ParsedError(*original(self, args, namespace))

    def parse_args(self, args=None, namespace=None):
        flags, unknown = original(self, args, namespace)
        assert not unknown, f"unknown flags: {unknown}"
        raise ParsedError(flags, [])

    with monkeypatch.context() as patch:
        patch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
        patch.setattr(sys, "argv", ["command", *argv])
        try:
            main(argv) if main.__code__.co_argcount else main()
        except ParsedError as parsed:
            return parsed.flags, parsed.overrides
        except (UserError, SystemExit) as error:
            pytest.fail(f"its flags do not parse: {error}")
    raise AssertionError("it has no flags")


def check_module(name, argv, monkeypatch):
    """Parses the flags of `python -m NAME`, and of its recipe where it takes one."""
    if name == "gptjax.runs.reference":
        assert not argv
        return
    flags, overrides = parse(importlib.import_module(name).main, argv, monkeypatch)
    if overrides or "config" in flags:
        configs.read(flags.config, overrides)


def check_script(script, argv, monkeypatch):
    """Parses the flags of `python SCRIPT`; what is left has to be keys of the config."""
    assert (ROOT / script).is_file(), script
    at = argv.index("--") if "--" in argv else len(argv)
    monkeypatch.syspath_prepend(str((ROOT / script).parent))
    spec = importlib.util.spec_from_file_location(f"docs_{Path(script).stem}", ROOT / script)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    flags, overrides = parse(module.main, argv, monkeypatch)
    recipes.check_keys(overrides, configs.SCHEMA)
    for swept in getattr(flags, "set", None) or ():
        assert swept.partition("=")[0] in configs.SCHEMA, swept
    if argv[at + 1 :]:  # the command that the script starts
        check_command(argv[at + 1 :], monkeypatch)


def check_pytest(argv):
    """Checks that what pytest is given to run exists, and that some file has what -k names."""
    parser = argparse.ArgumentParser()
    parser.add_argument("paths", nargs="*")
    parser.add_argument("-m")
    parser.add_argument("-k")
    parser.add_argument("-s", action="store_true")
    flags = parser.parse_args(argv)
    paths = [ROOT / path for pattern in flags.paths for path in braces(pattern)]
    assert all(path.exists() for path in paths), flags.paths
    if flags.k:
        files = [file for path in paths for file in ([path] if path.is_file() else path.rglob("test_*.py"))]
        assert any(flags.k in file.read_text(encoding="utf-8") for file in files), flags.k


def check_pip(argv):
    """Checks that the extras of `pip install -e '.[...]'` are ones that pyproject.toml has."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    for word in argv:
        match = re.fullmatch(r"(?:gptjax|\.)\[(.*)\]", word)
        assert not match or set(match[1].split(",")) <= extras.keys(), word


def check_command(words, monkeypatch):
    """Fails where a command could not be parsed by the program that it starts."""
    match words:
        case ["python", "-m", name, *argv]:
            check_module(name, argv, monkeypatch)
        case ["python", "-c", code] | ["python", "-X", _, "-c", code]:
            ast.parse(code)
        case ["python", script, *argv]:
            check_script(script, argv, monkeypatch)
        case ["pytest", *argv]:
            check_pytest(argv)
        case ["pip", *argv]:
            check_pip(argv)
        case ["bash", script]:
            assert (ROOT / script).is_file()
        case ["sbatch", *argv]:
            script = next(word for word in argv if not word.startswith("-"))
            assert (ROOT / script).is_file()
            check_module("gptjax.train", argv[argv.index(script) + 1 :], monkeypatch)
        case _:
            pytest.fail("no check for such a command")


@pytest.mark.parametrize("words", commands())
def test_a_command_parses(words, monkeypatch):
    monkeypatch.chdir(ROOT)
    check_command(words, monkeypatch)


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("python -m gptjax.generate --workdir=runs/base --no_such_flag=1", "unknown flags"),
        ("python -m gptjax.train --config=configs/base.py --config.model.layer=2", "did you mean model.layers"),
        ("python -m gptjax.train --config=configs/none.py", "no recipe"),
        ("python experiments/sweep.py --config=configs/base.py --set optimizer.rate=1,2", "optimizer.rate"),
        ("python experiments/none.py", "none.py"),
        ("pytest tests/test_none.py", "test_none"),
        ("pytest tests/test_docs.py -k nothing" + "_like_this", "nothing"),
        ("pip install -e '.[none]'", "none"),
    ],
)
def test_a_wrong_command_is_found(line, why, monkeypatch):
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, UserError, pytest.fail.Exception), match=why):
        check_command(shlex.split(line), monkeypatch)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_exist(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    lacking = []
    for target in LINK.findall(text):
        path, _, anchor = target.partition("#")
        if "://" in path:
            continue
        file = (page.parent / path).resolve() if path else page
        if not file.exists() or (anchor and anchor not in anchors(file)):
            lacking.append(target)
    for span in spans(page):
        for word in span.split():
            if IN_REPOSITORY.fullmatch(word):
                lacking += [path for path in braces(word.rstrip(".,:")) if not any(ROOT.glob(path.rstrip("/")))]
    assert not lacking


def anchors(file):
    """What a link into a page can end with: its headings as GitHub writes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", file.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_in_the_package_exist(page):
    """A dotted name is that of a module, or of something in one; "`NAME` in `FILE`" names something in that file."""
    text = page.read_text(encoding="utf-8")
    for name in re.findall(r"\bgptjax(?:\.\w+)+", text):
        if name not in ("gptjax.git", "gptjax.load"):
            assert has_name(name.split(".")[1:]), name
    for names, path in re.findall(r"((?:`\w+`(?:,| and| or)? )+)(?:in|of) \[?`(gptjax/[\w/]+\.py)`", text):
        source = (ROOT / path).read_text(encoding="utf-8")
        for name in SPAN.findall(names):
            assert re.search(rf"\b{name}\b", source), f"{name} in {path}"


def has_name(parts):
    """Tells whether gptjax.PARTS is a module, or a name that a module's source has."""
    for length in range(len(parts), 0, -1):
        path = ROOT.joinpath("gptjax", *parts[:length])
        for file in (path.with_suffix(".py"), path / "__init__.py"):
            if file.is_file():
                rest = parts[length:]
                return not rest or re.search(rf"\b{rest[0]}\b", file.read_text(encoding="utf-8")) is not None
    return False


def test_python_examples_parse():
    for page in PAGES:
        for language, body in FENCE.findall(page.read_text(encoding="utf-8")):
            if language == "python":
                ast.parse(body)


def test_each_subject_has_a_page_and_readme_links_it():
    assert {page.stem for page in PAGES[1:]} == SUBJECTS
    readme = PAGES[0].read_text(encoding="utf-8")
    assert all(f"docs/{subject}.md" in readme for subject in SUBJECTS)


def test_readme_is_short_and_has_the_command_that_ci_runs():
    readme = PAGES[0].read_bytes()
    assert len(readme) <= 9000
    assert b"pip install -e '.[test]' && pytest" in readme
    assert b"pip install -e . && python -m gptjax.train --config=configs/base.py" in readme


def test_the_reference_of_keys_is_fresh():
    page = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert page == reference.page(), "python -m gptjax.runs.reference > docs/configuration.md"
    assert all(f"| `{key}` |" in page for key in configs.SCHEMA)
    assert all(declared.meaning for declared in configs.SCHEMA.values())
