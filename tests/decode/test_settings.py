"""Sampling parameters: invalid ones are refused in one line; programs contain only the processing that rows need."""

import math

import jax
import numpy as np
import pytest

from gptjax.config.errors import ConfigError
from gptjax.decode import sampling
from gptjax.decode.penalties import History
from gptjax.decode.settings import SMALL_TOP_K, SamplingParams, batched, used

NAN = float("nan")


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"max_tokens": 0}, "max_tokens is 0; it must be at least 1"),
        ({"max_tokens": 2.5}, "max_tokens is 2.5; it must be a whole number"),
        ({"temperature": -1}, "temperature is -1; it must be at least 0 and finite"),
        ({"temperature": NAN}, "temperature is nan; it must be at least 0 and finite"),
        ({"temperature": math.inf}, "temperature is inf; it must be at least 0 and finite"),
        ({"temperature": "hot"}, "temperature is 'hot'; it must be a number"),
        ({"temperature": 1e-30}, "temperature is 1e-30; it must be 0 (greedy) or at least 1e-06"),
        ({"top_k": -3}, "top_k is -3; it must be at least 0"),
        ({"top_k": True}, "top_k is True; it must be a whole number"),
        ({"top_p": 0}, "top_p is 0; it must be more than 0 and at most 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be more than 0 and at most 1"),
        ({"top_p": NAN}, "top_p is nan; it must be more than 0 and at most 1"),
        ({"min_p": 1}, "min_p is 1; it must be at least 0 and less than 1"),
        ({"min_p": -0.1}, "min_p is -0.1; it must be at least 0 and less than 1"),
        ({"typical_p": 0.0}, "typical_p is 0.0; it must be more than 0 and at most 1"),
        ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be more than 0 (1e-06 to 1e+06)"),
        ({"frequency_penalty": math.inf}, "frequency_penalty is inf; it must be a number in -1e+06 to 1e+06"),
        ({"presence_penalty": NAN}, "presence_penalty is nan; it must be a number in -1e+06 to 1e+06"),
        ({"no_repeat_ngram": -1}, "no_repeat_ngram is -1; it must be at least 0"),
        ({"min_tokens": -1}, "min_tokens is -1; it must be at least 0"),
        ({"min_tokens": 9, "max_tokens": 8}, "min_tokens is 9, more than the 8 of max_tokens"),
        ({"logit_bias": {10: 1.0}}, "logit_bias has the id 10; ids are whole numbers in 0 to 9"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias has the id 'a'; ids are whole numbers in 0 to 9"),
        ({"logit_bias": {3: NAN}}, "logit_bias of id 3 is nan; it must be a number in -1e+06 to 1e+06, or -inf"),
        ({"logit_bias": [3]}, "logit_bias is [3]; it must map ids to nats, such as {50: -2.5}"),
        ({"stop": ("a", "")}, "stop has an empty string, which would end every text at once; leave it out"),
        ({"stop": "end"}, "stop is 'end'; it must be a list of strings"),
        ({"temperature": 0, "top_p": 0.9},
         "top_p=0.9 does nothing at temperature 0, which is greedy; leave out one of the two"),
        ({"temperature": 0, "min_p": 0.1},
         "min_p=0.1 does nothing at temperature 0, which is greedy; leave out one of the two"),
        ({"temperature": 0, "typical_p": 0.1},
         "typical_p=0.1 does nothing at temperature 0, which is greedy; leave out one of the two"),
    ],
)  # fmt: skip
def test_invalid_settings_are_refused_in_one_line(settings, expected):
    with pytest.raises(ConfigError) as error:
        SamplingParams(**settings).check(vocabulary=10)
    assert str(error.value) == expected


def test_valid_settings_are_accepted():
    for settings in (
        SamplingParams(),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, top_k=0, repetition_penalty=1.2, logit_bias={0: -math.inf, np.int64(9): 2}),
        SamplingParams(1, np.float32(2), 10**12, 0.5, 0.99, 1, 0.5, -2, 2, 3, {}, 1, ("\n", "end")),
    ):
        settings.check(vocabulary=10)
        batched([settings])


def test_used_kinds_are_those_with_an_effect():
    assert used([SamplingParams(temperature=0, top_k=7)]) == {"greedy"}
    assert used([SamplingParams(temperature=1, top_k=0)]) == {"sampling"}
    assert used([SamplingParams()]) == {"sampling", "temperature", "top_k"}
    assert used([SamplingParams(top_k=SMALL_TOP_K)]) == used([SamplingParams()])
    assert used([SamplingParams(top_k=SMALL_TOP_K + 1)]) == used([SamplingParams()]) | {"top_many"}
    assert used([SamplingParams(), SamplingParams(temperature=0, min_tokens=2)]) == used([SamplingParams()]) | {
        "greedy",
        "min_tokens",
    }
    everything = SamplingParams(9, 0.5, 500, 0.5, 0.5, 0.5, 2, 1, 1, 2, {1: 2.0}, 3)
    assert used([everything, SamplingParams(temperature=0)]) == {
        "greedy", "sampling", "temperature", "top_k", "top_many", "top_p", "min_p", "typical_p", "logit_bias",
        "repetition_penalty", "frequency_penalty", "no_repeat_ngram", "min_tokens",
    }  # fmt: skip
    for change in ({"frequency_penalty": 0.1}, {"presence_penalty": 0.1}):
        assert used([SamplingParams(**change)]) == used([SamplingParams()]) | {"frequency_penalty"}


def test_other_settings_of_the_same_kinds_compile_nothing_new():
    """Neither does another number of biases, within a power of two; and no program sorts the vocabulary."""
    V, traced = 300, []
    history = History(np.zeros((2, 8), np.int32), np.array([3, 4]), np.array([1, 1]))

    @jax.jit
    def process(logits, batched):
        traced.append(batched)
        return sampling.process_logits(logits, batched, history, kinds, (0,))

    row = SamplingParams(9, 0.5, 100, 0.5, 0.1, 0.5, 2, 1, 1, 2, {1: 2.0, 2: 1.0, 3: 1.0}, 3)
    kinds = used([row])
    for other in (row, row._replace(logit_bias=dict.fromkeys(range(4), 1.0), top_k=70), SamplingParams(temperature=0)):
        process(np.ones((2, V), np.float32), batched([other, row]))
    assert len(traced) == 1
    assert "sort[" not in str(jax.make_jaxpr(sampling.process_logits, static_argnums=(3,))(
        np.ones((2, V), np.float32), batched([row, row]), history, kinds))  # fmt: skip
