"""The feed-forward half of a Transformer block."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from research.layers.activation import activation
from research.layers.projection import Projection
from research.layers.tap import tap


class FeedForward(nn.Module):
    """down(activation(up(x))), or down(silu(gate(x)) x up(x)) for "swiglu".

    Args:    hidden: units between the two.  activation: name of the activation, or "swiglu".  bias: whether the projections have one.
             scale: standard deviation of the initial kernels.  out_scale: that of the output projection.  dtype: compute type.
    Source:  Vaswani et al. 2017, section 3.3; Shazeer 2020 (SwiGLU).
    """

    hidden: int
    activation: str = "gelu_tanh"
    bias: bool = True
    scale: float = 0.02
    out_scale: float = 0.02
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b t d"]) -> tuple[Float[Array, "b t d"], dict[str, Any]]:
        """(the block's addition, taps: hidden)."""
        taps: dict[str, Any] = {}
        y = self._project("up", self.hidden, self.scale, x)
        if self.activation == "swiglu":
            y = activation("silu")(self._project("gate", self.hidden, self.scale, x)) * y
        else:
            y = activation(self.activation)(y)
        y = tap(self, taps, "hidden", y)
        return self._project("down", x.shape[-1], self.out_scale, y), taps

    def _project(self, name, width, scale, x):
        names = ("hidden", "width") if name == "down" else ("width", "hidden")
        return Projection(x.shape[-1:], (width,), scale, self.bias, self.dtype, names, name=name)(x)
