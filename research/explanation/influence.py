"""Which training examples made an output what it is: influence along the training, TracIn."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.core.errors import ConfigError, nearest
from research.core.progress import track
from research.core.tree import map_paths, matches, paths
from research.core.types import Batch
from research.explanation.model import Examples, Model, Past
from research.explanation.order import layer_of, layers
from research.explanation.result import Finding, at_least
from research.explanation.split import Split, described, shown, training_split

FORMS = ("checkpoints", "replay")
ENTRIES = 1 << 26  # gradient entries that are held at once


@dataclasses.dataclass(frozen=True)
class Influence:
    """rate x (gradient of a training example's loss) . (gradient of the explained example's loss), summed over the run's kept checkpoints.

    Positive: a step on this training example lowered the loss of the explained one, to first order and for plain gradient descent; other
    optimizers rescale the step. With "replay" each checkpoint counts only the examples of the update that followed it, by their share of that
    update: with a checkpoint for every update this is TracIn's ideal form, and the sum over all examples is the loss that training took away.

    Args:    form: "checkpoints" (TracInCP: every training example at every checkpoint) | "replay".
             only: globs of the parameters whose gradients count; None: those of the last layer.
             shown: training examples shown of each kind.  sample: so many training examples, drawn by lot; None: all.
             rows: training examples in one call, fewer where their gradients are large.
    Raises:  ValueError: a count below 1, another form.
    Source:  Pruthi et al. 2020, sections 3.2 and 3.3, and 4 for the choice of the last layer.
    """

    form: str = "checkpoints"
    only: tuple[str, ...] | None = None
    shown: int = 5
    sample: int | None = None
    rows: int = 256
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        at_least(self, shown=1, rows=1, sample=1)
        if self.form not in FORMS:
            raise ValueError(f"form={self.form!r}{nearest(self.form, FORMS)}")

    def fits(self, model: Model) -> str | None:
        """It needs kept checkpoints, the data, and a loss that is a sum over examples."""
        if model.data is None:
            return "it has no training data"
        if model.history is None:
            return "it kept only its latest and best checkpoints; train it with train.keep=all or train.keep=every:N"
        if model.objective.batch_coupled:
            return "its loss couples the examples of a batch, so that no example has a gradient of its own"
        return None

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Finding:
        """The most helpful and the most harmful training examples of each example.

        Raises:  ConfigError: globs that fit no parameter, examples without right answers, no checkpoint that counts.
        """
        names = self._names(model)
        asked = answered(model, examples)
        history = self._history(model)
        split = training_split(model, self.sample, key)
        if self.form == "replay":
            assert model.data is not None
            seen = np.unique(np.concatenate([past.seen for past in history if past.seen is not None]))
            split = Split(model.data().splits["train"], seen if self.sample is None else np.intersect1d(seen, split.indices))
        total = np.zeros((len(examples), len(split)), np.float32)
        size = sum(int(np.prod(x.shape)) for path, x in paths(model.params).items() if path in names)
        rows = int(np.clip(ENTRIES // size, 1, min(self.rows, len(split))))
        steps, rates = [], []
        for past in history:
            steps.append(past.step)
            rates.append(past.rate)
            arrays = jax.device_put((past.params, past.extra, model.frozen, model.hyper))
            aim = _gradients(model.objective, names, arrays, asked, None)
            for places, batch, weights in track(self._visits(model, split, past, rows), f"checkpoint {past.step}", self._count(split, past, rows)):
                part = past.rate * np.asarray(_products(model.objective, names, arrays, batch, weights, aim))
                np.add.at(total.T, places, part.T[: len(places)])
        return self._finding(model, examples, asked, split, total, {"checkpoints": steps, "rates": rates, "parameters": size})

    def _names(self, model: Model) -> tuple[str, ...]:
        """The parameters whose gradients count."""
        known = paths(model.params)
        if self.only is None:
            order = layers(model)
            last = max((layer_of(path, model.params) for path in known), key=lambda layer: order.get(layer, (-1, -1))[1])
            return tuple(path for path in known if layer_of(path, model.params) == last)
        for glob in self.only:
            if not any(matches(path, (glob,)) for path in known):
                raise ConfigError(f"method.only={glob!r} fits no parameter of this model{nearest(glob, known)}")
        return tuple(path for path in known if matches(path, self.only))

    def _history(self, model: Model) -> Sequence[Past]:
        assert model.history is not None
        history = model.history()
        if self.form == "replay":
            history = [past for past in history if past.seen is not None]
        if not history:
            more = " that an update followed" if self.form == "replay" else ""
            raise ConfigError(f"method=influence: the run kept no checkpoint{more}; train it longer, or with train.keep=all")
        return history

    def _visits(self, model: Model, split: Split, past: Past, rows: int) -> Iterator[tuple[np.ndarray, Batch, Any]]:
        """(places of the examples in the split, the batch, weights of the loss) of one checkpoint."""
        if self.form == "checkpoints":
            for places, batch in split.chunks(rows):
                yield np.arange(places.start, places.stop), batch, None
            return
        assert past.seen is not None
        update = Split(split.source, past.seen)
        parts = (model.objective.weights(update.batch(past.seen[i : i + rows])) for i in range(0, len(past.seen), rows))
        weights = functools.reduce(functools.partial(jax.tree.map, jnp.add), parts)
        counted = Split(split.source, past.seen[np.isin(past.seen, split.indices)])
        for places, batch in counted.chunks(rows):
            yield np.searchsorted(split.indices, counted.indices[places]), batch, weights

    def _count(self, split: Split, past: Past, rows: int) -> int:
        count = len(split) if self.form == "checkpoints" or past.seen is None else int(np.isin(past.seen, split.indices).sum())
        return -(-count // rows)

    def _finding(self, model: Model, examples: Examples, asked: Batch, split: Split, total: np.ndarray, numbers: Mapping[str, Any]) -> Finding:
        order = np.argsort(-total, axis=1, kind="stable")
        helped = [[j for j in row[: self.shown] if total[i, j] > 0] for i, row in enumerate(order)]
        harmed = [[j for j in row[::-1][: self.shown] if total[i, j] < 0] for i, row in enumerate(order)]
        each, lines = [], []
        for i, name in enumerate(examples.names):
            one = {field: np.asarray(value)[i : i + 1] for field, value in asked.items()}
            panels = [shown(model, one, [str(name)], "explained")]
            told = []
            for kind, places in (("helped", helped[i]), ("harmed", harmed[i])):
                if places:
                    batch = split.batch(split.indices[places])
                    captions = [f"train {j}" for j in split.indices[places]]
                    panels.append(shown(model, batch, captions, f"training examples that {kind} most", "influence", total[i, places]))
                    answer = described(model, batch, 0)
                    told.append(f"{kind} most by train {split.indices[places[0]]} ({answer + ', ' if answer else ''}{total[i, places[0]]:.3g})")
            each.append(panels)
            lines.append(f"{name}: {', '.join(told) or 'no training example has any influence'}")
        found = {"helpful": helped, "harmful": harmed}
        listed = {kind: [[int(split.indices[j]) for j in row] for row in rows] for kind, rows in found.items()}
        values = {f"{kind}_influence": [[float(total[i, j]) for j in row] for i, row in enumerate(rows)] for kind, rows in found.items()}
        sums = {"influence_sum": total.sum(1).tolist()}
        return Finding(numbers={**numbers, **sums, **listed, **values}, kept={"influence": total, "index": split.indices}, each=each, lines=lines)


def answered(model: Model, examples: Examples) -> Batch:
    """The examples with right answers, which a loss needs: the data's own; where they have none, the explained output counts as the answer.

    Raises:  ConfigError: examples of a regression without targets.
    """
    batch = {name: np.asarray(value) for name, value in examples.batch.items()}
    missing = [name for name in ("label", "target") if name in model.spec["fields"] and name not in batch]
    if "label" in missing:
        batch["label"] = examples.target[:, -1].astype(np.int32)
    if "target" in missing and model.field != "tokens":
        raise ConfigError("influence compares losses, and these examples have no targets: give index=NUMBERS of the run's own data")
    if "target" in missing:
        tokens, rows = batch["tokens"], np.arange(len(examples))
        batch["target"] = np.concatenate([tokens[:, 1:], tokens[:, :1]], 1)
        last = batch["mask"].sum(1) - 1
        batch["target"][rows, last] = 0
        known = examples.target[:, 0] == last  # nothing follows the last token but what is explained there
        batch["target"][rows[known], last[known]] = examples.target[known, 1]
        batch["mask"] = batch["mask"].copy()
        batch["mask"][rows[~known], last[~known]] = False
    return batch


@functools.partial(jax.jit, static_argnums=(0, 1))
def _gradients(objective, names: tuple[str, ...], arrays, batch, weights) -> Float[Array, "b p"]:
    """The gradient of each example's loss with respect to the named parameters.

    Args:    weights: denominators of the loss's terms; None: each example's own, so that its loss is its mean.
    """
    params, extra, frozen, hyper = arrays
    known = paths(params)

    def loss(chosen, example):
        full = map_paths(lambda path, x: chosen.get(path, x), params)
        one = jax.tree.map(lambda x: jnp.asarray(x)[None], example)
        tally, _ = objective(full, extra, frozen, one, None, hyper, train=False)
        shares = objective.weights(one) if weights is None else weights
        terms = ((hyper.get(name, c) * tally.terms[name], shares[name]) for name, c in objective.coefficients)
        return functools.reduce(jnp.add, (jnp.where(weight > 0, term / jnp.where(weight > 0, weight, 1.0), 0.0) for term, weight in terms))

    slopes = jax.vmap(jax.grad(loss), (None, 0))({name: known[name] for name in names}, dict(batch))
    return jnp.concatenate([x.reshape(len(x), -1).astype(jnp.float32) for x in slopes.values()], 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _products(objective, names, arrays, batch, weights, aim) -> Float[Array, "b n"]:
    return jnp.einsum("bp,np->bn", aim, _gradients(objective, names, arrays, batch, weights), precision="highest")
