"""SmoothGrad and its variants: any method's explanation, averaged over inputs with noise."""

import dataclasses
import functools
import inspect
from typing import Any, ClassVar, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.core.build import build
from research.core.errors import nearest
from research.core.keys import named, per_example
from research.core.progress import track
from research.core.types import Batch, Edits, Hyper, Objective, Tree
from research.explanation import methods
from research.explanation.gradient import ROWS, read, real
from research.explanation.model import INPUT, Examples, Model, with_input
from research.explanation.result import Attribution, Method, at_least

VARIANTS = ("mean", "squared", "variance")
NOISE = "noise"  # the field of a batch that holds what is added to its input


@dataclasses.dataclass(frozen=True, kw_only=True)
class SmoothGrad:
    """What a method says of inputs with noise: its mean, mean square or variance.

    The noise is added at the tap `input`, so tokens get it on their embeddings, and every method sees it as if it were the input's own.

    Args:    method: the name of the method.  settings: of it, where they are not its defaults.
             samples: inputs with noise for each example, at least 1.
             noise: standard deviation, as a share of the range of each example's input.
             variant: "mean" (SmoothGrad), "squared" (its mean square) or "variance" (VarGrad).  rows: inputs in one call of the method.
    Raises:  ValueError: samples, rows or noise out of range, an unknown variant.
    Source:  Smilkov et al. 2017; the variants: Hooker et al. 2019, Adebayo et al. 2018.
    """

    method: str = "saliency"
    settings: Any = ()
    samples: int = 32
    noise: float = 0.15
    variant: str = "mean"
    rows: int = ROWS
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        at_least(self, samples=1, rows=1)
        if not self.noise >= 0:
            raise ValueError(f"noise={self.noise} must be at least 0")
        if self.variant not in VARIANTS:
            raise ValueError(f"variant={self.variant!r}{nearest(self.variant, VARIANTS)}")
        if self.method == "smooth_grad":
            raise ValueError("method=smooth_grad would smooth itself; name another method")

    def fits(self, model: Model) -> str | None:
        """What the method says of this model, and whether it gives numbers that can be averaged."""
        if inspect.signature(type(self.inner).__call__).return_annotation is not Attribution:
            return f"{self.method} gives no number for each part of an input, so there is nothing to smooth"
        return self.inner.fits(model)

    @functools.cached_property
    def inner(self) -> Method:
        """The method that is smoothed."""
        return build(methods.node(self.method, dict(self.settings)), where="method")

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """The mean, mean square or variance of what the method says, at the entries that it speaks of."""
        value = read(model, examples, INPUT)
        counted = real(examples)
        counted = np.expand_dims(counted, tuple(range(counted.ndim, value.ndim)))
        axes = tuple(range(1, value.ndim))
        span = np.where(counted, value, -np.inf).max(axes, keepdims=True) - np.where(counted, value, np.inf).min(axes, keepdims=True)
        keys = per_example(named(key, NOISE), jnp.asarray(examples.batch["index"]))
        drawn = jax.vmap(lambda key: jax.random.normal(key, (self.samples, *value.shape[1:]), jnp.float32))(keys)
        return self.over(model, examples, np.asarray(drawn) * np.float32(self.noise) * span[:, None].astype(np.float32), key)

    def over(self, model: Model, examples: Examples, noise: Float[np.ndarray, "b n ..."], key: jax.Array) -> Attribution:
        """The same with noise that is given."""
        every = np.concatenate([np.zeros_like(noise[:, :1]), noise], 1)  # the first of each example is the example itself
        count, each = every.shape[:2]
        size = min(self.rows, count * each)
        rows = np.minimum(np.arange(-(-count * each // size) * size), count * each - 1)  # the last call is filled up with the last row
        batch = {**{name: np.repeat(x, each, 0) for name, x in examples.batch.items()}, NOISE: every.reshape(-1, *every.shape[2:])}
        names, target = np.repeat(np.asarray(examples.names, object), each), np.repeat(examples.target, each, 0)
        noisy = dataclasses.replace(model, objective=cast(Objective, Noisy(model.objective)))  # explanation calls nothing but predict
        results = []
        for part in track(rows.reshape(-1, size), f"smooth {self.method}"):
            found = Examples({name: x[part] for name, x in batch.items()}, list(names[part]), target[part])
            results.append(cast(Attribution, self.inner(noisy, found, key)))
        values, output = (np.concatenate([getattr(result, name) for result in results])[: count * each] for name in ("values", "output"))
        values = values.reshape(count, each, *values.shape[1:])[:, 1:]
        made = {"mean": values.mean, "variance": values.var, "squared": np.square(values).mean}[self.variant](1)
        return Attribution(made, None, None, output.reshape(count, each)[:, 0], examples.target, at=results[0].at)


@dataclasses.dataclass(frozen=True)
class Noisy:
    """An objective whose predictions are those for the input with `batch["noise"]` added; what replaces the input replaces the noise too."""

    objective: Objective

    def predict(
        self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array | None, hyper: Hyper, *, edits: Edits | None = None
    ) -> tuple[dict[str, Array], dict[str, Array]]:
        """As the objective's."""
        plain = {name: x for name, x in batch.items() if name != NOISE}
        predict = functools.partial(self.objective.predict, params, extra, frozen, plain, key, hyper)
        if NOISE not in batch:
            return predict(edits=edits)
        value = predict()[1][INPUT]  # the rest of this call is dead code
        return predict(edits=with_input(value + jnp.asarray(batch[NOISE], value.dtype), edits))
