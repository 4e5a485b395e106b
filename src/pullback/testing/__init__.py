"""The contract of every kind of component, as checks that anyone can run on a component of their own."""

from pullback.testing.case import KINDS, Case, Kind

__all__ = ["KINDS", "Case", "Kind"]
