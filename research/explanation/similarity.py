"""How alike two layers see the same examples: centered kernel alignment."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.core.errors import ConfigError
from research.explanation.model import Examples, Model
from research.explanation.result import Finding, at_least
from research.explanation.vectors import drawn, last, read, sequential, vector_taps
from research.figures.explanation import Heat


@dataclasses.dataclass(frozen=True)
class CKA:
    """Linear centered kernel alignment of every pair of taps, of one run or of two: 1 where one is a rotation and a scaling of the other.

    Args:    at: taps; None: as `vector_taps` says.  other: another run, whose taps are the columns; None: this one's own.
             debias: estimate without the bias that makes wide layers look alike where examples are few (it may fall below 0).
             examples: of the split.  each: positions of every text.  split: train | validation | test; None: the last that there is.
    Raises:  ValueError: fewer than 4 examples.
    Source:  Kornblith et al. 2019, equation 4 with the linear kernel; debiased: Nguyen, Raghu and Kornblith 2021, equation 3 (Song et al. 2012).
    """

    at: tuple[str, ...] | str | None = None
    other: str | None = None
    debias: bool = True
    examples: int = 512
    each: int = 1
    split: str | None = None
    reads: ClassVar[str] = "nothing"

    def __post_init__(self):
        at_least(self, examples=4, each=1)

    def fits(self, model: Model) -> str | None:
        """It needs the data."""
        return "it has no data to compare layers on" if model.data is None else None

    def __call__(self, model: Model, examples: Examples | None, key: jax.Array) -> Finding:
        """The similarity of every pair.

        Raises:  ConfigError: an unknown tap, or another run that does not read the same inputs.
        """
        names = vector_taps(model, self.at)
        lot, places = jax.random.split(key)
        split = drawn(model, self.split or last(model), self.examples, lot)
        each = self.each if sequential(model) else None

        def seen(model: Model, names: list[str]) -> Float[Array, "l n n"]:
            items = read(model, split, names, places, each, whole=True)
            return jnp.stack([gram(jnp.asarray(items.values[name]), self.debias) for name in names])

        rows = columns = seen(model, names)
        others = names
        if self.other is not None:
            second = self._other(model)
            others = vector_taps(second, self.at)
            columns = seen(second, others)
        values = np.asarray(_aligned(rows, columns))
        title = f"{'debiased ' if self.debias else ''}linear CKA on {rows.shape[1]} {'positions' if sequential(model) else 'examples'}"
        heat = Heat(values, names, others, title, x=self.other or "", y="this run" if self.other else "", signed=False)
        lines = (
            ()
            if self.other is None
            else tuple(f"{name}: nearest is {others[int(row.argmax())]} ({row.max():.3f})" for name, row in zip(names, values, strict=True))
        )
        return Finding((heat,), {"rows": names, "columns": others}, {"similarity": values}, lines=lines)

    def _other(self, model: Model) -> Model:
        if model.open is None:
            raise ConfigError(f"method.other={self.other!r}: no other run can be opened from here")
        second = model.open(str(self.other))
        fields = [(one.field, tuple(one.spec["fields"][one.field]["shape"]), one.pieces and list(one.pieces)) for one in (model, second)]
        if fields[0] != fields[1]:
            what = "tokens" if fields[0][:2] == fields[1][:2] else f"{fields[1][0]} of shape {fields[1][1]}"
            raise ConfigError(f"method.other={self.other!r} reads other {what}: two runs are compared on inputs that both read")
        return second


def cka(x: Float[Array, "n d"], y: Float[Array, "n e"], debias: bool = False) -> Float[Array, ""]:
    """The similarity of two sets of vectors of the same items, in [0, 1] where it is not debiased."""
    first, second = gram(x, debias)[None], gram(y, debias)[None]
    return _aligned(first, second)[0, 0]


@functools.partial(jax.jit, static_argnums=1)
def gram(x: Float[Array, "n d"], debias: bool) -> Float[Array, "n n"]:
    """The inner products of the vectors, centered at their mean; without the diagonal, and U-centered, where it is to be debiased."""
    centered = x - x.mean(0, keepdims=True)
    centered = centered / jnp.sqrt((centered**2).sum() / len(x) + 1e-30)  # any scale gives the same similarity
    inner = jnp.matmul(centered, centered.T, precision="highest")
    if not debias:
        return inner
    n = len(x)
    inner = inner * (1.0 - jnp.eye(n, dtype=jnp.float32))
    row = inner.sum(1) / (n - 2)
    flat = inner - row[:, None] - row[None] + inner.sum() / ((n - 1) * (n - 2))
    return flat * (1.0 - jnp.eye(n, dtype=jnp.float32))


@jax.jit
def _aligned(first: Float[Array, "l n n"], second: Float[Array, "m n n"]) -> Float[Array, "l m"]:
    """Inner products of centered Gram matrices over the product of their lengths."""

    def product(a, b):
        return jnp.einsum("lij,mij->lm", a, b, precision="highest")

    def length(a):
        return jnp.sqrt(jnp.maximum(jnp.einsum("lij,lij->l", a, a, precision="highest"), 1e-12))

    return product(first, second) / (length(first)[:, None] * length(second)[None])
