"""Layers: ordinary parts of a network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import nn


class Layer(nn.Module):
    """Base of layers: shapes and dtypes as documented, state in ``state_dict``, gradients exact."""

    kind: ClassVar[str] = "layer"
    refuses: ClassVar[Mapping[str, str]] = {}
