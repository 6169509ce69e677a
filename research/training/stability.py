"""Signs that training is unstable: gradients that vanish or explode on their way through the layers, and units that are never active."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr, Literal, jaxprs_in_params
from jaxtyping import Array

from research.core.tree import STACKED, UNSTACKED, paths, unstack
from research.core.types import Batch, Hyper, Objective, State, Tree

GRADIENT, UPDATE, ACTIVE, DEAD, RATIO = "gradient_norm/", "update_norm/", "active/", "dead/", "gradient_ratio"
UNITS = re.compile(r"(^|/)(hidden|maps)(_\d+)?\Z")  # the taps that hold what an activation function has returned, units last
LITTLE = 1e-6  # an activation no larger counts as none: relu gives 0, a gelu far below 0 a rounding error
VANISHING = 1e-4  # first layer's gradient over the last one's
EXPLODING = 1e3  # the norm of one layer's gradient; with losses that are means it is around 1

Pairs = dict[str, tuple[Array, Array]]


def norms(gradients: Tree, updates: Tree) -> Pairs:
    """The norm of the gradient and of the update of each layer, as metrics; a layer is what holds parameters under one path."""
    one = jnp.ones((), jnp.float32)
    found: Pairs = {}
    for kind, tree in ((GRADIENT, gradients), (UPDATE, updates)):
        squares: dict[str, Array] = {}
        for path, leaf in paths(unstack(tree)).items():
            squares[_layer(path)] = squares.get(_layer(path), jnp.zeros((), jnp.float32)) + jnp.sum(leaf.astype(jnp.float32) ** 2)
        found |= {f"{kind}{layer}": (jnp.sqrt(total), one) for layer, total in squares.items()}
    return found


def activity(objective: Objective, params: Tree, extra: Tree, frozen: Tree, batch: Batch, key: jax.Array, hyper: Hyper) -> Pairs:
    """How often each unit of each tap of units is active over the valid items, as metrics with an axis of units.

    The forward pass is the one of the loss, on the same numbers: called where that is differentiated, it becomes the same program, and the
    compiler merges the two.
    """
    _, taps, _ = objective.apply(params, extra, frozen, batch, key, hyper, train=True)
    found: Pairs = {}
    for path, values in taps.items():
        if not UNITS.search(path):
            continue
        head, stacked, tail = f"/{path}".partition(f"/{STACKED}/")
        each = {f"{head}/{UNSTACKED}{i}/{tail}"[1:]: values[i] for i in range(len(values))} if stacked else {path: values}
        found |= {f"{ACTIVE}{name}": _active(x, jnp.asarray(batch["mask"])) for name, x in each.items()}
    return found


def _active(values: Array, mask: Array) -> tuple[Array, Array]:
    if values.shape[: mask.ndim] != mask.shape:
        mask = mask.reshape(len(mask), -1).any(1)
    counted = mask.reshape(*mask.shape, *(1,) * (values.ndim - mask.ndim))
    active = (jnp.abs(values) > LITTLE) & counted
    return active.astype(jnp.float32).sum(range(values.ndim - 1)), mask.sum(dtype=jnp.float32)


def order(objective: Objective, state: State, frozen: Tree, batch: Batch) -> list[str]:
    """The layers that hold a matrix, in the order in which a forward pass first reads them; nothing is computed.

    Args:    state, batch: arrays or abstract values.
    """

    def outputs(params, extra, frozen, batch, hyper):
        return objective.apply(params, extra, frozen, batch, None, hyper, train=False)[0]

    extra = {name: value for name, value in state.extra.items() if name != "skipped"}
    program = jax.make_jaxpr(outputs)(state.params, extra, frozen, batch, state.hyper).jaxpr
    leaves = paths(state.params)
    read: dict[str, None] = {}
    _read(program, dict(zip(program.invars, leaves, strict=False)), read)
    places: dict[str, list[str]] = {}  # a layer, or a stack with all of its own
    depths: dict[str, int] = {}
    for path in read:
        head, stacked, tail = f"/{path}".partition(f"/{STACKED}/")
        shape = leaves[path].shape
        if len(shape) >= 2 + bool(stacked):
            place = f"{head}/{UNSTACKED}"[1:] if stacked else _layer(path)
            places.setdefault(place, []).append(tail)
            depths[place] = shape[0] if stacked else 0
    layers: dict[str, None] = {}
    for place, tails in places.items():
        inner = [_layer(f"{place}{i}/{tail}") for i in range(depths[place]) for tail in tails]
        layers |= dict.fromkeys(inner or [place])
    return list(layers)


def _read(program: Jaxpr, names: Mapping[Any, str], read: dict[str, None]) -> None:
    """Adds the names of the variables in the order in which the program's equations first read them."""
    for equation in program.eqns:
        given = [None if isinstance(variable, Literal) else names.get(variable) for variable in equation.invars]
        for inner in jaxprs_in_params(equation.params):
            if len(inner.invars) == len(given):
                _read(inner, {variable: name for variable, name in zip(inner.invars, given, strict=True) if name}, read)
        read |= dict.fromkeys(name for name in given if name and name not in read)


class Watch:
    """What the host makes of a window of steps: scores to log, and warnings, each once.

    Args:    layers: as of `order`.
    """

    def __init__(self, layers: Sequence[str]):
        self._layers = layers
        self._told: set[tuple[str, str]] = set()

    def scores(self, sums: Mapping[str, tuple[Any, Any]]) -> dict[str, float]:
        """{name: score}: of each tap of units the share that was never active, and the first layer's gradient norm over the last one's.

        Args:    sums: over the window, {metric: (sum, weight)}.
        """
        found = {
            f"{DEAD}{name.removeprefix(ACTIVE)}": float(np.mean(total == 0)) for name, (total, n) in sums.items() if name.startswith(ACTIVE) and n
        }
        first, last = self._ends(sums)
        if last > 0:
            found[RATIO] = first / last
        return found

    def warnings(self, sums: Mapping[str, tuple[Any, Any]], skipped: Sequence[Mapping[str, tuple[Any, Any]]]) -> list[str]:
        """Lines that name the layers at which gradients vanish, explode or are not finite.

        Args:    sums: over the window.  skipped: the metrics of its steps whose update was not finite.
        """
        found: dict[tuple[str, str], str] = {}
        first, last = self._ends(sums)
        means = {name.removeprefix(GRADIENT): float(total / n) for name, (total, n) in sums.items() if name.startswith(GRADIENT)}
        if last > 0 and first < VANISHING * last:
            ends = f"{self._layers[0]} is {first:.2g}, that of {self._layers[-1]} {last:.2g}"
            found["vanish", self._layers[0]] = f"gradients vanish on their way back: the gradient norm of {ends}"
        largest = max(means, key=lambda layer: means[layer], default="")
        if largest and means[largest] > EXPLODING:
            found["explode", largest] = f"gradients explode: the gradient norm of {largest} is {means[largest]:.2g}"
        for metrics in skipped:
            names = [name.removeprefix(GRADIENT) for name, (norm, _) in metrics.items() if name.startswith(GRADIENT) and not np.isfinite(norm)]
            listed = [layer for layer in self._layers if layer in names] or names
            if listed:
                text = ", ".join(listed[:6]) + (" …" if len(listed) > 6 else "")
                found["infinite", listed[0]] = f"gradients explode: they are not finite in {text}"
        new = {kind: text for kind, text in found.items() if kind not in self._told}
        self._told |= set(new)
        return list(new.values())

    def _ends(self, sums: Mapping[str, tuple[Any, Any]]) -> tuple[float, float]:
        """The mean gradient norms of the first layer and of the last; (0, 0) where there are no two."""
        ends = [f"{GRADIENT}{layer}" for layer in (self._layers[0], self._layers[-1])] if len(self._layers) > 1 else []
        means = [float(total / n) for total, n in (sums[name] for name in ends if name in sums) if n]
        return (means[0], means[1]) if len(means) == 2 else (0.0, 0.0)


def _layer(path: str) -> str:
    """The path of what holds this parameter."""
    return path.rpartition("/")[0] or path
