"""What all tests share: hypothesis profiles, examples in Markdown as tests, shape checks on demand."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
from hypothesis import settings
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

if TYPE_CHECKING:
    from xdist.remote import Producer
    from xdist.scheduler import LoadScopeScheduling

collect_ignore = ["docs/conf.py"]  # importing it would write pages

settings.register_profile("dev", max_examples=20, deadline=None)
settings.register_profile("ci", max_examples=100, deadline=None, derandomize=True)
settings.register_profile("nightly", max_examples=2000, deadline=None)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "dev"))

if os.environ.get("PULLBACK_TYPECHECK") == "1":
    # Checks every annotated shape, dtype and type of the methods. It is no part of the ordinary run because
    # it would answer a wrong argument before our own message does.
    from jaxtyping import install_import_hook

    install_import_hook("pullback.methods", "beartype.beartype")

# ```python blocks are run from top to bottom of a page; `<!--- skip: next -->` shows one without running it.
pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["README.md", "docs/*.md", "src/pullback/methods/*/README.md"],
).pytest()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Producer) -> LoadScopeScheduling:
    """Spread single tests over the workers, but a page as a whole: each block builds on those before it."""
    from xdist.scheduler import LoadScopeScheduling

    class PageScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            path = nodeid.split("::", 1)[0]
            return path if path.endswith(".md") else nodeid

    return PageScheduling(config, log)
