"""From a config node to an object: the one place where a name in a config becomes a call."""

import functools
import importlib
import inspect
import pkgutil
import typing
from collections.abc import Callable, Mapping
from typing import Any

from beartype.door import is_bearable
from beartype.roar import BeartypeException
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from research.core.errors import ConfigError, nearest
from research.core.overrides import explain

ROOMS = ("data", "models", "layers", "losses", "metrics", "objectives", "compression", "explanation")
ROOMS += tuple(f"training.{file}" for file in ("loop", "muon", "optimizer", "parallel", "schedule", "sparsify"))  # no file there that writes
LIBRARIES = ("optax", "flax.linen", "jax.nn")  # no jax.numpy, which can load pickles
ALLOWED = (*(f"research.{room}" for room in ROOMS), *LIBRARIES)  # where a target may live
_PLACES = f"research.{{{','.join(ROOMS)}}}, {', '.join(LIBRARIES)}"
_KEYS = ("_target_", "_args_", "_partial_", "_recursive_")


def build(node: Any, *, where: str = "", without: tuple[str, ...] = (), **extra: Any) -> Any:
    """The object that a config node describes, its nested nodes built first.

    Understands `_target_`, `_args_`, `_partial_` and `_recursive_` as Hydra's `instantiate` does, but lists become tuples (a linen module
    with a list cannot be hashed), arguments are checked against the target's signature and types, and a target outside `ALLOWED` is never
    imported: Hydra's own block list says of itself that it is no security boundary.

    Args:    node: a mapping with `_target_`, or any plain value, which comes back with its lists as tuples.
             where: the node's name in the config, for messages.  without: keys of the node that are not the target's arguments.
             extra: further arguments, which win over the node's.
    Raises:  ConfigError: a forbidden or unknown target, an unknown or missing argument, or one of the wrong type or range.
    """
    if isinstance(node, DictConfig | ListConfig):
        try:
            node = OmegaConf.to_container(node, resolve=True, throw_on_missing=True)
        except OmegaConfBaseException as error:
            raise explain(error) from error
    check_targets(node, where)
    return _build(node, where, without, extra)


def check_targets(node: Any, where: str = "") -> None:
    """Refuses a tree of nodes that names any target outside the allow-list; nothing is imported.

    Raises:  ConfigError: naming the target and the key that holds it.
    """
    if isinstance(node, Mapping):
        target = node.get("_target_", ALLOWED[0])
        if not isinstance(target, str) or not _allowed(target) or "__" in target:
            raise ConfigError(f"{where or 'config'}._target_={target!r} is not allowed: a target must live in {_PLACES}")
        for name, value in node.items():
            check_targets(value, f"{where}.{name}".lstrip("."))
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            check_targets(value, f"{where}[{i}]")


def _allowed(name: str) -> bool:
    return any(f"{name}.".startswith(f"{root}.") for root in ALLOWED)


def _build(node, where, without=(), extra=None):
    if isinstance(node, list | tuple):
        return tuple(_build(value, f"{where}[{i}]") for i, value in enumerate(node))
    if not isinstance(node, Mapping):
        return node
    if "_target_" not in node:
        return {name: _build(value, f"{where}.{name}") for name, value in node.items() if name not in without}
    child = _build if node.get("_recursive_", True) else lambda value, where: freeze(value)
    arguments = {name: child(value, f"{where}.{name}") for name, value in node.items() if name not in (*_KEYS, *without)}
    arguments |= extra or {}
    positional = child(node.get("_args_", ()), f"{where}._args_")
    target = _locate(node["_target_"], where)
    partial = bool(node.get("_partial_", False))
    arguments = _checked(target, positional, arguments, where, partial)
    if partial:
        return functools.partial(target, *positional, **arguments)
    try:
        return target(*positional, **arguments)
    except ValueError as error:  # a constructor that refuses a value
        raise ConfigError(f"{where}: {' '.join(str(error).split()) or 'a value is refused'}") from error


def freeze(node: Any) -> Any:
    """A plain config value as something hashable: mappings become sorted tuples of pairs, lists become tuples."""
    if isinstance(node, Mapping):
        return tuple(sorted((name, freeze(value)) for name, value in node.items()))
    return tuple(map(freeze, node)) if isinstance(node, list | tuple) else node


def thaw(node: Any) -> Any:
    """The inverse of `freeze` for a mapping: pairs become a dict again."""
    if isinstance(node, tuple) and node and all(isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) for pair in node):
        return {name: thaw(value) for name, value in node}
    return tuple(map(thaw, node)) if isinstance(node, tuple) else node


def _locate(target: str, where: str) -> Callable[..., Any]:
    """What the target names: a function or class of a module that the allow-list covers, never a method, which may well write files."""
    names = target.split(".")
    found: Any = importlib.import_module(names[0])
    for i in range(1, len(names)):
        if not inspect.ismodule(found):
            raise ConfigError(f"{where}._target_={target!r} is not allowed: {'.'.join(names[:i])} is no module, and its members are no targets")
        found = _member(found, names[i], f"{where}._target_={target!r}")
        if inspect.ismodule(found) and found.__name__ != ".".join(names[: i + 1]):
            raise ConfigError(f"{where}._target_={target!r} is not allowed: {found.__name__} only passes through there")
    home = getattr(found, "__module__", None) or ""
    library = home.partition(".")[0] in {root.partition(".")[0] for root in LIBRARIES}  # functions live in its private modules
    if not callable(found) or not (library or _allowed(home)):
        raise ConfigError(f"{where}._target_={target!r} is not allowed: it is no function or class of {_PLACES}")
    return found


def _member(parent: Any, name: str, target: str) -> Any:
    """An attribute or submodule."""
    if hasattr(parent, name):
        return getattr(parent, name)
    path = f"{getattr(parent, '__name__', '')}.{name}"
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and not f"{path}.".startswith(f"{error.name}."):
            raise ConfigError(f"{target} cannot be imported: {error}") from error
        modules = [module.name for module in pkgutil.iter_modules(getattr(parent, "__path__", ()))]
        public = [other for other in dir(parent) if not other.startswith("_")]
        raise ConfigError(f"{target} does not exist{nearest(name, {*modules, *public})}") from error
    except Exception as error:  # the file of a new model, say, has a fault
        raise ConfigError(f"{target} cannot be imported: {type(error).__name__}: {error}") from error


def _checked(target, positional, arguments, where, partial):
    """The arguments, each of the type that the signature names; an int where a float is wanted becomes one."""
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        return arguments
    known = signature.parameters
    open_ended = any(p.kind is p.VAR_KEYWORD for p in known.values())
    for name in arguments:
        if name not in known and not open_ended:
            raise ConfigError(
                f"{where}.{name}: {target.__name__} takes no {name!r}{nearest(name, [n for n in known if n not in ('parent', 'name')])}"
            )
    try:
        (signature.bind_partial if partial else signature.bind)(*positional, **arguments)
    except TypeError as error:
        raise ConfigError(f"{where}: {target.__name__}: {error}") from error
    hints = _hints(target)
    return {name: _typed(value, hints.get(name, Any), f"{where}.{name}") for name, value in arguments.items()}


@functools.lru_cache(maxsize=512)
def _hints(target):
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # a library's forward reference that only its own type checker resolves
        return {}


def _floats(value):
    """The value with ints as floats, within tuples and mappings too: YAML's 1 is meant where a float is wanted."""
    if type(value) is tuple:
        return tuple(map(_floats, value))
    if type(value) is dict:
        return {name: _floats(entry) for name, entry in value.items()}
    return float(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _fits(value, hint):
    """Whether the value is of the type; beartype looks at one entry of a tuple or mapping of any length, here each counts."""
    parts = [(entry,) for entry in value] if type(value) is tuple else [{n: v} for n, v in value.items()] if type(value) is dict else []
    any_length = bool(parts) and is_bearable(type(value)(), hint)
    return is_bearable(value, hint) and (not any_length or all(is_bearable(part, hint) for part in parts))


def _typed(value, hint, where):
    try:
        for candidate in (value, _floats(value)):
            if _fits(candidate, hint):
                return candidate
    except BeartypeException:  # a hint that cannot be checked
        return value
    shown = getattr(hint, "__name__", None) if inspect.isclass(hint) else str(hint)
    raise ConfigError(f"{where}={value!r} has the wrong type: expected {str(shown).replace('typing.', '')}, found {type(value).__name__}")
