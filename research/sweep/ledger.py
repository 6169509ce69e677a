"""A sweep's ledger: what became of each trial, in a file that many processes append to and a crash cannot spoil."""

import dataclasses
import datetime
import fcntl
import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from research.core import app, hosts
from research.core.errors import ResearchError
from research.core.folder import plain

FILE = "ledger.jsonl"
DONE = ("finished", "stopped_early", "pruned")  # ended by itself: the same command leaves it as it is
FAILED = ("diverged", "failed")
STATES = (*DONE, *FAILED, "running", "interrupted")


@dataclasses.dataclass(frozen=True)
class Trial:
    """One trial as its last line in the ledger tells it.

    Args:    trial: the first digits of the hash of its compared config, and the name of its run folder below the sweep.
             number: of the job in the command that ran it.  overrides: as typed.  state: one of STATES.
             score: {metric, value, step} of the best step by `train.monitor`; None before there is one.  metrics: means of whole splits.
             reason: of any end but "finished".  code: exit code of a lone command that ends so.  seconds: of the whole trial.  time: UTC, ISO 8601.
    """

    trial: str
    number: int
    overrides: tuple[str, ...]
    state: str
    run: str
    score: Mapping[str, Any] | None = None
    metrics: Mapping[str, float | None] = dataclasses.field(default_factory=dict)
    reason: str | None = None
    code: int = 0
    seconds: float | None = None
    time: str = ""


class Ledger:
    """<sweep>/ledger.jsonl: one JSON object a line, appended and never changed; of the lines of one trial the last one counts.

    Args:    sweep: the folder of the sweep; made at the first line.
    """

    def __init__(self, sweep: epath.PathLike):
        self.sweep = epath.Path(sweep)
        self.path = self.sweep / FILE

    def append(self, trial: Trial) -> None:
        """Writes a line in one piece, whoever else is writing; of several hosts the first one writes.

        Raises:  ResearchError: the disk is full, read-only or not there.
        """
        if not hosts.first():
            return
        now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        line = json.dumps(plain({**dataclasses.asdict(trial), "time": now}), allow_nan=False) + "\n"
        try:
            self.sweep.mkdir(parents=True, exist_ok=True)
            with open(os.fspath(self.path), "ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                    line = "\n" + line  # a writer was killed within its line
                file.write(line.encode())
        except OSError as error:
            raise ResearchError(f"cannot write {self.path}: {error.strerror or error}") from error

    def trials(self) -> list[Trial]:
        """The trials, in the order in which they first appear; a line that is none is named and skipped.

        Raises:  ResearchError: the file is there and cannot be read.
        """
        found: dict[str, Trial] = {}
        for number, line in enumerate(self._lines(), 1):
            try:
                trial = _read(line)
            except (ValueError, TypeError) as error:
                app.say(f"skipped: {self.path}, line {number}: {error}")
            else:
                found[trial.trial] = trial
        return list(found.values())

    def _lines(self) -> list[str]:
        try:
            text = self.path.read_bytes().decode(errors="replace") if self.path.exists() else ""
        except OSError as error:
            raise ResearchError(f"cannot read {self.path}: {error.strerror or error}") from error
        return [line for line in text.split("\n") if line.strip()]


def _read(line: str) -> Trial:
    """The trial of a line.

    Raises:  ValueError, TypeError: it is none; the text says why.
    """
    try:
        held = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} in column {error.colno})") from error
    if not isinstance(held, dict):
        raise ValueError("no JSON object")
    names = {field.name: field for field in dataclasses.fields(Trial)}
    missing = [name for name in ("trial", "number", "overrides", "state", "run") if name not in held]
    if missing:
        raise ValueError(f"lacks {missing[0]!r}")
    if held["state"] not in STATES:
        raise ValueError(f"state {held['state']!r} is unknown")
    trial = held["trial"]
    if not isinstance(trial, str) or not trial.isalnum() or held["run"] != trial:  # a name from a file is no path
        raise ValueError(f"trial {trial!r} with run {held['run']!r} is no trial of this sweep")
    if not isinstance(held["overrides"], list) or not isinstance(held.get("metrics") or {}, dict):
        raise ValueError("overrides or metrics of the wrong type")
    held = {name: value for name, value in held.items() if name in names}
    return Trial(**{**held, "overrides": tuple(map(str, held["overrides"])), "metrics": held.get("metrics") or {}})
