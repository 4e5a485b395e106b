"""Slow literal transcriptions of the paper's equations in float64: the oracles of this room."""

from __future__ import annotations

import math

import numpy as np
import torch


def lam_at(p, gamma=10.0):
    """The coefficient's schedule as printed in section 5.2.2."""
    return 2.0 / (1.0 + math.exp(-gamma * p)) - 1.0


def mu_at(p, mu0=0.01, alpha=10.0, beta=0.75):
    """The learning rate's schedule as printed in section 5.2.2."""
    return mu0 / (1.0 + alpha * p) ** beta


def domain_loss(logits_source, logits_target):
    """mean_S L_d + mean_T L_d with d = 0 source, d = 1 target, one probability at a time."""
    total = 0.0
    for logits, d in ((logits_source, 0), (logits_target, 1)):
        losses = []
        for z in np.asarray(logits, dtype=np.float64).reshape(-1):
            q = 1.0 / (1.0 + math.exp(-z))
            losses.append(-math.log(q) if d == 1 else -math.log(1.0 - q))
        total += sum(losses) / len(losses)
    return total


def updates(trunk, label_head, domain_head, xs, ys, xt, lam, mu):
    """Eq. 13-15 with head strength 1, from three separate gradients: new values of th_f, th_y, th_d."""
    fs, ft = trunk(xs), trunk(xt)
    label = torch.nn.functional.cross_entropy(label_head(fs), ys)
    bce = torch.nn.functional.binary_cross_entropy_with_logits
    zs, zt = domain_head(fs), domain_head(ft)
    domain = bce(zs, torch.zeros_like(zs)) + bce(zt, torch.ones_like(zt))
    th_f, th_y, th_d = (list(m.parameters()) for m in (trunk, label_head, domain_head))
    label_f = torch.autograd.grad(label, th_f, retain_graph=True)
    label_y = torch.autograd.grad(label, th_y, retain_graph=True)
    domain_f = torch.autograd.grad(domain, th_f, retain_graph=True)
    domain_d = torch.autograd.grad(domain, th_d)
    new_f = [p - mu * (a - lam * b) for p, a, b in zip(th_f, label_f, domain_f, strict=True)]
    new_y = [p - mu * a for p, a in zip(th_y, label_y, strict=True)]
    new_d = [p - mu * a for p, a in zip(th_d, domain_d, strict=True)]
    return [p.detach() for p in (*new_f, *new_y, *new_d)]


def sigmoid(x):
    return 1.0 / (1.0 + np.exp(-x))


def algorithm_1(weights, x, y, xt, lam, mu, adversarial=True):
    """One update of Algorithm 1, unit by unit, from one source and one target example; returns new weights."""
    W, b, V, c, u, z = (np.array(w, dtype=np.float64) for w in weights)
    hidden, d = W.shape
    classes = len(c)
    h = np.array([sigmoid(sum(W[k, i] * x[i] for i in range(d)) + b[k]) for k in range(hidden)])
    scores = np.array([sum(V[m, k] * h[k] for k in range(hidden)) + c[m] for m in range(classes)])
    f = np.exp(scores) / np.exp(scores).sum()
    dc = np.array([-((1.0 if m == y else 0.0) - f[m]) for m in range(classes)])
    dV = np.outer(dc, h)
    db = np.array([sum(V[m, k] * dc[m] for m in range(classes)) * h[k] * (1 - h[k]) for k in range(hidden)])
    dW = np.outer(db, x)
    source = sigmoid(z[0] + u @ h)
    dz, du = lam * (1 - source), lam * (1 - source) * h
    if adversarial:
        tmp = lam * (1 - source) * u * h * (1 - h)
        db, dW = db + tmp, dW + np.outer(tmp, x)
    ht = np.array([sigmoid(sum(W[k, i] * xt[i] for i in range(d)) + b[k]) for k in range(hidden)])
    target = sigmoid(z[0] + u @ ht)
    dz, du = dz - lam * target, du - lam * target * ht
    if adversarial:
        tmp = -lam * target * u * ht * (1 - ht)
        db, dW = db + tmp, dW + np.outer(tmp, xt)
    return W - mu * dW, b - mu * db, V - mu * dV, c - mu * dc, u + mu * du, z + mu * dz
