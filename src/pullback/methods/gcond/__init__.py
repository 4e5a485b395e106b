"""Gradient Conductor: accumulate per task, then resolve conflicts (Limarenko et al. 2025, arXiv:2509.07252)."""

from pullback.methods.gcond.buffers import MomentumWriter, TaskAccumulator
from pullback.methods.gcond.conductor import GradientConductor, StepInfo
from pullback.methods.gcond.resolver import (
    ArbiterMemory,
    Conflict,
    ConflictResolver,
    Resolution,
    projection_shares,
)

__all__ = [
    "ArbiterMemory",
    "Conflict",
    "ConflictResolver",
    "GradientConductor",
    "MomentumWriter",
    "Resolution",
    "StepInfo",
    "TaskAccumulator",
    "projection_shares",
]
