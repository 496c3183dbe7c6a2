"""Converts BERT's `vocab.txt` to a `tokenizer.json`. Pure functions."""

from collections.abc import Mapping
from typing import Any

from gptjax.config.errors import DataError

SPECIAL = {
    "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]", "pad_token": "[PAD]", "mask_token": "[MASK]",
}  # fmt: skip


def describe(text: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a `tokenizer.json` of WordPiece (arXiv 1609.08144) with BERT's pre-tokenizer.

    Args:
      text: content of `vocab.txt`: one token per line, whose number is its id.
      settings: content of `tokenizer_config.json`.

    Raises:
      DataError: a special token is missing, or a token occurs twice.
    """
    tokens = text.rstrip("\n").split("\n")
    tokens = [token.rstrip("\r") for token in tokens]
    vocabulary = {token: number for number, token in enumerate(tokens)}
    names = {key: _name(settings.get(key)) or default for key, default in SPECIAL.items()}
    for name in ("unk_token", "cls_token", "sep_token"):
        if names[name] not in vocabulary:
            raise DataError(f"vocab.txt lacks the {name} {names[name]}")
    if len(vocabulary) < len(tokens):
        raise DataError("vocab.txt is damaged: a token occurs twice")
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    special = {name: vocabulary[name] for name in names.values() if name in vocabulary}
    lower = settings.get("do_lower_case", True)
    return {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": token, "content": name, **flags, "special": True}
            for name, token in sorted(special.items(), key=lambda item: item[1])
        ],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "lowercase": lower,
            "handle_chinese_chars": settings.get("tokenize_chinese_chars", True),
            "strip_accents": settings.get("strip_accents"),
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": _post_processor(names["cls_token"], names["sep_token"], vocabulary),
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": names["unk_token"], "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocabulary,
        },
    }  # fmt: skip


def _name(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token


def _post_processor(opening: str, closing: str, vocabulary: Mapping[str, int]) -> dict[str, Any]:
    # `[CLS] A [SEP]`, and `[CLS] A [SEP] B [SEP]` for two texts.
    def special(name: str, kind: int) -> dict[str, Any]:
        return {"SpecialToken": {"id": name, "type_id": kind}}

    def text(name: str, kind: int) -> list[dict[str, Any]]:
        return [{"Sequence": {"id": name, "type_id": kind}}, special(closing, kind)]

    single = [special(opening, 0), *text("A", 0)]
    tokens = {name: {"id": name, "ids": [vocabulary[name]], "tokens": [name]} for name in (opening, closing)}
    return {
        "type": "TemplateProcessing", "single": single, "pair": single + text("B", 1), "special_tokens": tokens,
    }  # fmt: skip
