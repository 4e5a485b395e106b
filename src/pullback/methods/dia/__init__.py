"""DIA: what a gradient leaks although the client trained with dropout (Scheliga et al. 2023, arXiv:2208.06163)."""

from __future__ import annotations

from pullback.methods.dia.attack import DropoutInversion, mask_accuracy
from pullback.methods.dia.masks import Site, dropout_sites, inject_masks, record_masks

__all__ = ["DropoutInversion", "Site", "dropout_sites", "inject_masks", "mask_accuracy", "record_masks"]
