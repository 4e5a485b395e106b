"""Project weights that a normalisation follows back to their first norm, after every step of any optimizer."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, TypeVar, final

import torch
from torch import Tensor, fx, nn

from pullback.core.checks import NonFinite, choice, fraction, positive
from pullback.core.frobenius import FrobeniusProjector
from pullback.core.invariance import scale_deviation
from pullback.core.kinds import StepBatch
from pullback.core.rescaling import Per, norms_of
from pullback.methods.nap.graph import Layer, Traced

Batch = TypeVar("Batch")

_QUADRATIC = (torch.optim.SGD, torch.optim.ASGD)
_LINEAR = tuple(
    found
    for name in (
        "Adam",
        "AdamW",
        "NAdam",
        "RAdam",
        "Adamax",
        "RMSprop",
        "Adagrad",
        "Adadelta",
        "Rprop",
        "Muon",
    )
    if (found := getattr(torch.optim, name, None)) is not None
)


@final
class Project(FrobeniusProjector):
    r"""Keep the norm of every weight that is followed by a normalisation: theta <- rho * theta / ||theta||_F.

    The second half of Normalize-and-Project; the first is `insert_norms`. Under a following
    normalisation the function does not depend on the norm of the weight, but the effective learning rate does: it falls
    with ||theta||^2 under SGD and with ||theta|| under Adam. With the norm held, the learning rate is the one that the
    schedule says. So write a schedule: what is taken away may have been a useful one.

    Layers are found in the graph that torch.fx traces: linear maps and convolutions of which every path leads to a
    normalisation before anything that feels their scale. The output layer never qualifies. A layer with a bias is
    projected jointly with it, as only both together are free in scale (before batch or instance norm the bias falls
    out). Frozen layers are left out, tied weights count once. `left_out` says why a layer was not chosen.

    Args:
        model: the network, after initialisation; torch.fx must be able to trace it.
        norm: ``"fro"``, the Frobenius norm.
        per: ``"tensor"``: one norm per layer, the scale that LayerNorm leaves free; ``"row"``: one per output unit or
            channel, which batch and instance norm leave free (a stronger constraint under LayerNorm).
        every: project after every so many steps; None never does.
        layers: names of layers (module paths) to project, instead of all that qualify.
        affine: gains and offsets of the normalisations: ``"leave"`` them; ``"homogeneous"`` keeps the joint norm of
            both, for networks whose activations let a positive factor pass (ReLU); ``"decay"`` pulls gains towards 1
            and offsets towards 0 by ``affine_decay`` per step.
        affine_decay: share of the way that ``"decay"`` goes in one step.
        norms: further module classes that count as normalisations.
        weight_decay: ``"check"`` refuses weight decay that is added to the gradient of a projected tensor (it pollutes
            the moments) and warns of a decoupled one (the projection cancels it); ``"allow"`` says nothing.
        nonfinite: as in `FrobeniusProjector`.

    Attributes:
        layers: weight of every projected layer by the layer's name.
        left_out: reason by the name of every other layer.

    Raises:
        ValueError: if no layer qualifies, a layer of ``layers`` does not, a weight is zero or not finite, ``every`` is
            below 1, or ``affine="homogeneous"`` meets an activation that is not. All errors of `FrobeniusProjector`.

    Example:
        >>> from pullback import attach, insert_norms
        >>> net = insert_norms(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)))
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        >>> nap = Project(net)
        >>> attachment = attach(optimizer, nap)
        >>> nap.layers, nap.left_out
        ({'0': '0.weight'}, {'2': "its output reaches the model's output before a normalisation"})
    """

    when: ClassVar[Literal["pre", "post", "both"]] = "both"

    def __init__(
        self,
        model: nn.Module,
        *,
        norm: Literal["fro"] = "fro",
        per: Per = "tensor",
        every: int | None = 1,
        layers: Iterable[str] | None = None,
        affine: Literal["leave", "homogeneous", "decay"] = "leave",
        affine_decay: float = 1e-3,
        norms: Iterable[type[nn.Module]] = (),
        weight_decay: Literal["check", "allow"] = "check",
        nonfinite: NonFinite = "skip",
    ) -> None:
        self.norm = choice("norm", norm, ("fro",))
        self.affine = choice("affine", affine, ("leave", "homogeneous", "decay"))
        self.affine_decay = fraction("affine_decay", affine_decay)
        self.weight_decay = choice("weight_decay", weight_decay, ("check", "allow"))
        if affine == "homogeneous" and per == "row":
            raise ValueError(
                "affine must be 'leave' or 'decay' with per='row', got 'homogeneous'. Use per='tensor'."
            )
        self.model = model
        choice_ = _Choice(Traced(model, norms=norms), per)
        wanted = None if layers is None else [layers] if isinstance(layers, str) else list(layers)
        blocks = choice_.blocks(wanted)
        self.layers = {name: block[0] for name, block in blocks.items()}
        self.left_out = {name: why for name, why in choice_.reasons.items() if name not in blocks}
        joint = list(blocks.values())
        pairs = choice_.affine_pairs(blocks) if affine != "leave" else {}
        if affine == "homogeneous":
            choice_.check_homogeneous(pairs)
            joint += [pair for pair in pairs.values() if pair]
        parameters = choice_.parameters
        rows = {path: parameters[path] for block in joint for path in block}
        super().__init__(rows, per=per, every=every, joint=joint, nonfinite=nonfinite)
        soft = [path for pair in pairs.values() for path in pair] if affine == "decay" else []
        self._targets = {path: float(path.endswith("weight")) for path in soft}
        self._soft = {parameters[path]: target for path, target in self._targets.items()}
        self._checked: weakref.ref[torch.optim.Optimizer] | None = None

    # --- steps ----------------------------------------------------------------------------------------------

    def pre_step_(self, batch: StepBatch) -> None:
        """Look at the optimizer's weight decay before its first step."""
        if self.weight_decay == "allow" or batch.optimizer is None:
            return
        if self._checked is None or self._checked() is not batch.optimizer:
            self._check_decay(batch.optimizer)
            self._checked = weakref.ref(batch.optimizer)

    def _check_decay(self, optimizer: torch.optim.Optimizer) -> None:
        mine = set(self._tensors)
        for number, group in enumerate(optimizer.param_groups):
            decay = group.get("weight_decay", 0.0)
            if not decay or mine.isdisjoint(group["params"]):
                continue
            known = type(optimizer).__name__ in {"AdamW", "Muon"}
            own = getattr(optimizer, "decoupled_weight_decay", known)
            decoupled = group.get("decoupled_weight_decay", own)
            head = f"weight_decay must be 0 for projected tensors, got {decay} in group {number} of "
            fix = "Give them a group of their own with weight_decay=0."
            if not decoupled:
                raise ValueError(
                    f"{head}{type(optimizer).__name__}, which adds it to the gradient and so to its moments. {fix}"
                )
            text = f"{head}{type(optimizer).__name__}; the projection cancels it. {fix}"
            warnings.warn(text, UserWarning, stacklevel=2)

    def post_step_(self, batch: StepBatch) -> None:
        """Project, and pull gains and offsets back where that is asked for."""
        super().post_step_(batch)
        if self._soft and self.every is not None:
            self._pull(batch)

    def _pull(self, batch: StepBatch) -> None:
        rows: dict[float, list[Tensor]] = {0.0: [], 1.0: []}
        for param, name in zip(batch.params, batch.names, strict=True):
            target = self._soft.get(param)
            if target is None and self._strange and name in self._targets:
                target = self._soft[param] = self._targets[name]
            if target is not None:
                rows[target].append(param)
        for target, params in rows.items():
            if params:
                torch._foreach_mul_(params, 1.0 - self.affine_decay)
            if params and target:
                torch._foreach_add_(params, target * self.affine_decay)

    # --- what can be asked ----------------------------------------------------------------------------------

    @torch.no_grad()
    def effective_lr(
        self, optimizer: torch.optim.Optimizer, *, power: float | None = None
    ) -> dict[str, float]:
        """Effective learning rate of every projected layer: lr / ||theta||^power.

        Args:
            optimizer: the one whose groups hold the weights.
            power: 2 for updates that grow with the gradient (SGD), 1 for those whose size does not depend on it (Adam,
                RMSprop, signs, Muon). None: known for torch's own optimizers.

        Returns:
            By layer, of those that the optimizer holds; reads the host.

        Raises:
            ValueError: if the power is not known, or the optimizer holds no projected layer.
        """
        power = _power(optimizer) if power is None else positive("power", power)
        rates = {p: float(group["lr"]) for group in optimizer.param_groups for p in group["params"]}
        found = {}
        for name, block in self._layer_blocks().items():
            tensors = [self._tensors[i] for i in block]
            if tensors[0] in rates:
                (norm,) = norms_of(tensors, [range(len(tensors))], "tensor")
                found[name] = rates[tensors[0]] / float(norm) ** power
        if not found:
            raise ValueError(
                f"optimizer must hold a projected layer, got {type(optimizer).__name__} with none of "
                f"{list(self.layers)[:3]}. Pass the one that trains this model."
            )
        return found

    def _layer_blocks(self) -> dict[str, tuple[int, ...]]:
        """Positions of the tensors of every layer."""
        by_name = dict(zip(self.names, self._blocks, strict=True))
        return {layer: by_name[weight] for layer, weight in self.layers.items() if weight in by_name}

    def check_invariance(
        self, batch: Batch, loss_fn: Callable[[nn.Module, Batch], Tensor], *, tolerance: float | None = None
    ) -> dict[str, float]:
        """Check that the loss does not depend on the norm of any projected layer.

        For every layer <theta, grad> must be 0 and the gradient at 3 theta a third of that at theta. Weights, buffers,
        ``.grad`` and the states of random generators are as before afterwards. Costs two backward passes per layer.

        Args:
            batch: handed to ``loss_fn``.
            loss_fn: ``loss_fn(model, batch)`` gives a scalar.
            tolerance: largest deviation, relative to the gradient; default 1e-3, in half precision 0.1.

        Returns:
            The larger of the two deviations by layer.

        Raises:
            ValueError: if a layer deviates by more; all of them are named.
            RuntimeError: if a layer has no gradient, or one that is zero or not finite.
        """
        model, blocks = self.model, self._layer_blocks()
        limit = {name: _limit([self._tensors[i] for i in block], tolerance) for name, block in blocks.items()}
        buffers = [(buffer, buffer.clone()) for buffer in model.buffers()]
        found: dict[str, float] = {}
        try:
            for name, block in blocks.items():
                tensors = [self._tensors[i] for i in block]
                found[name] = scale_deviation(f"layer {name}", tensors, lambda: loss_fn(model, batch))
        finally:
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
        bad = {name: value for name, value in found.items() if not value <= limit[name]}
        if bad:
            listed = ", ".join(f"{name} ({value:.2g})" for name, value in bad.items())
            raise ValueError(
                f"layers must be scale invariant, got deviations for {listed}. Something after them feels their scale: "
                "leave them out with layers=[...], or raise tolerance if only a normalisation's eps is in the way."
            )
        return found

    def __repr__(self) -> str:
        return f"Project({len(self.layers)} layers, per={self.per!r}, every={self.every}, affine={self.affine!r})"

    def __getstate__(self) -> dict[str, Any]:
        """Copies look at weight decay anew."""
        return {**super().__getstate__(), "_checked": None}


def _power(optimizer: torch.optim.Optimizer) -> float:
    if isinstance(optimizer, _QUADRATIC):
        return 2.0
    if isinstance(optimizer, _LINEAR):
        return 1.0
    raise ValueError(
        f"power must be given for {type(optimizer).__name__}, got None. Use 2 if its update grows with the gradient, "
        "1 if it does not."
    )


def _limit(tensors: list[Tensor], tolerance: float | None) -> float:
    if tolerance is not None:
        return positive("tolerance", tolerance)
    return 0.1 if tensors[0].dtype.itemsize < 4 else 1e-3


class _Choice:
    """Which layers of a model are followed by a normalisation, and what has to be projected with them."""

    def __init__(self, traced: Traced, per: Per) -> None:
        self._traced, self._per = traced, per
        self.parameters: Mapping[str, Tensor] = dict(traced.model.named_parameters(remove_duplicate=False))
        self.reasons = {name: self._reason(calls) for name, calls in traced.layers.items()}
        self._unshare()

    def _reason(self, calls: list[Layer]) -> str:
        """Why a layer does not qualify; empty if it does."""
        weight = self.parameters.get(calls[0].weight)
        if weight is None:
            return "its weight is computed by a parametrization"
        if not weight.requires_grad:
            return "its weight is frozen"
        for call in calls:
            norms, ends = self._traced.norms_after(call.node)
            if ends:
                return f"its output reaches {self._traced.describe(ends[0])} before a normalisation"
            if not norms:
                return "nothing uses its output"
        return ""

    def _unshare(self) -> None:
        """A weight that something else uses as well is not free in scale."""
        users: dict[Tensor, set[str]] = {}
        for path, parameter in self.parameters.items():
            users.setdefault(parameter, set()).add(path)
        for name, calls in self._traced.layers.items():
            if self.reasons[name]:
                continue
            paths = users[self.parameters[calls[0].weight]]
            free = {c[0].weight for n, c in self._traced.layers.items() if not self.reasons[n]}
            if not paths <= free:
                self.reasons[name] = f"its weight is shared with {sorted(paths - free)[0]}"

    def blocks(self, wanted: list[str] | None) -> dict[str, list[str]]:
        """Paths of the weight, and of a bias that is projected with it, by the name of the layer."""
        layers = self._traced.layers
        for name in wanted or ():
            if name not in layers:
                raise ValueError(
                    f"layers must name linear or convolutional layers, got {name!r}. Known: {list(layers)}."
                )
            if self.reasons[name]:
                raise ValueError(
                    f"layers must be followed by a normalisation, got {name!r}: {self.reasons[name]}. Put a "
                    "normalisation behind it (see insert_norms), or leave it out."
                )
        chosen = [name for name in layers if not self.reasons[name] and (wanted is None or name in wanted)]
        if not chosen:
            raise ValueError(
                f"model must have a layer that a normalisation follows, got {type(self._traced.model).__name__} with "
                f"{self.reasons or 'no layer'}. Use insert_norms(model) first."
            )
        if self._per == "row" and (bad := [n for n in chosen if layers[n][0].transposed]):
            raise ValueError(
                f"per must be 'tensor' for transposed convolutions, got 'row' for {bad[0]!r}, whose rows are inputs."
            )
        found: dict[str, list[str]] = {}
        seen: set[Tensor] = set()
        for name in chosen:
            weight = self.parameters[layers[name][0].weight]
            if weight not in seen:  # tied weights are projected once, under their first layer
                found[name] = self._block(layers[name])
            seen.add(weight)
        return found

    def _block(self, calls: list[Layer]) -> list[str]:
        bias = calls[0].bias
        if bias is None or bias not in self.parameters or not self.parameters[bias].requires_grad:
            return [calls[0].weight]
        users = {user for call in calls for user in call.node.users}
        cancels = all(self._traced.is_norm(user) and self._traced.per_channel(user) for user in users)
        return [calls[0].weight] if cancels else [calls[0].weight, bias]

    def affine_pairs(self, blocks: Mapping[str, list[str]]) -> dict[fx.Node, list[str]]:
        """Paths of gain and offset of every normalisation that follows a projected layer."""
        found: dict[fx.Node, list[str]] = {}
        for name in blocks:
            for call in self._traced.layers[name]:
                for node in self._traced.norms_after(call.node)[0]:
                    paths = [f"{node.target}.{kind}" for kind in ("weight", "bias")]
                    found[node] = [path for path in paths if path in self.parameters]
        return found

    def check_homogeneous(self, pairs: Mapping[fx.Node, list[str]]) -> None:
        """Refuse a gain whose scale does not pass on to the next layer."""
        for norm, pair in pairs.items():
            waiting = list(norm.users) if pair else []
            while waiting:
                node = waiting.pop()
                if any(node is call.node for calls in self._traced.layers.values() for call in calls):
                    continue
                if not self._traced.keeps_scale(node):
                    raise ValueError(
                        "affine must be 'leave' or 'decay' where an activation is not homogeneous, got 'homogeneous' "
                        f"for {norm.target}, which reaches {self._traced.describe(node)}."
                    )
                waiting += node.users
