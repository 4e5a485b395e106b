"""Mobile inverted bottlenecks, and stages of any user's modules that are inverted instead of remembered."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Literal, TypeAlias

import torch
from torch import Tensor, nn

from pullback.core.checks import choice, floating, fraction, integer, shown
from pullback.core.depthwise import Depthwise3d
from pullback.core.kinds import Layer
from pullback.core.reversible import CouplingStep, ReversibleSequence

Norm: TypeAlias = Literal["group", "instance", "batch"]
Act: TypeAlias = Literal["silu", "relu6", "leaky_relu"]

NORMS: Final[tuple[Norm, ...]] = ("group", "instance", "batch")
ACTS: Final[dict[Act, Callable[[], nn.Module]]] = {
    "silu": nn.SiLU,
    "relu6": nn.ReLU6,
    # In place it keeps one tensor where the others keep two, and its gradient can be read from what it leaves behind.
    "leaky_relu": lambda: nn.LeakyReLU(0.01, inplace=True),
}
CONVS: Final[dict[int, Any]] = {2: nn.Conv2d, 3: nn.Conv3d}
_BATCH: Final[dict[int, Any]] = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_INSTANCE: Final[dict[int, Any]] = {2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
_POOL: Final[dict[int, Any]] = {2: nn.AdaptiveAvgPool2d, 3: nn.AdaptiveAvgPool3d}


# --- mobile inverted bottleneck -----------------------------------------------------------------------------


def group_count(channels: int, wanted: int | None) -> int:
    """Groups of a GroupNorm: ``wanted``, or (None) the largest divisor up to 8 that leaves two channels in a group.

    Args:
        channels: channels of the norm.
        wanted: the user's number.

    Returns:
        A divisor of ``channels``.

    Raises:
        ValueError: if ``wanted`` does not divide ``channels``.
    """
    if wanted is None:
        return max(g for g in range(1, 9) if channels % g == 0 and (g == 1 or 2 * g <= channels))
    wanted = integer("groups", wanted, minimum=1)
    if channels % wanted:
        raise ValueError(
            f"groups must divide the {channels} channels of the norm, got {wanted}. "
            "Choose a divisor, or None for an automatic one."
        )
    return wanted


def _norm(kind: Norm, channels: int, dims: int, groups: int | None) -> nn.Module:
    if kind == "batch":
        return _BATCH[dims](channels)
    if kind == "instance":
        return _INSTANCE[dims](channels, affine=True)
    return nn.GroupNorm(group_count(channels, groups), channels)


class _Gate(nn.Module):
    """Squeeze-and-excitation: scale every channel by a number in (0, 1) that its mean and those of the others give."""

    def __init__(self, channels: int, reduced: int, dims: int, act: Act) -> None:
        super().__init__()
        self.mean = _POOL[dims](1)
        self.squeeze = CONVS[dims](channels, reduced, 1)
        self.act = ACTS[act]()
        self.excite = CONVS[dims](reduced, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(self.act(self.squeeze(self.mean(x)))))


class MBConv(Layer):
    r"""Mobile inverted bottleneck without a shortcut: the residual function F or G of a reversible block.

    1x1 convolution to ``expansion`` times the channels, norm, activation, depthwise convolution, norm, activation, 1x1
    convolution back, norm; no activation at the end (Sandler et al. 2018; section 3.1 of the card of this method). The
    shape stays as it is, which a coupling needs.

    For the backward pass it keeps ``6 e + 2`` tensors of the input's size, ``4 e + 2`` with ``act="leaky_relu"`` (see
    `pullback.methods.rev_mbconv_unet.saved_by_mbconv`); inside a `ReversibleStage` none of them outlives its block.

    Args:
        channels: channels of input and output.
        spatial_dims: 2 for input [batch, channels, height, width], 3 for [batch, channels, depth, height, width].
        expansion: widening factor e of the depthwise convolution.
        kernel_size: odd side of the depthwise kernel.
        norm: ``"group"`` (independent of the batch), ``"instance"`` or ``"batch"``.
        groups: groups of all GroupNorms; None chooses up to 8, at least two channels in each.
        act: ``"silu"``, ``"relu6"`` or ``"leaky_relu"`` (slope 0.01, in place).
        squeeze_excite: width of a squeeze-and-excitation gate after the depthwise part, as a share of ``channels``;
            None leaves it out.
        zero_init: start with a zero gain in the last norm, so that a block begins as the identity.

    Raises:
        TypeError: if an argument has another type.
        ValueError: if an argument is out of range.

    Example:
        >>> f = MBConv(8, spatial_dims=3, expansion=2)
        >>> tuple(f(torch.zeros(1, 8, 4, 4, 4)).shape)
        (1, 8, 4, 4, 4)
    """

    def __init__(
        self,
        channels: int,
        *,
        spatial_dims: int = 3,
        expansion: int = 2,
        kernel_size: int = 3,
        norm: Norm = "group",
        groups: int | None = None,
        act: Act = "silu",
        squeeze_excite: float | None = None,
        zero_init: bool = False,
    ) -> None:
        super().__init__()
        self.channels = integer("channels", channels, minimum=1)
        self.spatial_dims = choice("spatial_dims", spatial_dims, (2, 3))
        self.expansion = integer("expansion", expansion, minimum=1)
        if integer("kernel_size", kernel_size, minimum=1) % 2 == 0:
            raise ValueError(
                f"kernel_size must be odd, got {kernel_size}. An even kernel changes the shape; use 3."
            )
        self.norm: Norm = choice("norm", norm, NORMS)
        self.act: Act = choice("act", act, tuple(ACTS))
        dims, wide = self.spatial_dims, self.channels * self.expansion
        conv = CONVS[dims]
        self.expand = conv(self.channels, wide, 1, bias=False)
        self.norm1 = _norm(self.norm, wide, dims, groups)
        self.act1 = ACTS[self.act]()
        self.depthwise = (
            Depthwise3d(wide, kernel_size)
            if dims == 3
            else conv(wide, wide, kernel_size, padding=kernel_size // 2, groups=wide, bias=False)
        )
        self.norm2 = _norm(self.norm, wide, dims, groups)
        self.act2 = ACTS[self.act]()
        self.gate = nn.Identity() if squeeze_excite is None else self._gate(squeeze_excite, wide)
        self.project = conv(wide, self.channels, 1, bias=False)
        self.norm3 = _norm(self.norm, self.channels, dims, groups)
        if zero_init:
            gain: Any = self.norm3.weight
            nn.init.zeros_(gain)

    def _gate(self, share: float, wide: int) -> _Gate:
        fraction("squeeze_excite", share, fix="Use 0.25, or None for no gate.")
        return _Gate(wide, max(1, round(share * self.channels)), self.spatial_dims, self.act)

    def forward(self, x: Tensor) -> Tensor:
        """The residual, of the shape of ``x``.

        Args:
            x: floating tensor [batch, channels, ...] with two or three spatial axes.

        Returns:
            Tensor of the same shape.

        Raises:
            ValueError: if ``x`` has another shape, or leaves a norm with a single value.
        """
        self._check(x)
        h = self.act1(self.norm1(self.expand(x)))
        h = self.act2(self.norm2(self.depthwise(h)))
        return self.norm3(self.project(self.gate(h)))

    def _check(self, x: Tensor) -> None:
        if x.dim() != 2 + self.spatial_dims or x.shape[1] != self.channels:
            axes = ", ".join(("depth", "height", "width")[3 - self.spatial_dims :])
            raise ValueError(
                f"x must be [batch, {self.channels}, {axes}], got {shown(x)}. "
                "MBConv works on one half of a stage's channels."
            )
        if not len(x) and (self.norm == "instance" or (self.norm == "batch" and self.training)):
            raise ValueError(
                f"x must hold at least one example for norm={self.norm!r}, got {shown(x)}. Leave empty batches out."
            )
        values = math.prod(x.shape[2:])
        if self.norm == "batch":
            values = values * len(x) if self.training else 2
        elif (
            self.norm == "group"
            and isinstance(self.norm1, nn.GroupNorm)
            and isinstance(self.norm3, nn.GroupNorm)
        ):
            values *= min(norm.num_channels // norm.num_groups for norm in (self.norm1, self.norm3))
        if values == 1:
            raise ValueError(
                f"x must give norm={self.norm!r} more than one value for each statistic, got {shown(x)}. The output "
                "would be its offset alone; use fewer levels, larger inputs, or norm='group' with fewer groups."
            )


# --- stages -------------------------------------------------------------------------------------------------

Pair: TypeAlias = tuple[Tensor, Tensor]
"""The two half states of a stage, of equal shapes."""


def halves(x: Tensor, dim: int, *, own: bool) -> Pair:
    """Split a state in two.

    Args:
        x: the state.
        dim: axis to split, of even size.
        own: give the second half memory of its own. Where it is kept for the backward pass, a view would keep the
            whole of ``x`` alive; the first half is only added to, and is not kept.

    Returns:
        Both halves.
    """
    first, second = x.chunk(2, dim=dim)
    return first, second.clone() if own else second


def _kept_shape(name: str, fn: nn.Module) -> None:
    """Refuse a function that changes the shape, where that can be told without calling anybody else's code.

    A chain of torch's own modules is followed on the device ``meta``; whatever else is wrong with it, or with other
    modules, shows at the first call.
    """
    parts = list(fn.modules())
    own = all(type(part).__module__.startswith("torch.nn.modules") for part in parts)
    plain = all(isinstance(part, nn.Sequential) or not list(part.children()) for part in parts)
    hooked = any(part._forward_hooks or part._forward_pre_hooks for part in parts)
    first: Any = next((part for part in parts if hasattr(part, "in_channels")), None)
    if first is None or not own or not plain or hooked:
        return
    tensors = [*fn.named_parameters(), *fn.named_buffers()]
    x = torch.empty(2, first.in_channels, *(16,) * len(first.kernel_size), device="meta")
    try:
        state = {key: torch.empty_like(tensor, dtype=x.dtype, device="meta") for key, tensor in tensors}
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            shape = tuple(torch.func.functional_call(fn, state, (x,)).shape)
    except (RuntimeError, ValueError, TypeError, IndexError):
        return
    if shape != tuple(x.shape):
        raise ValueError(
            f"{name} must keep the shape of its input, got {type(fn).__name__} that turns {list(x.shape)} into "
            f"{list(shape)}. A coupling adds its output to the other half: change width and resolution between "
            "stages, with stride 1, padding and as many output as input channels inside."
        )


class ReversibleStage(Layer):
    r"""Reversible blocks one after another, with the activations of none of them kept.

    A block splits the channels in two halves and computes y1 = x1 + F(x2), y2 = x2 + G(y1), which is undone by
    x2 = y2 - G(y1), x1 = y1 - F(x2) (Gomez et al. 2017; section 3.1). The backward pass starts from the stage's output,
    the only thing that is kept, and rebuilds every input on its way.

    F and G are any modules that keep the shape of a half. Random numbers, autocast and the statistics of batch norms
    are those of the forward pass when F and G are computed again; `pullback.core.reversible` does it.

    Args:
        blocks: pairs (F, G).
        split_dim: axis that is split.
        reversible: False for ordinary automatic differentiation of the same function; may be set at any time.
        preserve_rng_state: replay the random numbers of F and G; False saves time where they draw none.

    Raises:
        TypeError: if a block is no pair of modules.
        ValueError: if there is no block, or a function is seen to change the shape.

    Example:
        >>> stage = ReversibleStage([(MBConv(2, spatial_dims=2), MBConv(2, spatial_dims=2))])
        >>> x = torch.randn(1, 4, 6, 6)
        >>> torch.allclose(stage.inverse(stage(x)), x, atol=1e-5)
        True
    """

    def __init__(
        self,
        blocks: Iterable[Sequence[nn.Module]],
        *,
        split_dim: int = 1,
        reversible: bool = True,
        preserve_rng_state: bool = True,
    ) -> None:
        super().__init__()
        self.split_dim = integer("split_dim", split_dim)
        pairs = [_pair(index, block) for index, block in enumerate(blocks)]
        if not pairs:
            raise ValueError("blocks must hold at least one pair (F, G), got none. Pass [(f, g), ...].")
        steps = [
            CouplingStep(slot=slot, reads=[1 - slot], fn=fn) for pair in pairs for slot, fn in enumerate(pair)
        ]
        self.sequence = ReversibleSequence(steps, preserve_rng_state=preserve_rng_state)
        self.reversible = reversible

    def forward(self, x: Any) -> Any:
        """The stage's output.

        Args:
            x: floating tensor whose axis ``split_dim`` has an even size, or a pair of half states of equal shapes. A
                pair comes back as a pair, which saves a copy, and memory where the next operation takes halves.

        Returns:
            What was given: a tensor of the same shape, or a pair. Under autocast it is in float32.

        Raises:
            TypeError: if ``x`` is neither, or in half precision where a graph is built; rebuilt, it would be off by a
                per cent after a few blocks.
            ValueError: if the axis is odd, halves differ in shape, or a function changes the shape.
            RuntimeError: if a function overwrites its input, or has buffers that change what it computes.
        """
        if isinstance(x, Tensor):
            self._check(x)
            pair = self._run(halves(x, self.split_dim, own=not self.reversible and torch.is_grad_enabled()))
            return torch.cat(pair, dim=self.split_dim)
        return self._run(_state(x))

    def _run(self, pair: Pair) -> Pair:
        if self.reversible and torch.is_grad_enabled():
            self._refuse_half(pair[0])
        first, second = self.sequence(pair)
        return first, second

    @staticmethod
    def _refuse_half(half: Tensor) -> None:
        kind = half.device.type
        raised = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        if raised or half.dtype not in {torch.float16, torch.bfloat16}:
            return
        raise TypeError(
            f"x must be float32 or float64 to be rebuilt in the backward pass, got {half.dtype}. Keep the weights in "
            "float32 and use torch.autocast, or set reversible=False."
        )

    @property
    def reversible(self) -> bool:
        """Whether activations are rebuilt (True) or kept (False)."""
        return self.sequence.reversible

    @reversible.setter
    def reversible(self, value: bool) -> None:
        self.sequence.reversible = bool(value)

    def functions(self) -> Iterator[nn.Module]:
        """F and G of every block, in the order in which they run."""
        fns: list[Any] = [step.fn for step in self.sequence.steps]
        yield from fns

    def inverse(self, y: Any) -> Any:
        """The input that gives ``y``, up to rounding; without gradients.

        Args:
            y: what `forward` returned, a tensor or a pair.

        Returns:
            A tensor or a pair as ``y`` is.
        """
        if isinstance(y, Tensor):
            self._check(y)
            return torch.cat(self.sequence.inverse(halves(y, self.split_dim, own=False)), dim=self.split_dim)
        first, second = self.sequence.inverse(_state(y))
        return first, second

    def _check(self, x: Tensor) -> None:
        floating("x", x)
        if not -x.dim() <= self.split_dim < x.dim() or x.shape[self.split_dim] % 2:
            raise ValueError(
                f"x must have an even size along split_dim={self.split_dim}, got {shown(x)}. "
                "The state is split in two halves of equal shapes."
            )


def _pair(index: int, block: Sequence[nn.Module]) -> tuple[nn.Module, nn.Module]:
    fns = tuple(block) if isinstance(block, Sequence | nn.ModuleList) else (block,)
    if len(fns) != 2 or not all(isinstance(fn, nn.Module) for fn in fns):
        raise TypeError(
            f"blocks[{index}] must be a pair (F, G) of modules, got {shown(block)}. "
            "Wrap functions into modules, so that their parameters are found."
        )
    for place, fn in enumerate(fns):
        _kept_shape(f"blocks[{index}][{place}]", fn)
    return fns


def _state(x: Any) -> Pair:
    if not isinstance(x, tuple | list) or len(x) != 2:
        raise TypeError(f"x must be a tensor or a pair of tensors, got {shown(x)}. Pass (x1, x2).")
    first, second = (floating("x", half) for half in x)
    if first.shape != second.shape:
        raise ValueError(
            f"x must be two halves of equal shapes, got {tuple(first.shape)} and {tuple(second.shape)}. "
            "Split an even axis with x.chunk(2, dim)."
        )
    return first, second
