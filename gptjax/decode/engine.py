"""Rows of a batch kept busy: requests wait for a row, are read into it, and leave it with their text.

The host's part of decoding. What the device does is in step.py and reading.py; what a row's text is, in stopping.py.
An Engine has as many rows as it is made with, and settings of rows are arrays: so nothing is compiled anew for another
prompt, another length within a piece, or other values of what its requests ask for.
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

CACHED_PREFIXES = 4  # prompts whose caches are kept, for others that begin alike


class EngineRequest(NamedTuple):
    """A prompt to go on from.

    Attributes:
      prompts: ids of the prompt as each speaker reads it, at least one; the first speaker's is the row's own.
      settings: how to choose tokens.
      key: the row's random key, which decides every draw.
      constraint: what the text must be, or None.
      sources: of encoder-decoders, ids of what each speaker's encoder reads.
    """

    prompts: tuple[tuple[int, ...], ...]
    settings: SamplingParams
    key: jax.Array
    constraint: Constraint | None = None
    sources: tuple[tuple[int, ...], ...] = ()

    def source(self, speaker: int) -> tuple[int, ...]:
        """What this speaker's encoder reads; nothing where it has none."""
        return self.sources[speaker] if self.sources else ()


class Sample(NamedTuple):
    """What came of a request.

    Attributes:
      text: without the end of text and without the stop string.
      ids: new ids, the one that ended the text included.
      logprobs: of each, nats, in the speakers' own distribution.
      finish: why it ended: "end" of text, "stop" string, "length" (max_tokens), "context" (no room), or
        "constraint": no token could follow, and the text is not what it had to be.
      alternatives: the likeliest ids at each place, with their log-probabilities.
      score: of a search.
      proposed, accepted: tokens, by speculation.
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
    """What a turn gives a row; as of Sample."""

    ids: list[int]
    logprobs: list[float]
    alternatives: list[list[tuple[int, float]]]
    proposed: int = 0
    accepted: int = 0


class Slot:
    """A request that has a row, and its text so far."""

    def __init__(self, ticket: int, request: EngineRequest) -> None:
        self.ticket, self.request = ticket, request
        self.sample = Sample("", [], [], "", [])
        self.state = detokenize.State()
        self.matcher: Matcher | None = request.constraint.start() if request.constraint else None

    @property
    def all_ids(self) -> list[int]:
        """Prompt and new ids."""
        return [*self.request.prompts[0], *self.sample.ids]

    def feed(self, tokenizer: Tokenizer, new: NewTokens) -> str:
        """Takes new tokens up to the one that ends the text; gives the text that can be shown now."""
        old, wanted = self.sample, self.request.settings
        self.state, text, n, _ = detokenize.detokenize(self.state, new.ids, tokenizer, wanted.stop)
        finish = self.state.ended or ""
        if self.matcher and not finish:
            finish = self._held_to_constraint(self.matcher, new.ids[:n])
        if not finish and len(old.ids) + n >= wanted.max_tokens:
            finish = "length"
        if self.request.sources and not old.ids:  # a text of its own, which has no word before its first one
            text = text.removeprefix(" ")
        self.sample = Sample(
            old.text + text,
            old.ids + new.ids[:n],
            old.logprobs + new.logprobs[:n],
            finish,
            old.alternatives + new.alternatives[:n],
            proposed=old.proposed + new.proposed,
            accepted=old.accepted + new.accepted,
        )
        return text + (self.end(finish) if finish else "")

    def _held_to_constraint(self, matcher: Matcher, ids: Sequence[int]) -> str:
        for token in ids:
            matcher.advance(token)
        if not matcher.is_done:
            return ""
        return "end" if matcher.is_complete else "constraint"

    def end(self, finish: str) -> str:
        """Ends the text, for that reason where it has none yet; gives what of it was held back."""
        self.state, rest, _, _ = detokenize.flush(self.state, self.request.settings.stop)
        self.sample = self.sample._replace(text=self.sample.text + rest, finish=self.sample.finish or finish)
        return rest


class PrefixCache(NamedTuple):
    """What a speaker has read, for others that begin alike: ids of its text, after a source where it hears one."""

    speaker: int
    source: tuple[int, ...]
    ids: tuple[int, ...]
    cache: Cache


class Limits(NamedTuple):
    """Sizes that an engine allocates for.

    Attributes:
      batch_size: B, the number of rows.
      max_length: maximum number of ids in a row, prompt and new tokens together.
      context: maximum number of tokens that a model attends to.
      sliding_context: whether a text may get longer than `context`. Layers then attend to the newest `context` tokens;
        with a table of positions, the newest half of them is read again each time the table is full.
      max_source_length: maximum number of ids in a source, for encoder-decoders.
    """

    batch_size: int
    max_length: int
    context: int
    sliding_context: bool = False
    max_source_length: int = 0


def round_length(length: int) -> int:
    """A length that few programs are compiled for: up to the next of 64, 96, ..., 256, 320, ..., 512, 640, ..."""
    n = 64
    while n < length:
        n += max(32, 1 << (n.bit_length() - 3))
    return n


@partial(jax.jit, donate_argnums=0)
def insert(
    state: State, row: Any, read: tuple[Cache, ...], next_M: Any, history: History, key: Any, until: Any
) -> State:
    """The state with a row given to a text, all of it read but for the last token; `history` is of that row alone."""
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
    """Where the parameters are; on each of their devices, where these divide them."""
    there: jax.sharding.Sharding = jax.tree.leaves(params)[0].sharding
    if isinstance(there, jax.sharding.NamedSharding):
        return jax.sharding.NamedSharding(there.mesh, jax.sharding.PartitionSpec())
    return there


class Engine:
    """Rows that go on from prompts, each for itself: what a row says does not depend on its neighbours.

    Attributes:
      limits: its room.
      rows: what each row is busy with.
    """

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
        rings = limits.sliding_context and all(map(prefill.can_slide, ensemble.decoders))
        if rings:
            ensemble = ensemble._replace(decoders=tuple(map(prefill.with_sliding_context, ensemble.decoders)))
        self.ensemble, self.tokenizer, self.limits = ensemble, tokenizer, limits
        self.capacity = S if rings else min(S, limits.context)
        self.rows: list[Slot | None] = [None] * B
        self.program = Program(
            models=ensemble.models,
            combine=ensemble.combine,
            used=frozenset(),
            ends=tokenizers.eos_token_ids(tokenizer),
            room=0 if rings else limits.context,
            alternatives=alternatives,
            watermark=watermark,
        )
        self.speculation = speculation
        self.weight_M = jnp.asarray(ensemble.weights, jnp.float32)
        self.remembered: deque[PrefixCache] = deque(maxlen=CACHED_PREFIXES * M)
        nowhere, ahead = jnp.zeros(B, jnp.int32), speculation.ahead if speculation else 1
        # Where the parameters are, and bound to it: an array that is not is another kind of argument to `jax.jit`.
        self.device = _params_sharding(ensemble.params)
        state = State(
            caches=tuple(
                decoder.empty(
                    B,
                    self.capacity,
                    ahead,
                    limits.max_source_length and prefill.source_capacity(decoder, limits.max_source_length),
                )
                for decoder in ensemble.decoders
            ),
            next_MB=jnp.zeros((M, B), jnp.int32),
            history=History(jnp.zeros((B, S), jnp.int32), nowhere, jnp.copy(nowhere)),
            keys_B=jax.random.split(jax.random.key(0), B),
            batched=settings.batched([SamplingParams()] * B),
            until_B=jnp.copy(nowhere),
            active_B=jnp.zeros(B, bool),
        )
        self.state = jax.device_put(state, self.device)

    def read(self, speaker: int, ids: Sequence[int], source: tuple[int, ...], remember: bool) -> Cache:
        """The cache of a single row that has read these ids, begun with what was read before where that serves.

        Args:
          speaker: whose cache.
          ids: may be none.
          source: what its encoder reads, if it has one: heard before, whole, or heard now.
          remember: whether this may serve others.
        """
        of, ids, done, cache, heard = self.ensemble.decoders[speaker], tuple(ids), 0, None, None
        for known in self.remembered:
            if (known.speaker, known.source) != (speaker, source):
                continue
            heard = known.cache.heard
            if (serves := prefill.reusable_prefix(known.ids, known.cache, ids)) > done:
                cache, done = self._cut(known.cache, serves), serves
        if cache is None:
            cache = jax.device_put(of.empty(1, self.capacity, prefill.max_chunk()), self.device)
            cache = cache._replace(heard=heard)
        is_new = done < len(ids)
        if source and heard is None:
            cache, is_new = jax.device_put(prefill.encode_source(of, [source], cache), self.device), True
        cache = prefill.prefill(of, ids, cache, done)
        if remember and is_new:
            self.remembered.append(PrefixCache(speaker, source, ids, cache))
        return cache

    def _cut(self, cache: Cache, length: int) -> Cache:
        return cache._replace(length_B=jax.device_put(np.array([length], np.int32), self.device))

    def admit(self, waiting: Iterator[tuple[int, EngineRequest]]) -> None:
        """Gives free rows to requests that wait."""
        came = False
        for number, busy in enumerate(self.rows):
            if busy is None and (next_up := next(waiting, None)):
                self.rows[number] = row = Slot(*next_up)
                self._begin(number, row, row.request.prompts)
                came = True
        if came:
            wanted = [row.request.settings if row else SamplingParams(temperature=0) for row in self.rows]
            room = self.state.batched.bias_ids_Bn.shape[1]
            self.state = self.state._replace(batched=jax.device_put(settings.batched(wanted, room), self.device))
            kinds = settings.used([row.request.settings for row in self.rows if row])
            self.program = self.program._replace(used=self.program.used | kinds)

    def _begin(self, number: int, row: Slot, prompts: Sequence[Sequence[int]]) -> None:
        ids, prompt, context = row.all_ids, len(row.request.prompts[0]), self.limits.context
        is_new = len(ids) == prompt  # what is read again in the middle of a text serves no other
        if self.program.room:  # of a table of positions: the newest half of what does not fit
            prompts = [ids if len(ids) < context else ids[-max(1, context // 2) :] for ids in prompts]
        ids_S = np.zeros(self.state.history.ids_BS.shape[1], np.int32)
        ids_S[: len(ids)] = ids
        longest = self.limits.max_length if self.limits.sliding_context else self.limits.context
        self.state = insert(
            self.state,
            number,
            tuple(self.read(i, ids[:-1], row.request.source(i), is_new) for i, ids in enumerate(prompts)),
            jnp.asarray([ids[-1] for ids in prompts], jnp.int32),
            History(jnp.asarray(ids_S), jnp.int32(len(ids)), jnp.int32(prompt)),
            row.request.key,
            min(prompt + row.request.settings.max_tokens, longest),
        )

    def turn(self, steps: int) -> list[tuple[Slot, str]]:
        """Some more tokens for each busy row, and the text that they add; rows whose text is over become free."""
        drawn = self._propose_and_judge(steps) if self.speculation else self._draw(steps)
        active_B = jax.device_get(self.state.active_B)
        said, over = [], []
        for number, row in enumerate(self.rows):
            if row is None:
                continue
            text = row.feed(self.tokenizer, drawn[number])
            if not row.sample.finish and not active_B[number] and self.limits.sliding_context:
                self._begin(number, row, [row.all_ids] * len(self.ensemble.decoders))
            elif row.sample.finish or not active_B[number]:
                text += row.end("context")
                over.append(number)
                self.rows[number] = None
            said.append((row, text))
        if any(active_B[over]):
            self.state = self.state._replace(active_B=self.state.active_B.at[jnp.asarray(over)].set(False))
        return said

    def _draw(self, steps: int) -> list[NewTokens]:
        """Of each row: new ids, their log-probabilities, and the likeliest at each place."""
        matchers = [row.matcher if row else None for row in self.rows]
        allowed_BW = None
        if any(matchers):
            steps, allowed_BW = 1, constraints.batched_bitmask(matchers, self.ensemble.models[0].config.vocabulary)
        params, most = self.ensemble.params, jnp.int32(min(steps, step.MAX_STEPS))
        self.state, on_device = step.decode_steps(self.program, params, self.weight_M, self.state, most, allowed_BW)
        drawn = jax.device_get(on_device)

        def of_row(number: int) -> NewTokens:
            places = drawn.active_nB[:, number]
            ids, logprobs = drawn.ids_nB[places, number].tolist(), drawn.logprobs_nB[places, number].tolist()
            pairs = zip(drawn.likeliest_nBm[places, number], drawn.likeliest_logprobs_nBm[places, number], strict=True)
            others = [list(zip(these.tolist(), theirs.tolist(), strict=True)) for these, theirs in pairs]
            return NewTokens(ids, logprobs, others)

        return [of_row(number) for number in range(len(self.rows))]

    def _propose_and_judge(self, steps: int) -> list[NewTokens]:
        """The same by speculation; the first speaker judges, the second proposes where there is one."""
        generation: Any = self.speculation
        rounds = jnp.int32(max(1, min(steps, step.MAX_STEPS) // generation.ahead))
        (target, *drafts), models, params = self.state.caches, self.ensemble.models, self.ensemble.params
        plan = DraftPlan(models[0], models[1] if drafts else None, generation, self.program.used, self.program.ends)
        history, batched = self.state.history, self.state.batched
        before = speculative.State(
            history, target, drafts[0] if drafts else None, self.state.active_B, self.state.until_B - history.length_B
        )
        keys_B = self.state.keys_B
        now, emitted = speculative.run_rounds(
            plan, rounds, params[0], params[1] if drafts else None, keys_B, batched, before
        )
        read = (now.target,) if now.draft is None else (now.target, now.draft)
        self.state = self.state._replace(caches=read, history=now.history, active_B=now.active_B)
        told = jax.device_get(emitted)

        def of_row(number: int) -> NewTokens:
            n = int(told.length_B[number])
            ids, logprobs = told.ids_BN[number, :n].tolist(), told.logprobs_BN[number, :n].tolist()
            counts = int(told.proposed_B[number]), int(told.accepted_B[number])
            return NewTokens(ids, logprobs, [[] for _ in range(n)], *counts)

        return [of_row(number) for number in range(len(self.rows))]

    def answer(
        self,
        requests: Iterable[EngineRequest],
        on_text: Callable[[int, str], None] = lambda ticket, text: None,
        stride: int = step.MAX_STEPS,
    ) -> Iterator[tuple[int, Sample]]:
        """Yields (which request, its sample) as texts are over; rows that become free go to requests that wait.

        Args:
          requests: any number of them, which `limits` have room for.
          on_text: gets each piece of text as it comes, whole characters only, with the number of its request.
          stride: tokens of each row between two looks at it; the first comes alone, to be there soon.
        """
        waiting, steps = enumerate(requests), 1
        self.admit(waiting)
        while any(self.rows):
            for row, text in self.turn(steps):
                if text:
                    on_text(row.ticket, text)
                if row.sample.finish:
                    yield row.ticket, row.sample
            self.admit(waiting)
            steps = stride
