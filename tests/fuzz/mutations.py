"""Ways to spoil an input: bytes, JSON values, files and flags; each a hypothesis strategy of small descriptions.

A description is data, so that a failing example prints as what was done, and can be kept as a regression test.
"""

import copy
import json
import os
import shutil

from hypothesis import strategies as st

# Values that stand where others should; sizes among them are small or impossible, so that no example computes long.
ODD = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    1.5,
    -0.5,
    1e300,
    10**20,
    "",
    "x",
    "ünï",
    "1",
    "a/b",
    [],
    [1],
    ["x"],
    {},
    {"a": 1},
]
ODD += [[[]], float("nan"), float("inf"), "\udcff", "\0", "x" * 300]
ODD_TEXT = [
    "",
    "0",
    "1",
    "-1",
    "2",
    "1.5",
    "-0.5",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "9" * 25,
    "x",
    "ünï",
    "caf\udce9",
    "a\0b",
]
ODD_TEXT += ["()", "None", "True", "(1,", "{}", "[[", "../..", "hf:", "a,b", "bytes", "-", "@", "x@y", "%s", "{0}"]
# Places of the material's folder, which holds a loop of links, a pipe that nobody writes to and a name that is no text.
PLACES = ["nowhere", "run", "set", "text.txt", "prompts.txt", "loop", "pipe", "empty", "empty.txt", "run/config.json"]
PLACES += ["name-\udcff.txt", "x" * 300, "y/" * 3000, "run/checkpoints", "text.txt/below", "."]
DEVICES = ["/dev/null", "/dev/full", "/proc/self/mem", "/"]

BYTES = st.one_of(
    st.tuples(st.just("flip"), st.integers(0, 2**20), st.integers(1, 255)),
    st.tuples(st.just("cut"), st.integers(0, 2**20)),
    st.tuples(
        st.just("insert"), st.integers(0, 2**20), st.sampled_from([b"\0", b"\xff", b"\n", b'"', b"{", b"\xef\xbb\xbf"])
    ),
    st.tuples(st.just("repeat"), st.integers(0, 2**20)),
    st.tuples(
        st.just("write"), st.sampled_from([b"", b"\0" * 16, b"[" * 5000, b"{}", b"[]", b"null", b"\xff\xfe", b"\n"])
    ),
)
VALUES = st.one_of(
    st.tuples(st.just("set"), st.integers(0, 2**16), st.sampled_from(range(len(ODD)))),
    st.tuples(st.just("drop"), st.integers(0, 2**16)),
    st.tuples(st.just("add"), st.integers(0, 2**16), st.sampled_from(range(len(ODD)))),
    st.tuples(st.just("deepen"), st.integers(0, 2**16)),
)
FILES = st.one_of(
    st.tuples(st.just("remove")),
    st.tuples(st.just("folder")),
    st.tuples(st.just("loop")),
    st.tuples(st.just("swap"), st.integers(0, 2**16)),
)


def of_files(names):
    """One file of some, and what is done to it; seldom one of the many of a checkpoint."""
    few = [name for name in names if "checkpoints" not in name]
    values = st.tuples(st.sampled_from([name for name in few if is_json(name)] or few), VALUES)
    others = st.tuples(st.sampled_from(few), st.one_of(BYTES, FILES))
    seldom = st.tuples(st.sampled_from(names), st.one_of(BYTES, FILES, VALUES))
    return st.one_of(values, values, others, seldom)


def is_json(name):
    """Whether a file holds JSON, whole or by lines."""
    return name.endswith((".json", ".jsonl", "_METADATA", "_sharding", ".zarray", "_METADATA"))


def of_flags(flags, also=()):
    """One flag of some, given or not, and what it is given."""
    named = st.sampled_from([*flags, *also])
    texts = st.sampled_from([*ODD_TEXT, *PLACES, *DEVICES])
    return st.one_of(
        st.tuples(st.just("value"), named, texts),
        st.tuples(st.just("leave"), st.sampled_from(flags)),
        st.tuples(st.just("twice"), st.sampled_from(flags)),
    )


def spoil_file(folder, name, change):
    """Does to a file of a folder what a description says."""
    path = folder / name
    kind, *how = change
    if kind in ("set", "drop", "add", "deepen"):
        spoil_json(path, kind, *how)
    elif kind == "remove":
        path.unlink()
    elif kind == "folder":
        path.unlink()
        path.mkdir()
    elif kind == "loop":
        path.unlink()
        path.symlink_to(path.name)
    elif kind == "swap":
        files = sorted(one for one in folder.rglob("*") if one.is_file() and one != path)
        shutil.copyfile(files[how[0] % len(files)], path)
    else:
        write(path, spoil_bytes(path.read_bytes(), kind, *how))


def write(path, raw):
    """Puts bytes into a file's place."""
    path.unlink()
    path.write_bytes(raw)


def spoil_bytes(raw, kind, *how):
    """Bytes after a change."""
    at = how[0] % (len(raw) + 1) if isinstance(how[0], int) else 0
    match kind:
        case "flip":
            at = min(at, len(raw) - 1)
            return raw[:at] + bytes([raw[at] ^ how[1]]) + raw[at + 1 :] if raw else b"\xff"
        case "cut":
            return raw[:at]
        case "insert":
            return raw[:at] + how[1] + raw[at:]
        case "repeat":
            line = raw[:at].count(b"\n")
            lines = raw.splitlines(keepends=True)
            return b"".join([*lines[: line + 1], *lines[line:]])
        case "write":
            return how[0]
    raise ValueError(kind)


def spoil_json(path, kind, *how):
    """Changes a value of a JSON file, or of a line of one."""
    text = path.read_text(encoding="utf-8", errors="replace")
    lines = text.splitlines() if path.suffix == ".jsonl" else [text]
    at = how[0] % len(lines) if lines else 0
    try:
        value = json.loads(lines[at])
    except (ValueError, IndexError, RecursionError):  # it is none, or empty: bytes are changed instead
        write(path, spoil_bytes(path.read_bytes(), "flip", how[0], 1))
        return
    lines[at] = json.dumps(changed(value, kind, *how))
    if kind == "deepen":
        lines[at] = '{"a":' * 5000 + "1" + "}" * 5000 if how[0] % 2 else "[" * 5000 + "]" * 5000
    write(path, "\n".join(lines).encode() + b"\n" * (path.suffix == ".jsonl"))


def changed(value, kind, number, odd=0):
    """A JSON value in which one place is another, is gone, or is there besides."""
    value = copy.deepcopy(value)
    places = list(places_in(value))
    if not places or kind == "deepen":
        return ODD[odd]
    parent, key = places[number % len(places)]
    if kind == "drop":
        del parent[key]
    elif kind == "set":
        parent[key] = ODD[odd]
    elif isinstance(parent, dict):
        parent[f"{key}x"] = ODD[odd]
    else:
        parent.append(ODD[odd])
    return value


def places_in(value):
    """(container, key) of each value in a JSON value."""
    for key, inner in list(
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    ):
        yield value, key
        yield from places_in(inner)


def spoil_flags(arguments, change, folder):
    """Command line after a change; places are of a folder."""
    kind, name, *how = change
    arguments = list(arguments)
    at = next((i for i, one in enumerate(arguments) if one.split("=", 1)[0] == name), None)
    if kind == "value":
        value = os.path.join(folder, how[0]) if how[0] in PLACES else how[0]
        text = name if not name.startswith("--") else f"{name}={value}"
        if at is None:
            return [*arguments, text]
        arguments[at] = text
    elif at is not None:
        arguments[at : at + 1] = [] if kind == "leave" else [arguments[at]] * 2
    return arguments
