"""Text is UTF-8 wherever gptjax reads or writes it, whatever the locale: no call leaves the encoding to that."""

import ast

import pytest
from conftest import ROOT

SOURCES = sorted(path for name in ("gptjax", "experiments", "configs") for path in (ROOT / name).rglob("*.py"))
# Positional places of the mode and of the encoding, by the name of what is called.
PLACES = {
    "open": (1, 3),
    "fdopen": (1, 3),
    "read_text": (None, 0),
    "write_text": (None, 1),
    "NamedTemporaryFile": (0, 2),
}


def left_to_the_locale(tree):
    """Lines of calls that open a text file, or run a command for its text, and name no encoding."""
    for call in ast.walk(tree):
        if not isinstance(call, ast.Call):
            continue
        name = getattr(call.func, "attr", getattr(call.func, "id", ""))
        named = {keyword.arg: keyword.value for keyword in call.keywords}
        if name in ("run", "Popen", "check_output") and {"text", "universal_newlines"} & named.keys():
            if "encoding" not in named:
                yield call.lineno
        elif name in PLACES and is_of_files(call):
            of_path = name == "open" and isinstance(call.func, ast.Attribute)
            mode_at, encoding_at = (0, 2) if of_path else PLACES[name]
            mode = named.get("mode") or (
                call.args[mode_at] if mode_at is not None and len(call.args) > mode_at else None
            )
            default = "w+b" if name == "NamedTemporaryFile" else "r"
            is_text = "b" not in (mode.value if isinstance(mode, ast.Constant) else default)
            if is_text and "encoding" not in named and len(call.args) <= encoding_at:
                yield call.lineno


def is_of_files(call):
    """Whether what is called is a file's or Python's own, and not a function of that name in a module."""
    if isinstance(call.func, ast.Name):
        return call.func.id in ("open", "fdopen", "NamedTemporaryFile")
    owner = call.func.value
    return not (isinstance(owner, ast.Name) and owner.id in ("files", "sources", "gzip")) and (
        call.func.attr != "open" or not (isinstance(owner, ast.Name) and owner.id == "os")
    )


def test_no_call_leaves_the_encoding_to_the_locale():
    found = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in SOURCES
        for line in left_to_the_locale(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found


@pytest.mark.parametrize(
    "code, expected",
    [
        ("open(p)", 1),
        ("open(p, 'w')", 1),
        ("open(p, 'rb')", 0),
        ("open(p, encoding='utf-8')", 0),
        ("path.open()", 1),
        ("path.open('rb')", 0),
        ("path.read_text()", 1),
        ("path.read_text('utf-8')", 0),
        ("path.write_text(x)", 1),
        ("path.write_text(x, encoding='utf-8')", 0),
        ("os.fdopen(h, 'w')", 1),
        ("subprocess.run(c, text=True)", 1),
        ("subprocess.run(c, text=True, encoding='utf-8')", 0),
    ],
)
def test_what_is_found(code, expected):
    assert len(list(left_to_the_locale(ast.parse(code)))) == expected
