"""Weight updates of flipped sign for a share of neurons, with any optimizer or as a rule on the weight itself."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, ClassVar, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from pullback.core.checks import choice, fraction, integer, shown
from pullback.core.kinds.transform import Parameters, StepBatch, Transform
from pullback.methods.curl_descent.targets import (
    Signs,
    Target,
    apply_,
    chosen_signs,
    matches,
    named,
    named_target,
    target_of,
)

if TYPE_CHECKING:
    from pullback.core.frobenius import FrobeniusProjector

Layers: TypeAlias = nn.Module | str | Iterable[nn.Module] | Iterable[str]
Side: TypeAlias = Literal["pre", "post"]
Which: TypeAlias = Literal["first", "random"]


class FlipHandle:
    """Hooks on weights; `remove` takes them off, as does leaving a ``with`` block."""

    def __init__(self, rule: RuleFlip, handles: Sequence[torch.utils.hooks.RemovableHandle]) -> None:
        self._rule, self._handles = rule, list(handles)

    def remove(self) -> None:
        """Restore the plain gradient; a second call does nothing."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        if self._rule._hooked is self:
            self._rule._hooked = None

    def __enter__(self) -> FlipHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()


@final
class RuleFlip(Transform):
    r"""Flip the sign of the weight updates of chosen neurons: curl descent.

    The update of a layer becomes ``-eta g D`` (``side="pre"``: columns, the synapses that leave a chosen input of the
    layer) or ``-eta D g`` (``side="post"``: rows, those that arrive at a chosen output), with D = diag(+-1). The error
    that is sent back to earlier layers is not touched: this is no gradient reversal. The field is then in general the
    gradient of nothing; its fixed points are those of the loss, their stability may differ (`solution_stability`).

    Attach it to an optimizer, or let `hook` flip gradients as they arrive at the weights. What the optimizer adds by
    itself (weight decay, coupled or not) keeps its sign; a penalty written into the loss is flipped with the rest.

    Args:
        layers: a layer, several, or globs on parameter names (default: every parameter of two or more dimensions).
            Layers are better: a name does not tell that ``Embedding`` and ``ConvTranspose`` have inputs first, or that
            a convolution has groups; named tensors are read as [outputs, inputs, ...]. With a convolution neurons are
            channels.
        fraction: share of the neurons of each layer to flip, in [0, 1]: ``round(fraction * n)`` of n. 0 flips nothing
            (bitwise), 1 all of them (gradient ascent).
        side: ``"pre"`` or ``"post"``; which neurons are counted.
        which: ``"first"``: the first ones, as in the paper; ``"random"``: chosen by ``seed`` and the layer's position,
            the same on every rank and device.
        mask: +1 or -1 for each neuron [n] instead of a fraction, for all of ``layers``.
        seed: stream of the random choice.
        renorm: after every step give each of the layers' weights the Frobenius norm that it has now, so that flipped
            directions cannot blow up; needs layers, not names. To hold all layers of a model, as the paper does,
            attach a ``FrobeniusProjector`` of the model after this.

    Raises:
        TypeError: if ``layers`` holds something without a weight of two or more dimensions.
        ValueError: if ``layers`` is empty or names a weight twice, if ``fraction`` lies outside [0, 1], if not exactly
            one of ``fraction`` and ``mask`` is given, or if a mask has another length or other entries than +-1.

    Example:
        >>> layer = torch.nn.Linear(4, 1, bias=False)
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        >>> attachment = RuleFlip(layer, fraction=0.5).attach(optimizer)
        >>> before = layer.weight.detach().clone()
        >>> layer(torch.ones(1, 4)).sum().backward()
        >>> optimizer.step()
        >>> (layer.weight.detach() - before).round()
        tensor([[ 1.,  1., -1., -1.]])
    """

    when: ClassVar[Literal["pre", "post", "both"]] = "pre"

    def __init__(
        self,
        layers: Layers = "*",
        *,
        fraction: float | None = None,
        side: Side = "pre",
        which: Which = "first",
        mask: Tensor | None = None,
        seed: int = 0,
        renorm: bool = False,
    ) -> None:
        self.side: Side = choice("side", side, ("pre", "post"))
        self.which: Which = choice("which", which, ("first", "random"))
        self.seed = integer("seed", seed)
        self.fraction, self.mask = _amount(fraction, mask)
        self.patterns, self.layers = _layers(layers)
        self._hooked: FlipHandle | None = None
        self._forget()
        targets = self._targets()
        weights = [target.weight for target in targets]
        for index, target in enumerate(targets):
            if any(target.weight is other for other in weights[:index]):
                raise ValueError(
                    f"layers must have weights of their own, got that of layers[{index}] twice: it would be flipped "
                    "back. Give a tied weight once."
                )
            self._signs_of(target, index)
        self._projector = self._renorm() if renorm else None
        if renorm:
            vars(self)["when"] = "both"  # of this instance: without the projector nothing follows the step

    def _forget(self) -> None:
        self._signs: dict[tuple[str, int, int], Signs] = {}
        self._named: dict[str, bool] = {}
        self._owned: Any = None

    def _targets(self) -> list[Target]:
        """Looked up afresh: sharding, loading or casting may replace a layer's weight."""
        return [target_of(layer, self.side, index) for index, layer in enumerate(self.layers)]

    # --- which entries -------------------------------------------------------------------------------------

    def _signs_of(self, target: Target, index: int) -> Signs:
        """The sign of each neuron of a target, chosen once."""
        key = (target.name, target.size, index)
        if key not in self._signs:
            amount = self.fraction if self.mask is None else self.mask
            self._signs[key] = chosen_signs(amount, target, which=self.which, seed=self.seed, index=index)
        return self._signs[key]

    def signs(self, params: Parameters) -> list[Tensor]:
        """The matrix D as one tensor of +1 and -1 per parameter, shaped to broadcast to it: no dense D.

        Args:
            params: a module, a mapping, tensors or (name, tensor) pairs; by names when this rule was given names.

        Returns:
            One tensor per parameter, in their order and dtype; a 0-dim one where nothing is flipped.

        Raises:
            TypeError: if ``params`` holds no tensors.
            ValueError: if it is empty.
        """
        rows = named(params)
        places = self._located([t for _, t in rows], [n for n, _ in rows], range(len(rows)))
        result = [torch.ones((), dtype=tensor.dtype, device=tensor.device) for _, tensor in rows]
        for place, target, signs in places:
            if signs.count:
                result[place] = target.broadcast(signs.factor(target, rows[place][1]))
        return result

    def _located(
        self, params: Sequence[Tensor], names: Sequence[str], indices: Sequence[int]
    ) -> list[tuple[int, Target, Signs]]:
        """Positions in ``params`` that are flipped, what is flipped there, and the sign of each neuron."""
        if self.layers:
            where = {id(param): place for place, param in enumerate(params)}
            rows = [(where.get(id(target.weight)), target, i) for i, target in enumerate(self._targets())]
            return [(p, target, self._signs_of(target, i)) for p, target, i in rows if p is not None]
        located = []
        for place, (param, name) in enumerate(zip(params, names, strict=True)):
            if param.dim() >= 2 and self._matches(name):
                target = named_target(name, param, self.side)
                located.append((place, target, self._signs_of(target, indices[place])))
        return located

    def _matches(self, name: str) -> bool:
        if name not in self._named:
            self._named[name] = matches(name, self.patterns)
        return self._named[name]

    # --- in an optimizer -----------------------------------------------------------------------------------

    def pre_step_(self, batch: StepBatch) -> None:
        """Flip ``batch.grads`` in place.

        Raises:
            RuntimeError: if `hook` flips already.
            TypeError: if a gradient is sparse, or a sharded one has groups.
            ValueError: if the optimizer holds none, or not all, of what is to be flipped.
        """
        if self._hooked is not None:
            raise RuntimeError(
                f"{self.name}: its hooks flip the gradient already, and the optimizer would flip it back. "
                "Use either hook() or attach(), remove the other one."
            )
        located = self._located(batch.params, batch.names, batch.indices)
        self._check_owned(batch, located)
        apply_([(batch.grads[place], target, signs) for place, target, signs in located])

    def _check_owned(self, batch: StepBatch, located: list[tuple[int, Target, Signs]]) -> None:
        """See once per set of parameters that the optimizer trains what is to be flipped."""
        groups = batch.groups[:1] if batch.optimizer is None else batch.optimizer.param_groups
        weights = [target.weight for target in self._targets()]
        known = (id(batch.optimizer), len(batch.params), *map(id, weights))
        if self._owned == known:
            return
        held = [param for group in groups for param in group["params"]]
        missing = [i for i, weight in enumerate(weights) if not any(weight is param for param in held)]
        if missing:
            raise ValueError(
                f"{self.name}: the optimizer must hold the weights of all layers, got none of layers[{missing[0]}]. "
                "Give only layers that it trains, one RuleFlip for each optimizer."
            )
        if not self.layers and not located and len(held) == len(batch.params):
            raise ValueError(
                f"{self.name}: layers must match a parameter of two or more dimensions, got {list(self.patterns)} "
                f"for the names {list(batch.names)[:3]}. Pass the layers themselves, or attach with names=model."
            )
        self._owned = known

    def post_step_(self, batch: StepBatch) -> None:
        """Reset the norms of the layers' weights (``renorm=True`` only)."""
        if self._projector is not None:
            weights = {id(target.weight) for target in self._targets()}
            if any(id(param) in weights for param in batch.params):
                self._projector.post_step_(batch)

    def update_(self, params: Parameters, **kwargs: Any) -> None:
        """Flip the gradients once, by hand, between ``backward()`` and ``step()``; see `Transform.update_`.

        Raises:
            RuntimeError: with ``renorm=True``, whose second half belongs after the step.
        """
        if self._projector is not None:
            raise RuntimeError(
                f"{self.name}.update_ cannot renormalise, as it runs before the step, got renorm=True. "
                "Attach it, or make a FrobeniusProjector and call its project_() after the step."
            )
        super().update_(params, **kwargs)

    def _renorm(self) -> FrobeniusProjector:
        from pullback.core.frobenius import FrobeniusProjector

        if not self.layers:
            raise ValueError(
                f"renorm=True needs the layers, got the names {list(self.patterns)}. Pass layers, or attach a "
                "FrobeniusProjector of the model after this."
            )
        return FrobeniusProjector([(target.name, target.weight) for target in self._targets()])

    # --- on the weight -------------------------------------------------------------------------------------

    def hook(self, params: Parameters | None = None) -> FlipHandle:
        """Flip gradients where they arrive at the weights, whatever uses them then; without any optimizer.

        Works for ``backward()`` and ``torch.autograd.grad``, with double backward, and before DDP averages (a fixed
        sign commutes with the mean).

        Args:
            params: a module or named parameters to look for names in; not needed when this rule was given layers.

        Returns:
            The handle whose ``remove()`` restores the plain gradients.

        Raises:
            RuntimeError: if this rule is hooked or attached already, or has ``renorm=True``.
            TypeError: if a weight is sharded.
            ValueError: if nothing is found, or a weight needs no gradient.
        """
        if self._hooked is not None or self.owner is not None or self._projector is not None:
            state = "hooked" if self._hooked else "attached to an optimizer" if self.owner else "renorm=True"
            raise RuntimeError(
                f"{self.name}.hook needs a rule that flips nowhere else and changes no norm, got one that is {state}. "
                "Remove the other, or make a second RuleFlip."
            )
        rows = named(params) if params is not None else []
        if self.layers:
            rows = [(target.name, target.weight) for target in self._targets()]
        located = self._located([t for _, t in rows], [n for n, _ in rows], range(len(rows)))
        if not located:
            raise ValueError(
                f"{self.name}.hook: params must hold a parameter of two or more dimensions that matches "
                f"{list(self.patterns)}, got {len(rows)} parameters. Pass the model."
            )
        for _, target, _ in located:
            target.check_hookable()
        self._hooked = FlipHandle(self, [target.hook(signs) for _, target, signs in located])
        return self._hooked

    # --- state ---------------------------------------------------------------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """The recorded norms of ``renorm=True``; the signs follow from the settings."""
        return {} if self._projector is None else {"renorm": self._projector.extra_state()}

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        """Check the recorded norms."""
        super().check_extra_state(state)
        if self._projector is not None:
            self._projector.check_extra_state(state["renorm"])

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over recorded norms."""
        if self._projector is not None:
            self._projector.load_extra_state(state["renorm"])

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry no hooks."""
        return {**super().__getstate__(), "_hooked": None, "_owned": None}

    def __repr__(self) -> str:
        amount = f"fraction={self.fraction:g}" if self.mask is None else f"mask={shown(self.mask)}"
        where = f"{len(self.layers)} layers" if self.layers else ", ".join(map(repr, self.patterns))
        extra = f", which={self.which!r}" if self.mask is None else ""
        renorm = ", renorm=True" if self._projector is not None else ""
        return f"RuleFlip({where}, {amount}, side={self.side!r}{extra}{renorm})"


def _amount(share: float | None, mask: Tensor | None) -> tuple[float, Tensor | None]:
    if (share is None) == (mask is None):
        both = "neither" if share is None else "both"
        raise ValueError(f"give exactly one of fraction and mask, got {both}. For example fraction=0.1.")
    if mask is None:
        return fraction("fraction", share, fix="Use k / n to flip k of n neurons."), None
    if not isinstance(mask, Tensor):
        raise TypeError(f"mask must be a tensor, got {shown(mask)}. Use torch.tensor([-1.0, 1.0, ...]).")
    if mask.dim() != 1 or mask.dtype is torch.bool or not bool((mask.abs() == 1).all()):
        raise ValueError(
            f"mask must be one vector of +1 and -1, got {shown(mask)} with other entries or shape. "
            "From booleans: torch.where(flipped, -1.0, 1.0)."
        )
    return 0.0, mask.detach().clone()


def _layers(layers: Layers) -> tuple[tuple[str, ...], tuple[nn.Module, ...]]:
    given: list[Any] = [layers] if isinstance(layers, nn.Module | str) else list(layers)
    if not given:
        raise ValueError("layers must not be empty, got none. Pass model.readout, for example.")
    if all(isinstance(each, str) for each in given):
        return tuple(given), ()
    for index, each in enumerate(given):
        if not isinstance(each, nn.Module):
            raise TypeError(
                f"layers[{index}] must be a layer (or all of them names), got {shown(each)}. "
                "Pass the module that holds the weight."
            )
    return (), tuple(given)
