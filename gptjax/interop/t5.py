"""T5 (arXiv 1910.10683) and its version 1.1: pre-norm encoder-decoders with relative positions and no biases."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.interop.bart import DECODING_KEYS, SIDES, decoding_config, decoding_model
from gptjax.interop.hf_config import COMMON, key
from gptjax.interop.openai import ACTIVATIONS
from gptjax.interop.weight_mapping import NEUTRAL, Family, Tensor, cross, hf_name_of, linear, lookup, qkv
from gptjax.interop.weights import Stored

PROJECTIONS = {
    **ACTIVATIONS, "gated-gelu": "geglu_tanh", "gated-gelu_new": "geglu_tanh", "gated-silu": "swiglu",
}  # fmt: skip


KEYS = COMMON | DECODING_KEYS | dict(
    vocab_size=key("size", 32_128), d_model=key("size", 512), d_kv=key("size", 64), d_ff=key("size", 2048),
    num_layers=key("layers", 6), num_decoder_layers=key("layers", None), num_heads=key("size", 8),
    n_positions=key("count", 512), relative_attention_num_buckets=key("size", 32),
    relative_attention_max_distance=key("count", 128), dropout_rate=key("number", 0.1),
    layer_norm_epsilon=key("number", 1e-6), feed_forward_proj=key("name", "relu"),
    pad_token_id=key("index", 0, null=True), tie_word_embeddings=key("flag", True, null=True),
    scale_decoder_outputs=key("flag", None),
)  # fmt: skip


def _infer_tied(h: Mapping[str, Any], stored: Mapping[str, Stored]) -> dict[str, Any]:
    # transformers 5 always writes that the head is tied; version 1.1's checkpoints have two different embeddings.
    # If `scale_decoder_outputs` is absent, `tie_word_embeddings` tells if the input of the head is scaled.
    scaled = h["scale_decoder_outputs"]
    head, tokens = stored.get("lm_head.weight"), stored.get("shared.weight")
    tied = head is None or tokens is None or np.array_equal(head.read(), tokens.read())
    scaled = h["tie_word_embeddings"] is not False if scaled is None else scaled
    return {**h, "scale_decoder_outputs": scaled, "tie_word_embeddings": tied}


def _model(h: Mapping[str, Any]) -> dict[str, Any]:
    D, tied, scaled = h["d_model"], h["tie_word_embeddings"] is not False, h["scale_decoder_outputs"]
    decoding = decoding_model(h)
    return NEUTRAL | dict(
        arch="seq2seq", layers=h["num_decoder_layers"] or h["num_layers"], encoder_layers=h["num_layers"],
        heads=h["num_heads"], kv_heads=h["num_heads"], head_width=h["d_kv"], width=D, mlp_width=h["d_ff"],
        context=h["n_positions"], vocabulary=h["vocab_size"], positions="relative",
        relative=dict(
            buckets=h["relative_attention_num_buckets"], longest=h["relative_attention_max_distance"],
        ),
        attention_scale=1.0, norm="rmsnorm", norm_epsilon=h["layer_norm_epsilon"], use_bias=False,
        qkv_bias=False, activation=lookup(PROJECTIONS, h["feed_forward_proj"], "feed_forward_proj"),
        tied_head=tied, logit_scale=D**-0.5 if (tied if scaled is None else scaled) else 1.0,
        dropout=h["dropout_rate"], objective="seq2seq",
        **decoding | dict(start=h["pad_token_id"] if decoding["start"] is None else decoding["start"]),
    )  # fmt: skip


def _config(m: Mapping[str, Any]) -> dict[str, Any]:
    without_start = dict(pad_token_id=None) if m["start"] is None else {}  # the default start token
    return without_start | dict(
        num_decoder_layers=m["layers"], num_layers=m["encoder_layers"], num_heads=m["heads"], d_kv=m["head_width"],
        d_model=m["width"], d_ff=m["mlp_width"], n_positions=m["context"], vocab_size=m["vocabulary"],
        relative_attention_num_buckets=m["relative"]["buckets"],
        relative_attention_max_distance=m["relative"]["longest"], layer_norm_epsilon=m["norm_epsilon"],
        feed_forward_proj=hf_name_of(PROJECTIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        scale_decoder_outputs=m["logit_scale"] != 1, dropout_rate=m["dropout"], **decoding_config(m),
    )  # fmt: skip


def _tensors(m: Mapping[str, Any]) -> list[Tensor]:
    tensors = [Tensor("tokens/embedding", ("shared.weight",))]
    for side, layers in zip(SIDES, (m["encoder_layers"], m["layers"]), strict=True):
        relative = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        tensors += [Tensor(f"{side}/relative/embedding", (relative,))]
        tensors += [Tensor(f"{side}/final_norm/scale", (f"{side}.final_layer_norm.weight",))]
        for i in range(layers):
            tensors += _block(f"{side}/block_{i}", f"{side}.block.{i}.layer", m, side == "decoder")
    return tensors


def _block(name: str, hf_name: str, m: Mapping[str, Any], cross_attends: bool) -> list[Tensor]:
    tensors = qkv(f"{name}/attention/qkv", f"{hf_name}.0.SelfAttention", m, "qkv")
    tensors += linear(f"{name}/attention/out", f"{hf_name}.0.SelfAttention.o", bias=False)
    tensors += [Tensor(f"{name}/attention_norm/scale", (f"{hf_name}.0.layer_norm.weight",))]
    if cross_attends:
        tensors += cross(f"{name}/cross", f"{hf_name}.1.EncDecAttention", m, "qkv")
        tensors += linear(f"{name}/cross/out", f"{hf_name}.1.EncDecAttention.o", bias=False)
        tensors += [Tensor(f"{name}/cross_norm/scale", (f"{hf_name}.1.layer_norm.weight",))]
    last = f"{hf_name}.{1 + cross_attends}"
    gated = "glu" in m["activation"]
    leaves = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    for leaf, hf_leaf in leaves.items():
        tensors += linear(f"{name}/mlp/{leaf}", f"{last}.DenseReluDense.{hf_leaf}", bias=False)
    return [*tensors, Tensor(f"{name}/mlp_norm/scale", (f"{last}.layer_norm.weight",))]


def _tied(m: Mapping[str, Any]) -> dict[str, str]:
    return dict.fromkeys((f"{side}.embed_tokens.weight" for side in SIDES), "shared.weight")


_BUFFERS = r"EncDecAttention\.relative_attention_bias\.weight$"  # in old checkpoints; not read

T5 = Family(
    "T5ForConditionalGeneration", "", _BUFFERS, KEYS, _model, _config, _tensors, tied=_tied, infer=_infer_tied
)  # fmt: skip
