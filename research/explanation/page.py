"""One page that shows explanations: a single HTML file that needs nothing else."""

import html
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from research.explanation.result import Attribution, Result, one_each
from research.figures import explanation as draw
from research.figures import html as shell


def page(title: str, results: Sequence[Result], *, facts: Mapping[str, Any], warnings: Sequence[str] = ()) -> str:
    """The page: for each example its explanations side by side, then what was found about the whole, then the numbers.

    Every text is escaped: names, tokens and settings may hold anything.

    Args:    facts: of the run, as a table above.  warnings: what a reader must know first.
    """
    names = next((result.names for result in results if result.names), ())
    parts = [f"<h1>{html.escape(title)}</h1>", _mapping(facts), *(f'<p class="warning">{html.escape(text)}</p>' for text in warnings)]
    for i, name in enumerate(names):
        blocks = [f"<div>{''.join(map(_panel, panels))}{_told(result, i)}</div>" for result in results if (panels := result.panels(i))]
        if blocks:
            first = next((result.pictured(i) for result in results if isinstance(result, Attribution)), ())
            blocks = [*(f"<div>{_panel(panel)}</div>" for panel in first), *blocks]
            parts.append(f'<h2>{html.escape(str(name))}</h2><div class="side">{"".join(blocks)}</div>')
    for result in results:
        if drawn := getattr(result, "drawn", ()):
            blocks = "".join(f"<div>{_panel(panel)}</div>" for panel in drawn)
            parts.append(f'<h2>{html.escape(result.method)}</h2><div class="side">{blocks}</div>')
    for result in results:
        parts.append(f"<h3>{html.escape(result.method)}</h3>{_mapping({**result.settings, **_short(result.summary())})}")
    return shell.document(title, "\n".join(parts))


def _panel(panel: draw.Panel) -> str:
    title = f"<h3>{html.escape(panel.title)}</h3>" if panel.title and isinstance(panel, draw.Tokens | draw.Rows) else ""
    if isinstance(panel, draw.Tokens):
        return title + _tokens(panel)
    if isinstance(panel, draw.Rows):
        return title + _table(panel)
    return shell.image(draw.png(panel), panel.title)


def _tokens(panel: draw.Tokens) -> str:
    most = draw.strength(panel.values)
    spans = []
    for token, value in zip(panel.tokens, panel.values, strict=True):
        share = float(np.clip(value / most, -1.0, 1.0)) if np.isfinite(value) else 0.5
        rgb = "128,128,128" if not np.isfinite(value) else "197,48,48" if share > 0 else "31,95,191"
        shown = html.escape(draw.visible(token)) + ("\n" if "\n" in token else "")
        spans.append(f'<span title="{value:.4g}" style="background:rgba({rgb},{abs(share) * 0.6:.3f})">{shown}</span>')
    finite = np.asarray(panel.values)[np.isfinite(panel.values)]
    meaning = "red speaks for the output, blue against it" if (finite < 0).any() else "the redder, the more"
    return f'<div class="tokens">{"".join(spans)}</div><p class="faint">{meaning}; full colour: {most:.3g}; hover for the value</p>'


def _table(panel: draw.Rows) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in panel.columns)
    rows = "".join("<tr>" + "".join(f"<td>{html.escape(draw.visible(draw.cell_text(cell)))}</td>" for cell in row) + "</tr>" for row in panel.rows)
    return f"<table><tr>{head}</tr>{rows}</table>"


def _told(result: Result, i: int) -> str:
    """The numbers of one example, below its picture."""
    told = [f"{name.replace('_', ' ')} {draw.cell_text(values[i])}" for name, values in one_each(result).items()]
    return f'<p class="faint">{html.escape(", ".join(told))}</p>' if told else ""


def _short(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Without what is told below each picture."""
    return {name: value for name, value in summary.items() if not isinstance(value, list | tuple | np.ndarray)}


def _mapping(values: Mapping[str, Any]) -> str:
    shown = {name: _told_value(value) for name, value in values.items()}
    rows = "".join(
        f"<tr><th>{html.escape(str(name).replace('_', ' '))}</th><td>{html.escape(text)}</td></tr>" for name, text in shown.items() if text
    )
    return f"<table>{rows}</table>"


def _told_value(value: Any) -> str:
    """A setting or a fact as text; empty where there is nothing to tell."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}={_told_value(x)}" for name, x in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(_told_value, value))
    return "" if value is None else draw.cell_text(value)
