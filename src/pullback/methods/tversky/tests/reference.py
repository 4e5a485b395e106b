"""Tversky similarity as the paper writes it: one pair of objects and one feature at a time, in plain Python floats."""

from __future__ import annotations

import math

INTERSECTIONS = ("product", "min", "max", "mean", "gmean", "softmin")
DIFFERENCES = ("ignorematch", "subtractmatch")


def scores(rows, bank):
    """Inner products of every row with every feature, as lists."""
    return [[sum(a * b for a, b in zip(row, feature, strict=True)) for feature in bank] for row in rows]


def gates(row, sharpness=None):
    """Membership of every feature: a strict threshold at 0, or (1 + tanh(c s)) / 2."""
    return [float(s > 0) if sharpness is None else (1 + math.tanh(sharpness * s)) / 2 for s in row]


def psi(kind, a, b):
    """What two numbers have in common (section 3.2)."""
    if kind == "product":
        return a * b
    if kind == "min":
        return min(a, b)
    if kind == "max":
        return max(a, b)
    if kind == "mean":
        return (a + b) / 2
    if kind == "gmean":
        return math.sqrt(a * b) if a > 0 and b > 0 else 0.0
    return -math.log(math.exp(-a) + math.exp(-b))


def intersection(s, t, gx, gy, kind, reduce):
    """f(X and Y) of one pair: summed over features before (official code) or after (paper) the reduction."""
    if reduce == "feature" or kind == "product":
        total = 0.0
        for a, b, p, q in zip(s, t, gx, gy, strict=True):
            total += p * q * psi(kind, a, b)
        return total
    inside_x = sum(a * p * q for a, p, q in zip(s, gx, gy, strict=True))
    inside_y = sum(b * p * q for b, p, q in zip(t, gx, gy, strict=True))
    return psi(kind, inside_x, inside_y)


def difference(s, t, gx, gy, kind, reduce):
    """f(X - Y) of one pair."""
    total = 0.0
    for a, p, q in zip(s, gx, gy, strict=True):
        total += a * p * (1 - q)
    if kind == "ignorematch":
        return total
    if reduce == "feature":
        for a, b, p, q in zip(s, t, gx, gy, strict=True):
            total += p * q * max(a - b, 0.0)
        return total
    inside_x = sum(a * p * q for a, p, q in zip(s, gx, gy, strict=True))
    inside_y = sum(b * p * q for b, p, q in zip(t, gx, gy, strict=True))
    return total + max(inside_x - inside_y, 0.0)


def similarity(
    x, y, bank, theta, alpha, beta, *, intersection_kind, difference_kind, model="contrast", reduce="aggregate",
    sharpness=None, normalize=False
):  # fmt: skip
    """S(x_i, y_j) for all pairs, as nested lists."""
    if normalize:
        x, y = ([[e / math.sqrt(sum(a * a for a in row)) for e in row] for row in rows] for rows in (x, y))
    out = []
    for s in scores(x, bank):
        line = []
        for t in scores(y, bank):
            gx, gy = gates(s, sharpness), gates(t, sharpness)
            common = intersection(s, t, gx, gy, intersection_kind, reduce)
            mine = difference(s, t, gx, gy, difference_kind, reduce)
            theirs = difference(t, s, gy, gx, difference_kind, reduce)
            if model == "contrast":
                line.append(theta * common - alpha * mine - beta * theirs)
            else:
                line.append(common / (common + alpha * mine + beta * theirs + 1))
        out.append(line)
    return out
