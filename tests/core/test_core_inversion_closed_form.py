"""Labels and inputs that need no search."""

import pytest
import torch
from inversion_parts import seeded, shared
from torch import nn
from torch.nn import functional

from pullback.core.inversion_closed_form import first_layer_leak, fits_input, recover_labels

LOSS = functional.cross_entropy


def victim(seed=0, bias=True, classes=10, activation=nn.ReLU):
    layers = nn.Linear(20, 30), activation(), nn.Linear(30, classes, bias=bias)
    return seeded(nn.Sequential(*layers), seed)


def inputs(seed, size):
    return torch.randn(size, 20, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
@pytest.mark.parametrize("activation", [nn.ReLU, nn.Tanh], ids=["relu", "tanh"])
def test_one_label_is_exact(bias, activation):
    for seed in range(20):
        model, y = victim(seed, bias, activation=activation), torch.tensor([seed % 10])
        assert recover_labels(shared(model, inputs(seed, 1), y)).tolist() == y.tolist()


def test_two_classes_need_the_sign_of_the_features():
    for label in (0, 1):
        model = victim(bias=False, classes=2)
        rows = shared(model, inputs(0, 1), torch.tensor([label]))
        assert recover_labels(rows).tolist() == [label]


def test_distinct_labels_on_a_relu_victim():
    for seed in range(100):
        size = 1 + seed % 8
        y = torch.randperm(10, generator=torch.Generator().manual_seed(seed))[:size]
        rows = shared(victim(seed, bias=False), 0.3 * inputs(seed, size), y)
        if size > 1:
            assert recover_labels(rows, size, method="distinct").tolist() == y.sort().values.tolist()


def test_counts_are_exact_with_the_batchs_own_probabilities():
    for seed in range(20):
        model = victim(seed)
        y = torch.randint(10, (16,), generator=torch.Generator().manual_seed(seed))
        x = inputs(seed, 16)
        mean = model(x).softmax(1).mean(0)
        rows = shared(model, x, y)
        assert recover_labels(rows, 16, probabilities=mean).tolist() == y.sort().values.tolist()
        assert recover_labels(rows, 16).shape == (16,)


def test_counts_with_uniform_probabilities_are_a_good_estimate():
    right = 0
    for seed in range(20):
        y = torch.randint(10, (8,), generator=torch.Generator().manual_seed(seed))
        found = recover_labels(shared(victim(seed), 0.2 * inputs(seed, 8), y), 8)
        right += sum(min(int((found == c).sum()), int((y == c).sum())) for c in range(10))
    assert right >= 0.9 * 160


def test_a_layer_may_be_named():
    model = nn.Sequential(victim(), nn.Linear(10, 7))
    head = dict(
        zip(dict(model.named_parameters()), shared(model, inputs(0, 1), torch.tensor([3])), strict=True)
    )
    assert recover_labels(head, layer="1").tolist() == [3]
    assert recover_labels(head, layer="1.weight").tolist() == [3]
    LOSS(model(inputs(0, 1)), torch.tensor([3])).backward()
    assert recover_labels(model).tolist() == [3]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda rows: recover_labels(rows, 0), "batch_size must be >= 1, got 0"),
        (
            lambda rows: recover_labels(rows, 2, method="sign"),
            "method must be 'counts' or 'distinct' for batches",
        ),
        (
            lambda rows: recover_labels(rows[:3], 2, method="counts"),
            "method must be 'distinct' without a bias",
        ),
        (
            lambda rows: recover_labels(rows, 11, method="distinct"),
            "batch_size must be at most the 10 classes",
        ),
        (lambda rows: recover_labels([rows[1]]), "layer must name a weight among the gradients"),
        (
            lambda rows: recover_labels([-row for row in rows]),
            "one sample under cross-entropy, got 9 negative",
        ),
        (lambda rows: recover_labels([torch.ones(2, 3, 1)]), "layer must be linear"),
        (lambda rows: recover_labels(rows, 2, probabilities=torch.ones(3)), "probabilities must be of shape"),
        (lambda rows: recover_labels(rows, method="idlg"), "method must be one of"),
        (lambda rows: first_layer_leak([rows[1]]), "layer must name a weight among the gradients"),
    ],
    ids=[
        "batch",
        "sign",
        "counts",
        "distinct",
        "none",
        "negative",
        "conv",
        "probabilities",
        "method",
        "leak",
    ],
)
def test_what_makes_no_sense_is_refused(call, message):
    rows = shared(victim(), inputs(0, 1), torch.tensor([4]))
    with pytest.raises((TypeError, ValueError), match=message):
        call(rows)


def test_one_input_of_a_linear_layer_is_read_off():
    model, x, y = victim(), inputs(1, 1), torch.tensor([4])
    rows = shared(model, x, y)
    leak = first_layer_leak(rows)
    assert leak.exact
    assert leak.alignment == pytest.approx(1.0, abs=1e-10)
    assert torch.allclose(leak.input, x[0].double(), atol=1e-5)
    assert "known exactly" in leak.verdict
    assert fits_input(leak, (1, 4, 5))
    assert not fits_input(leak, (1, 21))


def test_without_a_bias_length_and_sign_stay_unknown():
    model = seeded(nn.Sequential(nn.Linear(20, 30, bias=False), nn.GELU(), nn.Linear(30, 5)))
    x = inputs(1, 1)
    leak = first_layer_leak(shared(model, x, torch.tensor([4])))
    assert leak.input is None
    cosine = torch.cosine_similarity(leak.direction, x[0].double(), 0)
    assert abs(cosine.item()) == pytest.approx(1.0, abs=1e-10)
    assert "up to length and sign" in leak.verdict


def test_several_inputs_noise_and_convolutions_leave_no_closed_form():
    rows = shared(victim(), inputs(1, 2), torch.tensor([4, 5]))
    assert first_layer_leak(rows).direction is None
    one = shared(victim(), inputs(1, 1), torch.tensor([4]))
    generator = torch.Generator().manual_seed(0)
    noisy = [row + 0.01 * torch.randn(row.shape, generator=generator) for row in one]
    assert "several inputs, or its gradient was altered" in first_layer_leak(noisy).verdict
    model = seeded(nn.Sequential(nn.Conv1d(1, 2, 3), nn.Flatten(), nn.Linear(36, 4)))
    conv = shared(model, inputs(0, 1)[:, None], torch.tensor([1]))
    assert "is not linear" in first_layer_leak(conv).verdict
    zero = [torch.zeros_like(row) for row in one]
    assert "zero or not finite" in first_layer_leak(zero).verdict
