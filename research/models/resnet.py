"""A residual network: blocks of two convolutions, each added to what it was given.

Paper:      He et al. 2016; the stem for small images as in its section 4.2.
Parameters: 11,173,962 at the default size, ResNet-18, for 3 colours and 10 classes.
Experiment: cifar10_resnet18.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from research.core.axis import constrain
from research.core.errors import ConfigError
from research.core.types import Hyper
from research.layers.activation import activation
from research.layers.arguments import one_of, per_block
from research.layers.conv import Conv, overlapping_max_pool
from research.layers.norm import BatchNorm
from research.layers.tap import tap

STEMS = ("small", "imagenet")


class Block(nn.Module):
    """activation(x + norm(conv(activation(norm(conv(x)))))), where x is carried over by a 1 x 1 convolution if its shape changes.

    Args:    channels: of the output.  hidden: between the two convolutions.  stride: of the first.  activation: name of the activation.
             zero: whether the last norm's scale starts at zero.  dtype: compute type.
    """

    channels: int
    hidden: int
    stride: int = 1
    activation: str = "relu"
    zero: bool = False
    dtype: str = "float32"

    @nn.compact
    def __call__(
        self, x: Float[Array, "b y x c"], *, mask: Bool[Array, "b"] | None = None, train: bool = False
    ) -> tuple[Float[Array, "b y2 x2 c2"], dict[str, Any]]:
        """(the block's output, taps: hidden, output)."""
        taps: dict[str, Any] = {}
        act = activation(self.activation)
        y = self._conv("conv_0", self.hidden, 3, self.stride, x)
        y = BatchNorm(name="norm_0")(y, mask=mask, train=train)
        y = tap(self, taps, "hidden", act(y))
        y = self._conv("conv_1", self.channels, 3, 1, y)
        y = BatchNorm(start=0.0 if self.zero else 1.0, name="norm_1")(y, mask=mask, train=train)
        if x.shape != y.shape:
            x = self._conv("shortcut", self.channels, 1, self.stride, x)
            x = BatchNorm(name="shortcut_norm")(x, mask=mask, train=train)
        return tap(self, taps, "output", act(x + y)), taps

    def _conv(self, name, channels, kernel, stride, x):
        return Conv(channels, kernel, "SAME", bias=False, dtype=self.dtype, stride=stride, start="he", name=name)(x)


class ResNet(nn.Module):
    """A stem, stages of residual blocks, the mean over all positions, and a dense head.

    The first block of every stage but the first halves the image's sides. Kernels start He-normal, as in torchvision.

    Args:    outputs: size of the head.  blocks: of each stage.  channels: of each stage's blocks.
             hidden: channels between a block's two convolutions, a number or one per block; None: those of its stage.
             stem: "small": one 3 x 3 convolution.  "imagenet": one of 7 x 7 with stride 2, then max-pooling with stride 2.
             activation: name of the activation.  zero: whether each block's last norm starts with scale zero, so that the block changes
             nothing at first (Goyal et al. 2017).  dtype: compute type.
    Raises:  ValueError: sizes that do not fit each other, or an unknown name.
    """

    outputs: int
    blocks: tuple[int, ...] = (2, 2, 2, 2)
    channels: tuple[int, ...] = (64, 128, 256, 512)
    hidden: int | tuple[int, ...] | None = None
    stem: str = "small"
    activation: str = "relu"
    zero: bool = False
    dtype: str = "float32"

    def __post_init__(self):
        _blocks(self)
        activation(self.activation)
        one_of(self.stem, STEMS, "stem")
        super().__post_init__()

    @property
    def sizes(self) -> dict[str, tuple[int, ...]]:
        """The argument that says how many units each block has, one number a block; the sum of all blocks fixes the channels of a stage."""
        return {"hidden": tuple(hidden for _, hidden, _ in _blocks(self))}

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
        """(logits in float32, taps: input, maps (of the stem), block_0/hidden, block_0/output …, pooled, logits).

        Raises:  ConfigError: an input that is no image.
        """
        if x.ndim != 4:
            raise ConfigError(f"model: a ResNet needs images, b y x c; found an input of shape {x.shape}")
        taps: dict[str, Any] = {}
        x = tap(self, taps, "input", x).astype(self.dtype)
        kernel, stride = (7, 2) if self.stem == "imagenet" else (3, 1)
        x = Conv(self.channels[0], kernel, "SAME", bias=False, dtype=self.dtype, stride=stride, start="he", name="stem")(x)
        x = BatchNorm(name="stem_norm")(x, mask=mask, train=train)
        x = tap(self, taps, "maps", activation(self.activation)(x))
        if self.stem == "imagenet":
            x = overlapping_max_pool(x, 3, 2)
        for i, (channels, hidden, stride) in enumerate(_blocks(self)):
            block = Block(channels, hidden, stride, self.activation, self.zero, self.dtype, name=f"block_{i}")
            x, inner = block(x, mask=mask, train=train)
            taps |= inner
        x = tap(self, taps, "pooled", constrain(x.mean((1, 2)), "batch", None))  # b y x c -> b c
        x = nn.Dense(self.outputs, dtype=self.dtype, kernel_init=nn.initializers.glorot_uniform(), name="head")(x)
        return tap(self, taps, "logits", x.astype(jnp.float32)), taps


def _blocks(model: ResNet) -> list[tuple[int, int, int]]:
    """(channels, hidden, stride) of each block."""
    blocks = per_block(model.blocks, len(model.channels), "blocks")
    channels = per_block(model.channels, len(model.channels), "channels")
    outer = [size for size, count in zip(channels, blocks, strict=True) for _ in range(count)]
    inner = outer if model.hidden is None else per_block(model.hidden, len(outer), "hidden")
    strides = [2 if stage and not i else 1 for stage, count in enumerate(blocks) for i in range(count)]
    return list(zip(outer, inner, strides, strict=True))
