"""The paper's equations, written out slowly in float64 with loops over entries; the oracle of the tests."""

from __future__ import annotations

import math

import torch

# --- the weights (SIAM eq. 2.30 with the official code's statistics, arXiv v1 algorithm 1) ------------------------


def largest(layers):
    """Largest absolute entry over all layers."""
    return max(abs(entry) for layer in layers for entry in layer.flatten().tolist())


def mean_of_layer_means(layers):
    """Mean over layers of the mean absolute entry of each (official code)."""
    means = [sum(abs(e) for e in layer.flatten().tolist()) / layer.numel() for layer in layers]
    return sum(means) / len(means)


def mean_of_all(layers):
    """Mean absolute entry over all layers together (as the paper writes it)."""
    entries = [abs(e) for layer in layers for e in layer.flatten().tolist()]
    return sum(entries) / len(entries)


def norm(layers):
    """Euclidean norm over all layers together."""
    return math.sqrt(sum(e * e for layer in layers for e in layer.flatten().tolist()))


def targets(residuals, data, lam, *, statistics="layer-mean", inside=True):
    """The value towards which each weight moves.

    ``residuals`` is a list, ``data`` a list over terms, of gradients by layer; ``lam`` one number per data term.
    """
    weighted = [
        [(weight if inside else 1.0) * layer.double() for layer in layers]
        for weight, layers in zip(lam, data, strict=True)
    ]
    if statistics == "cavity":
        return [
            max(
                max(largest([residual[at]]) for residual in residuals) / mean_of_all([layers[at]])
                for at in range(len(layers))
            )
            for layers in weighted
        ]
    mean = mean_of_layer_means if statistics == "layer-mean" else mean_of_all
    top = max(largest(layers) for layers in residuals)
    return [top / mean(layers) for layers in weighted]


def norm_targets(gradients, lam, *, inside=False):
    """The later rule: mean of the norms over the norm, for every term alike."""
    norms = [(w if inside else 1.0) * norm(layers) for w, layers in zip(lam, gradients, strict=True)]
    return [sum(norms) / len(norms) / each for each in norms]


def moved(lam, target, alpha):
    """The moving average of each weight."""
    return [(1 - alpha) * old + alpha * new for old, new in zip(lam, target, strict=True)]


def heron(number, start, count):
    """Heron's iterates for the square root of ``number``."""
    found = [start]
    for _ in range(count):
        found.append((found[-1] + number / found[-1]) / 2)
    return found[1:]


# --- the architecture -----------------------------------------------------------------------------------------------


def modified_mlp(x, u, v, hidden, output, variant):
    """Output of the modified network for one point; every layer is (weight [out, in], bias [out])."""

    def layer(inputs, pair):
        weight, bias = pair
        return [
            sum(weight[i, j].item() * inputs[j] for j in range(len(inputs))) + bias[i].item()
            for i in range(len(bias))
        ]

    point = [float(each) for each in x]
    first = [math.tanh(a) for a in layer(point, u)]
    second = [math.tanh(a) for a in layer(point, v)]
    h = point
    for number, pair in enumerate(hidden):
        z = [math.tanh(a) for a in layer(h, pair)]
        if variant == "official":
            h = [z[i] * first[i] + (1 - z[i]) * second[i] for i in range(len(z))]
        elif number == 0:
            h = z
        else:
            h = [(1 - z[i]) * first[i] + z[i] * second[i] for i in range(len(z))]
    return layer(h, output)


# --- derivatives ----------------------------------------------------------------------------------------------------


def nested_derivatives(function, x):
    """Value [n, 1], first and second derivatives [d, n, 1] by nested calls of autograd."""
    return nested_derivatives_at(function, x.detach().requires_grad_())


def nested_derivatives_at(function, x):
    """The same at points that are leaves, so that the result can be differentiated by them."""
    u = function(x)

    def slope(y):
        (found,) = torch.autograd.grad(y.sum(), x, create_graph=True, materialize_grads=True)
        return found

    slopes = slope(u)
    second = [slope(slopes[:, j])[:, j] for j in range(x.shape[1])]
    return u, slopes.T[..., None], torch.stack(second)[..., None]
