"""The run folder: who may write it, what stands in it, and whether a command may go on with it."""

import contextlib
import copy
import datetime
import fcntl
import functools
import io
import json
import os
import platform
import secrets
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from etils import epath
from omegaconf import DictConfig, open_dict

from research.core import hosts
from research.core.config import COMPARED, differences, read_config, save_config
from research.core.errors import ConfigError, FolderInUseError, ResearchError
from research.core.folder import read_json, write_json

CONFIG, ENVIRONMENT, RESULT, LOCK = "config.yaml", "environment.json", "result.json", ".lock"


def new_path(runs: str, name: str) -> epath.Path:
    """A folder for a new run: <runs>/<name>/<UTC time>-<short id>, not the same twice in one second."""
    now = datetime.datetime.now(datetime.UTC).strftime("%Y%m%d-%H%M%S")
    return epath.Path(runs) / name / f"{now}-{secrets.token_hex(3)}"


@contextlib.contextmanager
def claimed(path: epath.Path) -> Iterator[None]:
    """Makes the folder and holds it as its only writer; the operating system lets go of a dead writer's claim.

    Of several hosts the first one holds it for all.

    Raises:  FolderInUseError: another process holds it; the message names host and pid.  ResearchError: the folder cannot be written.
    """
    if not hosts.first():
        hosts.wait("claimed")
        yield
        return
    with contextlib.ExitStack() as stack:
        try:
            path.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(io.FileIO(os.fspath(path / LOCK), "a+"))
            _lock(file, path)
        except OSError as error:
            raise ResearchError(f"run_dir={os.fspath(path)!r} cannot be written: {error.strerror or error}") from error
        hosts.wait("claimed")
        yield


def _lock(file: io.FileIO, path: epath.Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        raise FolderInUseError(f"run_dir={os.fspath(path)!r} is in use by {file.read().decode().strip() or 'another process'}") from None
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, pid {os.getpid()}\n".encode())


def saved_config(path: epath.Path) -> DictConfig | None:
    """The config of the run in this folder; None where there is none.

    Raises:  ConfigError: config.yaml cannot be read.
    """
    file = path / CONFIG
    if not file.exists():
        return None
    return read_config(file)


def compare(old: DictConfig, new: DictConfig, path: epath.Path) -> None:
    """Refuses to go on with a run whose config differs in what makes it that run.

    Raises:  ConfigError: listing every differing key with both values, and what to do.
    """
    probe = copy.deepcopy(new)
    with open_dict(probe):
        probe.data.spec = old.data.spec  # the data is not open yet; its spec is held against the folder's once it is
    keys = [key for key in COMPARED if key not in ("train.steps", "train.epochs")]  # a longer run is judged by its schedule
    found = differences(old, probe, keys)
    told = {key for key, *_ in found if not key.startswith("objective.module.")}  # the objective repeats the model's keys
    found = [entry for entry in found if entry[0] in told or entry[0].replace("objective.module.", "model.") not in told]
    if found:
        listed = "; ".join(f"{key}: {_short(was)} there, {_short(now)} here" for key, was, now in found)
        raise ConfigError(
            f"run_dir={os.fspath(path)!r} holds another run ({listed}): choose another run_dir, or resume=fork to start a new folder from it"
        )


def write_config(path: epath.Path, config: DictConfig) -> None:
    """Writes config.yaml, resolved and without secrets."""
    save_config(config, path / CONFIG)


def write_environment(path: epath.Path, parent: Mapping[str, Any] | None = None) -> None:
    """Appends what this command ran with to environment.json: versions, commit, devices, command line."""
    file = path / ENVIRONMENT
    launches = read_json(file) if file.exists() else []
    write_json(file, [*launches, environment() | ({"parent": parent} if parent else {})])


def environment() -> dict[str, Any]:
    """Versions, commit, devices and command line of this process."""
    names = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "hydra-core", "numpy", "ontogeny")
    device = jax.devices()[0]
    return {
        "time": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "devices": {"kind": device.device_kind, "platform": device.platform, "count": jax.device_count()},
        "versions": {name: _version(name) for name in names},
        "commit": _commit(),
    }


def read_result(path: epath.Path) -> dict[str, Any]:
    """result.json, or {} where the run has not ended yet."""
    file = path / RESULT
    return read_json(file) if file.exists() else {}


def write_result(path: epath.Path, **values: Any) -> dict[str, Any]:
    """Writes result.json: every key of the house is there, a missing number is null."""
    keys = ("status", "reason", "experiment", "step", "params", "metrics", "best", "expect", "compile_s", "train_s", "steps_per_s")
    keys += ("examples_per_s", "tokens_per_s", "data_wait", "peak_bytes", "device", "params_sha256", "state_sha256")
    keys += ("flops_per_example", "train_flops_per_example", "energy_kwh", "co2_g", "energy_method")
    result = dict.fromkeys(keys) | values
    write_json(path / RESULT, result)
    return result


def peak_bytes() -> int | None:
    """The most memory used so far: of the accelerator where it counts, else of this process."""
    stats = jax.local_devices()[0].memory_stats()
    if stats and "peak_bytes_in_use" in stats:
        return stats["peak_bytes_in_use"]
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def device_name() -> str:
    """The device as a person would name it, as "NVIDIA H200" or the processor and its cores."""
    device = jax.devices()[0]
    if device.platform != "cpu":
        return f"{jax.device_count()} x {device.device_kind}"
    return f"{len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} CPU cores, {_processor()}"


def _processor() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


@functools.cache
def _version(name: str) -> str | None:
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        return metadata.version(name)
    return None


@functools.cache
def _commit() -> str | None:
    """The commit of the checkout that this code runs from, with "+" where it was changed."""
    here = os.path.dirname(os.path.abspath(__file__))
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        told = subprocess.run(["git", "describe", "--always", "--dirty=+", "--abbrev=12"], cwd=here, capture_output=True, text=True, timeout=5)
        return told.stdout.strip() or None
    return None


def _short(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else text[:57] + "…"
