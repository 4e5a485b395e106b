"""Pass-rate weighted distillation at the frontier of a student's competence (Xu et al. 2026, arXiv:2603.11178)."""

from pullback.methods.paced.divergence import distillation_loss, two_stage
from pullback.methods.paced.pacing import BetaKernel, PassRateTracker
from pullback.methods.paced.student import GradientSNR, Rollouts, gradient_snr, rollout

__all__ = [
    "BetaKernel",
    "GradientSNR",
    "PassRateTracker",
    "Rollouts",
    "distillation_loss",
    "gradient_snr",
    "rollout",
    "two_stage",
]
