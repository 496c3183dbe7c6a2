"""T5 (arXiv 1910.10683) and its version 1.1: pre-norm encoder-decoders with relative positions and no biases."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from gptjax.interop.bart import DECODING_KEYS, SIDES, decoding_config, decoding_model
from gptjax.interop.hf_config import COMMON, key
from gptjax.interop.openai import ACTIVATIONS
from gptjax.interop.weight_mapping import NEUTRAL, Family, Tensor, cross, linear, named, qkv, theirs_of
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


def _told(h: Mapping[str, Any], found: Mapping[str, Stored]) -> dict[str, Any]:
    # Whether the head is tied. transformers 5 always says so, and its files tell: version 1.1's have two tables.
    # Where `scale_decoder_outputs` is absent, `tie_word_embeddings` says whether what the head reads is scaled.
    scaled = h["scale_decoder_outputs"]
    head, tokens = found.get("lm_head.weight"), found.get("shared.weight")
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
        qkv_bias=False, activation=named(PROJECTIONS, h["feed_forward_proj"], "feed_forward_proj"),
        tied_head=tied, logit_scale=D**-0.5 if (tied if scaled is None else scaled) else 1.0,
        dropout=h["dropout_rate"], objective="seq2seq",
        **decoding | dict(start=h["pad_token_id"] if decoding["start"] is None else decoding["start"]),
    )  # fmt: skip


def _config(m: Mapping[str, Any]) -> dict[str, Any]:
    unstarted = dict(pad_token_id=None) if m["start"] is None else {}  # which targets begin with, where nothing is said
    return unstarted | dict(
        num_decoder_layers=m["layers"], num_layers=m["encoder_layers"], num_heads=m["heads"], d_kv=m["head_width"],
        d_model=m["width"], d_ff=m["mlp_width"], n_positions=m["context"], vocab_size=m["vocabulary"],
        relative_attention_num_buckets=m["relative"]["buckets"],
        relative_attention_max_distance=m["relative"]["longest"], layer_norm_epsilon=m["norm_epsilon"],
        feed_forward_proj=theirs_of(PROJECTIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        scale_decoder_outputs=m["logit_scale"] != 1, dropout_rate=m["dropout"], **decoding_config(m),
    )  # fmt: skip


def _tensors(m: Mapping[str, Any]) -> list[Tensor]:
    found = [Tensor("tokens/embedding", ("shared.weight",))]
    for side, layers in zip(SIDES, (m["encoder_layers"], m["layers"]), strict=True):
        relative = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        found += [Tensor(f"{side}/relative/embedding", (relative,))]
        found += [Tensor(f"{side}/final_norm/scale", (f"{side}.final_layer_norm.weight",))]
        for i in range(layers):
            found += _block(f"{side}/block_{i}", f"{side}.block.{i}.layer", m, side == "decoder")
    return found


def _block(ours: str, theirs: str, m: Mapping[str, Any], crosses: bool) -> list[Tensor]:
    found = qkv(f"{ours}/attention/qkv", f"{theirs}.0.SelfAttention", m, "qkv")
    found += linear(f"{ours}/attention/out", f"{theirs}.0.SelfAttention.o", bias=False)
    found += [Tensor(f"{ours}/attention_norm/scale", (f"{theirs}.0.layer_norm.weight",))]
    if crosses:
        found += cross(f"{ours}/cross", f"{theirs}.1.EncDecAttention", m, "qkv")
        found += linear(f"{ours}/cross/out", f"{theirs}.1.EncDecAttention.o", bias=False)
        found += [Tensor(f"{ours}/cross_norm/scale", (f"{theirs}.1.layer_norm.weight",))]
    last = f"{theirs}.{1 + crosses}"
    gated = "glu" in m["activation"]
    names = {"gate": "wi_0", "up": "wi_1", "down": "wo"} if gated else {"up": "wi", "down": "wo"}
    for own, their in names.items():
        found += linear(f"{ours}/mlp/{own}", f"{last}.DenseReluDense.{their}", bias=False)
    return [*found, Tensor(f"{ours}/mlp_norm/scale", (f"{last}.layer_norm.weight",))]


def _copies(m: Mapping[str, Any]) -> dict[str, str]:
    return dict.fromkeys((f"{side}.embed_tokens.weight" for side in SIDES), "shared.weight")


_BUFFERS = r"EncDecAttention\.relative_attention_bias\.weight$"  # of old files, which nothing reads

T5 = Family(
    "T5ForConditionalGeneration", "", _BUFFERS, KEYS, _model, _config, _tensors, copies=_copies, told=_told
)  # fmt: skip
