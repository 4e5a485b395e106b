"""Annealed Gaussian gradient noise (Neelakantan et al. 2015, arXiv:1511.06807)."""

from pullback.methods.gradient_noise.noise import GradientNoise, NoiseReport
from pullback.methods.gradient_noise.sampling import add_gradient_noise_

__all__ = ["GradientNoise", "NoiseReport", "add_gradient_noise_"]
