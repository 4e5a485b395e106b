"""Which layer gets which geometry, and the measurement of noise beside any optimizer."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from pullback.core.attachment import attach
from pullback.core.clip import ClipGradNorm
from pullback.core.state import StateError
from pullback.methods.lanton import LANTON, LayerNoise, lmo_groups

# --- groups ----------------------------------------------------------------------------------------------


def geometries(model, **how):
    return {name: group["geometry"] for group in lmo_groups(model, **how) for name, _ in group["params"]}


class Language(nn.Module):
    """Misleading names on purpose."""

    def __init__(self, tied=False):
        super().__init__()
        self.bias = nn.Embedding(10, 4)
        self.norm = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)
        self.embed = nn.Linear(4, 4)
        self.hidden = nn.Linear(4, 10)
        if tied:
            self.hidden.weight = self.bias.weight
        self.position = nn.Parameter(torch.zeros(1, 1, 4))


def test_geometry_follows_modules_and_not_names():
    found = geometries(Language())
    assert found == {
        "position": "rms",
        "bias.weight": "sign",
        "norm.self_attn.in_proj_weight": "spectral",
        "norm.self_attn.in_proj_bias": "rms",
        "norm.self_attn.out_proj.weight": "spectral",
        "norm.self_attn.out_proj.bias": "rms",
        "norm.linear1.weight": "spectral",
        "norm.linear1.bias": "rms",
        "norm.linear2.weight": "spectral",
        "norm.linear2.bias": "rms",
        "norm.norm1.weight": "rms",
        "norm.norm1.bias": "rms",
        "norm.norm2.weight": "rms",
        "norm.norm2.bias": "rms",
        "embed.weight": "spectral",
        "embed.bias": "rms",
        "hidden.weight": "sign",
        "hidden.bias": "rms",
    }


def test_tied_weights_heads_and_overrides():
    tied = Language(tied=True)
    found = geometries(tied)
    assert found["bias.weight"] == "sign"
    assert "hidden.weight" not in found
    model = Language()
    assert geometries(model, head=())["hidden.weight"] == "spectral"
    assert geometries(model, head=model.embed) == {
        **geometries(model), "embed.weight": "sign", "hidden.weight": "spectral"
    }  # fmt: skip
    assert geometries(nn.Sequential(nn.Linear(4, 1), nn.Linear(1, 2)))["0.weight"] == "spectral"
    moved = geometries(model, override={model.norm: "sign", model.embed.weight: "rms"})
    assert moved["norm.linear1.weight"] == "sign"
    assert moved["norm.linear1.bias"] == "rms"
    assert moved["embed.weight"] == "rms"


def test_kernels_frozen_parameters_and_settings():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv1d(4, 4, 1), nn.Flatten(), nn.Linear(4, 2)
    )
    model[2].weight.requires_grad_(False)
    groups = lmo_groups(model, hidden={"lr": 0.3}, embed={"lr": 0.01, "weight_decay": 0.1})
    assert [(g["geometry"], g.get("lr"), [n for n, _ in g["params"]]) for g in groups] == [
        ("spectral", 0.3, ["0.weight"]),
        ("sign", 0.01, ["4.weight"]),
        ("rms", None, ["0.bias", "1.weight", "1.bias", "2.bias", "4.bias"]),
    ]
    optimizer = LANTON(groups)
    assert optimizer.param_groups[1]["param_names"] == ["4.weight"]


def test_what_cannot_be_sorted_is_refused():
    with pytest.raises(TypeError, match=r"model must be an nn.Module, got \[\]"):
        lmo_groups([])  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match="must have parameters that require a gradient, got none in Tanh"):
        lmo_groups(nn.Tanh())
    with pytest.raises(ValueError, match=r"initialised parameters, got a lazy LazyLinear. Run it once"):
        lmo_groups(nn.Sequential(nn.LazyLinear(3)))
    model = Language()
    with pytest.raises(ValueError, match="head must name parts of the model, got Linear"):
        lmo_groups(model, head=nn.Linear(2, 2))
    with pytest.raises(ValueError, match="head must be one of 'last', got 'first'"):
        lmo_groups(model, head="first")  # ty: ignore[invalid-argument-type]
    with pytest.raises(ValueError, match="override must name parts of the model"):
        lmo_groups(model, override={nn.Linear(2, 2): "sign"})
    with pytest.raises(ValueError, match=r"override must be one of .*got 'adamw'"):
        lmo_groups(model, override={model.embed: "adamw"})  # ty: ignore[invalid-argument-type]
    wrapped = type("FullyShardedDataParallel", (nn.Module,), {})()
    with pytest.raises(TypeError, match=r"got FullyShardedDataParallel. Use fully_shard"):
        lmo_groups(nn.Sequential(wrapped))


# --- noise beside another optimizer ------------------------------------------------------------------------


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 3))


def batch(step):
    return torch.randn(16, 6, generator=torch.Generator().manual_seed(step))


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        model(batch(step)).square().mean().backward()
        optimizer.step()


def test_it_measures_what_lanton_measures_and_edits_nothing():
    model, plain, other = network(), network(), network()
    sgd = torch.optim.SGD(model.named_parameters(), lr=0.0)
    noise = LayerNoise(model, exact=True)
    attach(sgd, noise)
    optimizer = LANTON(lmo_groups(other), lr=0.0, alpha=0.01, exact_noise=True)
    train(model, sgd, range(5))
    train(other, optimizer, range(5))
    report = noise.report(alpha=0.01)
    assert report.noise == pytest.approx(optimizer.noise(), rel=1e-6)
    assert report.multipliers == pytest.approx(optimizer.layer_rates(relative=True), rel=1e-6)
    assert report.geometry == {n: g["geometry"] for g in lmo_groups(model) for n, _ in g["params"]}
    assert report.measured == 4
    adamw, watched = (torch.optim.AdamW(net.parameters()) for net in (plain, model))
    plain.load_state_dict(model.state_dict())
    attach(watched, LayerNoise(), ClipGradNorm(1.0))
    attach(adamw, ClipGradNorm(1.0))
    train(model, watched, range(3))
    train(plain, adamw, range(3))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_the_noisier_layer_gets_the_smaller_multiplier():
    params = {"quiet": nn.Parameter(torch.zeros(8, 8)), "loud": nn.Parameter(torch.zeros(8, 8))}
    noise = LayerNoise({"quiet": "spectral", "loud": "spectral"}, every=2)
    for step in range(9):
        for i, (name, p) in enumerate(params.items()):
            drawn = torch.randn(8, 8, generator=torch.Generator().manual_seed(2 * step + i))
            p.grad = drawn * (9.0 if name == "loud" else 1.0)
        noise.update_(params)
    report = noise.report()
    assert report.measured == 4
    assert 4 < report.noise["loud"] / report.noise["quiet"] < 16
    assert report.multipliers["quiet"] == 1.0
    assert report.multipliers["loud"] < 0.7
    assert noise.report(alpha=math.inf).multipliers == {"quiet": 1.0, "loud": 1.0}
    with pytest.raises(ValueError, match="alpha must be > 0, got 0"):
        noise.report(alpha=0.0)


@pytest.mark.parametrize("fused", [False, True])
def test_under_grad_scaler_noise_is_unscaled_and_overflows_do_not_count(fused):
    found = []
    for scaled in (False, True):
        model = network()
        optimizer = torch.optim.SGD(model.named_parameters(), lr=0.1, fused=fused)
        noise = LayerNoise(model)
        noise.attach(optimizer)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000, enabled=scaled)
        for step in (0, 1, math.inf, 2) if scaled else (0, 1, 2):
            optimizer.zero_grad()
            factor = math.inf if step == math.inf else 1.0
            scaler.scale(model(batch(0 if step == math.inf else step)).square().mean() * factor).backward()
            scaler.step(optimizer)
            if scaled:
                scaler.update(2.0**10)
        found.append(noise.noise())
        assert noise.measured == 2
    assert found[0] == pytest.approx(found[1], rel=1e-5)


def test_closures_resume_and_missing_gradients():
    model = network()
    first = torch.optim.AdamW(model.named_parameters(), lr=0.01)
    noise = LayerNoise(model)
    attachment = noise.attach(first)
    train(model, first, range(3))
    resumed = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(resumed.named_parameters(), lr=0.01)
    optimizer.load_state_dict(copy.deepcopy(first.state_dict()))
    again = LayerNoise(resumed)
    again.attach(optimizer).load_state_dict(attachment.state_dict())
    train(model, first, range(3, 6))
    for step in range(3, 6):

        def closure(step=step):
            optimizer.zero_grad()
            loss = resumed(batch(step)).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    assert again.noise() == noise.noise()
    before = noise.noise()
    first.zero_grad()
    model(batch(7)).square().mean().backward()
    model[0].weight.grad = None
    first.step()
    assert noise.noise()["0.weight"] == before["0.weight"]
    assert noise.noise()["2.weight"] != before["2.weight"]


def test_independent_gradients_beside_another_optimizer():
    model = network()
    optimizer = torch.optim.SGD(model.named_parameters(), lr=0.0)
    noise = LayerNoise(model, difference="independent", beta=0.0, exact=True)
    noise.attach(optimizer)
    grads = []
    for number in (1, 2):
        optimizer.zero_grad()
        (model(batch(number)).square().mean() * (8.0 if number == 1 else 1.0)).backward()
        grads.append(model[2].weight.grad.clone() / (8.0 if number == 1 else 1.0))
        if number == 1:
            noise.record_independent(model, grad_scale=8.0)
    optimizer.step()
    wanted = torch.linalg.svdvals(grads[1] - grads[0]).sum().item()
    assert noise.noise()["2.weight"] == pytest.approx(wanted, rel=1e-4)
    optimizer.step()  # nothing recorded: nothing measured
    assert noise.measured == 1
    with pytest.raises(
        ValueError, match="difference must be 'independent' to record gradients, got 'previous'"
    ):
        LayerNoise().record_independent(model)
    with pytest.raises(ValueError, match="params must have gradients, got none"):
        LayerNoise(difference="independent").record_independent(network())


def test_names_and_gradients_that_do_not_fit_are_refused():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attachment = LayerNoise(model).attach(optimizer)
    with pytest.raises(
        ValueError, match=r"must name every parameter of the optimizer, got none for 'group0.0'"
    ):
        train(model, optimizer, [0])
    attachment.remove()
    LayerNoise(model).attach(optimizer, names=model)
    train(model, optimizer, [0])
    table = nn.Embedding(5, 3, sparse=True)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(TypeError, match="LayerNoise: the gradient of weight must be dense, got a sparse one"):
        LayerNoise().update_(table)
    curved = nn.Parameter(torch.zeros(2, dtype=torch.complex64))
    curved.grad = torch.ones(2, dtype=torch.complex64)
    with pytest.raises(TypeError, match=r"the gradient of param0 must be real, got torch.complex64"):
        LayerNoise().update_([curved])
    noise = LayerNoise(model)
    with pytest.raises(StateError, match="state must hold tensors of known layers"):
        noise.load_state_dict(
            {
                **noise.state_dict(),
                "state": {"noise": {"x": torch.ones(())}, "other": {}, "kinds": {}, "measured": 0},
            }
        )


# --- gradients that come in parts, and the one kept from the step before -----------------------------------


def test_accumulated_gradients_are_measured_as_a_whole():
    found = []
    for parts in (1, 4):
        model = network()
        optimizer = LANTON(lmo_groups(model), lr=0.0, alpha=0.01)
        for step in range(4):
            optimizer.zero_grad()
            for rows in batch(step).chunk(parts):
                (model(rows).square().mean() / parts).backward()
            optimizer.step()
        found.append(optimizer.noise())
    assert found[0] == pytest.approx(found[1], rel=1e-2)


def test_without_the_gradient_of_the_step_before_the_run_is_another():
    noises = []
    for forget in (False, True):
        model = network()
        optimizer = LANTON(lmo_groups(model), alpha=0.01)
        train(model, optimizer, range(3))
        for state in optimizer.state.values() if forget else ():
            state["reference_grad"].zero_()
        train(model, optimizer, [3])
        noises.append(optimizer.noise())
    assert all(noises[0][name] != noises[1][name] for name in noises[0])
