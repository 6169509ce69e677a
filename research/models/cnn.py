"""A convolutional network: convolutions with pooling between them, then dense layers.

Paper:      LeCun et al. 1998; the default is the network of Keras's MNIST and CIFAR-10 tutorials.
Parameters: 93,322 for 28 x 28 x 1 images and 10 classes, 122,570 for 32 x 32 x 3.
Experiment: mnist_cnn, digits_cnn.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.core import mup
from research.core.axis import constrain
from research.core.errors import ConfigError
from research.core.types import Hyper
from research.layers.activation import activation
from research.layers.arguments import one_of, per_block
from research.layers.conv import Conv, max_pool
from research.layers.dropout import Dropout
from research.layers.norm import check_norm, normalize
from research.layers.tap import tap


class CNN(nn.Module):
    """For each entry of `channels` convolution, norm, activation and pooling; then dense layers, activation and dropout; then a dense head.

    Kernels start Glorot-uniform and biases zero, as in Keras.

    Args:    outputs: size of the head.  channels: of each convolution.  kernel: side of each convolution's window, a number or one each.
             pool: side of the max-pool after each convolution, likewise; 1: none.  padding: "VALID" (the image shrinks by kernel - 1) or
             "SAME".  hidden: units of each dense layer before the head.  activation: name of the activation.
             norm: None, "batch" or "layer", before each convolution's activation.  dropout: rate after each dense layer; None: read from hyper.
             dtype: compute type.
             base: channels of the first convolution at which a maximal-update model equals the standard one; None: standard at any width.
    Raises:  ValueError: sizes that do not fit each other, or an unknown name.
    """

    outputs: int
    channels: tuple[int, ...] = (32, 64, 64)
    kernel: int | tuple[int, ...] = 3
    pool: int | tuple[int, ...] = (2, 2, 1)
    padding: str = "VALID"
    hidden: tuple[int, ...] = (64,)
    activation: str = "relu"
    norm: str | None = None
    dropout: float | None = 0.0
    dtype: str = "float32"
    base: int | None = None

    def __post_init__(self):
        _layers(self)
        per_block(self.hidden, len(self.hidden), "hidden")
        mup.check(self.base, self.grows)
        activation(self.activation)
        check_norm(self.norm)
        one_of(self.padding, ("VALID", "SAME"), "padding")
        super().__post_init__()

    @nn.nowrap
    def init(self, *args: Any, **kwargs: Any) -> Any:
        """As linen's, at the sizes that `base` asks for."""
        return mup.started(self, super().init(*args, **kwargs), mup.glorot, *args, **kwargs)

    @property
    def grows(self) -> mup.Sizes:
        """The arguments that widen together."""
        return {"channels": self.channels, "hidden": self.hidden}

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The arguments that say how many units each layer has, one number a layer."""
        mup.check_held(self)
        return {"channels": self.channels, "hidden": self.hidden}

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "b y x c"],
        *,
        mask: Bool[Array, "b"] | None = None,
        index: Int[Array, "b"] | None = None,
        hyper: Hyper | None = None,
        train: bool = False,
    ) -> tuple[Float[Array, "b n"], dict[str, Any]]:
        """(logits in float32, taps: input, maps_0 … (before pooling), hidden_0 …, logits).

        Raises:  ConfigError: an input that is no image, or one that is too small for these layers.
        """
        taps: dict[str, Any] = {}
        act = activation(self.activation)
        x = tap(self, taps, "input", x).astype(self.dtype)
        for i, (channels, kernel, pool) in enumerate(_layers(self)):
            _check_image(x.shape, kernel, pool, self.padding, i)
            x = Conv(channels, kernel, self.padding, self.norm != "batch", self.dtype, name=f"conv_{i}")(x)
            x = normalize(self.norm, f"norm_{i}", x, mask=mask, train=train)
            x = max_pool(tap(self, taps, f"maps_{i}", act(x)), pool)
        x = constrain(x.reshape(x.shape[0], -1), "batch", None)  # b y x c -> b d
        for i, width in enumerate(self.hidden):
            x = self._dense(f"dense_{i}", width, x)
            x = tap(self, taps, f"hidden_{i}", act(x))
            x = Dropout(self.dropout, name=f"dropout_{i}")(x, index=index, hyper=hyper or {}, train=train)
        if (m := mup.multiplier(self)) != 1:
            x = x / m
        x = self._dense("head", self.outputs, x)
        return tap(self, taps, "logits", x.astype(jnp.float32)), taps

    def _dense(self, name, width, x):
        return nn.Dense(width, dtype=self.dtype, kernel_init=nn.initializers.glorot_uniform(), name=name)(x)


def _layers(model: CNN) -> list[tuple[int, int, int]]:
    """(channels, kernel, pool) of each convolution."""
    depth = len(model.channels)
    sizes = [per_block(getattr(model, name), depth, name) for name in ("channels", "kernel", "pool")]
    return list(zip(*sizes, strict=True))


def _check_image(shape, kernel, pool, padding, i):
    if len(shape) != 4:
        raise ConfigError(f"model: a CNN needs images, b y x c; found an input of shape {shape}")
    shrink = kernel - 1 if padding == "VALID" else 0
    y, x = shape[1] - shrink, shape[2] - shrink
    if min(y, x) < pool:
        raise ConfigError(
            f"model: the image is {shape[1]} x {shape[2]} before conv_{i}, too small for kernel={kernel}, pool={pool}, padding={padding}; "
            "use padding=SAME, a smaller pool or fewer channels"
        )
