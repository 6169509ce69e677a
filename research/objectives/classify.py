"""Classification: one of n classes per example."""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.errors import ConfigError
from research.core.types import Batch, Hyper, Tally
from research.losses.cross_entropy import cross_entropy
from research.metrics.average import average
from research.metrics.classification import accuracy, top_k
from research.objectives.supervised import Supervised


@dataclasses.dataclass(frozen=True)
class Classify(Supervised):
    """Cross-entropy of `label`, with accuracy.

    Smoothing regularises training only: outside it `loss` is the plain cross-entropy, comparable between runs.

    Args:    label_smoothing: share of the target spread over all classes; None: read from hyper.
             class_weights: weight of each class in the loss; None: all 1.  top_k: also report how often the label is among the k highest.
    Raises:  ValueError: a smoothing or k out of range.
    """

    label_smoothing: float | None = 0.0
    class_weights: tuple[float, ...] | None = None
    top_k: int | None = None
    coefficients: ClassVar[tuple[tuple[str, float], ...]] = (("cross_entropy", 1.0),)

    def __post_init__(self):
        if self.label_smoothing is not None and not 0.0 <= self.label_smoothing < 1.0:
            raise ValueError(f"label_smoothing={self.label_smoothing} must be in [0, 1)")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k={self.top_k} must be at least 1")

    def weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The sum of the class weights of the valid examples."""
        return {"cross_entropy": self._weight(batch).sum()}

    def tally(self, outputs: Float[Array, "b n"], batch: Batch, hyper: Hyper, *, train: bool) -> Tally:
        """Sums of the loss and of the right answers.

        Raises:  ConfigError: the number of class weights is not that of the classes.
        """
        if self.class_weights is not None and len(self.class_weights) != outputs.shape[-1]:
            raise ConfigError(f"objective.class_weights has {len(self.class_weights)} entries for {outputs.shape[-1]} classes")
        label, mask = batch["label"], batch["mask"]
        smoothing = hyper["label_smoothing"] if self.label_smoothing is None else self.label_smoothing
        loss = cross_entropy(outputs, label, label_smoothing=smoothing if train else 0.0, class_weights=self._class_weights())
        total, _ = average(loss, mask)  # the loss is weighted by class already
        metrics = {"loss": (total, self._weight(batch).sum()), "accuracy": accuracy(outputs, label, mask)}
        if self.top_k is not None:
            metrics[f"top_{self.top_k}"] = top_k(outputs, label, mask, self.top_k)
        return Tally({"cross_entropy": total}, metrics)

    def _class_weights(self):
        return None if self.class_weights is None else jnp.asarray(self.class_weights, jnp.float32)

    def _weight(self, batch):
        mask, weights = batch["mask"].astype(jnp.float32), self._class_weights()
        return mask if weights is None else mask * weights[batch["label"]]
