"""How the C library hands out memory, and when Python looks for garbage."""

import contextlib
import ctypes
import functools
import gc
import mmap
import os

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX, _ARENA_MAX = -1, -3, -4, -8  # parameters of mallopt(3)
_HUGE = 1 << 21  # bytes of a huge page
_paused = False


@functools.cache
def keep_freed_memory() -> None:
    """Makes glibc keep what is freed instead of giving it back to the system, in huge pages where there are any; elsewhere nothing happens.

    On CPU, XLA allocates the intermediates of a program anew at each call, often from a thread of its own. By default glibc maps and unmaps
    blocks of that size, and each of their pages faults at its first touch: 300,000 times in a step of a GPT of ten million parameters. A block
    is only kept where it comes from the heap, and only one of the arenas that threads allocate from is a heap without bounds: the first. So
    there must be no other, which holds for threads that start after this call.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # no C library of that name, or one without mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(_ARENA_MAX, 1)
        libc.mallopt(_MMAP_MAX, 0)
        libc.mallopt(_MMAP_THRESHOLD, 1 << 30)  # bytes; setting it also stops glibc from adapting it
        libc.mallopt(_TRIM_THRESHOLD, -1)  # never
        _huge_pages(libc, os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE // 2)


def pause_garbage() -> None:
    """Stops the search for garbage while a command imports: a million objects that stay, looked through again and again for 0.5 to 0.8 seconds.

    `resume_garbage` ends it. Where the search is off already, that is somebody else's wish: nothing happens, here or there.
    """
    global _paused
    if gc.isenabled():
        _paused = True
        gc.disable()


def resume_garbage() -> None:
    """Ends what `pause_garbage` began; what there is by then is never looked through."""
    global _paused
    if _paused:
        _paused = False
        gc.freeze()
        gc.enable()


def _huge_pages(libc: ctypes.CDLL, size: int) -> None:
    """Lets the heap's next bytes come in huge pages: grows it by so many, of which none is touched, and marks them for the kernel."""
    libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    block = libc.malloc(size)
    if block is None:  # the kernel promises no more than it has, or this process may not have so much
        return
    start = -(-block // _HUGE) * _HUGE
    libc.madvise(start, (block + size - start) // _HUGE * _HUGE, mmap.MADV_HUGEPAGE)
    libc.free(block)
