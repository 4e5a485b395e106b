"""What can stop a trial, each with one clear line for the user."""

from __future__ import annotations

import signal


class TrialError(RuntimeError):
    """A trial cannot be loaded or run.

    Args:
        message: one line that names the file, the arm and seed where there is one, and the fix.
        traceback_text: the traceback inside the user's code, if there is one, for ``--debug``.
    """

    def __init__(self, message: str, *, traceback_text: str = "") -> None:
        super().__init__(message)
        self.traceback_text = traceback_text


class Interrupted(KeyboardInterrupt):
    """The run was stopped by a signal after everything that is finished was written.

    Args:
        signum: the signal that arrived.
        message: what was kept and how to go on.
    """

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.signum = signum
        self.message = message

    @property
    def exit_code(self) -> int:
        """Exit status by the shell's convention: 130 for SIGINT, 143 for SIGTERM."""
        return 128 + int(self.signum)

    def __str__(self) -> str:
        return f"{signal.Signals(self.signum).name}: {self.message}"
