"""Configs as plain trees: what stands at a dotted path, and what was meant where nothing stands."""

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import OmegaConf

from research.core.errors import nearest


def plain(config: Any) -> Any:
    """The config as dicts and lists, interpolations as they are written, Hydra's node left out."""
    tree = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    return {name: value for name, value in tree.items() if name != "hydra"} if isinstance(tree, dict) else tree


def paths(tree: Any, prefix: str = "") -> Iterator[str]:
    """The dotted path of every node and leaf below the root."""
    for name, value in tree.items() if isinstance(tree, Mapping) else ():
        yield (path := f"{prefix}{name}")
        yield from paths(value, f"{path}.")


def leaves(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted path, value as written) of everything that is no mapping or list; an empty one counts as a leaf."""
    tree = plain(config)
    for name, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        if value and isinstance(value, Mapping | list):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def near(path: str, tree: Any) -> str:
    """A hint at the path that was meant: the nearest of the whole tree, else the names that stand where the path leaves it."""
    name = path.rpartition(".")[2]  # must be near by itself: `optimizer.lr` is not `optimizer.b2`, however much of the path they share
    others = [other for other in paths(tree) if not path.startswith(f"{other}.") and difflib.get_close_matches(name, [other.rpartition(".")[2]])]
    close = difflib.get_close_matches(path, others, n=1, cutoff=0.7)
    parent, rest = descend(tree, path)
    return nearest(path, close) if close or not rest else nearest(rest[0], parent if isinstance(parent, Mapping) else ())


def descend(tree: Any, path: str) -> tuple[Any, list[str]]:
    """The deepest node on the way along the path, and what of the path is left."""
    names = [name for name in re.split(r"[.\[\]]+", path) if name]
    while names:
        if isinstance(tree, Mapping) and names[0] in tree:
            tree = tree[names[0]]
        elif isinstance(tree, list) and names[0].isdigit() and int(names[0]) < len(tree):
            tree = tree[int(names[0])]
        else:
            break
        names = names[1:]
    return tree, names


def is_call(node: Any) -> bool:
    """Whether the node describes an object to build, `_target_` and its arguments."""
    return isinstance(node, Mapping) and "_target_" in node


def below_call(tree: Any, path: str) -> bool:
    """Whether a node on the way along the path describes an object to build, so that the path is one of its arguments."""
    names = path.split(".")
    return any(is_call(descend(tree, ".".join(names[:i]))[0]) for i in range(1, len(names)))
