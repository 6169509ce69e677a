"""The linear layers of a model, which compression works on, and what their inputs look like."""

import contextlib
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Literal

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.core.types import Batch, Objective, Tree
from research.layers.conv import Conv
from research.layers.embedding import Embedding
from research.layers.projection import Projection

Kind = Literal["dense", "conv", "embedding"]
Model = tuple[Tree, Tree, Tree, Any]  # params, extra, frozen, hyper


@dataclasses.dataclass(frozen=True)
class Linear:
    """A layer that multiplies its input with a kernel.

    Kernels have axes of their own: (in, out) of a dense layer, (d, h, k) and (h, k, d) of attention, (y, x, c in, c out) of a convolution,
    (vocabulary, width) of an embedding. Methods see all of them as one matrix, inputs first; an embedding's output channels are its tokens.

    Args:    path: of the kernel in the canonical tree, "block_0/mlp/up/kernel".  kind: what the layer is.  shape: of the kernel.
             inputs: leading axes that are summed over; of an embedding, the last one is.
             windows: strides and padding of a convolution, along rows and columns.
    """

    path: str
    kind: Kind
    shape: tuple[int, ...]
    inputs: int
    windows: Any = ((1, 1), ((0, 0), (0, 0)))

    @property
    def module(self) -> str:
        """The path of the layer itself."""
        return self.path.rpartition("/")[0]

    def matrix(self, kernel: Array) -> Float[Array, "i o"]:
        """The kernel as a matrix, inputs first."""
        if self.kind == "embedding":
            return kernel.T
        return kernel.reshape(math.prod(self.shape[: self.inputs]), -1)

    def kernel(self, matrix: Float[Array, "i o"]) -> Array:
        """The inverse of `matrix`."""
        return matrix.T if self.kind == "embedding" else matrix.reshape(self.shape)

    def rows(self, x: Array, mask: Array | None = None) -> tuple[Float[Array, "n i"], Float[Array, ""]]:
        """(what the matrix is multiplied with, one row for each product, zero where the mask is False; how many rows count).

        Args:    x: the layer's input; a convolution's becomes its patches.  mask: of the batch, over its leading axes.
        """
        if self.kind == "conv":
            side = self.shape[0]
            x = jax.lax.conv_general_dilated_patches(x, (side, side), *self.windows, dimension_numbers=("NHWC", "HWIO", "NHWC"))
            x = x.reshape(*x.shape[:-1], -1, side, side)  # the patch comes as c in, y, x
            x = jnp.moveaxis(x, -3, -1)
        axes = 3 if self.kind == "conv" else 1 if self.kind == "embedding" else self.inputs
        x = x.astype(jnp.float32)
        leading = x.shape[: x.ndim - axes]
        keep = jnp.ones(leading, jnp.float32)
        if mask is not None:
            keep = keep * mask.reshape(*mask.shape, *[1] * (len(leading) - mask.ndim)).astype(jnp.float32)
        x = x * keep.reshape(*leading, *[1] * axes)
        return x.reshape(math.prod(leading), -1), keep.sum()


@flax.struct.dataclass
class Moments:
    """What a layer's inputs are like: sums over rows, which add over batches.

    Args:    gram: of the outer products x xᵀ.  absolute: of |x|.  largest: the largest |x| of each input.  count: rows.
    """

    gram: Float[Array, "i i"]
    absolute: Float[Array, "i"]
    largest: Float[Array, "i"]
    count: Float[Array, ""]

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.gram + other.gram, self.absolute + other.absolute, jnp.maximum(self.largest, other.largest), self.count + other.count)


@contextlib.contextmanager
def watching(see: Callable[[Linear, Array], None]) -> Iterator[None]:
    """Calls `see(layer, input)` for every linear layer that runs in this context, in order; embeddings are seen where they look up and where they
    are the head."""

    def intercept(call, args, kwargs, context):
        if context.method_name in ("__call__", "attend") and (layer := _layer(context.module)) is not None:
            see(layer, args[0])
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        yield


def linear_layers(objective: Objective, model: Model, batch: Batch) -> dict[str, Linear]:
    """The model's linear layers by the path of their kernel, in the order in which they run; nothing is computed."""
    found: dict[str, Linear] = {}

    def run(params, extra, frozen, hyper, batch):
        with watching(lambda layer, _: found.setdefault(layer.path, layer) and None):
            return objective.predict(params, extra, frozen, batch, None, hyper)

    jax.eval_shape(run, *model, batch)
    return found


def moments(objective: Objective, model: Model, batches: Iterable[Batch], only: Iterable[str] | None = None) -> dict[str, Moments]:
    """The moments of the inputs of linear layers, over all rows of these batches that count.

    Embeddings have them only where they are the head.

    Args:    only: the kernels whose layers are asked for; None: all.
    """
    total: dict[str, Moments] = {}
    paths = None if only is None else tuple(only)
    for batch in batches:
        part = _moments(objective, paths, *model, batch)
        total = {path: total[path] + part[path] for path in part} if total else part
    return total


@functools.partial(jax.jit, static_argnums=(0, 1))
def _moments(objective, only, params, extra, frozen, hyper, batch):
    """What comes after the last layer that is asked for is no part of the program."""
    found: dict[str, Moments] = {}

    def see(layer: Linear, x: Array) -> None:
        if not jnp.issubdtype(x.dtype, jnp.floating) or (only is not None and layer.path not in only):  # an embedding that looks up
            return
        rows, count = layer.rows(x, batch.get("mask"))
        gram = jnp.matmul(rows.T, rows, precision="highest")
        seen = Moments(gram, jnp.abs(rows).sum(0), jnp.abs(rows).max(0), count)
        found[layer.path] = found[layer.path] + seen if layer.path in found else seen

    with watching(see):
        objective.predict(params, extra, frozen, batch, None, hyper)
    return found


def blocks(layers: Iterable[str]) -> list[list[str]]:
    """The paths in runs of one first component, `block_0` or `head`."""
    return [list(paths) for _, paths in itertools.groupby(layers, key=lambda path: path.partition("/")[0])]


def relative_error(matrix: Float[Array, "i o"], changed: Float[Array, "i o"], gram: Float[Array, "i i"] | None) -> Float[Array, ""]:
    """‖X (W - W')‖ / ‖X W‖, or ‖W - W'‖ / ‖W‖ where there is no Gram matrix XᵀX; 0 where the layer does nothing."""

    def square(matrix):
        return jnp.vdot(matrix, matrix if gram is None else jnp.matmul(gram, matrix, precision="highest"))

    return jnp.sqrt(jnp.maximum(square(matrix - changed), 0.0) / jnp.maximum(square(matrix), 1e-30))


def _layer(module: nn.Module) -> Linear | None:
    path = "/".join(module.path)
    if isinstance(module, Embedding):
        return Linear(f"{path}/embedding", "embedding", (module.size, module.width), 1)
    if not isinstance(module, nn.Dense | Projection | Conv) or not module.has_variable("params", "kernel"):
        return None
    shape = module.get_variable("params", "kernel").shape
    if isinstance(module, Conv):
        return Linear(f"{path}/kernel", "conv", shape, 3, module.windows)
    return Linear(f"{path}/kernel", "dense", shape, len(module.inputs) if isinstance(module, Projection) else 1)
