"""Checkpoints: Orbax writes and reads the arrays; what makes a checkpoint safe to rely on is here.

<run>/checkpoints/<step>/state/          the arrays, by Orbax, as the canonical tree
                         host.json       what the host remembers: best, patience, counts
                         best            an empty file, where this was the best so far
                         manifest.json   written last: sha256 of every other file, shape and dtype of every leaf, state_sha256
<run>/checkpoints/frozen/                the same for what no step changes, written once; only where a run has such a thing
"""

import contextlib
import dataclasses
import errno
import json
import logging
import math
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import NamedSharding, PartitionSpec

from research.core import hosts
from research.core.errors import CheckpointError, ConfigError, nearest
from research.core.folder import plain
from research.core.tree import paths, restack, sha256, unstack
from research.core.types import State, Tree
from research.training import manifest

HOST, BEST, ARRAYS, FROZEN, PARTIAL = "host.json", "best", "state", "frozen", ".partial"
Kinds = dict[str, tuple[str, tuple[int, ...]]]  # canonical path -> dtype, shape
PACE_S = 10.0  # between two checkpoints of a run that evaluates more often: what a kill -9 may cost it, and an evaluation or two
_SMALL = 1 << 24  # bytes of arrays that a paced run keeps of its best step, so that a short run need not read back what it has just written
_FILES = 1 << 18  # bytes of all that a checkpoint holds beside its arrays, in blocks of a disk

_log = logging.getLogger(__name__)
# Orbax logs pages about each failed write; what failed comes back as our own error, in one line.
logging.getLogger("absl").addFilter(lambda record: "_SignalingThread" not in record.getMessage())


class _UnreadableError(Exception):
    """Why a checkpoint with a sound manifest cannot be used."""


@dataclasses.dataclass(frozen=True)
class _Snapshot:
    """What one checkpoint is to say: a copy, which no step changes any more."""

    step: int
    leaves: dict[str, Any]
    kinds: Kinds
    host: str
    best: bool


class Checkpoints:
    """The checkpoints of one run folder: one writer at a time, any number of readers.

    A checkpoint is written by one background thread under another name and renamed when it is whole, so kill -9 at any moment loses no more than
    the steps since the last one. Always kept are the latest, the one before it (should the latest be damaged) and the best.

    Args:    run: the run folder, local or any address that etils.epath knows.  keep: what else is kept: "latest" (nothing), "all", or
             "every:N" (steps that N divides).  pace_s: seconds between two that are written; those in between wait in memory, where a later one
             takes their place, and the last is written by `wait`.  read_only: for readers: leave what an interrupted writer left behind, and
             refuse to save.
    Raises:  ConfigError: an unknown `keep`.
    """

    def __init__(self, run: epath.PathLike, keep: str = "latest", *, pace_s: float = 0.0, read_only: bool = False):
        path = epath.Path(run)
        self.folder = (path if path.is_absolute() else path.absolute()) / "checkpoints"
        self._period = _period(keep)
        self._read_only = read_only
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._pace_s, self._paced = pace_s, time.monotonic()
        self._held: _Snapshot | None = None  # not on its way to the disk yet
        self._best: _Snapshot | None = None  # as it was written, where it is small
        if not read_only and hosts.first():
            self._clean()

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            self.close()
        except CheckpointError as error:
            if kind is None:
                raise
            _log.error("%s", error)  # the error that is under way says more

    def save(self, state: State, host: dict[str, Any], *, best: bool) -> None:
        """Begins to write a checkpoint, or holds it for later; the state is copied before this returns, so its buffers may be donated at once.

        Later steps, left from before a rollback, are removed first. At most one checkpoint is being written: this waits for the one before.

        Args:    state: one copy of it.  host: JSON values, numpy scalars included; NaN becomes null.  best: whether it is the best so far.
        Raises:  CheckpointError: the checkpoint before could not be written.
        """
        if self._read_only:
            raise ValueError(f"{self.folder} was opened for reading")
        if self._held is not None and self._held.best and not best:
            self._begin(self._held)
        self._held, step = None, int(state.step)
        kept = self._period and step % self._period == 0
        if due := kept or hosts.count() > 1 or time.monotonic() - self._paced >= self._pace_s:
            self._written()  # before there is another copy in memory
        new = _Snapshot(step, _own(state), _kinds(state), json.dumps(plain(host)), best)
        if due:
            self._begin(new)
        else:
            self._held = new

    def wait(self) -> None:
        """Returns when all that was saved is on disk.

        Raises:  CheckpointError: it could not be written; the message names its path.
        """
        held, self._held = self._held, None
        if held is not None:
            self._begin(held)
        self._written()

    def _begin(self, snapshot: "_Snapshot") -> None:
        self._written()
        self._paced = time.monotonic()
        if snapshot.best:
            small = self._pace_s and hosts.count() == 1 and sum(leaf.nbytes for leaf in snapshot.leaves.values()) <= _SMALL
            self._best = snapshot if small else None
        if hosts.count() > 1:  # each writes its own part of the arrays, before the next step may use their memory again
            self._write(snapshot)
        else:
            self._pending = self._thread.submit(self._write, snapshot)

    def _written(self) -> None:
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Waits, and ends the background thread.

        Raises:  CheckpointError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._thread.shutdown()

    def steps(self) -> list[int]:
        """The steps of the whole checkpoints on disk, oldest first."""
        if not self.folder.exists():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit() and (path / manifest.NAME).exists())

    def latest(self) -> int | None:
        """The newest step; None where there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The newest step that was saved as the best so far; None where there is none."""
        return max((step for step in self.steps() if (self._path(step) / BEST).exists()), default=None)

    def restore(self, which: str | int, like: State) -> tuple[State, dict[str, Any]]:
        """(the state, what the host remembered), verified against the manifest before anything is read; a small best one that this has just
        written comes from memory.

        Where "latest" or "best" is damaged, the newest undamaged step before or beside it is taken, with a warning that names the bad file.

        Args:    which: "latest", "best" (the latest, where no step was saved as the best), or a step.
                 like: the state's structure, shapes and dtypes, stacked or not; leaves with a sharding are placed accordingly.
        Raises:  CheckpointError: there is none; all are damaged; or it is another model's, with the first leaves that differ.
        """
        self.wait()
        if which == "best" and self._best is not None and self._best.step == self.best() and self._best.kinds == _kinds(like):
            copies = {path: leaf.copy() for path, leaf in self._best.leaves.items()}  # a step may be given them to write over
            return jax.tree.map(_placed, restack(copies, like), like), json.loads(self._best.host)
        damaged: dict[int, str] = {}
        while (step := next((step for step in self._order(which) if step not in damaged), None)) is not None:  # a writer may add and remove some
            bad = self._damage(step, _kinds(like))
            if bad is None:
                try:
                    return self._read(step, like)
                except _UnreadableError as error:
                    bad = str(error)
            damaged[step] = f"{self._path(step)} ({bad})"
            _log.warning("damaged checkpoint: %s; trying the one before", damaged[step])
        if damaged:
            raise CheckpointError(f"damaged checkpoint: {', '.join(damaged.values())}; and no other to fall back to")
        raise CheckpointError(f"{self.folder} holds no checkpoint")

    def save_frozen(self, frozen: Tree) -> None:
        """Writes what no step changes, once, before the first checkpoint; nothing where there is nothing.

        Raises:  CheckpointError: it cannot be written; the message names its path.
        """
        if self._read_only:
            raise ValueError(f"{self.folder} was opened for reading")
        if leaves := _own(frozen):
            with self._writing(FROZEN):
                self._replace(FROZEN, leaves, {"state_sha256": sha256(leaves), "tree": _kinds(frozen)}, {})

    def frozen(self, like: Tree) -> Tree:
        """What no step changes, verified as a checkpoint is; `like` itself where it holds no array.

        Args:    like: its structure, shapes and dtypes.
        Raises:  CheckpointError: it is not there, damaged, or another model's; nothing else can take its place.
        """
        if not jax.tree.leaves(like):
            return like
        path = self._path(FROZEN)
        if not path.exists():
            raise CheckpointError(f"{path} is missing: this model needs what was frozen when the run was made")
        bad = self._damage(FROZEN, _kinds(like))
        if bad is None:
            try:
                return self._arrays(FROZEN, like)
            except _UnreadableError as error:
                bad = str(error)
        raise CheckpointError(f"damaged checkpoint: {path} ({bad}); and no other to fall back to")

    def _path(self, step: int | str) -> epath.Path:
        return self.folder / str(step)

    def _order(self, which: str | int) -> list[int]:
        """The steps to try, first choice first."""
        steps = self.steps()[::-1]
        if which == "latest":
            return steps
        if which == "best":
            return sorted(steps, key=lambda step: not (self._path(step) / BEST).exists())  # stable: newest first within each group
        if not isinstance(which, int):
            raise ConfigError(f"checkpoint={which!r}: must be a step, 'latest' or 'best'")
        if which not in steps:
            raise CheckpointError(f"checkpoint={which}: {self.folder} has no such step{nearest(str(which), map(str, steps))}")
        return [which]

    def _damage(self, step: int | str, expected: Kinds) -> str | None:
        """The first bad file of a checkpoint; None where all are as they were written.

        Raises:  CheckpointError: it is whole, and another model's.
        """
        path = self._path(step)
        content = manifest.read(path)
        if content is None:
            return manifest.NAME
        _require_same(path, {name: (dtype, tuple(shape)) for name, (dtype, shape) in content["tree"].items()}, expected)
        return manifest.damage(path, content)

    def _read(self, step: int, like: State) -> tuple[State, dict[str, Any]]:
        """A checkpoint whose files are as they were written; that what they say is what was saved is seen here, from end to end."""
        try:
            host = json.loads((self._path(step) / HOST).read_text())
        except (OSError, ValueError) as error:
            raise _UnreadableError(f"cannot be read: {_reason(error)}") from error
        return self._arrays(step, like), host

    def _arrays(self, step: int | str, like: Tree) -> Tree:
        path = self._path(step)
        stored = {name: _stored(leaf) for name, leaf in _abstract(like).items()}
        try:
            with _orbax() as (orbax, args):
                arrays = orbax.restore(path / ARRAYS, args=args.StandardRestore(_nested(stored)))
        except Exception as error:  # pages of TensorStore's text
            raise _UnreadableError(f"cannot be read: {_reason(error)}") from error
        leaves = {**stored, **flatten_dict(arrays, sep="/")}
        if (content := manifest.read(path)) is None or sha256(leaves) != content["state_sha256"]:
            raise _UnreadableError("its arrays are not those that were saved")
        return jax.tree.map(_placed, restack(leaves, like), like)

    def _write(self, new: "_Snapshot") -> None:
        """One checkpoint, in the background thread."""
        with self._writing(str(new.step)):
            for later in reversed(self.steps()):
                if later > new.step and hosts.first():
                    _remove(self._path(later))
            files = {HOST: new.host} | ({BEST: ""} if new.best else {})
            content = {"step": new.step, "state_sha256": sha256(new.leaves), "tree": new.kinds}
            self._replace(str(new.step), new.leaves, content, files)
            if hosts.first():
                self._prune()

    def _replace(self, name: str, leaves: dict[str, Any], content: dict[str, Any], files: Mapping[str, str]) -> None:
        """Writes a sealed folder of arrays and small files under another name, and renames it when it is whole.

        Of several hosts each writes its part of the arrays, the first one all else.
        """
        path, part = self.folder / name, self.folder / f"{name}{PARTIAL}"
        if hosts.first():
            _remove(part)
            part.mkdir(parents=True)
            _require_space(part, leaves)
        hosts.wait(f"begin {name}")
        with _orbax() as (orbax, args):
            orbax.save(part / ARRAYS, args=args.StandardSave(_nested(leaves)))
        if hosts.first():
            for file, text in files.items():
                (part / file).write_text(text)
            manifest.write(part, content)
            _remove(path)
            part.rename(path)
        hosts.wait(f"end {name}")

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[None]:
        """Names the path in whatever goes wrong, and takes back what is half written."""
        part = self.folder / f"{name}{PARTIAL}"
        try:
            yield
        except Exception as error:
            with contextlib.suppress(OSError):  # the disk that refused the checkpoint may refuse this too; the next writer cleans
                if not (part / manifest.NAME).exists():  # a whole one may be all that is left of this step
                    _remove(part)
            raise CheckpointError(f"cannot write checkpoint {self.folder / name}: {_reason(error)}; earlier checkpoints stay") from error

    def _prune(self) -> None:
        """Removes what nobody asked to keep."""
        steps = self.steps()
        kept = {*steps[-2:], self.best()}
        for step in steps:
            if step not in kept and not (self._period and step % self._period == 0):
                _remove(self._path(step))

    def _clean(self) -> None:
        """Finishes or removes what a killed writer left behind."""
        for path in list(self.folder.iterdir()) if self.folder.exists() else ():
            if path.name.endswith(PARTIAL) and manifest.read(path) is not None:  # killed between the last two lines of a save
                final = path.parent / path.name.removesuffix(PARTIAL)
                _remove(final)
                path.rename(final)
            elif path.name.endswith(PARTIAL) or (path.name.isdigit() and not (path / manifest.NAME).exists()):
                _remove(path)


@contextlib.contextmanager
def _orbax() -> Iterator[tuple[Any, Any]]:
    """(a checkpointer, what makes its arguments). Imported at the first checkpoint: a quarter of a second beside the steps instead of before them."""
    import orbax.checkpoint

    with orbax.checkpoint.Checkpointer(orbax.checkpoint.StandardCheckpointHandler()) as checkpointer:
        yield checkpointer, orbax.checkpoint.args


def _period(keep: str) -> int:
    """N: steps that N divides are kept for good; 0: none."""
    word, _, number = keep.partition(":")
    if word == "every" and number.isdigit() and int(number) > 0:
        return int(number)
    if keep not in ("latest", "all"):
        raise ConfigError(f"train.keep={keep!r}: must be latest, all, or every:N with N at least 1")
    return 1 if keep == "all" else 0


def _host_copy(tree: Tree) -> dict[str, np.ndarray]:
    """Canonical path -> a copy in host memory; `np.asarray` would show, on CPU, the very buffer that the next step overwrites."""
    raw = jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)
    for leaf in jax.tree.leaves(raw):
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    return {path: np.asarray(leaf) for path, leaf in paths(unstack(jax.tree.map(np.array, raw))).items()}


def _own(tree: Tree) -> dict[str, Any]:
    """Canonical path -> what this host writes of it: a copy in its memory, or, of several hosts, the array on all their devices."""
    if hosts.count() == 1:
        return _host_copy(tree)
    return paths(unstack(jax.tree.map(lambda x: jax.random.key_data(x) if _is_key(x) else x, tree)))


def _abstract(tree: Tree) -> dict[str, jax.ShapeDtypeStruct]:
    """Canonical path -> what lies there, and where on a mesh of devices."""

    def leaf(x):
        place = getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place if isinstance(place, NamedSharding) else None)

    return paths(unstack(jax.tree.map(leaf, tree)))


def _kinds(tree: Tree) -> Kinds:
    """Canonical path -> (dtype, shape) of arrays or abstract values; a typed key has a dtype of its own, as key<fry>."""
    return {path: (str(leaf.dtype), tuple(leaf.shape)) for path, leaf in sorted(_abstract(tree).items())}


def _stored(leaf: jax.ShapeDtypeStruct) -> Any:
    """What lies on disk for a leaf, as an array that takes no memory; of a key, its data. On a mesh each device reads its part."""
    data = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)) if _is_key(leaf) else leaf
    if isinstance(leaf.sharding, NamedSharding) and math.prod(data.shape):
        place = leaf.sharding if data is leaf else NamedSharding(leaf.sharding.mesh, PartitionSpec())
        return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=place)
    return np.broadcast_to(np.zeros((), data.dtype), data.shape)


def _nested(leaves: dict[str, Any]) -> dict[str, Any]:
    """The tree that Orbax sees; it refuses arrays of size 0, which hold nothing to save."""
    return unflatten_dict({path: leaf for path, leaf in leaves.items() if math.prod(leaf.shape)}, sep="/")


def _placed(x: Any, like: Any) -> jax.Array:
    if _is_key(like):
        x = jax.random.wrap_key_data(x, impl=jax.random.key_impl(jnp.empty((), like.dtype)))
    return jax.device_put(x, getattr(like, "sharding", None))


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _require_same(path: epath.Path, saved: Kinds, expected: Kinds) -> None:
    if saved == expected:
        return
    different = [name for name in {**saved, **expected} if saved.get(name) != expected.get(name)]
    different.sort(key=lambda name: (not name.startswith("params/"), name))  # what a person knows best, first

    def show(kind):
        return "nothing" if kind is None else f"{kind[1]} {kind[0]}"

    shown = "; ".join(f"{name} is {show(saved.get(name))} there, {show(expected.get(name))} here" for name in different[:3])
    more = f"; and {len(different) - 3} more" if len(different) > 3 else ""
    raise CheckpointError(f"checkpoint {path} is of another model or optimizer: {shown}{more}")


def _remove(path: epath.Path) -> None:
    """Removes a folder, its manifest first: what is half removed is no checkpoint."""
    if path.exists():
        (path / manifest.NAME).unlink(missing_ok=True)
        path.rmtree()


def _require_space(path: epath.Path, leaves: dict[str, np.ndarray]) -> None:
    """Refuses what cannot fit; TensorStore finds out half-way, and prints pages."""
    if not os.path.isdir(path):  # a cloud address
        return
    needed, free = sum(leaf.nbytes for leaf in leaves.values()) + _FILES, shutil.disk_usage(path).free
    if needed > free:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {needed:,} bytes are needed and {free:,} are free")


def _reason(error: Exception) -> str:
    """One line: the operating system's words where it had any, TensorStore's pages cut short otherwise."""
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    code = re.search(r"os_error_code='(\d+)'", text)
    return os.strerror(int(code[1])) if code else " ".join(text.split())[:200]
