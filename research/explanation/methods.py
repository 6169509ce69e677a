"""Methods by name, as conf/method/ describes them, and one explanation from beginning to end."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import yaml

from research.core import folder
from research.core.build import build
from research.core.config import compose, resolved
from research.core.errors import ConfigError, nearest
from research.explanation.model import Examples, Model
from research.explanation.result import Attribution, Method, Result

ROOM = "research.explanation."


def names() -> list[str]:
    """The methods of this room that conf/method/ describes."""
    files = folder.conf() / "method"
    return sorted(path.stem for path in files.glob("*.yaml") if str(yaml.safe_load(path.read_text()).get("_target_", "")).startswith(ROOM))


def node(name: str, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The config of a method, with these settings changed.

    Raises:  ConfigError: no such method, or no such setting of it.
    """
    if name not in (known := names()):
        raise ConfigError(f"method={name} explains nothing{nearest(name, known)}")
    found = resolved(compose([f"method={name}"], verb="explain").method)
    for setting in settings or {}:
        if setting not in found:
            raise ConfigError(f"{name} has no setting {setting!r}{nearest(setting, [key for key in found if not key.startswith('_')])}")
    return {**found, **(settings or {})}


def explain(model: Model, name: str, config: Mapping[str, Any], examples: Examples | None, seed: int = 0) -> Result:
    """One explanation: the method built, held against the model, and applied.

    Args:    name: of the method.  config: its node.  examples: what to explain; None for a method that reads nothing.  seed: of what it draws by lot.
    Raises:  ConfigError: a method that does not fit the model, with those that do; settings that do not; no examples where some are needed.
    """
    method: Method = build(config, where="method")
    if (why := method.fits(model)) is not None:
        raise ConfigError(f"method={name} does not fit this run: {why}; these do: {', '.join(fitting(model))}")
    if examples is None and method.reads == "examples":
        raise ConfigError(f"method={name} explains examples: give input=PATH, index=NUMBERS of the run's own data, or prompt=TEXT")
    result = method(model, examples, jax.random.key(seed))
    told = {key: value for key, value in config.items() if not key.startswith("_")}
    known = {"method": name, "settings": told, "names": tuple(examples.names) if examples is not None else ()}
    if isinstance(result, Attribution):
        assert examples is not None
        _require_finite(result, name)
        return dataclasses.replace(result, **known, subject=(model, examples))
    return dataclasses.replace(result, **known)


def fitting(model: Model) -> list[str]:
    """The methods that can explain this model, at their default settings."""
    return [name for name in names() if build(node(name), where="method").fits(model) is None]


def _require_finite(result: Attribution, name: str) -> None:
    bad = [i for i, values in enumerate(result.values) if not np.isfinite(values).all()]
    if bad:
        raise ConfigError(f"method={name}: the attribution of example {bad[0]} is not finite; is the model's output there?")
