"""Residual stacks in a model of the user's: found, verified number by number, and rewired in place."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any, TypeAlias, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from pullback.core import checks
from pullback.core.branches import hooked
from pullback.core.splice import Splice, renamed
from pullback.core.streams import generator
from pullback.methods.shallow.report import mean_ratio, relative
from pullback.methods.shallow.stack import Branch, Fuse, Mode, ResidualStack, difference, warn_of_twins

Match: TypeAlias = type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[nn.Module], bool]
"""Which modules are residual blocks: classes, or a function that says so."""

_V = TypeVar("_V")
_ROWS = 4  # examples on which a block is verified, and as many of noise


@dataclass(frozen=True)
class Run:
    """One run of blocks that became a stack.

    Args:
        name: the stack's name in the model.
        blocks: how many blocks it holds.
        parameters: how many trainable parameters.
        branch: where the branches were found: an attribute, or the name of a function.
        eps: ||F_k(z)|| / ||z|| of every block in the sequential form, mean over the probe.
        gap: ||y_seq - y_par|| / ||y_seq - x|| on the probe.
    """

    name: str
    blocks: int
    parameters: int
    branch: str
    eps: tuple[float, ...]
    gap: float


@dataclass(frozen=True)
class Conversion:
    """What `shallow_` did.

    Args:
        count: how many stacks the model has got.
        names: old name to new name of everything in the model's ``state_dict``.
        runs: the stacks, in the order of the model.
    """

    count: int
    names: Mapping[str, str]
    runs: tuple[Run, ...]

    def rename(self, state: Mapping[str, _V], *, back: bool = False) -> dict[str, _V]:
        """A checkpoint of the old model with the names of the new one; ``back``: the other way round.

        Raises:
            ValueError: if a name is not one of the model's.
        """
        names = {new: old for old, new in self.names.items()} if back else self.names
        unknown = [name for name in state if name not in names]
        if unknown:
            raise ValueError(
                f"state must hold names of the {'new' if back else 'old'} model, got {unknown[0]!r}. "
                f"Pass back={not back} for a checkpoint of the other one."
            )
        return {names[name]: value for name, value in state.items()}


def shallow_(
    model: nn.Module,
    match: Match,
    *,
    probe: Any,
    branch: str | Callable[[nn.Module, Tensor], Tensor] | None = None,
    mode: Mode = "parallel",
    order: int = 1,
    branch_scale: float | str = 1.0,
    fold_post_activation: bool = False,
    fuse: Fuse = "auto",
    chunk: int | None = None,
    tolerance: float = 1e-5,
) -> Conversion:
    """Make every run of two or more residual blocks in ``model`` one `ResidualStack`, in place.

    A run is a maximal series of matching neighbours in an ``nn.Sequential`` or ``nn.ModuleList`` that keep the shape
    and feed each other on the probe; a change of shape splits it. The blocks stay the same objects, so that an
    optimizer made before goes on as it is. Each block is verified to compute x + F(x), in evaluation and in training
    mode, on what it sees and on noise; afterwards the model in the sequential form must give what it gave before, or
    nothing is changed.

    **Trained weights do not carry over to the parallel form** (see the page): train after the conversion.

    Args:
        model: whose containers are edited.
        match: the blocks.
        probe: an input of the model: a tensor, a tuple of positional or a mapping of keyword arguments.
        branch: where a block keeps F: an attribute or ``branch(block, x)``. None: the one child for which this is true.
        mode: of the new stacks, as all that follow.
        order: 1 or 2.
        branch_scale: a number or ``"1/sqrt(N)"``.
        fold_post_activation: take F(x) = block(x) - x for blocks that are not x + F(x) otherwise, such as those of the
            first ResNet with its activation after the addition.
        fuse: how branches are computed.
        chunk: branches at a time.
        tolerance: largest error of block(x) - x against F(x), relative to the largest value where that exceeds 1.

    Returns:
        Count, names for checkpoints, and a report for each stack.

    Raises:
        ValueError: if there is no such run, a block is not residual, or the model uses its blocks in another way.
        TypeError: if an argument has the wrong type.
    """
    checks.instance("model", model, nn.Module)
    found = _runs(model, _matcher(match), probe)
    names = {module: name for name, module in model.named_modules()}
    splices: dict[nn.Module, Splice] = {}
    made: list[ResidualStack] = []
    for container, groups in found.edges.items():
        stacks: dict[tuple[int, int], nn.Module] = {}
        for start, stop in groups:
            blocks = [b for b in list(container._modules.values())[start:stop] if b is not None]
            inputs = [found.seen[block].x for block in blocks]
            where = _verified(blocks, inputs, names, branch, fold_post_activation, tolerance)
            made.append(ResidualStack(blocks, mode="sequential", branch=where, fuse=fuse, chunk=chunk))
            stacks[start, stop] = made[-1]
        splices[container] = Splice(container, stacks)
    state = renamed(model, splices)
    try:
        for splice in splices.values():
            splice.apply_()
        _same_outputs(found.output, _call(model, probe))
    except BaseException:
        for splice in splices.values():
            splice.undo_()
        raise
    for stack in made:
        stack.mode, stack.order, stack.branch_scale = mode, order, branch_scale
        if mode == "parallel":
            warn_of_twins(stack, stacklevel=3)
    if any(isinstance(m, _NormBase) for stack in made for m in stack.modules()):
        warnings.warn(
            "converted blocks normalise by batch statistics, which differ between the forms. Train the model again "
            "before you use it in evaluation mode.",
            stacklevel=2,
        )
    places = {module: name for name, module in model.named_modules()}
    rows = tuple(_row(places[stack], stack, found.seen[stack.blocks[0]].x) for stack in made)
    return Conversion(len(made), state, rows)


# --- finding runs ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What a block did on the probe when it was called first: input and output, or why it is no block of a run."""

    x: Tensor
    y: Tensor
    why_not: str = ""


@dataclass(frozen=True)
class _Found:
    seen: Mapping[nn.Module, _Seen]
    edges: Mapping[nn.Module, Sequence[tuple[int, int]]]  # container -> (start, stop) of its runs
    output: Any


def _matcher(match: Match) -> Callable[[nn.Module], bool]:
    if isinstance(match, type | tuple):
        wanted = match if isinstance(match, tuple) else (match,)
        if not wanted or not all(isinstance(each, type) and issubclass(each, nn.Module) for each in wanted):
            raise TypeError(
                f"match must hold classes of modules, got {checks.shown(match)}. Pass the block's class."
            )
        return lambda module: isinstance(module, wanted)
    if not callable(match):
        raise TypeError(
            f"match must be a class or a function, got {checks.shown(match)}. Pass the block's class."
        )
    return match


def _containers(module: nn.Module, matches: Callable[[nn.Module], bool]) -> Iterator[nn.Module]:
    """Containers with matching children, outside of blocks and of stacks that are there already."""
    if isinstance(module, ResidualStack):
        return
    children = [child for child in module._modules.values() if child is not None]
    if isinstance(module, nn.Sequential | nn.ModuleList) and sum(map(matches, children)) > 1:
        yield module
    for child in children:
        if not matches(child):
            yield from _containers(child, matches)


def _runs(model: nn.Module, matches: Callable[[nn.Module], bool], probe: Any) -> _Found:
    containers = list(dict.fromkeys(_containers(model, matches)))
    blocks = [b for c in containers for b in c._modules.values() if b is not None and matches(b)]
    seen: dict[nn.Module, list[_Seen]] = {}

    def watch(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        row = _Seen(torch.empty(0), torch.empty(0), "it takes or gives more than one tensor")
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor) and isinstance(out, Tensor):
            why = "" if args[0].is_floating_point() and args[0].shape == out.shape else "shape"
            row = _Seen(args[0].detach().clone(), out.detach(), why)
        seen.setdefault(block, []).append(row)

    handles = [b.register_forward_hook(watch, with_kwargs=True) for b in dict.fromkeys(blocks)]
    try:
        output = _call(model, probe)
    finally:
        for handle in handles:
            handle.remove()
    calls: dict[nn.Module, Iterator[_Seen]] = {block: iter(rows) for block, rows in seen.items()}
    edges = {c: _edges(list(c._modules.values()), matches, calls) for c in containers}
    edges = {c: rows for c, rows in edges.items() if rows}
    if not edges:
        odd = {row.why_not for rows in seen.values() for row in rows} - {"", "shape"}
        raise ValueError(
            f"match must find two or more neighbours that keep the shape and feed each other, got {len(blocks)} "
            f"matching modules in {len(containers)} containers{' (of one: ' + odd.pop() + ')' if odd else ''}. "
            "Check the class, and that the blocks lie in an nn.Sequential or nn.ModuleList."
        )
    return _Found({block: rows[0] for block, rows in seen.items()}, edges, output)


def _edges(
    children: list[nn.Module | None],
    matches: Callable[[nn.Module], bool],
    calls: Mapping[nn.Module, Iterator[_Seen]],
) -> list[tuple[int, int]]:
    """Start and stop of all runs of two or more among ``children``."""
    runs: list[tuple[int, int]] = []
    start, last = 0, None
    for i, child in enumerate(children):
        row = next(calls.get(child, iter(())), None) if child is not None and matches(child) else None
        good = row is not None and not row.why_not
        fed = good and last is not None and row is not None and torch.equal(last.y, row.x)
        if not fed:
            runs.append((start, i))
            start = i if good else i + 1
        last = row if good else None
    runs.append((start, len(children)))
    return [(a, b) for a, b in runs if b - a > 1]


@torch.no_grad()
def _call(model: nn.Module, probe: Any) -> Any:
    """The model on the probe in evaluation mode; modes and random state are restored."""
    modes = {module: module.training for module in model.modules()}
    try:
        model.eval()
        with _forked(next(model.parameters(), torch.empty(0)).device):
            if isinstance(probe, Mapping):
                return model(**probe)
            return model(*probe) if isinstance(probe, tuple) else model(probe)
    finally:
        for module, training in modes.items():
            module.training = training


def _forked(device: torch.device) -> Any:
    """Random state of the host and of ``device``, restored at the end."""
    if device.type == "cpu":
        return torch.random.fork_rng(devices=[])
    return torch.random.fork_rng(devices=[device], device_type=device.type)


# --- verifying blocks ------------------------------------------------------------------------------------------


def _verified(
    blocks: Sequence[nn.Module],
    inputs: Sequence[Tensor],
    names: Mapping[nn.Module, str],
    branch: Branch,
    fold: bool,
    tolerance: float,
) -> Branch:
    """The branch that serves all blocks of a run, each verified."""
    rows = list(zip(blocks, inputs, strict=True))
    options: list[Branch] = [branch] if branch is not None else _children(rows[0][0])
    errors: dict[str, float] = {}
    for option in options:
        worst = [(_error(block, option, x, declared=branch is not None), block) for block, x in rows]
        error, block = max(worst, key=lambda row: row[0])
        if error <= tolerance:
            bad = next((block for block, _ in rows if hooked(block)), None)
            if bad is None:
                return option
            raise ValueError(
                f"block {names[bad]!r} must have no hooks, got some, which its branch alone would not run. "
                "Remove them, or put them on the branch."
            )
        errors[f"{names[block]!r} ({type(block).__name__})"] = error
    if fold:
        return difference
    where, error = (
        max(errors.items(), key=lambda row: row[1]) if errors else (repr(names[rows[0][0]]), float("nan"))
    )
    tried = f"branch={checks.shown(branch)}" if branch is not None else "any one of its children"
    raise ValueError(
        f"block {where} must compute x + F(x), got an error of {error:.2g} with F = {tried} (in evaluation or training "
        "mode). Name the branch (branch='attribute' or branch=lambda block, x: ...), or, when the block applies an "
        "activation or a random depth after the addition, pass fold_post_activation=True to take F(x) = block(x) - x."
    )


def _children(block: nn.Module) -> list[Branch]:
    """Names of the children that may be the branch."""
    return [name for name, child in block._modules.items() if child is not None]


def _error(block: nn.Module, branch: Branch, x: Tensor, *, declared: bool) -> float:
    """Largest error of block(x) - x against F(x), in both modes, on what the block saw and on noise; inf: no branch."""
    x = x[:_ROWS]
    noise = torch.randn(x.shape, generator=generator("shallow", 0), dtype=torch.float64)
    spread = float(x.double().std()) if x.numel() > 1 else 1.0
    points = torch.cat([x, (noise * (spread or 1.0)).to(x)])
    rounding = 16 * torch.finfo(x.dtype).eps
    worst = 0.0
    for training in (False, True):
        try:
            whole = _alone(block, None, points, training)
            part = _alone(block, branch, points, training)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError, ValueError):
            if declared:
                raise
            return float("inf")
        if not isinstance(part, Tensor) or part.shape != points.shape or not (declared or bool(part.any())):
            return float("inf")  # an undeclared branch of zeros proves nothing
        size = max(1.0, float(whole.abs().max()))
        error = float((whole.double() - points.double() - part.double()).abs().max()) / size
        worst = max(worst, error if error > rounding else 0.0)
    return worst


@torch.no_grad()
def _alone(block: nn.Module, branch: Branch, x: Tensor, training: bool) -> Tensor:
    """A copy of the block, or its branch, on a copy of ``x``; dropout draws alike in every call."""
    twin = copy.deepcopy(block).train(training)
    with _forked(x.device):
        torch.manual_seed(0)
        if branch is None:
            return twin(x.clone())
        return attrgetter(branch)(twin)(x.clone()) if isinstance(branch, str) else branch(twin, x.clone())


# --- checking and reporting ------------------------------------------------------------------------------------


def _same_outputs(before: Any, after: Any) -> None:
    """Refuse a conversion after which the sequential form gives something else."""
    for one, other in zip(_tensors(before), _tensors(after), strict=True):
        error = relative(other - one, one) if one.is_floating_point() else float(not torch.equal(one, other))
        if not error <= max(1e-4, 32 * (torch.finfo(one.dtype).eps if one.is_floating_point() else 0)):
            raise ValueError(
                f"model must use its blocks one after the other, got an output that differs by {error:.2g} once they "
                "are a stack in sequential form. Match fewer blocks, or build a ResidualStack by hand. The model is "
                "as it was."
            )


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _tensors(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _tensors(each)


@torch.no_grad()
def _row(name: str, stack: ResidualStack, x: Tensor) -> Run:
    twin = copy.deepcopy(stack).eval()
    eps, z = [], x
    for branch in twin.branches():
        step = branch(z) * twin.scale
        eps.append(mean_ratio(step, z))
        z = z + step
    gap = relative(z - twin.form(x, "parallel", 1, twin.scale), z - x)
    count = sum(p.numel() for p in stack.parameters() if p.requires_grad)
    where = stack.branch if isinstance(stack.branch, str) else getattr(stack.branch, "__name__", "function")
    return Run(name, len(stack.blocks), count, str(where), tuple(eps), gap)
