"""A dense layer between axes of any shape."""

import math

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.axis import Names, name_axes


class Projection(nn.Module):
    """A dense layer from axes of one shape to axes of another, as one flat matrix product.

    Args:    inputs: trailing axes of x that are summed over.  outputs: axes that take their place.
             scale: standard deviation of the initial kernel.  bias: whether there is one, zero at first.  dtype: compute type.
             names: logical names of the kernel's axes; (): none.
    """

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    scale: float
    bias: bool
    dtype: str
    names: Names = ()

    @nn.compact
    def __call__(self, x: Float[Array, "b t ..."]) -> Float[Array, "b t ..."]:
        kernel = self.param("kernel", nn.initializers.normal(self.scale), (*self.inputs, *self.outputs), jnp.float32).astype(self.dtype)
        if self.names:
            name_axes(self, "kernel", *self.names)
            name_axes(self, "bias", *self.names[len(self.inputs) :])
        rows = x.shape[: x.ndim - len(self.inputs)]
        size = math.prod(self.outputs)
        y = x.reshape(-1, math.prod(self.inputs)) @ kernel.reshape(-1, size)  # b t ... -> bt d
        if self.bias:
            y = y + self.param("bias", nn.initializers.zeros, self.outputs, jnp.float32).astype(self.dtype).reshape(1, size)
        return y.reshape(*rows, *self.outputs)
