"""A polite end: the first SIGINT or SIGTERM asks the loop to save and stop, the second one ends the process at once."""

import contextlib
import os
import signal
import threading
import weakref
from collections.abc import Iterator
from typing import ClassVar


class Interrupt:
    """Whether the process was asked to stop.

    `asked` is the signal's name, or None. Use `listening` around the work; outside the main thread, where Python delivers no signals, it
    does nothing, but whatever asks the main thread to stop asks all.
    """

    _all: ClassVar["weakref.WeakSet[Interrupt]"] = weakref.WeakSet()

    def __init__(self):
        self.asked: str | None = None
        self._patient = False
        self._all.add(self)

    @contextlib.contextmanager
    def listening(self, *, patient: bool) -> Iterator["Interrupt"]:
        """Takes over SIGINT and SIGTERM inside the block and gives them back after it; blocks may be nested.

        Args:    patient: True: the first signal is noted, for the loop to end at a good moment; False: it also raises KeyboardInterrupt.
        """
        outer, self._patient = self._patient, patient
        main = threading.current_thread() is threading.main_thread()
        before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)} if main else {}
        try:
            yield self
        finally:
            self._patient = outer
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, _) -> None:
        if self.asked is not None:
            os._exit(128 + number)  # asked twice: no saving, no waiting for threads
        for one in list(self._all):
            one.asked = signal.Signals(number).name
        if not self._patient:
            raise KeyboardInterrupt
