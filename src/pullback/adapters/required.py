"""Optional trainers: found, or asked for in one clear line."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType


def required(*modules: str, package: str, user: str) -> ModuleType:
    """The first of ``modules`` that is installed.

    Args:
        *modules: module names in order of preference.
        package: what to install when none is there.
        user: who needs it, for the message.

    Returns:
        The module.

    Raises:
        ImportError: if none is installed; one line that says what to install.
    """
    for module in modules:
        if importlib.util.find_spec(module.partition(".")[0]) is not None:
            return importlib.import_module(module)
    raise ImportError(f"{user} needs {package}, which is not installed. Run: pip install {package}")
