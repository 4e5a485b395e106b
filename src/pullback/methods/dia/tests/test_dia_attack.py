"""The attack on the field's architectures, its refusals, resumes and traces."""

import io
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from pullback.core.state import StateError
from pullback.methods.dia import DropoutInversion, dropout_rate, mask_accuracy, psnr
from pullback.methods.dia.tests.cases import LOSS, ViT, client, lenet, perceptron, picture, resnet, seeded
from pullback.testing.tools import flags, global_rng, gradients, hooks, same, values

SETTINGS: dict[str, Any] = {"max_iters": 30, "tolerance": 0.0, "stop_patience": None, "bounds": (0.0, 1.0)}
VICTIMS = {
    "mlp": lambda: perceptron(0.25, side=8, dtype=torch.float32),
    "lenet": lenet,
    "resnet": resnet,
    "vit": ViT,
}


def inversion(model, masks="search", **settings):
    return DropoutInversion(model, LOSS, masks=masks, **{**SETTINGS, **settings})


@pytest.mark.parametrize("name", VICTIMS)
def test_the_architectures_of_the_paper_can_be_attacked(name):
    model, x, y = seeded(VICTIMS[name]()).train(), picture(8, 1, torch.float32), torch.tensor([2])
    for module in model.modules():  # a client normalises by running statistics here: batch 1
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    shared, truth = client(model, x, y)
    before = [hooks(model), flags(model), gradients(model), values(model), global_rng()]
    result = inversion(model).reconstruct(shared, labels=y, input_shape=x.shape)
    assert same(before, [hooks(model), flags(model), gradients(model), values(model), global_rng()])
    assert all("forward" not in vars(module) for module in model.modules())
    assert {key: mask.shape for key, mask in result.masks.items()} == {
        key: mask.shape for key, mask in truth.items()
    }
    assert all(0 <= mask.min() <= mask.max() <= 1 for mask in result.masks.values())
    assert list(result.trace) == ["loss", "match", "tv", "mask_share", "lr"]
    assert result.loss < result.trace["loss"][0]
    relaxed = torch.cat([mask.flatten() for mask in result.masks.values()])
    assert ((relaxed > 0) & (relaxed < 1)).any()


def test_a_transformer_gives_its_image_away_under_dropout():
    model, x, y = seeded(ViT(0.1)).train(), picture(8, 1, torch.float32), torch.tensor([2])
    shared, truth = client(model, x, y)
    scores = {}
    for name, masks in (("ignorant", None), ("search", "search"), ("informed", truth)):
        attack = inversion(model, masks, max_iters=250, schedule="milestones")
        scores[name] = psnr(attack.reconstruct(shared, labels=y, input_shape=x.shape).images, x).item()
    assert scores["search"] > scores["ignorant"] + 3
    assert scores["informed"] > scores["ignorant"] + 6


def test_one_forward_pass_per_iteration_with_masks_too():
    model, x, y = perceptron(0.25), picture(4), torch.tensor([1])
    shared, _ = client(model, x, y)
    passes = []
    handle = model.register_forward_hook(lambda *_: passes.append(1))
    counts = []
    for budget in (10, 30):
        passes.clear()
        inversion(model, max_iters=budget).reconstruct(shared, labels=y, input_shape=x.shape)
        counts.append(len(passes))
    handle.remove()
    assert counts == [12, 32]  # one dry pass of the engine, one that looks for dropout calls


def test_one_leaf_holds_all_masks_and_only_images_move_by_signs():
    model, x, y = perceptron(0.25), picture(4), torch.tensor([1])
    shared, _ = client(model, x, y)
    states = []
    attack = inversion(model, max_iters=3, check_every=1, lr=0.01, bounds=None)
    attack.reconstruct(
        shared, labels=y, input_shape=x.shape, callback=lambda p: states.append(p.state_dict())
    )
    first, second = states[0]["descent"], states[1]["descent"]
    assert list(first["leaves"]) == ["images", "masks"]
    moments = first["mover"]["first"]
    assert set(moments[0].abs().mul(10).round(decimals=6).unique().tolist()) <= {0.0, 1.0}
    assert len(moments[1].abs().unique()) > 10
    assert not torch.equal(first["leaves"]["masks"], second["leaves"]["masks"])


def test_a_shared_module_has_a_mask_per_call():
    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.two, self.three = nn.Linear(16, 12), nn.Linear(12, 12), nn.Linear(12, 5)
            self.drop = nn.Dropout(0.3)

        def forward(self, x):
            h = self.drop(functional.gelu(self.one(x.flatten(1))))
            return self.three(self.drop(functional.gelu(self.two(h))))

    model, x, y = seeded(Shared()).double().train(), picture(4), torch.tensor([1])
    shared, truth = client(model, x, y)
    result = inversion(model, max_iters=250).reconstruct(shared, labels=y, input_shape=x.shape)
    assert list(result.masks) == ["drop#0", "drop#1"]
    assert mask_accuracy(result.masks, truth) > 0.95


def test_layers_at_rate_zero_have_no_mask():
    model, x, y = perceptron(0.25), picture(4), torch.tensor([1])
    model[3].p = 0.0
    shared, truth = client(model, x, y)
    result = inversion(model).reconstruct(shared, labels=y, input_shape=x.shape)
    assert list(result.masks) == list(truth) == ["6#0"]


def test_dropout_in_place_is_attacked_alike():
    x, y = picture(4), torch.tensor([1])
    found = []
    for inplace in (False, True):
        model = perceptron(0.25)
        model[3].inplace = model[6].inplace = inplace
        shared, _ = client(model, x, y)
        found.append(inversion(model).reconstruct(shared, labels=y, input_shape=x.shape))
    assert same(found[0].trace, found[1].trace)


def test_an_interrupted_attack_loses_nothing():
    model, x, y = perceptron(0.25), picture(4), torch.tensor([1])
    shared, truth = client(model, x, y)
    states = []
    attack = inversion(model, check_every=7)
    whole = attack.reconstruct(
        shared, labels=y, input_shape=x.shape, callback=lambda progress: states.append(progress.state_dict())
    )
    file = io.BytesIO()
    torch.save(states[1], file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    rest = inversion(model, check_every=7).reconstruct(shared, labels=y, input_shape=x.shape, resume=state)
    assert same(rest.trace, whole.trace)
    assert same(rest.masks, whole.masks)
    for other in (inversion(model, check_every=7, mask_reg=1e-3), inversion(model, truth, check_every=7)):
        with pytest.raises(StateError, match="other settings"):
            other.reconstruct(shared, labels=y, input_shape=x.shape, resume=state)


def test_masks_and_labels_can_be_searched_together():
    model, x, y = perceptron(0.25), picture(4), torch.tensor([1])
    shared, truth = client(model, x, y)
    result = inversion(model, max_iters=400).reconstruct(shared, labels=None, input_shape=x.shape)
    assert result.labels.argmax().item() == 1
    assert mask_accuracy(result.masks, truth) > 0.9


def test_masks_count_as_unknowns():
    model, x, y = perceptron(0.25, width=200), picture(4, 4), torch.tensor([1, 2, 0, 3])
    shared, _ = client(model, x, y)
    assert inversion(model, max_iters=1).reconstruct(shared, labels=y, input_shape=x.shape).notes == ()
    (note,) = (
        inversion(model, max_iters=1)
        .reconstruct({"7.weight": shared[-1]}, labels=y, input_shape=x.shape)
        .notes
    )
    assert "1664 unknowns but only 1000 shared numbers" in note
    few = inversion(model, None, max_iters=1).reconstruct(
        {"7.weight": shared[-1]}, labels=y, input_shape=x.shape
    )
    assert few.notes == ()


BAD = {
    "word": ({"masks": "truth"}, "masks must be one of 'search', got 'truth'"),
    "number": ({"masks": 3}, "masks must be 'search', a mapping from calls or None, got 3"),
    "penalty": ({"mask_reg": -1.0}, "mask_reg must be >= 0, got -1"),
    "init": ({"mask_init": "ones"}, "mask_init must be one of 'bernoulli', 'zero_columns', got 'ones'"),
    "missing": ({"masks": {}}, r"masks must have one for every dropout call, got missing \['3#0', '6#0'\]"),
    "unknown": ({"masks": {"3#0": None, "6#0": None, "9#0": None}}, r"unknown \['9#0'\]"),
    "shape": (
        {"masks": {"3#0": torch.ones(24), "6#0": None}},
        r"masks\['3#0'\] must have the shape \(1, 24\)",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_masks_that_make_no_sense_are_refused(case):
    settings, message = BAD[case]
    model, x, y = perceptron(0.25), picture(4), torch.tensor([1])
    shared, _ = client(model, x, y)
    with pytest.raises((TypeError, ValueError), match=message):
        inversion(model, **settings).reconstruct(shared, labels=y, input_shape=x.shape)


def test_dropout_without_a_name_is_refused_but_not_for_an_attack_without_masks():
    model = seeded(
        nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.AlphaDropout(0.1), nn.Linear(8, 5))
    ).train()
    x, y = picture(4, 1, torch.float32), torch.tensor([1])
    shared = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
    with pytest.raises(ValueError, match="got AlphaDropout at '2'"):
        inversion(model).reconstruct(shared, labels=y, input_shape=x.shape)
    assert inversion(model, None).reconstruct(shared, labels=y, input_shape=x.shape).status == "max_steps"


def test_rates_can_be_swept_on_one_model():
    model, x, y = perceptron(0.25), picture(4), torch.tensor([1])
    with dropout_rate(model, 0.5):
        shared, truth = client(model, x, y)
        result = inversion(model, max_iters=200).reconstruct(shared, labels=y, input_shape=x.shape)
    assert mask_accuracy(result.masks, truth) > 0.9
