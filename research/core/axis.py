"""Which device axis, if any, the code being traced is mapped over: the one thing that a norm must know about parallelism."""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_axis: contextvars.ContextVar[str | None] = contextvars.ContextVar("device_axis", default=None)


@contextlib.contextmanager
def device_axis(name: str | None) -> Iterator[None]:
    """Says that the code traced inside runs under a mapped axis of this name (None: under no such axis)."""
    token = _axis.set(name)
    try:
        yield
    finally:
        _axis.reset(token)


def psum(tree):
    """The sum over the device axis in force; the tree itself where there is none."""
    name = _axis.get()
    return tree if name is None else jax.lax.psum(tree, name)
