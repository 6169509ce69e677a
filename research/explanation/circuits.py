"""Who wrote the answer: an output as the sum of what the embedding, each head and each MLP added to the residual stream."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.explanation.model import INPUT, Examples, Model, outputs_of, replaced
from research.explanation.result import Finding
from research.explanation.stream import HEADS, MIDDLE, OUTPUT, another, blocks, by_head, difference, final_factor, grid, seen, short, unfit
from research.figures import explanation as draw


@dataclasses.dataclass(frozen=True)
class DirectLogit:
    """Direct logit attribution: the stream after the last block is a sum, and with the final norm's factor held fixed so is the logit.

    A part is what it writes for the output itself, not what later blocks make of it. The parts and a constant (the final norm's and the
    head's bias) add up to the logit; `residual_delta` and `completeness_delta` tell by how much they do not.

    Args:    heads: split each block's attention by head; what its projection's bias adds is a part of its own.
             against: an output whose logit is subtracted, so that the parts say what decides between the two; None: the logit itself.
    Source:  Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits"; the frozen norm as in TransformerLens.
    """

    heads: bool = True
    against: Any = None
    reads: ClassVar[str] = "examples"

    def fits(self, model: Model) -> str | None:
        """A model without a residual stream, or without an output at each token, does not."""
        return unfit(model) or (None if INPUT in model.taps else "its embedding is not tapped")

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Finding:
        """The contribution of each part at the explained position."""
        found, against = blocks(model), another(model, examples, self.against)
        layout = Layout(tuple((block.path, block.heads, block.at(MIDDLE) in model.taps) for block in found), final_factor(model), self.heads)
        made = _decomposed(model.objective, layout, model.arrays, dict(examples.batch), np.asarray(examples.target), against)
        output, parts, constant, lack, residual = jax.tree.map(np.asarray, made)
        values = np.concatenate([parts, constant[:, None]], axis=1)  # b p
        names = [*layout.parts, "constant"]
        silent = [n for n, name in enumerate(names) if name.endswith((" mlp", " bias")) and not values[:, n].any()]  # a block without them
        names, values = [name for n, name in enumerate(names) if n not in silent], np.delete(values, silent, axis=1)
        split = {block.path: [f"{short(block.path)} head {h}" for h in range(block.heads)] for block in found}
        by = None
        if self.heads and all(name in names for each in split.values() for name in each):
            by = np.stack([grid([values[i, [names.index(name) for name in each]] for each in split.values()]) for i in range(len(examples))])
        title = "" if self.against is None else f" less that of {seen(str(self.against))}"
        each = []
        for i in range(len(examples)):
            token = seen(model.token(int(examples.target[i, 1])))
            panels: list[draw.Panel] = [draw.Bars(names, values[i], f"parts of the logit of {token}{title}: {output[i]:.3g}")]
            each.append((*panels, by_head(by[i], "heads")) if by is not None else panels)
        explained = [model.explained(target, other) for target, other in zip(examples.target, against, strict=True)]
        numbers = {"explained": explained, "parts": names, "output": output, "target": examples.target[:, 1], "position": examples.target[:, 0]}
        numbers |= {"completeness_delta": lack, "residual_delta": residual}
        kept = {"values": values} | ({} if by is None else {"heads": by})
        return Finding(numbers=numbers, kept=kept, each=each)


@dataclasses.dataclass(frozen=True)
class Layout:
    """The taps that a decomposition goes by.

    Args:    blocks: (path, heads, whether the stream between attention and MLP is tapped).  factor: of the final norm; None: there is none.
             heads: whether attention is split by head.
    """

    blocks: tuple[tuple[str, int, bool], ...]
    factor: str | None
    heads: bool

    @property
    def parts(self) -> list[str]:
        """The names of the parts, in the order in which they are written."""
        names = ["embedding"]
        for path, heads, middle in self.blocks:
            attention = [*(f"head {h}" for h in range(heads)), "attention bias"] if self.heads else ["attention"]
            names += [f"{short(path)} {part}" for part in (*attention, "mlp")] if middle else [short(path)]
        return names


@functools.partial(jax.jit, static_argnums=(0, 1))
def _decomposed(objective, layout, arrays, batch, target, against) -> tuple[Any, Any, Any, Any, Any]:
    """(output, contribution of each part, what is there without any part, the sum of these less the output, the parts' sum less the stream)."""

    def run(edits=None):
        outputs, taps = outputs_of(objective, arrays, batch, edits)
        return difference(outputs, target, against), taps

    output, taps = run()
    last = f"{layout.blocks[-1][0]}/{OUTPUT}"
    held = {} if layout.factor is None else {layout.factor: replaced(taps[layout.factor])}

    def logit(stream):
        each = run({last: replaced(stream), **held})[0]
        return each.sum(), each

    slope = jax.grad(logit, has_aux=True)(taps[last])[0]  # the same at any stream: the norm's factor is held, so the logit is linear
    constant = logit(jnp.zeros_like(taps[last]))[1]
    parts = jnp.stack(_parts(layout, taps, lambda edits: run(edits)[1]))  # p b t d
    rows = jnp.arange(len(target), dtype=jnp.int32)
    given = (parts[:, rows, target[:, 0]] * slope[rows, target[:, 0]][None]).sum(-1, dtype=jnp.float32).T
    lack = given.sum(-1) + constant - output
    residual = jnp.abs(parts.sum(0) - taps[last]).max((1, 2))
    return output, given, constant, lack, residual


def _parts(layout, taps, run) -> list[Float[Array, "b t d"]]:
    """What the embedding, attention or its heads, and the MLPs add to the stream, as `Layout.parts` names them."""
    parts = [taps[INPUT]]
    before = INPUT
    for path, heads, middle in layout.blocks:
        output, between = f"{path}/{OUTPUT}", f"{path}/{MIDDLE}"
        if not middle:
            parts.append(taps[output] - taps[before])
        else:
            parts += [*_alone(path, heads, before, taps, run)] if layout.heads else [taps[between] - taps[before]]
            parts.append(taps[output] - taps[between])
        before = output
    return parts


def _alone(path, heads, before, taps, run) -> Float[Array, "h+1 b t d"]:
    """What each head adds while the others are silent, and last what is added while all are."""
    read = taps[f"{path}/{HEADS}"]
    silent = ~jnp.concatenate([jnp.eye(heads, dtype=bool), jnp.zeros((1, heads), bool)])  # h+1 h

    def added(off):
        edits = {before: replaced(taps[before]), f"{path}/{HEADS}": (off.reshape(1, heads, 1, 1), jnp.zeros_like(read))}
        return run(edits)[f"{path}/{MIDDLE}"] - taps[before]

    each = jax.lax.map(added, silent)
    return jnp.concatenate([each[:-1] - each[-1:], each[-1:]])
