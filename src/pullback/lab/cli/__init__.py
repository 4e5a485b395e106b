"""The command line. Start it with ``pullback`` or ``python -m pullback.lab.cli``."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main", "run"]

_NEEDED = (
    "cyclopts",
    "jinja2",
    "matplotlib",
    "numpy",
    "pebble",
    "rich",
    "scipy",
    "skimage",
    "sklearn",
    "statsmodels",
)


def main() -> None:
    """Entry point of the ``pullback`` command."""
    try:
        status = run(sys.argv[1:])
    except KeyboardInterrupt:  # while the command's own modules were loaded
        print("pullback: interrupted. Nothing has been started.", file=sys.stderr)
        status = 130
    sys.exit(status)


def run(tokens: Sequence[str]) -> int:
    """Run one command.

    Args:
        tokens: the words after ``pullback``.

    Returns:
        Exit status: 0 done, 1 a study failed to run, 2 bad usage, 130 or 143 interrupted by SIGINT or SIGTERM.
    """
    from importlib.util import find_spec

    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        print(
            f'pullback: the lab needs {", ".join(missing)}. Install it with: pip install "pullback[lab]"',
            file=sys.stderr,
        )
        return 2
    from pullback.lab.cli.app import dispatch

    return dispatch(list(tokens))
