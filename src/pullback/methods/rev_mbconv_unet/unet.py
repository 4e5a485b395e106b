"""The partially reversible U-Net in two and three dimensions, and the soft Dice loss it is trained with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, Final, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pullback.core.checks import choice, floating, integer, non_negative, shown
from pullback.core.kinds import Layer
from pullback.methods.rev_mbconv_unet.accounting import ActivationReport, report_of
from pullback.methods.rev_mbconv_unet.blocks import CONVS, Act, MBConv, Norm, Pair, ReversibleStage, halves

Activation: TypeAlias = Literal["sigmoid", "softmax", "none"]

_POOL: Final[dict[int, Any]] = {2: F.max_pool2d, 3: F.max_pool3d}
_CONV: Final[dict[int, Any]] = {2: F.conv2d, 3: F.conv3d}
_LINEAR: Final[dict[int, str]] = {2: "bilinear", 3: "trilinear"}


# --- what lies between the stages ---------------------------------------------------------------------------


class _Join(nn.Module):
    """1x1 convolution of the two halves of a state, as if they were concatenated.

    They are not: the concatenation would be kept for the backward pass beside the halves, which the stage keeps anyway.
    """

    def __init__(self, channels: int, out: int, dims: int, *, bias: bool) -> None:
        super().__init__()
        self.conv = CONVS[dims](channels, out, 1, bias=bias)
        self.apply_conv = _CONV[dims]

    def forward(self, pair: Pair) -> Tensor:
        weight = self.conv.weight
        half = weight.shape[1] // 2
        first = self.apply_conv(pair[0], weight[:, :half], self.conv.bias)
        return first + self.apply_conv(pair[1], weight[:, half:])


class _Down(nn.Module):
    """Max-pooling by 2 of both halves, then a 1x1 convolution to the next width."""

    def __init__(self, channels: int, out: int, dims: int) -> None:
        super().__init__()
        self.conv = CONVS[dims](channels, out, 1)
        self.pool = _POOL[dims]

    def forward(self, pair: Pair) -> Tensor:
        return self.conv(torch.cat([self.pool(half, 2) for half in pair], dim=1))


# --- the network --------------------------------------------------------------------------------------------


class ReversibleUNet(Layer):
    r"""U-Net whose stages are reversible sequences of mobile inverted bottlenecks.

    Level k = 0..K-1 has ``widths[k]`` channels and 2^-k of the resolution. First a convolution with kernel 3; in the
    encoder max-pooling, a 1x1 convolution to the next width and ``blocks[k]`` reversible blocks; in the decoder as many
    blocks, a 1x1 convolution back, linear upsampling, and the *sum* with the encoder's state; at the end a 1x1
    convolution to the classes (section 3.2). Stages keep only their outputs for the backward pass; pooling, changes of
    width and the skips are ordinary.

    Sides that 2^(K-1) does not divide are padded with zeros at their ends, and the output is cropped.

    Args:
        in_channels: channels of the image.
        out_channels: channels of the output, one for each class.
        spatial_dims: 2 or 3.
        widths: channels of each level; even.
        blocks: reversible blocks of each stage, one number for each level.
        expansion: widening factor of the bottlenecks.
        norm: ``"group"``, ``"instance"`` or ``"batch"``.
        groups: groups of the GroupNorms, None for an automatic number.
        act: ``"silu"``, ``"relu6"`` or ``"leaky_relu"``.
        squeeze_excite: width of the gates as a share of half a level's channels, None for no gates.
        zero_init: start every block as the identity.
        reversible: False keeps all activations, as an ordinary network does; see `set_reversible`.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range, a width is odd, or ``blocks`` has another length than ``widths``.

    Example:
        >>> net = ReversibleUNet(1, 2, spatial_dims=3, widths=(4, 8), blocks=(1, 1))
        >>> tuple(net(torch.zeros(1, 1, 9, 10, 11)).shape)
        (1, 2, 9, 10, 11)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        spatial_dims: int = 3,
        widths: Sequence[int] = (16, 32, 64),
        blocks: Sequence[int] = (2, 2, 2),
        expansion: int = 2,
        norm: Norm = "group",
        groups: int | None = None,
        act: Act = "silu",
        squeeze_excite: float | None = None,
        zero_init: bool = False,
        reversible: bool = True,
    ) -> None:
        super().__init__()
        self.in_channels = integer("in_channels", in_channels, minimum=1)
        self.out_channels = integer("out_channels", out_channels, minimum=1)
        self.spatial_dims = choice("spatial_dims", spatial_dims, (2, 3))
        self.widths, self.blocks = _levels(widths, blocks)
        dims, deeper = self.spatial_dims, list(pairwise(self.widths))

        def stage(level: int) -> ReversibleStage:
            parts = [
                MBConv(
                    self.widths[level] // 2,
                    spatial_dims=dims,
                    expansion=expansion,
                    norm=norm,
                    groups=groups,
                    act=act,
                    squeeze_excite=squeeze_excite,
                    zero_init=zero_init,
                )
                for _ in range(2 * self.blocks[level])
            ]
            return ReversibleStage(zip(parts[::2], parts[1::2], strict=True), reversible=reversible)

        self.first = CONVS[dims](self.in_channels, self.widths[0], 3, padding=1, bias=False)
        self.encoder = nn.ModuleList([stage(level) for level in range(len(self.widths))])
        self.down = nn.ModuleList([_Down(wide, out, dims) for wide, out in deeper])
        self.decoder = nn.ModuleList([stage(level) for level in range(len(self.widths))])
        self.up = nn.ModuleList([_Join(wide, out, dims, bias=True) for out, wide in deeper])
        self.last = _Join(self.widths[0], self.out_channels, dims, bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Scores of all classes for every voxel; no sigmoid or softmax is applied.

        Args:
            x: floating tensor [batch, in_channels, ...] with ``spatial_dims`` spatial axes of any sizes.

        Returns:
            Tensor [batch, out_channels, ...].

        Raises:
            TypeError: if ``x`` is no floating tensor.
            ValueError: if ``x`` has another shape, or is too small for the norms at the lowest level.
        """
        floating("x", x, shape=(None, self.in_channels, *(None,) * self.spatial_dims))
        sides = x.shape[2:]
        tensor: Tensor = self.first(self._padded(x))
        states: list[Pair] = []
        for level, stage in enumerate(self.encoder):
            if level:
                tensor = self.down[level - 1](states[-1])
            states.append(stage(halves(tensor, 1, own=not stage.reversible)))
        pair = states.pop()
        for level in reversed(range(len(self.widths))):
            pair = self.decoder[level](pair)
            if level:
                wider = F.interpolate(
                    self.up[level - 1](pair), scale_factor=2.0, mode=_LINEAR[self.spatial_dims]
                )
                first, second = wider.chunk(2, dim=1)
                skip = states.pop()
                pair = (first + skip[0], second + skip[1])
        scores: Tensor = self.last(pair)
        return scores[(..., *(slice(side) for side in sides))]

    def padded_sides(self, sides: Sequence[int]) -> tuple[int, ...]:
        """The next sides that 2^(K-1) divides.

        Args:
            sides: spatial sizes of an input.

        Returns:
            The sizes with which the network works.
        """
        step = 2 ** (len(self.widths) - 1)
        return tuple(-(-side // step) * step for side in sides)

    def _padded(self, x: Tensor) -> Tensor:
        sides = x.shape[2:]
        missing = [want - side for want, side in zip(self.padded_sides(sides), sides, strict=True)]
        if not any(missing):
            return x
        return F.pad(x, [amount for side in reversed(missing) for amount in (0, side)])

    def stages(self) -> Iterator[ReversibleStage]:
        """The stages in the order in which they run: encoder down, decoder up."""
        for stage in (*self.encoder, *reversed(self.decoder)):
            if isinstance(stage, ReversibleStage):
                yield stage

    def set_reversible(self, reversible: bool) -> ReversibleUNet:
        """Recompute activations in the backward pass, or keep them all; weights and results stay the same.

        Args:
            reversible: False for ordinary automatic differentiation.

        Returns:
            The network itself.
        """
        for stage in self.stages():
            stage.reversible = reversible
        return self

    def activation_report(self, input_shape: Sequence[int], *, count: bool = True) -> ActivationReport:
        """Bytes that one forward pass keeps for the backward pass, by formula and by counting.

        Args:
            input_shape: shape [batch, in_channels, ...] of an input.
            count: also run the network, once as it is and once with all activations kept. A network on the device
                ``"meta"`` is counted without memory and without time.

        Returns:
            The report.

        Raises:
            ValueError: if the shape is none of an input.
        """
        return report_of(self, input_shape, count=count)


def _levels(widths: Sequence[int], blocks: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    wide = tuple(integer("widths", width, minimum=2) for width in widths)
    odd = [width for width in wide if width % 2]
    if not wide or odd:
        raise ValueError(
            f"widths must hold an even number for every level, got {shown(widths)}. "
            "The blocks of a level work on two halves of its channels."
        )
    many = tuple(integer("blocks", count, minimum=1) for count in blocks)
    if len(many) != len(wide):
        raise ValueError(
            f"blocks must hold one number for each of the {len(wide)} widths, got {shown(blocks)}. "
            f"Write {(2,) * len(wide)}, for example."
        )
    return wide, many


# --- soft Dice ----------------------------------------------------------------------------------------------


def soft_dice(
    scores: Tensor,
    target: Tensor,
    *,
    activation: Activation = "sigmoid",
    smooth: float = 1e-5,
    batch: bool = False,
) -> Tensor:
    r"""Soft Dice loss: the mean over examples and classes of 1 - (2 sum(p t) + s) / (sum p + sum t + s).

    Sums run over all voxels, in float32 at least, also under autocast: a sum of a million half-precision numbers is
    none. An empty class that is predicted empty costs 0.

    Args:
        scores: floating tensor [batch, classes, ...], what the network returns.
        target: tensor of the same shape with values in [0, 1]: masks (bool, integer or floating), which may overlap
            with ``"sigmoid"``, or probabilities.
        activation: what turns scores into p: ``"sigmoid"``, ``"softmax"`` over classes, or ``"none"``.
        smooth: the constant s >= 0; with 0 a class that is empty in both gives NaN.
        batch: sum over the batch as well, so that classes absent from single examples weigh less.

    Returns:
        The loss, a 0-dim tensor in [0, 1].

    Raises:
        TypeError: if ``scores`` is no floating tensor.
        ValueError: if the shapes differ or an argument is out of range.

    Example:
        >>> target = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
        >>> round(float(soft_dice(target, target, activation="none")), 4)
        0.0
    """
    choice("activation", activation, ("sigmoid", "softmax", "none"))
    non_negative("smooth", smooth)
    floating("scores", scores)
    if scores.shape != target.shape or scores.dim() < 3:
        raise ValueError(
            f"target must be [batch, classes, ...] as scores are, got {shown(target)} for {shown(scores)}. "
            "Turn labels into one mask per class first."
        )
    axes = [0, *range(2, scores.dim())] if batch else list(range(2, scores.dim()))
    with torch.autocast(scores.device.type, enabled=False):
        p = scores if scores.dtype in {torch.float32, torch.float64} else scores.float()
        if activation != "none":
            p = p.sigmoid() if activation == "sigmoid" else p.softmax(dim=1)
        t = target.to(p.dtype)
        both, total = (p * t).sum(axes), p.sum(axes) + t.sum(axes)
        return (1.0 - (2.0 * both + smooth) / (total + smooth)).mean()


def dice_score(prediction: Tensor, target: Tensor) -> Tensor:
    """Dice overlap 2 |A and B| / (|A| + |B|) of masks, for every example and class.

    Args:
        prediction: bool tensor [batch, classes, ...].
        target: bool tensor of the same shape.

    Returns:
        float64 tensor [batch, classes] in [0, 1]; 1 where both are empty.

    Raises:
        TypeError: if one of them is no bool tensor.
        ValueError: if the shapes differ.
    """
    for name, mask in (("prediction", prediction), ("target", target)):
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError(
                f"{name} must be a bool tensor, got {shown(mask)}. Threshold it, for example > 0."
            )
    if prediction.shape != target.shape or target.dim() < 3:
        raise ValueError(
            f"target must be [batch, classes, ...] as prediction is, got {shown(target)} for "
            f"{shown(prediction)}. Turn labels into one mask per class first."
        )
    axes = list(range(2, target.dim()))
    both = (prediction & target).sum(axes).double()
    total = prediction.sum(axes).double() + target.sum(axes).double()
    return torch.where(total > 0, 2.0 * both / total.clamp_min(1.0), torch.ones_like(total))
