"""Two-digit additions with answers of three kinds: bare, simplified and detailed."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from pullback.core.streams import generator

LOW, HIGH = 10, 99
FORMATS = ("none", "simplified", "detailed")
"""Kinds of answers, from the least reasoning to the most."""
_TAGS = {"none": "N", "simplified": "S", "detailed": "D"}


@dataclass(frozen=True)
class Addition:
    """``first + second``, both from 10 to 99."""

    first: int
    second: int

    @property
    def sum(self) -> int:
        """The answer."""
        return self.first + self.second

    def prompt(self, form: str) -> str:
        """The question; a letter says which kind of answer is wanted, so that its choice costs no surprise."""
        return f"{self.first}+{self.second} {_TAGS[form]}\n"

    def response(self, form: str) -> str:
        """The right answer; intermediate sums have two digits, so that each digit has a place of its own."""
        (tens, ones), (more_tens, more_ones) = divmod(self.first, 10), divmod(self.second, 10)
        low = ones + more_ones
        carry = low // 10
        high = tens + more_tens + carry
        if form == "none":
            return f"{self.sum}\n"
        if form == "simplified":
            return f"{ones}+{more_ones}={low:02} {tens}+{more_tens}+{carry}={high:02} {self.sum}\n"
        return (
            f"Ones: {ones}+{more_ones}={low:02}, so write {low % 10} and carry {carry}. "
            f"Tens: {tens}+{more_tens}+{carry}={high:02}. The answer is {self.sum}.\n"
        )


def additions(held: int, seed: int) -> tuple[list[Addition], list[Addition]]:
    """All 8,100 additions in an order of the seed: those for training, and ``held`` that are not among them.

    Raises:
        ValueError: if that leaves nothing to train on.
    """
    wide = HIGH - LOW + 1
    if not 0 < held < wide**2:
        raise ValueError(f"held must be 1 to {wide**2 - 1}, got {held}. Hold out fewer problems.")
    order = torch.randperm(wide**2, generator=generator("additions", seed)).tolist()
    problems = [Addition(LOW + place // wide, LOW + place % wide) for place in order]
    return problems[held:], problems[:held]
