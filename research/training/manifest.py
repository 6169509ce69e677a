"""The seal of a folder: what lies in it, to the byte, and that it is whole."""

import hashlib
import json
import os
from collections.abc import Iterator
from typing import Any

from etils import epath

from research.core.folder import write_json

NAME = "manifest.json"


def write(path: epath.Path, content: dict[str, Any]) -> None:
    """Seals a folder: writes its manifest, last of all files and whole or not at all.

    Args:    path: the folder.  content: JSON values to keep beside the sha256 of every file, which are added under `files`.
    Raises:  ResearchError: the disk is full or read-only.
    """
    content = {**content, "files": {file.relative_to(path).as_posix(): _digest(file, flush=True) for file in _files(path)}}
    write_json(path / NAME, {**content, "sha256": _seal(content)})


def read(path: epath.Path) -> dict[str, Any] | None:
    """A folder's manifest; None where it is missing or not as it was written, so that the folder counts as damaged."""
    try:
        content = json.loads((path / NAME).read_text())
        return content if content.pop("sha256") == _seal(content) else None
    except (OSError, ValueError, KeyError, AttributeError):
        return None


def damage(path: epath.Path, content: dict[str, Any]) -> str | None:
    """The first file that is missing, unreadable or not as it was sealed; None where all are."""
    for name, digest in content["files"].items():
        try:
            if _digest(path / name) != digest:
                return name
        except OSError:
            return name
    return None


def _digest(path: epath.Path, flush: bool = False) -> str:
    with path.open("rb") as file:
        if flush and os.path.exists(path):  # of a local file: a machine that loses its power must not leave a seal on what never reached the disk
            os.fsync(file.fileno())
        return hashlib.file_digest(file, "sha256").hexdigest()  # pyright: ignore[reportArgumentType]  # etils says IO; it is a binary file


def _files(path: epath.Path) -> Iterator[epath.Path]:
    for child in sorted(path.iterdir()):
        yield from _files(child) if child.is_dir() else (child,)


def _seal(content: dict[str, Any]) -> str:
    """The manifest's own sha256, so that it too is verified."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
