"""Where a run's numbers go: metrics.jsonl, TensorBoard events, and the terminal."""

import contextlib
import io
import json
import os
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from research.core import hosts
from research.core.errors import ConfigError, nearest
from research.core.folder import plain, write_text

FILE = "metrics.jsonl"
_BINS = 64
MODES = ("auto", "bar", "lines", "none")


def read(folder: epath.Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, oldest first; a last line cut off by a crash is left out."""
    path = folder / FILE
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):
            records.append(json.loads(line))
    return records


class Log:
    """Writes records as they come: one JSON object per log point, the same scalars to TensorBoard, a bar or lines to the terminal.

    Of several hosts the first one writes. Opening the log of a resumed run drops the records after `start`: those steps are made again.

    Args:    folder: the run folder.  start, total: first step and last step of this run.
             tensorboard: also write events.  progress: auto | bar | lines | none.
    """

    def __init__(self, folder: epath.Path, start: int, total: int, *, tensorboard: bool = True, progress: str = "auto"):
        if progress not in MODES:
            raise ConfigError(f"logger.progress={progress!r} is unknown{nearest(progress, MODES)}")
        self.console = Console(stderr=True)
        progress, tensorboard = (progress, tensorboard) if hosts.first() else ("none", False)
        self._mode = ("bar" if self.console.is_terminal else "lines") if progress == "auto" else progress
        kept = [record for record in read(folder) if record.get("step", 0) <= start]
        write_text(folder / FILE, "".join(json.dumps(record) + "\n" for record in kept))
        self._file = io.FileIO(os.fspath(folder / FILE) if hosts.first() else os.devnull, "a")
        self._events: Any = None
        self._summary: Any = None
        if tensorboard:
            from research.training.events import Events, summary  # here: who reads a log needs no tensorboardX

            self._events, self._summary = Events(folder, start), summary
        self._logged: set[str] = set()
        self._bar: Progress | None = None
        if self._mode == "bar":
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[status]}"),
                TimeRemainingColumn(),
            )
            self._bar = Progress(*columns, console=self.console, transient=True, refresh_per_second=4)
            self._bar.add_task("train", total=total, completed=start, status="compiling")
            self._bar.start()

    def scalars(self, step: int, values: Mapping[str, float | None]) -> None:
        """One record: to metrics.jsonl at once (a crash loses nothing that was written), and to TensorBoard."""
        record = plain({"step": step, "time_s": round(time.time(), 3), **values})
        self._file.write((json.dumps(record) + "\n").encode())
        self._logged |= record.keys()
        if self._events:
            self._events.scalars({name: value for name, value in record.items() if name not in ("step", "time_s") and value is not None}, step)

    def progress(self, step: int, status: str) -> None:
        """Moves the bar, where there is one."""
        if self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=step, status=status)

    def line(self, text: str) -> None:
        """One line in the terminal, above the bar, unless progress is `none`."""
        if self._mode != "none":
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def histograms(self, step: int, arrays: Mapping[str, np.ndarray]) -> None:
        """The distribution of each array's finite values, to TensorBoard."""
        for name, array in arrays.items():
            values = np.asarray(array, np.float32).ravel()
            values = values[np.isfinite(values)]
            if self._events and values.size:
                self._events.add(self._summary.histogram(name, values, _BINS), step)

    def image(self, step: int, name: str, pixels: np.ndarray) -> None:
        """A picture (rows, columns, channels) in [0, 255], to TensorBoard."""
        if self._events:
            self._events.add(self._summary.image(name, pixels, dataformats="HWC"), step)

    def text(self, step: int, name: str, text: str) -> None:
        """A text, to TensorBoard."""
        if self._events:
            self._events.add(self._summary.text(name, text), step)

    def hparams(self, step: int, hyper: Mapping[str, Any], metrics: Mapping[str, float | None]) -> None:
        """The run's settings beside its scores, to TensorBoard's HPARAMS page, which looks for each score among the scalars."""
        scores = {name: value for name, value in plain(metrics).items() if value is not None}
        if self._events and scores:
            settings = {name: value if isinstance(value, bool | int | float | str) else str(value) for name, value in hyper.items()}
            final = (self._summary.scalar(name, value) for name, value in scores.items() if name not in self._logged)
            for part in (*self._summary.hparams(settings, scores), *final):
                self._events.add(part, step)

    def close(self) -> None:
        """Ends the bar and closes the files; safe to call twice."""
        if self._bar is not None:
            self._bar.stop()
        self._file.close()
        if self._events:
            self._events.close()
