"""Literal transcription of the equations, float64, one example at a time: slow, and the oracle of the tests.

Layers are numbered as in Scellier and Bengio (2017), from the clamped input s_0 = x to the output s_K; weights[k] joins
layer k [n_k] to layer k + 1 and is stored [n_{k+1}, n_k]; biases[k] belongs to layer k + 1.
"""

from __future__ import annotations

import cmath
import math

import torch


def clip(u):
    return min(max(u, 0.0), 1.0)


def drive(x, s, weights, biases, k):
    """Total input of layer k + 1: W_k s_k + b from below, W_{k+1}^T s_{k+2} from above."""
    below = x if k == 0 else s[k - 1]
    total = []
    for i in range(len(s[k])):
        value = biases[k][i]
        for j in range(len(below)):
            value = value + weights[k][i][j] * below[j]
        if k + 1 < len(s):
            for j in range(len(s[k + 1])):
                value = value + weights[k + 1][j][i] * s[k + 1][j]
        total.append(value)
    return total


def energy(x, s, weights, biases):
    """E = 1/2 sum s^2 - sum s_{k+1} W_k s_k - sum b s, with states that already lie in [0, 1]."""
    value = 0.0
    for k, layer in enumerate(s):
        below = x if k == 0 else s[k - 1]
        for i, unit in enumerate(layer):
            value = value + 0.5 * unit * unit - biases[k][i] * unit
            for j, other in enumerate(below):
                value = value - unit * weights[k][i][j] * other
    return value


def euler(x, s, weights, biases, *, steps, eps, beta=0.0, y=None):
    """s <- clip(s - eps dF/ds), all layers at once; the output also feels beta (y - s)."""
    for _ in range(steps):
        new = []
        for k, layer in enumerate(s):
            total = drive(x, s, weights, biases, k)
            forces = [d - u for d, u in zip(total, layer, strict=True)]
            if y is not None and k == len(s) - 1:
                forces = [f + beta * (t - u) for f, t, u in zip(forces, y, layer, strict=True)]
            new.append([clip(u + eps * f) for u, f in zip(layer, forces, strict=True)])
        s = new
    return s


def asynchronous(x, s, weights, biases, *, steps, first, beta=0.0, y=None):
    """Each layer's exact minimiser: those of one parity, then the others; ``first`` is the parity of layer indices."""
    s = [list(layer) for layer in s]
    for _ in range(steps):
        for parity in (first, 1 - first):
            for k in range(len(s)):
                if k % 2 != parity:
                    continue
                total = drive(x, s, weights, biases, k)
                if y is not None and k == len(s) - 1:
                    total = [(d + beta * t) / (1 + beta) for d, t in zip(total, y, strict=True)]
                s[k] = [clip(d) for d in total]
    return s


def energy_gradient(x, s, weights, biases):
    """dE/dW_k = - s_{k+1} s_k^T and dE/db = - s."""
    dw, db = [], []
    for k, layer in enumerate(s):
        below = x if k == 0 else s[k - 1]
        dw.append([[-unit * other for other in below] for unit in layer])
        db.append([-unit for unit in layer])
    return dw, db


def contrast(points, x, states, weights, biases):
    """sum of coefficient * dE/dtheta over (coefficient, state) pairs, the real part of it."""
    total_w = [[[0.0] * len(row) for row in w] for w in weights]
    total_b = [[0.0] * len(b) for b in biases]
    for coefficient, s in zip(points, states, strict=True):
        dw, db = energy_gradient(x, s, weights, biases)
        for k in range(len(s)):
            for i in range(len(s[k])):
                total_b[k][i] += complex(coefficient * db[k][i]).real
                for j in range(len(dw[k][i])):
                    total_w[k][i][j] += complex(coefficient * dw[k][i][j]).real
    return total_w, total_b


def points(estimator, beta, n_points=4):
    """Nudges of the phases and the coefficient of dE/dtheta at each, the free phase (nudge 0) included."""
    if estimator == "positive":
        return [(0.0, -1 / beta), (beta, 1 / beta)]
    if estimator == "negative":
        return [(0.0, 1 / beta), (-beta, -1 / beta)]
    if estimator == "centered":
        return [(beta, 1 / (2 * beta)), (-beta, -1 / (2 * beta))]
    rows = []
    for k in range(n_points):  # all N of them: the symmetry under conjugation is not used here
        nudge = beta * cmath.exp(2j * math.pi * k / n_points)
        rows.append((nudge, 1 / (n_points * nudge)))
    return rows


def quadratic_states(a, w, b, p, x, y, beta):
    """E = 1/2 s A s - s (W x + b), C = 1/2 |P (s - y)|^2: s_beta = (A + beta P)^-1 (W x + b + beta P y)."""
    return torch.linalg.solve(a + beta * p, w @ x + b + beta * (p @ y))


def quadratic_gradient(a, w, b, p, x, y):
    """Exact dC/dW = A^-1 P (s_0 - y) x^T."""
    s = quadratic_states(a, w, b, p, x, y, 0.0)
    return torch.outer(torch.linalg.solve(a, p @ (s - y)), x)


def truncated_backpropagation(x, y, s, weights, biases, *, steps, eps):
    """Gradient of C(s_T) through the last ``steps`` Euler steps from the steady state s; one example, torch tensors."""
    ws = [w.clone().requires_grad_() for w in weights]
    bs = [b.clone().requires_grad_() for b in biases]
    s = [layer.clone() for layer in s]
    for _ in range(steps):
        new = []
        for k, layer in enumerate(s):
            below = x if k == 0 else s[k - 1]
            force = ws[k] @ below + bs[k] - layer
            if k + 1 < len(s):
                force = force + ws[k + 1].T @ s[k + 1]
            new.append((layer + eps * force).clip(0.0, 1.0))
        s = new
    cost = 0.5 * (s[-1] - y).square().sum()
    return torch.autograd.grad(cost, [*ws, *bs], materialize_grads=True)
