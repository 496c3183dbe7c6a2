"""Makes gpt2.npz: a tiny random GPT-2 of transformers, its ids, logits and loss gradient, in gptjax's layout.

    python tests/golden/make_gpt2.py        (needs the parity extra: torch and transformers)

`arrays` is also what the live parity test compares with, so that both say the same of the same model.
"""

from pathlib import Path

import numpy as np

PATH = Path(__file__).with_suffix("").with_name("gpt2.npz")


def layout(state, layers, of=lambda tensor: tensor):
    """transformers' names to gptjax's: {"block_0/attention/qkv/kernel": array}; kernels are [in, out] in both."""
    names = {"tokens/embedding": "wte.weight", "positions/embedding": "wpe.weight"}
    names |= {"final_norm/scale": "ln_f.weight", "final_norm/bias": "ln_f.bias"}
    for i in range(layers):
        for ours, theirs in (("attention_norm", "ln_1"), ("mlp_norm", "ln_2")):
            names |= {
                f"block_{i}/{ours}/scale": f"h.{i}.{theirs}.weight",
                f"block_{i}/{ours}/bias": f"h.{i}.{theirs}.bias",
            }
        for ours, theirs in (
            ("attention/qkv", "attn.c_attn"),
            ("attention/out", "attn.c_proj"),
            ("mlp/up", "mlp.c_fc"),
            ("mlp/down", "mlp.c_proj"),
        ):
            names |= {
                f"block_{i}/{ours}/kernel": f"h.{i}.{theirs}.weight",
                f"block_{i}/{ours}/bias": f"h.{i}.{theirs}.bias",
            }
    return {ours: of(state[f"transformer.{theirs}"]).detach().numpy() for ours, theirs in names.items()}


def arrays(layers=2, heads=3, width=24, context=12, vocabulary=31, batch=2, length=9, seed=0):
    """Parameters, ids, logits, loss and gradients of a random GPT2LMHeadModel, by gptjax's names."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(seed)
    config = GPT2Config(
        n_layer=layers, n_head=heads, n_embd=width, n_positions=context, vocab_size=vocabulary,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # as made, norms are ones and biases zeros: a mistake there would not show
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ids = torch.randint(0, vocabulary, (batch, length + 1))
    logits = model(ids[:, :-1]).logits
    loss = torch.nn.functional.cross_entropy(logits.reshape(-1, vocabulary), ids[:, 1:].reshape(-1))
    loss.backward()
    named = dict(model.named_parameters())
    found = {"ids": ids.numpy(), "logits": logits.detach().numpy(), "loss": np.float32(loss.item())}
    found |= {f"params/{name}": value.copy() for name, value in layout(named, layers).items()}
    found |= {f"grads/{name}": value for name, value in layout(named, layers, of=lambda p: p.grad).items()}
    return found


if __name__ == "__main__":
    np.savez_compressed(PATH, **arrays())
    print(f"wrote {PATH}, {PATH.stat().st_size:,} bytes")
