"""The script that make builds `.venv` with: recovers what is broken, leaves alone what is right, says what is wrong."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

CHECKOUT = Path(__file__).parents[2]


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script with pip and venv replaced: every call is noted in ``calls``."""
    spec = importlib.util.spec_from_file_location("environment_script", CHECKOUT / ".ci" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.calls = []
    module.fails = False

    def create(venv: Path) -> None:
        module.calls.append("create")
        venv.mkdir()

    def install(venv: Path, extras: list[str], groups: list[str]) -> None:
        module.calls.append(("install", *extras, *groups))
        if module.fails:
            sys.exit("pip failed")

    monkeypatch.setattr(module, "create", create)
    monkeypatch.setattr(module, "install", install)
    monkeypatch.setattr(module, "warm_up", lambda _: module.calls.append("warm up"))
    monkeypatch.setattr(module, "works", lambda venv: not (venv / "broken").exists())
    monkeypatch.setattr(module, "fingerprint", lambda: getattr(module, "print_", "a"))
    monkeypatch.setattr(sys, "argv", ["environment.py", "--venv", str(tmp_path / ".venv"), "--extra", "lab"])
    return module


def test_a_finished_environment_is_left_alone(environment: ModuleType) -> None:
    environment.main()
    environment.main()
    assert environment.calls == ["create", ("install", "lab"), "warm up"]


def test_changed_pins_install_again_without_building_again(environment: ModuleType) -> None:
    environment.main()
    environment.print_ = "b"
    environment.main()
    assert environment.calls == ["create", *[("install", "lab"), "warm up"] * 2]


def test_an_interrupted_installation_is_built_again(environment: ModuleType) -> None:
    environment.fails = True
    with pytest.raises(SystemExit):
        environment.main()
    environment.fails = False
    environment.main()
    assert environment.calls == [*["create", ("install", "lab")] * 2, "warm up"]


def test_a_broken_environment_is_built_again(environment: ModuleType, tmp_path: Path) -> None:
    environment.main()
    (tmp_path / ".venv" / "broken").touch()
    environment.main()
    assert environment.calls == ["create", ("install", "lab"), "warm up"] * 2


def test_byte_code_is_kept_where_python_is_told_to_write_none(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    spec = importlib.util.spec_from_file_location("environment_script", CHECKOUT / ".ci" / "environment.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    (tmp_path / "imported_by_all.py").touch()
    monkeypatch.setattr(module, "interpreter", lambda _: Path(sys.executable))
    monkeypatch.setattr(module, "COMMON", ("imported_by_all",))
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    module.warm_up(tmp_path / ".venv")
    assert list(tmp_path.glob("__pycache__/imported_by_all.*.pyc"))


def test_groups_are_read_from_the_project(environment: ModuleType) -> None:
    wanted = environment.requirements("dev")
    assert any(line.startswith("pytest>=") for line in wanted)
    assert any(line.startswith("sphinx>=") for line in wanted)


def test_make_help_lists_the_targets_and_make_without_python_says_so() -> None:
    helped = subprocess.run(["make", "help"], cwd=CHECKOUT, capture_output=True, text=True, timeout=60)
    for target in ("study", "test", "bench", "docs", "lint"):
        assert f"make {target} " in helped.stdout
    alone = subprocess.run(
        ["make", "python", "PYTHON="], cwd=CHECKOUT, capture_output=True, text=True, timeout=60
    )
    assert alone.returncode != 0
    assert "No Python >= 3.11 found" in alone.stderr
