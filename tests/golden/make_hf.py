"""Makes hf/: a tiny random model of each Hugging Face family, with ids, logits, loss and the loss's gradient.

    python tests/golden/make_hf.py        (needs the parity extra: torch and transformers)

Each is a folder as transformers saves it, beside what transformers computes from it. `make` is also what the live
parity tests use, with more shapes, so that both go through the same import.
"""

import json
import shutil
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).with_name("hf")

PAIR = [[["local", "global"], 1]]
NEO = dict(hidden_size=24, num_layers=3, num_heads=3, max_position_embeddings=19, vocab_size=31)
NEOX = dict(
    hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, max_position_embeddings=24,
    vocab_size=31,
)  # fmt: skip
LLAMA = dict(
    hidden_size=20, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=6, intermediate_size=36,
    max_position_embeddings=64, vocab_size=37, rms_norm_eps=1e-5,
)  # fmt: skip
DYNAMIC = dict(rope_type="dynamic", rope_theta=10_000.0, factor=4.0)
YARN = dict(rope_type="yarn", rope_theta=10_000.0, factor=4.0, original_max_position_embeddings=8, beta_fast=4.0)
LLAMA3 = dict(
    rope_type="llama3", rope_theta=10_000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
ONE_KEY_HEAD = dict(
    hidden_size=35, num_attention_heads=5, num_key_value_heads=1, head_dim=14, num_hidden_layers=3,
    intermediate_size=22,
)  # fmt: skip

# family: case: what differs from the family's own config. The first of each is the golden one.
CASES = {
    "openai-gpt": {
        "golden": dict(n_layer=2, n_head=3, n_embd=24, n_positions=12, vocab_size=31),
        "odd": dict(n_layer=1, n_head=5, n_embd=35, n_positions=7, vocab_size=101, afn="relu"),
        "untied": dict(n_layer=3, n_head=1, n_embd=11, n_positions=9, vocab_size=17, tie_word_embeddings=False),
    },
    "gpt2": {
        "golden": dict(n_layer=2, n_head=3, n_embd=24, n_positions=12, vocab_size=31),
        "odd": dict(n_layer=1, n_head=5, n_embd=35, n_positions=7, vocab_size=101, activation_function="gelu"),
        "deep": dict(n_layer=6, n_head=2, n_embd=16, n_positions=33, vocab_size=64, n_inner=27),
        "untied": dict(n_layer=2, n_head=1, n_embd=11, n_positions=5, vocab_size=17, tie_word_embeddings=False),
    },
    "gpt_neo": {
        "golden": NEO | dict(attention_types=[[["global", "local"], 1], [["global"], 1]], window_size=5),
        "odd": NEO | dict(hidden_size=35, num_heads=5, attention_types=[[["local"], 3]], window_size=1),
        "wide": NEO | dict(num_layers=2, attention_types=PAIR, window_size=4, intermediate_size=9),
    },
    "gpt_neox": {
        "golden": NEOX,
        "odd": NEOX | dict(rope_parameters=dict(rope_theta=500.0, partial_rotary_factor=0.5), hidden_act="gelu_new"),
        "sequential": NEOX | dict(use_parallel_residual=False, tie_word_embeddings=True),
        "yarn": NEOX | dict(rope_parameters=YARN | dict(partial_rotary_factor=0.5)),
    },
    "llama": {
        "golden": LLAMA | dict(rope_parameters=LLAMA3),
        "one_key_head": LLAMA | ONE_KEY_HEAD,
        "tied": LLAMA | dict(tie_word_embeddings=True, rope_parameters=dict(rope_type="default", rope_theta=500.0)),
        "biased": LLAMA | dict(attention_bias=True, mlp_bias=True),
        "dynamic": LLAMA | dict(max_position_embeddings=6, rope_parameters=DYNAMIC),
        "yarn": LLAMA | dict(rope_parameters=YARN),
        "linear": LLAMA | dict(rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=10_000.0)),
    },
    "mistral": {
        "golden": LLAMA | dict(sliding_window=5),
        "one_key_head": LLAMA | ONE_KEY_HEAD | dict(sliding_window=3),
        "no_window": LLAMA | dict(sliding_window=None),
    },
    "qwen2": {
        "golden": LLAMA | dict(tie_word_embeddings=True),
        "one_key_head": LLAMA | ONE_KEY_HEAD,
        "windows": LLAMA | dict(num_hidden_layers=4, use_sliding_window=True, sliding_window=4, max_window_layers=2),
    },
    "olmo2": {
        "golden": LLAMA,
        "one_key_head": LLAMA | ONE_KEY_HEAD | dict(tie_word_embeddings=True),
    },
    "qwen3": {
        "golden": LLAMA,
        "one_key_head": LLAMA | ONE_KEY_HEAD | dict(tie_word_embeddings=True),
        "windows": LLAMA | dict(use_sliding_window=True, sliding_window=4, max_window_layers=1),
    },
}


def make(family, case, folder, seed=0, batch=2, dtype="float32", gradients=False):
    """Writes a random model to a folder, and beside it expected.npz with ids, logits, loss and gradients by name."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.manual_seed(seed)
    settings = CASES[family][case]
    off = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0} if family in ("gpt2", "openai-gpt") else {}
    config = AutoConfig.for_model(family, **settings, **off, bos_token_id=None, eos_token_id=None)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():  # as made, norms are ones and biases zeros: a mistake there would not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        if dtype == "bfloat16":
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
    is_dynamic = settings.get("rope_parameters") == DYNAMIC  # which is for longer texts
    length = 18 if is_dynamic else min(config.max_position_embeddings, 18)
    ids = torch.randint(0, config.vocab_size, (batch, length + 1))
    logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, config.vocab_size), ids[:, 1:].reshape(-1))
    found = {"ids": ids.numpy(), "logits": logits.detach().numpy(), "loss": np.float32(loss.item())}
    if gradients:
        loss.backward()
        found |= {f"grads/{name}": p.grad.numpy() for name, p in model.named_parameters()}
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    np.savez_compressed(Path(folder) / "expected.npz", **found)


def main():
    """Makes the golden case of each family anew."""
    shutil.rmtree(FOLDER, ignore_errors=True)
    for family in CASES:
        folder = FOLDER / family
        make(family, "golden", folder, batch=1, gradients=family in ("gpt2", "llama"))
        config = json.loads((folder / "config.json").read_text())
        kept = {key: value for key, value in config.items() if key != "transformers_version"}
        (folder / "config.json").write_text(json.dumps(kept, indent=1) + "\n")
        (folder / "generation_config.json").unlink(missing_ok=True)
        print(f"{folder}: {sum(path.stat().st_size for path in folder.iterdir()):,} bytes")


if __name__ == "__main__":
    main()
