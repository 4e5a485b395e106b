"""The MNI152 brain template at 2 mm (embedded)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
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


@dataclass(frozen=True)
class Tissue:
    """A block of the template with what is to be found in it.

    Args:
        image: float32 [1, x, y, z], intensity with mean 0 and deviation 1 over the training blocks.
        masks: bool [3, x, y, z]: neither, grey matter, white matter; a probability above one half decides.
    """

    image: Tensor
    masks: Tensor


@dataclass(frozen=True)
class TissueParts:
    """Coronal blocks of one hemisphere: two to train on, one to choose by, one to test on."""

    train: tuple[Tissue, ...]
    validation: Tissue
    test: Tissue


TRAIN_BLOCKS, VALIDATION_BLOCK, TEST_BLOCK = ((0, 24), (72, 91)), (29, 46), (51, 67)


@cache
def brain_tissue() -> TissueParts:
    """Segmentation of grey and white matter, split along the axis from back to front with gaps of 10 mm.

    Only one hemisphere is used. The template is exactly its own mirror image, so that a split into left and right would
    test on the voxels of the training set.

    Returns:
        The blocks, each 36 x 16 to 24 x 77 voxels.

    Raises:
        DataError: if the embedded file is missing or damaged.
    """
    brain = mni152()
    half = brain.t1.shape[0] // 2
    image = brain.t1[:half].float()
    tissue = torch.stack([brain.grey[:half], brain.white[:half]]) > 127
    masks = torch.cat([~tissue.any(0, keepdim=True), tissue])
    seen = torch.cat([image[:, start:stop].reshape(-1) for start, stop in TRAIN_BLOCKS])
    image = ((image - seen.mean()) / seen.std()).unsqueeze(0)

    def block(limits: tuple[int, int]) -> Tissue:
        rows = slice(*limits)
        return Tissue(image[:, :, rows].contiguous(), masks[:, :, rows].contiguous())

    train = tuple(block(limits) for limits in TRAIN_BLOCKS)
    return TissueParts(train, block(VALIDATION_BLOCK), block(TEST_BLOCK))


# --- what a network sees of it -----------------------------------------------------------------------------------


def another_scanner(images: Tensor, noise: float, g: torch.Generator) -> Tensor:
    """Every image as another scanner would see it: intensities scaled, a smooth bias field, noise.

    Args:
        images: float tensor [n, 1, x, y, z].
        noise: standard deviation of the noise.
        g: where the numbers come from.

    Returns:
        Tensor of the same shape.
    """
    n = len(images)
    scale = torch.exp(0.1 * torch.randn(n, 1, 1, 1, 1, generator=g))
    coarse = 0.1 * torch.randn(n, 1, 3, 3, 3, generator=g)
    bias = F.interpolate(coarse, size=images.shape[2:], mode="trilinear", align_corners=True).exp()
    return images * scale * bias + noise * torch.randn(images.shape, generator=g)


def cubes(count: int, side: int, noise: float, g: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random cubes of the training blocks, each from another scanner, with their masks.

    Args:
        count: number of cubes.
        side: voxels along each edge, at most 19.
        noise: standard deviation of the noise.
        g: where places and corruptions come from.

    Returns:
        Images float32 [count, 1, side, side, side] and masks bool [count, 3, side, side, side].
    """
    blocks, images, masks = brain_tissue().train, [], []
    for _ in range(count):
        block = blocks[int(torch.randint(len(blocks), (1,), generator=g))]
        corner = [int(torch.randint(size - side + 1, (1,), generator=g)) for size in block.image.shape[1:]]
        cube = (slice(None), *(slice(at, at + side) for at in corner))
        images.append(block.image[cube])
        masks.append(block.masks[cube])
    return another_scanner(torch.stack(images), noise, g), torch.stack(masks)


def coronal_slices(volume: Tensor, rows: Sequence[int]) -> Tensor:
    """Slices across the axis from back to front as they are looked at, the top of the head first.

    Args:
        volume: tensor [x, y, z].
        rows: places along y.

    Returns:
        Tensor [slices, height, width].
    """
    return volume[:, list(rows)].permute(1, 2, 0).flip(1)
