"""Sampling parameters of each row: `SamplingParams` on the host, `BatchedSamplingParams` on the device.

Rows of one batch may differ without compiling another program, because their parameters are arrays. Processing that no
row needs is left out of the program: `used` returns the kinds that are needed, and is static.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import limits
from gptjax.config.errors import ConfigError

SMALL_TOP_K = 64  # the largest k for which jax.lax.top_k is used
DROPPED_ID = np.int32(2**31 - 1)  # beyond every vocabulary: a scatter to this id is dropped
INTEGERS = {"max_tokens": 1, "top_k": 0, "no_repeat_ngram": 0, "min_tokens": 0}  # integers, with their minimum
MAX_MAGNITUDE = 1e6  # of a penalty or a bias; float32 still holds it divided by MIN_TEMPERATURE
MIN_TEMPERATURE = 1e-6


class SamplingParams(NamedTuple):
    """Sampling parameters of one continuation. Filters are applied in this order, each to the result of the previous.

    Attributes:
      max_tokens: maximum number of new tokens.
      temperature: divides the logits; 0 selects the most likely token, whatever the filters.
      top_k: sample from the k most likely tokens and their ties; 0: off.
      top_p: sample from the most likely tokens whose probabilities reach this sum (arXiv 1904.09751); 1: off.
      min_p: sample from tokens with at least this fraction of the highest probability (arXiv 2407.01082); 0: off.
      typical_p: sample from the tokens with information closest to the entropy whose probabilities reach this sum
        (arXiv 2202.00666); 1: off.
      repetition_penalty: divides positive and multiplies negative logits of ids in prompt or continuation
        (arXiv 1909.05858); 1: off.
      frequency_penalty: nats subtracted for each occurrence of an id in the continuation.
      presence_penalty: nats subtracted once for each id in the continuation.
      no_repeat_ngram: no n-gram of this size occurs twice, prompt included; 0: off.
      logit_bias: nats added by id; -inf bans.
      min_tokens: minimum number of new tokens before the text may end.
      stop: strings that end the text.
    """

    max_tokens: int = 200
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    no_repeat_ngram: int = 0
    logit_bias: Mapping[int, float] = {}
    min_tokens: int = 0
    stop: tuple[str, ...] = ()

    @property
    def greedy(self) -> bool:
        """True at temperature 0, which selects the most likely token."""
        return self.temperature == 0

    def check(self, vocabulary: int) -> None:
        """Checks the values.

        Args:
          vocabulary: number of ids that the model has logits for.

        Raises:
          ConfigError: the first value that is invalid.
        """
        for problems in (_numbers(self), _biases(self, vocabulary), _stops(self), _contradictions(self)):
            for problem in problems:
                raise ConfigError(problem)


def _numbers(settings: SamplingParams) -> Iterator[str]:
    for name, least in INTEGERS.items():
        value = getattr(settings, name)
        if not isinstance(value, Integral) or isinstance(value, bool):
            yield f"{name} is {value!r}; it must be a whole number"
        if value < least:
            yield f"{name} is {value}; it must be at least {least}"
    for name, is_valid, requirement in (
        ("temperature", lambda t: 0 <= t <= limits.LARGEST, "at least 0 and finite"),
        ("temperature", lambda t: t == 0 or t >= MIN_TEMPERATURE, f"0 (greedy) or at least {MIN_TEMPERATURE}"),
        ("top_p", lambda p: 0 < p <= 1, "more than 0 and at most 1"),
        ("min_p", lambda p: 0 <= p < 1, "at least 0 and less than 1"),
        ("typical_p", lambda p: 0 < p <= 1, "more than 0 and at most 1"),
        (
            "repetition_penalty",
            lambda x: 1 / MAX_MAGNITUDE <= x <= MAX_MAGNITUDE,
            f"more than 0 ({1 / MAX_MAGNITUDE:g} to {MAX_MAGNITUDE:g})",
        ),
        (
            "frequency_penalty",
            lambda x: abs(x) <= MAX_MAGNITUDE,
            f"a number in {-MAX_MAGNITUDE:g} to {MAX_MAGNITUDE:g}",
        ),
        ("presence_penalty", lambda x: abs(x) <= MAX_MAGNITUDE, f"a number in {-MAX_MAGNITUDE:g} to {MAX_MAGNITUDE:g}"),
    ):
        value = getattr(settings, name)
        if not isinstance(value, Real) or isinstance(value, bool):
            yield f"{name} is {value!r}; it must be a number"
        if not is_valid(value):
            yield f"{name} is {limits.format_number(value)}; it must be {requirement}"


def _biases(settings: SamplingParams, vocabulary: int) -> Iterator[str]:
    if not isinstance(settings.logit_bias, Mapping):
        yield f"logit_bias is {settings.logit_bias!r}; it must map ids to nats, such as {{50: -2.5}}"
    for token, bias in settings.logit_bias.items():
        if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= token < vocabulary:
            yield f"logit_bias has the id {token!r}; ids are whole numbers in 0 to {vocabulary - 1}"
        if not isinstance(bias, Real) or not (abs(bias) <= MAX_MAGNITUDE or bias == -math.inf):
            most = f"{MAX_MAGNITUDE:g}"
            yield f"logit_bias of id {token} is {bias!r}; it must be a number in -{most} to {most}, or -inf"


def _stops(settings: SamplingParams) -> Iterator[str]:
    stop = settings.stop
    if not isinstance(stop, tuple | list) or any(not isinstance(one, str) for one in stop):
        yield f"stop is {stop!r}; it must be a list of strings"
    if "" in stop:
        yield "stop has an empty string, which would end every text at once; leave it out"


def _contradictions(settings: SamplingParams) -> Iterator[str]:
    if settings.min_tokens > settings.max_tokens:
        yield f"min_tokens is {settings.min_tokens}, more than the {settings.max_tokens} of max_tokens"
    for name in ("top_p", "min_p", "typical_p"):
        value = getattr(settings, name)
        if settings.greedy and value != SamplingParams._field_defaults[name]:
            yield f"{name}={value} does nothing at temperature 0, which is greedy; leave out one of the two"


class BatchedSamplingParams(NamedTuple):
    """Sampling parameters of a batch, as arrays; n, the number of biases that a row can have, is part of the shape."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    typical_p_B: jax.Array
    repetition_B: jax.Array
    frequency_B: jax.Array
    presence_B: jax.Array
    ngram_B: jax.Array
    min_tokens_B: jax.Array
    bias_ids_Bn: jax.Array
    bias_Bn: jax.Array


def batched(rows: Sequence[SamplingParams], biases: int = 0) -> BatchedSamplingParams:
    """Returns the sampling parameters of rows as arrays.

    Args:
      rows: checked parameters, one per row.
      biases: minimum size of n; a larger one is a power of two, so that few programs are compiled.
    """
    most = max(biases, *(len(row.logit_bias) for row in rows))
    n = biases if most == biases else 1 << (most - 1).bit_length()
    ids = np.full((len(rows), n), DROPPED_ID)
    bias = np.zeros((len(rows), n), np.float32)
    for b, row in enumerate(rows):
        ids[b, : len(row.logit_bias)] = list(row.logit_bias)
        bias[b, : len(row.logit_bias)] = list(row.logit_bias.values())

    def integers(name: str) -> jax.Array:
        return jnp.asarray([min(getattr(row, name), int(DROPPED_ID)) for row in rows], jnp.int32)

    def floats(name: str) -> jax.Array:
        return jnp.asarray([getattr(row, name) for row in rows], jnp.float32)

    return BatchedSamplingParams(
        temperature_B=floats("temperature"),
        top_k_B=integers("top_k"),
        top_p_B=floats("top_p"),
        min_p_B=floats("min_p"),
        typical_p_B=floats("typical_p"),
        repetition_B=floats("repetition_penalty"),
        frequency_B=floats("frequency_penalty"),
        presence_B=floats("presence_penalty"),
        ngram_B=integers("no_repeat_ngram"),
        min_tokens_B=integers("min_tokens"),
        bias_ids_Bn=jnp.asarray(ids),
        bias_Bn=jnp.asarray(bias),
    )


def used(rows: Sequence[SamplingParams]) -> frozenset[str]:
    """Returns the kinds of processing that affect any row: static, a program is compiled for them.

    A program for more kinds gives each row the same result, bit for bit: `used(rows) | used(others)` is valid for both.
    """
    sampled = [row for row in rows if not row.greedy]
    is_used: dict[str, Any] = {
        "greedy": len(sampled) < len(rows),
        "sampling": bool(sampled),
        "temperature": any(row.temperature != 1 for row in sampled),
        "top_k": any(0 < row.top_k for row in sampled),
        "top_many": any(row.top_k > SMALL_TOP_K for row in sampled),
        "top_p": any(row.top_p < 1 for row in sampled),
        "min_p": any(row.min_p > 0 for row in sampled),
        "typical_p": any(row.typical_p < 1 for row in sampled),
        "logit_bias": any(row.logit_bias for row in rows),
        "repetition_penalty": any(row.repetition_penalty != 1 for row in rows),
        "frequency_penalty": any(row.frequency_penalty or row.presence_penalty for row in rows),
        "no_repeat_ngram": any(row.no_repeat_ngram for row in rows),
        "min_tokens": any(row.min_tokens for row in rows),
    }
    return frozenset(name for name, value in is_used.items() if value)
