"""DIA: what a gradient leaks although the client trained with dropout (Scheliga et al. 2023, arXiv:2208.06163).

The engine without dropout, the defences, and the scores come from the core and are offered here as well.
"""

from __future__ import annotations

from pullback.core.gradient_defences import Clip, Compose, Defence, GaussianNoise, Prune, Quantize, Sign
from pullback.core.image_quality import match, psnr, ssim
from pullback.core.inversion import GradientInversion, reconstruct
from pullback.core.inversion_closed_form import LayerLeak, first_layer_leak, recover_labels
from pullback.core.inversion_result import Progress, Reconstruction
from pullback.core.inversion_terms import GradientMatching, total_variation
from pullback.methods.dia.attack import DropoutInversion, mask_accuracy
from pullback.methods.dia.audit import (
    AuditReport,
    PrivacyUtility,
    Score,
    audit,
    cosine_utility,
    dropout_rate,
    one_step_utility,
    privacy_utility,
)  # fmt: skip
from pullback.methods.dia.masks import Site, dropout_sites, inject_masks, record_masks

__all__ = [
    "AuditReport",
    "Clip",
    "Compose",
    "Defence",
    "DropoutInversion",
    "GaussianNoise",
    "GradientInversion",
    "GradientMatching",
    "LayerLeak",
    "PrivacyUtility",
    "Progress",
    "Prune",
    "Quantize",
    "Reconstruction",
    "Score",
    "Sign",
    "Site",
    "audit",
    "cosine_utility",
    "dropout_rate",
    "dropout_sites",
    "first_layer_leak",
    "inject_masks",
    "mask_accuracy",
    "match",
    "one_step_utility",
    "privacy_utility",
    "psnr",
    "reconstruct",
    "record_masks",
    "recover_labels",
    "ssim",
    "total_variation",
]  # fmt: skip
