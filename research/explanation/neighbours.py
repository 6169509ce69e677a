"""Which training examples look alike to the model: nearest neighbours at a tap."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.core.errors import ConfigError
from research.core.progress import track
from research.explanation.model import Examples, Model, outputs_of
from research.explanation.result import Finding, at_least
from research.explanation.split import Split, counted, described, shown, training_split
from research.figures.explanation import Rows

DISTANCES = ("cosine", "euclidean")
CONTEXT = 40  # characters of text shown before a neighbour, and a quarter of that after it


@dataclasses.dataclass(frozen=True)
class Neighbours:
    """The training examples whose values at a tap are nearest to an example's: what the model takes for the same.

    A text is one point for each position, so its neighbours are places in the training text; the example's own point is the position that is
    explained. An example of the training split is its own first neighbour, at distance 0.

    Args:    at: the tap; None: the last one before the logits.  distance: "cosine" (1 - the cosine of the angle) | "euclidean".
             nearest: how many.  sample: so many training examples, drawn by lot; None: all.  rows: examples in one call of the model.
    Raises:  ValueError: a count below 1, another distance.
    """

    at: str | None = None
    distance: str = "cosine"
    nearest: int = 8
    sample: int | None = None
    rows: int = 256
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        at_least(self, nearest=1, rows=1, sample=1)
        if self.distance not in DISTANCES:
            raise ValueError(f"distance={self.distance!r}: choose from: {', '.join(DISTANCES)}")

    def fits(self, model: Model) -> str | None:
        """It needs the data."""
        return "it has no training data" if model.data is None else None

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Finding:
        """The neighbours of each example with their distances.

        Raises:  ConfigError: an unknown tap, or one of a text without one value for each position.
        """
        tap = self._tap(model)
        sequential = len(model.outputs) == 2
        values = np.asarray(model.read(examples.batch, [tap])[1][tap], np.float32)
        if sequential:
            values = values[np.arange(len(examples)), examples.target[:, 0]]
        points = self._scaled(values.reshape(len(examples), -1))
        split = training_split(model, self.sample, key)
        rows = min(self.rows, len(split))
        best = np.full((len(examples), 0), np.inf, np.float32), np.zeros((len(examples), 0, 2), np.int64)
        for places, batch in track(split.chunks(rows), "neighbours", -(-len(split) // rows)):
            found = _nearest(model.objective, tap, self.distance, self.nearest, model.arrays, batch, points, counted(batch, places))
            distance, row, position = (np.asarray(x) for x in found)
            best = _merged(best, (distance, np.stack([split.indices[np.minimum(places.start + row, places.stop - 1)], position], -1)), self.nearest)
        return self._finding(model, examples, split, tap, *best)

    def _tap(self, model: Model) -> str:
        """The tap's name."""
        sequential = len(model.outputs) == 2
        if self.at is not None:
            model.require(self.at)
            shape = model.taps[self.at].shape[1:]
            if sequential and not (len(shape) == 2 and shape[0] == model.outputs[0]):
                raise ConfigError(f"method.at={self.at}: its values have the shape {shape}; of a text only taps of (time, width) have neighbours")
            return self.at
        like = model.taps["input"].shape
        wide = [name for name, tap in model.taps.items() if name != "logits" and (tap.shape == like if sequential else tap.shape[-1] > 1)]
        return wide[-1]

    def _scaled(self, points: Float[np.ndarray, "b d"]) -> Float[np.ndarray, "b d"]:
        """Of length 1 where only the direction counts."""
        return points / np.maximum(np.linalg.norm(points, axis=1, keepdims=True), 1e-12) if self.distance == "cosine" else points

    def _finding(self, model: Model, examples: Examples, split: Split, tap: str, distance: np.ndarray, places: np.ndarray) -> Finding:
        sequential = len(model.outputs) == 2
        each, lines, answers = [], [], []
        for i, name in enumerate(examples.names):
            batch = split.batch(places[i, :, 0])
            names = [f"train {j}" for j in places[i, :, 0]]
            title = f"nearest training examples at {tap}, {self.distance} distance"
            if sequential:
                texts = [_context(model, batch, row, int(position)) for row, position in enumerate(places[i, :, 1])]
                own = _context(model, examples.batch, i, int(examples.target[i, 0]))
                cells = [[name, "", *own], *([near, float(d), *text] for near, d, text in zip(names, distance[i], texts, strict=True))]
                each.append((Rows(("example", "distance", "text up to there", "and on"), cells, title),))
                lines.append(f"{name}: nearest is train {places[i, 0, 0]} after {texts[0][0]!r} (distance {distance[i, 0]:.3g})")
                continue
            answers.append([described(model, batch, j) for j in range(len(names))])
            one = {field: np.asarray(value)[i : i + 1] for field, value in examples.batch.items()}
            each.append((shown(model, one, [str(name)], "explained"), shown(model, batch, names, title, "distance", distance[i])))
            lines.append(f"{name}: nearest is {names[0]}{f' ({answers[-1][0]})' if answers[-1][0] else ''} at distance {distance[i, 0]:.3g}")
        numbers: dict[str, Any] = {"tap": tap, "neighbours": places[:, :, 0].tolist(), "distances": distance.tolist()}
        if sequential:
            numbers["positions"] = places[:, :, 1].tolist()
        elif any(any(row) for row in answers):
            numbers["answers"] = answers
        return Finding(numbers=numbers, kept={"index": places[:, :, 0], "position": places[:, :, 1], "distance": distance}, each=each, lines=lines)


def _context(model: Model, batch: Any, row: int, position: int) -> tuple[str, str]:
    """(the text up to a position, the text after it), cut short."""
    count = int(np.asarray(batch["mask"][row]).sum())
    pieces = [model.token(int(token)) for token in batch["tokens"][row][:count]]
    return "".join(pieces[: position + 1])[-CONTEXT:], "".join(pieces[position + 1 :])[: CONTEXT // 4]


def _merged(old: tuple[np.ndarray, np.ndarray], new: tuple[np.ndarray, np.ndarray], nearest: int) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of two lists of (distances, places); of equal ones the first; what is infinitely far is none."""
    distance, places = np.concatenate([old[0], new[0]], 1), np.concatenate([old[1], new[1]], 1)
    order = np.argsort(distance, axis=1, kind="stable")[:, : min(nearest, int(np.isfinite(distance).sum(1).min()))]
    return np.take_along_axis(distance, order, 1), np.take_along_axis(places, order[:, :, None], 1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _nearest(
    objective, tap: str, distance: str, nearest: int, arrays, batch, points: Float[Array, "b d"], counts
) -> tuple[Float[Array, "b k"], Array, Array]:
    """(distance, row, position) of the nearest points of a batch; those that do not count are infinitely far."""
    values = outputs_of(objective, arrays, batch)[1][tap].astype(jnp.float32)
    values = values.reshape(counts.size, -1)  # n d
    if distance == "cosine":
        values = values / jnp.maximum(jnp.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    square = (points**2).sum(1)[:, None] + (values**2).sum(1)[None] - 2 * jnp.matmul(points, values.T, precision="highest")
    square = jnp.where(counts.reshape(1, -1), square, jnp.inf)
    near, place = jax.lax.top_k(-square, min(nearest, counts.size))
    exact = ((values[place] - points[:, None]) ** 2).sum(-1)  # the sum of three squares loses what is small
    exact = jnp.where(jnp.isfinite(near), exact / 2 if distance == "cosine" else jnp.sqrt(exact), jnp.inf)
    width = counts.size // counts.shape[0]
    return exact, place // width, place % width
