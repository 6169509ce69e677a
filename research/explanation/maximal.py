"""What a unit answers to most: examples of the run's data, and an input made for it."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from research.core.errors import ConfigError
from research.core.progress import track
from research.core.types import Batch
from research.explanation.model import INPUT, Examples, Model, outputs_of, replaced
from research.explanation.result import Finding, at_least
from research.explanation.split import Split, counted, described
from research.explanation.vectors import ROWS, drawn, last, sequential
from research.figures.explanation import Bars, Lines, Panel, Pictures, Rows, Tokens

SHOWN = 4  # units that are shown where none is named
SHARES = {"explained_variance": "variance", "recovered": "loss"}  # what a reconstruction keeps
CONTEXT = 24  # tokens before and after the one that a unit answers to most


@dataclasses.dataclass(frozen=True)
class Maximal:
    """The examples to which units answer most, and for images an input made to raise them further.

    A unit is an entry of the tap's last axis: of a channel the answer is its largest over the places of an image, or the positions of a text.
    The input is made by gradient ascent on the mean over the places, from faint noise, shifted at random and blurred in each step so that the
    result shows what the unit sees rather than noise, and kept within the range of the data.

    Args:    at: the tap; None: the last one before the outputs.  units: their numbers; None: those with the largest spread over the examples.
             examples: that are searched.  top: of them that are shown.  split: train | validation | test; None: the last that there is.
             steps: of the ascent; 0: none.  rate: of it, in deviations of the data.  jitter: largest shift, in pixels.
             blur: deviation of the filter, in pixels; 0: none.  decay: pulls the input towards 0, as coefficient of its mean square.
    Raises:  ValueError: a number out of range.
    Source:  Erhan et al. 2009; Olah, Mordvintsev and Schubert 2017 (jitter and blur).
    """

    at: str | None = None
    units: tuple[int, ...] | int | None = None
    examples: int = 2000
    top: int = 6
    split: str | None = None
    steps: int = 128
    rate: float = 0.1
    jitter: int = 2
    blur: float = 0.5
    decay: float = 0.01
    reads: ClassVar[str] = "nothing"

    def __post_init__(self):
        at_least(self, examples=1, top=1, steps=0, jitter=0, blur=0, decay=0)

    def fits(self, model: Model) -> str | None:
        """It needs the data."""
        return "it has no data to search" if model.data is None else None

    def __call__(self, model: Model, examples: Examples | None, key: jax.Array) -> Finding:
        """The examples and the inputs of every unit.

        Raises:  ConfigError: an unknown tap, or a unit that it does not have.
        """
        at = self.at or [name for name in model.taps if name != "logits"][-1]
        model.require(at)
        split = drawn(model, self.split or last(model), self.examples, key)
        answers, _ = searched(model, split, at)
        units = self._units(at, answers)
        best = np.argsort(-answers[:, units], axis=0, kind="stable")[: self.top].T  # u k
        panels = [
            panel
            for unit, rows in zip(units, best, strict=True)
            for panel in top_examples(model, split.source, at, unit, split.indices[rows], answers[rows, unit])
        ]
        numbers: dict[str, Any] = {"at": at, "units": units, "examples": split.indices[best].tolist()}
        numbers["answers"] = np.take_along_axis(answers[:, units].T, best, 1).tolist()
        kept = {"examples": split.indices[best], "answers": np.asarray(numbers["answers"], np.float32)}
        if model.field == "image" and self.steps:
            made, reached = self._made(model, split, at, units, key)
            captions = [f"unit {unit}: {value:.3g}" for unit, value in zip(units, reached, strict=True)]
            panels = [Pictures(made, captions, f"inputs made for units of {at}: their mean answer"), *panels]
            kept |= {"inputs": made, "reached": reached}
            numbers["reached"] = reached.tolist()
        return Finding(panels, numbers, kept)

    def _units(self, at: str, answers: Float[np.ndarray, "n d"]) -> list[int]:
        if self.units is None:
            return np.argsort(-answers.std(0), kind="stable")[:SHOWN].tolist()
        units = [self.units] if isinstance(self.units, int) else list(self.units)
        for unit in units:
            if not 0 <= unit < answers.shape[1]:
                raise ConfigError(f"method.units={unit}: {at} has the units 0 to {answers.shape[1] - 1}")
        return units

    def _made(self, model: Model, split: Split, at: str, units: list[int], key: jax.Array) -> tuple[np.ndarray, np.ndarray]:
        """(an input for each unit, the unit's mean answer to it)."""
        some = np.asarray(split.batch(split.indices[:256])["image"])
        low, high, scale = (jnp.float32(x) for x in (some.min(), some.max(), some.std()))
        batch = split.batch(np.resize(split.indices, len(units)))
        number = jnp.asarray(units, jnp.int32)
        start = jnp.float32(some.mean()) + 0.1 * scale * jax.random.normal(key, batch["image"].shape, jnp.float32)
        settings = self.steps, self.jitter, self.blur
        made, reached = _ascend(model.objective, at, settings, model.arrays, batch, number, start, (low, high, self.rate * scale, self.decay), key)
        return np.asarray(made), np.asarray(reached)


def searched(model: Model, split: Split, at: str) -> tuple[Float[np.ndarray, "n d"], Float[np.ndarray, "d"]]:
    """(the largest answer of each unit to each example, the share of items at which a unit's answer is above 0)."""
    rows = min(ROWS, len(split))
    largest, above, count = [], 0.0, 0
    for where, batch in track(split.chunks(rows), "searching", -(-len(split) // rows)):
        found = _largest(model.objective, at, model.arrays, batch, counted(batch, where))
        largest.append(np.asarray(found[0])[: where.stop - where.start])
        above, count = above + np.asarray(found[1], np.float64), count + float(found[2])
    return np.concatenate(largest), np.asarray(above / count)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _largest(objective, at, arrays, batch, valid):
    """(largest answer of every unit to every example, at how many items it is above 0, items)."""
    tap = outputs_of(objective, arrays, batch)[1][at].astype(jnp.float32)
    if tap.shape[: valid.ndim] != valid.shape:
        valid = valid.reshape(len(valid), -1).any(1)  # a tap without an entry for each position
    counts = valid.reshape(*valid.shape, *(1,) * (tap.ndim - valid.ndim))
    inner = tuple(range(1, tap.ndim - 1))
    items = jnp.broadcast_to(counts, (*tap.shape[:-1], 1)).sum(dtype=jnp.float32)
    return jnp.where(counts, tap, -jnp.inf).max(inner), ((tap > 0) & counts).sum((0, *inner), dtype=jnp.float32), items


def top_examples(
    model: Model, source: Any, at: str, unit: int, indices: Int[np.ndarray, "k"], answers: Float[np.ndarray, "k"], word: str = "unit"
) -> Iterator[Panel]:
    """These examples as pictures, texts coloured by the unit's answer to each token, or rows."""
    batch = Split(source, indices).batch(indices)
    title = f"{word} {unit} of {at}"
    if model.field == "image":
        captions = [": ".join(filter(None, (described(model, batch, i), f"{value:.3g}"))) for i, value in enumerate(answers)]
        yield Pictures(np.asarray(batch["image"]), captions, f"{title}: most in the data")
    elif sequential(model):
        values = np.asarray(model.read(batch, [at])[1][at])[..., unit]
        for row, index in enumerate(indices):
            yield _passage(model, batch, values[row], row, f"{title}: example {index}, {answers[row]:.3g}")
    else:
        inputs = np.asarray(batch[model.field]).reshape(len(indices), -1)
        columns = [str(name) for name in model.spec.get("columns") or range(inputs.shape[1])]
        yield Rows(
            ("example", "answer", *columns), [(int(i), float(a), *map(float, x)) for i, a, x in zip(indices, answers, inputs, strict=True)], title
        )


def _passage(model: Model, batch: Batch, values: np.ndarray, row: int, title: str) -> Tokens:
    """The text around the largest value; values that are nowhere below 0 are not coloured as if they were."""
    valid = np.flatnonzero(np.asarray(batch["mask"])[row]) if values.ndim == 1 else np.arange(0)
    middle = int(valid[values[valid].argmax()])
    part = valid[(valid >= middle - CONTEXT) & (valid <= middle + CONTEXT)]
    return Tokens([model.token(int(batch["tokens"][row][i])) for i in part], values[part], title)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _ascend(objective, at, settings, arrays, batch, units, start, scales, key):
    """(inputs, the mean answer of each input's own unit)."""
    steps, jitter, blur = settings
    low, high, rate, decay = (jnp.asarray(x, jnp.float32) for x in scales)

    def answer(x):
        tap = outputs_of(objective, arrays, batch, {INPUT: replaced(x)})[1][at]
        own = jnp.take_along_axis(tap, units.reshape(-1, *(1,) * (tap.ndim - 1)), -1)[..., 0]
        return own.reshape(len(own), -1).mean(1)

    def score(x, shift):
        moved = jnp.roll(x, shift, (1, 2)) if jitter else x
        return (answer(moved) - decay * (x**2).mean((1, 2, 3))).sum()

    def step(x, key):
        shift = jax.random.randint(key, (2,), -jitter, jitter + 1)
        slope = jax.grad(score)(x, (shift[0], shift[1]))
        size = jnp.sqrt((slope**2).mean((1, 2, 3), keepdims=True))
        x = x + rate * slope / jnp.maximum(size, 1e-12)
        return jnp.clip(_blurred(x, blur) if blur else x, low, high), None

    made, _ = jax.lax.scan(step, start, jax.random.split(key, steps))
    return made, answer(made)


def _blurred(x: Float[Array, "b y x c"], deviation: float) -> Float[Array, "b y x c"]:
    """Each channel by itself, along both axes."""
    reach = max(1, round(3 * deviation))
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / deviation) ** 2)
    weights = (weights / weights.sum()).astype(np.float32)
    for axis in (1, 2):
        widths: Sequence[tuple[int, int]] = [(reach, reach) if a == axis else (0, 0) for a in range(4)]
        padded, size = jnp.pad(x, widths, mode="edge"), x.shape[axis]
        x = functools.reduce(jnp.add, (weight * jax.lax.slice_in_dim(padded, i, i + size, axis=axis) for i, weight in enumerate(weights)))
    return x


@dataclasses.dataclass(frozen=True)
class SparseFeatures:
    """What the features of a sparse autoencoder are: how often each is above 0, those that never are, and the examples that raise some most.

    Args:    at: the tap of the features.  features: their numbers; None: some, evenly among those alive from the rarest to the commonest.
             count: how many are shown where none is named.  examples: that are searched.  top: of them that are shown.
             split: train | validation | test; None: the last that there is.
    Source:  Bricken et al. 2023, feature densities.
    """

    at: str = "dictionary/features"
    features: tuple[int, ...] | int | None = None
    count: int = 4
    examples: int = 1000
    top: int = 4
    split: str | None = None
    reads: ClassVar[str] = "nothing"

    def fits(self, model: Model) -> str | None:
        """It needs a run of a sparse autoencoder, and its data."""
        if model.data is None:
            return "it has no data to search"
        return None if self.at in model.taps else f"it has no tap {self.at}; experiment=sparse_autoencoder trains a run that has"

    def __call__(self, model: Model, examples: Examples | None, key: jax.Array) -> Finding:
        """Densities, scores of the reconstruction, and the examples of some features."""
        split = drawn(model, self.split or last(model), self.examples, key)
        answers, density = searched(model, split, self.at)
        alive = np.flatnonzero(density > 0)
        scores = _scores(model, split)
        numbers: dict[str, Any] = {"features": len(density), "dead": float((density == 0).mean()), "active": float(density.sum()), **scores}
        numbers["median_density"] = float(np.median(density[alive])) if len(alive) else 0.0
        panels: list[Panel] = [_densities(density)]
        if losses := {name: scores[f"{name}_loss"] for name in ("model", "spliced", "ablated") if f"{name}_loss" in scores}:
            names = {"model": "the model itself", "spliced": "reconstruction in its place", "ablated": "zeros in its place"}
            title = "kept: " + ", ".join(f"{scores[name]:.1%} of the {word}" for name, word in SHARES.items() if name in scores)
            panels.append(Bars([names[name] for name in losses], np.array(list(losses.values())), title, "loss of the model", ordered=False))
        order = alive[np.argsort(density[alive], kind="stable")]
        chosen = (
            order[np.linspace(0, len(order) - 1, min(self.count, len(order))).round().astype(int)]
            if self.features is None
            else np.atleast_1d(self.features)
        )
        for feature in chosen.tolist():
            if not 0 <= feature < len(density):
                raise ConfigError(f"method.features={feature}: there are the features 0 to {len(density) - 1}")
            best = np.argsort(-answers[:, feature], kind="stable")[: self.top]
            best = best[answers[best, feature] > 0]  # of a rare one there may be fewer
            if len(best):
                panels += top_examples(model, split.source, self.at, feature, split.indices[best], answers[best, feature], "feature")
        line = f"{len(alive)} of {len(density)} features are alive, {numbers['active']:.1f} above 0 at once"
        return Finding(panels, {**numbers, "shown": chosen.tolist()}, {"density": density.astype(np.float32)}, lines=(line,))


def _scores(model: Model, split: Split) -> dict[str, float]:
    """What the objective itself reports of these examples."""
    sums: dict[str, Any] = {}
    rows = min(ROWS, len(split))
    for where, batch in split.chunks(rows):
        pairs = jax.tree.map(lambda x: np.asarray(x, np.float64), _tallied(model.objective, model.arrays, {**batch, "mask": counted(batch, where)}))
        sums = jax.tree.map(np.add, sums, pairs) if sums else pairs
    means: dict[str, Any] = {name: (total / np.maximum(weight, 1e-30)).tolist() for name, (total, weight) in sums.items()}
    return {name: value for name, value in means.items() if not isinstance(value, list)} | model.objective.derived(means)


@functools.partial(jax.jit, static_argnums=0)
def _tallied(objective, arrays, batch):
    params, extra, frozen, hyper = arrays
    return objective(params, extra, frozen, batch, None, hyper, train=False)[0].metrics


def _densities(density: Float[np.ndarray, "m"]) -> Lines:
    """How many features are how often above 0."""
    alive = np.log10(density[density > 0])
    low = np.floor(alive.min()) if len(alive) else -1.0
    counts, edges = np.histogram(alive, np.linspace(low, 0.0, 25))
    places = np.repeat(edges, 2)
    heights = np.concatenate([[0], np.repeat(counts, 2), [0]])
    title = f"{int((density == 0).sum())} of {len(density)} features dead in these examples"
    return Lines({"features": (places, heights)}, title, "log10 of the share of items at which a feature is above 0", "features")
