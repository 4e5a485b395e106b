"""Where a result came from: versions, commit, machine and command."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

_PACKAGES = ("pullback", "torch", "numpy", "scipy", "statsmodels", "scikit-learn", "scikit-image", "torchjd")


def provenance(workers: int, seconds: float, ran: int) -> dict[str, Any]:
    """Describe the environment of a run.

    Args:
        workers: number of worker processes.
        seconds: wall time of the driver.
        ran: number of cells that ran now; the others were in the store.
    """
    return {
        "packages": {name: version for name in _PACKAGES if (version := _version(name))},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "threads_per_run": 1,
        "workers": workers,
        **_commit(),
        "wall_seconds": round(seconds, 3),
        "cells_run": ran,
        "finished": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": command(),
    }


def command() -> str:
    """The command that runs now, files by name only: evidence is committed and must carry no private path."""
    if not sys.argv:
        return ""
    program = Path(sys.argv[0]).name
    words = [Path(word).name if os.path.isabs(word) else word for word in sys.argv[1:]]
    return shlex.join(["pullback" if program == "__main__.py" else program, *words])


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def cpu_model() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _commit() -> dict[str, Any]:
    """The commit of the source tree and whether it has changes; empty for an installed package."""
    root = Path(__file__).parents[4]
    if not (root / ".git").exists():
        return {"commit": None, "dirty": None}
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0"}

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
            env=environment,
        )
        return done.stdout.strip()

    try:
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}
