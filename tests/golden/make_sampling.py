"""Makes sampling.npz: logits and histories of random rows, and what transformers' processors make of those logits.

    python tests/golden/make_sampling.py        (needs the parity extra: torch and transformers)

`processed` is also what the live test compares with: the list of processors is the one that `generate` itself makes of
a GenerationConfig, in its order. Frequency and presence penalties are not in transformers.
"""

import json
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("sampling.npz")
V, ENDS = 40, (7, 11)
# What our settings are called there, where it is not the same.
NAMES = {"no_repeat_ngram": "no_repeat_ngram_size", "min_tokens": "min_new_tokens"}
NEUTRAL = dict(temperature=1.0, top_k=0)
CASES = [
    {},
    {"temperature": 0.8, "top_k": 50},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.7, "top_p": 0.9},
    {"top_p": 0.3},
    {"min_p": 0.2},
    {"typical_p": 0.6},
    {"typical_p": 0.95, "temperature": 2.5},
    {"top_k": 12, "top_p": 0.8, "min_p": 0.05, "typical_p": 0.9, "temperature": 1.3},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7, "top_k": 9},
    {"no_repeat_ngram": 1},
    {"no_repeat_ngram": 2},
    {"no_repeat_ngram": 3, "repetition_penalty": 1.1},
    {"logit_bias": {3: 4.0, 11: -2.5, 39: float("-inf")}},
    {"min_tokens": 9, "logit_bias": {7: 5.0}},
    {"min_tokens": 3},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.85, "min_p": 0.02, "typical_p": 0.97, "repetition_penalty": 1.2,
     "no_repeat_ngram": 2, "logit_bias": {1: 1.5}, "min_tokens": 8},
]  # fmt: skip


def processed(logits_V, ids, prompt, settings, ends=ENDS):
    """What transformers' processors, in generate's order, make of one row's logits.

    Args:
      logits_V: float32.
      ids: prompt and new tokens.
      prompt: how many ids are the prompt.
      settings: by our names; what is not named does nothing.
      ends: ids that end a text.
    """
    import torch
    from transformers import GenerationConfig, GenerationMixin, PretrainedConfig

    settings = NEUTRAL | settings
    bias = settings.pop("logit_bias", {})
    named = {NAMES.get(name, name): value for name, value in settings.items()}
    named["sequence_bias"] = {(token,): float(nats) for token, nats in bias.items()} or None
    config = GenerationConfig(do_sample=True, **named)
    config._eos_token_tensor = torch.tensor(ends)
    model = GenerationMixin()
    model.config = PretrainedConfig()
    processors = model._get_logits_processor(config, input_ids_seq_length=int(prompt), device="cpu")
    ids = torch.tensor(np.asarray(ids)[None], dtype=torch.int64)
    return processors(ids, torch.tensor(logits_V)[None]).numpy()[0]


def rows(seed, count, vocabulary=V, length=16):
    """Random logits [B, V] whose values all differ, ids [B, S] with repetitions, and the lengths of ids and prompts."""
    rng = np.random.default_rng(seed)
    spaced = np.linspace(-4, 4, vocabulary) + rng.uniform(0, 0.9 * 8 / vocabulary, (count, vocabulary))
    logits = rng.permuted(spaced, axis=1).astype(np.float32)
    ids = rng.integers(0, 5, (count, length)).astype(np.int32) * 3 + rng.integers(0, 2, (count, 1), dtype=np.int32)
    lengths = rng.integers(length // 2, length + 1, count).astype(np.int32)
    return logits, ids, lengths, rng.integers(1, 5, count).astype(np.int32)


def main():
    """Makes the file anew."""
    logits, ids, lengths, prompts = rows(0, len(CASES))
    found = [processed(logits[b], ids[b, : lengths[b]], prompts[b], settings) for b, settings in enumerate(CASES)]
    np.savez_compressed(
        FILE, logits=logits, ids=ids, lengths=lengths, prompts=prompts, expected=np.stack(found),
        settings=json.dumps(CASES), ends=ENDS,
    )  # fmt: skip
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
