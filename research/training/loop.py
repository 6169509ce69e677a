"""The one training loop: evaluate, save, fetch, step, write."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, Protocol

import jax
import numpy as np

from research.core import hosts
from research.core.errors import ConfigError, DivergedError, nearest
from research.core.types import Batch, State, Tree
from research.training import stability
from research.training.checkpoint import Checkpoints
from research.training.clock import Clock, compiled_here
from research.training.interrupt import Interrupt
from research.training.log import Log
from research.training.parallel import Parallel
from research.training.sparsify import Sparsify
from research.training.step import Held, Metrics, Picks, Step, means

_QUIET = tuple(f"train/{name}" for name in ("gradient_norm", stability.UPDATE, stability.DEAD, stability.RATIO))  # too many for the terminal
_SYNCHRONISE = 10  # fake CPU devices deadlock after some 300 all-reduces that nobody waited for


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """The `train` group of the config; conf/train/default.yaml says what each means."""

    steps: int | None = 1000
    epochs: int | None = None
    stop_at: int | None = None
    log_every: int = 10
    eval_every: int | Literal["epoch"] | None = 100
    save_every: int | None = None
    keep: str = "latest"
    monitor: str = "validation/loss"
    mode: Literal["min", "max"] = "min"
    patience: int | None = None
    minimum_delta: float = 0.0
    accumulate: int = 1
    chunk: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    clip: float | None = None
    sparsify: Sparsify | None = None
    ema: float | None = None
    values: tuple[str, ...] = ("optimizer.learning_rate",)
    stability: bool = False
    skip_limit: int = 10
    key: Literal["threefry", "rbg"] = "threefry"

    def __post_init__(self):
        if (self.steps is None) == (self.epochs is None):
            raise ConfigError(f"train.steps={self.steps} and train.epochs={self.epochs}: give exactly one of them, the other null")
        for name in ("steps", "epochs", "stop_at", "log_every", "eval_every", "save_every", "patience", "accumulate", "chunk", "skip_limit"):
            value = getattr(self, name)
            if isinstance(value, int) and value < 1:
                raise ConfigError(f"train.{name}={value}: must be at least 1")
        if self.minimum_delta < 0:
            raise ConfigError(f"train.minimum_delta={self.minimum_delta}: must not be negative")
        for name in ("steps", "stop_at", "log_every", "eval_every", "save_every"):
            value = getattr(self, name)
            if isinstance(value, int) and value % self.chunk:
                near = max(round(value / self.chunk), 1) * self.chunk
                raise ConfigError(f"train.{name}={value}: train.chunk={self.chunk} does not divide it; the nearest that it divides is {near}")

    def resolved(self, batches: int) -> "Settings":
        """With epochs turned into steps.

        Args:    batches: of one epoch.
        Raises:  ConfigError: an epoch, or all of them, is no whole number of chunks.
        """
        for name, epochs in (("epochs", self.epochs), ("eval_every", 1 if self.eval_every == "epoch" else None)):
            if epochs is not None and (steps := epochs * batches) % self.chunk:
                near = min((n for n in range(1, steps + 1) if steps % n == 0), key=lambda n: abs(n - self.chunk))
                raise ConfigError(
                    f"train.{name}={getattr(self, name)}: {steps} steps, {batches} an epoch, which train.chunk={self.chunk} does not divide; "
                    f"the nearest that does is train.chunk={near}"
                )
        steps = self.steps if self.steps is not None else (self.epochs or 0) * batches
        every = batches if self.eval_every == "epoch" else self.eval_every
        return dataclasses.replace(self, steps=steps, epochs=None, eval_every=every)

    def check_start(self, step: int) -> None:
        """Refuses to go on from inside a chunk.

        Raises:  ConfigError: naming the step.
        """
        if step % self.chunk:
            raise ConfigError(f"train.chunk={self.chunk} does not divide {step}, the step to go on from; use train.chunk=1, or another checkpoint")


class Batches(Protocol):
    """Random access to batches; research.data.loader.Loader is one."""

    def __getitem__(self, step: int) -> Batch: ...

    def chunks(self, start: int, stop: int, length: int) -> Iterator[tuple[Held, Picks]]: ...

    def iterate(self, start: int, stop: int, put: Callable[[Any], Any]) -> Iterator[Batch]: ...

    def indices(self, step: int) -> np.ndarray: ...


@dataclasses.dataclass
class Outcome:
    """How a run ended: `status` is finished, stopped_early, pruned or interrupted."""

    state: State
    host: dict[str, Any]
    status: str
    reason: str | None = None


def new_host() -> dict[str, Any]:
    """What the host remembers beside the state; saved as host.json, so that a resumed run decides as an uninterrupted one."""
    return {"watched": None, "best": None, "bad_evaluations": 0, "schedule": {}, "seconds": {}, "learning_rate": None, "window": [], "in_a_row": 0}


@dataclasses.dataclass
class Loop:
    """Everything that the steps of one run pass through.

    Args:    evaluate: state -> means of the validation split, {} where there is none.  hooks: called as hook(state, step) after each
             evaluation, for samples and figures.  interrupt: whether the process was asked to stop, from before the loop on.
             pruner: (step, scores of an evaluation) -> why the run ends there, None where it goes on; {} asks what was decided before.
    """

    step: Step
    settings: Settings
    parallel: Parallel
    batches: Batches
    checkpoints: Checkpoints
    log: Log
    evaluate: Callable[[State], Mapping[str, float | None]]
    clock: Clock
    hooks: tuple[Callable[[State, int], None], ...] = ()
    interrupt: Interrupt = dataclasses.field(default_factory=Interrupt)
    pruner: Callable[[int, Mapping[str, float | None]], str | None] | None = None

    def run(self, state: State, frozen: Tree, host: dict[str, Any]) -> Outcome:
        """Goes on from this state to the end of the schedule, to `stop_at`, to the end of patience, or until a signal asks to stop.

        Raises:  DivergedError: `skip_limit` updates in a row were not finite; the last checkpoint stays.
        """
        settings, self._host = self.settings, {**new_host(), **host}
        if self._host["watched"] != (watched := [settings.monitor, settings.mode]):  # of another score, the best so far says nothing
            self._host |= {"watched": watched, "best": None, "bad_evaluations": 0}
        start = at = int(state.step)
        self._start, self._spent = start, self.clock.seconds["train"] + self.clock.seconds["wait"]
        end = self.step.steps
        stop = min(end, settings.stop_at or end)
        self._pending: list[tuple[int, Metrics]] = []  # still on the device: the last step of a chunk, the metrics of all its steps
        self._window = [(step, _restored(metrics)) for step, metrics in self._host["window"]]  # since the last log point
        self._latest: dict[str, float | None] = {}
        self._watch: stability.Watch | None = None
        live, frozen, chunk = self.parallel.place(state), self.parallel.hold(frozen), settings.chunk
        settings.check_start(start)
        train: Callable[..., tuple[State, Metrics]]
        fetched: Iterator[tuple[Any, ...]]
        if chunk == 1:
            train, fetched = self.parallel.train(self.step), ((batch,) for batch in self.batches.iterate(at, stop, self.parallel.put))
        else:
            train, fetched = self.parallel.train_chunk(self.step), self.batches.chunks(at, stop, chunk)
        ready: tuple[Any, ...] | None = None  # what the next step is given, where it is known already
        self._kinds: dict[str, Any] = {}  # of what the step is given
        # the run may have been killed between its last checkpoint and its result
        ended = self._out_of_patience() or self._pruned(start, {}) if start else None
        with self.interrupt.listening(patient=True) as interrupt:
            while True:
                improved = False
                if at > start and (at == end or _due(at, settings.eval_every)):
                    live, improved, ended = self._evaluate(live, at)
                if at >= stop and ended is None:
                    ended = ("finished", None) if at >= end else ("interrupted", f"train.stop_at={stop}")
                if (asked := self._asked(interrupt, at)) and ended is None:
                    ended = ("interrupted", asked)
                if at > start and (ended or improved or _due(at, settings.save_every or settings.eval_every)):
                    self._save(live, best=improved)
                if ended:
                    break
                fed, ready = ready or self._next(fetched), None
                if self.step.stability and self._watch is None:
                    one = self.parallel.one((live, fed[0] if chunk == 1 else self.batches[at]))
                    self._watch = stability.Watch(stability.order(self.step.objective, one[0], frozen, one[1]))
                with self.clock.span("train"):
                    given, programs = (live, *fed), compiled_here()
                    live, metrics = train(live, frozen, *fed)
                    if at == start or programs != compiled_here():
                        self._check_programs(given, at, first=at == start)
                    del given
                    at += chunk
                    self._pending.append((at, metrics))
                if due := _due(at, settings.log_every):
                    ready = self._next(fetched) if at < stop else None  # before the wait for this step
                with self.clock.span("train"):
                    if due:
                        self._write(at)
                    elif self.parallel.size > 1 and (chunk > 1 or at % _SYNCHRONISE == 0):
                        jax.block_until_ready(metrics)
        self.checkpoints.wait()
        return Outcome(self.parallel.one(live), self._host, *ended)

    def _next(self, fetched: Iterator[tuple[Any, ...]]) -> tuple[Any, ...]:
        """What a step is given; the time counts as waiting for data only where the device has nothing left to do."""
        waited = self.clock.seconds["wait"]
        with self.clock.span("wait"):
            fed = next(fetched)
        if self._pending and not jax.tree.leaves(self._pending[-1][1])[0].is_ready():
            self.clock.move("wait", "train", self.clock.seconds["wait"] - waited)
        return fed

    def _asked(self, interrupt: Interrupt, at: int) -> str | None:
        """The signal that asks the run to end; several hosts, of which any may have got one, agree on it at log points."""
        return interrupt.asked if hosts.count() == 1 else hosts.agreed(interrupt.asked) if _due(at, self.settings.log_every) else None

    def _evaluate(self, live: State, at: int) -> tuple[State, bool, tuple[str, str | None] | None]:
        """(state, whether this is the best so far, how the run ends if it does)."""
        with self.clock.span("train"):
            self._write(at)
        with self.clock.span("evaluate"):
            state = self.parallel.one(live)
            scores = dict(self.evaluate(state))
            for hook in self.hooks:
                hook(state, at)
        if scores:
            self.log.scalars(at, scores)
        value = self._monitored(scores)
        improved = self._improves(value)
        if improved:
            self._host |= {"best": {"metric": self.settings.monitor, "value": value, "step": at}, "bad_evaluations": 0}
        else:
            self._host["bad_evaluations"] += 1
        shown = {name: value for name, value in {**self._latest, **scores}.items() if value is not None and not name.startswith(_QUIET)}
        self.log.line(f"step {at}: " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))
        return self._reschedule(live, value), improved, self._out_of_patience() or self._pruned(at, {**self._latest, **scores})

    def _out_of_patience(self) -> tuple[str, str] | None:
        patience = self.settings.patience
        if patience is None or self._host["bad_evaluations"] < patience:
            return None
        return "stopped_early", f"{self.settings.monitor} did not improve in {patience} evaluations"

    def _pruned(self, at: int, scores: Mapping[str, float | None]) -> tuple[str, str] | None:
        reason = self.pruner and self.pruner(at, scores)
        return ("pruned", reason) if reason else None

    def _monitored(self, scores: Mapping[str, float | None]) -> float | None:
        known = {**self._latest, **scores}
        name = self.settings.monitor
        if name not in known:
            raise ConfigError(f"train.monitor={name!r} is no metric of this run{nearest(name, known)}")
        return known[name]

    def _improves(self, value: float | None) -> bool:
        """Whether this beats the best so far by more than the minimum; a NaN never does."""
        best = self._host["best"]
        if value is None or not math.isfinite(value):
            return False
        sign = 1 if self.settings.mode == "max" else -1
        return best is None or sign * (value - best["value"]) > self.settings.minimum_delta

    def _reschedule(self, live: State, value: float | None) -> State:
        """The state with the peak rate that the schedule wants after this evaluation."""
        record, factor = self.step.schedule.observe(self._host["schedule"], math.nan if value is None else value)
        self._host["schedule"] = record
        if factor == 1.0:
            return live
        self.log.line(f"learning rate x {factor:g}")
        return dataclasses.replace(live, hyper={**live.hyper, "learning_rate": live.hyper["learning_rate"] * np.float32(factor)})

    def _save(self, live: State, *, best: bool) -> None:
        with self.clock.span("train"):
            self._fetch()
        with self.clock.span("save"):
            self._host |= {"seconds": dict(self.clock.seconds), "window": self._window}
            self.checkpoints.save(self.parallel.one(live), dict(self._host), best=best)

    def _fetch(self) -> None:
        """Brings the metrics of the latest steps to the host, in one transfer."""
        fetched = jax.device_get([self.parallel.one(metrics) for _, metrics in self._pending])
        for (at, _), metrics in zip(self._pending, fetched, strict=True):
            self._window += [(at, metrics)] if self.settings.chunk == 1 else _each(metrics, at, self.settings.chunk)
        self._pending = []
        if self._window:
            self._host["learning_rate"] = float(self._window[-1][1]["learning_rate"][0])

    def _write(self, at: int) -> None:
        """Writes the means of the metrics since the last log point; ends a run that has diverged."""
        self._fetch()
        window, self._window = self._window, []
        if not window:
            return
        skipped = [step for step, metrics in window if metrics["skipped"][0] > 0]
        kept = [metrics for step, metrics in window if step not in skipped] or [metrics for _, metrics in window]  # a NaN would hide the others
        names = [name for name in kept[0] if all(name in metrics for metrics in kept)]  # a resumed run may measure more, or less
        sums = {name: tuple(np.sum(part, axis=0) for part in zip(*(metrics[name] for metrics in kept), strict=True)) for name in names}
        scores = means({name: pair for name, pair in sums.items() if name not in ("learning_rate", "skipped") and not np.ndim(pair[0])})
        scores |= self.step.objective.derived(scores)
        if self._watch is not None:
            scores |= self._watch.scores(sums)
            for warning in self._watch.warnings(sums, [metrics for step, metrics in window if step in skipped]):
                self.log.line(f"warning: step {at}: {warning}")
        rate, seconds = self._host["learning_rate"], self.clock.seconds
        self._latest = {f"train/{name}": value for name, value in scores.items()}
        wait = seconds["wait"] / max(seconds["wait"] + seconds["train"], 1e-9)
        self.log.scalars(at, {**self._latest, "learning_rate": rate, "skipped": len(skipped), "data_wait": wait})
        loss = scores.get("loss")
        speed = (at - self._start) / max(seconds["train"] + seconds["wait"] - self._spent, 1e-9)
        self.log.progress(at, f"loss {'-' if loss is None else format(loss, '.4f')}  {speed:.1f} steps/s  data wait {wait:.1%}")
        self._check_skips([step for step, _ in window], skipped)

    def _check_programs(self, given: tuple[Any, ...], at: int, *, first: bool) -> None:
        """Remembers what the step was compiled for; says what has changed where it was compiled anew."""
        kinds, before = _kinds(given), self._kinds
        self._kinds = kinds
        if first:
            return
        names = [name for name in {**before, **kinds} if before.get(name) != kinds.get(name)]
        shown = [f"{name} {_change(before.get(name), kinds.get(name))}" for name in names[:4]] + ["…"] * (len(names) > 4)
        message = f"step {at + 1} compiled anew: {', '.join(shown) or 'no shape has changed'}"
        self.log.line(f"warning: {message}")
        warnings.warn(message, CompiledAnew, stacklevel=2)

    def _check_skips(self, steps: list[int], skipped: list[int]) -> None:
        """Says which updates were skipped; ends the run when too many in a row were."""
        if skipped:
            self.log.line(f"skipped a non-finite update at step {', '.join(map(str, skipped[:8]))}{' …' if len(skipped) > 8 else ''}")
        for step in steps:
            self._host["in_a_row"] = in_a_row = self._host["in_a_row"] + 1 if step in skipped else 0
            if in_a_row >= self.settings.skip_limit:
                indices = {str(s - 1): self.batches.indices(s - 1).tolist() for s in range(step - in_a_row + 1, step + 1)}
                raise Diverged(f"{in_a_row} updates in a row had a non-finite loss or gradient, the last at step {step}", step, indices)


class CompiledAnew(UserWarning):
    """A training step was compiled after the first one: slow, and a fault of the program. The log has it too, so only tests turn it up."""


warnings.filterwarnings("ignore", category=CompiledAnew, append=True)


class Diverged(DivergedError):
    """Carries the numbers of the examples that the skipped updates were made of."""

    def __init__(self, message: str, step: int, indices: dict[str, list[int]]):
        super().__init__(message)
        self.step, self.indices = step, indices


def _restored(metrics: Mapping[str, Any]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """A step's metrics from host.json, where a number that was not finite is null."""
    return {name: (np.asarray(total, np.float32), np.asarray(weight, np.float32)) for name, (total, weight) in metrics.items()}


def _each(metrics: Mapping[str, Any], at: int, chunk: int) -> list[tuple[int, Any]]:
    """(step, its metrics) for each step of a chunk that ended at this one."""
    return [(at - chunk + 1 + i, {name: (total[i], weight[i]) for name, (total, weight) in metrics.items()}) for i in range(chunk)]


def _kinds(given: tuple[Any, ...]) -> dict[str, tuple[str, str, str]]:
    """{path: (shape, type, place)} of what a step is given: what its program is compiled for."""
    leaves = jax.tree_util.tree_flatten_with_path(given)[0]
    return {jax.tree_util.keystr(path[1:], simple=True, separator="/"): _kind(leaf) for path, leaf in leaves}


def _kind(leaf: Any) -> tuple[str, str, str]:
    kind = jax.typeof(leaf)
    name = f"{kind.dtype}{' (weak)' if getattr(kind, 'weak_type', False) else ''}"
    return " x ".join(map(str, kind.shape)) or "scalar", name, str(getattr(leaf, "sharding", "host"))


def _change(before: tuple[str, str, str] | None, now: tuple[str, str, str] | None) -> str:
    """What of an argument has changed, in words."""
    if before is None or now is None:
        return "is new" if now else "is gone"
    return ", ".join(f"{was} -> {is_}" for was, is_ in zip(before, now, strict=True) if was != is_)


def _due(at: int, every: int | str | None) -> bool:
    return isinstance(every, int) and at % every == 0
