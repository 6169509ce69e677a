"""A multilayer perceptron: dense layers with an activation between them.

Paper:      Rumelhart, Hinton and Williams 1986.
Parameters: 118,282 for 784 inputs and 10 outputs at the default size.
Experiment: mlp_regression (10-5-1).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.core import mup
from research.core.types import Hyper
from research.layers.activation import activation
from research.layers.arguments import per_block
from research.layers.dropout import Dropout
from research.layers.norm import check_norm, normalize
from research.layers.tap import tap


class MLP(nn.Module):
    """`depth` times dense, norm, activation and dropout; then a dense head.

    Args:    outputs: size of the head.  width: units of each hidden layer, a number or one per layer.  depth: hidden layers.
             activation: name of the activation.  dropout: rate after each activation; None: read from hyper.
             norm: None, "batch" or "layer", before each activation.  dtype: compute type.
             base: the (first) width at which a maximal-update model equals the standard one; None: standard at any width.
    Raises:  ValueError: sizes that do not fit each other, or an unknown name.
    """

    outputs: int
    width: int | tuple[int, ...] = 128
    depth: int = 2
    activation: str = "relu"
    dropout: float | None = 0.0
    norm: str | None = None
    dtype: str = "float32"
    base: int | None = None

    def __post_init__(self):
        per_block(self.width, self.depth, "width")
        mup.check(self.base, self.grows)
        activation(self.activation)
        check_norm(self.norm)
        super().__post_init__()

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> Any:
        """As linen's, at the sizes that `base` asks for."""
        return mup.started(self, super().init(*args, **kwargs), mup.lecun, *args, **kwargs)

    @property
    def grows(self) -> mup.Sizes:
        """The arguments that widen together."""
        return {"width": self.width}

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The arguments that say how many units each layer has, one number a layer."""
        mup.check_held(self)
        return {"width": per_block(self.width, self.depth, "width")}

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b ..."],
        *,
        mask: Bool[Array, "b"] | None = None,
        index: Int[Array, "b"] | None = None,
        hyper: Hyper | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b n"], dict[str, Any]]:
        """(logits in float32, taps: input, hidden_0 …, logits)."""
        taps: dict[str, Any] = {}
        x = tap(self, taps, "input", x)
        x = x.reshape(x.shape[0], -1).astype(self.dtype)  # b ... -> b f
        for i, width in enumerate(per_block(self.width, self.depth, "width")):
            x = nn.Dense(width, dtype=self.dtype, name=f"dense_{i}")(x)
            x = normalize(self.norm, f"norm_{i}", x, mask=mask, train=train)
            x = tap(self, taps, f"hidden_{i}", activation(self.activation)(x))
            x = Dropout(self.dropout, name=f"dropout_{i}")(x, index=index, hyper=hyper or {}, train=train)
        if self.depth and (m := mup.multiplier(self)) != 1:
            x = x / m
        x = nn.Dense(self.outputs, dtype=self.dtype, name="head")(x)
        return tap(self, taps, "logits", x.astype(jnp.float32)), taps
