"""The layers of a model in the order in which its forward pass meets them."""

from collections.abc import Collection
from typing import Any

import jax
import jax.extend

from research.core.spec import abstract_batch
from research.core.tree import paths
from research.explanation.model import Model, outputs_of

WRAPPED = ("own", "inner", "adapters", "trained")  # under what names a wrapper of an objective nests the layers


def layers(model: Model) -> dict[str, tuple[int, int]]:
    """{layer: (place where the input first meets it, place where it last does)}, those that are met first in front.

    A layer is the first part of a parameter's path. A parameter that is used twice, as a tied embedding, has two places. What is computed from
    parameters alone, as a decoded kernel, has no place of its own. A layer that the outputs do not depend on is left out.
    """

    def outputs(arrays, batch):
        return outputs_of(model.objective, arrays, batch)[0]

    arrays = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), model.arrays)
    program = jax.make_jaxpr(outputs)(arrays, abstract_batch(model.spec, 1)).jaxpr
    names = [layer_of(path, model.params) for tree in arrays[:3] for path in paths(tree)]  # the leaves in the order of the program's first inputs
    made_of: dict[Any, set[str]] = {variable: {name} for variable, name in zip(program.invars, names, strict=False)}
    reached = set(program.invars[len(jax.tree.leaves(arrays)) :])  # what depends on the batch
    places: dict[str, list[int]] = {}
    for i, equation in enumerate(program.eqns):
        read = [entry for entry in equation.invars if not isinstance(entry, jax.extend.core.Literal)]
        layers_read = set().union(*(made_of.get(entry, set()) for entry in read))
        if reached.intersection(read):
            reached.update(equation.outvars)
            for name in layers_read:
                places.setdefault(name, []).append(i)
        else:
            made_of.update(dict.fromkeys(equation.outvars, layers_read))
    return dict(sorted(((name, (min(met), max(met))) for name, met in places.items()), key=lambda item: item[1]))


def layer_of(path: str, known: Collection[str]) -> str:
    """The layer that a parameter belongs to: the first part of its path that names one, so that batch statistics and frozen kernels find theirs."""
    parts = [part for part in path.split("/") if part not in WRAPPED]
    return next((part for part in parts if part in known), parts[0])
