"""The block that Transformers are stacks of."""

import functools
from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float, Int

from research.core.axis import constrain
from research.core.types import Hyper
from research.layers.attention import Attention
from research.layers.dropout import Dropout
from research.layers.mlp import FeedForward
from research.layers.norm import normalize
from research.layers.tap import tap

TAPS = (  # of a block: what a rematerialisation policy can keep by name
    *("attention_norm/factor", "attention/query", "attention/key", "attention/value", "attention/weights", "attention/heads"),
    *("middle", "mlp_norm/factor", "mlp/hidden", "output"),
)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), with dropout on what is added; without the latter where hidden is 0.

    Args:    heads, kv_heads, head_width, rotary: as `Attention` takes them.  hidden, activation: as `FeedForward` takes them.
             norm: "layer" or "rms".  bias: whether projections and norms have one.  dropout: rate; None: read from hyper.
             scale: standard deviation of the initial kernels.  out_scale: that of the two projections whose outputs are added.
             dtype: compute type.  attention: the form of the computation, as `causal_attention` takes it.  factor: of queries.
    Source:  Radford et al. 2019 (norm before, not after).
    """

    heads: int
    kv_heads: int
    head_width: int
    hidden: int
    rotary: bool = False
    activation: str = "gelu_tanh"
    norm: str = "layer"
    bias: bool = True
    dropout: float | None = 0.0
    scale: float = 0.02
    out_scale: float = 0.02
    dtype: str = "float32"
    attention: str = "auto"
    factor: float = 1.0

    @nn.compact
    def __call__(
        self, x: Float[Array, "b t d"], positions: Int[Array, "#b t"], *, index: Int[Array, "b"] | None, hyper: Hyper, train: bool
    ) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
        """(the residual stream after this block, taps: those of attention, mlp and the norms, middle, output)."""
        taps: dict[str, Any] = {}
        shared = {"bias": self.bias, "scale": self.scale, "out_scale": self.out_scale, "dtype": self.dtype}
        how = {"attention": self.attention, "factor": self.factor}
        attention = Attention(self.heads, self.kv_heads, self.head_width, self.rotary, **shared, **how, name="attention")
        drop = functools.partial(_drop, rate=self.dropout, index=index, hyper=hyper, train=train)

        added, inner = attention(normalize(self.norm, "attention_norm", x, bias=self.bias, taps=taps), positions)
        taps |= inner
        x = tap(self, taps, "middle", constrain(x + drop("attention_dropout", added), "batch", "time", None))
        if self.hidden:
            feed_forward = FeedForward(self.hidden, self.activation, **shared, name="mlp")
            added, inner = feed_forward(normalize(self.norm, "mlp_norm", x, bias=self.bias, taps=taps))
            taps |= inner
            x = constrain(x + drop("mlp_dropout", added), "batch", "time", None)
        return tap(self, taps, "output", x), taps


def _drop(name, x, rate, **how):
    return Dropout(rate, name=name)(x, **how)
