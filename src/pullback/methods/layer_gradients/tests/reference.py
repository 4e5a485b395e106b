"""The paper's statistics, slow and literal, in float64: one example, one matrix, one number at a time."""

from __future__ import annotations

import math

import torch


def gradients(loss, weights):
    """The gradient of a loss with respect to each weight, as a float64 matrix."""
    found = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)
    return [
        torch.zeros_like(w, dtype=torch.float64) if g is None else g.double()
        for w, g in zip(weights, found, strict=True)
    ]


def spectrum(matrix):
    """All singular values, by the full decomposition that the authors' script calls."""
    _, values, _ = torch.linalg.svd(matrix.double())
    return values.tolist()


def statistics(matrix):
    """Section 2 of the card: nuclear norm, share of the largest value, effective rank, Frobenius norm, extremes."""
    values = spectrum(matrix)
    total = 0.0
    for s in values:
        total += s
    entropy = 0.0
    for s in values:
        if s > 0:
            entropy -= s / total * math.log(s / total)
    return {
        "nuclear": total,
        "sigma1_ratio": values[0] / total if total > 0 else 0.0,
        "effective_rank": math.exp(entropy) if total > 0 else 0.0,
        "frobenius": math.sqrt(sum(float(x) ** 2 for x in matrix.double().flatten())),
        "sigma_max": max(values),
        "sigma_min": min(values),
    }


def mad(curve):
    """1/(N-1) times the sum over i of ``|c[i+1] - c[i]|``."""
    total = 0.0
    for i in range(len(curve) - 1):
        total += abs(curve[i + 1] - curve[i])
    return total / (len(curve) - 1)


def relative(a, b):
    """``|a[i] - b[i]| / |a[i]|``, with 1e-10 for a reference of zero; the mean, and positions by size."""
    rows = []
    for x, y in zip(a, b, strict=True):
        rows.append(abs(x - y) / (1e-10 if x == 0 else abs(x)))
    order = sorted(range(len(rows)), key=lambda i: -rows[i])
    return sum(rows) / len(rows), rows, order[:5]


def curve(rows):
    """Mean and standard error over examples, layer by layer, without examples that hold a NaN."""
    kept = [row for row in rows if not any(math.isnan(x) for x in row)]
    mean = [sum(row[i] for row in kept) / len(kept) for i in range(len(rows[0]))]
    error = []
    for i, m in enumerate(mean):
        variance = sum((row[i] - m) ** 2 for row in kept) / (len(kept) - 1)
        error.append(math.sqrt(variance / len(kept)))
    return mean, error, len(rows) - len(kept)


def masked_loss(logits, prompt, response):
    """Mean cross entropy of the response tokens of one example, by slicing its logits by hand."""
    terms = []
    ids = [*prompt, *response]
    for t in range(len(prompt), len(ids)):
        scores = logits[t - 1].double()
        terms.append(torch.logsumexp(scores, 0) - scores[ids[t]])
    return sum(terms) / len(terms)
