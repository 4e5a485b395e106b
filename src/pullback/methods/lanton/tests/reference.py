"""The method, literally: one layer at a time, float64, exact singular values (arXiv:2510.14009, Algorithm 1)."""

from __future__ import annotations

import math

import torch


def direction(b, geometry, scale=True):
    """LMO(B) of one layer, and the length of its step."""
    if geometry == "sign":
        return -torch.sign(b)
    if geometry == "rms":
        norm = b.norm()
        return torch.zeros_like(b) if norm == 0 else -math.sqrt(b.numel()) * b / norm
    m = b.reshape(b.shape[0], -1)
    u, s, vh = torch.linalg.svd(m, full_matrices=False)
    kept = s > 1e-12 * s.max() if s.numel() and s.max() > 0 else torch.zeros_like(s, dtype=torch.bool)
    factor = math.sqrt(m.shape[0] / m.shape[1]) if scale else 1.0
    return (-factor * u[:, kept] @ vh[kept]).reshape(b.shape)


def dual(g, geometry):
    """||G||_* of the same norm, from its definition as a sum."""
    if geometry == "sign":
        return g.abs().sum().item()
    if geometry == "rms":
        return math.sqrt(g.numel()) * g.square().sum().sqrt().item()
    m = g.reshape(g.shape[0], -1)
    eigenvalues = torch.linalg.eigvalsh(m @ m.T if m.shape[0] <= m.shape[1] else m.T @ m)
    return math.sqrt(m.shape[0] / m.shape[1]) * eigenvalues.clamp(min=0).sqrt().sum().item()


def multipliers(noise, alpha):
    """Lines 3 and 4: alpha_l = alpha / sqrt(alpha^2 + H_l), then sqrt(alpha_l / max)."""
    if math.isinf(alpha):
        return [1.0] * len(noise)
    each = [alpha / math.sqrt(alpha**2 + h) for h in noise]
    return [math.sqrt(a / max(each)) for a in each]


class Lanton:
    """The optimizer over float64 weights; ``gradients`` are given for every step."""

    def __init__(self, weights, geometries, lr, betas, alpha, weight_decay=0.0):
        self.w = [w.double().clone() for w in weights]
        self.kinds, self.lr, self.betas, self.alpha, self.decay = geometries, lr, betas, alpha, weight_decay
        self.b = [torch.zeros_like(w) for w in self.w]
        self.h = [0.0] * len(self.w)
        self.previous = None

    def step(self, gradients, independent=None):
        """One step; ``independent`` (Option II) stands in for the gradients of the step before (Option I)."""
        gradients = [g.double() for g in gradients]
        other = independent or self.previous
        if other is not None:
            for i, (g, o) in enumerate(zip(gradients, other, strict=True)):
                self.h[i] = (
                    self.betas[1] * self.h[i] + (1 - self.betas[1]) * dual(g - o.double(), self.kinds[i]) ** 2
                )
        self.previous = None if independent else [g.clone() for g in gradients]
        rates = multipliers(self.h, self.alpha)
        for i, g in enumerate(gradients):
            self.b[i] = self.betas[0] * self.b[i] + (1 - self.betas[0]) * g
            self.w[i] = self.w[i] - self.lr * self.decay * self.w[i]
            self.w[i] = self.w[i] + self.lr * rates[i] * direction(self.b[i], self.kinds[i])
        return rates
