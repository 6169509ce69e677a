"""Adaptation by low-rank matrices beside a base that stands still, and merging them into it."""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from research.compression.linear import Linear
from research.compression.subject import Subject, get, put
from research.compression.wrapper import Wrapper
from research.core.errors import ConfigError, nearest
from research.core.tree import matches, paths
from research.core.types import Batch, Tree


@dataclasses.dataclass(frozen=True)
class LoRA(Wrapper):
    """An objective whose kernels are W + alpha / rank x down up, where W stands still.

    What is trained is {"adapters": {layer: {"down", "up"}}, "trained": parameters of the base that are trained in full}. `frozen["own"]` is the
    whole base, bit for bit as it was, those parameters included, so that leaving out what was trained gives the base back.

    Args:    layers: (path of the kernel, inputs, outputs) of each adapted layer; the last two are the sides of the kernel as a matrix.
             rank: inner size of an adapter; one is never larger than its layer's smaller side.  alpha: scale, divided by the rank.
             trained: globs of the base's parameters that are trained in full.
    Source:  Hu et al. 2021, section 4.1.
    """

    layers: tuple[tuple[str, int, int], ...] = ()
    rank: int = 8
    alpha: float = 16.0
    trained: tuple[str, ...] = ()

    def init(self, key: jax.Array, batch: Batch) -> tuple[Tree, Tree]:
        """(adapters, and a copy of what is trained in full; extra)."""
        base, extra = self.objective.init(key, batch)
        return self.adapted(key, base), extra

    def split(self, params: Tree) -> tuple[Tree, Tree]:
        """(what is trained, the base), where the adapters do nothing yet."""
        return self.adapted(jax.random.key(0), params), params

    def adapted(self, key: jax.Array, base: Tree) -> Tree:
        """What is trained, at first: `down` uniform in ±1 / sqrt(inputs), `up` zero, so that the model computes what the base does.

        Source:  as the authors' loralib, whose Kaiming-uniform `down` has a = sqrt(5), that is, this bound; the paper has a Gaussian one.
        """
        adapters: Tree = {}
        for number, (path, inputs, outputs) in enumerate(self.layers):
            rank, bound = min(self.rank, inputs, outputs), 1 / math.sqrt(inputs)
            down = jax.random.uniform(jax.random.fold_in(key, number), (inputs, rank), jnp.float32, -bound, bound)
            adapters = put(adapters, {f"{_module(path)}/down": down, f"{_module(path)}/up": jnp.zeros((rank, outputs), jnp.float32)})
        full = {path: leaf for path, leaf in paths(base).items() if matches(path, self.trained)}
        return {"adapters": adapters} | ({"trained": put({}, full)} if full else {})

    def whole(self, params: Tree, frozen: Tree) -> Tree:
        """The base with its adapters added."""
        base = self._base(params, frozen)
        plain = self.objective.whole(base, frozen["inner"]) if isinstance(self.objective, Wrapper) else base
        return put(plain, {path: self._kernel(get(plain, path), get(params["adapters"], _module(path))) for path, *_ in self.layers})

    def running(self, params: Tree, frozen: Tree) -> Any:
        """As the base runs."""
        return super().running(self._base(params, frozen), frozen)

    def _base(self, params, frozen):
        return put(frozen["own"], paths(params.get("trained", {})))

    def _kernel(self, kernel, adapter):
        product = jnp.matmul(adapter["down"], adapter["up"], precision="highest")
        return kernel + (self.alpha / self.rank * product).reshape(kernel.shape).astype(kernel.dtype)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapt:
    """LoRA: low-rank adapters beside kernels that stand still; training changes the adapters alone.

    Args:    rank: inner size of an adapter; layers with a smaller side have that many.  alpha: scale of what the adapters add, divided by the rank.
             only, skip: globs of the kernels that get one; only may be empty where train is not.
             train: globs of parameters that are trained in full, as head/**; they get none.
             seed: of the adapters.  partial: leave out layers named in `only` that can have none.
    Source:  Hu et al. 2021; over a quantized base: Dettmers et al. 2023 (QLoRA).
    """

    rank: int = 8
    alpha: float = 16.0
    only: tuple[str, ...] = ("**",)
    skip: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    seed: int = 0
    partial: bool = False
    trains: ClassVar[bool] = True

    def __post_init__(self):
        if self.rank < 1:
            raise ConfigError(f"method.rank={self.rank}: must be at least 1")
        if not self.alpha > 0:
            raise ConfigError(f"method.alpha={self.alpha}: must be above 0, as 2 x rank")
        if not self.only and not self.train:
            raise ConfigError("method.only=[]: nothing would be trained; name kernels that get an adapter, or parameters in method.train")

    def __call__(self, subject: Subject) -> Subject:
        """The base, still, with adapters that do nothing yet.

        Layers that the base computes without their kernel, as from quantized inputs, are left out where only the glob ** names them.

        Raises:  ConfigError: globs that fit nothing, or layers whose adapters would do nothing.
        """
        known = paths(subject.params)
        for glob in self.train:
            if not any(matches(path, [glob]) for path in known):
                raise ConfigError(f"method.train: {glob!r} fits no parameter{nearest(glob, known)}")
        chosen = subject.chosen(self.only, self.skip, partial=self.partial) if self.only else {}
        layers = {path: layer for path, layer in chosen.items() if not matches(path, self.train)}
        changed = self._adapted(subject, layers)
        if isinstance(subject.objective, Wrapper):
            idle = _idle(changed)
            named = [path for path in idle if matches(path, [glob for glob in self.only if glob != "**"])]
            if idle and (len(idle) == len(layers) or (named and not self.partial)):
                path = (named or idle)[0]
                raise ConfigError(f"method: an adapter of {path} would do nothing, since {_name(subject)} computes that layer without its kernel")
            changed = self._adapted(subject, {path: layer for path, layer in layers.items() if path not in idle})
        return changed

    def _adapted(self, subject: Subject, layers: Mapping[str, Linear]) -> Subject:
        """The model with adapters of these layers."""
        sides = {path: jax.eval_shape(layer.matrix, jax.ShapeDtypeStruct(layer.shape, jnp.float32)).shape for path, layer in layers.items()}
        node = [[path, *shape] for path, shape in sides.items()]
        config = subject.wrapped("research.compression.adapt.LoRA", layers=node, rank=self.rank, alpha=self.alpha, trained=list(self.train))
        changed = subject.replace(config=config, frozen={"own": subject.params, "inner": subject.frozen})
        params = _objective(changed).adapted(jax.random.key(self.seed), subject.params)
        return dataclasses.replace(changed, params=params, notes={path: {"rank": min(self.rank, *shape)} for path, shape in sides.items()})


@dataclasses.dataclass(frozen=True, kw_only=True)
class Merge:
    """LoRA's adapters added to the base for good: a plain model, which runs at the base's cost.

    Args:    drop: leave the adapters out instead, and all else that was trained: the base is back bit for bit, but for the running statistics of
             batch norms, which the adaptation has moved. Nothing is subtracted, which would round.
    """

    drop: bool = False
    trains: ClassVar[bool] = False

    def __call__(self, subject: Subject) -> Subject:
        """The plain model with the adapters in it, or the base as it was.

        Raises:  ConfigError: the run has no adapters.
        """
        objective, node = _objective(subject), subject.config["objective"]["objective"]
        if self.drop:
            return subject.replace(config={**subject.config, "objective": node}, params=subject.frozen["own"], frozen=subject.frozen["inner"])
        inner = objective.objective
        while isinstance(inner, Wrapper):  # a quantized base does not hold what is merged into it
            inner, node = inner.objective, node["objective"]
        params = jax.jit(objective.whole)(subject.params, subject.frozen)
        return subject.replace(config={**subject.config, "objective": node}, params=params, frozen=None)


def _module(path: str) -> str:
    return path.rpartition("/")[0]


def _objective(subject: Subject) -> LoRA:
    if not isinstance(subject.objective, LoRA):
        raise ConfigError(f"method=merge: this run has no adapters, its objective is {_name(subject)}")
    return subject.objective


def _name(subject: Subject) -> str:
    return type(subject.objective).__name__


def _idle(subject: Subject) -> list[str]:
    """The layers whose adapters do nothing, since the base computes them without the kernel that it is given, as from quantized inputs."""
    slopes = _slopes(subject.objective, *subject.model, subject.batches[0])
    return [path for path, *_ in _objective(subject).layers if not get(slopes, f"{_module(path)}/up")]


@functools.partial(jax.jit, static_argnums=0)
def _slopes(objective, params, extra, frozen, hyper, batch):
    """The largest slope of the outputs' squares with respect to each part of each adapter."""

    def squares(adapters):
        outputs, _ = objective.predict({**params, "adapters": adapters}, extra, frozen, batch, None, hyper)
        return sum(jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(outputs))

    return jax.tree.map(lambda x: jnp.abs(x).max(), jax.grad(squares)(params["adapters"]))
