"""`adapter_config.json` of a LoRA adapter of peft's: which keys change what is computed, and what they say."""

import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from gptjax.config.errors import DataError

# Keys of peft's LoraConfig that change nothing when an adapter is used, by the reason.
NO_EFFECT = {
    "where it comes from and what wrote it": (
        "base_model_name_or_path", "revision", "peft_version", "auto_mapping", "task_type", "inference_mode",
    ),
    "of training alone": ("lora_dropout",),
    "of how the matrices began, where `init_lora_weights` leaves the base as it is": (
        "eva_config", "corda_config", "lora_ga_config", "loftq_config",
    ),
    "peft tells it from the base's layer": ("fan_in_fan_out",),
    "of keys that are refused unless they are off": (
        "megatron_core", "qalora_group_size", "ensure_weight_tying", "runtime_config",
    ),
}  # fmt: skip
# Keys that are read here.
READ = (
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "target_modules",
    "exclude_modules", "layers_to_transform", "layers_pattern", "init_lora_weights", "bias",
)  # fmt: skip
# `init_lora_weights` that leave the base's matrices as they are; of others A and B are of a base that was changed.
PLAIN_INITIAL_WEIGHTS = ("gaussian", "eva", "orthogonal")
BY_NAME = r"(.*\.)?({})$"  # how a pattern of ranks or alphas is matched, from a name's first letter
BY_LAYER = r"(?:^|.*?\.){}\.(?P<idx>\d+)\."
HIGHEST = 1e9  # of ranks and alphas


class LoraConfig(NamedTuple):
    """What an adapter_config.json says.

    Attributes:
      rank: of modules that `rank_pattern` does not match; `alpha` likewise.
      rank_pattern: ranks by a pattern of modules' names.
      alpha_pattern: alphas by a pattern of modules' names.
      rank_stabilised: whether the scale is alpha / sqrt(rank), not alpha / rank.
      dora: whether columns have lengths of their own.
      is_target: whether peft adds something to the module of that name.
    """

    rank: int
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool
    dora: bool
    is_target: Callable[[str], bool]

    def rank_of(self, module: str) -> int:
        """Rank of a module, such as `model.layers.0.self_attn.q_proj`."""
        return _by_pattern(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Factor of what is added to a module."""
        alpha = _by_pattern(self.alpha_pattern, module, self.alpha)
        return scale(self.rank_of(module), alpha, self.rank_stabilised)


def scale(rank: int, alpha: float, rank_stabilised: bool) -> float:
    """alpha / r, or alpha / sqrt(r) (arXiv 2312.03732 eq. 6)."""
    return alpha / (math.sqrt(rank) if rank_stabilised else rank)


def _by_pattern(patterns: Mapping[str, Any], module: str, usual: Any) -> Any:
    # peft.utils.other.get_pattern_key: the first that matches the name or its end after a dot.
    return next((value for key, value in patterns.items() if re.match(BY_NAME.format(key), module)), usual)


def read(facts: Mapping[str, Any], where: str) -> LoraConfig:
    """What an adapter's config says.

    Args:
      facts: content of its adapter_config.json.
      where: that file, for messages.

    Raises:
      DataError: it is no LoRA adapter's, a value is of the wrong kind or missing, or a key that changes what is
        computed is none that gptjax has.
    """
    if facts.get("peft_type") != "LORA":
        raise DataError(f"{where} is no LoRA adapter's: its peft_type is {_short(facts.get('peft_type'))}")
    known = {*READ, *(key for keys in NO_EFFECT.values() for key in keys)}
    for key, value in facts.items():
        if key not in known and value not in (None, False, 0, "", [], {}):
            raise DataError(f"{where}: {key}={_short(value)} is not supported, only an adapter without it")
    if facts.get("bias", "none") != "none":
        raise DataError(f"{where}: bias={_short(facts['bias'])} is not supported, only none")
    initial = facts.get("init_lora_weights", True)
    if not isinstance(initial, bool) and initial not in PLAIN_INITIAL_WEIGHTS:
        raise DataError(
            f"{where}: init_lora_weights={_short(initial)} is not supported: A and B are of a base that it changed; "
            "save the adapter with path_initial_model_for_weight_conversion, which makes it a plain one"
        )
    return LoraConfig(
        rank=_number(facts, "r", where, whole=True),
        alpha=_number(facts, "lora_alpha", where),
        rank_pattern=_pattern(facts, "rank_pattern", where, whole=True),
        alpha_pattern=_pattern(facts, "alpha_pattern", where),
        rank_stabilised=_flag(facts, "use_rslora", where),
        dora=_flag(facts, "use_dora", where),
        is_target=_targets(facts, where),
    )


def _short(value: Any) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= 40 else f"{text[:40]}..."


def _wrong(where: str, key: str, value: Any, wanted: str) -> DataError:
    return DataError(f"{where}: {key} is {_short(value)}; it must be {wanted}")


def _number(facts: Mapping[str, Any], key: str, where: str, whole: bool = False) -> Any:
    if key not in facts:
        raise DataError(f"{where} lacks {key}")
    value = facts[key]
    kinds = (int,) if whole else (int, float)
    if type(value) not in kinds or not 0 < value <= HIGHEST:
        raise _wrong(where, key, value, f"a {'whole ' if whole else ''}number more than 0 and at most {HIGHEST:g}")
    return value


def _flag(facts: Mapping[str, Any], key: str, where: str) -> bool:
    value = facts.get(key, False)
    if type(value) is not bool:
        raise _wrong(where, key, value, "true or false")
    return value


def _pattern(facts: Mapping[str, Any], key: str, where: str, whole: bool = False) -> dict[str, Any]:
    found = facts.get(key) or {}
    if not isinstance(found, dict):
        raise _wrong(where, key, found, "an object of numbers by module")
    for name in found:
        _compiled(name, where, key, BY_NAME)
        _number(found, name, f"{where}: {key}", whole)
    return found


def _compiled(pattern: str, where: str, key: str, form: str = "{}") -> str:
    # The pattern inside what it is matched as part of.
    try:
        return re.compile(form.format(pattern)).pattern
    except (re.error, RecursionError, OverflowError) as error:
        raise DataError(f"{where}: {key} has {_short(pattern)}, which is no regular expression: {error}") from error


def _names(facts: Mapping[str, Any], key: str, where: str) -> list[str] | str:
    """A regular expression, or a list of modules' names, empty where the key is absent."""
    found = facts.get(key) or []
    if isinstance(found, str):
        return _compiled(found, where, key)
    if not isinstance(found, list) or not all(isinstance(name, str) for name in found):
        raise _wrong(where, key, found, "a regular expression or a list of modules' names")
    return found


def _targets(facts: Mapping[str, Any], where: str) -> Callable[[str], bool]:
    """peft.tuners.tuners_utils.check_target_module_exists."""
    targets, excluded = (_names(facts, key, where) for key in ("target_modules", "exclude_modules"))
    if not targets:
        raise DataError(f"{where} lacks target_modules")
    layers, pattern = facts.get("layers_to_transform"), _names(facts, "layers_pattern", where)
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
