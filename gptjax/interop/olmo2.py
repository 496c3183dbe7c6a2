"""OLMo 2 (arXiv 2501.00656): Llama with norms after the sublayers, and of all heads' queries and keys at once."""

from collections.abc import Mapping
from typing import Any

from gptjax.interop.hf_config import fixed, key
from gptjax.interop.llama import BUFFERS, KEYS, decoder_model, llama_config, llama_tensors
from gptjax.interop.weight_mapping import Family, Tensor

OLMO2_KEYS = KEYS | dict(
    vocab_size=key("size", 50_304), num_key_value_heads=key("size", None, null=True), rms_norm_eps=key("number", 1e-5),
    attention_bias=fixed(False),
)  # fmt: skip
# The norms of a block of Llama, which are before its sublayers, and those of OLMo 2, which are after them.
NORMS = {"input_layernorm": "post_attention_layernorm", "post_attention_layernorm": "post_feedforward_layernorm"}


def to_model(h: Mapping[str, Any]) -> dict[str, Any]:
    """Returns `config.model` of transformers' config."""
    return decoder_model(h) | dict(norm_position="output", qk_norm="heads")


def to_config(m: Mapping[str, Any]) -> dict[str, Any]:
    """Returns transformers' config of a `config.model`."""
    config = llama_config(m)
    del config["mlp_bias"]
    return config


def tensors(m: Mapping[str, Any]) -> list[Tensor]:
    """Returns the tensors of each parameter."""

    def renamed(name: str) -> str:
        *before, last, weight = name.split(".")
        return ".".join([*before, NORMS.get(last, last), weight])

    return [tensor._replace(hf_names=tuple(map(renamed, tensor.hf_names))) for tensor in llama_tensors(m)]


OLMO2 = Family("Olmo2ForCausalLM", "model.", BUFFERS, OLMO2_KEYS, to_model, to_config, tensors)
