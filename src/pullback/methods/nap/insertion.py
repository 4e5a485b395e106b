"""Put a normalisation before every nonlinearity of a model."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Literal, TypeAlias

from torch import Tensor, fx, nn

from pullback.core.checks import choice, non_negative, shown
from pullback.methods.nap.graph import Kind, SpatialRMSNorm, Traced

Build: TypeAlias = Callable[[int, Kind], nn.Module]
"""``norm(width, kind)`` makes a normalisation over the last dimension (``"features"``) or from the second on."""


def insert_norms(
    model: nn.Module,
    norm: Literal["layer", "rms"] | Build = "layer",
    *,
    affine: bool = False,
    bias: Literal["drop", "keep"] = "drop",
    eps: float = 1e-6,
    leave: Iterable[str] = (),
) -> fx.GraphModule:
    """A copy of ``model`` with a normalisation directly before every hidden nonlinearity.

    The graph is traced by torch.fx, so that calls of functions count like modules and names count for nothing. A
    nonlinearity that is normalised already keeps its normalisation. One behind which no layer follows belongs to the
    output and gets none.

    After a linear layer ``"layer"`` is LayerNorm and ``"rms"`` RMSNorm over the last dimension. After a convolution it
    is GroupNorm with one group, or its RMS counterpart, over channels and space: a normalisation of every pixel by
    itself would erase the contrast between pixels, and this one leaves exactly the scale of the kernel free.

    Args:
        model: any module that torch.fx can trace; it is not changed.
        norm: which normalisation, or a function of width and kind that makes one.
        affine: learn a gain (and for ``"layer"`` an offset). Off, so that no free scale comes back by the gain.
        bias: ``"drop"`` takes the bias out of a layer that feeds nothing but an inserted normalisation, so that its
            weight alone is scale invariant; ``"keep"`` leaves it, and `Project` then projects both jointly.
        eps: of the normalisation. It breaks the invariance by about eps / variance.
        leave: paths of modules, or names of graph nodes, that are left as they are: opaque modules, or nonlinearities
            that shall have no normalisation.

    Returns:
        A ``torch.fx.GraphModule`` with the modules of the copy under their old paths and the new ones under ``norms``.
        Build the optimizer from it.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if the model cannot be traced, computes something else in evaluation by its own code, has hooks of
            its own, holds nonlinearities inside a module such as an LSTM, has a nonlinearity of unknown width, or has
            no hidden nonlinearity at all.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> net = insert_norms(net)
        >>> net.norms
        Module(
          (_1): LayerNorm((8,), eps=1e-06, elementwise_affine=False, bias=False)
        )
        >>> getattr(net, "0")
        Linear(in_features=4, out_features=8, bias=False)
    """
    if not callable(norm):
        choice(
            "norm", norm, ("layer", "rms"), fix="Or pass a function norm(width, kind) that makes a module."
        )
    choice("bias", bias, ("drop", "keep"))
    non_negative("eps", eps)
    left = {leave} if isinstance(leave, str) else set(leave)
    traced = Traced(
        copy.deepcopy(model) if isinstance(model, nn.Module) else model, opaque=left, both_modes=True
    )
    _check_seen(traced, left)
    sites = _sites(traced, left)
    make = norm if callable(norm) else _builder(norm, affine, eps)
    inserted = _insert(traced, sites, make)
    if bias == "drop":
        _drop_biases(traced, inserted)
    traced.graph.lint()
    found = fx.GraphModule(traced.model, traced.graph, class_name=type(model).__name__)
    return found.train(model.training)


def _check_seen(traced: Traced, left: set[str]) -> None:
    known = {str(n.target) for n in traced.graph.nodes} | {n.name for n in traced.graph.nodes}
    unknown = sorted(name for name in left if name not in known)
    if unknown:
        raise ValueError(
            f"leave must name modules or nodes of the graph, got {unknown}. Known: {shown(sorted(known))}"
        )
    closed = [path for path in traced.closed() if path not in left]
    if closed:
        kind = type(traced.modules[closed[0]]).__name__
        raise ValueError(
            f"model must show its nonlinearities, got {kind} at {closed[0]!r}, which hides them. "
            f"Write it out, or pass leave=[{closed[0]!r}] to leave it as it is."
        )
    for node in traced.graph.nodes:
        source = next(traced.before(node), None) if traced.is_nonlinear(node) else None
        if source is not None and traced.is_in_place(node) and (not node.users or len(source.users) > 1):
            raise ValueError(
                f"model must use what its nonlinearities return, got {traced.describe(node)}, which overwrites a value "
                "that is used elsewhere. Make it inplace=False and use its result."
            )
    if traced.model._forward_hooks or traced.model._forward_pre_hooks:
        raise ValueError(
            f"model must have no forward hooks of its own, got some on {type(traced.model).__name__}: a traced copy "
            "would lose them. Register them on the result."
        )


def _sites(traced: Traced, left: set[str]) -> list[tuple[fx.Node, Kind, int]]:
    """Nonlinearities that need a normalisation, with kind and width of what comes in."""
    found: list[tuple[fx.Node, Kind, int]] = []
    hidden = 0
    for node in traced.graph.nodes:
        if not traced.is_nonlinear(node) or not traced.leads_to_layer(node):
            continue
        hidden += 1
        if {node.name, str(node.target)} & left or any(traced.is_norm(each) for each in traced.before(node)):
            continue
        source = next(traced.before(node), None)
        width = None if source is None else traced.width(source)
        if width is None:
            what = "its input" if source is None else traced.describe(source)
            raise ValueError(
                f"model must show how wide the input of {traced.describe(node)} is, got {what}. Put a normalisation "
                f"there by hand, or pass leave=[{node.name!r}] to leave this nonlinearity without one."
            )
        found.append((node, *width))
    if not hidden:
        raise ValueError(
            f"model must have a nonlinearity with a layer behind it, got {type(traced.model).__name__} without. "
            "A network of one layer has nothing to normalise."
        )
    return found


def _builder(norm: str, affine: bool, eps: float) -> Build:
    def make(width: int, kind: Kind) -> nn.Module:
        if kind == "features":
            if norm == "layer":
                return nn.LayerNorm(width, eps=eps, elementwise_affine=affine)
            return nn.RMSNorm(width, eps=eps, elementwise_affine=affine)
        return (
            nn.GroupNorm(1, width, eps=eps, affine=affine)
            if norm == "layer"
            else SpatialRMSNorm(width, eps, affine)
        )

    return make


def _insert(traced: Traced, sites: list[tuple[fx.Node, Kind, int]], make: Build) -> list[fx.Node]:
    """New nodes, one for each value that goes into nonlinearities."""
    place = "norms"
    while hasattr(traced.model, place):
        place += "_"
    holder = nn.Module()
    done: dict[fx.Node, fx.Node] = {}
    reference = next((p for p in traced.model.parameters() if p.is_floating_point()), None)
    for node, kind, width in sites:
        source = next(traced.before(node))
        if source not in done:
            module = make(width, kind)
            if isinstance(reference, Tensor):
                module.to(device=reference.device, dtype=reference.dtype)
            holder.add_module(node.name, module)
            traced.modules[f"{place}.{node.name}"] = module
            if place not in traced.model._modules:
                traced.model.add_module(place, holder)
            with traced.graph.inserting_before(node):
                done[source] = traced.graph.call_module(f"{place}.{node.name}", (source,))
        node.replace_input_with(source, done[source])
    return list(done.values())


def _drop_biases(traced: Traced, inserted: list[fx.Node]) -> None:
    """Take the bias out of layers whose every call feeds inserted normalisations and nothing else."""
    new = set(inserted)
    given = {node for node in traced.graph.nodes if node.op == "get_attr" and node.users}
    for calls in traced.layers.values():
        if calls[0].bias is None or not all(_feeds_only(traced, layer.node, new) for layer in calls):
            continue
        for layer in calls:
            module = traced.module(layer.node)
            if module is not None:
                module.register_parameter("bias", None)
            elif len(layer.node.args) > 2:
                layer.node.args = (*layer.node.args[:2], None, *layer.node.args[3:])
            else:
                layer.node.kwargs = {**layer.node.kwargs, "bias": None}
    for node in given:
        if not node.users:
            traced.graph.erase_node(node)


def _feeds_only(traced: Traced, node: fx.Node, norms: set[fx.Node]) -> bool:
    for user in node.users:
        if user not in norms and not (traced.is_elementwise(user) and _feeds_only(traced, user, norms)):
            return False
    return bool(node.users)
