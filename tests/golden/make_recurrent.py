"""Makes recurrent.npz: weights, what goes in and what comes out of torch's recurrent networks, and gradients.

    python tests/golden/make_recurrent.py        (needs torch)

`made` is also what the live tests use.
"""

from pathlib import Path

import numpy as np

GOLDEN = Path(__file__).with_name("recurrent.npz")
KINDS = ("rnn", "gru", "lstm")
D, LAYERS, B, T = 5, 2, 2, 6


def made(kind, both_ways, width=D, layers=LAYERS, rows=B, steps=T, seed=0):
    """{"x": [B, T, D], "y": ..., "dx": gradient of sum(y * y)/2, "weight_ih_l0": ..., "d weight_ih_l0": ...}."""
    import torch

    torch.manual_seed(seed)
    network = getattr(torch.nn, kind.upper())(width, width, layers, batch_first=True, bidirectional=both_ways)
    x = torch.randn(rows, steps, width, requires_grad=True)
    y, _ = network(x)
    (y * y).sum().div(2).backward()
    arrays = {"x": x, "y": y, "dx": x.grad}
    for name, parameter in network.named_parameters():
        arrays |= {name: parameter, f"d {name}": parameter.grad}
    return {name: array.detach().numpy() for name, array in arrays.items()}


if __name__ == "__main__":
    every = {
        f"{kind} {ways} {name}": array
        for kind in KINDS
        for ways in (1, 2)
        for name, array in made(kind, ways == 2).items()
    }
    np.savez_compressed(GOLDEN, **every)
