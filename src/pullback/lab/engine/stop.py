"""Stopping politely: the first signal asks, the second one ends the process."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Generator
from types import FrameType


class Stop:
    """A flag that a signal sets; call it to ask whether to stop."""

    def __init__(self) -> None:
        self.signum: int | None = None

    # Callable, so that an executor needs no more than "should I stop?".
    def __call__(self) -> bool:
        """Whether a signal has arrived."""
        return self.signum is not None


def _show_cursor() -> None:
    """A progress bar hides the cursor and has no time left to bring it back."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if os.isatty(sys.stdout.fileno()):
            os.write(sys.stdout.fileno(), b"\x1b[?25h\n")


@contextlib.contextmanager
def polite_stop() -> Generator[Stop]:
    """Turn SIGINT and SIGTERM into a flag while a trial runs, and put the previous handlers back afterwards.

    The handler only sets the flag. A second signal ends the process at once; the store keeps what was committed and
    the workers end by themselves. Outside the main thread, where Python allows no handlers, nothing is changed.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(signum: int, _frame: FrameType | None) -> None:
        if stop.signum is not None:
            _show_cursor()
            os._exit(128 + signum)
        stop.signum = signum

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
