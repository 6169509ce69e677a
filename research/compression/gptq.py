"""GPTQ: rounding input by input, each error made up for by the weights of the inputs that follow."""

import dataclasses
from collections.abc import Iterable

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.compression.codes import Grid, encode, number_format, scales
from research.compression.compensate import check, compensate, inverse_cholesky
from research.compression.linear import Linear, Moments, blocks
from research.compression.quantize import Quantization


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated(Quantization):
    """Kernels are rounded by what their inputs are like.

    Args:    sequential: quantize block by block in the order in which they run, and see each block's inputs as the quantized ones before it make
             them; False: as the dense model makes them, in one pass over the data.
    """

    sequential: bool = True

    def stages(self, layers: Iterable[str]) -> list[list[str]]:
        """One for each block, or one for all."""
        return blocks(layers) if self.sequential else super().stages(layers)

    def needs(self, layer: Linear) -> bool:
        """Every layer but embeddings, which are rounded to nearest."""
        return layer.kind != "embedding" or super().needs(layer)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GPTQ(Calibrated):
    """Inputs are rounded in turn, each error made up for by the weights of the inputs that follow; embeddings are rounded to nearest.

    Scales come from the weights as they are at first, those of inputs that are always zero left out.

    Args:    damp: share of the Hessian's mean diagonal that is added to it.  block: inputs between two updates of the rest.
             order: inputs with the largest second moment first; they still share scales with their neighbours.
    Source:  Frantar et al. 2022, algorithm 1; as the authors' program with symmetric `static_groups`, where an output has weights of both signs.
    """

    format: str = "int4"
    grid: Grid = "full"
    damp: float = 0.01
    block: int = 128
    order: bool = False

    def __post_init__(self):
        super().__post_init__()
        check(self.block, self.damp)

    def codes(self, layer: Linear, matrix: Float[Array, "i o"], group: int | None, seen: Moments | None) -> dict[str, Array]:
        """The matrix rounded so that its product with the data stays near."""
        if layer.kind == "embedding" or seen is None:
            return self.nearest(matrix, group)
        form = number_format(self.format, self.grid)
        hessian = seen.gram * (2 / seen.count)
        silent = jnp.diagonal(hessian) == 0
        matrix = jnp.where(silent[:, None], 0.0, matrix)
        scale = scales(matrix, form, group)
        order = jnp.argsort(-jnp.diagonal(hessian)) if self.order else jnp.arange(len(matrix))
        steps = jnp.repeat(scale, len(matrix) // len(scale), axis=0)[order]  # i o

        def rule(start, i, weights):
            step = steps[start + i]
            return form.decode(form.encode(weights * (1 / step))) * step

        factor = inverse_cholesky(hessian[order][:, order], self.damp)
        rounded = compensate(matrix[order], factor, lambda start, _: start, rule, block=self.block)
        rounded = rounded[jnp.argsort(order)]
        return {"values": encode(rounded, scale, form), "scale": scale}
