"""Peri-LN: norms around both sides of every residual sub-layer."""

from pullback.methods.peri_ln.conversion import NormReport, convert_norm_placement
from pullback.methods.peri_ln.placement import PLACEMENTS, PeriNorm, PeriNormBlock, norm_param_groups
from pullback.methods.peri_ln.probe import BlockStats, ResidualStreamProbe, StreamReport

__all__ = [
    "PLACEMENTS",
    "BlockStats",
    "NormReport",
    "PeriNorm",
    "PeriNormBlock",
    "ResidualStreamProbe",
    "StreamReport",
    "convert_norm_placement",
    "norm_param_groups",
]
