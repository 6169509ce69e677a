"""Runs of one program side by side: each in a thread with the loop that any run has, their steps as one program over all of them."""

import contextlib
import contextvars
import dataclasses
import functools
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from research.core.types import Batch, State, Tree
from research.training.loop import Settings
from research.training.parallel import Jit
from research.training.step import Held, Metrics, Picks, Step, chunked

_member: "contextvars.ContextVar[Member | None]" = contextvars.ContextVar("member", default=None)


class Together:
    """Runs that take each step at the same time: the last one to arrive runs the program for all.

    What a run does between its steps it does while the others wait: threads that take turns by themselves are faster than those among which
    Python switches every few milliseconds.

    The program has a fixed number of rows, one for each run. A run that has ended, failed or never begun leaves: its row then repeats
    another's, which nobody reads, so nothing is compiled anew and nobody waits for it.

    Args:    rows: of the program; at least the number of runs.
    """

    def __init__(self, rows: int):
        self.rows = rows
        self._active: set[int] = set()
        self._waiting: dict[int, tuple[Any, ...]] = {}
        self._results: dict[int, tuple[Any, ...] | BaseException] = {}
        self.turn = threading.Condition()

    def member(self, row: int) -> "Member":
        """The place of one run, taken at once: the others wait for it from now on."""
        with self.turn:
            self._active.add(row)
        return Member(self, row)

    def leave(self, row: int) -> None:
        """Ends the part that a run takes; safe to call twice."""
        with self.turn:
            self._active.discard(row)
            self._run_if_all()

    def call(self, row: int, program: Callable[..., Any], step: Step, state: State, *fed: Any) -> Any:
        """This run's part of one call of the program, once all have come to it."""
        with self.turn:
            self._waiting[row] = (program, step, state, *fed)
            self._run_if_all()
            self.turn.wait_for(lambda: row in self._results)
            result = self._results.pop(row)
        if isinstance(result, BaseException):
            raise result
        return result

    def _run_if_all(self) -> None:
        if not self._waiting or self._waiting.keys() < self._active:
            return
        waiting, self._waiting = self._waiting, {}
        (program, step, *_), *others = calls = list(waiting.values())
        try:
            if any(other[:2] != (program, step) for other in others):
                raise AssertionError("runs of different programs cannot step together")
            spare = self.rows - len(calls)
            states = (*(call[2] for call in calls), *(calls[0][2],) * spare)
            frozen, held = calls[0][3], calls[0][4:-1]
            fed = [call[-1] for call in calls]
            fed += fed[:1] * spare
            new, metrics = program(step, states, frozen, *held, tuple(fed))
            self._results |= dict(zip(waiting, rows_of((new, metrics), len(calls)), strict=True))
        except BaseException as error:
            self._results |= dict.fromkeys(waiting, error)
        self.turn.notify_all()


@dataclasses.dataclass(frozen=True, eq=False)
class Member:
    """One run's place among others; what its loop runs steps with.

    Args:    together: the others.  row: its place.
    """

    together: Together
    row: int

    @contextlib.contextmanager
    def taking_part(self) -> Iterator[None]:
        """Makes this the place of the run in this thread, and leaves at the end, however it ends."""
        token = _member.set(self)
        with self.together.turn:  # given up in `call` alone
            try:
                yield
            finally:
                _member.reset(token)
                self.leave()

    def leave(self) -> None:
        """Ends this run's part: it goes on alone, or is over."""
        self.together.leave(self.row)

    def parallel(self) -> "Rowwise":
        """The layout with which the loop of the run trains."""
        return Rowwise(self)


def member() -> Member | None:
    """The place of the run in this thread among others; None: it is alone."""
    return _member.get()


def common_chunk(settings: Settings) -> int:
    """The most steps between two moments at which a loop does anything else.

    Args:    settings: resolved, with a number of steps.
    """
    moments = (settings.steps, settings.stop_at, settings.log_every, settings.eval_every, settings.save_every)
    return math.gcd(*(moment for moment in moments if isinstance(moment, int)))


@dataclasses.dataclass(frozen=True, eq=False)
class Rowwise(Jit):
    """One device, whose program trains several runs at once.

    Args:    member: the place of this run.
    """

    member: Member

    def train(self, step: Step):
        return lambda state, frozen, batch: self.member.together.call(self.member.row, steps, step, state, frozen, batch)

    def train_chunk(self, step: Step):
        return lambda state, frozen, held, picks: self.member.together.call(self.member.row, chunks, step, state, frozen, held, picks)


def _stack(trees: tuple[Tree, ...]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def rows_of(tree: Tree, count: int) -> tuple[Tree, ...]:
    """The first rows of what a program over several runs gives: cut within the program they would take most of its compilation."""
    return tuple(_row(tree, i) for i in range(count))


@jax.jit
def _row(tree: Tree, i: Int[Array, ""]) -> Tree:
    return jax.tree.map(lambda x: x[i], tree)


@functools.partial(jax.jit, static_argnums=0)
def steps(step: Step, states: tuple[State, ...], frozen: Tree, batches: tuple[Batch, ...]) -> tuple[State, Metrics]:
    """One step of each run, of which the results' first axis tells."""
    return jax.vmap(step, in_axes=(0, None, 0))(_stack(states), frozen, _stack(batches))


@functools.partial(jax.jit, static_argnums=0)
def chunks(step: Step, states: tuple[State, ...], frozen: Tree, held: Held, picks: tuple[Picks, ...]) -> tuple[State, Metrics]:
    """A chunk of steps of each run, likewise, over one split on the device."""
    return jax.vmap(chunked(step), in_axes=(0, None, None, 0))(_stack(states), frozen, held, _stack(picks))
