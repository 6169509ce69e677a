"""Maximal-update parametrization: what a wider model must do otherwise, so that the learning rate of a narrow one is its own as well.

A model of this project takes part by two members: `base`, the width at which it is the standard model, and `grows`, the arguments that widen
with it. Everything follows from m = width / base and from which axes of a parameter grow, and that is seen by comparing the shapes of the
model at two widths: no layer is annotated.

| parameter                    | grows along        | first values  | rate of Adam | rate of SGD |
|------------------------------|--------------------|---------------|--------------|-------------|
| input (embeddings, biases, norms, the first kernel) | outputs | as at the base | 1 | m |
| hidden                       | inputs and outputs | 1 / sqrt(m)   | 1 / m        | 1           |
| output (the head)            | inputs             | as at the base | 1            | m           |
| fixed                        | nothing            | as at the base | 1            | 1           |

The model itself multiplies what its head reads by 1 / m, and its queries by sqrt(base head width / head width): logits of attention are then
divided by the head width, not by its root. Weight decay takes off the same share in each update at every width: rate x decay, whatever factor
the rate has. Source: Yang et al. 2022 (Tensor Programs V), table 8, which serves tied embeddings too, and appendix B.3; the first values
are relative to those of the base width, as in their package, which holds rate x decay fixed likewise.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, Protocol

import jax

from research.core.errors import ConfigError
from research.core.tree import STACKED, map_paths, matches, paths
from research.core.types import Tree

Sizes = Mapping[str, int | tuple[int, ...]]
KINDS = ("input", "hidden", "output", "fixed")
RULES: dict[str, dict[str, int]] = {  # how optimizers fall into two: kind of parameter -> power of m that its rate is multiplied by
    "adam": {"hidden": -1},  # updates whose entries do not depend on the size of the gradient
    "sgd": {"input": 1, "output": 1},  # updates in proportion to the gradient
}
_HEADS = ("**/query/kernel", "**/key/kernel", "**/value/kernel")  # kernels whose outputs are two axes, heads and head width


class Widening(Protocol):
    """A model that knows the width at which it is the standard one."""

    base: int | None

    @property
    def grows(self) -> Sizes:
        """The arguments that widen together; the first number is the one that `base` is the value of."""
        ...

    def clone(self, **changes: Any) -> Any:
        """The model with other arguments."""
        ...


def multiplier(model: Widening) -> float:
    """m = width / base; 1 for a standard model."""
    return 1.0 if model.base is None else _numbers(model.grows)[0] / model.base


def check(base: int | None, grows: Sizes, follow: Sizes | None = None) -> None:
    """Refuses a base at which some size would be no whole number.

    Args:    grows: as of the model.  follow: sizes that widen without being arguments.
    Raises:  ValueError: naming the size and the nearest base that serves.
    """
    if base is None:
        return
    named = {**grows, **(follow or {})}
    numbers = [number for number in _numbers(named) if number]
    if not numbers:
        raise ValueError(f"base={base}: nothing of this model widens; use null")
    unit = numbers[0] // math.gcd(*numbers)
    if base < 1 or base % unit:
        first = next(iter(grows))
        sizes = ", ".join(f"{name}={_plain(size)}" for name, size in named.items())
        raise ValueError(f"base={base}: with {sizes} the base of {first} must be a multiple of {unit}, as {max(round(base / unit), 1) * unit}")


def check_held(model: Widening) -> None:
    """Refuses to tell single sizes to whoever would change them one by one: m, and with it the function, would be another.

    Raises:  ConfigError: a maximal-update model.
    """
    if model.base is not None:
        raise ConfigError(f"model.base={model.base}: layers of a maximal-update model widen together, so their sizes cannot change one by one")


def resized(model: Widening, by: Fraction) -> dict[str, Any]:
    """The arguments that widen, multiplied; whole numbers, since `check` has seen to it.

    Args:    by: 1 / m for the base; 2 for a model twice as wide.
    """
    return {name: tuple(int(n * by) for n in size) if isinstance(size, tuple) else int(size * by) for name, size in model.grows.items()}


def started(model: Widening, variables: Mapping[str, Any], variance: Callable[[Sequence[int]], float], *args: Any, **kwargs: Any) -> dict[str, Any]:
    """The variables that the standard model has drawn, each kernel at the size that its kind asks for; as they are at the base width.

    Args:    variance: of a kernel's first values in the standard model, up to a factor, as a function of its shape without layer axes.
             args, kwargs: what the model's `init` was called with.
    """
    m = multiplier(model)
    if model.base is None or m == 1:
        return dict(variables)
    narrow = model.clone(base=None, **resized(model, Fraction(model.base, _numbers(model.grows)[0])))
    base = paths(jax.eval_shape(lambda: narrow.init(*args, **kwargs))["params"])
    found = kinds(base, paths(variables["params"]))

    def sized(path: str, x: Any) -> Any:
        if not path.endswith("kernel"):
            return x
        here, there = (variance(_own_shape(path, leaf)) for leaf in (x, base[path]))
        return x * (math.sqrt(there / here) * (m**-0.5 if found[path] == "hidden" else 1.0))

    return {**variables, "params": map_paths(sized, variables["params"])}


def kinds(narrow: Tree, wide: Tree) -> dict[str, str]:
    """{path: input | hidden | output | fixed}: along which axes each parameter grows from the one tree of shapes to the other."""
    found, wide = {}, paths(wide)
    for path, leaf in paths(narrow).items():
        shapes = zip(_own_shape(path, leaf), _own_shape(path, wide[path]), strict=True)
        grown = [before != after for before, after in shapes]
        inputs = _inputs(path, len(grown))
        found[path] = {(False, True): "input", (True, True): "hidden", (True, False): "output"}.get(
            (any(grown[:inputs]), any(grown[inputs:])), "fixed"
        )
    return found


def rates(found: Mapping[str, str], m: float, rule: str) -> dict[str, float]:
    """{path: what its learning rate is multiplied by}, of every parameter.

    Args:    found: as `kinds` gives it.  m: width / base.  rule: a name in `RULES`.
    """
    return {path: m ** RULES[rule].get(kind, 0) for path, kind in found.items()}


def constant(shape: Sequence[int]) -> float:
    """The variance of kernels that start alike at every width."""
    return 1.0


def lecun(shape: Sequence[int]) -> float:
    """The variance of LeCun's first values, 1 / inputs."""
    return 1.0 / math.prod(shape[:-1])


def glorot(shape: Sequence[int]) -> float:
    """The variance of Glorot's first values, 2 / (inputs + outputs), each times the window of a convolution."""
    return 2.0 / (math.prod(shape[:-2]) * (shape[-2] + shape[-1]))


def _own_shape(path: str, leaf: Any) -> tuple[int, ...]:
    """The shape of one layer's parameter."""
    return tuple(leaf.shape[1:] if f"/{STACKED}/" in f"/{path}" else leaf.shape)


def _inputs(path: str, rank: int) -> int:
    """How many of the first axes are inputs."""
    name = path.rpartition("/")[2]
    if name == "kernel":
        return rank - (2 if matches(path, _HEADS) and rank > 2 else 1)
    return 1 if name == "embedding" else 0


def _numbers(sizes: Sizes) -> list[int]:
    return [number for size in sizes.values() for number in (size if isinstance(size, tuple) else (size,))]


def _plain(size: int | tuple[int, ...]) -> str:
    return str(list(size) if isinstance(size, tuple) else size)
