"""Methods by name, as conf/method/ describes them, and one explanation from beginning to end."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from research.core import folder
from research.core.build import build
from research.core.config import read_config, resolved
from research.core.errors import ConfigError, nearest
from research.explanation.model import Examples, Model
from research.explanation.result import Attribution, Method, Result

ROOM = "research.explanation."


def names() -> list[str]:
    """The methods of this room that conf/method/ describes."""
    return list(folder.described("method", ROOM))


def node(name: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of a method, with these settings changed.

    Raises:  ConfigError: no such method, no such setting of it, or one that has no default and is not given.
    """
    known = names()
    if name not in known:
        other = "" if name not in folder.described("method") else ": it compresses, see research.compress"
        raise ConfigError(f"method={name} explains nothing{other or nearest(name, known)}")
    found = _default(name)
    for setting in settings or {}:
        if setting not in found:
            raise ConfigError(f"{name} has no setting {setting!r}{nearest(setting, [key for key in found if not key.startswith('_')])}")
    merged = {**found, **(settings or {})}
    for setting, value in merged.items():
        if isinstance(value, str) and value == "???":
            raise ConfigError(f"{name}: {setting} is not given; add method.{setting}=VALUE, or method=[{{{name}:{{{setting}:VALUE}}}}]")
    return merged


def prepare(model: Model, name: str, config: Mapping[str, Any], given: bool) -> Method:
    """A method, built and held against the model before anything is computed.

    Args:    name: of the method.  config: its node.  given: whether there are examples to explain.
    Raises:  ConfigError: a method that does not fit the model, with those that do; a tap that does not exist; no examples where some are needed.
    """
    method: Method = build(config, where="method")
    if (why := method.fits(model)) is not None:
        raise ConfigError(f"method={name} does not fit this run: {why}; these do: {', '.join(fitting(model))}")
    at = getattr(method, "at", None)
    if isinstance(at, str) and not set("*?[") & set(at):
        model.require(at)
    if not given and method.reads == "examples":
        raise ConfigError(f"method={name} explains examples: give input=PATH, index=NUMBERS of the run's own data, or prompt=TEXT")
    return method


def apply(method: Method, model: Model, name: str, config: Mapping[str, Any], examples: Examples | None, seed: int = 0) -> Result:
    """What a prepared method finds, with its name and settings.

    Args:    name, config, examples: as of `prepare`.  seed: of what it draws by lot.
    Raises:  ConfigError: settings that do not fit the model or the examples; an attribution that is not finite.
    """
    result = method(model, examples, jax.random.key(seed))
    told = {key: value for key, value in config.items() if not key.startswith("_")}
    names = tuple(examples.names) if examples is not None and method.reads == "examples" else ()
    known = {"method": name, "settings": told, "names": names}
    if isinstance(result, Attribution):
        assert examples is not None
        _require_finite(result, name)
        return dataclasses.replace(result, **known, subject=(model, examples))
    return dataclasses.replace(result, **known)


def explain(model: Model, name: str, config: Mapping[str, Any], examples: Examples | None, seed: int = 0) -> Result:
    """One explanation: `prepare` and `apply`."""
    return apply(prepare(model, name, config, examples is not None), model, name, config, examples, seed)


def fitting(model: Model) -> list[str]:
    """The methods that can explain this model, at their default settings."""
    return [name for name in names() if build(_default(name), where="method").fits(model) is None]


def _default(name: str) -> dict[str, Any]:
    """The node in a method's file, which stands for itself: it refers to nothing else."""
    return resolved(read_config(folder.conf() / "method" / f"{name}.yaml"))


def _require_finite(result: Attribution, name: str) -> None:
    bad = [i for i, values in enumerate(result.values) if not np.isfinite(values).all()]
    if bad:
        raise ConfigError(f"method={name}: the attribution of example {bad[0]} is not finite; is the model's output there?")
