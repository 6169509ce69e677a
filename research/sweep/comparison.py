"""What a sweep found: its settings by score, which of them is best, and whether it is apart from the others."""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence

import numpy as np

from research.core.direction import HEADLINES, direction
from research.core.errors import ConfigError, nearest
from research.sweep import statistics
from research.sweep.settings import Outcome, Setting, group
from research.sweep.statistics import Difference, Importance, Summary

ALPHA = 0.05
TRIALS = 10  # that a forest needs to say which key matters
SHOWN = 8  # names in a line of those that the best is not apart from


@dataclasses.dataclass(frozen=True)
class Line:
    """One setting in the table.

    Args:    gap: to the best one, best - this; None for the best itself.  p: of the gap, corrected; NaN where there is none.
    """

    setting: Setting
    summary: Summary
    scores: Mapping[str, float]
    gap: Difference | None = None
    p: float = math.nan

    @property
    def cost(self) -> dict[str, float]:
        """The means over its runs that finished."""
        costs = [outcome.cost for outcome in self.setting.scored]
        names = dict.fromkeys(name for cost in costs for name in cost)
        return {name: float(np.mean([cost[name] for cost in costs if name in cost])) for name in names}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Settings with their scores, best first; those without a score last.

    Args:    keys: that were swept.
    """

    experiment: str
    metric: str
    keys: tuple[str, ...]
    lines: tuple[Line, ...]

    @property
    def rising(self) -> bool:
        """Whether a higher score is better."""
        return direction(self.metric) == "max"

    @property
    def outcomes(self) -> list[Outcome]:
        """All runs."""
        return [outcome for line in self.lines for outcome in line.setting.outcomes]

    @property
    def scored(self) -> list[Line]:
        """The settings with a score."""
        return [line for line in self.lines if line.summary.n]

    @property
    def near(self) -> list[Line]:
        """The settings that the best one is not apart from: the corrected p is 0.05 or more, or there is none."""
        return [line for line in self.scored[1:] if not line.p < ALPHA]

    @property
    def apart(self) -> bool:
        """Whether the best setting is marked: there are others, and it is apart from all of them."""
        return len(self.scored) > 1 and not self.near

    @functools.cached_property
    def importance(self) -> Importance | None:
        """How much each swept key tells about the score; None where there are too few runs or keys to tell."""
        rows = [(line.setting.values, score) for line in self.lines for score in line.scores.values()]
        if len(rows) < TRIALS or len(self.keys) < 2:
            return None
        return statistics.importance({key: [values.get(key) for values, _ in rows] for key in self.keys}, [score for _, score in rows])

    def verdict(self) -> str:
        """What may be said of the best setting, in one line."""
        first = self.scored[0]
        score = f"{self.metric} {written(first.summary.mean)}"
        if first.summary.n < 2:
            several = any(line.summary.n > 1 for line in self.scored)
            how = "it has one run" if several else "each setting has one run" if len(self.scored) > 1 else "there is one run"
            return f"{first.setting.name}: {score}; {how}, so there is no interval and no best is marked: seeds=5 gives one"
        score += f" ({written(first.summary.t.low)} to {written(first.summary.t.high)})"
        if len(self.scored) == 1:
            return f"{first.setting.name}: {score} over {first.summary.n} runs"
        if self.apart:
            others = len(self.scored) - 1
            return (
                f"best: {first.setting.name}: {score}, apart from {'the other' if others == 1 else f'all {others} others'} (p < {ALPHA}, corrected)"
            )
        names = [line.setting.name for line in self.near]
        rest = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        word = "highest" if self.rising else "lowest"
        return f"{word}: {first.setting.name}: {score}, not apart from: {', '.join(names[:SHOWN])}{rest}"


def compare(outcomes: Sequence[Outcome], metric: str | None = None) -> Comparison:
    """The settings of these runs, compared.

    The one with the best mean is compared with each other one, over the seeds that both have; the p-values are corrected for their number (Holm).

    Args:    metric: as "test/accuracy"; None: the main one of the test split, else of validation, that most runs have.
    Raises:  ConfigError: no run finished, runs of several experiments, or a metric that none has.
    """
    experiment = _experiment(outcomes)
    settings = group(outcomes)
    finished = [outcome for setting in settings for outcome in setting.scored]
    if not finished:
        states = [outcome.state for outcome in outcomes]
        counts = ", ".join(f"{states.count(state)} {state.replace('_', ' ')}" for state in dict.fromkeys(states))
        first = next((outcome for outcome in outcomes if outcome.reason), None)
        told = f"; the first: [{' '.join(first.trial.overrides) if first.trial else first.run}] {first.reason}" if first else ""
        raise ConfigError(f"none of the {len(outcomes)} runs finished ({counts}){told}")
    metric = choose(metric, [outcome.metrics for outcome in finished])
    scores = [setting.scores(metric) for setting in settings]
    lines = [
        Line(setting, statistics.summary(list(held.values()), seed=i), held) for i, (setting, held) in enumerate(zip(settings, scores, strict=True))
    ]
    sign = -1 if direction(metric) == "max" else 1
    lines.sort(key=lambda line: sign * line.summary.mean if line.summary.n else math.inf)
    gaps = [statistics.difference(lines[0].scores, line.scores) for line in lines[1:]]
    corrected = statistics.holm([gap.p for gap in gaps])
    lines[1:] = [dataclasses.replace(line, gap=gap, p=p) for line, gap, p in zip(lines[1:], gaps, corrected, strict=True)]
    keys = tuple(dict.fromkeys(key for setting in settings for key in setting.values))
    return Comparison(experiment, metric, keys, tuple(lines))


def choose(asked: str | None, metrics: Sequence[Mapping[str, float]]) -> str:
    """The metric that is asked for, else the main one that most runs have, those of the test split first.

    Raises:  ConfigError: no run has it, or none has any.
    """
    known = sorted({name for held in metrics for name in held})
    if asked is not None and asked not in known:
        raise ConfigError(f"metric={asked!r}: no run here has it{nearest(asked, known)}")
    main = [f"{split}/{name}" for split in ("test", "validation", "train") for name in (*HEADLINES, "loss")]
    found = asked or max((name for name in (*main, *known) if name in known), key=lambda name: sum(name in held for held in metrics), default=None)
    if found is None:
        raise ConfigError("no run here has a metric of a whole split: nothing can be compared")
    return found


def _experiment(outcomes: Sequence[Outcome]) -> str:
    names = [str(outcome.config["name"]) for outcome in outcomes if outcome.config.get("name")]
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    if len(counts) > 1:
        listed = ", ".join(f"{name} ({count})" for name, count in counts.items())
        raise ConfigError(
            f"the runs are of several experiments, {listed}, whose scores are not compared; name={next(iter(counts))} takes those alone"
        )
    return next(iter(counts), "")


def written(value: float) -> str:
    """A score as text: four decimals, or four digits where that says more; empty for NaN."""
    if math.isnan(value):
        return ""
    return f"{value:.4f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.4g}"
