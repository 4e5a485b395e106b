"""What reaches the terminal: plain lines that no name or message can turn into something else."""

from __future__ import annotations

import contextlib
import re
import sys
from typing import TextIO

# Escape sequences first, then what is left of control characters and of marks that reorder text.
_SEQUENCES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b.")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")
_LONGEST = 2000


def clean(text: object) -> str:
    """``text`` without terminal control, at most 2,000 characters."""
    plain = _CONTROL.sub("", _SEQUENCES.sub("", str(text)))
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]} ... ({len(plain)} characters)"


def say(text: object = "", *, file: TextIO | None = None) -> None:
    """Print one or more plain lines."""
    to = file or sys.stdout
    print(_encodable(clean(text), to), file=to, flush=True)


def _encodable(text: str, file: TextIO | None) -> str:
    """``text`` with what the stream cannot show written as escapes: file names may hold lone surrogates."""
    encoding = getattr(file, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def page(text: str) -> None:
    """Print a longer text of our own, line by line."""
    for line in text.splitlines():
        say(line)


def complain(message: object) -> None:
    """Print an error as one line on standard error; a reader that has gone does not change how the command ends."""
    with contextlib.suppress(BrokenPipeError):
        say(f"pullback: {' '.join(clean(message).split())}", file=sys.stderr)
