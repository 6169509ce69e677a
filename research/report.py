"""Compares runs: `python -m research.report runs='runs/**'`, one row each, and which of them are worth their size."""

import csv
import fnmatch
import io
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from research.compression import ledger as measure
from research.core import app
from research.core.config import read_config, resolved
from research.core.errors import ConfigError, ResearchError, nearest
from research.core.folder import read_json, write_json, write_text
from research.core.nodes import descend, near
from research.core.spec import zero_batch
from research.figures.compression import pareto, short
from research.figures.curves import HEADLINES
from research.run import Run
from research.training.run import CONFIG, RESULT

LEDGER = "compression.json"
SKIPPED = ("checkpoints", "data", "figures", "samples")  # folders of a run that hold no runs
COSTS = {  # that the figure draws
    "bytes": "bytes",
    "parameters": "parameters",
    "trained": "trained parameters",
    "flops_per_example": "FLOPs per example",
    "ms": "ms of a batch",
}
FACTS = ("experiment", "method", "status", "step", "parameters", "trained", "bytes", "disk_bytes", "flops_per_example", "ms", "seconds")
DONE = ("finished", "stopped_early")  # a run that did not end so is marked
NARROW = 14  # characters that a column of words has at least
WIDE = Console(width=10_000)  # on which a table takes what it needs
SPARE = ("parameters", "seconds", "experiment")  # columns that go first where the terminal is narrow
HEADINGS = {"flops_per_example": "FLOPs", "seconds": "s"}
Row = dict[str, Any]


def report(config: DictConfig) -> list[Row]:
    """One row for each run folder below `runs`, as it is printed and written to `out`.

    Bytes and latency are those of the ledger of a compression, which measured its parent as well; `ms` is the median of a full batch on the
    machine where that was, so only runs of one parent can be compared by it; with `latency` all runs are timed here, side by side. `seconds` are
    those of training, or of the compression with all its stages. `intervals` are the ledger's, {metric: [low, high]}. A folder that cannot be
    read is named and left out.

    Args:    config: as `research.compose([...], verb="report")` gives it.
    Raises:  ConfigError: a pattern that fits no run, or a column that no run has.
    """
    if config.latency is not None and (type(config.latency) is not int or config.latency < 1):
        raise ConfigError(f"latency={config.latency}: must be a number of examples, as 256, or null")
    rows, parents = [], {}
    for folder in find(config.runs):
        try:
            rows.append(_row(folder, parents, config.settings))
        except ResearchError as error:
            app.say(f"left out: {folder}: {error}")
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            app.say(f"left out: {folder}: its {CONFIG}, {RESULT} or {LEDGER} does not hold what a run writes")
    if not rows:
        raise ConfigError(f"runs={config.runs!r} fits no folder of a run; quote the pattern, and note that ** is any number of folders")
    for row in rows:
        row |= {name: value for name, value in parents.get(os.path.realpath(row["run"]), {}).items() if row.get(name) is None}
    for path in config.settings:
        if not any(path in row for row in rows):
            raise ConfigError(f"settings: no run here has {path!r}{near(path, resolved(read_config(epath.Path(rows[0]['run']) / CONFIG)))}")
    columns = ["run", *config.settings, *FACTS, *_metrics(rows)]
    metric = _metric(rows, config.metric)
    if config.latency is not None:
        _time(rows, config.latency)
    rows = _sorted(rows, config.sort, columns)
    _show(rows, metric, config.settings)
    if config.out:
        _write(epath.Path(config.out), rows, columns, metric, config)
    return rows


def main(argv: list[str] | None = None) -> int:
    """The exit code of the command line."""
    return app.main(report, "report", argv)


def find(pattern: str) -> Iterator[str]:
    """The folders of runs that fit the pattern, in order; links to folders are not followed."""
    parts = pathlib.Path(pattern).parts
    fixed = next((i for i, part in enumerate(parts) if set(part) & set("*?[")), len(parts))
    base = pathlib.Path(*parts[:fixed])
    for folder, names, files in os.walk(base):
        names[:] = sorted(name for name in names if name not in SKIPPED and not name.startswith("."))
        if (CONFIG in files or RESULT in files) and _fits(pathlib.Path(folder).relative_to(base).parts, parts[fixed:]):
            yield os.path.normpath(folder)


def _fits(names: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not names
    if pattern[0] == "**":
        return any(_fits(names[i:], pattern[1:]) for i in range(len(names) + 1))
    return bool(names) and fnmatch.fnmatchcase(names[0], pattern[0]) and _fits(names[1:], pattern[1:])


def _row(folder: str, parents: dict[str, Row], settings: Sequence[str]) -> Row:
    """What the files of one run tell; `parents` takes what its ledger tells of the run that it was made from."""
    path = epath.Path(folder)
    config = resolved(_held(path / CONFIG, read_config))
    result: Row = _held(path / RESULT, read_json) if (path / RESULT).exists() else {"status": "running"}
    made = config.get("compression") or []
    row = {"run": folder, **dict.fromkeys(FACTS), "experiment": config["name"], "method": " + ".join(entry["method"] for entry in made) or None}
    row |= {path: value for path, (value, rest) in ((path, descend(config, path)) for path in settings) if not rest}
    row |= {name: result.get(name) for name in ("status", "step", "flops_per_example")}
    row |= {"parameters": result.get("params"), "trained": result.get("params"), "seconds": result.get("train_s")}
    row |= {name: float(value) for name, value in (result.get("metrics") or {}).items() if "/" in name and isinstance(value, int | float)}
    if (path / LEDGER).exists() and "sizes" in (ledger := _held(path / LEDGER, read_json)):
        row |= _measured(ledger, "after") | {"seconds": (row["seconds"] or 0.0) + sum(stage["seconds"] for stage in ledger["stages"])}
        parent = made[-len(ledger["stages"])]["parent"]["run"]
        parents.setdefault(os.path.realpath(parent), _measured(ledger, "before"))
    return row


def _held(path: epath.Path, read: Any) -> Any:
    """The content of a file that lies in the folder itself.

    Raises:  ResearchError: it is a link, missing, or cannot be read.
    """
    if os.path.islink(path):
        raise ResearchError(f"{path.name} is a link")
    return read(path)


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


def _time(rows: Sequence[Row], examples: int) -> None:
    """Gives each run's `ms` the median of its prediction of so many examples, all timed in turn; a run that cannot be read is named."""
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


def _metrics(rows: Sequence[Row]) -> list[str]:
    return sorted({name for row in rows for name in row if "/" in name})


def _metric(rows: Sequence[Row], asked: str | None) -> str | None:
    """The metric that counts: the one that is asked for, else the main one that most runs have; None where no run has one.

    Raises:  ConfigError: no run has it.
    """
    known = _metrics(rows)
    if asked is not None and asked not in known:
        raise ConfigError(f"metric={asked!r}: no run here has it{nearest(asked, known)}")
    main = [f"{split}/{name}" for split in ("test", "validation", "train") for name in (*HEADLINES, "loss")]
    return asked or max((name for name in main if name in known), key=lambda name: sum(name in row for row in rows), default=None)


def _sorted(rows: list[Row], column: str | None, columns: Sequence[str]) -> list[Row]:
    """By a column, downwards where it begins with a minus; rows without a value come last."""
    name = (column or "run").removeprefix("-")
    if name not in columns:
        raise ConfigError(f"sort={column!r}: there is no such column{nearest(name, columns)}")
    filled, rest = [row for row in rows if row.get(name) is not None], [row for row in rows if row.get(name) is None]
    return sorted(filled, key=lambda row: _order(row[name]), reverse=(column or "").startswith("-")) + rest


def _order(value: Any) -> tuple[bool, Any]:
    """Numbers by size, then all else by its text."""
    return (False, value) if isinstance(value, int | float) else (True, str(value))


def _show(rows: Sequence[Row], metric: str | None, settings: Sequence[str]) -> None:
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
    names = [os.path.relpath(row["run"], common) + ("" if row["status"] in DONE else f" ({row['status']})") for row in rows]
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


def _write(out: epath.Path, rows: Sequence[Row], columns: Sequence[str], metric: str | None, config: DictConfig) -> None:
    """report.csv, report.json and, where there is a metric, the figure."""
    written = io.StringIO()
    table = csv.DictWriter(written, columns, restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(out / "report.csv", written.getvalue())
    write_json(out / "report.json", rows)
    names = ["report.csv", "report.json"]
    scored = [row for row in rows if metric in row]
    costs = {title: np.array([_number(row[name]) for row in scored], np.float64) for name, title in COSTS.items()}
    costs = {name: x for name, x in costs.items() if np.isfinite(x).sum() > 1 and np.nanmax(x) > 1.01 * np.nanmin(x)}  # that tell the runs apart
    if "bytes" in costs:
        costs.pop(COSTS["parameters"], None)
    if not _adapted(rows):
        costs.pop(COSTS["trained"], None)
    if metric is not None and costs:
        labels = [" ".join(_setting(row.get(path)) for path in config.settings) or row["method"] or row["experiment"] for row in scored]
        title = f"{config.runs}{': ' if config.settings else ''}{' '.join(path.rpartition('.')[2] for path in config.settings)}"
        intervals = np.array([(row.get("intervals") or {}).get(metric) or [math.nan] * 2 for row in scored], np.float64)
        pareto(costs, np.array([row[metric] for row in scored]), labels, out / "pareto.png", name=metric, intervals=intervals, title=title)
        names.append("pareto.png")
    for name in names:
        app.say(f"wrote {os.fspath(out / name)}")


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


if __name__ == "__main__":
    raise SystemExit(main())
