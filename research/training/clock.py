"""Where a run's seconds go: compiling, waiting for data, evaluating, saving, and training proper."""

import collections
import contextlib
import threading
import time
from collections.abc import Iterator, Mapping

import jax

_COMPILE = "/jax/core/compile/"  # tracing, lowering and the backend's compilation each report their duration under this prefix
_PROGRAM = f"{_COMPILE}backend_compile_duration"  # once for each program, also for one that the cache had
_CACHED = "/jax/compilation_cache/cache_hits"
_compiled = 0.0
_cached = 0
_programs: collections.Counter[int] = collections.Counter()  # thread: programs


def _listen(event: str, duration_secs: float, **_: str | int) -> None:
    global _compiled
    if event.startswith(_COMPILE):
        _compiled += duration_secs
    if event == _PROGRAM:
        _programs[threading.get_ident()] += 1


def _count(event: str, **_: str | int) -> None:
    global _cached
    _cached += event == _CACHED


jax.monitoring.register_event_duration_secs_listener(_listen)
jax.monitoring.register_event_listener(_count)


def programs() -> tuple[int, int]:
    """(programs that this process has made ready to run, those of them that the persistent cache had)."""
    return sum(_programs.values()), _cached


def compiled_here() -> int:
    """Programs that this thread has made ready to run: others may save a checkpoint meanwhile."""
    return _programs[threading.get_ident()]


class Clock:
    """Seconds by name; spans do not nest, and compilation inside one is booked as `compile`.

    Args:    spent: seconds of the run's earlier parts, to go on from.
    """

    def __init__(self, spent: Mapping[str, float] = {}):
        self.seconds = {"compile": 0.0, "start": 0.0, "train": 0.0, "wait": 0.0, "evaluate": 0.0, "save": 0.0, **spent}

    @contextlib.contextmanager
    def span(self, name: str) -> Iterator[None]:
        """Books the time inside under this name."""
        began, compiled = time.perf_counter(), _compiled
        try:
            yield
        finally:
            elapsed = time.perf_counter() - began
            compiling = min(_compiled - compiled, elapsed)  # tracing of nested programs is reported twice
            self.seconds["compile"] += compiling
            self.seconds[name] += elapsed - compiling

    def move(self, name: str, other: str, seconds: float) -> None:
        """Books seconds under another name."""
        self.seconds[name] -= seconds
        self.seconds[other] += seconds
