"""The equations as they are written, in float64 NumPy with loops over everything that is summed; no autograd."""

from __future__ import annotations

import itertools

import numpy as np

EPS = 1e-5


def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + np.exp(-x))


ACTIVATIONS = {
    "silu": lambda x: x * sigmoid(x),
    "relu6": lambda x: np.minimum(np.maximum(x, 0.0), 6.0),
    "leaky_relu": lambda x: np.where(x > 0, x, 0.01 * x),
}


def pointwise(x, weight):
    """1x1 convolution: y[n, o, v] = sum_i w[o, i] x[n, i, v]."""
    n, width = x.shape[0], weight.shape[0]
    y = np.zeros((n, width, *x.shape[2:]))
    for o, i in itertools.product(range(width), range(x.shape[1])):
        y[:, o] += weight[o, i].item() * x[:, i]
    return y


def depthwise(x, weight):
    """Every channel with its own kernel of odd size, zeros outside: y[n, c, v] = sum_d w[c, d] x[n, c, v + d]."""
    kernel = weight.shape[2:]
    half = [k // 2 for k in kernel]
    padded = np.pad(x, [(0, 0), (0, 0), *((h, h) for h in half)])
    y = np.zeros_like(x)
    for offset in itertools.product(*map(range, kernel)):
        window = tuple(slice(o, o + side) for o, side in zip(offset, x.shape[2:], strict=True))
        for c in range(x.shape[1]):
            y[:, c] += weight[(c, 0, *offset)] * padded[(slice(None), c, *window)]
    return y


def normalise(x, groups, gain, offset):
    """Group norm: mean 0 and variance 1 over each group of channels and all voxels, then gain and offset."""
    y = np.empty_like(x)
    size = x.shape[1] // groups
    for n, g in itertools.product(range(x.shape[0]), range(groups)):
        part = x[n, g * size : (g + 1) * size]
        y[n, g * size : (g + 1) * size] = (part - part.mean()) / np.sqrt(part.var() + EPS)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return y * gain.reshape(shape) + offset.reshape(shape)


def batch_normalise(x, gain, offset):
    """Batch norm in training: mean 0 and variance 1 of each channel over batch and voxels."""
    y = np.empty_like(x)
    for c in range(x.shape[1]):
        y[:, c] = (x[:, c] - x[:, c].mean()) / np.sqrt(x[:, c].var() + EPS)
    shape = (1, -1, *(1,) * (x.ndim - 2))
    return y * gain.reshape(shape) + offset.reshape(shape)


def norm_of(state, name, x, kind, groups):
    """Dispatch on the kind of norm; instance norm is group norm with one channel per group."""
    gain, offset = state[f"{name}.weight"], state[f"{name}.bias"]
    if kind == "batch":
        return batch_normalise(x, gain, offset)
    return normalise(x, x.shape[1] if kind == "instance" else groups, gain, offset)


def mbconv(x, state, *, norm="group", groups=1, wide_groups=1, act="silu"):
    """Expand, norm, act, depthwise, norm, act, (gate,) project, norm (section 3.1)."""
    f = ACTIVATIONS[act]
    h = f(norm_of(state, "norm1", pointwise(x, state["expand.weight"]), norm, wide_groups))
    h = f(norm_of(state, "norm2", depthwise(h, state["depthwise.weight"]), norm, wide_groups))
    if "gate.squeeze.weight" in state:
        mean = h.reshape(*h.shape[:2], -1).mean(-1)
        small = f(
            mean @ state["gate.squeeze.weight"].reshape(-1, mean.shape[1]).T + state["gate.squeeze.bias"]
        )
        back = state["gate.excite.weight"].reshape(h.shape[1], -1)
        gate = sigmoid(small @ back.T + state["gate.excite.bias"])
        h = h * gate.reshape(*gate.shape, *(1,) * (h.ndim - 2))
    return norm_of(state, "norm3", pointwise(h, state["project.weight"]), norm, groups)


def coupling(x1, x2, pairs):
    """y1 = x1 + F(x2), y2 = x2 + G(y1), block after block."""
    for f, g in pairs:
        x1 = x1 + f(x2)
        x2 = x2 + g(x1)
    return x1, x2


def coupling_inverse(y1, y2, pairs):
    """x2 = y2 - G(y1), x1 = y1 - F(x2), from the last block to the first."""
    for f, g in reversed(pairs):
        y2 = y2 - g(y1)
        y1 = y1 - f(y2)
    return y1, y2


def soft_dice_loss(p, t, smooth=1e-5):
    """Mean over examples and classes of 1 - (2 sum pt + s) / (sum p + sum t + s)."""
    scores = []
    for n, k in itertools.product(range(p.shape[0]), range(p.shape[1])):
        both = float((p[n, k] * t[n, k]).sum())
        scores.append(1.0 - (2.0 * both + smooth) / (p[n, k].sum() + t[n, k].sum() + smooth))
    return float(np.mean(scores))


def units_of_plain_stage(blocks, expansion, *, in_place=False):
    """Section 5: saved half states of a plain stage, 12e + 4 per block (8e + 4 with in-place LeakyReLU)."""
    return blocks * ((8 if in_place else 12) * expansion + 4)


UNITS_OF_REVERSIBLE_STAGE = 2
