"""Scores of a whole split."""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import numpy as np

from research.core.axis import Layout, constrain, laid_out
from research.core.errors import DataError
from research.core.types import Batch, Hyper, Objective, Tree
from research.inference.batches import fetched, padded, valid

TRUTH = ("index", "label", "target")  # fields of the batch that are collected beside the predictions


def evaluate(
    objective: Objective,
    params: Tree,
    extra: Tree,
    frozen: Tree,
    hyper: Hyper,
    batches: Iterable[Batch],
    *,
    collect: bool = False,
    layout: Layout | None = None,
    put: Callable[[Batch], Batch] = lambda batch: batch,
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """(metrics, outputs) of all examples: the sums of all batches in float64, divided once, so exact however the split was cut.

    One compiled program: a short last batch is filled up with masked rows.

    Args:    batches: one pass over the split.  collect: also keep what the model predicts for every example (not for language models: large).
             layout: how the model lies on several devices; None: on one.  put: moves a batch, or this host's part of it, to them.
    Returns: {name: sum / weight, None at weight 0; and what the objective derives from them, for which alone metrics with axes are};
             {name: array of all valid examples in order}: what `predict` gives, `index`, and `label` or `target`; empty unless `collect`.
    Raises:  DataError: no batches.
    """
    model = (params, extra, frozen, hyper)
    model = jax.device_put(model) if layout is None else model  # once, not with every batch
    results = ((batch, *_measure(objective, collect, layout, *model, put(batch))) for batch in padded(batches))
    sums: dict[str, Any] = {}
    collected: list[dict[str, np.ndarray]] = []
    for batch, metrics, outputs in fetched(results):
        pairs = jax.tree.map(lambda x: x.astype(np.float64), metrics)
        sums = jax.tree.map(np.add, sums, pairs) if sums else pairs
        if collect:
            truth = {name: batch[name] for name in TRUTH if name in batch}
            collected.append({name: x[valid(batch)] for name, x in {**outputs, **truth}.items()})
    if not sums:
        raise DataError("there is nothing to evaluate: the split has no batches")
    means: dict[str, Any] = {name: _mean(total, weight) for name, (total, weight) in sums.items()}
    outputs = {name: np.concatenate([part[name] for part in collected]) for name in (collected[0] if collected else ())}
    return {name: mean for name, mean in means.items() if not isinstance(mean, list)} | objective.derived(means), outputs


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _measure(objective, collect, layout, params, extra, frozen, hyper, batch):
    with laid_out(layout):
        tally, _ = objective(params, extra, frozen, batch, None, hyper, train=False)
        outputs = objective.predict(params, extra, frozen, batch, None, hyper)[0] if collect else {}  # the compiler merges the two forward passes
        return jax.tree.map(constrain, (tally.metrics, outputs))  # on each device


def _mean(total, weight):
    """sum / weight as a number, or as a list where the metric has axes; None at weight 0."""
    if np.ndim(total) == 0:
        return float(total / weight) if weight else None
    return [_mean(t, w) for t, w in zip(total, np.broadcast_to(weight, np.shape(total)), strict=True)]
