"""Makes trunk.npz: stacks of torch.nn's Transformer layers, with their parameters, what they read and what they give;
and transformers' buckets of relative positions and Marian's table of sinusoidal ones.

    python tests/golden/make_trunk.py        (needs the parity extra: torch and transformers)
"""

import itertools
from pathlib import Path

import numpy as np

FILE = Path(__file__).with_name("trunk.npz")

B, T, S, D, H, F, L = 2, 7, 9, 8, 2, 12, 2
LENGTHS_T, LENGTHS_S = (7, 4), (9, 5)
# Whether it is a decoder that reads a memory, norm_first, activation.
CASES = list(itertools.product((False, True), (False, True), ("relu", "gelu")))
# buckets, longest, whether only tokens before are looked at
BUCKETS = [(32, 128, True), (32, 128, False), (8, 20, True), (6, 12, False)]


def name(decoder, norm_first, activation):
    """Of a case."""
    return f"{'decoder' if decoder else 'encoder'}_{'pre' if norm_first else 'post'}_{activation}"


def padding(lengths, longest):
    """mask [B, longest], True where there is no token, as torch has it."""
    return np.arange(longest) >= np.array(lengths)[:, None]


def layers(decoder, norm_first, activation, seed):
    """What torch's stack of layers gives for drawn parameters, by name; padding of both sides, causal in a decoder."""
    import torch
    from torch import nn

    torch.manual_seed(seed)
    kind = nn.TransformerDecoderLayer if decoder else nn.TransformerEncoderLayer
    layer = kind(D, H, F, 0.0, activation, batch_first=True, norm_first=norm_first)
    last = nn.LayerNorm(D) if norm_first else None
    stack = (
        nn.TransformerDecoder(layer, L, last)
        if decoder
        else nn.TransformerEncoder(layer, L, last, enable_nested_tensor=False)
    )
    stack.eval()
    x, memory = torch.randn(B, T, D), torch.randn(B, S, D)
    blank_BT, blank_BS = torch.tensor(padding(LENGTHS_T, T)), torch.tensor(padding(LENGTHS_S, S))
    with torch.no_grad():
        for parameter in stack.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        causal = nn.Transformer.generate_square_subsequent_mask(T) == -torch.inf
        if decoder:
            y = stack(x, memory, tgt_mask=causal, tgt_key_padding_mask=blank_BT, memory_key_padding_mask=blank_BS)
        else:
            y = stack(x, src_key_padding_mask=blank_BT)
    found = {"x": x, "memory": memory, "y": y} | {f"params/{key}": p for key, p in stack.named_parameters()}
    return {key: array.detach().numpy() for key, array in found.items()}


def distances():
    """Of queries to keys, as the buckets are made for."""
    return np.arange(-150, 151)


def buckets(count, longest, causal):
    """The bucket of each of `distances`."""
    import torch
    from transformers.models.t5.modeling_t5 import T5Attention

    of = T5Attention._relative_position_bucket
    return of(torch.tensor(-distances()), not causal, count, longest).numpy().astype(np.int32)


def sinusoids(positions, width):
    """Marian's table."""
    from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding

    return MarianSinusoidalPositionalEmbedding(positions, width).create_weight().numpy()


def everything(seed):
    """All arrays by name."""
    found = {f"buckets_{i}": buckets(*case) for i, case in enumerate(BUCKETS)}
    found |= {f"sinusoids_{width}": sinusoids(12, width) for width in (8, 7)}
    for case in CASES:
        found |= {f"{name(*case)}/{key}": array for key, array in layers(*case, seed).items()}
    return found


if __name__ == "__main__":
    np.savez_compressed(FILE, **everything(seed=0))
    print(f"{FILE}: {FILE.stat().st_size:,} bytes")
