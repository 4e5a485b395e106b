"""Remarks on a run: warn once for each reason, raise, or keep silent, as the user wants."""

from __future__ import annotations

import warnings
from typing import Literal


class Reporter:
    """Says each kind of remark once.

    Args:
        policy: "warn": a RuntimeWarning the first time; "raise": a RuntimeError every time; "ignore".
    """

    def __init__(self, policy: Literal["warn", "raise", "ignore"]) -> None:
        self.policy = policy
        self.said: set[str] = set()

    def __call__(self, reason: str, text: str, *, stacklevel: int = 4) -> None:
        """Say ``text`` unless something was said for this reason.

        Raises:
            RuntimeError: under the policy "raise".
        """
        if self.policy == "raise":
            raise RuntimeError(text)
        if self.policy == "warn" and reason not in self.said:
            self.said.add(reason)
            warnings.warn(text, RuntimeWarning, stacklevel=stacklevel)
