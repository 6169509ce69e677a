"""The one step function: every model, objective and optimizer of this project is trained by it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from research.core.axis import constrain, device_axis, psum
from research.core.errors import ConfigError
from research.core.types import Batch, Hyper, Objective, State, Tally, Tree
from research.training import stability
from research.training.optimizer import Optimizer
from research.training.schedule import Schedule

Metrics = dict[str, tuple[Array, Array]]
Picks = Mapping[str, Any]  # the examples of a batch by number, "index" [b], and which of them count, "keep" [b]; of a chunk [k b]


@dataclasses.dataclass(frozen=True)
class Step:
    """`step(state, frozen, batch) -> (state, metrics)`: one optimizer update over one global batch, as a pure function.

    Each term of the loss is coefficient x sum / weight, where the weights of the *whole* global batch are summed before the gradient is taken.
    Gradients of microbatches and devices then only add, so accumulation, padding, uneven masks and data parallelism are exact. An update
    whose loss or gradient is not finite is skipped: params, opt and extra stay, `step` advances, the skip is counted.

    Equal and hashable by content, so it is a static argument of one module-level jit and a second run with other `hyper` compiles nothing.

    Args:    objective: model and loss.  optimizer: how gradients become updates.  schedule: the learning rate's shape in [0, 1].
             steps: optimizer updates of the whole schedule.  accumulate: microbatches per update; divides the batch of one device.
             axis: name of the mapped device axis under pmap; None elsewhere.
             stability: also measure the gradient and update norms of each layer, and how often each unit is active.
    """

    objective: Objective
    optimizer: Optimizer
    schedule: Schedule
    steps: int
    accumulate: int = 1
    axis: str | None = None
    stability: bool = False

    def __post_init__(self):
        if self.accumulate > 1 and self.objective.batch_coupled:
            raise ConfigError(f"train.accumulate={self.accumulate}: a term of {type(self.objective).__name__} couples the whole batch; set it to 1")

    def create(self, key: jax.Array, batch: Batch, hyper: Mapping[str, float]) -> State:
        """The state before the first step; no leaf is shared with another, so all can be donated.

        Args:    key: the run's seed as a typed key.  batch: any batch of the right shapes; zeros will do.  hyper: starting values.
        """
        init, steps = jax.random.split(key)
        params, extra = self.objective.init(init, batch)
        counters = {"skipped": {"total": jnp.zeros((), jnp.int32), "in_a_row": jnp.zeros((), jnp.int32)}}
        values = {name: jnp.asarray(value, jnp.float32) for name, value in hyper.items()}
        state = State(jnp.zeros((), jnp.int32), params, {**extra, **counters}, self.optimizer.init(params), steps, values)
        return jax.tree.map(jnp.copy, state)

    def __call__(self, state: State, frozen: Tree, batch: Batch) -> tuple[State, Metrics]:
        """(the next state, {name: (sum, weight)}); jit with the state donated."""
        with device_axis(self.axis):
            key = jax.random.fold_in(state.key, state.step)
            weights = psum(self.objective.weights(batch))
            extra = {name: value for name, value in state.extra.items() if name != "skipped"}
            grads, loss, tally, extra = self._gradient(state, frozen, batch, extra, key, weights)
            grads, loss, metrics = psum((grads, loss, tally.metrics))
            norm = optax.tree.norm(grads)
            rate = state.hyper["learning_rate"] * self.schedule(state.step, self.steps)
            updates, opt = self.optimizer.update(grads, state.opt, state.params, state.hyper, rate)
            params = optax.apply_updates(state.params, updates)
            finite = jnp.isfinite(loss) & jnp.isfinite(norm)
            old = {name: state.extra[name] for name in extra}
            params, opt, extra = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (params, opt, extra), (state.params, state.opt, old))
            extra["skipped"] = _count(state.extra["skipped"], finite)
            one = jnp.ones((), jnp.float32)
            metrics |= {"gradient_norm": (norm, one), "learning_rate": (rate, one), "skipped": (1.0 - finite.astype(jnp.float32), one)}
            metrics.setdefault("loss", (loss, one))
            if self.stability:
                metrics |= stability.norms(grads, updates)
            return State(state.step + 1, params, extra, opt, state.key, state.hyper), metrics

    def _gradient(self, state, frozen, batch, extra, key, weights):
        """(gradient, loss, tally, extra) over the microbatches of this device; gradients and sums only add."""

        def loss(params: Tree, extra: Tree, part: Batch):
            tally, changed = self.objective(params, extra, frozen, part, key, state.hyper, train=True)
            value = divide(tally, weights, self.objective.coefficients, state.hyper)
            if self.stability:
                active = stability.activity(self.objective, params, extra, frozen, part, key, state.hyper)
                tally = Tally(tally.terms, tally.metrics | active)
            return value, (tally, changed)

        gradient = jax.value_and_grad(loss, has_aux=True)
        if self.accumulate == 1:
            (value, (tally, extra)), grads = gradient(state.params, extra, batch)
            return grads, value, tally, extra

        def add(carry, part):
            sums, extra = carry
            (value, (tally, extra)), grads = gradient(state.params, extra, part)
            return (jax.tree.map(jnp.add, sums, (grads, value, tally)), extra), None

        parts = jax.tree.map(lambda x: constrain(x.reshape(self.accumulate, -1, *x.shape[1:]), None, "batch"), batch)
        (value, (tally, _)), grads = jax.eval_shape(gradient, state.params, extra, jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), (grads, value, tally))
        ((grads, value, tally), extra), _ = jax.lax.scan(add, (zeros, extra), parts)
        return grads, value, tally, extra


class Held(Protocol):
    """A whole split on the device, as a pytree; research.data.on_device has them."""

    def take(self, indices: Int[Array, "b"]) -> dict[str, Array]:
        """The fields of these examples, gathered on the device."""
        ...


def chunked(step: Callable[[State, Tree, Batch], tuple[State, Metrics]]) -> Callable[[State, Tree, Held, Picks], tuple[State, Metrics]]:
    """Many steps as one program: `chunked(step)(state, frozen, held, picks) -> (state, metrics)`, each metric with a leading axis of k steps.

    The very same step is scanned over batches that are gathered where the split lies, so a chunk is dispatched once. Batches and keys have the
    bits that single steps see; the compiler may round the sums inside in another order.
    """

    def run(state: State, frozen: Tree, held: Held, picks: Picks) -> tuple[State, Metrics]:
        return jax.lax.scan(lambda state, picks: step(state, frozen, gathered(held, picks)), state, picks)

    return run


def gathered(held: Held, picks: Picks) -> Batch:
    """The batch of one step, as the loader gives it."""
    batch, keep = held.take(picks["index"]), picks["keep"]
    mask = batch.get("mask", jnp.ones(keep.shape, bool))
    batch = {**batch, "mask": mask & keep.reshape(-1, *[1] * (mask.ndim - 1)), "index": picks["index"]}
    return {name: constrain(x, "batch") for name, x in batch.items()}


def divide(tally: Tally, weights: Mapping[str, Array], coefficients: tuple[tuple[str, float], ...], hyper: Hyper) -> Float[Array, ""]:
    """The loss: the sum over terms of coefficient x sum / weight, a term of weight 0 counting 0.

    Args:    tally: sums of a part of the batch.  weights: denominators over the whole global batch.
             coefficients: term -> coefficient, unless `hyper` holds one of that name.
    """
    total = jnp.zeros((), jnp.float32)
    for name, coefficient in coefficients:
        weight = weights[name]
        share = jnp.where(weight > 0, tally.terms[name] / jnp.where(weight > 0, weight, 1.0), 0.0)
        total = total + hyper.get(name, coefficient) * share
    return total


def means(pairs: Mapping[str, tuple[Any, Any]]) -> dict[str, float | None]:
    """{name: sum / weight} as numbers on the host; None at weight 0, which no reader mistakes for a score."""
    return {name: float(total) / float(weight) if float(weight) else None for name, (total, weight) in pairs.items()}


def _count(skipped: dict[str, Array], finite: Array) -> dict[str, Array]:
    missed = 1 - finite.astype(jnp.int32)
    return {"total": skipped["total"] + missed, "in_a_row": (skipped["in_a_row"] + missed) * missed}
