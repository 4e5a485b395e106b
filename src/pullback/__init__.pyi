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
from pullback.methods.elu import BiasShiftProbe as BiasShiftProbe
from pullback.methods.elu import activation_gain as activation_gain
from pullback.methods.elu import init_gain_ as init_gain_
from pullback.methods.elu import swap_activations as swap_activations
from pullback.methods.gcond import ConflictResolver as ConflictResolver
from pullback.methods.gcond import GradientConductor as GradientConductor
from pullback.methods.gcond import MomentumWriter as MomentumWriter
from pullback.methods.gcond import TaskAccumulator as TaskAccumulator
from pullback.methods.gradient_noise import GradientNoise as GradientNoise
from pullback.methods.gradient_noise import add_gradient_noise_ as add_gradient_noise_
from pullback.methods.lanton import LANTON as LANTON
from pullback.methods.lanton import LayerNoise as LayerNoise
from pullback.methods.lanton import lmo_groups as lmo_groups
from pullback.methods.layer_gradients import GradientSpectrum as GradientSpectrum
from pullback.methods.layer_gradients import layer_curve as layer_curve
from pullback.methods.layer_gradients import mean_absolute_difference as mean_absolute_difference
from pullback.methods.layer_gradients import relative_difference as relative_difference
from pullback.methods.nap import Project as Project
from pullback.methods.nap import insert_norms as insert_norms
from pullback.methods.paced import BetaKernel as BetaKernel
from pullback.methods.paced import PassRateTracker as PassRateTracker
from pullback.methods.paced import distillation_loss as distillation_loss
from pullback.methods.paced import gradient_snr as gradient_snr
from pullback.methods.peri_ln import PeriNorm as PeriNorm
from pullback.methods.peri_ln import PeriNormBlock as PeriNormBlock
from pullback.methods.peri_ln import ResidualStreamProbe as ResidualStreamProbe
from pullback.methods.peri_ln import convert_norm_placement as convert_norm_placement
from pullback.methods.pinn_annealing import GradientAnnealing as GradientAnnealing
from pullback.methods.pinn_annealing import GradientHistograms as GradientHistograms
from pullback.methods.pinn_annealing import ModifiedMLP as ModifiedMLP
from pullback.methods.pinn_annealing import weight_matrices as weight_matrices
from pullback.methods.rev_mbconv_unet import MBConv as MBConv
from pullback.methods.rev_mbconv_unet import ReversibleStage as ReversibleStage
from pullback.methods.rev_mbconv_unet import ReversibleUNet as ReversibleUNet
from pullback.methods.rev_mbconv_unet import soft_dice as soft_dice
from pullback.methods.revcol import CouplingStep as CouplingStep
from pullback.methods.revcol import RevCol as RevCol
from pullback.methods.revcol import ReversibleSequence as ReversibleSequence
from pullback.methods.revcol import memory_report as memory_report
from pullback.methods.sam_gs import SAMGS as SAMGS
from pullback.methods.sam_gs import multitask_backward as multitask_backward
from pullback.methods.shallow import ResidualStack as ResidualStack
from pullback.methods.shallow import shallow_ as shallow_
from pullback.methods.shallow import truncation_report as truncation_report
from pullback.methods.tract import TrAct as TrAct
from pullback.methods.tract import precondition_input as precondition_input
from pullback.methods.tract import tract as tract
from pullback.methods.tversky import FeatureBank as FeatureBank
from pullback.methods.tversky import TverskyProjection as TverskyProjection
from pullback.methods.tversky import TverskySimilarity as TverskySimilarity
from pullback.methods.tversky import replace_linear as replace_linear

__version__: str

__all__ = [
    "LANTON",
    "SAMGS",
    "Attachment",
    "BetaKernel",
    "BiasShiftProbe",
    "ClipGradNorm",
    "ConflictMonitor",
    "ConflictResolver",
    "CouplingStep",
    "DomainAdversarialLoss",
    "FeatureBank",
    "GradientAnnealing",
    "GradientConductor",
    "GradientHistograms",
    "GradientNoise",
    "GradientReversal",
    "GradientSpectrum",
    "LayerNoise",
    "MBConv",
    "ModifiedMLP",
    "MomentumWriter",
    "NonFiniteError",
    "PassRateTracker",
    "PeriNorm",
    "PeriNormBlock",
    "Project",
    "ResidualStack",
    "ResidualStreamProbe",
    "RevCol",
    "ReversibleSequence",
    "ReversibleStage",
    "ReversibleUNet",
    "RuleFlip",
    "ShallowDANN",
    "TaskAccumulator",
    "TrAct",
    "TverskyProjection",
    "TverskySimilarity",
    "activation_gain",
    "add_gradient_noise_",
    "attach",
    "cite",
    "convert_norm_placement",
    "curl_fraction",
    "distillation_loss",
    "flip_threshold",
    "gradient_snr",
    "init_gain_",
    "insert_norms",
    "layer_curve",
    "lmo_groups",
    "mean_absolute_difference",
    "memory_report",
    "multitask_backward",
    "precondition_input",
    "proxy_a_distance",
    "relative_difference",
    "replace_linear",
    "schedules",
    "shallow_",
    "soft_dice",
    "solution_stability",
    "swap_activations",
    "tract",
    "truncation_report",
    "weight_matrices",
]
