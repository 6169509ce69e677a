"""Files: where the configs are, and how a small file is written whole or not at all."""

import json
import math
import os
import pathlib
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath

from research.core import hosts
from research.core.errors import ConfigError, ResearchError

_PACKAGE = pathlib.Path(__file__).resolve().parents[1]


def conf() -> epath.Path:
    """The folder conf/: inside the package where a wheel is installed, beside it in a checkout.

    Raises:  ConfigError: it is in neither place.
    """
    return _shipped("conf")


def experiments() -> epath.Path:
    """The folder experiments/, found as `conf` is."""
    return _shipped("experiments")


def _shipped(name: str) -> epath.Path:
    for place in (_PACKAGE, _PACKAGE.parent):
        if (place / name).is_dir():
            return epath.Path(place / name)
    raise ConfigError(f"there is no folder {name}/ in {_PACKAGE} or in {_PACKAGE.parent}: install the package again")


def described(group: str, room: str = "") -> dict[str, str]:
    """{option: the first line of its file, which says what it is} of the options in conf/<group>/, sorted.

    Args:    room: only those whose `_target_` begins so, as "research.explanation."; "": all.
    """
    root, found = conf() / group, {}
    for path in sorted(pathlib.Path(root).rglob("*.yaml")):
        text = path.read_text()
        target = re.search(r"^_target_:\s*(\S+)", text, re.MULTILINE)
        if not room or (target and target[1].startswith(room)):
            first = text.partition("\n")[0]
            found[path.relative_to(root).with_suffix("").as_posix()] = first.lstrip("# ") if first.startswith("#") else ""
    return found


def write_text(path: epath.PathLike, text: str) -> None:
    """Writes a file whole or not at all: a reader sees the old text or the new one, never a part, even after kill -9.

    Of several hosts the first one writes.

    Args:    path: local, or any address that etils.epath knows (gs://); its folder is made where it is missing.
    Raises:  ResearchError: the disk is full, read-only or not there; the file that stood there before stays.
    """
    if not hosts.first():
        return
    path = epath.Path(path)
    part = path.parent / f".{path.name}.{os.getpid()}.part"  # in the same folder, so that the rename is atomic
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            part.write_text(text)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ResearchError(f"cannot write {path}: {error.strerror or error}") from error


def write_json(path: epath.PathLike, value: Any) -> None:
    """Writes a value as JSON that any reader accepts: NaN and infinities, which JSON has not, become null.

    Args:    value: mappings, sequences, numbers and strings; numpy and JAX scalars and arrays are written as plain numbers and lists.
    Raises:  ResearchError: as `write_text`.  TypeError: a value of another type.
    """
    write_text(path, json.dumps(plain(value), indent=2, allow_nan=False) + "\n")


def read_json(path: epath.PathLike) -> Any:
    """The value in a JSON file.

    Raises:  ResearchError: the file is missing, unreadable or not JSON; the message names it, and the line of a fault.
    """
    path = epath.Path(path)
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as error:
        raise ResearchError(f"there is no file {path}") from error
    except OSError as error:
        raise ResearchError(f"cannot read {path}: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise ResearchError(f"{path} is not JSON: byte {error.start} is not UTF-8") from error
    except json.JSONDecodeError as error:
        raise ResearchError(f"{path} is not JSON: line {error.lineno}, column {error.colno}: {error.msg}") from error


def plain(value: Any) -> Any:
    """The value in JSON's own types: tuples as lists, arrays and their scalars as numbers, paths as strings, non-finite numbers as None."""
    if isinstance(value, Mapping):
        return {str(name): plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if hasattr(value, "__array__"):
        return plain(np.asarray(value).tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
