"""Batches: token sets in, arrays of a step out. A batch is a pure function of (seed, step), on any number of hosts.

What a step reads follows from the phase that it lies in: its shape, and the proportions of the sets. No position is
ever saved.
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
    """A stretch of training in which batches have one shape."""

    start: int  # steps taken before it
    batch_size: int  # B, rows per batch
    context: int  # T, tokens per row


def stages(config: Any) -> list[Stage]:
    """The stages of a run, the first one starting at 0: those of `config.stages`, then `config`'s own shape to the end.

    Args:
      config: `config.data`, resolved and checked.
    """
    result, start = [], 0
    for steps, batch_size, context in config.stages:
        result.append(Stage(start, batch_size, context))
        start += steps
    return [*result, Stage(start, config.batch_size, config.context)]


def stage_of(step: int, stages: list[Stage]) -> Stage:
    """The stage that a step, counted from 1, belongs to."""
    return next(stage for stage in reversed(stages) if stage.start < step)


class MixtureStage(NamedTuple):
    """A stretch of training in which sets are mixed in one proportion."""

    start: int  # steps taken before it
    shares: Mapping[str, int]  # whole numbers by name of the set; one that is not named gives no rows


def change_mixture(mixings: Sequence[MixtureStage], step: int, shares: Mapping[str, int]) -> list[MixtureStage]:
    """The mixings of a run that reads its sets in these proportions after a step.

    Args:
      known: those so far; what they say of later steps has not been read yet.
      step: steps taken.
      shares: as of Mixing.
    """
    past = [mixing for mixing in mixings if mixing.start < step]
    if past and past[-1].shares == shares:
        return past
    return [*past, MixtureStage(step, shares)]


class Phase(NamedTuple):
    """A stretch of training in which both stay the same."""

    start: int
    batch_size: int
    context: int
    names: tuple[str, ...]
    shares: tuple[int, ...]
    skip: tuple[int, ...]  # rows of each set, in this context, that count as read before


def phases(stages: Sequence[Stage], mixings: Sequence[MixtureStage]) -> list[Phase]:
    """The stages cut where the mixture changes.

    A set is read on from where as many of its tokens have been read as in the phases before, whatever their context.
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
    """What one of several processes reads of each batch: of so many equal parts those from `start` to before `end`."""

    start: int = 0
    end: int = 1
    parts: int = 1


SINGLE_PROCESS = ProcessShard()


class Batches:
    """`[step - 1]` is the Batch of that step, in the shape of its stage.

    Args:
      rows: `(set's name, context) -> endless rows`, see gptjax.data.layouts.
      stages: see `stages`.
      mixings: the first one starts at 0.
      share: which rows of each batch; whatever it is, the batch that all processes make together is the same.
      first: no step before it is asked for, so that sets which only those read need not be there.
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
        which, nth = source_of_row(row, phase.shares) if len(phase.names) > 1 else (0, row)
        return self._rows[phase.names[which], phase.context][phase.skip[which] + nth]


def stack(rows: Sequence[Batch]) -> Batch:
    """The rows as one batch."""
    return {key: np.stack([row[key] for row in rows]) for key in rows[0]}  # type: ignore[literal-required, return-value]


class EvalBatches(Sequence[Batch]):
    """Batches of an epoch of rows, once and in order; the last is filled up with rows that weigh 0.

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
    """Indices of `count` of the batches, evenly spread, always the same; all of them where there are no more."""
    return sorted({round(i) for i in np.linspace(0, len(batches) - 1, min(count, len(batches)))})


@contextmanager
def prefetch(make: Callable[[int], T], first: int, end: int, ahead: int) -> Iterator[Iterator[T]]:
    """make(first), make(first + 1), ... up to before `end`, in order, each begun in a thread before it is asked for.

    Args:
      make: called in several threads at once.
      first, end: its arguments.
      ahead: how many are made or ready beyond the one in use; 0: each is made when it is asked for.
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
