"""Recurrent models against PyTorch, live and golden, and NumPy; segments, padding, causality, cached decoding."""

import functools
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import BASE, ROOT, evaluate, generate, overrides, tiny_config, train

from gptjax import models
from gptjax.models.recurrent.cells import CELLS
from gptjax.models.recurrent.model import RecurrentEncoder
from gptjax.runs import config as configs

sys.path.append(str(ROOT / "tests" / "golden"))
import make_recurrent

V = 30
PAIRS = [("lstm", "lstm", "additive"), ("transformer", "gru", "multiplicative"), ("gru", "rnn", "additive")]
PAIRS += [("rnn", "lstm", "multiplicative")]


logits = jax.jit(models.logits, static_argnums=0)
extend = jax.jit(models.extend, static_argnums=0)
encode_source = jax.jit(models.encode_source, static_argnums=0)
forward = jax.jit(models.forward, static_argnums=0)


@functools.cache
def build(**changes):
    """A tiny model with parameters, including biases, large enough that each affects the output."""
    config = configs.with_vocabulary(tiny_config(**dict(model_use_bias=True) | changes), V)
    model = models.build(config.model)
    rng, shapes = np.random.default_rng(0), models.shapes(model)
    return model, jax.tree.map(lambda leaf: (0.4 * rng.normal(size=leaf.shape)).astype("f"), shapes)


def language_model(cell, **changes):
    return build(model_arch="recurrent", model_cell=cell, **changes)


def translator(encoder, decoder, attention, **changes):
    parts = dict(model_encoder=encoder, model_decoder=decoder, model_attention=attention)
    return build(model_arch="seq2seq", model_positions="sinusoidal", **parts, **changes)


def ids(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, V, shape).astype(np.int32)


def close(got, wanted, atol=1e-5):
    np.testing.assert_allclose(np.asarray(got), np.asarray(wanted), atol=atol, rtol=1e-5)


# Against torch


def of_torch(arrays, layers):
    """Parameters, or gradients, of a RecurrentEncoder from PyTorch's by name."""

    def layer(ending, d):
        parts = {"input": "ih", "state": "hh"}
        return {
            part: {"kernel": arrays[f"{d}weight_{name}_{ending}"].T, "bias": arrays[f"{d}bias_{name}_{ending}"]}
            for part, name in parts.items()
        }

    ways = {"forward": "", "backward": "_reverse"}
    return [
        {
            f"{way}_{i}": layer(f"l{i}{ending}", d)
            for way, ending in ways.items()
            for i in range(layers)
            if f"weight_ih_l{i}{ending}" in arrays
        }
        for d in ("", "d ")
    ]


def check_parity(kind, both_ways, arrays, layers):
    changes = dict(model_width=arrays["x"].shape[-1], model_heads=1, model_encoder_layers=layers, model_use_bias=True)
    config = tiny_config(**changes, model_bidirectional=both_ways).copy_and_resolve_references().unlock()
    config.model.kernels = "plain"
    encoder = RecurrentEncoder(config.model, "float32", kind)
    params, wanted = of_torch(arrays, layers)
    segments = jnp.ones(arrays["x"].shape[:2], jnp.int32)

    def half_of_squares(params, x):
        y = encoder.apply({"params": params}, x, segments)
        return (y**2).sum() / 2, y

    result = jax.jit(jax.grad(half_of_squares, argnums=(0, 1), has_aux=True))
    (dparams, dx), y = result(params, arrays["x"])
    close(y, arrays["y"])
    close(dx, arrays["dx"], 5e-5)
    jax.tree.map(lambda a, b: close(a, b, 5e-5), dparams, wanted)


@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("kind", CELLS)
def test_equals_the_golden_file_of_torch_and_so_do_gradients(kind, both_ways):
    prefix = f"{kind} {1 + both_ways} "
    with np.load(make_recurrent.GOLDEN) as every:
        arrays = {name.removeprefix(prefix): every[name] for name in every if name.startswith(prefix)}
    check_parity(kind, both_ways, arrays, make_recurrent.LAYERS)


@pytest.mark.parametrize("kind", CELLS)
def test_equals_torch(kind):
    pytest.importorskip("torch", reason="needs torch; the golden file has smaller cases")
    check_parity(kind, True, make_recurrent.made(kind, True, width=24, layers=3, rows=3, steps=20, seed=1), 3)


# Against NumPy


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def gru(inputs, states, h):
    (ir, iz, i_n), (sr, sz, sn) = np.split(inputs, 3), np.split(states, 3)
    r, z = sigmoid(ir + sr), sigmoid(iz + sz)
    return (1 - z) * np.tanh(i_n + r * sn) + z * h


def lstm(total, c):
    i, f, g, o = np.split(total, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def parts_of(model, params, source):
    """Decoder parameters as float64, the encoder output, and the token embedding."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def encode(model):
        return model.encode(source[None], jnp.ones((1, len(source)), jnp.int32)).x_BSM

    encoded = jax.jit(lambda params: model.apply({"params": params}, method=encode))(params)
    return p["decoder"], np.asarray(encoded, np.float64)[0], p["tokens"]["embedding"]


@functools.partial(jax.jit, static_argnums=0)
def attending(model, params, *given):
    """Hidden states, and attention weights [B, T, S]."""
    x_BTD, output = model.apply({"params": params}, *given, method="features", mutable=["attention"])
    return x_BTD, output["attention"]["decoder"]["weights_BHTS"][0][:, 0]


def test_additive_attention_equals_a_numpy_reference():
    """arXiv 1409.0473 appendix A, one GRU layer."""
    model, params = translator("gru", "gru", "additive", model_layers=1)
    source, target = ids(7), ids(5, seed=1)
    p, h_S, embedded = parts_of(model, params, source)
    layer, attention = p["layer_0"], p["attention"]
    s = np.tanh(h_S.mean(0) @ p["begin"]["kernel"])
    wanted, weights = [], []
    for token in target:
        e = embedded[token]
        hidden = np.tanh(s @ attention["query"]["kernel"] + h_S @ attention["key"]["kernel"])
        weights.append(softmax(hidden @ attention["score"]))
        c = weights[-1] @ h_S
        inputs = e @ layer["input"]["kernel"] + layer["input"]["bias"] + c @ layer["feed"]["kernel"]
        s = gru(inputs, s @ layer["state"]["kernel"] + layer["state"]["bias"], s)
        pairs = np.concatenate([s, e, c]) @ attention["readout"]["kernel"]
        wanted.append(pairs.reshape(-1, 2).max(-1))
    got, result = attending(model, params, target[None], source[None], np.ones((1, 7), np.int32))
    close(got[0], wanted)
    close(result[0], weights)
    assert np.ptp(weights, axis=0).max() > 0.02  # the steps do not all read alike


def test_multiplicative_attention_equals_a_numpy_reference():
    """arXiv 1508.04025 section 3.1, general score, with input feeding; two LSTM layers."""
    model, params = translator("lstm", "lstm", "multiplicative", model_layers=2)
    source, target = ids(7), ids(5, seed=1)
    p, h_S, embedded = parts_of(model, params, source)
    h0, c0, h1, c1 = np.split(np.tanh(h_S.mean(0) @ p["begin"]["kernel"]), 4)
    fed, wanted, weights = np.zeros_like(h0), [], []
    first, second, attention = p["layer_0"], p["layer_1"], p["attention"]

    def total(layer, x, h):
        biases = layer["input"]["bias"] + layer["state"]["bias"]
        return x @ layer["input"]["kernel"] + h @ layer["state"]["kernel"] + biases

    for token in target:
        h0, c0 = lstm(total(first, embedded[token], h0) + fed @ first["feed"]["kernel"], c0)
        h1, c1 = lstm(total(second, h0, h1), c1)
        weights.append(softmax(h_S @ attention["key"]["kernel"] @ h1))
        fed = np.tanh(np.concatenate([weights[-1] @ h_S, h1]) @ attention["mix"]["kernel"])
        wanted.append(fed)
    got, result = attending(model, params, target[None], source[None], np.ones((1, 7), np.int32))
    close(got[0], wanted)
    close(result[0], weights)
    assert np.ptp(weights, axis=0).max() > 0.02


# Segments, padding and time


@pytest.mark.parametrize("cell", CELLS)
def test_packed_documents_are_read_as_if_alone_and_touch_no_other(cell):
    model, params = language_model(cell)
    tokens, segments = ids(1, 12), jnp.array([[1] * 4 + [2] * 5 + [0] * 3])
    packed = logits(model, params, tokens, segments)[0]
    close(packed[:4], logits(model, params, tokens[:, :4])[0])
    close(packed[4:9], logits(model, params, tokens[:, 4:9])[0])
    assert np.array_equal(packed[4:9], logits(model, params, tokens ^ (segments == 1), segments)[0, 4:9])

    @jax.jit
    @jax.grad
    def of_second(shift_BTD):
        return (logits(model, params, tokens, segments, shift_BTD)[0, 4:9] ** 2).sum()

    of_tokens = np.abs(of_second(jnp.zeros((1, 12, 16)))[0]).sum(-1)
    assert (of_tokens[4:9] > 0).all() and not of_tokens[:4].any() and not of_tokens[9:].any()


@pytest.mark.parametrize("encoder, decoder, attention", PAIRS)
@pytest.mark.slow
def test_packed_pairs_are_read_as_if_alone_and_padding_does_nothing(encoder, decoder, attention):
    model, params = translator(encoder, decoder, attention)
    target, source = ids(1, 10), ids(1, 8, seed=1)
    segments, of_source = np.array([[1] * 4 + [2] * 4 + [0] * 2]), np.array([[1] * 3 + [2] * 3 + [0] * 2])
    packed, weights = attending(model, params, target, source, of_source, segments)
    apart, source_apart = target[0, :8].reshape(2, 4), source[0, :6].reshape(2, 3)
    alone, weights_alone = attending(model, params, apart, source_apart, np.ones((2, 3), np.int32))
    close(packed[0, :8].reshape(alone.shape), alone, 2e-5)
    weights = np.asarray(weights[0])
    assert not weights[segments[0][:, None] != of_source[0]].any()
    close(np.stack([weights[:4, :3], weights[4:8, 3:6]]), weights_alone)

    @jax.jit
    @jax.grad
    def of_first(shift_BSD):
        output = model.apply({"params": params}, target, source, of_source, segments, shift_BSD, method="features")
        return (output[0, :4] ** 2).sum()

    of_tokens = np.abs(of_first(jnp.zeros((1, 8, 16)))[0]).sum(-1)
    assert (of_tokens[:3] > 0).all() and not of_tokens[3:].any()


@pytest.mark.parametrize("cell", CELLS)
def test_no_token_reads_a_later_one(cell):
    model, params = language_model(cell)
    tokens = ids(1, 8)

    @jax.jit
    @jax.jacobian
    def jacobian(shift_BTD):
        return logits(model, params, tokens, None, shift_BTD)[0].sum(-1)

    reads_TT = np.abs(jacobian(jnp.zeros((1, 8, 16)))[:, 0]).sum(-1)
    assert not np.triu(reads_TT, 1).any() and (reads_TT[np.tril_indices(8)] > 0).all()


# Reading by token


def in_pieces(model, params, tokens, cache, pieces):
    """Logits of rows that extend a cache by pieces of different lengths, [B, T, V]; 0 after a row's last token."""
    B, T = tokens.shape
    done, result = np.zeros(B, int), np.zeros((B, T, V), "f")
    for counts in np.asarray(pieces):
        width = counts.max() + 1  # the last one is no token of any row
        piece = np.stack([np.resize(row[at : at + n], width) for row, at, n in zip(tokens, done, counts, strict=True)])
        x, table, cache = extend(model, params, piece.astype(np.int32), cache, jnp.asarray(counts))
        output = models.next_logits(model, x, table)
        for b, n in enumerate(counts):
            result[b, done[b] : done[b] + n] = output[b, :n]
        done += counts
    assert np.array_equal(cache.length_B, done)
    return result


PIECES = ((1, 3, 2), (4, 1, 1), (1, 2, 3), (1, 1, 1))


@pytest.mark.slow
@pytest.mark.parametrize("cell", CELLS)
def test_reading_in_pieces_equals_reading_at_once(cell):
    model, params = language_model(cell)
    tokens = ids(3, 7)
    result = in_pieces(model, params, tokens, models.init_cache(model, 3, 16, 8, "float32"), PIECES)
    close(result, logits(model, params, tokens))
    few, stored = models.for_decoding(model, params)
    close(in_pieces(few, stored, tokens, models.init_cache(few, 3, 16, 8, "float32"), PIECES), result)


@pytest.mark.parametrize("encoder, decoder, attention", [*PAIRS, ("lstm", "transformer", "additive")])
@pytest.mark.slow
def test_so_do_decoders_that_hear_a_source(encoder, decoder, attention):
    model, params = translator(encoder, decoder, attention)
    tokens, source, of_source = (
        ids(3, 7),
        ids(3, 6, seed=1),
        (np.arange(6) < np.array([[6], [2], [4]])).astype(np.int32),
    )
    cache = encode_source(model, params, source, of_source, models.init_cache(model, 3, 16, 8, "float32", 6))
    result = in_pieces(model, params, tokens, cache, PIECES)
    close(result, logits(model, params, tokens, source, of_source), 2e-5)


# Dropout, kinds of numbers, and commands


@pytest.mark.parametrize("cell", ["", *PAIRS[1:3]])
@pytest.mark.slow
def test_dropout_is_of_training_alone_and_of_every_layer(cell):
    model, params = translator(*cell, model_dropout=0.5) if cell else language_model("gru", model_dropout=0.5)
    source = {"source_BS": ids(2, 5), "source_segments_BS": np.ones((2, 5), np.int32)}
    given = {"ids_BT": ids(2, 5)} | (source if cell else {})
    plain, once = (forward(model, params, given, key).x_BTD for key in (None, jax.random.key(0)))
    again, other = (forward(model, params, given, jax.random.key(key)).x_BTD for key in (0, 1))
    assert np.array_equal(once, again) and not np.array_equal(once, other) and not np.array_equal(once, plain)
    assert 0.3 < (np.asarray(once) == 0).mean() < 0.7  # what the head reads, too

    @jax.jit
    @jax.grad
    def of_kernels(params):  # what is dropped of one token between layers moves no row of the second one's kernel
        return forward(model, params, {name: x[:1, :1] for name, x in given.items()}, jax.random.key(0)).x_BTD.sum()

    layers = of_kernels(params)["decoder"] if cell else of_kernels(params)
    stays = (np.asarray(layers["layer_1"]["input"]["kernel"]) == 0).all(-1)
    assert 2 < stays.sum() < 14


def test_bfloat16_is_near_float32():
    for model, params in (language_model("lstm"), translator("gru", "lstm", "additive")):
        given = (ids(2, 6),) if model.kind == "decoder" else (ids(2, 6), ids(2, 5), np.ones((2, 5), np.int32))
        near = logits(model.clone(dtype="bfloat16"), params, *given)
        assert near.dtype == jnp.float32
        assert 0 < np.abs(near - logits(model, params, *given)).max() < 0.2


@pytest.mark.slow
def test_trains_writes_and_is_evaluated_by_the_commands(call, call_train, tmp_path, text_file):
    flags = dict(model_arch="recurrent", model_cell="gru", data_path=text_file, optimizer_learning_rate=1e-2)
    done = call_train(tmp_path / "run", "--json", **flags, train_steps=24)
    assert done.code == 0, done.err
    output = call(evaluate, f"--workdir={tmp_path / 'run'}", "--json")
    assert output.code == 0 and '"loss"' in output.out
    ask = f"--workdir={tmp_path / 'run'}", "--prompt=the model", "--max_tokens=20", "--sliding_context"
    once, again = call(generate, *ask), call(generate, *ask)
    assert (once.code, once.out) == (0, again.out)
    assert len(once.out) > 10, once.out
    assert call(generate, *ask[:-1], "--beams=2", "--max_tokens=3").code == 0
    assert "cannot take back" in call(generate, *ask[:-1], "--max_tokens=3", "--ngram=2").refusal()


@pytest.mark.parametrize(
    "changes, word",
    [
        (dict(model_cell="lstn"), "did you mean lstm"),
        (dict(model_scan_layers=True), "scan_layers"),
        (dict(model_remat="full"), "remat"),
        (dict(mesh_tensor=1, mesh_context=2, mesh_data=1), "mesh.context=2"),
        (dict(model_arch="seq2seq", model_decoder="gru", model_attention="addition"), "did you mean additive"),
    ],
)
def test_what_cannot_be_is_one_line(call, tmp_path, text_file, changes, word):
    flags = overrides(**dict(model_arch="recurrent", data_path=text_file) | changes)
    assert word in call(train, f"--config={BASE}", f"--workdir={tmp_path / 'run'}", *flags).refusal()
