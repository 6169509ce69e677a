"""Normalisation with float32 statistics."""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from research.core.axis import psum
from research.layers.arguments import one_of
from research.layers.tap import tap

NORMS = ("batch", "layer", "rms")


class LayerNorm(nn.Module):
    """(x - mean) / sqrt(variance + epsilon) x scale + bias over the last axis, in float32 and then back in the type of x.

    The tap `factor` is 1 / sqrt(variance + epsilon): held fixed by an edit, the norm is linear in x.

    Args:    epsilon: added to the variance.  bias: whether a bias is learned.
    Source:  Ba, Kiros and Hinton 2016.
    """

    epsilon: float = 1e-5
    bias: bool = True

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"], taps: dict[str, Any] | None = None) -> Float[Array, "*b d"]:
        full = x.astype(jnp.float32)
        centred = full - full.mean(-1, keepdims=True)
        factor = _factor(self, taps, jnp.square(centred).mean(-1, keepdims=True))  # dead code unless it is read or edited
        y = centred * factor if self.has_variable("edits", "factor") else standardized(full, self.epsilon)
        return _affine(self, y, self.bias).astype(x.dtype)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + epsilon) x scale over the last axis, in float32 and then back in the type of x.

    The tap `factor` is 1 / sqrt(mean(x^2) + epsilon): held fixed by an edit, the norm is linear in x.

    Args:    epsilon: added to the mean square.
    Source:  Zhang and Sennrich 2019.
    """

    epsilon: float = 1e-6

    @nn.compact
    def __call__(self, x: Float[Array, "*b d"], taps: dict[str, Any] | None = None) -> Float[Array, "*b d"]:
        full = x.astype(jnp.float32)
        y = full * _factor(self, taps, jnp.square(full).mean(-1, keepdims=True))
        return _affine(self, y, bias=False).astype(x.dtype)


class BatchNorm(nn.Module):
    """Each channel normalised by its mean and variance over the batch and all positions; masked rows are left out.

    In training the statistics are those of the global batch: sums and counts are added over the device axis in force. The running ones
    live in the collection `batch_stats` and are used otherwise; a batch without any valid row leaves them unchanged. As in torch, the
    variance that normalises is divided by n, the running one by n - 1. Under gradient accumulation each microbatch is normalised by its own
    statistics (ghost normalisation), so 1, 2 and 4 microbatches do not give the same update.

    Args:    decay: share of the running statistics that an update keeps.  epsilon: added to the variance.  start: the scale at first.
    Source:  Ioffe and Szegedy 2015.
    """

    decay: float = 0.9
    epsilon: float = 1e-5
    start: float = 1.0

    @nn.compact
    def __call__(self, x: Float[Array, "b ... c"], *, mask: Bool[Array, "b ..."] | None = None, train: bool) -> Float[Array, "b ... c"]:
        channels = x.shape[-1:]
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, channels, jnp.float32)
        running_variance = self.variable("batch_stats", "variance", jnp.ones, channels, jnp.float32)
        full = x.astype(jnp.float32)
        mean, variance = running_mean.value, running_variance.value
        if train:
            mean, variance, count = _moments(full, mask)
            keep = jnp.where(count > 0, self.decay, 1.0)
            unbiased = variance * count / jnp.maximum(count - 1.0, 1.0)
            running_mean.value = keep * running_mean.value + (1.0 - keep) * mean
            running_variance.value = keep * running_variance.value + (1.0 - keep) * unbiased
        y = (full - _wide(mean, x.ndim)) * _wide(jax.lax.rsqrt(variance + self.epsilon), x.ndim)
        return _affine(self, y, bias=True, start=self.start).astype(x.dtype)


def check_norm(name: str | None) -> None:
    """Refuses a name that `normalize` does not know.

    Raises:  ValueError: an unknown name; the message names the nearest right one.
    """
    if name is not None:
        one_of(name, NORMS, "norm")


def normalize(
    kind: str | None,
    name: str,
    x: Float[Array, "b ... c"],
    *,
    mask: Bool[Array, "b"] | None = None,
    train: bool = False,
    bias: bool = True,
    taps: dict[str, Any] | None = None,
) -> Float[Array, "b ... c"]:
    """x under the norm of this kind, a child of the module that calls; x itself where there is none.

    Args:    kind: None, "batch", "layer" or "rms".  name: the child's name.  mask, train: as `BatchNorm` takes them.  bias: of `LayerNorm`.
             taps: where "layer" and "rms" record their factor; None: nowhere.
    Raises:  ValueError: an unknown kind.
    """
    check_norm(kind)
    if kind is None:
        return x
    if kind == "batch":
        return BatchNorm(name=name)(x, mask=mask, train=train)
    return RMSNorm(name=name)(x, taps) if kind == "rms" else LayerNorm(bias=bias, name=name)(x, taps)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def standardized(x: Float[Array, "*b d"], epsilon: float) -> Float[Array, "*b d"]:
    """(x - mean) / sqrt(variance + epsilon) over the last axis.

    With y the result and r the factor, the gradient is r (g - mean(g) - y mean(g y)): said by hand it needs y and r alone, where derived
    line by line it keeps and reads more: on CPU 4 % of a small GPT's whole step.
    """
    return _standardized(x, epsilon)[0]


@standardized.defjvp  # type: ignore[arg-type]  # its stub does not know of arguments that are not differentiated
def _standardized_tangent(epsilon, primals, tangents):
    y, factor = _standardized(primals[0], epsilon)
    slope = tangents[0] * factor
    return y, slope - slope.mean(-1, keepdims=True) - y * (y * slope).mean(-1, keepdims=True)


def _standardized(x, epsilon):
    centred = x - x.mean(-1, keepdims=True)
    factor = jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon)
    return centred * factor, factor


def _moments(x, mask):
    """(mean, variance, number of valid entries) of each channel over the global batch."""
    keep = jnp.ones(x.shape[:1], bool) if mask is None else mask
    weight = jnp.broadcast_to(keep.reshape(*keep.shape, *(1,) * (x.ndim - keep.ndim)), (*x.shape[:-1], 1)).astype(jnp.float32)
    axes = tuple(range(x.ndim - 1))
    total, count = psum(((x * weight).sum(axes), weight.sum()))
    count_or_one = jnp.maximum(count, 1.0)
    mean = total / count_or_one
    variance = psum((jnp.square(x - _wide(mean, x.ndim)) * weight).sum(axes)) / count_or_one
    return mean, variance, count


def _factor(module, taps, square):
    """1 / sqrt(square + epsilon), tapped."""
    return tap(module, {} if taps is None else taps, "factor", jax.lax.rsqrt(square + module.epsilon))


def _affine(module, x, bias, start=1.0):
    """x times a learned scale, plus a learned bias: parameters of the module that calls."""
    y = x * _wide(module.param("scale", nn.initializers.constant(start), x.shape[-1:], jnp.float32), x.ndim)
    return y + _wide(module.param("bias", nn.initializers.zeros, x.shape[-1:], jnp.float32), x.ndim) if bias else y


def _wide(vector, rank):
    return vector.reshape((1,) * (rank - 1) + vector.shape)
