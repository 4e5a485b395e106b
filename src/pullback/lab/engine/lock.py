"""One driver at a time: an advisory lock that ends with the process that holds it."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows has no fcntl; msvcrt locks a byte in the same way
    import msvcrt


class LockedError(RuntimeError):
    """Another living process holds the lock."""


class DriverLock:
    """A lock file that names its holder by process id and start time.

    The operating system drops the lock when the holder ends, however it ends, so a lock is never stale.

    Args:
        path: the lock file; it is left in place, since deleting it would race with the next holder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file: IO[str] | None = None

    def acquire(self) -> None:
        """Take the lock; taking it twice is harmless.

        Raises:
            LockedError: naming the holder.
        """
        if self._file is not None:
            return
        file = open(self.path, "a+", encoding="utf-8")  # noqa: SIM115 -- it stays open while the lock is held
        try:
            _lock(file)
        except OSError as error:
            file.seek(0)
            holder = _holder(file.read())
            file.close()
            name = self.path.name.removesuffix(".lock")
            raise LockedError(
                f"{self.path.with_name(name)} is in use by {holder}. Wait for it, or choose another folder."
            ) from error
        file.seek(0)
        file.truncate()
        file.write(json.dumps({"pid": os.getpid(), "start": time.strftime("%Y-%m-%d %H:%M:%S")}))
        file.flush()
        self._file = file

    def release(self) -> None:
        """Give the lock back."""
        if self._file is not None:
            self._file.close()
            self._file = None


def _lock(file: IO[str]) -> None:
    if os.name == "nt":
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _holder(text: str) -> str:
    try:
        kept = json.loads(text)
        return f"process {kept['pid']} since {kept['start']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
