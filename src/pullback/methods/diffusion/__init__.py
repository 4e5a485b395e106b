"""Diffusion models on one Gaussian path: predictions, samplers, guidance, flow maps (Lai et al. 2025)."""

from __future__ import annotations

from pullback.core.gaussian_mixture import GaussianMixture
from pullback.core.gaussian_path import Coefficients, GaussianPath
from pullback.core.prediction import GaussianField, Prediction
from pullback.methods.diffusion.denoiser import (
    Denoiser,
    Guided,
    ReversedTime,
    cfg,
    classifier_guidance,
    posterior_sampling,
)
from pullback.methods.diffusion.flowmap import ConsistencyMap, MeanFlow
from pullback.methods.diffusion.sampling import log_prob, sample

__all__ = [
    "Coefficients",
    "ConsistencyMap",
    "Denoiser",
    "GaussianField",
    "GaussianMixture",
    "GaussianPath",
    "Guided",
    "MeanFlow",
    "Prediction",
    "ReversedTime",
    "cfg",
    "classifier_guidance",
    "log_prob",
    "posterior_sampling",
    "sample",
]
