"""Named intermediates that can be read, replaced and differentiated."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from research.core.axis import layerless
from research.core.tree import STACKED


def tap(module: nn.Module, taps: dict[str, Any], name: str, x: Any) -> Any:
    """Records x under the module's path and this name; applies the edit of that path, where there is one.

    An edit is a pair (mask, value), which replaces x where the mask is True, or an array that is added (zeros, to differentiate). Edits come
    in as the variable collection `edits`, an argument of the compiled program, so reading, patching, ablating and differentiating share
    one program. An unused tap costs nothing under jit. Inside a block the value carries its name in the block, `mlp/hidden`, by which a
    rematerialisation policy can keep it.

    Args:    module: the caller, bound.  taps: where to record; a parent merges what its children return.  name: one word.
    Returns: x, or its edited value; this is what is recorded.
    """
    edit = module.get_variable("edits", name) if module.has_variable("edits", name) else None
    if isinstance(edit, tuple | list):
        mask, value = edit
        x = jnp.where(mask, jnp.asarray(value, x.dtype), x)
    elif edit is not None:
        x = x + jnp.asarray(edit, x.dtype)
    path = "/".join((*module.path, name))
    _, inside, own = layerless(path).rpartition(f"{STACKED}/")
    if inside:
        x = checkpoint_name(x, own)
    taps[path] = x
    return x


def nest(edits: Any) -> dict[str, Any]:
    """Edits keyed by tap path as the nested collection that `tap` reads: {"block_0/mlp/hidden": e} -> {"block_0": {"mlp": {"hidden": e}}}."""
    nested: dict[str, Any] = {}
    for path, edit in (edits or {}).items():
        *parents, name = path.split("/")
        node = nested
        for parent in parents:
            node = node.setdefault(parent, {})
        node[name] = edit
    return nested
