"""The Frobenius projector against loops in float64: norms, rows, joint blocks, counts, refusals, state."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pullback.core.attachment import attach
from pullback.core.checks import NonFiniteError
from pullback.core.frobenius import FrobeniusProjector
from pullback.core.rescaling import HALF_TOLERANCE
from pullback.core.state import StateError
from pullback.testing import Case, parametrize_with_checks


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


def draw(*shape, dtype=torch.float64, seed=0):
    return nn.Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype))


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
        projector._rho = [weight.detach().float().norm() * (1 + off * HALF_TOLERANCE)]
        projector._plan = None
        before = weight.detach().clone()
        projector.project_()
        assert torch.equal(weight.detach(), before) is stays


def test_single_precision_is_never_left_alone():
    weight = draw(64, 64, dtype=torch.float32)
    projector = FrobeniusProjector([weight])
    with torch.no_grad():
        weight.mul_(1 + HALF_TOLERANCE / 8)
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


# --- trouble ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("per", ["tensor", "row"])
def test_a_norm_lost_later_is_left_and_counted(value, per):
    lost, sound = draw(3, 2), draw(3, 2, seed=1)
    projector = FrobeniusProjector({"lost": lost, "sound": sound}, per=per)
    with torch.no_grad():
        lost[1 if per == "row" else slice(None)] = value
        sound.mul_(2)
    before = lost.detach().clone()
    projector.project_()
    projector.project_()
    assert torch.equal(lost.detach().nan_to_num(7.0), before.nan_to_num(7.0))
    assert projector.left() == {"lost": 2, "sound": 0}
    assert projector.growth()["sound"].flatten()[0].item() == pytest.approx(1.0)


def test_policies_warn_and_raise_name_the_tensor_and_raise_changes_nothing():
    for policy in ("warn", "raise"):
        lost, sound = draw(3, 2), draw(3, 2, seed=1)
        projector = FrobeniusProjector({"lost": lost, "sound": sound}, nonfinite=policy)
        with torch.no_grad():
            lost.zero_()
            sound.mul_(2)
        if policy == "warn":
            with pytest.warns(RuntimeWarning, match="norm of lost is zero or not finite"):
                projector.project_()
        else:
            with pytest.raises(NonFiniteError, match="norm of lost"):
                projector.project_()
        assert projector.growth()["sound"].item() == pytest.approx(1.0 if policy == "warn" else 2.0)


def bad_tensors():
    sparse = torch.eye(3).to_sparse()
    base = draw(3, 3)
    return {
        "float": (
            [torch.ones(3, dtype=torch.int64)],
            TypeError,
            "param0 must be a real floating tensor, got .*int64",
        ),
        "complex": ([torch.ones(3, dtype=torch.complex64)], TypeError, "got dtype torch.complex64"),
        "sparse": ([sparse], ValueError, "param0 must be dense, got layout torch.sparse_coo"),
        "meta": ([torch.ones(3, device="meta")], ValueError, "got the meta device"),
        "zero": ([draw(2), torch.zeros(3)], ValueError, "param1 must have a finite norm > 0, got 0"),
        "nan": ([torch.tensor([float("nan")])], ValueError, "param0 must have a finite norm > 0, got nan"),
        "inf": ([torch.tensor([float("inf")])], ValueError, "finite norm > 0, got inf"),
        "none": ([], ValueError, "must not be empty"),
        "empty": ([torch.ones(0, 3)], ValueError, "finite norm > 0, got 0"),
        "one": (torch.ones(3), TypeError, r"Pass \[tensor\]"),
        "shared": (
            [base, nn.Parameter(base.data)],
            ValueError,
            "param1 must have memory of its own, got that of param0",
        ),
    }


@pytest.mark.parametrize("which", bad_tensors())
def test_tensors_without_a_norm_to_keep_are_refused(which):
    params, error, match = bad_tensors()[which]
    with pytest.raises(error, match=match):
        FrobeniusProjector(params)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"every": 0}, "every must be >= 1, got 0. Use 1"),
        ({"per": "col"}, "per must be one of 'tensor', 'row'"),
        ({"per": "row"}, "b must have at least 2 dimensions"),
        ({"joint": [("w", "x")]}, "an unknown name: 'x'"),
        ({"joint": [("w", "b"), ("b",)]}, "a name twice: 'b'"),
        ({"joint": ["wb"]}, "joint must hold lists of names"),
        ({"joint": [("w", "h")]}, "share device, dtype"),
        ({"nonfinite": "ignore"}, "nonfinite must be one of"),
    ],
)
def test_bad_settings_are_refused(settings, match):
    named = {"w": draw(3, 2), "b": draw(3), "h": draw(3, 2, dtype=torch.bfloat16)}
    with pytest.raises(ValueError, match=match):
        FrobeniusProjector(named, **settings)


def test_zero_row_is_named():
    weight = draw(3, 2)
    with torch.no_grad():
        weight[2] = 0
    FrobeniusProjector([weight])
    with pytest.raises(ValueError, match="got 0 in row 2"):
        FrobeniusProjector([weight], per="row")


def test_an_optimizer_of_other_tensors_is_refused():
    other = draw(3, 3)
    optimizer = torch.optim.SGD([other], lr=0.1)
    FrobeniusProjector({"w": draw(3, 2)}).attach(optimizer)
    other.grad = torch.ones_like(other)
    with pytest.raises(ValueError, match=r"must hold one of 1 projected tensors \(w\), got others: group0.0"):
        optimizer.step()


def test_a_step_without_our_gradients_is_no_trouble():
    weight, head = draw(3, 3), draw(2)
    optimizer = torch.optim.SGD([weight, head], lr=0.1)
    projector = FrobeniusProjector([weight])
    projector.attach(optimizer)
    head.grad = torch.ones_like(head)
    optimizer.step()
    assert projector.steps == 1


# --- state --------------------------------------------------------------------------------------------------


def test_state_between_two_projections_resumes_bitwise():
    def run(projector, weight, optimizer, attachment, numbers):
        for step in numbers:
            weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)).double()
            optimizer.step()

    def start(scale):
        weight = nn.Parameter(draw(4, 3).detach() * scale)
        optimizer = torch.optim.Adam([weight], lr=0.1)
        projector = FrobeniusProjector([weight], every=3)
        return projector, weight, optimizer, projector.attach(optimizer)

    whole = start(1.0)
    run(*whole, range(8))
    first = start(1.0)
    run(*first, range(4))
    file = io.BytesIO()
    torch.save((first[1].detach(), first[2].state_dict(), first[3].state_dict()), file)
    file.seek(0)
    weight, moments, state = torch.load(file, weights_only=True)
    second = start(2.0)  # its own norm is another
    with torch.no_grad():
        second[1].copy_(weight)
    second[2].load_state_dict(moments)
    second[3].load_state_dict(state)
    run(*second, range(4, 8))
    assert torch.equal(whole[1], second[1])


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan")])
def test_a_state_with_an_impossible_norm_is_refused(value):
    projector = FrobeniusProjector([draw(2, 2)])
    state = copy.deepcopy(projector.state_dict())
    state["state"]["norms"]["param0"].fill_(value)
    before = projector.norms()["param0"]
    with pytest.raises(StateError, match="must be finite and > 0"):
        projector.load_state_dict(state)
    assert torch.equal(projector.norms()["param0"], before)


def test_counts_survive_a_state_and_a_copy():
    weight = draw(2, 2)
    projector = FrobeniusProjector([weight])
    with torch.no_grad():
        weight.zero_()
    projector.project_()
    assert copy.deepcopy(projector).left() == {"param0": 1}
    other = FrobeniusProjector([draw(2, 2)])
    other.load_state_dict(projector.state_dict())
    assert other.left() == {"param0": 1}


def test_copied_optimizer_goes_on_with_its_own_tensors_by_place():
    weight, head = draw(3, 3), draw(3, seed=1)
    optimizer = torch.optim.SGD([head, weight], lr=0.5)  # unnamed: the place must do
    attachment = attach(optimizer, FrobeniusProjector({"w": weight}))
    for p in (weight, head):
        p.grad = torch.ones_like(p)
    optimizer.step()
    twin = copy.deepcopy(optimizer)
    attachment.reattach(twin)
    head2, weight2 = twin.param_groups[0]["params"]
    before = weight.detach().clone()
    for p in (weight2, head2):
        p.grad = torch.ones_like(p)
    twin.step()
    assert torch.equal(weight.detach(), before)
    assert weight2.norm().item() == pytest.approx(attachment.transforms[0].norms()["w"].item(), rel=1e-14)


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
