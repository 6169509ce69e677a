"""The body of `hydra/sweeper=search`: optuna is asked for trials, any launcher runs them, and the scores are told."""

import contextlib
import dataclasses
import fcntl
import json
import math
import numbers
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import optuna
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, Quote, QuotedString, RangeSweep
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution, distribution_to_json
from optuna.trial import FrozenTrial, TrialState
from rich.console import Console
from rich.table import Table

from research.core import app
from research.core.config import fingerprint
from research.core.direction import direction
from research.core.errors import ConfigError, FolderInUseError, Interrupted, ResearchError, nearest
from research.core.folder import read_json, write_json
from research.core.nodes import descend, plain
from research.core.overrides import Composer
from research.sweep import pruning
from research.sweep.composing import Once, compose_jobs
from research.sweep.ledger import Ledger

FILE, JOURNAL, LOCK = "search.json", "search.journal", "search.lock"
SAMPLERS = ("tpe", "random", "grid", "cmaes", "sobol")
DIRECTIONS = ("min", "max")
TRIALS = 32  # where nobody gives a number
DIGITS = 6  # of a number between two bounds
_TAGS = ("log",)
_ENDED = (TrialState.COMPLETE, TrialState.PRUNED)
_WHOLE = re.compile(r"interval\(\s*(?:start\s*=\s*)?[+-]?\d+\s*,\s*(?:end\s*=\s*)?[+-]?\d+\s*\)")  # bounds written as whole numbers


@dataclasses.dataclass(frozen=True)
class Axis:
    """One searched key and its values, which are also places in [0, 1].

    Args:    key: as an override writes it, plus signs included.  distribution: optuna's form.  steps: the values of a range of fractions,
             which adding up a step would miss by a rounding.
    """

    key: str
    distribution: BaseDistribution
    steps: tuple[float, ...] = ()

    @property
    def count(self) -> int | None:
        """How many values there are; None: any number between two bounds."""
        known: Any = self.distribution
        if isinstance(known, CategoricalDistribution):
            return len(known.choices)
        if self.steps:
            return len(self.steps)
        return (known.high - known.low) // known.step + 1 if isinstance(known, IntDistribution) else None

    def value(self, i: int) -> Any:
        """The i-th of the values that can be counted."""
        known: Any = self.distribution
        return known.choices[i] if isinstance(known, CategoricalDistribution) else self.steps[i] if self.steps else known.low + i * known.step

    def at(self, place: float) -> Any:
        """The value at a place; those that can be counted share [0, 1] equally, unless they are to be searched by their logarithm."""
        known: Any = self.distribution
        if getattr(known, "log", False):
            whole = 0.5 if isinstance(known, IntDistribution) else 0.0
            low, high = math.log(known.low - whole), math.log(known.high + whole)
            value = math.exp(low + place * (high - low))
            value = round(value) if whole else value
        elif self.count is not None:
            return self.value(min(int(place * self.count), self.count - 1))
        else:
            value = known.low + place * (known.high - known.low)
        return min(max(value, known.low), known.high)

    def place(self, value: Any) -> float:
        """Where a value lies; the middle of what it shares."""
        known: Any = self.distribution
        if getattr(known, "log", False):
            whole = 0.5 if isinstance(known, IntDistribution) else 0.0
            low, high = math.log(known.low - whole), math.log(known.high + whole)
            return (math.log(value) - low) / (high - low)
        if self.count is not None:
            return (self._number(value) + 0.5) / self.count
        return (value - known.low) / (known.high - known.low)

    def rounded(self, value: Any) -> Any:
        """The value with as many digits as float32 can tell apart and a person can read."""
        if self.count is not None:
            return value
        known: Any = self.distribution
        return min(max(float(f"{value:.{DIGITS}g}"), known.low), known.high)

    def line(self, value: Any) -> str:
        """The override that gives the key this value."""
        return f"{self.key}={self.steps[self._number(value)] if self.steps else value}"

    def _number(self, value: Any) -> int:
        known: Any = self.distribution
        if isinstance(known, CategoricalDistribution):
            return known.choices.index(value)
        return int(np.argmin(np.abs(np.subtract(self.steps, value)))) if self.steps else (value - known.low) // known.step


def axis(override: Override, present: Any = None) -> Axis:
    """The values that an override lists, as choices, or as numbers between bounds.

    `interval(a,b)` holds whole numbers where its bounds are written as such and the config has whole numbers there, or inside `int(…)`.

    Args:    present: what the config has at this key without the search.
    Raises:  ConfigError: nothing to choose from, bounds in the wrong order, a logarithm of what is not positive, or an unknown tag.
    """
    key, line, sweep = override.get_key_element(), override.input_line or "", override.value()
    tags = getattr(sweep, "tags", set())
    for tag in tags:
        if tag not in _TAGS:
            raise ConfigError(f"override {line!r}: tag {tag!r} is unknown{nearest(tag, _TAGS)}")
    log = "log" in tags
    if isinstance(sweep, IntervalSweep):
        low, high = sweep.start, sweep.end
        assert low is not None
        assert high is not None
        cast = isinstance(low, int) and isinstance(high, int)
        whole = cast or bool(_WHOLE.search(line) and _holds_whole(present) and low == int(low) and high == int(high))
        if not (math.isfinite(low) and math.isfinite(high)):
            raise ConfigError(f"override {line!r}: both bounds must be finite")
        if low >= high:
            fault = "is empty" if low == high else f"is reversed; write interval({_short(high)},{_short(low)})"
            raise ConfigError(f"override {line!r}: the interval {fault}")
        _check_log(line, log, low)
        return Axis(key, IntDistribution(int(low), int(high), log=log) if whole else FloatDistribution(float(low), float(high), log=log))
    if isinstance(sweep, RangeSweep):
        values = sweep.range()
        values = sorted(values) if not isinstance(values, range) else values if values.step > 0 else values[::-1]
        if not values:
            raise ConfigError(f"override {line!r}: the range holds no value; range(START,STOP) needs START below STOP")
        _check_log(line, log, values[0])
        if isinstance(values, range):
            if log and values.step != 1:
                raise ConfigError(f"override {line!r}: a range that is searched by its logarithm has no step")
            return Axis(key, IntDistribution(values[0], values[-1], step=values.step, log=log))
        if log:
            raise ConfigError(f"override {line!r}: a range of fractions has steps; use tag(log, interval({values[0]},{values[-1]}))")
        step = float(sweep.step) if len(values) > 1 else 1.0
        return Axis(key, FloatDistribution(values[0], values[-1], step=abs(step)), tuple(values))
    choices = tuple(dict.fromkeys(override.sweep_string_iterator()))
    if not choices:
        raise ConfigError(f"override {line!r}: there is nothing to choose from")
    if log:
        raise ConfigError(f"override {line!r}: only numbers between bounds can be searched by their logarithm, as tag(log, interval(1e-4,1e-1))")
    return Axis(key, CategoricalDistribution(choices))


def _check_log(line: str, log: bool, low: float) -> None:
    if log and low <= 0:
        raise ConfigError(f"override {line!r}: {_short(low)} has no logarithm; begin above 0, or leave tag(log, …) away")


def _holds_whole(present: Any) -> bool:
    return type(present) is int or (isinstance(present, list) and bool(present) and all(type(entry) is int for entry in present))


def _short(value: float) -> str:
    return f"{value:g}"


class Sampler(optuna.samplers.BaseSampler):
    """Chooses trials by one of `SAMPLERS`, each from its number, the seed and the told scores alone.

    So a search that was killed, and is gone on with, chooses as one that ran undisturbed; nothing else is kept of the sampler, and all
    values of a trial are chosen before the first is written down.

    Args:    axes: what is searched.  name: one of SAMPLERS.  seed: of the search.  startup: trials before tpe stops to draw at random.
    Raises:  ConfigError: an unknown name, or values that this sampler cannot choose.
    """

    def __init__(self, axes: Sequence[Axis], name: str, seed: int, startup: int):
        if name not in SAMPLERS:
            raise ConfigError(f"hydra.sweeper.sampler={name!r} is unknown{nearest(name, SAMPLERS)}")
        self.axes, self.name, self.seed, self.startup = tuple(axes), name, seed, startup
        self.varied = tuple(axis for axis in axes if not axis.distribution.single())
        for axis in self.axes:
            if name == "grid" and axis.count is None:
                raise ConfigError(f"hydra.sweeper.sampler=grid: {axis.key} is an interval; use range(START,STOP,STEP), or sampler=sobol")
            if name == "cmaes" and axis in self.varied and isinstance(axis.distribution, CategoricalDistribution):
                raise ConfigError(f"hydra.sweeper.sampler=cmaes: {axis.key} is a choice, and cmaes searches numbers; use sampler=tpe")
        if name == "cmaes":
            if len(self.varied) < 2:
                raise ConfigError("hydra.sweeper.sampler=cmaes searches at least two numbers; use sampler=tpe")
            _cmaes()

    @property
    def size(self) -> int | None:
        """How many different trials there are; None: no end of them."""
        counts = [axis.count for axis in self.axes]
        return None if None in counts else math.prod(count for count in counts if count is not None)

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """All that varies: everything is chosen together."""
        return {axis.key: axis.distribution for axis in self.varied}

    def sample_relative(self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:
        """The values of one trial."""
        if not search_space:
            return {}
        draw: Callable[[optuna.Study, FrozenTrial], dict[str, Any]] = getattr(self, f"_{self.name}")
        chosen = draw(study, trial)
        return {axis.key: axis.rounded(chosen[axis.key]) for axis in self.varied}

    def sample_independent(self, study: optuna.Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution) -> Any:
        """Never asked: nothing is left over."""
        raise AssertionError(f"{param_name} was not chosen with the others")

    def _seed(self, number: int) -> int:
        return int(np.random.SeedSequence([self.seed, number]).generate_state(1)[0])

    def _random(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        places = np.random.default_rng(self._seed(trial.number)).random(len(self.varied))
        return self._values(places)

    def _sobol(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        from scipy.stats import qmc

        points = qmc.Sobol(len(self.varied), scramble=True, rng=self.seed)
        if trial.number:
            points.fast_forward(trial.number)
        return self._values(points.random(1)[0])

    def _grid(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """In the order of nested loops, the last axis the innermost one, as Hydra's own sweeps."""
        counts = [axis.count or 1 for axis in self.varied]
        places = np.unravel_index(trial.number % math.prod(counts), counts)
        return {axis.key: axis.value(int(i)) for axis, i in zip(self.varied, places, strict=True)}

    def _tpe(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        inner = optuna.samplers.TPESampler(seed=self._seed(trial.number), n_startup_trials=self.startup)
        chosen = inner.sample_relative(study, trial, inner.infer_relative_search_space(study, trial))
        for axis in self.varied:
            if axis.key not in chosen:
                chosen[axis.key] = inner.sample_independent(study, trial, axis.key, axis.distribution)
        return chosen

    def _cmaes(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, Any]:
        """The told scores, a generation after another, make the distribution anew: optuna's own sampler keeps it as a pickle."""
        bounds = np.tile([0.0, 1.0], (len(self.varied), 1))
        strategy = _cmaes().CMA(mean=np.full(len(self.varied), 0.5), sigma=1 / 6, bounds=bounds, seed=self._seed(trial.number))
        sign = -1.0 if study.direction == optuna.study.StudyDirection.MAXIMIZE else 1.0
        told = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        size = strategy.population_size
        for start in range(0, len(told) - size + 1, size):
            strategy.tell([(self._places(one.params), sign * one.values[0]) for one in told[start : start + size]])
        return self._values(strategy.ask())

    def _values(self, places: Any) -> dict[str, Any]:
        return {axis.key: axis.at(float(place)) for axis, place in zip(self.varied, places, strict=True)}

    def _places(self, values: Mapping[str, Any]) -> np.ndarray:
        return np.array([axis.place(values[axis.key]) for axis in self.varied])


def _cmaes() -> Any:
    try:
        import cmaes
    except ModuleNotFoundError as error:
        raise ConfigError("hydra.sweeper.sampler=cmaes needs cmaes: pip install 'ontogeny[sweeps]'") from error
    return cmaes


class Search:
    """A search: its study, and the launcher that runs its trials.

    Args:    launcher: of Hydra, set up.  loader, config: as Hydra gives them to a sweeper.  arguments: overrides of the task.
             The others: as `hydra.sweeper.…` says.
    Raises:  ConfigError: a bad value, or a study of the same folder that looked for something else.
    """

    def __init__(
        self,
        launcher: Launcher,
        loader: Any,
        config: DictConfig,
        arguments: Sequence[str],
        *,
        sampler: str = "tpe",
        trials: int | None = None,
        at_once: int = 1,
        seed: int = 0,
        metric: Any = None,
        direction: Any = None,
        startup: int = 10,
        pruner: str | None = None,
        rung: int | None = None,
        reduction: int = 3,
        storage: str | None = None,
        params: Mapping[str, Any] | None = None,
    ):
        optuna.logging.set_verbosity(optuna.logging.WARNING)
        for name, value, least in (("trials", trials, 1), ("at_once", at_once, 1), ("seed", seed, 0), ("startup", startup, 0)):
            if not (value is None and name == "trials") and (type(value) is not int or value < least):
                raise ConfigError(f"hydra.sweeper.{name}={value!r}: must be a whole number of at least {least}")
        self.launcher, self.at_once = launcher, at_once
        self.folder = pathlib.Path(str(config.hydra.sweep.dir))
        self.fixed, swept = _parted(loader, _with(params, arguments, config))
        self.retry = "retry=true" in self.fixed
        once = loader if isinstance(loader, Once) else Once(loader)
        first = compose_jobs(once, config, [[*self.fixed, *(line for o in swept if (line := _first(o)))]])[0]
        tree = plain(first)
        self.axes = [axis(override, descend(tree, override.key_or_group)[0]) for override in swept]
        if not self.axes:
            raise ConfigError(
                "hydra/sweeper=search: no override lists values to choose from, as optimizer.learning_rate=tag(log,interval(1e-4,1e-1))"
            )
        self.sampler = Sampler(self.axes, sampler, seed, startup)
        self.metrics, self.directions = _aims(first, metric, direction)
        if len(self.metrics) > 1 and sampler == "cmaes":
            raise ConfigError(f"hydra.sweeper.sampler=cmaes looks for one metric, not {len(self.metrics)}; use sampler=tpe")
        self.pruner = None if pruner is None else self._pruner(first, pruner, rung, reduction, startup)
        self.address = storage or str(self.folder.absolute() / JOURNAL)
        self.study = self._study(fingerprint(first)[:12], seed)
        wanted = trials if trials is not None else self.sampler.size if sampler == "grid" else TRIALS
        assert wanted is not None
        self.trials = wanted if self.sampler.size is None or sampler != "grid" else min(wanted, self.sampler.size)
        self._fault: ResearchError | None = None  # of a launcher, which a ledger does not know
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(config, self.folder / "multirun.yaml")  # as Hydra's own sweeper leaves it

    def _pruner(self, first: DictConfig, name: str, rung: int | None, reduction: int, startup: int) -> dict[str, Any]:
        """What the trials are told of pruning, through the study."""
        if len(self.metrics) > 1:
            raise ConfigError(f"hydra.sweeper.pruner={name}: trials are pruned by one metric, not by {', '.join(self.metrics)}")
        every, steps = first.train.eval_every, first.train.steps
        settings = {"name": name, "metric": self.metrics[0], "rung": rung, "reduction": reduction, "startup": startup}
        pruning.made(settings, rung if rung is not None else 1, steps or 1)
        if rung is not None and isinstance(steps, int) and rung >= steps:
            raise ConfigError(f"hydra.sweeper.rung={rung}: a run ends at train.steps={steps}, so nothing would be pruned; give fewer")
        if rung is not None and isinstance(every, int) and rung < every:
            raise ConfigError(f"hydra.sweeper.rung={rung}: before the first evaluation, train.eval_every={every}, there is nothing to decide by")
        return settings

    def _study(self, config: str, seed: int) -> optuna.Study:
        """The study of this folder, new or gone on with."""
        aims = {"metric": self.metrics, "direction": self.directions, "config": config}
        aims["values"] = {axis.key: json.loads(distribution_to_json(axis.distribution)) for axis in self.axes}
        store = pruning.storage(self.address)
        names = {"min": "minimize", "max": "maximize"}

        def create() -> optuna.Study:
            directions: Any = [names[direction] for direction in self.directions]
            study = optuna.create_study(storage=store, study_name=pruning.STUDY, directions=directions, load_if_exists=True, sampler=self.sampler)
            study.set_user_attr("aims", aims)
            return study

        if pruning.STUDY in optuna.get_all_study_names(store):
            study = optuna.load_study(study_name=pruning.STUDY, storage=store, sampler=self.sampler)
            before = study.user_attrs.get("aims")
            if before != aims and any(trial.state.is_finished() for trial in study.get_trials(deepcopy=False)):
                raise ConfigError(f"{self.address} holds another search ({_difference(before or {}, aims)}): choose another sweep_dir")
            if before != aims:  # nothing was learnt from it
                optuna.delete_study(study_name=pruning.STUDY, storage=store)
                study = create()
        else:
            study = create()
        if study.user_attrs.get(pruning.SETTINGS) != self.pruner:
            study.set_user_attr(pruning.SETTINGS, self.pruner)
        return study

    def run(self) -> None:
        """Asks, launches and tells until there are as many trials as wanted, or all that differ were tried.

        Raises:  ConfigError: a metric that no run writes.  Interrupted, KeyboardInterrupt: asked to stop; all that was asked and not told is run
                 again by the same command.  ResearchError: of a launcher, once the others have ended.  FolderInUseError: another
                 search is at work here.
        """
        with _alone(self.folder):
            self._run()
        if self._fault is not None:
            raise self._fault

    def _run(self) -> None:
        if self.retry:
            self._ask_failed_again()
        told = sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))
        if told:
            app.say(f"{told} trials were told before")
        try:
            while batch := self._batch():
                self._launch(batch)
        finally:
            self._write()
        self._show()

    def _batch(self) -> list[FrozenTrial]:
        """The trials to run next: what was asked and never told, and new ones to fill the batch that an undisturbed search would have had."""
        trials = self.study.get_trials(deepcopy=False)
        count, repeated = len(trials), sum("again" in trial.user_attrs for trial in trials)
        open_ = [trial.number for trial in trials if not trial.state.is_finished()]
        start = (count - 1) // self.at_once * self.at_once if open_ else count // self.at_once * self.at_once
        fresh = max(min(start + self.at_once, self.trials + repeated) - count, 0)
        if open_ and any(trial.state.is_finished() for trial in trials[start:]):
            fresh = 0  # its scores are being told
        if not open_ and self.sampler.size is not None and len(self._lines(trials)) >= self.sampler.size:
            return []
        asked = [self.study.ask() if trials[i].state is TrialState.WAITING else pruning.taken_up(self.study, i) for i in open_]
        for trial in [*asked, *(self.study.ask() for _ in range(fresh))]:
            self._choose(trial)
        return [trial for trial in self.study.get_trials(deepcopy=False) if not trial.state.is_finished()]

    def _choose(self, trial: optuna.Trial) -> None:
        for axis in self.axes:
            known: Any = axis.distribution
            if isinstance(known, CategoricalDistribution):
                trial.suggest_categorical(axis.key, known.choices)
            elif isinstance(known, IntDistribution):
                trial.suggest_int(axis.key, known.low, known.high, step=known.step, log=known.log)
            else:
                trial.suggest_float(axis.key, known.low, known.high, step=known.step, log=known.log)

    def _ask_failed_again(self) -> None:
        trials = self.study.get_trials(deepcopy=False)
        known = self._lines([trial for trial in trials if trial.state is not TrialState.FAIL])
        for lines, trial in self._lines(trials).items():
            if lines not in known:
                self.study.enqueue_trial(trial.params, user_attrs={"again": True})

    def _lines(self, trials: Sequence[FrozenTrial]) -> dict[tuple[str, ...], FrozenTrial]:
        """{the searched overrides: the last trial that has them}."""
        return {self._overrides(trial): trial for trial in trials if len(trial.params) == len(self.axes)}

    def _overrides(self, trial: FrozenTrial) -> tuple[str, ...]:
        return tuple(axis.line(trial.params[axis.key]) for axis in self.axes)

    def _launch(self, batch: Sequence[FrozenTrial]) -> None:
        """Runs trials and tells their scores, in the order of their numbers; what was tried before is told again without a run."""
        known = self._lines([trial for trial in self.study.get_trials(deepcopy=False) if self._is_known(trial)])
        wanted: dict[tuple[str, ...], FrozenTrial] = {}
        for trial in batch:
            if (lines := self._overrides(trial)) not in known:
                wanted.setdefault(lines, trial)
        results: dict[tuple[str, ...], Any] = {}
        for part in _consecutive(list(wanted.items())):
            jobs = [[*self.fixed, *lines, *self._pruning(trial)] for lines, trial in part]
            done = self.launcher.launch(jobs, initial_job_idx=part[0][1].number)
            results |= {lines: self._returned(job) for (lines, _), job in zip(part, done, strict=True)}
        for trial in batch:
            self._tell(trial, self._overrides(trial), results)
        self._write()

    def _is_known(self, trial: FrozenTrial) -> bool:
        return trial.state in _ENDED or (trial.state is TrialState.FAIL and not self.retry)

    def _pruning(self, trial: FrozenTrial) -> list[str]:
        return [] if self.pruner is None else [f"pruning={QuotedString(f'{self.address}#{trial.number}', Quote.single).with_quotes()}"]

    def _returned(self, job: Any) -> Any:
        """What the verb returned; None where it failed."""
        try:
            return job.return_value
        except Exception as error:  # of another process, which the launcher has brought home
            if self._fault is None:
                code, line = app.outcome(error)
                self._fault = ResearchError(line)
                self._fault.exit_code = code
            return None

    def _tell(self, trial: FrozenTrial, lines: tuple[str, ...], results: Mapping[tuple[str, ...], Any]) -> None:
        if lines not in results or self._is_told(lines):
            self._tell_again(trial, lines)
            return
        result = results[lines]
        if result is None:
            self.study.tell(trial.number, state=TrialState.FAIL)
            return
        if result.get("status") == "interrupted":
            raise Interrupted(f"trial {trial.number} [{' '.join(lines)}] has no score: {result.get('reason')}; the same command without it goes on")
        values = [_value(result, metric) for metric in self.metrics]
        if result.get("status") == "pruned":
            self.study.tell(trial.number, state=TrialState.PRUNED)
        elif len(scores := [value for value in values if value is not None]) < len(values):
            self.study.tell(trial.number, state=TrialState.FAIL)
        else:
            self.study.tell(trial.number, scores)
        shown = "  ".join(f"{metric} {'-' if value is None else format(value, '.4g')}" for metric, value in zip(self.metrics, values, strict=True))
        pruned = "pruned, " if result.get("status") == "pruned" else ""
        app.say(f"trial {trial.number + 1} of {self._total()} [{' '.join(lines)}] {pruned}{shown}{self._leader()}")

    def _is_told(self, lines: tuple[str, ...]) -> bool:
        return lines in self._lines([trial for trial in self.study.get_trials(deepcopy=False) if self._is_known(trial)])

    def _tell_again(self, trial: FrozenTrial, lines: tuple[str, ...]) -> None:
        """Gives a trial the score of the earlier one that it repeats."""
        before = self._lines([other for other in self.study.get_trials(deepcopy=False) if self._is_known(other)])[lines]
        if before.state is TrialState.COMPLETE:
            self.study.tell(trial.number, before.values)
            return
        if before.intermediate_values and not trial.intermediate_values:
            step = max(before.intermediate_values)
            pruning.taken_up(self.study, trial.number).report(before.intermediate_values[step], step)
        self.study.tell(trial.number, state=before.state)

    def _total(self) -> int:
        return self.trials + sum("again" in trial.user_attrs for trial in self.study.get_trials(deepcopy=False))

    def _leader(self) -> str:
        front = self._front()
        if len(self.metrics) > 1:
            return f" ({len(front)} on the front)" if front else ""
        return f" (best {front[0].values[0]:.4g}, trial {front[0].number + 1})" if front else ""

    def _front(self) -> list[FrozenTrial]:
        """The best trial; of several metrics all that no other one is better than in each, different ones, by the first metric."""
        if not self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)):
            return []
        if len(self.metrics) == 1:
            return [self.study.best_trial]
        found = {self._overrides(trial): trial for trial in reversed(self.study.best_trials)}
        return sorted(found.values(), key=lambda trial: (trial.values[0], trial.number), reverse=self.directions[0] == "max")

    def _write(self) -> None:
        """search.json: what was looked for, how far it is, and what is best so far."""
        trials = self.study.get_trials(deepcopy=False)
        states = {state.name.lower(): sum(trial.state is state for trial in trials) for state in TrialState}
        runs = [(set(trial.overrides), trial.run) for trial in Ledger(self.folder).trials()]

        def told(trial: FrozenTrial) -> dict[str, Any]:
            lines = self._overrides(trial)
            run = next((run for overrides, run in runs if overrides.issuperset(lines)), None)
            return {"trial": trial.number, "run": run, "overrides": lines, "values": dict(zip(self.metrics, trial.values, strict=True))}

        aims = {"metric": self.metrics, "direction": self.directions, "sampler": self.sampler.name, "seed": self.sampler.seed, "pruner": self.pruner}
        front = [told(trial) for trial in self._front()]
        written = {**aims, "trials": {"wanted": self._total(), **states}, "different": len(self._lines(trials)), "best": front}
        file = self.folder / FILE
        if not file.exists() or read_json(file) != json.loads(json.dumps(written)):
            write_json(file, written)

    def _show(self) -> None:
        """The best trial, or the front, on the terminal."""
        trials = self.study.get_trials(deepcopy=False)
        different = len(self._lines(trials))
        if different < len(trials):
            app.say(f"{len(trials)} trials, {different} of them different; the others were told again without a run")
        if self.sampler.size is not None and different >= self.sampler.size and len(trials) < self._total():
            app.say(f"all {different} combinations were tried")
        front = self._front()
        if not front:
            app.say("no trial has a score")
            return
        table = Table(
            title="best trial" if len(self.metrics) == 1 else f"the front: {' against '.join(self.metrics)}", title_justify="left", box=None
        )
        for name in ("trial", *self.metrics, "overrides"):
            table.add_column(name, justify="left" if name == "overrides" else "right", overflow="fold")
        for trial in front:
            table.add_row(str(trial.number + 1), *(f"{value:.6g}" for value in trial.values), " ".join(self._overrides(trial)))
        if app.talks():
            Console(markup=False).print(table)
        app.say(f"written to {self.folder / FILE}")


@contextlib.contextmanager
def _alone(folder: pathlib.Path) -> Iterator[None]:
    """Holds the folder as the only search in it; the operating system lets go of a dead one's claim.

    Raises:  FolderInUseError: another one is at work there.
    """
    with open(folder / LOCK, "ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FolderInUseError(f"sweep_dir='{folder}' is in use by another search") from None
        yield


def _parted(loader: Any, arguments: Sequence[str]) -> tuple[list[str], list[Override]]:
    """(overrides that are the same in every trial, overrides that list values); of one key the last counts."""
    last = {override.get_key_element(): override for override in OverridesParser.create(loader).parse_overrides(list(arguments))}
    swept = [override for override in last.values() if override.is_sweep_override()]
    return [override.input_line or "" for override in last.values() if not override.is_sweep_override()], swept


def _with(params: Mapping[str, Any] | None, arguments: Sequence[str], config: DictConfig) -> list[str]:
    """The overrides, those of `hydra.sweeper.params` first and checked like typed ones."""
    lines = [f"{key}={value}" for key, value in (params or {}).items()]
    return (
        [*Composer(config.hydra.job.config_name).check([*arguments, *lines], multirun=True)[len(arguments) :], *arguments]
        if lines
        else list(arguments)
    )


def _first(override: Override) -> str | None:
    """The override with the first of its choices; None: it chooses between bounds."""
    if not override.is_choice_sweep():
        return None
    choice = next(iter(override.sweep_string_iterator()), None)
    return None if choice is None else f"{override.get_key_element()}={choice}"


def _aims(config: DictConfig, metric: Any, way: Any) -> tuple[list[str], list[str]]:
    """(what is looked for, which way each is better)."""
    if "train" not in config:
        raise ConfigError("hydra/sweeper=search chooses by the scores of research.train; other commands have none")
    metric, way = (OmegaConf.to_container(x) if OmegaConf.is_config(x) else x for x in (metric, way))
    metrics = [config.train.monitor] if metric is None else list(metric) if isinstance(metric, list | tuple) else [metric]
    if not metrics or not all(isinstance(name, str) for name in metrics) or len(set(metrics)) < len(metrics):
        raise ConfigError(
            f"hydra.sweeper.metric={metric!r}: must be a score as validation/accuracy, a key of result.json as params, or a list of them"
        )
    if way is None:
        return metrics, [config.train.mode if name == config.train.monitor else _way(name) for name in metrics]
    ways = list(way) if isinstance(way, list | tuple) else [way]
    for one in ways:
        if one not in DIRECTIONS:
            raise ConfigError(f"hydra.sweeper.direction={one!r} is unknown{nearest(one, DIRECTIONS)}")
    if len(ways) != len(metrics):
        raise ConfigError(f"hydra.sweeper.direction={ways}: {len(metrics)} metrics need as many, {', '.join(metrics)}")
    return metrics, ways


def _way(name: str) -> str:
    """Which value of a score or a cost is better; a speed is no cost."""
    return "max" if name.endswith("_per_s") else direction(name)


def _value(result: Mapping[str, Any], name: str) -> float | None:
    """A score of a run, or a number of its result; None where it has none.

    Raises:  ConfigError: runs write no such metric.
    """
    best, metrics = result.get("best") or {}, result.get("metrics") or {}
    known = {**{key: value for key, value in result.items() if value is None or _is_number(value)}, **metrics}
    if best:
        known[best["metric"]] = best["value"]
    if name not in known:
        raise ConfigError(f"hydra.sweeper.metric={name!r}: no run writes it{nearest(name, known)}")
    value = known[name]
    return float(value) if _is_number(value) and math.isfinite(value) else None


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def _difference(before: Mapping[str, Any], aims: Mapping[str, Any]) -> str:
    """What another search looked for, in words."""
    for name, now in aims.items():
        if (was := before.get(name)) != now:
            return "its trials have another config" if name == "config" else f"{name}: {json.dumps(was)} there, {json.dumps(now)} here"
    return "unknown"


def _consecutive(items: list[tuple[tuple[str, ...], FrozenTrial]]) -> list[list[tuple[tuple[str, ...], FrozenTrial]]]:
    """The items in parts of adjoining numbers: a launcher counts its jobs from the first one on."""
    parts: list[list[tuple[tuple[str, ...], FrozenTrial]]] = []
    for item in items:
        if parts and item[1].number == parts[-1][-1][1].number + 1:
            parts[-1].append(item)
        else:
            parts.append([item])
    return parts
