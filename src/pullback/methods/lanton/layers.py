"""Which geometry a layer has, how noisy its gradient is, and what a step is multiplied by."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from pullback.core.checks import choice, integer, positive, shown
from pullback.core.kinds import StepBatch, Transform
from pullback.core.kinds.transform import Parameters
from pullback.core.norms import whole
from pullback.core.parameters import named_parameters
from pullback.core.state import StateError, check_state
from pullback.methods.lanton import geometry as geo
from pullback.methods.lanton.geometry import GEOMETRIES, Geometry, default_geometry

Difference: TypeAlias = Literal["previous", "independent"]
"""What a gradient is compared with: that of the step before, or one of another batch at the same weights."""

AUTO_SHARE = 0.3
"""``alpha="auto"`` is this share of the median noise of a group."""

_EMBEDDINGS = (nn.Embedding, nn.EmbeddingBag)
_GROUPS: tuple[tuple[str, Geometry], ...] = (("hidden", "spectral"), ("embed", "sign"), ("vector", "rms"))


# --- geometry of a model's layers --------------------------------------------------------------------------------


def lmo_groups(
    model: nn.Module,
    *,
    head: nn.Module | Iterable[nn.Module] | Literal["last"] = "last",
    override: Mapping[nn.Module | Tensor, Geometry] | None = None,
    hidden: Mapping[str, Any] | None = None,
    embed: Mapping[str, Any] | None = None,
    vector: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """Parameter groups of a model for `LANTON`: chosen by modules and shapes, never by a parameter's name.

    Embeddings, also those tied to an output layer, and the head step by signs (norm: largest entry); other matrices
    and kernels by their polar factor (operator norm); all else, such as biases and gains, by the unit vector (root
    mean square). A parameter of your own module does not become a matrix by axes of size 1.

    Args:
        model: any module; frozen parameters are left out.
        head: the output layers. ``"last"`` takes the last ``nn.Linear`` in the order of registration; pass the module
            where that is another one, or ``()`` for a model without a head.
        override: geometry of single modules (with all inside them) or parameters, by identity; a module's vectors
            stay vectors.
        hidden: further settings of the group of hidden matrices, for example ``{"lr": 0.02}``.
        embed: those of embeddings and head.
        vector: those of vectors.

    Returns:
        Up to three groups with named parameters and ``geometry``.

    Raises:
        TypeError: if ``model`` is no module or is wrapped by FullyShardedDataParallel, whose parameters are flat.
        ValueError: if nothing is trainable, a parameter has no shape yet, or a head or override lies outside the model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be an nn.Module, got {shown(model)}. Pass the model that is trained.")
    kinds = _geometries(model, head, override or {})
    settings = {"hidden": hidden, "embed": embed, "vector": vector}
    groups: list[dict[str, Any]] = []
    for name, geometry in _GROUPS:
        params = [(n, p) for n, p in model.named_parameters() if p.requires_grad and kinds[p] == geometry]
        if params:
            groups.append({"params": params, "geometry": geometry, **dict(settings[name] or {})})
    if not groups:
        raise ValueError(
            f"model must have parameters that require a gradient, got none in {type(model).__name__}. Unfreeze some."
        )
    return groups


def _geometries(
    model: nn.Module, head: Any, override: Mapping[nn.Module | Tensor, Geometry]
) -> dict[Tensor, Geometry]:
    kinds: dict[Tensor, Geometry] = {}
    embedded: set[Tensor] = set()
    for module in model.modules():
        if type(module).__name__ == "FullyShardedDataParallel":
            raise TypeError(
                "model must hold its parameters in their own shapes, got FullyShardedDataParallel. Use fully_shard."
            )
        for param in module.parameters(recurse=False):
            if isinstance(param, nn.UninitializedParameter):
                raise ValueError(
                    f"model must have initialised parameters, got a lazy {type(module).__name__}. Run it once first."
                )
            loose = not type(module).__module__.startswith("torch.nn")  # [1, 1, d] is no matrix there
            sizes = [size for size in param.shape if size != 1] if loose else param.shape
            kinds[param] = "spectral" if len(sizes) >= 2 else "rms"
            if isinstance(module, _EMBEDDINGS):
                embedded.add(param)
    heads = _heads(model, head)
    inside = set(model.modules())
    for place in heads:
        _inside("head", place, inside)
        embedded.update(p for p in place.parameters(recurse=False) if kinds[p] == "spectral")
    kinds.update(dict.fromkeys(embedded, "sign"))
    for target, geometry in override.items():
        choice("override", geometry, GEOMETRIES)
        if isinstance(target, nn.Module):
            _inside("override", target, inside)
            kinds.update({p: geometry for p in target.parameters() if kinds[p] != "rms"})
        elif target in kinds:
            kinds[target] = geometry
        else:
            raise ValueError(
                f"override must name parts of the model, got {shown(target)}. Pass its own parameters."
            )
    return kinds


def _heads(model: nn.Module, head: Any) -> list[nn.Module]:
    if isinstance(head, str):
        choice("head", head, ("last",), fix="Pass 'last', the module itself, or () for none.")
        return [*filter(lambda module: isinstance(module, nn.Linear), model.modules())][-1:]
    return [head] if isinstance(head, nn.Module) else list(head)


def _inside(argument: str, module: object, modules: set[nn.Module]) -> None:
    if not isinstance(module, nn.Module) or module not in modules:
        raise ValueError(
            f"{argument} must name parts of the model, got {type(module).__name__}. Pass its own modules."
        )


# --- noise -------------------------------------------------------------------------------------------------------


def multipliers(noise: Tensor, alpha: Tensor | float) -> Tensor:
    """sqrt(alpha_l / max alpha) with alpha_l = alpha / sqrt(alpha^2 + H_l), for the layers of one group.

    Written as ((alpha^2 + min H) / (alpha^2 + H_l))^(1/4): exactly 1 for the least noisy layer and for alpha = inf.

    Args:
        noise: H of every layer [n] (squared dual norms), NaN where nothing was measured yet: these get 1.
        alpha: in the unit of dual norms; ``inf`` gives 1 everywhere.
    """
    least = torch.where(noise.isnan(), torch.inf, noise).amin()
    square = alpha * alpha
    return ((square + least) / (square + noise)).nan_to_num(nan=1.0).pow(0.25)


def unknown(device: torch.device) -> Tensor:
    """The noise of a layer without a measurement, in float32 whatever its dtype."""
    return torch.full((), torch.nan, dtype=torch.float32, device=device)


def averaged(noise: Tensor, norms: Tensor, beta: float) -> Tensor:
    """H <- beta H + (1 - beta) norm^2, from H = 0 at the first measurement; kept where a norm is not finite."""
    square = norms.to(noise.dtype).square()
    new = noise.nan_to_num(nan=0.0).mul(beta).add(square, alpha=1.0 - beta)
    return torch.where(new.isfinite(), new, noise)


def auto_alpha(noise: Tensor) -> Tensor:
    """A share of the median layer's noise, 0-dim; ``inf`` where nothing was measured."""
    return noise.sqrt().nanmedian().mul(AUTO_SHARE).nan_to_num(nan=torch.inf)


def difference_norms(
    grads: Sequence[Tensor], others: Sequence[Tensor], geometry: Geometry, **how: Any
) -> Tensor:
    """Dual norms of ``grads - others`` [n]; sharded tensors are gathered, so that every rank reads the same."""
    if any(hasattr(grad, "full_tensor") for grad in grads):
        return geo.dual_norms([whole(g - o) for g, o in zip(grads, others, strict=True)], geometry, **how)
    return geo.dual_norms(grads, geometry, minus=others, **how)


def check_gradient(owner: str, name: str, grad: Tensor) -> None:
    """Refuse a sparse or complex gradient by TypeError: it has no dual norm here."""
    if grad.layout is not torch.strided:
        raise TypeError(
            f"{owner}: the gradient of {name} must be dense, got a sparse one ({grad.layout}). "
            "Build the embedding with sparse=False, or leave it to another optimizer."
        )
    if grad.is_complex():
        raise TypeError(
            f"{owner}: the gradient of {name} must be real, got {grad.dtype}. Train torch.view_as_real of it."
        )


@dataclass(frozen=True)
class NoiseReport:
    """What `LayerNoise` found.

    Args:
        noise: sqrt(H) by parameter, in the unit of its dual norm; comparable within one geometry only.
        multipliers: what LANTON would multiply each layer's rate by, in (0, 1].
        geometry: the geometry of each parameter.
        measured: number of differences measured.
    """

    noise: dict[str, float]
    multipliers: dict[str, float]
    geometry: dict[str, Geometry]
    measured: int


@final
class LayerNoise(Transform):
    """Measure the gradient noise of every layer beside any optimizer; nothing is edited.

    H_l = beta H_l + (1 - beta) ||G_l - G~_l||_*^2 in the dual norm of the layer's geometry, where G~ is the gradient of
    the step before (paper, Option I) or an independent one at the same weights (Option II). Attach it after clipping to
    measure what the optimizer sees, before it to measure the raw gradient.

    Args:
        layers: a model, whose layers are sorted as `lmo_groups` does; geometries by parameter name; or ``None``:
            matrices and kernels ``"spectral"``, all else ``"rms"``. Names are those of the attachment: build the
            optimizer from ``model.named_parameters()`` or pass ``names=model`` to ``attach``.
        beta: decay of the average, in [0, 1).
        difference: ``"previous"``, or ``"independent"`` with `record_independent` before a step.
        every: steps between measurements of ``"previous"``.
        exact: nuclear norms by singular values instead of the estimate.

    Raises:
        TypeError, ValueError: if a setting does not fit; in a step, if a gradient or a name does not.

    Example:
        >>> model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(model.named_parameters())
        >>> noise = LayerNoise(model)
        >>> attachment = noise.attach(optimizer)
        >>> for _ in range(3):
        ...     optimizer.zero_grad()
        ...     model(torch.randn(8, 3)).square().mean().backward()
        ...     optimizer.step()
        >>> sorted(noise.report().noise)
        ['0.bias', '0.weight', '1.bias', '1.weight']
    """

    kind: ClassVar[str] = "probe"
    when: ClassVar[Literal["pre", "post", "both"]] = "pre"

    def __init__(
        self,
        layers: nn.Module | Mapping[str, Geometry] | None = None,
        *,
        beta: float = 0.9,
        difference: Difference = "previous",
        every: int = 1,
        exact: bool = False,
    ) -> None:
        self.geometry: dict[str, Geometry] | None = None
        if isinstance(layers, nn.Module):
            groups = lmo_groups(layers)
            self.geometry = {name: group["geometry"] for group in groups for name, _ in group["params"]}
        elif layers is not None:
            self.geometry = {n: choice(f"layers[{n!r}]", g, GEOMETRIES) for n, g in layers.items()}
        self.beta = geo.decay("beta", beta)
        self.difference: Difference = choice("difference", difference, ("previous", "independent"))
        self.every = integer("every", every, minimum=1)
        self.exact = bool(exact)
        self.measured = 0
        self._kinds: dict[str, Geometry] = {}
        self._noise: dict[str, Tensor] = {}
        self._other: dict[str, Tensor] = {}

    def __repr__(self) -> str:
        return f"LayerNoise(beta={self.beta:g}, difference={self.difference!r}, every={self.every})"

    # --- measuring ------------------------------------

    def pre_step_(self, batch: StepBatch) -> None:
        """Measure this step's gradients, and keep them where the next step needs them."""
        rows = {n: g for n, g in zip(batch.names, batch.grads, strict=True) if g.numel()}
        self._learn(rows)
        follows = self.difference == "previous"
        if not follows or batch.step % self.every == 0:
            known = {n: g for n, g in rows.items() if n in self._other}
            self._measure(known)
        if not follows:
            self._other.clear()
        elif (batch.step + 1) % self.every == 0:
            self._keep(rows)

    @torch.no_grad()
    def record_independent(self, params: Parameters, *, grad_scale: float = 1.0) -> None:
        """Keep present gradients, of another batch at the same weights, for the difference of the next step.

        Args:
            params: what `update_` takes, with the names of the attachment (a model, for example).
            grad_scale: the loss scale that the gradients still carry, ``scaler.get_scale()`` under ``GradScaler``.

        Raises:
            ValueError: if the difference is ``"previous"``, the scale is not > 0, or no parameter has a gradient.
        """
        if self.difference != "independent":
            raise ValueError(
                f"difference must be 'independent' to record gradients, got {self.difference!r}. Build it so."
            )
        scale = positive("grad_scale", grad_scale)
        source: Any = params if isinstance(params, nn.Module | Mapping) else list(params)
        named = named_parameters(source).items()
        rows = {n: p.grad for n, p in named if p.grad is not None and p.numel()}
        if not rows:
            raise ValueError(
                f"params must have gradients, got none in {len(named)}. Call it after backward()."
            )
        self._learn(rows)
        self._other = {n: g / scale for n, g in rows.items()}

    def _learn(self, rows: Mapping[str, Tensor]) -> None:
        for name, grad in rows.items():
            check_gradient("LayerNoise", name, grad)
            if name in self._kinds:
                continue
            if self.geometry is None:
                self._kinds[name] = default_geometry(grad)
            elif name in self.geometry:
                self._kinds[name] = self.geometry[name]
            else:
                raise ValueError(
                    f"layers must name every parameter of the optimizer, got none for {name!r}. "
                    "Pass names=model to attach, or build the optimizer from model.named_parameters()."
                )

    def _measure(self, rows: Mapping[str, Tensor]) -> None:
        for geometry in GEOMETRIES:
            names = [name for name in rows if self._kinds[name] == geometry]
            if not names:
                continue
            others = [self._other[name] for name in names]
            norms = difference_norms([rows[name] for name in names], others, geometry, exact=self.exact)
            old = [self._noise.get(name, unknown(norms.device)) for name in names]
            new = averaged(torch.stack(old), norms, self.beta).unbind()
            self._noise.update(zip(names, new, strict=True))
        self.measured += bool(rows)

    def _keep(self, rows: Mapping[str, Tensor]) -> None:
        for name, grad in rows.items():
            if name in self._other:
                self._other[name].copy_(grad)
            else:
                self._other[name] = grad.detach().clone()

    # --- reading --------------------------------------

    def noise(self) -> dict[str, float]:
        """sqrt(H) of every measured parameter, read from the device."""
        return {name: float(value.sqrt()) for name, value in self._noise.items()}

    def report(self, alpha: float | Literal["auto"] = "auto") -> NoiseReport:
        """Noise of every layer, and the multipliers that LANTON would choose now, by geometry.

        Args:
            alpha: in the unit of dual norms; ``"auto"`` takes 0.3 times the median noise of a geometry.

        Raises:
            ValueError: if ``alpha`` is not > 0.
        """
        given = None if alpha == "auto" else geo.check_alpha(alpha)
        rates: dict[str, float] = {}
        for geometry in GEOMETRIES:
            names = [name for name in self._noise if self._kinds[name] == geometry]
            if names:
                noise = torch.stack([self._noise[name] for name in names])
                found = multipliers(noise, auto_alpha(noise) if given is None else given)
                rates.update(zip(names, found.tolist(), strict=True))
        kinds = {name: self._kinds[name] for name in self._noise}
        return NoiseReport(self.noise(), {n: rates[n] for n in kinds}, kinds, self.measured)

    # --- state ----------------------------------------

    def extra_state(self) -> dict[str, Any]:
        """Averages, kept gradients and geometries by name."""
        return {
            "noise": {name: value.clone() for name, value in self._noise.items()},
            "other": {name: value.clone() for name, value in self._other.items()},
            "kinds": dict(self._kinds),
            "measured": self.measured,
        }

    def check_extra_state(self, state: Mapping[str, Any]) -> None:
        """Check the parts, whose names are whatever was measured."""
        reference = {"noise": {}, "other": {}, "kinds": {}, "measured": 0}
        check_state(f"{self.name}.state", state, reference, open_keys=("noise", "other", "kinds"))
        unknown = (set(state["noise"]) | set(state["other"])) - set(state["kinds"])
        tensors = [*state["noise"].values(), *state["other"].values()]
        if unknown or not all(isinstance(tensor, Tensor) for tensor in tensors):
            raise StateError(
                f"{self.name}: state must hold tensors of known layers, got {sorted(unknown)} besides."
            )

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take over copies."""
        self._noise = {name: value.clone() for name, value in state["noise"].items()}
        self._other = {name: value.clone() for name, value in state["other"].items()}
        self._kinds = dict(state["kinds"])
        self.measured = int(state["measured"])
