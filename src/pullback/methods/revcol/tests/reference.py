"""RevCol from its equations: scalar loops over columns and levels, no library layer, any dtype.

Parameters are taken by name from a ``state_dict``; what is computed with them is written out here.
"""

from __future__ import annotations

import math

import torch


def channel_norm(x, weight, bias):
    """Over channels of [n, c, h, w], eps 1e-6, population variance."""
    mean = x.mean(1, keepdim=True)
    variance = ((x - mean) ** 2).mean(1, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt() * weight.view(1, -1, 1, 1) + bias.view(1, -1, 1, 1)


def strided(x, weight, bias):
    """Convolution whose stride is its kernel: patches times weights."""
    n, c, h, w = x.shape
    o, _, k, _ = weight.shape
    patches = (
        x.reshape(n, c, h // k, k, w // k, k).permute(0, 2, 4, 1, 3, 5).reshape(n, h // k, w // k, c * k * k)
    )
    return (patches @ weight.reshape(o, -1).T + bias).permute(0, 3, 1, 2)


def pixelwise(x, weight, bias):
    """A linear map of the channels at every position."""
    return torch.einsum("oc,nchw->nohw", weight.reshape(weight.shape[0], -1), x) + bias.view(1, -1, 1, 1)


def depthwise(x, weight, bias):
    """Every channel with a kernel of its own, zeros around."""
    k = weight.shape[-1]
    n, c, h, w = x.shape
    padded = torch.zeros(n, c, h + k - 1, w + k - 1, dtype=x.dtype)
    padded[:, :, k // 2 : k // 2 + h, k // 2 : k // 2 + w] = x
    out = torch.zeros_like(x)
    for i in range(k):
        for j in range(k):
            out = out + weight[:, 0, i, j].view(1, -1, 1, 1) * padded[:, :, i : i + h, j : j + w]
    return out + bias.view(1, -1, 1, 1)


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def block(x, p, at):
    """ConvNeXt: depthwise, norm, expand, GELU, contract, layer scale, added to the input."""
    y = depthwise(x, p[f"{at}.depthwise.weight"], p[f"{at}.depthwise.bias"])
    y = channel_norm(y, p[f"{at}.norm.weight"], p[f"{at}.norm.bias"])
    y = gelu(pixelwise(y, p[f"{at}.expand.weight"], p[f"{at}.expand.bias"]))
    y = pixelwise(y, p[f"{at}.contract.weight"], p[f"{at}.contract.bias"])
    return x + p[f"{at}.gamma"].view(1, -1, 1, 1) * y


def level(p, at, below, above, blocks):
    """Fusion of what comes from below and above, then the blocks."""
    if f"{at}.down.0.weight" in p:
        below = strided(below, p[f"{at}.down.0.weight"], p[f"{at}.down.0.bias"])
        below = channel_norm(below, p[f"{at}.down.1.weight"], p[f"{at}.down.1.bias"])
    y = below
    if above is not None:
        up = pixelwise(above, p[f"{at}.up.0.weight"], p[f"{at}.up.0.bias"])
        up = channel_norm(up, p[f"{at}.up.1.weight"], p[f"{at}.up.1.bias"])
        y = y + up.repeat_interleave(2, 2).repeat_interleave(2, 3)
    for number in range(blocks):
        y = block(y, p, f"{at}.blocks.{number}")
    return y


def stem(p, images):
    x = strided(images, p["stem.0.weight"], p["stem.0.bias"])
    return channel_norm(x, p["stem.1.weight"], p["stem.1.bias"])


def columns(p, images, count, blocks):
    """Features of every column: c_l <- a_l * c_l + L_l(c_{l-1} new, c_{l+1} old), with old features 0 at first."""
    x, c, found = stem(p, images), [0.0] * len(blocks), []
    levels = len(blocks)
    for i in range(count):
        old = list(c)
        for index in range(levels):
            step = f"columns.steps.{i * levels + index}"
            below = x if index == 0 else c[index - 1]
            above = old[index + 1] if i > 0 and index + 1 < levels else None
            a = p[f"{step}.scale"]
            c[index] = a * old[index] + level(p, f"{step}.fn", below, above, blocks[index])
        found.append(list(c))
    return found


def head(p, at, feature):
    """Mean over positions, norm, linear map."""
    pooled = feature.mean((2, 3))
    mean = pooled.mean(1, keepdim=True)
    pooled = (pooled - mean) / (((pooled - mean) ** 2).mean(1, keepdim=True) + 1e-6).sqrt()
    pooled = pooled * p[f"{at}.norm.weight"] + p[f"{at}.norm.bias"]
    return pooled @ p[f"{at}.linear.weight"].T + p[f"{at}.linear.bias"]


def bilinear(x):
    """Twice as large, corners on corners."""
    n, c, h, w = x.shape
    out = torch.zeros(n, c, 2 * h, 2 * w, dtype=x.dtype)
    for i in range(2 * h):
        for j in range(2 * w):
            y, z = i * (h - 1) / (2 * h - 1), j * (w - 1) / (2 * w - 1)
            y0, z0 = min(int(y), h - 1), min(int(z), w - 1)
            y1, z1 = min(y0 + 1, h - 1), min(z0 + 1, w - 1)
            dy, dz = y - y0, z - z0
            top = (1 - dz) * x[:, :, y0, z0] + dz * x[:, :, y0, z1]
            low = (1 - dz) * x[:, :, y1, z0] + dz * x[:, :, y1, z1]
            out[:, :, i, j] = (1 - dy) * top + dy * low
    return out


def decoder(p, at, feature):
    """Three stages up, then 48 channels and a pixel shuffle by 4."""
    y = feature
    for stage in range(3):
        here = f"{at}.stages.{stage}"
        y = pixelwise(y, p[f"{here}.0.weight"], p[f"{here}.0.bias"])
        y = gelu(channel_norm(y, p[f"{here}.1.weight"], p[f"{here}.1.bias"]))
        y = block(bilinear(y), p, f"{here}.4")
    y = pixelwise(y, p[f"{at}.last.weight"], p[f"{at}.last.bias"])
    n, c, h, w = y.shape
    return y.reshape(n, c // 16, 4, 4, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // 16, 4 * h, 4 * w)


def cross_entropy(logits, targets):
    return sum(
        torch.logsumexp(row, 0) - row[k] for row, k in zip(logits, targets.tolist(), strict=True)
    ) / len(targets)


def loss(logits, rebuilt, images, targets, f, c):
    """Three reconstructions and three early heads with opposed weights, and the last head with weight 1."""
    total = cross_entropy(logits[-1], targets)
    target = images.clamp(0.01, 0.99)
    for i, r in enumerate(rebuilt):
        p = 1 / (1 + torch.exp(-r))
        bce = -(target * torch.log(p) + (1 - target) * torch.log(1 - p)).mean()
        total = total + f * (1 - i / 3) * bce + c * (i + 1) / 4 * cross_entropy(logits[i], targets)
    return total
