"""Attention alignment: heads shall look where the data says that the answer lies."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from research.core.errors import ConfigError
from research.core.gradients import Run, named
from research.core.types import Batch
from research.metrics.average import Pair, average
from research.objectives.penalised import Penalised, valid


@dataclasses.dataclass(frozen=True)
class AttentionAlignment(Penalised):
    """An objective, plus coefficient x KL(relevance || mean attention), averaged over the valid examples that have a relevant token.

    The batch's `relevance`, b t, is scaled to sum to 1 over the valid tokens of a text; the attention is the mean over the chosen taps, their
    chosen heads and the valid tokens that look.

    Args:    layers: taps of attention weights, b h t s, as block_0/attention/weights; at least one.  heads: of each; (): all.
             attention_alignment: the coefficient, not below 0; None: read from hyper.
    Raises:  ValueError: a coefficient out of range, or no layers.
    Source:  Liu, Utiyama, Finch and Sumita 2016 (supervised attention): their cross-entropy, less the entropy of the relevance, so that 0 is reached.
    """

    layers: tuple[str, ...] = ()
    heads: tuple[int, ...] = ()
    attention_alignment: float | None = 1.0
    term: ClassVar[str] = "attention_alignment"
    reads: ClassVar[tuple[str, ...]] = ("relevance",)

    def __post_init__(self):
        super().__post_init__()
        if not self.layers:
            raise ValueError("layers=[]: name the taps of attention weights, as [block_0/attention/weights]")

    def weight(self, batch: Batch) -> Float[Array, ""]:
        """The number of valid examples with a relevant token."""
        return _told(batch).sum(dtype=jnp.float32)

    def penalty(self, run: Run, batch: Batch, key: jax.Array) -> Pair:
        """The divergence of the mean attention from the relevance.

        Raises:  ConfigError: a tap or a head that is not there, or a tap that holds no attention weights.
        """
        taps = run(None)[1]
        mean = sum(self._mean(named(taps, layer), layer, batch) for layer in self.layers) / len(self.layers)
        relevance = _relevance(batch)
        wanted = relevance / jnp.maximum(relevance.sum(1, keepdims=True), jnp.finfo(jnp.float32).tiny)
        safe = jnp.where(wanted > 0, wanted, 1.0)
        each = jnp.where(wanted > 0, wanted * (jnp.log(safe) - jnp.log(jnp.maximum(mean, 1e-30))), 0.0)
        return average(each.sum(1), _told(batch))

    def _mean(self, weights: Array, layer: str, batch: Batch) -> Float[Array, "b s"]:
        b, t = batch["mask"].shape
        if weights.ndim != 4 or weights.shape[0] != b or weights.shape[2:] != (t, t):
            hint = "; use model.scan=false" if weights.ndim == 5 else ""
            raise ConfigError(f"objective.layers: {layer!r} has the shape {weights.shape}, and attention weights are b h t t{hint}")
        for head in self.heads:
            if not 0 <= head < weights.shape[1]:
                raise ConfigError(f"objective.heads: {head} is no head of {layer!r}; they are numbered 0 to {weights.shape[1] - 1}")
        chosen = weights[:, jnp.asarray(self.heads, jnp.int32)] if self.heads else weights
        looking = jnp.asarray(batch["mask"]).astype(jnp.float32)
        summed = jnp.einsum("bts,bt->bs", chosen.astype(jnp.float32).mean(1), looking)
        return summed / jnp.maximum(looking.sum(1, keepdims=True), 1.0)


def _relevance(batch: Batch) -> Float[Array, "b t"]:
    """The relevance of the valid tokens."""
    return jnp.where(batch["mask"], jnp.asarray(batch["relevance"]).astype(jnp.float32), 0.0)


def _told(batch: Batch) -> Bool[Array, "b"]:
    """The examples with a relevant token."""
    return valid(batch) & (_relevance(batch).sum(1) > 0)
