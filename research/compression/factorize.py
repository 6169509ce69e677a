"""Low rank: a kernel as the product of two thin ones, which the model multiplies with one after the other."""

import abc
import contextlib
import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.compression.linear import Linear, moments
from research.compression.subject import Subject, get, put
from research.compression.wrapper import Wrapper
from research.core.errors import ConfigError
from research.core.tree import matches
from research.core.types import Tree
from research.layers.conv import Conv


@dataclasses.dataclass(frozen=True)
class Factorized(Wrapper):
    """An objective some of whose kernels are {"first": (*inputs, rank), "second": (rank, *outputs)}, both trained.

    The layer multiplies with one after the other; of a convolution, `first` is a convolution to `rank` channels and `second` one of 1 x 1. The
    product itself, `whole`, is for those who want plain parameters: no layer reads it, so a compiled program does not make it.

    Args:    layers: (path of the kernel, leading axes that are summed over, rank) of each.
    """

    layers: tuple[tuple[str, int, int], ...] = ()

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(kernels by the two factors that are nearest to them, nothing)."""
        return put(params, {path: _nearest(get(params, path), inputs, rank) for path, inputs, rank in self.layers}), None

    def whole(self, params: Tree, frozen: Tree) -> Tree:
        """The products of the factors in the place of the kernels."""
        pairs = ((path, get(params, path)) for path, *_ in self.layers)
        joined = put(params, {path: jnp.tensordot(pair["first"], pair["second"], 1, precision="highest") for path, pair in pairs})
        return self.objective.whole(joined, frozen["inner"]) if isinstance(self.objective, Wrapper) else joined

    @contextlib.contextmanager
    def running(self, params: Tree, frozen: Tree) -> Iterator[None]:
        """Each of these layers multiplies twice."""
        factors = {path.rpartition("/")[0]: get(params, path) for path, *_ in self.layers}

        def intercept(call, args, kwargs, context):
            path = "/".join(context.module.path)
            if context.method_name != "__call__" or path not in factors:
                return call(*args, **kwargs)
            return _twice(context.module, factors[path], *args)

        with super().running(params, frozen), nn.intercept_methods(intercept):
            yield


@dataclasses.dataclass(frozen=True, kw_only=True)
class LowRank(abc.ABC):
    """What the methods share: which layers, and what rank each gets. Exactly one of rank, share and energy is given.

    A layer whose factors would hold as much as its kernel is left as it is.

    Args:    rank: of every layer.  share: of each layer's weights that its factors may hold, in (0, 1).  energy: share of the squared singular
             values that the smallest sufficient rank keeps, in (0, 1).  only, skip: globs of kernel paths.
             partial: leave out layers named in `only` that cannot be made smaller.
    """

    rank: int | None = None
    share: float | None = None
    energy: float | None = None
    only: tuple[str, ...] = ("**",)
    skip: tuple[str, ...] = ()
    partial: bool = False
    trains: ClassVar[bool] = False

    def __post_init__(self):
        given = [name for name in ("rank", "share", "energy") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ConfigError(f"method: give exactly one of rank, share and energy, the others null; found {', '.join(given) or 'none'}")
        if self.rank is not None and self.rank < 1:
            raise ConfigError(f"method.rank={self.rank}: must be at least 1")
        for name in ("share", "energy"):
            if (value := getattr(self, name)) is not None and not 0 < value < 1:
                raise ConfigError(f"method.{name}={value}: must be in (0, 1), as 0.5")

    def __call__(self, subject: Subject) -> Subject:
        """The model with thin factors in the place of kernels.

        Raises:  ConfigError: a layer named in `only`, or every layer, would not become smaller; the largest rank that is of use is named.
        """
        layers = subject.chosen(self.only, self.skip, partial=self.partial)
        inputs = self._inputs(subject, layers)
        found, notes, left = {}, {}, {}
        for path, layer in layers.items():
            matrix = layer.matrix(get(subject.params, path)).astype(jnp.float32)
            directions, values = self._directions(matrix, inputs.get(path))
            rank = self._rank(matrix.shape, values)
            if rank > _useful(*matrix.shape):
                left[path] = f"{path} is {matrix.shape[0]} x {matrix.shape[1]}, and rank {rank} saves nothing; at most {_useful(*matrix.shape)} does"
                notes[path] = {"rank": min(matrix.shape), "error": 0.0}
                continue
            found[path] = (layer, rank, directions)
            notes[path] = {"rank": rank, "error": float(jnp.sqrt(jnp.square(values[rank:]).sum() / jnp.maximum(jnp.square(values).sum(), 1e-30)))}
        named = [path for path in left if matches(path, [glob for glob in self.only if glob != "**"])]
        if (named and not self.partial) or not found:
            raise ConfigError(f"method: {left[(named or list(left))[0]]}")
        leaves = {path: _factors(layer, get(subject.params, path), rank, directions) for path, (layer, rank, directions) in found.items()}
        node = [[path, layer.inputs, rank] for path, (layer, rank, _) in found.items()]
        config = subject.wrapped("research.compression.factorize.Factorized", layers=node)
        frozen = {"own": None, "inner": subject.frozen}
        return dataclasses.replace(subject.replace(config=config, params=put(subject.params, leaves), frozen=frozen), notes=notes)

    def _rank(self, shape: tuple[int, ...], values: Float[Array, "k"]) -> int:
        """The rank of a layer with these singular values."""
        if self.rank is not None:
            return self.rank
        if self.share is not None:
            return max(int(self.share * shape[0] * shape[1] / sum(shape)), 1)
        assert self.energy is not None
        kept = jnp.cumsum(jnp.square(values)) / jnp.maximum(jnp.square(values).sum(), 1e-30)
        return min(int((kept < self.energy).sum()) + 1, len(values))

    def _inputs(self, subject: Subject, layers: Iterable[str]) -> dict[str, Float[Array, "i i"]]:
        """What the layers' inputs are like, where the method asks."""
        return {}

    @abc.abstractmethod
    def _directions(self, matrix: Float[Array, "i o"], gram: Float[Array, "i i"] | None) -> tuple[Float[Array, "o k"], Float[Array, "k"]]:
        """(orthonormal directions of the outputs, most important first; what each contributes: singular values)."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SVD(LowRank):
    """Each kernel by the nearest matrix of low rank: the leading singular vectors.

    Args:    as of `LowRank`.
    Source:  Eckart and Young 1936; for networks Denton et al. 2014.
    """

    def _directions(self, matrix, gram):
        _, values, rows = jnp.linalg.svd(matrix, full_matrices=False)
        return rows.T, values


@dataclasses.dataclass(frozen=True, kw_only=True)
class Activation(LowRank):
    """Each kernel by the matrix of low rank whose outputs are nearest on calibration data: the W' that minimises |X W - X W'|.

    With Q the leading right singular vectors of X W, W' = W Q Qᵀ, so that `first` is W Q and `second` is Qᵀ. X W is known up to a rotation of its
    rows by G^½ W, where G = XᵀX; no inverse is formed, so inputs that are always zero or always equal do no harm.

    Args:    as of `LowRank`.
    Source:  Chen et al. 2021 (DRONE), theorem 1; as SVD-LLM (Wang et al. 2024), which whitens with a Cholesky factor of G and inverts it.
    """

    def _inputs(self, subject, layers):
        return {path: seen.gram for path, seen in moments(subject.objective, subject.model, subject.batches, layers).items()}

    def _directions(self, matrix, gram):
        values, vectors = jnp.linalg.eigh(gram)
        root = jnp.sqrt(jnp.maximum(values, 0.0))[:, None] * jnp.matmul(vectors.T, matrix, precision="highest")  # i o
        _, values, rows = jnp.linalg.svd(root, full_matrices=False)
        return rows.T, values


def _useful(inputs: int, outputs: int) -> int:
    """The largest rank whose factors hold less than the matrix."""
    return (inputs * outputs - 1) // (inputs + outputs)


def _factors(layer: Linear, kernel: Array, rank: int, directions: Float[Array, "o k"]) -> dict[str, Array]:
    """The two factors of a kernel that keep these directions of its outputs, of one length each, so that both learn at one pace."""
    basis = directions[:, :rank]
    first = jnp.matmul(layer.matrix(kernel).astype(jnp.float32), basis, precision="highest")
    length = jnp.sqrt(jnp.maximum(jnp.linalg.norm(first, axis=0), 1e-12))
    first, second = first / length[None], basis.T * length[:, None]
    shape = (*layer.shape[: layer.inputs], rank), (rank, *layer.shape[layer.inputs :])
    return {"first": first.reshape(shape[0]).astype(kernel.dtype), "second": second.reshape(shape[1]).astype(kernel.dtype)}


def _nearest(kernel: Array, inputs: int, rank: int) -> dict[str, Array]:
    """A kernel's factors by its singular vectors alone."""
    layer = Linear("", "dense", kernel.shape, inputs)
    _, _, rows = jnp.linalg.svd(layer.matrix(kernel).astype(jnp.float32), full_matrices=False)
    return _factors(layer, kernel, rank, rows.T)


def _twice(module: Any, pair: Any, x: Array) -> Array:
    """What the layer computes with the product of the factors as its kernel."""
    dtype = module.dtype or x.dtype
    first, second, x = pair["first"].astype(dtype), pair["second"].astype(dtype), x.astype(dtype)
    rank, axes = first.shape[-1], first.ndim - 1
    if isinstance(module, Conv):
        y = jax.lax.conv_general_dilated(x, first, *module.windows, dimension_numbers=("NHWC", "HWIO", "NHWC"))
    else:
        y = x.reshape(*x.shape[: x.ndim - axes], -1) @ first.reshape(-1, rank)
    leading = y.shape[:-1]
    y = y.reshape(math.prod(leading), rank) @ second.reshape(rank, -1)
    if module.has_variable("params", "bias"):
        y = y + module.get_variable("params", "bias").astype(dtype).reshape(1, -1)
    return y.reshape(*leading, *second.shape[1:])
