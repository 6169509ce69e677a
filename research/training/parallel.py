"""Where a step runs: on one device, or over many, of one machine or several; the step function is the same object."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from research.core.axis import Layout, Names, laid_out, layerless, recorded_names
from research.core.errors import ConfigError, nearest
from research.core.tree import STACKED, map_paths, paths
from research.core.types import Batch, Objective, State, Tree
from research.training.step import Held, Metrics, Picks, Step, chunked


class Parallel(Protocol):
    """How batches and states lie on devices, and the compiled program of a step."""

    axis: ClassVar[str | None]

    @property
    def count(self) -> int:
        """Into how many equal parts a batch is cut."""
        ...

    @property
    def size(self) -> int:
        """Devices that compute one step together."""
        ...

    def fit(self, objective: Objective, batch: Batch) -> "Parallel":
        """This, knowing what the objective's arrays are; nothing is computed and no device is looked at.

        Args:    batch: abstract, of one example.
        Raises:  ConfigError: the arrays cannot be cut so; the message has the numbers.
        """
        ...

    def check(self) -> None:
        """Refuses what the devices of this process cannot do.

        Raises:  ConfigError: with the number of devices that are wanted and that there are.
        """
        ...

    @property
    def layout(self) -> Layout | None:
        """How one program's arrays lie on several devices; None where a program has one device."""
        ...

    @property
    def share(self) -> tuple[int, int]:
        """(i, n): this host reads the i-th of n equal parts of every batch."""
        ...

    def feed(self, batch: Batch) -> Batch:
        """This host's part of a batch for another program than the step, as evaluation; its size is a multiple of `count` where there is a layout."""
        ...

    def put(self, batch: Batch) -> Batch:
        """This host's part of a batch on the devices."""
        ...

    def create(self, step: Step, key: jax.Array, batch: Batch, hyper: Mapping[str, float]) -> State:
        """The first state, made by one compiled program (initialising layer by layer is slower than compiling), where it will stay."""
        ...

    def abstract(self, tree: Tree) -> Tree:
        """Abstract values with the places where `place` puts them, for reading a checkpoint there at once."""
        ...

    def place(self, state: State) -> State:
        """A state on the devices."""
        ...

    def hold(self, frozen: Tree) -> Tree:
        """What stands still beside the state, on the devices."""
        ...

    def bytes_per_device(self, tree: Tree) -> int:
        """Bytes that each device holds of a tree of abstract values."""
        ...

    def one(self, tree: Tree) -> Tree:
        """One copy of a placed state or of a step's metrics."""
        ...

    def train(self, step: Step) -> Callable[[State, Tree, Batch], tuple[State, Metrics]]:
        """The compiled step; its state argument is donated."""
        ...

    def train_chunk(self, step: Step) -> Callable[[State, Tree, Held, Picks], tuple[State, Metrics]]:
        """The compiled chunk of steps over a split that lies on the devices; its state argument is donated.

        Raises:  ConfigError: this layout has none.
        """
        ...


# Module-level, with the content-hashed step as a static argument: one program per content, however many runs share the process.
_jit_train = jax.jit(lambda step, state, frozen, batch: step(state, frozen, batch), static_argnums=0, donate_argnums=1)
_jit_chunk = jax.jit(lambda step, state, frozen, held, picks: chunked(step)(state, frozen, held, picks), static_argnums=0, donate_argnums=1)


@functools.cache
def _creating(platform: str) -> Callable[..., State]:
    """The program that makes a first state. It runs once, so on CPU LLVM's quick passes will do: the same numbers in half the compile time."""
    quick = {"xla_backend_optimization_level": 1} if platform == "cpu" else None

    def first_state(step: Step, layout, key, batch, hyper):
        state = step.create(key, batch, hyper)
        return state if layout is None else _stay(state, layout)

    return jax.jit(first_state, static_argnums=(0, 1), compiler_options=quick)


def create(step: Step, key: jax.Array, batch: Batch, hyper: Mapping[str, float], layout: Any = None) -> State:
    """The first state by one compiled program: on one device, or where a sharded layout has its arrays."""
    return _creating(jax.default_backend())(step, layout, key, batch, _values(hyper))


def abstract_state(step: Step, key: jax.Array, batch: Batch, hyper: Mapping[str, float]) -> State:
    """What `create` gives on one device, as shapes and dtypes: by the same program, which keeps what is traced here."""
    return _creating(jax.default_backend()).eval_shape(step, None, key, batch, _values(hyper))


@dataclasses.dataclass(frozen=True)
class _Whole:
    """What holds where each device has the whole state."""

    axis: ClassVar[str | None] = None

    @property
    def count(self) -> int:
        return 1

    @property
    def size(self) -> int:
        return self.count

    def fit(self, objective: Objective, batch: Batch) -> "Parallel":
        return self  # type: ignore[return-value]  # the two classes below have the rest

    def check(self) -> None:
        if jax.process_count() > 1:
            raise ConfigError(f"parallel={type(self).__name__.lower()} is for one machine; for {jax.process_count()} use parallel=data, fsdp or mesh")

    @property
    def layout(self) -> Layout | None:
        return None

    @property
    def share(self) -> tuple[int, int]:
        return 0, 1

    def feed(self, batch: Batch) -> Batch:
        return batch

    def create(self, step: Step, key: jax.Array, batch: Batch, hyper: Mapping[str, float]) -> State:
        return create(step, key, batch, hyper)

    def abstract(self, tree: Tree) -> Tree:
        return tree

    def hold(self, frozen: Tree) -> Tree:
        return frozen

    def bytes_per_device(self, tree: Tree) -> int:
        return sum(math.prod(leaf.shape) * _width(leaf) for leaf in jax.tree.leaves(tree))


@dataclasses.dataclass(frozen=True)
class Jit(_Whole):
    """One device."""

    def put(self, batch: Batch) -> Batch:
        return batch if jax.default_backend() == "cpu" else jax.device_put(batch)  # on CPU a separate transfer costs 0.3 ms and gains nothing

    def place(self, state: State) -> State:
        return jax.device_put(state)

    def one(self, tree: Tree) -> Tree:
        return tree

    def train(self, step: Step):
        return lambda state, frozen, batch: _jit_train(step, state, frozen, batch)

    def train_chunk(self, step: Step):
        return lambda state, frozen, held, picks: _jit_chunk(step, state, frozen, held, picks)


@dataclasses.dataclass(frozen=True)
class Pmap(_Whole):
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

    def train_chunk(self, step: Step):
        raise ConfigError("train.chunk: parallel=pmap takes single steps; use train.chunk=1, or parallel=jit")

    @property
    def _sharding(self) -> NamedSharding:
        return NamedSharding(Mesh(np.array(jax.local_devices()[: self.count]), (self.axis,)), PartitionSpec(self.axis))


@functools.lru_cache(maxsize=64)
def _pmapped(step: Step, count: int):
    return jax.pmap(step.__call__, axis_name=step.axis, in_axes=(0, None, 0), donate_argnums=0, devices=jax.local_devices()[:count])


AXES = ("data", "fsdp", "tensor", "sequence")
EQUAL = ("heads", "hidden")  # a name that the program itself cuts: it must divide; others stay whole where they do not
RULES = (("batch", ("data", "fsdp")), ("time", ("sequence",)), ("width", ("fsdp",)), *((name, ("tensor",)) for name in (*EQUAL, "vocabulary")))


@dataclasses.dataclass(frozen=True)
class Sharded:
    """One program over a mesh of devices: `data x fsdp x tensor x sequence` of them, of one machine or several.

    A batch is cut over data and fsdp, a text's positions over sequence, heads and hidden units over tensor, and the state itself over fsdp; the
    compiler adds the communication. The rules say which logical axes of a model, named in layers/, go where. Where none of a large array's
    names is cut over fsdp, its longest axis that fsdp divides is.

    Args:    data, fsdp, tensor, sequence: devices along each axis; one of them may be None: all that the others leave.
             rules: (logical axis of a model, axes of the mesh).  whole: arrays of fewer entries are copied to each device.
             names: (path of a parameter, names of its axes), as `fit` finds them.
    Raises:  ConfigError: a size or an axis that cannot be.
    """

    data: int | None = None
    fsdp: int | None = 1
    tensor: int | None = 1
    sequence: int | None = 1
    rules: tuple[tuple[str, tuple[str, ...]], ...] = RULES
    whole: int = 1024
    names: tuple[tuple[str, Names], ...] = ()
    axis: ClassVar[str | None] = None

    def __post_init__(self):
        sizes = {name: getattr(self, name) for name in AXES}
        for name, size in sizes.items():
            if size is not None and size < 1:
                raise ConfigError(f"parallel.{name}={size}: must be at least 1, or null for all devices that the other axes leave")
        if len(open_axes := [name for name, size in sizes.items() if size is None]) > 1:
            raise ConfigError(f"parallel.{open_axes[0]} and parallel.{open_axes[1]} are both null: only one axis can take what the others leave")
        for name, axes in self.rules:
            for axis in axes:
                if axis not in AXES:
                    raise ConfigError(f"parallel.rules.{name}: {axis!r} is no axis of the mesh{nearest(axis, AXES)}")

    @functools.cached_property
    def layout(self) -> Layout:
        """The mesh's axes with their sizes, and the rules."""
        sizes = {name: getattr(self, name) for name in AXES}
        known = math.prod(size for size in sizes.values() if size is not None)
        if None in sizes.values() and jax.device_count() % known:
            shown = " x ".join(f"{name} {size}" for name, size in sizes.items() if size not in (None, 1))
            raise ConfigError(f"parallel: {shown} does not divide the {_plural(jax.device_count())} that there are")
        return Layout(tuple((name, jax.device_count() // known if size is None else size) for name, size in sizes.items()), self.rules)

    @property
    def count(self) -> int:
        return self.layout.parts("batch")

    @property
    def size(self) -> int:
        return self.layout.size(*AXES)

    def fit(self, objective: Objective, batch: Batch) -> "Sharded":
        key = jax.eval_shape(lambda: jax.random.key(0))
        params, extra = jax.eval_shape(objective.init, key, batch)
        frozen = jax.eval_shape(objective.still, key, batch)
        with recorded_names() as names:
            jax.eval_shape(lambda p, e, f, b: objective.predict(p, e, f, b, None, _AnyHyper())[0], params, extra, frozen, batch)
        fitted = dataclasses.replace(self, names=tuple(sorted(names.items())))
        for path, leaf in paths(params).items():
            for name, size in zip(fitted._names_of(path, leaf.shape), leaf.shape, strict=True):
                if name in EQUAL and size % (parts := self.layout.parts(name)):
                    axes = ", ".join(f"parallel.{axis}={self.layout.size(axis)}" for axis in self.layout.cut(name))
                    raise ConfigError(f"{axes}: the {name} of {path} are {size}, which {parts} does not divide")
        time = batch["tokens"].shape[1] if "tokens" in batch else None
        if time is not None and time % (parts := self.layout.parts("time")):
            raise ConfigError(
                f"parallel.sequence={parts} does not divide a context of {time} tokens; the nearest that it does is {max(time // parts, 1) * parts}"
            )
        return fitted

    def check(self) -> None:
        wanted, there = self.size, jax.device_count()
        if wanted > there or (jax.process_count() > 1 and wanted != there):
            shown = " x ".join(f"{name} {size}" for name, size in self.layout.sizes if size > 1) or "data 1"
            hint = "; debug.cpu_devices=N pretends that a CPU is N" if jax.default_backend() == "cpu" and jax.process_count() == 1 else ""
            raise ConfigError(f"parallel: {shown} needs {_plural(wanted)}, and there {'is' if there == 1 else 'are'} {there}{hint}")

    @functools.cached_property
    def share(self) -> tuple[int, int]:
        place = NamedSharding(self.layout.mesh, self.layout.spec(("batch",)))
        held = place.addressable_devices_indices_map((self.count,)).values()
        read = {index[0].indices(self.count)[0] for index in held if index is not None}
        first, parts = min(read), len(read)
        if max(read) - first + 1 != parts or first % parts or self.count % parts:
            raise ConfigError("parallel: the examples of this host's devices are no equal part of a batch; make data x fsdp a multiple of the hosts")
        return first // parts, self.count // parts

    def feed(self, batch: Batch) -> Batch:
        return self.put(batch)

    def put(self, batch: Batch) -> Batch:
        time = np.shape(batch["tokens"])[1] if "tokens" in batch else None

        places = {name: self._fed[np.ndim(x) > 1 and x.shape[1] == time] for name, x in batch.items()}
        if jax.process_count() == 1:
            return jax.device_put(dict(batch), places)
        return {name: _from_part(np.asarray(x), places[name], *self.share) for name, x in batch.items()}

    def create(self, step: Step, key: jax.Array, batch: Batch, hyper: Mapping[str, float]) -> State:
        return create(step, key, batch, hyper, self)

    def abstract(self, tree: Tree) -> Tree:
        return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), tree, self._places(tree))

    def place(self, state: State) -> State:
        return jax.tree.map(_moved, state, self._places(state))

    def hold(self, frozen: Tree) -> Tree:
        return jax.tree.map(_moved, frozen, self._places(frozen))

    def one(self, tree: Tree) -> Tree:
        return tree

    def train(self, step: Step):
        return lambda state, frozen, batch: _sharded_train(step, self, state, frozen, batch)

    def train_chunk(self, step: Step):
        everywhere = NamedSharding(self.layout.mesh, PartitionSpec())
        copies: dict[int, Held] = {}  # the split on each device, made once

        def train(state, frozen, held, picks):
            if id(held) not in copies:
                copies[id(held)] = jax.device_put(held, everywhere)
            return _sharded_chunk(step, self, state, frozen, copies[id(held)], picks)

        return train

    def bytes_per_device(self, tree: Tree) -> int:
        def held(path, leaf):
            parts = [self.layout.size(*_axes(entry)) for entry in self.spec(path, leaf.shape)]
            return math.prod(leaf.shape) // math.prod(parts) * _width(leaf)

        return sum(held(path, leaf) for path, leaf in paths(tree).items())

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Over which axes of the mesh an array of the state is cut.

        Args:    path: in the state, or in a part of it.
        """
        if math.prod(shape) < self.whole:
            return PartitionSpec()
        names, layout = self._names_of(path, shape), self.layout
        entries = [_axes(entry) for entry in layout.spec(names)]
        entries = [axes if size % layout.size(*axes) == 0 else () for axes, size in zip(entries, shape, strict=True)]
        fsdp = layout.size("fsdp")
        if fsdp > 1 and not any("fsdp" in axes for axes in entries):
            first = _is_stacked(path, shape)  # the axis of the layers is scanned over, one layer at a time
            free = [i for i in range(first, len(shape)) if not entries[i] and shape[i] % fsdp == 0]
            if free:
                entries[max(free, key=lambda i: shape[i])] = ("fsdp",)
        return PartitionSpec(*(axes or None for axes in entries))

    @functools.cached_property
    def _fed(self) -> tuple[NamedSharding, NamedSharding]:
        """Where a field of a batch goes: one without positions, and one with."""
        mesh, spec = self.layout.mesh, self.layout.spec
        return NamedSharding(mesh, spec(("batch",))), NamedSharding(mesh, spec(("batch", "time")))

    def _places(self, tree: Tree) -> Tree:
        return map_paths(lambda path, x: NamedSharding(self.layout.mesh, self.spec(path, x.shape)), tree)

    def _names_of(self, path: str, shape: tuple[int, ...]) -> Names:
        """The names of an array's axes: those of the parameter whose path its own ends with, as the moments of an optimizer do."""
        path = layerless(path)
        found = [known for known in _ends(path) if known in dict(self.names)]
        names: Names = dict(self.names)[found[0]] if found else ()
        if _is_stacked(path, shape) and len(shape) == len(names) + 1:
            return (None, *names)
        return names if len(names) == len(shape) else (None,) * len(shape)


class _AnyHyper(dict):
    """Stands for every value that a model may read, where only the names of its parameters matter."""

    def __missing__(self, name: str) -> jax.Array:
        return jnp.zeros((), jnp.float32)


def _sharded(step, parallel, state, frozen, batch):
    with laid_out(parallel.layout):
        state, metrics = step(state, frozen, batch)
        return _stay(state, parallel), jax.lax.with_sharding_constraint(metrics, NamedSharding(parallel.layout.mesh, PartitionSpec()))


def _chunk(step, parallel, state, frozen, held, picks):
    with laid_out(parallel.layout):
        return chunked(functools.partial(_sharded, step, parallel))(state, frozen, held, picks)


_sharded_train = jax.jit(_sharded, static_argnums=(0, 1), donate_argnums=2)
_sharded_chunk = jax.jit(_chunk, static_argnums=(0, 1), donate_argnums=2)


def _stay(state, parallel):
    """The state, every array where it lay before, so that the next step finds it there and its memory can be used again."""
    return jax.lax.with_sharding_constraint(state, parallel._places(state))


def _moved(x: Any, place: NamedSharding) -> jax.Array:
    """x on the devices of the mesh; on several hosts each fills its own."""
    if isinstance(x, jax.Array) and x.sharding.is_equivalent_to(place, x.ndim):
        return x
    if jax.process_count() == 1:
        return jax.device_put(x, place)
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = np.asarray(jax.random.key_data(x))
        raw = jax.make_array_from_callback(data.shape, NamedSharding(place.mesh, PartitionSpec()), lambda index: data[index])
        return jax.random.wrap_key_data(raw, impl=jax.random.key_impl(x))
    whole = np.asarray(x)
    return jax.make_array_from_callback(whole.shape, place, lambda index: whole[index])


def _from_part(part: np.ndarray, place: NamedSharding, i: int, n: int) -> jax.Array:
    """A global array of which this host has the i-th of n equal parts along the first axis."""
    rows = part.shape[0]

    def held(index):
        start, stop, _ = index[0].indices(rows * n)
        return part[(slice(start - i * rows, stop - i * rows), *index[1:])]

    return jax.make_array_from_callback((rows * n, *part.shape[1:]), place, held)


def _values(hyper: Mapping[str, float]) -> dict[str, jax.Array]:
    return {name: jnp.float32(value) for name, value in hyper.items()}


def _width(leaf: Any) -> int:
    """Bytes of one entry."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct((), leaf.dtype))
        return math.prod(data.shape) * data.dtype.itemsize
    return leaf.dtype.itemsize


def _axes(entry: Any) -> tuple[str, ...]:
    """An entry of a partition spec as a tuple."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def _ends(path: str) -> list[str]:
    """The path, then what is left of it without its first word, and so on."""
    words = path.split("/")
    return ["/".join(words[i:]) for i in range(len(words))]


def _is_stacked(path: str, shape: tuple[int, ...]) -> bool:
    return f"/{STACKED}/" in f"/{path}" and len(shape) > 0


def _plural(devices: int) -> str:
    return f"{devices} device{'s' if devices != 1 else ''}"
