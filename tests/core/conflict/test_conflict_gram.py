"""Gram matrices of gradients against plain loops; grouping; questions to the graph."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from pullback.core import gram as module
from pullback.core.autograph import reaches
from pullback.core.gram import gram, with_remainder
from pullback.core.grouping import grouped, without_wrappers

SHAPES = [(3, 4), (5,), (), (2, 3, 2), (0, 4)]
GROUP_OF = [0, 1, 0, 1, 0]


def loops(gradients, group_of, groups):
    """Entry by entry in Python floats."""
    tasks = len(gradients)
    found = [[[0.0] * tasks for _ in range(tasks)] for _ in range(groups)]
    for position, group in enumerate(group_of):
        for i in range(tasks):
            for j in range(tasks):
                a, b = gradients[i][position], gradients[j][position]
                if a is not None and b is not None:
                    pairs = zip(a.double().flatten().tolist(), b.double().flatten().tolist(), strict=True)
                    found[group][i][j] += math.fsum(x * y for x, y in pairs)
    return torch.tensor(found, dtype=torch.float64)


def drawn(tasks=3, dtype=torch.float64, seed=0):
    stream = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(s, generator=stream, dtype=torch.float64).to(dtype) for s in SHAPES]
        for _ in range(tasks)
    ]


def ours(gradients, group_of=GROUP_OF, groups=2):
    params = [torch.zeros(shape, dtype=gradients[0][0].dtype) for shape in SHAPES]
    return gram(gradients, params, group_of, groups, names=list("abcde"))


@pytest.mark.parametrize("chunk", [1, 4, 7, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_it_is_the_plain_loops_whatever_the_chunk(monkeypatch, chunk, dtype):
    monkeypatch.setattr(module, "CHUNK", chunk)
    gradients = drawn(dtype=dtype)
    gradients[1][1] = None
    gradients[2][0] = gradients[2][2] = None
    assert torch.allclose(ours(gradients), loops(gradients, GROUP_OF, 2), rtol=1e-12, atol=1e-12)


def test_no_copy_of_all_parameters_is_made(monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 8)
    sizes = []
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, **k: sizes.append(a[0]) or empty(*a, **k))
    ours(drawn())
    assert sizes == [3 * 8, 3 * 8]


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
def test_products_neither_underflow_nor_overflow_in_float32(scale):
    gradients = drawn(dtype=torch.float32)
    scaled = [[g * scale for g in row] for row in gradients]
    assert torch.allclose(ours(scaled) / scale**2, loops(gradients, GROUP_OF, 2), rtol=1e-5, atol=1e-5)


def test_views_in_another_memory_order_and_complex_gradients_count_alike():
    plain = [[torch.randn(2, 3, 4, 4), torch.randn(3, dtype=torch.complex64)] for _ in range(2)]
    params = [torch.zeros_like(g) for g in plain[0]]
    moved = [[row[0].to(memory_format=torch.channels_last), row[1]] for row in (plain[0],)] + [plain[1]]
    real = [[row[0], torch.view_as_real(row[1])] for row in plain]
    got = gram(moved, params, [0, 1], 2, names=["a", "b"])
    assert torch.allclose(got, loops(real, [0, 1], 2), rtol=1e-12)


def test_a_sparse_gradient_is_refused_by_name():
    gradients = drawn(2)
    gradients[1][1] = torch.ones(5).double().to_sparse()
    with pytest.raises(TypeError, match=r"gradient of b must be dense, got layout torch.sparse_coo"):
        ours(gradients)


@pytest.mark.parametrize("tasks", [2, 4])
@pytest.mark.parametrize("scale", [1.0, 65536.0, 0.25])
def test_the_last_row_is_what_remains_of_the_scaled_sum(tasks, scale):
    gradients = drawn(tasks)
    total = [scale * sum(column) for column in zip(*gradients, strict=True)]
    found = with_remainder(ours([*gradients[:-1], total]), torch.tensor(scale), torch.float64)
    assert torch.allclose(found, ours(gradients), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("size", [1e-2, 1e-4])
def test_a_small_remainder_keeps_its_digits(size):
    gradients = drawn(2, torch.float64)
    gradients[1] = [g * size for g in gradients[1]]
    total = [a + b for a, b in zip(*gradients, strict=True)]
    found = with_remainder(ours([gradients[0], total]), torch.tensor(1.0), torch.float64)
    assert torch.allclose(found, ours(gradients), rtol=1e-6, atol=0)


def test_a_remainder_of_rounding_is_zero_and_nan_is_not():
    gradients = drawn(2, torch.float32)
    one = gradients[0]
    noisy = [g * (1 + 5e-7 * torch.randn(g.shape)) for g in one]
    found = with_remainder(ours([one, noisy]), torch.tensor(1.0), torch.float32)
    assert (found[:, 1] == 0).all()
    assert (found[:, :, 1] == 0).all()
    assert torch.equal(found[:, 0, 0], ours([one, noisy])[:, 0, 0])
    noisy[0] = noisy[0] * math.nan
    found = with_remainder(ours([one, noisy]), torch.tensor(1.0), torch.float32)
    assert found[0, 1].isnan().all()
    assert found[0, 0, 0].isfinite()
    assert (found[1, 1] == 0).all()


# --- groups -------------------------------------------------------------------------------------------------


def names(rows):
    return [(name, group) for name, _, group in rows]


PARAMS = {name: torch.zeros(1) for name in ("stem.weight", "b1.weight", "b1.bias", "b2.weight", "scale")}


def test_groups_by_module_function_and_pattern():
    assert names(grouped(PARAMS)) == [
        ("stem.weight", "stem"), ("b1.weight", "b1"), ("b1.bias", "b1"), ("b2.weight", "b2"), ("scale", "scale"),
    ]  # fmt: skip
    only = grouped(PARAMS, lambda name: "weights" if name.endswith("weight") else None)
    assert names(only) == [(n, "weights") for n in ("stem.weight", "b1.weight", "b2.weight")]
    ordered = grouped(PARAMS, {"late": ("b2.*", "scale"), "b1": "b1.*", "rest": "*"})
    assert names(ordered) == [
        ("b2.weight", "late"), ("scale", "late"), ("b1.weight", "b1"), ("b1.bias", "b1"), ("stem.weight", "rest"),
    ]  # fmt: skip


def test_bad_groups_are_refused():
    with pytest.raises(
        ValueError, match=r"groups must match .* got none for \['c'\]. Names look like 'stem.weight'"
    ):
        grouped(PARAMS, {"b": "b1.*", "c": "trunk.*"})
    with pytest.raises(ValueError, match="got none for any group"):
        grouped(PARAMS, lambda name: None)
    with pytest.raises(TypeError, match="groups must be None, a function"):
        grouped(PARAMS, 3)
    with pytest.raises(TypeError, match=r"groups\('stem.weight'\) must be a string or None, got 1"):
        grouped(PARAMS, lambda name: 1)


def test_wrappers_are_looked_through():
    inner = {"module._orig_mod.stem.weight": 0, "module._orig_mod.block._orig_mod.bias": 1}
    assert without_wrappers(inner) == {"stem.weight": 0, "block.bias": 1}
    assert without_wrappers({"module.a": 0, "head.b": 1}) == {"module.a": 0, "head.b": 1}


# --- the graph ----------------------------------------------------------------------------------------------


def test_a_path_is_found_and_a_closed_one_is_not():
    net, other = nn.Linear(2, 2), nn.Linear(2, 2)
    first, second, third = net(torch.ones(3, 2)).square().mean(0).sum().expand(3).clone().unbind()
    total = 2 * first + second
    assert reaches(total, [net.weight])
    assert not reaches(total, [other.weight])
    assert not reaches(total, [net.weight], around=[first, second])
    assert reaches(total + third, [net.weight], around=[first, second])  # another output of the same node
    assert reaches(total + net.bias.sum(), [net.bias], around=[first, second])
    assert reaches(net.weight, [net.weight])
    assert not reaches(total.detach(), [net.weight])
