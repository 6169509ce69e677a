"""Convolution and pooling of images."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


class Conv(nn.Module):
    """A square convolution: kernel (y, x, c in, c out), bias zero at first.

    Args:    channels: of the output.  kernel: side of the window.  padding: "VALID" or "SAME": the centres of the windows are every stride-th
             pixel from the first on, as in torch with padding = kernel // 2, whatever the stride.
             bias: whether there is one; a batch norm that follows makes it useless.  dtype: compute type.  stride: from window to window.
             start: the kernel's first values. "glorot": Glorot-uniform, as in Keras.  "he": normal, of variance 2 / (channels x kernel^2), for a
             ReLU that follows.
    Source:  Glorot and Bengio 2010; He et al. 2015.
    """

    channels: int
    kernel: int = 3
    padding: str = "VALID"
    bias: bool = True
    dtype: str = "float32"
    stride: int = 1
    start: str = "glorot"

    @property
    def windows(self) -> tuple[tuple[int, int], tuple[tuple[int, int], tuple[int, int]]]:
        """(strides, padding) along rows and columns."""
        around = ((self.kernel - 1) // 2, self.kernel // 2) if self.padding == "SAME" else (0, 0)
        return (self.stride, self.stride), (around, around)

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y2 x2 c2"]:
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = self.param("kernel", _STARTS[self.start], shape, jnp.float32).astype(self.dtype)
        y = jax.lax.conv_general_dilated(x, kernel, *self.windows, dimension_numbers=("NHWC", "HWIO", "NHWC"))
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
            y = y + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return y


_STARTS = {"glorot": nn.initializers.glorot_uniform(), "he": nn.initializers.variance_scaling(2.0, "fan_out", "normal")}


def max_pool(x: Float[Array, "b y x c"], size: int) -> Float[Array, "b y2 x2 c"]:
    """The largest value of each window of size x size; rows and columns that fill no window are dropped.

    Windows do not overlap, so this is a reshape and a maximum, whose gradient on CPU is much faster than that of `reduce_window`. Equal
    maxima share the gradient.
    """
    b, rows, columns, c = x.shape
    rows, columns = rows // size, columns // size
    windows = x[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, c)
    return windows.max((2, 4))


def overlapping_max_pool(x: Float[Array, "b y x c"], size: int, stride: int) -> Float[Array, "b y2 x2 c"]:
    """The largest value of each window of size x size around every stride-th pixel, as torch's with padding = size // 2."""
    around = ((size - 1) // 2, size // 2)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), ((0, 0), around, around, (0, 0)))
