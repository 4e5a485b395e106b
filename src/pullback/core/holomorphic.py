"""Derivatives of functions of complex tensors, and double precision for small differences of real or complex ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def wide(tensor: Tensor) -> Tensor:
    """The tensor in double precision, if it is floating or complex and its device has such numbers."""
    if tensor.device.type == "mps" or not (tensor.is_floating_point() or tensor.is_complex()):
        return tensor
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


def derivative(value: Tensor, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Derivative of the sum of ``value`` by each of ``inputs``; zeros where it does not depend on one.

    For complex inputs this is the holomorphic derivative, of which autograd gives the conjugate.
    """
    grads = torch.autograd.grad(value, list(inputs), torch.ones_like(value), materialize_grads=True)
    return [each.conj().resolve_conj() if each.is_complex() else each for each in grads]


@torch.enable_grad()
def is_holomorphic(function: Callable[[list[Tensor]], Tensor], points: Sequence[Tensor]) -> bool:
    """Whether ``function`` keeps the Cauchy-Riemann equations at complex points beside the real ``points``.

    False also where the function gives a real number, or calls what torch does not define for complex numbers.

    Example:
        >>> x = torch.tensor([0.3, -0.7])
        >>> is_holomorphic(lambda p: p[0].pow(2), [x]), is_holomorphic(lambda p: p[0] * p[0].conj(), [x])
        (True, False)
    """
    held = [torch.complex(0.6 * p + 0.1, 0.05 + 0.02 * p).detach().requires_grad_() for p in points]
    try:
        value = function(held).sum()
        if not value.is_complex():
            return False
        real = torch.autograd.grad(value.real, held, retain_graph=True, materialize_grads=True)
        imag = torch.autograd.grad(value.imag, held, materialize_grads=True)
    except RuntimeError:  # an operation without a complex version
        return False
    return all(torch.allclose(v, 1j * u, rtol=1e-3, atol=1e-5) for u, v in zip(real, imag, strict=True))
