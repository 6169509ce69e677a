"""The figures of a report, drawn from its comparison."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from research.core.config import LEARNING_RATE
from research.core.errors import ConfigError, nearest
from research.figures import compression, mup
from research.figures import sweep as draw
from research.sweep.comparison import Comparison, Line
from research.sweep.page import Picture
from research.sweep.scaling import Law, budgets, predict
from research.sweep.settings import shorten, shown
from research.sweep.statistics import t_interval

COSTS = {"seconds": "seconds a trial", "flops": "FLOPs of training", "bytes": "peak bytes of the process"}
LINES = 8  # that a response figure has at most
WIDTH, BASE = "model.width", "model.base"


def pictures(comparison: Comparison, out: epath.Path, pair: tuple[str, str] | None) -> list[Picture]:
    """Draws all figures that this sweep has something to show in.

    Args:    pair: the two swept keys of the heat map, if there is to be one.
    """
    found = [_scores(comparison, out)] if len(comparison.scored) > 1 else []
    drawn = (_learning(comparison, out), _response(comparison, out), _transfer(comparison, out), _heat(comparison, out, pair) if pair else None)
    found += [picture for picture in drawn if picture]
    if len(comparison.keys) > 1:
        found.append(_parallel(comparison, out))
    if comparison.importance is not None:
        draw.importances(
            _short(comparison.importance.shares), out / "importance.png", explained=comparison.importance.explained, metric=comparison.metric
        )
        told = (
            "Permutation importance of a random forest on held-out runs, as the total effect of each key on the rank of the score; what seeds and "
            "interactions do is in it too. Keys that always change together share it in a way that means nothing."
        )
        found.append(Picture("importance.png", "Which of the swept keys matter", told))
    if cost := _cost(comparison, out):
        found.append(cost)
    return found


def _short(values: Mapping[str, Any]) -> dict[str, Any]:
    names = shorten(values)
    return {names[key]: value for key, value in values.items()}


def _scores(comparison: Comparison, out: epath.Path) -> Picture:
    lines = comparison.scored
    draw.scores(
        [line.setting.name for line in lines],
        np.array([line.summary.mean for line in lines]),
        np.array([line.summary.t for line in lines], np.float64),
        [list(line.scores.values()) for line in lines],
        out / "scores.png",
        metric=comparison.metric,
        best=comparison.apart,
        near=[line in comparison.near for line in lines],
    )
    colour = "Orange: apart from all others. " if comparison.apart else "Dark: not apart from the first. " if lines[0].summary.n > 1 else ""
    return Picture("scores.png", "Scores of the settings", f"{colour}Each run is a grey point.")


def _learning(comparison: Comparison, out: epath.Path) -> Picture | None:
    """Curves of the metric over steps, of validation where that was logged."""
    name = comparison.metric.rpartition("/")[2]
    records = [[outcome.records() for outcome in line.setting.scored] for line in comparison.scored]
    known = [f"{split}/{quantity}" for quantity in (name, "loss") for split in ("validation", "train")]
    points = {key: max((sum(key in record for record in lines) for runs in records for lines in runs), default=0) for key in known}
    metric = next((key for key in known if points[key] > 1), next((key for key in known if points[key]), known[0]))  # a single point is no curve
    curves = [_curves(line, runs, metric) for line, runs in zip(comparison.scored, records, strict=True)]
    band = any(curve.reach is not None for curve in curves)
    draw.learning(curves, out / "curves.png", metric=metric, note="mean and 95 % t interval over seeds" if band else "")
    return Picture("curves.png", "Learning curves", "Drawn as far as every run of a setting goes." if band else "")


def _curves(line: Line, runs: Sequence[Sequence[Mapping[str, Any]]], metric: str) -> draw.Curves:
    """At the steps at which every run has a value; the interval is t's at each step by itself."""
    logged = [
        {record["step"]: record[metric] for record in records if isinstance(record.get(metric), int | float) and "step" in record} for records in runs
    ]
    logged = [held for held in logged if held]
    steps = sorted(set.intersection(*(set(held) for held in logged))) if logged else []
    values = np.array([[held[step] for step in steps] for held in logged], np.float64).reshape(len(logged), len(steps))
    reach = None
    if len(values) > 1 and len(steps):
        reach = np.array([t_interval(column).high - column.mean() for column in values.T])
    return draw.Curves(line.setting.name, np.array(steps, np.float64), values, reach)


def pair_of(comparison: Comparison, asked: Sequence[str] | None) -> tuple[str, str] | None:
    """The two keys of the heat map, in full; None where none are asked for and other than two were swept.

    Raises:  ConfigError: not two keys, or one that was not swept.
    """
    keys, short = comparison.keys, shorten(comparison.keys)
    if asked is None:
        return (keys[0], keys[1]) if len(keys) == 2 else None
    named = {**{name: key for key, name in short.items()}, **{key: key for key in keys}}
    if len(asked) != 2 or asked[0] == asked[1]:
        raise ConfigError(f"heat={list(asked)}: must be two swept keys, as [{','.join(keys[:2]) or 'a,b'}]")
    for name in asked:
        if name not in named:
            raise ConfigError(f"heat: {name!r} was not swept{nearest(name, keys)}")
    return named[asked[0]], named[asked[1]]


def _levels(values: Sequence[Any]) -> list[Any]:
    """The different values in order: numbers by size, all else by text."""
    different = {str(value): value for value in values}.values()
    return sorted(different, key=lambda value: (False, value, "") if _number(value) else (True, 0, str(value)))


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _heat(comparison: Comparison, out: epath.Path, pair: tuple[str, str]) -> Picture | None:
    rows, columns = (_levels([line.setting.values.get(key) for line in comparison.scored]) for key in pair)
    if len(rows) * len(columns) > 40 * 40 or len(comparison.scored) < 2:
        return None  # a random search: each cell would hold one trial, or none
    cells: dict[tuple[str, str], list[float]] = {}
    for line in comparison.scored:
        cells.setdefault((str(line.setting.values.get(pair[0])), str(line.setting.values.get(pair[1]))), []).extend(line.scores.values())
    table = np.array([[np.mean(cells.get((str(r), str(c)), [math.nan])) for c in columns] for r in rows])
    rest = len(comparison.keys) > 2
    names = (shorten(comparison.keys)[pair[0]], shorten(comparison.keys)[pair[1]])
    note = "mean over seeds and all other keys" if rest else "mean over seeds"
    draw.heat(table, rows, columns, out / "heat.png", names=names, metric=comparison.metric, rising=comparison.rising, note=note)
    return Picture("heat.png", f"{comparison.metric} over {names[0]} and {names[1]}", "The darker, the better; the best is bold.")


def _response(comparison: Comparison, out: epath.Path) -> Picture | None:
    """The score over one swept number, where one or two keys were swept; of two the one with more values is the axis."""
    levels = {key: _levels([line.setting.values.get(key) for line in comparison.scored]) for key in comparison.keys}
    numeric = [key for key in levels if len(levels[key]) > 2 and all(map(_number, levels[key]))]
    if not numeric or len(levels) > 2:
        return None
    axis = max(numeric, key=lambda key: len(levels[key]))
    other = next((key for key in levels if key != axis), None)
    if other is not None and len(levels[other]) > LINES:
        return None
    lines = {}
    for level in levels[other] if other is not None else [None]:
        held = [line for line in comparison.scored if other is None or str(line.setting.values.get(other)) == str(level)]
        held.sort(key=lambda line: line.setting.values[axis])
        if held:
            name = "" if other is None else f"{shorten(levels)[other]}={shown(level)}"
            intervals = np.array([line.summary.t for line in held], np.float64)
            lines[name] = ([float(line.setting.values[axis]) for line in held], np.array([line.summary.mean for line in held]), intervals)
    several = any(line.summary.n > 1 for line in comparison.scored)
    note = "mean and 95 % t interval over seeds" if several else ""
    draw.response(lines, out / "response.png", key=shorten(levels)[axis], metric=comparison.metric, note=note)
    return Picture("response.png", f"{comparison.metric} over {shorten(levels)[axis]}")


def _transfer(comparison: Comparison, out: epath.Path) -> Picture | None:
    """A loss over the learning rate at each width, where these two were swept, and `model.base` perhaps; for a score that rises, validation's."""
    if not {WIDTH, LEARNING_RATE} <= set(comparison.keys) <= {WIDTH, LEARNING_RATE, BASE}:
        return None
    metric = "validation/loss" if comparison.rising else comparison.metric
    panels: dict[str, dict[int, dict[float, list[float]]]] = {}
    for line in comparison.scored:
        values = line.setting.values
        scores = list(line.setting.scores(metric).values())
        if not (isinstance(values[WIDTH], int) and _number(values[LEARNING_RATE]) and scores):
            return None
        base = values.get(BASE)
        name = "" if BASE not in comparison.keys else "standard" if base is None else f"maximal update, base {base}"
        panels.setdefault(name, {}).setdefault(values[WIDTH], {})[float(values[LEARNING_RATE])] = scores
    rates = [by_rate for by_width in panels.values() for by_rate in by_width.values()]
    if max(map(len, panels.values())) < 2 or min(map(len, rates)) < 3:
        return None
    mup.transfer(dict(sorted(panels.items())), out / "transfer.png", score=metric)
    return Picture(
        "transfer.png", "The best learning rate at each width", "Means over seeds, bands from the lowest to the highest one; the best rate is ringed."
    )


def _parallel(comparison: Comparison, out: epath.Path) -> Picture:
    rows = [
        (line.setting.values, outcome.metrics.get(comparison.metric, math.nan) if outcome in line.setting.scored else math.nan)
        for line in comparison.lines
        for outcome in line.setting.outcomes
        if line.setting.values
    ]
    columns = {name: [values.get(key) for values, _ in rows] for key, name in shorten(comparison.keys).items()}
    scores = np.array([score for _, score in rows])
    draw.parallel(columns, scores, out / "parallel.png", metric=comparison.metric, rising=comparison.rising)
    return Picture("parallel.png", "Every run through its swept values", "The darker, the better.")


def _cost(comparison: Comparison, out: epath.Path) -> Picture | None:
    """The score over each cost in which the settings differ, with the front."""
    lines = comparison.scored
    costs = {title: np.array([line.cost.get(name, math.nan) for line in lines]) for name, title in COSTS.items()}
    costs = {title: x for title, x in costs.items() if np.isfinite(x).sum() > 1 and np.nanmax(x) > 1.02 * np.nanmin(x) > 0}
    if not costs:
        return None
    scores, names = np.array([line.summary.mean for line in lines]), [line.setting.name for line in lines]
    compression.pareto(costs, scores, names, out / "cost.png", name=comparison.metric)
    return Picture("cost.png", "Score against cost", "Means over seeds; the line joins the settings that no other beats in both.")


def scaling(law: Law, flops: float, metric: str, out: epath.Path) -> Picture:
    """Draws a scaling law."""
    size, tokens, _ = law.points.T
    grid = np.geomspace(size.min() / 4, size.max() * 4, 200)
    held = budgets(law)
    curves = [(grid, predict(law.values[None], grid, budget / 6 / grid)[0]) for budget in held]
    best = [law.best(budget)[0] for budget in held]
    optima = np.array([[n, predict(law.values[None], np.array([n]), np.array([budget / 6 / n]))[0, 0]] for n, budget in zip(best, held, strict=True)])
    axis = np.geomspace(held[0], max(held[-1], flops), 40)
    band = [law.best(budget) for budget in axis]
    draw.iso_flop(
        held,
        curves,
        optima,
        np.stack([size, 6 * size * tokens, law.points[:, 2]], axis=1),
        out / "scaling.png",
        band=(axis, np.array([value for value, _ in band]), np.array([interval for _, interval in band])),
        chosen=(flops, law.best(flops)[0]),
        metric=metric,
    )
    return Picture(
        "scaling.png", "Equal budgets, and the best size for each", "Fitted to every run that finished; the band is the bootstrap's over runs."
    )
