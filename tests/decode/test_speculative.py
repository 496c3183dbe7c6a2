"""Speculative decoding: the text of plain decoding, or its distribution; rows are independent."""

from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import tiny_config
from scipy import stats

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.data.tokenizers import tokenizers
from gptjax.decode import prefill
from gptjax.decode.drafting import DraftPlan, SpeculativeConfig, check_draft, prompt_lookup
from gptjax.decode.penalties import History
from gptjax.decode.sampling import process_logits, sample
from gptjax.decode.settings import SamplingParams, batched, used
from gptjax.decode.speculative import State, run_rounds
from gptjax.models import cache as caches

GREEDY = SamplingParams(temperature=0.0, top_k=0)
KINDS = {
    "rotary": {"model_positions": "rotary"},
    "windows": {"model_positions": "rotary", "model_windows": (3, 0)},
    "learned": {"model_positions": "learned"},
    "single": {"model_positions": "rotary", "model_layers": 1},
}


@cache
def decoder(kind="rotary", seed=0, V=32, noise=0.0, loud=30):
    """A model with large weights, whose output depends on all of its input. Noise makes a similar one."""
    config = tiny_config(model_context=256, **KINDS[kind]).model
    with config.unlocked():
        config.vocabulary, config.tied_head = V, False
    model = models.build(config)
    leaves, tree = jax.tree.flatten(model.init(jax.random.key(seed), jnp.zeros((1, 1), jnp.int32))["params"])
    noises = [noise * 0.02 * jax.random.normal(jax.random.key(7), x.shape) for x in leaves]
    wild = [loud * (x + dx) if x.ndim > 1 else x for x, dx in zip(leaves, noises, strict=True)]
    return prefill.decoder(model, jax.tree.unflatten(tree, wild))


def prefilled(speculation, target, draft, prompts, S, budgets):
    """Returns the state of rows after prefill."""

    def read(of):
        batch = of.empty(len(prompts), S, speculation.lookahead)
        for row, prompt in enumerate(prompts):
            batch = caches.put(batch, row, prefill.prefill(of, prompt[:-1], of.empty(1, S, S)))
        return batch

    ids = np.full((len(prompts), S), 3, np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = prompt
    length = np.array([len(prompt) for prompt in prompts], np.int32)
    history = History(jnp.array(ids), jnp.array(length), jnp.array(length))
    active = jnp.ones(len(prompts), bool)
    return State(history, read(target), draft and read(draft), active, jnp.array(budgets, jnp.int32))


class Decoded:
    """Result of rows: ids and log-probabilities of each, and the summed counts."""

    def __init__(self, speculation, target, draft, settings, state, keys, ends=(), rounds=16):
        plan = DraftPlan(target.model, draft and draft.model, speculation, used(settings), ends)
        self.ids, self.logprobs = [[] for _ in keys], [[] for _ in keys]
        self.proposed, self.accepted, self.rounds = np.zeros((3, len(keys)), int)
        self.calls = 0
        while state.active_B.any():
            state, new = run_rounds(plan, rounds, target.params, draft and draft.params, keys, batched(settings), state)
            for row, n in enumerate(np.asarray(new.length_B)):
                self.ids[row] += np.asarray(new.ids_BN)[row, :n].tolist()
                self.logprobs[row] += np.asarray(new.logprobs_BN)[row, :n].tolist()
            self.proposed += new.proposed_B
            self.accepted += new.accepted_B
            self.rounds += new.rounds_B
            self.calls += 1
        self.state = state


def decode(speculation, target, draft, prompts, budgets, settings, S=256, seed=0, **more):
    keys = jax.random.split(jax.random.key(seed), len(prompts))
    state = prefilled(speculation, target, draft, prompts, S, budgets)
    return Decoded(speculation, target, draft, settings, state, keys, **more)


def prompts_of(*lengths, V=32):
    rng = np.random.default_rng(0)
    return [rng.integers(0, V, n).tolist() for n in lengths]


def assert_plain(of, prompt, ids, logprobs, settings, key, ends=()):
    """Plain decoding without a cache, its choice after each place of the whole text at once, gives the same ids."""
    text = np.array(prompt + ids, np.int32)
    places = np.arange(len(prompt), len(text))
    logits_NV = _whole(of.model, of.params, np.pad(text, (0, 256 - len(text)))[None])[0, places - 1]
    history = History(jnp.tile(text, (len(ids), 1)), jnp.array(places), jnp.full(len(ids), len(prompt)))
    wanted_NV = process_logits(logits_NV, batched([settings] * len(ids)), history, used([settings]), ends)
    keys_N = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(len(ids)))
    expected = sample(wanted_NV, keys_N, jnp.full(len(ids), settings.temperature))
    np.testing.assert_array_equal(ids, expected)
    own = jax.nn.log_softmax(logits_NV)[np.arange(len(ids)), np.array(ids)]
    np.testing.assert_allclose(logprobs, own, atol=1e-4)


@partial(jax.jit, static_argnums=0)
def _whole(model, params, ids_BT):
    return models.logits(model, params, ids_BT)


@pytest.mark.parametrize("kind", ["rotary", "windows", "learned"])
@pytest.mark.parametrize("proposer", ["draft", "ngram"])
@pytest.mark.slow
def test_greedy_text_is_that_of_plain_decoding(kind, proposer):
    target = decoder(kind)
    draft = decoder(kind, noise=0.1) if proposer == "draft" else None
    speculation = SpeculativeConfig(4, 0 if draft else 3)
    prompts, budgets = prompts_of(3, 1, 17), [230, 210, 215]
    got = decode(speculation, target, draft, prompts, budgets, [GREEDY] * 3)
    assert len(set(got.ids[0])) > 4  # a text that says something
    assert [len(ids) for ids in got.ids] == budgets
    for row, prompt in enumerate(prompts):
        assert_plain(target, prompt, got.ids[row], got.logprobs[row], GREEDY, jax.random.key(0))
    assert (0 < got.accepted).all() and (got.accepted < got.proposed).all()


@pytest.mark.slow
def test_a_draft_that_is_the_model_is_always_right():
    """Every round but the last gives k + 1 tokens, and the counts say so."""
    target, speculation, prompts, budgets = decoder(), SpeculativeConfig(4), prompts_of(3, 1, 17), [230, 210, 213]
    got = decode(speculation, target, decoder(noise=0), prompts, budgets, [GREEDY] * 3)
    rounds = [46, 42, 43]
    assert got.rounds.tolist() == rounds and got.calls == 3
    assert got.proposed.tolist() == got.accepted.tolist() == [n - r for n, r in zip(budgets, rounds, strict=True)]


@pytest.mark.parametrize("proposer", ["draft", "ngram"])
def test_counts_vs_a_count_by_hand(proposer):
    """Rounds are reconstructed from the text: proposals after each prefix, and how many are accepted."""
    target, speculation = decoder(), SpeculativeConfig(4, 0 if proposer == "draft" else 3)
    draft = decoder(noise=0.1) if proposer == "draft" else None
    prompts, budgets = prompts_of(3, 1, 17), [60, 50, 40]
    got = decode(speculation, target, draft, prompts, budgets, [GREEDY] * 3)

    def proposals(ids, most):
        if draft is None:
            return by_hand(ids, 3, most)
        ids = list(ids)
        for _ in range(most):
            ids_1T = np.pad(np.array(ids), (0, 256 - len(ids)))[None]
            ids.append(int(_whole(draft.model, draft.params, ids_1T)[0, len(ids) - 1].argmax()))
        return ids[len(ids) - most :]

    for row, (prompt, budget) in enumerate(zip(prompts, budgets, strict=True)):
        done = proposed = accepted = rounds = 0
        while done < budget:
            proposed_ids = proposals(prompt + got.ids[row][:done], min(4, budget - done - 1))
            right = next(
                (i for i, (a, b) in enumerate(zip(proposed_ids, got.ids[row][done:], strict=False)) if a != b),
                len(proposed_ids),
            )
            done, proposed, accepted, rounds = (
                done + right + 1,
                proposed + len(proposed_ids),
                accepted + right,
                rounds + 1,
            )
        assert (proposed, accepted, rounds) == (got.proposed[row], got.accepted[row], got.rounds[row])


def by_hand(ids, longest, most):
    """Prompt lookup in plain Python."""
    for n in range(min(longest, len(ids) - 1), 0, -1):
        for start in range(len(ids) - n - 1, -1, -1):
            if ids[start : start + n] == ids[len(ids) - n :]:
                going_on = list(ids)
                for i in range(most):
                    going_on.append(going_on[start + n + i])
                return going_on[len(ids) :]
    return []


def test_lookup_vs_plain_python():
    rng = np.random.default_rng(1)
    lengths = rng.integers(1, 25, 300)
    ids = rng.integers(0, 3, (300, 24))
    history = History(jnp.array(ids), jnp.array(lengths), jnp.array(lengths))
    for longest in (1, 3):
        got = prompt_lookup(SpeculativeConfig(4, longest), history, jnp.full(300, 4))
        for row, length in enumerate(lengths):
            proposed_ids = by_hand(ids[row, :length].tolist(), longest, 4)
            assert np.asarray(got.ids_Bk)[row, : got.length_B[row]].tolist() == proposed_ids


def expected_counts(of, prompt, places, settings, draws):
    """Returns the expected count of each text, from the processed distribution after every prefix."""
    V = of.model.config.vocabulary
    texts = np.stack(np.meshgrid(*[np.arange(V)] * places, indexing="ij"), -1).reshape(-1, places)
    whole = np.concatenate([np.tile(prompt, (len(texts), 1)), texts], 1)
    logits_NTV = _whole(of.model, of.params, whole)
    chance = np.ones(len(texts))
    for place in range(places):
        at = np.full(len(texts), len(prompt) + place)
        history = History(jnp.array(whole), jnp.array(at), jnp.full(len(texts), len(prompt)))
        logits_NV = process_logits(
            logits_NTV[:, at[0] - 1], batched([settings] * len(texts)), history, used([settings])
        )
        chance *= np.asarray(jax.nn.softmax(logits_NV))[np.arange(len(texts)), texts[:, place]]
    return draws * chance


def p_value(counts, expected):
    """Returns the p-value of Pearson's chi-square test; rare texts are counted together."""
    assert counts[expected == 0].sum() == 0
    rare = expected < 10
    counts, expected = (np.append(x[~rare], x[rare].sum()) for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    return stats.chi2.sf(((counts - expected) ** 2 / expected).sum(), len(expected) - 1)


DRAWS = 20_000
FILTERED = SamplingParams(temperature=1.2, top_k=4, top_p=0.95, repetition_penalty=1.2, frequency_penalty=0.5)


@pytest.fixture
def optimised():
    """Programs compiled as a user's are: here they run for longer than they compile."""
    name = "jax_disable_most_optimizations"
    before = jax.config.values[name]
    jax.config.update(name, False)
    yield
    jax.config.update(name, before)


@pytest.mark.parametrize("proposer", [pytest.param("draft", marks=pytest.mark.slow), "ngram"])
@pytest.mark.slow
def test_sampled_text_follows_the_models_distribution(proposer, optimised):
    """20,000 rows with one prompt: their first token, and their first three jointly, by chi-square."""
    prompt, speculation = [2, 3, 3], SpeculativeConfig(2, 0 if proposer == "draft" else 2)
    target = decoder("single", V=5, loud=12)
    draft = decoder("single", V=5, noise=0.7, loud=12) if proposer == "draft" else None
    start = prefilled(speculation, target, draft, [prompt], 12, [5])
    start, settings = jax.tree.map(lambda x: jnp.repeat(x, DRAWS, axis=0), (start, batched([FILTERED])))
    plan = DraftPlan(target.model, draft and draft.model, speculation, used([FILTERED]))
    keys = jax.random.split(jax.random.key(3), DRAWS)
    _, got = run_rounds(plan, 3, target.params, draft and draft.params, keys, settings, start)
    for places in (1, 3):
        numbers = np.asarray(got.ids_BN)[:, :places] @ 5 ** np.arange(places)[::-1]
        counts = np.bincount(numbers, minlength=5**places)
        assert p_value(counts, expected_counts(target, prompt, places, FILTERED, DRAWS)) > 0.001
        if draft:  # the test can tell the two models apart
            assert p_value(counts, expected_counts(draft, prompt, places, FILTERED, DRAWS) + 1e-9) < 1e-9
    assert 0.1 < got.accepted_B.sum() / got.proposed_B.sum() < 0.9


@pytest.mark.slow
def test_lookup_samples_the_tokens_of_plain_sampling():
    settings = SamplingParams(temperature=0.9, top_k=8, repetition_penalty=1.1, frequency_penalty=0.2)
    target, prompts = decoder(loud=6), prompts_of(3, 1, 17)
    got = decode(SpeculativeConfig(4, 3), target, None, prompts, [90] * 3, [settings] * 3, seed=5)
    for row, key in enumerate(jax.random.split(jax.random.key(5), 3)):
        assert_plain(target, prompts[row], got.ids[row], got.logprobs[row], settings, key)
    assert got.accepted.sum() > 0


@pytest.mark.slow
@pytest.mark.parametrize("proposer", [pytest.param("draft", marks=pytest.mark.slow), "ngram"])
def test_rows_are_independent(proposer):
    """Alone, and as one of 16 of other lengths, budgets and settings, greedy ones among them."""
    target, speculation = decoder("windows", loud=12), SpeculativeConfig(4, 0 if proposer == "draft" else 3)
    draft = decoder("windows", noise=0.3, loud=12) if proposer == "draft" else None
    cool, nucleus = SamplingParams(temperature=0.8, top_k=5), SamplingParams(top_p=0.9, top_k=0)
    settings = [GREEDY, SamplingParams(temperature=1.0, top_k=0), cool, nucleus] * 4
    prompts, budgets = prompts_of(*range(1, 17)), list(range(100, 116))
    together = decode(speculation, target, draft, prompts, budgets, settings, ends=(9,), S=128)
    keys = jax.random.split(jax.random.key(0), 16)

    def empty_but(row):
        state = prefilled(speculation, target, draft, [[5]] * row + [prompts[row]] + [[5]] * (15 - row), 128, budgets)
        return state._replace(active_B=jnp.arange(16) == row)

    for row in (2, 8):
        alone = Decoded(speculation, target, draft, settings, empty_but(row), keys, ends=(9,))
        assert alone.ids[row] == together.ids[row] and alone.logprobs[row] == together.logprobs[row]
        assert (alone.proposed[row], alone.accepted[row]) == (together.proposed[row], together.accepted[row])
    assert_plain(target, prompts[8], together.ids[8], together.logprobs[8], GREEDY, keys[8])
    # A batch of one is a program with products of other shapes, whose last bits may differ.
    state = prefilled(speculation, target, draft, prompts[2:3], 128, budgets[2:3])
    alone = Decoded(speculation, target, draft, settings[2:3], state, keys[2:3], ends=(9,))
    assert alone.ids == together.ids[2:3]
    np.testing.assert_allclose(alone.logprobs[0], together.logprobs[2], atol=1e-4)


@pytest.mark.slow
def test_rows_end_where_they_should_within_an_accepted_run():
    """The model is its own draft, so runs are accepted whole: budget, capacity and ends cut them at every place."""
    target, speculation, S = decoder(), SpeculativeConfig(4), 24
    starts = prompts_of(3, 1, 17)
    texts = decode(speculation, target, target, starts, [30] * 3, [GREEDY] * 3).ids
    prompt, text = starts[0], texts[0]
    last = next(n for n in range(7, 20) if text[n] not in text[:n] + texts[2][:7])
    prompts = [starts[2]] + [prompt] * 5 + [prompt + text[:n] for n in range(6)]
    whole = [starts[2] + texts[2]] + [prompt + text] * 11
    budgets = [30, 1, 2, 4, 5, 6] + [30] * 6
    got = decode(speculation, target, target, prompts, budgets, [GREEDY] * 12, S=S, ends=(text[last], 98))
    for row, (begin, budget) in enumerate(zip(prompts, budgets, strict=True)):
        room = min(budget, S - len(begin))
        expected = whole[row][len(begin) :][:room]
        ended = text[last] in expected
        assert ended == (row > 5)
        expected = expected[: expected.index(text[last]) + 1] if ended else expected
        rounds, rest = divmod(len(expected), 5)
        assert got.ids[row] == expected
        assert got.rounds[row] == rounds + (rest > 0)
        assert got.accepted[row] == 4 * rounds + (rest if ended else max(rest - 1, 0))
        assert got.proposed[row] == sum(min(4, room - at - 1) for at in range(0, len(expected), 5))


@pytest.mark.slow
def test_rows_that_are_not_active_stay_as_they_are():
    target, speculation, prompts = decoder(), SpeculativeConfig(4, 3), prompts_of(3, 5, 17)
    state = prefilled(speculation, target, None, prompts, 256, [20] * 3)
    before = jax.tree.map(np.array, state)
    state = state._replace(active_B=jnp.array([True, False, True]))
    got = Decoded(speculation, target, None, [GREEDY] * 3, state, jax.random.split(jax.random.key(0), 3))
    assert [len(ids) for ids in got.ids] == [20, 0, 20] and got.proposed[1] == got.rounds[1] == 0
    assert got.state.target.length_B[1] == before.target.length_B[1]
    np.testing.assert_array_equal(got.state.history.ids_BS[1], before.history.ids_BS[1])
    got.state = got.state._replace(active_B=jnp.array([False, True, False]))
    later = Decoded(speculation, target, None, [GREEDY] * 3, got.state, jax.random.split(jax.random.key(0), 3))
    assert_plain(target, prompts[1], later.ids[1], later.logprobs[1], GREEDY, jax.random.key(0))


@pytest.mark.parametrize(
    "speculation, has_draft, expected",
    [
        (SpeculativeConfig(0), True, "tokens of speculation is 0; it must be 1 to 64"),
        (SpeculativeConfig(4, -1), False, "ngram of speculation is -1"),
        (SpeculativeConfig(4, 3), True, "leave out one of the two"),
        (SpeculativeConfig(4), False, "nothing proposes tokens"),
    ],
)
def test_invalid_speculation_is_refused(speculation, has_draft, expected):
    with pytest.raises(ConfigError, match=expected):
        speculation.check(has_draft)


def test_a_draft_model_of_another_vocabulary_is_refused():
    own, other = tokenizers.bytes_encoding(), tokenizers.chars_encoding(["abc"])
    check_draft(decoder(), decoder(seed=1), own, own)
    with pytest.raises(ConfigError, match="has 5 ids and the model 32; they must share one vocabulary"):
        check_draft(decoder(), decoder(V=5, loud=12), own, own)
    with pytest.raises(ConfigError, match="tokenizer is not the model's"):
        check_draft(decoder(), decoder(seed=1), own, other)
