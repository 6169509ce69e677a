"""Which hosts belong to a run, and what is refused before any of them is looked for."""

import pytest

from research.core import hosts
from research.core.errors import ConfigError

ALONE = {"count": "auto", "coordinator": None, "id": None, "timeout_s": 5}


def test_a_process_that_nobody_else_was_started_with_is_the_only_host(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("SLURM_NTASKS", "4")  # of the allocation; only srun starts several
    hosts.connect(ALONE)
    hosts.connect({**ALONE, "count": 1})
    assert hosts.first()
    assert hosts.count() == 1
    assert hosts.agreed("SIGTERM") == "SIGTERM"
    assert hosts.agreed(None) is None
    hosts.wait("nobody")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "hosts.count=0: must be auto, cluster, or a number"),
        ({"count": "two"}, "hosts.count='two': must be auto, cluster"),
        ({"count": 2}, "hosts.coordinator=None: must be the ADDRESS:PORT of the first host, where hosts.count=2"),
        ({"count": 2, "coordinator": "somewhere", "id": 0}, "hosts.coordinator='somewhere'"),
        ({"count": 2, "coordinator": "here:1234", "id": 2}, "hosts.id=2: must be a number from 0 to 1"),
        ({"timeout_s": 0}, "hosts.timeout_s=0: must be a whole number of at least 1"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        hosts.connect({**ALONE, **changes})


def test_srun_and_a_pod_are_noticed(monkeypatch):
    asked = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **given: asked.append(given))
    monkeypatch.setattr("jax.distributed.is_initialized", lambda: False)
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    hosts.connect(ALONE)
    monkeypatch.delenv("SLURM_STEP_NUM_TASKS")
    monkeypatch.setenv("TPU_WORKER_HOSTNAMES", "10.0.0.1,10.0.0.2")
    hosts.connect(ALONE)
    hosts.connect({**ALONE, "count": 2, "coordinator": "10.0.0.1:1234", "id": 1})
    limits = {"initialization_timeout": 5, "heartbeat_timeout_seconds": 5, "shutdown_timeout_seconds": 5}
    assert asked == [limits, limits, {"coordinator_address": "10.0.0.1:1234", "num_processes": 2, "process_id": 1, **limits}]
