"""Pytree paths, globs, the canonical (unstacked) tree, and the hash of a state."""

import functools
import hashlib
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from research.core.types import Tree

STACKED, UNSTACKED = "blocks", "block_"  # a scanned stack of layers is `blocks` alive, `block_0`, `block_1` … everywhere else


def paths(tree: Tree) -> dict[str, Any]:
    """Every leaf under its path, `block_0/attention/query/kernel`; None is no leaf."""
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def map_paths(function: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """The tree with each leaf replaced by function(path, leaf)."""
    return jax.tree_util.tree_map_with_path(lambda path, leaf: function(jax.tree_util.keystr(path, simple=True, separator="/"), leaf), tree)


@functools.lru_cache(maxsize=1024)
def _pattern(glob: str) -> re.Pattern[str]:
    parts = re.split(r"(\*\*/|\*\*|\*|\?)", glob)
    translated = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    return re.compile("".join(translated.get(part, re.escape(part)) for part in parts) + r"\Z")


def matches(path: str, globs: Iterable[str]) -> bool:
    """Whether any glob fits the whole path: `*` stays within one level, `**` crosses levels.

    The path of a stacked leaf, `blocks/mlp/kernel`, stands for every layer: `block_*/mlp/*` fits it, `block_3/mlp/*` does not.
    """
    path = f"/{path}".replace(f"/{STACKED}/", f"/{UNSTACKED}*/")[1:]
    return any(_pattern(glob).match(path) for glob in globs)


def unstack(tree: Tree) -> Tree:
    """The canonical tree: every `blocks` with a leading layer axis becomes `block_0`, `block_1` …

    Works on any pytree, an optimizer state or a tree of abstract values included; a tree without `blocks` comes back unchanged.
    """
    if isinstance(tree, dict):
        out = {}
        for name, value in tree.items():
            if name == STACKED:
                depth = jax.tree.leaves(value)[0].shape[0] if jax.tree.leaves(value) else 0
                for i in range(depth):
                    out[f"{UNSTACKED}{i}"] = jax.tree.map(functools.partial(_layer, i=i), value)
            else:
                out[name] = unstack(value)
        return out
    return _inside(unstack, tree)


def stack(tree: Tree) -> Tree:
    """The inverse of `unstack`: `block_0`, `block_1` … become one `blocks` with a leading layer axis."""
    if isinstance(tree, dict):
        found = sorted((name for name in tree if re.fullmatch(UNSTACKED + r"\d+", name)), key=lambda name: int(name[len(UNSTACKED) :]))
        out = {name: stack(value) for name, value in tree.items() if name not in found}
        if found:
            out[STACKED] = jax.tree.map(_pile, *(tree[name] for name in found))
        return out
    return _inside(stack, tree)


def restack(leaves: Mapping[str, Any], like: Tree) -> Tree:
    """A tree of the same structure as `like` from canonical leaves by path: stacked where `like` is, as they are elsewhere."""

    def leaf(path, x):
        head, stacked, tail = f"/{path}".partition(f"/{STACKED}/")
        if not stacked:
            return leaves[path]
        return _pile(*(leaves[f"{head}/{UNSTACKED}{i}/{tail}"[1:]] for i in range(x.shape[0])))

    return map_paths(leaf, like)


def _layer(x, i):
    if isinstance(x, jax.ShapeDtypeStruct):
        place = x.sharding
        if isinstance(place, NamedSharding):
            place = NamedSharding(place.mesh, PartitionSpec(*place.spec[1:]))
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=place)
    return x[i]


def _pile(*xs):
    if isinstance(xs[0], jax.ShapeDtypeStruct):
        return jax.ShapeDtypeStruct((len(xs), *xs[0].shape), xs[0].dtype)
    return jnp.stack(xs)


def _inside(function, tree):
    """Apply to the children of one pytree node; a leaf is returned as it is."""
    leaves, structure = jax.tree_util.tree_flatten(tree, is_leaf=lambda x: x is not tree)
    if jax.tree_util.treedef_is_leaf(structure):
        return tree
    return jax.tree_util.tree_unflatten(structure, [function(leaf) for leaf in leaves])


def sha256(tree: Tree, frozen: Tree = None) -> str:
    """The hash of a tree's content, independent of scanning, devices and insertion order.

    Over leaves sorted by canonical path: path, dtype, shape, then the little-endian bytes; typed keys by their key data.

    Args:    tree: arrays on any device, a State included.  frozen: what stands still beside it; its paths begin with `frozen/`.
    Returns: 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    leaves = paths(unstack(tree)) | {f"frozen/{path}": leaf for path, leaf in paths(unstack(frozen)).items()}
    for path, leaf in sorted(leaves.items()):
        if isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = gathered(leaf)
        digest.update(f"{path}\0{array.dtype.name}\0{array.shape}\0".encode())
        if array.dtype.byteorder == ">" or (array.dtype.byteorder == "=" and sys.byteorder == "big"):
            array = array.astype(array.dtype.newbyteorder("<"))
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def gathered(x: Any) -> np.ndarray:
    """An array on this host, parts on others included; all hosts must ask."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        from jax.experimental import multihost_utils

        x = multihost_utils.process_allgather(x, tiled=True)
    return np.asarray(x)


def count(tree: Tree) -> int:
    """The number of scalars in a tree of arrays or abstract values."""
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
