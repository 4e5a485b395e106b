"""The examples in the documentation of the contracts run."""

import doctest

import pytest

import pullback.testing
import pullback.testing.contract
import pullback.testing.ranks


@pytest.mark.parametrize(
    "module", [pullback.testing, pullback.testing.contract, pullback.testing.ranks], ids=lambda m: m.__name__
)
def test_examples_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0
    assert result.failed == 0
