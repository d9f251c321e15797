"""Signals that ask a training to stop: it saves at the next point where it can go on exactly, and only then obeys.

SLURM announces the end of a job with a signal, some time before it. Whatever was to happen at that signal, such as
submitit putting the job back into the queue, happens after the save; so nothing here knows who sent it.
"""

from __future__ import annotations

import signal
import threading
import time
from types import FrameType

SIGNALS = (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)

SECONDS_TO_SAFE_POINT = 120.0
"""How long a signal waits for a safe point; then it is obeyed without a save. Launchers announce an end earlier."""


class StopRequest:
    """A signal that has arrived and is not obeyed yet.

    What the signals do is looked up when this is made, and given back to them by :meth:`release`.

    Args:
        seconds: how long a signal may wait.
    """

    def __init__(self, seconds: float = SECONDS_TO_SAFE_POINT) -> None:
        self.seconds = seconds
        self.number = 0
        self._since = 0.0
        self._handlers = {number: signal.getsignal(number) for number in SIGNALS}

    @property
    def overdue(self) -> bool:
        """Whether a signal has waited too long."""
        return bool(self.number) and time.monotonic() - self._since > self.seconds

    def hold(self) -> None:
        """Put signals off from now on; in any thread but the main one this is impossible and left out."""
        if threading.current_thread() is threading.main_thread():
            for number in SIGNALS:
                signal.signal(number, self._note)

    def release(self) -> None:
        """Give the signals back to those who had them; one that waits is obeyed by whoever comes to it next."""
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._handlers.items():
                signal.signal(number, signal.SIG_DFL if handler is None else handler)

    def obey(self, number: int) -> None:
        """Do what a signal would have done when it came.

        Raises:
            SystemExit: nobody had asked for anything else.
        """
        self.number = 0
        handler = self._handlers[signal.Signals(number)]
        if callable(handler):
            handler(number, None)
        elif handler != signal.SIG_IGN:
            raise SystemExit(128 + number)

    def _note(self, number: int, frame: FrameType | None) -> None:
        # Nothing is saved inside a handler: it may run in the middle of anything.
        if self.number == number:
            # Whoever asks a second time does not want to wait.
            self.obey(number)
        elif not self.number:
            self.number, self._since = number, time.monotonic()
        elif self.number == signal.SIGTERM:
            # Of two signals the announcement counts: SIGTERM follows or precedes it, and submitit passes over that.
            self.number = number
