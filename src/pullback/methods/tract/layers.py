"""TrAct in layers of torch: the layer keeps its identity, its parameters and its kernel; one call undoes it."""

from __future__ import annotations

from types import TracebackType
from typing import Any, ClassVar, final

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils import parametrize

from pullback.core.checks import instance
from pullback.core.schedules import Schedule
from pullback.core.windows import padding_of
from pullback.methods.tract.covariance import Patches, Rows
from pullback.methods.tract.signal import TrAct, check_plain

_FIX = "For a layer of your own call precondition_input on its weight and input in its forward."


class _Treated(nn.Module):
    """What the treated layers share; mixed in before the layer's own class."""

    plain: ClassVar[type[nn.Module]]
    tract: TrActHandle

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        self.tract.signal._apply(fn, recurse)
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self.tract.signal.extra_repr()}"


class TrActLinear(_Treated, nn.Linear):
    """``nn.Linear`` with the preconditioned weight gradient."""

    plain = nn.Linear

    def forward(self, input: Tensor) -> Tensor:
        """The plain layer's values [..., m] of ``input`` [..., n]."""
        return F.linear(input, self.tract.weight_for(input, Rows(self.in_features)), self.bias)


class _TreatedConv(_Treated):
    def forward(self: Any, input: Tensor) -> Tensor:
        """The plain layer's values of ``input`` [(N,) C, *spatial]."""
        return self._conv_forward(input, self.tract.weight_for(input, _patches(self)), self.bias)


class TrActConv1d(_TreatedConv, nn.Conv1d):
    """``nn.Conv1d`` with the preconditioned weight gradient."""

    plain = nn.Conv1d


class TrActConv2d(_TreatedConv, nn.Conv2d):
    """``nn.Conv2d`` with the preconditioned weight gradient."""

    plain = nn.Conv2d


class TrActConv3d(_TreatedConv, nn.Conv3d):
    """``nn.Conv3d`` with the preconditioned weight gradient."""

    plain = nn.Conv3d


_TREATED: dict[type[nn.Module], type[nn.Module]] = {
    each.plain: each for each in (TrActLinear, TrActConv1d, TrActConv2d, TrActConv3d)
}


def _patches(layer: Any) -> Patches:
    return Patches(
        channels=layer.in_channels,
        groups=layer.groups,
        kernel=tuple(layer.kernel_size),
        stride=tuple(layer.stride),
        dilation=tuple(layer.dilation),
        pads=padding_of(layer),
        mode=layer.padding_mode,
    )


@final
class TrActHandle:
    """A treated layer: its damping, a switch, and the way back.

    Leaving a ``with`` block removes it. A copy of the layer (``copy.deepcopy``) is treated too and has a handle of its
    own as its attribute ``tract``.

    Attributes:
        layer: the treated layer.
        signal: the `TrAct` in it; ``signal.state_dict()`` holds the damping, ``signal.progress(p)`` moves a schedule.
    """

    def __init__(self, layer: nn.Module, signal: TrAct) -> None:
        self.layer = layer
        self.signal = signal

    @property
    def lam(self) -> float:
        """The damping; setting it recompiles nothing and holds from the next forward pass on."""
        return float(self.signal.lam)

    @lam.setter
    def lam(self, value: float) -> None:
        self.signal.set(value)

    @property
    def enabled(self) -> bool:
        """Whether the gradient is edited; False gives bitwise the plain layer."""
        return self.signal.enabled

    @enabled.setter
    def enabled(self, value: bool) -> None:
        self.signal.enabled = instance("enabled", value, bool, fix="Set True or False.")

    def weight_for(self, x: Tensor, samples: Rows | Patches) -> Tensor:
        """The layer's weight for the use on ``x``.

        Raises:
            TypeError: if the weight is not held whole, or ``x`` is sparse.
        """
        layer: Any = self.layer
        weight = layer.weight
        if not (self.signal.enabled and layer.training):
            return weight
        return self.signal.edited(check_plain("weight", weight), check_plain("input", x), samples)

    def remove(self) -> None:
        """Make the layer the plain one again; a second call does nothing.

        Raises:
            RuntimeError: if something else changed the layer's class in the meantime.
        """
        layer: Any = self.layer
        if vars(layer).get("tract") is not self:
            return
        plain = getattr(type(layer), "plain", None)
        if _TREATED.get(plain) is not type(layer):
            raise RuntimeError(
                f"the layer must have the class that tract gave it, got {type(layer).__name__}. Undo the later change "
                "(a parametrization, fully_shard) first, or set handle.enabled = False."
            )
        layer.__class__ = plain
        del layer.tract

    def __enter__(self) -> TrActHandle:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def __repr__(self) -> str:
        return f"TrActHandle({self.layer})"


def tract(layer: nn.Module, lam: float | Schedule = 0.1, *, sync_covariance: Any = False) -> TrActHandle:
    r"""Train the pre-activations of a model's first layer: edit its weight gradient, and nothing else.

    The gradient :math:`G^\top X` of the weight becomes :math:`G^\top X (X^\top X / b + \lambda I)^{-1}` with the
    covariance of the inputs (for a convolution: of the patches) of that very forward pass (paper eq. 9). Values,
    parameters, names in ``state_dict``, hooks, and all other gradients stay as they are, to the bit. Any optimizer
    then takes the result for the gradient. In evaluation mode, with a frozen weight and under ``no_grad`` the layer is
    the plain one and keeps nothing.

    The layer is changed in place, by its class, so that whatever refers to it (optimizers, wrappers, compiled models)
    keeps doing so. Use it on the layer that sees the data, with inputs standardised over the data set.

    Args:
        layer: an ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d`` or ``nn.Conv3d`` itself, with any groups, stride, dilation
            and padding.
        lam: damping :math:`\lambda` > 0, in the unit of the squared input: a number, or a schedule of the progress.
        sync_covariance: True averages the covariance over all processes, a process group over its own, which gives the
            gradient of one process with the whole batch; False: every process uses its own.

    Returns:
        The handle; also a context manager that removes itself.

    Raises:
        TypeError: if ``layer`` is of another kind, or its weight is complex, sparse, quantised or not there yet.
        ValueError: if ``lam`` is not finite and > 0, or the layer is treated already or its weight parametrised.
        RuntimeError: if ``sync_covariance`` is asked for and no processes are connected.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 10))
        >>> handle = tract(model[0], lam=0.1)
        >>> handle.lam = 0.2
        >>> handle.remove()
        >>> type(model[0]).__name__
        'Conv2d'
    """
    layer = instance("layer", layer, nn.Module, fix="Pass the layer itself, for example model.conv1.")
    if isinstance(layer, _Treated):
        raise ValueError(
            f"layer must be a plain one, got {type(layer).__name__}, which is treated already. Call "
            "layer.tract.remove() first, or set layer.tract.lam."
        )
    _check_layer(layer)
    handle = TrActHandle(layer, TrAct(lam, process_group=_group(sync_covariance)))
    handle.signal.to(layer.weight.device)
    vars(layer)["tract"] = handle  # not registered: state_dict stays that of the plain layer
    layer.__class__ = _TREATED[type(layer)]
    return handle


def _check_layer(layer: nn.Module) -> None:
    kind = type(layer).__name__
    if parametrize.is_parametrized(layer):
        raise ValueError(
            f"layer must have a plain weight, got {kind} with a parametrization. Call tract first and register the "
            "parametrization after it: the gradient of the resulting weight is then edited."
        )
    if isinstance(layer, LazyModuleMixin):
        raise TypeError(
            f"layer must have its weight, got the uninitialised {kind}. Run one batch through it first."
        )
    if type(layer) not in _TREATED:
        names = ", ".join(each.__name__ for each in _TREATED)
        first = next(
            (f"{name} ({type(m).__name__})" for name, m in layer.named_modules() if type(m) in _TREATED), None
        )
        fix = (
            _FIX if first is None else f"Pass the layer that sees the data; the first one inside is {first}."
        )
        raise TypeError(f"layer must be one of {names}, got {kind}. {fix}")
    weight: Any = layer.weight
    if not weight.dtype.is_floating_point or weight.layout != torch.strided:
        shown = weight.dtype if weight.layout == torch.strided else weight.layout
        raise TypeError(
            f"layer.weight must be real, floating and dense, got {shown}. Leave this layer untreated."
        )


def _group(sync: Any) -> Any:
    if sync is False or sync is None:
        return None
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        raise RuntimeError(
            f"sync_covariance needs connected processes, got {sync!r} in a single one. Call "
            "torch.distributed.init_process_group first, or leave it False."
        )
    return torch.distributed.group.WORLD if sync is True else sync
