"""The examples in the documentation of the contracts run."""

import doctest

import pytest

import pullback.testing
import pullback.testing.contract


@pytest.mark.parametrize("module", [pullback.testing, pullback.testing.contract], ids=lambda m: m.__name__)
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
