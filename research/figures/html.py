"""The shell of every HTML page: one file that needs nothing else, whatever it is shown in."""

import base64
import html

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #1f2933; max-width: 76rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; border-top: 1px solid #e4e7eb; padding-top: 1rem; } h3 { font-size: .95rem; margin-bottom: .2rem; }
.side { display: flex; flex-wrap: wrap; gap: 1.5rem; align-items: flex-start; } .side > div { max-width: 100%; } img { max-width: 100%; }
.tokens { font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.tokens span { border-radius: 3px; padding: 1px 0; }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 2px 10px 2px 0; text-align: left; vertical-align: top; }
th { color: #7b8794; vertical-align: bottom; } .number { text-align: right; font-variant-numeric: tabular-nums; } td.number { white-space: nowrap; }
tr.best td { font-weight: 600; background: #fdf1e7; } .lead { font-size: 1.05rem; }
.wide { overflow-x: auto; } .wide td, .wide th { padding-right: 8px; }
summary { cursor: pointer; color: #1f5fbf; margin: .8rem 0 .4rem; }
.warning { color: #c53030; } .faint { color: #7b8794; font-size: 13px; }
"""


def document(title: str, body: str) -> str:
    """The page as text.

    Args:    title: any text; escaped here.  body: HTML, escaped by whoever made it.
    """
    name = html.escape(title)
    return f'<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>{name}</title>\n<style>{STYLE}</style>\n{body}\n</html>\n'


def image(png: bytes, title: str = "", *, zoom: float = 0.58) -> str:
    """A picture that lies in the page itself.

    Args:    title: any text, for those who cannot see it; escaped here.  zoom: of its pixels.
    """
    data = base64.b64encode(png).decode()
    return f'<img alt="{html.escape(title, quote=True)}" src="data:image/png;base64,{data}" style="zoom:{f"{zoom:g}".lstrip("0")}">'
