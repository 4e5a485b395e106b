"""The Frobenius projector in trouble, its refusals and its state."""

import copy
import io

import pytest
import torch
from projected import draw
from torch import nn

from pullback.core.attachment import attach
from pullback.core.checks import NonFiniteError
from pullback.core.frobenius import FrobeniusProjector
from pullback.core.state import StateError

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
        "lazy": (
            list(nn.LazyLinear(2).parameters()),
            ValueError,
            "must be initialised, got a lazy parameter",
        ),
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
