"""Every room's components pass the contract of their kind, and none is without a case."""

import importlib
import inspect

import pytest

from pullback.core.facts import rooms
from pullback.testing import KINDS, parametrize_with_checks


def cases_of(room):
    """The room's declared cases; a room without them has none."""
    name = f"pullback.methods.{room}.tests.cases"
    if importlib.util.find_spec(name) is None:
        return ()
    return importlib.import_module(name).CASES


def components_of(room):
    """Exported names that stand for a component of some kind."""
    module = importlib.import_module(f"pullback.methods.{room}")
    exported = {name: getattr(module, name) for name in rooms()[room].exports}
    return {name: value for name, value in exported.items() if getattr(value, "kind", None) in KINDS}


def missing(components, cases):
    """Components that no case builds: neither by name nor by class."""
    named = {case.name.partition("[")[0] for case in cases}
    return sorted(name for name in components if name not in named)


CASES = [case for room in rooms() for case in cases_of(room)]


@parametrize_with_checks(CASES)
def test_components_pass_their_contract(case, check):
    check(case)


@pytest.mark.parametrize("room", rooms())
def test_every_exported_component_has_a_case(room):
    assert not missing(components_of(room), cases_of(room))


@pytest.mark.parametrize("room", rooms())
def test_every_room_exports_a_component_of_its_kind(room):
    found = {getattr(value, "kind", None) for value in components_of(room).values()}
    assert rooms()[room].kind in found or not found


@pytest.mark.parametrize("room", rooms())
def test_cases_have_names_of_their_own(room):
    names = [case.name for case in cases_of(room)]
    assert len(set(names)) == len(names)
    assert all(inspect.isroutine(case.build) or inspect.isclass(case.build) for case in cases_of(room))


def test_a_component_without_a_case_is_noticed():
    assert missing({"GradientNoise": object()}, ()) == ["GradientNoise"]
    some = next(iter(CASES))
    assert missing({some.name.partition("[")[0]: object()}, [some]) == []
