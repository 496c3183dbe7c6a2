"""The supported families of Hugging Face models by transformers' `model_type`, for import and export.

A family maps `config.model` to transformers' config and back, and lists the tensors of each parameter. These are pure
functions of dictionaries; nothing here reads a file.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from gptjax.config import flatten
from gptjax.config.errors import ConfigError, DataError
from gptjax.interop import bart, bert, gpt_neox, hf_config, llama, olmo2, openai, t5
from gptjax.interop.weight_mapping import Family, Tensor, layer_windows
from gptjax.models import options as model_options

FAMILIES: dict[str, Family] = {
    "gpt2": openai.GPT2,
    "openai-gpt": openai.GPT1,
    "gpt_neo": openai.GPT_NEO,
    "gpt_neox": gpt_neox.GPT_NEOX,
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "qwen2": llama.QWEN2,
    "qwen3": llama.QWEN3,
    "olmo2": olmo2.OLMO2,
    "bert": bert.BERT,
    "bart": bart.BART,
    "marian": bart.MARIAN,
    "t5": t5.T5,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """Returns the family of transformers' config; raises DataError if it is not supported."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise DataError(
            f"config.json: model_type={hf_config.abbreviated(kind)} is not supported; there are {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def model_of(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """Returns the family of transformers' config, and its `config.model` with `objective` (Family.to_model).

    Args:
      config: transformers' config, completed by the family's `infer` if tensors are known.

    Raises:
      DataError: an unsupported family or option, or an invalid value.
    """
    family = family_of(config)
    model = {"objective": "causal"} | to_model(family, config)
    for problem in model_options.problems(ConfigDict(model)):
        raise DataError(f"config.json describes a model that cannot be: {problem}")
    return family, model


def to_model(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the `config.model` of transformers' config; raises the errors of `model_of`."""
    try:
        return family.to_model(hf_config.read(config, family.keys))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"config.json has a value that no {config['model_type']} has: {error}") from error


def config_of(model: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """Returns a family that computes the same as a `config.model`, and transformers' config for it.

    A family matches if `to_model` of its config gives an equivalent `config.model`.

    Raises:
      ConfigError: no family matches; the message has the nearest one and the differences.
    """
    nearest: tuple[str, list[str]] | None = None
    for kind, family in FAMILIES.items():
        config, wanted = family.to_config(model), canonical(model)
        try:
            back = canonical(_read_back(family, model))
        except DataError:  # heads do not divide the width, and the family's config has no head size
            continue
        differing = [f"{key} {wanted[key]}" for key in sorted(wanted) if wanted[key] != back.get(key)]
        if not differing:
            return family, {"model_type": kind, "architectures": [family.architecture]} | config
        if nearest is None or len(differing) < len(nearest[1]):
            nearest = kind, differing
    assert nearest
    raise ConfigError(f"no Hugging Face family is this model; {nearest[0]} is nearest, without {', '.join(nearest[1])}")


def _read_back(family: Family, model: Mapping[str, Any]) -> dict[str, Any]:
    # The round trip of a model, with another activation if the family has no name for the model's.
    for activation in (model["activation"], "gelu_tanh"):
        try:
            return _round_trip(family, {**model, "activation": activation})
        except DataError:
            pass
    return _round_trip(family, {**model, "activation": "swiglu"})


def _round_trip(family: Family, model: Mapping[str, Any]) -> dict[str, Any]:
    return family.to_model(hf_config.with_defaults(family.to_config(model), family.keys))


def canonical(model: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the keys of a `config.model` that affect its computation, in canonical form."""
    flat = flatten(dict(model, attention_scale=model["attention_scale"] or 1 / math.sqrt(model["head_width"])))
    flat["windows"] = layer_windows(model)
    unused = r"objective|dropout|init_std|residual_init|scan_layers|remat|kernels"
    if model["parametrization"] == "standard" and not model["base_layers"]:
        unused += r"|parametrization|base_.*"
    if model["positions"] != "rotary":
        unused += r"|rotary\..*"
    else:
        scaling = model["rotary"]["scaling"]
        unused += rf"|rotary\.(?!theta$|fraction$|scaling$|{scaling}\.).*"
    if model["positions"] != "relative":
        unused += r"|relative\..*"
    if model["arch"] != "seq2seq":
        unused += "|encoder|decoder|encoder_layers|bidirectional|attention|start|forced_first"
    if model["arch"] != "recurrent":
        unused += "|cell"
    if model["task"] == "none":
        unused += "|labels|pooling"
    if model["mlp"] != "experts":
        unused += r"|experts.*|load_balance_loss|router_z_loss"
    return {key: value for key, value in flat.items() if not re.fullmatch(unused, key)}


def tensors_of(family: Family, model: Mapping[str, Any]) -> list[Tensor]:
    """Returns the tensors of a model, one entry for each parameter."""
    head = Tensor("head/kernel", (family.head,), transposed=True)
    return family.tensors(model) + ([] if model["tied_head"] else [head])


def tied_names(family: Family, model: Mapping[str, Any]) -> dict[str, str]:
    """Returns names of duplicate tensors that checkpoints may have, with the names of their originals."""
    tokens = next(tensor.hf_names[0] for tensor in family.tensors(model) if tensor.name == "tokens/embedding")
    return family.tied(model) | ({family.head: tokens} if model["tied_head"] else {})
