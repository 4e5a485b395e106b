"""Defences: what each promises, and that none writes to what it is given."""

import math

import pytest
import torch

from pullback.core.gradient_defences import Clip, Compose, GaussianNoise, Prune, Quantize, Sign
from pullback.core.inversion_terms import GradientMatching


def gradients(seed=0, size=400):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(size, generator=generator),
        0.1 * torch.randn(20, 5, generator=generator),
        torch.zeros(3),
    ]


EVERY = (GaussianNoise(0.1), Clip(0.5), Prune(0.3), Sign(), Quantize(4), Compose(Clip(1.0), Prune(0.5)))


@pytest.mark.parametrize("defence", EVERY, ids=[type(each).__name__ for each in EVERY])
def test_new_tensors_of_the_same_shapes(defence):
    given = gradients()
    before = [each.clone() for each in given]
    found = defence(given)
    assert [each.shape for each in found] == [each.shape for each in given]
    assert all(map(torch.equal, before, given))
    assert any(not torch.equal(one, other) for one, other in zip(found, given, strict=True))
    assert all(bool(each.isfinite().all()) for each in found)


def test_noise_has_its_deviation_and_its_own_numbers_per_step_and_tensor():
    zeros = [torch.zeros(10_000), torch.zeros(10_000)]
    noise = GaussianNoise(0.3, seed=1)
    torch.manual_seed(0)
    first, second = noise(zeros)
    torch.manual_seed(1)
    assert torch.equal(noise(zeros)[0], first)
    assert first.std().item() == pytest.approx(0.3, rel=5 / math.sqrt(20_000))
    for other in (second, noise(zeros, step=1)[0], GaussianNoise(0.3, seed=2)(zeros)[0]):
        assert abs(torch.corrcoef(torch.stack([first, other]))[0, 1]) < 0.05
    assert all(map(torch.equal, GaussianNoise(0.0)(gradients()), gradients()))


def test_clip_bounds_the_norm_of_all_together_and_keeps_the_direction():
    given = gradients()
    norm = torch.cat([each.reshape(-1) for each in given]).norm()
    clipped = Clip(2.0)(given)
    assert torch.cat([each.reshape(-1) for each in clipped]).norm().item() == pytest.approx(2.0, rel=1e-5)
    assert torch.allclose(clipped[0] / given[0], 2.0 / norm, rtol=1e-5)
    assert all(map(torch.equal, Clip(2 * float(norm))(given), given))
    distance = GradientMatching()
    other = gradients(1)
    assert distance(other, clipped).item() == pytest.approx(distance(other, given).item(), abs=1e-6)


@pytest.mark.parametrize("per", ["tensor", "all"])
def test_prune_zeroes_the_smallest_and_again_changes_nothing(per):
    given = gradients()[:2]
    prune = Prune(0.8, per=per)
    pruned = prune(given)
    if per == "tensor":
        shares = [float((each == 0).float().mean()) for each in pruned]
        assert shares == pytest.approx([0.8, 0.8], abs=0.011)
    else:
        flat = torch.cat([each.reshape(-1) for each in pruned])
        assert float((flat == 0).float().mean()) == pytest.approx(0.8, abs=0.003)
    for before, after in zip(given, pruned, strict=True):
        kept, gone = after != 0, after == 0
        assert torch.equal(after[kept], before[kept])
        if per == "tensor":
            assert before[kept].abs().min() > before[gone].abs().max()
    assert all(map(torch.equal, prune(pruned), pruned))
    assert all(map(torch.equal, Prune(0.0)(given), given))


def test_prune_keeps_ties():
    assert Prune(0.5)([torch.ones(4)])[0].tolist() == [1, 1, 1, 1]
    assert Prune(0.5)([torch.tensor([1.0, 2.0, 3.0, 4.0])])[0].tolist() == [0, 0, 3, 4]


def test_sign_and_quantize():
    row = torch.tensor([1.0, -3.0, 0.0, 0.5])
    assert Sign()([row])[0].tolist() == [1.125, -1.125, 0.0, 1.125]
    assert Quantize(2)([row])[0].tolist() == [0.0, -3.0, 0.0, 0.0]
    for bits in (3, 8, 16):
        (found,) = Quantize(bits)([torch.randn(1000, generator=torch.Generator().manual_seed(0))])
        assert len(found.unique()) <= 2**bits - 1
    (fine,) = Quantize(16)([row])
    assert (fine - row).abs().max() <= 3 / (2**15 - 1)


def test_composition_runs_in_order():
    given = gradients()
    both = Compose(Prune(0.5), Clip(1.0))(given)
    assert all(map(torch.equal, both, Clip(1.0)(Prune(0.5)(given))))
    assert not torch.equal(both[0], Compose(Clip(1.0), Prune(0.5))(given)[0])
    assert repr(Compose(Clip(1.0), Sign())) == "Compose(Clip(max_norm=1.0), Sign())"


def test_clip_and_prune_can_be_followed_by_an_attacker():
    given = [each.double().requires_grad_() for each in gradients(size=6)[:1]]
    for defence in (Clip(0.5), Prune(0.4), Compose(Clip(0.5), Prune(0.4))):
        assert torch.autograd.gradcheck(lambda *x, defence=defence: tuple(defence(x)), tuple(given))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GaussianNoise(-0.1), "std must be >= 0, got -0.1"),
        (lambda: Clip(0.0), "max_norm must be > 0, got 0"),
        (lambda: Prune(1.0), "share must be below 1, got 1"),
        (lambda: Prune(-0.1), r"share must be in \[0, 1\], got -0.1"),
        (lambda: Prune(0.1, per="layer"), "per must be one of"),
        (lambda: Quantize(1), "bits must be >= 2, got 1. For one bit use Sign"),
        (lambda: Quantize(17), "bits must be at most 16, got 17"),
        (lambda: Compose(abs), "defences must be of type Defence"),
    ],
    ids=["noise", "clip", "prune", "negative", "per", "one-bit", "bits", "compose"],
)
def test_what_makes_no_sense_is_refused(make, message):
    with pytest.raises((TypeError, ValueError), match=message):
        make()
