"""A recurrent network that predicts the next token.

Paper:      Hochreiter and Schmidhuber 1997; stacked as a language model as in Zaremba, Sutskever and Vinyals 2014.
Parameters: 1,083,969 at the default size with 65 tokens.
Experiment: shakespeare_char_lstm.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.core.axis import constrain
from research.core.errors import ConfigError
from research.core.types import Hyper
from research.layers.arguments import per_block
from research.layers.dropout import Dropout
from research.layers.embedding import Embedding
from research.layers.recurrent import LSTM as Layer
from research.layers.tap import tap


class LSTM(nn.Module):
    """Embedding, `depth` LSTM layers with dropout before, between and after them, and the logits of the next token at each position.

    A later token never changes earlier logits, so rows padded at the end need no mask. There is no longest context.

    Where the collection `cache` holds an `empty_cache`, the tokens go on from its `length`; then mask says which of them count. It keeps the state
    after every position, so that it can be rewound to any.

    Args:    vocabulary: tokens.  width: of each layer's state, a number or one per layer.  depth: layers.
             embedding: width of the token vectors; None: that of the last layer where tied, else of the first.
             tied: whether the head is the token embedding.  dropout: rate; None: read from hyper.  dtype: compute type.
    Raises:  ValueError: sizes that do not fit each other.
    """

    vocabulary: int
    width: int | tuple[int, ...] = 256
    depth: int = 2
    embedding: int | None = None
    tied: bool = False
    dropout: float | None = 0.0
    dtype: str = "float32"

    def __post_init__(self):
        widths = _widths(self)
        for name in ("vocabulary", "depth"):
            per_block(getattr(self, name), 1, name)
        if self.embedding is not None:
            per_block(self.embedding, 1, "embedding")
        if self.tied and _embedding(self) != widths[-1]:
            raise ValueError(f"embedding={self.embedding} must be the last layer's width, {widths[-1]}, where tied=true")
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "b t"],
        *,
        mask: Bool[Array, "b t"] | None = None,
        index: Int[Array, "b"] | None = None,
        hyper: Hyper | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b t v"], dict[str, Any]]:
        """(logits in float32, taps: input, hidden_0 … (what each layer has read), logits).

        Raises:  ConfigError: an input that is no tokens.
        """
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise ConfigError(f"model: an LSTM needs tokens, b t; found an input of shape {tokens.shape} and type {tokens.dtype}")
        taps: dict[str, Any] = {}
        start = self._advance(tokens, mask)
        embedding = Embedding(self.vocabulary, _embedding(self), _embedding(self) ** -0.5, self.dtype, name="token")
        x = tap(self, taps, "input", constrain(embedding(tokens), "batch", "time", None))  # b t d
        for i, width in enumerate(_widths(self)):
            x = Dropout(self.dropout, name=f"dropout_{i}")(x, index=index, hyper=hyper or {}, train=train)
            layer = Layer(width, self.dtype, name=f"lstm_{i}")
            x = tap(self, taps, f"hidden_{i}", self._read(layer, f"lstm_{i}", x, start))
        x = Dropout(self.dropout, name="dropout")(x, index=index, hyper=hyper or {}, train=train)
        logits = embedding.attend(x) if self.tied else nn.Dense(self.vocabulary, dtype=self.dtype, name="head")(x)
        return tap(self, taps, "logits", logits.astype(jnp.float32)), taps

    @nn.nowrap
    def empty_cache(self, rows: int, length: int) -> dict[str, Any]:
        """The collection `cache` before any token: each layer's state before and after every position, and how many positions each row holds.

        Args:    rows: sequences.  length: positions to make room for; what is written beyond is lost.
        """

        def zeros(width: int) -> dict[str, Any]:
            shape = (rows, length + 1, width)
            return {"hidden": jnp.zeros(shape, self.dtype), "cell": jnp.zeros(shape, jnp.float32)}

        return {"length": jnp.zeros(rows, jnp.int32), **{f"lstm_{i}": zeros(width) for i, width in enumerate(_widths(self))}}

    def _advance(self, tokens, mask):
        """Where the cache ends, b, before it takes these tokens in; None without a cache."""
        if not self.has_variable("cache", "length"):
            return None
        start = self.get_variable("cache", "length")
        self.put_variable("cache", "length", start + (tokens.shape[1] if mask is None else mask.sum(-1, dtype=jnp.int32)))
        return start

    def _read(self, layer, name, x, start):
        """What the layer reads, b t w, from zeros or from its state in the cache, which then holds the states after these positions too."""
        if start is None:
            return layer(x)[0]
        rows, held = jnp.arange(x.shape[0]), self.get_variable("cache", name)
        states = layer(x, state=(held["hidden"][rows, start], held["cell"][rows, start]))
        place = start[:, None] + 1 + jnp.arange(x.shape[1], dtype=jnp.int32)[None]  # b t
        written = {key: held[key].at[rows[:, None], place].set(new, mode="drop") for key, new in zip(("hidden", "cell"), states, strict=True)}
        self.put_variable("cache", name, written)
        return states[0]


def _widths(model: LSTM) -> tuple[int, ...]:
    """The width of each layer's state."""
    return per_block(model.width, model.depth, "width")


def _embedding(model: LSTM) -> int:
    """The width of the token vectors."""
    return model.embedding or _widths(model)[-1 if model.tied else 0]
