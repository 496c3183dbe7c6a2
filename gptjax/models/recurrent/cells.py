"""Recurrent cells and layers.

The formulas, the order of the gates and the two biases are those of `torch.nn.RNN`, `GRU` and `LSTM`: a cell reads
`inputs = W_i x + b_i` and `states = W_h h + b_h`, each of P columns, gate after gate. Below, `.` is the elementwise
product, and h' is the state after h. States are float32. Independent of tokens, attention and losses.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.models import logical_axes
from gptjax.models.kernels import KERNELS
from gptjax.models.recurrent.scan import Loop, Product, scan

State = tuple[jax.Array, ...]  # h_BD, the layer's output, and other arrays carried to the next step


class Cell(NamedTuple):
    """A recurrent cell.

    Attributes:
      gates: P / D.
      parts: number of arrays of its state.
      sums: True if it depends only on inputs + states.
      step: (inputs_BP, states_BP, state) -> next state; inputs_BP is 0.0 if states_BP is the sum of both.
    """

    gates: int
    parts: int
    sums: bool
    step: Callable[[Any, jax.Array, State], State]


def rnn(inputs_BP: Any, states_BP: jax.Array, state: State) -> State:
    """h' = tanh(inputs + states) (Elman 1990, "Finding structure in time")."""
    return (jnp.tanh(inputs_BP + states_BP),)


def gru(inputs_BP: jax.Array, states_BP: jax.Array, state: State) -> State:
    """h' = (1 - z) . n + z . h, with gates r, z, n in this order (arXiv 1406.1078 section 2.3).

    r and z are the sigmoid of inputs + states, n = tanh(inputs_n + r . states_n): r multiplies after the product, as in
    PyTorch and cuDNN, and not before it, as in the paper.
    """
    (h_BD,) = state
    inputs_r, inputs_z, inputs_n = jnp.split(inputs_BP, 3, axis=-1)
    states_r, states_z, states_n = jnp.split(states_BP, 3, axis=-1)
    r, z = jax.nn.sigmoid(inputs_r + states_r), jax.nn.sigmoid(inputs_z + states_z)
    n = jnp.tanh(inputs_n + r * states_n)
    return (n + z * (h_BD - n),)


def lstm(inputs_BP: Any, states_BP: jax.Array, state: State) -> State:
    """c' = f . c + i . g and h' = o . tanh(c'), with gates i, f, g, o in this order.

    g is the tanh, the others are the sigmoid of inputs + states (Hochreiter & Schmidhuber 1997, "Long short-term
    memory", with the forget gate of Gers et al. 2000, "Learning to forget").
    """
    return _lstm(inputs_BP + states_BP, state[1])


@jax.custom_vjp
def _lstm(sums_BP: jax.Array, c_BD: jax.Array) -> State:
    return _lstm_forward(sums_BP, c_BD)[0]


def _lstm_forward(sums_BP: jax.Array, c_BD: jax.Array) -> tuple[State, Any]:
    i, f, g, o = jnp.split(sums_BP, 4, axis=-1)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    next_c_BD = f * c_BD + i * g
    squashed_BD = jnp.tanh(next_c_BD)
    return (o * squashed_BD, next_c_BD), (i, f, g, o, c_BD, squashed_BD)


def _lstm_backward(saved: Any, dstate: State) -> State:
    """Gradient from six saved arrays per step, where JAX would save eleven."""
    i, f, g, o, c_BD, squashed_BD = saved
    dh_BD, dc_BD = dstate
    dc_BD = dc_BD + dh_BD * o * (1 - squashed_BD**2)
    di, df, dg = dc_BD * g * i * (1 - i), dc_BD * c_BD * f * (1 - f), dc_BD * i * (1 - g**2)
    do = dh_BD * squashed_BD * o * (1 - o)
    return jnp.concatenate([di, df, dg, do], axis=-1), dc_BD * f


_lstm.defvjp(_lstm_forward, _lstm_backward)

CELLS: dict[str, Cell] = {
    "rnn": Cell(1, 1, True, rnn),
    "gru": Cell(3, 1, False, gru),
    "lstm": Cell(4, 2, True, lstm),
}


class Kernel(nn.Module):
    """A matrix [rows, columns] that multiplies before or within a loop, with an optional bias.

    Attributes:
      config: `config.model`; reads kernels.
      dtype: of the arithmetic.
      rows, columns: shape; initialized normal with standard deviation 1 / sqrt(rows), since no norm rescales the input.
      use_bias: True for a bias, initialized to 0.
      ones: range of columns whose bias is initialized to 1.
      squares: if not 0, the number of orthogonal matrices, side by side, that it is initialized to, so that neither
        states nor gradients explode or vanish (arXiv 1312.6120; arXiv 1409.0473 appendix B.1).
    """

    config: Any
    dtype: str
    rows: int
    columns: int
    use_bias: bool = False
    ones: tuple[int, int] = (0, 0)
    squares: int = 0

    def setup(self) -> None:
        """Declares the parameters."""
        self.transposed = KERNELS[self.config.kernels].transposed
        self.kernel = self.matrix()
        if self.use_bias:
            self.bias = logical_axes.parameter(self, "bias", self._first_bias, (self.columns,))

    def matrix(self) -> jax.Array:
        """Declares the matrix, in the layout of the product's kernels."""
        init = _orthogonal_blocks(self.squares) if self.squares else nn.initializers.normal(self.rows**-0.5)
        shape = (self.columns, self.rows) if self.transposed else (self.rows, self.columns)
        return logical_axes.parameter(self, "kernel", init, shape, self.dtype)

    def _first_bias(self, key: jax.Array, shape: tuple[int], dtype: Any) -> jax.Array:
        return jnp.zeros(shape, dtype).at[slice(*self.ones)].set(1.0)

    def __call__(self, x: jax.Array) -> jax.Array:
        """x @ kernel over the last axis, without the bias, float32."""
        return KERNELS[self.config.kernels].product(x, self.kernel, self.dtype, "float32")

    def equation(self) -> str:
        """The `jnp.einsum` subscripts of [B, rows] times `kernel`; see gptjax.models.recurrent.scan.Loop."""
        return "bd,pd->bp" if self.transposed else "bd,dp->bp"

    def bias_or_zero(self) -> jax.Array | float:
        """The bias, or 0.0 if there is none."""
        return self.bias if self.use_bias else 0.0


def _orthogonal_blocks(squares: int) -> Callable[..., jax.Array]:
    def init(key: jax.Array, shape: tuple[int, int], dtype: Any) -> jax.Array:
        square = nn.initializers.orthogonal()
        D, along = min(shape), int(shape[1] >= shape[0])
        return jnp.concatenate([square(one, (D, D), dtype) for one in jax.random.split(key, squares)], axis=along)

    return init


class Layer(nn.Module):
    """A recurrent layer in one direction.

    Attributes:
      config: `config.model`; reads width, use_bias, kernels.
      dtype: of the products.
      cell: of CELLS.
      input_width: columns of the input.
      fed_width: columns of the attention's output that is fed to it; 0 for none.
    """

    config: Any
    dtype: str
    cell: str
    input_width: int
    fed_width: int = 0

    def setup(self) -> None:
        """Declares the parameters."""
        c, gates = self.config, CELLS[self.cell].gates
        P = gates * c.width
        # Initializes the forget gate's bias to 1 (Gers et al. 2000; Jozefowicz et al. 2015, section 2.2).
        forget = (c.width, 2 * c.width) if self.cell == "lstm" else (0, 0)
        self.input = Kernel(c, self.dtype, self.input_width, P, c.use_bias, forget)
        self.state = Kernel(c, self.dtype, c.width, P, c.use_bias, squares=gates)
        if self.fed_width:
            self.feed = Kernel(c, self.dtype, self.fed_width, P)

    def __call__(
        self,
        x_TBD: jax.Array,
        resets_TB1: jax.Array | None,
        state: State,
        reverse: bool = False,
        keep_all: bool = False,
    ) -> State:
        """Returns the state after each step, time first; its first part, [T, B, width], is the layer's output.

        Args:
          x_TBD: the input; its products are computed before the loop, for all steps at once.
          resets_TB1: True where the state is reset to 0 before the step; None: nowhere.
          state: before the first step, or before the last one in reverse.
          reverse: True to run from the last step to the first.
          keep_all: True returns all parts of the state, not only the first.
        """
        cell = CELLS[self.cell]
        inputs_TBP = self.input(x_TBD) + self.outer_bias()
        addends = {"state": inputs_TBP} if cell.sums else {}
        xs = (resets_TB1, None if cell.sums else inputs_TBP)

        def step(product: Product, bias: Any, state: State, x: Any) -> tuple[State, State]:
            resets_B1, inputs_BP = x
            if resets_B1 is not None:
                state = reset(state, 0.0, resets_B1)
            states_BP = product("state", state[0]) + bias
            state = cell.step(0.0 if inputs_BP is None else inputs_BP, states_BP, state)
            return state, state if keep_all else state[:1]

        loop = Loop(step, {"state": self.state.equation()}, self.dtype, reverse)
        states: State = scan(loop, {"state": self.state.kernel}, addends, self.inner_bias(), state, xs)[1]
        return states

    def outer_bias(self) -> jax.Array | float:
        """Bias of the inputs, plus that of the states if the cell depends only on their sum."""
        return self.input.bias_or_zero() + (self.state.bias_or_zero() if CELLS[self.cell].sums else 0.0)

    def inner_bias(self) -> jax.Array | float:
        """Bias of the states' product within the loop."""
        return 0.0 if CELLS[self.cell].sums else self.state.bias_or_zero()


def zeros(cell: str, rows: int, width: int) -> State:
    """The initial state, zeros."""
    return tuple(jnp.zeros((rows, width), jnp.float32) for _ in range(CELLS[cell].parts))


def reset(state: State, first: State | float, resets_B1: jax.Array) -> State:
    """Resets the state to `first` in rows where `resets_B1` is True."""
    if not isinstance(first, tuple):
        return tuple(jnp.where(resets_B1, first, old) for old in state)
    return tuple(jnp.where(resets_B1, new, old) for new, old in zip(first, state, strict=True))


def segment_starts(segments_BT: jax.Array, reverse: bool = False) -> jax.Array:
    """resets_TB1: True at the first token of each segment; in reverse, at the last one."""
    borders_Bt = segments_BT[:, 1:] != segments_BT[:, :-1]
    at_edge = (0, 1) if reverse else (1, 0)
    return jnp.pad(borders_Bt, ((0, 0), at_edge), constant_values=True).T[..., None]


def select_steps(states: Any, count_B: jax.Array) -> Any:
    """Selects from states [T, B, ...] each row's state after `count_B` tokens, at least 1: [B, ...]."""
    return jax.tree.map(lambda part: part[count_B - 1, jnp.arange(part.shape[1])], states)
