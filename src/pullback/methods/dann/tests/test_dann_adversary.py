"""The domain-adversarial loss, the proxy A-distance and reverse validation against their definitions."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import lookup_backend

from pullback.core import schedules
from pullback.core.checks import NonFiniteError
from pullback.methods.dann import (
    DomainAdversarialLoss,
    GradientReversal,
    proxy_a_distance,
    reverse_validation,
)
from pullback.methods.dann.tests import reference

untyped: Any = DomainAdversarialLoss


def network(seed=0, outputs=1, dtype=torch.float64):
    torch.manual_seed(seed)
    trunk = nn.Sequential(nn.Linear(5, 7), nn.Tanh()).to(dtype)
    return (
        trunk,
        nn.Linear(7, 3).to(dtype),
        nn.Sequential(nn.Linear(7, 4), nn.Tanh(), nn.Linear(4, outputs)).to(dtype),
    )


def batch(ns=6, nt=4, dtype=torch.float64):
    g = torch.Generator().manual_seed(3)
    return (
        torch.randn(ns, 5, generator=g, dtype=dtype),
        torch.randint(3, (ns,), generator=g),
        torch.randn(nt, 5, generator=g, dtype=dtype) + 1,
    )


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 2.0])
@pytest.mark.parametrize("forward", ["joint", "separate"])
def test_one_step_is_the_three_explicit_updates(lam, forward):
    trunk, label, domain = network()
    xs, ys, xt = batch()
    expected = reference.updates(trunk, label, domain, xs, ys, xt, lam, mu=0.1)
    grl = GradientReversal(lam)
    grl.lam = grl.lam.double().fill_(lam)
    loss_d = DomainAdversarialLoss(domain, grl, forward=forward)
    parameters = [*trunk.parameters(), *label.parameters(), *domain.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    features = trunk(torch.cat([xs, xt]))
    (F.cross_entropy(label(features[:6]), ys) + loss_d(features[:6], features[6:])).backward()
    optimizer.step()
    for got, want in zip(parameters, expected, strict=True):
        torch.testing.assert_close(got.detach(), want, rtol=1e-12, atol=1e-14)


def test_zero_strength_trains_as_source_only_to_the_bit():
    def train(adversary):
        trunk, label, domain = network()
        loss_d = DomainAdversarialLoss(domain, GradientReversal(0.0), forward="separate")
        optimizer = torch.optim.SGD([*trunk.parameters(), *label.parameters()], lr=0.1, momentum=0.9)
        heads = torch.optim.SGD(domain.parameters(), lr=0.1)
        before = [p.clone() for p in domain.parameters()]
        xs, ys, xt = batch()
        for _ in range(10):
            features = trunk(xs)
            loss = F.cross_entropy(label(features), ys)
            if adversary:
                loss = loss + loss_d(features, trunk(xt))
            optimizer.zero_grad()
            heads.zero_grad()
            loss.backward()
            optimizer.step()
            heads.step()
        moved = any(not torch.equal(a, b) for a, b in zip(before, domain.parameters(), strict=True))
        return [*trunk.parameters(), *label.parameters()], moved

    plain, _ = train(False)
    zero, head_learned = train(True)
    assert head_learned
    assert all(torch.equal(a, b) for a, b in zip(plain, zero, strict=True))


def test_value_is_the_printed_sum_of_domain_means():
    trunk, _, domain = network()
    xs, _, xt = batch()
    fs, ft = trunk(xs), trunk(xt)
    want = reference.domain_loss(domain(fs).detach().numpy(), domain(ft).detach().numpy())
    for forward in ("joint", "separate"):
        assert DomainAdversarialLoss(domain, forward=forward)(fs, ft).item() == pytest.approx(want, rel=1e-13)
    assert DomainAdversarialLoss(domain, combine="mean")(fs, ft).item() == pytest.approx(want / 2, rel=1e-13)


def test_unequal_halves_weigh_the_same():
    trunk, _, domain = network()
    xs, _, xt = batch()
    loss = DomainAdversarialLoss(domain)
    fs, ft = trunk(xs), trunk(xt)
    assert loss(fs, torch.cat([ft] * 5)).item() == pytest.approx(loss(fs, ft).item(), rel=1e-13)


def test_swapping_roles_with_a_flipped_head_leaves_the_feature_gradient():
    trunk, _, domain = network()
    xs, _, xt = batch()

    def feature_gradient(head, swap):
        fs, ft = trunk(xs).detach().requires_grad_(), trunk(xt).detach().requires_grad_()
        DomainAdversarialLoss(head)(*((ft, fs) if swap else (fs, ft))).backward()
        return fs.grad, ft.grad

    class Flipped(nn.Module):
        def forward(self, x):
            return -domain(x)

    torch.testing.assert_close(feature_gradient(domain, False), feature_gradient(Flipped(), True))


def test_on_a_linear_gaussian_toy_the_means_of_the_domains_approach():
    g = torch.Generator().manual_seed(0)
    xs = torch.randn(4000, 2, generator=g, dtype=torch.float64)
    xt = torch.randn(4000, 2, generator=g, dtype=torch.float64) + torch.tensor(
        [2.0, 1.0], dtype=torch.float64
    )
    w = torch.tensor([0.8, 0.3], dtype=torch.float64, requires_grad=True)
    head = nn.Linear(1, 1, dtype=torch.float64)
    optimizer = torch.optim.LBFGS(head.parameters(), max_iter=50)

    def closure():
        optimizer.zero_grad()
        loss = DomainAdversarialLoss(head, GradientReversal(0.0))((xs @ w)[:, None], (xt @ w)[:, None])
        loss.backward()
        return loss

    optimizer.step(closure)  # the head at its optimum
    loss = DomainAdversarialLoss(head, GradientReversal(1.0))((xs @ w)[:, None], (xt @ w)[:, None])
    (slope,) = torch.autograd.grad(loss, w)

    def distance(v):
        return ((xt @ v).mean() - (xs @ v).mean()).abs().item()

    with torch.no_grad():
        assert distance(w - 0.1 * slope) < distance(w)


def test_several_domains_by_cross_entropy():
    trunk, _, domain = network(outputs=3)
    xs, _, xt = batch()
    parts = [trunk(xs), trunk(xt), trunk(xt + 1)]
    want = sum(F.cross_entropy(domain(x), torch.full((len(x),), k)) for k, x in enumerate(parts))
    loss = DomainAdversarialLoss(domain)
    torch.testing.assert_close(loss(*parts), want)
    right = [(domain(x).argmax(1) == k).double().mean() for k, x in enumerate(parts)]
    torch.testing.assert_close(loss.accuracy, torch.stack(right).mean())


def test_two_logits_equal_one():
    trunk, _, one = network()
    xs, _, xt = batch()

    class Two(nn.Module):
        def forward(self, x):
            z = one(x)
            return torch.cat([torch.zeros_like(z), z], 1)

    a, b = DomainAdversarialLoss(one), DomainAdversarialLoss(Two())
    torch.testing.assert_close(a(trunk(xs), trunk(xt)), b(trunk(xs), trunk(xt)))
    torch.testing.assert_close(a.accuracy, b.accuracy)


def test_accuracy_counts_each_domain_alike():
    class Threshold(nn.Module):
        def forward(self, x):
            return x[:, 0]

    loss = DomainAdversarialLoss(Threshold())
    source, target = torch.tensor([[-1.0], [-1.0], [-1.0], [1.0]]), torch.tensor([[1.0], [-1.0]])
    loss(source, target)
    assert loss.accuracy.item() == pytest.approx((3 / 4 + 1 / 2) / 2)
    assert not loss.accuracy.requires_grad


def test_joint_and_separate_differ_exactly_where_batch_statistics_do():
    torch.manual_seed(0)
    head = nn.Sequential(nn.Linear(7, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 1))
    fs, ft = torch.randn(8, 7), torch.randn(8, 7) + 3
    joint, separate = DomainAdversarialLoss(head), DomainAdversarialLoss(head, forward="separate")
    assert abs(joint(fs, ft).item() - separate(fs, ft).item()) > 1e-3
    head.eval()
    torch.testing.assert_close(joint(fs, ft), separate(fs, ft))


@pytest.mark.parametrize(("forward", "calls"), [("joint", 1), ("separate", 2)])
def test_number_of_head_calls(forward, calls):
    trunk, _, domain = network()
    seen = []
    domain.register_forward_hook(lambda *_: seen.append(1))
    xs, _, xt = batch()
    DomainAdversarialLoss(domain, forward=forward)(trunk(xs), trunk(xt))
    assert len(seen) == calls


@pytest.mark.parametrize("missing", [None, torch.zeros(0, 7, dtype=torch.float64)])
def test_one_domain_warns_and_does_not_crash(missing):
    trunk, _, domain = network()
    xs, _, _ = batch()
    with pytest.warns(RuntimeWarning, match="domain 0 only"):
        loss = DomainAdversarialLoss(domain)(trunk(xs), missing)
    assert loss.isfinite()


def test_non_finite_policies():
    _, _, domain = network()
    bad, good = (
        torch.full((2, 7), float("nan"), dtype=torch.float64, requires_grad=True),
        torch.ones(2, 7, dtype=torch.float64, requires_grad=True),
    )
    with pytest.raises(NonFiniteError, match=r"DomainAdversarialLoss: the loss is nan"):
        DomainAdversarialLoss(domain)(bad, good)
    with pytest.warns(RuntimeWarning, match="the loss is nan"):
        assert DomainAdversarialLoss(domain, nonfinite="warn")(bad, good).isnan()
    skipped = DomainAdversarialLoss(domain, nonfinite="skip")(bad, good)
    assert skipped.item() == 0.0
    (skipped + 0.0).backward()
    assert good.grad is None


def test_half_precision_logits_are_raised():
    head = nn.Linear(7, 1).bfloat16()
    loss = DomainAdversarialLoss(head)(torch.randn(3, 7).bfloat16(), torch.randn(3, 7).bfloat16())
    assert loss.dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_the_whole_loss_compiles_once():
    trunk, _, domain = network(dtype=torch.float32)
    loss = DomainAdversarialLoss(domain, GradientReversal(schedules.dann()))
    xs, _, xt = batch(dtype=torch.float32)
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return lookup_backend("aot_eager")(graph, inputs)

    compiled = torch.compile(lambda a, b: loss(trunk(a), trunk(b)), backend=backend, fullgraph=True)
    for step in range(4):
        loss.grl.progress(step / 4)
        got = torch.autograd.grad(compiled(xs, xt), trunk[0].weight)[0]
        want = torch.autograd.grad(loss(trunk(xs), trunk(xt)), trunk[0].weight)[0]
        torch.testing.assert_close(got, want)
    assert len(graphs) == 1


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda h: DomainAdversarialLoss(h)(torch.ones(2, 7)), ValueError, "at least 2 domains, got 1"),
        (lambda h: DomainAdversarialLoss(h)(None, None), ValueError, "at least one example, got none"),
        (lambda h: untyped(h, forward="joined"), ValueError, "forward must be one of"),
        (lambda h: untyped(h, combine="none"), ValueError, "combine must be one of"),
        (lambda h: untyped(h, nonfinite="ignore"), ValueError, "nonfinite must be one of"),
        (lambda h: untyped(lambda x: x), TypeError, "domain_head must be of type Module"),
        (lambda h: untyped(h, h), TypeError, "grl must be of type GradientReversal"),
        (
            lambda h: DomainAdversarialLoss(h)(*[torch.ones(2, 7)] * 3),
            ValueError,
            r"logits of shape \(n, 3\), got \(2, 1\)",
        ),
    ],
)
def test_bad_arguments_are_named(call, error, message):
    with pytest.raises(error, match=message):
        call(nn.Linear(7, 1))


# --- proxy A-distance ----------------------------------------------------------------------------------------------


def test_distance_of_equal_and_of_separable_sets():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2000, 3))
    assert proxy_a_distance(a, b) < 0.15
    assert proxy_a_distance(a, b + 20) == 2.0


def test_distance_of_two_gaussians_is_that_of_the_bayes_rule():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randn(6000, 1, generator=g), torch.randn(6000, 1, generator=g) + 2.0
    error = 0.5 * (1 - torch.erf(torch.tensor(1.0 / 2**0.5)).item())  # Phi(-1)
    assert proxy_a_distance(a, b) == pytest.approx(2 * (1 - 2 * error), abs=0.05)
    assert proxy_a_distance(a, b[:600]) == pytest.approx(2 * (1 - 2 * error), abs=0.15)


def test_distance_is_repeatable_and_refuses_nonsense(monkeypatch):
    a, b = np.random.default_rng(0).normal(size=(2, 50, 3))
    assert proxy_a_distance(a, b, seed=1) == proxy_a_distance(a, b, seed=1)
    with pytest.raises(ValueError, match="target must have 3 features"):
        proxy_a_distance(a, b[:, :2])
    with pytest.raises(ValueError, match="source must be finite"):
        proxy_a_distance(a * np.nan, b)
    with pytest.raises(ValueError, match="c must hold at least one value"):
        proxy_a_distance(a, b, c=())
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)
    with pytest.raises(ImportError, match=r'pip install "pullback\[lab\]"'):
        proxy_a_distance(a, b)


# --- reverse validation --------------------------------------------------------------------------------------------


def test_reverse_validation_chooses_the_value_that_comes_home():
    rng = np.random.default_rng(0)
    xs, ys, xt = rng.normal(size=200), rng.integers(0, 2, 200), rng.normal(size=100) + 10
    xs = xs + 4.0 * ys
    calls = []

    def fit(a, labels, b, value, start):
        calls.append((len(a), len(b), value, start))
        return lambda x: (np.asarray(x) > value).astype(int)  # value 2.0 is the right threshold of the source

    found = reverse_validation(fit, (xs, ys), xt, [9.0, 2.0, -9.0])
    assert found.best == 2.0
    assert [value for value, _ in found.risks] == [9.0, 2.0, -9.0]
    assert found.risks[1][1] < 0.1 < found.risks[0][1]
    assert [c[:2] for c in calls[:2]] == [(180, 90), (90, 180)]
    assert calls[0][3] is None
    assert calls[1][3] is not None
    with pytest.raises(ValueError, match="grid must hold at least one value"):
        reverse_validation(fit, (xs, ys), xt, [])
    with pytest.raises(ValueError, match="equally many inputs and labels, got 200 and 3"):
        reverse_validation(fit, (xs, ys[:3]), xt, [1.0])
    with pytest.raises(ValueError, match="validation must leave examples on both sides"):
        reverse_validation(fit, (xs, ys), xt, [1.0], validation=0.0)
