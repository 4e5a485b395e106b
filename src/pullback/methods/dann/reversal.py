"""The gradient reversal layer (Ganin et al. 2016, arXiv:1505.07818)."""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from pullback.core.buffers import ExactBuffers
from pullback.core.checks import finite, fraction, instance, integer, positive
from pullback.core.edit import edit_gradient
from pullback.core.kinds import Signal
from pullback.core.schedules import Schedule


def _reversed(grad: Tensor, lam: Tensor, *, limit: float | None) -> Tensor:
    """``-lam`` times the gradient, then the clip."""
    back = (grad * -lam).to(grad.dtype)  # the cast matters for 0-dim gradients only
    return back if limit is None else _clipped(back, limit)


def _clipped(grad: Tensor, limit: float) -> Tensor:
    """Scale ``grad`` down to norm ``limit``; bitwise unchanged when its norm is smaller."""
    dtype = torch.float64 if grad.dtype == torch.float64 else torch.float32
    norm = torch.linalg.vector_norm(grad, dtype=dtype)
    return (grad * (limit / norm.clamp_min(limit))).to(grad.dtype)


def _differentiable(name: str, value: object) -> Tensor:
    x = instance(name, value, Tensor, fix="Pass the features as one tensor.")
    if not x.is_floating_point():
        raise TypeError(f"{name} must be a floating tensor, got dtype {x.dtype}. Convert it with .float().")
    return x


def reverse_gradient(x: Tensor, lam: float | Tensor, *, clip: float | None = None) -> Tensor:
    r"""Return ``x``; its gradient is multiplied by ``-lam`` on the way back (paper eq. 16-17).

    Args:
        x: any floating tensor.
        lam: strength, a number or a 0-dim tensor; 0 stops the gradient (zeros, not None), -1 is the identity.
        clip: largest norm of the reversed gradient of ``x`` as a whole, in the units that backward sees (a loss
            scale included); None: no limit.

    Returns:
        A view of ``x``, of the same shape and dtype.

    Raises:
        TypeError: if ``x`` is no floating tensor.
        ValueError: if ``lam`` is not finite or no scalar, or ``clip`` is not > 0.
    """
    x = _differentiable("x", x)
    limit = None if clip is None else positive("clip", clip)
    if not isinstance(lam, Tensor):
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        lam = torch.full((), finite("lam", lam), dtype=wide, device=x.device)
    elif lam.dim() > 0:
        raise ValueError(
            f"lam must be a number or a 0-dim tensor, got shape {tuple(lam.shape)}. Reverse parts of x separately."
        )
    return edit_gradient(x, partial(_reversed, limit=limit), lam)


@final
class GradientReversal(ExactBuffers, Signal):
    r"""Identity whose gradient comes back multiplied by :math:`-\lambda` (paper eq. 16-17).

    Put it between the features and the domain head, and add the domain loss to the total with weight 1: the head
    then learns at full strength and only the features see :math:`\lambda` (paper eq. 13-15 as used in all its deep
    experiments). There are no parameters and training and evaluation do not differ.

    ``lam`` is a 0-dim float32 buffer: it is in ``state_dict``, changing it recompiles nothing and no step reads it
    back to the host. Every forward takes ``lam`` as it is at that moment.

    Args:
        lam: strength: a number, or a schedule of the progress in [0, 1] such as ``schedules.dann(gamma=10)``.
        clip: largest norm of the reversed gradient (see `reverse_gradient`); None: no limit.

    Shape:
        Any shape in, the same shape out.

    Raises:
        TypeError: if ``lam`` is neither a number nor callable.
        ValueError: if ``lam`` is not finite or ``clip`` is not > 0.

    Example:
        >>> grl = GradientReversal(lam=0.5)
        >>> x = torch.ones(2, requires_grad=True)
        >>> grl(x).sum().backward()
        >>> x.grad
        tensor([-0.5000, -0.5000])
    """

    lam: Tensor
    position: Tensor

    def __init__(self, lam: float | Schedule = 1.0, *, clip: float | None = None) -> None:
        super().__init__()
        self.schedule: Schedule | None = None if isinstance(lam, int | float) or not callable(lam) else lam
        self.clip = None if clip is None else positive("clip", clip)
        start = finite("lam", lam) if self.schedule is None else finite("lam(0)", self.schedule(0.0))
        self.register_buffer("lam", torch.tensor(start, dtype=torch.float32))
        self.register_buffer("position", torch.tensor(0.0, dtype=torch.float32))
        self._at = 0.0  # what position holds, so that step() need not read a device

    def forward(self, x: Tensor) -> Tensor:
        """Return a view of ``x`` (any shape) whose gradient will be reversed."""
        # The clone (of one number) keeps backward right when lam moves on between forward and backward.
        return edit_gradient(_differentiable("x", x), partial(_reversed, limit=self.clip), self.lam.clone())

    def progress(self, p: float) -> None:
        """Move to progress ``p`` in [0, 1] and set ``lam`` by the schedule (a fixed ``lam`` stays).

        Raises:
            ValueError: if ``p`` lies outside [0, 1] or the schedule's value is not finite.
        """
        at = fraction("p", p, fix="Divide the step by the number of steps.")
        if self.schedule is not None:
            self.lam.fill_(finite(f"lam({at:g})", self.schedule(at)))
        self.position.fill_(at)
        self._at = at

    def step(self, total: int) -> None:
        """Move on by one of ``total`` steps; call it once after every optimizer step. Ends at progress 1.

        Raises:
            ValueError: if ``total`` is below 1.
        """
        total = integer("total", total, minimum=1)
        done = round(self._at * total)
        self.progress(min(1.0, (done + 1) / total))

    def extra_repr(self) -> str:
        """Schedule or strength, and the clip."""
        strength = f"lam={self.schedule if self.schedule is not None else round(float(self.lam), 6)}"
        return strength if self.clip is None else f"{strength}, clip={self.clip}"

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._at = 0.0 if self.position.is_meta else float(self.position)
