"""The Jacobian penalty: small changes of the input shall change the outputs little."""

import dataclasses
import math
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core import keys
from research.core.gradients import Run, pullback
from research.core.types import Batch
from research.metrics.average import Pair, average
from research.objectives.penalised import Penalised, per_example, valid, valid_only


@dataclasses.dataclass(frozen=True)
class JacobianPenalty(Penalised):
    """An objective, plus coefficient x half the squared Frobenius norm of d outputs / d input, averaged over the valid examples.

    With n outputs, the squared norm is n times the mean of |v . J|^2 over directions v on the unit sphere, so a few random directions estimate
    it without bias, at one backward pass each. An example's directions depend on its number and the step alone.

    Args:    jacobian: the coefficient, not below 0; None: read from hyper.
             projections: random directions of each example; None: exact, with one backward pass for each output.
             at: the tap that stands for the input.
    Raises:  ValueError: a coefficient out of range, or less than one projection.
    Source:  Hoffman, Roberts and Yaida 2019, section 2.
    """

    jacobian: float | None = 0.01
    projections: int | None = 1
    at: str = "input"
    term: ClassVar[str] = "jacobian"

    def __post_init__(self):
        super().__post_init__()
        if self.projections is not None and self.projections < 1:
            raise ValueError(f"projections={self.projections} must be at least 1, or null for the exact norm")

    def penalty(self, run: Run, batch: Batch, key: jax.Array) -> Pair:
        """Half the squared norm, exact or estimated."""
        outputs, pull = pullback(run, self.at)
        size = math.prod(outputs.shape[1:])
        if self.projections is None:
            basis = jnp.eye(size, dtype=outputs.dtype).reshape(size, 1, *outputs.shape[1:])
            along, share = jnp.broadcast_to(basis, (size, *outputs.shape)), 1.0
        else:
            along, share = self._directions(batch, key, outputs, self.projections), size / self.projections
        slopes = jax.vmap(pull)(along * valid_only(batch, outputs)[None])  # p b ...
        return average(0.5 * share * jax.vmap(per_example)(slopes.astype(jnp.float32) ** 2).sum(0), valid(batch))

    def _directions(self, batch, key, outputs, count: int) -> Float[Array, "p b ..."]:
        """Unit vectors over all outputs of an example, uniform on the sphere."""
        each = keys.per_example(keys.named(key, self.term), batch["index"])
        shape = (count, math.prod(outputs.shape[1:]))
        drawn = jax.vmap(lambda key: jax.random.normal(key, shape, jnp.float32))(each)  # b p n
        unit = drawn / jnp.linalg.norm(drawn, axis=-1, keepdims=True)
        return unit.swapaxes(0, 1).reshape(count, *outputs.shape).astype(outputs.dtype)
