"""Forward-mode derivatives."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def directional(
    function: Callable[..., Any], at: Sequence[Tensor], along: Sequence[Tensor]
) -> tuple[Any, Any]:
    """Value of ``function`` and its derivative in one direction, by one forward pass.

    Args:
        function: of tensors.
        at: the point.
        along: the direction, in the shapes of ``at``.

    Raises:
        RuntimeError: from torch, if an operation has no forward-mode derivative.
    """
    with warnings.catch_warnings():
        # torch scripts some of its own derivatives at their first use, and warns about doing so.
        warnings.filterwarnings("ignore", message=".*torch.jit", category=DeprecationWarning)
        value, derivative, *_ = torch.func.jvp(function, tuple(at), tuple(along))
        return value, derivative
