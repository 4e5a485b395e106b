"""LANTON: noise-adaptive layer-wise rates for geometry-aware optimizers (Hao et al. 2025, arXiv:2510.14009)."""

from pullback.methods.lanton.lanton import LANTON
from pullback.methods.lanton.layers import LayerNoise, NoiseReport, lmo_groups

__all__ = ["LANTON", "LayerNoise", "NoiseReport", "lmo_groups"]
