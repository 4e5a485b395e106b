"""What evaluation keeps, how many products a pass takes, and how much memory."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pullback.methods.tversky import EncodedRows, TverskyProjection


def rows(*size, seed=0, dtype=torch.float32):
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def head(d=6, m=4, k=9, **options) -> Any:
    torch.manual_seed(0)
    return TverskyProjection(d, m, k, **options)


# --- what evaluation keeps --------------------------------------


class Count(TorchDispatchMode):
    """Counts matrix products, and the largest tensor that an operation makes."""

    def __init__(self):
        super().__init__()
        self.products, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.products += func in {
            torch.ops.aten.mm.default,
            torch.ops.aten.addmm.default,
            torch.ops.aten.bmm.default,
        }
        for each in out if isinstance(out, tuple | list) else (out,):
            if isinstance(each, torch.Tensor):
                self.largest = max(self.largest, each.numel())
        return out


def products(call):
    with Count() as count:
        out = call()
    return count.products, out


@pytest.mark.parametrize(
    "form", [{}, {"intersection": "min"}, {"model": "ratio"}, {"gate": "tanh"}, {"normalize": True}]
)
def test_evaluation_keeps_the_prototypes_side_until_a_parameter_changes(form):
    layer, x = head(**form).eval(), rows(5, 6)
    with torch.no_grad():
        cold, out = products(lambda: layer(x))
        warm, again = products(lambda: layer(x))
        assert warm == cold - 1
        assert torch.equal(out, again)
    torch.testing.assert_close(layer(x), out)  # with gradients nothing is kept
    assert products(lambda: layer(x))[0] == cold
    optimizers = (
        torch.optim.SGD(layer.parameters(), 0.1),
        torch.optim.Adam(layer.parameters(), 0.1, fused=True),
        torch.optim.AdamW(layer.parameters(), 0.1, foreach=True),
    )
    for optimizer in optimizers:
        layer(x).square().sum().backward()
        optimizer.step()
        with torch.no_grad():
            number, changed = products(lambda: layer(x))
            assert number == cold
            torch.testing.assert_close(changed, copy.deepcopy(layer).train()(x))


def test_what_is_kept_follows_loading_moving_and_swapping():
    layer, other, x = head().eval(), head().eval(), rows(5, 6)
    with torch.no_grad():
        other.feature_bank.weight.mul_(-1)
        wanted = other(x)
        assert not torch.equal(layer(x), wanted)
        layer.load_state_dict(other.state_dict())
        assert torch.equal(layer(x), wanted)
        torch.testing.assert_close(layer.double()(x.double()).float(), wanted)
        layer.float()
        torch.testing.assert_close(layer(x), wanted)
        layer.prototypes.weight = nn.Parameter(2 * layer.prototypes.weight)
        torch.testing.assert_close(layer(x), copy.deepcopy(layer).train()(x))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        assert layer(x).dtype == torch.float32
        layer.prototypes.weight.data.zero_()  # leaves no trace
        layer.eval()
        torch.testing.assert_close(layer(x), copy.deepcopy(layer).train()(x))
    with torch.inference_mode():
        layer(x)
    for p in layer.parameters():
        p.requires_grad_(False)
    point = x.clone().requires_grad_()
    assert torch.autograd.grad(layer(point).sum(), point)[0].shape == x.shape
    swapped = {"prototypes.weight": rows(4, 6, seed=5)}
    with torch.no_grad():
        one = torch.func.functional_call(layer, swapped, x)
        swapped["prototypes.weight"] = rows(4, 6, seed=6)
        assert not torch.equal(torch.func.functional_call(layer, swapped, x), one)


def test_copies_and_files_do_not_hold_what_is_kept():
    layer, x = head().eval(), rows(5, 6)
    with torch.no_grad():
        layer(x)
        assert layer._kept.full
        assert not copy.deepcopy(layer)._kept.full
        file = io.BytesIO()
        torch.save(layer, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
        assert not loaded._kept.full
        assert torch.equal(loaded(x), layer(x))


def test_encoded_rows_are_never_kept():
    linear = nn.Linear(9, 6)
    encoder = nn.Sequential(nn.Flatten(), linear)
    layer = TverskyProjection(6, 4, 8, prototypes=EncodedRows(torch.rand(4, 3, 3), encoder)).eval()
    x = rows(5, 6)
    with torch.no_grad():
        before = layer(x)
        linear.weight.mul_(-1)
        assert not torch.equal(layer(x), before)


# --- cost -------------------------------------------------------


N, M, K = 24, 40, 64  # NK + MK + NM = 5,056 of NMK = 61,440


@pytest.mark.parametrize(
    ("form", "forward", "backward"),
    [
        ({}, 2, 3),
        ({"intersection": "mean"}, 2, 2),
        ({"difference": "subtractmatch"}, 3, 4),
        ({"intersection": "gmean", "difference": "subtractmatch"}, 2, 2),
        ({"model": "ratio"}, 3, 4),
        ({"gate": "tanh"}, 2, 4),
    ],
)
def test_products_and_memory_of_the_fused_forms(form, forward, backward):
    """Products of size n m k beside the four small ones of the projections; no tensor of pairs times features."""
    layer, x = head(m=M, k=K, **form), rows(N, 6).requires_grad_()
    params = [p for p in layer.parameters() if p.requires_grad]
    kept = []
    with (
        torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t),
        Count() as count,
    ):
        out = layer(x)
    assert count.products == forward + 2
    assert count.largest <= max(N * K, M * K, N * M)
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(storages.values()) <= 4 * 8 * (N * K + M * K + N * M)
    with Count() as count:
        torch.autograd.grad(out, [x, *params], torch.ones_like(out))
    assert count.products == backward + 4
    assert count.largest <= max(N * K, M * K, N * M)


def test_product_contrast_keeps_saliences_and_what_is_absent():
    layer, x = head(m=M, k=K), rows(N, 6)
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t,
        lambda t: t,
    ):
        layer(x)
    inputs = x.numel() + sum(p.numel() for p in layer.parameters())
    assert sum(kept.values()) <= 4 * (inputs + 2 * (N * K + M * K))


@pytest.mark.parametrize("intersection", ["min", "softmin"])
def test_blocks_bound_the_memory_of_per_feature_reductions(intersection):
    layer, x = head(m=M, k=K, intersection=intersection, reduce="feature", chunk=2), rows(N, 6)
    with Count() as count:
        layer(x).sum().backward()
    assert count.largest <= max(N * K * 2, M * K, N * M)
    if intersection == "min":
        layer = head(m=M, k=K, intersection="min", reduce="feature")
        with Count() as count:
            layer(x).sum().backward()
        assert count.largest <= max(N * K, M * K, N * M)


def test_equals_the_derivative_of_the_plain_form():
    """The hand-written backward pass against autograd on the formula as it stands, with second derivatives."""
    s, t = (
        rows(5, 7, dtype=torch.float64).requires_grad_(),
        rows(4, 7, seed=1, dtype=torch.float64).requires_grad_(),
    )
    layer = head(d=7, k=7).double()
    with torch.no_grad():
        layer.feature_bank.weight.copy_(torch.eye(7))
    weights = [layer.theta, layer.alpha, layer.beta]

    def plain():
        u, v = s * (s > 0), t * (t > 0)
        return (
            layer.theta * u @ v.T
            - layer.alpha * u @ (t <= 0).double().T
            - layer.beta * (s <= 0).double() @ v.T
        )

    def fused():
        return torch.func.functional_call(layer, {"prototypes.weight": t}, s)

    results = []
    for form in (plain, fused):
        first = torch.autograd.grad(form().pow(3).sum(), [s, t, *weights], create_graph=True)
        second = torch.autograd.grad(torch.stack([g.square().sum() for g in first]).sum(), [s, t, *weights])
        results.append([*first, *second])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)
