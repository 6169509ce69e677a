"""An objective whose model's parameters are made of others: the form of every compressed model that is not simply a smaller one."""

import abc
import contextlib
import dataclasses
from typing import Any

import jax
from jaxtyping import Array, Float, Int

from research.core.types import Batch, Decoder, Edits, Hyper, Objective, Tally, Tree


@dataclasses.dataclass(frozen=True)
class Wrapper(abc.ABC):
    """An objective around another one: what is trained and what stands still together make the parameters of the plain model inside.

    A subclass says how the plain parameters come apart (`split`) and together (`whole`); all else forwards. Wrappers nest: `frozen` is
    {"own": what this one keeps still, "inner": the frozen of the objective inside}, and `whole` always gives the plain model's parameters.

    Args:    objective: what is wrapped, plain or a wrapper itself.
    """

    objective: Objective

    @abc.abstractmethod
    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(what is trained, what stands still) of parameters of the objective inside; traceable, so that shapes are known without arrays."""

    @abc.abstractmethod
    def whole(self, params: Tree, frozen: Tree) -> Tree:
        """The plain model's parameters."""

    def running(self, params: Tree, frozen: Tree) -> contextlib.AbstractContextManager[Any]:
        """The context in which the plain model runs, where layers compute otherwise than they do by themselves."""
        return self.objective.running(params, frozen["inner"]) if isinstance(self.objective, Wrapper) else contextlib.nullcontext()

    @property
    def plain(self) -> Objective:
        """The innermost objective."""
        return self.objective.plain if isinstance(self.objective, Wrapper) else self.objective

    @property
    def coefficients(self) -> tuple[tuple[str, float], ...]:
        """Those of the objective inside."""
        return self.objective.coefficients

    @property
    def batch_coupled(self) -> bool:
        """As the objective inside."""
        return self.objective.batch_coupled

    def init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """(what is trained, extra)."""
        params, extra = self.objective.init(key, batch)
        return self.split(params)[0], extra

    def still(self, key: jax.Array, batch: Batch) -> Tree:
        """{"own": what this wrapper keeps still, "inner": what the objective inside does}."""
        params, _ = self.objective.init(key, batch)
        return {"own": self.split(params)[1], "inner": self.objective.still(key, batch)}

    def apply(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool, edits: Edits | None = None
    ) -> tuple[Any, dict[str, Array], Tree]:
        """(outputs, taps, extra) of the plain model."""
        with self.running(params, frozen):
            return self.plain.apply(self.whole(params, frozen), extra, None, batch, key, hyper, train=train, edits=edits)

    def weights(self, batch: Batch) -> dict[str, Float[Array, ""]]:
        """The denominators of the objective inside."""
        return self.objective.weights(batch)

    def __call__(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, train: bool
    ) -> tuple[Tally, Tree]:
        """(tally, extra) of the plain objective."""
        with self.running(params, frozen):
            return self.plain(self.whole(params, frozen), extra, None, batch, key, hyper, train=train)

    def predict(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, edits: Edits | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """What the plain objective predicts, and its taps."""
        with self.running(params, frozen):
            return self.plain.predict(self.whole(params, frozen), extra, None, batch, key, hyper, edits=edits)

    def derived(self, means: dict[str, float | None]) -> dict[str, float]:
        """Those of the objective inside."""
        return self.objective.derived(means)

    def decoder(self) -> Decoder | None:
        """The plain objective's decoder over the plain model's parameters."""
        inner = self.plain.decoder()
        return None if inner is None else WrappedDecoder(self, self.keeping(inner))

    def keeping(self, decoder: Decoder) -> Decoder:
        """The plain objective's decoder with its cache in the form in which this objective, or one inside, wants it kept."""
        return self.objective.keeping(decoder) if isinstance(self.objective, Wrapper) else decoder


@dataclasses.dataclass(frozen=True)
class WrappedDecoder:
    """A decoder whose parameters are made of others at each call.

    Args:    wrapper: makes them.  decoder: of the plain objective.
    """

    wrapper: Wrapper
    decoder: Decoder

    def begin(self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, length: int, hyper: Hyper) -> Tree:
        """As the plain decoder's."""
        with self.wrapper.running(params, frozen):
            return self.decoder.begin(self.wrapper.whole(params, frozen), extra, None, batch, length, hyper)

    def advance(
        self, params: Tree, extra: Tree, frozen: Tree, cache: Tree, tokens: Int[Array, "b n"], hyper: Hyper
    ) -> tuple[Float[Array, "b n v"], Tree]:
        """As the plain decoder's."""
        with self.wrapper.running(params, frozen):
            return self.decoder.advance(self.wrapper.whole(params, frozen), extra, None, cache, tokens, hyper)

    def rewind(self, cache: Tree, length: Int[Array, "b"]) -> Tree:
        """As the plain decoder's."""
        return self.decoder.rewind(cache, length)
