"""Variance, outliers and gradients along the residual stream (section 3 of the paper), read by hooks that go away."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from pullback.core.buffers import buffers_apart
from pullback.core.checks import instance, integer, positive
from pullback.core.kinds import Probe
from pullback.core.residual import Block, Branch, find_blocks, recognise
from pullback.core.rng import rng_state, set_rng_state
from pullback.core.state import StateError, check_state

FLOAT16_MAX = 65504.0
FEWEST = 5  # norms before the first one that may be called a spike
_STATS = ("var", "max_abs", "q999", "massive", "branch_rms")


@dataclass(frozen=True)
class BranchGradient:
    """Gradient of one sub-layer.

    Args:
        first: name of its first weight.
        last: name of its last weight.
        first_norm: Frobenius norm of the gradient of the first; NaN if no gradient came.
        last_norm: the same of the last.
    """

    first: str
    last: str
    first_norm: float
    last_norm: float


@dataclass(frozen=True)
class BlockStats:
    """The residual stream behind one block.

    Args:
        name: path of the block.
        var: variance over channels of each token, averaged over tokens.
        max_abs: largest magnitude of an entry.
        q999: magnitude that 99.9 % of the entries do not exceed.
        massive: share of entries beyond 100 times the median magnitude.
        branch_rms: RMS of what the block added to its input (post-LN: of the difference).
        gradients: of its sub-layers, in order.
    """

    name: str
    var: float
    max_abs: float
    q999: float
    massive: float
    branch_rms: float
    gradients: tuple[BranchGradient, ...]


@dataclass(frozen=True)
class StreamReport:
    """What one forward (and backward) pass left.

    Args:
        blocks: in order of the model.
        input_var: variance of the first block's input.
        growth: variance behind the last block over ``input_var``.
        headroom: 65504 / largest magnitude: below 1 the stream has left the range of float16.
        gradient_norm: total norm over all trainable parameters; NaN without a backward pass.
        gradient_ratio: gradient norm of the last weight of the last block over that of the first block.
        spike: whether ``gradient_norm`` exceeds ``factor`` times the running median.
        median: running median of the norms before this one; NaN while there are fewer than five.
    """

    blocks: tuple[BlockStats, ...]
    input_var: float
    growth: float
    headroom: float
    gradient_norm: float
    gradient_ratio: float
    spike: bool
    median: float


class ResidualStreamProbe(Probe):
    """Reads variance, outliers and gradients of every block of a transformer, around the user's own step.

    ``with probe: loss_fn(model(x), y).backward()`` measures that pass, ``probe.report()`` gives it.
    ``probe(loss_fn, *batch)`` runs a pass of its own and leaves parameters, buffers, gradients and random
    states as they were. Everything is computed in float32 (float64 models: float64); only floats are kept.
    One pass per block: of several forward or backward passes in it the last one counts. Gradients are those
    of ``backward()``: before clipping, before DDP averages, and times the loss scale under a
    ``GradScaler``.

    Args:
        model: holds blocks that `convert_norm_placement` knows, converted or not, or those named in
            ``blocks``. Give the model that ``torch.compile`` got, not the compiled one: inside compiled
            code no hook runs.
        blocks: paths of the blocks, in order; needed for blocks that are not known. Their output must be
            [..., dim], or a tuple that begins with it.
        window: number of steps whose median norm a spike is measured against.
        factor: how many times the median makes a spike.

    Raises:
        TypeError: if an argument has a wrong type.
        ValueError: if no block is found, a path is not in the model, or a number is out of range.
    """

    format_version: ClassVar[int] = 1

    def __init__(
        self, model: nn.Module, *, blocks: Sequence[str] | None = None, window: int = 50, factor: float = 5.0
    ) -> None:
        self.model = instance("model", model, nn.Module)
        self.window, self.factor = integer("window", window, minimum=1), positive("factor", factor)
        self._blocks = _known(model) if blocks is None else _named(model, blocks)
        self._norms: deque[float] = deque(maxlen=self.window)
        self._handles: list[Any] = []
        self._stream: dict[int, Tensor] = {}
        self._squares: dict[int, Tensor] = {}
        self._report: StreamReport | None = None

    # --- around the user's step -----------------------------------------------------------------------------

    def __enter__(self) -> ResidualStreamProbe:
        if self._handles:
            raise RuntimeError(
                "ResidualStreamProbe is measuring already, got a second `with`. Leave the first."
            )
        self._report = None
        try:
            for index, block in enumerate(self._blocks):
                hook = self._stream_hook(index, block.name)
                self._handles.append(block.module.register_forward_hook(hook, with_kwargs=True))
            for parameter in self.model.parameters():
                if parameter.requires_grad:
                    self._handles.append(parameter.register_hook(self._gradient_hook(id(parameter))))
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()
        try:
            if kind is None:
                self._report = self._summary()
        finally:
            self._stream.clear()
            self._squares.clear()

    def _remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _stream_hook(self, index: int, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            del module
            x = out[0] if isinstance(out, tuple | list) and out else out
            if not isinstance(x, Tensor) or x.numel() == 0:
                raise ValueError(
                    f"block {name!r} must give a tensor [..., dim] that is not empty, got {type(x).__name__}. "
                    "Name other blocks, and measure on a batch that has examples."
                )
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, Tensor)]
            before = next((each for each in given if each.shape == x.shape), None)
            self._stream[index] = stream_stats(x, before)

        return hook

    def _gradient_hook(self, key: int) -> Callable[[Tensor], None]:
        def hook(grad: Tensor) -> None:
            dense = grad.coalesce().values() if grad.is_sparse else grad
            wide = torch.float64 if dense.dtype == torch.float64 else torch.float32
            self._squares[key] = torch.linalg.vector_norm(dense.detach(), dtype=wide).square()

        return hook

    # --- a pass of the probe's own --------------------------------------------------------------------------

    def __call__(self, loss_fn: Callable[..., Tensor], *batch: Any) -> StreamReport:
        """Measure ``loss_fn(model, *batch)`` forwards and backwards, and leave no trace in the model.

        Raises:
            TypeError: if ``loss_fn`` gives no tensor.
            ValueError: if its loss is no scalar.
        """
        random = rng_state()
        try:
            with torch.inference_mode(False), buffers_apart(self.model), torch.enable_grad(), self:
                loss = instance("the result of loss_fn", loss_fn(self.model, *batch), Tensor)
                if loss.dim():
                    raise ValueError(
                        f"loss_fn must give a scalar, got shape {tuple(loss.shape)}. Take its mean."
                    )
                wanted = [p for p in self.model.parameters() if p.requires_grad]
                if wanted and loss.requires_grad:
                    torch.autograd.grad(loss, wanted, allow_unused=True)
        finally:
            set_rng_state(random)
        return self.report()

    # --- results --------------------------------------------------------------------------------------------

    def report(self) -> StreamReport:
        """The last measurement.

        Raises:
            RuntimeError: if there is none, or the last one ended with an exception.
        """
        if self._report is None:
            raise RuntimeError(
                "ResidualStreamProbe has measured nothing, got report(). Run a pass inside `with probe:` first."
            )
        return self._report

    def _summary(self) -> StreamReport:
        missing = [block.name for index, block in enumerate(self._blocks) if index not in self._stream]
        if missing:
            raise RuntimeError(
                f"{len(missing)} of {len(self._blocks)} blocks did not run inside `with probe:`, got nothing from "
                f"{missing[0]!r}. Run the whole model, uncompiled, or name the blocks that run."
            )
        stream = _floats([self._stream[index] for index in range(len(self._blocks))])
        keys = list(self._squares)
        squares = dict(zip(keys, _floats([self._squares[key] for key in keys]), strict=True))
        norms = {key: math.sqrt(value) for key, (value,) in squares.items()}
        blocks = tuple(
            _block_stats(block, row, norms) for block, row in zip(self._blocks, stream, strict=True)
        )
        total = math.sqrt(math.fsum(value for (value,) in squares.values())) if squares else math.nan
        median = statistics.median(self._norms) if len(self._norms) >= FEWEST else math.nan
        if math.isfinite(total):
            self._norms.append(total)
        first, last = _last_gradient(blocks[0]), _last_gradient(blocks[-1])
        largest = max((block.max_abs for block in blocks), key=lambda value: (math.isnan(value), value))
        return StreamReport(
            blocks=blocks,
            input_var=stream[0][-1],
            growth=_ratio(blocks[-1].var, stream[0][-1]),
            headroom=_ratio(FLOAT16_MAX, largest),
            gradient_norm=total,
            gradient_ratio=_ratio(last, first),
            spike=total > self.factor * median,
            median=median,
        )

    def state_dict(self) -> dict[str, Any]:
        """The norms of the last steps, for a resume that flags the same spikes."""
        return {"format_version": self.format_version, "norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, or nothing of it when it does not fit.

        Raises:
            StateError: if keys, types or the version do not fit.
        """
        norms = state.get("norms") if isinstance(state, Mapping) else None
        reference = {"format_version": self.format_version, "norms": norms}
        check_state("ResidualStreamProbe", state, reference, version=self.format_version)
        if not isinstance(norms, list) or any(type(each) is not float or not each >= 0 for each in norms):
            raise StateError(
                f"ResidualStreamProbe.norms must be a list of norms >= 0, got {norms!r:.80}. "
                "Pass what state_dict() returned."
            )
        self._norms = deque(norms, maxlen=self.window)

    def __repr__(self) -> str:
        return (
            f"ResidualStreamProbe({len(self._blocks)} blocks, window={self.window}, factor={self.factor:g})"
        )


# --- pieces -------------------------------------------------------------------------------------------------


def _known(model: nn.Module) -> list[Block]:
    found = list(find_blocks(model))
    blocks = [row for row in found if isinstance(row, Block)]
    if not blocks:
        others = [row for row in found if not isinstance(row, Block)]
        reasons = "; ".join(f"{name}: {reason}" for name, reason in others)
        raise ValueError(
            f"model must hold known transformer blocks, got none in {type(model).__name__}"
            f"{f' ({reasons[:200]})' if reasons else ''}. Name them: blocks=('layers.0', ...)."
        )
    return blocks


def _named(model: nn.Module, paths: Sequence[str]) -> list[Block]:
    modules = dict(model.named_modules())
    if isinstance(paths, str) or not paths:
        raise ValueError(f"blocks must be a list of paths, got {paths!r}. Write blocks=('layers.0',).")
    unknown = [path for path in paths if path not in modules]
    if unknown:
        raise ValueError(
            f"blocks must be paths in the model, got {unknown[0]!r}. It has {list(modules)[1:6]} ..."
        )
    return [_described(path, modules[path]) for path in paths]


def _described(path: str, module: nn.Module) -> Block:
    """A block at a path; one of unknown structure is a single sub-layer."""
    found = recognise(path, module)
    if isinstance(found, Block):
        return found
    return Block(path, module, "branches", "pre", (Branch("", ("",)),))


@torch.no_grad()
def stream_stats(x: Tensor, before: Tensor | None) -> Tensor:
    """var, max |x|, 99.9 % quantile, massive share, RMS of x - before, variance of before; on the device."""
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    x = x.detach().to(wide)
    size = x.abs().flatten()
    nothing = x.new_tensor(math.nan)
    return torch.stack(
        [
            x.var(-1, correction=0).mean(),
            size.max(),
            size.kthvalue(max(1, math.ceil(0.999 * size.numel()))).values,
            (size > 100 * size.median()).to(wide).mean(),
            nothing if before is None else (x - before.to(wide)).square().mean().sqrt(),
            nothing if before is None else before.detach().to(wide).var(-1, correction=0).mean(),
        ]
    )


def _floats(rows: list[Tensor]) -> list[list[float]]:
    """Tensors of equal length as floats, read from the device at once."""
    if not rows:
        return []
    device = rows[0].device
    stacked = torch.stack([row.detach().to(device, torch.float64).reshape(-1) for row in rows])
    return cast("list[list[float]]", stacked.tolist())


def _block_stats(block: Block, row: list[float], norms: Mapping[int, float]) -> BlockStats:
    gradients = []
    for branch in block.branches:
        weights = block.weights(branch)
        if weights:
            (first, a), (last, b) = weights[0], weights[-1]
            rows = norms.get(id(a), math.nan), norms.get(id(b), math.nan)
            gradients.append(BranchGradient(first, last, *rows))
    return BlockStats(block.name, *row[: len(_STATS)], gradients=tuple(gradients))


def _last_gradient(block: BlockStats) -> float:
    return block.gradients[-1].last_norm if block.gradients else math.nan


def _ratio(a: float, b: float) -> float:
    """Quotient of a and b, infinite where only b is zero."""
    if b == 0:
        return math.nan if a == 0 else math.copysign(math.inf, a)
    return a / b
