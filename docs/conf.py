"""Sphinx configuration. The pages of rooms are written here, from the rooms themselves, at every build."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pullback
from pullback.core.facts import Facts, rooms

HERE = Path(__file__).resolve().parent
PACKAGE = Path(pullback.__file__).resolve().parent

project = "pullback"
author = "The pullback authors"
copyright = author
version = release = pullback.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
source_suffix = {".md": "markdown"}
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"pullback {version}"
html_static_path = []
myst_heading_anchors = 3
myst_enable_extensions = ["colon_fence", "dollarmath"]
suppress_warnings = ["myst.xref_missing", "myst.header"]
autodoc_typehints = "description"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": True}
default_role = "literal"
napoleon_google_docstring = True
napoleon_numpy_docstring = False

CAPABILITIES = {
    "conflict": "several losses, tasks or domains pull at once",
    "step": "how the update is taken",
    "carry": "layers that carry the signal, and memory",
    "local": "learning without back-propagation",
    "read": "diagnosis",
    "invert": "what gradients leak",
    "follow": "learned fields",
}


def room_page(facts: Facts) -> str:
    """A room's README, with its facts, its evidence and the reference of its public names."""
    path = PACKAGE / "methods" / facts.room / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else f"# {facts.room}\n"
    head, _, rest = text.partition("\n")
    paper = f"*{facts.title}*, {facts.venue} {facts.year}"
    if facts.arxiv:
        paper += f", [arXiv:{facts.arxiv}](https://arxiv.org/abs/{facts.arxiv})"
    said = f"> {paper}\n>\n> Kind: {facts.kind}. Capability: {facts.capability}.\n>\n> Claim: {facts.claim}\n"
    body = re.sub(r"\]\((?!https?:|#)[^)]*/([\w.-]+\.md)\)", r"](\1)", rest)
    names = "\n".join(
        f"```{{eval-rst}}\n.. autoobject:: {facts.module}.{name}\n```\n".replace(
            "autoobject", directive(name)
        )
        for name in facts.exports
    )
    return f"{head}\n\n{said}\n{body}\n\n## Reference\n\n{names}"


def directive(name: str) -> str:
    """The autodoc directive that fits a public name."""
    value = getattr(pullback, name)
    if isinstance(value, type):
        return "autoclass"
    return "autofunction" if callable(value) else "autodata"


def write_rooms() -> None:
    """Write one page per room, and their list by capability."""
    folder = HERE / "rooms"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    lines = ["# Methods", "", "Every method is one *room*: its maths, its page, its study and its tests.", ""]
    for capability, meaning in CAPABILITIES.items():
        inside = [facts for facts in rooms().values() if facts.capability == capability]
        if inside:
            lines += [f"## {capability.capitalize()}: {meaning}", ""]
            lines += [f"- [{facts.room}]({facts.room}.md): {facts.summary}" for facts in inside]
            lines += [""]
    lines += ["```{toctree}", ":hidden:", "", *rooms(), "```", ""]
    (folder / "index.md").write_text("\n".join(lines), encoding="utf-8")
    for facts in rooms().values():
        (folder / f"{facts.room}.md").write_text(room_page(facts), encoding="utf-8")


write_rooms()


def skip_generated(app: object, what: str, name: str, value: object, skip: bool, options: object) -> bool:  # noqa: ARG001
    """Leave out what scikit-learn writes into its estimators; its text links into its own documentation."""
    return skip or bool(re.fullmatch(r"set_\w+_request", name))


def setup(app: object) -> None:
    """Connect the filter."""
    app.connect("autodoc-skip-member", skip_generated)
