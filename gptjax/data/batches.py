"""Batches: the arrays of a step, read from token sets, as a pure function of (seed, step) on any number of hosts.

The phase of a step determines its shape and the proportions of the sets. No reader position is ever saved.
"""

import bisect
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple, TypeVar

import grain
import numpy as np

from gptjax.data.layouts import Batch, Rows
from gptjax.data.mixtures import counts_before, source_of_row

T = TypeVar("T")


class Stage(NamedTuple):
    """Range of steps in which batches have one shape."""

    start: int  # number of steps before it
    batch_size: int  # B, rows per batch
    context: int  # T, tokens per row


def stages(config: Any) -> list[Stage]:
    """Returns the stages of a run, the first starting at 0: `config.stages`, then the shape of `config` to the end.

    Args:
      config: `config.data`, resolved and checked.
    """
    result, start = [], 0
    for steps, batch_size, context in config.stages:
        result.append(Stage(start, batch_size, context))
        start += steps
    return [*result, Stage(start, config.batch_size, config.context)]


def stage_of(step: int, stages: list[Stage]) -> Stage:
    """Returns the stage of a step, counted from 1."""
    return next(stage for stage in reversed(stages) if stage.start < step)


class MixtureStage(NamedTuple):
    """Range of steps in which sets are mixed in one proportion."""

    start: int  # number of steps before it
    shares: Mapping[str, int]  # integer weight by name of the set; a set without one gives no rows


def change_mixture(mixings: Sequence[MixtureStage], step: int, shares: Mapping[str, int]) -> list[MixtureStage]:
    """Returns the mixture stages of a run that changes to the proportions `shares` after a step.

    Args:
      mixings: stages so far; those that start at `step` or later are dropped.
      step: number of steps taken.
      shares: see `MixtureStage`.
    """
    past = [mixing for mixing in mixings if mixing.start < step]
    if past and past[-1].shares == shares:
        return past
    return [*past, MixtureStage(step, shares)]


class Phase(NamedTuple):
    """Range of steps in which both shape and proportions stay the same."""

    start: int
    batch_size: int
    context: int
    names: tuple[str, ...]
    shares: tuple[int, ...]
    skip: tuple[int, ...]  # rows of each set, of this context, that count as already read


def phases(stages: Sequence[Stage], mixings: Sequence[MixtureStage]) -> list[Phase]:
    """Splits the stages where the mixture changes.

    Each set continues after as many of its tokens as the earlier phases have read, whatever their context.
    """
    result: list[Phase] = []
    tokens_read: dict[str, int] = {}  # tokens of each set
    starts = sorted({stage.start for stage in stages} | {mixing.start for mixing in mixings})
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        stage = stage_of(start + 1, list(stages))
        mixing = next(mixing for mixing in reversed(mixings) if mixing.start <= start)
        names, shares = tuple(mixing.shares), tuple(mixing.shares.values())
        skip = tuple(-(-tokens_read.get(name, 0) // stage.context) for name in names)
        result.append(Phase(start, stage.batch_size, stage.context, names, shares, skip))
        if end is not None:
            for name, count in zip(names, counts_before((end - start) * stage.batch_size, shares), strict=True):
                tokens_read[name] = tokens_read.get(name, 0) + count * stage.context
    return result


class ProcessShard(NamedTuple):
    """Share of each batch that one process reads: parts `start` to `end` (exclusive) of `parts` equal parts."""

    start: int = 0
    end: int = 1
    parts: int = 1


SINGLE_PROCESS = ProcessShard()


class Batches:
    """Sequence of batches: `[step - 1]` is the Batch of that step, in the shape of its stage.

    Args:
      rows: `(name of a set, context) -> endless rows`, see gptjax.data.layouts.
      stages: see `stages`.
      mixings: mixture stages, the first of which starts at 0.
      share: rows of each batch that this process reads; the global batch does not depend on it.
      first: first step that is requested; sets that only earlier steps read need not exist.
    """

    def __init__(
        self,
        rows: Callable[[str, int], grain.MapDataset],
        stages: Sequence[Stage],
        mixings: Sequence[MixtureStage],
        share: ProcessShard = SINGLE_PROCESS,
        first: int = 0,
    ) -> None:
        self.phases, self.share = phases(stages, mixings), share
        self._starts = [phase.start for phase in self.phases]
        current = self.phases[bisect.bisect_right(self._starts, first) - 1 :]
        needed = {(name, phase.context) for phase in current for name in phase.names}
        self._rows = {key: rows(*key) for key in sorted(needed)}

    def __getitem__(self, index: int) -> Batch:
        phase = self.phases[bisect.bisect_right(self._starts, index) - 1]
        before, (start, end, parts) = (index - phase.start) * phase.batch_size, self.share
        indices = range(before + phase.batch_size * start // parts, before + phase.batch_size * end // parts)
        return stack([self._row(phase, row) for row in indices])

    def _row(self, phase: Phase, row: int) -> Batch:
        set_index, row_of_set = source_of_row(row, phase.shares) if len(phase.names) > 1 else (0, row)
        return self._rows[phase.names[set_index], phase.context][phase.skip[set_index] + row_of_set]


def stack(rows: Sequence[Batch]) -> Batch:
    """Stacks rows into a batch."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}  # type: ignore[literal-required, return-value]


class EvalBatches(Sequence[Batch]):
    """Batches of one epoch of rows, in order; the last one is padded with rows of weight 0.

    Args:
      rows: see gptjax.data.layouts.
      batch_size: B.
    """

    def __init__(self, rows: Rows, batch_size: int) -> None:
        self.rows, self.batch_size = rows, batch_size

    def __len__(self) -> int:
        return math.ceil(self.rows.per_epoch / self.batch_size)

    def __getitem__(self, index: Any) -> Any:
        first = range(len(self))[index] * self.batch_size
        rows = [self.rows.row(0, k) for k in range(first, min(first + self.batch_size, self.rows.per_epoch))]
        blank = {key: np.zeros_like(value) for key, value in rows[0].items()}
        return stack([*rows, *[blank] * (self.batch_size - len(rows))])  # type: ignore[list-item]


def evenly_spaced(batches: Sequence[Batch], count: int) -> list[int]:
    """Returns evenly spaced indices of at most `count` of the batches; deterministic."""
    return sorted({round(i) for i in np.linspace(0, len(batches) - 1, min(count, len(batches)))})


@contextmanager
def prefetch(make: Callable[[int], T], first: int, end: int, ahead: int) -> Iterator[Iterator[T]]:
    """Iterates over make(first), ..., make(end - 1) in order, computing them ahead of time in threads.

    Args:
      make: called in several threads at once.
      first, end: range of its argument.
      ahead: number of results computed beyond the one in use; 0 computes each one on request.
    """
    if not ahead:
        yield (make(index) for index in range(first, end))
        return
    pool = ThreadPoolExecutor(ahead, thread_name_prefix="batches")

    def every() -> Iterator[T]:
        waiting: deque[Future[T]] = deque()
        for index in range(first, end):
            while len(waiting) <= min(ahead, end - index - 1):
                waiting.append(pool.submit(make, index + len(waiting)))
            yield waiting.popleft().result()

    try:
        yield every()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
