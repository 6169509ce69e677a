"""Checks of the arguments that models are built with."""

from collections.abc import Iterable

from research.core.errors import nearest


def per_block(value: int | tuple[int, ...], depth: int, name: str, least: int = 1) -> tuple[int, ...]:
    """One size for each of `depth` blocks: a number is repeated, a tuple is checked.

    Args:    value: a size, or one per block.  depth: number of blocks.  name: the argument's name, for the message.  least: the smallest size.
    Raises:  ValueError: a tuple of another length, or a size below the least.
    """
    sizes = (value,) * depth if isinstance(value, int) else value
    if len(sizes) != depth:
        raise ValueError(f"{name}={value} has {len(sizes)} entries, but depth is {depth}; give one entry per block or set depth={len(sizes)}")
    if any(size < least for size in sizes):
        raise ValueError(f"{name}={value} must be at least {least}")
    return sizes


def one_of(value: str, choices: Iterable[str], name: str) -> str:
    """The value, where it is one of the choices.

    Args:    value: what was chosen.  choices: the names to choose from.  name: the argument's name, for the message.
    Raises:  ValueError: it is none of them; the message names the nearest right one.
    """
    if value not in (choices := tuple(choices)):
        raise ValueError(f"{name}={value!r} is unknown{nearest(value, choices)}")
    return value
