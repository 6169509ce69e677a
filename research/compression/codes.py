"""Numbers of a few bits: codes, and what they stand for in units of a scale that a group of numbers shares."""

import abc
import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from research.core.errors import ConfigError, nearest

Grid = Literal["symmetric", "full"]
NORMAL_FLOAT = (  # quantiles of the normal distribution, 8 of each half with zero among both, divided by the largest
    *(-1.0, -0.6961928, -0.52507305, -0.3949175, -0.28444138, -0.18477343, -0.091050036, 0.0),
    *(0.0795803, 0.1609302, 0.2461123, 0.33791524, 0.44070983, 0.562617, 0.72295684, 1.0),
)


class Format(abc.ABC):
    """A number format. A number is (what its code stands for) x (the scale of its group)."""

    dtype: Any  # in which codes are stored
    largest: float  # what the largest absolute value of a group is in units of its scale

    @abc.abstractmethod
    def encode(self, units: Float[Array, "..."]) -> Shaped[Array, "..."]:
        """The codes that are nearest to numbers in units of their scale."""

    @abc.abstractmethod
    def decode(self, codes: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """What the codes stand for, float32."""


@dataclasses.dataclass(frozen=True)
class Integer(Format):
    """Whole numbers, rounded half to even. Three bits are stored in four: no storage has a type for three.

    Args:    bits: 2, 3, 4 or 8.
             grid: "symmetric": the largest value is exactly 2^(bits-1) - 1, so that the lowest code is never used; "full": all codes are used, the
             scale is 2 max|w| / (2^bits - 1), and a positive largest value is half a scale off.
    Source:  "full": as the program of Frantar et al. 2022 (GPTQ), where an output has weights of both signs.
    """

    bits: int
    grid: Grid = "symmetric"

    @property
    def dtype(self) -> Any:
        """int2, int4 or int8."""
        return {2: jnp.int2, 3: jnp.int4, 4: jnp.int4, 8: jnp.int8}[self.bits]

    @property
    def largest(self) -> float:
        """2^(bits-1) - 1, and half more on the full grid."""
        return 2.0 ** (self.bits - 1) - (0.5 if self.grid == "full" else 1.0)

    def encode(self, units: Float[Array, "..."]) -> Shaped[Array, "..."]:
        """The nearest whole numbers that have a code."""
        half = 2 ** (self.bits - 1)
        return jnp.clip(jnp.round(units), -half, half - 1).astype(self.dtype)

    def decode(self, codes: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """The whole numbers."""
        return codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class NormalFloat(Format):
    """Sixteen levels, equally likely where numbers are normal. Code 0 is zero, so that zeros are seen as such; -8 is the highest level.

    Source:  Dettmers et al. 2023 (QLoRA), section 3; the values are those of bitsandbytes.
    """

    dtype: Any = jnp.int4
    largest: float = 1.0

    def encode(self, units: Float[Array, "..."]) -> Shaped[Array, "..."]:
        """The codes of the nearest levels."""
        levels = jnp.asarray(NORMAL_FLOAT, jnp.float32)
        number = jnp.searchsorted((levels[1:] + levels[:-1]) / 2, units).astype(jnp.int32)
        return ((number + 1) % 16 - 8).astype(self.dtype)

    def decode(self, codes: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """The levels."""
        return jnp.asarray(NORMAL_FLOAT, jnp.float32)[(codes.astype(jnp.int32) + 7) % 16]


@dataclasses.dataclass(frozen=True)
class Float8(Format):
    """Four bits of exponent and three of mantissa, up to 448.

    Source:  Micikevicius et al. 2022, E4M3.
    """

    dtype: Any = jnp.float8_e4m3fn
    largest: float = 448.0

    def encode(self, units: Float[Array, "..."]) -> Shaped[Array, "..."]:
        """The nearest numbers of this type."""
        return units.astype(self.dtype)

    def decode(self, codes: Shaped[Array, "..."]) -> Float[Array, "..."]:
        """The same numbers."""
        return codes.astype(jnp.float32)


INTEGERS = {"int8": 8, "int4": 4, "int3": 3, "int2": 2}
FORMATS = (*INTEGERS, "nf4", "fp8")


def number_format(name: str, grid: Grid = "symmetric") -> Format:
    """The format of this name.

    Raises:  ConfigError: an unknown name, or a grid for what has none.
    """
    if name not in FORMATS:
        raise ConfigError(f"method.format={name!r} is unknown{nearest(name, FORMATS)}")
    if name in INTEGERS:
        return Integer(INTEGERS[name], grid)
    if grid != "symmetric":
        raise ConfigError(f"method.grid={grid}: only integers have one; method.format={name} needs grid=symmetric")
    return NormalFloat() if name == "nf4" else Float8()


def scales(matrix: Float[Array, "i o"], form: Format, group: int | None = None) -> Float[Array, "g o"]:
    """The scale of each group of inputs in each output: its largest absolute value / `form.largest`; where all are zero, as if it were 1.

    Args:    group: inputs that share a scale; None: all.
    """
    inputs, outputs = matrix.shape
    largest = jnp.abs(matrix).reshape(-1, inputs if group is None else group, outputs).max(1)
    return jnp.where(largest > 0, largest, 1.0) * (1 / form.largest)


def encode(matrix: Float[Array, "i o"], scale: Float[Array, "g o"], form: Format) -> Shaped[Array, "i o"]:
    """The codes nearest to the matrix.

    Multiplied with reciprocals here and in `scales`: a compiler makes that of divisions where it can, and codes must not depend on whether it did.
    """
    return form.encode((_grouped(matrix, scale) * (1 / scale)[:, None]).reshape(matrix.shape))


def decode(codes: Shaped[Array, "i o"], scale: Float[Array, "g o"], form: Format) -> Float[Array, "i o"]:
    """The matrix that the codes stand for, float32.

    It is made outputs first: from codes that are kept so, a compiler decodes while it multiplies with a vector, and no matrix is written.
    """
    units = form.decode(codes.T)  # o i
    return (units.reshape(len(units), len(scale), -1) * scale.T[:, :, None]).reshape(units.shape).T


def _grouped(matrix, scale):
    return matrix.reshape(len(scale), -1, matrix.shape[1])  # g i/g o
