"""Signals: the first is noted or raised, the second ends the process, and the handlers go back to whom they belonged."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from research.training.interrupt import Interrupt

BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture(autouse=True)
def handlers():
    """Neither signal may reach pytest, and both handlers are the same after the test."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in BOTH}
    yield
    found = {number: signal.getsignal(number) for number in BOTH}
    for number, handler in before.items():
        signal.signal(number, handler)
    assert set(found.values()) == {signal.SIG_IGN}


@pytest.mark.parametrize("number", BOTH)
def test_a_patient_listener_notes_the_first_signal(number):
    with Interrupt().listening(patient=True) as interrupt:
        assert interrupt.asked is None
        os.kill(os.getpid(), number)
        assert interrupt.asked == signal.Signals(number).name


@pytest.mark.parametrize("number", BOTH)
def test_an_impatient_one_raises_too(number):
    interrupt = Interrupt()
    with pytest.raises(KeyboardInterrupt), interrupt.listening(patient=False):
        os.kill(os.getpid(), number)
    assert interrupt.asked == signal.Signals(number).name  # should a library swallow the exception, the loop still stops


def test_blocks_may_be_nested():
    interrupt = Interrupt()
    with interrupt.listening(patient=False):
        with interrupt.listening(patient=True):
            pass
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_outside_the_main_thread_it_does_nothing():
    found = []

    def listen():
        with Interrupt().listening(patient=True):
            found.append([signal.getsignal(number) for number in BOTH])

    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [[signal.SIG_IGN, signal.SIG_IGN]]


@pytest.mark.parametrize(("first", "second"), [(signal.SIGTERM, signal.SIGINT), (signal.SIGINT, signal.SIGTERM), (signal.SIGTERM, signal.SIGTERM)])
def test_the_second_signal_ends_the_process_at_once(first, second):
    program = f"""
import os
from research.training.interrupt import Interrupt
try:
    with Interrupt().listening(patient=True) as interrupt:
        os.kill(os.getpid(), {int(first)})
        print("noted", interrupt.asked, flush=True)
        os.kill(os.getpid(), {int(second)})
finally:
    print("never")
"""
    told = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (told.returncode, told.stdout) == (128 + second, f"noted {first.name}\n")
