"""Learners: training without ordinary back-propagation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor


class Learner(ABC):
    """Base of whatever trains by its own rule instead of a loss's gradient.

    Where the paper's form is a scikit-learn estimator, a member derives from the estimator classes instead
    and sets ``kind`` itself.
    """

    kind: ClassVar[str] = "learner"
    refuses: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def step(self, batch: Any) -> Mapping[str, float]:
        """Learn from one batch and return the named losses.

        A batch without examples is refused; one with NaN is refused or skipped, and leaves the learner as it was.
        """

    @abstractmethod
    def predict(self, inputs: Any) -> Tensor:
        """Predict without ever seeing a label."""
