"""Parses and checks the `adapter_config.json` of a peft LoRA adapter."""

import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptjax.config.errors import DataError

# Keys of peft's LoraConfig that have no effect on inference, by reason.
NO_EFFECT = {
    "provenance": (
        "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "inference_mode",
    ),
    "training only": ("lora_dropout",),
    "initialization, if `init_lora_weights` does not change the base": (
        "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    ),
    "peft infers it from the base layer": ("fan_in_fan_out",),
    "options of features that are refused unless they are off": (
        "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config",
    ),
}  # fmt: skip
# Keys that are read.
SUPPORTED = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias",
)  # fmt: skip
# Values of `init_lora_weights` that do not change the base's weights; with others A and B fit a modified base.
PLAIN_INITIAL_WEIGHTS = ("gaussian", "eva", "orthogonal")
BY_NAME = r"(.*\.)?({})$"  # pattern of ranks or alphas, matched at the start of a name
BY_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
MAXIMUM = 1e9  # rank or alpha


class LoraConfig(NamedTuple):
    """A parsed adapter_config.json.

    Attributes:
      rank: rank of modules that `rank_pattern` does not match; `alpha` likewise.
      rank_pattern: ranks by regular expression of module names.
      alpha_pattern: alphas by regular expression of module names.
      rank_stabilised: the scale is alpha / sqrt(rank) instead of alpha / rank.
      dora: columns have a learned magnitude.
      is_target: predicate of the names of adapted modules.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    dora: bool
    is_target: Callable[[str], bool]

    def rank_of(self, module: str) -> int:
        """Returns the rank of a module, such as `model.layers.0.self_attn.q_proj`."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Returns the scale of a module's update."""
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return scale(self.rank_of(module), alpha, self.rank_stabilised)


def scale(rank: int, alpha: float, rank_stabilised: bool) -> float:
    """Returns alpha / r, or alpha / sqrt(r) if stabilized (arXiv 2312.03732 eq. 6)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, default: Any) -> Any:
    # peft.utils.other.get_pattern_key: the first that matches the name or its end after a dot.
    return next((value for key, value in patterns.items() if re.match(BY_NAME.format(key), module)), default)


def read(content: Mapping[str, Any], where: str) -> LoraConfig:
    """Parses an adapter's config.

    Args:
      content: content of its adapter_config.json.
      where: path of that file, for messages.

    Raises:
      DataError: not a LoRA adapter, a missing value or one of the wrong type, or an unsupported option.
    """
    if content.get("peft_type") != "LORA":
        raise DataError(f"{where} is no LoRA adapter's: its peft_type is {_short(content.get('peft_type'))}")
    keys = {*SUPPORTED, *itertools.chain(*NO_EFFECT.values())}
    for key, value in content.items():
        if key not in keys and value not in (None, False, 0, "", [], {}):
            raise DataError(f"{where}: {key}={_short(value)} is not supported, only an adapter without it")
    if content.get("bias", "none") != "none":
        raise DataError(f"{where}: bias={_short(content['bias'])} is not supported, only none")
    initial = content.get("init_lora_weights", True)
    if not isinstance(initial, bool) and initial not in PLAIN_INITIAL_WEIGHTS:
        raise DataError(
            f"{where}: init_lora_weights={_short(initial)} is not supported: A and B are of a base that it changed; "
            "save the adapter with path_initial_model_for_weight_conversion, which makes it a plain one"
        )
    return LoraConfig(
        rank=_number(content, "r", where, whole=True),
        alpha=_number(content, "lora_alpha", where),
        rank_pattern=_pattern(content, "rank_pattern", where, whole=True),
        alpha_pattern=_pattern(content, "alpha_pattern", where),
        rank_stabilised=_flag(content, "use_rslora", where),
        dora=_flag(content, "use_dora", where),
        is_target=_targets(content, where),
    )


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:40]}..."


def _wrong(where: str, key: str, value: Any, wanted: str) -> DataError:
    return DataError(f"{where}: {key} is {_short(value)}; it must be {wanted}")


def _number(content: Mapping[str, Any], key: str, where: str, whole: bool = False) -> Any:
    if key not in content:
        raise DataError(f"{where} lacks {key}")
    value = content[key]
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not 0 < value <= MAXIMUM:
        raise _wrong(where, key, value, f"a {'whole ' if whole else ''}number more than 0 and at most {MAXIMUM:g}")
    return value


def _flag(content: Mapping[str, Any], key: str, where: str) -> bool:
    value = content.get(key, False)
    if type(value) is not bool:
        raise _wrong(where, key, value, "true or false")
    return value


def _pattern(content: Mapping[str, Any], key: str, where: str, whole: bool = False) -> dict[str, Any]:
    patterns = content.get(key) or {}
    if not isinstance(patterns, dict):
        raise _wrong(where, key, patterns, "an object of numbers by module")
    for name in patterns:
        _compiled(name, where, key, BY_NAME)
        _number(patterns, name, f"{where}: {key}", whole)
    return patterns


def _compiled(pattern: str, where: str, key: str, form: str = "{}") -> str:
    # The pattern, embedded in `form`.
    try:
        return re.compile(form.format(pattern)).pattern
    except (re.error, RecursionError, OverflowError) as error:
        raise DataError(f"{where}: {key} has {_short(pattern)}, which is not a regular expression: {error}") from error


def _names(content: Mapping[str, Any], key: str, where: str) -> list[str] | str:
    """Returns a regular expression, or a list of module names, empty if the key is absent."""
    names = content.get(key) or []
    if isinstance(names, str):
        return _compiled(names, where, key)
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise _wrong(where, key, names, "a regular expression or a list of modules' names")
    return names


def _targets(content: Mapping[str, Any], where: str) -> Callable[[str], bool]:
    """Returns the predicate of peft.tuners.tuners_utils.check_target_module_exists."""
    targets, excluded = (_names(content, key, where) for key in ("target_modules", "exclude_modules"))
    if not targets:
        raise DataError(f"{where} lacks target_modules")
    layers, pattern = content.get("layers_to_transform"), _names(content, "layers_pattern", where)
    wanted = layers if isinstance(layers, list) else [] if layers is None else [layers]
    if not all(type(number) is int for number in wanted):
        raise _wrong(where, "layers_to_transform", layers, "a layer's number or a list of them")
    pattern = [pattern] if isinstance(pattern, str) else pattern
    numbered = [_compiled(one, where, "layers_pattern", BY_LAYER) for one in pattern] or [r".*?\.[^.]*\.(?P<idx>\d+)\."]
    if wanted and isinstance(targets, str):
        raise DataError(f"{where}: layers_to_transform goes with a list of target_modules, not with a pattern")

    def matches(names: list[str] | str, module: str) -> bool:
        if isinstance(names, str):
            return re.fullmatch(names, module) is not None
        return any(module == name or module.endswith(f".{name}") for name in names)

    def in_layers(module: str) -> bool:
        match = next((match for one in numbered if (match := re.match(one, module))), None)
        return not wanted or (match is not None and int(match["idx"]) in wanted)

    def is_target(module: str) -> bool:
        if matches(excluded, module):
            return False
        return targets == "all-linear" or (matches(targets, module) and in_layers(module))

    return is_target
