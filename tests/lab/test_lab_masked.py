"""The masked autoencoder of studies: structural similarity against scikit-image, masks, losses by hand."""

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity

from pullback.lab.models.masked import Images, autoencoder, completion_losses, digit_parts, masks, ssim


def test_structural_similarity_is_scikit_images():
    g = torch.Generator().manual_seed(0)
    a = torch.rand(5, 196, generator=g)
    b = (a + 0.3 * torch.randn(5, 196, generator=g)).clamp(0, 1)
    for x, y in zip(a, b, strict=True):
        pair = [each.reshape(14, 14).double().numpy() for each in (x, y)]
        _, full = structural_similarity(
            *pair, win_size=7, data_range=1.0, use_sample_covariance=False, full=True
        )
        wanted = full[3:-3, 3:-3].mean()
        assert float(ssim(x[None], y[None])) == pytest.approx(wanted, abs=1e-5)
    assert float(ssim(a, a)) == pytest.approx(1.0, abs=1e-6)


def test_masks_hide_37_whole_patches_at_random():
    found = masks(2000, torch.Generator().manual_seed(1)).reshape(-1, 7, 2, 7, 2)
    assert torch.equal(found.amax((2, 4)), found.amin((2, 4)))
    patches = found[:, :, 0, :, 0].reshape(2000, 49)
    assert set(patches.sum(1).tolist()) == {37.0}
    assert float((patches.mean(0) - 37 / 49).abs().max()) < 5 * (0.755 * 0.245 / 2000) ** 0.5


def test_losses_by_hand_and_blind_to_the_visible():
    train, validation, test = digit_parts()
    assert [len(part.x) for part in (train, validation, test)] == [7000, 1000, 2000]
    assert float(((train.x - train.mean) / train.std).std()) == pytest.approx(1.0, abs=1e-3)
    some = train.take(slice(0, 20))
    mask = masks(20, torch.Generator().manual_seed(2))
    net = autoencoder()
    with torch.no_grad():
        found = completion_losses(net, some, mask)
    z = (some.x - train.mean) / train.std
    with torch.no_grad():
        out = net(torch.cat([z * (1 - mask), mask], 1))
    wanted = np.mean(np.abs((out - z).numpy()[mask.numpy() == 1]))
    assert float(found["l1"]) == pytest.approx(wanted, rel=1e-5)
    other = Images(torch.where(mask == 1, 1 - some.x, some.x), some.mean, some.std)
    changed = (other.x - train.mean) / train.std
    assert torch.equal(changed * (1 - mask), z * (1 - mask))  # hidden pixels never reach the network
    constant = torch.nn.Linear(392, 196)
    torch.nn.init.zeros_(constant.weight)
    torch.nn.init.zeros_(constant.bias)
    blind = completion_losses(constant.requires_grad_(False), some, mask)["l1"]
    assert float(blind) == pytest.approx(float(z.abs()[mask == 1].mean()), rel=1e-5)


def test_batch_norm_on_request():
    kinds = [type(m).__name__ for m in autoencoder(norm=True)]
    assert kinds == ["Linear", "BatchNorm1d", "GELU", "Linear", "BatchNorm1d", "GELU", "Linear"]
    assert (
        sum(p.numel() for p in autoencoder().parameters())
        == 392 * 256 + 256 + 256 * 256 + 256 + 256 * 196 + 196
    )
