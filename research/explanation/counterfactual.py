"""The smallest change of an input that makes the model answer otherwise."""

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from research.core.errors import ConfigError, nearest
from research.explanation.dependence import column, column_names, restored
from research.explanation.model import INPUT, Examples, Model, outputs_of, replaced
from research.explanation.result import Finding
from research.figures import explanation as draw

NORMS = ("l2", "l1")
HALVINGS = 24  # of the way back to the input, at the end


@dataclasses.dataclass(frozen=True)
class Counterfactual:
    """The nearest input that the model puts into another class, by gradient descent on distance + penalty x (what the other class still lacks).

    The target of the examples is the class that is wanted; where the model answers so already, any other class will do. The penalty of each example
    rises tenfold until its class flips, and is then halved in between; the nearest input that flipped is kept, and pulled back to the input
    as far as it stays flipped. Descent finds a near one, not surely the nearest, and may miss a class that only a far input has.

    Args:    norm: of the change: "l2", or "l1", which changes few entries.  margin: by how many logits the new class must lead, at least 0.
             searches: penalties that are tried.  steps: of descent at each.  rate: of the descent at its start, in the units that the model reads.
             penalty: to begin with, above 0.  low, high: least and largest value of an entry, in the units that the model reads; None: black and
             white of an image, no bound elsewhere. An input beyond them widens them.
             only: what may change: columns by name or number; of an image the box (top, left, bottom, right), ends left out; (): all.
    Raises:  ConfigError: a value out of range, a box or columns that cover nothing.
    Source:  Wachter et al. 2017; the search for the penalty is Carlini and Wagner 2017, the descent for l1 that of Chen et al. 2018.
    """

    norm: str = "l2"
    margin: float = 0.01
    searches: int = 8
    steps: int = 200
    rate: float = 0.05
    penalty: float = 1.0
    low: float | None = None
    high: float | None = None
    only: tuple[str | int, ...] = ()
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ConfigError(f"method.norm={self.norm!r} is unknown{nearest(self.norm, NORMS)}")
        for name in ("searches", "steps"):
            if getattr(self, name) < 1:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be at least 1")
        for name in ("rate", "penalty"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"method.{name}={getattr(self, name)}: must be above 0")
        if self.margin < 0:
            raise ConfigError(f"method.margin={self.margin}: must not be negative")
        if self.low is not None and self.high is not None and not self.low < self.high:
            raise ConfigError(f"method.low={self.low}: must be below high={self.high}")

    def fits(self, model: Model) -> str | None:
        """Why no small change could flip a class."""
        if "classes" not in model.spec:
            return "it has no classes that could flip"
        if model.field == "tokens":
            return "there is no small change of a token"
        return None if model.outputs[-1] > 1 else "it has a single class"

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Finding:
        """Before, after and difference of each example; `flipped`, the classes, and the distances in both norms."""
        outputs, taps = model.read(examples.batch, (INPUT,))
        before, value = np.asarray(outputs).argmax(-1), np.asarray(taps[INPUT], np.float32)
        target = np.asarray(examples.target)[:, -1]
        classes = np.arange(model.outputs[-1])[None]
        wanted = np.where((target == before)[:, None], classes != before[:, None], classes == target[:, None])
        low, high = self._box(model, value)
        settings = (self.norm, self.searches, self.steps)
        numbers = tuple(np.float32(x) for x in (self.margin, self.rate, self.penalty))
        found = _search(model.objective, settings, model.arrays, dict(examples.batch), value, wanted, self._open(model), low, high, numbers)
        after, flipped, answers = (np.asarray(x) for x in found)
        change = (after - value).reshape(len(value), -1).astype(np.float64)
        told = {
            "explained": [f"{'any but ' if i == here else ''}{model.name(int(i))}" for i, here in zip(target, before, strict=True)],
            "flipped": flipped.tolist(),
            "before": [model.name(int(i)) for i in before],
            "after": [model.name(int(i)) for i in answers],
            "l2": np.linalg.norm(change, axis=1),
            "l1": np.abs(change).sum(1),
            "entries_changed": (change != 0).sum(1),
        }
        lines = [
            f"{name}: {told['before'][i]} -> {told['after'][i]} at distance {told[self.norm][i]:.4g}"
            if flipped[i]
            else f"{name}: no change found that flips {told['before'][i]}; more searches, steps or a wider box may"
            for i, name in enumerate(examples.names)
        ]
        each = [_panels(model, value[i], after[i], told["before"][i], told["after"][i], bool(flipped[i])) for i in range(len(value))]
        return Finding(numbers=told, kept={"before": value, "after": after}, each=each, lines=lines)

    def _box(self, model: Model, value: Float[np.ndarray, "b ..."]) -> tuple[np.ndarray, np.ndarray]:
        """The least and the largest value of each entry."""
        ends = []
        for given, shade, beyond in ((self.low, 0.0, -np.inf), (self.high, 1.0, np.inf)):
            if given is not None:
                end = np.float32(given)
            elif model.field == "image":
                mean, deviation = (np.asarray(model.statistics.get(f"image_{name}", other)) for name, other in (("mean", 0.0), ("std", 1.0)))
                end = ((shade - mean) / deviation).astype(np.float32)
            else:
                end = np.float32(beyond)
            ends.append(np.broadcast_to(end, value.shape))
        return np.minimum(ends[0], value), np.maximum(ends[1], value)

    def _open(self, model: Model) -> Bool[np.ndarray, "..."]:
        """Which entries may change."""
        places = tuple(model.spec["fields"][model.field]["shape"])
        if not self.only:
            return np.ones(places, bool)
        mask = np.zeros(places, bool)
        if model.field == "features":
            mask[[column(model, name, "only") for name in self.only]] = True
        elif model.field == "image" and len(self.only) == 4 and all(isinstance(end, int) for end in self.only):
            top, left, bottom, right = (int(end) for end in self.only)
            if min(top, left) >= 0:
                mask[top:bottom, left:right] = True
        else:
            raise ConfigError(f"method.only={list(self.only)}: of an image it is [top,left,bottom,right], of a table a list of columns")
        if not mask.any():
            raise ConfigError(f"method.only={list(self.only)} covers nothing of an input of {' x '.join(map(str, places))}")
        return mask


def _panels(model: Model, before: np.ndarray, after: np.ndarray, here: str, there: str, flipped: bool) -> tuple[draw.Panel, ...]:
    """What to draw of one example."""
    end = there if flipped else f"{there} (not flipped)"
    if model.field == "image":
        shown = draw.Pictures(np.stack([before, after]), [f"before: {here}", f"after: {end}"])
        return shown, draw.Overlay(before, (after - before).sum(-1), "difference: red is raised, blue lowered")
    if model.field != "features":
        return (draw.Heat((after - before).reshape(len(before), -1).T, title=f"{here} -> {end}: difference"),)
    names = column_names(model)
    old, new = (np.array([restored(model, "features", x[j], j) for j in range(len(names))]) for x in (before, after))
    order = np.argsort(-np.abs(after - before), kind="stable")
    rows = [(names[j], float(old[j]), float(new[j]), float(new[j] - old[j])) for j in order if after[j] != before[j]]
    return draw.Rows(("column", "before", "after", "change"), rows, f"{here} -> {end}"), draw.Bars(
        names, after - before, "difference, as the model reads it"
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _search(objective, settings, arrays, batch, value, wanted, open_, low, high, numbers):
    """(the nearest input of each example that flips, or the input itself; whether it flips; its class)."""
    norm, searches, steps = settings
    margin, rate, penalty = numbers
    axes = tuple(range(1, value.ndim))

    def outputs(change) -> Float[Array, "b n"]:
        return outputs_of(objective, arrays, batch, {INPUT: replaced(value + change)})[0]

    def lead(change) -> Float[Array, "b"]:
        """By how much the best of the wanted classes is ahead of the best of the others."""
        logits = outputs(change)
        return jnp.where(wanted, logits, -jnp.inf).max(-1) - jnp.where(wanted, -jnp.inf, logits).max(-1)

    def size(change) -> Float[Array, "b"]:
        return jnp.abs(change).sum(axes) if norm == "l1" else jnp.square(change).sum(axes)

    def lacking(change, weight):
        ahead = lead(change)
        return (weight * jnp.maximum(margin - ahead, 0.0)).sum(), ahead

    def each(x):
        return x.reshape(-1, *(1,) * (value.ndim - 1))

    def allowed(change):
        return jnp.where(open_[None], jnp.clip(value + change, low, high) - value, 0.0)

    def keep(best, change, ahead):
        held, least = best
        better = (ahead >= margin) & (size(change) < least)
        return jnp.where(each(better), change, held), jnp.where(better, size(change), least)

    def descend(weight, best):
        """One penalty for each example, from the input itself; (best, whether it flipped on the way)."""

        def step(carry, i):
            change, first, second, best, ever = carry
            slope, ahead = jax.grad(lacking, has_aux=True)(change, weight)
            best, ever = keep(best, change, ahead), ever | (ahead >= margin)
            now = rate * (1.0 - i / steps)
            if norm == "l1":  # proximal: a step along the penalty's slope, then all entries shrink
                moved = change - now * slope
                return (allowed(jnp.sign(moved) * jnp.maximum(jnp.abs(moved) - now, 0.0)), first, second, best, ever), None
            slope = slope + 2.0 * change
            first, second = 0.9 * first + 0.1 * slope, 0.999 * second + 0.001 * jnp.square(slope)
            moved = now * (first / (1.0 - 0.9 ** (i + 1.0))) / (jnp.sqrt(second / (1.0 - 0.999 ** (i + 1.0))) + 1e-8)  # Adam
            return (allowed(change - moved), first, second, best, ever), None

        still = jnp.zeros_like(value)
        ever = jnp.zeros(len(value), bool)
        (change, _, _, best, ever), _ = jax.lax.scan(step, (still, still, still, best, ever), jnp.arange(steps, dtype=jnp.float32))
        ahead = lead(change)
        return keep(best, change, ahead), ever | (ahead >= margin)

    def search(carry, _):
        weight, below, above, best = carry
        best, ever = descend(weight, best)
        below, above = jnp.where(ever, below, weight), jnp.where(ever, weight, above)
        weight = jnp.where(jnp.isinf(above), weight * 10.0, (below + above) / 2.0)
        return (weight, below, above, best), None

    count = len(value)
    start = (jnp.full(count, penalty), jnp.zeros(count), jnp.full(count, jnp.inf), (jnp.zeros_like(value), jnp.full(count, jnp.inf)))
    (_, _, _, (change, least)), _ = jax.lax.scan(search, start, None, searches)
    flipped = jnp.isfinite(least)

    def halve(ends, _):
        short, far = ends
        middle = (short + far) / 2.0
        enough = lead(each(middle) * change) >= margin
        return (jnp.where(enough, short, middle), jnp.where(enough, middle, far)), None

    (_, share), _ = jax.lax.scan(halve, (jnp.zeros(count), jnp.ones(count)), None, HALVINGS)
    change = each(share) * change
    return value + change, flipped, outputs(change).argmax(-1)
