"""Intermediate supervision: early columns rebuild the image and classify it, so that they do not collapse."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback.core.checks import floating, fraction, non_negative

DARKEST, BRIGHTEST = 0.01, 0.99  # intensities that a logit can reach


def supervised_loss(
    logits: Sequence[Tensor],
    rebuilt: Sequence[Tensor],
    images: Tensor,
    targets: Tensor,
    *,
    reconstruction: float = 3.0,
    early: float = 0.7,
    label_smoothing: float = 0.0,
) -> Tensor:
    r"""Loss of K heads and K - 1 rebuilt images; the authors' K is 4.

    .. math:: \sum_{i=0}^{K-2} \Big[ f \big(1 - \tfrac{i}{K-1}\big) \mathrm{BCE}(r_i, \text{image})
        + c \tfrac{i+1}{K} \mathrm{CE}(y_i, t) \Big] + \mathrm{CE}(y_{K-1}, t):

    early columns are asked for the image, late ones for the class. All terms are computed in float32 at least.

    Args:
        logits: class scores of each head, [batch, classes], the real one last.
        rebuilt: logits of intensities of each head but the last, of the shape of ``images``.
        images: intensities in [0, 1], [batch, colours, height, width]: before any normalisation by mean and deviation.
            They are cut to [0.01, 0.99].
        targets: classes [batch], or probabilities [batch, classes] (mixup).
        reconstruction: weight f; 3.0 in the authors' tiny model, 4.0 is their default elsewhere.
        early: weight c; 0.7 and 0.8.
        label_smoothing: share of the target that is spread over all classes.

    Returns:
        A 0-dim tensor.

    Raises:
        ValueError: if there are not as many rebuilt images as early heads, shapes differ, or a weight is out of range.
        TypeError: if a weight is no number.
    """
    f, c = non_negative("reconstruction", reconstruction), non_negative("early", early)
    smoothing = fraction("label_smoothing", label_smoothing)
    heads = len(logits)
    if len(rebuilt) != heads - 1:
        raise ValueError(
            f"rebuilt must hold one image for each head but the last, got {len(rebuilt)} for {heads} heads. "
            "Pass both as the network returned them in training mode."
        )

    def judged(scores: Tensor) -> Tensor:
        return F.cross_entropy(_wide(scores), targets, label_smoothing=smoothing)

    total = judged(logits[-1])
    if not rebuilt:
        return total
    wanted = _wide(floating("images", images)).clamp(DARKEST, BRIGHTEST)
    for i, image in enumerate(rebuilt):
        if image.shape != wanted.shape:
            raise ValueError(
                f"images must have the shape {tuple(image.shape)} of what was rebuilt, got {tuple(wanted.shape)}. "
                "Pass the batch that went into the network."
            )
        bce = F.binary_cross_entropy_with_logits(_wide(image), wanted)
        total = total + f * (1 - i / (heads - 1)) * bce + c * (i + 1) / heads * judged(logits[i])
    return total


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
