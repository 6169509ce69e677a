"""Runs read from their folders and grouped into settings: what has the same config but for its seed, or its fold, is one setting."""

import contextlib
import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import yaml
from etils import epath

from research.core import app
from research.core.config import COMPARED, FREE
from research.core.errors import ConfigError, ResearchError
from research.core.folder import read_json
from research.core.nodes import descend, leaves
from research.sweep.ledger import Ledger, Trial
from research.training.run import CONFIG, RESULT

SCORED = ("finished", "stopped_early")  # that a score counts of: what was pruned or failed has not been trained as the others
FOLD = re.compile(r"\d+/\d+")  # data.validation of one of several folds
SETTLED = ("data.spec", *FREE)  # parts of a config that follow from others, or from the machine
METRICS = "metrics.jsonl"
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # 25 times as fast: a report reads hundreds of configs


@dataclasses.dataclass(frozen=True)
class Outcome:
    """One run: what its folder tells and, where it is a trial of a sweep, what the ledger does.

    Args:    config: as saved, resolved; {} where the run ended before it was.  result: result.json; {} where there is none.
    """

    run: str
    config: Mapping[str, Any]
    result: Mapping[str, Any]
    trial: Trial | None = None

    @property
    def state(self) -> str:
        """How it ended."""
        return self.trial.state if self.trial else self.result.get("status") or "running"

    @property
    def reason(self) -> str:
        """Why it ended so, in one line; empty where it ended as it should."""
        told = self.trial.reason if self.trial else self.result.get("reason")
        return " ".join(str(told or ("was killed, or still runs" if self.state == "running" else "")).split())

    @property
    def overrides(self) -> dict[str, str]:
        """{key: value as typed}, of a trial."""
        split = (line.partition("=") for line in (self.trial.overrides if self.trial else ()))
        return {name.lstrip("+"): value for name, _, value in split}

    @property
    def metrics(self) -> dict[str, float]:
        """Means over whole splits, the finite ones."""
        held = {**(self.result.get("metrics") or {}), **(self.trial.metrics if self.trial else {})}
        numbers = {name: value for name, value in held.items() if "/" in name and isinstance(value, int | float)}
        return {name: float(value) for name, value in numbers.items() if math.isfinite(value)}

    @property
    def replicate(self) -> str:
        """What tells it from the other runs of its setting."""
        seed = self.config["seed"] if "seed" in self.config else self.overrides.get("seed", 0)
        fold = self.config["data"].get("validation") if self.config.get("data") else self.overrides.get("data.validation")
        return f"seed={seed}" + (f" fold={fold}" if FOLD.fullmatch(str(fold)) else "")

    @property
    def cost(self) -> dict[str, float]:
        """seconds: of the whole trial, else of training; flops: of training; bytes: the peak of its process. Only what is known."""
        seconds = self.trial.seconds if self.trial and self.trial.seconds is not None else self.result.get("train_s")
        factors = [self.result.get("train_flops_per_example"), self.result.get("step"), (self.config.get("data") or {}).get("batch")]
        flops = math.prod(factors) if None not in factors else None
        held = {"seconds": seconds, "flops": flops, "bytes": self.result.get("peak_bytes")}
        return {name: float(value) for name, value in held.items() if value is not None}

    def compared(self) -> dict[str, Any]:
        """{dotted path: value} of all that makes its setting this setting."""
        parts = {root: found for root in COMPARED for found, rest in [descend(self.config, root)] if not rest}
        held = {path: value for root, found in parts.items() for path, value in _leaves(root, found)}
        folded = FOLD.fullmatch(str(held.get("data.validation")))
        left = ("seed", *SETTLED, *(("data.validation",) if folded else ()))
        return {path: value for path, value in held.items() if not any(f"{path}.".startswith(f"{root}.") for root in left)}

    def records(self) -> list[dict[str, Any]]:
        """The lines of its metrics.jsonl; a line that was cut off by a crash is left out."""
        try:
            lines = (epath.Path(self.run) / METRICS).read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            return []
        found = (_record(line) for line in lines)
        return [record for record in found if record]


def _leaves(root: str, found: Any) -> Iterator[tuple[str, Any]]:
    return leaves(found, f"{root}.") if found and isinstance(found, Mapping | list) else iter([(root, found)])


def _record(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        return None
    return record if isinstance(record, dict) else None


@dataclasses.dataclass(frozen=True)
class Setting:
    """Runs that differ in their seed or fold alone.

    Args:    values: {swept key: value}; what they all share is left out.
    """

    values: Mapping[str, Any]
    outcomes: tuple[Outcome, ...]

    @property
    def name(self) -> str:
        """As "learning_rate=0.003 width=64"."""
        short = shorten(self.values)
        return " ".join(f"{short[key]}={shown(value)}" for key, value in self.values.items()) or "all"

    def scores(self, metric: str) -> dict[str, float]:
        """{replicate: score} of the runs that finished; of two with one seed the first."""
        found: dict[str, float] = {}
        for outcome in self.scored:
            if metric in outcome.metrics:
                found.setdefault(outcome.replicate, outcome.metrics[metric])
        return found

    @property
    def scored(self) -> list[Outcome]:
        """The runs that finished."""
        return [outcome for outcome in self.outcomes if outcome.state in SCORED]

    @property
    def missed(self) -> dict[str, int]:
        """{state: number} of the runs that did not."""
        states = [outcome.state for outcome in self.outcomes if outcome.state not in SCORED]
        return {state: states.count(state) for state in dict.fromkeys(states)}


def shorten(keys: Iterable[str]) -> dict[str, str]:
    """{dotted key: its last name, or the whole key where two end alike}."""
    keys = list(keys)
    last = [key.rpartition(".")[2] for key in keys]
    return {key: name if last.count(name) == 1 and not name.isdigit() else key for key, name in zip(keys, last, strict=True)}


def shown(value: Any) -> str:
    """A swept value as text."""
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace(" ", "") if isinstance(value, list) else str(value)


def read(folder: epath.PathLike, trial: Trial | None = None) -> Outcome:
    """The run in this folder.

    Raises:  ResearchError: its config or result is a link, or cannot be read; of a trial only where it finished.
    """
    path = epath.Path(folder)
    try:
        config = content(path / CONFIG, _config)
        result = content(path / RESULT, read_json) if (path / RESULT).exists() else {}
    except ResearchError:
        if trial is None or trial.state in SCORED:
            raise
        config, result = {}, {}  # it failed before these were written
    return Outcome(os.fspath(folder), config, result, trial)


def content(path: epath.Path, load: Any) -> Any:
    """The mapping in a file that lies in the folder itself."""
    if os.path.islink(path):
        raise ResearchError(f"{path.name} is a link")
    found = load(path)
    if not isinstance(found, dict):
        raise ResearchError(f"{path.name} holds no mapping")
    return found


def _config(path: epath.Path) -> Any:
    """As `core.config.read_config`, in plain dicts and without interpolations, which no saved config has but for secrets.

    Raises:  as there.
    """
    try:
        text = path.read_text()
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader)):
            raise ConfigError(f"{path} uses YAML aliases, which no config of a run has")
        return yaml.load(text, Loader)
    except OSError as error:
        raise ResearchError(f"cannot read {path}: {error.strerror or error}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not a config: {' '.join(str(error).split())}") from error


def trials(sweep: str) -> list[Outcome]:
    """The trials of a sweep, in the order in which they were begun; what cannot be read is named and left out.

    Raises:  ConfigError: the folder is missing, has no ledger, or the ledger names no trial.
    """
    ledger = Ledger(sweep)
    if not epath.Path(sweep).is_dir():
        raise ConfigError(f"sweep={sweep!r}: there is no such folder")
    if not ledger.path.exists():
        hint = "; runs='FOLDER/**' reports runs that are no sweep"
        raise ConfigError(f"sweep={sweep!r}: there is no {ledger.path.name} in it, which `python -m research.train -m` writes{hint}")
    found = []
    for trial in ledger.trials():
        try:
            found.append(read(os.path.join(sweep, trial.run), trial))
        except ResearchError as error:
            app.say(f"left out: {trial.run}: {error}")
    if not found:
        raise ConfigError(f"sweep={sweep!r}: its {ledger.path.name} names no trial that can be read")
    return found


def group(outcomes: Sequence[Outcome]) -> list[Setting]:
    """The settings, in the order of their first run.

    The swept keys are those that were typed with several values, of a sweep; else those in which the configs differ. A run that ended before it
    had a config belongs where its overrides say.
    """
    found: dict[str, list[Outcome]] = {}
    typed: dict[tuple[tuple[str, str], ...], str] = {}
    compared = [outcome.compared() if outcome.config else None for outcome in outcomes]
    keys = [json.dumps(tree, sort_keys=True, default=str) if tree is not None else None for tree in compared]
    for outcome, key in zip(outcomes, keys, strict=True):
        if key is not None and outcome.trial:
            typed.setdefault(_typed(outcome), key)
    trees: dict[str, dict[str, Any]] = {}
    for outcome, tree, key in zip(outcomes, compared, keys, strict=True):
        key = key or typed.get(_typed(outcome)) or str(_typed(outcome))
        found.setdefault(key, []).append(outcome)
        trees.setdefault(key, tree or {})
    held = list(found.values())
    values = _swept(held, list(trees.values()))
    return [Setting(mapping, tuple(runs)) for mapping, runs in zip(values, held, strict=True)]


def _typed(outcome: Outcome) -> tuple[tuple[str, str], ...]:
    """Its overrides without what makes it one of several seeds or folds."""
    kept = outcome.overrides.items()
    return tuple(sorted((name, value) for name, value in kept if name != "seed" and not (name == "data.validation" and FOLD.fullmatch(value))))


def _swept(groups: Sequence[Sequence[Outcome]], trees: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """{swept key: value} of each group; a value that a group lacks is None."""
    typed = [dict(_typed(runs[0])) for runs in groups]
    order = dict.fromkeys(name for runs in groups for name in runs[0].overrides)
    names = [name for name in order if len({row.get(name) for row in typed}) > 1]
    rows = [{name: _value(name, runs[0], tree, row) for name in names} for runs, tree, row in zip(groups, trees, typed, strict=True)]
    names = [name for name in names if len({str(row[name]) for row in rows}) > 1]
    rows = [{name: row[name] for name in names} for row in rows]
    if len({str(row) for row in rows}) == len(rows):
        return rows
    differing = _differing([tree for tree in trees if tree])
    return [{**row, **{path: tree.get(path) for path in differing if path not in row}} for row, tree in zip(rows, trees, strict=True)]


def _value(name: str, outcome: Outcome, tree: Mapping[str, Any], typed: Mapping[str, str]) -> Any:
    if name in tree:
        return tree[name]
    value, rest = descend(outcome.config, name)
    if outcome.config and not rest and not isinstance(value, Mapping):
        return value
    text = typed.get(name)
    for read_as in (int, float):
        with contextlib.suppress(TypeError, ValueError):
            return read_as(text)  # type: ignore[arg-type]  # None is a TypeError
    return text


def _differing(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """The paths in which configs differ, without those that only follow: a repeated model, and the arguments of another target."""
    paths = list(dict.fromkeys(path for tree in trees for path in tree))
    varying = [path for path in paths if len({str(tree.get(path)) for tree in trees}) > 1]
    kept: list[str] = []
    seen = set()
    for path in varying:
        root = path.partition(".")[0]
        target = f"{root}._target_"
        column = tuple(str(tree.get(path)) for tree in trees)
        if path != target and target in varying:
            alike = {str(tree.get(target)): set() for tree in trees}
            for tree in trees:
                alike[str(tree.get(target))].add(str(tree.get(path)))
            if all(len(values) == 1 for values in alike.values()):
                continue
        if column not in seen or not path.startswith("objective."):
            kept.append(path)
        seen.add(column)
    return kept
