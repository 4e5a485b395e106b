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
from pullback.methods.lanton import LANTON as LANTON
from pullback.methods.lanton import LayerNoise as LayerNoise
from pullback.methods.lanton import lmo_groups as lmo_groups
from pullback.methods.nap import Project as Project
from pullback.methods.nap import insert_norms as insert_norms
from pullback.methods.paced import BetaKernel as BetaKernel
from pullback.methods.paced import PassRateTracker as PassRateTracker
from pullback.methods.paced import distillation_loss as distillation_loss
from pullback.methods.paced import gradient_snr as gradient_snr
from pullback.methods.pinn_annealing import GradientAnnealing as GradientAnnealing
from pullback.methods.pinn_annealing import GradientHistograms as GradientHistograms
from pullback.methods.pinn_annealing import ModifiedMLP as ModifiedMLP
from pullback.methods.pinn_annealing import weight_matrices as weight_matrices
from pullback.methods.revcol import CouplingStep as CouplingStep
from pullback.methods.revcol import RevCol as RevCol
from pullback.methods.revcol import ReversibleSequence as ReversibleSequence
from pullback.methods.revcol import memory_report as memory_report
from pullback.methods.sam_gs import SAMGS as SAMGS
from pullback.methods.sam_gs import multitask_backward as multitask_backward
from pullback.methods.tract import TrAct as TrAct
from pullback.methods.tract import precondition_input as precondition_input
from pullback.methods.tract import tract as tract

__version__: str

__all__ = [
    "LANTON",
    "SAMGS",
    "Attachment",
    "BetaKernel",
    "ClipGradNorm",
    "ConflictMonitor",
    "ConflictResolver",
    "CouplingStep",
    "DomainAdversarialLoss",
    "GradientAnnealing",
    "GradientConductor",
    "GradientHistograms",
    "GradientNoise",
    "GradientReversal",
    "LayerNoise",
    "ModifiedMLP",
    "MomentumWriter",
    "NonFiniteError",
    "PassRateTracker",
    "Project",
    "RevCol",
    "ReversibleSequence",
    "RuleFlip",
    "ShallowDANN",
    "TaskAccumulator",
    "TrAct",
    "add_gradient_noise_",
    "attach",
    "cite",
    "curl_fraction",
    "distillation_loss",
    "flip_threshold",
    "gradient_snr",
    "insert_norms",
    "lmo_groups",
    "memory_report",
    "multitask_backward",
    "precondition_input",
    "proxy_a_distance",
    "schedules",
    "solution_stability",
    "tract",
    "weight_matrices",
]
