"""Right for the right reasons: an answer may not depend on the parts of the input that are known to be irrelevant."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.errors import ConfigError
from research.core.gradients import Run, pullback
from research.core.types import Batch
from research.metrics.average import Pair, average
from research.objectives.penalised import Penalised, per_example, valid, valid_only


@dataclasses.dataclass(frozen=True)
class RightReasons(Penalised):
    """The objective of a classifier, plus coefficient x the squared gradient of its log-probabilities at irrelevant inputs.

    penalty = sum over the entries i of the input of ((1 - relevance_i) d(sum over classes k of log p_k) / d input_i)^2, averaged over the valid
    examples. The batch's `relevance` is 1 where the input may be used and 0 where it may not, with the axes of the input or its first ones. Of
    a text the input is the embedding, and the log-probabilities of all valid positions are summed. Batch statistics mix examples: then the
    gradient holds the influence on other examples too.

    Args:    right_reasons: the coefficient, not below 0; None: read from hyper.  at: the tap whose gradient is penalised.
    Raises:  ValueError: a coefficient out of range, or an objective that is no classifier's.
    Source:  Ross, Hughes and Doshi-Velez 2017, whose sums over the examples are not divided by their number.
    """

    right_reasons: float | None = 1.0
    at: str = "input"
    term: ClassVar[str] = "right_reasons"
    reads: ClassVar[tuple[str, ...]] = ("relevance",)

    def __post_init__(self):
        super().__post_init__()
        if self.output != "logits":
            raise ValueError(f"{type(self.objective).__name__} has no log-probabilities; right reasons are those of a classifier")

    def penalty(self, run: Run, batch: Batch, key: jax.Array) -> Pair:
        """The squared gradient at irrelevant inputs.

        Raises:  ConfigError: a relevance of another shape than the input's.
        """
        outputs, pull = pullback(run, self.at)
        slope = pull(jax.grad(lambda x: (jax.nn.log_softmax(x.astype(jnp.float32)) * valid_only(batch, x)).sum())(outputs))
        irrelevant = 1.0 - _relevance(batch, slope)
        return average(per_example((irrelevant * slope.astype(jnp.float32)) ** 2), valid(batch))


def _relevance(batch: Batch, like: Float[Array, "b ..."]) -> Float[Array, "b ..."]:
    """The batch's relevance over the axes of an input."""
    relevance = jnp.asarray(batch["relevance"]).astype(jnp.float32)
    relevance = relevance.reshape(*relevance.shape, *(1,) * (like.ndim - relevance.ndim))
    if relevance.ndim != like.ndim or any(n not in (1, m) for n, m in zip(relevance.shape, like.shape, strict=True)):
        raise ConfigError(f"relevance has the shape {jnp.shape(batch['relevance'])[1:]} for an input of the shape {like.shape[1:]}")
    return relevance
