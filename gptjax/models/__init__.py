"""Models: token ids in, logits out. Pure Flax Linen modules, used only through `init` and `apply`.

Nothing here reads text, knows an objective or an optimizer, or names a mesh axis, and nothing here imports another
package of gptjax. Array names end in their shape, one letter an axis:

    B batch        T query/target length   S key/source length   N = B * T, flattened
    D model width  H query heads           G key/value heads     K head width
    F feed-forward width                   V vocabulary          L layers
    E experts      k experts per token
    M width of an encoder's memory         P columns of a recurrent cell's gates
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
from gptjax.models.heads import HEADS, POOLINGS
from gptjax.models.kernels import FOR_FEW_ROWS, KERNELS, resolved
from gptjax.models.kernels.reference import TokenLoss
from gptjax.models.layers import ACTIVATIONS, GATES, NORMS, RESIDUAL_INITS
from gptjax.models.mlp import MLPS
from gptjax.models.model import Interceptor
from gptjax.models.positions import POSITIONS, ROTARY_SCALINGS
from gptjax.models.recurrent.attention import ATTENTIONS
from gptjax.models.recurrent.cells import CELLS
from gptjax.models.recurrent.model import Recurrent
from gptjax.models.seq2seq import DECODERS, ENCODERS, Seq2Seq
from gptjax.models.stacking import unstack
from gptjax.models.transformer import REMATS, RESIDUALS

# Each has `features`, `asked`, `read` (both), `table` and `config`; what writes text `extend` and `empty` too.
MODELS: dict[str, Any] = {"gpt": GPT, "encoder": Encoder, "seq2seq": Seq2Seq, "recurrent": Recurrent}

# What the keys of `config.model` choose among.
CHOICES: dict[str, Mapping[str, Any]] = {
    "model.arch": MODELS,
    "model.encoder": ENCODERS,
    "model.decoder": DECODERS,
    "model.cell": CELLS,
    "model.attention": ATTENTIONS,
    "model.task": HEADS,
    "model.pooling": POOLINGS,
    "model.positions": POSITIONS,
    "model.rotary.scaling": ROTARY_SCALINGS,
    "model.norm": NORMS,
    "model.norm_position": RESIDUALS,
    "model.mlp": MLPS,
    "model.activation": ACTIVATIONS | GATES,
    "model.residual_init": RESIDUAL_INITS,
    "model.parametrization": dict.fromkeys(parametrization.PARAMETRIZATIONS),
    "model.remat": REMATS,
    "model.kernels": {"auto": None} | {name: own for name, own in KERNELS.items() if not own.turned},
}


class Output(NamedTuple):
    """A forward pass: what the head reads and the head's rows, which make logits, and what the model says of itself."""

    x_BTD: jax.Array
    table_VD: jax.Array  # float32
    penalty: jax.Array  # to be added to the loss per token, nats; 0 but for mixtures of experts
    metrics: dict[str, jax.Array]  # means over layers, by name
    ahead_nBTD: tuple[jax.Array, ...] = ()  # what the head reads for the tokens after the next one, nearest first


def build(
    config: Any, dtype: str = "float32", divided: Collection[str] = (), attached: Interceptor | None = None
) -> nn.Module:
    """The model that `config` (`config.model` of a run, resolved) describes.

    Args:
      config: see configs/base.py.
      dtype: of the arithmetic.
      divided: what is divided among devices, as gptjax.models.kernels.resolved takes it.
      attached: what else is done with its modules' methods, see gptjax.models.model.Model.
    """
    config = ConfigDict(config)
    config.kernels = resolved(config.kernels, divided)
    return MODELS[config.arch](config=FrozenConfigDict(config), dtype=dtype, attached=attached)


def example(model: nn.Module) -> dict[str, jax.Array]:
    """The least that a model reads: a token, and of encoder-decoders a source of one token."""
    one = jnp.ones((1, 1), jnp.int32)
    source = {"source_BS": one, "source_segments_BS": one} if kind(model) == "seq2seq" else {}
    return {"ids_BT": jnp.zeros((1, 1), jnp.int32)} | source


def init(model: nn.Module, key: jax.Array) -> Any:
    """Its first parameters."""

    def all_of_it(model: Any, **read: jax.Array) -> Any:
        features = model.features(**read)
        answers = model.task(features, read["ids_BT"] >= 0) if model.config.task != "none" else None
        ahead = model.ahead(features) if model.config.mtp_depth else ()
        return model.asked(features), model.table(), answers, ahead

    read: Any = example(model)
    params = model.init(key, **read, method=all_of_it)["params"]
    return parametrization.drawn(params, model.config)


def shapes(model: nn.Module) -> Any:
    """The tree of its parameters as `jax.ShapeDtypeStruct`s; nothing is allocated."""
    return jax.eval_shape(lambda: init(model, jax.random.key(0)))


def kind(model: nn.Module) -> str:
    """What it is: a "decoder", an "encoder" or a "seq2seq"."""
    found: str = model.kind  # type: ignore[attr-defined]
    return found


def readable(model: nn.Module) -> int:
    """How many ids it reads: those of its vocabulary, which it may say too, and those of what is attached to it."""
    return int(model.config.vocabulary + getattr(model.attached, "prompt_length", 0))  # type: ignore[attr-defined]


def is_recurrent(config: Any) -> bool:
    """Whether what `config.model` describes keeps a state of all tokens that it has read: none can be taken back."""
    return config.arch == "recurrent" or (config.arch == "seq2seq" and config.decoder in CELLS)


def reads(model: nn.Module, batch: Mapping[str, Any]) -> dict[str, Any]:
    """What of a batch the model reads, by the names of its arguments."""
    also = {name: batch[name] for name in model.also_reads if name in batch}  # type: ignore[attr-defined]
    return {"ids_BT": batch["inputs_BT"]} | also


def perturbed(model: nn.Module, batch: Mapping[str, Any]) -> tuple[str, tuple[int, ...]]:
    """By which name of a batch what is embedded first can be shifted, and the shape of that shift."""
    name, ids = ("BSD", "source_BS") if kind(model) == "seq2seq" else ("BTD", "inputs_BT")
    return f"perturbation_{name}", (*batch[ids].shape, model.config.width)  # type: ignore[attr-defined]


def forward(model: nn.Module, params: Any, read: Mapping[str, Any], dropout: jax.Array | None = None) -> Output:
    """What the model makes of token ids.

    Args:
      model: as `build` gives it.
      params: of the model.
      read: arguments of its `read`, such as `reads` gives them.
      dropout: the random key of dropout, or None for none.
    """

    def heads(model: Any) -> Any:
        features, segments_BT = model.features(**read, deterministic=dropout is None), read.get("segments_BT")
        ahead = model.ahead(features, segments_BT, dropout is None) if model.config.mtp_depth else ()
        return model.asked(features), model.table(), ahead

    (x_BTD, table_VD, ahead), said = _applied(model, params, heads, dropout)
    penalty = sum(_by_name(said.get("losses", {}), jnp.sum).values(), start=jnp.zeros(()))
    return Output(x_BTD, table_VD, penalty, _by_name(said.get("metrics", {}), jnp.mean), ahead)


def answer(model: nn.Module, params: Any, read: Mapping[str, Any], dropout: jax.Array | None = None) -> jax.Array:
    """What the model's task head says, float32; see gptjax.models.heads.TaskHead.

    Where ids are [B, C, T], of C choices a row, the head's axis [B] becomes [B, C].
    """
    ids = read["ids_BT"]
    flat = {name: x.reshape(-1, *x.shape[ids.ndim - 1 :]) for name, x in read.items()}
    real_BT = flat.get("segments_BT", jnp.ones_like(flat["ids_BT"])) > 0

    def answered(model: Any) -> jax.Array:
        found: jax.Array = model.task(model.features(**flat, deterministic=dropout is None), real_BT, dropout is None)
        return found

    answers: jax.Array = _applied(model, params, answered, dropout)[0]
    return answers.reshape(*ids.shape[:-1], *answers.shape[1:])


def _applied(model: nn.Module, params: Any, method: Callable[[Any], Any], dropout: jax.Array | None) -> Any:
    rngs = None if dropout is None else {"dropout": dropout}
    return model.apply({"params": params}, rngs=rngs, mutable=["losses", "metrics"], method=method)


def _by_name(tree: Any, over_layers: Callable[[jax.Array], jax.Array]) -> dict[str, jax.Array]:
    found: dict[str, list[jax.Array]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        found.setdefault(path[-1].key, []).append(jnp.ravel(leaf))
    return {name: over_layers(jnp.concatenate(leaves)) for name, leaves in found.items()}


def cross_entropy(model: nn.Module, said: Output, targets_BT: Any, weights_BT: Any) -> jax.Array:
    """Sum over positions of weight * nats that the model needs for the target; see gptjax.models.kernels.reference."""
    c = model.config
    return KERNELS[c.kernels].cross_entropy(said.x_BTD, said.table_VD, targets_BT, weights_BT, c.logit_softcap)


def token_loss(
    model: nn.Module, said: Output, targets_BT: Any, weights_BT: Any, smoothing: float = 0.0, z_loss: float = 0.0
) -> TokenLoss:
    """Cross-entropy with label smoothing and z-loss, and what it is without; see gptjax.models.kernels.reference."""
    c = model.config
    kernel = KERNELS[c.kernels].token_loss
    return kernel(said.x_BTD, said.table_VD, targets_BT, weights_BT, c.logit_softcap, smoothing, z_loss)


def logits(model: nn.Module, params: Any, ids_BT: Any, *others: Any, **more: Any) -> jax.Array:
    """What the model says, without dropout: float32 [B, T, V] for each position; arguments as of its `features`."""
    logits_BTV: Any = model.apply({"params": params}, ids_BT, *others, **more)
    return logits_BTV


def empty(model: nn.Module, rows: int, capacity: int, ahead: int, dtype: str, source: int = 0) -> Cache:
    """A cache that has read nothing.

    Args:
      model: a decoder, or an encoder-decoder, whose cache has room for a source.
      rows: B.
      capacity: the most tokens that a row ever holds.
      ahead: the most tokens that are written at once, or written and then taken back.
      dtype: of keys and values.
      source: S, how many tokens of a source there is room for; 0: nothing is kept yet, until `listened`.
    """

    def kept(model: Any) -> Any:
        return model.empty(rows, capacity, ahead, dtype)

    cache = Cache(model.apply({}, method=kept), jnp.zeros(rows, jnp.int32))
    if not source:
        return cache
    blank = jax.ShapeDtypeStruct((rows, source), jnp.int32)

    def heard(params: Any, blank: Any) -> Any:
        return encode_source(model, params, blank, blank, cache).heard

    shapes_of_it: Any = jax.eval_shape(heard, shapes(model), blank)
    return cache._replace(heard=jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes_of_it))


def encode_source(model: nn.Module, params: Any, source_BS: Any, source_segments_BS: Any, cache: Cache) -> Cache:
    """The cache of an encoder-decoder that has heard a source: segments are 1, and 0 for padding.

    What it heard is kept in the dtype that its layers' keys and values, or states, are kept in.
    """

    dtype = jax.tree.leaves(cache.layers)[0].dtype

    def heard(model: Any) -> Any:
        return model.hear(source_BS, source_segments_BS)

    def kept(x: jax.Array) -> jax.Array:
        return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x

    return cache._replace(heard=jax.tree.map(kept, model.apply({"params": params}, method=heard)))


def extend(
    model: nn.Module, params: Any, ids_BT: Any, cache: Cache, count_B: Any = None
) -> tuple[jax.Array, jax.Array, Cache]:
    """What the model makes of tokens that follow those in a cache: x_BTD and table_VD, as of `Output`, and the cache.

    Args:
      model: with unrolled layers.
      params: of the model.
      ids_BT: token ids.
      cache: as `empty` gives it, with `ahead` at least T.
      count_B: how many ids of each row are real, at least 1, the others' x means nothing; None: all.
    """

    def all_of_it(model: Any) -> tuple[jax.Array, jax.Array, Cache]:
        x_BTD, extended = model.extend(ids_BT, cache, count)
        return x_BTD, model.table(), extended

    B, T = ids_BT.shape
    count = jnp.full(B, T, jnp.int32) if count_B is None else count_B
    said: Any = model.apply({"params": params}, method=all_of_it)
    return said


def next_logits(model: nn.Module, x: jax.Array, table_VD: jax.Array) -> jax.Array:
    """Float32 logits [..., V] of what the head reads, [..., D]."""
    return KERNELS[model.config.kernels].unembed(x, table_VD, model.config.logit_softcap)


def unrolled(model: nn.Module, params: Any) -> tuple[nn.Module, Any]:
    """The same model with a folder of parameters per block, and nothing that only training needs."""
    config = ConfigDict(model.config)
    scanned, config.scan_layers, config.remat = config.scan_layers, False, "none"
    return model.clone(config=FrozenConfigDict(config)), unstack(params) if scanned else params


def for_few_rows(model: nn.Module, params: Any) -> tuple[nn.Module, Any]:
    """The same model, unrolled, with its products stored as they are fastest for the few rows that decoding has.

    It never says what `config.suppress_tokens` lists.

    Parameters, of JAX or NumPy, become arrays of JAX in the dtype that products read them in, so that no step has to
    make them so anew.
    """
    model, params = unrolled(model, suppress(params, model.config))
    config = ConfigDict(model.config)
    if model.dtype == "float32":
        config.kernels = FOR_FEW_ROWS.get(config.kernels, config.kernels)
    turns = KERNELS[config.kernels].turned

    def stored(path: Any, leaf: jax.Array) -> jax.Array:
        names = [part.key for part in path]
        if names[-1] not in ("kernel", "embedding") or "router" in names:
            return jnp.asarray(leaf)
        read = jnp.asarray(leaf, model.dtype)
        return read.T if turns and names[-1] == "kernel" and read.ndim == 2 else read

    params = jax.tree_util.tree_map_with_path(stored, params)
    return model.clone(config=FrozenConfigDict(config)), params
