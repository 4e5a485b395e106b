"""A student of chains of arithmetic, stopped half-way, with the pool and the tests that go with it."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pullback.core.streams import generator
from pullback.lab.data.chains import ANSWER, PROMPT, SYMBOLS, Chains, chains
from pullback.lab.models.causal import CausalTransformer

MOST_STEPS = 600  # of the student's own training


@dataclass(frozen=True)
class School:
    """How problems are drawn and the student is trained.

    Args:
        beyond: share of the pool that is beyond reach.
        pool: problems to distil from.
        held: learnable problems of the test, and as many for selection; half as many of copying for each.
        start: accuracy on learnable problems at which the student's own training ends.
        width: of the student.
    """

    beyond: float = 0.0
    pool: int = 2000
    held: int = 1000
    start: float = 0.4
    width: int = 48


@dataclass(frozen=True)
class Part:
    """Problems with their prompts and right answers, computed once."""

    chains: Chains
    prompts: Tensor = field(init=False)
    answers: Tensor = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "prompts", self.chains.prompts())
        object.__setattr__(self, "answers", self.chains.answers())

    def first(self, count: int) -> Part:
        """The first few of the problems."""
        return Part(self.chains.take(slice(0, count)))

    def logits(self, student: CausalTransformer, rows: Tensor | slice, written: Tensor) -> Tensor:
        """Logits for each position of ``written`` [n, ANSWER]."""
        return student(torch.cat([self.prompts[rows], written[:, :-1]], 1), ANSWER)

    @torch.no_grad()
    def accuracy(self, student: CausalTransformer) -> float:
        """Probability that an answer sampled at temperature 1 is right throughout, in the mean over the problems."""
        logs = self.logits(student, slice(None), self.answers).log_softmax(-1)
        chosen = logs.gather(2, self.answers[..., None])[..., 0]
        return float(torch.where(self.chains.mask, chosen, 0).sum(1).exp().mean())


@dataclass(frozen=True)
class Problems:
    """All problems of one seed: the pool, and learnable and copying problems that are not in it."""

    pool: Part
    validation: Part
    test: Part
    copy_validation: Part
    copy: Part


def problems_of(school: School, seed: int) -> Problems:
    """Draw the problems; those that are tested are not in the pool."""
    beyond = round(school.beyond * school.pool)
    pool = chains(school.pool - beyond, generator("pool", seed))
    if beyond:
        pool = pool.join(chains(beyond, generator("beyond", seed), "beyond"))
    n, half = school.held, school.held // 2
    fresh = chains(4 * n, generator("held", seed))
    fresh = fresh.take(~torch.isin(fresh.keys(), pool.keys()))
    copying = chains(2 * half, generator("copy", seed), "copy")
    parts = (fresh.take(slice(0, n)), fresh.take(slice(n, 2 * n)), copying.take(slice(0, half)))
    return Problems(Part(pool), *map(Part, parts), Part(copying.take(slice(half, None))))


def schooled(school: School, seed: int) -> tuple[Problems, CausalTransformer]:
    """The problems, and a student that has learned to copy and was stopped on its way to arithmetic."""
    problems, state = _trained(school, seed)
    student = _untrained(school, seed)
    student.load_state_dict(state)
    return problems, student


def _untrained(school: School, seed: int) -> CausalTransformer:
    stream = generator("student", seed)
    return CausalTransformer(SYMBOLS, PROMPT + ANSWER - 1, school.width, heads=4, layers=1, generator=stream)


@lru_cache(maxsize=16)
def _trained(school: School, seed: int) -> tuple[Problems, dict[str, Tensor]]:
    """A pure function of its arguments, kept so that a process trains the student of a seed once for all arms."""
    problems, student = problems_of(school, seed), _untrained(school, seed)
    optimizer = torch.optim.AdamW(student.parameters(), lr=3e-3, fused=True)
    glance = problems.validation.first(300)
    for step in range(MOST_STEPS):
        if step and step % 10 == 0 and glance.accuracy(student) >= school.start:
            break
        draws = generator("school", seed, step)
        part = Part(chains(48, draws).join(chains(16, draws, "copy")))
        logits = part.logits(student, slice(None), part.answers)
        loss = F.cross_entropy(logits[part.chains.mask], part.answers[part.chains.mask])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return problems, {name: value.clone() for name, value in student.state_dict().items()}
