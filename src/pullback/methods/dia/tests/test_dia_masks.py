"""Masks: recorded as torch draws them, injected where they belong, and dropout that has no name is refused."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.methods.dia import dropout_rate, dropout_sites, inject_masks, mask_accuracy, record_masks
from pullback.methods.dia.tests.cases import ViT, lenet, perceptron, picture, resnet, seeded
from pullback.testing.tools import flags, global_rng, hooks, same, values


class Twice(nn.Module):
    """One dropout module at two places of a forward pass."""

    def __init__(self, p=0.5):
        super().__init__()
        self.one, self.two, self.drop = nn.Linear(6, 8), nn.Linear(8, 4), nn.Dropout(p)

    def forward(self, x):
        return self.drop(self.two(self.drop(self.one(x))))


LAYERS = {
    "Dropout": (lambda: nn.Dropout(0.3), (3, 4, 5), (3, 4, 5)),
    "in-place": (lambda: nn.Dropout(0.3, inplace=True), (3, 4, 5), (3, 4, 5)),
    "Dropout1d": (lambda: nn.Dropout1d(0.3), (3, 4, 5), (3, 4, 1)),
    "Dropout1d-single": (lambda: nn.Dropout1d(0.3), (4, 5), (4, 1)),
    "Dropout2d": (lambda: nn.Dropout2d(0.3), (3, 4, 5, 6), (3, 4, 1, 1)),
    "Dropout2d-in-place": (lambda: nn.Dropout2d(0.3, inplace=True), (3, 4, 5, 6), (3, 4, 1, 1)),
    "Dropout3d": (lambda: nn.Dropout3d(0.3), (3, 4, 2, 5, 6), (3, 4, 1, 1, 1)),
    "Dropout3d-single": (lambda: nn.Dropout3d(0.3), (4, 2, 5, 6), (4, 1, 1, 1)),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_recording_changes_no_bit_and_replaying_gives_the_same(name, dtype):
    make, shape, mask_shape = LAYERS[name]
    model = nn.Sequential(nn.Identity(), make()).train()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)
    torch.manual_seed(3)
    plain = model(x.clone())
    torch.manual_seed(3)
    with record_masks(model) as masks:
        recorded = model(x.clone())
    assert torch.equal(plain, recorded)
    assert {key: tuple(mask.shape) for key, mask in masks.items()} == {"1#0": mask_shape}
    assert set(masks["1#0"].unique().tolist()) <= {0.0, 1.0}
    with inject_masks(model.eval(), masks):
        given = x.clone()
        assert torch.equal(model(given), plain)
        assert torch.equal(given, plain) == model[1].inplace


def test_a_mask_of_ones_scales():
    model = nn.Sequential(nn.Dropout(0.25)).eval()
    with inject_masks(model, {"0#0": torch.ones(2, 3)}):
        assert torch.equal(model(torch.ones(2, 3)), torch.full((2, 3), 1 / 0.75))


def test_every_call_has_a_mask_of_its_own_and_counting_begins_anew():
    model = seeded(Twice())
    x = torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    with record_masks(model) as masks:
        out = model(x)
    assert {name: tuple(mask.shape) for name, mask in masks.items()} == {"drop#0": (2, 8), "drop#1": (2, 4)}
    with inject_masks(model, masks):
        for _ in range(2):
            assert torch.equal(model(x), out)


def test_gradients_are_those_of_the_recorded_pass():
    model = perceptron(0.5)
    x, y = picture(4, 3), torch.tensor([0, 1, 2])
    with record_masks(model) as masks:
        true = torch.autograd.grad(functional.cross_entropy(model(x), y), list(model.parameters()))
    with inject_masks(model.eval(), masks):
        again = torch.autograd.grad(functional.cross_entropy(model(x), y), list(model.parameters()))
    assert all(map(torch.equal, true, again))


def test_relaxed_masks_have_slopes():
    model = perceptron(0.5, width=3)
    masks = {name: torch.rand(1, 3, dtype=torch.float64, requires_grad=True) for name in ("3#0", "6#0")}
    with inject_masks(model, masks):
        found = torch.autograd.grad(model(picture(4)).sum(), list(masks.values()))
    assert all(bool((slope != 0).all()) for slope in found)


def test_what_is_off_draws_nothing():
    model = perceptron(0.5)
    model[3].eval()
    with record_masks(model) as masks:
        model(picture(4))
    assert list(masks) == ["6#0"]
    model[6].p = 0.0
    with record_masks(model.eval()) as masks:
        model(picture(4))
    assert masks == {}
    with inject_masks(model, {"3#0": None}):
        assert torch.equal(model(picture(4)), model.eval()(picture(4)))


def test_a_generator_of_ones_own_leaves_the_global_one_alone():
    model, before = perceptron(0.5), global_rng()
    found = []
    for _ in range(2):
        with record_masks(model, generator=torch.Generator().manual_seed(5)) as masks:
            model(picture(4))
        found.append(masks)
    assert same(*found)
    assert same(before, global_rng())


def test_nothing_is_left_behind_even_after_an_error():
    model = perceptron(0.5)
    before = [hooks(model), flags(model), values(model)]
    for context in (record_masks(model), inject_masks(model, {})):
        with pytest.raises(ZeroDivisionError), context:
            raise ZeroDivisionError
        assert same([hooks(model), flags(model), values(model)], before)
    dropout_sites(model, picture(4))
    assert same([hooks(model), flags(model), values(model)], before)


def test_contexts_may_be_nested():
    model = perceptron(0.5)
    ones = {name: torch.ones(1, 24, dtype=torch.float64) for name in ("3#0", "6#0")}
    with inject_masks(model, ones):
        outer = model(picture(4))
        with record_masks(model) as masks:
            model(picture(4))
        assert set(masks) == set(ones)
        assert torch.equal(model(picture(4)), outer)


def test_recording_holds_one_pass():
    model = perceptron(0.5)
    with record_masks(model):
        model(picture(4))
        with pytest.raises(RuntimeError, match="record_masks holds one forward pass, got a second one"):
            model(picture(4))


def test_masks_that_do_not_fit_are_refused():
    model = perceptron(0.5)
    with (
        inject_masks(model, {"3#0": torch.ones(1, 24)}),
        pytest.raises(ValueError, match="got none for '6#0'"),
    ):
        model(picture(4))
    with (
        inject_masks(model, {"3#0": torch.ones(24)}),
        pytest.raises(ValueError, match=r"the shape \(1, 24\), got \(24,\)"),
    ):
        model(picture(4))


class Own(nn.Dropout):
    def forward(self, input):
        return super().forward(input)


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (nn.AlphaDropout(0.1), "got AlphaDropout at '0', which shifts and scales"),
        (nn.FeatureAlphaDropout(0.1), "got FeatureAlphaDropout at '0'"),
        (nn.Dropout(1.0), "p must be below 1, got 1 at '0'"),
        (Own(0.1), "got Own with its own forward at '0'"),
    ],
    ids=["alpha", "feature-alpha", "one", "own"],
)
def test_dropout_that_is_no_plain_mask_is_refused(layer, message):
    model = nn.Sequential(layer)
    for call in (lambda: dropout_sites(model, torch.ones(1, 2)), lambda: inject_masks(model, {}).__enter__()):
        with pytest.raises(ValueError, match=message):
            call()
    layer.p = 0.0
    assert dropout_sites(model, torch.ones(1, 2)) == []


# --- which calls there are ------------------------------------------------------------------------------------------


def test_sites_of_a_perceptron_know_their_readers():
    sites = dropout_sites(perceptron(0.25), picture(4, 3))
    assert [(s.name, s.p, s.shape, s.linear) for s in sites] == [
        ("3#0", 0.25, (3, 24), "4"), ("6#0", 0.25, (3, 24), "7"),
    ]  # fmt: skip


def test_sites_of_a_transformer_and_of_convolutions():
    sites = {s.name: s.shape for s in dropout_sites(seeded(ViT()), picture(8, 2, torch.float32))}
    assert sites == {
        "drop#0": (2, 5, 16), "block.on_attention#0": (2, 2, 5, 5), "block.on_out#0": (2, 5, 16),
        "block.on_up#0": (2, 5, 32), "block.on_down#0": (2, 5, 16),
    }  # fmt: skip
    sites = {s.name: s.shape for s in dropout_sites(resnet(), picture(8, 2, torch.float32))}
    assert sites == {"1.drop#0": (2, 6, 1, 1), "2#0": (2, 6, 8, 8)}
    assert len(dropout_sites(lenet(), picture(8, 1, torch.float32))) == 2


def test_looking_for_sites_changes_nothing():
    model = resnet().train()
    before = [hooks(model), flags(model), values(model), global_rng()]
    dropout_sites(model, picture(8, 1, torch.float32))
    assert same(before, [hooks(model), flags(model), values(model), global_rng()])


class Wild(nn.Module):
    """Dropout, or noise, that no module announces."""

    def __init__(self, act):
        super().__init__()
        self.act = act

    def forward(self, x):
        return self.act(x, self.training)


def _attend(x, training, p=0.1):
    rows = x[:, None]
    return functional.scaled_dot_product_attention(rows, rows, rows, None, p if training else 0.0)[:, 0]


def _drop_path(x, training):
    return x * torch.empty(len(x), 1, 1).bernoulli_(0.9) if training else x


WILD = {
    "functional": (lambda x, training: functional.dropout(x, 0.1, training), r"got dropout\(\)"),
    "functional-default": (lambda x, training: functional.dropout(x) if training else x, r"got dropout\(\)"),
    "functional2d": (
        lambda x, training: functional.dropout2d(x[..., None], 0.1, training)[..., 0],
        r"got dropout2d\(\)",
    ),
    "alpha": (lambda x, training: functional.alpha_dropout(x, 0.1, training), r"got alpha_dropout\(\)"),
    "torch": (lambda x, training: torch.dropout(x, 0.1, training), r"got dropout\(\)"),
    "attention": (_attend, r"got scaled_dot_product_attention\(\)"),
    "drop-path": (_drop_path, "a draw outside of them"),
    "noise": (lambda x, training: x + torch.randn_like(x) if training else x, "a draw outside of them"),
}


@pytest.mark.parametrize("name", WILD)
def test_dropout_without_a_name_is_refused_with_the_fix(name):
    act, message = WILD[name]
    model = nn.Sequential(nn.Linear(4, 4), Wild(act), nn.Dropout(0.1))
    with pytest.raises(
        ValueError, match=f"random numbers in dropout modules only, .*{message}.*Put an nn.Dropout"
    ):
        dropout_sites(model, torch.ones(2, 3, 4))


def test_a_refused_model_keeps_its_numbers():
    model, before = nn.Sequential(nn.Linear(4, 4), Wild(_drop_path)), global_rng()
    with pytest.raises(ValueError, match="a draw outside"):
        dropout_sites(model, torch.ones(2, 3, 4))
    assert same(before, global_rng())


MODULES = {
    "attention": (
        lambda: nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True),
        "MultiheadAttention at '0.m'",
    ),
    "encoder": (
        lambda: nn.TransformerEncoderLayer(4, 2, 8, dropout=0.1, batch_first=True),
        "at '0.m.self_attn'",
    ),
    "lstm": (lambda: nn.LSTM(4, 4, 2, dropout=0.1, batch_first=True), "LSTM at '0.m' with dropout=0.1"),
}


class Holder(nn.Module):
    def __init__(self, module, self_attention):
        super().__init__()
        self.m, self.self_attention = module, self_attention

    def forward(self, x):
        out = self.m(x, x, x) if self.self_attention else self.m(x)
        return out[0] if isinstance(out, tuple) else out


@pytest.mark.parametrize("name", MODULES)
def test_modules_with_fused_dropout_are_named(name):
    make, message = MODULES[name]
    model = nn.Sequential(Holder(make(), name == "attention"))
    with pytest.raises(ValueError, match=message):
        dropout_sites(model, torch.ones(2, 3, 4))


@pytest.mark.parametrize(
    "act",
    [
        lambda x, training: functional.dropout(x, 0.1, training=False),
        lambda x, training: functional.dropout(x, 0.0, training),
        lambda x, training: _attend(x, training, 0.0),
    ],
    ids=["off", "rate-0", "attention-0"],
)
def test_functions_that_drop_nothing_are_fine(act):
    assert len(dropout_sites(nn.Sequential(Wild(act), nn.Dropout(0.1)), torch.ones(2, 3, 4))) == 1


# --- accuracy and rates ---------------------------------------------------------------------------------------------


def test_accuracy_counts_units_over_all_calls():
    truth = {"a": torch.tensor([[1.0, 0.0], [1.0, 1.0]]), "b": torch.tensor([[0.0], [1.0]])}
    assert mask_accuracy(truth, truth) == 1.0
    guess = {"a": torch.tensor([[0.9, 0.6], [0.5, 0.2]]), "b": torch.tensor([[0.1], [0.7]])}
    assert mask_accuracy(guess, truth) == pytest.approx(4 / 6)
    flipped = {name: mask.flip(0) for name, mask in truth.items()}
    assert mask_accuracy(flipped, truth, order=[1, 0]) == 1.0
    assert mask_accuracy(flipped, truth) == pytest.approx(2 / 6)
    for wrong in ({"a": truth["a"]}, {"a": truth["a"][:1], "b": truth["b"]}):
        with pytest.raises(ValueError, match="masks"):
            mask_accuracy(wrong, truth)


def test_rates_are_set_for_a_while():
    model = perceptron(0.25).eval()
    with dropout_rate(model, 0.5):
        assert [(m.p, m.training) for m in (model[3], model[6])] == [(0.5, True)] * 2
    assert [(m.p, m.training) for m in (model[3], model[6])] == [(0.25, False)] * 2
    for p, made, message in (
        (1.0, model, "p must be below 1"),
        (0.5, nn.Linear(2, 2), "must have dropout modules"),
    ):
        with pytest.raises(ValueError, match=message), dropout_rate(made, p):
            pass
