"""What a model holds at its taps over the run's own data, one vector for each item, and linear classifiers of such vectors."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.core.errors import ConfigError
from research.core.progress import track
from research.core.types import Batch
from research.explanation.model import INPUT, Model
from research.explanation.split import Split

WIDEST = 1024  # numbers of a tap that are read one by one; of a larger one the mean over its places
ROWS = 64  # examples in one call of the model


@dataclasses.dataclass(frozen=True, eq=False)
class Items:
    """Vectors of items: examples, or positions of texts.

    Args:    values: tap -> vectors.  example: row of `batch` that each item belongs to.  position: within it; 0 where there are none.
             batch: the fields of the examples.
    """

    values: dict[str, Float[np.ndarray, "n d"]]
    example: Int[np.ndarray, "n"]
    position: Int[np.ndarray, "n"]
    batch: Batch

    def __len__(self) -> int:
        return len(self.example)

    def field(self, name: str) -> np.ndarray:
        """The value of a field at each item."""
        values = np.asarray(self.batch[name])
        return (
            values[self.example, self.position] if values.ndim > 1 and values.shape[1:] == np.shape(self.batch["mask"])[1:] else values[self.example]
        )


def splits(model: Model) -> dict[str, Any]:
    """The run's splits, of texts those without overlap."""
    assert model.data is not None
    return {name: getattr(source, "whole", source) for name, source in model.data().splits.items()}


def last(model: Model) -> str:
    """The name of the split that the model was judged by last."""
    return next(name for name in ("test", "validation", "train") if name in splits(model))


def drawn(model: Model, name: str, count: int, key: jax.Array) -> Split:
    """So many examples of a split, drawn by lot, in order.

    Raises:  ConfigError: there is no such split.
    """
    known = splits(model)
    if name not in known:
        raise ConfigError(f"method.split={name!r}: the run's data has {', '.join(known)}")
    order = np.asarray(jax.random.permutation(key, len(known[name])))
    return Split(known[name], np.sort(order[:count]))


def sequential(model: Model) -> bool:
    """Whether the model reads one item after the other, so that a tap has a vector at each position."""
    return len(model.spec["fields"]["mask"]["shape"]) == 1


def vector_taps(model: Model, at: Sequence[str] | str | None = None) -> list[str]:
    """The taps to look at; where none is named all that have a vector for each item, of a text those as wide as its input, and the logits.

    Raises:  ConfigError: an unknown tap, or one of a text without a vector for each position.
    """
    time = list(model.spec["fields"]["mask"]["shape"])
    fitting = [name for name, tap in model.taps.items() if math.prod(tap.shape[1:]) > 1 and (not time or list(tap.shape[1:-1]) == time)]
    if at is None:
        return [name for name in fitting if not time or name == "logits" or model.taps[name].shape == model.taps[INPUT].shape]
    names = [at] if isinstance(at, str) else list(at)
    model.require(*names)
    for name in names:
        if time and name not in fitting:
            raise ConfigError(f"method.at={name!r} has the shape {model.taps[name].shape[1:]}: of a text a tap must have a vector at each position")
    return names


def deepest(model: Model) -> str:
    """The last tap with a vector for each item before the outputs."""
    names = [name for name in vector_taps(model) if name != "logits"]
    return names[-1]


def read(model: Model, split: Split, names: Sequence[str], key: jax.Array, each: int | None = None, *, whole: bool = False) -> Items:
    """The vectors of the items of these examples.

    Args:    each: positions of every text, drawn by lot; None: all that count.  whole: also of a large tap every number, not the mean over places.
    """
    places = _places(model, split, key, each)
    values: dict[str, list[np.ndarray]] = {name: [] for name in names}
    rows = min(ROWS, len(split))
    done = 0
    for where, batch in track(split.chunks(rows), "reading", -(-len(split) // rows)):
        _, taps = model.read(batch, names)
        count = where.stop - where.start
        inside = places[(places[:, 0] >= done) & (places[:, 0] < done + count)] - np.array([done, 0])
        for name in names:
            tap = np.asarray(taps[name], np.float32)
            values[name].append(tap[inside[:, 0], inside[:, 1]] if sequential(model) else _flat(tap[:count], whole))
        done += count
    example, position = places.T
    return Items({name: np.concatenate(parts) for name, parts in values.items()}, example, position, split.batch(split.indices))


def _places(model: Model, split: Split, key: jax.Array, each: int | None) -> Int[np.ndarray, "n 2"]:
    """(row, position) of every item."""
    rows = np.arange(len(split))
    if not sequential(model):
        return np.stack([rows, np.zeros_like(rows)], 1)
    mask = np.asarray(split.batch(split.indices)["mask"])
    if each is not None:
        lot = np.where(mask, np.asarray(jax.random.uniform(key, mask.shape)), 2.0)
        order = np.argsort(lot, axis=1)[:, :each]
        chosen = np.zeros_like(mask)
        np.put_along_axis(chosen, order, True, 1)
        mask = mask & chosen
    return np.argwhere(mask)


def _flat(values: Float[np.ndarray, "b ..."], whole: bool) -> Float[np.ndarray, "b d"]:
    flat = values.reshape(len(values), -1)
    if whole or values.ndim == 2 or flat.shape[1] <= WIDEST:
        return flat
    return values.reshape(len(values), -1, values.shape[-1]).mean(1)


@functools.partial(jax.jit, static_argnums=(2, 4))
def logistic(
    x: Float[Array, "n d"], label: Int[Array, "n"], classes: int, penalty: Float[Array, ""], steps: int = 200
) -> tuple[Float[Array, "d c"], Float[Array, "c"]]:
    """(kernel, bias) of multinomial logistic regression: the least of mean cross-entropy + penalty / 2 |kernel|² on inputs scaled to deviation 1.

    Each step minimises a quadratic bound of the loss whose curvature is the same everywhere, so that one Cholesky factor serves all; with
    Nesterov's momentum.

    Returns: for the inputs as they are, not as they are scaled.
    Source:  Böhning 1992.
    """
    mean, deviation = x.mean(0), x.std(0)
    scale = jnp.where(deviation > 1e-6, deviation, 1.0)
    ones = jnp.ones((len(x), 1), jnp.float32)
    scaled = jnp.concatenate([(x - mean[None]) / scale[None], ones], 1)  # n d+1
    right = jax.nn.one_hot(label, classes, dtype=jnp.float32)
    pull = jnp.full(scaled.shape[1], penalty).at[-1].set(1e-6)  # the bias is free, but for a hair
    count = jnp.float32(len(x))
    product = functools.partial(jnp.matmul, precision="highest")
    bound = jax.scipy.linalg.cho_factor(0.5 * product(scaled.T, scaled) / count + jnp.diag(pull + 1e-6))

    def step(carry, _):
        here, ahead, speed = carry
        slope = product(scaled.T, jax.nn.softmax(product(scaled, ahead)) - right) / count + pull[:, None] * ahead
        new = ahead - jax.scipy.linalg.cho_solve(bound, slope)
        faster = (1.0 + jnp.sqrt(1.0 + 4.0 * speed**2)) / 2.0
        back = ((ahead - new) * (new - here)).sum() > 0  # the momentum points uphill: begin it anew
        faster = jnp.where(back, 1.0, faster)
        return (new, new + jnp.where(back, 0.0, (speed - 1.0) / faster) * (new - here), faster), None

    start = jnp.zeros((scaled.shape[1], classes), jnp.float32)
    (weights, _, _), _ = jax.lax.scan(step, (start, start, jnp.float32(1.0)), length=steps)
    kernel = weights[:-1] / scale[:, None]
    return kernel, weights[-1] - product(mean, kernel)
