"""A Transformer as its taps show it: blocks that read one residual stream and add to it, tokens, heads."""

import dataclasses
from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.core.errors import ConfigError, nearest
from research.core.tree import matches
from research.explanation.model import Examples, Model, examples, pick
from research.figures import explanation as draw

WEIGHTS, HEADS, OUTPUT, MIDDLE = "attention/weights", "attention/heads", "output", "middle"  # below a block's path


@dataclasses.dataclass(frozen=True)
class Block:
    """A block by its path.

    Args:    path: as block_3.  heads: how many it has.
    """

    path: str
    heads: int

    def at(self, name: str) -> str:
        """The path of one of its taps."""
        return f"{self.path}/{name}" if self.path else name


def blocks(model: Model) -> list[Block]:
    """The blocks with attention whose residual stream is tapped, in their order."""
    found = []
    for name, shape in model.taps.items():
        if matches(name, [f"**/{WEIGHTS}"]):
            path = name.removesuffix(WEIGHTS).rstrip("/")
            block = Block(path, shape.shape[1])
            if block.at(OUTPUT) in model.taps:
                found.append(block)
    return found


def unfit(model: Model) -> str | None:
    """Why a method that needs attention and an output at each token cannot explain this model; None: it can."""
    if not blocks(model):
        return "it has no tap of attention weights"
    return None if len(model.outputs) == 2 else "it has one output an example, not one at each token"


def final_factor(model: Model) -> str | None:
    """The tap of the factor of the norm between the last block and the outputs; None where there is no such norm."""
    names = list(model.taps)
    after = names[names.index(blocks(model)[-1].at(OUTPUT)) :]
    return next((name for name in after if matches(name, ["**/factor"])), None)


def chosen(model: Model, globs: Sequence[str]) -> list[str]:
    """The taps that any glob fits, in their order.

    Raises:  ConfigError: a glob that fits none; the message names the nearest tap.
    """
    for glob in globs:
        if not any(matches(name, [glob]) for name in model.taps):
            raise ConfigError(f"{glob!r} fits no tap of this model{nearest(glob, model.taps)}")
    return [name for name in model.taps if matches(name, globs)]


def labels(model: Model, shown: Examples, i: int) -> list[str]:
    """The tokens of an example, up to the last that counts."""
    return [model.token(int(token)) for token in np.asarray(shown.batch["tokens"])[i][: shown.length(i)]]


def short(path: str) -> str:
    """A tap's path as a row of a figure names it."""
    return path.removesuffix(f"/{OUTPUT}").removesuffix(f"/{HEADS}").replace("block_", "block ").replace("/", " ")


def by_head(values: Float[np.ndarray, "l h"], title: str, signed: bool = True) -> draw.Heat:
    """A number a head as a heat map; layers that have fewer heads are NaN at the end."""
    layers, heads = values.shape
    return draw.Heat(values, [f"layer {i}" for i in range(layers)], [str(i) for i in range(heads)], title, x="head", signed=signed)


def grid(rows: Sequence[np.ndarray]) -> Float[np.ndarray, "l h"]:
    """Rows of each layer's heads, those with fewer filled up with NaN."""
    made = np.full((len(rows), max(len(row) for row in rows)), np.nan, np.float32)
    for line, row in zip(made, rows, strict=True):
        line[: len(row)] = row
    return made


def seen(token: str) -> str:
    """A token as a figure names it: blanks as signs."""
    return token if token.strip(" ") else "␣" * len(token)


def another(model: Model, shown: Examples, name: object) -> np.ndarray:
    """The numbers of another output of each example, named as a target is; -1 where the name is None.

    Raises:  ConfigError: there is no such output.
    """
    if name is None:
        return np.full(len(shown), -1, np.int32)
    return examples(model, shown.batch, shown.names, name).target[:, -1]


def difference(outputs: Float[Array, "b ..."], target: Array, against: Array) -> Float[Array, "b"]:
    """The target's output less that of another; the output itself where the other is -1."""
    other = pick(outputs, jnp.concatenate([target[:, :-1], jnp.maximum(against, 0)[:, None]], axis=1))
    return pick(outputs, target) - jnp.where(against < 0, 0.0, other)
