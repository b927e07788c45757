"""SIGTERM and Ctrl-C as a request to finish the current step, save and leave."""

import signal
import threading

import numpy as np
from jax.experimental import multihost_utils


class StopRequest:
    """A context in which SIGTERM and SIGINT set a flag; the previous handlers return at its end.

    A second signal acts as if this context were not there.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGINT)

    def __init__(self):
        self.signal = 0
        self._previous = {}

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in self.SIGNALS}
        return self

    def __exit__(self, *exception):
        self._restore()

    def _restore(self):
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def _handle(self, number, frame):
        self.signal = number
        self._restore()

    def agreed(self) -> int:
        """The signal that any process received; every process must ask at the same step."""
        return int(np.max(multihost_utils.process_allgather(np.asarray(self.signal))))

    @staticmethod
    def exit_code(number: int) -> int:
        """0 after SIGTERM, which schedulers send as a matter of course; 130 after Ctrl-C."""
        return 0 if number == signal.SIGTERM else 128 + number
