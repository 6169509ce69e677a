"""What several runs of one process may share: opened data, and its copy on the device."""

import contextlib
import contextvars
import threading
from collections.abc import Callable, Hashable, Iterator
from typing import TypeVar

T = TypeVar("T")
_held: "contextvars.ContextVar[_Held | None]" = contextvars.ContextVar("held", default=None)


class _Held(dict[Hashable, object]):
    """What is shared, and the lock under which it is made: only once, whoever comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.lock = threading.RLock()


@contextlib.contextmanager
def sharing() -> Iterator[None]:
    """Inside, and in threads that are given this context, `shared` makes each thing once."""
    token = _held.set(_Held())
    try:
        yield
    finally:
        _held.reset(token)


def shared(key: Hashable, make: Callable[[], T]) -> T:
    """What `make` gives; inside `sharing`, what it gave the first time for this key."""
    held = _held.get()
    if held is None:
        return make()
    with held.lock:
        if key not in held:
            held[key] = make()
        return held[key]  # type: ignore[return-value]  # whatever `make` gave for this key
