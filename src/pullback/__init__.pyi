"""Public names of pullback. Written by `python -m pullback.lab.rooms stub` from the facts of the rooms."""

from pullback.core import schedules as schedules
from pullback.core.attachment import Attachment as Attachment
from pullback.core.attachment import attach as attach
from pullback.core.checks import NonFiniteError as NonFiniteError
from pullback.core.citation import cite as cite
from pullback.core.clip import ClipGradNorm as ClipGradNorm
from pullback.methods.gradient_noise import GradientNoise as GradientNoise
from pullback.methods.gradient_noise import add_gradient_noise_ as add_gradient_noise_

__version__: str

__all__ = [
    "Attachment",
    "ClipGradNorm",
    "GradientNoise",
    "NonFiniteError",
    "add_gradient_noise_",
    "attach",
    "cite",
    "schedules",
]
