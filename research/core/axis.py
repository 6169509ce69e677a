"""What a model must know of parallelism: the mapped axis that a norm sums over, and what its arrays' axes are called.

Models give the axes of parameters and of a few intermediates logical names, as "width" or "heads"; a `Layout` says over which axes of a mesh of
devices each name is cut. Outside a layout the names mean nothing and cost nothing.
"""

import contextlib
import contextvars
import dataclasses
import functools
import re
from collections.abc import Iterator
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from research.core.tree import STACKED, UNSTACKED

Names = tuple[str | None, ...]  # a logical name for each axis of an array; None: never cut

_axis: contextvars.ContextVar[str | None] = contextvars.ContextVar("device_axis", default=None)
_layout: contextvars.ContextVar["Layout | None"] = contextvars.ContextVar("layout", default=None)
_named: contextvars.ContextVar[dict[str, Names] | None] = contextvars.ContextVar("named", default=None)


@contextlib.contextmanager
def device_axis(name: str | None) -> Iterator[None]:
    """Says that the code traced inside runs under a mapped axis of this name (None: under no such axis)."""
    token = _axis.set(name)
    try:
        yield
    finally:
        _axis.reset(token)


def psum(tree):
    """The sum over the device axis in force; the tree itself where there is none."""
    name = _axis.get()
    return tree if name is None else jax.lax.psum(tree, name)


@dataclasses.dataclass(frozen=True)
class Layout:
    """How arrays lie on a mesh of devices: the sizes of its axes, and which of them each logical name is cut over.

    Args:    sizes: (axis of the mesh, its size) in order.  rules: (logical name, axes of the mesh).
    """

    sizes: tuple[tuple[str, int], ...]
    rules: tuple[tuple[str, tuple[str, ...]], ...]

    def size(self, *axes: str) -> int:
        """Devices along these axes of the mesh together."""
        sizes, count = dict(self.sizes), 1
        for axis in axes:
            count *= sizes[axis]
        return count

    def cut(self, name: str | None) -> tuple[str, ...]:
        """The axes of the mesh, those of more than one device, that this logical name is cut over."""
        return tuple(axis for axis in dict(self.rules).get(name or "", ()) if self.size(axis) > 1)

    def parts(self, name: str | None) -> int:
        """Into how many parts this logical name is cut."""
        return self.size(*self.cut(name))

    def spec(self, names: Names) -> PartitionSpec:
        """Over which axes of the mesh an array with these names is cut."""
        taken: set[str] = set()
        parts: list[tuple[str, ...] | None] = []
        for name in names:
            axes = tuple(axis for axis in self.cut(name) if axis not in taken)  # an axis of the mesh cuts one axis of an array
            taken |= set(axes)
            parts.append(axes or None)
        return PartitionSpec(*parts)

    @property
    def mesh(self) -> Mesh:
        """The devices of this process's program, in the order that their connections favour."""
        return _mesh(self.sizes)


@contextlib.contextmanager
def laid_out(layout: Layout | None) -> Iterator[None]:
    """Says that the code traced inside is one program over all devices of this layout (None: over one device)."""
    token = _layout.set(layout)
    try:
        yield
    finally:
        _layout.reset(token)


def layout() -> Layout | None:
    """The layout in force."""
    return _layout.get()


def constrain(x: Array, *names: str | None) -> Array:
    """x, cut as the layout in force says of axes with these names; x itself where there is none."""
    found = _layout.get()
    if found is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(found.mesh, found.spec(names)))


@contextlib.contextmanager
def recorded_names() -> Iterator[dict[str, Names]]:
    """{path of a parameter: names of its axes} of what is traced inside."""
    names: dict[str, Names] = {}
    token = _named.set(names)
    try:
        yield names
    finally:
        _named.reset(token)


def name_axes(module: Any, parameter: str, *names: str | None) -> None:
    """Gives the axes of a module's parameter logical names.

    Args:    module: the bound linen module that owns it.  names: one for each axis, without that of stacked layers.
    """
    if (record := _named.get()) is not None:
        record[layerless("/".join((*module.path, parameter)))] = names


def layerless(path: str) -> str:
    """A parameter's path with the same word for every layer, stacked or not."""
    return re.sub(rf"(^|/)(?:{UNSTACKED}\d+|{STACKED})(?=/)", rf"\1{STACKED}", path)


@functools.lru_cache(maxsize=64)
def _mesh(sizes):
    names, counts = zip(*sizes, strict=True)
    return jax.make_mesh(counts, names, axis_types=(jax.sharding.AxisType.Auto,) * len(names))
