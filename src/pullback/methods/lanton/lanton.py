"""LANTON: steps of fixed length per layer, shortened where a layer's gradient is noisier than its group's quietest."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from pullback.core.checks import NonFinite, positive, shown
from pullback.core.finite import admit, all_finite
from pullback.core.kinds import Optimizer
from pullback.core.parameters import optimizer_rows
from pullback.core.state import StateError
from pullback.methods.lanton import layers as noises
from pullback.methods.lanton.geometry import (
    GEOMETRIES,
    Geometry,
    Length,
    check_settings,
    default_geometry,
    step_,
)

AUTO_AFTER = 20
"""Measurements after which ``alpha="auto"`` is fixed; multipliers are 1 until then."""

_COUNTERS = ("step", "measured", "frozen", "auto_alpha")


class _Layer(NamedTuple):
    """A parameter with its gradient and state in one step."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    geometry: Geometry


class LANTON(Optimizer):
    r"""Norm-constrained steps (Muon, Scion) whose length per layer follows the noise of the layer's gradient.

    In every step (arXiv:2510.14009, Algorithm 1), for each layer l of a group::

        B <- beta1 B + (1 - beta1) G
        H <- beta2 H + (1 - beta2) ||G - G~||_*^2          in the dual norm of the layer's geometry
        r = ((alpha^2 + min H) / (alpha^2 + H))^(1/4)      in (0, 1], 1 for the quietest layer of the group
        W <- W - lr weight_decay W + lr r LMO(B)

    Layers are compared within one parameter group and one geometry; `lmo_groups` makes such groups of a model. State
    is the momentum and, where noise is measured, one more gradient and one number per layer.

    Args:
        params: groups of `lmo_groups`, or anything that torch's optimizers take.
        lr: length of a step in the norm of each layer; a number or a 0-dim tensor.
        betas: decay of the momentum and of the noise average, each in [0, 1).
        alpha: noise level, in the unit of dual norms, above which rates fall; ``inf`` gives the base optimizer.
            ``"auto"`` measures 20 times, then fixes 0.3 of the median noise of each group and geometry.
        geometry: ``"spectral"``, ``"sign"`` or ``"rms"``, usually set by group; ``"auto"``: spectral for two and more
            dimensions, rms below.
        difference: what G~ is. ``"previous"``: the gradient of the step before, or the last one of this layer.
            ``"independent"``: what `record_independent` took at the same weights.
        noise_every: steps between measurements; ``None`` measures nothing and needs no second buffer.
        weight_decay: decoupled decay, with lr itself and not the multiplied rate.
        nesterov: whether the direction is that of beta1 B + (1 - beta1) G.
        ns_steps: Newton-Schulz iterations.
        ns_dtype: dtype of the iterations: ``"bfloat16"`` as in torch's Muon, ``"float32"`` or ``"float64"``.
        adjust_lr_fn: length of spectral steps, by the names of torch's Muon.
        exact_noise: nuclear norms by singular values instead of the estimate (slow).
        maximize: ascend.
        foreach: ``False`` steps layer by layer; batches of one shape otherwise.
        nonfinite: what to do when a gradient holds NaN or Inf: ``"raise"``, ``"skip"`` (the step changes nothing) or
            ``"warn"``, at the cost of one number read by the host; ``None`` does not look, and reads nothing.
        capturable: refused, as which steps measure is decided on the host.
        differentiable: refused.
        fused: refused; ``GradScaler`` unscales before the step.

    Raises:
        TypeError: if an argument is of another type; in a step, if a gradient is sparse or complex.
        ValueError: if an argument is out of range, or there is no parameter.
        RuntimeError: in a step, if ``difference="independent"`` and no gradient was recorded.
        NonFiniteError: in a step, under ``nonfinite="raise"``.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> optimizer = LANTON(model.parameters(), lr=0.02)
        >>> model(torch.randn(4, 8)).square().mean().backward()
        >>> optimizer.step()
    """

    decoupled_weight_decay = True

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.02,
        betas: tuple[float, float] = (0.95, 0.9),
        *,
        alpha: float | Literal["auto"] = "auto",
        geometry: Geometry | Literal["auto"] = "auto",
        difference: noises.Difference = "previous",
        noise_every: int | None = 1,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        ns_steps: int = 5,
        ns_dtype: str = "bfloat16",
        adjust_lr_fn: Length = "spectral_unclamped",
        exact_noise: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        nonfinite: NonFinite | None = "raise",
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        for name, flag in (("capturable", capturable), ("differentiable", differentiable), ("fused", fused)):
            if flag:
                raise ValueError(f"{name} must be False, got {flag!r}. There is no such step; leave it out.")
        defaults = {
            "lr": lr, "betas": betas, "alpha": alpha, "geometry": geometry, "difference": difference,
            "noise_every": noise_every, "weight_decay": weight_decay, "nesterov": nesterov, "ns_steps": ns_steps,
            "ns_dtype": ns_dtype, "adjust_lr_fn": adjust_lr_fn, "exact_noise": exact_noise, "maximize": maximize,
            "foreach": foreach, "nonfinite": nonfinite,
        }  # fmt: skip
        check_settings(defaults)
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, or nothing where a setting or a parameter is refused (TypeError, ValueError)."""
        check_settings({**self.defaults, **param_group})
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        for param in group["params"]:
            if param.is_complex() or (group["geometry"] == "spectral" and param.dim() < 2):
                self.param_groups.pop()
                raise (TypeError if param.is_complex() else ValueError)(
                    f"params must be real, and of two or more dimensions where geometry is 'spectral', "
                    f"got shape {tuple(param.shape)} of {param.dtype}. Put it into a group of geometry 'rms'."
                )
        device = group["params"][0].device if group["params"] else None
        group.setdefault("step", 0)
        group.setdefault("measured", 0)
        group.setdefault("frozen", ())
        group.setdefault("auto_alpha", torch.full((len(GEOMETRIES),), torch.inf, device=device))

    # --- the step -------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Take one step.

        Args:
            closure: evaluated once, with autograd on, before the step.

        Returns:
            What the closure returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        found = [self._layers(group) for group in self.param_groups]
        policy = self.defaults["nonfinite"]
        if policy is not None and not self._admitted(found, policy):
            return loss
        for group, layers in zip(self.param_groups, found, strict=True):
            if layers:
                self._update(group, layers)
        return loss

    def _layers(self, group: dict[str, Any]) -> list[_Layer]:
        """The layers of a group that have a gradient, checked before anything is changed."""
        layers = []
        for param in group["params"]:
            grad = param.grad
            if grad is None or not param.numel():
                continue
            if grad.layout is not torch.strided or grad.is_complex():
                noises.check_gradient("LANTON", self._name(param), grad)
            layers.append(_Layer(param, grad, self.state[param], _geometry(group, param)))
        recorded = any("reference_grad" in layer.state for layer in layers) or group["measured"]
        late = bool(layers) and group["step"] >= (group["noise_every"] or torch.inf)
        if group["difference"] == "independent" and late and not recorded:
            raise RuntimeError(
                f"difference='independent' needs record_independent() before step(), got none in {group['step']}. "
                "Call it after a backward pass on another batch, or use 'previous'."
            )
        return layers

    @torch.compiler.disable
    def _admitted(self, found: list[list[_Layer]], policy: NonFinite) -> bool:
        layers = list(chain.from_iterable(found))
        grads = [layer.grad for layer in layers]
        if all_finite(grads):
            return True
        steps = max(group["step"] for group in self.param_groups)
        names = {param: name for name, param in optimizer_rows(self)}
        known = [names[layer.param] for layer in layers]
        return admit(grads, known, policy=policy, owner="LANTON", step=steps)

    def _name(self, param: Tensor) -> str:
        return next(name for name, tensor in optimizer_rows(self) if tensor is param)

    def _update(self, group: dict[str, Any], layers: list[_Layer]) -> None:
        sorts = [(g, [layer for layer in layers if layer.geometry == g]) for g in GEOMETRIES]
        sorts = [(geometry, some) for geometry, some in sorts if some]
        if group["noise_every"] is not None:
            self._observe(group, sorts)
        for geometry, some in sorts:
            for layer in some:
                if "momentum_buffer" not in layer.state:
                    layer.state["momentum_buffer"] = torch.zeros_like(layer.grad)
            _descend(group, some, geometry, self._rates(group, some, geometry))
        group["step"] += 1

    # --- noise ----------------------------------------

    def _observe(self, group: dict[str, Any], sorts: list[tuple[Geometry, list[_Layer]]]) -> None:
        """Measure in this step, and keep its gradients, where it is time to."""
        every, step, follows = group["noise_every"], group["step"], group["difference"] == "previous"
        seen = []
        if not follows or step % every == 0:
            seen = [g for g, layers in sorts if self._measure(group, layers, g)]
        if seen:
            group["measured"] += 1
        if seen and group["alpha"] == "auto" and group["measured"] >= AUTO_AFTER:
            self._fix_alpha(group, [row for row in sorts if row[0] in seen and row[0] not in group["frozen"]])
        if follows and (step + 1) % every == 0:
            _keep([layer for _, layers in sorts for layer in layers])

    def _measure(self, group: dict[str, Any], layers: list[_Layer], geometry: Geometry) -> bool:
        known = [layer for layer in layers if "reference_grad" in layer.state]
        if not known:
            return False
        norms = noises.difference_norms(
            [layer.grad for layer in known],
            [layer.state["reference_grad"] for layer in known],
            geometry,
            rule=group["adjust_lr_fn"],
            exact=group["exact_noise"],
            dtype=getattr(torch, group["ns_dtype"]),
            foreach=group["foreach"] is not False,
        )
        for layer in known:
            if "noise" not in layer.state:
                layer.state["noise"] = noises.unknown(norms.device)
            if group["difference"] == "independent":
                del layer.state["reference_grad"]
        held = [layer.state["noise"] for layer in known]
        new = noises.averaged(torch.stack(held), norms, group["betas"][1])
        torch._foreach_copy_(held, list(new.unbind()))
        return True

    def _fix_alpha(self, group: dict[str, Any], sorts: list[tuple[Geometry, list[_Layer]]]) -> None:
        for geometry, layers in sorts:
            value = noises.auto_alpha(_noise(layers)).to(group["auto_alpha"].device)
            here = torch.arange(len(GEOMETRIES), device=value.device) == GEOMETRIES.index(geometry)
            group["auto_alpha"] = torch.where(here, value, group["auto_alpha"])
            group["frozen"] = (*group["frozen"], geometry)

    def _rates(self, group: dict[str, Any], layers: list[_Layer], geometry: Geometry) -> Tensor | None:
        """Multipliers [n] of the layers, or ``None`` where all are known to be 1."""
        alpha = group["alpha"]
        if len(layers) == 1 or not group["measured"] or alpha == torch.inf or group["noise_every"] is None:
            return None
        if alpha == "auto":
            if geometry not in group["frozen"]:
                return None
            alpha = group["auto_alpha"][GEOMETRIES.index(geometry)]
        return noises.multipliers(_noise(layers), alpha)

    @property
    def measures_next(self) -> bool:
        """Whether the next step is one in which ``noise_every`` wants a gradient for `record_independent`."""
        groups = [group for group in self.param_groups if group["noise_every"] is not None]
        return any(group["step"] % group["noise_every"] == 0 for group in groups)

    @torch.no_grad()
    def record_independent(self, *, grad_scale: float = 1.0) -> None:
        """Keep present gradients, of another batch at the same weights, for the difference of the next step.

        Call it after a backward pass of its own, then ``zero_grad()``, then the ordinary backward pass and step.

        Args:
            grad_scale: the loss scale that the gradients still carry, ``scaler.get_scale()`` under ``GradScaler``.

        Raises:
            ValueError: if no group has ``difference="independent"``, the scale is not > 0, or there is no gradient.
        """
        scale = positive("grad_scale", grad_scale)
        groups = [group for group in self.param_groups if group["difference"] == "independent"]
        if not groups:
            raise ValueError("difference must be 'independent' to record gradients, got 'previous'.")
        # As if of the other difference: that nothing was recorded yet is no mistake here.
        layers = [layer for g in groups for layer in self._layers({**g, "difference": "previous"})]
        if not layers:
            raise ValueError("gradients must be there, got none. Call record_independent() after backward().")
        _keep(layers, scale)

    def noise(self) -> dict[str, float]:
        """sqrt(H) of every measured layer by name, in the unit of its dual norm; read from the device."""
        rows = ((name, self.state.get(param, {})) for name, param in optimizer_rows(self))
        return {name: float(state["noise"].sqrt()) for name, state in rows if "noise" in state}

    def layer_rates(self, *, relative: bool = False) -> dict[str, float]:
        """The rate of every layer by name, as the next step would take it if all layers had gradients.

        Args:
            relative: the multipliers in (0, 1] instead of the rates lr times multiplier.
        """
        found: dict[Tensor, float] = {}
        for group in self.param_groups:
            base = 1.0 if relative else float(group["lr"])
            held = [p for p in group["params"] if p.numel()]
            for geometry in GEOMETRIES:
                same = [p for p in held if _geometry(group, p) == geometry]
                layers = [_Layer(p, p, self.state.get(p, {}), geometry) for p in same]
                rates = self._rates(group, layers, geometry) if layers else None
                values = [1.0] * len(layers) if rates is None else rates.tolist()
                found.update({layer.param: base * v for layer, v in zip(layers, values, strict=True)})
        return {name: found[param] for name, param in optimizer_rows(self) if param in found}

    # --- state ----------------------------------------

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over a state of `state_dict`; noise stays in float32 whatever the dtype of the parameters.

        Raises:
            StateError: if it is the state of another optimizer.
        """
        wanted = {*self.defaults, *_COUNTERS}
        for group in state_dict["param_groups"]:
            missing = sorted(wanted - set(group))
            if missing:
                raise StateError(
                    f"LANTON: groups must hold {missing}, got {shown(sorted(group))}. Load LANTON's state."
                )
        super().load_state_dict(dict(state_dict))
        ids = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        params = chain.from_iterable(group["params"] for group in self.param_groups)
        for key, param in zip(ids, params, strict=True):
            saved = state_dict["state"].get(key, {})
            if "noise" in saved:
                self.state[param]["noise"] = saved["noise"].detach().clone().to(param.device)
        for group in self.param_groups:
            group["frozen"] = tuple(group["frozen"])
            if group["params"]:
                group["auto_alpha"] = group["auto_alpha"].to(group["params"][0].device)


def _noise(layers: list[_Layer]) -> Tensor:
    """H of some layers [n], NaN where nothing was measured."""
    device = layers[0].param.device
    return torch.stack([layer.state.get("noise", noises.unknown(device)).to(device) for layer in layers])


def _geometry(group: Mapping[str, Any], param: Tensor) -> Geometry:
    return default_geometry(param) if group["geometry"] == "auto" else group["geometry"]


def _keep(layers: list[_Layer], scale: float = 1.0) -> None:
    """Copy the gradients into the second buffer."""
    for layer in layers:
        if "reference_grad" not in layer.state:
            layer.state["reference_grad"] = torch.empty_like(layer.grad)
    held, grads = [layer.state["reference_grad"] for layer in layers], [layer.grad for layer in layers]
    for one, grad in zip(held, grads, strict=True):
        one.copy_(grad)
        if scale != 1.0:
            one.div_(scale)


def _descend(
    group: Mapping[str, Any], layers: list[_Layer], geometry: Geometry, rates: Tensor | None
) -> None:
    """Momentum, decay and step of the layers of one geometry (lines 1 and 5)."""
    foreach = group["foreach"] is not False and not any(
        hasattr(layer.param, "full_tensor") for layer in layers
    )
    params, grads = [layer.param for layer in layers], [layer.grad for layer in layers]
    held, beta, lr = [layer.state["momentum_buffer"] for layer in layers], group["betas"][0], group["lr"]
    if group["maximize"]:
        grads = list(torch._foreach_neg(grads)) if foreach else [-grad for grad in grads]
    keep = 1.0 - lr * group["weight_decay"] if group["weight_decay"] else None
    if foreach:
        torch._foreach_lerp_(held, grads, 1.0 - beta)
        if keep is not None:
            torch._foreach_mul_(params, keep)
    else:
        for param, buffer, grad in zip(params, held, grads, strict=True):
            buffer.lerp_(grad, 1.0 - beta)
            if keep is not None:
                param.mul_(keep)
    step_(
        params, held, geometry, lr=lr, rates=rates, towards=(grads, 1.0 - beta) if group["nesterov"] else None,
        rule=group["adjust_lr_fn"], ns_steps=group["ns_steps"], dtype=getattr(torch, group["ns_dtype"]),
        foreach=foreach,
    )  # fmt: skip
