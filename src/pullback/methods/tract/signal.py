"""TrAct for layers of your own: the weight passes unchanged, its gradient comes back preconditioned."""

from __future__ import annotations

from functools import partial
from typing import Any, final

import torch
from torch import Tensor

from pullback.core.buffers import ExactBuffers
from pullback.core.checks import floating, fraction, positive
from pullback.core.edit import edit_gradient
from pullback.core.kinds import Signal
from pullback.core.schedules import Schedule
from pullback.methods.tract.covariance import Rows, Samples, precondition

LARGER = "The damping keeps the covariance invertible; the paper uses 0.1, and 0.05 to 0.2 for short to long training."


def precondition_input(
    weight: Tensor, x: Tensor, lam: float | Tensor = 0.1, *, process_group: Any = None
) -> Tensor:
    r"""Return ``weight``; its gradient is multiplied from the right by the inverse damped covariance of ``x``.

    With :math:`z = X W^\top` and :math:`G = \partial L / \partial z` of a loss averaged over the batch, the gradient
    :math:`G^\top X` comes back as :math:`G^\top X (X^\top X / b + \lambda I)^{-1}` (paper eq. 9): the change of W
    whose effect on z is nearest, in ridge regression, to a gradient step on z itself. Everything else, the gradient
    of ``x`` included, is that of the plain layer.

    Args:
        weight: [m, n], or [m, ...] with n entries in a row.
        x: samples [..., n]; every leading index is one of the b samples. Unfolded patches for a convolution.
        lam: damping :math:`\lambda` > 0, in the unit of the squared input; a number or a 0-dim tensor.
        process_group: average the covariance over the processes of this group (all must run the backward pass), or
            None.

    Returns:
        A view of ``weight``.

    Raises:
        TypeError: if ``weight`` or ``x`` is no real floating tensor or is sharded.
        ValueError: if ``lam`` is not finite and > 0 or no scalar, or ``x`` has other entries than a row of ``weight``.

    Example:
        >>> weight = torch.ones(1, 2, requires_grad=True)
        >>> x = torch.tensor([[3.0, 4.0]])
        >>> y = torch.nn.functional.linear(x, precondition_input(weight, x, lam=1.0))
        >>> torch.autograd.grad(y, weight)[0]  # one sample: x / (|x|^2 + lam)
        tensor([[0.1154, 0.1538]])
    """
    samples = _rows(weight, x)
    if not isinstance(lam, Tensor):
        wide = torch.float64 if torch.float64 in {weight.dtype, x.dtype} else torch.float32
        lam = torch.full((), positive("lam", lam, fix=LARGER), dtype=wide, device=weight.device)
    elif lam.dim() > 0:
        raise ValueError(
            f"lam must be a number or a 0-dim tensor, got shape {tuple(lam.shape)}. Pass one damping."
        )
    return preconditioned(weight, x, lam, samples, process_group)


def preconditioned(weight: Tensor, x: Tensor, lam: Tensor, samples: Samples, process_group: Any) -> Tensor:
    """The edit itself, nothing checked; a weight that gets no gradient passes as it is and keeps nothing."""
    if not (weight.requires_grad and torch.is_grad_enabled()):
        return weight
    if process_group is not None and torch.compiler.is_compiling():
        raise RuntimeError(
            "process_group must be None in a compiled region, got a group: the covariance is reduced in the middle of "
            "the backward pass. Leave the layer outside of torch.compile, or do not average its covariance."
        )
    return edit_gradient(weight, partial(precondition, samples=samples, process_group=process_group), x, lam)


def check_plain(name: str, tensor: object) -> Tensor:
    """Refuse what cannot be preconditioned: no tensor, not real and floating, sparse, sharded.

    Raises:
        TypeError: if it is one of these.
    """
    plain = floating(name, tensor)
    if plain.layout != torch.strided:
        raise TypeError(f"{name} must be dense, got layout {plain.layout}. Convert it with .to_dense().")
    if type(plain).__name__ == "DTensor":
        raise TypeError(
            f"{name} must be held whole in the forward pass, got a DTensor. Use fully_shard, which gathers weights, "
            "or DistributedDataParallel, instead of tensor parallelism on this layer."
        )
    return plain


def _rows(weight: object, x: object) -> Rows:
    weight, x = check_plain("weight", weight), check_plain("x", x)
    if weight.dim() < 2:
        raise ValueError(
            f"weight must have rows, got shape {tuple(weight.shape)}. Pass [m, n], or the kernel of a convolution."
        )
    width = weight[0].numel() if len(weight) else 1
    if x.dim() == 0 or x.shape[-1] != width:
        raise ValueError(
            f"x must have {width} entries in its last dimension, one for each entry of a row of weight, got shape "
            f"{tuple(x.shape)}. Pass the layer's input, unfolded for a convolution."
        )
    return Rows(max(width, 1))


@final
class TrAct(ExactBuffers, Signal):
    r"""`precondition_input` as a module with a damping that may move on during training.

    ``signal(weight, x)`` returns ``weight``. In evaluation mode, and with ``signal.enabled = False``, its gradient is
    the plain one. ``lam`` is a 0-dim float32 buffer: it is in ``state_dict``, and changing it recompiles nothing.
    `tract` installs one in a layer of torch.

    Args:
        lam: damping > 0: a number, or a schedule of the progress in [0, 1].
        process_group: see `precondition_input`.

    Shape:
        Weight [m, n] and samples [..., n] in, the weight out.

    Raises:
        TypeError: if ``lam`` is neither a number nor callable.
        ValueError: if ``lam`` is not finite and > 0.

    Example:
        >>> signal = TrAct(lam=0.1)
        >>> weight, x = torch.ones(3, 2, requires_grad=True), torch.ones(5, 2)
        >>> torch.equal(signal(weight, x), weight)
        True
    """

    lam: Tensor

    def __init__(self, lam: float | Schedule = 0.1, *, process_group: Any = None) -> None:
        super().__init__()
        self.schedule: Schedule | None = None if isinstance(lam, int | float) or not callable(lam) else lam
        start = lam if self.schedule is None else self.schedule(0.0)
        name = "lam" if self.schedule is None else "lam(0)"
        self.register_buffer("lam", torch.tensor(positive(name, start, fix=LARGER), dtype=torch.float32))
        self.process_group = process_group
        self.enabled = True

    def forward(self, weight: Tensor, x: Tensor) -> Tensor:
        """Return ``weight`` [m, n], to be used on ``x`` [..., n]."""
        samples = _rows(weight, x)
        return self.edited(weight, x, samples) if self.enabled and self.training else weight

    def edited(self, weight: Tensor, x: Tensor, samples: Samples) -> Tensor:
        """The edit whatever the mode, for samples that are read from ``x`` in any way; nothing is checked."""
        # The clone (of one number) keeps backward right when lam moves on between forward and backward.
        return preconditioned(weight, x, self.lam.clone(), samples, self.process_group)

    def set(self, lam: float) -> None:
        """Set the damping.

        Raises:
            ValueError: if ``lam`` is not finite and > 0.
        """
        self.lam.fill_(positive("lam", lam, fix=LARGER))

    def progress(self, p: float) -> None:
        """Move to progress ``p`` in [0, 1] and set ``lam`` by the schedule (a fixed ``lam`` stays).

        Raises:
            ValueError: if ``p`` lies outside [0, 1] or the schedule's value is not finite and > 0.
        """
        at = fraction("p", p, fix="Divide the step by the number of steps.")
        if self.schedule is not None:
            self.lam.fill_(positive(f"lam({at:g})", self.schedule(at), fix=LARGER))

    def extra_repr(self) -> str:
        """Schedule or damping."""
        shown = self.schedule if self.schedule is not None else round(float(self.lam), 6)
        return f"lam={shown}" if self.enabled else f"lam={shown}, enabled=False"

    def __deepcopy__(self, memo: dict[int, Any]) -> TrAct:
        # A process group cannot be copied, and the copy's layer belongs to the same processes.
        twin = TrAct(1.0, process_group=self.process_group)
        memo[id(self)] = twin
        twin.schedule, twin.enabled = self.schedule, self.enabled
        twin.train(self.training)
        twin.lam = self.lam.clone()
        return twin
