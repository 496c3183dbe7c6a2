"""Policies of checkpoints: when to save, and which to keep."""

import pytest
from conftest import tiny_config

from gptjax.runs.checkpoint_policy import Retention, SaveSchedule


def due(last=100, **settings):
    now = [0.0]
    settings = {f"checkpoint_{key}": value for key, value in settings.items()}
    return SaveSchedule(tiny_config(**settings).checkpoint, last, lambda: now[0]), now


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(every_steps=4), [4, 8, 10]),
        (dict(every_steps=0), [10]),
        (dict(every_steps=4, keep_every=3), [3, 4, 6, 8, 9, 10]),
        (dict(every_steps=0, keep_every=5), [5, 10]),
    ],
)
def test_a_run_saves_at_multiples_and_after_the_last_step(settings, expected):
    is_due, _ = due(last=10, **settings)
    assert [step for step in range(1, 11) if is_due(step)] == expected


def test_a_run_saves_after_some_minutes_without_a_save():
    is_due, now = due(every_steps=0, every_minutes=1.5)
    saved = []
    for step in range(1, 13):
        now[0] += 20
        if is_due(step):
            saved.append(step)
            is_due.restart()
    assert saved == [5, 10], "90 seconds are over after the fifth step of 20"


def test_after_a_failed_save_a_run_waits_and_retries_at_any_step():
    is_due, now = due(last=20, every_steps=4)
    now[0] = 100.0
    assert not is_due(4, retry_at=101.0)
    assert is_due(5, retry_at=100.0)
    assert is_due(20, retry_at=101.0), "the last one is always tried"


def test_the_newest_the_periodic_and_the_best_are_kept():
    losses = {100: 3.0, 150: 1.0, 200: 2.0, 250: 2.0, 350: 4.0}
    steps = [50, 100, 150, 200, 250, 300, 350, 400]
    assert Retention(2).steps_to_keep(steps, losses) == {350, 400}
    assert Retention(1, every=200).steps_to_keep(steps, losses) == {200, 400}
    assert Retention(1, best=2).steps_to_keep(steps, losses) == {150, 200, 400}, "of equals the earlier"
    assert Retention(1, every=100, best=1).steps_to_keep(steps, losses) == {100, 150, 200, 300, 400}
    assert Retention(9).steps_to_keep(steps, {}) == set(steps)
    assert Retention(1, best=1).steps_to_keep([350, 400], losses) == {350, 400}, "a loss alone is no checkpoint"


def test_a_loss_is_among_the_best_if_it_replaces_one_or_fewer_are_kept():
    assert not Retention(1).is_among_best(0.0, {})
    assert Retention(1, best=1).is_among_best(9.0, {})
    assert Retention(1, best=2).is_among_best(2.5, {1: 2.0, 2: 3.0, 3: 9.0})
    assert not Retention(1, best=2).is_among_best(3.0, {1: 2.0, 2: 3.0, 3: 9.0})
    assert not Retention(1, best=2).is_among_best(float("nan"), {})
