"""Linear probes: what can be read off a layer by a linear classifier, and how much of that the classifier merely memorised."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int

from research.core.errors import ConfigError, nearest
from research.core.progress import track
from research.explanation.model import Examples, Model
from research.explanation.result import Finding, at_least
from research.explanation.vectors import Items, drawn, logistic, read, sequential, splits, vector_taps
from research.figures.explanation import Bars, Rows

NORMAL = 1.96  # deviations to either side that hold 95 %


@dataclasses.dataclass(frozen=True)
class Probe:
    """Accuracy of a linear classifier of each tap's vectors, and its selectivity: that accuracy less the one on a control task.

    In the control task every type of item has one label, drawn by lot, with the same shares of labels: what the classifier gets right of it, it
    has memorised. In a text the type is the token that is read; elsewhere every example is a type of its own, and its control is chance.
    Probes learn on the training split and are judged on the split after it; intervals hold 95 % and count whole examples, whose items depend
    on each other.

    Args:    at: taps; None: as `vector_taps` says.  label: what is read off: a field of the batch, or a column of a table;
             None: what the run learns to predict.  examples: of the training split.  held_out: of the other.  each: positions of every text.
             classes: a real-valued label is cut into so many classes of equal size.  penalty: on the classifier's squared weights.
    Raises:  ValueError: a number out of range.
    Source:  Alain and Bengio 2016; Hewitt and Liang 2019 (control task and selectivity).
    """

    at: tuple[str, ...] | str | None = None
    label: str | None = None
    examples: int = 2000
    held_out: int = 1000
    each: int = 4
    classes: int = 4
    penalty: float = 1e-3
    reads: ClassVar[str] = "nothing"

    def __post_init__(self):
        at_least(self, examples=2, held_out=2, each=1, classes=2)
        if self.penalty < 0:
            raise ValueError(f"penalty={self.penalty} must not be below 0")

    def fits(self, model: Model) -> str | None:
        """It needs the data."""
        return "it has no data to learn from" if model.data is None else None

    def __call__(self, model: Model, examples: Examples | None, key: jax.Array) -> Finding:
        """Accuracy, control and selectivity of every tap.

        Raises:  ConfigError: an unknown tap or label, data of a single class.
        """
        names = vector_taps(model, self.at)
        train, test = self._items(model, names, key)
        label, other, count = self._labels(model, train, test)
        control = _control(model, (train, test), (label, other), jax.random.fold_in(key, 2))
        commonest = float((other == np.bincount(label, minlength=count).argmax()).mean())
        rows = []
        for name in track(names, "probes"):
            hits = [self._hits(train.values[name], test.values[name], *pair, count) for pair in ((label, other), control)]
            accuracy, memorised, gap = (_interval(x, test.example) for x in (*hits, hits[0] - hits[1]))
            rows.append((name, accuracy, memorised, gap))
        return _finding(rows, commonest, count, len(train), len(test))

    def _items(self, model: Model, names: list[str], key: jax.Array) -> tuple[Items, Items]:
        """(items to learn from, items to be judged by), which share no example."""
        known = splits(model)
        keys = jax.random.split(key, 4)
        other = next((name for name in ("test", "validation") if name in known), "train")
        source = next(name for name in ("train", "validation", "test") if name in known)
        if other != source:
            learn, judge = drawn(model, source, self.examples, keys[0]), drawn(model, other, self.held_out, keys[1])
        else:
            both = drawn(model, source, self.examples + self.held_out, keys[0])
            order = np.asarray(jax.random.permutation(keys[1], len(both)))
            cut = max(1, len(both) * self.examples // (self.examples + self.held_out))
            learn, judge = (dataclasses.replace(both, indices=np.sort(both.indices[part])) for part in (order[:cut], order[cut:]))
        each = self.each if sequential(model) else None
        return read(model, learn, names, keys[2], each), read(model, judge, names, keys[3], each)

    def _labels(self, model: Model, train: Items, test: Items) -> tuple[np.ndarray, np.ndarray, int]:
        """(labels of both, number of classes)."""
        columns = [str(name) for name in model.spec.get("columns") or ()]
        name = self.label or ("label" if "label" in train.batch else "target")
        if name in columns:
            found = [items.field("features")[:, columns.index(name)] for items in (train, test)]
        elif name in train.batch and name not in ("mask", "index", "image", "features"):
            found = [items.field(name) for items in (train, test)]
        else:
            known = [*columns, *(field for field in train.batch if field not in ("mask", "index", "image", "features"))]
            raise ConfigError(f"method.label={name!r} is neither a field nor a column of the run's data{nearest(name, known)}")
        if found[0].dtype.kind == "f":
            if found[0].ndim > 1:
                found = [values.reshape(len(values), -1)[:, 0] for values in found]  # of several targets the first
            edges = np.unique(np.quantile(found[0], np.arange(1, self.classes) / self.classes))
            found = [np.digitize(values, edges) for values in found]
        label, other = (np.asarray(values, np.int32) for values in found)
        if len(np.unique(label)) < 2:
            raise ConfigError(f"method.label={name!r} has one value alone in the examples that were drawn: there is nothing to tell apart")
        return label, other, int(max(label.max(), other.max())) + 1

    def _hits(self, x: np.ndarray, held: np.ndarray, label: np.ndarray, other: np.ndarray, count: int) -> Float[np.ndarray, "n"]:
        """1 where the classifier of these vectors is right about the ones held out, 0 elsewhere."""
        kernel, bias = logistic(jnp.asarray(x), jnp.asarray(label), count, jnp.float32(self.penalty))
        guess = (held @ np.asarray(kernel) + np.asarray(bias)[None]).argmax(1)
        return (guess == other).astype(np.float32)


def _control(
    model: Model, items: tuple[Items, Items], labels: tuple[np.ndarray, np.ndarray], key: jax.Array
) -> tuple[Int[np.ndarray, "n"], Int[np.ndarray, "m"]]:
    """Labels of the control task: one for each type of item, drawn from the labels that there are."""
    seed = int(jax.random.randint(key, (), 0, 2**31 - 1))
    random = np.random.default_rng(seed)
    if not sequential(model):
        return random.choice(labels[0], len(items[0])).astype(np.int32), random.choice(labels[0], len(items[1])).astype(np.int32)
    by_type = random.choice(labels[0], model.spec["vocabulary"]).astype(np.int32)
    first, second = (by_type[x.field("tokens")] for x in items)
    return first, second


def _interval(values: Float[np.ndarray, "n"], example: Int[np.ndarray, "n"]) -> tuple[float, float, float]:
    """(mean, low, high): 95 % of the normal approximation over examples, each with the sum of its items."""
    mean = float(values.mean())
    rows = np.unique(example, return_inverse=True)[1]
    groups = rows.max() + 1
    excess = np.bincount(rows, values - mean, groups)
    error = np.sqrt((excess**2).sum() * groups / max(groups - 1, 1)) / len(values)
    return mean, mean - NORMAL * float(error), mean + NORMAL * float(error)


def _finding(rows: list[Any], commonest: float, count: int, learned: int, judged: int) -> Finding:
    names = [row[0] for row in rows]
    columns = {word: np.array([row[i] for row in rows]) for i, word in enumerate(("accuracy", "control", "selectivity"), 1)}
    note = f"{count} classes; the commonest alone: {commonest:.3f}"
    drawn = [
        Bars(names, values[:, 0], f"{word} of a linear probe", note if word == "accuracy" else word, values[:, 1], values[:, 2], ordered=False)
        for word, values in columns.items()
        if word != "control"
    ]
    table = Rows(("tap", *columns), [(name, *(float(values[i, 0]) for values in columns.values())) for i, name in enumerate(names)], note)
    numbers: dict[str, Any] = {word: dict(zip(names, values[:, 0].tolist(), strict=True)) for word, values in columns.items()}
    numbers |= {f"{word}_interval": dict(zip(names, values[:, 1:].tolist(), strict=True)) for word, values in columns.items()}
    numbers |= {"commonest": commonest, "classes": count, "learned_from": learned, "judged_by": judged}
    best = int(columns["selectivity"][:, 0].argmax())
    accuracy, control = (float(columns[word][best, 0]) for word in ("accuracy", "control"))
    line = f"most selective at {names[best]}: accuracy {accuracy:.3f}, control {control:.3f}; {note}"
    return Finding((*drawn, table), numbers, {word: values.astype(np.float32) for word, values in columns.items()}, lines=(line,))
