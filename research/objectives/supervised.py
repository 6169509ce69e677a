"""What the objectives with one module and one input share."""

import abc
import dataclasses
import functools
from typing import Any, ClassVar

import flax.linen as nn
import jax
from jaxtyping import Array

from research.core.errors import DataError
from research.core.types import Batch, Decoder, Edits, Hyper, Tally, Tree
from research.layers.tap import nest

INPUTS = ("image", "features", "audio", "tokens")  # the fields of a batch that can be a model's input


@dataclasses.dataclass(frozen=True)
class Supervised(abc.ABC):
    """A module applied to a batch's one input; a subclass adds `coefficients`, `weights` and `tally`.

    Args:    module: called as `module(input, mask=, index=, hyper=, train=) -> (outputs, taps)`.
    """

    module: nn.Module
    batch_coupled: ClassVar[bool] = False
    output: ClassVar[str] = "logits"  # what predict calls the outputs

    def init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """(params, the module's other collections) for a batch of these shapes."""
        variables = dict(_init(self.module, key, _input(batch)))
        return variables.pop("params"), variables

    def still(self, key: jax.Array, batch: Batch) -> Tree:
        """None: all that this model needs is in params and extra."""
        return None

    def apply(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool, edits: Edits | None = None
    ) -> tuple[Any, dict[str, Array], Tree]:
        """(outputs, taps, extra): one forward pass; in training `extra` comes back with its new statistics."""
        variables = {"params": params, **extra} | ({"edits": nest(edits)} if edits else {})
        inputs: dict[str, Any] = {"mask": batch.get("mask"), "index": batch.get("index"), "hyper": hyper, "train": train}
        rngs = None if key is None else {"dropout": key}
        result: Any = self.module.apply(variables, _input(batch), **inputs, rngs=rngs, mutable=list(extra) if train else [])
        (outputs, taps), changed = result
        return outputs, taps, {**extra, **changed}

    def __call__(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool
    ) -> tuple[Tally, Tree]:
        """(tally, extra): the sums of one microbatch."""
        outputs, _, extra = self.apply(params, extra, frozen, batch, key, hyper, train=train)
        return self.tally(outputs, batch, hyper, train=train), extra

    @abc.abstractmethod
    def tally(self, outputs: Array, batch: Batch, hyper: Hyper, *, train: bool) -> Tally:
        """The sums that these outputs contribute."""

    def predict(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, edits: Edits | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """({"logits" or "value": outputs}, taps)."""
        outputs, taps, _ = self.apply(params, extra, frozen, batch, key, hyper, train=False, edits=edits)
        return {self.output: outputs}, taps

    def derived(self, means: dict[str, float | None]) -> dict[str, float]:
        """Metrics that are functions of the means, computed once on the host."""
        return {}

    def decoder(self) -> Decoder | None:
        """None: nothing here is made token by token."""
        return None


@functools.partial(jax.jit, static_argnums=0)
def _init(module, key, x):
    return module.init(key, x, train=False)


def _input(batch: Batch) -> Array:
    """The batch's one input field."""
    found = [name for name in INPUTS if name in batch]
    if len(found) != 1:
        raise DataError(f"a batch with {', '.join(batch)} has {len(found)} inputs for the model; it needs exactly one of {', '.join(INPUTS)}")
    return batch[found[0]]
