"""Structured pruning: whole channels, hidden units and attention heads go, and a smaller model of the same family is left."""

import dataclasses
import functools
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np

from research.compression.subject import Subject, get, put
from research.compression.wrapper import Wrapper
from research.core.config import remodelled
from research.core.errors import ConfigError, nearest
from research.core.tree import paths
from research.core.types import Batch, Objective, Tree

_TOLERANCE = 1e-4  # of the largest output, between the model with units zeroed and the model without them


@dataclasses.dataclass(frozen=True)
class Width:
    """The number of units of one layer, and where they lie in the model's arrays.

    Args:    argument: of the model's constructor.  layer: which of its numbers.  size: units.
             axes: (path, axis, repeat): the axis of a leaf that is `repeat` x size long; the unit is what counts fastest along it, as where an
             image is flattened before a dense layer.
    """

    argument: str
    layer: int
    size: int
    axes: tuple[tuple[str, int, int], ...]

    @property
    def name(self) -> str:
        """As a person would write it, `channels[1]`."""
        return f"{self.argument}[{self.layer}]"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Structured:
    """The least important units of each layer go, with every weight that reads or writes them.

    Which weights belong to a unit is found by probing: the model is built, in shapes alone, with one more unit in one layer, and every axis that
    has grown belongs to that layer's units. The shrunk model is then held against the whole one with those units at zero; a layer whose
    units cannot simply go, as where a layer norm averages over them, is refused.

    Args:    sparsity: share of the units that go, in [0, 1); one number, or one for each argument of the model, as {channels: 0.3, hidden: 0.5}.
             score: what makes a unit important: "taylor", the square of the sum of weight x gradient over all that belongs to it, on calibration
             data; or "norm", the length of all weights that belong to it.
             multiple: the number of units that are kept is a multiple of this, where a layer has at least twice as many: odd widths run slower.
             partial: leave layers as they are whose units cannot go.
    Source:  Molchanov et al. 2019, equation 8 (taylor); Fang et al. 2023 (coupled weights; found there by tracing, here by probing).
    """

    sparsity: float | Mapping[str, float] = 0.5
    score: Literal["taylor", "norm"] = "taylor"
    multiple: int = 8
    partial: bool = False
    trains: ClassVar[bool] = False

    def __post_init__(self):
        for name, value in self.sparsity.items() if isinstance(self.sparsity, Mapping) else (("", self.sparsity),):
            if not 0 <= value < 1:
                raise ConfigError(f"method.sparsity{'.' + name if name else ''}={value}: must be in [0, 1)")
        if self.multiple < 1:
            raise ConfigError(f"method.multiple={self.multiple}: must be at least 1")

    def __call__(self, subject: Subject) -> Subject:
        """The smaller model."""
        if isinstance(subject.objective, Wrapper):
            raise ConfigError(f"method: structured pruning needs a plain model; this one is {type(subject.objective).__name__} already")
        explicit, kept = self.choose(subject)
        for width in list(_unfit(subject, explicit, kept)):
            if not self.partial:
                raise ConfigError(
                    f"method: the units of {width.name} cannot go alone, since the model mixes them elsewhere; partial=true leaves them"
                )
            kept[width] = np.arange(width.size)
        notes = {width.name: {"units": width.size, "kept": len(units)} for width, units in kept.items()}
        return dataclasses.replace(_shrunk(subject, explicit, kept), notes=notes)

    def choose(self, subject: Subject) -> tuple[dict[str, Any], dict[Width, np.ndarray]]:
        """(the model's sizes as arguments, one number a layer; of each layer the units that stay, in their order)."""
        explicit, found = _widths(subject)
        arguments = {width.argument for width in found}
        for name in self.sparsity if isinstance(self.sparsity, Mapping) else ():
            if name not in arguments:
                raise ConfigError(f"method.sparsity.{name}: the model has no such sizes{nearest(name, arguments)}")
        importance = _importance(subject, found, self.score)
        return explicit, {width: self._kept(width, importance[width]) for width in found}

    def _kept(self, width: Width, importance: np.ndarray) -> np.ndarray:
        """The units that stay, in their order."""
        share = self.sparsity.get(width.argument, 0.0) if isinstance(self.sparsity, Mapping) else self.sparsity
        step = self.multiple if width.size >= 2 * self.multiple else 1
        count = min(max(round(width.size * (1 - share) / step) * step, step), width.size)
        return np.sort(np.argsort(-importance, kind="stable")[:count])


def _widths(subject: Subject) -> tuple[dict[str, Any], list[Width]]:
    """(the model's sizes as arguments, one number a layer; the widths that they are)."""
    module: Any = getattr(subject.objective, "module", None)
    if not hasattr(module, "sizes"):
        raise ConfigError(f"method: {type(module).__name__} does not tell its `sizes`, so no units can go")
    explicit = {name: list(value) if isinstance(value, tuple) else value for name, value in module.sizes.items()}
    whole = _abstract(subject.replace(config=remodelled(subject.config, **explicit)))
    found = []
    for argument, numbers in ((name, value) for name, value in explicit.items() if isinstance(value, list)):
        for layer, size in enumerate(numbers):
            grown = [*numbers[:layer], size + 1, *numbers[layer + 1 :]]
            wider = _abstract(subject.replace(config=remodelled(subject.config, **{**explicit, argument: grown})))
            axes = tuple(
                (path, axis, more - less)
                for path, leaf in whole.items()
                for axis, (less, more) in enumerate(zip(leaf.shape, wider[path].shape, strict=True))
                if more != less
            )
            found.append(Width(argument, layer, size, axes))
    return explicit, found


def _abstract(subject: Subject) -> dict[str, jax.ShapeDtypeStruct]:
    """{params/… and extra/… path: shape} of a subject's model, from its objective alone."""
    params, extra = jax.eval_shape(subject.objective.init, jax.random.key(0), subject.batches[0])
    return paths({"params": params, "extra": extra})


def _importance(subject: Subject, widths: list[Width], score: str) -> dict[Width, np.ndarray]:
    """How much each unit matters."""
    leaves = paths({"params": subject.params, "extra": subject.extra})
    if score == "norm":
        values = {path: np.square(leaf) for path, leaf in leaves.items()}
    else:
        grads = _gradient(subject)
        values = {f"params/{path}": np.asarray(get(subject.params, path)) * np.asarray(grad) for path, grad in paths(grads).items()}
    found = {}
    for width in widths:
        parts = [
            _by_unit(values[path], width.size, axis, repeat) for path, axis, repeat in width.axes if path in values and path.startswith("params/")
        ]
        total = np.sum(parts, axis=0)
        found[width] = np.sqrt(total) if score == "norm" else np.square(total)
    return found


def _gradient(subject: Subject) -> Tree:
    """The gradient of the loss on the calibration data."""
    total = None
    for batch in subject.batches:
        part = _loss_gradient(subject.objective, *subject.model, batch)
        total = part if total is None else jax.tree.map(jnp.add, total, part)
    return total


@functools.partial(jax.jit, static_argnums=0)
def _loss_gradient(objective: Objective, params, extra, frozen, hyper, batch: Batch):
    def loss(params):
        tally, _ = objective(params, extra, frozen, batch, None, hyper, train=False)
        weights = objective.weights(batch)
        return sum(hyper.get(name, coefficient) * tally.terms[name] / weights[name] for name, coefficient in objective.coefficients)

    return jax.grad(loss)(params)


def _by_unit(values: Any, size: int, axis: int, repeat: int) -> np.ndarray:
    """The sum of a leaf's values over everything but the units of one axis."""
    split = np.moveaxis(np.asarray(values), axis, 0).reshape(repeat, size, -1)
    return split.sum((0, 2), dtype=np.float64)


def _positions(width: Width, units: np.ndarray, repeat: int) -> np.ndarray:
    """Where these units lie along an axis that holds each of them `repeat` times."""
    return (np.arange(repeat)[:, None] * width.size + units[None]).ravel()


def _shrunk(subject: Subject, explicit: Mapping[str, Any], kept: Mapping[Width, np.ndarray]) -> Subject:
    """The model with these units only."""
    sizes = {name: list(value) if isinstance(value, list) else value for name, value in explicit.items()}
    leaves = paths({"params": subject.params, "extra": subject.extra})
    for width, units in kept.items():
        sizes[width.argument][width.layer] = len(units)
        for path, axis, repeat in width.axes:
            leaves[path] = jnp.take(leaves[path], _positions(width, units, repeat), axis=axis)
    tree = put({}, leaves)
    return subject.replace(config=remodelled(subject.config, **sizes), params=tree["params"], extra=tree.get("extra", {}))


def masked(subject: Subject, kept: Mapping[Width, np.ndarray]) -> Subject:
    """The whole model with every weight of the other units at zero."""
    leaves = {path: np.array(leaf) for path, leaf in paths({"params": subject.params, "extra": subject.extra}).items()}
    for width, units in kept.items():
        gone = np.setdiff1d(np.arange(width.size), units)
        for path, axis, repeat in width.axes:
            if path.startswith("params/"):
                np.moveaxis(leaves[path], axis, 0)[_positions(width, gone, repeat)] = 0
    tree = put({}, leaves)
    return dataclasses.replace(subject, params=tree["params"], extra=tree.get("extra", {}))


def _unfit(subject: Subject, explicit: Mapping[str, Any], kept: Mapping[Width, np.ndarray]) -> Iterator[Width]:
    """The widths whose units cannot go without changing what the others compute."""

    def differ(kept):
        return _difference(masked(subject, kept), _shrunk(subject, explicit, kept)) > _TOLERANCE

    if differ(kept):
        every = {width: np.arange(width.size) for width in kept}
        yield from (width for width, units in kept.items() if differ({**every, width: units}))


def _difference(first: Subject, second: Subject) -> float:
    """The largest difference of the two models' outputs on a calibration batch, as a share of the largest output."""
    outputs = [jax.tree.leaves(_predict(subject.objective, *subject.model, subject.batches[0])) for subject in (first, second)]
    return max(float(np.abs(a - b).max() / np.abs(a).max()) for a, b in zip(*outputs, strict=True))


@functools.partial(jax.jit, static_argnums=0)
def _predict(objective, params, extra, frozen, hyper, batch):
    return objective.predict(params, extra, frozen, batch, None, hyper)[0]
