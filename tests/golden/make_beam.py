"""Makes beam.npz: what beam search of transformers finds with hf/llama, its embedding and head drawn anew.

    python tests/golden/make_beam.py        (needs the parity extra: torch and transformers)

As it was made, that model says the same of every token; with `tables` its texts differ and end. `searched` is also
what the live tests use.
"""

from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("hf") / "llama"
GOLDEN = Path(__file__).with_name("beam.npz")

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
ENDS = [10, 0]
MAX_TOKENS = 12
WIDTHS = (1, 2, 4, 5)
PENALTIES = (-1.0, 0.0, 0.5, 1.0, 2.0)
STOPPING = (True, False, "never")


def tables():
    """The embedding and the head, [V, D] each."""
    return (0.3 * np.random.default_rng(0).normal(size=(2, 37, 20))).astype(np.float32)


def load():
    """The model of the golden folder with `tables`."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(FOLDER).eval()
    with torch.no_grad():
        for of, table in zip((model.model.embed_tokens, model.lm_head), tables(), strict=True):
            of.weight.copy_(torch.tensor(table))
    return model


def searched(model, prompts, width, penalty, stopping, best=1, ends=ENDS):
    """[(ids, score)] of the best continuations of each prompt; these are of one length. A greedy text has no score."""
    import torch

    options = {} if width == 1 else dict(length_penalty=penalty, early_stopping=stopping, num_return_sequences=best)
    ids = torch.tensor(prompts)
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), num_beams=width, do_sample=False, max_new_tokens=MAX_TOKENS,
        eos_token_id=ends, pad_token_id=0, output_scores=True, return_dict_in_generate=True, **options,
    )  # fmt: skip
    new = [cut(row, ends) for row in found.sequences[:, ids.shape[1] :].tolist()]
    scores = [None] * len(prompts) if width == 1 else found.sequences_scores.tolist()
    each = list(zip(new, scores, strict=True))
    return [each[i : i + best] for i in range(0, len(each), best)]


def cut(ids, ends):
    """The ids to the first that ends, which is the last of them; what follows is padding."""
    first = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return ids[: first + 1]


def main():
    """Makes the file anew: for each case the ids, -1 after their end, and the scores, best first."""
    model, arrays = load(), {}
    for width in WIDTHS[1:]:
        for penalty in PENALTIES:
            for stopping in STOPPING:
                found = searched(model, [PROMPT], width, penalty, stopping, best=width)[0]
                ids = np.full((width, MAX_TOKENS), -1, np.int16)
                for row, (tokens, _) in zip(ids, found, strict=True):
                    row[: len(tokens)] = tokens
                name = f"{width} {penalty} {stopping}"
                arrays |= {f"{name} ids": ids, f"{name} scores": np.array([score for _, score in found], np.float32)}
    np.savez_compressed(GOLDEN, **arrays)
    print(f"{GOLDEN}: {GOLDEN.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
