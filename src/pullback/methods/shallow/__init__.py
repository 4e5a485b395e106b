"""Residual stacks in their parallel form: truncated expansions on the same parameters (arXiv:2309.08414)."""

from __future__ import annotations

from pullback.methods.shallow.conversion import Conversion, Run, shallow_
from pullback.methods.shallow.report import TruncationReport, determination_ratio, truncation_report
from pullback.methods.shallow.stack import ResidualStack, difference

__all__ = [
    "Conversion",
    "ResidualStack",
    "Run",
    "TruncationReport",
    "determination_ratio",
    "difference",
    "shallow_",
    "truncation_report",
]
