"""JSON schemas: matching values pass, and the first mismatch is named."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config.errors import DataError
from gptjax.core import schema
from gptjax.core.schema import Row

SCHEMA = {
    "step": int,
    "loss": (float, None),
    "names?": [str],
    "shares": {str: int},
    "pair?": Row(int, str),
    "any?": object,
}
GOOD = {"step": 1, "loss": 2, "names": ["a"], "shares": {"x": 1}, "pair": [1, "a"], "any": [{}], "more": {}}


@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, ""),
        ({"loss": None}, ""),
        ({"names": []}, ""),
        ({"step": True}, "step is True, not a whole number"),
        ({"step": 1.0}, "step is 1.0, not a whole number"),
        ({"step": 2**63}, "step is 9223372036854775808, not a whole number"),
        ({"loss": "1"}, "loss is '1', not a number"),
        ({"loss": 10**400}, "loss is 1000"),
        ({"names": "a"}, "names is 'a', not an array"),
        ({"names": ["a", None]}, "names[1] is None, not a text"),
        ({"shares": {"x": 1, "y.z": []}}, "shares.y.z is an array, not a whole number"),
        ({"shares": [1]}, "shares is an array, not an object"),
        ({"pair": [1]}, "pair is an array, not an array of 2"),
        ({"pair": ["a", 1]}, "pair[0] is 'a', not a whole number"),
    ],
)
def test_the_first_place_that_does_not_fit_is_named(change, expected):
    assert schema.mismatch(GOOD | change, SCHEMA).startswith(expected)
    assert bool(schema.mismatch(GOOD | change, SCHEMA)) == bool(expected)


def test_what_is_absent_is_named_unless_it_may_be():
    assert schema.mismatch({"step": 1, "loss": 1.0, "shares": {}}, SCHEMA) == ""
    assert schema.mismatch({"step": 1, "loss": 1.0}, SCHEMA) == "it lacks shares"
    assert schema.mismatch({"a": {}}, {"a": {"b": int}}) == "a lacks b"
    assert schema.mismatch([], SCHEMA) == "it is an array, not an object"


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@given(JSON)
def test_any_value_is_let_through_or_named(value):
    assert isinstance(schema.mismatch(value, SCHEMA), str)
    assert schema.mismatch(value, object) == ""
    assert schema.mismatch({"x": value}, {"x": object}) == ""


def test_lines_name_their_number_and_one_that_was_cut_short_is_left_out(tmp_path):
    path = tmp_path / "lines.jsonl"
    assert schema.read_lines(path, {"a": int}) == []
    path.write_text('{"a": 1}\n{"a": 2}\n{"a"')
    assert schema.read_lines(path, {"a": int}) == [{"a": 1}, {"a": 2}]
    for bad, told in (
        ('{"a"', "is not JSON"),
        ('{"a": "x"}', "a is 'x', not a whole number"),
        ("[" * 9999, "too deeply"),
    ):
        path.write_text(f'{{"a": 1}}\n{bad}\n{{"a": 2}}\n')
        with pytest.raises(DataError, match=f"lines.jsonl is damaged: line 2.*{told}"):
            schema.read_lines(path, {"a": int})
