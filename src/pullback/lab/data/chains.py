"""Chains of modular arithmetic, evaluated from left to right, with a verifier and an exact teacher.

A prompt is ``d0 op d1 op ... dk =``; the answer is the chain of running values modulo 10 and an end symbol. Beside
+ and x there are two more operators: *blank* gives the operand (a chain of blanks is a copying task), and *drawn* gives
a digit that was drawn once for this place of this problem, so that there is nothing to learn from other problems.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

LONGEST = 6  # operators
PLUS, TIMES, DRAWN, EQUALS, END, BLANK = range(10, 16)
SYMBOLS = 16
PROMPT = 2 * LONGEST + 2
ANSWER = LONGEST + 1


@dataclass(frozen=True)
class Chains:
    """Problems.

    Args:
        first: the first digits [n].
        operators: symbols [n, LONGEST]; those beyond ``length`` do not count.
        operands: digits [n, LONGEST].
        drawn: digits [n, LONGEST], what the operator *drawn* gives.
        length: number of operators of each [n], 1 to LONGEST.
    """

    first: Tensor
    operators: Tensor
    operands: Tensor
    drawn: Tensor
    length: Tensor

    def __len__(self) -> int:
        return len(self.first)

    def take(self, rows: Tensor | slice) -> Chains:
        """Some of the problems."""
        parts = (self.first, self.operators, self.operands, self.drawn, self.length)
        return Chains(*(part[rows] for part in parts))

    def join(self, more: Chains) -> Chains:
        """These problems, then more of them."""
        names = ("first", "operators", "operands", "drawn", "length")
        return Chains(*(torch.cat([getattr(self, name), getattr(more, name)]) for name in names))

    @property
    def mask(self) -> Tensor:
        """Which positions of the answer there are [n, ANSWER], the end included."""
        return torch.arange(ANSWER) <= self.length[:, None]

    def prompts(self) -> Tensor:
        """Tokens [n, PROMPT]; short chains are filled with blanks, the equals sign is always last."""
        tokens = torch.full((len(self), PROMPT), BLANK)
        inside = torch.arange(LONGEST) < self.length[:, None]
        tokens[:, 0] = self.first
        tokens[:, 1:-1:2] = torch.where(inside, self.operators, BLANK)
        tokens[:, 2:-1:2] = torch.where(inside, self.operands, BLANK)
        tokens[:, -1] = EQUALS
        return tokens

    def next_symbol(self, position: int, before: Tensor) -> Tensor:
        """The right symbol [n] at a position of the answer, after the symbols ``before`` [n]; -1: there is none.

        What is right depends on the value that *was written* before, so that a mistake is carried on, not repaired.
        """
        if position == LONGEST:
            return torch.full_like(before, END)
        operator, operand = self.operators[:, position], self.operands[:, position]
        value = torch.where(operator == PLUS, (before + operand) % 10, (before * operand) % 10)
        value = torch.where(before < 10, value, -1)
        value = torch.where(operator == BLANK, operand, value)
        value = torch.where(operator == DRAWN, self.drawn[:, position], value)
        return torch.where(position < self.length, value, END)

    def answers(self) -> Tensor:
        """Right answers [n, ANSWER]; behind the end stand end symbols."""
        symbols, before = [], self.first
        for position in range(ANSWER):
            symbols.append(self.next_symbol(position, before))
            before = torch.where(symbols[-1] < 10, symbols[-1], before)
        return torch.stack(symbols, 1)

    def right(self, written: Tensor) -> Tensor:
        """The verifier: whether the whole chain of ``written`` [n, ..., ANSWER] is right."""
        shape = (len(self), *[1] * (written.dim() - 2), ANSWER)
        return ((written == self.answers().view(shape)) | ~self.mask.view(shape)).all(-1)

    def teacher(self, written: Tensor, smoothing: float) -> Tensor:
        """Logits [n, ANSWER, SYMBOLS] of an exact teacher that reads ``written`` [n, ANSWER].

        The right symbol after what was written has probability 1 - smoothing plus its share of ``smoothing``, which is
        spread over all symbols; where there is no right symbol all are alike.
        """
        right = [self.next_symbol(j, written[:, j - 1] if j else self.first) for j in range(ANSWER)]
        one = torch.nn.functional.one_hot(torch.stack(right, 1).clamp(min=0), SYMBOLS)
        sure = (torch.stack(right, 1) >= 0)[..., None]
        return torch.where(sure, (1 - smoothing) * one + smoothing / SYMBOLS, 1 / SYMBOLS).log()

    def keys(self) -> Tensor:
        """A number for each prompt [n], equal for equal prompts only."""
        powers = SYMBOLS ** torch.arange(PROMPT - 1)  # 16^13 fits into 63 bits
        return (self.prompts()[:, :-1] * powers).sum(1)


def chains(count: int, generator: torch.Generator, kind: str = "learnable", shortest: int = 1) -> Chains:
    """Draw problems of 1 to LONGEST operators.

    Args:
        count: how many.
        generator: source of all draws.
        kind: ``"learnable"`` (+ and x), ``"copy"`` (blanks only), or ``"beyond"`` (*drawn* only, so that the problem
            teaches nothing about others).
        shortest: fewest operators.

    Returns:
        The problems.

    Raises:
        ValueError: if ``kind`` is unknown.
    """

    def draw(low: int, high: int, *shape: int) -> Tensor:
        return torch.randint(low, high, (count, *shape), generator=generator)

    if kind not in {"learnable", "copy", "beyond"}:
        raise ValueError(f"kind must be 'learnable', 'copy' or 'beyond', got {kind!r}.")
    length = draw(shortest, LONGEST + 1)
    first, operands, drawn = draw(0, 10), draw(0, 10, LONGEST), draw(0, 10, LONGEST)
    operators = draw(PLUS, DRAWN, LONGEST)
    if kind == "copy":
        operators = torch.full_like(operators, BLANK)
    elif kind == "beyond":
        operators = torch.full_like(operators, DRAWN)
    return Chains(first, operators, operands, drawn, length)
