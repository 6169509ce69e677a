"""Convolution and pooling of images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Conv(nn.Module):
    """A square convolution with stride 1: kernel (y, x, c in, c out) of Glorot-uniform values, bias zero at first, as in Keras.

    Args:    channels: of the output.  kernel: side of the window.  padding: "VALID" or "SAME".
             bias: whether there is one; a batch norm that follows makes it useless.  dtype: compute type.
    """

    channels: int
    kernel: int = 3
    padding: str = "VALID"
    bias: bool = True
    dtype: str = "float32"

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y2 x2 c2"]:
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = self.param("kernel", nn.initializers.glorot_uniform(), shape, jnp.float32).astype(self.dtype)
        y = jax.lax.conv_general_dilated(x, kernel, (1, 1), self.padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
            y = y + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return y


def max_pool(x: Float[Array, "b y x c"], size: int) -> Float[Array, "b y2 x2 c"]:
    """The largest value of each window of size x size; rows and columns that fill no window are dropped.

    Windows do not overlap, so this is a reshape and a maximum, whose gradient on CPU is much faster than that of `reduce_window`. Equal
    maxima share the gradient.
    """
    b, rows, columns, c = x.shape
    rows, columns = rows // size, columns // size
    windows = x[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, c)
    return windows.max((2, 4))
