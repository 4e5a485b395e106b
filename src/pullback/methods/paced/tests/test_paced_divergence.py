"""Distillation losses: references, gradients, masks, chunks, precision, memory; the two stages."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode

from pullback.core.saved_bytes import saved_bytes
from pullback.methods.paced import distillation_loss, two_stage
from pullback.methods.paced.tests import reference

KINDS: Any = ("forward_kl", "reverse_kl", "jsd")


def logits(problems=3, positions=5, vocabulary=7, seed=0, dtype=torch.float64, scale=2.0):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, problems, positions, vocabulary)
    drawn = (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)
    student, teacher = drawn[0].clone(), drawn[1].clone()
    mask = torch.rand(problems, positions, generator=generator) < 0.6
    return student, teacher, mask


def each(student, teacher, mask=None, **how):
    return distillation_loss(student, teacher, mask, reduction="none", **how)


# --- values --------------------------------------------------------------------------------------------------------


@given(
    st.integers(0, 3),
    st.integers(0, 4),
    st.integers(1, 6),
    st.sampled_from(KINDS),
    st.floats(0.3, 3.0),
    st.floats(0.0, 1.0),
    st.sampled_from(["mean", "sum"]),
    st.integers(1, 4),
    st.integers(0, 99),
)
def test_equals_the_reference(problems, positions, vocabulary, kind, temperature, beta, tokens, chunk, seed):
    student, teacher, mask = logits(problems, positions, vocabulary, seed)
    how: Any = {"temperature": temperature, "beta": beta, "tokens": tokens}
    got = each(student, teacher, mask, divergence=kind, chunk=chunk, **how)
    wanted = reference.distillation(student.tolist(), teacher.tolist(), mask.tolist(), kind, **how)
    torch.testing.assert_close(got, torch.tensor(wanted, dtype=torch.float64), rtol=1e-9, atol=1e-12)


def test_directions_are_those_of_torch_distributions():
    student, teacher, _ = logits()
    s, t = Categorical(logits=student), Categorical(logits=teacher)
    torch.testing.assert_close(each(student, teacher, divergence="forward_kl"), kl_divergence(t, s).mean(1))
    torch.testing.assert_close(each(student, teacher, divergence="reverse_kl"), kl_divergence(s, t).mean(1))


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.5, 1.0])
def test_jsd_is_that_of_trl(beta):
    """The generalised JSD of huggingface/trl (mixture corrected by its 3043), which has the KL at its ends."""
    student, teacher, _ = logits()
    s, t = student.log_softmax(-1), teacher.log_softmax(-1)

    def kl_div(log_input, log_target):
        return F.kl_div(log_input, log_target, reduction="none", log_target=True).sum(-1).mean(1)

    if beta in (0.0, 1.0):
        wanted = kl_div(s, t) if beta == 0.0 else kl_div(t, s)
    else:
        mixture = ((1 - beta) * s.exp() + beta * t.exp()).log()
        wanted = beta * kl_div(mixture, t) + (1 - beta) * kl_div(mixture, s)
    torch.testing.assert_close(each(student, teacher, divergence="jsd", beta=beta), wanted)


def test_limits_of_the_jsd():
    student, teacher, _ = logits()
    near = 1e-6
    low = each(student, teacher, divergence="jsd", beta=near) / near
    high = each(student, teacher, divergence="jsd", beta=1 - near) / near
    torch.testing.assert_close(low, each(student, teacher, divergence="forward_kl"), rtol=1e-4, atol=0)
    torch.testing.assert_close(high, each(student, teacher, divergence="reverse_kl"), rtol=1e-4, atol=0)
    swapped = each(teacher, student, divergence="jsd", beta=0.7)
    torch.testing.assert_close(each(student, teacher, divergence="jsd", beta=0.3), swapped)


@pytest.mark.parametrize("kind", KINDS)
def test_never_negative_and_zero_only_for_logits_equal_up_to_a_constant(kind):
    student, teacher, _ = logits(50)
    assert bool((each(student, teacher, divergence=kind) > 1e-3).all())
    shifted = student + torch.randn(50, 5, 1, dtype=torch.float64)
    assert float(each(student, shifted, divergence=kind).abs().max()) < 1e-14


# --- gradients -----------------------------------------------------------------------------------------------------


def gradient(student, teacher, mask=None, **how):
    point = student.clone().requires_grad_()
    each(point, teacher, mask, **how).sum().backward()
    return point.grad


def test_gradients_have_their_closed_forms():
    student, teacher, mask = logits()
    p_s, p_t = student.softmax(-1), teacher.softmax(-1)
    share = mask / mask.sum(1, keepdim=True).clamp(min=1)
    forward = (p_s - p_t) * share[..., None]
    torch.testing.assert_close(gradient(student, teacher, mask), forward)
    ratio = student.log_softmax(-1) - teacher.log_softmax(-1)
    kl = (p_s * ratio).sum(-1, keepdim=True)
    torch.testing.assert_close(
        gradient(student, teacher, mask, divergence="reverse_kl"), p_s * (ratio - kl) * share[..., None]
    )
    warm = gradient(student, teacher, temperature=2.0, tokens="sum")
    torch.testing.assert_close(warm, ((student / 2).softmax(-1) - (teacher / 2).softmax(-1)) / 2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", ["whole", "masked", "slice"])
def test_first_and_second_derivatives(kind, layout):
    student, teacher, mask = logits(2, 3, 4)
    student = student.requires_grad_()

    def loss(x):
        if layout == "slice":
            return each(x[:, :-1], teacher[:, 1:], mask[:, 1:], divergence=kind, beta=0.3, chunk=2)
        return each(
            x, teacher, mask if layout == "masked" else None, divergence=kind, temperature=1.7, chunk=2
        )

    assert torch.autograd.gradcheck(loss, student)
    assert torch.autograd.gradgradcheck(loss, student)


def test_the_teacher_gets_no_gradient():
    student, teacher, _ = logits()
    teacher = teacher.requires_grad_()
    each(student.requires_grad_(), teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    (slope,) = torch.autograd.grad(each(student, teacher).sum(), student, create_graph=True)
    assert torch.autograd.grad(slope.square().sum(), teacher, allow_unused=True) == (None,)


@pytest.mark.parametrize("kind", KINDS)
def test_per_example_gradients_by_vmap_equal_single_ones(kind):
    student, teacher, mask = logits(4)

    def loss(x, y, m):
        return each(x[None], y[None], m[None], divergence=kind, chunk=2).sum()

    got = torch.func.vmap(torch.func.grad(loss))(student, teacher, mask)
    torch.testing.assert_close(got, gradient(student, teacher, mask, divergence=kind))


# --- masks, chunks, layouts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_positions_outside_the_mask_do_not_matter_even_if_nan(kind):
    student, teacher, mask = logits()
    spoiled = [torch.where(mask[..., None], x, math.nan) for x in (student, teacher)]
    assert torch.equal(each(*spoiled, mask, divergence=kind), each(student, teacher, mask, divergence=kind))
    grad = gradient(*spoiled, mask, divergence=kind)
    assert torch.equal(grad, gradient(student, teacher, mask, divergence=kind))
    assert not grad[~mask].any()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("who", [0, 1])
def test_nan_where_it_counts_is_not_hidden(kind, who):
    student, teacher, _ = logits()
    (student, teacher)[who][1, 2, 3] = math.nan
    found = each(student, teacher, divergence=kind)
    assert found.isnan().tolist() == [False, True, False]
    grad = gradient(student, teacher, divergence=kind)
    assert bool(grad[1, 2].isnan().all())
    assert bool(grad[[0, 2]].isfinite().all())


def test_empty_responses_give_zero_and_no_gradient():
    student, teacher, _ = logits()
    nothing = torch.zeros(3, 5, dtype=torch.bool)
    for tokens in ("mean", "sum"):
        assert each(student, teacher, nothing, tokens=tokens).tolist() == [0.0] * 3
    assert not gradient(student, teacher, nothing).any()
    assert each(student[:, :0], teacher[:, :0]).tolist() == [0.0] * 3
    assert each(student[:0], teacher[:0]).shape == (0,)
    assert float(distillation_loss(student[:0], teacher[:0], reduction="sum")) == 0.0


@pytest.mark.parametrize("kind", KINDS)
def test_chunks_change_nothing(kind):
    student, teacher, mask = logits()
    for masked in (None, mask):
        wanted = (
            each(student, teacher, masked, divergence=kind),
            gradient(student, teacher, masked, divergence=kind),
        )
        for chunk in (1, 2, 4, 100):
            how: Any = {"divergence": kind, "chunk": chunk}
            torch.testing.assert_close(
                each(student, teacher, masked, **how), wanted[0], rtol=1e-14, atol=1e-15
            )
            got = gradient(student, teacher, masked, **how)
            torch.testing.assert_close(got, wanted[1], rtol=1e-14, atol=1e-15)


def test_reductions_and_masks_by_hand():
    student, teacher, mask = logits(2, 3)
    mask = torch.tensor([[True, False, True], [False, True, False]])
    at = each(student.reshape(6, 1, 7), teacher.reshape(6, 1, 7)).view(2, 3)
    torch.testing.assert_close(each(student, teacher, mask)[0], (at[0, 0] + at[0, 2]) / 2)
    torch.testing.assert_close(each(student, teacher, mask, tokens="sum")[0], at[0, 0] + at[0, 2])
    mean, total = (distillation_loss(student, teacher, mask, reduction=r) for r in ("mean", "sum"))
    torch.testing.assert_close(mean, ((at[0, 0] + at[0, 2]) / 2 + at[1, 1]) / 2)
    torch.testing.assert_close(total, (at[0, 0] + at[0, 2]) / 2 + at[1, 1])


# --- precision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_is_raised_and_gradients_keep_its_dtype(dtype, kind):
    student, teacher, mask = logits(dtype=dtype)
    got, wanted = (
        each(s, t, mask, divergence=kind)
        for s, t in ((student, teacher), (student.double(), teacher.double()))
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-6)
    assert gradient(student, teacher, mask, divergence=kind).dtype == dtype
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(each(student, teacher, mask, divergence=kind), got)


def test_forbidden_symbols_of_the_teacher():
    """A teacher cut to its likeliest symbols (logits of -Inf elsewhere): forward KL finite, reverse KL infinite."""
    student, teacher, _ = logits()
    teacher[..., 3:] = -math.inf
    loss, grad = each(student, teacher), gradient(student, teacher)
    assert bool(loss.isfinite().all())
    assert bool(grad.isfinite().all())
    torch.testing.assert_close(
        loss, kl_divergence(Categorical(logits=teacher), Categorical(logits=student)).mean(1)
    )
    assert each(student, teacher, divergence="reverse_kl").tolist() == [math.inf] * 3
    far = torch.zeros(1, 1, 3, dtype=torch.float32)
    far[..., 0] = -200.0  # its probability is zero in float32, though its logarithm is not
    cut = torch.tensor([[[-math.inf, 0.0, 0.0]]])
    assert float(each(far, cut, divergence="reverse_kl")) == 0.0
    both = student.clone()
    both[..., 3:] = -math.inf
    for kind in KINDS:
        found = gradient(both, teacher, divergence=kind)
        assert bool(found.isfinite().all())
        assert not found[..., 3:].any()


# --- memory --------------------------------------------------------------------------------------------------------


def test_no_copy_of_the_logits_is_kept():
    student, teacher, mask = logits(4, 64, 500, dtype=torch.float32)
    student = student.requires_grad_()
    for kind in KINDS:
        for masked in (mask, None):
            loss = lambda k=kind, m=masked: each(student, teacher, m, divergence=k)  # noqa: E731
            assert saved_bytes(loss, student, teacher) < 0.05 * student.nbytes

    def plain():
        s, t = student.log_softmax(-1), teacher.log_softmax(-1)
        return (t.exp() * (t - s)).sum(-1)

    assert saved_bytes(plain, student, teacher) >= 2 * student.nbytes


def test_a_slice_of_the_logits_is_not_flattened_by_a_copy():
    sizes = []
    student, teacher, mask = logits(4, 65, 500, dtype=torch.float32)
    given = {x.untyped_storage().data_ptr() for x in (student, teacher)}

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            if isinstance(out, torch.Tensor) and out.untyped_storage().data_ptr() not in given:
                sizes.append(out.numel())
            return out

    with torch.no_grad(), Watch():
        each(student[:, :-1], teacher[:, :-1], mask[:, 1:], chunk=16)
        each(student[:, :-1], teacher[:, :-1], chunk=16)
    assert max(sizes) <= 16 * 500


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # the compiler's own
def test_compiled_loss_is_the_eager_one():
    student, teacher, mask = logits()
    wanted = gradient(student, teacher, mask, divergence="reverse_kl")
    torch._dynamo.reset()
    fast = torch.compile(
        lambda x: each(x, teacher, mask, divergence="reverse_kl").sum(), backend="aot_eager", fullgraph=True
    )
    point = student.clone().requires_grad_()
    fast(point).backward()
    torch.testing.assert_close(point.grad, wanted)
    torch._dynamo.reset()


# --- refusals and stages -------------------------------------------------------------------------------------------


def test_misuse_is_refused():
    student, teacher, mask = logits()
    loose: Any = distillation_loss
    for arguments, how, error, message in (
        ((student[0], teacher[0]), {}, ValueError, "student_logits must be a tensor with 3 dimensions"),
        ((student.long(), teacher), {}, TypeError, "student_logits must be a floating tensor"),
        (
            (student, teacher[..., 1:]),
            {},
            ValueError,
            r"teacher_logits must be of shape \(3, 5, 7\).*got \(3, 5, 6\)",
        ),
        ((student, teacher, mask[:, 1:]), {}, ValueError, r"mask must be of shape \(3, 5\), got \(3, 4\)"),
        ((student, teacher, mask.long()), {}, TypeError, "mask must be a bool tensor, got torch.int64"),
        ((student, teacher, mask.tolist()), {}, TypeError, "mask must be a bool tensor, got list"),
        ((student, teacher), {"divergence": "kl"}, ValueError, "divergence must be one of"),
        ((student, teacher), {"temperature": 0.0}, ValueError, "temperature must be > 0, got 0"),
        ((student, teacher), {"beta": 1.5}, ValueError, r"beta must be in \[0, 1\], got 1.5"),
        ((student, teacher), {"tokens": "max"}, ValueError, "tokens must be one of"),
        ((student, teacher), {"reduction": "batchmean"}, ValueError, "reduction must be one of"),
        ((student, teacher), {"chunk": 0}, ValueError, "chunk must be >= 1, got 0"),
        (
            (student[:0], teacher[:0]),
            {},
            ValueError,
            "student_logits must hold at least one problem, got none",
        ),
    ):
        with pytest.raises(error, match=message):
            loose(*arguments, **how)


def test_two_stages():
    assert [two_stage(step, 3) for step in range(4)] == ["forward_kl"] * 2 + ["reverse_kl"] * 2
    assert [two_stage(step, 10, switch=0.3) for step in (0, 2, 3, 9)] == ["forward_kl"] * 2 + [
        "reverse_kl"
    ] * 2
    assert two_stage(0, 5, switch=0.0) == "reverse_kl"
    assert two_stage(4, 5, switch=1.0) == "forward_kl"
    assert two_stage(50, 5) == "reverse_kl"
    for arguments, message in (
        ((-1, 5), "step must be >= 0, got -1"),
        ((0, 0), "total must be >= 1, got 0"),
    ):
        with pytest.raises(ValueError, match=message):
            two_stage(*arguments)
    with pytest.raises(ValueError, match=r"switch must be in \[0, 1\], got 2"):
        two_stage(0, 5, switch=2.0)
