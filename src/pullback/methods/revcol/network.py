"""RevCol: columns of a feature pyramid that can be undone, as a classifier and as a backbone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pullback.core.checks import choice, floating, fraction, instance, integer, positive
from pullback.core.kinds import Layer
from pullback.core.reversible import CouplingStep, ReversibleSequence, away_from_zero_
from pullback.methods.revcol.layers import (
    ChannelNorm,
    Classifier,
    Decoder,
    LevelFunction,
    initialise_,
    supervised_loss,
)

Recomputation: TypeAlias = Literal["reversible", "checkpoint", "none"]
"""What the backward pass computes again: columns that are undone, checkpointed columns, or nothing."""

HEADS = 4
STEM = 4  # side and stride of the stem's kernel


class RevColOutput(NamedTuple):
    """What a network with intermediate supervision returns in training.

    Args:
        logits: class scores of each supervised column, [batch, classes]; the last are the real ones.
        images: logits of the rebuilt image from each supervised column but the last, of the images' shape.
    """

    logits: tuple[Tensor, ...]
    images: tuple[Tensor, ...]


@dataclass(frozen=True)
class FeatureInfo:
    """The levels of the pyramid, finest first.

    Args:
        widths: channels of each level.
        strides: pixels of the image to a position, on each side.
    """

    widths: tuple[int, ...]
    strides: tuple[int, ...]

    def channels(self) -> list[int]:
        """Channels of each level."""
        return list(self.widths)

    def reduction(self) -> list[int]:
        """Stride of each level against the image."""
        return list(self.strides)


class RevCol(Layer):
    r"""Reversible column network (Cai et al. 2023, arXiv:2212.11696).

    After the stem, x, come columns of one step for each level,

    .. math:: c_l \leftarrow a_l c_l + L_l(c_{l-1}, c_{l+1}), \qquad c_{-1} = x,

    where the features on the left and :math:`c_{l+1}` are still those of the column before, and 0 in the first one.
    They can be undone, so that activations inside columns are rebuilt in the backward pass. Each step back divides by
    :math:`a_l`, whose authors' start is 0.5: rounding errors double with every column, and at 16 columns nothing is
    left of the gradient. The features of every ``anchor_every``-th column are therefore kept. Standardise the images:
    regions that are exactly zero while all biases are, too, magnify the rounding (see the room's page).

    Args:
        columns: number of columns.
        channels: widths of the levels, finest first.
        blocks: ConvNeXt blocks of each level.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        kernel: side of the depthwise kernels, odd.
        drop_path: stochastic depth of the last block of a column; the first has 0, between them it grows evenly.
        layer_scale: initial factor of every block's branch.
        intermediate_supervision: also judge and rebuild the image from a quarter, a half and three quarters of the
            columns; a call in training mode then returns a `RevColOutput`, whose loss `loss` gives.
        anchor_every: keep the features of every such column: 1 as the authors' code does, 0 none at all.
        recompute: ``"reversible"``; ``"checkpoint"`` for `torch.utils.checkpoint` of each column; ``"none"`` for plain
            automatic differentiation. Also an attribute, which may be set at any time.
        drift_check: measure how far rebuilt features are off; see `ReversibleSequence`. The result is in
            ``net.columns.drift``.

    Attributes:
        columns: the `ReversibleSequence`; ``columns.steps[i * levels + l]`` is level l of column i.
        feature_info: channels and strides of the levels.

    Raises:
        TypeError: if an argument is of a wrong type.
        ValueError: if an argument is out of range, or ``intermediate_supervision`` meets a number of columns that 4
            does not divide.
    """

    refuses: ClassVar[Mapping[str, str]] = {
        "compiles": "rebuilding stands outside compiled graphs; compile the levels, or the whole with breaks",
        "gradgradcheck": "the backward pass of rebuilt columns is not recorded",
    }

    def __init__(
        self,
        columns: int = 4,
        channels: Sequence[int] = (64, 128, 256, 512),
        blocks: Sequence[int] = (2, 2, 4, 2),
        num_classes: int = 1000,
        *,
        in_channels: int = 3,
        kernel: int = 3,
        drop_path: float = 0.0,
        layer_scale: float = 1e-6,
        intermediate_supervision: bool = False,
        anchor_every: int = 4,
        recompute: Recomputation = "reversible",
        drift_check: bool = False,
    ) -> None:
        super().__init__()
        columns = integer("columns", columns, minimum=1)
        widths, depths = _levels(channels, blocks)
        integer("num_classes", num_classes, minimum=1)
        integer("in_channels", in_channels, minimum=1)
        if integer("kernel", kernel, minimum=1) % 2 == 0:
            raise ValueError(f"kernel must be odd, got {kernel}. Use 3, or 7 as ConvNeXt does.")
        if fraction("drop_path", drop_path) == 1.0:
            raise ValueError("drop_path must be below 1, got 1.0. It drops every example.")
        if intermediate_supervision and columns % HEADS:
            raise ValueError(
                f"columns must be a multiple of {HEADS} for intermediate_supervision, got {columns}. "
                f"Use {columns + -columns % HEADS}."
            )
        every = integer("anchor_every", anchor_every, minimum=0, fix="Use 0 to keep no column's features.")
        self.recompute: Recomputation = choice("recompute", recompute, ("reversible", "checkpoint", "none"))
        levels = len(widths)
        strides = tuple(STEM * 2**level for level in range(levels))
        self.feature_info = FeatureInfo(widths, strides)
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, widths[0], STEM, stride=STEM), ChannelNorm(widths[0])
        )
        supervised = (
            range(columns // HEADS - 1, columns, columns // HEADS) if intermediate_supervision else ()
        )
        make = partial(
            LevelFunction, channels=widths, kernel=kernel, layer_scale=positive("layer_scale", layer_scale)
        )
        steps = _steps(columns, depths, make, drop_path, supervised)
        self.columns = ReversibleSequence(steps, anchor_every=levels * every, drift_check=drift_check)
        heads = HEADS if intermediate_supervision else 1
        self.classifiers = nn.ModuleList(Classifier(widths[-1], num_classes) for _ in range(heads))
        self.decoders = nn.ModuleList(Decoder(widths, in_channels) for _ in range(heads - 1))
        initialise_(self)

    def extra_repr(self) -> str:
        """How activations are treated."""
        return f"recompute={self.recompute!r}"

    @property
    def levels(self) -> int:
        """Number of levels."""
        return len(self.feature_info.widths)

    def set_reversible(self, reversible: bool = True) -> RevCol:
        """Rebuild activations, or (False) keep them all: the same weights, the same function, another memory."""
        self.recompute = "reversible" if reversible else "none"
        return self

    def forward(self, images: Tensor) -> Tensor | RevColOutput:
        """Class scores [batch, classes] of images [batch, colours, height, width].

        With intermediate supervision and in training mode: a `RevColOutput`.

        Raises:
            TypeError: if ``images`` is no floating tensor.
            ValueError: if it has another number of dimensions or colours, or a side that the coarsest stride does not
                divide.
        """
        features, tapped = self._run(images)
        if self.decoders and self.training:
            pairs = zip(self.classifiers, tapped, strict=True)
            rebuilt = zip(self.decoders, tapped[:-1], strict=True)
            return RevColOutput(
                tuple(head(feature) for head, feature in pairs),
                tuple(decoder(feature) for decoder, feature in rebuilt),
            )
        return self.classifiers[-1](features[-1])

    def forward_features(self, images: Tensor) -> list[Tensor]:
        """The last column's features, finest level first: [batch, channels, height / stride, width / stride] each.

        Raises:
            TypeError, ValueError: as :meth:`forward`.
        """
        return self._run(images)[0]

    def column_features(self, images: Tensor, column: int) -> list[Tensor]:
        """Features of one column, counted from 0, under plain automatic differentiation.

        Raises:
            TypeError, ValueError: as :meth:`forward`, or if there is no such column.
        """
        count = len(self.columns.steps) // self.levels
        if not 0 <= integer("column", column) < count:
            raise ValueError(f"column must be from 0 to {count - 1}, got {column}. The first is 0.")
        state, _ = self.columns.advance(
            [None] * self.levels, [self._begin(images)], 0, (column + 1) * self.levels
        )
        return state  # ty: ignore[invalid-explicit-return]

    def loss(
        self,
        output: Tensor | RevColOutput,
        images: Tensor,
        targets: Tensor,
        *,
        reconstruction: float = 3.0,
        early: float = 0.7,
        label_smoothing: float = 0.0,
    ) -> Tensor:
        """Loss of what :meth:`forward` returned in training; see `supervised_loss`. Of plain scores: cross entropy."""
        logits, rebuilt = output if isinstance(output, RevColOutput) else ((output,), ())
        return supervised_loss(
            logits,
            rebuilt,
            images,
            targets,
            reconstruction=reconstruction,
            early=early,
            label_smoothing=label_smoothing,
        )

    # --- columns --------------------------------------------------------------------------------------------------

    def _begin(self, images: Tensor) -> Tensor:
        """The stem's output; factors are kept away from zero first."""
        convolution: Any = self.stem[0]
        floating("images", images, shape=(None, convolution.in_channels, None, None))
        stride = self.feature_info.strides[-1]
        if images.shape[2] % stride or images.shape[3] % stride or 0 in images.shape[2:]:
            raise ValueError(
                f"images must have sides that {stride} divides, got {tuple(images.shape[2:])}. Pad or resize them."
            )
        if (
            self.recompute == "reversible" or not torch.compiler.is_compiling()
        ):  # there it would split the graph
            away_from_zero_([step.scale for step in self.columns.steps])  # ty: ignore[invalid-argument-type]
        return self.stem(images)

    def _run(self, images: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Features of the last column, and what was tapped."""
        x = self._begin(images)
        if self.recompute == "checkpoint" and torch.is_grad_enabled():
            return self._checkpointed(x)
        self.columns.reversible = self.recompute == "reversible"
        found = list(self.columns([None] * self.levels, [x]))
        return found[: self.levels], found[self.levels :]

    def _checkpointed(self, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        state: list[Any] = [None] * self.levels
        taps: list[Tensor] = []

        def column(start: int, x: Tensor, *state: Tensor | None) -> tuple[Tensor, ...]:
            return tuple(self.columns.advance(state, [x], start, start + self.levels)[0])  # ty: ignore

        for start in range(0, len(self.columns.steps), self.levels):
            state = list(checkpoint(column, start, x, *state, use_reentrant=False))
            if self.columns.steps[start + self.levels - 1].tap:
                taps.append(state[-1])
        return state, taps


def _steps(
    columns: int,
    depths: Sequence[int],
    make: Callable[..., LevelFunction],
    drop_path: float,
    supervised: Collection[int],
) -> list[CouplingStep]:
    """The steps of all columns; ``make(level, first=..., rates=...)`` builds a level."""
    count, levels, steps = sum(depths), len(depths), []
    rates = [drop_path * k / max(count - 1, 1) for k in range(count)]
    for column in range(columns):
        for level, depth in enumerate(depths):
            start = sum(depths[:level])
            fn = make(level, first=column == 0, rates=rates[start : start + depth])
            reads = ([level - 1] if level else []) + ([level + 1] if fn.up is not None else [])
            scale = nn.Parameter(torch.full((1, fn.width, 1, 1), 0.5))
            tap = level == levels - 1 and column in supervised
            steps.append(CouplingStep(level, reads, fn, scale, context=() if level else (0,), tap=tap))
    return steps


def _levels(channels: Sequence[int], blocks: Sequence[int]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    instance("channels", channels, (list, tuple), fix="Pass one width for each level.")
    instance("blocks", blocks, (list, tuple), fix="Pass one number for each level.")
    widths = tuple(integer("channels", each, minimum=1) for each in channels)
    depths = tuple(integer("blocks", each, minimum=1) for each in blocks)
    if not widths or len(widths) != len(depths):
        raise ValueError(
            f"channels and blocks must have one entry for each level, got {len(widths)} and {len(depths)}. "
            "Make them equally long."
        )
    return widths, depths


# --- named networks ---


class Configuration(NamedTuple):
    """Widths and blocks of each level, number of columns, rate of stochastic depth."""

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    columns: int
    drop_path: float


CONFIGURATIONS: Mapping[str, Configuration] = MappingProxyType(
    {
        "tiny": Configuration((64, 128, 256, 512), (2, 2, 4, 2), 4, 0.1),
        "small": Configuration((64, 128, 256, 512), (2, 2, 4, 2), 8, 0.3),
        "base": Configuration((72, 144, 288, 576), (1, 1, 3, 2), 16, 0.4),
        "large": Configuration((128, 256, 512, 1024), (1, 2, 6, 2), 8, 0.5),
        "xlarge": Configuration((224, 448, 896, 1792), (1, 2, 6, 2), 8, 0.5),
    }
)
"""By name: tiny 30M, small 60M, base 138M parameters, large and xlarge."""


def revcol(name: str, **changes: Any) -> RevCol:
    """A network of the paper by name.

    Args:
        name: a key of `CONFIGURATIONS`.
        **changes: arguments of `RevCol`, which win over the configuration's.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: if there is no such name.
        TypeError: if an argument is unknown.
    """
    named = CONFIGURATIONS[choice("name", name, tuple(CONFIGURATIONS))]
    return RevCol(**{**named._asdict(), **changes})
