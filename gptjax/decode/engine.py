"""Continuous batching: requests wait for a row of the batch, are prefilled into it, and free it when their text ends.

The host's part of decoding; step.py and prefill.py are the device's. An Engine has a fixed number of rows, and the
sampling parameters of rows are arrays: no other prompt, length within a chunk, or parameter compiles a program.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.data.tokenizers import tokenizers
from gptjax.data.tokenizers.tokenizers import Tokenizer
from gptjax.decode import constraints, detokenize, prefill, settings, speculative, step
from gptjax.decode.constraints import Constraint, Matcher
from gptjax.decode.drafting import DraftPlan, SpeculativeConfig
from gptjax.decode.ensemble import Ensemble
from gptjax.decode.penalties import History
from gptjax.decode.settings import SamplingParams
from gptjax.decode.step import Program, State
from gptjax.decode.watermark import Watermark
from gptjax.models import cache as caches
from gptjax.models.cache import Cache

CACHED_PREFIXES = 4  # prompts whose caches are kept for prompts with the same prefix


class EngineRequest(NamedTuple):
    """A prompt to continue.

    Attributes:
      prompts: ids of the prompt for each model, at least one; those of the first model are the row's own.
      sampling_params: of the row.
      key: a jax.random key; all samples of the row are derived from it.
      constraint: that the text must match, or None.
      sources: ids of each model's source, for encoder-decoders.
    """

    prompts: tuple[tuple[int, ...], ...]
    sampling_params: SamplingParams
    key: jax.Array
    constraint: Constraint | None = None
    sources: tuple[tuple[int, ...], ...] = ()

    def source(self, index: int) -> tuple[int, ...]:
        """Returns the source of a model; empty for a decoder."""
        return self.sources[index] if self.sources else ()


class Sample(NamedTuple):
    """Result of a request.

    Attributes:
      text: without the end of text and without the stop string.
      ids: new ids, the one that ended the text included.
      logprobs: of each id, nats, in the models' distribution.
      finish: reason why it ended: "end" of text, "stop" string, "length" (max_tokens), "context" (context is full), or
        "constraint": no token can follow, and the text does not match its constraint.
      alternatives: the most likely ids at each position, with their log-probabilities.
      score: of a search.
      proposed, accepted: number of tokens, with speculative decoding.
    """

    text: str
    ids: list[int]
    logprobs: list[float]
    finish: str
    alternatives: list[list[tuple[int, float]]]
    score: float | None = None
    proposed: int = 0
    accepted: int = 0


class NewTokens(NamedTuple):
    """New tokens of a row; fields as in Sample."""

    ids: list[int]
    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]
    proposed: int = 0
    accepted: int = 0


class Slot:
    """A row that is in use: its request and its text so far."""

    def __init__(self, request_id: int, request: EngineRequest) -> None:
        self.request_id, self.request = request_id, request
        self.sample = Sample("", [], [], "", [])
        self.state = detokenize.State()
        self.matcher: Matcher | None = request.constraint.start() if request.constraint else None

    @property
    def all_ids(self) -> list[int]:
        """Prompt and new ids."""
        return [*self.request.prompts[0], *self.sample.ids]

    def feed(self, tokenizer: Tokenizer, new: NewTokens) -> str:
        """Appends new tokens up to the one that ends the text; returns the new text."""
        sample, params = self.sample, self.request.sampling_params
        self.state, text, n, _ = detokenize.detokenize(self.state, new.ids, tokenizer, params.stop)
        finish = self.state.ended or ""
        if self.matcher and not finish:
            finish = self._advance_matcher(self.matcher, new.ids[:n])
        if not finish and len(sample.ids) + n >= params.max_tokens:
            finish = "length"
        if self.request.sources and not sample.ids:  # a target has no word before its first one
            text = text.removeprefix(" ")
        self.sample = Sample(
            sample.text + text,
            sample.ids + new.ids[:n],
            sample.logprobs + new.logprobs[:n],
            finish,
            sample.alternatives + new.alternatives[:n],
            proposed=sample.proposed + new.proposed,
            accepted=sample.accepted + new.accepted,
        )
        return text + (self.end(finish) if finish else "")

    def _advance_matcher(self, matcher: Matcher, ids: Sequence[int]) -> str:
        for token in ids:
            matcher.advance(token)
        if not matcher.is_done:
            return ""
        return "end" if matcher.is_complete else "constraint"

    def end(self, finish: str) -> str:
        """Ends the text, with this reason where it has none yet; returns the rest of the text."""
        self.state, rest, _, _ = detokenize.flush(self.state, self.request.sampling_params.stop)
        self.sample = self.sample._replace(text=self.sample.text + rest, finish=self.sample.finish or finish)
        return rest


class PrefixCache(NamedTuple):
    """Cached prefill of a model, for prompts with the same source and the same first ids."""

    model_index: int
    source: tuple[int, ...]
    ids: tuple[int, ...]
    cache: Cache


class Limits(NamedTuple):
    """Sizes that an engine allocates for.

    Attributes:
      batch_size: B, the number of rows.
      max_length: maximum number of ids in a row, prompt and new tokens together.
      context: maximum number of tokens that a model attends to.
      sliding_context: texts may get longer than `context`: layers attend to the newest `context` tokens; a table of
        positions is refilled with the newest half of them each time it is full.
      max_source_length: maximum number of ids in a source, for encoder-decoders.
    """

    batch_size: int
    max_length: int
    context: int
    sliding_context: bool = False
    max_source_length: int = 0


def round_length(length: int) -> int:
    """Returns the next of 64, 96, ..., 256, 320, ..., 512, 640, ..., so that few programs are compiled."""
    n = 64
    while n < length:
        n += max(32, 1 << (n.bit_length() - 3))
    return n


@partial(jax.jit, donate_argnums=0)
def insert(
    state: State, row: Any, read: tuple[Cache, ...], next_M: Any, history: History, key: Any, until: Any
) -> State:
    """Inserts a prefilled text into a row of the state; `history` is of that row alone."""
    return State(
        tuple(caches.put(old, row, new) for old, new in zip(state.caches, read, strict=True)),
        state.next_MB.at[:, row].set(next_M),
        jax.tree.map(lambda old, new: old.at[row].set(new), state.history, history),
        state.keys_B.at[row].set(key),
        state.batched,
        state.until_B.at[row].set(until),
        state.active_B.at[row].set(True),
    )


def _params_sharding(params: Any) -> jax.sharding.Sharding:
    """Returns the parameters' sharding; replicated over their mesh where they are sharded."""
    sharding: jax.sharding.Sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(sharding, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return sharding


class Engine:
    """Batched decoding of requests in independent rows; `slots` has the request of each row, or None."""

    def __init__(
        self,
        ensemble: Ensemble,
        tokenizer: Tokenizer,
        limits: Limits,
        alternatives: int = 0,
        watermark: Watermark | None = None,
        speculation: SpeculativeConfig | None = None,
    ) -> None:
        B, S, M = limits.batch_size, round_length(limits.max_length), len(ensemble.decoders)
        uses_ring_buffers = limits.sliding_context and all(map(prefill.can_slide, ensemble.decoders))
        if uses_ring_buffers:
            ensemble = ensemble._replace(decoders=tuple(map(prefill.with_sliding_context, ensemble.decoders)))
        self.ensemble, self.tokenizer, self.limits = ensemble, tokenizer, limits
        self.capacity = S if uses_ring_buffers else min(S, limits.context)
        self.slots: list[Slot | None] = [None] * B
        self.program = Program(
            models=ensemble.models,
            combine=ensemble.combine,
            used=frozenset(),
            ends=tokenizers.eos_token_ids(tokenizer),
            max_cache_length=0 if uses_ring_buffers else limits.context,
            alternatives=alternatives,
            watermark=watermark,
        )
        self.speculation = speculation
        self.weight_M = jnp.asarray(ensemble.weights, jnp.float32)
        self.prefix_caches: deque[PrefixCache] = deque(maxlen=CACHED_PREFIXES * M)
        zeros_B, source = jnp.zeros(B, jnp.int32), limits.max_source_length
        lookahead = speculation.lookahead if speculation else 1
        # Committed to the parameters' devices: an uncommitted array is another kind of argument to `jax.jit`.
        self.device = _params_sharding(ensemble.params)
        state = State(
            caches=tuple(
                decoder.empty(B, self.capacity, lookahead, source and prefill.source_capacity(decoder, source))
                for decoder in ensemble.decoders
            ),
            next_MB=jnp.zeros((M, B), jnp.int32),
            history=History(jnp.zeros((B, S), jnp.int32), zeros_B, jnp.copy(zeros_B)),
            keys_B=jax.random.split(jax.random.key(0), B),
            batched=settings.batched([SamplingParams()] * B),
            until_B=jnp.copy(zeros_B),
            active_B=jnp.zeros(B, bool),
        )
        self.state = jax.device_put(state, self.device)

    def prefill(self, index: int, ids: Sequence[int], source: tuple[int, ...], keep: bool) -> Cache:
        """Returns a cache of a single row prefilled with `ids`, reusing a cached prefix where there is one.

        Args:
          index: of the model.
          ids: may be empty.
          source: read by the encoder, if there is one; a cached encoder output is reused.
          keep: cache the result for other prompts.
        """
        decoder, ids, done, cache, encoder_output = self.ensemble.decoders[index], tuple(ids), 0, None, None
        for entry in self.prefix_caches:
            if (entry.model_index, entry.source) != (index, source):
                continue
            encoder_output = entry.cache.encoder_output
            if (length := prefill.reusable_prefix(entry.ids, entry.cache, ids)) > done:
                cache, done = self._truncate(entry.cache, length), length
        if cache is None:
            cache = jax.device_put(decoder.empty(1, self.capacity, prefill.max_chunk()), self.device)
            cache = cache._replace(encoder_output=encoder_output)
        is_new = done < len(ids)
        if source and encoder_output is None:
            cache, is_new = jax.device_put(prefill.encode_source(decoder, [source], cache), self.device), True
        cache = prefill.prefill(decoder, ids, cache, done)
        if keep and is_new:
            self.prefix_caches.append(PrefixCache(index, source, ids, cache))
        return cache

    def _truncate(self, cache: Cache, length: int) -> Cache:
        return cache._replace(length_B=jax.device_put(np.array([length], np.int32), self.device))

    def admit(self, waiting: Iterator[tuple[int, EngineRequest]]) -> None:
        """Inserts waiting requests into free rows."""
        has_admitted = False
        for number, slot in enumerate(self.slots):
            if slot is None and (item := next(waiting, None)):
                self.slots[number] = row = Slot(*item)
                self._insert(number, row, row.request.prompts)
                has_admitted = True
        if has_admitted:
            params = [row.request.sampling_params if row else SamplingParams(temperature=0) for row in self.slots]
            biases = self.state.batched.bias_ids_Bn.shape[1]
            self.state = self.state._replace(batched=jax.device_put(settings.batched(params, biases), self.device))
            kinds = settings.used([row.request.sampling_params for row in self.slots if row])
            self.program = self.program._replace(used=self.program.used | kinds)

    def _insert(self, number: int, row: Slot, prompts: Sequence[Sequence[int]]) -> None:
        ids, prompt, context = row.all_ids, len(row.request.prompts[0]), self.limits.context
        is_new = len(ids) == prompt  # a prefill in the middle of a text is not reused
        if self.program.max_cache_length:  # table of positions: keep the newest half of ids that do not fit
            prompts = [ids if len(ids) < context else ids[-max(1, context // 2) :] for ids in prompts]
        ids_S = np.zeros(self.state.history.ids_BS.shape[1], np.int32)
        ids_S[: len(ids)] = ids
        longest = self.limits.max_length if self.limits.sliding_context else self.limits.context
        self.state = insert(
            self.state,
            number,
            tuple(self.prefill(i, ids[:-1], row.request.source(i), is_new) for i, ids in enumerate(prompts)),
            jnp.asarray([ids[-1] for ids in prompts], jnp.int32),
            History(jnp.asarray(ids_S), jnp.int32(len(ids)), jnp.int32(prompt)),
            row.request.key,
            min(prompt + row.request.sampling_params.max_tokens, longest),
        )

    def run_step(self, steps: int) -> list[tuple[Slot, str]]:
        """Decodes up to `steps` tokens for each row in use; returns new texts, and frees rows whose text ended."""
        new_tokens = self._speculate(steps) if self.speculation else self._decode(steps)
        active_B = jax.device_get(self.state.active_B)
        texts, finished_rows = [], []
        for number, row in enumerate(self.slots):
            if row is None:
                continue
            text = row.feed(self.tokenizer, new_tokens[number])
            if not row.sample.finish and not active_B[number] and self.limits.sliding_context:
                self._insert(number, row, [row.all_ids] * len(self.ensemble.decoders))
            elif row.sample.finish or not active_B[number]:
                text += row.end("context")
                finished_rows.append(number)
                self.slots[number] = None
            texts.append((row, text))
        if any(active_B[finished_rows]):
            self.state = self.state._replace(active_B=self.state.active_B.at[jnp.asarray(finished_rows)].set(False))
        return texts

    def _decode(self, steps: int) -> list[NewTokens]:
        """Returns new tokens of each row, with their log-probabilities and alternatives."""
        matchers = [row.matcher if row else None for row in self.slots]
        allowed_BW = None
        if any(matchers):
            steps, allowed_BW = 1, constraints.batched_bitmask(matchers, self.ensemble.models[0].config.vocabulary)
        params, most = self.ensemble.params, jnp.int32(min(steps, step.MAX_STEPS))
        self.state, on_device = step.decode_steps(self.program, params, self.weight_M, self.state, most, allowed_BW)
        output = jax.device_get(on_device)

        def of_row(number: int) -> NewTokens:
            active_n = output.active_nB[:, number]
            ids, logprobs = output.ids_nB[active_n, number].tolist(), output.logprobs_nB[active_n, number].tolist()
            pairs = zip(output.top_ids_nBm[active_n, number], output.top_logprobs_nBm[active_n, number], strict=True)
            alternatives = [list(zip(ids.tolist(), logprobs.tolist(), strict=True)) for ids, logprobs in pairs]
            return NewTokens(ids, logprobs, alternatives)

        return [of_row(number) for number in range(len(self.slots))]

    def _speculate(self, steps: int) -> list[NewTokens]:
        """Returns new tokens of each row by speculative decoding; a second model is the draft model."""
        speculation: Any = self.speculation
        rounds = jnp.int32(max(1, min(steps, step.MAX_STEPS) // speculation.lookahead))
        (target, *drafts), models, params = self.state.caches, self.ensemble.models, self.ensemble.params
        plan = DraftPlan(models[0], models[1] if drafts else None, speculation, self.program.used, self.program.ends)
        history, batched = self.state.history, self.state.batched
        before = speculative.State(
            history, target, drafts[0] if drafts else None, self.state.active_B, self.state.until_B - history.length_B
        )
        keys_B = self.state.keys_B
        now, emitted = speculative.run_rounds(
            plan, rounds, params[0], params[1] if drafts else None, keys_B, batched, before
        )
        extended = (now.target,) if now.draft is None else (now.target, now.draft)
        self.state = self.state._replace(caches=extended, history=now.history, active_B=now.active_B)
        emitted = jax.device_get(emitted)

        def of_row(number: int) -> NewTokens:
            n = int(emitted.length_B[number])
            ids, logprobs = emitted.ids_BN[number, :n].tolist(), emitted.logprobs_BN[number, :n].tolist()
            counts = int(emitted.proposed_B[number]), int(emitted.accepted_B[number])
            return NewTokens(ids, logprobs, [[] for _ in range(n)], *counts)

        return [of_row(number) for number in range(len(self.slots))]

    def generate(
        self,
        requests: Iterable[EngineRequest],
        on_text: Callable[[int, str], None] = lambda request_id, text: None,
        stride: int = step.MAX_STEPS,
    ) -> Iterator[tuple[int, Sample]]:
        """Yields (number of the request, its sample) as texts end; waiting requests take the rows that become free.

        Args:
          requests: any number of requests that fit `limits`.
          on_text: called with the number of a request and each new part of its text, whole characters only.
          stride: number of tokens of each row in a dispatch; the first one has a single token, for low latency.
        """
        waiting, steps = enumerate(requests), 1
        self.admit(waiting)
        while any(self.slots):
            for row, text in self.run_step(steps):
                if text:
                    on_text(row.request_id, text)
                if row.sample.finish:
                    yield row.request_id, row.sample
            self.admit(waiting)
            steps = stride
