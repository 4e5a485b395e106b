"""Public names of pullback. Written by `python -m pullback.lab.rooms stub` from the facts of the rooms."""

from pullback.core import schedules as schedules
from pullback.core.attachment import Attachment as Attachment
from pullback.core.attachment import attach as attach
from pullback.core.checks import NonFiniteError as NonFiniteError
from pullback.core.citation import cite as cite
from pullback.core.clip import ClipGradNorm as ClipGradNorm
from pullback.methods.dann import DomainAdversarialLoss as DomainAdversarialLoss
from pullback.methods.dann import GradientReversal as GradientReversal
from pullback.methods.dann import ShallowDANN as ShallowDANN
from pullback.methods.dann import proxy_a_distance as proxy_a_distance
from pullback.methods.gradient_noise import GradientNoise as GradientNoise
from pullback.methods.gradient_noise import add_gradient_noise_ as add_gradient_noise_
from pullback.methods.pinn_annealing import GradientAnnealing as GradientAnnealing
from pullback.methods.pinn_annealing import GradientHistograms as GradientHistograms
from pullback.methods.pinn_annealing import ModifiedMLP as ModifiedMLP
from pullback.methods.pinn_annealing import weight_matrices as weight_matrices

__version__: str

__all__ = [
    "Attachment",
    "ClipGradNorm",
    "DomainAdversarialLoss",
    "GradientAnnealing",
    "GradientHistograms",
    "GradientNoise",
    "GradientReversal",
    "ModifiedMLP",
    "NonFiniteError",
    "ShallowDANN",
    "add_gradient_noise_",
    "attach",
    "cite",
    "proxy_a_distance",
    "schedules",
    "weight_matrices",
]
