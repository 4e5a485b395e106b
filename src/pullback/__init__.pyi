"""Public names of pullback. Written by `python -m pullback.lab.rooms stub` from the facts of the rooms."""

from pullback.core import schedules as schedules
from pullback.core.attachment import Attachment as Attachment
from pullback.core.attachment import attach as attach
from pullback.core.checks import NonFiniteError as NonFiniteError
from pullback.core.citation import cite as cite
from pullback.core.clip import ClipGradNorm as ClipGradNorm
from pullback.core.conflict import ConflictMonitor as ConflictMonitor
from pullback.methods.curl_descent import RuleFlip as RuleFlip
from pullback.methods.curl_descent import curl_fraction as curl_fraction
from pullback.methods.curl_descent import flip_threshold as flip_threshold
from pullback.methods.curl_descent import solution_stability as solution_stability
from pullback.methods.dann import DomainAdversarialLoss as DomainAdversarialLoss
from pullback.methods.dann import GradientReversal as GradientReversal
from pullback.methods.dann import ShallowDANN as ShallowDANN
from pullback.methods.dann import proxy_a_distance as proxy_a_distance
from pullback.methods.gcond import ConflictResolver as ConflictResolver
from pullback.methods.gcond import GradientConductor as GradientConductor
from pullback.methods.gcond import MomentumWriter as MomentumWriter
from pullback.methods.gcond import TaskAccumulator as TaskAccumulator
from pullback.methods.gradient_noise import GradientNoise as GradientNoise
from pullback.methods.gradient_noise import add_gradient_noise_ as add_gradient_noise_
from pullback.methods.paced import BetaKernel as BetaKernel
from pullback.methods.paced import PassRateTracker as PassRateTracker
from pullback.methods.paced import distillation_loss as distillation_loss
from pullback.methods.paced import gradient_snr as gradient_snr
from pullback.methods.sam_gs import SAMGS as SAMGS
from pullback.methods.sam_gs import multitask_backward as multitask_backward

__version__: str

__all__ = [
    "SAMGS",
    "Attachment",
    "BetaKernel",
    "ClipGradNorm",
    "ConflictMonitor",
    "ConflictResolver",
    "DomainAdversarialLoss",
    "GradientConductor",
    "GradientNoise",
    "GradientReversal",
    "MomentumWriter",
    "NonFiniteError",
    "PassRateTracker",
    "RuleFlip",
    "ShallowDANN",
    "TaskAccumulator",
    "add_gradient_noise_",
    "attach",
    "cite",
    "curl_fraction",
    "distillation_loss",
    "flip_threshold",
    "gradient_snr",
    "multitask_backward",
    "proxy_a_distance",
    "schedules",
    "solution_stability",
]
