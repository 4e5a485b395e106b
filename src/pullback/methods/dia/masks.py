"""Dropout masks as named tensors: recorded where the client draws them, injected where an attacker guesses them.

A mask belongs to one *call*: ``"block.drop#0"`` is the first call of that module in a forward pass, ``"block.drop#1"``
the second. It has the batch as its first axis, since every sample has a mask of its own.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from pullback.core.checks import instance, shown
from pullback.core.inversion_victim import left_alone, training_but_norms, unwrapped
from pullback.core.replay import Generators, moved

ELEMENTS = (nn.Dropout,)
CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)
AFFINE = (nn.AlphaDropout, nn.FeatureAlphaDropout)
DROPOUTS = (*ELEMENTS, *CHANNELS, *AFFINE)
_FIX = "Put an nn.Dropout module in its place, so that every draw has a name."


def dropouts(model: nn.Module) -> dict[str, nn.Module]:
    """Dropout modules with p > 0 by path, a shared one once.

    Raises:
        ValueError: if one has p = 1, is no plain mask (alpha dropout), or has a forward of its own.
    """
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        p = getattr(module, "p", 0.0)
        if not isinstance(module, DROPOUTS) or p == 0.0:
            continue
        if isinstance(module, AFFINE):
            raise ValueError(
                f"model must drop by masks alone, got {type(module).__name__} at {path!r}, which shifts and "
                "scales what is left. Use nn.Dropout, or masks=None."
            )
        if p == 1.0:
            raise ValueError(
                f"p must be below 1, got 1 at {path!r}: nothing passes, and 1 / (1 - p) is infinite. Lower p."
            )
        base = next(kind for kind in DROPOUTS if isinstance(module, kind))
        if type(module).forward is not base.forward:
            raise ValueError(
                f"model must use torch's own dropout, got {type(module).__name__} with its own forward at {path!r}. "
                f"{_FIX}"
            )
        found[path] = module
    return found


def mask_shape(module: nn.Module, x: Tensor) -> tuple[int, ...]:
    """Shape of the mask for one call: that of ``x``, or one number per sample and channel."""
    if isinstance(module, ELEMENTS):
        return tuple(x.shape)
    unbatched = (isinstance(module, nn.Dropout1d) and x.dim() == 2) or (
        isinstance(module, nn.Dropout3d) and x.dim() == 4
    )
    kept = 1 if unbatched else 2
    return (*x.shape[:kept], *(1 for _ in x.shape[kept:]))


def masked(module: nn.Module, x: Tensor, mask: Tensor) -> Tensor:
    """``x * mask / (1 - p)``, in place where the module works in place; bit for bit what torch's dropout computes."""
    scaled = mask / (1 - module.p)  # ty: ignore[unsupported-operator]
    return x.mul_(scaled) if module.inplace else x * scaled


class Calls:
    """Dropout modules of a model with their ``forward`` exchanged while the context is open; calls are counted.

    Args:
        model: the model.
        act: ``act(name of the call, module, x) -> output``.
    """

    def __init__(self, model: nn.Module, act: Callable[[str, nn.Module, Tensor], Tensor]) -> None:
        self.modules, self.act = dropouts(model), act
        self.counts: dict[str, int] = {}

    def begin(self) -> None:
        """A new forward pass: count from 0."""
        self.counts = dict.fromkeys(self.modules, 0)

    def _forward(self, path: str, module: nn.Module, x: Tensor) -> Tensor:
        call = self.counts[path]
        self.counts[path] = call + 1
        return self.act(f"{path}#{call}", module, x)

    @contextmanager
    def installed(self) -> Generator[None]:
        """Exchange the forwards, and put them back afterwards, also after an error."""
        before = {path: vars(module).get("forward") for path, module in self.modules.items()}
        self.begin()
        try:
            for path, module in self.modules.items():
                vars(module)["forward"] = partial(self._forward, path, module)
            yield
        finally:
            for path, module in self.modules.items():
                if before[path] is None:
                    vars(module).pop("forward", None)
                else:
                    vars(module)["forward"] = before[path]


@contextmanager
def record_masks(
    model: nn.Module, *, generator: torch.Generator | None = None
) -> Generator[dict[str, Tensor]]:
    """Record the dropout masks of one forward pass, as they are drawn and not inferred from zeros in the output.

    For evaluation: an attacker does not have them. On a CPU the numbers are those that the modules would have drawn
    themselves. Modules in evaluation mode, or with p = 0, draw nothing and have no mask.

    Args:
        model: the client's model, usually in train mode.
        generator: where to draw from; None: torch's global generator, as dropout does.

    Yields:
        Masks by call, zeros and ones of the shape of the activation, batch first; filled by the forward pass.

    Raises:
        ValueError: if the model has a dropout that is no plain mask.
        RuntimeError: if a second forward pass runs in the context.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5)).train()
        >>> with record_masks(model) as masks:
        ...     _ = model(torch.ones(2, 4))
        >>> {name: tuple(mask.shape) for name, mask in masks.items()}
        {'1#0': (2, 8)}
    """
    inner, found, passes = unwrapped(model), {}, 0

    def draw(name: str, module: nn.Module, x: Tensor) -> Tensor:
        if not module.training:
            return x
        empty = torch.empty_like(x) if isinstance(module, ELEMENTS) else x.new_empty(mask_shape(module, x))
        mask = empty.detach().bernoulli_(1 - module.p, generator=generator)  # ty: ignore[unsupported-operator]
        found[name] = mask
        return masked(module, x, mask)

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes > 1:
            raise RuntimeError(
                "record_masks holds one forward pass, got a second one. Open a context for each."
            )

    calls = Calls(inner, draw)
    handle = inner.register_forward_pre_hook(count)
    try:
        with calls.installed():
            yield found
    finally:
        handle.remove()


@contextmanager
def inject_masks(model: nn.Module, masks: Mapping[str, Tensor | None]) -> Generator[None]:
    """Let dropout modules use given masks instead of drawing some, in train and evaluation mode alike.

    Args:
        model: the model.
        masks: by call, as `record_masks` gives them; real numbers are allowed. None: no dropout at this call.

    Raises:
        ValueError: if a call has no mask, or one of another shape.

    Example:
        >>> model = nn.Sequential(nn.Identity(), nn.Dropout(0.5)).eval()
        >>> with inject_masks(model, {"1#0": torch.tensor([[1.0, 0.0]])}):
        ...     model(torch.ones(1, 2))
        tensor([[2., 0.]])
    """
    inner = unwrapped(model)
    injection = Injection(inner, masks)
    handle = inner.register_forward_pre_hook(lambda *_: injection.begin())
    try:
        with injection.installed():
            yield
    finally:
        handle.remove()


class Injection(Calls):
    """`inject_masks` for a loop: the masks may be exchanged between two passes.

    Args:
        model: the model.
        masks: by call.
    """

    def __init__(self, model: nn.Module, masks: Mapping[str, Tensor | None]) -> None:
        super().__init__(model, self._inject)
        self.masks = masks

    def _inject(self, name: str, module: nn.Module, x: Tensor) -> Tensor:
        if name not in self.masks:
            raise ValueError(
                f"masks must have one for every dropout call, got none for {name!r}. There are "
                f"{shown(list(self.masks))}; None stands for a call without dropout."
            )
        mask = self.masks[name]
        if mask is None:
            return x
        if tuple(mask.shape) != mask_shape(module, x):
            raise ValueError(
                f"masks[{name!r}] must have the shape {mask_shape(module, x)}, got {tuple(mask.shape)}. Masks have a "
                "batch axis."
            )
        return masked(module, x, mask)


# --- which calls there are ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Site:
    """One dropout call of a forward pass.

    Args:
        name: ``"module.path#call"``.
        p: its rate.
        shape: of its mask, batch first.
        linear: path of the first linear layer that reads the call's output directly, if one does.
    """

    name: str
    p: float
    shape: tuple[int, ...]
    linear: str | None


def dropout_sites(model: nn.Module, example: Tensor) -> list[Site]:
    """All dropout calls of a forward pass in train mode, found by one pass that changes nothing.

    Args:
        model: the model.
        example: an input of the right shape; its values do not matter.

    Raises:
        ValueError: if the model draws random numbers anywhere but in dropout modules: functional dropout, fused
            attention with ``dropout_p``, recurrent layers with dropout, stochastic depth. The message names them.
    """
    model = unwrapped(model)
    instance("example", example, Tensor)
    rows: dict[str, tuple[float, tuple[int, ...], Tensor]] = {}

    def note(name: str, module: nn.Module, x: Tensor) -> Tensor:
        out = x.view_as(x)  # an object of its own, so that its readers can be told from those of x
        rows[name] = (float(module.p), mask_shape(module, x), out)  # ty: ignore[invalid-argument-type]
        return out

    readers: list[tuple[str, Tensor]] = []
    generators, calls = Generators([example.device]), Calls(model, note)
    with left_alone(model, example.device), ExitStack() as stack, torch.no_grad():
        stack.enter_context(training_but_norms(model))
        stack.enter_context(calls.installed())
        stack.callback(_watch(model, readers))
        seen = stack.enter_context(_Unnamed())
        before = generators.read()
        model(example)
        drew = moved(before, generators.read())
    if seen.found or drew:
        raise ValueError(
            f"model must draw random numbers in dropout modules only, got {_culprits(model, seen.found)}. {_FIX} "
            "masks=None attacks without masks."
        )
    return [Site(name, p, shape, _reader(out, readers)) for name, (p, shape, out) in rows.items()]


def _watch(model: nn.Module, readers: list[tuple[str, Tensor]]) -> Callable[[], None]:
    """Note what linear layers read; gives the function that takes the hooks away."""

    def note(path: str, module: nn.Module, args: tuple[Any, ...]) -> None:
        del module
        if args:
            readers.append((path, args[0]))

    handles = [
        module.register_forward_pre_hook(partial(note, path))
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    return lambda: [handle.remove() for handle in handles].clear()


def _reader(out: Tensor, readers: Sequence[tuple[str, Tensor]]) -> str | None:
    return next((path for path, given in readers if given is out), None)


class _Unnamed(TorchFunctionMode):
    """Sees functions that drop, outside of dropout modules."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if ("dropout" in name or name in _ATTENTION) and _drops(func, args, kwargs):
            self.found.append(f"{name}()")
        return func(*args, **kwargs)


_ATTENTION = ("scaled_dot_product_attention", "multi_head_attention_forward")


def _drops(func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> bool:
    """Whether a call really drops, as far as its arguments tell."""
    if func is functional.scaled_dot_product_attention:  # a builtin without signature
        return bool((args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)) > 0)
    try:
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
    except (TypeError, ValueError):
        return True
    given = bound.arguments
    return bool(given.get("training", True)) and given.get("p", given.get("dropout_p", 0.5)) > 0


def _culprits(model: nn.Module, found: Sequence[str]) -> str:
    fused = [
        f"{type(module).__name__} at {path!r} with dropout={module.dropout}"
        for path, module in model.named_modules()
        if isinstance(module, nn.MultiheadAttention | nn.RNNBase) and module.dropout
    ]
    rows = [*dict.fromkeys(found), *fused]
    return ", ".join(rows) or "a draw outside of them (stochastic depth, noise)"
