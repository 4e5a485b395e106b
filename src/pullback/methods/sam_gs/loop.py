"""One call in the place of ``loss.backward()``: K losses in, ``.grad`` of trunk and heads out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torchjd.aggregation import Aggregator

from pullback.core.checks import NonFiniteError, choice, instance, shown
from pullback.core.finite import all_finite
from pullback.methods.sam_gs.aggregator import SAMGS
from pullback.methods.sam_gs.surgery import pairwise_dissimilarity, state_dtype

Losses: TypeAlias = Sequence[Tensor] | Mapping[str, Tensor]


@dataclass(frozen=True, eq=False)
class BackwardReport:
    """What one call of `multitask_backward` saw and did; tensors stay on the device and carry no graph.

    Args:
        names: the tasks, in order.
        branch: SAM-GS: ``"equalise"``, ``"momentum"``, ``"single"``; another aggregator: its class name.
            ``"accumulate"`` when nothing was aggregated yet, ``"skip"`` when gradients were not finite.
        similarity: mean over pairs of tasks of ``2 |g_i| |g_j| / (|g_i|^2 + |g_j|^2)``, 0-dim.
        norms: of every task's gradient with respect to the shared parameters [tasks].
        cosines: of the angle between every two of them [tasks, tasks]; 0 beside a zero gradient.
    """

    names: tuple[str, ...]
    branch: str
    similarity: Tensor
    norms: Tensor
    cosines: Tensor


def multitask_backward(
    losses: Losses,
    *,
    shared: nn.Module | Iterable[Tensor],
    aggregator: Aggregator,
    heads: nn.Module | Iterable[Tensor] | None = None,
    aggregate: bool = True,
    scaler: torch.amp.GradScaler | None = None,
    process_group: Any = "auto",
    retain_graph: bool = False,
) -> BackwardReport:
    """Differentiate every loss and fill ``.grad``: aggregated for shared parameters, plain sums for all others.

    Gradients are added to what ``.grad`` holds, as ``backward()`` does. One backward pass per loss; the last one
    frees the graph. Tensor hooks of parameters run, post-accumulate hooks do not.

    *Accumulation*: divide the losses by the number of micro-batches and pass ``aggregate=False`` for all but the last
    one. The tasks' gradients wait in the ``.jac`` of the shared parameters, where TorchJD keeps them as well.

    *GradScaler*: pass the losses unscaled, and the scaler; then call ``scaler.step`` as usual. Gradients are unscaled
    before they are aggregated. After an overflow the aggregator is not called, and ``scaler.step`` leaves the step out.

    *Several processes*: gradients are averaged over ranks before they are aggregated, those of the other parameters
    too. Call the model inside ``ddp.no_sync()``, because DistributedDataParallel is not to average on its own.

    Args:
        losses: one scalar per task, all from one forward pass; a mapping gives the tasks names.
        shared: parameters (or the module) whose gradients are aggregated; frozen ones are left out.
        aggregator: `SAMGS`, or any aggregator of TorchJD.
        heads: the other parameters; None finds all leaves of the losses that are not shared.
        aggregate: False for all micro-batches but the last.
        scaler: the GradScaler that will make the step.
        process_group: ``"auto"`` averages over all ranks when ``torch.distributed`` runs, a group over its own,
            None over none.
        retain_graph: keep the graph for another backward pass.

    Returns:
        What was measured. With the branch ``"skip"`` (only ``nonfinite="skip"``) no ``.grad`` was touched.

    Raises:
        TypeError: if an argument is of a wrong kind, or a shared parameter is sharded or gets a sparse gradient.
        ValueError: if there is no loss, a loss is no scalar or has no graph, or shared parameters are missing, spread
            over devices, or hold gradients of another set of tasks.
        NonFiniteError: if a gradient is not finite and the aggregator says ``nonfinite="raise"``.
    """
    names, values = _tasks(losses)
    instance("aggregator", aggregator, Aggregator, fix="Pass SAMGS() or an aggregator of TorchJD.")
    trunk = _shared(shared)
    others = _leaves(values) if heads is None else _parameters("heads", heads)
    others = [p for p in others if not any(p is q for q in trunk)]
    ranks = _Ranks(process_group)
    flat = _flat(trunk, len(values))
    plain = _differentiate(values, trunk, others, flat, scaler, retain_graph)
    _add_waiting(trunk, flat)
    if not aggregate:
        for p, piece in zip(trunk, _pieces(flat, trunk), strict=True):
            vars(p)["jac"] = piece
        _add_to_grad(others, plain)
        return _report(names, "accumulate", flat, None)
    ranks.average_([flat])
    overflow = scaler is not None and not all_finite([flat])
    if overflow:  # Inf or NaN in some column, for the scaler to find
        branch, vector, report = "skip", flat.sum(0), _report(names, "skip", flat, None)
    else:
        branch, vector, report = _aggregate(names, flat, aggregator, scaler)
    if branch != "skip" or overflow:
        _add_to_grad(trunk, _pieces(vector, trunk), own=False)
        if ranks.size > 1:  # a collective needs the same tensors everywhere
            plain = [torch.zeros_like(p) if g is None else g for p, g in zip(others, plain, strict=True)]
        _add_to_grad(others, plain)
        ranks.average_([p.grad for p in others if p.grad is not None])
    return report


# --- the arguments ---------------------------------------------------------------------------------------------


def _tasks(losses: Losses) -> tuple[tuple[str, ...], list[Tensor]]:
    """Names and losses, checked."""
    if isinstance(losses, Tensor) or not isinstance(losses, Mapping | Sequence):
        raise TypeError(
            f"losses must be a list or a mapping of scalar tensors, got {shown(losses)}. Pass [loss1, loss2]."
        )
    pairs = losses.items() if isinstance(losses, Mapping) else enumerate(losses)
    rows = [(str(name), loss) for name, loss in pairs]
    if not rows:
        raise ValueError("losses must hold at least one loss, got none. Leave this step out.")
    for name, loss in rows:
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            fix = "Reduce it with .mean() or .sum()."
            raise ValueError(f"losses[{name}] must be a scalar tensor, got {shown(loss)}. {fix}")
        if not loss.requires_grad:
            raise ValueError(
                f"losses[{name}] must depend on parameters, got a tensor without a graph. "
                "For a task that is absent from the batch pass 0 times its output."
            )
    return tuple(name for name, _ in rows), [loss for _, loss in rows]


def _parameters(name: str, given: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    """The distinct trainable tensors of a module or an iterable."""
    rows = given.parameters() if isinstance(given, nn.Module) else given
    if isinstance(rows, Tensor | Mapping | str) or not isinstance(rows, Iterable):
        raise TypeError(
            f"{name} must be a module or an iterable of parameters, got {shown(given)}. Pass trunk.parameters()."
        )
    found = {id(instance(f"{name}[{i}]", p, Tensor)): p for i, p in enumerate(rows)}
    return [p for p in found.values() if p.requires_grad]


def _shared(given: nn.Module | Iterable[Tensor]) -> list[Tensor]:
    trunk = _parameters("shared", given)
    if not any(p.numel() for p in trunk):
        raise ValueError(
            "shared must hold at least one trainable parameter, got none. An iterator that was read before is "
            "empty: pass trunk.parameters() afresh."
        )
    if any(hasattr(p, "placements") for p in trunk):
        raise TypeError(
            "shared must hold plain parameters, got a DTensor. Sharded training (FSDP) is not supported."
        )
    devices = {p.device for p in trunk}
    if len(devices) > 1:
        raise ValueError(
            f"shared must lie on one device, got {sorted(map(str, devices))}. Aggregate each device's part by itself."
        )
    return trunk


def _leaves(losses: list[Tensor]) -> list[Tensor]:
    """All leaves that the losses depend on, in the order of the graph (equal on ranks with equal graphs)."""
    found: dict[int, Tensor] = {}
    seen: set[Any] = set()
    waiting = [torch.autograd.graph.get_gradient_edge(loss).node for loss in losses]
    while waiting:
        node = waiting.pop()
        if node in seen:
            continue
        seen.add(node)
        leaf = getattr(node, "variable", None)
        if isinstance(leaf, Tensor):
            found[id(leaf)] = leaf
        waiting.extend(below for below, _ in node.next_functions if below is not None)
    return list(found.values())


# --- gradients ---------------------------------------------------------------------------------------------------


def _flat(trunk: list[Tensor], tasks: int) -> Tensor:
    """Room for the gradients of all tasks [tasks, parameters], in the widest dtype of the parameters."""
    dtype = trunk[0].dtype
    for p in trunk:
        dtype = torch.promote_types(dtype, p.dtype)
    return torch.empty(tasks, sum(p.numel() for p in trunk), dtype=dtype, device=trunk[0].device)


def _pieces(flat: Tensor, trunk: list[Tensor]) -> list[Tensor]:
    """Views of ``flat`` [..., parameters], one per parameter, in its shape."""
    parts = flat.split([p.numel() for p in trunk], dim=-1)
    return [part.view((*flat.shape[:-1], *p.shape)) for part, p in zip(parts, trunk, strict=True)]


def _differentiate(
    losses: list[Tensor],
    trunk: list[Tensor],
    others: list[Tensor],
    flat: Tensor,
    scaler: torch.amp.GradScaler | None,
    retain_graph: bool,
) -> list[Tensor | None]:
    """Write each task's gradient into its row of ``flat``; return the sums for the other parameters."""
    total: list[Tensor | None] = [None] * len(others)
    for k, loss in enumerate(losses):
        with torch.autocast(flat.device.type, enabled=False):  # it would round in the backward pass as well
            grads = torch.autograd.grad(
                loss if scaler is None else scaler.scale(loss),
                [*trunk, *others],
                retain_graph=retain_graph or k < len(losses) - 1,
                allow_unused=True,
            )
        full: list[tuple[Tensor, Tensor]] = []
        for row, grad in zip(_pieces(flat[k], trunk), grads, strict=False):
            if grad is None:
                row.zero_()
            elif grad.layout is not torch.strided:
                raise TypeError(
                    f"gradients of shared parameters must be dense, got {grad.layout} for shape {tuple(row.shape)}. "
                    "Build the embedding with sparse=False, or keep it out of shared."
                )
            else:
                full.append((row, grad))
        if full:
            torch._foreach_copy_([row for row, _ in full], [grad for _, grad in full])
        for i, grad in enumerate(grads[len(trunk) :]):
            if grad is not None:
                old = total[i]
                total[i] = grad if old is None else old + grad
    return total


def _add_waiting(trunk: list[Tensor], flat: Tensor) -> None:
    """Add the gradients of earlier micro-batches, and take them off the parameters."""
    waiting = [vars(p).get("jac") for p in trunk]
    if all(each is None for each in waiting):
        return
    pieces = _pieces(flat, trunk)
    shapes = [None if each is None else tuple(each.shape) for each in waiting]
    if shapes != [tuple(piece.shape) for piece in pieces]:
        raise ValueError(
            f"shared must be the same parameters, with {len(flat)} losses, in all micro-batches of a step, got .jac of "
            f"shapes {shown(shapes)}. After a step that was broken off, delete the .jac of every shared parameter."
        )
    for p, piece, each in zip(trunk, pieces, waiting, strict=True):
        if each is not None:
            piece.add_(each)
            del vars(p)["jac"]


def _add_to_grad(params: list[Tensor], grads: Sequence[Tensor | None], *, own: bool = True) -> None:
    """Add to ``.grad`` as backward() does; ``own`` copies, because autograd may hand out one tensor twice."""
    for p, grad in zip(params, grads, strict=True):
        if grad is None:
            continue
        if p.grad is not None:
            p.grad = p.grad + grad if grad.layout is not torch.strided else p.grad.add_(grad)
        elif grad.layout is not torch.strided:
            p.grad = grad.clone()
        elif own or grad.dtype != p.dtype or not p.is_contiguous():
            p.grad = torch.empty_like(p, requires_grad=False).copy_(grad)
        else:
            p.grad = grad


# --- ranks and the aggregator ------------------------------------------------------------------------------------


class _Ranks:
    """The processes whose gradients are averaged."""

    def __init__(self, process_group: Any) -> None:
        self.size, self._group = 1, None
        if isinstance(process_group, str):
            choice("process_group", process_group, ("auto",), fix="Pass 'auto', a process group, or None.")
            if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
                return
        elif process_group is None:
            return
        else:
            self._group = process_group
        self.size = torch.distributed.get_world_size(self._group)

    def average_(self, tensors: list[Tensor]) -> None:
        """Replace dense tensors by their means over all ranks, one collective per dtype and device."""
        if self.size == 1:
            return
        alike: dict[Any, list[Tensor]] = {}
        for each in tensors:
            alike.setdefault((each.dtype, each.device), []).append(each)
        for group in alike.values():
            joined = group[0] if len(group) == 1 else torch.cat([each.reshape(-1) for each in group])
            torch.distributed.all_reduce(joined, group=self._group)
            joined.div_(self.size)
            if len(group) > 1:
                parts = joined.split([each.numel() for each in group])
                torch._foreach_copy_(
                    group, [part.view(each.shape) for part, each in zip(parts, group, strict=True)]
                )


def _aggregate(
    names: tuple[str, ...], flat: Tensor, aggregator: Aggregator, scaler: torch.amp.GradScaler | None
) -> tuple[str, Tensor, BackwardReport]:
    """Aggregate unscaled gradients; the result carries the loss scale again, as ``scaler.step`` expects."""
    scale = None if scaler is None else scaler.scale(torch.ones((), device=flat.device))
    if scale is not None:
        flat.div_(scale)
    try:
        with torch.autocast(flat.device.type, enabled=False):
            vector = aggregator(flat)
    except NonFiniteError as error:
        raise NonFiniteError(f"{error} The tasks are {', '.join(names)}.") from error
    own = aggregator.report if isinstance(aggregator, SAMGS) else None
    branch = type(aggregator).__name__ if own is None else own.branch
    report = _report(names, branch, flat, None if own is None else own.similarity)
    return branch, vector if scale is None else vector * scale, report


def _report(names: tuple[str, ...], branch: str, flat: Tensor, similarity: float | None) -> BackwardReport:
    """Norms and cosines of the rows of ``flat``; nothing is read by the host."""
    rows = flat.to(state_dtype(flat.dtype))
    norms = torch.linalg.vector_norm(rows, dim=1)
    with torch.autocast(rows.device.type, enabled=False):
        products = rows @ rows.T
    below = norms.unsqueeze(0) * norms.unsqueeze(1)
    cosines = torch.where(below > 0, products / torch.where(below > 0, below, 1.0), 0.0)
    if similarity is None:
        pairs = len(norms) * (len(norms) - 1)
        mean = 1.0 - pairwise_dissimilarity(norms).sum() / max(pairs, 1)
    else:
        mean = norms.new_tensor(similarity)
    return BackwardReport(names, branch, mean, norms, cosines)
