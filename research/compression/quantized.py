"""Objectives some of whose kernels, activations and cache are numbers of a few bits."""

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from research.compression.codes import Format, Grid, Integer, decode, encode, number_format, scales
from research.compression.linear import Kind, Linear
from research.compression.subject import get, put
from research.compression.wrapper import Wrapper
from research.core.tree import paths
from research.core.types import Batch, Decoder, Hyper, Tree

Activations = Literal["dynamic", "static"]
Spec = tuple[
    str, Kind, tuple[int, ...], int, int | None
]  # path of the kernel, kind, shape, leading axes that are summed over, inputs that share a scale
Stored = Mapping[str, Array]  # what stands in a kernel's place
EIGHT = Integer(8)  # what activations and the cache are rounded to


@dataclasses.dataclass(frozen=True)
class Quantized(Wrapper):
    """An objective some of whose kernels stand still as codes and scales.

    `frozen["own"]` has, in each kernel's place, {"values": codes (outputs, inputs), "scale": (groups, outputs)} and, where there are such,
    "input_scale": (inputs,), by which the layer's inputs are divided, and "activation_scale": of all inputs together. The kernel they stand for is
    decoded where the layer runs; with `activations` it is not: the layer rounds its inputs to eight bits, and integers are multiplied and summed
    in 32 bits, of a convolution over its patches. A token's embedding alone is decoded where it is looked up.

    Args:    layers: of each kernel, (path, kind, shape, leading axes that are summed over, inputs that share a scale).
             format: as `number_format` knows it.  smoothed: whether there are input scales.
             activations: "dynamic": each row of inputs by its own largest value; "static": all by one value from calibration; None: float.
             cache: "int8": the decoder keeps keys and values in eight bits, with a scale for each position and head; None: as the model does.
    """

    layers: tuple[Spec, ...] = ()
    format: str = "int8"
    smoothed: bool = False
    activations: Activations | None = None
    cache: Literal["int8"] | None = None

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(parameters without these kernels, the kernels rounded to nearest on the symmetric grid)."""
        form, own = number_format(self.format), {}
        for path, kind, shape, inputs, group in self.layers:
            kernel = get(params, path)
            layer = Linear(path, kind, shape, inputs)
            matrix = layer.matrix(kernel).astype(jnp.float32)
            scale = scales(matrix, form, group)
            stored = {"values": encode(matrix, scale, form), "scale": scale}
            if self.smoothed:
                stored["input_scale"] = jnp.ones(len(matrix), jnp.float32)
            if self.activations == "static":
                stored["activation_scale"] = jnp.ones((), jnp.float32)
            own = put(own, {path: transposed(stored)})
        return put(params, {path: None for path, *_ in self.layers}), own

    def whole(self, params: Tree, frozen: Tree) -> Tree:
        """The parameters with the kernels that the codes stand for."""
        joined = self._joined(params, frozen)
        return self.objective.whole(joined, frozen["inner"]) if isinstance(self.objective, Wrapper) else joined

    @contextlib.contextmanager
    def running(self, params: Tree, frozen: Tree) -> Iterator[None]:
        """Lookups decode what they take; with `activations`, layers multiply integers."""
        own = {layer.module: (layer, stored) for layer, stored in self._stored(frozen)}
        form = number_format(self.format)

        def intercept(call, args, kwargs, context):
            layer, stored = own.get("/".join(context.module.path), (None, None))
            if layer is None or stored is None or context.method_name not in ("__call__", "attend"):
                return call(*args, **kwargs)
            if layer.kind == "embedding" and context.method_name == "__call__":
                return _looked_up(stored, form, *args).astype(context.module.dtype)
            return call(*args, **kwargs) if self.activations is None else _product(context.module, layer, stored, _multiplied_as_integers, *args)

        inner = self.objective.running(self._joined(params, frozen), frozen["inner"]) if isinstance(self.objective, Wrapper) else None
        with inner or contextlib.nullcontext(), nn.intercept_methods(intercept):
            yield

    def decoder(self) -> Decoder | None:
        """The plain objective's decoder over these kernels."""
        decoder = super().decoder()
        return None if decoder is None else QuantizedDecoder(self, decoder)

    def keeping(self, decoder: Decoder) -> Decoder:
        """The decoder with its cache as `cache` says."""
        inner = super().keeping(decoder)
        return inner if self.cache is None else EightBitCache(inner)

    def vector_products(self, frozen: Tree) -> contextlib.AbstractContextManager[Any]:
        """The context in which a layer that multiplies a single row decodes its kernel in the product itself: no float kernel is written.

        For decoding by this model alone: what a wrapper around it adds to a kernel would not be seen.
        """
        own = {layer.module: (layer, stored) for layer, stored in self._stored(frozen)}
        form = number_format(self.format)

        def multiply(rows, stored):
            # without the barrier the bias is added in the product, which then wants its kernel whole
            return jax.lax.optimization_barrier(rows @ decoded(transposed(stored), form))

        def intercept(call, args, kwargs, context):
            layer, stored = own.get("/".join(context.module.path), (None, None))
            lookup = context.method_name == "__call__" and layer is not None and layer.kind == "embedding"
            if layer is None or stored is None or lookup or layer.kind == "conv" or context.method_name not in ("__call__", "attend"):
                return call(*args, **kwargs)
            if math.prod(args[0].shape[: args[0].ndim - layer.inputs]) > 1:
                return call(*args, **kwargs)
            return _product(context.module, layer, stored, multiply, *args)

        return nn.intercept_methods(intercept) if self.activations is None else contextlib.nullcontext()

    def _stored(self, frozen: Tree) -> Iterator[tuple[Linear, Stored]]:
        for path, kind, shape, inputs, _ in self.layers:
            stored: Any = get(frozen["own"], path)
            yield Linear(path, kind, shape, inputs), stored

    def _joined(self, params, frozen):
        form = number_format(self.format)
        return put(params, {layer.path: layer.kernel(decoded(transposed(stored), form)) for layer, stored in self._stored(frozen)})


@dataclasses.dataclass(frozen=True)
class QuantizedDecoder:
    """A decoder that multiplies a single row with codes.

    Args:    wrapper: whose decoder it is.
    """

    wrapper: Quantized
    decoder: Decoder

    def begin(self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, length: int, hyper: Hyper) -> Tree:
        """As the decoder's."""
        return self.decoder.begin(params, extra, frozen, batch, length, hyper)

    def advance(
        self, params: Tree, extra: Tree, frozen: Tree, cache: Tree, tokens: Int[Array, "b n"], hyper: Hyper
    ) -> tuple[Float[Array, "b n v"], Tree]:
        """As the decoder's."""
        with self.wrapper.vector_products(frozen):
            return self.decoder.advance(params, extra, frozen, cache, tokens, hyper)

    def rewind(self, cache: Tree, length: Int[Array, "b"]) -> Tree:
        """As the decoder's."""
        return self.decoder.rewind(cache, length)


@dataclasses.dataclass(frozen=True)
class EightBitCache:
    """A decoder that keeps keys and values as eight-bit codes, with a scale for each position and head.

    A position is rounded once, when it is written; later calls leave its codes as they are.

    Args:    decoder: its cache is a dict with `length`, and holds `key` and `value`, each b g s k, wherever it likes.
    """

    decoder: Decoder

    def begin(self, params: Tree, extra: Tree, frozen: Tree, batch: Batch, length: int, hyper: Hyper) -> Tree:
        """The decoder's cache with codes in it."""
        return _cache_encoded(self.decoder.begin(params, extra, frozen, batch, length, hyper))

    def advance(
        self, params: Tree, extra: Tree, frozen: Tree, cache: Tree, tokens: Int[Array, "b n"], hyper: Hyper
    ) -> tuple[Float[Array, "b n v"], Tree]:
        """As the decoder's, on keys and values that the codes stand for."""
        logits, longer = self.decoder.advance(params, extra, frozen, _cache_decoded(cache), tokens, hyper)
        written = cache["length"][:, None, None, None]

        def kept(old, new):
            if old.ndim != 4:
                return new
            return jnp.where(jnp.arange(old.shape[2])[None, None, :, None] < written, old, new)

        return logits, jax.tree.map(kept, cache, _cache_encoded(longer))

    def rewind(self, cache: Tree, length: Int[Array, "b"]) -> Tree:
        """As the decoder's."""
        return self.decoder.rewind(cache, length)


@dataclasses.dataclass(frozen=True)
class FakeQuantized(Wrapper):
    """An objective whose kernels are rounded in every pass, while the gradient passes as if they were not.

    Args:    layers, format: as of `Quantized`.  grid: as of `Integer`.
    Source:  Jacob et al. 2018, section 3; the straight-through gradient: Bengio et al. 2013.
    """

    layers: tuple[Spec, ...] = ()
    format: str = "int8"
    grid: Grid = "symmetric"

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(all parameters, nothing)."""
        return params, None

    def whole(self, params: Tree, frozen: Tree) -> Tree:
        """The parameters with their kernels rounded."""
        joined = self._joined(params)
        return self.objective.whole(joined, frozen["inner"]) if isinstance(self.objective, Wrapper) else joined

    def running(self, params: Tree, frozen: Tree) -> Any:
        """As the objective inside, with rounded kernels."""
        return super().running(self._joined(params), frozen)

    def _joined(self, params):
        form, leaves = number_format(self.format, self.grid), {}
        for path, kind, shape, inputs, group in self.layers:
            kernel = get(params, path)
            layer = Linear(path, kind, shape, inputs)
            matrix = layer.matrix(kernel).astype(jnp.float32)
            scale = scales(matrix, form, group)
            rounded = layer.kernel(decode(encode(matrix, scale, form), scale, form)).astype(kernel.dtype)
            leaves[path] = kernel - jax.lax.stop_gradient(kernel) + jax.lax.stop_gradient(rounded)  # 0 + rounded, with the kernel's gradient
        return put(params, leaves)


def decoded(stored: Stored, form: Format) -> Float[Array, "i o"]:
    """The matrix that stands behind the codes of a layer."""
    matrix = decode(stored["values"], stored["scale"], form)
    return matrix / stored["input_scale"][:, None] if "input_scale" in stored else matrix


def transposed(stored: Stored) -> dict[str, Array]:
    """The codes outputs first, all else as it is."""
    return {**stored, "values": stored["values"].T}


def _looked_up(stored: Stored, form: Format, numbers: Int[Array, "*b"]) -> Float[Array, "*b d"]:
    """The vectors of these numbers, decoded alone: the table itself is never made."""
    take: Callable[[Array, int], Array] = functools.partial(jnp.take, indices=numbers.ravel(), mode="clip")
    matrix = decoded({**stored, "values": take(stored["values"], axis=0).T, "scale": take(stored["scale"], axis=1)}, form)
    return matrix.T.reshape(*numbers.shape, -1)


def _product(module: Any, layer: Linear, stored: Stored, multiply: Callable[[Array, Stored], Array], x: Array) -> Array:
    """What the layer computes where its rows, n i, are multiplied with the codes by `multiply(rows, stored)`, n o."""
    dtype = module.dtype or x.dtype
    if layer.kind == "conv":
        layer = dataclasses.replace(layer, windows=module.windows)
        sides = zip(x.shape[1:3], *module.windows, strict=True)
        leading = (x.shape[0], *((side + sum(around) - layer.shape[0]) // stride + 1 for side, stride, around in sides))
    else:
        leading = x.shape[: x.ndim - layer.inputs]
    y = multiply(layer.rows(x)[0], stored).astype(dtype)
    if module.has_variable("params", "bias"):
        y = y + module.get_variable("params", "bias").astype(dtype).reshape(1, -1)
    outputs = layer.shape[:1] if layer.kind == "embedding" else layer.shape[layer.inputs :]
    return y.reshape(*leading, *outputs)


def _multiplied_as_integers(rows: Float[Array, "n i"], stored: Stored) -> Float[Array, "n o"]:
    """The product with the rows rounded to eight bits: sums of products of integers, exact in 32 bits."""
    if "input_scale" in stored:
        rows = rows / stored["input_scale"][None]
    scale = scales(rows.T, EIGHT).T if "activation_scale" not in stored else stored["activation_scale"].reshape(1, 1)  # n 1 or 1 1
    codes = jnp.clip(jnp.round(rows * (1 / scale)), -EIGHT.largest, EIGHT.largest).astype(jnp.int8)
    values, groups = stored["values"].T.astype(jnp.int8), len(stored["scale"])
    sums = jax.lax.dot_general(
        codes.reshape(len(codes), groups, -1),
        values.reshape(groups, -1, values.shape[1]),
        (((2,), (1,)), ((1,), (0,))),
        preferred_element_type=jnp.int32,
    )  # g n o
    return (sums.astype(jnp.float32) * stored["scale"][:, None]).sum(0) * scale


def _cache_encoded(cache: Tree) -> Tree:
    """The cache with codes for keys and values."""

    def encoded(x):
        largest = jnp.abs(x.astype(jnp.float32)).max(-1, keepdims=True)
        scale = jnp.where(largest > 0, largest, 1.0) * (1 / EIGHT.largest)
        return {"values": EIGHT.encode(x.astype(jnp.float32) * (1 / scale)), "scale": scale}

    return put(cache, {path: encoded(x) for path, x in paths(cache).items() if path.rpartition("/")[2] in ("key", "value")})


def _cache_decoded(cache: Tree) -> Tree:
    """The inverse of `_cache_encoded`."""
    stored = {path.rpartition("/")[0]: get(cache, path.rpartition("/")[0]) for path in paths(cache) if path.endswith("/values")}
    return put(cache, {path: EIGHT.decode(pair["values"]) * pair["scale"] for path, pair in stored.items()})
