"""Several machines, or processes of one, as one run: each is given the same command, computes its part, and the first one writes."""

import os
import sys
from collections.abc import Mapping
from typing import Any

from research.core.errors import ConfigError

_REASONS = (None, "SIGINT", "SIGTERM")
_index, _count = 0, 1


def first() -> bool:
    """Whether this is the host that writes files and speaks at the terminal."""
    return _index == 0


def count() -> int:
    """Hosts of this run."""
    return _count


def connect(node: Mapping[str, Any]) -> None:
    """Joins the other hosts, before anything else asks JAX for a device; does nothing on a single one.

    A host that falls silent for `timeout_s` ends the run on all others, so a dead peer is an error, never a hang.

    Args:    node: the config's `hosts`: count, coordinator, id, timeout_s.
    Raises:  ConfigError: values that do not fit each other, or no other host found in time.
    """
    global _index, _count
    number, timeout = node["count"], node["timeout_s"]
    if not isinstance(timeout, int) or timeout < 1:
        raise ConfigError(f"hosts.timeout_s={timeout!r}: must be a whole number of at least 1")
    where = {} if number in ("auto", "cluster") else _address(node)
    if number == 1 or (number == "auto" and not _launched()):
        return
    import jax

    if jax.distributed.is_initialized():
        return
    limits: dict[str, Any] = {"initialization_timeout": timeout, "heartbeat_timeout_seconds": timeout, "shutdown_timeout_seconds": timeout}
    try:
        jax.distributed.initialize(**where, **limits)
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"hosts.count={number}: the hosts did not find each other: {' '.join(str(error).split())[:200]}") from error
    _index, _count = jax.process_index(), jax.process_count()


def wait(name: str) -> None:
    """Returns when all hosts have come here.

    Args:    name: the same on all, of this place in the program.
    """
    if _count > 1:
        from jax.experimental import multihost_utils

        multihost_utils.sync_global_devices(name)


def leave(code: int) -> None:
    """Ends this process at once where others may be in another place of the program: it would wait for them in vain; nothing on a single host."""
    if _count > 1:
        sys.stdout.flush()
        os._exit(code)


def agreed(reason: str | None) -> str | None:
    """The signal that any host was sent, the same answer on all, where each asks at the same point; None: none was.

    Args:    reason: the signal's name on this host.
    """
    if _count == 1:
        return reason
    import numpy as np
    from jax.experimental import multihost_utils

    codes = multihost_utils.process_allgather(np.int32(_REASONS.index(reason)))
    return _REASONS[int(np.max(codes))]


def _launched() -> bool:
    """Whether srun, or Google's platform for TPUs, started this process as one of several."""
    workers = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    return int(os.environ.get("SLURM_STEP_NUM_TASKS") or 1) > 1 or "," in workers


def _address(node: Mapping[str, Any]) -> dict[str, Any]:
    number, place, name = node["count"], node["coordinator"], node["id"]
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ConfigError(f"hosts.count={number!r}: must be auto, cluster, or a number of at least 1")
    if number == 1:
        return {}
    if not isinstance(place, str) or not place.rpartition(":")[2].isdigit():
        raise ConfigError(f"hosts.coordinator={place!r}: must be the ADDRESS:PORT of the first host, where hosts.count={number}")
    if not isinstance(name, int) or not 0 <= name < number:
        raise ConfigError(f"hosts.id={name!r}: must be a number from 0 to {number - 1}, another on each host")
    return {"coordinator_address": place, "num_processes": number, "process_id": name}
