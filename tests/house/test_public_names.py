"""``import pullback`` is light, its names are loaded late, and every one of them is documented."""

from __future__ import annotations

import subprocess
import sys

import pytest

import pullback


def modules_after(code: str) -> set[str]:
    """Modules that a fresh Python has loaded after ``code`` beyond those of an empty one."""
    shown = "; import sys; print('\\n'.join(sys.modules))"
    lists = [
        subprocess.run(
            [sys.executable, "-c", text + shown], capture_output=True, text=True, check=True
        ).stdout
        for text in ("pass", code)
    ]
    return set(lists[1].split()) - set(lists[0].split())


def test_import_loads_nothing_but_the_package_itself() -> None:
    assert modules_after("import importlib, pullback") - modules_after("import importlib") <= {
        "pullback",
        "__future__",
    }


def test_facts_and_citations_load_neither_torch_nor_a_room() -> None:
    loaded = modules_after("import pullback; pullback.cite(); dir(pullback)")
    assert "pullback.core.facts" in loaded
    assert not {"torch", "numpy"} & loaded
    assert [name for name in loaded if name.startswith("pullback.methods.")] == []


def test_every_name_loads_and_says_what_it_is() -> None:
    for name in dir(pullback):
        value = getattr(pullback, name)
        assert isinstance(value, str) or (value.__doc__ or "").strip(), f"{name} has no docstring"


def test_a_star_import_gives_what_the_stub_lists() -> None:
    found: dict[str, object] = {}
    exec("from pullback import *", found)
    names = set(found) - {"__builtins__"}
    assert names == set(dir(pullback)) - {"__version__"}


def test_a_name_is_loaded_once() -> None:
    vars(pullback).pop("attach", None)
    first = pullback.attach
    assert vars(pullback)["attach"] is first


@pytest.mark.parametrize(("name", "hint"), [("atach", "Did you mean 'attach'?"), ("zzzzz", "pullback list")])
def test_an_unknown_name_gets_a_hint(name: str, hint: str) -> None:
    with pytest.raises(AttributeError) as caught:
        getattr(pullback, name)
    assert hint in str(caught.value)


def test_private_names_are_not_looked_up() -> None:
    with pytest.raises(AttributeError, match="_repr_html_"):
        pullback._repr_html_  # noqa: B018
