"""What the contracts need to know of this room's components."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from pullback.methods.rev_mbconv_unet import MBConv, ReversibleStage, ReversibleUNet
from pullback.testing import Case

_mbconv: Any = MBConv  # with arguments of wrong types, which must be refused
_unet: Any = ReversibleUNet


def _images(channels: int, *sides: int):
    """Inputs of a fixed shape; the batch is the first axis."""

    def inputs(generator: torch.Generator, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        shape = (3, channels, *sides)
        return (torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype),)

    return inputs


def _stage(**settings: Any) -> ReversibleStage:
    parts = [MBConv(2, spatial_dims=2, **settings) for _ in range(4)]
    return ReversibleStage(list(zip(parts[::2], parts[1::2], strict=True)))


def _network(**settings: Any) -> ReversibleUNet:
    return _unet(1, 2, **{"spatial_dims": 2, "widths": (2, 4), "blocks": (1, 1), **settings})


_REBUILT = {
    "gradgradcheck": "the backward pass rebuilds activations without recording it",
    "dtypes": "a state in half precision cannot be rebuilt; autocast keeps it in float32",
    "compiles": "the autograd function of a stage stays outside a compiled graph, which is broken there",
}

CASES = (
    Case(
        name="MBConv",
        kind="layer",
        build=lambda: MBConv(4, spatial_dims=2, groups=1),
        inputs=_images(4, 3, 3),
        shape=tuple,
        bad=(
            lambda: MBConv(0),
            lambda: _mbconv(4, norm="none"),
            lambda: _mbconv(4, act="gelu"),
            lambda: MBConv(4, kernel_size=2),
            lambda: MBConv(4, squeeze_excite=-1.0),
            lambda: _mbconv(4, expansion=1.5),
        ),
    ),
    Case(
        name="MBConv[3d, gate, leaky_relu]",
        kind="layer",
        build=lambda: MBConv(2, groups=1, act="leaky_relu", squeeze_excite=0.5),
        inputs=_images(2, 2, 3, 2),
        shape=tuple,
    ),
    Case(
        name="ReversibleStage",
        kind="layer",
        build=_stage,
        inputs=_images(4, 3, 3),
        shape=tuple,
        refuses=_REBUILT,
        bad=(lambda: ReversibleStage([]), lambda: ReversibleStage([(nn.Conv2d(2, 3, 1), nn.Identity())])),
    ),
    Case(
        name="ReversibleUNet",
        kind="layer",
        build=_network,
        inputs=_images(1, 5, 4),
        shape=lambda s: (s[0], 2, *s[2:]),
        refuses=_REBUILT,
        bad=(
            lambda: _network(widths=(2, 3)),
            lambda: _network(blocks=(1,)),
            lambda: _unet(1, 2, spatial_dims=1),
            lambda: _unet(1.5, 2),
        ),
    ),
    Case(
        name="ReversibleUNet[3d]",
        kind="layer",
        build=lambda: _network(spatial_dims=3, act="relu6"),
        inputs=_images(1, 4, 3, 4),
        shape=lambda s: (s[0], 2, *s[2:]),
        refuses=_REBUILT,
    ),
    Case(
        name="ReversibleUNet[plain]",
        kind="layer",
        build=lambda: _network(reversible=False, zero_init=True),
        inputs=_images(1, 4, 4),
        shape=lambda s: (s[0], 2, *s[2:]),
        refuses={"compiles": _REBUILT["compiles"]},
    ),
)
