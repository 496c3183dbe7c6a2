"""Fine-tuning methods: which of a model's parameters are trained, and which are added to it, by rules of paths.

A method depends on the base's paths and shapes alone, a prompt also on the token embedding, so that it applies to every
model of the package; gptjax.finetune.attached has the effect of the additions. Before the first step the outputs are
the base's, but for prefixes and prompts, which tokens attend to from the start.
"""

import math
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax import models
from gptjax.config.errors import ConfigError
from gptjax.finetune import attached, paths
from gptjax.finetune.attached import Attached
from gptjax.finetune.paths import Flat

# Modules whose matrices are no hidden ones: heads and routers.
EXCLUDED_MODULES = re.compile(r"(^|/)(head|router|task)(/|$)")


class Method(NamedTuple):
    """A fine-tuning method.

    Attributes:
      trains: chooses the trainable paths of the base: `(shapes by path, config.finetune) -> paths`.
      adds: initializes the additions: `(base by path, config, key) -> arrays by path`.
    """

    trains: Callable[[Flat, Any], Iterable[str]]
    adds: Callable[[Flat, Any, jax.Array], Flat]


def no_parameters(base: Flat, options: Any) -> list[str]:
    """Chooses no parameter of the base."""
    return []


def no_additions(base: Flat, config: Any, key: jax.Array) -> Flat:
    """Adds no parameters."""
    return {}


def all_parameters(base: Flat, options: Any) -> list[str]:
    """Chooses every parameter."""
    return list(base)


def matching_rule(base: Flat, options: Any) -> list[str]:
    """Chooses the parameters that `finetune.rule` matches."""
    return paths.matching(base, options.rule, "finetune.rule")


def top_layers(base: Flat, options: Any) -> list[str]:
    """Chooses the last `finetune.top_layers` blocks, an encoder-decoder's of the decoder, and everything after them.

    Raises:
      ConfigError: the model has fewer blocks, or they are stacked.
    """
    depths = {path: paths.depth(path) for path in base if not path.startswith("encoder/")}
    count = max((depth for depth in depths.values() if depth is not None), default=-1) + 1
    if not 1 <= options.top_layers <= count:
        stacked = "; model.scan_layers=False keeps layers separate" if not count else ""
        raise ConfigError(f"finetune.top_layers is {options.top_layers}; it must be 1 to {count}{stacked}")
    first = count - options.top_layers
    after = re.compile(r"(^|/)(final_norm|head|head_bias|task|transform|transform_norm)(/|$)")
    return [path for path, depth in depths.items() if after.search(path) or (depth is not None and depth >= first)]


def biases(base: Flat, options: Any) -> list[str]:
    """Chooses every bias (BitFit, arXiv 2106.10199).

    Raises:
      ConfigError: the base has none.
    """
    chosen = [path for path in base if path.rsplit("/", 1)[-1] == "bias"]
    if not chosen:
        raise ConfigError("finetune.method=bitfit trains biases, and this model has none (model.use_bias)")
    return chosen


def target_modules(base: Flat, options: Any) -> dict[str, tuple[int, ...]]:
    """Returns the modules with a matrix that `finetune.targets` matches, each with its shape [..., D, F]."""
    suffix = "/kernel"
    kernels = [path for path in base if path.endswith(suffix) and not EXCLUDED_MODULES.search(path)]
    names = [path.removesuffix(suffix) for path in kernels]
    return {name: base[name + suffix].shape for name in paths.matching(names, options.targets, "finetune.targets")}


def lora(base: Flat, config: Any, key: jax.Array, magnitudes: bool = False) -> Flat:
    """LoRA: A normal with variance 1 / D, B zero (arXiv 2106.09685 section 4.1); with `magnitudes` DoRA, whose column
    norms are the base's at first (arXiv 2402.09353 eq. 5)."""
    options, additions = config.finetune, {}
    for index, (name, shape) in enumerate(target_modules(base, options).items()):
        (*leading, D, F), r = shape, options.rank
        subkey = jax.random.fold_in(key, index)
        additions[f"{name}/lora_a"] = jax.random.normal(subkey, (*leading, D, r)) / math.sqrt(D)
        additions[f"{name}/lora_b"] = jnp.zeros((*leading, r, F))
        if magnitudes:
            additions[f"{name}/dora"] = jnp.zeros((*leading, F))
    return additions


def adalora(base: Flat, config: Any, key: jax.Array) -> Flat:
    """AdaLoRA: P diag(0) Q with P and Q normal (arXiv 2303.10512 eq. 3), of rank `adalora.first_rank`."""
    options, additions = config.finetune, {}
    for index, (name, shape) in enumerate(target_modules(base, options).items()):
        (*leading, D, F), r = shape, options.adalora.first_rank
        first, second = jax.random.split(jax.random.fold_in(key, index))
        additions[f"{name}/lora_a"] = 0.02 * jax.random.normal(first, (*leading, D, r))
        additions[f"{name}/lora_b"] = 0.02 * jax.random.normal(second, (*leading, r, F))
        additions[f"{name}/lora_e"] = jnp.zeros((*leading, r))
    return additions


def ia3(base: Flat, config: Any, key: jax.Array) -> Flat:
    """(IA)^3: factors, ones at first, of keys, values and the input of an MLP's last product (arXiv 2205.05638, 3.3).

    Raises:
      ConfigError: the model has neither.
    """
    c, additions = config.model, {}
    for path, leaf in base.items():
        if match := re.search(r"^(.*(?:attention/qkv|cross/kv))/kernel$", path):
            additions[f"{match[1]}/ia3_kv"] = jnp.ones((*leaf.shape[:-2], c.kv_heads, 2, c.head_width))
        elif (match := re.search(r"^(.*mlp/down)/kernel$", path)) and c.mlp == "dense":
            additions[f"{match[1]}/ia3_in"] = jnp.ones(leaf.shape[:-1])
    return additions or _refused("ia3", "attention or MLP")


def adapters(base: Flat, config: Any, key: jax.Array) -> Flat:
    """Adapters: a bottleneck MLP after each sublayer, its last matrix zero (arXiv 1902.00751 section 2.1).

    Raises:
      ConfigError: the model has no sublayers.
    """
    additions, m = {}, config.finetune.bottleneck
    last = re.compile(r"^(.*(?:attention|cross)/out|.*mlp/down)/kernel$")
    for index, (path, leaf) in enumerate(base.items()):
        match = last.search(path)
        if not match:
            continue
        name, D = match[1].rsplit("/", 1)[0], leaf.shape[-1]
        leading = leaf.shape[:1] if "blocks" in path.split("/") else ()  # layers, not experts
        subkey = jax.random.fold_in(key, index)
        additions[f"{name}/adapter_down"] = jax.random.normal(subkey, (*leading, D, m)) / math.sqrt(D)
        additions[f"{name}/adapter_down_bias"] = jnp.zeros((*leading, m))
        additions[f"{name}/adapter_up"] = jnp.zeros((*leading, m, D))
        additions[f"{name}/adapter_up_bias"] = jnp.zeros((*leading, D))
    return additions or _refused("adapter", "attention or MLP")


def prefix(base: Flat, config: Any, key: jax.Array) -> Flat:
    """Prefix tuning: keys and values before those of each layer (arXiv 2101.00190 section 4.2), normal at first.

    Raises:
      ConfigError: the model has no self-attention.
    """
    c, additions = config.model, {}
    for index, (path, leaf) in enumerate(base.items()):
        if match := re.search(r"^(.*attention)/qkv/kernel$", path):
            shape = (*leaf.shape[:-2], config.finetune.length, c.kv_heads, c.head_width)
            subkeys = jax.random.split(jax.random.fold_in(key, index))
            for name, subkey in zip(("prefix_k", "prefix_v"), subkeys, strict=True):
                additions[f"{match[1]}/{name}"] = 0.02 * jax.random.normal(subkey, shape)
    return additions or _refused("prefix", "self-attention")


def prompt(base: Flat, config: Any, key: jax.Array) -> Flat:
    """Prompt tuning: vectors before each text, at first embeddings of random tokens (arXiv 2104.08691 section 3.1)."""
    table_VD, P = base["tokens/embedding"], config.finetune.length
    V = table_VD.shape[0]
    # A copy: trained and frozen parameters are donated separately.
    return {"tokens/prompt": jnp.array(table_VD[jax.random.choice(key, V, (P,), replace=V < P)])}


def _refused(method: str, what: str) -> Flat:
    raise ConfigError(f"finetune.method={method} adds to {what}, and this model has none")


METHODS: dict[str, Method] = {
    "full": Method(all_parameters, no_additions),
    "rule": Method(matching_rule, no_additions),
    "top": Method(top_layers, no_additions),
    "bitfit": Method(biases, no_additions),
    "lora": Method(no_parameters, lora),
    "dora": Method(no_parameters, partial(lora, magnitudes=True)),
    "adalora": Method(no_parameters, adalora),
    "ia3": Method(no_parameters, ia3),
    "adapter": Method(no_parameters, adapters),
    "prefix": Method(no_parameters, prefix),
    "prompt": Method(no_parameters, prompt),
}


def make_attached(options: Any) -> Attached | None:
    """Returns the settings of the additions of `config.finetune`, for `models.build`; None if it adds none."""
    method = METHODS[options.method]
    if method.adds is no_additions:
        return None
    rank = options.adalora.first_rank if options.method == "adalora" else options.rank
    scale = options.alpha / (math.sqrt(rank) if options.rank_stabilised else rank)  # arXiv 2312.03732 eq. 6
    prompt_length = options.length if options.method == "prompt" else 0
    return Attached(scale, options.dropout, options.parallel, prompt_length)


def build_model(config: Any, divided: Collection[str] = ()) -> nn.Module:
    """Builds the model of a run's config with its additions; `divided` is passed to `models.build`."""
    return models.build(config.model, config.train.dtype, divided, make_attached(config.finetune))


class Partition(NamedTuple):
    """A model's parameters in two parts: nested dictionaries."""

    tuned: dict[str, Any]  # trainable parameters
    frozen: dict[str, Any]  # all others


def partition(base: Mapping[str, Any], config: Any, key: jax.Array, fresh: Mapping[str, Any]) -> Partition:
    """Returns the initial parameters of a fine-tuning run. Pure: `jax.eval_shape` gives their shapes.

    Args:
      base: parameters of the base model.
      config: resolved config of the run.
      key: random key of the additions.
      fresh: newly initialized parameters of the model; those that the base lacks, such as a task head's, are taken from
        them and trained.

    Raises:
      ConfigError: a rule matches nothing, or the method does not apply to this model.
    """
    leaves, initial = paths.flat(base), paths.flat(fresh)
    method, options = METHODS[config.finetune.method], config.finetune
    shared = {path: leaf for path, leaf in leaves.items() if path in initial and leaf.shape == initial[path].shape}
    new = {path: leaf for path, leaf in initial.items() if path not in shared}
    train = set(method.trains(shared, options))
    if options.also:
        train |= set(paths.matching(shared, options.also, "finetune.also"))
    tuned, frozen = paths.split(paths.nested(shared), train)
    return Partition(paths.union(tuned, paths.nested(new | method.adds(shared, config, key))), frozen)


def merge(params: Any, options: Any) -> Any:
    """Merges the additions of `config.finetune`, if any, into the model's matrices; see `merge_additions`."""
    settings = make_attached(options)
    return params if settings is None else merge_additions(params, settings)


def merge_additions(params: Mapping[str, Any], settings: Attached) -> dict[str, Any]:
    """Returns parameters of the model without additions that give the same outputs.

    Raises:
      ConfigError: an addition cannot be merged into a matrix.
    """
    leaves = paths.flat(params)
    for path in leaves:
        if re.search(r"(adapter_|prefix_|tokens/prompt$)", path):
            raise ConfigError(f"{path} is no part of a matrix: adapters, prefixes and prompts cannot be merged")
    merged = {path: leaf for path, leaf in leaves.items() if not MERGEABLE.search(path)}
    for name in sorted({path.rsplit("/", 1)[0] for path in leaves if MERGEABLE.search(path)}):
        parts = {
            last: leaves.get(f"{name}/{last}") for last in ("lora_a", "lora_b", "lora_e", "dora", "ia3_kv", "ia3_in")
        }
        merged[f"{name}/kernel"] = _kernel(merged[f"{name}/kernel"], settings, **parts)
        if parts["ia3_kv"] is not None and f"{name}/bias" in merged:
            bias, factor = merged[f"{name}/bias"], parts["ia3_kv"]
            merged[f"{name}/bias"] = vmap_leading(attached.scale_keys_and_values, factor.ndim - 3)(bias, factor)
    return paths.nested(merged)


def vmap_leading(f: Callable[..., jax.Array], axes: int) -> Callable[..., jax.Array]:
    """Maps a function over that many leading axes."""
    return f if axes == 0 else jax.vmap(vmap_leading(f, axes - 1))


MERGEABLE = re.compile(r"/(lora_[abe]|dora|ia3_kv|ia3_in)$")


def _kernel(
    kernel: jax.Array, settings: Attached, lora_a: Any, lora_b: Any, lora_e: Any, dora: Any, ia3_kv: Any, ia3_in: Any
) -> jax.Array:
    if lora_a is not None:
        kernel = attached.merge_lora(settings.scale, kernel, lora_a, lora_b, lora_e, dora)
    if ia3_kv is not None:
        kernel = vmap_leading(attached.scale_keys_and_values, ia3_kv.ndim - 3)(kernel, ia3_kv)
    return kernel if ia3_in is None else kernel * ia3_in[..., None]
