"""Pruning: a trial of a search ends early where others did better at the same step, whichever process or thread they run in."""

import fcntl
import io
import math
import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from research.core import hosts
from research.core.errors import ConfigError, ResearchError, nearest

if TYPE_CHECKING:
    import optuna

PRUNERS = ("median", "asha", "hyperband")
STUDY = "search"  # name of the one study in a storage
SETTINGS, PRUNED = "pruner", "pruned"  # what the study and its trials remember of pruning
_JOURNAL = ".journal"
_WAIT_S = 60  # for other writers of a database
Scores = Mapping[str, float | None]


def pruner_of(place: Any, every: int | str | None, steps: int) -> Callable[[int, Scores], str | None] | None:
    """What the loop of a trial asks after each evaluation; None where no search prunes it.

    Args:    place: of the trial in its search, STORAGE#NUMBER, as `pruning` of the config says.  every, steps: as the loop's settings have them.
    Raises:  ConfigError: as `Pruner`, or several hosts, of which each would decide by itself.
    """
    if place is None:
        return None
    address, mark, number = str(place).rpartition("#")
    if not mark or not number.isdigit():
        raise ConfigError(f"pruning={place!r}: hydra/sweeper=search sets it, as STORAGE#TRIAL")
    if hosts.count() > 1:
        raise ConfigError(f"pruning: {hosts.count()} hosts cannot end together at the word of one study; search with hydra.sweeper.pruner=null")
    return Pruner(address, int(number), every if isinstance(every, int) else None, steps)


class Pruner:
    """Reports a trial's score at each evaluation to its study, and says whether the trial is to end there, and why.

    A decision stands: a trial that was killed after it ends at once when it is started again.

    Args:    address: of the study's storage.  number: of the trial.  every: updates between evaluations; None: there is one, at the end.
             steps: of the whole run.
    Raises:  ConfigError: there is no such study or trial, or nothing could be decided by.  ResearchError: as `storage`.
    """

    def __init__(self, address: str, number: int, every: int | None, steps: int):
        try:
            self._study = _optuna().load_study(study_name=STUDY, storage=storage(address))
        except KeyError as error:
            raise ConfigError(f"pruning={address!r} holds no search; hydra/sweeper=search sets it") from error
        if number >= len(self._study.get_trials(deepcopy=False)):
            raise ConfigError(f"pruning: the search in {address!r} has no trial {number}")
        self._settings, self._steps = self._study.user_attrs[SETTINGS], steps
        rung, every = self._settings["rung"], every or steps
        if rung is not None and rung < every:
            raise ConfigError(f"hydra.sweeper.rung={rung}: before the first evaluation, train.eval_every={every}, there is nothing to decide by")
        self._study.pruner = made(self._settings, rung or every, steps)
        self._trial = taken_up(self._study, number)

    def __call__(self, step: int, scores: Scores) -> str | None:
        """Why the trial ends at this step; None: it goes on.

        Args:    scores: of the evaluation; {}: there was none, only an end that was decided before is asked for.
        Raises:  ConfigError: an evaluation does not give the score that the search looks at.
        """
        metric = self._settings["metric"]
        held = self._study.get_trials(deepcopy=False)[self._trial.number]
        if not scores or PRUNED in held.user_attrs:
            return held.user_attrs.get(PRUNED)
        if metric not in scores:
            raise ConfigError(f"hydra.sweeper.pruner={self._settings['name']}: an evaluation does not give {metric!r}{nearest(metric, scores)}")
        value = scores[metric]
        if not held.state.is_finished() and step not in held.intermediate_values:  # else it was killed before its checkpoint, and comes here again
            self._trial.report(math.nan if value is None else value, step)
        if step < (held.last_step or 0) or held.state.is_finished() or not self._is_behind() or step >= self._steps:
            return None  # it went on from here before, or has come to its end
        shown = "is no number" if value is None else f"{value:.4g}"
        reason = f"{metric} {shown} at step {step}, behind other trials ({self._settings['name']})"
        self._trial.set_user_attr(PRUNED, reason)
        return reason

    def _is_behind(self) -> bool:
        others: Any = _Ended(self._study, self._steps) if self._settings["name"] == "median" else self._study
        return self._study.pruner.prune(others, self._study.get_trials(deepcopy=False)[self._trial.number])


class _Ended:
    """A study in which a trial is complete once it has come to its last step: it is told so only when its whole batch has ended."""

    def __init__(self, study: "optuna.Study", steps: int):
        self._study, self._steps, self.direction = study, steps, study.direction

    def get_trials(self, deepcopy: bool = True, states: Any = None) -> list[Any]:
        """As optuna's own, for the one question that median asks."""
        state = _optuna().trial.TrialState
        trials = self._study.get_trials(deepcopy=deepcopy, states=(state.COMPLETE, state.RUNNING))
        return [trial for trial in trials if trial.state is state.COMPLETE or (trial.last_step or 0) >= self._steps]


def made(settings: Mapping[str, Any], rung: int, steps: int) -> "optuna.pruners.BasePruner":
    """Optuna's pruner of these settings.

    Args:    settings: {name: one of PRUNERS, reduction, startup}.  rung: updates before the first decision.  steps: of a whole run.
    Raises:  ConfigError: an unknown name, or a number out of range.
    """
    name, reduction, startup = (settings[key] for key in ("name", "reduction", "startup"))
    if name not in PRUNERS:
        raise ConfigError(f"hydra.sweeper.pruner={name!r} is unknown{nearest(name, PRUNERS)}")
    for key, value, least in (("rung", rung, 1), ("reduction", reduction, 2)):
        if type(value) is not int or value < least:
            raise ConfigError(f"hydra.sweeper.{key}={value!r}: must be a whole number of at least {least}")
    pruners = _optuna().pruners
    if name == "median":
        return pruners.MedianPruner(n_startup_trials=startup, n_warmup_steps=rung)
    if name == "asha":
        return pruners.SuccessiveHalvingPruner(min_resource=rung, reduction_factor=reduction)
    return pruners.HyperbandPruner(min_resource=rung, max_resource=max(steps, rung), reduction_factor=reduction)


def taken_up(study: "optuna.Study", number: int) -> "optuna.Trial":
    """A trial that was asked for before, by its number, to go on with."""
    return _optuna().Trial(study, study.get_trials(deepcopy=False)[number]._trial_id)


def storage(address: str) -> "optuna.storages.BaseStorage":
    """Where studies are kept, opened: a journal, a file that ends in .journal and is made where it is missing, or a database's URL.

    A line that a killed writer left half written at the end of a journal is cut off: optuna reads no journal that goes on after one.

    Raises:  ConfigError: an address of neither kind.  ResearchError: it cannot be opened.
    """
    storages = _optuna().storages
    if "://" in address:
        waiting = {"connect_args": {"timeout": _WAIT_S}} if address.startswith("sqlite") else {}
        try:
            return storages.RDBStorage(address, engine_kwargs=waiting)
        except Exception as error:  # of SQLAlchemy, of a driver, or of optuna, each its own kind
            said = " ".join(str(error).split())[:200]
            raise ResearchError(f"hydra.sweeper.storage={address!r} cannot be opened: {said}") from error
    if not address.endswith(_JOURNAL):
        raise ConfigError(f"hydra.sweeper.storage={address!r}: must be a file that ends in {_JOURNAL}, or a URL such as sqlite:///search.db")

    class Lock(storages.journal.JournalFileOpenLock):
        """One that the system takes back from a killed process at once; optuna's own outlive it for half a minute."""

        def acquire(self) -> bool:
            self._file = io.FileIO(f"{address}.lock", "a")
            fcntl.flock(self._file, fcntl.LOCK_EX)
            return True

        def release(self) -> None:
            self._file.close()

    try:
        os.makedirs(os.path.dirname(address) or ".", exist_ok=True)
        _mend(address)
        return storages.JournalStorage(storages.journal.JournalFileBackend(address, lock_obj=Lock(address)))
    except OSError as error:
        raise ResearchError(f"hydra.sweeper.storage={address!r} cannot be opened: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ResearchError(f"hydra.sweeper.storage={address!r} is no journal of optuna: {error}") from error


def _mend(path: str) -> None:
    """Cuts off what follows the last end of a line."""
    with io.FileIO(f"{path}.lock", "a") as lock, io.FileIO(path, "a+") as file:
        fcntl.flock(lock, fcntl.LOCK_EX)
        size = kept = file.seek(0, os.SEEK_END)
        while kept and (file.seek(kept - 1), file.read(1))[1] != b"\n":
            kept -= 1
        if kept < size:
            file.truncate(kept)


def _optuna() -> Any:
    """The package, kept from telling each step in its own words.

    Raises:  ConfigError: it is not installed.
    """
    try:
        import optuna
    except ModuleNotFoundError as error:
        raise ConfigError("hydra/sweeper=search needs optuna: pip install 'ontogeny[sweeps]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
