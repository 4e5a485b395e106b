"""One broken rule: where it is broken, what is wrong, and what to do."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Problem:
    """One place at which a rule is broken.

    Args:
        file: path as the reader knows it, for example ``gradient_noise/study.py``.
        line: line number, 0 when the problem belongs to the whole file.
        text: what is wrong and how to mend it.
    """

    file: str
    line: int
    text: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}" if self.line else f"{self.file}: {self.text}"
