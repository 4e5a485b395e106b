"""Slow literal transcriptions of the paper's equations in float64, one number at a time: the oracles of this room."""

from __future__ import annotations

import math

import numpy as np


def weight(p, alpha=1.0, beta=1.0):
    """Eq. 3: p^alpha (1 - p)^beta, with 0^0 = 1."""
    return math.pow(p, alpha) * math.pow(1.0 - p, beta)


def weighted_mean(rates, losses, ids, alpha=1.0, beta=1.0, normalize="pool-mean"):
    """Mean over a batch of weight times loss, over the normaliser; ``rates`` are the pool's, nan is unknown."""
    raw = [float("nan") if math.isnan(p) else weight(p, alpha, beta) for p in rates]
    whose = raw if normalize != "batch-mean" else [raw[i] for i in ids]
    known = [w for w in whose if not math.isnan(w)]
    mean = sum(known) / len(known) if known else 1.0
    total = 0.0
    for i, loss in zip(ids, losses, strict=True):
        w = mean if math.isnan(raw[i]) else raw[i]
        if w != 0.0:
            total += w * loss / (1.0 if normalize == "none" else mean)
    return total / len(ids)


def log_softmax(logits):
    highest = max(logits)
    total = math.log(sum(math.exp(z - highest) for z in logits)) + highest
    return [z - total for z in logits]


def kl(log_p, log_q):
    """KL(P || Q), symbol by symbol."""
    return sum(math.exp(a) * (a - b) for a, b in zip(log_p, log_q, strict=True))


def divergence(student, teacher, kind, temperature=1.0, beta=0.5):
    """One position: forward KL(T || S), reverse KL(S || T), or the generalised Jensen-Shannon divergence."""
    s = log_softmax([z / temperature for z in student])
    t = log_softmax([z / temperature for z in teacher])
    if kind == "forward_kl" or (kind == "jsd" and beta == 0.0):
        return kl(t, s)
    if kind == "reverse_kl" or (kind == "jsd" and beta == 1.0):
        return kl(s, t)
    middle = [math.log(beta * math.exp(a) + (1.0 - beta) * math.exp(b)) for a, b in zip(t, s, strict=True)]
    return beta * kl(t, middle) + (1.0 - beta) * kl(s, middle)


def distillation(student, teacher, mask, kind, temperature=1.0, beta=0.5, tokens="mean"):
    """Loss of each problem; only positions where the mask is true count, and none gives 0."""
    losses = []
    for row_s, row_t, row_m in zip(student, teacher, mask, strict=True):
        parts = [
            divergence(list(s), list(t), kind, temperature, beta)
            for s, t, m in zip(row_s, row_t, row_m, strict=True)
            if m
        ]
        losses.append(sum(parts) / (max(len(parts), 1) if tokens == "mean" else 1))
    return losses


def snr(gradients):
    """Unbiased |mean|^2 over the trace of the covariance, and the naive one, from rows of gradients."""
    g = np.asarray(gradients, dtype=np.float64)
    n = len(g)
    mean = g.sum(0) / n
    trace = sum(float((row - mean) @ (row - mean)) for row in g) / (n - 1)
    square = float(mean @ mean)
    return (square - trace / n) / trace, square / trace


def bootstrap_interval(gradients, counts, level):
    """Basic bootstrap of `snr`: errors of resamples around the ratio of the population they are drawn from."""
    g = np.asarray(gradients, dtype=np.float64)
    mean = g.sum(0) / len(g)
    population = float(mean @ mean) / (sum(float((row - mean) @ (row - mean)) for row in g) / len(g))
    errors = [snr(np.repeat(g, row, axis=0))[0] - population for row in counts]
    estimate = snr(g)[0]
    return estimate - np.quantile(errors, (1 + level) / 2), estimate - np.quantile(errors, (1 - level) / 2)


def efficiency(weights, signal, noise):
    """Squared signal over variance of a weighted mean of independent gradients."""
    return sum(w * s for w, s in zip(weights, signal, strict=True)) ** 2 / sum(
        w * w * v for w, v in zip(weights, noise, strict=True)
    )


def sample_log_probability(step_logits, tokens, temperature, stop):
    """Log-probability that sampling writes ``tokens``; ``step_logits(prefix)`` gives the next position's logits."""
    total = 0.0
    for position, token in enumerate(tokens):
        total += log_softmax([z / temperature for z in step_logits(tokens[:position])])[token]
        if token == stop:
            break
    return total
