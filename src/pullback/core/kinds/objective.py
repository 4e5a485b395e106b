"""Objectives: losses and penalties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn


class Objective(nn.Module):
    """Base of losses and penalties whose ``forward`` returns a scalar; weight zero gives the plain loss."""

    kind: ClassVar[str] = "objective"
    refuses: ClassVar[Mapping[str, str]] = {}
