"""How the C library hands out memory."""

import contextlib
import ctypes
import functools

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)


@functools.cache
def keep_freed_memory() -> None:
    """Makes glibc keep what is freed instead of giving it back to the system; elsewhere nothing happens.

    On CPU, XLA allocates the intermediates of a program anew at each call. By default glibc maps and unmaps blocks of that size, and each of
    their pages faults at its first touch: a quarter of a training step of a small GPT on a virtual machine.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no C library of that name, or one without mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 30)  # bytes; setting it also stops glibc from adapting it
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
