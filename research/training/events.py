"""TensorBoard's event files: tensorboardX makes the summaries, this writes them.

tensorboardX's own writer hands them to a thread; when a full disk ends that thread, the training process waits for it for ever.
"""

import contextlib
import functools
import io
import os
import re
import socket
import struct
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath


@contextlib.contextmanager
def _hidden(name: str) -> Iterator[None]:
    """Makes a package that is not loaded yet look as if it were not installed."""
    modules: dict[str, Any] = sys.modules
    absent = name not in modules
    if absent:
        modules[name] = None
    try:
        yield
    finally:
        if absent:
            del modules[name]


with _hidden("torch"):  # tensorboardX loads it to know its tensors, which takes seconds; none comes here
    from tensorboardX import summary
    from tensorboardX.proto import event_pb2, summary_pb2
    from tensorboardX.record_writer import masked_crc32c

__all__ = ["Events", "summary"]


@functools.cache
def _tag(name: str) -> str:
    """The name as tensorboardX writes it: TensorBoard knows no other characters."""
    return re.sub(r"[^-/\w.]", "_", name).lstrip("/")


class Events:
    """One event file, written at once: an error comes where it is made, and a crash loses nothing.

    Args:    folder: where the file is made.  start: the step that the run goes on from; TensorBoard then drops what an older file says of later ones.
    """

    def __init__(self, folder: epath.Path, start: int = 0):
        path = folder / f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{os.getpid()}.{start}"
        self._file = io.FileIO(os.fspath(path), "a")
        self._write(file_version="brain.Event:2")
        if start:
            self._write(step=start + 1, session_log={"status": "START"})

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Appends numbers of one step, as one event: tensorboardX checks and packs each by itself, which takes as long as a small step."""
        scalars = [summary_pb2.Summary.Value(tag=_tag(name), simple_value=value) for name, value in values.items()]  # type: ignore[attr-defined]  # as below
        self._write(step=step, summary=summary_pb2.Summary(value=scalars))  # type: ignore[attr-defined]  # as below

    def add(self, summary: Any, step: int) -> None:
        """Appends a summary of `tensorboardX.summary`."""
        self._write(step=step, summary=summary)

    def close(self) -> None:
        """Closes the file; safe to call twice."""
        self._file.close()

    def _write(self, **fields: Any) -> None:
        data = event_pb2.Event(wall_time=time.time(), **fields).SerializeToString()  # type: ignore[attr-defined]  # made at import, so no checker sees it
        length = struct.pack("<Q", len(data))
        record = (length, struct.pack("<I", masked_crc32c(length)), data, struct.pack("<I", masked_crc32c(data)))
        self._file.write(b"".join(record))
