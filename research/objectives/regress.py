"""Regression: one or more numbers per example."""

import dataclasses
import functools
import math
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.errors import nearest
from research.core.types import Batch, Hyper, Tally
from research.losses.regression import absolute_error, huber, squared_error
from research.metrics.average import average
from research.objectives.supervised import Supervised

LOSSES = {"mse": squared_error, "mae": absolute_error, "huber": huber}


@dataclasses.dataclass(frozen=True)
class Regress(Supervised):
    """The mean of a loss over all outputs of all examples, with mean squared and mean absolute error.

    Args:    loss: "mse", "mae" or "huber".  delta: where huber turns from quadratic to linear, in the unit of the target.
    Raises:  ValueError: an unknown loss, or a delta that is not above 0.
    """

    loss: str = "mse"
    delta: float = 1.0
    output: ClassVar[str] = "value"

    def __post_init__(self):
        if self.loss not in LOSSES:
            raise ValueError(f"loss={self.loss!r} is unknown{nearest(self.loss, LOSSES)}")
        if self.delta <= 0.0:
            raise ValueError(f"delta={self.delta} must be above 0")

    @property
    def coefficients(self) -> tuple[tuple[str, float], ...]:
        """One term, named after the loss."""
        return ((self.loss, 1.0),)

    def weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The number of valid targets."""
        return {self.loss: self._mask(batch).sum(dtype=jnp.float32)}

    def tally(self, outputs: Float[Array, "b o"], batch: Batch, hyper: Hyper, *, train: bool) -> Tally:
        """Sums of the loss and of both errors."""
        target, mask = batch["target"], self._mask(batch)
        loss = functools.partial(huber, delta=self.delta) if self.loss == "huber" else LOSSES[self.loss]
        pair = average(loss(outputs, target), mask)
        errors = {"mse": average(squared_error(outputs, target), mask), "mae": average(absolute_error(outputs, target), mask)}
        return Tally({self.loss: pair[0]}, {"loss": pair, **errors})

    def derived(self, means: dict[str, float | None]) -> dict[str, float]:
        """The root of the mean squared error, in the unit of the target."""
        mse = means.get("mse")
        return {} if mse is None else {"rmse": math.sqrt(mse)}

    def _mask(self, batch):
        return jnp.broadcast_to(batch["mask"][:, None], batch["target"].shape)  # b -> b o
