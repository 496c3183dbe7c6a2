"""How each row of a batch wants its tokens chosen: `Settings` on the host, `Knobs` on the device.

Rows of one batch may differ without a program of their own: what they ask for are arrays. What no row asks for is not
in the program at all: `used` tells, and is static. Nothing here computes with logits.
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

FEW = 64  # the largest top k that is found without a look at the whole vocabulary for each of its bits
NOWHERE = np.int32(2**31 - 1)  # an id that no vocabulary has: what is scattered there is dropped
WHOLE = {"max_tokens": 1, "top_k": 0, "no_repeat_ngram": 0, "min_tokens": 0}  # whole numbers, and the least of each
LARGEST = 1e6  # of a penalty or a bias: far beyond use, and float32 has room for it over the least temperature
COLDEST = 1e-6


class SamplingParams(NamedTuple):
    """How to choose the tokens of one continuation. Those that filter come in this order, each after its predecessors.

    Attributes:
      max_tokens: the most new tokens.
      temperature: divides the logits; 0 takes the likeliest token, whatever the filters.
      top_k: draws among the k likeliest, and their equals; 0 among all.
      top_p: draws among the likeliest whose probabilities reach this sum (arXiv 1904.09751); 1 among all.
      min_p: draws among those at least this likely in units of the likeliest (arXiv 2407.01082); 0 among all.
      typical_p: draws among the nearest to the entropy whose probabilities reach this sum (arXiv 2202.00666); 1: all.
      repetition_penalty: divides positive and multiplies negative logits of ids in prompt or continuation
        (arXiv 1909.05858); 1: none.
      frequency_penalty: nats taken for each time that the continuation has the id.
      presence_penalty: nats taken once from each id of the continuation.
      no_repeat_ngram: no n ids in a row come twice, the prompt's included; 0: they may.
      logit_bias: nats added by id; -inf bans.
      min_tokens: text does not end before so many new tokens.
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
        """Whether the likeliest token is taken."""
        return self.temperature == 0

    def check(self, vocabulary: int) -> None:
        """Raises ConfigError for the first value that cannot be.

        Args:
          vocabulary: how many ids the model gives logits for.
        """
        for problems in (_numbers(self), _biases(self, vocabulary), _stops(self), _contradictions(self)):
            for problem in problems:
                raise ConfigError(problem)


def _numbers(settings: SamplingParams) -> Iterator[str]:
    for name, least in WHOLE.items():
        value = getattr(settings, name)
        if not isinstance(value, Integral) or isinstance(value, bool):
            yield f"{name} is {value!r}; it must be a whole number"
        if value < least:
            yield f"{name} is {value}; it must be at least {least}"
    for name, fits, what in (
        ("temperature", lambda t: 0 <= t <= limits.LARGEST, "at least 0 and finite"),
        ("temperature", lambda t: t == 0 or t >= COLDEST, f"0 (the likeliest) or at least {COLDEST}"),
        ("top_p", lambda p: 0 < p <= 1, "more than 0 and at most 1"),
        ("min_p", lambda p: 0 <= p < 1, "at least 0 and less than 1"),
        ("typical_p", lambda p: 0 < p <= 1, "more than 0 and at most 1"),
        ("repetition_penalty", lambda x: 1 / LARGEST <= x <= LARGEST, f"more than 0 ({1 / LARGEST:g} to {LARGEST:g})"),
        ("frequency_penalty", lambda x: abs(x) <= LARGEST, f"a number in {-LARGEST:g} to {LARGEST:g}"),
        ("presence_penalty", lambda x: abs(x) <= LARGEST, f"a number in {-LARGEST:g} to {LARGEST:g}"),
    ):
        value = getattr(settings, name)
        if not isinstance(value, Real) or isinstance(value, bool):
            yield f"{name} is {value!r}; it must be a number"
        if not fits(value):
            yield f"{name} is {limits.format_number(value)}; it must be {what}"


def _biases(settings: SamplingParams, vocabulary: int) -> Iterator[str]:
    if not isinstance(settings.logit_bias, Mapping):
        yield f"logit_bias is {settings.logit_bias!r}; it must map ids to nats, such as {{50: -2.5}}"
    for token, bias in settings.logit_bias.items():
        if not isinstance(token, Integral) or isinstance(token, bool) or not 0 <= token < vocabulary:
            yield f"logit_bias has the id {token!r}; ids are whole numbers in 0 to {vocabulary - 1}"
        if not isinstance(bias, Real) or not (abs(bias) <= LARGEST or bias == -math.inf):
            yield f"logit_bias of id {token} is {bias!r}; it must be a number in {-LARGEST:g} to {LARGEST:g}, or -inf"


def _stops(settings: SamplingParams) -> Iterator[str]:
    stop = settings.stop
    if not isinstance(stop, tuple | list) or any(not isinstance(one, str) for one in stop):
        yield f"stop is {stop!r}; it must be a list of strings"
    if "" in stop:
        yield "stop has an empty string, which every text has at once; leave it out"


def _contradictions(settings: SamplingParams) -> Iterator[str]:
    if settings.min_tokens > settings.max_tokens:
        yield f"min_tokens is {settings.min_tokens}, more than the {settings.max_tokens} of max_tokens"
    for name in ("top_p", "min_p", "typical_p"):
        value = getattr(settings, name)
        if settings.greedy and value != SamplingParams._field_defaults[name]:
            yield f"{name}={value} does nothing at temperature 0, which takes the likeliest; leave out one of the two"


class BatchedSamplingParams(NamedTuple):
    """The same for a batch, as arrays; how many biases a row has room for (n) is part of the shape."""

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
    """The settings of rows as arrays.

    Args:
      rows: checked settings, one a row.
      biases: room for at least so many biases a row; beyond it, room grows by powers of two so that few programs
        are compiled.
    """
    most = max(biases, *(len(row.logit_bias) for row in rows))
    room = biases if most == biases else 1 << (most - 1).bit_length()
    ids = np.full((len(rows), room), NOWHERE)
    bias = np.zeros((len(rows), room), np.float32)
    for b, row in enumerate(rows):
        ids[b, : len(row.logit_bias)] = list(row.logit_bias)
        bias[b, : len(row.logit_bias)] = list(row.logit_bias.values())

    def whole(name: str) -> jax.Array:
        return jnp.asarray([min(getattr(row, name), int(NOWHERE)) for row in rows], jnp.int32)

    def real(name: str) -> jax.Array:
        return jnp.asarray([getattr(row, name) for row in rows], jnp.float32)

    return BatchedSamplingParams(
        temperature_B=real("temperature"),
        top_k_B=whole("top_k"),
        top_p_B=real("top_p"),
        min_p_B=real("min_p"),
        typical_p_B=real("typical_p"),
        repetition_B=real("repetition_penalty"),
        frequency_B=real("frequency_penalty"),
        presence_B=real("presence_penalty"),
        ngram_B=whole("no_repeat_ngram"),
        min_tokens_B=whole("min_tokens"),
        bias_ids_Bn=jnp.asarray(ids),
        bias_Bn=jnp.asarray(bias),
    )


def used(rows: Sequence[SamplingParams]) -> frozenset[str]:
    """Which kinds of processing do anything to any row: static, and what a program is compiled for.

    A program for more kinds gives each row the same, bit for bit: `used(rows) | used(others)` serves both.
    """
    drawn = [row for row in rows if not row.greedy]
    wanted: dict[str, Any] = {
        "greedy": len(drawn) < len(rows),
        "sampling": bool(drawn),
        "temperature": any(row.temperature != 1 for row in drawn),
        "top_k": any(0 < row.top_k for row in drawn),
        "top_many": any(row.top_k > FEW for row in drawn),
        "top_p": any(row.top_p < 1 for row in drawn),
        "min_p": any(row.min_p > 0 for row in drawn),
        "typical_p": any(row.typical_p < 1 for row in drawn),
        "logit_bias": any(row.logit_bias for row in rows),
        "repetition_penalty": any(row.repetition_penalty != 1 for row in rows),
        "frequency_penalty": any(row.frequency_penalty or row.presence_penalty for row in rows),
        "no_repeat_ngram": any(row.no_repeat_ngram for row in rows),
        "min_tokens": any(row.min_tokens for row in rows),
    }
    return frozenset(name for name, is_wanted in wanted.items() if is_wanted)
