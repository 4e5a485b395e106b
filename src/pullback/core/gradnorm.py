"""GradNorm: loss weights that equalise training rates by the norms of the tasks' gradients (a baseline of studies)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, final

import torch
from torch import Tensor

from pullback.core.checks import NonFiniteError, floating, integer, non_negative, positive, shown
from pullback.core.state import check_state

FORMAT_VERSION = 1

_BETAS = (0.9, 0.999)
_EPS = 1e-8
_FLOOR = 1e-6
"""Smallest weight before renormalisation: an additive step could reach zero, from where a loss never returns."""


@final
class GradNorm:
    r"""Adaptive loss weights of Chen et al. (2018), "GradNorm", arXiv 1711.02257.

    With the unweighted gradient norms :math:`n_i = \|\nabla_W L_i\|_2` on the shared parameters ``W`` (usually the
    last shared layer), every call takes one step on the weights:

    * :math:`G_i = w_i n_i`, :math:`\bar G = \mathrm{mean}_i\, G_i`;
    * :math:`\tilde r_i = L_i / L_i(0)`, with the losses of the first call as :math:`L_i(0)`, and
      :math:`r_i = \tilde r_i / \mathrm{mean}_j\, \tilde r_j`, the relative inverse training rate;
    * targets :math:`T_i = \bar G\, r_i^\alpha` (eq. 1), held constant;
    * :math:`L_\mathrm{grad} = \sum_i |G_i - T_i|` (eq. 2), whose gradient is
      :math:`\partial / \partial w_i = n_i\, \mathrm{sign}(G_i - T_i)`;
    * one step of Adam (betas 0.9 and 0.999, eps 1e-8), and :math:`w \leftarrow w\, N / \sum_j w_j`.

    Adam rather than SGD because its step does not depend on the unit of the gradients; the renormalisation leaves its
    moments alone. Weights stay at 1e-6 or above before the renormalisation.

    A task whose loss has been zero in all calls has no training rate yet and counts as one that stands still
    (:math:`\tilde r_i = 1`); its first positive loss becomes its :math:`L_i(0)`. When all losses are zero, all
    rates are equal. Under data parallelism hand over losses and norms that are reduced, so that ranks agree.

    Cost: ``O(tasks)`` and one read of the device per call, for the test of the arguments. The norms are the caller's.

    Args:
        tasks: number of losses N.
        asymmetry: the paper's alpha, >= 0: how strongly slow tasks are pulled back; 0 equalises the norms.
        lr: learning rate of the weights, > 0.

    Attributes:
        weights: the weights ``[tasks]``, positive, with sum ``tasks``; float32, or float64 when an argument was.
        steps: number of updates so far.

    Raises:
        TypeError: if ``tasks`` is no integer or another argument no number.
        ValueError: if ``tasks`` < 1, ``asymmetry`` < 0 or ``lr`` <= 0.

    Example:
        >>> balance = GradNorm(tasks=2, lr=0.1)
        >>> losses, norms = torch.tensor([2.0, 3.0]), torch.tensor([10.0, 1.0])
        >>> balance.update(losses, norms)
        tensor([0.9000, 1.1000])
        >>> total = (balance.weights * losses).sum()
    """

    def __init__(self, tasks: int, *, asymmetry: float = 1.5, lr: float = 1e-3) -> None:
        self.tasks = integer("tasks", tasks, minimum=1, fix="Give the number of losses.")
        self.asymmetry = non_negative("asymmetry", asymmetry, fix="Use 0 to equalise the gradient norms.")
        self.lr = positive("lr", lr)
        self.steps = 0
        self.weights = torch.ones(self.tasks)
        self._initial = torch.zeros(self.tasks)  # 0: no positive loss seen yet
        self._moments = torch.zeros(2, self.tasks)

    @torch.no_grad()
    def update(self, losses: Tensor, norms: Tensor) -> Tensor:
        """Take one step on the weights.

        Args:
            losses: unweighted losses ``[tasks]``, >= 0; a graph behind them is ignored.
            norms: Euclidean norms ``[tasks]`` of the gradients of the *unweighted* losses with respect to the
                shared parameters.

        Returns:
            The new weights ``[tasks]``, also at ``weights``; later updates make new tensors and leave it alone.

        Raises:
            TypeError: if an argument is no floating tensor.
            ValueError: if a shape is not ``[tasks]``, or a loss or norm is negative.
            NonFiniteError: if a loss or norm is NaN or Inf, or so large that the step overflows. After any error
                nothing has changed.
        """
        losses = floating("losses", losses, shape=(self.tasks,), fix="Use torch.stack([loss_a, loss_b]).")
        norms = floating("norms", norms, shape=(self.tasks,), fix="Give one norm per loss.")
        dtype = self.weights.dtype  # float32 from the start
        for tensor in (losses, norms):
            dtype = torch.promote_types(dtype, tensor.dtype)
        given = torch.stack([each.to(losses.device, dtype) for each in (losses, norms)])
        weights, initial, moments = (
            tensor.to(losses.device, dtype) for tensor in (self.weights, self._initial, self._moments)
        )
        initial = torch.where(initial > 0, initial, given[0])
        gradient = _gradient(weights, *given, initial, self.asymmetry)
        weights, moments = self._step(weights, moments, gradient)
        sound = (
            (given >= 0).all() & given.isfinite().all() & weights.isfinite().all() & moments.isfinite().all()
        )
        if not sound:  # the one read of the device
            self._refuse(*given)
        self.weights, self._initial, self._moments = weights, initial, moments
        self.steps += 1
        return self.weights

    def _step(self, weights: Tensor, moments: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """One step of Adam and the renormalisation; returns new weights and moments."""
        first, second = _BETAS
        t = self.steps + 1
        mean = first * moments[0] + (1 - first) * gradient
        square = second * moments[1] + (1 - second) * gradient.square()
        step = mean / (1 - first**t) / ((square / (1 - second**t)).sqrt() + _EPS)
        weights = (weights - self.lr * step).clamp_min(_FLOOR)
        return weights * (self.tasks / weights.sum()), torch.stack([mean, square])

    def _refuse(self, losses: Tensor, norms: Tensor) -> None:
        """Say what is wrong with the arguments; reads the device at leisure."""
        for name, tensor in (("losses", losses), ("norms", norms)):
            for task, value in enumerate(tensor.tolist()):
                if value < 0:
                    fix = (
                        "Shift the loss by its lower bound." if name == "losses" else "Give Euclidean norms."
                    )
                    raise ValueError(f"{name}[{task}] must be >= 0, got {value}. {fix}")
                if not tensor[task].isfinite():
                    raise NonFiniteError(
                        f"{name}[{task}] must be finite, got {value}. Leave this step out, or look at the loss."
                    )
        raise NonFiniteError(
            f"losses and norms must be small enough to be squared in {losses.dtype}, got {shown(losses.tolist())} "
            f"and {shown(norms.tolist())}. Scale the losses down, or pass float64 tensors."
        )

    # --- state ----------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Versioned state: weights, first losses, moments and count (copies), not the settings."""
        return {
            "format_version": FORMAT_VERSION,
            "steps": self.steps,
            "weights": self.weights.clone(),
            "initial_losses": self._initial.clone(),
            "moments": self._moments.clone(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of :meth:`state_dict`, or nothing of it when any part does not fit.

        Raises:
            StateError: if the version is newer, or a key, type, number of tasks or dtype does not fit.
        """
        reference = self.state_dict()
        weights = state.get("weights") if isinstance(state, Mapping) else None
        if isinstance(weights, Tensor) and weights.dtype == torch.float64:  # what update promotes to
            reference = {k: v.double() if isinstance(v, Tensor) else v for k, v in reference.items()}
        check_state("GradNorm", state, reference, version=FORMAT_VERSION)
        self.steps = state["steps"]
        self.weights = state["weights"].clone()
        self._initial = state["initial_losses"].clone()
        self._moments = state["moments"].clone()

    def __repr__(self) -> str:
        return f"GradNorm(tasks={self.tasks}, asymmetry={self.asymmetry:g}, lr={self.lr:g})"


def _gradient(weights: Tensor, losses: Tensor, norms: Tensor, initial: Tensor, asymmetry: float) -> Tensor:
    """Gradient ``[tasks]`` of eq. 2 with respect to the weights, the targets of eq. 1 being constants."""
    started = initial > 0
    pace = torch.where(started, losses / torch.where(started, initial, 1.0), 1.0)
    mean = pace.mean()
    rates = torch.where(mean > 0, pace / torch.where(mean > 0, mean, 1.0), 1.0)
    weighted = weights * norms
    targets = weighted.mean() * rates**asymmetry
    return norms * torch.sign(weighted - targets)
