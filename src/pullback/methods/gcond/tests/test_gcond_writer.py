"""The momentum that is written: closed forms, Lion/LARS, state, refusals."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pullback.core.state import StateError
from pullback.methods.gcond import MomentumWriter, TaskAccumulator
from pullback.methods.gcond.tests import reference
from pullback.methods.gcond.tests.test_gcond_accumulator import flat, model, written


def test_a_constant_direction_is_written_as_it_is_at_every_step():
    weight = nn.Parameter(torch.zeros(4, dtype=torch.float64))
    writer = MomentumWriter([weight], beta=0.9)
    u = torch.tensor([1.0, -2.0, 3.0, 0.0], dtype=torch.float64)
    for _ in range(20):
        writer.write_(u)
        torch.testing.assert_close(weight.grad, u, rtol=1e-13, atol=0)


def test_momentum_forgets_at_the_declared_rate():
    weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    writer = MomentumWriter([weight], beta=0.8)
    writer.write_(torch.ones(1, dtype=torch.float64))
    for t in range(2, 6):
        writer.write_(torch.zeros(1, dtype=torch.float64))
        assert written(weight).item() == pytest.approx(0.2 * 0.8 ** (t - 1) / (1 - 0.8**t))


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_lion_lars_per_tensor(beta, dtype):
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(3, 2).to(dtype)), nn.Parameter(torch.zeros(2, dtype=dtype)),
              nn.Parameter(torch.full((2,), 40.0, dtype=dtype))]  # fmt: skip
    writer = MomentumWriter(params, beta, update="lion_lars", coefficient=1e-2, trust_clip=5.0)
    u = [torch.randn(3, 2), torch.ones(2), torch.tensor([1e-3, 0.0])]
    for _ in range(3):
        writer.write_(
            torch.cat([each.flatten() for each in u]).to(torch.float32 if dtype != torch.float64 else dtype)
        )
    for p, direction in zip(params, u, strict=True):
        wanted = reference.lion_lars(direction.double(), p.detach().double(), 1e-2, 5.0)
        torch.testing.assert_close(
            written(p).double(), wanted, rtol=1e-6 if dtype != torch.bfloat16 else 1e-2, atol=1e-12
        )
    assert written(params[1]).double().tolist() == pytest.approx([1e-2] * 2, rel=1e-2)  # a norm of 0: ratio 1
    assert written(params[2]).double().tolist() == pytest.approx(
        [5e-2, 0.0], rel=1e-2
    )  # the ratio is clipped


def test_scale_multiplies_what_is_written_and_not_the_momentum():
    weight = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    for beta in (0.0, 0.5):
        writer = MomentumWriter([weight], beta)
        rows = [torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)]
        writer.combine_(rows, [1.0, -1.0], scale=1024.0)
        torch.testing.assert_close(weight.grad, torch.tensor([-2048.0, -2048.0], dtype=torch.float64))
        writer.combine_(rows, [1.0, -1.0])
        torch.testing.assert_close(weight.grad, torch.tensor([-2.0, -2.0], dtype=torch.float64))


def test_written_gradients_may_be_clipped_in_place():
    net = model()
    writer = MomentumWriter(net)
    writer.write_(torch.ones(37, dtype=torch.float64))
    nn.utils.clip_grad_norm_(net.parameters(), 0.1)
    assert float(flat(net).norm()) == pytest.approx(0.1, rel=1e-4)
    writer.write_(torch.ones(37, dtype=torch.float64))
    torch.testing.assert_close(flat(net), torch.ones(37, dtype=torch.float64))


def test_parameters_frozen_later_are_left_alone():
    net = model()
    writer = MomentumWriter(net)
    writer.write_(torch.ones(37, dtype=torch.float64))
    net[0].requires_grad_(False)
    writer.write_(torch.ones(37, dtype=torch.float64))
    assert [p.grad is None for p in net.parameters()] == [True, True, False, False]


def test_writer_state_resumes_and_refuses_what_does_not_fit():
    net, other = model(), model()
    first, second = MomentumWriter(net, 0.9), MomentumWriter(other, 0.9)
    u = torch.randn(5, 37, dtype=torch.float64)
    for k in range(3):
        first.write_(u[k])
    second.load_state_dict(first.state_dict())
    for k in (3, 4):
        first.write_(u[k])
        second.write_(u[k])
    assert torch.equal(flat(net), flat(other))
    state = first.state_dict()
    for wrong in (
        {**state, "format_version": 2},
        {**state, "sizes": [[20, 5, 9, 3]]},
        {**state, "momentum": []},
        {key: value for key, value in state.items() if key != "steps"},
    ):
        with pytest.raises(StateError):
            second.load_state_dict(wrong)
    assert second.steps == 5


# --- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"beta": 1.0}, ValueError, "beta must be < 1, got 1"),
        ({"beta": -0.1}, ValueError, r"beta must be in \[0, 1\], got -0.1"),
        ({"update": "lion"}, ValueError, "Did you mean 'lion_lars'"),
        ({"coefficient": 0.0}, ValueError, "coefficient must be > 0, got 0"),
        ({"trust_clip": -1.0}, ValueError, "trust_clip must be > 0, got -1"),
    ],
)
def test_bad_options_of_the_writer_are_named(options, error, message):
    with pytest.raises(error, match=message):
        MomentumWriter(model(), **options)
    with pytest.raises(ValueError, match=r"direction must have \[37\] entries, got \[\[3\]\]"):
        MomentumWriter(model()).write_(torch.zeros(3))
    with pytest.raises(ValueError, match="process_group must be one of 'auto', got 'all'"):
        TaskAccumulator(model(), ("a",), process_group="all")


def test_parameters_that_moved_are_refused():
    net = model()
    writer = MomentumWriter(net)
    net.float()
    with pytest.raises(
        RuntimeError,
        match=r"MomentumWriter: '0\.weight' must stay on cpu in torch\.float64, got cpu and torch\.float32",
    ):
        writer.write_(torch.zeros(37, dtype=torch.float64))


def test_reprs():
    net = model()
    assert repr(TaskAccumulator(net, {"a": 0.5})) == "TaskAccumulator({a: 0.5}, parameters=37, ranks=1)"
    assert repr(MomentumWriter(net)) == "MomentumWriter(beta=0.9, update='gradient', steps=0)"
