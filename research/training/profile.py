"""Which operations a step's time goes to: a trace of the device, added up by module and operation."""

import collections
import contextlib
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import jax
from etils import epath

from research.core.errors import ResearchError
from research.core.tree import UNSTACKED

_PROGRAM_WORDS = ("checkpoint", "rematted_computation", "while", "body", "cond", "closed_call", "pjit")  # of an operation's name: no module's
_CONTAINERS = ("while", "conditional", "call")  # their time is that of the operations inside, which are recorded too
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.\-]+) = .*?[ )]([a-z][\w\-]*)\(.*$", re.MULTILINE)
_NAME = re.compile(r'op_name="([^"]*)"')


@dataclasses.dataclass(frozen=True)
class Operation:
    """What the device did for one kind of operation of one module.

    Args:    module: its path, equal blocks as one, `block_*/mlp/up`; "" where the program names none, as for the optimizer.
             operation: of JAX, as `dot_general`; the compiler's own name where it has none.  backward: whether it is of the gradient.
             count: how often it ran in a step.  seconds: of a step, added over threads.  share: of the time of all operations.
    """

    module: str
    operation: str
    backward: bool
    count: float
    seconds: float
    share: float


@contextlib.contextmanager
def traced(path: epath.PathLike) -> Iterator[None]:
    """Writes a trace of what runs inside, for TensorBoard, Perfetto or `dearest`; Python's own calls are left out, which would slow it down.

    Raises:  ResearchError: the folder cannot be written.
    """
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    try:
        epath.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ResearchError(f"profile={os.fspath(path)!r} cannot be written: {error.strerror or error}") from error
    with jax.profiler.trace(os.fspath(path), profiler_options=options):
        yield


def dearest(path: epath.PathLike, steps: int, count: int = 10) -> list[Operation]:
    """The operations that took most of the time in the newest trace of a folder, the dearest first.

    The compiler joins operations: one name then stands for all that were joined, that of the last. Names are known while the traced program
    is still in this process.

    Args:    steps: that were traced.  count: operations to tell.
    Raises:  ResearchError: there is no trace, or none of a device.
    """
    files = sorted(epath.Path(path).glob("plugins/profile/*/*.xplane.pb"))
    if not files:
        raise ResearchError(f"there is no trace in {os.fspath(path)!r}")
    spent = _spent(jax.profiler.ProfileData.from_file(os.fspath(files[-1])).planes)
    known = {module: _instructions(module, {name for of, name in spent if of == module}) for module in {module for module, _ in spent}}
    found: dict[tuple[str, str, bool], list[float]] = collections.defaultdict(lambda: [0.0, 0.0])
    for (program, name), (times, seconds) in spent.items():
        code, called = known[program].get(name, ("", ""))
        if code not in _CONTAINERS:
            entry = found[_read(called) if called else ("", re.sub(r"[.\d]+$", "", name), False)]
            entry[0] += times / steps
            entry[1] += seconds / steps
    if not found:
        raise ResearchError(f"the trace in {os.fspath(path)!r} has no operation of a device")
    whole = sum(seconds for _, seconds in found.values())
    ranked = sorted(found.items(), key=lambda entry: -entry[1][1])[:count]
    return [Operation(*kind, times, seconds, seconds / whole) for kind, (times, seconds) in ranked]


def _spent(planes: Iterable[Any]) -> dict[tuple[str, str], tuple[int, float]]:
    """{(program, operation of the compiler): (times, seconds)} of all devices; of the host's threads where no device has a plane of its own."""
    planes = [(plane.name, [(line.name, list(line.events)) for line in plane.lines]) for plane in planes]
    devices = [lines for name, lines in planes if name.startswith("/device:")] or [lines for name, lines in planes if name == "/host:CPU"]
    found: dict[tuple[str, str], tuple[int, float]] = {}
    for lines in devices:
        own = [line for line in lines if line[0] == "XLA Ops"] or lines  # a device that has this line repeats in it what its streams do
        events = [(event, dict(event.stats)) for _, events in own for event in events]
        # On CPU an operation may return before its threads are done: another event, which points at it, then tells its end.
        ends = {stats["_c"]: event.start_ns + event.duration_ns for event, stats in events if event.name.startswith("end: ") and "_c" in stats}
        for event, stats in events:
            if "hlo_op" in stats:
                key = str(stats.get("hlo_module", "")), str(stats["hlo_op"])
                times, seconds = found.get(key, (0, 0.0))
                end = max(event.start_ns + event.duration_ns, ends.get(stats.get("_p"), 0))
                found[key] = times + 1, seconds + (end - event.start_ns) * 1e-9
    return found


def _instructions(program: str, names: set[str]) -> Mapping[str, tuple[str, str]]:
    """{instruction: (its kind, the name that JAX gave it)} of the program in this process that is called so and knows most of these names."""
    best: dict[str, tuple[str, str]] = {}
    for executable in jax.local_devices()[0].client.live_executables():
        for module in executable.hlo_modules():
            if module.name == program:
                found = {
                    line[1]: (line[2], called[1] if (called := _NAME.search(line[0])) else "") for line in _INSTRUCTION.finditer(module.to_string())
                }
                best = max(best, found, key=lambda known: len(names & known.keys()))
    return best


def _read(called: str) -> tuple[str, str, bool]:
    """(module, operation, backward) of a name such as `jit(step)/transpose(jvp(GPT))/GPT._run/block_0/mlp/up/dot_general`."""
    *words, operation = called.split("/")
    path = [word for word in words if word not in _PROGRAM_WORDS and not set(word) & set("(.,)")]
    return re.sub(rf"\b{UNSTACKED}\d+", f"{UNSTACKED}*", "/".join(path)), operation, "transpose(" in called
