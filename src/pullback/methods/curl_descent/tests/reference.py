"""The equations entry by entry, in double precision and without cleverness: the oracle."""

from __future__ import annotations

import math

import numpy as np

# --- the rule (official simulation, mode "col") ------------------------------------------------------------


def diagonal(signs):
    """D = diag(+-1) as the dense matrix that the equations write."""
    d = np.zeros((len(signs), len(signs)))
    for i, sign in enumerate(signs):
        d[i, i] = sign
    return d


def first_signs(n, alpha):
    """The first round(alpha n) of n entries are -1."""
    return [-1.0 if i < round(alpha * n) else 1.0 for i in range(n)]


def field(w1, w2, x, y, d1, d2, phi=np.tanh, dphi=lambda a: 1 - np.tanh(a) ** 2):
    """Update directions of both layers (times -eta the updates), averaged over examples.

    delta2 = e, delta1 = (W2^T delta2) phi'(a); dW2 ~ <delta2 h^T> D2, dW1 ~ <delta1 x^T> D1. Only the update is
    flipped, W2^T delta2 is not.
    """
    u1, u2 = np.zeros_like(w1), np.zeros_like(w2)
    for k in range(len(x)):
        a = w1 @ x[k]
        h = phi(a)
        delta2 = w2 @ h - y[k]
        delta1 = (w2.T @ delta2) * dphi(a)
        u2 += np.outer(delta2, h) / len(x)
        u1 += np.outer(delta1, x[k]) / len(x)
    return u1 @ diagonal(d1), u2 @ diagonal(d2)


def linear_field(w1, w2, target, sigma, d1, d2):
    """The same for a linear net with scalar output under the input covariance ``sigma``."""
    error = (w2 @ w1 - target) @ sigma
    return np.outer(w2[0], error[0]) @ diagonal(d1), (error @ w1.T) @ diagonal(d2)


def jacobian(w1, w2, target, sigma, d1, d2, step=1e-6):
    """Central differences of the update direction -field at (w1, w2)."""
    flat = np.concatenate([w1.ravel(), w2.ravel()])

    def minus_field(theta):
        one, two = theta[: w1.size].reshape(w1.shape), theta[w1.size :].reshape(w2.shape)
        u1, u2 = linear_field(one, two, target, sigma, d1, d2)
        return -np.concatenate([u1.ravel(), u2.ravel()])

    columns = []
    for i in range(flat.size):
        up, down = flat.copy(), flat.copy()
        up[i] += step
        down[i] -= step
        columns.append((minus_field(up) - minus_field(down)) / (2 * step))
    return np.stack(columns, axis=1)


# --- theory ------------------------------------------------------------------------------------------------


def operator(w1, w2, d1, d2):
    """S = ||W2||^2 D1 + W1^T D2 W1, entry by entry."""
    n, m = w1.shape
    s = np.zeros((m, m))
    for i in range(m):
        for j in range(m):
            s[i, j] = sum(w1[k, i] * d2[k] * w1[k, j] for k in range(n))
        s[i, i] += d1[i] * sum(w2[0, k] ** 2 for k in range(n))
    return s


def lowest_of_random(ratio, alpha, layer, size=500, seed=0):
    """lambda_min of one large random S: W1 of variance 1/M, ||W2|| = 1."""
    rng = np.random.default_rng(seed)
    m = round(size * ratio / (1 + ratio))
    n = size - m
    w1 = rng.standard_normal((n, m)) / math.sqrt(m)
    d1 = np.array(first_signs(m, alpha if layer == "hidden" else 0.0))
    d2 = np.array(first_signs(n, alpha if layer == "readout" else 0.0))
    return np.linalg.eigvalsh(np.diag(d1) + w1.T @ (d2[:, None] * w1))[0]


def invariants(w1, w2, d1, d2):
    """sum_j D1_jj W1_ij^2 - D2_ii W2_i^2 of every hidden unit i."""
    return [
        sum(d1[j] * w1[i, j] ** 2 for j in range(w1.shape[1]))
        - d2[i] * sum(w2[p, i] ** 2 for p in range(len(w2)))
        for i in range(len(w1))
    ]


def order_parameter(path):
    """q = mean_i Var_t(w_i) / Var_i(mean_t w_i) of a path [times][weights]."""
    times, weights = len(path), len(path[0])
    means = [sum(row[i] for row in path) / times for i in range(weights)]
    within = [sum((row[i] - means[i]) ** 2 for row in path) / times for i in range(weights)]
    grand = sum(means) / weights
    return (sum(within) / weights) / (sum((m - grand) ** 2 for m in means) / weights)


# --- the 1-1-1 net -----------------------------------------------------------------------------------------


def toy_orbit(w1, w2, target, eta, steps):
    """y = w2 w1 x with D = (-1, +1): the path of both weights."""
    path = [(w1, w2)]
    for _ in range(steps):
        error = w2 * w1 - target
        w1, w2 = w1 + eta * w2 * error, w2 - eta * w1 * error
        path.append((w1, w2))
    return path
