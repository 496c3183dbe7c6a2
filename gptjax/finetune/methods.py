"""Ways to fine-tune: which of a model's parameters train, and which small ones are added to it, by rules of paths.

A method reads the base's paths and shapes, and a prompt the table of tokens, so that it goes on every model of the
house; what additions do there is in gptjax.finetune.attached. Before the first step each of them leaves the base's
answers as they are, but for prefixes and prompts, which are there to be read.
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

# Matrices that are no products of the model's inside: tables of words, routers, and heads.
EXCLUDED_MODULES = re.compile(r"(^|/)(head|router|task)(/|$)")


class Method(NamedTuple):
    """One way to fine-tune.

    Attributes:
      trains: of the base's own paths, those that train: `(shapes by path, config.finetune) -> paths`.
      adds: what is added, at first: `(base by path, config, key) -> arrays by path`.
    """

    trains: Callable[[Flat, Any], Iterable[str]]
    adds: Callable[[Flat, Any, jax.Array], Flat]


def no_parameters(base: Flat, options: Any) -> list[str]:
    """Nothing of the base's own."""
    return []


def no_additions(base: Flat, config: Any, key: jax.Array) -> Flat:
    """No addition."""
    return {}


def all_parameters(base: Flat, options: Any) -> list[str]:
    """Every parameter."""
    return list(base)


def matching_rule(base: Flat, options: Any) -> list[str]:
    """Those that `finetune.rule` matches."""
    return paths.matching(base, options.rule, "finetune.rule")


def top_layers(base: Flat, options: Any) -> list[str]:
    """Those of the last `finetune.top_layers` blocks, of an encoder-decoder of its decoder's, and all behind them.

    Raises:
      ConfigError: there are not that many blocks, or they are stacked.
    """
    own = {path: paths.depth(path) for path in base if not path.startswith("encoder/")}
    count = max((number for number in own.values() if number is not None), default=-1) + 1
    if not 1 <= options.top_layers <= count:
        stacked = "; model.scan_layers=False has them apart" if not count else ""
        raise ConfigError(f"finetune.top_layers is {options.top_layers}; it must be 1 to {count}{stacked}")
    first = count - options.top_layers
    behind = re.compile(r"(^|/)(final_norm|head|head_bias|task|transform|transform_norm)(/|$)")
    return [path for path, at in own.items() if behind.search(path) or (at is not None and at >= first)]


def biases(base: Flat, options: Any) -> list[str]:
    """Every bias (BitFit, arXiv 2106.10199).

    Raises:
      ConfigError: the base has none.
    """
    found = [path for path in base if path.rsplit("/", 1)[-1] == "bias"]
    if not found:
        raise ConfigError("finetune.method=bitfit trains biases, and this model has none (model.use_bias)")
    return found


def target_modules(base: Flat, options: Any) -> dict[str, tuple[int, ...]]:
    """Modules with a matrix [..., D, F] that `finetune.targets` matches, and its shape."""
    suffix = "/kernel"
    inside = [path for path in base if path.endswith(suffix) and not EXCLUDED_MODULES.search(path)]
    names = [path.removesuffix(suffix) for path in inside]
    return {name: base[name + suffix].shape for name in paths.matching(names, options.targets, "finetune.targets")}


def lora(base: Flat, config: Any, key: jax.Array, lengths: bool = False) -> Flat:
    """LoRA: A as normal as keeps a product's size, B zero (arXiv 2106.09685 section 4.1); with `lengths` DoRA, whose
    columns begin as long as the base's (arXiv 2402.09353 eq. 5)."""
    options, found = config.finetune, {}
    for index, (name, shape) in enumerate(target_modules(base, options).items()):
        (*leading, D, F), r = shape, options.rank
        own = jax.random.fold_in(key, index)
        found[f"{name}/lora_a"] = jax.random.normal(own, (*leading, D, r)) / math.sqrt(D)
        found[f"{name}/lora_b"] = jnp.zeros((*leading, r, F))
        if lengths:
            found[f"{name}/dora"] = jnp.zeros((*leading, F))
    return found


def adalora(base: Flat, config: Any, key: jax.Array) -> Flat:
    """AdaLoRA: P diag(0) Q with P and Q normal (arXiv 2303.10512 eq. 3), at the rank it begins with."""
    options, found = config.finetune, {}
    for index, (name, shape) in enumerate(target_modules(base, options).items()):
        (*leading, D, F), r = shape, options.adalora.first_rank
        first, second = jax.random.split(jax.random.fold_in(key, index))
        found[f"{name}/lora_a"] = 0.02 * jax.random.normal(first, (*leading, D, r))
        found[f"{name}/lora_b"] = 0.02 * jax.random.normal(second, (*leading, r, F))
        found[f"{name}/lora_e"] = jnp.zeros((*leading, r))
    return found


def ia3(base: Flat, config: Any, key: jax.Array) -> Flat:
    """(IA)^3: ones, times keys, values and what an MLP's last product reads (arXiv 2205.05638 section 3.3).

    Raises:
      ConfigError: the model has neither.
    """
    c, found = config.model, {}
    for path, leaf in base.items():
        if match := re.search(r"^(.*(?:attention/qkv|cross/kv))/kernel$", path):
            found[f"{match[1]}/ia3_kv"] = jnp.ones((*leaf.shape[:-2], c.kv_heads, 2, c.head_width))
        elif (match := re.search(r"^(.*mlp/down)/kernel$", path)) and c.mlp == "dense":
            found[f"{match[1]}/ia3_in"] = jnp.ones(leaf.shape[:-1])
    return found or _refused("ia3", "attention or MLP")


def adapters(base: Flat, config: Any, key: jax.Array) -> Flat:
    """A small MLP after each sublayer, its last matrix zero (arXiv 1902.00751 section 2.1).

    Raises:
      ConfigError: the model has no sublayers.
    """
    found, m = {}, config.finetune.bottleneck
    last = re.compile(r"^(.*(?:attention|cross)/out|.*mlp/down)/kernel$")
    for index, (path, leaf) in enumerate(base.items()):
        match = last.search(path)
        if not match:
            continue
        name, D = match[1].rsplit("/", 1)[0], leaf.shape[-1]
        leading = leaf.shape[:1] if "blocks" in path.split("/") else ()  # not its experts
        own = jax.random.fold_in(key, index)
        found[f"{name}/adapter_down"] = jax.random.normal(own, (*leading, D, m)) / math.sqrt(D)
        found[f"{name}/adapter_down_bias"] = jnp.zeros((*leading, m))
        found[f"{name}/adapter_up"] = jnp.zeros((*leading, m, D))
        found[f"{name}/adapter_up_bias"] = jnp.zeros((*leading, D))
    return found or _refused("adapter", "attention or MLP")


def prefix(base: Flat, config: Any, key: jax.Array) -> Flat:
    """Keys and values before each layer's own (arXiv 2101.00190 section 4.2), drawn as normal as heads are wide.

    Raises:
      ConfigError: the model has no attention of a sequence to itself.
    """
    c, found = config.model, {}
    for index, (path, leaf) in enumerate(base.items()):
        if match := re.search(r"^(.*attention)/qkv/kernel$", path):
            shape = (*leaf.shape[:-2], config.finetune.length, c.kv_heads, c.head_width)
            own = jax.random.split(jax.random.fold_in(key, index))
            for name, part in zip(("prefix_k", "prefix_v"), own, strict=True):
                found[f"{match[1]}/{name}"] = 0.02 * jax.random.normal(part, shape)
    return found or _refused("prefix", "attention of a sequence to itself")


def prompt(base: Flat, config: Any, key: jax.Array) -> Flat:
    """Vectors before each text, at first the embeddings of tokens drawn at random (arXiv 2104.08691 section 3.1)."""
    table_VD, P = base["tokens/embedding"], config.finetune.length
    V = table_VD.shape[0]
    # A copy: what is tuned and what is frozen are given up apart from each other.
    return {"tokens/prompt": jnp.array(table_VD[jax.random.choice(key, V, (P,), replace=V < P)])}


def _refused(method: str, what: str) -> Flat:
    raise ConfigError(f"finetune.method={method} adds to {what}, and this model has none")


METHODS: dict[str, Method] = {
    "full": Method(all_parameters, no_additions),
    "rule": Method(matching_rule, no_additions),
    "top": Method(top_layers, no_additions),
    "bitfit": Method(biases, no_additions),
    "lora": Method(no_parameters, lora),
    "dora": Method(no_parameters, partial(lora, lengths=True)),
    "adalora": Method(no_parameters, adalora),
    "ia3": Method(no_parameters, ia3),
    "adapter": Method(no_parameters, adapters),
    "prefix": Method(no_parameters, prefix),
    "prompt": Method(no_parameters, prompt),
}


def make_attached(options: Any) -> Attached | None:
    """How additions of `config.finetune` count, for `models.build`; None where there are none."""
    method = METHODS[options.method]
    if method.adds is no_additions:
        return None
    rank = options.adalora.first_rank if options.method == "adalora" else options.rank
    scale = options.alpha / (math.sqrt(rank) if options.rank_stabilised else rank)  # arXiv 2312.03732 eq. 6
    prompt_length = options.length if options.method == "prompt" else 0
    return Attached(scale, options.dropout, options.parallel, prompt_length)


def build_model(config: Any, divided: Collection[str] = ()) -> nn.Module:
    """The model of a run's config, with how its additions count; `divided` as of `models.build`."""
    return models.build(config.model, config.train.dtype, divided, make_attached(config.finetune))


class Partition(NamedTuple):
    """A model's parameters in two: nested dictionaries."""

    tuned: dict[str, Any]  # what trains
    frozen: dict[str, Any]  # the rest


def partition(base: Mapping[str, Any], config: Any, key: jax.Array, fresh: Mapping[str, Any]) -> Partition:
    """What a run that fine-tunes begins with. Pure: of shapes `jax.eval_shape` gives shapes.

    Args:
      base: the parameters it begins from.
      config: of the run, resolved.
      key: of what is drawn.
      fresh: the model's own parameters as they are drawn at first; those that the base lacks, such as a task head's,
        are taken from there, and train.

    Raises:
      ConfigError: a rule that matches nothing, or a method that this model has no place for.
    """
    leaves, known = paths.flat(base), paths.flat(fresh)
    method, options = METHODS[config.finetune.method], config.finetune
    own = {path: leaf for path, leaf in leaves.items() if path in known and leaf.shape == known[path].shape}
    new = {path: leaf for path, leaf in known.items() if path not in own}
    train = set(method.trains(own, options))
    if options.also:
        train |= set(paths.matching(own, options.also, "finetune.also"))
    tuned, frozen = paths.divided(paths.nested(own), train)
    return Partition(paths.union(tuned, paths.nested(new | method.adds(own, config, key))), frozen)


def merge(params: Any, options: Any) -> Any:
    """The parameters of a run with this `config.finetune` as those of a plain model; errors as of `folded`."""
    how = make_attached(options)
    return params if how is None else merge_additions(params, how)


def merge_additions(params: Mapping[str, Any], how: Attached) -> dict[str, Any]:
    """The model's own parameters alone, with what was added made part of them: they answer alike.

    Raises:
      ConfigError: something was added that no matrix can hold.
    """
    leaves = paths.flat(params)
    for path in leaves:
        if re.search(r"(adapter_|prefix_|tokens/prompt$)", path):
            raise ConfigError(f"{path} is no part of a matrix: adapters, prefixes and prompts cannot be merged")
    own = {path: leaf for path, leaf in leaves.items() if not MERGEABLE.search(path)}
    for name in sorted({path.rsplit("/", 1)[0] for path in leaves if MERGEABLE.search(path)}):
        parts = {
            last: leaves.get(f"{name}/{last}") for last in ("lora_a", "lora_b", "lora_e", "dora", "ia3_kv", "ia3_in")
        }
        own[f"{name}/kernel"] = _kernel(own[f"{name}/kernel"], how, **parts)
        if parts["ia3_kv"] is not None and f"{name}/bias" in own:
            bias, factor = own[f"{name}/bias"], parts["ia3_kv"]
            own[f"{name}/bias"] = vmap_leading(attached.scale_keys_and_values, factor.ndim - 3)(bias, factor)
    return paths.nested(own)


def vmap_leading(f: Callable[..., jax.Array], axes: int) -> Callable[..., jax.Array]:
    """The function of each slice along so many first axes."""
    return f if axes == 0 else jax.vmap(vmap_leading(f, axes - 1))


MERGEABLE = re.compile(r"/(lora_[abe]|dora|ia3_kv|ia3_in)$")


def _kernel(
    kernel: jax.Array, how: Attached, lora_a: Any, lora_b: Any, lora_e: Any, dora: Any, ia3_kv: Any, ia3_in: Any
) -> jax.Array:
    if lora_a is not None:
        kernel = attached.merge_lora(how.scale, kernel, lora_a, lora_b, lora_e, dora)
    if ia3_kv is not None:
        kernel = vmap_leading(attached.scale_keys_and_values, ia3_kv.ndim - 3)(kernel, ia3_kv)
    return kernel if ia3_in is None else kernel * ia3_in[..., None]
