"""What attention weights tell: maps, their rollout, their product with gradients, and heads that look for what came before."""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from research.core.errors import ConfigError
from research.explanation.model import Examples, Model, outputs_of, score
from research.explanation.result import Attribution, Finding, at_least
from research.explanation.stream import WEIGHTS, blocks, by_head, grid, labels, seen, unfit
from research.figures import explanation as draw

LEGIBLE = 10_000  # weights that are drawn with their tokens named; where there are more, each head becomes a small picture


@dataclasses.dataclass(frozen=True)
class AttentionMaps:
    """How much each token reads from each other, head by head.

    A weight says where a head looks, not what it takes from there nor whether that mattered.

    Args:    layer, head: which one, from 0 or from the end where negative; None: all.
    """

    layer: int | None = None
    head: int | None = None
    reads: ClassVar[str] = "examples"

    def fits(self, model: Model) -> str | None:
        """A model without attention does not."""
        return None if blocks(model) else "it has no tap of attention weights"

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Finding:
        """The weights of each layer, b h t s; a heat map a head."""
        found = blocks(model)
        layers = _one(self.layer, len(found), "layer")
        names = {layer: found[layer].at(WEIGHTS) for layer in layers}
        _, taps = model.read(examples.batch, tuple(names.values()))
        kept, heads = {}, {}
        for layer, name in names.items():
            heads[layer] = _one(self.head, found[layer].heads, "head")
            kept[f"layer_{layer}"] = np.asarray(taps[name])[:, heads[layer]]
        each = [self._panels(model, examples, i, kept, heads) for i in range(len(examples))]
        return Finding(kept=kept, each=each)

    def _panels(self, model: Model, examples: Examples, i: int, kept: dict[str, np.ndarray], heads: dict[int, list[int]]) -> list[draw.Panel]:
        tokens = [seen(token) for token in labels(model, examples, i)]
        maps = {layer: kept[f"layer_{layer}"][i, :, : len(tokens), : len(tokens)] for layer in heads}
        if sum(weights.size for weights in maps.values()) > LEGIBLE:
            return [draw.Pictures(1.0 - maps[n][..., None], [f"head {h}" for h in heads[n]], f"layer {n}, dark: much") for n in maps]
        return [
            draw.Heat(weights, tokens, tokens, f"layer {layer} head {head}", x="is read", y="reads", signed=False)
            for layer in maps
            for head, weights in zip(heads[layer], maps[layer], strict=True)
        ]


@dataclasses.dataclass(frozen=True)
class AttentionRollout:
    """How much of each token reaches the explained position if every block mixes what its heads read with what it held.

    The product of residual x identity + (1 - residual) x the mean of the heads' weights over the blocks, first to last.

    Args:    residual: share of a block's output that is its own input, in [0, 1).
    Raises:  ValueError: a residual outside [0, 1).
    Source:  Abnar and Zuidema 2020, section 3.
    """

    residual: float = 0.5
    reads: ClassVar[str] = "examples"

    def __post_init__(self):
        if not 0 <= self.residual < 1:
            raise ValueError(f"residual={self.residual} must be in [0, 1)")

    def fits(self, model: Model) -> str | None:
        """A model without attention, or without an output at each token, does not."""
        return unfit(model)

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """Shares of the explained position, which sum to 1: b t."""
        names = tuple(block.at(WEIGHTS) for block in blocks(model))
        output, mixed = _rolled(model.objective, names, self.residual, model.arrays, examples.batch, examples.target)
        values = np.asarray(mixed)[np.arange(len(examples)), examples.target[:, 0]]
        return Attribution(values, None, None, np.asarray(output), examples.target)


@dataclasses.dataclass(frozen=True)
class AttentionXGradient:
    """Rollout of attention weights x their gradients: only what raises the explained output counts, so heads that do not matter fall out.

    R becomes R + mean over heads of max(0, A dy/dA) R, block by block, from the identity on; the value is R less the identity.

    Source:  Chefer, Gur and Wolf 2021, equations 5 and 6.
    """

    reads: ClassVar[str] = "examples"

    def fits(self, model: Model) -> str | None:
        """A model without attention, or without an output at each token, does not."""
        return unfit(model)

    def __call__(self, model: Model, examples: Examples, key: jax.Array) -> Attribution:
        """What reaches the explained position from each token: b t."""
        names = tuple(block.at(WEIGHTS) for block in blocks(model))
        output, relevance = _relevance(model.objective, names, model.arrays, examples.batch, examples.target)
        values = np.asarray(relevance)[np.arange(len(examples)), examples.target[:, 0]]
        return Attribution(values, None, None, np.asarray(output), examples.target)


@dataclasses.dataclass(frozen=True)
class InductionScore:
    """Which heads look back at what followed the present token the last time: read off random tokens that are then repeated.

    The score of a head is its mean weight, over the repetition, at the token after the present one's first occurrence. Beside it stand its
    weight at the first occurrence itself and, while the tokens are new, at the token just before: a head with that one is what induction
    heads build on.

    Args:    examples: sequences.  length: tokens before the repetition; None: half of the model's context.
    Source:  Olsson et al. 2022 (prefix matching score).
    """

    examples: int = 16
    length: int | None = None
    reads: ClassVar[str] = "nothing"

    def __post_init__(self):
        at_least(self, examples=1)

    def fits(self, model: Model) -> str | None:
        """A model without attention over tokens does not."""
        if model.field != "tokens" or len(model.outputs) != 2:
            return "it does not go on with a sequence of tokens"
        return unfit(model)

    def __call__(self, model: Model, examples: Examples | None, key: jax.Array) -> Finding:
        """Scores of each head, and the accuracy on the repetition."""
        longest = model.spec["time"] // 2
        length = longest if self.length is None else self.length
        if not 2 <= length <= longest:
            raise ConfigError(f"method.length={length}: must be from 2 to {longest}, half of the model's context")
        batch = repeated(key, self.examples, length, model.spec["vocabulary"])
        found = blocks(model)
        outputs, scores = _looks_back(model.objective, tuple(block.at(WEIGHTS) for block in found), length, model.arrays, batch)
        tokens = np.asarray(batch["tokens"])
        accuracy = float((np.asarray(outputs).argmax(-1)[:, length:-1] == tokens[:, length + 1 :]).mean())
        kept = {name: grid(values) for name, values in jax.tree.map(np.asarray, scores).items()}
        layer, head = divmod(int(np.nanargmax(kept["induction"])), kept["induction"].shape[1])
        best, before = kept["induction"][layer, head], np.unravel_index(np.nanargmax(kept["previous"]), kept["previous"].shape)
        lines = (
            f"layer {layer} head {head} looks most at what followed the last time: {best:.3f}",
            f"layer {before[0]} head {before[1]} looks most at the token before: {kept['previous'][before]:.3f}",
            f"accuracy on repeated tokens: {accuracy:.3f}",
        )
        titles = {"induction": "at what followed the last time", "previous": "at the token before", "same": "at the same token, the last time"}
        drawn = [by_head(kept[name], title, signed=False) for name, title in titles.items()]
        numbers = {name: values.tolist() for name, values in kept.items()} | {"accuracy": accuracy, "length": length}
        return Finding(drawn, numbers, kept, lines=lines)


def repeated(key: jax.Array, count: int, length: int, vocabulary: int) -> dict[str, np.ndarray]:
    """A batch of random tokens, each sequence followed by itself; all different in a sequence where there are enough, so that one went before."""
    if vocabulary >= length:
        first = np.stack([np.asarray(jax.random.permutation(row, vocabulary)[:length], np.int32) for row in jax.random.split(key, count)])
    else:
        first = np.asarray(jax.random.randint(key, (count, length), 0, vocabulary, jnp.int32))
    tokens = np.concatenate([first, first], axis=1)
    return {"tokens": tokens, "mask": np.ones(tokens.shape, bool), "index": np.arange(count, dtype=np.int32)}


def _one(number: int | None, count: int, name: str) -> list[int]:
    if number is None:
        return list(range(count))
    if not -count <= number < count:
        raise ConfigError(f"method.{name}={number}: this model has the {name}s 0 to {count - 1}")
    return [number % count]


@functools.partial(jax.jit, static_argnums=(0, 1))
def _rolled(objective, names, residual, arrays, batch, target):
    output, taps = score(objective, arrays, batch, target)
    return output, rollout([taps[name] for name in names], residual)


def rollout(weights: list[Float[Array, "b h t t"]], residual: float | Array = 0.5) -> Float[Array, "b t t"]:
    """The share of each token's input in each token's output after all blocks."""
    mixed = jnp.broadcast_to(jnp.eye(weights[0].shape[-1]), (len(weights[0]), *weights[0].shape[-2:]))
    for each in weights:
        mixed = residual * mixed + (1 - residual) * (each.mean(1) @ mixed)
    return mixed


@functools.partial(jax.jit, static_argnums=(0, 1))
def _relevance(objective, names, arrays, batch, target):
    def total(added):
        output, taps = score(objective, arrays, batch, target, added)
        return output.sum(), (output, [taps[name] for name in names])

    shapes = jax.eval_shape(lambda: score(objective, arrays, batch, target)[1])
    zeros = {name: jnp.zeros(shapes[name].shape, shapes[name].dtype) for name in names}
    slopes, (output, weights) = jax.grad(total, has_aux=True)(zeros)
    relevance = jnp.broadcast_to(jnp.eye(weights[0].shape[-1]), (len(weights[0]), *weights[0].shape[-2:]))
    for name, each in zip(names, weights, strict=True):
        relevance = relevance + jnp.maximum(each * slopes[name], 0.0).mean(1) @ relevance
    return output, relevance - jnp.eye(relevance.shape[-1])[None]


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _looks_back(objective, names, length, arrays, batch) -> Any:
    outputs, taps = outputs_of(objective, arrays, batch)
    new, again = jnp.arange(1, length, dtype=jnp.int32), jnp.arange(length, 2 * length, dtype=jnp.int32)
    places = {"induction": (again, again - length + 1), "previous": (new, new - 1), "same": (again, again - length)}
    looks = {look: [taps[name][:, :, query, key].mean((0, 2)) for name in names] for look, (query, key) in places.items()}
    return outputs, looks
