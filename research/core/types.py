"""The contracts that the rooms meet in: what a step, an objective and a decoder are."""

from collections.abc import Mapping
from typing import Any, Protocol, TypeAlias

import flax.struct
import jax
from jaxtyping import Array, Float, Int

Tree: TypeAlias = Any  # a pytree of arrays
Batch: TypeAlias = Mapping[str, Any]  # a flat dict: image tokens source target label features audio mask weight index relevance teacher
Hyper: TypeAlias = Mapping[str, Float[Array, ""]]
Edits: TypeAlias = Mapping[str, Any]  # tap path -> (mask, value), or an array to add


@flax.struct.dataclass
class Tally:
    """What one microbatch contributes: sums to differentiate, and (sum, weight) pairs to report.

    Sums add over microbatches, devices, batches and whole splits, and are divided once, at the end.
    """

    terms: dict[str, Float[Array, ""]]
    metrics: dict[str, tuple[Array, Array]]


@flax.struct.dataclass
class State:
    """All that a checkpoint needs to go on bit for bit."""

    step: Int[Array, ""]  # optimizer updates made or skipped so far
    params: Tree  # floating leaves that the gradient sees
    extra: Tree  # what else the step changes: batch statistics, counters
    opt: Tree  # the optimizer's state
    key: jax.Array  # the run's typed PRNG key; never advanced, folded with `step`
    hyper: Any  # Hyper: the numbers that a sweep varies, values rather than constants of the program


class Decoder(Protocol):
    """An autoregressive model one token at a time; the cache is a plain pytree, batch axis first."""

    def begin(self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, length: int, hyper: Hyper) -> Tree:
        """A cache with room for `length` positions, filled with the prompt `batch["tokens"]` where its mask is True."""
        ...

    def advance(
        self, params: Tree, extra: Tree, frozen: Tree, cache: Tree, tokens: Int[Array, "b n"], hyper: Hyper
    ) -> tuple[Float[Array, "b n v"], Tree]:
        """The logits after each of n more tokens, and the longer cache."""
        ...

    def rewind(self, cache: Tree, length: Int[Array, "b"]) -> Tree:
        """The cache as it was when each row held `length` positions."""
        ...


class Objective(Protocol):
    """A model and its loss as pure functions: a frozen dataclass, equal and hashable by content."""

    coefficients: tuple[tuple[str, float], ...]  # term -> coefficient; a name listed in `train.values` is read from hyper instead
    batch_coupled: bool  # whether a term is no sum over items (in-batch contrastive, load balancing), so that accumulation is refused

    def init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """(params, extra) for a batch of these shapes; runs under `jax.eval_shape` too."""
        ...

    def still(self, key: jax.Array, batch: Batch) -> Tree:
        """`frozen`, as far as predicting needs it, in shape: what no gradient may see, as quantized kernels. None for most."""
        ...

    def apply(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool, edits: Edits | None = None
    ) -> tuple[Any, dict[str, Array], Tree]:
        """(outputs, taps, extra): one forward pass."""
        ...

    def weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The denominator of each term: a function of the batch alone, summed before the gradient is taken."""
        ...

    def __call__(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool
    ) -> tuple[Tally, Tree]:
        """(tally, extra): the sums of one microbatch."""
        ...

    def predict(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, edits: Edits | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """({"logits" | "value": ...}, taps): what inference, explanation and compression see."""
        ...

    def derived(self, means: dict[str, float | None]) -> dict[str, float]:
        """Metrics that are functions of the means, as perplexity; computed once, on the host."""
        ...

    def decoder(self) -> Decoder | None:
        """One-token-at-a-time decoding, where the model has it."""
        ...
