"""Runs as a table, one row each: what they are, how they score and what they cost, and which of them are worth that."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from research.core import app
from research.core.errors import ConfigError, ResearchError, nearest
from research.core.folder import read_json
from research.core.nodes import descend
from research.core.spec import zero_batch
from research.figures.compression import pareto
from research.figures.numbers import short
from research.sweep.comparison import choose
from research.sweep.settings import SCORED, Outcome, content
from research.training.run import CONFIG

LEDGER = "compression.json"
COSTS = {  # that the figure draws
    "bytes": "bytes",
    "parameters": "parameters",
    "trained": "trained parameters",
    "flops_per_example": "FLOPs per example",
    "ms": "ms of a batch",
}
FACTS = ("experiment", "method", "status", "step", "parameters", "trained", "bytes", "disk_bytes", "flops_per_example", "ms", "seconds")
NARROW = 14  # characters that a column of words has at least
WIDE = Console(width=10_000)  # on which a table takes what it needs
SPARE = ("parameters", "seconds", "experiment")  # columns that go first where the terminal is narrow
HEADINGS = {"flops_per_example": "FLOPs", "seconds": "s"}
Row = dict[str, Any]


def row_of(outcome: Outcome, parents: dict[str, Row], settings: Sequence[str]) -> Row:
    """What the files of one run tell; `parents` takes what its ledger tells of the run that it was made from."""
    path, config, result = epath.Path(outcome.run), outcome.config, outcome.result
    row: Row = {"run": outcome.run, **dict.fromkeys(FACTS), "status": outcome.state, "reason": outcome.reason or None}
    if outcome.trial is not None and not config:
        return row  # it ended before it had a folder
    made = config.get("compression") or []
    row |= {"experiment": config["name"], "method": " + ".join(entry["method"] for entry in made) or None}
    row |= {path: value for path, (value, rest) in ((path, descend(config, path)) for path in settings) if not rest}
    row |= {name: result.get(name) for name in ("step", "flops_per_example")}
    row |= {"parameters": result.get("params"), "trained": result.get("params"), "seconds": result.get("train_s")}
    row |= outcome.metrics
    if (path / LEDGER).exists() and "sizes" in (ledger := content(path / LEDGER, read_json)):
        row |= _measured(ledger, "after") | {"seconds": (row["seconds"] or 0.0) + sum(stage["seconds"] for stage in ledger["stages"])}
        parent = made[-len(ledger["stages"])]["parent"]["run"]
        parents.setdefault(os.path.realpath(parent), _measured(ledger, "before"))
    return row


def _measured(ledger: Mapping[str, Any], which: str) -> Row:
    """What a ledger says of one of its two models."""
    sizes, latency = ledger["sizes"][which], list(ledger.get("latency", {}).values())
    scores = {f"{ledger['split']}/{name}": row[which] for name, row in ledger["metrics"].items()}
    return {
        **{name: value for name, (value, _, _) in scores.items()},
        "intervals": {name: [low, high] for name, (_, low, high) in scores.items()},
        "parameters": sizes["parameters"],
        "bytes": sizes["bytes"],
        "disk_bytes": sizes.get("disk_bytes"),
        "flops_per_example": ledger.get("flops_per_example", {}).get(which),
        "ms": latency[-1][which]["median_ms"] if latency else None,
    }


def time(rows: Sequence[Row], examples: int) -> None:
    """Gives each run's `ms` the median of its prediction of so many examples, all timed in turn; a run that cannot be read is named."""
    from research.compression import ledger as measure  # with models and their libraries, which a report that only reads does not wait for
    from research.run import Run

    programs = {}
    for row in rows:
        row["ms"] = None
        try:
            run = Run(row["run"])
            weights = run.weights()
            model = (weights.params, weights.extra, weights.frozen, weights.hyper)
            programs[row["run"]] = measure.program(run.objective, model, zero_batch(run.spec, examples))
        except ResearchError as error:
            app.say(f"not timed: {row['run']}: {error}")
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            app.say(f"not timed: {row['run']}: its {CONFIG} does not describe a run that can be built")
    rounds = measure.rounds(programs) if programs else []
    for row in rows:
        if row["run"] in programs:
            row["ms"] = 1e3 * float(np.median([seconds for times in rounds for seconds in times[row["run"]]]))


def metrics(rows: Sequence[Row]) -> list[str]:
    """The metrics that any row has, sorted."""
    return sorted({name for row in rows for name in row if "/" in name})


def main_metric(rows: Sequence[Row], asked: str | None) -> str | None:
    """The metric that counts: the one that is asked for, else the main one that most runs have; None where no run has one.

    Raises:  ConfigError: no run has it.
    """
    return choose(asked, [{name: row[name] for name in row if "/" in name} for row in rows]) if asked or metrics(rows) else None


def ordered(rows: list[Row], column: str | None, columns: Sequence[str]) -> list[Row]:
    """By a column, downwards where it begins with a minus; rows without a value come last."""
    name = (column or "run").removeprefix("-")
    if name not in columns:
        raise ConfigError(f"sort={column!r}: there is no such column{nearest(name, columns)}")
    filled, rest = [row for row in rows if row.get(name) is not None], [row for row in rows if row.get(name) is None]
    return sorted(filled, key=lambda row: _order(row[name]), reverse=(column or "").startswith("-")) + rest


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers by size, then all else by its text."""
    return (False, value) if isinstance(value, int | float) else (True, str(value))


def show(rows: Sequence[Row], metric: str | None, settings: Sequence[str]) -> None:
    """Prints the main columns; those that tell nothing here are left out, and of the others, where they do not fit, those that can be spared."""
    console = Console(markup=False)
    columns = [
        "experiment",
        *settings,
        "method",
        *([metric] if metric else []),
        "parameters",
        "trained",
        "bytes",
        "flops_per_example",
        "ms",
        "seconds",
    ]
    columns = [name for name in columns if any(row.get(name) is not None for row in rows) and (name != "trained" or _adapted(rows))]
    if len({row["experiment"] for row in rows}) == 1:
        columns.remove("experiment")
    table = _table(rows, columns, settings)
    for name in SPARE:
        if WIDE.measure(table).minimum > console.width and name in columns:
            columns.remove(name)
            table = _table(rows, columns, settings)
    console.print(table)


def _table(rows: Sequence[Row], columns: Sequence[str], settings: Sequence[str]) -> Table:
    table = Table(box=None, header_style="bold", pad_edge=False)
    common = os.path.commonpath([os.path.dirname(row["run"]) or "." for row in rows])
    cells = [[_setting(row.get(name)) if name in settings else _text(name, row.get(name)) for name in columns] for row in rows]
    names = [os.path.relpath(row["run"], common) + ("" if row["status"] in SCORED else f" ({row['status']})") for row in rows]
    table.add_column(f"run in {common}", overflow="fold", min_width=min(NARROW, max(map(len, names))))
    for number, name in enumerate(columns):
        if name in ("experiment", "method", *settings):
            widest = max(len(row[number]) for row in cells)
            table.add_column(name.rpartition(".")[2], overflow="fold", min_width=min(NARROW, widest))
        else:
            table.add_column(HEADINGS.get(name, name).replace("/", "/\n"), justify="right", min_width=max(len(row[number]) for row in cells))
    for name, row in zip(names, cells, strict=True):
        table.add_row(name, *row)
    return table


def _adapted(rows: Sequence[Row]) -> bool:
    """Whether a run here trained other parameters than those that it predicts with, as adapters beside a base that stands still."""
    return any(row["trained"] is not None and row["trained"] != row["parameters"] for row in rows if row.get("parameters") is not None)


def _setting(value: Any) -> str:
    return str(value).replace(" ", "")


def _text(name: str, value: Any) -> str:
    if value is None or isinstance(value, str):
        return value or ""
    if "/" in name:
        return f"{value:.4f}"
    return f"{value:,}" if name == "step" else short(value)


def draw_costs(out: epath.Path, rows: Sequence[Row], metric: str | None, settings: Sequence[str], source: str) -> list[str]:
    """Draws the metric of each run over its costs, where there are some that tell the runs apart; returns the names of the files.

    Args:    settings: keys whose values name the points.  source: of the runs, for the title.
    """
    scored = [row for row in rows if metric in row]
    costs = {title: np.array([_number(row[name]) for row in scored], np.float64) for name, title in COSTS.items()}
    costs = {name: x for name, x in costs.items() if np.isfinite(x).sum() > 1 and np.nanmax(x) > 1.01 * np.nanmin(x)}
    if "bytes" in costs:
        costs.pop(COSTS["parameters"], None)
    if not _adapted(rows):
        costs.pop(COSTS["trained"], None)
    if metric is None or not costs:
        return []
    labels = [" ".join(_setting(row.get(path)) for path in settings) or row["method"] or row["experiment"] for row in scored]
    title = f"{source}{': ' if settings else ''}{' '.join(path.rpartition('.')[2] for path in settings)}"
    intervals = np.array([(row.get("intervals") or {}).get(metric) or [math.nan] * 2 for row in scored], np.float64)
    pareto(costs, np.array([row[metric] for row in scored]), labels, out / "pareto.png", name=metric, intervals=intervals, title=title)
    return ["pareto.png"]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
