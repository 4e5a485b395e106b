"""What checks share: toy models, comparisons, snapshots of what must not change."""

from __future__ import annotations

import copy
import gc
import random
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract

FEATURES = 8
SCALES = (0.0, 1e-30, 1e-10, 1.0, 1e10, 1e30)


def rng(seed: int = 0) -> torch.Generator:
    """A private generator."""
    return torch.Generator().manual_seed(seed)


def draw(case: Case, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Any, ...]:
    """Arguments of one call of the case's component."""
    if case.inputs is None:
        return (torch.randn(4, FEATURES, generator=rng(seed), dtype=torch.float64).to(dtype),)
    return tuple(case.inputs(rng(seed), dtype))


def differentiable(inputs: Sequence[Any]) -> list[Tensor]:
    """The floating-point tensors among the arguments."""
    return [each for each in inputs if isinstance(each, Tensor) and each.is_floating_point()]


def leaves(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """The same arguments with floating-point tensors as leaves that want a gradient."""
    return tuple(
        each.detach().clone().requires_grad_()
        if isinstance(each, Tensor) and each.is_floating_point()
        else each
        for each in inputs
    )


def tensors(value: Any) -> Iterator[tuple[str, Tensor]]:
    """All tensors inside nested containers, dataclasses and results, with their places."""
    if isinstance(value, Tensor):
        yield "", value
    elif isinstance(value, Mapping):
        for key, each in value.items():
            for where, tensor in tensors(each):
                yield f"[{key!r}]{where}", tensor
    elif isinstance(value, list | tuple):
        for position, each in enumerate(value):
            for where, tensor in tensors(each):
                yield f"[{position}]{where}", tensor
    elif is_dataclass(value) and not isinstance(value, type):
        for each in fields(value):
            for where, tensor in tensors(getattr(value, each.name)):
                yield f".{each.name}{where}", tensor


def same(first: Any, second: Any) -> bool:
    """Whether two nested values are bitwise equal (NaN equals NaN)."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return (
            first.shape == second.shape
            and first.dtype == second.dtype
            and torch.equal(torch.nan_to_num(first.detach()), torch.nan_to_num(second.detach()))
            and torch.equal(first.detach().isnan(), second.detach().isnan())
        )
    if isinstance(first, np.ndarray):
        return isinstance(second, np.ndarray) and np.array_equal(
            first, second, equal_nan=first.dtype.kind == "f"
        )
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        return list(first) == list(second) and all(same(first[key], second[key]) for key in first)
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    if is_dataclass(first) and not isinstance(first, type):
        return type(first) is type(second) and all(
            same(getattr(first, each.name), getattr(second, each.name)) for each in fields(first)
        )
    if isinstance(first, float) and isinstance(second, float):
        return first == second or (first != first and second != second)
    return bool(first == second)


def expect_same(first: Any, second: Any, what: str, *, fix: str = "") -> None:
    """Refuse two values that are not bitwise equal.

    Raises:
        BrokenContract: with ``what`` and the largest difference.
    """
    if not same(first, second):
        raise BrokenContract(f"{what}{_difference(first, second)}.", fix=fix)


def _difference(first: Any, second: Any) -> str:
    one, other = dict(tensors(first)), dict(tensors(second))
    if list(one) != list(other):
        return ""
    for where, tensor in one.items():
        if tensor.shape != other[where].shape:
            return f" (shape {tuple(tensor.shape)} against {tuple(other[where].shape)})"
        if not same(tensor, other[where]) and tensor.numel():
            gap = (tensor.detach().double() - other[where].detach().double()).abs().max().item()
            return f" (largest difference {gap:.3g}{' in ' + where if where else ''})"
    return ""


def expect_close(first: Tensor, second: Tensor, what: str, *, rtol: float, atol: float) -> None:
    """Refuse tensors that differ by more than ``atol + rtol * |second|``.

    Raises:
        BrokenContract: with ``what`` and the largest difference.
    """
    if first.shape != second.shape:
        raise BrokenContract(f"{what} (shape {tuple(first.shape)} against {tuple(second.shape)}).")
    if not torch.allclose(first.double(), second.double(), rtol=rtol, atol=atol, equal_nan=True):
        gap = (first.double() - second.double()).abs().max().item()
        raise BrokenContract(f"{what} (largest difference {gap:.3g}).")


def expect_finite(value: Any, what: str) -> None:
    """Refuse NaN and Inf in any floating-point tensor of a nested value.

    Raises:
        BrokenContract: with ``what`` and where.
    """
    for where, tensor in tensors(value):
        if (tensor.is_floating_point() or tensor.is_complex()) and not bool(tensor.isfinite().all()):
            raise BrokenContract(f"{what}{' ' + where if where else ''} holds NaN or Inf.")


def cast(module: Any, dtype: torch.dtype) -> Any:
    """The component in ``dtype``, if it is a module."""
    return module.to(dtype) if isinstance(module, nn.Module) else module


def global_rng() -> tuple[Tensor, Any, Any]:
    """State of torch's, NumPy's and Python's global generators."""
    kind, words, *rest = np.random.get_state(legacy=True)  # noqa: NPY002 - the very thing to watch
    return torch.get_rng_state(), (kind, np.asarray(words).tolist(), *rest), random.getstate()


@contextmanager
def keeping_rng() -> Generator[None]:
    """Put the global generators back afterwards, so that checks leave no trace either."""
    torch_state, numpy_state, python_state = (
        torch.get_rng_state(),
        np.random.get_state(),  # noqa: NPY002
        random.getstate(),
    )
    try:
        yield
    finally:
        torch.set_rng_state(torch_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        random.setstate(python_state)


_HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


def hooks(module: nn.Module) -> dict[str, int]:
    """Number of hooks of every module and tensor of ``module``, and instance-level ``forward`` patches."""
    found = {
        f"{name or 'model'}.{kind}": len(getattr(each, kind))
        for name, each in module.named_modules()
        for kind in _HOOKS
    }
    found |= {f"{n or 'model'}.forward": int("forward" in vars(m)) for n, m in module.named_modules()}
    for name, parameter in module.named_parameters():
        found[f"{name}._backward_hooks"] = len(parameter._backward_hooks or ())
        found[f"{name}._post_accumulate"] = len(getattr(parameter, "_post_accumulate_grad_hooks", None) or ())
    return found


def flags(module: nn.Module) -> dict[str, bool]:
    """``training`` of every module and ``requires_grad`` of every parameter."""
    modes = {f"{name}.training": each.training for name, each in module.named_modules()}
    return modes | {f"{n}.requires_grad": p.requires_grad for n, p in module.named_parameters()}


def gradients(module: nn.Module) -> dict[str, Tensor | None]:
    """Copies of the gradients of all parameters."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in module.named_parameters()}


def values(module: nn.Module) -> dict[str, Tensor]:
    """Copies of all parameters and buffers."""
    rows = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in rows}


def perceptron(dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A small perceptron with weights of its own, whatever the global generator holds."""
    model = nn.Sequential(nn.Linear(FEATURES, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    generator = rng(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.copy_(0.5 * drawn)
    return model


def user_model(case: Case) -> nn.Module:
    """The case's model, or the small perceptron in float32."""
    with keeping_rng():
        torch.manual_seed(0)
        return perceptron(torch.float32) if case.model is None else case.model()


def batch_for(model: nn.Module, case: Case, seed: int = 0) -> tuple[Any, ...]:
    """Arguments for the user's model in its own dtype."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    return draw(case, dtype, seed)


def clone(component: Any) -> Any:
    """A deep copy."""
    return copy.deepcopy(component)


def toy_loss(model: nn.Module, seed: int = 0, inputs: tuple[Any, ...] | None = None) -> Tensor:
    """A smooth loss of the model on a batch that depends on ``seed`` only."""
    if inputs is None:
        dtype = next(model.parameters()).dtype
        inputs = (torch.randn(16, FEATURES, generator=rng(1000 + seed), dtype=torch.float64).to(dtype),)
    out = model(*inputs)
    target = torch.randn(out.shape, generator=rng(2000 + seed), dtype=torch.float64).to(out.dtype)
    return functional.mse_loss(out, target)


def tensors_left_by(act: Callable[[], object]) -> int:
    """Number of tensors made during ``act`` that are still alive afterwards.

    What was alive before is frozen out of the collector's sight, which keeps this quick in a large process.
    """
    gc.freeze()
    try:
        act()
        gc.collect()
        return sum(issubclass(type(each), Tensor) for each in gc.get_objects())
    finally:
        gc.unfreeze()
