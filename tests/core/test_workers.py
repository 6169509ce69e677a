"""Each worker of a sweep has its own part of the machine."""

import os
import subprocess
import sys

import pytest

WORKER = """
import os, sys
from research.core.workers import take_part
take_part(sys.argv[1], int(sys.argv[2]))
take_part(sys.argv[1], int(sys.argv[2]))  # a second job of the same worker
print(sorted(os.sched_getaffinity(0)), os.environ.get("CUDA_VISIBLE_DEVICES"), os.environ.get("XLA_PYTHON_CLIENT_MEM_FRACTION"), flush=True)
sys.stdin.read()
"""


def workers(folder, count, living, **environment):
    """What each of so many workers that live at once says of itself."""
    command = [sys.executable, "-c", WORKER, str(folder), str(count)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    held, said = [], []
    for _ in range(living):
        held.append(process := subprocess.Popen(command, **pipes, env=os.environ | environment))
        said.append(process.stdout.readline().strip())
    for process in held:
        process.communicate("")
    return said


def test_cores_and_gpus_are_shared_out_and_come_back_from_the_dead(tmp_path):
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.fail("this test needs two cores")
    for _ in range(2):
        one, other = workers(tmp_path, 2, 2, CUDA_VISIBLE_DEVICES="3,5,7")
        assert (one, other) == (f"{cores[0::2]} 3,7 0.90", f"{cores[1::2]} 5 0.90")


def test_more_workers_than_gpus_share_the_memory_of_one(tmp_path):
    said = workers(tmp_path, 3, 3, CUDA_VISIBLE_DEVICES="0")
    assert [line.split("] ")[1] for line in said] == ["0 0.30"] * 3


def test_a_single_worker_keeps_the_machine(tmp_path):
    (said,) = workers(tmp_path, 1, 1, CUDA_VISIBLE_DEVICES="0,1")
    assert said == f"{sorted(os.sched_getaffinity(0))} 0,1 None"
    assert not list(tmp_path.iterdir())
