"""Concept vectors: does a class depend on what distinguishes a set of examples."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jaxtyping import Array, Float

from research.core.errors import ConfigError, nearest
from research.core.progress import track
from research.explanation.model import Examples, Model, outputs_of, replaced, score
from research.explanation.result import Finding, at_least
from research.explanation.split import Split
from research.explanation.vectors import ROWS, WIDEST, deepest, drawn, last, logistic
from research.figures.explanation import Bars, Heat, Rows

LEVEL = 0.05  # of significance, over all pairs of concept and target together
PENALTY = 1e-2  # of the classifiers
HELD = 3  # every third example of a set judges the classifier of the others


@dataclasses.dataclass(frozen=True)
class TCAV:
    """For each concept and target class the share of the class's examples whose logit rises along the concept.

    The concept's direction at a tap is the normal of a linear classifier of its examples against random ones; of a large tap, of the mean over
    its places, and the derivative is that of moving all places at once. Each of `sets` random sets gives one direction and one score; Welch's
    t-test compares them with the scores of directions between two random sets, each taken both ways, whose mean is 1/2. A significant score
    above that: the concept speaks for the class.

    Args:    at: the tap; None: the last one before the outputs.
             concept: a class, by name or number; or a list of numbers of examples of the split; or an .npz of inputs as the model reads them,
             in the field's name; None: every class in turn.  target: a class, or a list of them; None: every class.
             examples: of a set.  sets: random ones.  judged: examples of each target class.
             split: where all examples are from; None: the last that there is.
    Raises:  ValueError: a number out of range.
    Source:  Kim et al. 2018, sections 3.2 to 3.4.
    """

    at: str | None = None
    concept: Any = None
    target: Any = None
    examples: int = 60
    sets: int = 30
    judged: int = 100
    split: str | None = None
    reads: ClassVar[str] = "nothing"

    def __post_init__(self):
        at_least(self, examples=6, sets=3, judged=1)

    def fits(self, model: Model) -> str | None:
        """It needs classes, and examples of them."""
        if model.data is None:
            return "it has no data to take examples from"
        return None if "label" in model.spec["fields"] and "classes" in model.spec else "its data has no classes"

    def __call__(self, model: Model, examples: Examples | None, key: jax.Array) -> Finding:
        """The score of every concept for every target class, and whether it is more than chance.

        Raises:  ConfigError: an unknown tap, class or file, or too few examples.
        """
        at = self.at or deepest(model)
        model.require(at)
        source = drawn(model, self.split or last(model), 1, key).source
        labels = _labels(source)
        random = np.random.default_rng(int(jax.random.randint(key, (), 0, 2**31 - 1)))
        concepts, targets = self._concepts(model, source, labels), self._targets(model)
        pool = _pooled(model, at)
        everything = Split(source, np.sort(random.permutation(len(source))[: max(20 * self.examples, 2000)]))
        others = _vectors(model, at, everything, pool)
        chance, _ = self._directions(others, others, random)
        chance = np.concatenate([chance, -chance])  # which of two random sets is the concept is by lot: without both, luck would favour a whole class
        slopes = {target: self._slopes(model, at, Split(source, self._of_class(model, labels, target, random)), target, pool) for target in targets}
        found, checks = [], []
        for split in track(concepts.values(), "concepts", len(concepts)):
            directions, right = self._directions(_vectors(model, at, split, pool), others, random)
            checks.append(right)
            found.append([(_scores(slopes[target], directions), _scores(slopes[target], chance)) for target in targets])
        return self._finding(at, list(concepts), [model.name(target) for target in targets], found, checks)

    def _concepts(self, model: Model, source: Any, labels: np.ndarray) -> dict[str, Split]:
        """{name: its examples}."""
        if isinstance(self.concept, str) and self.concept.endswith(".npz"):
            given = _given(model, self.concept)
            return {epath.Path(self.concept).stem: Split(given, np.arange(len(given)))}
        if isinstance(self.concept, list | tuple):
            numbers = np.array([i for i in self.concept if isinstance(i, int)], np.int64)
            if len(numbers) < len(self.concept) or numbers.min(initial=0) < 0 or numbers.max(initial=0) >= len(source):
                raise ConfigError(f"method.concept={list(self.concept)[:4]}…: must be numbers of examples, 0 to {len(source) - 1}")
            return self._enough({"examples": Split(source, numbers)})
        classes = range(model.spec["classes"]) if self.concept is None else [_class(model, self.concept, "concept")]
        return self._enough({model.name(c): Split(source, np.flatnonzero(labels == c)[: 4 * self.examples]) for c in classes})

    def _enough(self, concepts: dict[str, Split]) -> dict[str, Split]:
        for name, split in concepts.items():
            if len(split) < 6:
                raise ConfigError(f"method.concept: {name} has {len(split)} examples; a direction needs at least 6")
        return concepts

    def _targets(self, model: Model) -> list[int]:
        if self.target is None:
            return list(range(model.spec["classes"]))
        return [_class(model, target, "target") for target in (self.target if isinstance(self.target, list | tuple) else [self.target])]

    def _of_class(self, model: Model, labels: np.ndarray, target: int, random: np.random.Generator) -> np.ndarray:
        known = np.flatnonzero(labels == target)
        if not len(known):
            raise ConfigError(f"method.target={model.name(target)}: the split has no example of it")
        return np.sort(random.permutation(known)[: self.judged])

    def _directions(self, own: np.ndarray, others: np.ndarray, random: np.random.Generator) -> tuple[Float[np.ndarray, "s d"], float]:
        """(a direction for each random set, the share of held-out examples that the classifiers know)."""
        size = min(self.examples, len(own), len(others) // 2)
        sets = []
        for _ in range(self.sets):
            against = random.permutation(len(others))[: 2 * size]
            mine = others[against[size:]] if own is others else own[random.permutation(len(own))[:size]]
            sets.append(np.concatenate([mine, others[against[:size]]]))
        x, label = np.stack(sets), np.repeat(np.array([1, 0], np.int32), size)
        held = np.arange(2 * size) % HELD == 0
        kernel, bias = _classifiers(jnp.asarray(x[:, ~held]), jnp.asarray(label[~held]))
        kernel, bias = np.asarray(kernel), np.asarray(bias)
        guess = (np.einsum("snd,sdc->snc", x[:, held], kernel) + bias[:, None]).argmax(-1)
        return kernel[..., 1] - kernel[..., 0], float((guess == label[held]).mean())

    def _slopes(self, model: Model, at: str, split: Split, target: int, pool: bool) -> Float[np.ndarray, "n d"]:
        """The gradient of the target's logit with respect to the tap."""
        made = []
        rows = min(ROWS, len(split))
        for where, batch in split.chunks(rows):
            slope = np.asarray(_slope(model.objective, at, pool, model.arrays, batch, np.full((rows, 1), target, np.int32)))
            made.append(slope[: where.stop - where.start])
        return np.concatenate(made)

    def _finding(self, at: str, concepts: list[str], targets: list[str], found: list[Any], checks: list[float]) -> Finding:
        scores = np.array([[pair[0].mean() for pair in row] for row in found])
        chance = np.array([[welch(*pair) for pair in row] for row in found])
        level = LEVEL / scores.size
        shares = np.stack([np.stack([pair[0] for pair in row]) for row in found])  # concept target set
        if len(concepts) > 1:
            values = np.where(chance < level, scores - 0.5, np.nan)
            panel: Any = Heat(values, concepts, targets, f"TCAV at {at}, less 1/2", "target class", "concept")
        else:
            spread = shares[0].std(-1)
            title = f"TCAV of {concepts[0]} at {at}; 1/2: it does not matter"
            panel = Bars(targets, scores[0], title, "share whose logit rises", scores[0] - spread, scores[0] + spread, ordered=False)
        rows = [
            (concept, target, float(scores[i, j]), float(chance[i, j]), "yes" if chance[i, j] < level else "no")
            for i, concept in enumerate(concepts)
            for j, target in enumerate(targets)
        ]
        strongest = sorted(rows, key=lambda row: (row[4] == "no", -abs(row[2] - 0.5)))[:20]
        table = Rows(("concept", "target", "score", "p", "significant"), strongest, f"level {LEVEL} over {len(rows)} pairs")
        numbers = {
            "at": at,
            "scores": {concept: dict(zip(targets, scores[i].tolist(), strict=True)) for i, concept in enumerate(concepts)},
            "p": {concept: dict(zip(targets, chance[i].tolist(), strict=True)) for i, concept in enumerate(concepts)},
            "accuracy": dict(zip(concepts, checks, strict=True)),
        }
        lines = [
            "score: the share of a class's examples whose logit rises along the concept's direction; no colour: no more than chance "
            f"({int((chance < level).sum())} of {len(rows)} are more)"
        ]
        weak = [name for name, right in numbers["accuracy"].items() if right < 0.6]
        if weak:
            lines.append(f"a linear classifier hardly knows {', '.join(weak)} at {at}: there is no such concept to speak of")
        return Finding((panel, table), numbers, {"scores": shares.astype(np.float32)}, lines=tuple(lines))


def welch(first: Float[np.ndarray, "n"], second: Float[np.ndarray, "m"]) -> float:
    """The probability that means so far apart arise by chance: Welch's two-sided t-test; 1 and 0 where neither varies."""
    from scipy.stats import t

    a, b = first.var(ddof=1) / len(first), second.var(ddof=1) / len(second)
    apart = abs(float(first.mean() - second.mean()))
    if a + b < 1e-12:
        return float(apart < 1e-6)
    freedom = (a + b) ** 2 / (a**2 / (len(first) - 1) + b**2 / (len(second) - 1))
    return float(2 * t.sf(apart / np.sqrt(a + b), freedom))


@jax.jit
def _classifiers(x: Float[Array, "s n d"], label: Array) -> tuple[Float[Array, "s d 2"], Float[Array, "s 2"]]:
    return jax.vmap(lambda one: logistic(one, label, 2, jnp.float32(PENALTY), 100))(x)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _slope(objective, at, pool, arrays, batch, target):
    """d logit / d tap of each example; summed over the places where the tap is pooled."""
    value = outputs_of(objective, arrays, batch)[1][at]
    slope = jax.grad(lambda x: score(objective, arrays, batch, target, {at: replaced(x)})[0].sum())(value)
    return slope.reshape(len(slope), -1, slope.shape[-1]).sum(1) if pool else slope.reshape(len(slope), -1)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _vector(objective, at, pool, arrays, batch):
    value = outputs_of(objective, arrays, batch)[1][at].astype(jnp.float32)
    return value.reshape(len(value), -1, value.shape[-1]).mean(1) if pool else value.reshape(len(value), -1)


def _vectors(model: Model, at: str, split: Split, pool: bool) -> Float[np.ndarray, "n d"]:
    rows = min(ROWS, len(split))
    parts = [np.asarray(_vector(model.objective, at, pool, model.arrays, batch))[: where.stop - where.start] for where, batch in split.chunks(rows)]
    return np.concatenate(parts)


def _scores(slopes: Float[np.ndarray, "n d"], directions: Float[np.ndarray, "s d"]) -> Float[np.ndarray, "s"]:
    """For each direction the share of the examples whose logit rises along it."""
    return (slopes @ directions.T > 0).mean(0)


def _pooled(model: Model, at: str) -> bool:
    return model.taps[at].ndim > 2 and int(np.prod(model.taps[at].shape)) > WIDEST


def _labels(source: Any) -> np.ndarray:
    """The label of every example of a split."""
    return np.concatenate([np.asarray(source.take(np.arange(i, min(i + 4096, len(source))))["label"]) for i in range(0, len(source), 4096)])


def _class(model: Model, name: Any, where: str) -> int:
    """The number of a class."""
    classes = [str(c) for c in model.classes]
    if str(name) in classes:
        return classes.index(str(name))
    if isinstance(name, int) and 0 <= name < model.spec["classes"]:
        return name
    raise ConfigError(f"method.{where}={name!r} is no class of this run{nearest(str(name), classes or map(str, range(model.spec['classes'])))}")


@dataclasses.dataclass(frozen=True, eq=False)
class _Inputs:
    """Inputs of a file, ready for the model."""

    field: str
    values: np.ndarray

    def __len__(self) -> int:
        return len(self.values)

    def take(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        return {self.field: self.values[indices]}


def _given(model: Model, path: str) -> _Inputs:
    try:
        with np.load(path, allow_pickle=False) as file:
            known = dict(file)
    except (OSError, ValueError) as error:
        raise ConfigError(f"method.concept={path!r} cannot be read: {error}") from error
    wanted = tuple(model.spec["fields"][model.field]["shape"])
    if model.field not in known or known[model.field].shape[1:] != wanted or len(known[model.field]) < 6:
        found = {name: x.shape for name, x in known.items()}
        raise ConfigError(f"method.concept={path!r} must hold {model.field} of shape (6 or more, {', '.join(map(str, wanted))}); it holds {found}")
    return _Inputs(model.field, known[model.field].astype(np.float32))
