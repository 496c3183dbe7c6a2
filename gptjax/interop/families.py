"""The families of Hugging Face models that gptjax can be, by transformers' `model_type`, both ways.

A family is a translation of `config.model` and a list of which tensors make which parameter. Pure functions of
dictionaries; nothing here reads a file.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from gptjax.config import ConfigError, DataError, flatten
from gptjax.interop import bart, bert, llama, openai, t5
from gptjax.interop.translation import Family, Tensor, each_layer

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
    if kind not in FAMILIES:
        raise DataError(f"config.json: model_type={kind} is not supported; there are {', '.join(FAMILIES)}")
    return FAMILIES[kind]


def model_of(config: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family of transformers' config, and its `config.model` with `objective`, as of Family.to_model.

    Args:
      config: as the family's `told` gives it, where tensors tell something.

    Raises:
      DataError: another family, a switch that gptjax does not have, or a key that is missing.
    """
    family, kind = family_of(config), config["model_type"]
    try:
        return family, {"objective": "causal"} | family.to_model(config)
    except KeyError as error:
        raise DataError(f"config.json lacks {error.args[0]}") from error
    except (TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise DataError(f"config.json has a value that no {kind} has: {error}") from error


def config_of(model: Mapping[str, Any]) -> tuple[Family, dict[str, Any]]:
    """The family that computes the same as a `config.model`, and transformers' config for it.

    A config fits when it survives the way there and back.

    Raises:
      ConfigError: none does; tells the nearest and where it differs.
    """
    nearest: tuple[str, list[str]] | None = None
    for kind, family in FAMILIES.items():
        config, there, back = family.to_config(model), meaning(model), meaning(_read_back(family, model))
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
            return family.to_model(family.to_config({**model, "activation": activation}))
        except DataError:
            pass
    return family.to_model(family.to_config({**model, "activation": "swiglu"}))


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
