"""Stacks of blocks against torch.nn's Transformer layers, and positions against transformers': live, and golden arrays.

`pytest tests/models/test_transformer.py -s` prints the largest errors.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT, tiny_config

from gptjax.interop import bart, weight_mapping
from gptjax.interop.weight_mapping import norm
from gptjax.models.attention import CrossKV
from gptjax.models.kernels import resolve_kernels
from gptjax.models.kernels.reference import relative_position_bucket
from gptjax.models.positions import SinusoidalPositions
from gptjax.models.transformer import Transformer

sys.path.append(str(ROOT / "tests" / "golden"))
import make_trunk


@pytest.fixture(scope="module", params=["live", "golden"])
def expected(request):
    """Arrays computed by PyTorch and transformers, by name."""
    if request.param == "golden":
        return dict(np.load(make_trunk.FILE))
    pytest.importorskip("torch", reason="the parity extra is not installed")
    pytest.importorskip("transformers", reason="the parity extra is not installed")
    return make_trunk.everything(seed=1)


def trunk_of(decoder, norm_first, activation):
    config = tiny_config(
        model_layers=make_trunk.L, model_heads=make_trunk.H, model_width=make_trunk.D, model_mlp_width=make_trunk.F,
        model_positions="none", model_use_bias=True, model_norm_position="pre" if norm_first else "post",
        model_activation=activation, model_kernels=resolve_kernels("auto"),
    ).model  # fmt: skip
    return Transformer(config, causal=decoder, crosses=decoder), config


def from_torch(config, result, decoder):
    """Parameters of a Transformer from PyTorch's, by the names of BART's layers."""
    today = {
        "out_proj": "out_proj", "encoder_attn.": "multihead_attn.", "encoder_attn_layer_norm": "norm2",
        "self_attn_layer_norm": "norm1", "final_layer_norm": "norm3" if decoder else "norm2", "fc": "linear",
    }  # fmt: skip
    given = dict(result)
    for key, array in result.items():  # three projections in one
        if "in_proj" in key:
            leaf = key.rsplit("in_proj_", 1)[1]
            for part, piece in zip("qkv", np.split(array, 3), strict=True):
                given[key.replace(f"in_proj_{leaf}", f"{part}_proj.{leaf}")] = piece
    tensors = [t for i in range(config.layers) for t in bart.block(f"block_{i}", f"layers.{i}", config, decoder)]
    tensors += norm("final_norm", "norm") if config.norm_position == "pre" else []
    tree = {}
    for tensor in tensors:
        names = tensor.hf_names
        for reference_value, torchs in today.items():
            names = [name.replace(reference_value, torchs) for name in names]
        *folders, leaf = tensor.name.split("/")
        at = tree
        for folder in folders:
            at = at.setdefault(folder, {})
        at[leaf] = weight_mapping.from_hf(tensor, [given[name] for name in names])
    return tree


@pytest.mark.thorough
@pytest.mark.parametrize("case", make_trunk.CASES, ids=lambda case: make_trunk.name(*case))
def test_layers_vs_torch(case, expected):
    prefix = make_trunk.name(*case) + "/"
    result = {key.removeprefix(prefix): array for key, array in expected.items() if key.startswith(prefix)}
    transformer, config = trunk_of(*case)
    torchs = {key.removeprefix("params/"): array for key, array in result.items() if key.startswith("params/")}
    params = from_torch(config, torchs, case[0])
    real_BT, real_BS = (
        ~make_trunk.padding(lengths, longest)
        for lengths, longest in ((make_trunk.LENGTHS_T, make_trunk.T), (make_trunk.LENGTHS_S, make_trunk.S))
    )

    @jax.jit
    def actual(params, x, memory):
        source = CrossKV(memory, jnp.asarray(real_BS, jnp.int32)) if case[0] else None
        return transformer.apply({"params": params}, x, jnp.asarray(real_BT, jnp.int32), source)

    y = np.asarray(actual(params, result["x"], result["memory"]))
    error = np.abs(y - result["y"])[real_BT].max()
    assert np.abs(result["y"][real_BT]).max() > 0.5 and error < 1e-5
    print(f"\n{prefix[:-1]}: within {error:.1e}")


@pytest.mark.parametrize("which", range(len(make_trunk.BUCKETS)))
def test_buckets_of_distances_vs_t5(which, expected):
    count, longest, causal = make_trunk.BUCKETS[which]
    actual = jax.jit(lambda d: relative_position_bucket(d, count, longest, causal))(jnp.asarray(make_trunk.distances()))
    np.testing.assert_array_equal(actual, expected[f"buckets_{which}"])
    assert len(np.unique(actual)) > count // 2


@pytest.mark.parametrize("width", [8, 7])
def test_sinusoids_in_halves_vs_marian(width, expected):
    table = expected[f"sinusoids_{width}"]
    actual = SinusoidalPositions(None, halves=True).apply({}, jnp.zeros((1, len(table), width)))[0]
    np.testing.assert_allclose(actual, table, atol=1e-6)
