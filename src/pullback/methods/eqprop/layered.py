"""Layered networks with symmetric connections: energies, forces and layer minimisers in closed form.

E(x, s) = sum_k G(s_k) - Phi(x, s) with Phi = sum_k <s_k, c_k(s_{k-1})>, s_0 = x. c_k is an affine map (dense, or a
convolution with pooling), G belongs to the activation: G' is the inverse of sigma. Stationary states obey
s_k = sigma(dPhi/ds_k), and given its neighbours sigma(dPhi/ds_k) is the exact minimiser of layer k.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn

from pullback.core.checks import choice, integer, positive
from pullback.core.costs import Cost, SquaredError
from pullback.core.potentials import ACTIVATIONS, ActivationName
from pullback.core.two_way import Conv, Dense
from pullback.methods.eqprop.energies import EnergyModel, Nudge, States, settle

NEWTON_STEPS = 4


# --- networks ------------------------------------------------------------------------------------------------------


class LayeredEnergy(EnergyModel):
    """A chain of connections and activations; `HopfieldMLP` and `HopfieldConvNet` build them.

    Args:
        connections: `Dense` or `Conv`, from the input upwards.
        activations: name of the activation of every state above a connection.
        readout: classes of a linear read-out outside of the dynamics (for ``cost="cross_entropy"``), or None.
        units: units of the last state, for the read-out.
    """

    closed_form = True

    def __init__(
        self,
        connections: Sequence[Dense | Conv],
        activations: Sequence[str],
        *,
        readout: int | None = None,
        units: int = 0,
    ) -> None:
        super().__init__()
        self.connections: Any = nn.ModuleList(connections)
        self.names = [choice("activation", name, ACTIVATIONS) for name in activations]
        self.activations = [ACTIVATIONS[name] for name in self.names]
        self.readout = None if readout is None else nn.Linear(units, integer("readout", readout, minimum=1))
        last = len(self.names) - 1
        even, odd = range(0, last + 1, 2), range(1, last + 1, 2)
        self._up = [*even, *odd]  # a free phase begins beside the input, a nudged one at the output
        self._down = [*odd, *even] if last % 2 else self._up

    @property
    def is_holomorphic(self) -> bool:
        """Whether states may be complex: no clipping and no maximum."""
        return all(each.bounds is None for each in self.activations) and all(
            getattr(each, "pool", "") != "max" for each in self.connections
        )

    @property
    def is_clipped(self) -> bool:
        """Whether an activation clips."""
        return any(each.bounds is not None for each in self.activations)

    def shapes(self, x: Tensor) -> list[tuple[int, ...]]:
        """Shape of every state of one example."""
        shape, found = tuple(x.shape[1:]), []
        for each in self.connections:
            shape = each.shape(shape)
            found.append(shape)
        return found

    def energy(self, x: Tensor, states: States) -> Tensor:
        """E for each example."""
        total, below = 0.0, x
        for each, act, s in zip(self.connections, self.activations, states, strict=True):
            value = act.potential(s) - s * each(below)  # no conjugate: E stays holomorphic
            total, below = total + value.flatten(1).sum(1), s
        return torch.as_tensor(total)

    def hold(self, x: Tensor) -> Tensor:
        """Drive of the first state by the input, the most expensive product of all."""
        return self.connections[0](x)

    def drive(self, held: Tensor, states: States, k: int) -> Tensor:
        """dPhi/ds_k, k counted from 0."""
        layers = self._layers  # not called as modules: at 20 steps a batch the hooks' bookkeeping would show
        total = held if k == 0 else layers[k].forward(states[k - 1])
        if k + 1 < len(states):
            total = layers[k + 1].back(total, states[k + 1], states[k])
        return total

    @property
    def _layers(self) -> list[Any]:
        return list(self.connections._modules.values())

    def sweep(
        self, held: Any, states: States, nudge: Nudge | None, minimizer: str, step_size: float
    ) -> States:
        """One Euler step of all layers, or exact minimisers of every second layer and then of the others."""
        last, new = len(states) - 1, list(states)
        if minimizer == "async":
            for k in self._up if nudge is None else self._down:
                new[k] = self._minimiser(self.drive(held, new, k), new[k], k, nudge if k == last else None)
            return new
        for k, s in enumerate(states):
            total, act = self.drive(held, states, k), self.activations[k]
            if nudge is not None and k == last:
                total = total - nudge.force(s.flatten(1)).view_as(s)
            if act.curvature is None:  # preconditioned by G'', which is infinite where sigma saturates
                new[k] = torch.lerp(s, act.call(total), step_size) if not s.is_complex() else (
                    s + step_size * (act.call(total) - s))  # fmt: skip
            else:
                moved = s.mul(1.0 - step_size * act.curvature).add_(total, alpha=step_size)
                new[k] = moved if act.bounds is None else moved.clamp(*act.bounds)
        return new

    def _minimiser(self, total: Tensor, state: Tensor, k: int, nudge: Nudge | None) -> Tensor:
        """Argmin over s_k of F; with another cost than the squared error one step of its fixed point."""
        act = self.activations[k]
        if nudge is None:
            return act.call(total)
        if not isinstance(nudge.cost, SquaredError):
            return act.call(total - nudge.force(state.flatten(1)).view_as(state))
        beta, y, flat = nudge.beta, nudge.target, total.flatten(1)
        if act.curvature is not None:  # a s^2/2 - d s + beta (s - y)^2/2
            best = (flat + nudge.pushed) * nudge.shrink if act.curvature == 1.0 else (
                (flat + nudge.pushed) / (act.curvature + beta))  # fmt: skip
            return (best if act.bounds is None else best.clamp(*act.bounds)).view_as(total)
        u = flat
        for _ in range(NEWTON_STEPS):  # u - d + beta (sigma(u) - y) = 0
            s = act.call(u)
            u = u - (u - flat + beta * (s - y)) / (1.0 + beta * act.slope(s))
        return act.call(u).view_as(total)

    def contrast(self, x: Tensor, free: States, nudged: States, weights: Tensor) -> list[Tensor | None]:
        """As in `EnergyModel`; for dense layers in closed form, differences of states before products of them.

        dE/dW_k = - s_k s_{k-1}^T, and s t^T - s_0 t_0^T = s (t - t_0)^T + (s - s_0) t_0^T.
        """
        if not all(isinstance(each, Dense) for each in self.connections):
            return super().contrast(x, free, nudged, weights)
        count, grads = len(x), {}
        scale = -weights / count
        below, gap = x.flatten(1), None
        for each, s0, s in zip(self.connections, free, nudged, strict=True):
            stacked = s.view(len(weights), count, -1)
            delta = stacked - s0
            mean = _real((delta * scale.view(-1, 1, 1)).sum(0))
            grad = mean.T @ below
            if gap is not None:
                _add_product_(grad, (stacked * scale.view(-1, 1, 1)).flatten(0, 1), gap)
            grads[each.weight], grads[each.bias] = grad, mean.sum(0)
            below, gap = s0, delta.flatten(0, 1)
        return [grads.get(p) if p.requires_grad else None for p in self.parameters()]

    def adjoint(self, states: States, pull: Tensor, steps: int) -> States:
        """Lambda = (1 - D J)^-1 D dC/ds by sweeps (recurrent back-propagation): D = sigma', J = d2Phi/ds2."""
        slopes = [act.slope(s) for act, s in zip(self.activations, states, strict=True)]
        found = [torch.zeros_like(s) for s in states]
        last = len(states) - 1
        for _ in range(steps):
            for k in self._down:
                total = torch.zeros_like(states[k])
                if k:
                    total = self.connections[k].tangent(found[k - 1], states[k - 1])
                if k < last:
                    total = self.connections[k + 1].back(total, found[k + 1], states[k])
                else:
                    total = total + pull.view_as(states[k])
                found[k] = slopes[k] * total
        return found

    def exact(
        self, x: Tensor, free: States, cost: Cost, target: Tensor, steps: int, tolerance: float = 0.0
    ) -> list[Tensor | None]:
        """Batch mean of lambda^T d2Phi/(ds dtheta), lambda after ``steps`` sweeps of `adjoint`, for every parameter."""
        del tolerance
        output = self.output(free)
        moved = self.adjoint(free, cost.pull(output, target), steps)
        wanted = [p for p in self.connections.parameters() if p.requires_grad]
        with torch.enable_grad():
            total, below, other = torch.zeros((), device=x.device), x, None
            for each, s, change in zip(self.connections, free, moved, strict=True):
                total = total + (change * each(below)).sum()
                if other is not None:
                    total = total + (s * each.tangent(other, below)).sum()
                below, other = s, change
            found = torch.autograd.grad(total / len(x), wanted) if wanted else ()
        grads = dict(zip(wanted, found, strict=True))
        grads |= cost.gradients(output, target, torch.full_like(output[:, :1], 1.0 / len(x)))
        return [grads.get(p) if p.requires_grad else None for p in self.parameters()]

    def check_nudge(self, estimator: str, beta: float, cost: Cost, minimizer: str, *, in_plane: bool) -> None:
        """As in `EnergyModel`; also a nudge that outweighs the energy, and complex states that are clipped.

        Raises:
            ValueError: in these two cases.
        """
        super().check_nudge(estimator, beta, cost, minimizer, in_plane=in_plane)
        limit = self.activations[-1].curvature or 1.0
        away = estimator not in {"positive", "implicit"} and isinstance(cost, SquaredError)
        if away and minimizer == "async" and beta >= limit:
            raise ValueError(
                f"beta must be < {limit:g} where the output is nudged away from its target, got {beta:g}: E - beta C "
                "has no minimum there. Lower beta, or use minimizer='euler' and few steps."
            )
        if in_plane and not self.is_holomorphic:
            raise ValueError(
                f"activation must be holomorphic for nudges in the complex plane, got {', '.join(self.names)}. Use "
                "'sigmoid' or 'tanh' (and pool='avg'), or estimator='centered'."
            )

    def movable(self, states: States) -> States:
        """Where units are free to move: sigma' is not 0."""
        return [act.slope(s) > 0.0 for act, s in zip(self.activations, states, strict=True)]

    def layer_groups(self, lrs: Sequence[float]) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer, a learning rate for every connection and, at last, for the read-out.

        Raises:
            ValueError: if there is another number of rates than of layers.
        """
        layers = [*self.connections, *([] if self.readout is None else [self.readout])]
        if len(lrs) != len(layers):
            raise ValueError(
                f"lrs must hold {len(layers)} rates, one for each layer, got {len(lrs)}. Add or drop some."
            )
        return [
            {"params": list(each.parameters()), "lr": positive("lrs", lr)}
            for each, lr in zip(layers, lrs, strict=True)
        ]

    @torch.no_grad()
    def predict(self, x: Tensor, steps: int = 60) -> Tensor:
        """Outputs (or logits of the read-out) [batch, classes] after a free phase of ``steps`` sweeps."""
        count = integer("steps", steps, minimum=1)
        begin = self.initial(x)  # before the drive, because it refuses inputs of another shape
        return self.prediction(settle(self, self.hold(x), begin, None, count, "async", 0.5).states)

    def extra_repr(self) -> str:
        """Activations."""
        return ", ".join(self.names)


def _real(value: Tensor) -> Tensor:
    return value.real if value.is_complex() else value


def _add_product_(total: Tensor, upper: Tensor, lower: Tensor) -> None:
    """``total`` += Re(upper^T lower)."""
    total.addmm_(_real(upper).T, _real(lower))
    if upper.is_complex():
        total.addmm_(upper.imag.T, lower.imag, alpha=-1.0)


class HopfieldMLP(LayeredEnergy):
    """Dense layers whose weights act up and down (arXiv:1602.05179, clamped input, rho a clip).

    Args:
        sizes: inputs, units of every layer, outputs; inputs of more than one dimension are flattened.
        activation: of every layer.
        output_activation: of the last one; default: as the others.
        readout: classes of a linear read-out for ``cost="cross_entropy"``; the last layer is then a hidden one.
        gain: of Glorot's uniform initialisation.

    Raises:
        ValueError: if a size is below 1 or there are fewer than two, or the activation is unknown.

    Example:
        >>> net = HopfieldMLP([4, 8, 3])
        >>> net.predict(torch.zeros(2, 4)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        sizes: Sequence[int],
        activation: ActivationName = "hard_sigmoid",
        *,
        output_activation: ActivationName | None = None,
        readout: int | None = None,
        gain: float = 1.0,
    ) -> None:
        widths = [integer("sizes", size, minimum=1) for size in sizes]
        if len(widths) < 2:
            raise ValueError(
                f"sizes must hold inputs and outputs at least, got {widths}. Pass [784, 256, 10]."
            )
        scale = positive("gain", gain)
        layers = [Dense(a, b, gain=scale) for a, b in pairwise(widths)]
        names = [activation] * (len(layers) - 1) + [output_activation or activation]
        super().__init__(layers, names, readout=readout, units=widths[-1])


class HopfieldConvNet(LayeredEnergy):
    """Convolutions with pooling, then a dense output layer (arXiv:2101.05536).

    Args:
        image: channels, height and width of the input.
        channels: of every convolution.
        outputs: units of the dense layer above; 0 for none (with a read-out).
        activation: of every layer.
        kernel: odd size of all kernels.
        pool: "max", "avg" or "none", by 2 after every convolution.
        readout: classes of a linear read-out for ``cost="cross_entropy"``.
        gain: of Glorot's uniform initialisation.

    Raises:
        ValueError: if a number is out of range, the image is too small for the pooling, or nothing lies above.

    Example:
        >>> net = HopfieldConvNet((1, 8, 8), [4], outputs=3)
        >>> net.predict(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        image: tuple[int, int, int],
        channels: Sequence[int],
        outputs: int = 10,
        *,
        activation: ActivationName = "half_hard_sigmoid",
        kernel: int = 3,
        pool: Literal["max", "avg", "none"] = "max",
        readout: int | None = None,
        gain: float = 1.0,
    ) -> None:
        scale, shape = positive("gain", gain), tuple(integer("image", each, minimum=1) for each in image)
        layers: list[Dense | Conv] = []
        for count in channels:
            layer = Conv(
                shape[0], integer("channels", count, minimum=1), kernel=kernel, pool=pool, gain=scale
            )
            shape = layer.shape(shape)
            layers.append(layer)
        units = shape[0] * shape[1] * shape[2]
        if units == 0 or not layers:
            raise ValueError(
                f"channels must fit the image {image}, got {list(channels)}. Take fewer layers, or pool='none'."
            )
        if integer("outputs", outputs, minimum=0):
            layers.append(Dense(units, outputs, gain=scale))
            units = outputs
        elif readout is None:
            raise ValueError("outputs must be > 0 where there is no read-out, got 0. Pass readout=10.")
        super().__init__(layers, [activation] * len(layers), readout=readout, units=units)
