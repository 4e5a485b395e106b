"""Victims, what trivial attackers have, scores, federated training, and the figures of attacks."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

from pullback.lab.figures.reconstructions import reconstructions, trade_off
from pullback.lab.models import inverted, victims
from pullback.lab.models.federated import federated_accuracy
from pullback.lab.models.victims import Attention, always_drop_, victim

# --- victims -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", victims.ARCHITECTURES)
def test_weights_depend_on_the_seed_alone_and_second_derivatives_exist(architecture):
    before = torch.get_rng_state()
    net, other = victim(architecture, 0.0, 3), victim(architecture, 0.5, 3)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), other.parameters(), strict=True))
    assert not torch.equal(next(net.parameters()), next(victim(architecture, 0.0, 4).parameters()))
    x = torch.randn(2, 1, 28, 28, requires_grad=True)
    gradients = torch.autograd.grad(
        cross_entropy(net.eval()(x), torch.tensor([1, 2])), list(net.parameters()), create_graph=True
    )
    slope = torch.autograd.grad(torch.stack([g.square().sum() for g in gradients]).sum(), x)[0]
    assert float(slope.abs().sum()) > 0
    assert torch.equal(net(x), other.eval()(x))


def test_every_place_of_the_paper_has_its_dropout():
    names = [name for name, module in victim("vit", 0.1, 0).named_modules() if isinstance(module, nn.Dropout)]
    block = ["attention.drop_probabilities", "attention.drop_output", "perceptron.2", "perceptron.4"]
    assert names == ["drop_embedding", *(f"blocks.{i}.{place}" for i in range(2) for place in block)]
    perceptron = victim("mlp", 0.1, 0)
    assert [tuple(p.shape) for p in perceptron.parameters()] == [
        (256, 784),
        (256, 256),
        (256, 256),
        (10, 256),
    ]


def test_attention_is_that_of_torch():
    torch.manual_seed(0)
    layer = Attention(8, 2, 0.0).double()
    x = torch.randn(3, 5, 8, dtype=torch.float64)
    query, key, value = (each.unflatten(-1, (2, 4)).transpose(1, 2) for each in layer.qkv(x).chunk(3, -1))
    mixed = scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(layer(x), layer.out(mixed), rtol=0, atol=1e-12)


def test_patches_are_squares_of_the_image():
    net = victim("vit", 0.0, 0)
    seen = []
    net.embed.register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x = torch.arange(784.0).view(1, 1, 28, 28)
    net(x)
    assert torch.equal(seen[0][0, 5], x[0, 0, 7:14, 7:14].flatten())  # second row, second column


def test_dropout_that_never_stops():
    net = victim("cnn", 0.5, 0).eval()
    x = torch.randn(1, 1, 28, 28)
    assert torch.equal(net(x), net(x))
    assert always_drop_(net) == 3
    assert not torch.equal(net(x), net(x))


def test_an_unknown_victim_is_refused():
    with pytest.raises(ValueError, match=r"architecture must be one of .*, got 'gru'"):
        victim("gru", 0.1, 0)


# --- images and scores ---------------------------------------------------------------------------------------


def test_victims_are_not_in_the_reference_and_labels_of_a_batch_differ():
    x, y = inverted.private_batch(3, 6)
    known, _ = inverted.reference()
    assert len(set(y.tolist())) == 6
    assert torch.equal(x[:1], inverted.private_batch(3)[0])
    assert not torch.equal(x[:1], inverted.private_batch(4)[0])
    assert len(known) + len(inverted.held_images()[0]) == 10_000
    held, labels = inverted.held_images()
    row = (held - x[:1]).abs().flatten(1).sum(1).argmin()
    assert torch.equal(held[row], x[0])
    assert labels[row] == y[0]
    with pytest.raises(ValueError, match=r"batch must lie in 1..10, got 11"):
        inverted.private_batch(0, 11)


def test_blind_attackers_are_the_best_of_their_kind():
    x, _ = inverted.private_batch(5, 2)
    best = (inverted.constant_images(x) - x).square().flatten(1).sum(1)
    for grey in np.linspace(inverted.LOW, inverted.HIGH, 30):
        assert bool(((float(grey) - x).square().flatten(1).sum(1) >= best * (1 - 1e-5)).all())
    found = (inverted.nearest_images(x) - x).square().flatten(1).sum(1)
    brute = torch.stack([(inverted.reference()[0] - one).square().flatten(1).sum(1).min() for one in x])
    torch.testing.assert_close(found, brute, rtol=1e-4, atol=1e-3)


def test_scores_have_their_closed_forms():
    x, y = inverted.private_batch(1, 3)
    assert inverted.decibels(x + 0.1 / inverted.STD, x) == pytest.approx(20.0, abs=1e-4)
    assert inverted.decibels(x, x) == inverted.EXACT == 60.0
    rounded = (inverted.to_bytes(x)[:, None].float() / 255 - inverted.MEAN) / inverted.STD
    torch.testing.assert_close(rounded, x, rtol=0, atol=1e-5)  # the data are bytes
    assert inverted.structure(x, x) == pytest.approx(1.0)
    assert inverted.identified(x, x, y) == 1.0
    held, labels = inverted.held_images()
    others = torch.stack([held[(labels == label) & ((held - one).abs().flatten(1).sum(1) > 0)][0]
                          for one, label in zip(x, y, strict=True)])  # fmt: skip
    assert inverted.identified(others, x, y) == 0.0
    assert inverted.identified(torch.cat([x[:1], others[1:]]), x, y) == pytest.approx(1 / 3)


def test_a_direction_gives_the_image_by_its_background():
    x, _ = inverted.private_batch(2)
    for factor in (1e-3, -7.0):
        torch.testing.assert_close(inverted.on_black(factor * x), x, rtol=1e-5, atol=1e-5)
    assert float(inverted.on_black(torch.zeros(4)).max()) == pytest.approx(inverted.LOW)


# --- federated training --------------------------------------------------------------------------------------


def test_a_round_is_a_step_along_the_mean_gradient():
    net, other = victim("mlp", 0.0, 0, width=8), victim("mlp", 0.0, 0, width=8)
    seen = []

    def keep(gradients, *, step=0):
        seen.append(step)
        return [100.0 * g for g in gradients]  # Adam does not see the length

    score = federated_accuracy(net, keep, rounds=1, clients=4, lr=0.01, seed=7)
    assert seen == [0, 1, 2, 3]
    assert 0.0 <= score <= 1.0
    from pullback.core.streams import generator

    x, y = inverted.reference()
    rows = torch.randperm(len(y), generator=generator("federated", 7))[:4]
    optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    (100.0 * cross_entropy(other(x[rows]), y[rows])).backward()
    optimizer.step()
    for a, b in zip(net.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_federated_training_learns_is_seeded_and_leaves_the_global_generator():
    before = torch.get_rng_state()

    def plain(gradients, *, step=0):
        del step
        return gradients

    scores = [federated_accuracy(victim("cnn", 0.1, 0, width=6), plain, rounds=40, clients=8, lr=1e-2, seed=1)
              for _ in range(2)]  # fmt: skip
    assert scores[0] == scores[1] > 0.4
    assert torch.equal(torch.get_rng_state(), before)


# --- figures -------------------------------------------------------------------------------------------------


def fake(arrays, **more) -> Any:
    cells = [SimpleNamespace(arm=arm, seed=seed, arrays=found) for (arm, seed), found in arrays.items()]
    arms = [SimpleNamespace(name=arm, role="other") for arm in dict.fromkeys(arm for arm, _ in arrays)]
    return SimpleNamespace(cells=cells, arms=arms, **more)


def test_reconstructions_stand_in_rows_of_arms_and_columns_of_seeds():
    grey = np.full((1, 28, 28), 100, np.uint8)
    arrays = {("a", s): {"original": grey, "image": grey + s} for s in (1, 2, 3)}
    arrays |= {("b", s): {"image": grey} for s in (2, 3, 4)}
    result = fake(arrays, scores=lambda arm, metric: {1: 9.0, 2: 10.4, 3: float("nan"), 4: 1.0})
    rows = {
        "original": ("a", "original"),
        "first": ("a", "image"),
        "second": ("b", "image"),
        "no": ("c", "image"),
    }
    axes = reconstructions(result, rows).axes
    assert len(axes) == 6  # three arms, the two seeds that all of them have
    assert [ax.get_title(loc="left") for ax in axes] == ["", "", "10", "", "10", ""]
    assert [ax.get_ylabel() for ax in axes[::2]] == ["original", "first", "second"]
    assert int(axes[2].images[0].get_array()[0, 0]) == 102
    with pytest.raises(ValueError, match="rows must name arms whose runs logged images"):
        reconstructions(result, {"no": ("c", "image")})


def test_a_trade_off_joins_the_means_of_its_settings():
    table = np.array([[0.0, 0.9, 40.0], [0.5, 0.7, 20.0]])
    result = fake(
        {("a", 1): {"trade": table}, ("a", 2): {"trade": table + np.array([0, 0.1, 2])}, ("b", 1): {}}
    )
    (ax,) = trade_off(result, "trade", xlabel="cost", ylabel="exposure").axes
    line = next(each for each in ax.lines if each.get_label() == "a")
    np.testing.assert_allclose(line.get_xydata(), [[0.95, 41.0], [0.75, 21.0]])
    assert [each.get_text() for each in ax.texts] == ["0.5"]
