"""The position-wise part of a block: x_BTD in, [B, T, D] out, no position sees another."""

import jax
from flax import linen as nn

from gptjax.models.layers import ACTIVATIONS, Linear


class MLP(nn.Module):
    """activation(x W + b) W' + b' (arXiv 1706.03762, eq. 2, with any activation)."""

    width: int
    activation: str
    use_bias: bool
    out_init_std: float
    dtype: str

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        h_BTF = Linear(self.width, self.use_bias, dtype=self.dtype, name="up")(x_BTD)
        h_BTF = ACTIVATIONS[self.activation](h_BTF)
        return Linear(x_BTD.shape[-1], self.use_bias, self.out_init_std, self.dtype, name="down")(h_BTF)


MLPS: dict[str, type[nn.Module]] = {"plain": MLP}
