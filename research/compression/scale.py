"""Scaling inputs before rounding: what is hard to round moves from where it hurts to where it does not."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.compression.codes import number_format
from research.compression.gptq import Calibrated
from research.compression.linear import Linear, Moments, relative_error
from research.compression.quantized import Activations, decoded
from research.core.errors import ConfigError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaled(Calibrated):
    """Each input of a layer is divided by a scale, and its weights are multiplied with it before they are rounded: x W = (x / s) (s W).

    The scales stay with the kernel rather than in the layer before, so any layer can have them; their bytes are counted.
    """

    sequential: bool = False

    @property
    def smoothed(self) -> bool:
        """There are input scales."""
        return True

    def scaled(self, matrix: Float[Array, "i o"], group: int | None, scale: Float[Array, "i"]) -> dict[str, Array]:
        """The matrix rounded to nearest after its inputs' weights are multiplied."""
        return {**self.nearest(matrix * scale[:, None], group), "input_scale": scale}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AWQ(Scaled):
    """Scales are powers of the inputs' mean size, the exponent searched for so that the layer's outputs change least; embeddings have none.

    Args:    points: exponents that are tried: 0, 1/points … below 1.
    Source:  Lin et al. 2024 (AWQ), equation 5, each layer by itself; without the clipping of weights.
    """

    format: str = "int4"
    points: int = 20

    def __post_init__(self):
        super().__post_init__()
        if self.points < 1:
            raise ConfigError(f"method.points={self.points}: must be at least 1")

    def codes(self, layer: Linear, matrix: Float[Array, "i o"], group: int | None, seen: Moments | None) -> dict[str, Array]:
        """The matrix with the scales whose rounding changes its product with the data least."""
        if layer.kind == "embedding" or seen is None:
            return self.scaled(matrix, group, jnp.ones(len(matrix), jnp.float32))
        form, size = number_format(self.format, self.grid), seen.absolute / seen.count

        def scale(exponent):
            power = jnp.maximum(size**exponent, 1e-4)
            return power / jnp.sqrt(power.max() * power.min())

        def error(exponent):
            return relative_error(matrix, decoded(self.scaled(matrix, group, scale(exponent)), form), seen.gram)

        exponents = jnp.arange(self.points, dtype=jnp.float32) / self.points
        return self.scaled(matrix, group, scale(exponents[jnp.argmin(jax.lax.map(error, exponents))]))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothQuant(Scaled):
    """Scales max|x|^alpha / max|w|^(1 - alpha) of each input, so that neither inputs nor weights have outliers when both are rounded.

    Args:    alpha: 0: the weights of all inputs become equally large; 1: the inputs.
    Source:  Xiao et al. 2023 (SmoothQuant), equation 4.
    """

    activations: Activations | None = "dynamic"
    alpha: float = 0.5

    def __post_init__(self):
        super().__post_init__()
        if self.activations is None:
            raise ConfigError("method.activations=null: smoothing is for inputs that are rounded; use dynamic or static")
        if not 0 <= self.alpha <= 1:
            raise ConfigError(f"method.alpha={self.alpha}: must be in [0, 1], as 0.5")

    def needs(self, layer: Linear) -> bool:
        """Every layer: a tied head is an embedding."""
        return True

    def codes(self, layer: Linear, matrix: Float[Array, "i o"], group: int | None, seen: Moments | None) -> dict[str, Array]:
        """The scaled matrix rounded to nearest; scales are 1 where an input or its weights are always zero."""
        largest = jnp.zeros(len(matrix), jnp.float32) if seen is None else seen.largest
        weights = jnp.abs(matrix).max(1)
        scale = largest**self.alpha / jnp.maximum(weights, 1e-5) ** (1 - self.alpha)
        return self.scaled(matrix, group, jnp.where((largest > 0) & (weights > 0), scale, 1.0))
