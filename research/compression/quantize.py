"""Quantization: which kernels, and where asked for activations and cache, become numbers of a few bits, and how they are rounded."""

import abc
import dataclasses
import functools
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from research.compression.codes import INTEGERS, Grid, encode, number_format, scales
from research.compression.linear import Kind, Linear, Moments, moments, relative_error
from research.compression.quantized import EIGHT, Activations, FakeQuantized, Quantized, decoded, transposed
from research.compression.subject import Subject, get, put
from research.compression.wrapper import Wrapper
from research.core.errors import ConfigError
from research.core.tree import paths
from research.core.types import Objective

KINDS: tuple[Kind, ...] = ("dense", "conv", "embedding")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantization(abc.ABC):
    """What the methods share: which kernels become codes of which format.

    A layer's kernel counts as a matrix, inputs first: a convolution's inputs are (y, x, c in), an embedding's output channels are its tokens.

    Args:    format: "int8", "int4", "int3" (in the storage of int4), "int2", "nf4" or "fp8".
             grid: "symmetric" or "full", as of `Integer`.  group: inputs that share a scale; None: all of an output.
             activations: None, "dynamic" or "static"; cache: None or "int8"; both as of `Quantized`.
             only, skip: globs of kernel paths.
             partial: leave out layers named in `only` that cannot be quantized; one whose inputs the group does not divide gets one scale an output.
    """

    format: str = "int8"
    grid: Grid = "symmetric"
    group: int | None = None
    activations: Activations | None = None
    cache: Literal["int8"] | None = None
    only: tuple[str, ...] = ("**",)
    skip: tuple[str, ...] = ()
    partial: bool = False
    trains: ClassVar[bool] = False

    def __post_init__(self):
        number_format(self.format, self.grid)
        if self.group is not None and self.group < 1:
            raise ConfigError(f"method.group={self.group}: must be at least 1, or null for one scale an output")
        if self.activations is not None and self.format not in INTEGERS:
            raise ConfigError(
                f"method.activations={self.activations}: integers are multiplied with integers; method.format={self.format} is none, use int8"
            )

    def __call__(self, subject: Subject) -> Subject:
        """The model with codes for kernels.

        Raises:  ConfigError: a layer that this cannot quantize, a model that is quantized already, or data that counts nothing where it is needed.
        """
        subject = unquantized(subject)
        if self.cache is not None and subject.objective.decoder() is None:
            raise ConfigError(f"method.cache={self.cache}: this model has no decoder, so no cache; use cache=null")
        layers = chosen(subject, self.group, self.only, self.skip, self.partial)
        if self.activations is not None and (thin := [path for path in layers if path not in subject.layers]):
            raise ConfigError(
                f"method.activations={self.activations}: {thin[0]} is a factor of a kernel, whose inputs stay float; use activations=null"
            )
        own, notes = self._own(subject, layers)
        settings = {"format": self.format, "smoothed": self.smoothed, "activations": self.activations, "cache": self.cache}
        config = subject.wrapped("research.compression.quantized.Quantized", layers=specs(layers), **settings)
        frozen = {"own": put({}, own), "inner": subject.frozen}
        params = put(subject.params, dict.fromkeys(layers))
        return subject.replace(config=config, params=params, frozen=frozen, notes={**subject.notes, **notes})

    @property
    def smoothed(self) -> bool:
        """Whether `codes` gives input scales."""
        return False

    @abc.abstractmethod
    def codes(self, layer: Linear, matrix: Float[Array, "i o"], group: int | None, seen: Moments | None) -> dict[str, Array]:
        """{"values", "scale"} and, where smoothed, "input_scale" of one layer; traceable.

        Args:    seen: its inputs; None where there are none, as of an embedding that only looks up.
        """

    def nearest(self, matrix: Float[Array, "i o"], group: int | None) -> dict[str, Array]:
        """{"values", "scale"} of the matrix rounded to nearest."""
        form = number_format(self.format, self.grid)
        scale = scales(matrix, form, group)
        return {"values": encode(matrix, scale, form), "scale": scale}

    def stages(self, layers: Iterable[str]) -> list[list[str]]:
        """The layers that are quantized at once, from what their inputs are after the stages before."""
        return [list(layers)]

    def needs(self, layer: Linear) -> bool:
        """Whether a layer cannot be quantized without data."""
        return self.activations == "static"

    def _own(self, subject: Subject, layers: Mapping[str, tuple[Linear, int | None]]) -> tuple[dict[str, Any], dict[str, dict[str, float]]]:
        """({path: what takes the kernel's place}, notes on each layer)."""
        params, own, notes = subject.params, {}, {}
        for stage in self.stages(layers):
            asked = any(self.needs(layers[path][0]) for path in stage)
            seen = moments(subject.objective, (params, *subject.model[1:]), subject.batches, stage) if asked else {}
            kernels = {}
            for path in stage:
                layer, group = layers[path]
                if path in seen and not seen[path].count > 0:
                    raise ConfigError(f"calibration: no row of the data counts at {path}; give more calibration.examples")
                kernel = get(params, path)
                nameless = dataclasses.replace(layer, path="")  # layers of one size share a program
                own[path], kernels[path], note = _quantized(self, nameless, group, kernel, seen.get(path))
                if not math.isfinite(float(note["error"])):
                    raise ConfigError(
                        f"method: {path} cannot be quantized by these inputs: its Hessian cannot be inverted; a larger method.damp helps"
                    )
                bits = sum(leaf.size * jax.dtypes.itemsize_bits(leaf.dtype) for leaf in own[path].values())
                notes[path] = {"error": float(note["error"]), "bits": bits / kernel.size}
            params = put(params, kernels)
        return own, notes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Nearest(Quantization):
    """Each weight becomes the nearest number that has a code."""

    def codes(self, layer: Linear, matrix: Float[Array, "i o"], group: int | None, seen: Moments | None) -> dict[str, Array]:
        """The matrix rounded to nearest."""
        return self.nearest(matrix, group)


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizationAware:
    """Training with kernels that are rounded in every pass; quantized to nearest with the same settings, the run then computes the same numbers.

    Args:    format, grid, group, only, skip, partial: as of `Quantization`.
    """

    format: str = "int8"
    grid: Grid = "symmetric"
    group: int | None = None
    only: tuple[str, ...] = ("**",)
    skip: tuple[str, ...] = ()
    partial: bool = False
    trains: ClassVar[bool] = True

    def __post_init__(self):
        Nearest(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})

    def __call__(self, subject: Subject) -> Subject:
        """The model with rounding in it, its parameters as they are.

        Raises:  ConfigError: a layer that cannot be quantized so, or a model that is quantized already.
        """
        subject = unquantized(subject)
        layers = chosen(subject, self.group, self.only, self.skip, self.partial)
        target = "research.compression.quantized.FakeQuantized"
        config = subject.wrapped(target, layers=specs(layers), format=self.format, grid=self.grid)
        return subject.replace(config=config, frozen={"own": None, "inner": subject.frozen})


def unquantized(subject: Subject) -> Subject:
    """The model whose kernels can be quantized: of one that was trained with rounding, the one inside.

    Raises:  ConfigError: it is quantized already.
    """
    objective: Objective = subject.objective
    while isinstance(objective, Wrapper):
        if isinstance(objective, Quantized):
            by = next((e["method"] for e in reversed(subject.config.get("compression", ())) if "quantize" in e["method"]), "another run")
            raise ConfigError(f"method: this model is quantized already, by {by}: take the run that it was made from")
        objective = objective.objective
    if not isinstance(subject.objective, FakeQuantized):
        return subject
    return subject.replace(config={**subject.config, "objective": subject.config["objective"]["objective"]}, frozen=subject.frozen["inner"])


def chosen(subject: Subject, group: int | None, only: tuple[str, ...], skip: tuple[str, ...], partial: bool) -> dict[str, tuple[Linear, int | None]]:
    """{path: (layer, inputs that share a scale)} of what is to be quantized; of a kernel of low rank, both factors.

    Raises:  ConfigError: a group that does not divide a layer's inputs, or a kernel whose form has changed.
    """
    known, found = paths(subject.params), {}
    for path, layer in subject.chosen(only, skip, KINDS, partial).items():
        if path in known:
            found[path] = layer
        elif f"{path}/first" in known:
            for name in ("first", "second"):
                shape = known[f"{path}/{name}"].shape
                found[f"{path}/{name}"] = Linear(f"{path}/{name}", "dense", shape, len(shape) - 1 if name == "first" else 1)
        elif not partial:
            raise ConfigError(f"method: {path} is no parameter of {type(subject.objective).__name__}: merge its adapters first, or skip=[{path}]")
    groups = {path: _group(layer, group, partial) for path, layer in found.items()}
    return {path: (layer, groups[path]) for path, layer in found.items()}


def specs(layers: Mapping[str, tuple[Linear, int | None]]) -> list[list[Any]]:
    """The layers as a config holds them."""
    return [[path, layer.kind, list(layer.shape), layer.inputs, group] for path, (layer, group) in layers.items()]


def _group(layer: Linear, group: int | None, partial: bool) -> int | None:
    inputs = layer.shape[-1] if layer.kind == "embedding" else math.prod(layer.shape[: layer.inputs])
    if group is None or inputs % group == 0:
        return group
    if partial:
        return None
    near = min((n for n in range(1, inputs + 1) if inputs % n == 0), key=lambda n: abs(n - group))
    raise ConfigError(
        f"method.group={group}: {layer.path} has {inputs} inputs, which {group} does not divide (the nearest number that does is {near}); "
        "method.partial=true gives it one scale an output"
    )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _quantized(method: Quantization, layer: Linear, group: int | None, kernel: Array, seen: Moments | None):
    """(what takes the kernel's place, the kernel that it stands for, note) of one layer."""
    matrix = layer.matrix(kernel).astype(jnp.float32)
    stored = method.codes(layer, matrix, group, seen)
    if method.activations == "static":
        stored["activation_scale"] = jnp.ones((), jnp.float32)
        if seen is not None:
            largest = (seen.largest / stored.get("input_scale", 1.0)).max()
            stored["activation_scale"] = jnp.where(largest > 0, largest, 1.0) * (1 / EIGHT.largest)
    rounded = decoded(stored, number_format(method.format, method.grid))
    error = relative_error(matrix, rounded, None if seen is None else seen.gram)
    return transposed(stored), layer.kernel(rounded).astype(kernel.dtype), {"error": error}
