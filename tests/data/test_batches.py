"""Batches: a pure function of (seed, step); each epoch gives all; evaluation counts every token once."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from gptjax.config import DataError
from gptjax.data.batches import Stage, StagedBatches, eval_batches, spread, stage_of, stages, train_batches


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in a.keys() | b.keys())


def test_batch_1000_asked_for_directly_is_the_one_reached_by_stepping():
    tokens = np.arange(5000, dtype=np.int32)
    stepping = iter(train_batches(tokens, 16, 4, seed=3))
    for _ in range(1001):
        reached = next(stepping)
    assert same(reached, train_batches(tokens, 16, 4, seed=3)[1000])
    assert not same(reached, train_batches(tokens, 16, 4, seed=4)[1000])
    assert not same(reached, train_batches(tokens, 16, 4, seed=3)[1001])


@settings(max_examples=30, deadline=None)
@given(length=st.integers(20, 300), context=st.integers(1, 19), seed=st.integers(0, 9))
def test_an_epoch_gives_each_token_once(length, context, seed):
    batches = train_batches(np.arange(length, dtype=np.int32), context, 1, seed)
    windows = length // context
    for epoch in range(2):
        inputs = np.concatenate([batches[epoch * windows + i]["inputs_BT"].ravel() for i in range(windows)])
        assert len(set(inputs)) == len(inputs) == windows * context


def test_stages_give_their_shapes_at_each_step():
    found = stages(ConfigDict({"stages": ((3, 2, 5), (2, 4, 5)), "batch_size": 4, "context": 10}))
    batches = StagedBatches(np.arange(1000, dtype=np.int32), found, seed=0)
    shapes = [(2, 5)] * 3 + [(4, 5)] * 2 + [(4, 10)] * 4
    assert [batches[i]["inputs_BT"].shape for i in range(9)] == shapes
    assert [stage_of(i + 1, found)[1:] for i in range(9)] == shapes


def test_a_stage_reads_on_where_the_one_before_it_stopped():
    tokens = np.arange(1000, dtype=np.int32)
    grown = StagedBatches(tokens, [Stage(0, 2, 10), Stage(10, 4, 10)], seed=0)
    read = np.concatenate([grown[i]["inputs_BT"] for i in range(30)])
    np.testing.assert_array_equal(read, train_batches(tokens, 10, 100, seed=0)[0]["inputs_BT"])
    longer = StagedBatches(
        tokens, [Stage(0, 3, 5), Stage(5, 1, 10)], seed=0
    )  # 75 tokens are 8 windows, the last not whole
    assert same(longer[5], train_batches(tokens, 10, 1, seed=0)[8])


def test_targets_are_the_next_tokens_and_epochs_differ():
    tokens = np.arange(1000, dtype=np.int32)
    batches = train_batches(tokens, 10, 5, seed=0)
    for step in (0, 7, 25, 1000):
        batch = batches[step]
        np.testing.assert_array_equal(batch["targets_BT"], (batch["inputs_BT"] + 1) % 1000)
        assert batch["inputs_BT"].shape == (5, 10) and batch["weights_BT"].sum() == 50
    first, second = ({int(batches[e * 20 + i]["inputs_BT"][0, 0]) for i in range(20)} for e in range(2))
    assert first != second
    offsets = {int(train_batches(tokens, 10, 1, seed)[0]["inputs_BT"][0, 0]) % 10 for seed in range(20)}
    assert len(offsets) > 5, "the seed decides where windows begin, not only their order"


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 200), context=st.integers(1, 30), batch_size=st.integers(1, 5))
def test_evaluation_predicts_each_token_after_the_first_once(length, context, batch_size):
    tokens = np.arange(length, dtype=np.int32)
    batches = eval_batches(tokens, context, batch_size)
    every = [batches[i] for i in range(len(batches))]
    targets = np.concatenate([b["targets_BT"][b["weights_BT"] > 0] for b in every])
    assert targets.tolist() == list(range(1, length))
    assert {b["inputs_BT"].shape for b in every} == {(batch_size, context)}


def test_a_sample_is_spread_evenly_and_never_more_than_there_is():
    batches = eval_batches(np.arange(1001, dtype=np.int32), 10, 1)
    assert spread(batches, 5) == [0, 25, 50, 74, 99]
    assert spread(batches, 1000) == list(range(100))


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="has 16 tokens, fewer than one window of 16"):
        train_batches(np.arange(16, dtype=np.int32), 16, 1, 0)
