"""Parts of a column: ConvNeXt blocks, fusion of neighbouring levels, heads and decoders (Cai et al. 2023, fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPS = 1e-6


class ChannelNorm(nn.LayerNorm):
    """Layer normalisation over the channels of [batch, channels, height, width], eps 1e-6."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=EPS)

    def forward(self, input: Tensor) -> Tensor:
        """Normalised ``input``, of the same shape."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class PixelLinear(nn.Linear):
    """One linear map of the channels at every position of [batch, channels, height, width]."""

    def forward(self, input: Tensor) -> Tensor:
        """[batch, out channels, height, width]."""
        return super().forward(input.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class StochasticDepth(nn.Module):
    """Drop whole examples of a residual branch in training, and scale the others by 1 / (1 - rate)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        """``x`` [batch, ...], some of whose examples are zero."""
        if not self.training or self.rate == 0.0:
            return x
        keep = 1.0 - self.rate
        mask = x.new_empty(x.shape[0], *(1,) * (x.dim() - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        """The rate."""
        return f"rate={self.rate:g}"


class ConvNeXtBlock(nn.Module):
    """Depthwise convolution, norm, four times as wide and back with GELU, layer scale, added to the input.

    Args:
        channels: width of input and output.
        kernel: side of the depthwise kernel, odd; 3 here where ConvNeXt has 7.
        drop_path: rate of stochastic depth.
        layer_scale: initial value of the learned factor per channel.
    """

    def __init__(
        self, channels: int, *, kernel: int = 3, drop_path: float = 0.0, layer_scale: float = 1e-6
    ) -> None:
        super().__init__()
        self.depthwise = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.expand = nn.Linear(channels, 4 * channels)
        self.contract = nn.Linear(4 * channels, channels)
        self.gamma = nn.Parameter(torch.full((channels,), layer_scale))
        self.drop_path = StochasticDepth(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] to the same."""
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.contract(F.gelu(self.expand(y)))
        return x + self.drop_path(y.permute(0, 3, 1, 2))


class LevelFunction(nn.Module):
    """One level of one column: L_l(below, above), fusion followed by blocks.

    Args:
        level: 0 is the finest, whose ``below`` is the stem's output.
        channels: widths of all levels.
        first: whether it belongs to the first column, to which nothing comes from above.
        kernel: side of the depthwise kernels.
        rates: stochastic depth of each block; as many as there are blocks.
        layer_scale: initial layer scale.
    """

    def __init__(
        self,
        level: int,
        channels: Sequence[int],
        *,
        first: bool,
        kernel: int,
        rates: Sequence[float],
        layer_scale: float,
    ) -> None:
        super().__init__()
        width = channels[level]
        self.down: nn.Module = nn.Identity()
        if level:
            self.down = nn.Sequential(nn.Conv2d(channels[level - 1], width, 2, stride=2), ChannelNorm(width))
        self.up: nn.Module | None = None
        if level + 1 < len(channels) and not first:
            self.up = nn.Sequential(PixelLinear(channels[level + 1], width), ChannelNorm(width))
        self.blocks = nn.Sequential(
            *(ConvNeXtBlock(width, kernel=kernel, drop_path=r, layer_scale=layer_scale) for r in rates)
        )

    def forward(self, first: Tensor, second: Tensor | None = None) -> Tensor:
        """The update of this level.

        Args:
            first: the slots that the step reads come first: at level 0 ``above``, or the stem's output where nothing
                comes from above; elsewhere ``below`` [batch, channels below, 2 height, 2 width].
            second: the other one. ``above`` is [batch, channels above, height / 2, width / 2].

        Returns:
            [batch, channels, height, width].
        """
        stem_last = isinstance(self.down, nn.Identity) and second is not None
        below, above = (second, first) if stem_last else (first, second)
        fused = self.down(below)
        if self.up is not None:
            fused = fused + F.interpolate(self.up(above), scale_factor=2.0, mode="nearest")
        return self.blocks(fused)


class Classifier(nn.Module):
    """Mean over positions, norm, linear map: [batch, channels, height, width] to [batch, classes]."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(channels, eps=EPS)
        self.linear = nn.Linear(channels, classes)

    def forward(self, feature: Tensor) -> Tensor:
        """Class scores."""
        return self.linear(self.norm(feature.mean((2, 3))))


class Decoder(nn.Module):
    """Rebuild the image from a column's coarsest feature, as logits of intensities in [0, 1].

    One stage for each finer level: to its width, norm, GELU, twice as large (bilinear, corners aligned), one block;
    then 16 values a pixel and colour, shuffled into 4 x 4 pixels.

    Args:
        channels: widths of all levels.
        colours: channels of the image.
    """

    def __init__(self, channels: Sequence[int], colours: int) -> None:
        super().__init__()
        widths = list(reversed(channels))
        self.stages = nn.Sequential(*map(self._stage, widths[:-1], widths[1:]))
        self.last = nn.Conv2d(widths[-1], 16 * colours, 1)
        self.shuffle = nn.PixelShuffle(4)

    @staticmethod
    def _stage(wide: int, narrow: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(wide, narrow, 1),
            ChannelNorm(narrow),
            nn.GELU(),
            nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
            ConvNeXtBlock(narrow),
        )

    def forward(self, feature: Tensor) -> Tensor:
        """[batch, coarsest channels, h, w] to [batch, colours, h * stride, w * stride]."""
        return self.shuffle(self.last(self.stages(feature)))


@torch.no_grad()
def initialise_(net: nn.Module) -> None:
    """Weights of convolutions and linear maps from a normal of deviation 0.02 cut at 2, biases 0."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
