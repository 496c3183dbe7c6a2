"""BERT, with each of its heads: masked words, next sentences, texts, tokens, spans and choices (arXiv 1810.04805)."""

from collections.abc import Mapping
from typing import Any

from gptjax.interop.hf_config import COMMON, fixed, key
from gptjax.interop.openai import ACTIVATIONS
from gptjax.interop.weight_mapping import NEUTRAL, Family, Tensor, head_width, hf_name_of, linear, lookup, norm, qkv
from gptjax.interop.weights import Stored

MASKED_HEAD = "cls.predictions.transform.dense.weight"
# transformers' classes: their keys of config.model, and their training objective.
ARCHITECTURES: dict[str, tuple[dict[str, Any], str]] = {
    "BertForMaskedLM": (dict(task="none", head_transform=True), "masked"),
    "BertForPreTraining": (
        dict(task="classification", pooling="pooler", head_transform=True), "masked + next_sentence",
    ),
    "BertForSequenceClassification": (dict(task="classification", pooling="pooler"), "classification"),
    "BertForTokenClassification": (dict(task="tagging"), "tagging"),
    "BertForQuestionAnswering": (dict(task="span"), "span"),
    "BertForMultipleChoice": (dict(task="choice", pooling="pooler"), "choice"),
    "BertModel": (dict(task="none"), "masked"),
}  # fmt: skip
TASK_ARCHITECTURES = dict(
    classification="BertForSequenceClassification", regression="BertForSequenceClassification",
    tagging="BertForTokenClassification", span="BertForQuestionAnswering", choice="BertForMultipleChoice",
)  # fmt: skip


KEYS = COMMON | dict(
    vocab_size=key("size", 30_522), hidden_size=key("size", 768), num_hidden_layers=key("layers", 12),
    num_attention_heads=key("size", 12), intermediate_size=key("size", 3072), hidden_act=key("name", "gelu"),
    hidden_dropout_prob=key("number", 0.1), max_position_embeddings=key("size", 512), type_vocab_size=key("size", 2),
    initializer_range=key("number", 0.02), layer_norm_eps=key("number", 1e-12), tie_word_embeddings=key("flag", True),
    architectures=key("names", None), id2label=key("object", None), num_labels=key("size", 2, null=True),
    is_decoder=fixed(False), add_cross_attention=fixed(False), is_encoder_decoder=fixed(False),
    position_embedding_type=fixed("absolute"),
)  # fmt: skip


def _infer_heads(h: Mapping[str, Any], tensors: Mapping[str, Stored]) -> dict[str, Any]:
    # bert-base's checkpoint has both heads of pre-training, but its config names the class of masked words only.
    kind = (h["architectures"] or ["BertModel"])[0]
    names = {name.removeprefix("bert.") for name in tensors}
    if kind in ("BertForMaskedLM", "BertModel") and {"cls.seq_relationship.weight", "pooler.dense.weight"} <= names:
        kind = "BertForPreTraining"
    elif kind == "BertModel" and MASKED_HEAD in names:
        kind = "BertForMaskedLM"
    return {**h, "architectures": [kind]}


def _model(h: Mapping[str, Any]) -> dict[str, Any]:
    D, H = h["hidden_size"], h["num_attention_heads"]
    kind = (h["architectures"] or ["BertModel"])[0]
    heads, objective = lookup(ARCHITECTURES, kind, "architectures")
    labels = len(h["id2label"] or ()) or h["num_labels"] or 2
    if kind == "BertForSequenceClassification" and labels == 1:
        heads, objective, labels = heads | dict(task="regression"), "regression", 2
    elif heads["task"] not in ("classification", "tagging") or kind == "BertForPreTraining":
        labels = 2
    return NEUTRAL | dict(
        arch="encoder", layers=h["num_hidden_layers"], heads=H, kv_heads=H, width=D,
        head_width=head_width(D, H, "hidden_size={} and num_attention_heads={}"),
        mlp_width=h["intermediate_size"], context=h["max_position_embeddings"], vocabulary=h["vocab_size"],
        types=h["type_vocab_size"], embedding_norm=True, norm_position="post",
        norm_epsilon=h["layer_norm_eps"],
        activation=lookup(ACTIVATIONS, h["hidden_act"], "hidden_act"),
        tied_head=h["tie_word_embeddings"] or not heads.get("head_transform", False),
        head_bias=heads.get("head_transform", False), labels=labels, dropout=h["hidden_dropout_prob"],
        init_std=h["initializer_range"], objective=objective, **heads,
    )  # fmt: skip


def architecture(m: Mapping[str, Any]) -> str:
    """Returns transformers' class for a `config.model` with `objective`; reading it back refuses what it lacks."""
    if m["task"] == "classification" and m["head_transform"] and "next_sentence" in m.get("objective", ""):
        return "BertForPreTraining"
    return TASK_ARCHITECTURES.get(m["task"], "BertForMaskedLM" if m["head_transform"] else "BertModel")


def _config(m: Mapping[str, Any]) -> dict[str, Any]:
    labels = 1 if m["task"] == "regression" else m["labels"] if m["task"] in ("classification", "tagging") else 2
    problem = {"problem_type": "regression"} if m["task"] == "regression" else {}
    return dict(
        architectures=[architecture(m)], num_hidden_layers=m["layers"], num_attention_heads=m["heads"],
        hidden_size=m["width"], intermediate_size=m["mlp_width"], max_position_embeddings=m["context"],
        vocab_size=m["vocabulary"], type_vocab_size=max(m["types"], 1), layer_norm_eps=m["norm_epsilon"],
        hidden_act=hf_name_of(ACTIVATIONS, m["activation"]), tie_word_embeddings=m["tied_head"],
        id2label={str(i): f"LABEL_{i}" for i in range(labels)}, label2id={f"LABEL_{i}": i for i in range(labels)},
        hidden_dropout_prob=m["dropout"], attention_probs_dropout_prob=m["dropout"], initializer_range=m["init_std"],
        **problem,
    )  # fmt: skip


def _tensors(m: Mapping[str, Any]) -> list[Tensor]:
    embeddings = "bert.embeddings"
    tensors = [Tensor("tokens/embedding", (f"{embeddings}.word_embeddings.weight",))]
    tensors += [Tensor("positions/embedding", (f"{embeddings}.position_embeddings.weight",))]
    tensors += [Tensor("types", (f"{embeddings}.token_type_embeddings.weight",))]
    tensors += norm("embedding_norm", f"{embeddings}.LayerNorm")
    for i in range(m["layers"]):
        name, hf_name = f"block_{i}", f"bert.encoder.layer.{i}"
        projections = [f"self.{projection}" for projection in ("query", "key", "value")]
        tensors += qkv(f"{name}/attention/qkv", f"{hf_name}.attention", m, projections)
        tensors += linear(f"{name}/attention/out", f"{hf_name}.attention.output.dense", bias=True)
        tensors += norm(f"{name}/attention_norm", f"{hf_name}.attention.output.LayerNorm")
        tensors += linear(f"{name}/mlp/up", f"{hf_name}.intermediate.dense", bias=True)
        tensors += linear(f"{name}/mlp/down", f"{hf_name}.output.dense", bias=True)
        tensors += norm(f"{name}/mlp_norm", f"{hf_name}.output.LayerNorm")
    if m["head_transform"]:
        tensors += linear("transform", "cls.predictions.transform.dense", bias=True)
        tensors += norm("transform_norm", "cls.predictions.transform.LayerNorm")
        tensors += [Tensor("head_bias", (_bias(m),))]
    return tensors + _task(m)


def _task(m: Mapping[str, Any]) -> list[Tensor]:
    if m["task"] == "none":
        return []
    pooler = linear("task/pooler", "bert.pooler.dense", bias=True) if m["pooling"] == "pooler" else []
    pre_training = architecture(m) == "BertForPreTraining"
    name = "cls.seq_relationship" if pre_training else "qa_outputs" if m["task"] == "span" else "classifier"
    return [*pooler, *linear("task", name, bias=True)]


def _bias(m: Mapping[str, Any]) -> str:
    # An untied head has its own bias, and the other one is not read.
    return "cls.predictions.bias" if m["tied_head"] else "cls.predictions.decoder.bias"


def _tied(m: Mapping[str, Any]) -> dict[str, str]:
    return {} if not m["head_transform"] else {"cls.predictions.decoder.bias": _bias(m)}


BERT = Family(
    "BertForMaskedLM",
    "bert.",
    r"position_ids$|^bert\.pooler\.|^cls\.(seq_relationship\.|predictions\.bias$)",
    KEYS,
    _model,
    _config,
    _tensors,
    head="cls.predictions.decoder.weight",
    unprefixed=("cls.", "classifier.", "qa_outputs."),
    tied=_tied,
    renames={r"LayerNorm\.gamma$": "LayerNorm.weight", r"LayerNorm\.beta$": "LayerNorm.bias"},
    infer=_infer_heads,
)
