"""Averages of runs: one model whose weights are the mean of several that were trained from one start."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp

from research.compression.subject import Subject
from research.compression.wrapper import Wrapper
from research.core.errors import ConfigError
from research.core.tree import paths
from research.core.types import Tree

_PASSES = 100  # updates of running statistics: at a decay of 0.9, 3e-5 of the old ones are left


def average(trees: Sequence[Tree], weights: Sequence[float] | None = None) -> Tree:
    """The weighted mean of trees of one form, leaf by leaf, in float32 and then in each leaf's own type.

    Args:    weights: one for each tree, not below 0; None: all equal. Only their ratios count.
    Raises:  ValueError: no trees, weights that do not fit, or trees of different form; the first leaf that differs is named.
    """
    shares = [1.0] * len(trees) if weights is None else list(weights)
    if not trees or len(shares) != len(trees):
        raise ValueError(f"{len(shares)} weights for {len(trees)} models: give one for each")
    if min(shares) < 0 or not sum(shares) > 0:
        raise ValueError(f"weights={shares}: must not be negative, and not all 0")
    shapes = [{path: leaf.shape for path, leaf in paths(tree).items()} for tree in trees]
    for number, other in enumerate(shapes[1:], 2):
        if different := sorted(path for path in {*shapes[0], *other} if shapes[0].get(path) != other.get(path)):
            name = different[0]
            raise ValueError(
                f"model {number} is of another form: {name} is {other.get(name, 'missing')} there, {shapes[0].get(name, 'missing')} here"
            )
    total = sum(shares)

    def mean(*leaves):
        parts = (share / total * leaf.astype(jnp.float32) for share, leaf in zip(shares, leaves, strict=True))
        return functools.reduce(jnp.add, parts).astype(leaves[0].dtype)

    return jax.tree.map(mean, *trees)


def greedy(trees: Sequence[Tree], loss: Callable[[Tree], float]) -> tuple[tuple[int, ...], Tree]:
    """(which trees are in it, their mean): from the best on, each joins if the mean is then no worse.

    Args:    loss: of a model on data that none was trained on; lower is better.
    Source:  Wortsman et al. 2022 (model soups), recipe 1.
    """
    losses = [loss(tree) for tree in trees]
    first, *others = sorted(range(len(trees)), key=losses.__getitem__)
    chosen, mean, best = (first,), trees[first], losses[first]
    for number in others:
        tried = average([trees[i] for i in (*chosen, number)])
        if (now := loss(tried)) <= best:
            chosen, mean, best = (*chosen, number), tried, now
    return chosen, mean


@dataclasses.dataclass(frozen=True, kw_only=True)
class Soup:
    """The mean of this run's weights and those of other runs of the same model, which must have one start in common to lie in one valley.

    Running statistics of batch norms are measured anew on the calibration data: the mean of statistics is not that of the mean model.

    Args:    runs: folders of the other runs.  weights: of this run and of each of those, in this order; empty: all equal.
             choose: "all"; or "greedy": from the best on, each joins only if the loss on the calibration data is then no worse. That data is of the
             training split, so it favours runs that have learned it by heart.
    Source:  Wortsman et al. 2022; statistics: Izmailov et al. 2018, section 3.2.
    """

    runs: tuple[str, ...] = ()
    weights: tuple[float, ...] = ()
    choose: Literal["all", "greedy"] = "all"
    trains: ClassVar[bool] = False

    def __post_init__(self):
        if not self.runs:
            raise ConfigError("method.runs=[]: name the runs to average with, as method.runs=[runs/a,runs/b]")
        if self.weights and self.choose == "greedy":
            raise ConfigError("method.weights: the greedy choice weighs all equally; leave them out, or choose=all")

    def __call__(self, subject: Subject) -> Subject:
        """The averaged model.

        Raises:  ConfigError: a run of another model, or weights that do not fit.
        """
        if isinstance(subject.objective, Wrapper):
            raise ConfigError(f"method=soup: averages plain models; this one is {type(subject.objective).__name__}")
        trees = [subject.params, *subject.others]
        try:
            mean = average(trees, self.weights or None)
            chosen = tuple(range(len(trees)))
            if self.choose == "greedy":
                chosen, mean = greedy(trees, lambda params: _loss(dataclasses.replace(subject, params=params, extra=_measured(subject, params))))
        except ValueError as error:
            raise ConfigError(f"method=soup: {error}") from error
        notes = {("this run", *self.runs)[i]: {"chosen": float(i in chosen)} for i in range(len(trees))}
        return dataclasses.replace(subject, params=mean, extra=_measured(subject, mean), notes=notes)


def _loss(subject: Subject) -> float:
    """The mean loss on the calibration data."""
    pairs = [_tally(subject.objective, *subject.model, batch) for batch in subject.batches]
    return float(sum(total for total, _ in pairs)) / float(sum(weight for _, weight in pairs))


@functools.partial(jax.jit, static_argnums=0)
def _tally(objective, params, extra, frozen, hyper, batch):
    return objective(params, extra, frozen, batch, None, hyper, train=False)[0].metrics["loss"]


def _measured(subject: Subject, params: Tree) -> Tree:
    """`extra` with running statistics of these parameters on the calibration data; as it was where there are none."""
    extra = subject.extra
    if jax.tree.leaves(extra):
        for number in range(_PASSES):
            extra = _updated(subject.objective, params, extra, subject.frozen, subject.hyper, subject.batches[number % len(subject.batches)])
    return extra


@functools.partial(jax.jit, static_argnums=0)
def _updated(objective, params, extra, frozen, hyper, batch):
    return objective.apply(params, extra, frozen, batch, jax.random.key(0), hyper, train=True)[2]
