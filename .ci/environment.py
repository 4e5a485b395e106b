"""Build `.venv`, or bring it up to date: ``python .ci/environment.py [--extra NAME]... [--group NAME]...``.

Needs nothing but Python (venv and pip). An environment that is already what `pyproject.toml` and `constraints.txt` ask
for is left alone; one whose installation was interrupted, or whose Python is gone, is built again from nothing.
"""

import sys

OLDEST = (3, 11)  # nothing above the check below may need a newer Python than it tells about
if sys.version_info < OLDEST:
    found = ".".join(str(part) for part in sys.version_info[:3])
    sys.exit(
        "pullback needs Python >= 3.11, got {} ({}). Name a newer one: make PYTHON=python3.12 ...".format(
            found, sys.executable
        )
    )

import argparse
import hashlib
import importlib.util
import os
import shutil
import subprocess
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
INPUTS = ("pyproject.toml", "constraints.txt")
COMMON = ("torch", "scipy.stats", "statsmodels.stats.weightstats", "sklearn.svm", "matplotlib.pyplot")


def interpreter(venv: Path) -> Path:
    """The Python of ``venv``."""
    return venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def requirements(group: str) -> list[str]:
    """The requirements of a dependency group of `pyproject.toml` (older versions of pip cannot read them)."""
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]
    found: list[str] = []
    for entry in groups[group]:
        found += requirements(entry["include-group"]) if isinstance(entry, dict) else [entry]
    return found


def fingerprint() -> str:
    """Hash of everything that decides what is installed, apart from the extras and groups."""
    digest = hashlib.sha256(str(ROOT).encode())
    for name in INPUTS:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()


def works(venv: Path) -> bool:
    """Whether the environment's Python starts and has pip."""
    command = [str(interpreter(venv)), "-c", "import sys, pip; sys.exit(sys.version_info < (3, 11))"]
    try:
        return subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    except OSError:
        return False


def create(venv: Path) -> None:
    """Make an empty environment at ``venv``."""
    if importlib.util.find_spec("venv") is None or importlib.util.find_spec("ensurepip") is None:
        sys.exit(
            f"{sys.executable} has no venv module or no pip. Install it (Debian, Ubuntu: apt install python3-venv)."
        )
    print(f"Building {venv.name} with Python {sys.version.split()[0]} ...", flush=True)
    if subprocess.run([sys.executable, "-m", "venv", str(venv)]).returncode:
        shutil.rmtree(venv, ignore_errors=True)
        sys.exit(f"{sys.executable} could not make {venv}. Install its venv module, or free some disk space.")


def install(venv: Path, extras: list[str], groups: list[str]) -> None:
    """Install the package in place with ``extras`` and the requirements of ``groups``, all pinned."""
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    wanted = [requirement for group in groups for requirement in requirements(group)]
    command = [str(interpreter(venv)), "-m", "pip", "install", "--quiet", "--no-compile", "--no-input"]
    command += [
        "--disable-pip-version-check",
        "--constraint",
        str(ROOT / "constraints.txt"),
        "--editable",
        target,
    ]
    print(
        f"Installing {', '.join(extras + groups) or 'pullback'} (pinned by constraints.txt) ...", flush=True
    )
    if subprocess.run(command + wanted, cwd=ROOT).returncode:
        sys.exit(
            "pip could not install the packages: its message is above. Run the same make command to try again."
        )


def warm_up(venv: Path) -> None:
    """Keep the byte code of what every process here imports.

    pip would compile thousands of modules that nobody imports. And where PYTHONDONTWRITEBYTECODE is set, as in many
    containers, each process would compile torch anew: 3 s instead of 1.4.
    """
    code = f"import sys; sys.dont_write_bytecode = False; import {', '.join(COMMON)}"
    subprocess.run([str(interpreter(venv)), "-c", code], capture_output=True)


def main() -> None:
    """Make `.venv` hold the wanted extras and groups."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--extra", action="append", default=[])
    parser.add_argument("--group", action="append", default=[])
    options = parser.parse_args()
    venv: Path = options.venv.resolve()
    running, label = venv / ".installing", "+".join([*options.extra, *options.group])
    stamp = venv / f".installed-{label}"
    if venv.exists() and (running.exists() or not works(venv)):
        print(f"{venv.name} is incomplete or broken: building it again.", flush=True)
        shutil.rmtree(venv)
    if not venv.exists():
        create(venv)
    if stamp.exists() and stamp.read_text(encoding="utf-8") == fingerprint():
        return
    running.touch()
    install(venv, options.extra, options.group)
    warm_up(venv)
    stamp.write_text(fingerprint(), encoding="utf-8")
    running.unlink()


if __name__ == "__main__":
    main()
