"""Batches are a pure function of (seed, step) on any number of hosts; epochs and evaluation are complete."""

import hashlib
import threading
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from ml_collections import ConfigDict

from gptjax.config.errors import DataError
from gptjax.data import layouts
from gptjax.data.augment import Augment
from gptjax.data.batches import (
    Batches,
    EvalBatches,
    MixtureStage,
    ProcessShard,
    Stage,
    change_mixture,
    evenly_spaced,
    prefetch,
    stage_of,
    stages,
)
from gptjax.data.layouts import LAYOUTS
from gptjax.data.mixtures import counts_before, shares, source_of_row
from gptjax.data.packing import pack
from gptjax.data.token_sets import Part, TokenSet

PLAIN = Augment()


def tokens_of(count, documents=1, first=0, closing=()):
    """A stream that counts up from `first`, cut into documents of about the same length, in two parts."""
    ids = np.arange(first, first + count, dtype=np.int32)
    ends = np.linspace(0, count, documents + 1).astype(int)[1:]
    cut = int(ends[(len(ends) - 1) // 2])
    parts = [Part(ids[:cut], ends[ends <= cut]), Part(ids[cut:], ends[ends > cut] - cut)]
    return TokenSet([part for part in parts if len(part.tokens_N)], closing)


def rows_of(sets, layout="flat", seed=0, augment=PLAIN):
    def rows(name, context):
        made = LAYOUTS[layout](sets[name], context, seed, augment, f"{name} {len(sets[name])}")
        return layouts.shuffle_and_repeat(made, seed)

    return rows


def batches_of(tokens, context, batch_size, seed=0, layout="flat", augment=PLAIN, **more):
    rows = rows_of({"a": tokens}, layout, seed, augment)
    return Batches(rows, [Stage(0, batch_size, context)], [MixtureStage(0, {"a": 1})], **more)


def same(a, b):
    return all(np.array_equal(a[key], b[key]) for key in a.keys() | b.keys())


def digest(batch):
    return hashlib.sha256(b"".join(batch[key].tobytes() for key in sorted(batch))).hexdigest()


OF_TEXT = sorted(set(LAYOUTS) - {"pairs"})  # which want prompts: tests/data/test_pairs.py


@pytest.mark.parametrize("layout", OF_TEXT)
@pytest.mark.parametrize("augment, count", [(PLAIN, 10_000), (Augment(0.1, 0.1, 0.1, 0.1), 1_000)])
def test_10_000_consecutive_batches_equal_directly_requested_ones(layout, augment, count):
    change, grow = count * 2 // 5, count * 7 // 10  # steps at which the mixture and the shape change

    def fresh():
        sets = {"a": tokens_of(3000, 40), "b": tokens_of(500, 11, 5000)}
        mixings = [MixtureStage(0, {"a": 2, "b": 1}), MixtureStage(change, {"b": 3, "a": 1})]
        return Batches(rows_of(sets, layout, 3, augment), [Stage(0, 2, 16), Stage(grow, 3, 8)], mixings)

    stepping = fresh()
    digests = [digest(stepping[i]) for i in range(count)]
    assert len(set(digests)) > count // 10
    for step in [*np.random.default_rng(0).integers(0, count, 12).tolist(), change - 1, change, grow - 1, grow]:
        assert digest(fresh()[step]) == digests[step]


def test_seed_and_step_decide_a_batch():
    tokens = tokens_of(5000)
    one = batches_of(tokens, 16, 4, seed=3)[1000]
    assert not same(one, batches_of(tokens, 16, 4, seed=4)[1000])
    assert not same(one, batches_of(tokens, 16, 4, seed=3)[1001])


@pytest.mark.parametrize("layout", OF_TEXT)
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_shards_of_processes_make_up_the_global_batch(layout, processes):
    sets = {"a": tokens_of(3000, 40), "b": tokens_of(500, 11, 5000)}
    made = (rows_of(sets, layout), [Stage(0, 8, 16), Stage(5, 4, 32)], [MixtureStage(0, {"a": 2, "b": 1})])
    whole = Batches(*made)
    shares = [Batches(*made, ProcessShard(process, process + 1, processes)) for process in range(processes)]
    for step in range(12):
        parts = [share[step] for share in shares]
        assert same(whole[step], {key: np.concatenate([part[key] for part in parts]) for key in parts[0]})


@settings(max_examples=40, deadline=None)
@given(length=st.integers(20, 300), context=st.integers(1, 19), seed=st.integers(0, 9))
def test_an_epoch_of_windows_gives_each_token_once(length, context, seed):
    tokens = tokens_of(length)
    batches = batches_of(tokens, context, 1, seed)
    windows = -(-length // context)
    for epoch in range(2):
        rows = [batches[epoch * windows + i] for i in range(windows)]
        inputs = np.concatenate([row["inputs_BT"][row["weights_BT"] > 0] for row in rows])
        assert sorted(inputs.tolist()) == list(range(length))


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    context=st.integers(2, 40),
    closing=st.sampled_from([(), (999,)]),
)
def test_an_epoch_of_packed_rows_gives_every_document_once_and_whole(lengths, context, closing):
    ends = np.cumsum(lengths)
    # Each token says its document and its place, so that a row can be taken apart again.
    ids = np.concatenate([1000 * (d + 1) + np.arange(n) for d, n in enumerate(lengths)]).astype(np.int32)
    if not closing and max(lengths) < 2:
        return
    tokens = TokenSet([Part(ids, ends)], closing, f"set {lengths}")
    batches = batches_of(tokens, context, 1, layout="packed")
    read = []
    for row in range(len(pack(tokens, context).rows_R1) - 1):
        batch = batches[row]
        for segment in range(1, int(batch["segments_BT"].max()) + 1):
            here = batch["segments_BT"][0] == segment
            inputs, targets = batch["inputs_BT"][0][here].tolist(), batch["targets_BT"][0][here].tolist()
            assert np.all(batch["weights_BT"][0][here] == 1)
            assert inputs[1:] == targets[:-1], "inside a piece each target is read next"
            assert len({token // 1000 for token in inputs}) == 1, "a piece is of one document"
            whole = lengths[inputs[0] // 1000 - 1]
            if whole + bool(closing) - 1 <= context:
                assert inputs[0] % 1000 == 0 and len(inputs) == whole + bool(closing) - 1, "cut without need"
            read += zip(inputs, targets, strict=True)
        assert np.all(batch["weights_BT"][batch["segments_BT"] == 0] == 0)
    last = [1000 * (d + 1) + n - 1 for d, n in enumerate(lengths)]
    expected = set(ids.tolist()) - (set() if closing else set(last))
    assert sorted(token for token, _ in read) == sorted(expected)


def test_stages_give_their_shapes_at_each_step():
    found = stages(ConfigDict({"stages": ((3, 2, 5), (2, 4, 5)), "batch_size": 4, "context": 10}))
    batches = Batches(rows_of({"a": tokens_of(1000)}), found, [MixtureStage(0, {"a": 1})])
    shapes = [(2, 5)] * 3 + [(4, 5)] * 2 + [(4, 10)] * 4
    assert [batches[i]["inputs_BT"].shape for i in range(9)] == shapes
    assert [stage_of(i + 1, found)[1:] for i in range(9)] == shapes


def test_stage_continues_where_the_previous_one_stopped():
    sets, mixings = {"a": tokens_of(1000)}, [MixtureStage(0, {"a": 1})]
    grown = Batches(rows_of(sets), [Stage(0, 2, 10), Stage(10, 4, 10)], mixings)
    read = np.concatenate([grown[i]["inputs_BT"] for i in range(30)])
    np.testing.assert_array_equal(read, batches_of(sets["a"], 10, 100)[0]["inputs_BT"])
    longer = Batches(rows_of(sets), [Stage(0, 3, 5), Stage(5, 1, 10)], mixings)  # 75 tokens: 8 windows, the last cut
    assert same(longer[5], batches_of(sets["a"], 10, 1)[8])


def test_targets_are_the_next_tokens_and_epochs_differ():
    tokens = tokens_of(1000)
    batches = batches_of(tokens, 10, 5)
    for step in (0, 7, 25, 1000):
        batch = batches[step]
        np.testing.assert_array_equal(batch["targets_BT"], (batch["inputs_BT"] + 1) % 1000)
        assert batch["inputs_BT"].shape == (5, 10) and batch["weights_BT"].sum() == 50
    first, second = ({int(batches[e * 20 + i]["inputs_BT"][0, 0]) for i in range(20)} for e in range(2))
    assert first != second
    offsets = {int(batches_of(tokens, 10, 1, seed)[0]["inputs_BT"][0, 0]) % 10 for seed in range(20)}
    assert len(offsets) > 5, "the seed decides where windows begin, not only their order"


@pytest.mark.parametrize("few", [0, 2**16])
def test_both_ways_to_shuffle_give_each_row_once_an_epoch(few, monkeypatch):
    monkeypatch.setattr(layouts, "MAX_DRAWN_ORDER", few)
    numbers = layouts.shuffled_indices(37, 5)
    epochs = [[numbers[37 * epoch + i] for i in range(37)] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(37)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(range(37))
    assert [layouts.shuffled_indices(37, 6)[i] for i in range(37)] != epochs[0]


# Mixtures


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=6), st.integers(0, 10**6), st.integers(1, 2000))
def test_any_window_of_rows_has_each_set_in_proportion(parts, start, length):
    counts = np.subtract(counts_before(start + length, parts), counts_before(start, parts))
    assert counts.sum() == length
    assert np.all(np.abs(counts - length * np.array(parts) / sum(parts)) <= len(parts))


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 20), min_size=1, max_size=5))
def test_a_round_of_rows_is_exactly_the_shares_and_each_set_is_read_in_order(parts):
    given_by = [source_of_row(row, parts) for row in range(2 * sum(parts))]
    for which, share in enumerate(parts):
        own = [nth for by, nth in given_by if by == which]
        assert own == list(range(2 * share))


def test_shares_equal_the_weights_as_written():
    assert shares([0.7, 0.2, 0.1]) == (7, 2, 1)
    assert shares([1, 1, 1]) == (1, 1, 1)
    assert shares([10, 1000], temperature=1) == (1, 100)
    a, b = shares([1, 4], temperature=2.0)
    assert abs(b / a - 2) < 1e-6
    a, b = shares([1, 10**12], temperature=1)
    assert a >= 1


def test_mixture_batches_are_in_proportion_and_a_change_continues_each_set():
    sets = {"a": tokens_of(400), "b": tokens_of(400, first=1000)}
    changing = [MixtureStage(0, {"a": 3, "b": 1}), MixtureStage(10, {"b": 1, "a": 1})]
    batches = Batches(rows_of(sets), [Stage(0, 4, 10)], changing)
    from_a = [int((batches[i]["inputs_BT"][:, 0] < 1000).sum()) for i in range(20)]
    assert from_a == [3] * 10 + [2] * 10
    alone = batches_of(sets["a"], 10, 1)
    read = [row for i in range(20) for row in batches[i]["inputs_BT"] if row[0] < 1000]
    np.testing.assert_array_equal(read, [alone[i]["inputs_BT"][0] for i in range(50)])


def test_change_mixture_keeps_stages_that_were_read():
    a, b, c = ({"a": share} for share in (1, 2, 3))
    assert change_mixture([], 0, a) == [MixtureStage(0, a)]
    assert change_mixture([MixtureStage(0, a)], 0, b) == [MixtureStage(0, b)]
    assert change_mixture([MixtureStage(0, a)], 7, a) == [MixtureStage(0, a)]
    assert change_mixture([MixtureStage(0, a)], 7, b) == [MixtureStage(0, a), MixtureStage(7, b)]
    assert change_mixture([MixtureStage(0, a), MixtureStage(7, b)], 7, b) == [MixtureStage(0, a), MixtureStage(7, b)]
    assert change_mixture([MixtureStage(0, a), MixtureStage(7, b)], 7, c) == [MixtureStage(0, a), MixtureStage(7, c)]
    assert change_mixture([MixtureStage(0, a), MixtureStage(7, b)], 5, a) == [MixtureStage(0, a)]


def test_added_set_starts_at_its_beginning_and_removed_set_may_be_missing():
    sets = {"b": tokens_of(400, first=1000)}
    changing = [MixtureStage(0, {"a": 1}), MixtureStage(10, {"b": 1})]
    batches = Batches(rows_of(sets), [Stage(0, 4, 10)], changing, first=10)
    assert same(batches[10], batches_of(sets["b"], 10, 4)[0])
    with pytest.raises(KeyError):
        Batches(rows_of(sets), [Stage(0, 4, 10)], changing, first=9)


# Examples


def test_examples_are_padded_and_their_prompts_weigh_nothing():
    ids = np.array([1, 10, 11, 12, 13, 1, 20, 21, 1, 30, 31, 32, 33, 34, 35], np.int32)
    tokens = TokenSet([Part(ids, np.array([5, 8, 15]), np.array([3, 1, 2], np.int32))], (1,))
    batches = batches_of(tokens, 5, 1, layout="examples")
    rows = {int(b["inputs_BT"][0, 1]): b for b in (batches[i] for i in range(3))}
    assert rows[10]["inputs_BT"].tolist() == [[1, 10, 11, 12, 13]]
    assert rows[10]["targets_BT"].tolist() == [[10, 11, 12, 13, 1]]
    assert rows[10]["weights_BT"].tolist() == [[0, 0, 1, 1, 1]]
    assert rows[20]["targets_BT"].tolist() == [[20, 21, 1, 0, 0]]
    assert rows[20]["weights_BT"].tolist() == [[1, 1, 1, 0, 0]]
    assert rows[30]["targets_BT"].tolist() == [[30, 31, 32, 33, 34]], "what is too long is cut at its end"
    assert rows[30]["weights_BT"].tolist() == [[0, 1, 1, 1, 1]]


def test_examples_whose_prompts_fill_the_row_are_dropped():
    ids = np.arange(20, dtype=np.int32)
    tokens = TokenSet([Part(ids, np.array([10, 20]), np.array([9, 2], np.int32))])
    batches = batches_of(tokens, 5, 1, layout="examples")
    assert {int(batches[i]["inputs_BT"][0, 0]) for i in range(4)} == {10}
    with pytest.raises(DataError, match="no document has text after its prompt within 1 tokens"):
        batches_of(tokens, 1, 1, layout="examples")


# Augmentation


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 60), st.integers(0, 99))
def test_each_edit_changes_nothing_else(length, seed):
    from gptjax.data.augment import augment_tokens

    tokens, ids = tokens_of(500, first=1000), np.arange(length, dtype=np.int32)

    def edited(**share):
        return augment_tokens(ids, Augment(**share), tokens, np.random.default_rng(seed))

    for result in (edited(insert=0.3), edited(delete=0.3), edited(swap=0.3), edited(replace=0.3)):
        assert (result[0], result[-1]) == (0, length - 1)
    kept = edited(insert=0.3)
    assert kept[kept < 1000].tolist() == ids.tolist()
    left = edited(delete=0.3)
    assert set(left) <= set(ids) and left.tolist() == sorted(left)
    assert sorted(edited(swap=0.3)) == ids.tolist()
    changed = edited(replace=0.3)
    assert len(changed) == length and np.all((changed == ids) | (changed >= 1000))
    assert edited().tolist() == ids.tolist()
    if length > 2:
        assert len(edited(insert=1.0)) == 2 * length - 2 and len(edited(delete=1.0)) == 2


def test_augmented_rows_differ_between_epochs_and_padding_weighs_nothing():
    tokens = tokens_of(100)
    batches = batches_of(tokens, 10, 10, augment=Augment(delete=0.3))
    assert not same(batches[0], batches[1])
    for batch in (batches[0], batches_of(tokens_of(100, 9), 20, 4, layout="packed", augment=Augment(delete=0.5))[0]):
        assert np.all(batch["targets_BT"][batch["weights_BT"] == 0] == 0)
        assert 0 < batch["weights_BT"].sum() < batch["weights_BT"].size


# Evaluation


def eval_batches(tokens, context, batch_size, layout="flat"):
    return EvalBatches(layouts.EVAL_LAYOUTS[layout](tokens, context, 0, PLAIN, f"held out {len(tokens)}"), batch_size)


@settings(max_examples=50, deadline=None)
@given(length=st.integers(2, 200), context=st.integers(1, 30), batch_size=st.integers(1, 5))
def test_evaluation_predicts_each_token_after_the_first_once(length, context, batch_size):
    batches = eval_batches(tokens_of(length), context, batch_size)
    every = [batches[i] for i in range(len(batches))]
    targets = np.concatenate([b["targets_BT"][b["weights_BT"] > 0] for b in every])
    assert targets.tolist() == list(range(1, length))
    assert {b["inputs_BT"].shape for b in every} == {(batch_size, context)}


@pytest.mark.parametrize("layout, expected", [("packed", 300), ("examples", 200)])
def test_evaluation_follows_the_layout_of_the_run(layout, expected):
    """Ten documents of 30 tokens: all of them without seeing each other, or the first 20 predictions of each."""
    tokens = tokens_of(300, 10, closing=(999,))
    every = list(eval_batches(tokens, 20, 4, layout))
    read = [int(t) for b in every for t in b["targets_BT"][b["weights_BT"] > 0]]
    assert len(read) == len(set(read)) == expected
    assert {b["inputs_BT"].shape for b in every} == {(4, 20)}


def test_sample_is_evenly_spaced():
    batches = eval_batches(tokens_of(1001), 10, 1)
    assert evenly_spaced(batches, 5) == [0, 25, 50, 74, 99]
    assert evenly_spaced(batches, 1000) == list(range(100))


def test_a_text_shorter_than_a_window_is_refused():
    with pytest.raises(DataError, match="has 16 tokens, fewer than one window of 16"):
        batches_of(tokens_of(16), 16, 1)


# Prefetching


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_prefetch_keeps_order_and_raises_errors_in_place(ahead):
    def make(index):
        time.sleep(0.001 * (index % 3))
        if index == 9:
            raise ValueError("nine")
        return index

    with prefetch(make, 3, 12, ahead) as coming:
        assert [next(coming) for _ in range(6)] == list(range(3, 9))
        with pytest.raises(ValueError, match="nine"):
            next(coming)
    with prefetch(make, 0, 5, ahead) as coming:
        assert list(coming) == list(range(5))


def test_prefetch_computes_exactly_the_requested_number_ahead():
    made, ready = [], threading.Semaphore(0)

    def make(index):
        made.append(index)
        ready.release()
        return index

    with prefetch(make, 0, 100, 2) as coming:
        assert next(coming) == 0
        for _ in range(3):
            assert ready.acquire(timeout=5)
        time.sleep(0.02)
        assert sorted(made) == [0, 1, 2]
