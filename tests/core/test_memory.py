"""What the C library does with freed memory, and when Python looks for garbage."""

import gc
import platform
import subprocess
import sys

import pytest

from research.core.memory import pause_garbage, resume_garbage

PROGRAM = """
import ctypes, resource, sys
from research.core.memory import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes, libc.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
for _ in range(20):
    block = libc.malloc(64 << 20)
    ctypes.memset(block, 1, 64 << 20)
    libc.free(block)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has the setting")
def test_a_block_that_is_freed_and_allocated_again_faults_once():
    def faults(how):
        return int(subprocess.run([sys.executable, "-c", PROGRAM, how], capture_output=True, text=True, check=True).stdout)

    assert faults("keep") < faults("default") - 10 * (64 << 20) // 4096


def test_the_search_for_garbage_rests_between_pause_and_resume():
    frozen = gc.get_freeze_count()
    try:
        pause_garbage()
        assert not gc.isenabled()
        resume_garbage()
        assert gc.isenabled()
        assert gc.get_freeze_count() > frozen
    finally:
        gc.unfreeze()
        gc.enable()


def test_a_search_that_somebody_else_has_ended_is_left_so():
    gc.disable()
    try:
        pause_garbage()
        resume_garbage()
        assert not gc.isenabled()
    finally:
        gc.enable()
