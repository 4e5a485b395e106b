"""Spectra of per-layer gradients (Li, Li and Zhou 2025, arXiv:2410.23743)."""

from __future__ import annotations

from pullback.core.matrices import PRESETS, split_heads, split_outputs
from pullback.core.responses import Responses, response_batch, response_loss, response_mask
from pullback.methods.layer_gradients.curves import (
    Curves,
    MeanAbsoluteDifference,
    RelativeDifference,
    layer_curve,
    mean_absolute_difference,
    relative_difference,
)
from pullback.methods.layer_gradients.probe import GradientSpectrum, Measurement, Sample
from pullback.methods.layer_gradients.spectrum import STATISTICS, Record, spectrum_statistics

__all__ = [
    "PRESETS",
    "STATISTICS",
    "Curves",
    "GradientSpectrum",
    "MeanAbsoluteDifference",
    "Measurement",
    "Record",
    "RelativeDifference",
    "Responses",
    "Sample",
    "layer_curve",
    "mean_absolute_difference",
    "relative_difference",
    "response_batch",
    "response_loss",
    "response_mask",
    "spectrum_statistics",
    "split_heads",
    "split_outputs",
]
