"""A bar on the terminal for what takes long."""

from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

T = TypeVar("T")

_shown = False  # whether a bar is on the screen


def track(iterable: Iterable[T], description: str, total: float | None = None) -> Iterator[T]:
    """The items of the iterable, with a bar on stderr that says how many have been worked on; in a terminal only, gone at the end.

    Inside another one that is still running it shows nothing: the outer bar tells how far the whole is.

    Args:    description: what is done, in a word or two.  total: how many items there are; None: as many as the iterable has, where it knows.
    """
    global _shown
    if _shown:
        yield from iterable
        return
    console = Console(stderr=True)
    columns = TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        _shown = True
        try:
            yield from progress.track(iterable, total=total, description=description)
        finally:
            _shown = False
