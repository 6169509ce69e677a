"""Where a step runs: on one device, or data-parallel over several; the step function is the same object."""

import dataclasses
import functools
from collections.abc import Callable
from typing import ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.core.errors import ConfigError
from research.core.types import Batch, State, Tree
from research.training.step import Metrics, Step


class Parallel(Protocol):
    """How batches and states lie on devices, and the compiled program of a step."""

    axis: ClassVar[str | None]

    @property
    def count(self) -> int:
        """Devices that share a batch."""
        ...

    def put(self, batch: Batch) -> Batch:
        """A host batch on the devices."""
        ...

    def place(self, state: State) -> State:
        """A state on the devices."""
        ...

    def one(self, tree: Tree) -> Tree:
        """One copy of a placed state or of a step's metrics."""
        ...

    def train(self, step: Step) -> Callable[[State, Tree, Batch], tuple[State, Metrics]]:
        """The compiled step; its state argument is donated."""
        ...


# Module-level, with the content-hashed step as a static argument: one program per content, however many runs share the process.
_jit_train = jax.jit(lambda step, state, frozen, batch: step(state, frozen, batch), static_argnums=0, donate_argnums=1)
_create = jax.jit(lambda step, key, batch, hyper: step.create(key, batch, hyper), static_argnums=0)


def create(step: Step, key: jax.Array, batch: Batch, hyper: dict[str, float]) -> State:
    """The first state, made by one compiled program (initialising layer by layer is slower than compiling)."""
    return _create(step, key, batch, {name: jnp.float32(value) for name, value in hyper.items()})


@dataclasses.dataclass(frozen=True)
class Jit:
    """One device."""

    axis: ClassVar[str | None] = None

    @property
    def count(self) -> int:
        return 1

    def put(self, batch: Batch) -> Batch:
        return batch if jax.default_backend() == "cpu" else jax.device_put(batch)  # on CPU a separate transfer costs 0.3 ms and gains nothing

    def place(self, state: State) -> State:
        return jax.device_put(state)

    def one(self, tree: Tree) -> Tree:
        return tree

    def train(self, step: Step):
        return lambda state, frozen, batch: _jit_train(step, state, frozen, batch)


@dataclasses.dataclass(frozen=True)
class Pmap:
    """Data parallelism over the local devices by `jax.pmap`: the state is copied to each, the batch is cut in equal parts.

    Args:    devices: how many local devices; None: all.
    Raises:  ConfigError: more devices than there are.
    """

    devices: int | None = None
    axis: ClassVar[str | None] = "data"

    def __post_init__(self):
        if self.devices is not None and not 1 <= self.devices <= jax.local_device_count():
            raise ConfigError(f"parallel.devices={self.devices}: this machine has {jax.local_device_count()}")

    @property
    def count(self) -> int:
        return self.devices or jax.local_device_count()

    def put(self, batch: Batch) -> Batch:
        return jax.device_put(
            jax.tree.map(lambda x: np.reshape(x, (self.count, -1, *x.shape[1:])), batch), self._sharding
        )  # [devices, b / devices, ...]

    def place(self, state: State) -> State:
        return jax.device_put(jax.tree.map(lambda x: jnp.broadcast_to(x, (self.count, *x.shape)), state), self._sharding)

    def one(self, tree: Tree) -> Tree:
        return jax.tree.map(lambda x: x[0], tree)

    def train(self, step: Step):
        return _pmapped(step, self.count)

    @property
    def _sharding(self) -> NamedSharding:
        return NamedSharding(Mesh(np.array(jax.local_devices()[: self.count]), (self.axis,)), PartitionSpec(self.axis))


@functools.lru_cache(maxsize=64)
def _pmapped(step: Step, count: int):
    return jax.pmap(step.__call__, axis_name=step.axis, in_axes=(0, None, 0), donate_argnums=0, devices=jax.local_devices()[:count])
