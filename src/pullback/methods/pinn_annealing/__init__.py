"""Learning-rate annealing for composite losses, and the improved architecture (arXiv:2001.04536)."""

from pullback.methods.pinn_annealing.annealing import GradientAnnealing
from pullback.methods.pinn_annealing.networks import (
    AnnealingStatistics,
    GradientHistograms,
    GradientTable,
    ModifiedMLP,
    glorot_normal_,
    weight_matrices,
)

__all__ = [
    "AnnealingStatistics",
    "GradientAnnealing",
    "GradientHistograms",
    "GradientTable",
    "ModifiedMLP",
    "glorot_normal_",
    "weight_matrices",
]
