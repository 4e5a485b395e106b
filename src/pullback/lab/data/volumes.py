"""The MNI152 brain template at 2 mm (embedded)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from pullback.lab.data.card import DatasetCard
from pullback.lab.data.source import embedded_arrays


@dataclass(frozen=True)
class Brain:
    """One template brain.

    Args:
        t1: uint8 [72, 91, 77], T1 weighted intensity scaled to 0..255.
        grey: uint8 [72, 91, 77], grey-matter probability times 255.
        white: uint8 [72, 91, 77], white-matter probability times 255.
        voxel_mm: edge of a voxel in millimetres.
        card: where it comes from.
    """

    t1: Tensor
    grey: Tensor
    white: Tensor
    voxel_mm: float
    card: DatasetCard


@cache
def mni152() -> Brain:
    """The symmetric MNI152 template with its grey- and white-matter maps.

    Raises:
        DataError: if the embedded file is missing or damaged.
    """
    arrays = embedded_arrays("mni152_2mm.npz")
    card = DatasetCard(
        name="mni152",
        source="nilearn 0.14.1, resampled to 2 mm, cropped and scaled to 0..255",
        licence="BSD-3-Clause; MNI notice",
        citation="V. Fonov et al.: Unbiased average age-appropriate atlases for pediatric studies, NeuroImage 2011.",
        examples=1,
        counts={"t1": 1, "grey": 1, "white": 1},
    )
    t1, grey, white = (torch.from_numpy(arrays[key]) for key in ("t1", "gm", "wm"))
    return Brain(t1, grey, white, float(arrays["voxel_mm"].max()), card)
