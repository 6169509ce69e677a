"""Sparsity during training: which weights are zero, and when that changes."""

import abc
import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import ClassVar, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from research.core.errors import ConfigError, nearest
from research.core.keys import named
from research.core.sparsity import Budget, layer_sparsities, smallest
from research.core.tree import STACKED, UNSTACKED, map_paths, matches, paths
from research.core.types import Tree

Leaves = Mapping[str, Array]  # kernels, or what belongs to them, by path; stacked ones hold every layer of their stack


class Masks(NamedTuple):
    """Which weights live, and what a rule remembers to decide it."""

    count: Int[Array, ""]  # updates made
    kept: Tree  # as the parameters: True where a weight lives, None where a leaf is no business of the rule
    score: Tree  # likewise, of rules that add something up from update to update; None of others

    def keep(self, tree: Tree) -> Tree:
        """The tree, shaped as the parameters, with zero at every weight that does not live."""
        return self._map(lambda kept, x: jnp.where(kept, x, jnp.zeros((), x.dtype)), tree)

    def land(self, updates: Tree, params: Tree) -> Tree:
        """The updates, but those that end on exactly zero at every weight that does not live."""
        return self._map(lambda kept, update, x: jnp.where(kept, update, -x.astype(update.dtype)), updates, params)

    def _map(self, function, *trees):
        return jax.tree.map(lambda kept, x, *xs: x if kept is None else function(kept, x, *xs), self.kept, *trees, is_leaf=lambda x: x is None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sparsify(abc.ABC):
    """A rule that says at each update which weights live. It wraps the whole optimizer: it sees the dense gradient, the optimizer that of the living.

    Args:    only, skip: globs of kernel paths; of the leaves that fit, kernels of two axes and more are sparsified.
             steps: updates of the whole run, of which begin and end are shares; training fills it in.
    """

    only: tuple[str, ...] = ("**",)
    skip: tuple[str, ...] = ()
    steps: int = 1
    required: ClassVar[bool] = True  # whether there must be a kernel to sparsify

    def init(self, params: Tree) -> Masks:
        """The masks before the first update, whose end is the first moment at which all that does not live is zero.

        Raises:  ConfigError: a glob that fits no kernel, or no kernel at all.
        """
        kernels = self._kernels(params)
        return Masks(jnp.zeros((), jnp.int32), _tree(self.first(kernels), params), _tree(self.remembered(kernels), params))

    def update(self, masks: Masks, grads: Tree, params: Tree) -> Masks:
        """The masks of this update.

        Args:    grads: dense, and the same on every device.  params: before the update.
        """
        kept = paths(masks.kept)
        grads, weights = ({path: leaf for path, leaf in paths(tree).items() if path in kept} for tree in (grads, params))
        score = self.add(paths(masks.score), grads, weights)
        kept = jax.lax.cond(self.due(masks.count), lambda: self.choose(masks.count, kept, score, grads, weights), lambda: kept)
        return Masks(masks.count + 1, _tree(kept, params), _tree(score, params))

    @abc.abstractmethod
    def first(self, kernels: Leaves) -> Leaves:
        """The masks to begin with."""

    @abc.abstractmethod
    def due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        """Whether masks are chosen anew after so many updates."""

    @abc.abstractmethod
    def choose(self, count: Int[Array, ""], kept: Leaves, score: Leaves, grads: Leaves, weights: Leaves) -> Leaves:
        """New masks."""

    def remembered(self, kernels: Leaves) -> Leaves:
        """What is added up, before the first update; nothing."""
        return {}

    def add(self, score: Leaves, grads: Leaves, weights: Leaves) -> Leaves:
        """What is added up, after one more gradient."""
        return score

    def _kernels(self, params: Tree) -> dict[str, Array]:
        """The leaves to sparsify, by path."""
        known = {path: x for path, x in paths(params).items() if f"/{path}".endswith("/kernel") and len(_shape(path, x)) >= 2}
        for name, globs in (("only", self.only), ("skip", self.skip)):
            for glob in globs:
                if glob != "**" and not any(matches(path, [glob]) for path in known):
                    raise ConfigError(f"train.sparsify.{name}: {glob!r} fits no kernel{nearest(glob, known)}")
        found = {path: x for path, x in known.items() if matches(path, self.only) and not matches(path, self.skip)}
        if self.required and not found:
            raise ConfigError(f"train.sparsify: no kernel is left by only={list(self.only)}, skip={list(self.skip)}{nearest('', known)}")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Static(Sparsify):
    """What is zero at the start stays zero: for fine-tuning a pruned model. Where kernels are no parameters, as beside adapters, it does nothing."""

    required: ClassVar[bool] = False

    def first(self, kernels: Leaves) -> Leaves:
        """True at what is not zero."""
        return {path: x != 0 for path, x in kernels.items()}

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        """Never."""
        return jnp.zeros((), bool)

    def choose(self, count: Int[Array, ""], kept: Leaves, score: Leaves, grads: Leaves, weights: Leaves) -> Leaves:
        """The masks as they are."""
        return kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scheduled(Sparsify):
    """The sparsity s grows from `initial` to `sparsity`, fast at first: s = s_f + (s_i - s_f) (1 - p)³ with p the way from begin to end.

    Args:    sparsity: share of zeros at the end, in [0, 1).  initial: share at the beginning, of the smallest weights by then.
             begin, end: of the growth, as shares of the run.  every: updates from one choice to the next.
             budget: how zeros are shared out: "uniform" or "erk" (Erdos-Renyi-kernel); where scope is "layer".
             scope: "layer": scores are compared within each layer; "global": over all.
    Source:  Zhu and Gupta 2017, equation 1.
    """

    sparsity: float = 0.9
    initial: float = 0.0
    begin: float = 0.0
    end: float = 0.75
    every: int = 10
    budget: Budget = "uniform"
    scope: Literal["layer", "global"] = "layer"

    def __post_init__(self):
        _check_share("sparsity", self.sparsity)
        if not 0 <= self.initial <= self.sparsity:
            raise ConfigError(f"train.sparsify.initial={self.initial}: must be in [0, sparsity={self.sparsity}]")
        if not 0 <= self.begin < self.end <= 1:
            raise ConfigError(f"train.sparsify.begin={self.begin}, end={self.end}: must be shares of the run with 0 <= begin < end <= 1")
        _check_every(self.every)
        if self.scope == "global" and self.budget != "uniform":
            raise ConfigError(f"train.sparsify.budget={self.budget} says what each layer loses, scope=global lets the scores say it; use scope=layer")

    @abc.abstractmethod
    def score(self, score: Leaves, weights: Leaves) -> Leaves:
        """What the smallest of go."""

    def progress(self, count: Int[Array, ""]) -> Float[Array, ""]:
        """The share of the growth that is due after so many updates: 1 - (1 - p)³."""
        begin, end = self._span
        way = (count.astype(jnp.float32) - begin) / (end - begin)
        return 1 - (1 - jnp.clip(way, 0.0, 1.0)) ** 3

    def first(self, kernels: Leaves) -> Leaves:
        """The smallest weights go at once."""
        return self._smallest({path: jnp.abs(x) for path, x in kernels.items()}, jnp.zeros((), jnp.float32))

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        """Every so many updates from begin to end, and at the end."""
        begin, end = self._span
        return (count > begin) & (count < end) & ((count - begin) % self.every == 0) | (count == end)

    def choose(self, count: Int[Array, ""], kept: Leaves, score: Leaves, grads: Leaves, weights: Leaves) -> Leaves:
        """The smallest scores go, as many as the schedule says."""
        return self._smallest(self.score(score, weights), self.progress(count))

    @property
    def _span(self) -> tuple[int, int]:
        """The updates before the growth begins and before it ends."""
        begin = round(self.begin * self.steps)
        return begin, min(max(round(self.end * self.steps), begin + 1), max(self.steps - 1, begin + 1))

    def _smallest(self, scores: Leaves, progress: Float[Array, ""]) -> Leaves:
        """True at the weights that are kept."""
        if self.scope == "global":
            return _smallest_of_all(scores, _count(self.initial, self.sparsity, sum(x.size for x in scores.values()), progress))
        initial, final = (_sparsities(scores, share, self.budget) for share in (self.initial, self.sparsity))
        counts = {path: _count(initial[path], final[path], math.prod(_shape(path, x)), progress) for path, x in scores.items()}
        counts = {path: jnp.broadcast_to(counts[path], len(_layers(path, x))) for path, x in scores.items()}
        return _each_layer(lambda score, count: ~smallest(score, count[0]), scores, counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradual(Scheduled):
    """The weights nearest to zero go, more and more of them.

    Source:  Zhu and Gupta 2017.
    """

    def score(self, score: Leaves, weights: Leaves) -> Leaves:
        """|w|."""
        return {path: jnp.abs(x) for path, x in weights.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Movement(Scheduled):
    """The weights go that training moves towards zero most: those of the smallest sum of -w dL/dw.

    Source:  Sanh et al. 2020, section 3, with hard top-v selection. There a weight that has gone keeps its value for the case that it returns; here
             it is zero, so its score rests, and it returns from zero where the others fall below it.
    """

    def score(self, score: Leaves, weights: Leaves) -> Leaves:
        """The sum so far."""
        return score

    def remembered(self, kernels: Leaves) -> Leaves:
        """Zero for each weight."""
        return {path: jnp.zeros(x.shape, jnp.float32) for path, x in kernels.items()}

    def add(self, score: Leaves, grads: Leaves, weights: Leaves) -> Leaves:
        """-w dL/dw more."""
        return {path: x - (weights[path] * grads[path]).astype(jnp.float32) for path, x in score.items()}


@dataclasses.dataclass(frozen=True, kw_only=True)
class RigL(Sparsify):
    """As many weights live from first to last, but not the same ones: now and then the smallest go, and those of the largest gradients come.

    The masks are drawn by lot. The share that is exchanged falls as half a cosine to 0. A weight that comes is zero by then; so are its moments in
    the optimizer, but for what is left of an earlier life.

    Args:    sparsity: share of zeros, in [0, 1).  budget: how they are shared out: "erk" (Erdos-Renyi-kernel) or "uniform".
             fraction: share of the living that is exchanged at first.  every: updates from one exchange to the next.
             until: share of the run after which the masks rest.  seed: of the lot.
    Source:  Evci et al. 2020, algorithm 1, where an exchange takes the place of an update; here it comes before it.
    """

    sparsity: float = 0.9
    budget: Budget = "erk"
    fraction: float = 0.3
    every: int = 100
    until: float = 0.75
    seed: int = 0

    def __post_init__(self):
        _check_share("sparsity", self.sparsity)
        _check_every(self.every)
        for name in ("fraction", "until"):
            if not 0 < getattr(self, name) <= 1:
                raise ConfigError(f"train.sparsify.{name}={getattr(self, name)}: must be in (0, 1]")

    def first(self, kernels: Leaves) -> Leaves:
        """Drawn by the seed and the path of each layer, scanned or not."""
        key, sparsities = jax.random.key(self.seed), _sparsities(kernels, self.sparsity, self.budget)
        kept = {}
        for path, x in kernels.items():
            lots = jnp.stack([jax.random.uniform(named(key, layer), (math.prod(_shape(path, x)),)) for layer in _layers(path, x)])
            kept[path] = ~jax.vmap(smallest, (0, None))(lots, int(lots.shape[1] * sparsities[path])).reshape(x.shape)
        return kept

    def due(self, count: Int[Array, ""]) -> Bool[Array, ""]:
        """Every so many updates, until the masks rest."""
        return (count > 0) & (count % self.every == 0) & (count < round(self.until * self.steps))

    def choose(self, count: Int[Array, ""], kept: Leaves, score: Leaves, grads: Leaves, weights: Leaves) -> Leaves:
        """As many of the largest gradients come as of the smallest weights go."""
        way = count.astype(jnp.float32) / (self.until * self.steps)
        share = self.fraction / 2 * (1 + jnp.cos(jnp.pi * way))

        def exchange(kept, grad, weight):
            number = jnp.floor(share * kept.sum(dtype=jnp.float32)).astype(jnp.int32)
            staying = kept & ~smallest(jnp.where(kept, jnp.abs(weight), jnp.inf), number)
            return staying | smallest(jnp.where(staying, jnp.inf, -jnp.abs(grad)), number)

        return _each_layer(exchange, kept, grads, weights)


def _tree(leaves: Leaves, params: Tree) -> Tree:
    """The leaves in the structure of the parameters, None for those that are not among them; None where there is none at all."""
    return map_paths(lambda path, _: leaves.get(path), params) if leaves else None


def _stacked(path: str) -> bool:
    return f"/{STACKED}/" in f"/{path}"


def _shape(path: str, x: Array) -> tuple[int, ...]:
    """The shape of one layer's kernel."""
    return x.shape[1:] if _stacked(path) else x.shape


def _rows(path: str, x: Array) -> Float[Array, "l n"]:
    """One row for each layer of the leaf."""
    return x.reshape(x.shape[0] if _stacked(path) else 1, -1)


def _each_layer(function: Callable[..., Array], first: Leaves, *others: Leaves) -> Leaves:
    """function(row, …) of every layer, in the shapes of the first leaves; layers of one size are one program."""
    sizes = {path: math.prod(_shape(path, x)) for path, x in first.items()}
    done = {}
    for size in sorted(set(sizes.values())):
        names = [path for path in first if sizes[path] == size]
        rows = (jnp.concatenate([_rows(path, leaves[path]) for path in names]) for leaves in (first, *others))
        ends = np.cumsum([first[path].size // size for path in names])[:-1]
        parts = jnp.split(jax.vmap(function)(*rows), ends)
        done |= {path: part.reshape(first[path].shape) for path, part in zip(names, parts, strict=True)}
    return done


def _layers(path: str, x: Array) -> list[str]:
    """The canonical paths of the layers in a leaf."""
    if not _stacked(path):
        return [path]
    return [f"/{path}".replace(f"/{STACKED}/", f"/{UNSTACKED}{i}/")[1:] for i in range(x.shape[0])]


def _sparsities(leaves: Leaves, sparsity: float, budget: Budget) -> dict[str, float]:
    """The share of zeros in each leaf; all layers of a stack are of one shape, and have one."""
    shares = layer_sparsities({layer: _shape(path, x) for path, x in leaves.items() for layer in _layers(path, x)}, sparsity, budget)
    return {path: shares[_layers(path, x)[0]] for path, x in leaves.items()}


def _count(initial: float, final: float, size: int, progress: Float[Array, ""]) -> Int[Array, ""]:
    """How many of `size` weights are zero at this point between two shares."""
    first, last = int(size * initial), int(size * final)
    return first + jnp.floor((last - first) * progress).astype(jnp.int32)


def _smallest_of_all(scores: Leaves, count: Int[Array, ""]) -> Leaves:
    """True but at the smallest scores of all leaves together."""
    ends = np.cumsum([x.size for x in scores.values()])[:-1]
    kept = jnp.split(~smallest(jnp.concatenate([x.ravel() for x in scores.values()]), count), ends)
    return {path: part.reshape(x.shape) for (path, x), part in zip(scores.items(), kept, strict=True)}


def _check_share(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ConfigError(f"train.sparsify.{name}={value}: must be in [0, 1)")


def _check_every(value: int) -> None:
    if value < 1:
        raise ConfigError(f"train.sparsify.every={value}: must be at least 1")
