"""The families of Hugging Face models that gptjax can be, by transformers' `model_type`, both ways.

A family is a translation of `config.model` and a list of which tensors make which parameter. Pure functions of
dictionaries; nothing here reads a file.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from gptjax.config import flatten
from gptjax.config.checks import model_problems
from gptjax.config.errors import ConfigError, DataError
from gptjax.interop import bart, bert, hf_config, llama, openai, t5
from gptjax.interop.weight_mapping import Family, Tensor, each_layer

FAMILIES: dict[str, Family] = {
    "gpt2": openai.GPT2,
    "openai-gpt": openai.GPT1,
    "gpt_neo": openai.GPT_NEO,
    "llama": llama.LLAMA,
    "mistral": llama.MISTRAL,
    "qwen2": llama.QWEN2,
    "qwen3": llama.QWEN3,
    "bert": bert.BERT,
    "bart": bart.BART,
    "marian": bart.MARIAN,
    "t5": t5.T5,
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family of transformers' config; DataError where gptjax has it not."""
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in FAMILIES:
        raise DataError(
            f"config.json: model_type={hf_config.short(kind)} is not supported; there are {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def model_of(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of transformers' config, and its `config.model` with `objective`, as of Family.to_model.

    Args:
      config: as the family's `told` gives it, where tensors tell something.

    Raises:
      DataError: another family, a switch that gptjax does not have, or a value that no model has.
    """
    family = family_of(config)
    model = {"objective": "causal"} | to_model(family, config)
    for problem in model_problems(ConfigDict(model)):
        raise DataError(f"config.json describes a model that cannot be: {problem}")
    return family, model


def to_model(family: Family, config: Mapping[str, Any]) -> dict[str, Any]:
    """`config.model` of transformers' config; errors as of `model_of`."""
    try:
        return family.to_model(hf_config.read(config, family.keys))
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"config.json has a value that no {config['model_type']} has: {error}") from error


def config_of(model: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family that computes the same as a `config.model`, and transformers' config for it.

    A config fits when it survives the way there and back.

    Raises:
      ConfigError: none does; tells the nearest and where it differs.
    """
    nearest: tuple[str, list[str]] | None = None
    for kind, family in FAMILIES.items():
        config, there = family.to_config(model), meaning(model)
        try:
            back = meaning(_read_back(family, model))
        except DataError:  # heads that do not divide the width, in a family whose config has no width of heads
            continue
        differing = [f"{key} {there[key]}" for key in sorted(there) if there[key] != back.get(key)]
        if not differing:
            return family, {"model_type": kind, "architectures": [family.architecture]} | config
        if nearest is None or len(differing) < len(nearest[1]):
            nearest = kind, differing
    assert nearest
    raise ConfigError(f"no Hugging Face family is this model; {nearest[0]} is nearest, without {', '.join(nearest[1])}")


def _read_back(family: Family, model: Mapping[str, Any]) -> dict[str, Any]:
    # What the family makes of a model; with an activation of its own where it has no name for the model's.
    for activation in (model["activation"], "gelu_tanh"):
        try:
            return _translated(family, {**model, "activation": activation})
        except DataError:
            pass
    return _translated(family, {**model, "activation": "swiglu"})


def _translated(family: Family, model: Mapping[str, Any]) -> dict[str, Any]:
    return family.to_model(hf_config.filled(family.to_config(model), family.keys))


def meaning(model: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a `config.model` that decide what it computes, each said in one way."""
    flat = flatten(dict(model, attention_scale=model["attention_scale"] or 1 / math.sqrt(model["head_width"])))
    flat["windows"] = each_layer(model)
    unused = r"objective|dropout|init_std|residual_init|scan_layers|remat|kernels"
    if model["parametrization"] == "standard" and not model["base_layers"]:
        unused += r"|parametrization|base_.*"
    if model["positions"] != "rotary":
        unused += r"|rotary\..*"
    elif model["rotary"]["scaling"] == "none":
        unused += r"|rotary\.(?!theta).*"
    elif model["rotary"]["scaling"] == "linear":
        unused += r"|rotary\.(low|high|original).*"
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
    """All tensors of a model: one entry for each of its parameters."""
    head = Tensor("head/kernel", (family.head,), transposed=True)
    return family.tensors(model) + ([] if model["tied_head"] else [head])


def copies_of(family: Family, model: Mapping[str, Any]) -> dict[str, str]:
    """Names under which files may have a tensor again, and its own name."""
    tokens = next(tensor.theirs[0] for tensor in family.tensors(model) if tensor.ours == "tokens/embedding")
    return family.copies(model) | ({family.head: tokens} if model["tied_head"] else {})
