"""Rooms: make a new one, hold all of them to the rules, and write the files that are generated from them.

``python -m pullback.lab.rooms new|check|stub|table`` is the command line of this package. A room is one folder of
``pullback/methods``; everything that the product knows of a method comes from there.
"""

from __future__ import annotations

from pullback.lab.rooms.generate import new_room
from pullback.lab.rooms.problem import Problem
from pullback.lab.rooms.rules import check_room

__all__ = ["Problem", "check_room", "new_room"]
