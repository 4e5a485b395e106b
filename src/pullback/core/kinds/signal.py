"""Signals: layers whose forward pass is plain and whose backward pass is altered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn


class Signal(nn.Module):
    """Base of layers that edit what comes back through them.

    The forward values are the documented ones (usually the input's own); only the gradient changes.
    Coefficients that change during training are 0-dim buffers, so that they are in ``state_dict`` and safe to
    compile.
    """

    kind: ClassVar[str] = "signal"
    refuses: ClassVar[Mapping[str, str]] = {}
