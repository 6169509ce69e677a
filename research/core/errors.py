"""Errors that a person can act on: one line each, with an exit code that a script can act on."""

import difflib
from collections.abc import Iterable


class ResearchError(Exception):
    """Anything that the user can mend; its text is one line that names the bad value, its origin and the nearest right one."""

    exit_code = 1


class DataError(ResearchError):
    """The data is missing, unreadable or not what its spec says."""


class ConfigError(ResearchError):
    """The configuration cannot be run."""

    exit_code = 2


class DivergedError(ResearchError):
    """Too many updates in a row had a non-finite loss or gradient."""

    exit_code = 3


class CheckpointError(ResearchError):
    """A checkpoint is damaged, or belongs to another model."""

    exit_code = 4


class FolderInUseError(ResearchError):
    """Another process writes to this run folder."""

    exit_code = 5


class Interrupted(ResearchError):
    """The run was asked to stop, has saved, and can be resumed by the same command."""

    exit_code = 75


def nearest(word: str, choices: Iterable[str]) -> str:
    """A hint `; did you mean 'x'?`, or the list of choices where none is near.

    Args:    word: what was written.  choices: what would have been right.
    Returns: text to append to an error's line; empty where there are no choices.
    """
    choices = sorted(map(str, choices))
    near = difflib.get_close_matches(str(word), choices, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {near[0]!r}?"
    shown = ", ".join(choices[:12]) + (", …" if len(choices) > 12 else "")
    return f"; choose from: {shown}" if choices else ""
