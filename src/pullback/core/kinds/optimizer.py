"""Optimizers: real ``torch.optim.Optimizer`` subclasses."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch


class Optimizer(torch.optim.Optimizer):
    """Base of optimizers that own the whole update.

    Being a real torch optimizer, a member works with schedulers, ``GradScaler``, trainers and checkpoints.
    Counters and settings belong into ``param_groups`` and tensors into ``state[parameter]``, so that both
    survive a distributed checkpoint.

    Attributes:
        decoupled_weight_decay: whether weight decay shrinks parameters apart from the gradient.
    """

    kind: ClassVar[str] = "optimizer"
    refuses: ClassVar[Mapping[str, str]] = {}
    decoupled_weight_decay: ClassVar[bool] = False
