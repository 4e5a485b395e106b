"""The Frobenius projector against loops in float64: norms, rows, joint blocks, counts, refusals, state."""

import copy
import warnings

import pytest
import torch
from projected import draw
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pullback.core.attachment import attach
from pullback.core.frobenius import FrobeniusProjector
from pullback.testing import Case, parametrize_with_checks

TOLERANCE = 2.0**-9  # of half precision


def perceptron_projector(**settings):
    shapes = {"0.weight": (6, 8), "2.weight": (3, 6)}  # those of the contract's perceptron, see `user_model`
    named = {
        name: nn.Parameter(torch.linspace(0.1, 0.5, a * b).view(a, b)) for name, (a, b) in shapes.items()
    }
    return FrobeniusProjector(named, **settings)


def user_model():
    return nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 3))


CASES = [
    Case(
        name=f"FrobeniusProjector[{name}]",
        kind="transform",
        model=user_model,
        build=build,
        neutral=lambda: perceptron_projector(every=None),
        bad=(lambda: perceptron_projector(every=0), lambda: perceptron_projector(per="column")),
        refuses={"odd_parameters": "projects the tensors that it was made from"},
    )
    for name, build in {
        "tensor": perceptron_projector,
        "row": lambda: perceptron_projector(per="row"),
        "every": lambda: perceptron_projector(every=2, nonfinite="warn"),
    }.items()
]


@parametrize_with_checks(CASES)
def test_projector_passes_the_contract_of_transforms(case, check):
    check(case)


# --- maths --------------------------------------------------------------------------------------------------


def test_tensors_come_back_to_their_first_norm():
    params = {"a": draw(4, 3), "b": draw(5, seed=1), "c": draw(2, 3, 3, 3, seed=2)}
    first = {name: p.detach().clone() for name, p in params.items()}
    projector = FrobeniusProjector(params)
    moved = {name: p.detach() * 1.7 + 0.3 for name, p in params.items()}
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(moved[name])
    projector.project_()
    for name, p in params.items():
        wanted = moved[name] * first[name].square().sum().sqrt() / moved[name].square().sum().sqrt()
        torch.testing.assert_close(p.detach(), wanted, rtol=1e-14, atol=0)


def test_rows_come_back_to_their_first_norms():
    weight = draw(4, 3, 2)
    first = weight.detach().clone()
    projector = FrobeniusProjector([weight], per="row")
    moved = first * torch.tensor([0.5, 1.0, 2.0, 9.0], dtype=torch.float64).view(4, 1, 1) + 0.1
    with torch.no_grad():
        weight.copy_(moved)
    projector.project_()
    for row in range(4):
        wanted = moved[row] * first[row].norm() / moved[row].norm()
        torch.testing.assert_close(weight[row].detach(), wanted, rtol=1e-14, atol=0)


@pytest.mark.parametrize("per", ["tensor", "row"])
def test_joint_tensors_keep_their_joint_norm_and_proportion(per):
    weight, bias, other = draw(4, 3), draw(4, seed=1), draw(2, 2, seed=2)

    def norm(w, b):
        return (w.square().sum(1) + b.square()).sqrt() if per == "row" else torch.cat([w.view(-1), b]).norm()

    wanted = norm(weight.detach(), bias.detach())
    named = {"weight": weight, "other": other, "bias": bias}
    projector = FrobeniusProjector(named, per=per, joint=[("weight", "bias")])
    assert projector.names == ["weight", "other"]
    with torch.no_grad():
        weight.mul_(3.0).add_(0.1)
        bias.mul_(0.2)
    before = weight.detach() / bias.detach()[:, None]
    projector.project_()
    torch.testing.assert_close(norm(weight.detach(), bias.detach()), wanted, rtol=1e-14, atol=0)
    torch.testing.assert_close(weight.detach() / bias.detach()[:, None], before, rtol=1e-13, atol=0)


def test_a_joint_block_with_a_frozen_part_stays():
    weight, bias = draw(4, 3), draw(4, seed=1)
    projector = FrobeniusProjector({"w": weight, "b": bias}, joint=[("w", "b")])
    with torch.no_grad():
        bias.mul_(3)
    weight.requires_grad_(False)
    before = bias.detach().clone()
    projector.project_()
    assert torch.equal(bias.detach(), before)
    weight.requires_grad_(True)
    projector.project_()
    assert not torch.equal(bias.detach(), before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_norms_are_recorded_and_applied_in_float32(dtype):
    weight = draw(40, 30, dtype=dtype)
    rho = weight.detach().double().norm()
    projector = FrobeniusProjector([weight])
    assert projector.norms()["param0"].dtype == torch.float32
    assert projector.norms()["param0"].item() == pytest.approx(rho.item(), rel=1e-6)
    with torch.no_grad():
        weight.mul_(1.5)
    moved = weight.detach().double()
    projector.project_()
    wanted = (moved * (rho / moved.norm())).to(dtype)
    torch.testing.assert_close(weight.detach(), wanted, rtol=1.2e-7 if dtype == torch.float32 else 0, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_left_alone_while_it_is_nearly_right(dtype):
    weight = draw(64, 64, dtype=dtype)
    projector = FrobeniusProjector([weight])
    for off, stays in ((0.5, True), (2.1, False)):
        projector._rho = [weight.detach().float().norm() * (1 + off * TOLERANCE)]
        projector._plan = None
        before = weight.detach().clone()
        projector.project_()
        assert torch.equal(weight.detach(), before) is stays


def test_single_precision_is_never_left_alone():
    weight = draw(64, 64, dtype=torch.float32)
    projector = FrobeniusProjector([weight])
    with torch.no_grad():
        weight.mul_(1 + TOLERANCE / 8)
    projector.project_()
    assert weight.norm().item() == pytest.approx(projector.norms()["param0"].item(), rel=1e-6)


# --- steps --------------------------------------------------------------------------------------------------


def steps(projector, params, count):
    optimizer = torch.optim.SGD(params, lr=0.1, momentum=0.9)
    with attach(optimizer, projector):
        for step in range(count):
            for i, p in enumerate(params):
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(9 * step + i)).to(
                    p.dtype
                )
            optimizer.step()
            yield step


def test_every_third_step_projects_and_others_do_not():
    weight = draw(6, 5)
    projector = FrobeniusProjector([weight], every=3)
    rho = weight.norm().item()
    on_sphere = [abs(weight.norm().item() / rho - 1) < 1e-14 for _ in steps(projector, [weight], 7)]
    assert on_sphere == [False, False, True, False, False, True, False]


def test_what_had_no_gradient_when_it_was_due_waits_for_a_step_that_moves_it():
    first, second = draw(3, 3), draw(3, 3, seed=1)
    projector = FrobeniusProjector([first, second], every=2)
    optimizer = torch.optim.SGD([first, second], lr=0.5)
    attachment = projector.attach(optimizer)
    on_sphere = []
    for step in range(4):
        first.grad = None if step % 2 else torch.ones_like(first)  # never at a step that is due
        second.grad = torch.ones_like(second)
        optimizer.step()
        on_sphere.append([abs(growth.item() - 1) < 1e-14 for growth in projector.growth().values()])
        attachment.load_state_dict(copy.deepcopy(attachment.state_dict()))
    assert on_sphere == [[False, False], [False, True], [True, False], [True, True]]


def test_an_unstepped_tensor_is_not_touched():
    first, second = draw(3, 3), draw(3, 3, seed=1)
    projector = FrobeniusProjector([first, second])
    with torch.no_grad():
        second.mul_(2.0)
    for _ in steps(projector, [first], 2):
        pass
    assert projector.growth()["param1"].item() == pytest.approx(2.0)


def test_by_hand_equals_attached():
    found = []
    for by_hand in (True, False):
        weight = draw(4, 4)
        optimizer = torch.optim.SGD([weight], lr=0.3)
        projector = FrobeniusProjector({"w": weight}, every=2)
        if not by_hand:
            projector.attach(optimizer)
        for step in range(5):
            weight.grad = torch.full_like(weight, 0.1 * (step + 1))
            optimizer.step()
            if by_hand:
                projector.update_({"w": weight})
        found.append(weight.detach())
    assert torch.equal(*found)


def test_tied_tensors_are_projected_once():
    table = nn.Embedding(5, 4)
    head = nn.Linear(4, 5, bias=False)
    head.weight = table.weight
    model = nn.ModuleList([table, head])
    projector = FrobeniusProjector(model)
    assert projector.names == ["0.weight"]
    rho = table.weight.norm().item()
    with torch.no_grad():
        table.weight.mul_(4.0)
    projector.project_()
    assert table.weight.norm().item() == pytest.approx(rho, rel=1e-6)


def test_a_sparse_gradient_needs_nothing_special():
    table = nn.Embedding(6, 3, sparse=True)
    optimizer = torch.optim.SGD(table.parameters(), lr=1.0)
    projector = FrobeniusProjector(table)
    projector.attach(optimizer)
    table(torch.tensor([1, 1, 4])).square().sum().backward()
    optimizer.step()
    assert projector.growth()["weight"].item() == pytest.approx(1.0, rel=1e-6)


# --- no host read -------------------------------------------------------------------------------------------


class HostReads(TorchDispatchMode):
    """Counts the operations that hand a value to the host."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func in {
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.nonzero.default,
        }
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [{}, {"per": "row"}, {"joint": [("a", "b")]}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_read_by_the_host(settings, dtype):
    named = {"a": draw(4, 3, dtype=dtype), "b": draw(4, 2, dtype=dtype), "c": draw(2, 2, dtype=dtype)}
    projector = FrobeniusProjector(named, **settings)
    with HostReads() as reads:
        projector.project_()
        projector._project([0])  # another set of blocks: a new plan
        projector.project_()
    assert reads.count == 0
    with HostReads() as reads, warnings.catch_warnings():
        projector.left()
    assert reads.count > 0  # the counter sees reads
