"""What the objectives that add one term to another objective share."""

import abc
import dataclasses
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from research.core.gradients import Run
from research.core.types import Batch, Decoder, Edits, Hyper, Objective, Tally, Tree
from research.metrics.average import Pair


@dataclasses.dataclass(frozen=True)
class Penalised(abc.ABC):
    """An objective and a penalty on how its model comes to its answers; in all else it is that objective.

    A subclass has a field named as its term, the coefficient, and adds `penalty`. The parameters are the model's own, so the run is read,
    compressed and explained as one without the penalty. With coefficient 0 the penalty is not computed; None: read from hyper.

    Args:    objective: what is learned.
    """

    objective: Objective
    term: ClassVar[str]
    reads: ClassVar[tuple[str, ...]] = ()  # fields of the batch that the penalty needs; a split without them is scored without it

    def __post_init__(self):
        value = getattr(self, self.term)
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{self.term}={value} must be a number not below 0")
        if self.term in dict(self.objective.coefficients):
            raise ValueError(f"the objective inside has a term {self.term!r} already")

    @abc.abstractmethod
    def penalty(self, run: Run, batch: Batch, key: jax.Array) -> Pair:
        """(sum over the valid examples, their weight).

        Args:    run: the forward pass of this batch.  key: the step's; outside training always the same.
        """

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The denominator: the number of valid examples."""
        return valid(batch).sum(dtype=jnp.float32)

    @property
    def coefficients(self) -> tuple[tuple[str, float], ...]:
        """Those of the objective inside, and that of the penalty where it is used."""
        value = getattr(self, self.term)
        return self.objective.coefficients if value == 0 else (*self.objective.coefficients, (self.term, value or 0.0))

    @property
    def batch_coupled(self) -> bool:
        """As the objective inside."""
        return self.objective.batch_coupled

    @property
    def output(self) -> str:
        """What predict calls the outputs."""
        return getattr(self.objective, "output", "logits")

    def init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """As the objective inside."""
        return self.objective.init(key, batch)

    def still(self, key: jax.Array, batch: Batch) -> Tree:
        """As the objective inside."""
        return self.objective.still(key, batch)

    def apply(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool, edits: Edits | None = None
    ) -> tuple[Any, dict[str, Array], Tree]:
        """As the objective inside."""
        return self.objective.apply(params, extra, frozen, batch, key, hyper, train=train, edits=edits)

    def weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The denominators of the objective inside, and that of the penalty where it is used."""
        weights = self.objective.weights(batch)
        return weights if getattr(self, self.term) == 0 else {**weights, self.term: self.weight(batch)}

    def __call__(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool
    ) -> tuple[Tally, Tree]:
        """(tally, extra): the sums of one microbatch."""
        tally, changed = self.objective(params, extra, frozen, batch, key, hyper, train=train)
        if getattr(self, self.term) == 0 or (not train and any(name not in batch for name in self.reads)):
            return tally, changed

        def run(edits: Edits | None) -> tuple[Array, Mapping[str, Array]]:
            return self.objective.apply(params, extra, frozen, batch, key, hyper, train=train, edits=edits)[:2]

        pair = self.penalty(run, batch, jax.random.key(0) if key is None else key)
        return Tally({**tally.terms, self.term: pair[0]}, {**tally.metrics, self.term: pair}), changed

    def predict(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, edits: Edits | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """As the objective inside."""
        return self.objective.predict(params, extra, frozen, batch, key, hyper, edits=edits)

    def derived(self, means: dict[str, float | None]) -> dict[str, float]:
        """As the objective inside."""
        return self.objective.derived(means)

    def decoder(self) -> Decoder | None:
        """As the objective inside."""
        return self.objective.decoder()


def valid(batch: Batch) -> Bool[Array, "b"]:
    """Which examples count: of a text, those with a token that does."""
    mask = jnp.asarray(batch["mask"])
    return mask.reshape(len(mask), -1).any(1)


def per_example(values: Float[Array, "b ..."]) -> Float[Array, "b"]:
    """The sum over all axes but the first, in float32."""
    return values.astype(jnp.float32).reshape(len(values), -1).sum(1)


def valid_only(batch: Batch, outputs: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """1 at the outputs that count, else 0, of the outputs' shape and type."""
    mask = jnp.asarray(batch["mask"])
    return jnp.broadcast_to(mask.reshape(*mask.shape, *(1,) * (outputs.ndim - mask.ndim)), outputs.shape).astype(outputs.dtype)
