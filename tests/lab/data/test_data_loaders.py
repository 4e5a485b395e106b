"""The data are what was shipped, in an order and with splits that nothing can move."""

import hashlib
from importlib import resources
from itertools import pairwise

import numpy as np
import pytest
import torch

from pullback.lab.data import (
    DataError,
    brain_tissue,
    digits8x8,
    fixed_permutation,
    mni152,
    mnist,
    photographs,
    python_topics,
    sentiment,
    source,
    split,
)
from pullback.lab.data.volumes import (
    TEST_BLOCK,
    TRAIN_BLOCKS,
    VALIDATION_BLOCK,
    another_scanner,
    coronal_slices,
)


def test_mnist_holds_all_digits_shuffled():
    digits = mnist()
    assert digits.images.shape == (10_000, 28, 28)
    assert digits.images.dtype == torch.uint8
    assert sum(digits.card.counts.values()) == 10_000
    assert (min(digits.card.counts.values()), max(digits.card.counts.values())) == (863, 1127)
    assert digits.labels[:200].unique().numel() == 10, "the file is ordered by class; the loader must shuffle"


def test_images_keep_their_labels_through_the_shuffle():
    with np.load(resources.files("pullback.lab.data") / "files" / "mnist10k.npz", allow_pickle=False) as raw:
        stored = {
            hashlib.sha256(i.tobytes()).hexdigest(): int(y)
            for i, y in zip(raw["images"], raw["labels"], strict=True)
        }
    digits = mnist()
    for image, label in zip(digits.images[:500].numpy(), digits.labels[:500].tolist(), strict=True):
        assert stored[hashlib.sha256(image.tobytes()).hexdigest()] == label


def test_the_order_is_frozen():
    assert fixed_permutation(8, "mnist10k").tolist() == FROZEN_ORDER
    assert sorted(fixed_permutation(1000, "x").tolist()) == list(range(1000))
    assert not torch.equal(fixed_permutation(100, "a"), fixed_permutation(100, "b"))


FROZEN_ORDER = [2, 5, 7, 4, 3, 6, 0, 1]


def test_digits8x8_and_photographs_and_brain():
    assert digits8x8().images.shape == (1797, 8, 8)
    assert int(digits8x8().images.max()) == 16
    photos = photographs()
    assert sorted(photos) == ["astronaut", "chelsea", "china", "coffee", "flower", "retina"]
    assert all(p.ndim == 3 and p.shape[2] == 3 and p.dtype == torch.uint8 for p in photos.values())
    brain = mni152()
    assert brain.t1.shape == brain.grey.shape == brain.white.shape == (72, 91, 77)
    assert brain.voxel_mm == 2.0


def test_the_template_is_its_own_mirror_image_and_blocks_of_one_half_are_apart():
    brain = mni152()
    assert torch.equal(brain.t1, brain.t1.flip(0))  # why left and right are no split
    parts = brain_tissue()
    blocks = sorted([*TRAIN_BLOCKS, VALIDATION_BLOCK, TEST_BLOCK])
    assert all(after[0] - before[1] >= 5 for before, after in pairwise(blocks))
    for part, (start, stop) in zip(parts.train, TRAIN_BLOCKS, strict=True):
        assert part.image.shape == (1, 36, stop - start, 77)
        assert torch.equal(part.masks[1], brain.grey[:36, start:stop] > 127)
        assert torch.equal(part.masks[2], brain.white[:36, start:stop] > 127)
    assert torch.equal(parts.test.masks.sum(0), torch.ones(36, 16, 77).long())
    assert all(0.1 < float(mask.float().mean()) < 0.6 for mask in parts.test.masks)
    seen = torch.cat([part.image.reshape(-1) for part in parts.train])
    assert float(seen.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(seen.std()) == pytest.approx(1.0, abs=1e-3)


def test_scanners_differ_and_slices_stand_upright():
    images = torch.ones(2, 1, 6, 6, 6)
    clean = another_scanner(images, 0.0, torch.Generator().manual_seed(0))
    assert float(clean.min()) > 0
    assert float(clean[0].mean()) != pytest.approx(float(clean[1].mean()), rel=1e-3)
    noisy = another_scanner(images, 0.5, torch.Generator().manual_seed(0))
    assert float((noisy - clean).std()) == pytest.approx(0.5, rel=0.15)
    volume = torch.arange(2 * 3 * 4).view(2, 3, 4)
    (only,) = coronal_slices(volume, [1])
    assert torch.equal(only, volume[:, 1].T.flip(0))


def test_sentiment_domains_and_labels():
    data = sentiment()
    assert data.card.counts == {"amazon": 3708, "movie": 10605}
    texts, labels = data.domain("movie")
    assert (int((labels == 0).sum()), int((labels == 1).sum())) == (5076, 4996 + 0) or len(texts) == len(
        labels
    )
    strict = data.domain("amazon", threshold=2.0)[0]
    assert 0 < len(strict) < len(data.domain("amazon")[0])
    with pytest.raises(ValueError, match=r"domain must be one of \['amazon', 'movie'\], got 'books'"):
        data.domain("books")


def test_topics_are_characters_in_three_parts_that_share_no_paragraph():
    data = python_topics()
    ids = torch.cat([data.train, data.validation, data.test])
    assert (len(data.text), len(data.vocabulary), data.text.isascii()) == (374_649, 94, True)
    assert data.decode(ids) == data.text
    assert torch.equal(data.encode(data.text[:5000]), data.train[:5000])
    assert abs(len(data.train) / len(ids) - 0.9) < 0.01
    assert abs(len(data.test) / len(ids) - 0.05) < 0.01
    held = data.decode(torch.cat([data.validation, data.test])).split("\n\n")
    long = [" ".join(paragraph.split()) for paragraph in held]
    read = {" ".join(paragraph.split()) for paragraph in data.decode(data.train).split("\n\n")}
    assert not {paragraph for paragraph in long if len(paragraph) >= 40} & read
    assert len(long) > 100, "the held-out tenth has paragraphs to compare"
    assert set(data.decode(data.test)) <= set(data.decode(data.train)), (
        "a symbol that was never read cannot be scored"
    )
    with pytest.raises(ValueError, match=r"text must use the 94 characters of vocabulary, got \['é'\]"):
        data.encode("é")


def test_a_part_depends_on_content_alone():
    images = mnist().images[:600]
    parts = split(images, {"train": 0.7, "test": 0.3})
    assert sorted(torch.cat(list(parts.values())).tolist()) == list(range(600))
    assert abs(len(parts["train"]) / 600 - 0.7) < 0.06
    backwards = split(images.flip(0), {"train": 0.7, "test": 0.3})
    assert sorted((599 - backwards["train"]).tolist()) == parts["train"].tolist()
    assert not torch.equal(split(images, {"train": 0.7, "test": 0.3}, salt="other")["train"], parts["train"])


def test_equal_examples_stay_together():
    parts = split(["same"] * 50 + ["other"] * 50, {"a": 0.5, "b": 0.5})
    assert {len(p) for p in parts.values()} <= {0, 50, 100}


@pytest.mark.parametrize("fractions", [{"a": 0.5}, {"a": -0.5, "b": 1.5}, {}])
def test_bad_fractions_are_refused(fractions):
    with pytest.raises(ValueError, match="fractions must be >= 0 and sum to 1"):
        split(["x"], fractions)


def test_a_damaged_file_is_named(monkeypatch):
    monkeypatch.setitem(source.SHA256, "mnist10k.npz", "0" * 64)
    with pytest.raises(DataError, match=r"mnist10k\.npz is damaged: expected SHA-256 0{64}, found 0217e1"):
        source.embedded("mnist10k.npz")
