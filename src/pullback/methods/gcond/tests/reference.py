"""Literal transcription of GCond (arXiv:2509.07252, sections 3.1 to 3.5 and appendix A) on whole float64 vectors.

Nothing is batched and no Gram matrix is kept: every round reads the vectors themselves.
"""

from __future__ import annotations

import math

import torch

EPS = 1e-8
ROUNDING = 3e-15  # what differs by rounding alone is equal


def cosine(a, b):
    return float(a @ b) / (float(a.norm()) * float(b.norm()))


def effective_angle(c, thresholds, power):
    crit, main, weak = thresholds
    if c <= crit:
        return math.pi
    if c < main:
        return math.pi / 2 + math.pi / 2 * ((c - main) / (crit - main)) ** power
    return math.pi / 2 * (1 - (c - main) / (weak - main))


class Conductor:
    """All of one run: resolution with its memory, then momentum. ``reference`` as in the product."""

    def __init__(
        self,
        tasks,
        *,
        thresholds=(-0.8, -0.5, 0.0),
        power=2.0,
        max_iters=3,
        smooth=True,
        arbiter_weights=(0.8, 0.2),
        dominance_window=0,
        ema_decay=0.95,
        ema_bias_correction=False,
        norm_cap=None,
        stability_reference="raw",
        momentum=0.9,
    ):
        self.thresholds, self.power, self.max_iters, self.smooth = thresholds, power, max_iters, smooth
        self.arbiter_weights, self.window = arbiter_weights, dominance_window
        self.decay, self.correct, self.cap = ema_decay, ema_bias_correction, norm_cap
        self.kept, self.beta = stability_reference, momentum
        self.average = [0.0 if ema_bias_correction else 1.0] * tasks
        self.previous = [None] * tasks
        self.history = []
        self.m, self.t = 0.0, 0

    def step(self, accumulated):
        """``accumulated``: one float64 vector per task, the mean over its micro-batches times its weight."""
        self.t += 1
        raw = [g.clone() for g in accumulated]
        for i, g in enumerate(raw):
            self.average[i] = self.decay * self.average[i] + (1 - self.decay) * float(g.norm())
        capped = [g if self.cap is None or g.norm() <= self.cap else g * self.cap / g.norm() for g in raw]
        grads = [g.clone() for g in capped]
        for _ in range(self.max_iters or 2 * len(grads)):
            pairs = [(i, j) for i in range(len(grads)) for j in range(i + 1, len(grads))]
            pairs = [(i, j) for i, j in pairs if min(grads[i].norm(), grads[j].norm()) > 1e-7]
            if not pairs:
                break
            i, j = min(pairs, key=lambda pair: cosine(grads[pair[0]], grads[pair[1]]))
            c = cosine(grads[i], grads[j])
            if c >= self.thresholds[2] - ROUNDING:
                break
            self.resolve(grads, capped, i, j, c)
        self.previous = raw if self.kept == "raw" else grads
        u = sum(grads)
        self.m = self.beta * self.m + (1 - self.beta) * u
        return self.m / (1 - self.beta**self.t)

    def resolve(self, grads, capped, i, j, c):
        crit, main, _ = self.thresholds
        if not self.smooth and c >= main:  # appendix A, weak zone: no arbiter
            a, b = grads[i].clone(), grads[j].clone()
            grads[i] = a - (a @ b) / (b @ b) * b
            grads[j] = b - (a @ b) / (a @ a) * a
            return
        w, l = self.arbiter(grads if self.kept == "resolved" else capped, i, j)
        self.history.append(w)
        gw, gl = grads[w].clone(), grads[l].clone()
        if not self.smooth:
            grads[l] = torch.zeros_like(gl) if c < crit else gl - (gw @ gl) / (gw @ gw) * gw
            return
        alpha = effective_angle(c, self.thresholds, self.power)
        s_w, s_l = math.sin(alpha), math.sin(min(alpha, math.pi / 2))
        grads[w] = gw - s_w * (gw @ gl) / (gl @ gl) * gl
        grads[l] = gl - s_l * (gw @ gl) / (gw @ gw) * gw

    def arbiter(self, grads, i, j):
        if self.window and len(self.history) >= self.window:
            last = set(self.history[-self.window :])
            if last == {i}:
                return j, i
            if last == {j}:
                return i, j
        average = [a / (1 - self.decay**self.t) if self.correct else a for a in self.average]
        stability = [
            0.0 if p is None or p.norm() == 0 or g.norm() == 0 else cosine(g, p)
            for g, p in zip(grads, self.previous, strict=True)
        ]
        eps = (
            0.0 if self.correct else EPS
        )  # the correction is ours: it needs no guard where a gradient is not 0
        relative = [float(g.norm()) / (a + eps) for g, a in zip(grads, average, strict=True)]
        first, second = self.arbiter_weights
        score = {
            k: first * max(0.0, stability[k]) + second * relative[k] / (relative[i] + relative[j])
            for k in (i, j)
        }
        return (j, i) if score[j] > score[i] + ROUNDING else (i, j)


def lion_lars(m_hat, p, coefficient, clip):
    """The update of one tensor (published code, ``use_lion``)."""
    a, b = float(p.norm()), float(m_hat.norm())
    ratio = a / b if a >= EPS and b >= EPS else 1.0
    return torch.sign(m_hat) * coefficient * min(ratio, clip)
