"""The learning rate's shape over a run: a pure function of (step, steps) with values in [0, 1], to be multiplied by the peak rate."""

import dataclasses
import math
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.core.errors import ConfigError


class Schedule(Protocol):
    """A frozen dataclass, equal and hashable by content."""

    def __call__(self, step: Int[Array, "*n"], steps: int) -> Float[Array, "*n"]:
        """The share of the peak rate at this optimizer update of a run of `steps` updates."""
        ...

    def check(self, steps: int) -> None:
        """Refuses a run that is too short for the shape."""
        ...

    def observe(self, record: dict[str, Any], value: float) -> tuple[dict[str, Any], float]:
        """(new record, factor for the peak rate) after an evaluation: 1 unless the schedule looks at results."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Warmup:
    """A linear warm-up: the base of the shapes, which say in `_after` what follows it.

    The warm-up is (step + 1) / (warmup + 1), nanoGPT's rule: the first update already learns, and the peak follows the last warm-up update.

    Args:    warmup: optimizer updates of linear warm-up, at least 0.
    """

    warmup: int = 0

    def __post_init__(self):
        _require(self.warmup >= 0, "warmup", self.warmup, "at least 0")

    def __call__(self, step: Int[Array, "*n"], steps: int) -> Float[Array, "*n"]:
        """The share of the peak rate: in [0, 1].

        Args:    step: updates made so far, traced or not.  steps: updates of the whole run, static.
        """
        step = jnp.asarray(step, jnp.int32)
        ramp = (step + 1).astype(jnp.float32) / (self.warmup + 1)
        return jnp.where(step < self.warmup, ramp, self._after(step, steps)).astype(jnp.float32)

    def _after(self, step: Int[Array, "*n"], steps: int) -> Float[Array, "*n"]:
        """The shape once the warm-up is over, in [0, 1]; its value before that is not used."""
        raise NotImplementedError

    def check(self, steps: int) -> None:
        """Refuses a warm-up that is longer than the run.

        Raises:  ConfigError: naming both numbers.
        """
        if self.warmup > steps:
            raise ConfigError(f"schedule.warmup={self.warmup} is longer than the run, train.steps={steps}; the peak rate would never be reached")

    def observe(self, record: dict[str, Any], value: float) -> tuple[dict[str, Any], float]:
        """(record, 1.0): the shape does not depend on results."""
        return record, 1.0

    def _progress(self, step, steps):
        """From 0 at the end of the warm-up to 1 at the end of the run."""
        return _ramp(step - self.warmup, steps - self.warmup)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Constant(Warmup):
    """1 throughout."""

    def _after(self, step: Int[Array, "*n"], steps: int) -> Float[Array, "*n"]:
        return jnp.ones(step.shape, jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cosine(Warmup):
    """Half a cosine from 1 at the end of the warm-up down to `final` at the end of the run.

    Args:    final: share of the peak rate at the end, in [0, 1].
    Source:  Loshchilov and Hutter 2017, without restarts; nanoGPT's `get_lr` with lr_decay_iters = steps.
    """

    final: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _require(0 <= self.final <= 1, "final", self.final, "in [0, 1]")

    def _after(self, step: Int[Array, "*n"], steps: int) -> Float[Array, "*n"]:
        return self.final + (1 - self.final) * 0.5 * (1 + jnp.cos(jnp.pi * self._progress(step, steps)))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear(Warmup):
    """A straight line from 1 at the end of the warm-up down to `final` at the end of the run.

    Args:    final: share of the peak rate at the end, in [0, 1].
    """

    final: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _require(0 <= self.final <= 1, "final", self.final, "in [0, 1]")

    def _after(self, step: Int[Array, "*n"], steps: int) -> Float[Array, "*n"]:
        return 1 - (1 - self.final) * self._progress(step, steps)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Step(Warmup):
    """A staircase: multiplied by `factor` every so many updates, or at given updates; both count from the run's first update.

    Args:    factor: what each stair multiplies by, in [0, 1].  every: updates between stairs.  at: the updates where a stair begins.
             Exactly one of `every` and `at` is given.
    """

    factor: float = 0.1
    every: int | None = None
    at: tuple[int, ...] = ()

    def __post_init__(self):
        super().__post_init__()
        _require(0 <= self.factor <= 1, "factor", self.factor, "in [0, 1]")
        if (self.every is None) == (not self.at):
            raise ConfigError(f"schedule.every={self.every} and schedule.at={list(self.at)}: give exactly one of them")
        _require(self.every is None or self.every >= 1, "every", self.every, "at least 1")

    def _after(self, step: Int[Array, "*n"], steps: int) -> Float[Array, "*n"]:
        stairs = step // self.every if self.every else jnp.sum(step[..., None] >= jnp.array(self.at, jnp.int32), -1)
        return jnp.power(jnp.float32(self.factor), stairs.astype(jnp.float32))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exponential(Warmup):
    """A smooth decay: rate ** (updates since the warm-up / every).

    Args:    rate: what `every` updates multiply by, in (0, 1].  every: updates.
    """

    rate: float = 0.95
    every: int = 1000

    def __post_init__(self):
        super().__post_init__()
        _require(0 < self.rate <= 1, "rate", self.rate, "in (0, 1]")
        _require(self.every >= 1, "every", self.every, "at least 1")

    def _after(self, step: Int[Array, "*n"], steps: int) -> Float[Array, "*n"]:
        return jnp.exp(jnp.maximum(step - self.warmup, 0).astype(jnp.float32) * (math.log(self.rate) / self.every))


@dataclasses.dataclass(frozen=True, kw_only=True)
class WarmupStableDecay(Warmup):
    """1 until the last `decay` updates, then down to `final`; a longer run shares its history up to there.

    Args:    decay: updates of the last phase.  final: share of the peak rate at the end, in [0, 1].
             shape: "linear", "cosine", or "sqrt" (1 - sqrt of the progress, a fast start and a slow end).
    Source:  Hu et al. 2024 (MiniCPM); the shapes in Hägele et al. 2024.
    """

    decay: int = 100
    shape: Literal["linear", "cosine", "sqrt"] = "linear"
    final: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        _require(self.decay >= 0, "decay", self.decay, "at least 0")
        _require(0 <= self.final <= 1, "final", self.final, "in [0, 1]")

    def _after(self, step: Int[Array, "*n"], steps: int) -> Float[Array, "*n"]:
        progress = _ramp(step - (steps - self.decay), self.decay)
        fall = {"linear": progress, "cosine": 0.5 * (1 - jnp.cos(jnp.pi * progress)), "sqrt": jnp.sqrt(progress)}[self.shape]
        return 1 - (1 - self.final) * fall

    def check(self, steps: int) -> None:
        """Refuses a warm-up and decay that together are longer than the run.

        Raises:  ConfigError: naming the numbers.
        """
        super().check(steps)
        if self.warmup + self.decay > steps:
            raise ConfigError(f"schedule.warmup={self.warmup} and schedule.decay={self.decay} are longer than the run, train.steps={steps}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plateau(Constant):
    """1, and on the host, at each evaluation, a smaller peak rate once the watched number has stopped improving.

    The record is a small JSON dict that is saved beside the checkpoint, so a resumed run decides as the uninterrupted one.

    Args:    factor: what a reduction multiplies by, in (0, 1).  patience: evaluations without improvement that are let pass.
             threshold: improvement that counts, relative to the best value.  cooldown: evaluations after a reduction that count as good.
             minimum: smallest share of the first peak rate, in [0, 1].  mode: whether the watched number is better when smaller ("min") or larger.
    Source:  torch.optim.lr_scheduler.ReduceLROnPlateau, threshold_mode "rel".
    """

    factor: float = 0.1
    patience: int = 10
    threshold: float = 1e-4
    cooldown: int = 0
    minimum: float = 0.0
    mode: Literal["min", "max"] = "min"

    def __post_init__(self):
        super().__post_init__()
        _require(0 < self.factor < 1, "factor", self.factor, "in (0, 1)")
        _require(self.patience >= 0, "patience", self.patience, "at least 0")
        _require(self.threshold >= 0, "threshold", self.threshold, "at least 0")
        _require(self.cooldown >= 0, "cooldown", self.cooldown, "at least 0")
        _require(0 <= self.minimum <= 1, "minimum", self.minimum, "in [0, 1]")

    def observe(self, record: dict[str, Any], value: float) -> tuple[dict[str, Any], float]:
        """(new record, factor for the peak rate) after an evaluation.

        Args:    record: what the last call returned; {} before the first.  value: the watched number; NaN counts as no improvement.
        """
        old = {"best": None, "bad": 0, "cooldown": 0, "scale": 1.0} | record
        better = self._better(value, old["best"])
        best, bad = (float(value), 0) if better else (old["best"], old["bad"] + 1)
        cooldown, scale = old["cooldown"], old["scale"]
        if cooldown > 0:
            cooldown, bad = cooldown - 1, 0
        if bad > self.patience:
            cooldown, bad, scale = self.cooldown, 0, max(scale * self.factor, self.minimum)
        return {"best": best, "bad": bad, "cooldown": cooldown, "scale": scale}, scale / old["scale"]

    def _better(self, value, best):
        if best is None or math.isnan(value):
            return not math.isnan(value)
        return value < best * (1 - self.threshold) if self.mode == "min" else value > best * (1 + self.threshold)


def same_history(schedule: Schedule, step: int, old_steps: int, new_steps: int) -> bool:
    """Whether a run of `new_steps` updates would have had the same rates as one of `old_steps` in its first `step` updates.

    Only then may a run be made longer and still be the run that it would have been. The shapes are compared as numbers, not by name.
    """
    curve = jax.jit(schedule, static_argnums=1)
    past = jnp.arange(step, dtype=jnp.int32)
    return bool(jnp.array_equal(curve(past, old_steps), curve(past, new_steps)))


def _ramp(step, steps):
    """step / steps, held in [0, 1]."""
    return jnp.clip(step.astype(jnp.float32) / max(steps, 1), 0.0, 1.0)


def _require(holds: bool, name: str, value: Any, what: str) -> None:
    if not holds:
        raise ConfigError(f"schedule.{name}={value}: must be {what}")
