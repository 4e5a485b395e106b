"""Flow maps: networks that jump along the probability flow, learned directly, for sampling in one to four calls.

A flow map ``G(x, s, t)`` takes the state at time s to the one at t <= s; ``G(x, s, s) = x`` and jumps compose. MeanFlow
(Geng et al. 2025, arXiv:2505.13447) learns the average velocity between two times, a consistency model (Song et al.
2023, arXiv:2303.01469) the jump to t = 0. Both as in Lai et al. 2025 (arXiv:2510.21890), on any Gaussian path.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pullback.core.buffers import ExactBuffers
from pullback.core.checks import choice, fraction, instance, integer, non_negative, positive
from pullback.core.field_network import call_network, data_of, per_row, state_of
from pullback.core.forward_mode import directional
from pullback.core.gaussian_path import GaussianPath, Number
from pullback.core.kinds.field import Field
from pullback.core.prediction import GaussianField, edm_coefficients
from pullback.core.streams import generator as stream

_SMALLEST = 1e-8  # beside a squared error whose root is taken


class FlowMap(nn.Module, Field):
    """Base of flow maps: ``G(x, s, t, **cond)`` with states [batch, ...] and times that are numbers, 0-dim, or [batch].

    Args:
        net: the network.
        path: the path.
    """

    def __init__(self, net: nn.Module, path: GaussianPath) -> None:
        super().__init__()
        self.net = instance("net", net, nn.Module, fix="Wrap a function in a module.")
        self.path = instance("path", path, GaussianPath, fix="Use GaussianPath.linear(), for example.")

    def extra_repr(self) -> str:
        """What is shown beside the network."""
        return f"path={self.path!r}"

    def _times(self, x: Tensor, *times: Number) -> list[Tensor]:
        """Every time as a tensor [batch] in the dtype of ``x``, checked against the path."""
        found = []
        for time in times:
            self.path(time)  # refuses what is outside
            found.append(torch.as_tensor(time, dtype=x.dtype, device=x.device).expand(len(x)))
        return found

    def _noise(self, shape: Sequence[int], seed: int, number: int, like: Tensor | None = None) -> Tensor:
        """Draw ``number`` of the stream of a seed, on the network's device."""
        parameter = next(self.net.parameters(), torch.zeros(())) if like is None else like
        device, dtype = (
            parameter.device,
            parameter.dtype if parameter.dtype == torch.float64 else torch.float32,
        )
        drawn = stream("diffusion.flowmap", integer("seed", seed), number, device=device)
        return torch.randn(tuple(shape), generator=drawn, device=device, dtype=dtype)


class MeanFlow(FlowMap):
    """A network for the average velocity h between two times; the jump is ``G(x, s, t) = x + (t - s) h(x, s, t)``.

    Args:
        net: called as ``net(x, s, t, **cond)`` with times [batch], t <= s.
        path: the path.

    Example:
        >>> class Net(torch.nn.Module):
        ...     def forward(self, x, s, t):
        ...         return x * (s + t).unsqueeze(1)
        >>> flow = MeanFlow(Net(), GaussianPath.linear())
        >>> flow.sample((4, 2), steps=1).shape
        torch.Size([4, 2])
    """

    def forward(self, x: Tensor, s: Number, t: Number, **cond: Any) -> Tensor:
        """The state at time ``t`` from the state ``x`` at time ``s``."""
        x = state_of(x)
        first, second = self._times(x, s, t)
        return x + _over(second - first, x) * call_network(self.net, x, (first, second), cond)

    def average_velocity(self, x: Tensor, s: Number, t: Number, **cond: Any) -> Tensor:
        """h(x, s, t); at s = t the velocity of the probability flow."""
        x = state_of(x)
        return call_network(self.net, x, self._times(x, s, t), cond)

    def loss(
        self,
        x0: Tensor,
        *,
        generator: torch.Generator,
        same: float = 0.5,
        power: float = 0.0,
        small: float = 1e-3,
        derivative: Literal["forward", "difference"] = "forward",
        **cond: Any,
    ) -> Tensor:
        """Squared residual of the identity h = v - (s - t) d/ds h along the path, the mean over entries and rows.

        The state is ``x_s = alpha x0 + sigma eps``, its velocity ``alpha' x0 + sigma' eps``, and the right side of the
        identity is a constant to the gradient. Rows with t = s are plain flow matching and need no derivative: only the
        others are differentiated, without a graph.

        Args:
            x0: data [batch, ...].
            generator: where times and noise come from; another one on every rank.
            same: share of the rows with t = s.
            power: p of the weight 1 / (||error||^2 + c)^p of every row, with ||.||^2 the sum over entries.
            small: c of that weight.
            derivative: "forward": a forward-mode product, with attention in torch's plain form, which alone has one;
                "difference": central differences, for networks with operations that have none.
            **cond: conditions, handed to the network.

        Raises:
            TypeError: if there is no generator.
            ValueError: if an argument is out of range, or the batch empty.
            RuntimeError: from torch, if the network has no forward-mode derivative; take "difference".
        """
        x0 = data_of(x0)
        size, generator = len(x0), instance("generator", generator, torch.Generator)
        choice("derivative", derivative, ("forward", "difference"))
        s, t = _two_times(self.path, size, round(fraction("same", same) * size), generator, x0)
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=generator.device).to(
            x0.device
        )
        at = self.path(s).over(x0)
        x = at.alpha * x0 + at.sigma * eps
        velocity = at.dalpha * x0 + at.dsigma * eps
        found = call_network(self.net, x, (s, t), cond)
        apart = size - round(same * size)  # the rows whose two times differ come first
        target = velocity.clone()
        if apart:
            part = {name: each[:apart] if per_row(each, size) else each for name, each in cond.items()}
            rise = self._along(x[:apart], s[:apart], t[:apart], velocity[:apart], part, derivative)
            target[:apart] -= _over(s[:apart] - t[:apart], x) * rise
        error = (found - target).square().flatten(1)
        if non_negative("power", power) == 0.0:
            return error.mean()
        scale = (error.detach().sum(1) + positive("small", small)) ** -power
        return (error.mean(1) * scale).mean()

    @torch.no_grad()
    def _along(
        self, x: Tensor, s: Tensor, t: Tensor, velocity: Tensor, cond: Mapping[str, Any], how: str
    ) -> Tensor:
        """d/ds h(x_s, s, t) along the path, (dh/dx) v + dh/ds."""

        def average(x: Tensor, s: Tensor) -> Tensor:
            return call_network(self.net, x, (s, t), cond)

        if how == "forward":
            with sdpa_kernel(SDPBackend.MATH):
                return directional(average, (x, s), (velocity, torch.ones_like(s)))[1]
        step = torch.finfo(x.dtype).eps ** (1 / 3)
        ahead = average(x + step * velocity, s + step)
        return (ahead - average(x - step * velocity, s - step)) / (2 * step)

    def sample(
        self,
        shape: Sequence[int] | None = None,
        *,
        steps: int = 1,
        x: Tensor | None = None,
        seed: int = 0,
        cond: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Samples by ``steps`` jumps of equal time, one call each, without a graph.

        Args:
            shape: of the samples, [batch, ...]; not needed with ``x``.
            steps: number of jumps.
            x: states at the end of the path; noise unless given.
            seed: of the noise.
            cond: conditions, handed to the network.
        """
        steps, end = integer("steps", steps, minimum=1), self.path.end
        with torch.no_grad():
            x = (
                self._noise(_shape(shape, x), seed, 0) * float(self.path(end).sigma)
                if x is None
                else state_of(x)
            )
            for i in range(steps):
                x = self(x, end * (steps - i) / steps, end * (steps - i - 1) / steps, **(cond or {}))
        return x


class ConsistencyMap(ExactBuffers, FlowMap):
    """A network for the jump to the data, ``f(x, s) = c_skip x + c_out F``, which is the identity at s = 0 by its form.

    Coefficients are those of `edm_coefficients`; the network is called as F = ``net(c_in x, s, **cond)``.

    Args:
        net: the network.
        path: the path.
        sigma_data: standard deviation of the data.
        levels: number of times at which neighbours are compared, from the path's ``last`` to 0.
    """

    def __init__(
        self, net: nn.Module, path: GaussianPath, *, sigma_data: float = 0.5, levels: int = 40
    ) -> None:
        super().__init__(net, path)
        self.sigma_data = positive("sigma_data", sigma_data)
        self.levels = integer("levels", levels, minimum=2)
        times = torch.tensor(path.grid(self.levels, "karras"))
        self.times: Tensor
        self.register_buffer("times", times, persistent=False)

    def forward(self, x: Tensor, s: Number, t: Number = 0.0, **cond: Any) -> Tensor:
        """The data that belong to the state ``x`` at time ``s``, [batch, ...].

        Args:
            x: states [batch, ...].
            s: time of ``x``.
            t: time to jump to; a consistency map knows 0 alone.
            **cond: conditions, handed to the network.

        Raises:
            ValueError: if ``t`` is not 0.
        """
        if isinstance(t, Tensor) or t != 0.0:
            raise ValueError(
                f"t must be 0 for a consistency map, got {t!r:.40}. Use MeanFlow to jump to other times."
            )
        x = state_of(x)
        at = self.path(s).over(x)
        skip, out, scale = edm_coefficients(at, self.sigma_data)
        return x * skip + call_network(self.net, x * scale, self._times(x, s), cond) * out

    def loss(
        self,
        x0: Tensor,
        *,
        generator: torch.Generator,
        teacher: GaussianField | None = None,
        huber: float | None = None,
        **cond: Any,
    ) -> Tensor:
        """Distance of f at neighbouring times of one trajectory; the later-in-sampling one is a constant.

        Args:
            x0: data [batch, ...].
            generator: where times and noise come from; another one on every rank.
            teacher: a model whose DDIM step gives the neighbour; without one it is made of the same data and noise.
            huber: c of the distance sqrt(||.||^2 + c^2) - c; the mean square unless given.
            **cond: conditions, handed to network and teacher.

        Raises:
            TypeError: if there is no generator.
            ValueError: if the batch is empty.
        """
        x0 = data_of(x0)
        generator = instance("generator", generator, torch.Generator)
        picks = torch.randint(self.levels, (len(x0),), generator=generator, device=generator.device).to(
            x0.device
        )
        eps = torch.randn(x0.shape, generator=generator, dtype=x0.dtype, device=generator.device).to(
            x0.device
        )
        s, t = (self.times[each].to(x0) for each in (picks, picks + 1))
        a, b = self.path(s).over(x0), self.path(t).over(x0)
        x = a.alpha * x0 + a.sigma * eps
        with torch.no_grad():
            clean = x0 if teacher is None else teacher(x, s, **cond).x0
            noise = eps if teacher is None else (x - a.alpha * clean) / a.sigma
            target = self(b.alpha * clean + b.sigma * noise, t, **cond)
        error = (self(x, s, **cond) - target).square().flatten(1)
        if huber is None:
            return error.mean()
        c = positive("huber", huber)
        return ((error.sum(1) + c * c + _SMALLEST).sqrt() - c).mean()

    def sample(
        self,
        shape: Sequence[int] | None = None,
        *,
        steps: int = 1,
        x: Tensor | None = None,
        seed: int = 0,
        cond: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """Samples by ``steps`` jumps to the data, with fresh noise of a smaller level between them.

        Args:
            shape: of the samples, [batch, ...]; not needed with ``x``.
            steps: number of jumps, one call each.
            x: states at the path's ``last`` time; noise unless given.
            seed: of all noise.
            cond: conditions, handed to the network.
        """
        steps = integer("steps", steps, minimum=1)
        times = self.path.grid(steps, "karras") if steps < 2 else self.path.grid(steps, "uniform")
        with torch.no_grad():
            x = (
                self._noise(_shape(shape, x), seed, 0) * float(self.path(times[0]).sigma)
                if x is None
                else state_of(x)
            )
            for i, time in enumerate(times[:-1]):
                if i:
                    x = self.path.corrupt(x, self._noise(x.shape, seed, i, like=x), time)
                x = self(x, time, **(cond or {}))
        return x


def _over(time: Tensor, x: Tensor) -> Tensor:
    return time.view(-1, *[1] * (x.dim() - 1))


def _shape(shape: Sequence[int] | None, x: Tensor | None) -> Sequence[int]:
    if shape is None and x is None:
        raise ValueError("shape must be given where x is not, got None. Write sample((64, 1, 28, 28)).")
    return shape or ()


def _two_times(
    path: GaussianPath, size: int, equal: int, generator: torch.Generator, like: Tensor
) -> tuple[Tensor, Tensor]:
    """Uniform s >= t in [0, end], the same number for both in the last ``equal`` rows."""
    drawn = torch.rand(2, size, generator=generator, device=generator.device).to(like) * path.end
    s, t = drawn.amax(0), drawn.amin(0)
    if equal:
        s[size - equal :] = t[size - equal :] = drawn[0, size - equal :]
    return s, t
