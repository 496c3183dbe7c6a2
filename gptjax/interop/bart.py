"""BART (arXiv 1910.13461) and Marian (arXiv 1804.00344): post-norm encoder-decoders that differ in their embeddings."""

import math
from collections.abc import Mapping
from typing import Any

from gptjax.config.errors import DataError
from gptjax.interop.hf_config import COMMON, abbreviated, fixed, key
from gptjax.interop.openai import ACTIVATIONS
from gptjax.interop.weight_mapping import (
    NEUTRAL,
    Family,
    Tensor,
    cross,
    head_width,
    hf_name_of,
    linear,
    lookup,
    norm,
    qkv,
    require,
)

SIDES = ("encoder", "decoder")


# Keys for decoding; transformers reads them from generation_config.json, too.
DECODING_KEYS = dict(
    decoder_start_token_id=key("index", None), forced_bos_token_id=key("index", None), is_encoder_decoder=fixed(True),
    is_decoder=fixed(False),
)  # fmt: skip
KEYS = COMMON | DECODING_KEYS | dict(
    vocab_size=key("size", 50_265), max_position_embeddings=key("size", 1024), encoder_layers=key("layers", 12),
    encoder_ffn_dim=key("size", 4096), encoder_attention_heads=key("size", 16), decoder_layers=key("layers", 12),
    decoder_ffn_dim=key("size", 4096), decoder_attention_heads=key("size", 16),
    activation_function=key("name", "gelu"), d_model=key("size", 1024), dropout=key("number", 0.1),
    init_std=key("number", 0.02), scale_embedding=key("flag", False, null=True), tie_word_embeddings=fixed(True),
    bad_words_ids=key("lists", None), decoder_start_token_id=key("index", 2, null=True),
)  # fmt: skip
MARIAN_KEYS = KEYS | dict(
    vocab_size=key("size", 58_101), decoder_vocab_size=key("size", None), max_position_embeddings=key("count", 1024),
    share_encoder_decoder_embeddings=fixed(True), decoder_start_token_id=key("index", 58_100, null=True),
)  # fmt: skip


def decoding_model(h: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of `config.model` that control decoding."""
    return dict(start=h["decoder_start_token_id"], forced_first=h["forced_bos_token_id"])


def decoding_config(m: Mapping[str, Any]) -> dict[str, Any]:
    """Inverse of `decoding_model`; no last id is forced, since gptjax has no such option."""
    return dict(
        is_encoder_decoder=True, decoder_start_token_id=m["start"], forced_bos_token_id=m["forced_first"],
        forced_eos_token_id=None,
    )  # fmt: skip


def _model(h: Mapping[str, Any]) -> dict[str, Any]:
    D, H = h["d_model"], h["decoder_attention_heads"]
    require(h, encoder_attention_heads=H, encoder_ffn_dim=h["decoder_ffn_dim"])
    suppressed = [ids for ids in h["bad_words_ids"] or () if len(ids) == 1]
    if not all(type(token) is int and 0 <= token < h["vocab_size"] for (token,) in suppressed):
        raise DataError(f"config.json: bad_words_ids is {abbreviated(h['bad_words_ids'])}; it must be lists of ids")
    return NEUTRAL | dict(
        arch="seq2seq", layers=h["decoder_layers"], encoder_layers=h["encoder_layers"], heads=H, kv_heads=H,
        head_width=head_width(D, H, "d_model={} and decoder_attention_heads={}"), width=D,
        mlp_width=h["decoder_ffn_dim"], context=h["max_position_embeddings"], vocabulary=h["vocab_size"],
        embedding_scale=math.sqrt(D) if h["scale_embedding"] else 1.0, norm_position="post",
        activation=lookup(ACTIVATIONS, h["activation_function"], "activation_function"),
        head_bias=True, suppress_tokens=tuple(token for (token,) in suppressed), dropout=h["dropout"],
        init_std=h["init_std"], objective="seq2seq", **decoding_model(h),
    )  # fmt: skip


def _config(m: Mapping[str, Any]) -> dict[str, Any]:
    return dict(
        decoder_layers=m["layers"], encoder_layers=m["encoder_layers"], num_hidden_layers=m["encoder_layers"],
        d_model=m["width"], max_position_embeddings=m["context"], vocab_size=m["vocabulary"],
        activation_function=hf_name_of(ACTIVATIONS, m["activation"]), scale_embedding=m["embedding_scale"] != 1,
        dropout=m["dropout"], attention_dropout=m["dropout"], init_std=m["init_std"],
        **{f"{side}_attention_heads": m["heads"] for side in SIDES},
        bad_words_ids=[[token] for token in m["suppress_tokens"]] or None,
        **{f"{side}_ffn_dim": m["mlp_width"] for side in SIDES}, **decoding_config(m),
    )  # fmt: skip


def _bart_model(h: Mapping[str, Any]) -> dict[str, Any]:
    return _model(h) | dict(embedding_norm=True, positions="learned")


def _marian_model(h: Mapping[str, Any]) -> dict[str, Any]:
    require({**h, "decoder_vocab_size": h["decoder_vocab_size"] or h["vocab_size"]}, decoder_vocab_size=h["vocab_size"])
    return _model(h) | dict(positions="sinusoidal_halves")


def _tensors(m: Mapping[str, Any]) -> list[Tensor]:
    tensors = [Tensor("tokens/embedding", ("model.shared.weight",))]
    tensors += [Tensor("head_bias", ("final_logits_bias",), leading_axis=True, optional=True)]
    for side, layers in zip(SIDES, (m["encoder_layers"], m["layers"]), strict=True):
        if m["positions"] == "learned":  # BART skips the first two rows
            tensors += [Tensor(f"{side}/positions/embedding", (f"model.{side}.embed_positions.weight",), skip_rows=2)]
        if m["embedding_norm"]:
            tensors += norm(f"{side}/embedding_norm", f"model.{side}.layernorm_embedding")
        for i in range(layers):
            tensors += block(f"{side}/block_{i}", f"model.{side}.layers.{i}", m, side == "decoder")
    return tensors


def block(name: str, hf_name: str, m: Mapping[str, Any], cross_attends: bool) -> list[Tensor]:
    """Returns the tensors of a layer."""
    tensors = qkv(f"{name}/attention/qkv", f"{hf_name}.self_attn", m)
    tensors += linear(f"{name}/attention/out", f"{hf_name}.self_attn.out_proj", bias=True)
    tensors += norm(f"{name}/attention_norm", f"{hf_name}.self_attn_layer_norm")
    if cross_attends:
        tensors += cross(f"{name}/cross", f"{hf_name}.encoder_attn", m)
        tensors += linear(f"{name}/cross/out", f"{hf_name}.encoder_attn.out_proj", bias=True)
        tensors += norm(f"{name}/cross_norm", f"{hf_name}.encoder_attn_layer_norm")
    tensors += linear(f"{name}/mlp/up", f"{hf_name}.fc1", bias=True)
    tensors += linear(f"{name}/mlp/down", f"{hf_name}.fc2", bias=True)
    return tensors + norm(f"{name}/mlp_norm", f"{hf_name}.final_layer_norm")


def _tied(m: Mapping[str, Any]) -> dict[str, str]:
    return dict.fromkeys((f"model.{side}.embed_tokens.weight" for side in SIDES), "model.shared.weight")


_BUFFERS = r"embed_positions\.weight$"  # Marian computes them
_HEADS = ("lm_head.", "final_logits_bias")

BART = Family(
    "BartForConditionalGeneration", "model.", r"^$", KEYS, _bart_model, _config, _tensors, unprefixed=_HEADS, tied=_tied
)
MARIAN = Family(
    "MarianMTModel", "model.", _BUFFERS, MARIAN_KEYS, _marian_model, _config, _tensors, unprefixed=_HEADS, tied=_tied
)
