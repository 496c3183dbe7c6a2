"""Makes hf_encoders/: a tiny random BERT, BART, Marian and T5, with what each reads and the logits of transformers.

    python tests/golden/make_hf_encoders.py        (needs the parity extra: torch and transformers)

Each is a folder as transformers saves it. `make` is also what the live parity tests use, with more shapes, so that both
go through the same import.
"""

import json
import shutil
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("hf_encoders")

BERT = dict(
    hidden_size=24, num_hidden_layers=2, num_attention_heads=3, intermediate_size=36, max_position_embeddings=18,
    vocab_size=31,
)  # fmt: skip
LABELS = {0: "bad", 1: "so", 2: "good"}
BART = dict(
    d_model=24, encoder_layers=2, decoder_layers=3, encoder_attention_heads=3, decoder_attention_heads=3,
    encoder_ffn_dim=36, decoder_ffn_dim=36, max_position_embeddings=20, vocab_size=31, pad_token_id=1, bos_token_id=0,
    eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
)  # fmt: skip
MARIAN = BART | dict(
    pad_token_id=30, decoder_start_token_id=30, eos_token_id=0, bos_token_id=None, scale_embedding=True,
    activation_function="swish",
)  # fmt: skip
T5 = dict(
    d_model=24, d_kv=6, d_ff=36, num_layers=3, num_decoder_layers=2, num_heads=3, vocab_size=31,
    relative_attention_num_buckets=8, relative_attention_max_distance=12, decoder_start_token_id=0,
)  # fmt: skip
OF_DECODING = ("forced_bos_token_id", "forced_eos_token_id", "bad_words_ids")  # generation_config.json has these
SEQ2SEQ = {"bart": "BartForConditionalGeneration", "marian": "MarianMTModel", "t5": "T5ForConditionalGeneration"}

# family: case: transformers' class and what differs from the family's own config. The first of each is the golden one.
CASES = {
    "bert": {
        "golden": ("BertForPreTraining", BERT),
        "masked": ("BertForMaskedLM", BERT | dict(hidden_act="relu", layer_norm_eps=1e-5, type_vocab_size=3)),
        "untied": ("BertForMaskedLM", BERT | dict(tie_word_embeddings=False, num_hidden_layers=1)),
        "texts": ("BertForSequenceClassification", BERT | dict(id2label=LABELS)),
        "value": ("BertForSequenceClassification", BERT | dict(num_labels=1)),
        "tokens": ("BertForTokenClassification", BERT | dict(id2label=LABELS)),
        "span": ("BertForQuestionAnswering", BERT),
        "choice": ("BertForMultipleChoice", BERT),
    },
    "bart": {
        "golden": (SEQ2SEQ["bart"], BART | dict(forced_bos_token_id=0)),
        "scaled": (SEQ2SEQ["bart"], BART | dict(scale_embedding=True, activation_function="relu", encoder_layers=1)),
    },
    "marian": {
        "golden": (SEQ2SEQ["marian"], MARIAN),
        "odd": (SEQ2SEQ["marian"], MARIAN | dict(d_model=15, scale_embedding=False, decoder_layers=1)),
    },
    "t5": {
        "golden": (SEQ2SEQ["t5"], T5),
        "v1.1": (SEQ2SEQ["t5"], T5 | dict(feed_forward_proj="gated-gelu", tie_word_embeddings=False)),
        "silu": (SEQ2SEQ["t5"], T5 | dict(feed_forward_proj="gated-silu", num_decoder_layers=1)),
    },
}


def random_model(architecture, family, settings, seed=0, dtype="float32"):
    """A model of transformers, of random parameters, none of which is what it is made as."""
    import torch
    import transformers
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    decoding = {key: settings[key] for key in OF_DECODING if key in settings}
    known = {key: value for key, value in settings.items() if key not in decoding}
    config = transformers.AutoConfig.for_model(family, **known)
    model = getattr(transformers, architecture)._from_config(config, attn_implementation="eager").eval()
    for key, value in decoding.items():
        setattr(model.generation_config, key, value)
    if family == "t5" and settings.get("tie_word_embeddings") is False:  # as the files of 1.1 have it
        model.lm_head.weight = torch.nn.Parameter(torch.randn(config.vocab_size, config.d_model))
    with torch.no_grad():  # as made, norms are ones and biases zeros: a mistake there would not show
        buffers = [b for name, b in model.named_buffers() if name == "final_logits_bias"]
        for parameter in [*(p for p in model.parameters() if p.requires_grad), *buffers]:
            parameter.add_(0.1 * torch.randn_like(parameter))
            if dtype == "bfloat16":
                parameter.copy_(parameter.bfloat16())
    return model


def rows(family, settings, seed=0, batch=3):
    """What a model reads, by our names: rows of different lengths, filled up with padding."""
    rng = np.random.default_rng(seed)
    V, T = settings["vocab_size"], 14

    def ids(shape=(batch, T)):
        return rng.integers(3, V - 1, shape).astype(np.int32)

    filled = (np.arange(T) < rng.permutation(np.linspace(5, T, batch).astype(int))[:, None]).astype(np.int32)
    if family == "bert":
        types = rng.integers(0, settings.get("type_vocab_size", 2), (batch, T)).astype(np.int32)
        return {"ids_BT": ids(), "segments_BT": filled, "types_BT": types}
    return {"ids_BT": ids((batch, T - 3)), "source_BS": ids(), "source_segments_BS": filled}


def answers(model, read):
    """What transformers says: `logits` of tokens where it has them, `answers` where it has a head besides."""
    import torch

    given = {name: torch.tensor(array).long() for name, array in read.items()}
    with torch.no_grad():
        if "source_BS" in given:
            named = dict(input_ids="source_BS", attention_mask="source_segments_BS", decoder_input_ids="ids_BT")
            return {"logits": model(**{theirs: given[ours] for theirs, ours in named.items()}).logits.numpy()}
        named = dict(input_ids="ids_BT", attention_mask="segments_BT", token_type_ids="types_BT")
        kind, read = type(model).__name__, {theirs: given[ours] for theirs, ours in named.items()}
        if kind == "BertForMultipleChoice":  # all rows are choices of one
            return {"answers": model(**{name: array[None] for name, array in read.items()}).logits[0].numpy()}
        said = model(**read)
    if kind == "BertForPreTraining":
        return {"logits": said.prediction_logits.numpy(), "answers": said.seq_relationship_logits.numpy()}
    if kind == "BertForMaskedLM":
        return {"logits": said.logits.numpy()}
    if kind == "BertForQuestionAnswering":
        return {"answers": np.stack([said.start_logits.numpy(), said.end_logits.numpy()], -1)}
    return {"answers": said.logits.numpy()[..., 0] if model.config.num_labels == 1 else said.logits.numpy()}


def make(family, case, folder, seed=0):
    """Writes a random model to a folder, and beside it expected.npz with what it read and said; gives the model."""
    architecture, settings = CASES[family][case]
    model = random_model(architecture, family, settings, seed)
    read = rows(family, settings, seed)
    model.save_pretrained(folder)
    np.savez_compressed(Path(folder) / "expected.npz", **read, **answers(model, read))
    return model


def main():
    """Makes the golden case of each family anew."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for family in CASES:
        folder = FOLDER / family
        make(family, "golden", folder)
        for path in folder.glob("*.json"):
            settings = json.loads(path.read_text())
            kept = {key: value for key, value in settings.items() if key != "transformers_version"}
            path.write_text(json.dumps(kept, indent=1) + "\n")
        if family == "bert":
            (folder / "generation_config.json").unlink(missing_ok=True)
        print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
