"""A perceptron: one layer of linear units.

Paper:      Rosenblatt 1958; with softmax cross-entropy it is logistic regression, with squared error linear regression.
Parameters: 7,850 for 784 inputs and 10 outputs.
Experiment: none of its own; the baseline that a deeper model must beat on the same data.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.core.types import Hyper
from research.layers.tap import tap


class Perceptron(nn.Module):
    """One dense layer on the flattened input.

    Args:    outputs: number of linear units.  dtype: compute type.
    """

    outputs: int
    dtype: str = "float32"

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
        """(logits in float32, taps: input, logits)."""
        taps: dict[str, Any] = {}
        x = tap(self, taps, "input", x)
        x = x.reshape(x.shape[0], -1).astype(self.dtype)  # b ... -> b f
        x = nn.Dense(self.outputs, dtype=self.dtype, name="head")(x)
        return tap(self, taps, "logits", x.astype(jnp.float32)), taps
