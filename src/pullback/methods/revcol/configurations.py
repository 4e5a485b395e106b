"""The authors' named networks (Cai et al. 2023, table 9 and the configurations of the official code)."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from pullback.core.checks import choice
from pullback.methods.revcol.network import RevCol


class Configuration(NamedTuple):
    """Widths and blocks of each level, number of columns, rate of stochastic depth."""

    channels: tuple[int, ...]
    blocks: tuple[int, ...]
    columns: int
    drop_path: float


CONFIGURATIONS: Mapping[str, Configuration] = MappingProxyType(
    {
        "tiny": Configuration((64, 128, 256, 512), (2, 2, 4, 2), 4, 0.1),
        "small": Configuration((64, 128, 256, 512), (2, 2, 4, 2), 8, 0.3),
        "base": Configuration((72, 144, 288, 576), (1, 1, 3, 2), 16, 0.4),
        "large": Configuration((128, 256, 512, 1024), (1, 2, 6, 2), 8, 0.5),
        "xlarge": Configuration((224, 448, 896, 1792), (1, 2, 6, 2), 8, 0.5),
    }
)
"""By name: tiny 30M, small 60M, base 138M parameters, large and xlarge."""


def revcol(name: str, **changes: Any) -> RevCol:
    """A network of the paper by name.

    Args:
        name: a key of `CONFIGURATIONS`.
        **changes: arguments of `RevCol`, which win over the configuration's.

    Returns:
        The network, freshly initialised.

    Raises:
        ValueError: if there is no such name.
        TypeError: if an argument is unknown.
    """
    named = CONFIGURATIONS[choice("name", name, tuple(CONFIGURATIONS))]
    return RevCol(**{**named._asdict(), **changes})
