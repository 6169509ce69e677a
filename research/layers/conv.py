"""Convolution and pooling of images."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.axis import layout
from research.core.cost import FEWER, counting

COLUMNS = 1 << 22  # bytes that the windows of one piece of a batch may take on CPU: they stay in its cache; no more are kept for the gradient
TILES = 1 << 24  # bytes that the tiles of one piece may take
SAVED, CHANNELS, PRODUCT, ROWS = 1.7, 32, 1 << 23, 0.25  # from here on tiles pay: products saved, channels, work of a product, its rows / channels
PIECES = 8  # of so many pieces at most the rows count together

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
    slower. Windows that do not fit into a cache are read in pieces of the batch, and again for the gradient. Windows of 3 x 3 with many channels
    share their products in tiles: the layers of a ResNet-18 take 0.51 to 0.70 of the time with that (two cores, AMD EPYC). For images of one
    channel the sum is taken pixel by pixel of the kernel, in half the time; that form has no forward-mode derivative, its gradient has one.

    Args:    strides, padding: along rows and columns.
    """
    if jax.default_backend() != "cpu":
        return _convolve(x, kernel, strides, padding)
    if _tiles_pay(x, kernel, strides, padding) and not counting.value:
        with jax.named_scope(FEWER):
            return _by_tiles(x, kernel, padding)
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

    size = math.prod((*_size(x, kernel, strides, padding), *kernel.shape[:3])) * x.dtype.itemsize
    return _in_pieces(read, x, size, max(COLUMNS, kernel.size * kernel.dtype.itemsize))  # each piece reads the kernel anew


def _at_once(rows, size, most):
    """The largest divisor of the batch that fits into `most` bytes, each row taking `size`."""
    return max(n for n in range(1, rows + 1) if rows % n == 0 and (n == 1 or n * size <= most))


def _in_pieces(read, x, size, most, keep=True):
    """read(x), in pieces of the batch of at most `most` bytes, each row taking `size`; what was read is read again for the gradient.

    Args:    keep: a batch of one piece keeps what was read.
    """
    at_once = _at_once(len(x), size, most)
    if at_once == len(x) and keep:
        return read(x)
    if at_once == len(x) or layout() is not None:  # pieces of a batch that lies on several devices would have to be sent
        return jax.checkpoint(read)(x)
    y = jax.lax.map(jax.checkpoint(read), x.reshape(-1, at_once, *x.shape[1:]))
    return y.reshape(-1, *y.shape[2:])


def _size(x, kernel, strides, padding):
    """Rows and columns of the output."""
    return jax.eval_shape(lambda x, kernel: _convolve(x, kernel, strides, padding), x, kernel).shape[1:3]


def _tiles_pay(x, kernel, strides, padding):
    """Whether tiles are the faster form: measured on two cores (AMD EPYC), for batches of 1 to 128 and 16 to 512 channels."""
    if kernel.shape[:2] != (3, 3) or strides != (1, 1) or x.dtype != jnp.float32:
        return False
    (rows, columns), channels = _size(x, kernel, strides, padding), kernel.shape[2:]
    tiles = -(-rows // 2) * -(-columns // 2)
    if 9 * rows * columns < SAVED * 16 * tiles or min(channels) < CHANNELS or len(x) * tiles * math.prod(channels) < PRODUCT:
        return False
    together = min(PIECES * _at_once(len(x), _tile_bytes(x, tiles), TILES), len(x))  # each piece reads the kernel, 16 numbers for its 9, anew
    return together * tiles >= ROWS * max(channels)


def _tile_bytes(x, tiles):
    """Of one row of the batch."""
    return 16 * tiles * x.shape[-1] * x.dtype.itemsize


def _by_tiles(x, kernel, padding):
    """Windows of 3 x 3 by Winograd's minimal filtering: a tile of 4 x 4 pixels gives 2 x 2 outputs with 16 products instead of 36.

    The tiles, which overlap by two, and the kernel are transformed by sums alone, so gradients are those of sums and of 16 matrix products. In
    float32 the error is that of the windows' form, 1e-6 of the largest value; in bfloat16 it would not be. Tiles, products and the slopes of both
    take up to four times `TILES` for a moment, and each trial of a vmapped sweep its own.

    Source:  Lavin and Gray 2016, section 4.1, F(2 x 2, 3 x 3).
    """
    size, (c, d) = _size(x, kernel, (1, 1), padding), kernel.shape[2:]
    down, across = (-(-side // 2) for side in size)
    filled = [(before, after + 2 * count - side) for (before, after), count, side in zip(padding, (down, across), size, strict=True)]
    weights = [weight for row in _kernel_sums(kernel) for weight in _kernel_sums(row)]  # 16 of c d

    def read(x):
        x = jnp.pad(x, ((0, 0), *filled, (0, 0)))
        tiles = [tile for row in _tile_sums(x, 1, down) for tile in _tile_sums(row, 2, across)]  # 16 of b y/2 x/2 c
        products = [(tile.reshape(-1, c) @ weight).reshape(*tile.shape[:3], d) for tile, weight in zip(tiles, weights, strict=True)]
        rows = [_product_sums(products[i : i + 4]) for i in (0, 4, 8, 12)]  # 4 of (even, odd) columns
        even, odd = (_product_sums(column) for column in zip(*rows, strict=True))  # of columns: (even, odd) rows
        lines = [jnp.concatenate(pair, axis=-1).reshape(len(x), down, -1) for pair in zip(even, odd, strict=True)]
        return jnp.concatenate(lines, axis=-1).reshape(len(x), 2 * down, 2 * across, d)[:, : size[0], : size[1]]

    return _in_pieces(read, x, _tile_bytes(x, down * across), TILES, keep=False)


def _tile_sums(x, axis, count):
    """Of each tile along an axis, pixels 2 i to 2 i + 3, the four sums that are multiplied."""
    a, b, c, d = (jax.lax.slice_in_dim(x, start, start + 2 * count - 1, 2, axis) for start in range(4))
    return a - c, b + c, c - b, b - d


def _kernel_sums(kernel):
    """Of three weights along the first axis, the four sums that they are multiplied by."""
    outer, inner = 0.5 * (kernel[0] + kernel[2]), 0.5 * kernel[1]
    return kernel[0], outer + inner, outer - inner, kernel[2]


def _product_sums(products):
    """Of four products, the two outputs of a tile."""
    a, b, c, d = products
    return a + b + c, b - c - d


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

    The first of equal maxima takes the gradient, as in torch. It goes to the winner by its number: where a gradient is told by comparing values with
    the maximum, as that of `jnp.max` is, XLA's CPU code may compute both sides anew and round them otherwise, and then nobody gets it. Windows do
    not overlap, so this is a reshape and a few comparisons, much faster on CPU than `reduce_window`.
    """
    b, rows, columns, c = x.shape
    rows, columns = rows // size, columns // size
    return _largest(x[:, : rows * size, : columns * size].reshape(b, rows, size, columns, size, c))


@jax.custom_jvp
def _largest(windows):
    """Of each window, b y n x n c -> b y x c."""
    return functools.reduce(jnp.maximum, _places(windows))


@_largest.defjvp
def _largest_forward(primals, tangents):
    (windows,), (moved,), size = primals, tangents, primals[0].shape[2]
    number = _winner(jax.lax.stop_gradient(windows))
    numbers = jnp.arange(size * size, dtype=jnp.int32).reshape(1, 1, size, 1, size, 1)
    return _largest(windows), jnp.where(number[:, :, None, :, None] == numbers, moved, 0).sum((2, 4))


def _winner(windows):
    """The number of the largest value in each window; the first one's where several are equal, the last one's where several are NaN."""
    largest, *others = _places(windows)
    number = jnp.zeros(largest.shape, jnp.int32)
    for i, value in enumerate(others, 1):
        number = jnp.where((value > largest) | jnp.isnan(value), jnp.int32(i), number)
        largest = jnp.maximum(largest, value)
    return number


def _places(windows):
    """The values at each place of the windows, b y n x n c -> n * n of b y x c."""
    size = windows.shape[2]
    return [windows[:, :, i, :, j] for i in range(size) for j in range(size)]


def overlapping_max_pool(x: Float[Array, "b y x c"], size: int, stride: int) -> Float[Array, "b y2 x2 c"]:
    """The largest value of each window of size x size around every stride-th pixel, as torch's with padding = size // 2."""
    around = ((size - 1) // 2, size // 2)
    return jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, size, size, 1), (1, stride, stride, 1), ((0, 0), around, around, (0, 0)))
