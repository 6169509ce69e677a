"""A comparison as tables: for the terminal, CSV, Markdown, JSON, and one HTML page that needs nothing else."""

import csv
import dataclasses
import html
import io
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath
from rich.console import Console
from rich.table import Table

from research.core.folder import write_text
from research.figures import html as shell
from research.figures.numbers import short
from research.sweep.comparison import Comparison, Line, written
from research.sweep.scaling import NAMES
from research.sweep.settings import shorten, shown

METHOD = (
    "A setting is all runs with the same config but for their seed (or fold). Runs that failed, were pruned or still run are counted and left out of "
    "its mean.",
    "t: mean ± t of n - 1 degrees of freedom times the standard error. Bootstrap: bias-corrected and accelerated, of 4,999 resamples with a fixed "
    "seed; of five seeds it is too narrow (it covers the mean in about 82 % of cases).",
    "Difference: this setting minus the first one, over the seeds that both have. p: paired t, two-sided (Welch's where fewer than two seeds are "
    "shared), corrected for the number of comparisons by Holm. Sign flips: p of the exact permutation test, not corrected; of five pairs it is 0.06 "
    "at least.",
    "The first setting is marked as best only where each corrected p is below 0.05. The same seeds chose it, so its mean is a little too good.",
    "Peak bytes are those of the whole process: of trials that share one process, of all before it as well.",
)
PRINTED = 40  # settings in the terminal
MISSED = "without a score"


@dataclasses.dataclass(frozen=True)
class Picture:
    """A figure that was drawn.

    Args:    file: its name in the folder of the report.  told: what it shows, for the page.
    """

    file: str
    title: str
    told: str = ""


def table(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """(headings, rows) of the settings, best first, as text."""
    keys, several = comparison.keys, any(line.summary.n > 1 for line in comparison.scored)
    costs = [name for name in ("seconds", "flops", "bytes") if any(name in line.cost for line in comparison.lines)]
    missed = any(line.setting.missed for line in comparison.lines)
    names = shorten(keys)
    spread = ["deviation", "95 % t", "95 % bootstrap", "difference", "p", "sign flips"] if several else []
    heads = [
        *(names[key] for key in keys),
        "runs",
        *([MISSED] if missed else []),
        comparison.metric,
        *spread,
        *({"flops": "FLOPs", "bytes": "peak bytes"}.get(c, c) for c in costs),
    ]
    rows = []
    for line in comparison.lines:
        s, gap = line.summary, line.gap
        row = [shown(line.setting.values[key]) if line.setting.values.get(key) is not None else "" for key in keys]
        row += [str(s.n), *([_missed(line)] if missed else []), written(s.mean)]
        if several:
            row += [written(s.deviation), _interval(s.t), _interval(s.bootstrap)]
            row += ["", "", ""] if gap is None or not s.n else [_difference(line), _p(line.p), _p(gap.permutation)]
        row += [short(line.cost[name]) if name in line.cost else "" for name in costs]
        rows.append(row)
    return heads, rows


def printed(comparison: Comparison, width: int) -> Table:
    """The settings for a terminal of so many characters: of the columns that do not fit, those that can be spared are left out."""
    heads, rows = table(comparison)
    spared = ["95 % bootstrap", "sign flips", "peak bytes", "FLOPs", "deviation", "seconds", "difference"]
    wide = Console(width=10_000)
    kept = [head for head in heads if head not in spared[:3]]
    for name in (None, *spared[3:]):
        kept = [head for head in kept if head != name]
        shown = Table(box=None, header_style="bold", pad_edge=False)
        for i, head in enumerate(heads):
            if head in kept:
                if i < len(comparison.keys) or head == MISSED:
                    shown.add_column(head, overflow="fold")
                else:
                    shown.add_column(head.replace("/", "/\n"), justify="right", no_wrap=True)
        for row in rows[:PRINTED]:
            shown.add_row(*(cell for head, cell in zip(heads, row, strict=True) if head in kept))
        if wide.measure(shown).maximum <= width:
            break
    return shown


def _interval(ends: Sequence[float]) -> str:
    return "" if math.isnan(ends[0]) else f"{written(ends[0])} to {written(ends[1])}"


def _difference(line: Line) -> str:
    """This setting's mean minus the first one's, with its interval."""
    assert line.gap is not None
    low, high = line.gap.interval
    ends = "" if math.isnan(low) else f" ({_signed(-high)} to {_signed(-low)})"
    return _signed(-line.gap.mean) + ends + ("" if line.gap.pairs or math.isnan(low) else " unpaired")


def _signed(value: float) -> str:
    return f"{value:+.4f}" if abs(value) < 1000 else f"{value:+.4g}"


def _p(value: float) -> str:
    return "" if math.isnan(value) else "< 0.0001" if value < 1e-4 else f"{value:.4f}"


def _missed(line: Line) -> str:
    return ", ".join(f"{count} {state.replace('_', ' ')}" for state, count in line.setting.missed.items())


def failures(comparison: Comparison) -> list[tuple[str, str, str]]:
    """(setting with seed, state, reason) of each run without a score."""
    found = []
    for line in comparison.lines:
        for outcome in line.setting.outcomes:
            if outcome not in line.setting.scored:
                found.append((f"{line.setting.name} {outcome.replicate}", outcome.state.replace("_", " "), outcome.reason))
    return found


def counts(comparison: Comparison) -> str:
    """As "29 finished, 3 failed"."""
    states = [outcome.state for outcome in comparison.outcomes]
    return ", ".join(f"{states.count(state)} {state.replace('_', ' ')}" for state in dict.fromkeys(sorted(states)))


def law_lines(told: Mapping[str, Any]) -> list[str]:
    """A scaling law in words."""
    fit = told["fit"]
    numbers = ", ".join(f"{name} = {fit[name]['value']:.4g} ({fit[name]['interval'][0]:.3g} to {fit[name]['interval'][1]:.3g})" for name in NAMES)
    low, high = told["parameters_interval"]
    beyond = ", which is more than any run took" if told["beyond_runs"] else ""
    lines = [
        f"{told['law']} over {told['runs']} runs: {numbers}; log loss is off by {told['error_of_log_loss']:.2%}",
        f"best size for {told['budget_flops']:.3g} FLOPs{beyond}: {_rounded(told['parameters'])} parameters ({_rounded(low)} to {_rounded(high)}) on "
        f"{_rounded(told['tokens'])} tokens, loss {told['loss']:.4f}",
    ]
    if not told["determined"]:
        lines.append("a number of the law lies at the end of its range: these runs do not determine it")
    for what, value, (least, most) in (("parameters", told["parameters"], told["sizes"]), ("tokens", told["tokens"], told["lengths"])):
        if not least <= value <= most:
            side = "fewer" if value < least else "more"
            lines.append(f"that is {side} {what} than any run had ({_rounded(least)} to {_rounded(most)}): run such ones before you rely on it")
    return lines


def _rounded(value: float) -> str:
    """A count with three digits that say something: 1234567 is 1,230,000."""
    return f"{float(f'{value:.3g}'):,.0f}"


def write(
    comparison: Comparison, out: epath.Path, pictures: Sequence[Picture], *, source: str, law: Mapping[str, Any] | None, warnings: Sequence[str] = ()
) -> list[str]:
    """Writes settings.csv, report.md and report.html; returns their names.

    Args:    pictures: that lie in `out`.  source: what was reported, as typed.  law: of `Law.told`.  warnings: what a reader must know first.
    """
    title = f"{comparison.experiment}: {comparison.metric}"
    write_text(out / "settings.csv", _csv(comparison))
    write_text(out / "report.md", _markdown(comparison, pictures, title, source, law, warnings))
    write_text(out / "report.html", _html(comparison, out, pictures, title, source, law, warnings))
    return ["settings.csv", "report.md", "report.html"]


def _csv(comparison: Comparison) -> str:
    """A row for each setting, numbers in full; of metrics other than the main one the mean and deviation."""
    metrics = sorted({name for outcome in comparison.outcomes for name in outcome.metrics} - {comparison.metric})
    spread = ["mean", "deviation", "t_low", "t_high", "bootstrap_low", "bootstrap_high"]
    gaps = ["difference", "difference_low", "difference_high", "pairs", "p", "p_corrected", "p_sign_flips"]
    others = [f"{name} {what}" for name in metrics for what in ("mean", "deviation")]
    file = io.StringIO()
    table = csv.writer(file, lineterminator="\n")
    table.writerow([*comparison.keys, "metric", "n", "without_score", *spread, *gaps, "seconds", "flops", "bytes", *others])
    for line in comparison.lines:
        s, gap = line.summary, line.gap
        row: list[Any] = [line.setting.values.get(key) for key in comparison.keys]
        row += [comparison.metric, s.n, sum(line.setting.missed.values()), s.mean, s.deviation, *s.t, *s.bootstrap]
        row += [None] * 7 if gap is None else [-gap.mean, -gap.interval.high, -gap.interval.low, gap.pairs, gap.p, line.p, gap.permutation]
        row += [line.cost.get(name) for name in ("seconds", "flops", "bytes")]
        for name in metrics:
            values = list(line.setting.scores(name).values())
            row += [np.mean(values) if values else None, np.std(values, ddof=1) if len(values) > 1 else None]
        table.writerow(["" if value is None or (isinstance(value, float) and math.isnan(value)) else value for value in row])
    return file.getvalue()


def described(comparison: Comparison, law: Mapping[str, Any] | None) -> dict[str, Any]:
    """The comparison for report.json."""
    lines = []
    for line in comparison.lines:
        s, gap = line.summary, line.gap
        held = {"n": s.n, "mean": s.mean, "deviation": s.deviation, "t_interval": list(s.t), "bootstrap_interval": list(s.bootstrap)}
        if gap is not None:
            ends = [-gap.interval.high, -gap.interval.low]
            held["difference"] = {
                "mean": -gap.mean,
                "interval": ends,
                "pairs": gap.pairs,
                "p": gap.p,
                "p_corrected": line.p,
                "p_sign_flips": gap.permutation,
            }
        lines.append(
            {"values": dict(line.setting.values), **held, "scores": dict(line.scores), "cost": line.cost, "without_score": line.setting.missed}
        )
    importance = comparison.importance
    return {
        "experiment": comparison.experiment,
        "metric": comparison.metric,
        "keys": list(comparison.keys),
        "verdict": comparison.verdict(),
        "best": dict(comparison.scored[0].setting.values) if comparison.apart else None,
        "settings": lines,
        "failures": [dict(zip(("run", "state", "reason"), row, strict=True)) for row in failures(comparison)],
        "importance": None if importance is None else {"shares": importance.shares, "explained": importance.explained},
        "scaling": law,
    }


def _trials(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    heads = [*shorten(comparison.keys).values(), "", "state", comparison.metric, "seconds", "FLOPs", "folder"]
    rows = []
    for line in comparison.lines:
        for outcome in line.setting.outcomes:
            cost, score = outcome.cost, outcome.metrics.get(comparison.metric, math.nan)
            row = [shown(line.setting.values.get(key)) for key in comparison.keys]
            row += [outcome.replicate, outcome.state.replace("_", " "), written(score)]
            rows.append([*row, *(short(cost[name]) if name in cost else "" for name in ("seconds", "flops")), os.path.basename(outcome.run)])
    return heads, rows


def _facts(comparison: Comparison, source: str) -> dict[str, str]:
    seeds = sorted({outcome.replicate for outcome in comparison.outcomes}, key=lambda text: [int(n) for n in re.findall(r"\d+", text)])
    listed = ", ".join(seeds[:10]) + (f" and {len(seeds) - 10} more" if len(seeds) > 10 else "")
    held = {"runs": counts(comparison), "settings": str(len(comparison.lines)), "seeds": listed, "swept": ", ".join(comparison.keys)}
    devices = dict.fromkeys(str(outcome.result["device"]) for outcome in comparison.outcomes if outcome.result.get("device"))
    return {"from": source, **{name: text for name, text in held.items() if text}, **({"device": "; ".join(devices)} if devices else {})}


def _markdown(comparison, pictures, title, source, law, warnings) -> str:
    def cell(text: str) -> str:
        return re.sub(r"([\\`*_{}\[\]<>|#])", r"\\\1", " ".join(text.split())) if text else ""

    def rows(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
        return [f"| {' | '.join(map(cell, row))} |" for row in (heads, *body)]

    def grid(heads: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
        top, *rest = rows(heads, body)
        return [top, "|" + "---|" * len(heads), *rest, ""]

    lines = [f"# {cell(title)}", "", *(f"**{cell(text)}**\n" for text in warnings), cell(comparison.verdict()), ""]
    lines += [f"- {name}: {cell(text)}" for name, text in _facts(comparison, source).items()]
    lines += ["", *grid(*table(comparison))]
    if law:
        lines += ["## Scaling law", "", *(f"{cell(text)}\n" for text in law_lines(law))]
    for picture in pictures:
        lines += [
            f"## {cell(picture.title)}",
            "",
            *([cell(picture.told), ""] if picture.told else []),
            f"![{cell(picture.title)}]({picture.file})",
            "",
        ]
    if missed := failures(comparison):
        lines += ["## Runs without a score", "", *grid(("run", "state", "reason"), missed)]
    return "\n".join([*lines, "## How it was computed", "", *(f"- {cell(text)}" for text in METHOD)]) + "\n"


def _html(comparison: Comparison, out: epath.Path, pictures: Sequence[Picture], title, source, law, warnings) -> str:
    escape = html.escape
    parts = [f"<h1>{escape(title)}</h1>", *(f'<p class="warning">{escape(text)}</p>' for text in warnings)]
    parts.append(f'<p class="lead">{escape(comparison.verdict())}</p>')
    facts = _facts(comparison, source).items()
    parts.append("<table>" + "".join(f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>" for name, text in facts) + "</table>")
    parts.append("<h2>Settings</h2>")
    heads, rows = table(comparison)
    parts.append(_folded(heads, rows, numbers=len(comparison.keys), best=comparison.apart, what="settings"))
    if law:
        parts.append("<h2>Scaling law</h2>" + "".join(f"<p>{escape(text)}</p>" for text in law_lines(law)))
    for picture in pictures:
        told = f'<p class="faint">{escape(picture.told)}</p>' if picture.told else ""
        parts.append(f"<h2>{escape(picture.title)}</h2>{told}{shell.image((out / picture.file).read_bytes(), picture.title)}")
    if missed := failures(comparison):
        parts.append("<h2>Runs without a score</h2>" + _grid(("run", "state", "reason"), missed, numbers=3))
    heads, rows = _trials(comparison)
    inner = _grid(heads, rows, numbers=len(comparison.keys) + 2)
    parts.append(f"<h2>All runs</h2><details><summary>{len(rows)} runs</summary>{inner}</details>")
    parts.append("<h2>How it was computed</h2>" + "".join(f'<p class="faint">{escape(text)}</p>' for text in METHOD))
    return shell.document(title, "\n".join(parts))


def _folded(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int, best: bool, what: str) -> str:
    """The table; of a long one the rest is shown when asked for."""
    first = _grid(heads, rows[:PRINTED], numbers=numbers, best=best)
    if len(rows) <= PRINTED:
        return first
    rest = _grid(heads, rows[PRINTED:], numbers=numbers)
    return f"{first}<details><summary>{len(rows) - PRINTED} more {what}</summary>{rest}</details>"


def _grid(heads: Sequence[str], rows: Sequence[Sequence[str]], *, numbers: int, best: bool = False) -> str:
    """Args: numbers: columns from this one on are numbers, aligned at the right.  best: the first row is marked."""
    kinds = ["" if i < numbers or head == MISSED else ' class="number"' for i, head in enumerate(heads)]
    top = "".join(f"<th{kind}>{html.escape(name)}</th>" for kind, name in zip(kinds, heads, strict=True))
    body = []
    for number, row in enumerate(rows):
        cells = "".join(f"<td{kind}>{html.escape(text)}</td>" for kind, text in zip(kinds, row, strict=True))
        body.append(f"<tr{' class=' + chr(34) + 'best' + chr(34) if best and number == 0 else ''}>{cells}</tr>")
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(body)}</table></div>'
