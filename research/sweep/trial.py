"""A multirun of `research.train` as a sweep: every job is a trial with a folder of its own, and the ledger knows how each went."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath
from omegaconf import DictConfig, open_dict
from rich.console import Console

from research.core import app
from research.core.config import compose, fingerprint
from research.core.errors import ConfigError, DivergedError, Interrupted, ResearchError
from research.core.overrides import Composer
from research.sweep.ledger import DONE, FAILED, Ledger, Trial
from research.training import run

Verb = Callable[[DictConfig], dict[str, Any]]
REPEATS = {"seeds": "seed=range({})", "k_fold": "data.validation={}"}  # a number of runs of one setting -> what differs between them
FREE = re.compile(r"[+~]*(hydra[./]|sweep_dir=|retry=|pruning|debug[.=])")  # overrides that do not make another sweep


@dataclasses.dataclass
class Sweep:
    """What one command knows of the sweep that it runs, if it runs one.

    Args:    folder: of the sweep; None: a single run.
    """

    folder: str | None = None
    began: dict[str, str] = dataclasses.field(default_factory=dict)  # trial -> overrides, of this command's jobs
    _known: dict[str, Trial] | None = None

    def arrange(self, composer: Composer, overrides: list[str], multirun: bool) -> tuple[list[str], bool]:
        """The overrides, checked; of a sweep with `seeds` and `k_fold` written out and its folder named.

        Raises:  ConfigError: as `Composer.check`, or a number of repeats that is none.
        """
        overrides, repeated = _repeated(overrides)
        if repeated and not multirun:
            overrides = [*overrides, *(() if _given("hydra/launcher", overrides) else ("hydra/launcher=compiled",))]
        multirun = multirun or repeated
        checked = composer.check(overrides, multirun=multirun)
        if multirun:
            if folder := _given("sweep_dir", checked):
                self.folder = folder.strip("'\"")
            else:
                config = compose(composer.first(checked), composer.verb)
                digest = hashlib.sha256("\n".join(sorted(line for line in checked if not FREE.match(line))).encode()).hexdigest()[:6]
                self.folder = os.path.join(config.paths.sweeps, f"{config.name}-{digest}")
                checked = [*checked, f"sweep_dir='{self.folder}'"]
            checked = [line for line in checked if not line.startswith("hydra.sweep.dir=")] + [f"hydra.sweep.dir='{self.folder}'"]
            app.say(f"sweep folder {self.folder}")
        return checked, multirun

    def trials_of(self, verb: Verb) -> Verb:
        """The verb, which as a job of a sweep takes its folder there and writes down what becomes of it."""

        @functools.wraps(verb)
        def trial(config: DictConfig) -> dict[str, Any]:
            job = app.job()
            if job is None or config.sweep_dir is None:
                return verb(config)
            if config.run_dir is not None:
                raise ConfigError(f"run_dir={config.run_dir!r}: each trial of a sweep has its own folder below sweep_dir={config.sweep_dir!r}")
            return self._trial(verb, config, job)

        return trial

    def _trial(self, verb: Verb, config: DictConfig, job: app.Job) -> dict[str, Any]:
        ledger, name = Ledger(config.sweep_dir), fingerprint(config)[:12]
        if self._known is None:
            self._known = {trial.trial: trial for trial in ledger.trials()}
        overrides = tuple(line for line in job.overrides if not FREE.match(line))
        path, typed = epath.Path(config.sweep_dir) / name, " ".join(overrides)
        if (other := self.began.get(name)) is not None:
            raise ConfigError(f"[{typed}] is the same run as [{other}]: what differs between them does not make another run")
        self.began[name] = typed
        before = self._known.get(name)
        goes_on = before is not None and before.state == "pruned" and config.get("pruning") is None  # nothing prunes it any more
        if before is not None and before.state in DONE and not goes_on and (result := run.read_result(path)).get("status") == before.state:
            app.say(f"{path} is {before.state.replace('_', ' ')}: nothing to do")
            return result
        if before is not None and before.state in FAILED and not config.retry:
            raise _recorded(ConfigError(f"{path} {before.state} before ({before.reason}); retry=true tries it again"), before.code)
        with open_dict(config):
            config.run_dir = os.fspath(path)
        trial, start = Trial(name, job.number, overrides, "running", name), time.perf_counter()
        ledger.append(trial)
        try:
            result = verb(config)
        except BaseException as error:
            code, reason = app.outcome(error, config)
            stopped = isinstance(error, Interrupted | KeyboardInterrupt | SystemExit)
            state = "interrupted" if stopped else "diverged" if isinstance(error, DivergedError) else "failed"
            ledger.append(dataclasses.replace(trial, state=state, reason=reason, code=code, seconds=time.perf_counter() - start))
            raise _recorded(error, code) from error.__cause__
        ended = {"state": result["status"], "score": result["best"], "metrics": result["metrics"], "reason": result["reason"]}
        ledger.append(dataclasses.replace(trial, **ended, seconds=time.perf_counter() - start))
        return result

    def ended(self, code: int) -> int:
        """Tells how the trials of the sweep went; returns the exit code of the command.

        Args:    code: of Hydra's part of the command: of jobs in this process.
        """
        if self.folder is None or not (trials := Ledger(self.folder).trials()):
            return code
        _compare(self.folder)
        counts = {state: sum(trial.state == state for trial in trials) for state in dict.fromkeys(trial.state for trial in trials)}
        app.say(f"{len(trials)} trials: " + ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in counts.items()))
        app.say(f"next: python -m research.report sweep={self.folder}")
        missed = [trial for trial in trials if trial.state in (*FAILED, "running")]
        if code or not missed:
            return code
        worst = max(missed, key=lambda trial: trial.code)
        told = f"the first: [{' '.join(missed[0].overrides)}] {missed[0].reason or 'was killed; the same command goes on with it'}"
        print(f"error: {len(missed)} of {len(trials)} trials failed, {told}", file=sys.stderr, flush=True)
        return worst.code or 1


def _compare(folder: str) -> None:
    """Prints the settings with their means and intervals, where there is something to compare."""
    from research.sweep import comparison, page, settings  # here: figures need not be imported to begin a sweep

    with contextlib.suppress(ResearchError):  # no trial has finished, say; the ledger tells how each went
        compared = comparison.compare(settings.trials(folder))
        console = Console(markup=False, highlight=False)
        if len(compared.outcomes) > 1:
            console.print(page.printed(compared, console.width))
            console.print(compared.verdict(), soft_wrap=True)


def _recorded(error: BaseException, code: int) -> BaseException:
    """The error, marked as one that the ledger has: a launcher's other process need not carry it home."""
    error.recorded = True  # type: ignore[attr-defined]  # a mark of ours on anybody's exception
    if isinstance(error, ConfigError):
        error.exit_code = code
    return error


def _repeated(overrides: Sequence[str]) -> tuple[list[str], bool]:
    """The overrides with `seeds=N` and `k_fold=N` as sweeps of what they stand for, and whether there were any."""
    kept, repeated = [], False
    for line in overrides:
        name, _, number = line.partition("=")
        if name not in REPEATS or number == "null":
            kept.append(line)
            continue
        least = 2 if name == "k_fold" else 1
        if not number.isdigit() or int(number) < least:
            raise ConfigError(f"{name}={number}: must be a whole number of at least {least}")
        key = REPEATS[name].partition("=")[0]
        if (other := _given(key, overrides)) is not None:
            raise ConfigError(f"{line} and {key}={other}: give one of them")
        values = number if name == "seeds" else ",".join(f"{i}/{number}" for i in range(int(number)))
        kept.append(REPEATS[name].format(values))
        repeated = True
    return kept, repeated


def _given(key: str, overrides: Sequence[str]) -> str | None:
    """The value that an override gives to a key; None where none does."""
    return next((line.partition("=")[2] for line in overrides if line.partition("=")[0].lstrip("+") == key), None)
