"""A part of the machine for each worker process of a sweep, taken before JAX looks for devices."""

import fcntl
import io
import math
import os
import pathlib
from typing import TypeVar

T = TypeVar("T")
_held: list[io.FileIO] = []  # for as long as this process lives


def take_part(folder: str, workers: int) -> None:
    """Gives this process its share of the cores and of the GPUs that it may use; once, whatever number of jobs it runs.

    Workers number themselves by locks in the folder, which the system takes back from a dead one. Where there are fewer GPUs than workers,
    those that share one share its memory.

    Args:    folder: that all workers see.  workers: how many there are at once; one keeps everything.
    """
    if _held or workers < 2:
        return
    number = _number(folder, workers)
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, _share(sorted(os.sched_getaffinity(0)), number, workers))
    if gpus := _gpus():
        os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(_share(gpus, number, workers))
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", f"{0.9 / math.ceil(workers / len(gpus)):.2f}")


def _number(folder: str, workers: int) -> int:
    """The first number that no living worker has; beyond the last one, the first again."""
    os.makedirs(folder, exist_ok=True)
    for number in range(workers):
        file = io.FileIO(os.path.join(folder, f".worker-{number}"), "a")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
        else:
            _held.append(file)
            return number
    return 0


def _share(things: list[T], number: int, workers: int) -> list[T]:
    """Every so many-th of them; where there are fewer than workers, one that is shared."""
    return things[number::workers] or [things[number % len(things)]]


def _gpus() -> list[str]:
    """The NVIDIA GPUs of this process, by the names that CUDA takes."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [name for name in named.split(",") if name]
    found = pathlib.Path("/proc/driver/nvidia/gpus")
    return [str(i) for i in range(len(list(found.iterdir())))] if found.is_dir() else []
