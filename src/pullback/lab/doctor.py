"""Look at the machine: what is installed, what is missing, and whether the output folder can be written."""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from pullback.lab.cli.terminal import say
from pullback.lab.engine.errors import TrialError
from pullback.lab.extras import EXTRAS, installed, lack

OLDEST_TORCH = (2, 9)
_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")


@dataclass(frozen=True)
class Finding:
    """One line of the diagnosis; ``fix`` is empty when all is well, ``fatal`` marks what stops studies."""

    name: str
    value: str
    fix: str = ""
    fatal: bool = False


def diagnose(out: Path) -> int:
    """Print all findings; returns 1 when something would stop a study."""
    findings = [
        _python(),
        torch_finding(installed("torch")),
        _threads(),
        _memory(),
        _disk(out),
        *_extras(),
        _browser(),
    ]
    findings.append(_folder(out))
    width = max(len(f.name) for f in findings)
    for f in findings:
        mark = "ok" if not f.fix else ("FAIL" if f.fatal else "note")
        say(f"{mark:4} {f.name:{width}}  {f.value}{'. ' + f.fix if f.fix else ''}")
    return int(any(f.fatal for f in findings))


def _python() -> Finding:
    return Finding("python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")


def torch_finding(version: str | None) -> Finding:
    """Whether the installed torch can be used.

    Args:
        version: its version, None when it is not installed.
    """
    wanted = ".".join(map(str, OLDEST_TORCH))
    fix = f'Install it with: pip install "torch>={wanted}"'
    if version is None:
        return Finding("torch", "not installed", fix, fatal=True)
    numbers = tuple(int(part) for part in version.split("+")[0].split(".")[:2] if part.isdigit())
    if numbers < OLDEST_TORCH:
        return Finding("torch", f"{version}, older than {wanted}", fix, fatal=True)
    return Finding("torch", version)


def require_torch() -> None:
    """Refuse to run anything with a torch that cannot do it.

    Raises:
        TrialError: if torch is missing or too old, with the command that installs it.
    """
    found = torch_finding(installed("torch"))
    if found.fatal:
        raise TrialError(f"torch: {found.value}. {found.fix}")


def _threads() -> Finding:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return Finding("processors", f"{cores} usable; a study runs one worker on each, with one torch thread")


def _memory() -> Finding:
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (AttributeError, OSError, ValueError):
        return Finding("memory", "unknown on this system")
    fix = "Use --workers 1." if total < 4 else ""
    return Finding("memory", f"{total:.1f} GiB", fix)


def _disk(out: Path) -> Finding:
    place = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    free = shutil.disk_usage(place).free / 2**30
    return Finding(
        "disk", f"{free:.1f} GiB free at {place}", "Free some space." if free < 0.5 else "", fatal=free < 0.05
    )


def _extras() -> list[Finding]:
    found = []
    for name, extra in EXTRAS.items():
        have = [f"{p} {version}" for p in (*extra.packages, *extra.alone) if (version := installed(p))]
        found.append(Finding(f"extra {name}", ", ".join(have) or "not installed", lack([name])))
    return found


def _browser() -> Finding:
    path = next((p for name in _BROWSERS if (p := shutil.which(name))), None)
    fix = "" if path else "Only the tests of the report page need one; install Chromium to run them."
    return Finding("browser", path or "no Chromium found", fix)


def _folder(out: Path) -> Finding:
    """Try to write where a study would, and leave nothing behind."""
    place = next(p for p in (out.resolve(), *out.resolve().parents) if p.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=place, prefix=".pullback-doctor-") as file:
            file.write(b"x")
            file.flush()
    except OSError as error:
        fix = "Choose another folder with --out."
        return Finding("output folder", f"{place} cannot be written: {error.strerror}", fix, fatal=True)
    return Finding("output folder", f"{out} can be written")


if __name__ == "__main__":
    sys.exit(diagnose(Path("runs")))
