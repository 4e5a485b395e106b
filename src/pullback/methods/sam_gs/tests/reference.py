"""A slow, literal transcription of the method and of its toy landscapes: plain Python floats, one entry at a time."""

from __future__ import annotations

import math

EPSILON = 1e-8


def norm(vector: list[float]) -> float:
    """Euclidean norm."""
    return math.sqrt(sum(x * x for x in vector))


def pair(a: float, b: float) -> float:
    """Magnitude similarity of two gradients with norms ``a`` and ``b``; equal when both vanish."""
    if a == 0.0 and b == 0.0:
        return 1.0
    return 2.0 * a * b / (a * a + b * b)


def mean_similarity(norms: list[float], variant: str) -> float:
    """Psi: the paper's mean runs over all K^2 pairs, the official code's over i < j only."""
    tasks = range(len(norms))
    if variant == "paper":
        every = [pair(norms[i], norms[j]) for i in tasks for j in tasks]
    else:
        every = [pair(norms[i], norms[j]) for i in tasks for j in tasks if i < j]
    return sum(every) / len(every)


class Reference:
    """Both printed forms of the algorithm.

    ``official``: epsilon inside the recursion of h, factor K, clip to norm 1 as ``clip_grad_norm_`` does it.
    ``paper``: epsilon in the denominator, no factor, no clip.
    """

    def __init__(self, variant="official", beta1=0.9, beta2=0.99, gamma=0.1, reduction="mean", max_norm=None):
        self.variant, self.beta1, self.beta2, self.gamma = variant, beta1, beta2, gamma
        self.reduction = reduction
        self.max_norm = max_norm if max_norm is not None else (1.0 if variant == "official" else math.inf)
        self.m: list[list[float]] | None = None
        self.h, self.t = 0.0, 0
        self.branch = ""

    def step(self, gradients: list[list[float]]) -> list[float]:
        tasks, entries = range(len(gradients)), range(len(gradients[0]))
        norms = [norm(g) for g in gradients]
        psi = mean_similarity(norms, self.variant)
        tested = psi
        if self.reduction == "min":  # the reinforcement-learning variant of the official code
            tested = min(pair(norms[i], norms[j]) for i in tasks for j in tasks if i < j)
        self.t += 1
        if self.m is None:
            self.m = [[0.0 for _ in entries] for _ in tasks]
        for k in tasks:
            for i in entries:
                self.m[k][i] = self.beta1 * self.m[k][i] + (1.0 - self.beta1) * gradients[k][i]
        self.h = self.beta2 * self.h + (1.0 - self.beta2) * (1.0 - psi) ** 2
        if self.variant == "official":
            self.h += EPSILON
        h_hat = self.h / (1.0 - self.beta2**self.t)
        out = [0.0 for _ in entries]
        if tested < self.gamma:
            self.branch = "equalise"
            mean = sum(norms) / len(norms)
            for k in tasks:
                for i in entries:
                    if norms[k] > 0.0:
                        out[i] += mean * gradients[k][i] / norms[k]
        else:
            self.branch = "momentum"
            below = math.sqrt(h_hat) + (EPSILON if self.variant == "paper" else 0.0)
            for k in tasks:
                for i in entries:
                    m_hat = self.m[k][i] / (1.0 - self.beta1**self.t)
                    out[i] += gradients[k][i] * abs(m_hat) / below
        if self.variant == "official":
            out = [len(gradients) * x for x in out]
        shrink = min(1.0, self.max_norm / (norm(out) + 1e-6))
        return [shrink * x for x in out]


# --- the two toys ------------------------------------------------------------------------------------------------


def _signal(a: float, b: float, task: int) -> float:
    """f1 and f2: the logarithm of the distance to a curved valley."""
    first, second = 0.5 * (-a - 7.0) - math.tanh(-b), 0.5 * (-a + 3.0) + math.tanh(-b) + 2.0
    inside = first if task == 1 else second
    return math.log(max(abs(inside), 5e-6)) + 6.0


def _bowl(a: float, b: float, task: int, toy: int) -> float:
    """q1 and q2 of the first toy, and what replaces them in the second."""
    if toy == 1:
        across = (-a + 7.0) if task == 1 else (-a - 7.0)
        return (across**2 + 0.1 * (-b - 8.0) ** 2) / 10.0 - 20.0
    s = 1.0 if task == 1 else -1.0
    sixth = 0.1 * (((a - s * 5.45) / 4.0) ** 6 + (b / 4.0) ** 6)
    fourth = ((a - s * 5.5) / 4.0) ** 4 + (b / 4.0) ** 4
    second = 1.5 * (((a - s * 5.5) / 4.0) ** 2 + (b / 4.0) ** 2)
    return sixth - fourth - second + 1.5


def toy_losses(a: float, b: float, toy: int) -> tuple[float, float]:
    """L1 and L2 at (a, b)."""
    upper, lower = max(math.tanh(0.5 * b), 0.0), max(math.tanh(-0.5 * b), 0.0)
    first, second = (_signal(a, b, k) * upper + _bowl(a, b, k, toy) * lower for k in (1, 2))
    return first, second
