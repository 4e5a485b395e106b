"""The attack written out for a multi-layer perceptron without biases: gradients by hand, float64, no product code.

Scheliga et al. 2023: a_l = gelu(W_l h_{l-1}), h_l = a_l * m_l / (1 - p_l), logits W_L h_{L-1}, mean cross-entropy.
"""

import math

import torch


def gelu(z):
    return z * 0.5 * (1 + torch.erf(z / math.sqrt(2)))


def gelu_slope(z):
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-(z**2) / 2) / math.sqrt(2 * math.pi)


def gradient(weights, x, masks, rates, y):
    """Gradients of the mean cross-entropy with respect to all weights, by the chain rule."""
    h, zs, hs = x, [], [x]
    for weight, mask, p in zip(weights[:-1], masks, rates, strict=True):
        z = h @ weight.T
        h = gelu(z) * mask / (1 - p)
        zs.append(z)
        hs.append(h)
    logits = h @ weights[-1].T
    target = torch.zeros_like(logits)
    for row, label in enumerate(y.tolist()):
        target[row, label] = 1.0
    delta = (torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True) - target) / len(x)
    found = [delta.T @ hs[-1]]
    for layer in range(len(masks) - 1, -1, -1):
        delta = (delta @ weights[layer + 1]) * masks[layer] / (1 - rates[layer]) * gelu_slope(zs[layer])
        found.insert(0, delta.T @ hs[layer])
    return found


def cosine_loss(guess, shared, epsilon):
    dot = sum((a * b).sum() for a, b in zip(guess, shared, strict=True))
    one, other = (torch.sqrt(sum((a * a).sum() for a in rows)) for rows in (guess, shared))
    return 1 - dot / (one * other + epsilon)


def total_variation(images):
    across = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs()
    down = (images[:, :, 1:, :] - images[:, :, :-1, :]).abs()
    return across.sum() / across.numel() + down.sum() / down.numel()


def mask_penalty(masks, rates):
    return sum(abs((1 - mask.sum() / mask.numel()) - p) for mask, p in zip(masks, rates, strict=True))


def attack(weights, shared, x, masks, rates, y, steps, *, lr, tv, mask_reg, bounds, epsilon):
    """Losses of ``steps`` iterations and the leaves after them: section 3 of the method, without its plateaus."""
    leaves = [x.clone(), *(mask.clone() for mask in masks)]
    first, second = [torch.zeros_like(v) for v in leaves], [torch.zeros_like(v) for v in leaves]
    losses = []
    for step in range(1, steps + 1):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        guess = gradient(weights, leaves[0].flatten(1), leaves[1:], rates, y)
        loss = cosine_loss(guess, shared, epsilon) + tv * total_variation(leaves[0])
        if masks:
            loss = loss + mask_reg * mask_penalty(leaves[1:], rates)
        losses.append(loss.item())
        slopes = list(torch.autograd.grad(loss, leaves))
        slopes[0] = torch.sign(slopes[0])
        for i, slope in enumerate(slopes):
            first[i] = 0.9 * first[i] + 0.1 * slope
            second[i] = 0.999 * second[i] + 0.001 * slope**2
            unbiased = first[i] / (1 - 0.9**step), second[i] / (1 - 0.999**step)
            leaves[i] = leaves[i].detach() - lr * unbiased[0] / (unbiased[1].sqrt() + 1e-8)
        leaves[0] = torch.clamp(leaves[0], *bounds)
        leaves[1:] = [torch.clamp(mask, 0.0, 1.0) for mask in leaves[1:]]
    return losses, leaves
