"""The equations, slow and literal: one sample at a time where it matters, float64, one formula a line."""

from __future__ import annotations

import math
from itertools import pairwise

import torch


def coefficients(name, t):
    """alpha, sigma, alpha', sigma' at a number t; derivatives by hand."""
    if name == "cosine":
        c, s, w = math.cos(math.pi * t / 2), math.sin(math.pi * t / 2), math.pi / 2
        return c, s, -w * s, w * c
    if name == "linear":
        return 1 - t, t, -1.0, 1.0
    if name == "ve":
        return 1.0, t, 0.0, 1.0
    total, rate = 0.1 * t + 19.9 * t**2 / 2, 0.1 + 19.9 * t
    alpha = math.exp(-total / 2)
    sigma = math.sqrt(1 - alpha**2)
    return alpha, sigma, -rate / 2 * alpha, rate / 2 * alpha**2 / sigma if sigma else math.inf


def level(name, t):
    alpha, sigma, _, _ = coefficients(name, t)
    return math.log(alpha / sigma)


def mixture_score(x, t, name, means, stds, weights):
    """sum_k r_k (alpha m_k - x) / (alpha^2 s_k^2 + sigma^2) for one point x [D]."""
    alpha, sigma, _, _ = coefficients(name, t)
    dimension = len(x)
    densities, pulls = [], []
    for mean, std, weight in zip(means, stds, weights, strict=True):
        variance = alpha**2 * std**2 + sigma**2
        gap = alpha * mean - x
        densities.append(
            weight
            * math.exp(-float(gap @ gap) / (2 * variance))
            / (2 * math.pi * variance) ** (dimension / 2)
        )
        pulls.append(gap / variance)
    return sum(d * pull for d, pull in zip(densities, pulls, strict=True)) / sum(densities)


def readings(x, score, t, name):
    """x0, eps and velocity from a score: x0 = (x + sigma^2 score) / alpha, v = f x - g^2 score / 2."""
    alpha, sigma, dalpha, dsigma = coefficients(name, t)
    f = dalpha / alpha
    g2 = 2 * sigma * dsigma - 2 * f * sigma**2
    return {
        "score": score,
        "eps": -sigma * score,
        "x0": (x + sigma**2 * score) / alpha,
        "v": f * x - g2 / 2 * score,
    }


def ddim(x, s, t, x0, name, eta=0.0, z=None):
    a, sigma_s, _, _ = coefficients(name, s)
    b, sigma_t, _, _ = coefficients(name, t)
    eps = (x - a * x0) / sigma_s
    c2 = eta**2 * (sigma_t**2 / sigma_s**2) * (sigma_s**2 - (a / b) ** 2 * sigma_t**2)
    out = b * x0 + math.sqrt(sigma_t**2 - c2) * eps
    return out if z is None else out + math.sqrt(c2) * z


def ancestral(x, s, t, x0, name, z):
    """DDPM: the Gaussian q(x_t | x_s, x0) of a Markov chain x_s = (a / b) x_t + noise, by Bayes' rule."""
    a, sigma_s, _, _ = coefficients(name, s)
    b, sigma_t, _, _ = coefficients(name, t)
    ratio, added = a / b, sigma_s**2 - (a / b) ** 2 * sigma_t**2
    precision = 1 / sigma_t**2 + ratio**2 / added
    mean = (b * x0 / sigma_t**2 + ratio * x / added) / precision
    return mean + z / math.sqrt(precision)


def dpmpp_2m(x, times, predict_x0, name):
    """x_t = (sigma_t / sigma_s) x - alpha_t (e^-h - 1) D."""
    x0_before, h_before = None, math.nan
    for s, t in pairwise(times):
        _, sigma_s, _, _ = coefficients(name, s)
        alpha_t, sigma_t, _, _ = coefficients(name, t)
        x0 = predict_x0(x, s)
        if sigma_t == 0:
            return alpha_t * x0
        h = level(name, t) - level(name, s)
        d = x0 if x0_before is None else x0 + 0.5 * (h / h_before) * (x0 - x0_before)
        x = sigma_t / sigma_s * x - alpha_t * (math.exp(-h) - 1) * d
        x0_before, h_before = x0, h
    return x


def unipc(x, times, predict_x0, name):
    """Predictor and corrector of order 2 in data form, with the 2 x 2 system solved by torch."""
    older, h_before = None, math.nan
    m0 = predict_x0(x, times[0])
    for i, (s, t) in enumerate(pairwise(times)):
        _, sigma_s, _, _ = coefficients(name, s)
        alpha_t, sigma_t, _, _ = coefficients(name, t)
        final = i == len(times) - 2
        if sigma_t == 0:
            return alpha_t * m0
        h = level(name, t) - level(name, s)
        hh, p = -h, math.expm1(-h)
        base = sigma_t / sigma_s * x - alpha_t * p * m0
        if older is None or final:
            guess = base
        else:
            r = -h_before / h
            guess = base - alpha_t * p * 0.5 * (older - m0) / r
        if final:
            return guess
        m1 = predict_x0(guess, t)
        if older is None:
            x = base - alpha_t * p * 0.5 * (m1 - m0)
        else:
            right = torch.tensor([(p / hh - 1) / p, 2 * ((p / hh - 1) / hh - 0.5) / p], dtype=torch.float64)
            rho = torch.linalg.solve(
                torch.tensor([[1.0, 1.0], [r, 1.0]], dtype=torch.float64), right
            ).tolist()
            x = base - alpha_t * p * (rho[0] * (older - m0) / r + rho[1] * (m1 - m0))
        older, m0, h_before = m0, m1, h
    return x


def edm_heun(x, levels, denoise):
    """Algorithm 1 of Karras et al. without churn: levels falling to 0, ``denoise(x, sigma)``."""
    for high, low in pairwise(levels):
        slope = (x - denoise(x, high)) / high
        moved = x + (low - high) * slope
        if low > 0:
            again = (moved - denoise(moved, low)) / low
            moved = x + (low - high) * 0.5 * (slope + again)
        x = moved
    return x


def karras(steps, low=0.002, high=80.0):
    """sigma_i = (high^(1/7) + i / (N - 1) (low^(1/7) - high^(1/7)))^7, i < N, and 0."""
    a, b = high ** (1 / 7), low ** (1 / 7)
    return [(a + i / (steps - 1) * (b - a)) ** 7 for i in range(steps)] + [0.0]


def gaussian_flow(x, s, t, name, mean, std):
    """alpha_t m + (G_t / G_s) (x - alpha_s m) with G^2 = alpha^2 std^2 + sigma^2."""
    a, sigma_s, _, _ = coefficients(name, s)
    b, sigma_t, _, _ = coefficients(name, t)
    return b * mean + math.sqrt((b**2 * std**2 + sigma_t**2) / (a**2 * std**2 + sigma_s**2)) * (x - a * mean)


def mean_velocity(x, s, t, name, mean, std):
    """(Psi(x) - x) / (t - s) of a Gaussian."""
    return (gaussian_flow(x, s, t, name, mean, std) - x) / (t - s)
