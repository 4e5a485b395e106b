"""The paper's blocks, its variance law and its gradient bound, literally: loops over tokens and channels in float64."""

from __future__ import annotations

import math


def rms_norm(x, gain, eps):
    """One token: gain_i x_i / sqrt(mean x^2 + eps)."""
    mean = sum(value * value for value in x) / len(x)
    return [g * value / math.sqrt(mean + eps) for g, value in zip(gain, x, strict=True)]


def layer_norm(x, gain, shift, eps):
    """One token: gain_i (x_i - m) / sqrt(mean (x - m)^2 + eps) + shift_i."""
    m = sum(x) / len(x)
    var = sum((value - m) ** 2 for value in x) / len(x)
    return [g * (v - m) / math.sqrt(var + eps) + s for g, v, s in zip(gain, x, shift, strict=True)]


def linear(x, weight):
    """One token: weight [out][in] times x."""
    return [sum(w * value for w, value in zip(row, x, strict=True)) for row in weight]


def gelu(x):
    return [0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in x]


def attention(tokens, qkv, out, heads, causal):
    """Multi-head attention of tokens [t][d]; qkv [3d][d] stacks queries, keys, values; head h has d / heads of them."""
    d = len(tokens[0])
    width = d // heads
    rows = [linear(x, qkv) for x in tokens]
    mixed = []
    for i in range(len(tokens)):
        entry = []
        for h in range(heads):
            lo, hi = h * width, (h + 1) * width
            seen = range(i + 1) if causal else range(len(tokens))
            scores = [
                sum(rows[i][c] * rows[j][d + c] for c in range(lo, hi)) / math.sqrt(width) for j in seen
            ]
            top = max(scores)
            exps = [math.exp(s - top) for s in scores]
            weights = [e / sum(exps) for e in exps]
            entry += [
                sum(w * rows[j][2 * d + c] for w, j in zip(weights, seen, strict=True)) for c in range(lo, hi)
            ]
        mixed.append(linear(entry, out))
    return mixed


def sublayer(tokens, branch, placement, norm_in, norm_out, norm_post):
    """x + N_out(M(N_in(x))), or what the placement leaves of it; ``branch`` maps all tokens at once."""
    before = [norm_in(x) for x in tokens] if placement in ("pre", "peri", "sandwich") else tokens
    added = branch(before)
    if placement in ("peri", "sandwich", "output"):
        added = [norm_out(a) for a in added]
    sums = [[a + b for a, b in zip(x, y, strict=True)] for x, y in zip(tokens, added, strict=True)]
    return [norm_post(x) for x in sums] if placement == "post" else sums


def variance_law(sublayers, gain=1.0, start=1.0):
    """Var(x) behind so many sub-layers at the start: each adds gain^2."""
    return start + sublayers * gain**2


def gradient_bound(hidden, output, gain):
    """Proposition 3.1: |dL/dW2_ij| <= 4 gain sqrt(D) |h| / |a| for one token with cross-entropy."""
    norm = math.sqrt(sum(v * v for v in hidden))
    return 4 * gain * math.sqrt(len(output)) * norm / math.sqrt(sum(v * v for v in output))
