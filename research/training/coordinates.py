"""The coordinate check: how far each activation moves in the first updates, at several widths."""

import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp

from research.core.types import Batch
from research.training.assembly import Assembly

NOT = ("factor", "weights")  # last names of taps that are no activations: what norms divide by, and shares that add to 1


def coordinates(assembly: Assembly, batches: Sequence[Batch]) -> dict[str, list[float]]:
    """{tap: its root mean square change since the start, on the first batch, after each update}.

    In maximal-update parametrization none of them depends on the width, and each is as large as the learning rate lets it be. In the standard one
    they grow with it: a wider model takes larger steps in what it computes.

    Args:    assembly: of a run that trains without a teacher.  batches: one for each update.
    Source:  Yang et al. 2022, appendix D.1; there the mean absolute value of the activation itself, here of what training has done to it.
    """
    state, objective = assembly.state(), assembly.step.objective

    @jax.jit
    def activations(state):
        _, taps = objective.predict(state.params, state.extra, None, batches[0], None, state.hyper)
        return {name: tap for name, tap in taps.items() if name.rpartition("/")[2] not in NOT}

    @jax.jit
    def moved(now, start):
        return {name: jnp.sqrt(jnp.mean(jnp.square(now[name].astype(jnp.float32) - start[name].astype(jnp.float32)))) for name in now}

    step, start = jax.jit(assembly.step), activations(state)
    sizes: dict[str, list[float]] = {name: [] for name in start}
    for batch in batches:
        state, _ = step(state, None, batch)
        for name, size in moved(activations(state), start).items():
            sizes[name].append(float(size))
    return {name: of for name, of in sizes.items() if any(of)}  # the input of an image model never moves


def slopes(by_width: Mapping[int, Mapping[str, float]]) -> dict[str, float]:
    """{tap: the power of the width that its size grows with}: the least-squares slope of log size over log width.

    Args:    by_width: width -> {tap: size}; at least two widths, every size above 0.
    """
    widths = sorted(by_width)
    x = [math.log(width) for width in widths]
    middle = sum(x) / len(x)
    spread = sum((value - middle) ** 2 for value in x)
    slopes = {}
    for name in by_width[widths[0]]:
        y = [math.log(by_width[width][name]) for width in widths]
        slopes[name] = sum((a - middle) * b for a, b in zip(x, y, strict=True)) / spread
    return slopes
