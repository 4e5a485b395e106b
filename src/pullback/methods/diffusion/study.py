"""Placeholder."""

STUDIES = ()
