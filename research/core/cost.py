"""What a computation costs in floating-point operations, counted from its shapes; nothing is computed."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend.core import Jaxpr, JaxprEqn, jaxprs_in_params
from jax.extend.core.primitives import cond_p, conv_general_dilated_p, dot_general_p, scan_p, while_p
from jax.interpreters.partial_eval import dce_jaxpr

from research.core.types import Batch, Objective, Tree

FEWER = "fewer_products"  # a scope: what is computed inside takes fewer products than its formula has, except where `counting`
counting = jax.make_user_context(False)  # True: the program that is traced is only counted, and such a layer takes the form of its formula
_TRANSFORMS = ("checkpoint", "rematted_computation", "while", "body", "closed_call")  # words of a name stack that are no module's


class Cost(NamedTuple):
    """The operations of one call.

    Args:    flops: of matrix products and convolutions.  exact: False where a loop of unknown length has some: its body is counted once.
    """

    flops: int
    exact: bool


def cost(function: Callable[..., Any], *args: Any, as_written: bool = False) -> Cost:
    """The operations of `function(*args)`.

    Counted are the products and sums of matrix products and convolutions, two for each weight that meets an input, whatever their types: the
    convention of the field, "model FLOPs". A convolution's padding counts as computed. Element-wise operations are left out. A scan counts
    as often as it runs, of the branches of a condition the dearest, what the result does not depend on not at all.

    The program is the one for this platform: attention on CPU skips keys that lie after a whole block of queries, elsewhere it does not.
    A convolution counts in full, also where it is computed with fewer products (`layers/conv.py`).

    Args:    args: arrays or abstract values.  as_written: count such a convolution's own products instead.
    """
    return _total(_program(function, args, as_written))


def flops_by_layer(function: Callable[..., Any], *args: Any) -> dict[str, int]:
    """{path of a linen module: floating-point operations of its own} of `function(*args)`; their sum is what `cost` counts.

    Of the branches of a condition the dearest counts, as there. What no module names stands under "".
    """
    found: dict[str, int] = {}
    _add(_program(function, args), "", 1, found)
    return found


def flops(function: Callable[..., Any], *args: Any) -> int:
    """The floating-point operations of `function(*args)`, as `cost` counts them."""
    return cost(function, *args).flops


def flops_per_example(objective: Objective, model: tuple[Tree, Tree, Tree, Any], batch: Batch) -> int:
    """The floating-point operations of predicting one example: an image, a row, a whole text.

    What a call computes once for all its rows, as kernels that are put together from adapters, is shared by them: it depends on the batch.

    Args:    model: params, extra, frozen, hyper.  batch: arrays or abstract values, batch axis first.
    """

    def outputs(model, batch):
        params, extra, frozen, hyper = model
        return objective.predict(params, extra, frozen, batch, None, hyper)[0]

    return flops(outputs, model, batch) // batch["mask"].shape[0]


def _program(function: Callable[..., Any], args: tuple[Any, ...], as_written: bool = False) -> Jaxpr:
    """What `function(*args)` computes, without what no result depends on."""
    program = jax.make_jaxpr(function)(*args).jaxpr
    if not as_written and _has_fewer(program):  # else not traced again, by which all that JAX remembers of inner functions is lost
        with counting(True):
            program = jax.make_jaxpr(function)(*args).jaxpr
    return dce_jaxpr(program, [True] * len(program.outvars))[0]


def _has_fewer(program: Jaxpr) -> bool:
    return any(FEWER in str(equation.source_info.name_stack) or any(map(_has_fewer, jaxprs_in_params(equation.params))) for equation in program.eqns)


def _add(program: Jaxpr, above: str, times: int, found: dict[str, int]) -> None:
    """Adds what each equation costs to the module that its name stack ends in."""
    for equation in program.eqns:
        stack = "/".join(part for part in (above, str(equation.source_info.name_stack)) if part)
        once, inner = _equation(equation).flops, list(jaxprs_in_params(equation.params))
        if not once:
            continue
        if not inner:
            words = [word for word in stack.split("/") if word not in _TRANSFORMS and not set(word) & set("(.,")]
            path = "/".join(words[1:])  # the first is the class of the whole
            found[path] = found.get(path, 0) + times * once
            continue
        if equation.primitive is cond_p:
            inner = [max(inner, key=lambda branch: _total(branch).flops)]
        repeat = once // max(sum(_total(part).flops for part in inner), 1)  # a scan's length, a mesh's devices
        for part in inner:
            _add(part, stack, times * repeat, found)


def _total(program: Jaxpr) -> Cost:
    parts = [_equation(equation) for equation in program.eqns]
    return Cost(sum(part.flops for part in parts), all(part.exact for part in parts))


def _equation(equation: JaxprEqn) -> Cost:
    kind, params = equation.primitive, equation.params
    shapes: list[Any] = [getattr(variable.aval, "shape", ()) for variable in (*equation.invars, *equation.outvars)]
    if kind is dot_general_p:
        (summed, _), _ = params["dimension_numbers"]
        left, _, product = shapes
        return Cost(2 * math.prod(product) * math.prod(left[axis] for axis in summed), True)
    if kind is conv_general_dilated_p:
        _, kernel, outputs = shapes
        channels = kernel[params["dimension_numbers"].rhs_spec[0]]
        return Cost(2 * math.prod(outputs) * math.prod(kernel) // channels, True)
    inner = [_total(program) for program in jaxprs_in_params(params)]
    if kind is cond_p:
        return Cost(max(part.flops for part in inner), all(part.exact for part in inner))
    once = sum(part.flops for part in inner)
    exact = all(part.exact for part in inner) and not (kind is while_p and once)
    if kind is scan_p:
        return Cost(params["length"] * once, exact)
    if kind.name == "shard_map":  # its shapes are those of one device
        mesh = params["mesh"]
        return Cost(math.prod(mesh.shape[axis] for axis in params.get("newly_manual_axes", mesh.axis_names)) * once, exact)
    return Cost(once, exact)
