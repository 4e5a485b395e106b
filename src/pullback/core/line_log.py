"""A file of JSON lines that grows as a run goes on and survives its interruption."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, final

from pullback.core.checks import shown


@final
class LineLog:
    """One JSON object per line under a header line; a record is in the file when `append` returns.

    A line counts once its newline is written. What an interruption left of a last line is dropped on resumption, with a
    warning. When a write fails (a full disk), the file is cut back to its last whole line and the records wait in
    memory: the next `append` or `flush` writes them first.

    Args:
        path: the file; its folder must exist.
        header: says what the lines are; a file with another header is refused.
        resume: go on with a file that is there; without it such a file is refused.

    Attributes:
        records: what the file held when it was opened, in order.
        dropped: bytes of a half-written last line that were dropped.
        waiting: number of records that could not be written yet.

    Raises:
        FileExistsError: if the file is there and ``resume`` is false.
        ValueError: if it is no such file, its header differs, or a line in its middle is damaged.
        OSError: if it cannot be opened or written.
    """

    def __init__(
        self, path: str | os.PathLike[str], header: Mapping[str, Any], *, resume: bool = False
    ) -> None:
        self.path = Path(path)
        self.records: list[dict[str, Any]] = []
        self.dropped = 0
        self._pending: list[bytes] = []
        self._end = 0
        self._fd: int | None = None
        there = self.path.exists() and self.path.stat().st_size > 0
        if there and not resume:
            raise FileExistsError(
                f"path must be a new file, got {str(path)!r}, which exists. Pass resume=True to go on with it."
            )
        if there:
            self._read(dict(header))
        self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | getattr(os, "O_BINARY", 0), 0o644)
        os.ftruncate(self._fd, self._end)
        if self._end == 0:
            self._pending.append(_line(header))
            self.flush()

    @property
    def waiting(self) -> int:
        """Records that are only in memory so far."""
        return len(self._pending)

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._fd is None

    def _read(self, header: dict[str, Any]) -> None:
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        lines = content[:end].split(b"\n")[:-1]
        if not lines and not _line(header).startswith(content):
            raise ValueError(
                f"path must hold a log of this kind, got {str(self.path)!r} without a header line."
            )
        if lines:
            _check_header(self.path, _object(self.path, 1, lines[0]), header)
        self.records = [_object(self.path, number, line) for number, line in enumerate(lines[1:], start=2)]
        self._end, self.dropped = end, len(content) - end
        if self.dropped:
            warnings.warn(
                f"{self.path}: the last line was half-written ({self.dropped} bytes) and is dropped; "
                f"{len(self.records)} records are kept.",
                RuntimeWarning,
                stacklevel=4,
            )

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Write records; none is lost when that fails.

        Raises:
            OSError: if they could not be written; they wait, see the class.
            ValueError: if the log is closed.
        """
        self._pending += [_line(each) for each in records]
        self.flush()

    def flush(self) -> None:
        """Write what waits.

        Raises:
            OSError: as `append`.
            ValueError: as `append`.
        """
        if self._fd is None:
            raise ValueError(f"the log must be open, got {str(self.path)!r}, which is closed. Open it again.")
        fd = self._fd
        while self._pending:
            line = self._pending[0]
            try:
                self._put(fd, line)
            except OSError as error:
                os.ftruncate(fd, self._end)  # shortening needs no space
                raise OSError(
                    error.errno,
                    f"{len(self._pending)} records must be written, and wait in memory ({error.strerror}). Make room, "
                    "then call flush()",
                    str(self.path),
                ) from error
            self._end += len(line)
            del self._pending[0]

    def _put(self, fd: int, line: bytes) -> None:
        os.lseek(fd, self._end, os.SEEK_SET)
        view = memoryview(line)
        while view:
            view = view[os.write(fd, view) :]

    def close(self) -> None:
        """Write what waits, wait for the disk, close the file; a second call does nothing.

        Raises:
            OSError: if that fails.
        """
        if self._fd is not None:
            self.flush()
            fd, self._fd = self._fd, None
            os.fsync(fd)
            os.close(fd)

    def __del__(self) -> None:
        fd = getattr(self, "_fd", None)
        if fd is not None:
            os.close(fd)


def _line(record: Mapping[str, Any]) -> bytes:
    return json.dumps(record, allow_nan=False, separators=(",", ":")).encode() + b"\n"


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        found = None
    if not isinstance(found, dict):
        raise ValueError(
            f"path must hold one JSON object per line, got {shown(line)} in line {number} of {str(path)!r}. Is it "
            "another file, or was it edited?"
        )
    return found


def _check_header(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key, value in wanted.items():
        if key not in found:
            raise ValueError(
                f"path must hold a log of this kind, got {str(path)!r} without {key!r} in its header. Use a new one."
            )
        if found[key] != json.loads(json.dumps(value)):
            raise ValueError(
                f"path must hold a log with {key}={shown(value)}, got {shown(found[key])} in {str(path)!r}. Use a "
                "file of its own for each setting."
            )
