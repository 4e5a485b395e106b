"""The two forms of a residual stack and their expansion, written out literally in float64."""

from __future__ import annotations

from itertools import combinations
from math import comb

import torch


def sequential(functions, x):
    """z_0 = x, z_k = z_(k-1) + F_k(z_(k-1))."""
    z = x
    for f in functions:
        z = z + f(z)
    return z


def first_order(functions, x):
    """x + sum_i F_i(x)."""
    y = x
    for f in functions:
        y = y + f(x)
    return y


def second_order(functions, x):
    """x + sum_j [F_j(x) + J_j(x) sum_(i<j) F_i(x)], with the Jacobian as a matrix; x of shape [d]."""
    y = x
    for j, f in enumerate(functions):
        tangent = torch.zeros_like(x)
        for i in range(j):
            tangent = tangent + functions[i](x)
        y = y + f(x) + torch.autograd.functional.jacobian(f, x) @ tangent
    return y


def expansion(matrices, x, order):
    """All products of at most ``order`` linear branches, later ones on the left: the subsets in their order."""
    y, terms = x, 0
    for size in range(1, order + 1):
        for subset in combinations(range(len(matrices)), size):
            term = x
            for k in subset:
                term = matrices[k] @ term
            y, terms = y + term, terms + 1
    assert terms == sum(comb(len(matrices), size) for size in range(1, order + 1))
    return y


def jacobian_product(functions, x):
    """(I + J_N(z_(N-1))) ... (I + J_1(z_0)) of the sequence."""
    product, z = torch.eye(len(x), dtype=x.dtype), x
    for f in functions:
        product = (torch.eye(len(x), dtype=x.dtype) + torch.autograd.functional.jacobian(f, z)) @ product
        z = z + f(z)
    return product


def jacobian_sum(functions, x):
    """I + sum_k J_k(x) of the parallel form of order 1."""
    total = torch.eye(len(x), dtype=x.dtype)
    for f in functions:
        total = total + torch.autograd.functional.jacobian(f, x)
    return total
