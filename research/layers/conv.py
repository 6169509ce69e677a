"""Convolution and pooling of images."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.axis import layout

COLUMNS = 1 << 22  # bytes that the windows of one piece of a batch may take on CPU: they stay in its cache; no more are kept for the gradient

Pair = tuple[int, int]


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
    def windows(self) -> tuple[Pair, tuple[Pair, Pair]]:
        """(strides, padding) along rows and columns."""
        around = ((self.kernel - 1) // 2, self.kernel // 2) if self.padding == "SAME" else (0, 0)
        return (self.stride, self.stride), (around, around)

    @nn.compact
    def __call__(self, x: Float[Array, "b y x c"]) -> Float[Array, "b y2 x2 c2"]:
        shape = (self.kernel, self.kernel, x.shape[-1], self.channels)
        kernel = jnp.asarray(self.param("kernel", _STARTS[self.start], shape, jnp.float32), self.dtype)
        y = convolve(x, kernel, *self.windows)
        if self.bias:
            bias = self.param("bias", nn.initializers.zeros, (self.channels,), jnp.float32)
            y = y + bias.astype(self.dtype).reshape(1, 1, 1, -1)
        return y


_STARTS = {"glorot": nn.initializers.glorot_uniform(), "he": nn.initializers.variance_scaling(2.0, "fan_out", "normal")}


def convolve(x: Float[Array, "b y x c"], kernel: Float[Array, "k k2 c d"], strides: Pair, padding: tuple[Pair, Pair]) -> Float[Array, "b y2 x2 d"]:
    """The sum over each window, weighted by the kernel.

    On CPU it is a matrix product of the windows side by side with the kernel, and so are its gradients, which XLA takes for convolutions that are
    slower: on two cores (AMD EPYC) the step of a ResNet-18 takes 0.90 of the time, that of a small CNN 0.80. Windows that do not fit into a
    cache are read in pieces of the batch, and again for the gradient. For images of one channel the sum is taken pixel by pixel of the kernel,
    in half the time; that form has no forward-mode derivative, its gradient has one.

    Args:    strides, padding: along rows and columns.
    """
    if jax.default_backend() != "cpu":
        return _convolve(x, kernel, strides, padding)
    return (_by_windows if x.shape[-1] > 1 else _by_pixels)(x, kernel, strides, padding)


def _convolve(x, kernel, strides, padding):
    return jax.lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def _by_windows(x, kernel, strides, padding):
    full = kernel.astype(jnp.float32)  # in which the gradients of pieces are added

    def read(x):
        windows = jnp.concatenate(_pixels(x, kernel.shape[:2], strides, padding), axis=-1)  # b y2 x2 (k k2 c)
        weights = full.astype(x.dtype).reshape(windows.shape[-1], -1)
        y = jnp.matmul(windows.reshape(-1, len(weights)), weights, preferred_element_type=jnp.float32)
        return y.astype(x.dtype).reshape(*windows.shape[:3], -1)

    at_once = _rows_at_once(x, kernel, strides, padding)
    if at_once == len(x):
        return read(x)
    if layout() is not None:  # pieces of a batch that lies on several devices would have to be sent
        return jax.checkpoint(read)(x)
    y = jax.lax.map(jax.checkpoint(read), x.reshape(-1, at_once, *x.shape[1:]))
    return y.reshape(-1, *y.shape[2:])


def _rows_at_once(x, kernel, strides, padding):
    """The largest divisor of the batch whose windows fit into `COLUMNS`, or into the bytes of the kernel, which each piece reads anew."""
    rows, outputs = len(x), jax.eval_shape(lambda x, kernel: _convolve(x, kernel, strides, padding), x, kernel)
    size = math.prod((*outputs.shape[1:3], *kernel.shape[:3])) * x.dtype.itemsize  # of one row
    most = max(COLUMNS, kernel.size * kernel.dtype.itemsize)
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * size <= most))


def _pixels(x, sides, strides, padding):
    """For each pixel of the kernel, row by row, what all windows have there: b y2 x2 c."""
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    rows, columns = (size - side for size, side in zip(x.shape[1:3], sides, strict=True))  # from the first window to the last
    starts = ((i, j) for i in range(sides[0]) for j in range(sides[1]))
    return [x[:, i : i + rows + 1 : strides[0], j : j + columns + 1 : strides[1]] for i, j in starts]


def _sum(x, kernel, strides, padding):
    pixels = _pixels(x, kernel.shape[:2], strides, padding)
    weights = kernel.reshape(-1, *kernel.shape[2:])
    products = (jnp.matmul(pixel, weight, preferred_element_type=jnp.float32) for pixel, weight in zip(pixels, weights, strict=True))
    return functools.reduce(jnp.add, products).astype(x.dtype)  # rounded once, as XLA's is


def _forward(x, kernel, strides, padding):
    return _sum(x, kernel, strides, padding), (x, kernel)


def _backward(strides, padding, kept, slope):
    x, kernel = kept
    (slope_x,) = jax.linear_transpose(lambda x: _convolve(x, kernel, strides, padding), x)(slope)
    (slope_kernel,) = jax.linear_transpose(lambda kernel: _by_windows(x, kernel, strides, padding), kernel)(slope)
    return slope_x, slope_kernel


_by_pixels = jax.custom_vjp(_sum, nondiff_argnums=(2, 3))
_by_pixels.defvjp(_forward, _backward)


def max_pool(x: Float[Array, "b y x c"], size: int) -> Float[Array, "b y2 x2 c"]:
    """The largest value of each window of size x size; rows and columns that fill no window are dropped.

    Windows do not overlap, so this is a reshape and maxima of two, over rows and then over columns. They melt into what comes before them, and on
    CPU their gradient takes a third of the time of that of a maximum over an axis, which is much faster than that of `reduce_window`. Equal
    maxima share the gradient, half and half in each maximum of two.
    """
    b, rows, columns, c = x.shape
    rows, columns = rows // size, columns // size
    windows = x[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, c)
    over_rows = functools.reduce(jnp.maximum, (windows[:, :, i] for i in range(size)))
    return functools.reduce(jnp.maximum, (over_rows[:, :, :, i] for i in range(size)))


def overlapping_max_pool(x: Float[Array, "b y x c"], size: int, stride: int) -> Float[Array, "b y2 x2 c"]:
    """The largest value of each window of size x size around every stride-th pixel, as torch's with padding = size // 2."""
    around = ((size - 1) // 2, size // 2)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), ((0, 0), around, around, (0, 0)))
