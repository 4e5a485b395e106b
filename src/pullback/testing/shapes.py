"""Checks of differentiable modules: dtypes, layouts, batch sizes, autocast, compile, torch.func, scales."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn

from pullback.testing.case import Case
from pullback.testing.check import BrokenContract, NotApplicable, check
from pullback.testing.exercise import MODULE_KINDS, backward_through, built
from pullback.testing.tools import (
    SCALES,
    clone,
    differentiable,
    draw,
    expect_close,
    expect_finite,
    expect_same,
    leaves,
    tensors,
)

_DTYPES = ((torch.float32, 1e-4, 1e-5), (torch.bfloat16, 6e-2, 6e-2))


@check(*MODULE_KINDS, refusable="raises")
def dtypes(case: Case) -> None:
    """float32 and bfloat16 work, keep their dtype, and agree with float64 to their precision."""
    for dtype, rtol, atol in _DTYPES:
        component = built(case).to(dtype)
        rounded = draw(case, dtype)  # compare at the rounded point
        reference = clone(component).to(torch.float64)
        exact = tuple(e.double() if _floating(e) else e for e in rounded)
        out, grads = backward_through(component, leaves(rounded))
        wanted, wanted_grads = backward_through(reference, leaves(exact))
        for (where, one), (_, other) in zip(
            tensors([out, grads]), tensors([wanted, wanted_grads]), strict=True
        ):
            wider = case.kind == "objective" and where.startswith("[0]") and one.dtype == torch.float32
            if one.is_floating_point() and one.dtype != dtype and not wider:  # a loss may be summed wider
                raise BrokenContract(f"{dtype} in gives {one.dtype} out at {where}.")
            expect_close(one, other, f"{dtype} is wrong at {where}", rtol=rtol, atol=atol)


def _floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@check(*MODULE_KINDS, "aggregator", "field")
def noncontiguous(case: Case) -> None:
    """Transposed and strided inputs give what contiguous ones give."""
    if case.kind == "aggregator":
        inputs: tuple[Any, ...] = (torch.randn(3, 6, dtype=torch.float64),)
    else:
        inputs = draw(case)
    if not any(each.dim() for each in differentiable(inputs)):
        raise NotApplicable("no input with an axis")
    for layout in (_transposed, _strided):
        changed = tuple(layout(each) if _floating(each) and each.dim() else each for each in inputs)
        for (where, one), (_, other) in zip(
            tensors(_plain_call(case, changed)), tensors(_plain_call(case, inputs)), strict=True
        ):
            expect_close(one, other, f"{layout.__name__[1:]} input differs at {where}", rtol=1e-9, atol=1e-12)


def _plain_call(case: Case, inputs: tuple[Any, ...]) -> Any:
    component = built(case)
    if case.kind in MODULE_KINDS:
        wanted = tuple(each.detach().requires_grad_() if _floating(each) else each for each in inputs)
        return backward_through(component, wanted)
    return component(*inputs)


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.detach().transpose(0, -1).contiguous().transpose(0, -1)


def _strided(tensor: Tensor) -> Tensor:
    return torch.stack([tensor.detach(), torch.zeros_like(tensor)], dim=-1)[..., 0]


@check(*MODULE_KINDS, "field", refusable="raises")
def batch_of_one(case: Case) -> None:
    """A batch of one works, forwards and backwards, and stays finite."""
    expect_finite(_sliced(case, 1), "The result of a batch of one")


@check(*MODULE_KINDS, "field", refusable="raises")
def empty_batch(case: Case) -> None:
    """An empty batch gives a finite result of the right shape, or a clear ValueError or TypeError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torch warns about empty tensors in places
            result = _sliced(case, 0)
    except (TypeError, ValueError) as error:
        if len(str(error)) < 15:
            raise BrokenContract(f"An empty batch is refused without a reason: {error!r}.") from error
        return
    except (RuntimeError, IndexError, ZeroDivisionError) as error:
        raise BrokenContract(
            f"An empty batch raises {type(error).__name__}: {error}", fix="Refuse it by ValueError."
        ) from error
    expect_finite(result, "The result of an empty batch")


def _sliced(case: Case, size: int) -> Any:
    inputs = draw(case)
    if not any(each.dim() for each in differentiable(inputs)):
        raise NotApplicable("no input with a batch axis")
    return _plain_call(case, tuple(e[:size] if isinstance(e, Tensor) and e.dim() else e for e in inputs))


@check(*MODULE_KINDS, refusable="raises")
def autocast(case: Case) -> None:
    """Under bfloat16 autocast it runs forwards and backwards; gradients keep the dtype of their inputs."""
    component = built(case).to(torch.float32)
    arguments = leaves(draw(case, torch.float32))
    wanted = [*differentiable(arguments), *(p for p in component.parameters() if p.requires_grad)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = component(*arguments)
    expect_finite(out, "The output under autocast")
    plain = built(case).to(torch.float32)(*arguments)
    for (where, one), (_, other) in zip(tensors(out), tensors(plain), strict=True):
        scale = float(other.detach().abs().max()) if other.numel() else 0.0
        expect_close(
            one.detach(), other.detach(), f"Autocast is wrong at {where}", rtol=0.1, atol=0.1 * scale
        )
    outs = [each for _, each in tensors(out) if each.requires_grad]
    if not outs:
        return
    total = torch.stack([each.float().sum() for each in outs]).sum()
    grads = torch.autograd.grad(total, wanted, allow_unused=True)
    for each, grad in zip(wanted, grads, strict=True):
        if grad is not None and grad.dtype != each.dtype:
            raise BrokenContract(f"Under autocast a {each.dtype} tensor gets a {grad.dtype} gradient.")
        expect_finite(grad, "A gradient under autocast")


@check(*MODULE_KINDS, "aggregator", refusable="raises")
def compiles(case: Case) -> None:
    """``torch.compile(fullgraph=True)`` gives what eager mode gives, forwards and backwards."""
    if case.kind == "aggregator":
        raise NotApplicable("torchjd drives aggregators in eager mode")
    component, inputs = built(case), leaves(draw(case))
    expected = backward_through(clone(component), inputs)
    for backend in ("eager", "aot_eager"):
        torch._dynamo.reset()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's own deprecations
            compiled = torch.compile(clone(component), backend=backend, fullgraph=True)
            result = backward_through(compiled, inputs)
        for (where, one), (_, other) in zip(tensors(result), tensors(expected), strict=True):
            expect_close(one, other, f"backend={backend!r} differs at {where}", rtol=1e-9, atol=1e-11)
    torch._dynamo.reset()


@check(*MODULE_KINDS, refusable="raises")
def func_grad(case: Case) -> None:
    """``torch.func.grad`` gives what autograd gives."""
    component, inputs = built(case), draw(case)
    where = [i for i, each in enumerate(inputs) if _floating(each)]
    if not where:
        raise NotApplicable("no floating-point input")

    def loss(*floats: Tensor) -> Tensor:
        filled = list(inputs)
        for index, each in zip(where, floats, strict=True):
            filled[index] = each
        return _total(component(*filled))

    points = tuple(inputs[i].clone() for i in where)
    got = torch.func.grad(loss, argnums=tuple(range(len(where))))(*points)
    for one, other in zip(got, _gradients(loss, points), strict=True):
        expect_close(one, other, "torch.func.grad differs from autograd", rtol=1e-9, atol=1e-12)


@check("signal", "layer", refusable="raises")
def func_vmap(case: Case) -> None:
    """``torch.func.vmap`` over stacked batches equals a loop over them."""
    component = built(case).eval()
    batches = [draw(case, seed=seed) for seed in range(2)]
    if len(batches[0]) != 1:
        raise NotApplicable("more than one input")
    stacked = torch.stack([batch[0] for batch in batches])
    got = torch.func.vmap(component)(stacked)
    looped = [component(*batch) for batch in batches]
    if not isinstance(got, Tensor):
        raise NotApplicable("more than one output")
    expect_close(
        got.detach(), torch.stack(looped).detach(), "vmap differs from a loop", rtol=1e-9, atol=1e-12
    )


def _total(out: Any) -> Tensor:
    parts = [(each * each).sum() + each.sum() for _, each in tensors(out) if each.is_floating_point()]
    return torch.stack(parts).sum()


def _gradients(loss: Any, points: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    wanted = [each.clone().requires_grad_() for each in points]
    grads = torch.autograd.grad(loss(*wanted), wanted, allow_unused=True)
    return tuple(torch.zeros_like(w) if g is None else g for w, g in zip(wanted, grads, strict=True))


@check(*MODULE_KINDS, refusable="raises")
def without_autograd(case: Case) -> None:
    """Under ``no_grad`` and ``inference_mode`` the values are the ordinary ones."""
    inputs = draw(case)
    expected = built(case)(*leaves(inputs))
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            got = built(case)(*inputs)
        for (where, one), (_, other) in zip(tensors(got), tensors(expected), strict=True):
            expect_same(
                one.detach().clone(), other.detach(), f"Values differ under {mode.__name__} at {where}"
            )


@check(*MODULE_KINDS)
def scales(case: Case) -> None:
    """Inputs times 0, 1e-30 ... 1e30 give no NaN, forwards or backwards (float64)."""
    for scale in SCALES:
        inputs = leaves(tuple(each * scale if _floating(each) else each for each in draw(case)))
        for where, each in tensors(backward_through(built(case), inputs)):
            if each.is_floating_point() and bool(each.isnan().any()):
                raise BrokenContract(f"Inputs times {scale:g} give NaN at {where}.")


@check(*MODULE_KINDS, refusable="raises")
def explicit_parameters(case: Case) -> None:
    """``torch.autograd.grad`` for the parameters gives what ``backward()`` puts into ``.grad``."""
    component = built(case)
    params: list[nn.Parameter] = [p for p in component.parameters() if p.requires_grad]
    if not params:
        raise NotApplicable("no parameters")
    inputs = draw(case)
    asked = torch.autograd.grad(_total(component(*inputs)), params, allow_unused=True)
    twin = clone(component)
    _total(twin(*inputs)).backward()
    filled = [p.grad for p in twin.parameters() if p.requires_grad]
    for got, wanted in zip(asked, filled, strict=True):
        if (got is None) != (wanted is None):
            raise BrokenContract(
                "torch.autograd.grad(loss, parameters) misses a gradient that backward() gives.",
                fix="Make parameters explicit inputs of the custom autograd Function.",
            )
        if got is not None and wanted is not None:
            expect_close(
                got, wanted, "autograd.grad and backward() differ on a parameter", rtol=1e-9, atol=1e-12
            )
