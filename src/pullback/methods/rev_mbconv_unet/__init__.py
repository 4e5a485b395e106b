"""Reversible mobile inverted bottlenecks and the U-Net made of them (Pendse et al. 2020, arXiv:2104.09648)."""

from pullback.methods.rev_mbconv_unet.accounting import (
    ActivationReport,
    analytic_bytes,
    peak_bytes,
    saved_by_mbconv,
)
from pullback.methods.rev_mbconv_unet.blocks import MBConv, ReversibleStage
from pullback.methods.rev_mbconv_unet.unet import ReversibleUNet, dice_score, soft_dice

__all__ = [
    "ActivationReport",
    "MBConv",
    "ReversibleStage",
    "ReversibleUNet",
    "analytic_bytes",
    "dice_score",
    "peak_bytes",
    "saved_by_mbconv",
    "soft_dice",
]
