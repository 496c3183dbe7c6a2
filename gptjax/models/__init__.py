"""Models: token ids in, logits out. Pure Flax Linen modules, used only through `init` and `apply`.

This package handles no text, objectives or optimizers, names no mesh axis, and imports gptjax.config alone.
Array names end in their shape, one letter per axis:

    B batch        T query/target length   S key/source length   N = B * T, flattened
    D model width  H query heads           G key/value heads     K head width
    F feed-forward width                   V vocabulary          L layers
    E experts      k experts per token
    M width of an encoder's output         P columns of a recurrent cell's gates
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn
from ml_collections import ConfigDict, FrozenConfigDict

from gptjax.models import parametrization
from gptjax.models.cache import Cache
from gptjax.models.embedder import suppress
from gptjax.models.encoder import Encoder
from gptjax.models.gpt import GPT
from gptjax.models.kernels import FOR_DECODING, KERNELS, resolve_kernels
from gptjax.models.kernels.reference import TokenLoss
from gptjax.models.model import Interceptor
from gptjax.models.recurrent.cells import CELLS
from gptjax.models.recurrent.model import Recurrent
from gptjax.models.seq2seq import Seq2Seq
from gptjax.models.stacking import unstack

# All have `features`, `pre_logits`, `hidden`, `unembedding` and `config`; decoders have `extend` and `init_cache` too.
MODELS: dict[str, Any] = {"gpt": GPT, "encoder": Encoder, "seq2seq": Seq2Seq, "recurrent": Recurrent}


class Output(NamedTuple):
    """Output of a forward pass: hidden states and unembedding, whose product is the logits, and auxiliary losses."""

    x_BTD: jax.Array
    unembedding_VD: jax.Array  # float32
    penalty: jax.Array  # added to the loss per token, nats; 0 without a mixture of experts
    metrics: dict[str, jax.Array]  # means over layers, by name
    mtp_nBTD: tuple[jax.Array, ...] = ()  # hidden states of the multi-token prediction heads, nearest token first


def build(
    config: Any, dtype: str = "float32", sharded: Collection[str] = (), attached: Interceptor | None = None
) -> nn.Module:
    """Builds the model that `config` (`config.model` of a run, resolved) describes.

    Args:
      config: see gptjax.models.options.
      dtype: of the arithmetic.
      sharded: the parts that are sharded over devices, see gptjax.models.kernels.resolve_kernels.
      attached: an interceptor of the methods of its modules, see gptjax.models.model.Model.
    """
    config = ConfigDict(config)
    config.kernels = resolve_kernels(config.kernels, sharded)
    return MODELS[config.arch](config=FrozenConfigDict(config), dtype=dtype, attached=attached)


def dummy_inputs(model: nn.Module) -> dict[str, jax.Array]:
    """The smallest inputs of a model: one token, and for encoder-decoders a source of one token."""
    one = jnp.ones((1, 1), jnp.int32)
    source = {"source_BS": one, "source_segments_BS": one} if kind(model) == "seq2seq" else {}
    return {"ids_BT": jnp.zeros((1, 1), jnp.int32)} | source


def init(model: nn.Module, key: jax.Array) -> Any:
    """Initializes the parameters of a model."""

    def all_parts(model: Any, **inputs: jax.Array) -> Any:
        features = model.features(**inputs)
        task = model.task(features, inputs["ids_BT"] >= 0) if model.config.task != "none" else None
        mtp = model.mtp_hidden(features) if model.config.mtp_depth else ()
        return model.pre_logits(features), model.unembedding(), task, mtp

    inputs: Any = dummy_inputs(model)
    params = model.init(key, **inputs, method=all_parts)["params"]
    return parametrization.scale_init(params, model.config)


def shapes(model: nn.Module) -> Any:
    """The tree of the model's parameters as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(lambda: init(model, jax.random.key(0)))


def kind(model: nn.Module) -> str:
    """Returns "decoder", "encoder" or "seq2seq"."""
    name: str = model.kind  # type: ignore[attr-defined]
    return name


def num_embeddings(model: nn.Module) -> int:
    """The number of token ids that the model accepts: its vocabulary, and the ids of a tuned prompt."""
    return int(model.config.vocabulary + getattr(model.attached, "prompt_length", 0))  # type: ignore[attr-defined]


def is_recurrent(config: Any) -> bool:
    """Returns True if the model of `config.model` keeps a recurrent state, from which no token can be removed."""
    return config.arch == "recurrent" or (config.arch == "seq2seq" and config.decoder in CELLS)


def select_inputs(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Selects the model's inputs from a batch, by the names of its arguments."""
    extra = {name: batch[name] for name in model.extra_inputs if name in batch}  # type: ignore[attr-defined]
    return {"ids_BT": batch["inputs_BT"]} | extra


def perturbation_spec(model: nn.Module, batch: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """The batch key and the shape of a perturbation of the model's first embeddings."""
    name, ids = ("BSD", "source_BS") if kind(model) == "seq2seq" else ("BTD", "inputs_BT")
    return f"perturbation_{name}", (*batch[ids].shape, model.config.width)  # type: ignore[attr-defined]


def forward(model: nn.Module, params: Any, inputs: Mapping[str, Any], dropout: jax.Array | None = None) -> Output:
    """Runs a forward pass.

    Args:
      model: from `build`.
      params: of the model.
      inputs: arguments of its `features`, such as `select_inputs` returns.
      dropout: the random key of dropout, or None for none.
    """

    def heads(model: Any) -> Any:
        features, segments_BT = model.features(**inputs, deterministic=dropout is None), inputs.get("segments_BT")
        mtp = model.mtp_hidden(features, segments_BT, dropout is None) if model.config.mtp_depth else ()
        return model.pre_logits(features), model.unembedding(), mtp

    (x_BTD, unembedding_VD, mtp), sown = _apply(model, params, heads, dropout)
    penalty = sum(_reduce_by_name(sown.get("losses", {}), jnp.sum).values(), start=jnp.zeros(()))
    return Output(x_BTD, unembedding_VD, penalty, _reduce_by_name(sown.get("metrics", {}), jnp.mean), mtp)


def task_output(
    model: nn.Module, params: Any, inputs: Mapping[str, Any], dropout: jax.Array | None = None
) -> jax.Array:
    """Runs the model and its task head, float32; see gptjax.models.heads.TaskHead.

    With ids [B, C, T], for C choices a row, the axis [B] of the head's output becomes [B, C].
    """
    ids = inputs["ids_BT"]
    flat = {name: x.reshape(-1, *x.shape[ids.ndim - 1 :]) for name, x in inputs.items()}
    mask_BT = flat.get("segments_BT", jnp.ones_like(flat["ids_BT"])) > 0

    def run_task(model: Any) -> jax.Array:
        output: jax.Array = model.task(model.features(**flat, deterministic=dropout is None), mask_BT, dropout is None)
        return output

    output: jax.Array = _apply(model, params, run_task, dropout)[0]
    return output.reshape(*ids.shape[:-1], *output.shape[1:])


def _apply(model: nn.Module, params: Any, method: Callable[[Any], Any], dropout: jax.Array | None) -> Any:
    rngs = None if dropout is None else {"dropout": dropout}
    return model.apply({"params": params}, rngs=rngs, mutable=["losses", "metrics"], method=method)


def _reduce_by_name(tree: Any, over_layers: Callable[[jax.Array], jax.Array]) -> dict[str, jax.Array]:
    by_name: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        by_name.setdefault(path[-1].key, []).append(jnp.ravel(leaf))
    return {name: over_layers(jnp.concatenate(leaves)) for name, leaves in by_name.items()}


def cross_entropy(model: nn.Module, output: Output, targets_BT: Any, weights_BT: Any) -> jax.Array:
    """Sum over positions of weight * -log p(target), in nats; see gptjax.models.kernels.reference."""
    c = model.config
    kernel = KERNELS[c.kernels].cross_entropy
    return kernel(output.x_BTD, output.unembedding_VD, targets_BT, weights_BT, c.logit_softcap)


def token_loss(
    model: nn.Module, output: Output, targets_BT: Any, weights_BT: Any, smoothing: float = 0.0, z_loss: float = 0.0
) -> TokenLoss:
    """Cross-entropy with label smoothing and z-loss, and without both; see gptjax.models.kernels.reference."""
    c = model.config
    kernel = KERNELS[c.kernels].token_loss
    return kernel(output.x_BTD, output.unembedding_VD, targets_BT, weights_BT, c.logit_softcap, smoothing, z_loss)


def logits(model: nn.Module, params: Any, ids_BT: Any, *others: Any, **more: Any) -> jax.Array:
    """Float32 logits [B, T, V] without dropout; arguments are those of the model's `features`."""
    logits_BTV: Any = model.apply({"params": params}, ids_BT, *others, **more)
    return logits_BTV


def init_cache(model: nn.Module, rows: int, capacity: int, ahead: int, dtype: str, source: int = 0) -> Cache:
    """Initializes an empty cache.

    Args:
      model: a decoder, or an encoder-decoder, whose cache has room for a source.
      rows: B.
      capacity: the maximum number of tokens of a row.
      ahead: the maximum number of tokens that are written at once, or written and then discarded.
      dtype: of keys and values.
      source: S, the maximum number of source tokens; 0 leaves the encoder output out, until `encode_source`.
    """

    def layers(model: Any) -> Any:
        return model.init_cache(rows, capacity, ahead, dtype)

    cache = Cache(model.apply({}, method=layers), jnp.zeros(rows, jnp.int32))
    if not source:
        return cache
    blank = jax.ShapeDtypeStruct((rows, source), jnp.int32)

    def encoder_output(params: Any, blank: Any) -> Any:
        return encode_source(model, params, blank, blank, cache).encoder_output

    struct: Any = jax.eval_shape(encoder_output, shapes(model), blank)
    return cache._replace(encoder_output=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), struct))


def encode_source(model: nn.Module, params: Any, source_BS: Any, source_segments_BS: Any, cache: Cache) -> Cache:
    """Encodes a source and puts the encoder output into the cache of an encoder-decoder.

    Segments are 1, and 0 for padding. The encoder output is cached in the dtype of the layers' keys and values, or
    states.
    """

    dtype = jax.tree.leaves(cache.layers)[0].dtype

    def encode(model: Any) -> Any:
        return model.encode_source(source_BS, source_segments_BS)

    def cast(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return cache._replace(encoder_output=jax.tree.map(cast, model.apply({"params": params}, method=encode)))


def extend(
    model: nn.Module, params: Any, ids_BT: Any, cache: Cache, count_B: Any = None
) -> tuple[jax.Array, jax.Array, Cache]:
    """Runs the model on tokens that follow those in a cache.

    Args:
      model: with unrolled layers.
      params: of the model.
      ids_BT: token ids.
      cache: from `init_cache`, with `ahead` at least T.
      count_B: the number of valid ids of each row, at least 1; the others' x_BTD is undefined. None: all.

    Returns:
      x_BTD and unembedding_VD, as in `Output`, and the extended cache.
    """

    def all_parts(model: Any) -> tuple[jax.Array, jax.Array, Cache]:
        x_BTD, extended = model.extend(ids_BT, cache, count)
        return x_BTD, model.unembedding(), extended

    B, T = ids_BT.shape
    count = jnp.full(B, T, jnp.int32) if count_B is None else count_B
    outputs: Any = model.apply({"params": params}, method=all_parts)
    return outputs


def next_logits(model: nn.Module, x: jax.Array, unembedding_VD: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D]."""
    return KERNELS[model.config.kernels].unembed(x, unembedding_VD, model.config.logit_softcap)


def unroll_layers(model: nn.Module, params: Any) -> tuple[nn.Module, Any]:
    """The same model with a folder of parameters per block, without scan and rematerialization."""
    config = ConfigDict(model.config)
    scanned, config.scan_layers, config.remat = config.scan_layers, False, "none"
    return model.clone(config=FrozenConfigDict(config)), unstack(params) if scanned else params


def for_decoding(model: nn.Module, params: Any) -> tuple[nn.Module, Any]:
    """The same model, unrolled, with kernels stored in the layout that is fastest for the few rows of decoding.

    Token ids in `config.suppress_tokens` are suppressed. Parameters, JAX or NumPy arrays, become JAX arrays in the
    dtype that products read them in, so that no step converts them again.
    """
    model, params = unroll_layers(model, suppress(params, model.config))
    config = ConfigDict(model.config)
    if model.dtype == "float32":
        config.kernels = FOR_DECODING.get(config.kernels, config.kernels)
    transposed = KERNELS[config.kernels].transposed

    def store(path: Any, leaf: jax.Array) -> jax.Array:
        names = [part.key for part in path]
        if names[-1] not in ("kernel", "embedding") or "router" in names:
            return jnp.asarray(leaf)
        array = jnp.asarray(leaf, model.dtype)
        return array.T if transposed and names[-1] == "kernel" and array.ndim == 2 else array

    params = jax.tree_util.tree_map_with_path(store, params)
    return model.clone(config=FrozenConfigDict(config)), params
