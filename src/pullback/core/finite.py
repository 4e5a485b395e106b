"""The test for NaN and Inf in gradients, and what follows from it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from pullback.core.checks import NonFinite, NonFiniteError, shown
from pullback.core.norms import total_norm, whole


def _values(tensor: Tensor) -> Tensor:
    """The stored values of a sparse tensor, or the tensor itself."""
    return tensor._values() if tensor.layout is torch.sparse_coo else tensor


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Whether no tensor holds NaN or Inf: one norm over all of them and one read by the host.

    A finite Euclidean norm means that every entry is finite, and it is the fastest to compute. It may overflow for
    finite entries; only then zero times every entry, which is NaN for NaN and Inf alone, has the last word. (A largest
    absolute value would not do: a rank whose shard is empty has none.)
    """
    dense = [values for values in map(_values, tensors) if values.numel()]
    return not dense or _norm_is_finite(dense) or _norm_is_finite([values * 0 for values in dense])


def _norm_is_finite(tensors: Sequence[Tensor]) -> bool:
    return math.isfinite(whole(total_norm(tensors)).item())


def _describe(grads: Sequence[Tensor], names: Sequence[str]) -> str:
    """Name the first gradient that is not finite and count the others."""
    bad = []
    for name, grad in zip(names, grads, strict=True):
        values = _values(grad)
        # Counted over all shards, so that every rank, also one whose own entries are sound, tells the same.
        wrong = int(whole((~torch.isfinite(values)).sum()))
        if wrong:
            nans = int(whole(values.isnan().sum()))
            bad.append((name, wrong, values.numel(), "NaN" if nans else "Inf"))
    name, wrong, size, what = bad[0]
    others = f" and {len(bad) - 1} other gradients" if len(bad) > 1 else ""
    return f"the gradient of {shown(name)} holds {what} in {wrong} of {size} entries{others}"


def admit(grads: Sequence[Tensor], names: Sequence[str], *, policy: NonFinite, owner: str, step: int) -> bool:
    """Whether a step with these gradients may go on under ``policy``.

    Args:
        grads: unscaled gradients.
        names: their names, for the message.
        policy: what to do about NaN and Inf.
        owner: who asks, for the message.
        step: number of the step, for the message.

    Returns:
        ``True`` when the step goes on; ``False`` when the policy is ``"skip"`` and something is not finite.

    Raises:
        NonFiniteError: when the policy is ``"raise"`` and something is not finite; names owner, parameter,
            step.
    """
    if all_finite(grads):
        return True
    if policy == "skip":
        return False
    text = f"{owner}, step {step}: {_describe(grads, names)}."
    if policy == "raise":
        raise NonFiniteError(
            f"{text} Lower the learning rate or look at the loss; nonfinite='skip' leaves such steps out."
        )
    warnings.warn(f"{text} The step goes on because nonfinite='warn'.", RuntimeWarning, stacklevel=3)
    return True
