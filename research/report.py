"""Compares runs: `python -m research.report sweep=PATH`, with intervals, or `runs='runs/**'`, one row each, and which are worth their size."""

import csv
import fnmatch
import io
import math
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from etils import epath
from omegaconf import DictConfig
from rich.console import Console

from research.core import app
from research.core.errors import ConfigError, ResearchError, nearest
from research.core.folder import write_json, write_text
from research.core.nodes import near
from research.sweep import listing, page, pictures, scaling, settings
from research.sweep.comparison import Comparison, compare
from research.sweep.listing import Row
from research.sweep.settings import Outcome
from research.training.run import CONFIG, RESULT

SKIPPED = ("checkpoints", "data", "figures", "samples")  # folders of a run that hold no runs


def report(config: DictConfig) -> list[Row]:
    """One row for each run of a sweep, or for each run folder below `runs`, as it is printed and written to `out`.

    Runs of one experiment are also compared: those that differ in their seed alone are one setting, with a mean, intervals and corrected p-values;
    of a sweep this is what is printed. Bytes and latency are those of the ledger of a compression, which measured its parent as well; `ms` is the
    median of a full batch on the machine where that was, so only runs of one parent can be compared by it; with `latency` all runs are timed here,
    side by side. `seconds` are those of training, or of the compression with all its stages. `intervals` are the ledger's, {metric: [low, high]}. A
    folder that cannot be read is named and left out.

    Args:    config: as `research.compose([...], verb="report")` gives it.
    Raises:  ConfigError: a pattern that fits no run, a folder that is no sweep, a sweep of several experiments or without a finished run, a metric,
             key or column that no run has.
    """
    _check(config)
    parents: dict[str, Row] = {}
    outcomes, rows = [], []
    for outcome in settings.trials(config.sweep) if config.sweep else _found(config.runs):
        try:
            rows.append(listing.row_of(outcome, parents, config.settings))
            outcomes.append(outcome)
        except ResearchError as error:
            app.say(f"left out: {outcome.run}: {error}")
        except (AttributeError, KeyError, IndexError, TypeError, ValueError):
            app.say(f"left out: {outcome.run}: its {CONFIG}, {RESULT} or {listing.LEDGER} does not hold what a run writes")
    if not rows:
        raise ConfigError(
            f"sweep={config.sweep!r}: no run in it can be read"
            if config.sweep
            else f"runs={config.runs!r} fits no folder of a run; quote the pattern, and note that ** is any number of folders"
        )
    if config.name is not None:
        rows, outcomes = _named(config.name, rows, outcomes)
    for row in rows:
        row |= {name: value for name, value in parents.get(os.path.realpath(row["run"]), {}).items() if row.get(name) is None}
    for path in config.settings:
        if not any(path in row for row in rows):
            raise ConfigError(f"settings: no run here has {path!r}{near(path, _first(outcomes))}")
    comparison, law = _compared(config, rows, outcomes)
    metric = comparison.metric if comparison else listing.main_metric(rows, config.metric)
    columns = ["run", *dict.fromkeys((*config.settings, *_swept(rows, comparison))), *listing.FACTS, *listing.metrics(rows)]
    if config.latency is not None:
        listing.time(rows, config.latency)
    rows = listing.ordered(rows, config.sort, columns)
    if not config.sweep or config.settings or config.latency is not None:
        listing.show(rows, metric, config.settings)
    if comparison and (config.sweep or len(comparison.lines) < len(comparison.outcomes)):
        _tell(comparison)
    told = law.told(config.budget or law.largest) if law else None
    for line in page.law_lines(told) if told else ():
        app.say(line)
    if out := config.out or (os.path.join(config.sweep, "report") if config.sweep else None):
        _write(epath.Path(out), rows, columns, metric, config, comparison, law)
    return rows


def _check(config: DictConfig) -> None:
    if config.latency is not None and (type(config.latency) is not int or config.latency < 1):
        raise ConfigError(f"latency={config.latency}: must be a number of examples, as 256, or null")
    if config.budget is not None and not (isinstance(config.budget, int | float) and 0 < config.budget < math.inf):
        raise ConfigError(f"budget={config.budget}: must be a number of FLOPs, as 1.0e15, or null")
    if config.budget is not None and not config.scaling:
        raise ConfigError(f"budget={config.budget} is of a scaling law: add scaling=true")


def _found(pattern: str) -> Iterator[Outcome]:
    """The runs that fit the pattern; what cannot be read is named and left out."""
    for folder in find(pattern):
        try:
            yield settings.read(folder)
        except ResearchError as error:
            app.say(f"left out: {folder}: {error}")


def _named(name: str, rows: list[Row], outcomes: list[Outcome]) -> tuple[list[Row], list[Outcome]]:
    """The runs of one experiment, and the trials that ended before they knew theirs."""
    kept = [row["experiment"] in (name, None) for row in rows]
    if not any(row["experiment"] == name for row in rows):
        raise ConfigError(f"name={name!r}: no run here has it{nearest(name, {row['experiment'] for row in rows if row['experiment']})}")
    return [row for row, keep in zip(rows, kept, strict=True) if keep], [outcome for outcome, keep in zip(outcomes, kept, strict=True) if keep]


def _first(outcomes: Sequence[Outcome]) -> Mapping[str, Any]:
    return next((outcome.config for outcome in outcomes if outcome.config), {})


def _compared(config: DictConfig, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> tuple[Comparison | None, scaling.Law | None]:
    """The comparison and, if asked for, the scaling law; None where loose runs are of several kinds, which is said."""
    metric = config.metric
    if config.scaling and metric is None:
        metric = next((name for name in ("test/loss", "validation/loss") if any(name in row for row in rows)), None)
    compressed = any(row["method"] for row in rows)
    if not config.sweep and not config.scaling and (compressed or len(rows) < 2):
        return None, None  # one row each says it all
    try:
        comparison = compare(outcomes, metric)
        pictures.pair_of(comparison, config.heat)  # before anything is written
    except ConfigError as error:
        if config.sweep or config.scaling or config.heat is not None or (config.metric is not None and "metric=" in str(error)):
            raise
        app.say(f"no settings are compared: {error}")
        return None, None
    for row, outcome in zip(rows, outcomes, strict=True):
        values = next(line.setting.values for line in comparison.lines if outcome in line.setting.outcomes)
        row |= {key: value for key, value in values.items() if key not in row} | {"seed": outcome.replicate.partition("seed=")[2]}
    return comparison, scaling.fit(scaling.points(outcomes, comparison.metric)) if config.scaling else None


def _swept(rows: Sequence[Row], comparison: Comparison | None) -> list[str]:
    """Columns that a comparison adds."""
    return [] if comparison is None else [*comparison.keys, "seed", *(["reason"] if any(row.get("reason") for row in rows) else [])]


def _tell(comparison: Comparison) -> None:
    """Prints the settings, the runs that have no score, and what may be said of the best."""
    console = Console(markup=False, highlight=False)
    console.print(page.printed(comparison, console.width))
    if (rest := len(comparison.lines) - page.PRINTED) > 0:
        console.print(f"and {rest} settings more")
    for name, state, reason in page.failures(comparison)[: page.PRINTED]:
        console.print(f"{state}: {name}{': ' if reason else ''}{reason}", soft_wrap=True)
    console.print(comparison.verdict(), soft_wrap=True)


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


def _write(
    out: epath.Path,
    rows: Sequence[Row],
    columns: Sequence[str],
    metric: str | None,
    config: DictConfig,
    comparison: Comparison | None,
    law: scaling.Law | None,
) -> None:
    """report.csv and report.json of the runs; their settings as tables, figures and a page where they are compared."""
    written = io.StringIO()
    table = csv.DictWriter(written, columns, restval="", extrasaction="ignore", lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_text(out / "report.csv", written.getvalue())
    flops = (config.budget or law.largest) if law else math.nan
    told = law.told(flops) if law else None
    write_json(out / "report.json", {"runs": rows, **({"comparison": page.described(comparison, told)} if comparison else {})})
    names = ["report.csv", "report.json"]
    if not config.sweep or config.settings or config.latency is not None:
        names += listing.draw_costs(out, rows, metric, config.settings, config.sweep or config.runs)
    if comparison:
        source = f"sweep={config.sweep}" if config.sweep else f"runs={config.runs}"
        drawn = [pictures.scaling(law, flops, comparison.metric, out)] if law else []
        drawn += pictures.pictures(comparison, out, pictures.pair_of(comparison, config.heat))
        names += [*page.write(comparison, out, drawn, source=source, law=told), *(picture.file for picture in drawn)]
    for name in names:
        app.say(f"wrote {os.fspath(out / name)}")


if __name__ == "__main__":
    raise SystemExit(main())
