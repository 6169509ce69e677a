"""Recurrent layers: what is read at each position depends on all positions before it, through a state of fixed size."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from research.core.axis import layout


class LSTM(nn.Module):
    """Long short-term memory: cell' = forget x cell + input x tanh(candidate), hidden' = output x tanh(cell').

    The product with x is one matrix product over all positions, outside the loop over time, and the gradients of the weights are one product
    each after the backward loop. The four gates lie in one kernel in torch's order: input, forget, candidate, output. As in Keras, kernels
    start Glorot-uniform and orthogonal, and biases zero but for the forget gate's, which start at one; torch adds two biases, here there is one.

    Args:    width: of the state.  dtype: compute type; the cell is kept in float32.
    Source:  Hochreiter and Schmidhuber 1997; Gers, Schmidhuber and Cummins 2000 (forget gate); Jozefowicz et al. 2015 (its bias).
    """

    width: int
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b t d"],
        *,
        state: tuple[Float[Array, "b w"], Float[Array, "b w"]] | None = None,
        mask: Bool[Array, "b t"] | None = None,
    ) -> tuple[Float[Array, "b t w"], Float[Array, "b t w"]]:
        """(hidden, cell) after each position, the cell in float32.

        Args:    state: (hidden, cell) before the first position; None: zeros.  mask: where False, the state goes on unchanged.
        """
        gates = nn.Dense(4 * self.width, dtype=self.dtype, kernel_init=nn.initializers.glorot_uniform(), bias_init=_bias, name="input")
        recurrent = self.param("recurrent", nn.initializers.orthogonal(), (self.width, 4 * self.width), jnp.float32).astype(self.dtype)
        rows = x.swapaxes(0, 1).astype(self.dtype)  # t b d: positions first, so that each is one piece of memory
        given = gates(rows.reshape(-1, x.shape[-1])).reshape(*rows.shape[:2], -1) if _flat() else gates(rows)
        if state is None:
            state = (jnp.zeros((x.shape[0], self.width), given.dtype), jnp.zeros((x.shape[0], self.width), jnp.float32))
        hidden, cell = lstm(given, recurrent, state[0].astype(given.dtype), state[1].astype(jnp.float32), None if mask is None else mask.T)
        return hidden.swapaxes(0, 1), cell.swapaxes(0, 1)


@jax.custom_vjp
def lstm(
    given: Float[Array, "t b w4"],
    recurrent: Float[Array, "w w4"],
    hidden: Float[Array, "b w"],
    cell: Float[Array, "b w"],
    mask: Bool[Array, "t b"] | None,
) -> tuple[Float[Array, "t b w"], Float[Array, "t b w"]]:
    """(hidden, cell) after each position.

    Args:    given: what the input adds to the gates, in the order input, forget, candidate, output.  recurrent: kernel from the hidden state to
             the gates.  hidden, cell: before the first position.  mask: where False, the state goes on unchanged; None: nowhere.
    """
    return _forward(given, recurrent, hidden, cell, mask)[0]


def _forward(given, recurrent, hidden, cell, mask):
    scale = jnp.repeat(jnp.array([0.5, 0.5, 1, 0.5], jnp.float32), cell.shape[-1])[None]  # 1 4w

    def step(state, at):
        hidden, cell = state
        given, keep = at
        sums = (given + hidden @ recurrent).astype(jnp.float32)
        gates = jnp.tanh(sums * scale) * scale + (1 - scale)  # sigmoid(x) = tanh(x / 2) / 2 + 1 / 2: one form for all four
        i, f, g, o = jnp.split(gates, 4, -1)
        new_cell = f * cell + i * g
        new_hidden = (o * jnp.tanh(new_cell)).astype(hidden.dtype)
        state = _kept(keep, new_hidden, hidden), _kept(keep, new_cell, cell)
        return state, (*state, gates.astype(given.dtype))

    _, (hiddens, cells, gates) = jax.lax.scan(step, (hidden, cell), (given, mask))
    return (hiddens, cells), (recurrent, hidden, cell, mask, hiddens, cells, gates)


def _backward(kept, slopes):
    recurrent, hidden, cell, mask, hiddens, cells, gates = kept
    width, back = cell.shape[-1], recurrent.T
    hiddens = jnp.concatenate([hidden[None], hiddens[:-1]])  # before each position
    before = jnp.concatenate([cell[None], cells[:-1]])
    i, f, g, o = jnp.split(gates.astype(jnp.float32), 4, -1)
    bent = jnp.tanh(f * before + i * g)
    # What does not depend on later positions is done for all at once, outside the loop: the slope of each gate's sum, and that of the new cell.
    bends = jnp.concatenate([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g), bent * o * (1 - o)], -1).astype(gates.dtype)  # t b 4w
    through = o * (1 - bent * bent)

    def step(state, at):
        slope_hidden, slope_cell = state
        added_hidden, added_cell, bends, through, f, keep = at
        slope_hidden, slope_cell = slope_hidden + added_hidden, slope_cell + added_cell
        here = slope_hidden.astype(jnp.float32)
        inner = slope_cell + here * through
        slope = (jnp.concatenate([inner, inner, inner, here], -1) * bends.astype(jnp.float32)).astype(bends.dtype)
        if keep is not None:
            slope = _kept(keep, slope, jnp.zeros_like(slope))
        carried = _kept(keep, slope @ back, slope_hidden), _kept(keep, inner * f, slope_cell)
        return carried, slope

    start = jnp.zeros_like(hidden), jnp.zeros_like(cell)
    (slope_hidden, slope_cell), slope = jax.lax.scan(step, start, (*slopes, bends, through, f, mask), reverse=True)
    if _flat():
        slope_recurrent = hiddens.reshape(-1, width).T @ slope.reshape(-1, 4 * width)
    else:
        slope_recurrent = jnp.einsum("tbw,tbk->wk", hiddens, slope)
    return slope, slope_recurrent, slope_hidden, slope_cell, None


lstm.defvjp(_forward, _backward)


def _kept(keep, new, old):
    """The new state where it counts, else the old one."""
    return new if keep is None else jnp.where(keep[:, None], new, old)


def _flat() -> bool:
    """Whether positions and rows are made one axis for a product: XLA's own over two takes twice the time on CPU; a mesh cuts the rows alone."""
    return layout() is None


def _bias(key, shape, dtype):
    """Zero, but one for the forget gate."""
    width = shape[0] // 4
    return jnp.zeros(shape, dtype).at[width : 2 * width].set(1)
