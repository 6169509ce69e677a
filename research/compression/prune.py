"""Pruning: which weights of a trained model become zero."""

import abc
import dataclasses
import functools
import logging
import math
import re
from collections.abc import Mapping
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from research.compression.compensate import check, compensate, inverse_cholesky
from research.compression.linear import Linear, Moments, blocks, moments, relative_error
from research.compression.subject import Subject, get, put
from research.core.errors import ConfigError
from research.core.keys import named
from research.core.sparsity import Budget, layer_sparsities, smallest
from research.core.tree import map_paths, paths
from research.core.types import Batch, Objective, Tree

STATIC = {"_target_": "research.training.sparsify.Static", "only": ["**"], "skip": []}  # fine-tuning keeps the zeros
_log = logging.getLogger(__name__)
_PATTERN = re.compile(r"unstructured|(?P<kept>\d+):(?P<group>\d+)|block:(?P<rows>\d+)x(?P<columns>\d+)")


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Which weights of a matrix, inputs first, stand or fall together.

    Args:    rows, columns: inputs and outputs of a tile; 1 and 1: each weight by itself.
             kept: of N:M, how many weights of `rows` consecutive inputs are kept in each output; None: tiles fall as a whole.
    """

    rows: int = 1
    columns: int = 1
    kept: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Pattern":
        """The pattern of its name: "unstructured", "N:M" or "block:RxC".

        Raises:  ConfigError: none of these, or numbers that make no sense.
        """
        found = _PATTERN.fullmatch(text)
        if found is None:
            raise ConfigError(f"method.pattern={text!r}: must be unstructured, N:M as 2:4, or block:RxC as block:4x4")
        kept, group, rows, columns = (None if number is None else int(number) for number in found.group("kept", "group", "rows", "columns"))
        if kept is not None and group is not None:
            if not 1 <= kept < group:
                raise ConfigError(f"method.pattern={text!r}: keeps N of M, so N must be in [1, M), as 2:4")
            return cls(rows=group, kept=kept)
        if rows == 0 or columns == 0:
            raise ConfigError(f"method.pattern={text!r}: a block has at least 1 input and 1 output, as block:4x4")
        return cls(rows or 1, columns or 1)

    @property
    def sparsity(self) -> float | None:
        """The share of zeros where the pattern itself decides it."""
        return None if self.kept is None else 1 - self.kept / self.rows

    def misfit(self, inputs: int, outputs: int) -> str | None:
        """What of a layer this pattern does not divide, None where it fits."""
        for size, of, what in ((self.rows, inputs, "inputs"), (self.columns, outputs, "outputs")):
            if of % size:
                near = min((n for n in range(1, of + 1) if of % n == 0), key=lambda n: abs(n - size))
                return f"has {of} {what}, which {size} does not divide (the nearest number that does is {near})"
        return None

    def tiles(self, scores: Float[Array, "i o"]) -> Float[Array, "i2 o2"]:
        """The mean score of each tile."""
        inputs, outputs = scores.shape
        return scores.reshape(inputs // self.rows, self.rows, outputs // self.columns, self.columns).mean((1, 3))

    def spread(self, tiles: Bool[Array, "i2 o2"]) -> Bool[Array, "i o"]:
        """Each tile's value at all of its weights."""
        return jnp.repeat(jnp.repeat(tiles, self.rows, axis=0), self.columns, axis=1)

    def smallest(self, scores: Float[Array, "i o"], sparsity: float, each_output: bool = False) -> Bool[Array, "i o"]:
        """True at the weights that go: those of the smallest scores, of equal ones the first.

        Args:    sparsity: share of the weights, rounded down to whole tiles; N:M has its own.
                 each_output: compare among the inputs of each output (or column of tiles) rather than in the whole matrix.
        """
        if self.kept is not None:
            groups = scores.reshape(-1, self.rows, scores.shape[1])
            among = jax.vmap(jax.vmap(smallest, (1, None), 1), (0, None))
            return among(groups, self.rows - self.kept).reshape(scores.shape)
        tiles = self.tiles(scores)
        if each_output:
            return self.spread(jax.vmap(smallest, (1, None), 1)(tiles, int(tiles.shape[0] * sparsity)))
        return self.spread(smallest(tiles.ravel(), int(tiles.size * sparsity)).reshape(tiles.shape))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pruning(abc.ABC):
    """What all methods here share: how much goes, in which pattern, from which layers.

    A layer's kernel counts as a matrix, inputs first; a convolution's inputs are (y, x, c in). The run that comes out trains with
    `train.sparsify` set, so that fine-tuning keeps the zeros.

    Args:    sparsity: share of the weights that become zero, in [0, 1).
             pattern: "unstructured"; "N:M": N of M consecutive inputs are kept in each output, as 2:4, and sparsity is 1 - N/M; "block:RxC": blocks
             of R inputs and C outputs go as a whole, by the mean of their scores.
             budget: "uniform": every layer loses the same share; "erk": large layers lose more (Erdos-Renyi-kernel).
             only, skip: globs of kernel paths.  partial: leave out layers that cannot be pruned so, instead of refusing.
    """

    sparsity: float = 0.5
    pattern: str = "unstructured"
    budget: Budget = "uniform"
    only: tuple[str, ...] = ("**",)
    skip: tuple[str, ...] = ()
    partial: bool = False
    trains: ClassVar[bool] = False

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"method.sparsity={self.sparsity}: must be in [0, 1)")
        implied = self.shape.sparsity
        if implied is not None and not math.isclose(self.sparsity, implied, abs_tol=1e-6):
            raise ConfigError(
                f"method.sparsity={self.sparsity}: pattern={self.pattern} leaves {self.shape.kept} of {self.shape.rows}; set {implied:g}"
            )
        if implied is not None and self.budget != "uniform":
            raise ConfigError(f"method.budget={self.budget}: pattern={self.pattern} takes the same share of every layer; use budget=uniform")

    @property
    def shape(self) -> Pattern:
        """The pattern, parsed."""
        return Pattern.parse(self.pattern)

    def __call__(self, subject: Subject) -> Subject:
        """The pruned model.

        Raises:  ConfigError: layers that this cannot prune, or calibration data that counts nothing where the method needs it.
        """
        layers = self._layers(subject)
        sparsities = layer_sparsities({path: layer.shape for path, layer in layers.items()}, self.sparsity, self.budget)
        params, notes = self.prune(subject, layers, sparsities)
        for path, note in notes.items():
            if note["sparsity"] == 1:
                _log.warning("%s has lost all of its weights: method.sparsity=%g is too much for it", path, self.sparsity)
        config = {**subject.config, "train": {**subject.config["train"], "sparsify": STATIC}}
        return subject.replace(config=config, objective=subject.objective, params=params, notes={**subject.notes, **notes})

    @abc.abstractmethod
    def prune(self, subject: Subject, layers: Mapping[str, Linear], sparsities: Mapping[str, float]) -> tuple[Tree, dict[str, dict[str, float]]]:
        """(parameters with zeros, notes on each layer)."""

    def _layers(self, subject: Subject) -> dict[str, Linear]:
        """The layers to prune, in the order in which they run."""
        found = subject.chosen(self.only, self.skip, partial=self.partial)
        known = paths(subject.params)
        for path, layer in list(found.items()):
            if path not in known:
                raise ConfigError(f"method: {path} is no parameter of {type(subject.objective).__name__}: prune before the weights change their form")
            inputs = math.prod(layer.shape[: layer.inputs])
            problem = self.shape.misfit(inputs, math.prod(layer.shape) // inputs)
            if problem and not self.partial:
                raise ConfigError(f"method.pattern={self.pattern!r}: {path} {problem}; skip it, or method.partial=true leaves it as it is")
            if problem:
                del found[path]
        if not found:
            raise ConfigError(f"method.pattern={self.pattern!r} fits none of the layers")
        return found


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scored(Pruning):
    """Weights have scores that can be compared, and the smallest go.

    Args:    scope: "layer": the smallest of each layer; "global": the smallest of all chosen layers together.
    """

    scope: Literal["layer", "global"] = "layer"

    def __post_init__(self):
        super().__post_init__()
        if self.scope == "global" and self.budget != "uniform":
            raise ConfigError(f"method.budget={self.budget} says what each layer loses, scope=global lets the scores say it; use scope=layer")
        if self.scope == "global" and self.shape.sparsity is not None:
            raise ConfigError(f"method.scope=global: pattern={self.pattern} takes the same share of every layer; use scope=layer")

    @abc.abstractmethod
    def score(self, kernel: Array, evidence: Array) -> Array:
        """How much each weight matters, shaped as the kernel."""

    def evidence(self, subject: Subject) -> Tree:
        """What `score` is told beside the weights, in their structure; here nothing that they do not say themselves."""
        return subject.params

    def prune(self, subject: Subject, layers: Mapping[str, Linear], sparsities: Mapping[str, float]) -> tuple[Tree, dict[str, dict[str, float]]]:
        """(parameters with zeros, notes on each layer)."""
        evidence = self.evidence(subject)
        arrays = {path: (get(subject.params, path), get(evidence, path)) for path in layers}
        if self.scope == "global":
            zeros = _smallest_of_all(self, tuple(layers.items()), arrays)
        else:
            zeros = {path: _smallest(self, _nameless(layer), sparsities[path], *arrays[path]) for path, layer in layers.items()}
        seen = moments(subject.objective, subject.model, subject.batches, layers)
        kernels, notes = {}, {}
        for path, layer in layers.items():
            kernels[path], note = _zeroed(_nameless(layer), arrays[path][0], zeros[path], seen[path])
            notes[path] = _numbers(note)
        return put(subject.params, kernels), notes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Magnitude(Scored):
    """The weights nearest to zero go.

    Source:  Han et al. 2015.
    """

    def score(self, kernel: Array, evidence: Array) -> Array:
        """|w|."""
        return jnp.abs(kernel)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Random(Scored):
    """Weights drawn by lot go: what every other method must beat.

    Args:    seed: of the lot, which is drawn for each layer by its path.
    """

    seed: int = 0

    def score(self, kernel: Array, evidence: Array) -> Array:
        """The lot."""
        return evidence

    def evidence(self, subject: Subject) -> Tree:
        """Uniform random numbers."""
        key = jax.random.key(self.seed)
        return map_paths(lambda path, x: jax.random.uniform(named(key, path), x.shape), subject.params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient(Scored):
    """The weights go whose removal changes the loss least, to first order: |w dL/dw|, over the calibration data as one batch.

    Source:  Mozer and Smolensky 1989; Lee et al. 2019 (SNIP), equation 5, which leaves the same order.
    """

    def score(self, kernel: Array, evidence: Array) -> Array:
        """|w dL/dw|."""
        return jnp.abs(kernel * evidence)

    def evidence(self, subject: Subject) -> Tree:
        """dL/dw of the objective's own loss."""
        return loss_gradient(subject)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibrated(Pruning):
    """Layers are pruned by what their inputs are like.

    Args:    sequential: prune block by block in the order in which they run, and see each block's inputs as the pruned ones before it make them;
             False: as the dense model makes them, in one pass over the data.
    """

    sequential: bool = True

    @abc.abstractmethod
    def pruned(self, matrix: Float[Array, "i o"], seen: Moments, sparsity: float) -> Float[Array, "i o"]:
        """The matrix with zeros, float32."""

    def prune(self, subject: Subject, layers: Mapping[str, Linear], sparsities: Mapping[str, float]) -> tuple[Tree, dict[str, dict[str, float]]]:
        """(parameters with zeros, notes on each layer)."""
        params, notes = subject.params, {}
        for block in blocks(layers) if self.sequential else [list(layers)]:
            seen = moments(subject.objective, (params, *subject.model[1:]), subject.batches, block)
            kernels = {}
            for path in block:
                self._require_data(path, seen[path])
                kernels[path], note, finite = _calibrated(self, _nameless(layers[path]), sparsities[path], get(params, path), seen[path])
                if not finite:
                    raise ConfigError(f"method: {path} cannot be pruned by these inputs: its Hessian cannot be inverted; a larger method.damp helps")
                notes[path] = _numbers(note)
            params = put(params, kernels)
        return params, notes

    def _require_data(self, path: str, seen: Moments) -> None:
        if not seen.count > 0:
            raise ConfigError(f"calibration: no row of the data counts at {path}; give more calibration.examples, or others by calibration.seed")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Wanda(Calibrated):
    """In each output the weights go whose product with the length of their input is smallest: |w_ij| ‖x_i‖.

    Source:  Sun et al. 2024 (Wanda), equation 1.
    """

    def pruned(self, matrix: Float[Array, "i o"], seen: Moments, sparsity: float) -> Float[Array, "i o"]:
        """The matrix with zeros; what stays is as it was."""
        scores = jnp.abs(matrix) * jnp.sqrt(jnp.diagonal(seen.gram))[:, None]
        return jnp.where(self.shape.smallest(scores, sparsity, each_output=True), 0.0, matrix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseGPT(Calibrated):
    """Inputs are pruned in turn, each error made up for by the weights of the inputs that follow.

    The weights with the smallest w_ij² / U_ii² go, chosen for one block of inputs when its turn comes; U is the Cholesky factor of the inverse
    Hessian 2/n sum of x xᵀ.

    Args:    block: inputs that are chosen among together, and updated at once.  damp: share of the Hessian's mean diagonal that is added to it.
    Source:  Frantar and Alistarh 2023 (SparseGPT), algorithm 1. As in the authors' code all weights at the threshold go, so one more than the share.
    """

    block: int = 128
    damp: float = 0.01

    def __post_init__(self):
        super().__post_init__()
        check(self.block, self.damp)

    def pruned(self, matrix: Float[Array, "i o"], seen: Moments, sparsity: float) -> Float[Array, "i o"]:
        """The matrix with zeros; what stays has changed."""
        pattern = self.shape
        hessian = seen.gram * (2 / seen.count)
        factor = inverse_cholesky(hessian, self.damp)
        diagonal = jnp.diagonal(factor)

        def decide(start, weights):
            scores = jnp.square(weights / jax.lax.dynamic_slice_in_dim(diagonal, start, len(weights))[:, None])
            if pattern.kept is not None:
                return pattern.smallest(scores, sparsity)
            tiles = pattern.tiles(scores)
            count = int(tiles.size * sparsity)
            return pattern.spread(tiles <= jnp.sort(tiles.ravel())[count]) if count else jnp.zeros(scores.shape, bool)

        def rule(zero, i, weights):
            return jnp.where(zero[i], 0.0, weights)

        matrix = jnp.where((jnp.diagonal(hessian) == 0)[:, None], 0.0, matrix)
        block = max(self.block // pattern.rows, 1) * pattern.rows
        return compensate(matrix, factor, decide, rule, group=None if pattern.kept is None else pattern.rows, block=block)

    def _require_data(self, path: str, seen: Moments) -> None:
        super()._require_data(path, seen)
        if seen.count < len(seen.gram):
            rows = f"{float(seen.count):g} rows of calibration data are fewer than its {len(seen.gram)} inputs"
            _log.warning("%s: %s, so that damping decides much; give more calibration.examples", path, rows)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Iterative:
    """Nothing goes at once: the run that comes out is fine-tuned while its sparsity grows along a cubic schedule.

    Args:    score: what the smallest of go: "magnitude", or "movement", the sum of -w dL/dw over the fine-tuning.
             sparsity: share of zeros at the end, in [0, 1).  initial: share at once.  begin, end: of the growth, as shares of the fine-tuning.
             every: updates from one choice to the next.  budget, scope, only, skip: as of the methods that prune at once.
    Source:  Zhu and Gupta 2017 (magnitude); Sanh et al. 2020 (movement).
    """

    score: Literal["magnitude", "movement"] = "magnitude"
    sparsity: float = 0.9
    initial: float = 0.0
    begin: float = 0.0
    end: float = 0.75
    every: int = 10
    budget: Budget = "uniform"
    scope: Literal["layer", "global"] = "layer"
    only: tuple[str, ...] = ("**",)
    skip: tuple[str, ...] = ()
    trains: ClassVar[bool] = True

    def __post_init__(self):
        if not 0 <= self.sparsity < 1:
            raise ConfigError(f"method.sparsity={self.sparsity}: must be in [0, 1)")

    def __call__(self, subject: Subject) -> Subject:
        """The model as it is, with the rule that its training follows."""
        subject.chosen(self.only, self.skip)
        rule = {"magnitude": "Gradual", "movement": "Movement"}[self.score]
        settings = {name: list(value) if isinstance(value, tuple) else value for name, value in dataclasses.asdict(self).items() if name != "score"}
        sparsify = {"_target_": f"research.training.sparsify.{rule}", **settings}
        return subject.replace(config={**subject.config, "train": {**subject.config["train"], "sparsify": sparsify}}, objective=subject.objective)


def loss_gradient(subject: Subject) -> Tree:
    """The gradient of the objective's loss with respect to the parameters, all calibration batches taken as one.

    Raises:  ConfigError: no row of the data counts.
    """
    weights = [_weights(subject.objective, batch) for batch in subject.batches]
    total = functools.reduce(_add, weights)
    if not any(float(weight) for weight in total.values()):
        raise ConfigError("calibration: no row of the data counts; give more calibration.examples, or others by calibration.seed")
    parts = (_gradient(subject.objective, *subject.model, batch, total) for batch in subject.batches)
    return functools.reduce(_add, parts)


@jax.jit
def _add(first: Tree, second: Tree) -> Tree:
    return jax.tree.map(jnp.add, first, second)


@functools.partial(jax.jit, static_argnums=0)
def _weights(objective: Objective, batch: Batch) -> dict[str, Float[Array, ""]]:
    return objective.weights(batch)


@functools.partial(jax.jit, static_argnums=0)
def _gradient(objective: Objective, params, extra, frozen, hyper, batch: Batch, weights) -> Tree:
    def loss(params):
        tally, _ = objective(params, extra, frozen, batch, None, hyper, train=False)
        shares = (hyper.get(name, c) * tally.terms[name] / jnp.where(weights[name] > 0, weights[name], 1.0) for name, c in objective.coefficients)
        return functools.reduce(jnp.add, shares)

    return jax.grad(loss)(params)


def _nameless(layer: Linear) -> Linear:
    """The layer without its path: layers of one size share a program."""
    return dataclasses.replace(layer, path="")


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _smallest(method: Scored, layer: Linear, sparsity: float, kernel: Array, evidence: Array) -> Bool[Array, "i o"]:
    """True at the weights of a layer that go."""
    return method.shape.smallest(layer.matrix(method.score(kernel, evidence)), sparsity)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _smallest_of_all(method: Scored, layers: tuple[tuple[str, Linear], ...], arrays: Mapping[str, tuple[Array, Array]]):
    """{path: True at the weights that go} where all layers are compared with each other."""
    tiles = [method.shape.tiles(layer.matrix(method.score(*arrays[path]))) for path, layer in layers]
    joined = jnp.concatenate([score.ravel() for score in tiles])
    zeros = jnp.split(smallest(joined, int(joined.size * method.sparsity)), np.cumsum([score.size for score in tiles])[:-1])
    return {path: method.shape.spread(zero.reshape(score.shape)) for (path, _), score, zero in zip(layers, tiles, zeros, strict=True)}


@functools.partial(jax.jit, static_argnums=0)
def _zeroed(layer: Linear, kernel: Array, zero: Bool[Array, "i o"], seen: Moments):
    """(kernel with zeros, note) of one layer."""
    matrix = layer.matrix(kernel)
    pruned = jnp.where(zero, jnp.zeros((), matrix.dtype), matrix)
    return layer.kernel(pruned), _note(matrix, pruned, seen)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _calibrated(method: Calibrated, layer: Linear, sparsity: float, kernel: Array, seen: Moments):
    """(kernel with zeros, note, whether all of it is finite) of one layer."""
    matrix = layer.matrix(kernel)
    pruned = method.pruned(matrix.astype(jnp.float32), seen, sparsity).astype(matrix.dtype)
    return layer.kernel(pruned), _note(matrix, pruned, seen), jnp.isfinite(pruned).all()


def _note(matrix: Float[Array, "i o"], pruned: Float[Array, "i o"], seen: Moments) -> dict[str, Float[Array, ""]]:
    """What the ledger says of a layer: its share of zeros, and how far its outputs are off, NaN where there is no data."""
    matrix, pruned = matrix.astype(jnp.float32), pruned.astype(jnp.float32)
    error = jnp.where(seen.count > 0, relative_error(matrix, pruned, seen.gram), jnp.nan)
    return {"sparsity": (pruned == 0).mean(dtype=jnp.float32), "error": error}


def _numbers(note: Mapping[str, Array]) -> dict[str, float]:
    """The note for the ledger: what is known of it."""
    return {name: float(value) for name, value in note.items() if jnp.isfinite(value)}
