"""Dialogues and labels in the formats of common data sets: used, dropped and counted, or refused by line."""

import math

import numpy as np
import pytest
from conftest import shared, tiny_config

from gptjax.config.errors import DataError
from gptjax.data import dialogues, examples, fields, records
from gptjax.data.records import Record
from gptjax.data.tokenizers import tokenizers

BYTES = tokenizers.bytes_encoding()
TOOLS = (
    "{{ tools | tojson if tools }}{% for m in messages %}[{{ m.role }}]{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<{{ call.function.name }} {{ call.function.arguments | tojson }}>{% endfor %};"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)


def options_of(**of_examples):
    config = tiny_config(data_path="none", data_layout="examples", model_context=600)
    with config.unlocked():
        config.data.examples.update(of_examples)
    return config.data


def shown(found, **of_examples):
    """Returns the text of records, and its pieces in the loss."""
    config = options_of(**({"form": "chat"} | of_examples))
    tokens = examples.to_token_set(BYTES, found, config, "", "some")
    ids, weights = tokens.read(0, len(tokens)), tokens.arrays["weights_BT"]
    learnt = "".join(chr(i) if w and i < 256 else "\0" for i, w in zip(ids[1:], weights, strict=False))
    return BYTES.decode(ids.tolist()), [piece for piece in learnt.split("\0") if piece]


def chat(*turns, **beside):
    return Record(
        {"messages": [dict(role=role, content=content, **more) for role, content, more in turns]} | beside, "here"
    )


USER, ASSISTANT = ("user", "hi", {}), ("assistant", "hello", {})
CALL = {"tool_calls": [{"id": "1", "type": "function", "function": {"name": "w", "arguments": '{"x": 1}'}}]}
TEXT, IMAGE = {"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}


@pytest.mark.parametrize(
    ("record", "learnt", "reported"),
    [
        (chat(USER, ASSISTANT), ["hello"], ""),
        (chat(USER, ("assistant", None, {}), ASSISTANT), ["hello"], "1 turn of some without text left out"),
        (chat(USER, ("assistant", [], {}), ASSISTANT), ["hello"], "1 turn of some without text left out"),
        (chat(USER, ("assistant", None, CALL), ("tool", "sun", {}), ASSISTANT), ["hello"], "1 turn of some with"),
        (chat(USER, ("assistant", "see", CALL), ASSISTANT), ["see", "hello"], "without its tool calls"),
        (chat(USER, ("assistant", [TEXT, "b"], {})), ["a\nb"], ""),
        (chat(USER, ("assistant", {"text": "a"}, {})), ["a"], ""),
        (chat(USER, ("assistant", "bad", {"weight": 0}), USER, ("assistant", "good", {})), ["good"], "1 turn of"),
        (chat(USER, ("assistant", "bad", {"train": False}), USER, ASSISTANT), ["hello"], "excluded from the loss, as"),
        (chat(USER, ("assistant", "a", {"weight": None, "tool_calls": None})), ["a"], ""),
        (chat(("Human", "q", {}), ("ChatGPT", "a", {}), ("bing", "b", {}), ("model", "c", {})), ["a", "b", "c"], ""),
        (chat(("narrator", "q", {}), ASSISTANT), ["hello"], "1 turn of some of the unknown role 'narrator'"),
        (chat(USER, ASSISTANT, system="be nice"), ["hello"], ""),
        (chat(("system", "a", {}), ASSISTANT, system="b"), ["hello"], "without its field 'system'"),
        (chat(USER, ASSISTANT, tools="[]"), ["hello"], ""),
        (chat(USER, ASSISTANT, tools='[{"name": "w"}]'), ["hello"], "read without its tools"),
        (chat(USER, ("function_call", "w()", {}), ("observation", "s", {}), ASSISTANT), ["w()", "hello"], ""),
        (Record({"conversations": [{"role": "user", "value": "q"}, {"from": "gpt", "content": "a"}]}, ""), ["a"], ""),
        (Record({"messages": None, "conversations": [{"from": "gpt", "value": "a"}]}, ""), ["a"], ""),
    ],
)  # fmt: skip
def test_accepted_dialogues(capsys, record, learnt, reported):
    text, found = shown([record])
    assert [piece.strip() for piece in found] == learnt and "None" not in text
    said = capsys.readouterr().err
    assert reported in said and bool(reported) == ("examples" in said)
    if "system" in record.fields:
        assert ("System: be nice" in text) == (record.fields["system"] == "be nice")


def test_a_template_with_tools_writes_them(tmp_path, capsys):
    (tmp_path / "tools.jinja").write_text(TOOLS)
    record = chat(USER, ("assistant", None, CALL), ("tool", "sun", {}), ASSISTANT, tools='[{"name": "w"}]')
    text, learnt = shown([record], chat_template=str(tmp_path / "tools.jinja"))
    assert '[{"name": "w"}][user]hi;[assistant]<w {"x": 1}>;[tool]sun;[assistant]hello;' in text
    assert learnt == ['<w {"x": 1}>;', "hello;"] and capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (chat(USER, ("assistant", 5, {})), "here, turn 2 has a content that is int and not text"),
        (chat(USER, ("assistant", True, {})), "here, turn 2 has a content that is bool and not text"),
        (chat(("user", [TEXT, IMAGE], {}), ASSISTANT), "here, turn 1 has a part of the type 'image_url'"),
        (chat(("user", [{"type": "text", "text": None}], {})), "here, turn 1 has a part without a text"),
        (chat(("user", [3], {})), "here, turn 1 has a part without a text"),
        (chat((["user"], "a", {}), ASSISTANT), "here, turn 1 has a role that is list and not text"),
        (chat((None, "a", {}), ASSISTANT), "here, turn 1 has a role that is empty"),
        (chat(USER, ("assistant", "a", {"weight": 0.5})), "here, turn 2 has 'weight' that is neither 0 nor 1"),
        (chat(USER, ("assistant", "a", {"train": "no"})), "here, turn 2 has 'train' that is neither 0 nor 1"),
        (chat(USER, ("assistant", "a", {"tool_calls": "w"})), "here, turn 2 has tool calls that are not a list of"),
        (chat(USER, ("assistant", "a", {"tool_calls": [{"x": 1}]})), "here, turn 2 has a tool call without a name"),
        (chat(USER, ASSISTANT, system=3), "here has 'system' that is int and not text"),
        (chat(USER, ASSISTANT, tools="no"), "here, tools is not JSON"),
        (chat(USER, ASSISTANT, tools=3), "here has 'tools' that are not a list"),
        (Record({"messages": {"role": "user"}}, "here"), "here has 'messages' that is not a list of objects with"),
        (Record({"messages": [{"role": "user"}]}, "here"), "here has 'messages' that is not a list of objects with"),
        (chat(("x", "a", {}), ("y", "b", {})), "an assistant's: the roles are 'x', 'y', and an assistant is called"),
        (chat(("user", "a", {})), "no turn is an assistant's: the roles are 'user'"),
    ],
)  # fmt: skip
def test_refused_dialogues(record, says):
    with pytest.raises(DataError, match=says):
        shown([record])


# Labels


def value(label, **more):
    return Record({"text": "a", "label": label} | more, "here")


@pytest.mark.parametrize(
    ("label", "number"),
    [(1, 1), (-2.5, -2.5), ("4.5", 4.5), (" 3e2 ", 300), (np.float32(0.5), 0.5), (10**30, 1e30), (1e-300, 1e-300)],
)
def test_values(label, number):
    assert fields.value_of(value(label), options_of().examples) == number


NO_NUMBERS = [
    float("nan"),
    "nan",
    "NaN",
    "inf",
    float("inf"),
    "-Infinity",
    1e300,
    "1e300",
    10**400,
    "1_000",
    True,
    False,
]


@pytest.mark.parametrize("label", [*NO_NUMBERS, None, [1], "", "much", {"a": 1}])
def test_invalid_values(label):
    with pytest.raises(DataError, match="here has 'label' that is (not a number|too large)"):
        fields.value_of(value(label), options_of().examples)


@pytest.mark.parametrize(
    ("label", "labels", "name"),
    [
        (1, ("0", "1"), "1"),
        ("1", ("0", "1"), "1"),
        (1.0, ("0", "1"), "1"),
        (True, ("false", "true"), "true"),
        (False, ("False", "True"), "False"),
        (np.int64(1), ("0", "1"), "1"),
        (True, ("0", "1"), None),
        (1, ("1.0", "2.0"), None),
        (1.0, ("1.0", "1"), "twice"),
        (float("nan"), ("nan", "b"), None),
        (None, ("None", "b"), None),
        (["a"], ("a", "['a']"), None),
    ],
)
def test_names_of_labels(label, labels, name):
    options = options_of(labels=labels).examples
    if name in labels:
        assert fields.label_of(value(label), options) == name
    else:
        with pytest.raises(DataError, match=name or "labels does not name"):
            fields.label_of(value(label), options)


@pytest.mark.parametrize(
    ("label", "choices", "expected"),
    [
        (1, ["1", "0"], 1),  # a number counts choices that are texts
        (1, [1, 0], "is ambiguous: 1 is the number of choice 1 and the text of choice 0"),
        ("1", ["1", "0"], "is ambiguous: '1' is the number of choice 1 and the text of choice 0, counted from 0"),
        ("0", ["0", "1"], 0),
        ("A", ["B", "A"], "is ambiguous: 'A' is the letter of choice 0 and the text of choice 1"),
        ("1", ["a", "b"], 1),
        ("4", ["3", "4"], 1),
        (4, ["3", "4"], 1),
        (4, [3, 4], 1),
        (True, ["false", "true"], 1),
        (True, ["a", "b"], "none of its 2 choices: True"),
        (None, ["None", "b"], "none of its 2 choices: None"),
        ("b", ["a", None], "has 'choices' that is NoneType and not text"),
        ("b", ["a", ["b"]], "has 'choices' that is list and not text"),
    ],
)
def test_choices(label, choices, expected):
    record = value(label, choices=choices)
    if isinstance(expected, int):
        assert fields.choice_of(record, options_of().examples) == expected
    else:
        with pytest.raises(DataError, match=expected):
            fields.choice_of(record, options_of().examples)


@pytest.mark.parametrize(
    ("found", "text"),
    [("a", "a"), (3, "3"), (4.5, "4.5"), (1.0, "1.0"), (np.float32(0.5), "0.5"), (True, "bool"), (None, "NoneType"),
     ([1], "list"), ({}, "dict"), (b"a", "bytes"), (float("nan"), "nan, which is not finite")],
)  # fmt: skip
def test_only_texts_and_numbers_become_text(found, text):
    record = Record({"text": found}, "here")
    if (
        isinstance(found, str | int | float | np.float32)
        and not isinstance(found, bool)
        and not (isinstance(found, float) and math.isnan(found))
    ):
        assert fields.fill_template("<{text}>", record, "template") == f"<{text}>"
    else:
        with pytest.raises(DataError, match=f"here has 'text' that is {text}.* and not text"):
            fields.fill_template("<{text}>", record, "template")


# Files that once failed

RIGHT = {
    "content_null_tool": (["sunny!"], "1 turn of some with tool calls alone left out"),
    "content_null_only": (["hello"], "1 turn of some without text left out"),
    "content_parts": (["hello"], ""),
    "content_dict": (["hello"], ""),
    "weight0": (["good"], "1 turn of some of an assistant read but excluded from the loss"),
    "sg_system_field": (["hello"], ""),
    "sg_function_call": (['{"name":"w"}', "it is sunny"], ""),
    "sg_chatgpt_roles": (["hello"], ""),
    "lone_surrogate": (["b"], "records    1 of 1"),
    "role_list": "line 1, turn 1 has a role that is list and not text",
    "deep": "line 1 is nested too deeply",
    "al_surrogate": (["b\xef\xbf\xbd"], "records    1 of 1"),
    "pq_invalid_utf8": (["x"], "records    1 of 1"),
    "al_output_nan": "line 1 has 'output' that is nan, which is not finite",
    "v_nan": "line 1 has 'label' that is not a number: nan",
    "v_inf": "line 1 has 'label' that is too large: inf",
    "c_numeric_choices": "line 1 has 'label' that is ambiguous",
}
FORM = {"al": "instructions", "pq": "instructions", "v": "values", "c": "choices"}


@pytest.mark.parametrize("case", RIGHT)
def test_cases(case, capsys):
    path, expected = next(shared(f"cases/examples_{case}").iterdir()), RIGHT[case]
    form = FORM.get(case.split("_")[0], "chat")
    if isinstance(expected, str):
        with pytest.raises(DataError, match=expected):
            examples.to_token_set(BYTES, list(records.read(path)), options_of(form=form), "", "some")
        return
    learnt, reported = expected
    text, found = shown(list(records.read(path)), form=form)
    assert [piece.strip() for piece in found] == learnt and "None" not in text
    assert reported in capsys.readouterr().err
    if case == "sg_system_field":
        assert "System: be nice" in text


@pytest.mark.parametrize("name", ["nanlab", "biglab"])
def test_non_numeric_labels_are_refused_before_compilation(tmp_path, call_train, name):
    path = shared(f"cases/nan_labels/{name}.jsonl")
    config = {"data_path": path, "data_layout": "examples", "model_task": "regression", "train_objective": "regression"}
    message = call_train(tmp_path / "run", "--config.data.examples.form=values", **config).refusal()
    assert f"{name}.jsonl, line 4 has 'label' that is" in message
    assert not (tmp_path / "run").exists()


def test_real_dialogues(capsys):
    path = shared("data/llamafactory_demo/glaive_toolcall_en_demo.json")
    found = list(records.read(path))[:40]
    read = [dialogues.read(record, "") for record in found]
    assert all(one.notes in ([], [dialogues.TOOLS]) for one in read)
    assert {message["role"] for one in read for message in one.messages} <= {"user", "assistant", "tool", "system"}
    assert sum(any(m["role"] == "tool" for m in one.messages) for one in read) > 5
