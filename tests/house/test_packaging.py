"""What a user installs: the wheel's and the archive's contents and metadata, built from this checkout."""

from __future__ import annotations

import email
import re
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import pullback

CHECKOUT = Path(pullback.__file__).parents[2]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one wheel and one source archive."""
    folder = tmp_path_factory.mktemp("dist")
    command = [
        sys.executable,
        "-m",
        "build",
        "--no-isolation",
        "--wheel",
        "--sdist",
        "-o",
        str(folder),
        str(CHECKOUT),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    (path,) = built.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_the_package_its_data_and_its_licences(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    for name in (
        "pullback/__init__.py",
        "pullback/__init__.pyi",
        "pullback/py.typed",
        "pullback/lab/data/files/mnist10k.npz",
        "pullback/lab/data/files/sentiment.tsv.gz",
        "pullback/lab/data/files/topics.txt.gz",
        "pullback/lab/rooms/templates/study.py.txt",
    ):
        assert name in names
        assert wheel.getinfo(name).file_size > 0 or name.endswith("py.typed")
    ends = {name.rpartition("/")[2] for name in names if ".dist-info/licenses/" in name}
    assert {"LICENSE", "NOTICE"} <= ends


def test_every_module_of_the_checkout_is_in_the_wheel(wheel: zipfile.ZipFile) -> None:
    source = CHECKOUT / "src"
    wanted = {
        path.relative_to(source).as_posix()
        for path in source.rglob("*")
        if path.suffix in {".py", ".toml", ".j2", ".css", ".js", ".html"}
        and "tests" not in path.parts
        and "__pycache__" not in path.parts
    }
    assert wanted - set(wheel.namelist()) == set()


def test_the_wheel_holds_no_tests_no_evidence_and_no_pickles(wheel: zipfile.ZipFile) -> None:
    for name in wheel.namelist():
        assert "/tests/" not in name
        assert not name.startswith(("tests/", "evidence/", "docs/", "benchmarks/"))
        assert not name.endswith((".pt", ".pth", ".pkl", ".pickle", ".sqlite", ".pyc"))
        assert name.startswith(("pullback/", f"pullback-{pullback.__version__}.dist-info/"))


def test_the_metadata_says_what_is_needed(wheel: zipfile.ZipFile) -> None:
    (name,) = (n for n in wheel.namelist() if n.endswith("/METADATA"))
    metadata = email.message_from_bytes(wheel.read(name))
    assert metadata["Version"] == pullback.__version__
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "Apache-2.0"
    assert {"lab", "torchjd"} <= set(metadata.get_all("Provides-Extra", []))
    always = {
        re.split(r"[<>=!; ]", line)[0]
        for line in metadata.get_all("Requires-Dist", [])
        if "extra ==" not in line
    }
    assert always == {"torch", "numpy", "safetensors", "jaxtyping"}
    (entry,) = (n for n in wheel.namelist() if n.endswith("/entry_points.txt"))
    assert b"pullback = pullback.lab.cli:main" in wheel.read(entry)


def test_the_source_archive_can_build_and_test_itself(built: Path) -> None:
    (path,) = built.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "conftest.py",
        "README.md",
        "LICENSE",
        "NOTICE",
        "src/pullback/__init__.py",
    } <= names
    assert not any(
        name.startswith((".venv", "runs/")) or name.endswith((".pkl", ".pt", ".sqlite")) for name in names
    )


def test_the_version_stands_in_one_place() -> None:
    text = (CHECKOUT / "pyproject.toml").read_text("utf-8")
    assert 'dynamic = ["version"]' in text
    assert f"version: {pullback.__version__}" in (CHECKOUT / "CITATION.cff").read_text("utf-8")
    assert f"## {pullback.__version__}" in (CHECKOUT / "CHANGELOG.md").read_text("utf-8")


def test_constraints_pin_everything_that_is_asked_for() -> None:
    import tomllib

    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text("utf-8"))
    lines = (CHECKOUT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = {line.partition("==")[0].lower().replace("_", "-") for line in lines if "==" in line}
    asked = [*project["project"]["dependencies"], *project["build-system"]["requires"]]
    for group in project["project"]["optional-dependencies"].values():
        asked += group
    for group in project["dependency-groups"].values():
        asked += [entry for entry in group if isinstance(entry, str)]
    names = {re.split(r"[<>=!\[; ]", line)[0].lower().replace("_", "-") for line in asked}
    assert names - pinned == set()
    assert "torch==2.13.0" in lines
    assert not [line for line in lines if "://" in line or line.startswith("-")]
