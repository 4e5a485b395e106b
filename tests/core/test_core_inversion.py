"""Gradient inversion: what it finds, what it costs, and that it leaves no trace."""

import io

import pytest
import torch
from inversion_parts import batch, perceptron, seeded, shared
from torch import nn
from torch.nn import functional

from pullback.core.inversion import GradientInversion, reconstruct
from pullback.core.inversion_terms import GradientMatching
from pullback.core.state import StateError
from pullback.testing.tools import flags, global_rng, gradients, hooks, same, values

LOSS = functional.cross_entropy


def attack(model, **settings):
    return GradientInversion(model, LOSS, **{"max_iters": 40, "tolerance": 0.0, "lr": 0.05, **settings})


def found(model, x, y, *, seed=0, callback=None, resume=None, labels="known", **settings):
    labels = y if isinstance(labels, str) else labels
    return attack(model, **settings).reconstruct(
        shared(model, x, y), labels=labels, input_shape=x.shape, seed=seed, callback=callback, resume=resume
    )


# --- what it finds --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("matching", ["cosine", "euclidean"])
def test_deep_leakage_settings_find_the_input(matching):
    model = perceptron()
    x, y = batch()
    result = found(
        model, x, y, matching=matching, optimizer="lbfgs", lr=1.0, tv=0.0, max_iters=400, tolerance=1e-16
    )
    assert result.status == "converged"
    assert (result.images - x).abs().max() < 1e-5
    assert result.images is result.value


def test_deep_leakage_finds_soft_labels_together_with_the_input():
    model = perceptron()
    x, y = batch()
    y = y + 2
    settings = {"matching": "euclidean", "optimizer": "lbfgs", "lr": 1.0, "tv": 0.0, "max_iters": 300}
    result = found(model, x, y, labels=None, tolerance=1e-9, **settings)
    assert result.status == "converged"
    assert (result.images - x).abs().max() < 1e-4
    assert torch.allclose(result.labels, functional.one_hot(y, 4).double(), atol=1e-4)


def test_inverting_gradients_settings_find_the_input_in_its_box():
    model = perceptron(torch.float32)
    x, y = batch(torch.float32)
    result = found(model, x, y, bounds=(0.0, 1.0), max_iters=600, schedule="milestones", lr=0.1)
    assert (result.images - x).abs().max() < 0.03
    assert 0 <= result.images.min() <= result.images.max() <= 1
    assert list(result.trace) == ["loss", "match", "lr"]
    assert [len(row) for row in result.trace.values()] == [600] * 3


def test_every_evaluated_image_lies_in_the_box():
    model, seen = perceptron(), []
    x, y = batch()
    handle = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    found(model, x, y, bounds=(0.2, torch.full((6,), 0.4, dtype=torch.float64)), lr=0.5, max_iters=10)
    handle.remove()
    guesses = torch.stack(seen[2:])  # the first pass was the client's, the second a dry one
    assert len(guesses) == 10
    assert guesses.min() == 0.2
    assert guesses.max() == 0.4


def test_total_variation_is_a_part_of_the_loss():
    model = seeded(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(64, 3))).double()
    x, y = (
        torch.rand(1, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        torch.tensor([1]),
    )
    result = found(model, x, y, tv=0.1, max_iters=5)
    assert list(result.trace) == ["loss", "match", "tv", "lr"]
    assert torch.allclose(result.trace["loss"], result.trace["match"] + 0.1 * result.trace["tv"], rtol=1e-14)
    weak, default = found(model, x, y, tv=1e-5, max_iters=5), found(model, x, y, max_iters=5)
    assert torch.equal(weak.trace["loss"], default.trace["loss"])
    assert list(found(model, x, y, tv=0.0, max_iters=5).trace) == ["loss", "match", "lr"]


def test_matching_some_layers_needs_no_gradient_of_the_others():
    model = perceptron()
    x, y = batch()
    gradients_ = dict(zip(dict(model.named_parameters()), shared(model, x, y), strict=True))
    partial = {name: gradients_[name] for name in ("2.weight", "0.weight")}
    one = attack(model).reconstruct(partial, labels=y, input_shape=x.shape)
    whole = found(model, x, y)
    assert one.trace["match"][0] != whole.trace["match"][0]
    again = found(model, x, y, matching=GradientMatching(layers=["0.weight", "2.weight"]))
    assert torch.equal(again.trace["loss"], one.trace["loss"])


def test_gradients_may_come_as_list_mapping_or_model():
    model = perceptron()
    x, y = batch()
    rows = shared(model, x, y)
    LOSS(model(x), y).backward()
    named = {name: row for (name, _), row in zip(model.named_parameters(), rows, strict=True)}
    results = [
        attack(model).reconstruct(g, labels=y, input_shape=x.shape) for g in (rows, list(rows), named, model)
    ]
    assert all(torch.equal(each.trace["loss"], results[0].trace["loss"]) for each in results)


def test_frozen_parameters_take_no_part():
    model = perceptron()
    x, y = batch()
    model[0].bias.requires_grad_(False)
    rows = torch.autograd.grad(LOSS(model(x), y), [p for p in model.parameters() if p.requires_grad])
    result = attack(model).reconstruct(rows, labels=y, input_shape=x.shape)
    assert result.status == "max_steps"
    assert not model[0].bias.requires_grad
    with pytest.raises(
        ValueError, match="one entry for each of the 3 parameters that require gradients, got 2"
    ):
        attack(model).reconstruct(rows[:2], labels=y, input_shape=x.shape)


def test_restarts_are_independent_and_the_best_wins():
    model = perceptron()
    x, y = batch()
    result = found(model, x, y, restarts=3)
    alone = found(model, x, y)
    assert len(set(result.restart_losses)) == 3
    assert result.restart_losses[0] == alone.loss
    assert result.loss == min(result.restart_losses) == result.restart_losses[result.restart]
    assert result.steps == 120
    starts = torch.stack([torch.zeros_like(x), x, torch.ones_like(x)])
    assert found(model, x, y, restarts=3, init=starts).restart == 1


def test_starts():
    model = perceptron()
    x, y = batch()
    assert found(model, x, y, init=x).trace["match"][0] == pytest.approx(0.0, abs=1e-12)
    assert torch.equal(found(model, x, y, init="zeros", max_iters=1).images, torch.zeros_like(x))
    uniform = found(model, x, y, init="uniform", max_iters=1, bounds=(2.0, 3.0)).images
    assert 2 < uniform.min() < uniform.max() < 3
    normal = [found(model, x, y, max_iters=1, seed=seed).images for seed in (0, 0, 1)]
    assert torch.equal(normal[0], normal[1])
    assert not torch.equal(normal[0], normal[2])


def test_more_unknowns_than_equations_are_noted():
    model = seeded(nn.Sequential(nn.Linear(6, 2))).double()
    x, y = batch(size=4, classes=2)
    (note,) = found(model, x, y).notes
    assert "24 unknowns but only 14 shared numbers" in note
    assert found(perceptron(), *batch()).notes == ()


# --- what it costs --------------------------------------------------------------------------------------------------


def test_one_forward_pass_and_two_backward_passes_per_iteration(monkeypatch):
    model = perceptron()
    x, y = batch()
    rows = shared(model, x, y)
    passes, calls, real = [], [], torch.autograd.grad
    model.register_forward_hook(lambda *_: passes.append(1))
    monkeypatch.setattr(
        torch.autograd, "grad", lambda *a, **k: calls.append(k.get("create_graph", False)) or real(*a, **k)
    )
    trees, modules = [], nn.Module.named_modules
    monkeypatch.setattr(nn.Module, "named_modules", lambda *a, **k: trees.append(1) or modules(*a, **k))
    counts = {}
    for budget in (10, 30):
        passes.clear(), calls.clear(), trees.clear()
        attack(model, max_iters=budget).reconstruct(rows, labels=y, input_shape=x.shape)
        counts[budget] = (len(passes), calls.count(True), calls.count(False), len(trees))
    assert counts[10][:3] == (11, 10, 10)  # one dry pass
    assert counts[30][:3] == (31, 30, 30)
    assert counts[10][3] == counts[30][3]


def test_the_host_reads_once_per_block(monkeypatch):
    model = perceptron()
    x, y = batch()
    reads, cpu = [], torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: reads.append(1) or cpu(self))
    for name in ("item", "__float__", "__bool__", "tolist"):
        real = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda self, real=real: reads.append(1) or real(self))
    counts = {}
    for every in (5, 20):
        reads.clear()
        found(model, x, y, max_iters=100, check_every=every, stop_patience=None)
        counts[every] = len(reads)
    blocks = counts[5] - counts[20]
    assert blocks <= 5 * 15  # fifteen blocks more; some reads each of a trace that lies on the host already
    assert counts[20] < 60


def test_no_graph_outlives_an_iteration():
    model = perceptron()
    x, y = batch()
    result = found(model, x, y)
    assert result.images.grad_fn is None
    assert not result.images.requires_grad
    assert all(not row.requires_grad for row in result.trace.values())


# --- no trace -------------------------------------------------------------------------------------------------------


class Counting(nn.Module):
    """A buffer that every forward pass writes to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("passes", torch.zeros(()))

    def forward(self, x):
        self.passes += 1
        return x


@pytest.mark.parametrize("fails", [False, True], ids=["ends", "raises"])
def test_the_model_is_left_as_it_was(fails):
    model = seeded(
        nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), Counting(), nn.Dropout(0.5), nn.Linear(8, 4))
    ).double()
    model.train()
    model[0].eval()
    model[4].bias.requires_grad_(False)
    x, y = batch(size=3)
    LOSS(model(x), y).backward()
    before = [hooks(model), flags(model), gradients(model), values(model), global_rng()]
    steps = []

    def stop(progress):
        steps.append(progress.step)
        if fails:
            raise KeyboardInterrupt

    def act():
        attack(model).reconstruct(model, labels=y, input_shape=x.shape, callback=stop)

    if fails:
        with pytest.raises(KeyboardInterrupt):
            act()
    else:
        act()
    assert steps
    assert same(before, [hooks(model), flags(model), gradients(model), values(model), global_rng()])


def test_nothing_that_is_passed_in_is_changed():
    model = perceptron()
    x, y = batch()
    rows, start = shared(model, x, y), torch.rand(1, 6, dtype=torch.float64)
    before = [each.clone() for each in (*rows, start, y)]
    attack(model, init=start, bounds=(0.0, 1.0), lr=0.5).reconstruct(rows, labels=y, input_shape=x.shape)
    assert all(map(torch.equal, before, (*rows, start, y)))


def test_in_place_layers_do_not_write_to_the_guess():
    model = seeded(
        nn.Sequential(nn.ReLU(inplace=True), nn.Linear(6, 12), nn.GELU(), nn.Linear(12, 4))
    ).double()
    x, y = batch()
    rows = shared(model, x.clone(), y)
    start = torch.full((1, 6), -1.0, dtype=torch.float64)
    result = attack(model, init=start, max_iters=1).reconstruct(rows, labels=y, input_shape=x.shape)
    assert torch.equal(result.images, start)


# --- going on -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["signed", "lbfgs"])
def test_an_interrupted_attack_loses_nothing(optimizer):
    model = perceptron()
    x, y = batch()
    settings = {"optimizer": optimizer, "restarts": 2, "check_every": 6, "patience": 5}
    states = []
    whole = found(model, x, y, callback=lambda progress: states.append(progress.state_dict()), **settings)
    assert len(states) > 8
    for state in (states[1], states[-2]):
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        rest = found(model, x, y, resume=torch.load(file, weights_only=True), **settings)
        assert torch.equal(rest.images, whole.images)
        assert same(rest.trace, whole.trace)
        assert (rest.restart_losses, rest.steps, rest.restart) == (
            whole.restart_losses,
            whole.steps,
            whole.restart,
        )


def test_a_resumed_attack_may_have_a_larger_budget():
    model = perceptron()
    x, y = batch()
    states = []
    found(model, x, y, max_iters=40, callback=lambda progress: states.append(progress.state_dict()))
    more = found(model, x, y, max_iters=80, resume=states[-1])
    assert torch.equal(more.trace["loss"], found(model, x, y, max_iters=80).trace["loss"])


def _other_model(model):
    with torch.no_grad():
        model[0].bias.add_(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, model: state.update(format_version=2), "format_version must be <= 1, got 2"),
        (lambda state, model: state.pop("descent"), "resume must hold 'descent'"),
        (lambda state, model: state.update(settings="0"), "one with other settings"),
        (lambda state, model: state.update(gradients="0"), "one with other gradients"),
        (lambda state, model: _other_model(model), "one with other gradients|one with other model"),
        (lambda state, model: state.update(seed=3), "one with other seed"),
        (lambda state, model: state["descent"]["leaves"].update(images=torch.zeros(2)), "must have shape"),
        (lambda state, model: state.update(descent={}), "must have the keys"),
    ],
    ids=["newer", "incomplete", "settings", "gradients", "model", "seed", "shape", "empty"],
)
def test_a_foreign_state_is_refused(change, message):
    model = perceptron()
    x, y = batch()
    states = []
    found(model, x, y, callback=lambda progress: states.append(progress.state_dict()))
    change(states[0], model)
    with pytest.raises(StateError, match=message):
        found(model, x, y, resume=states[0])


def test_another_setting_makes_another_attack_of_it():
    model = perceptron()
    x, y = batch()
    states = []
    found(model, x, y, callback=lambda progress: states.append(progress.state_dict()))
    with pytest.raises(StateError, match="other settings"):
        found(model, x, y, lr=0.06, resume=states[0])
    with pytest.raises(StateError, match="other gradients"):
        found(model, x + 0.1, y, resume=states[0])
    with pytest.raises(StateError, match="resume must be a mapping, got int"):
        found(model, x, y, resume=3)


def test_the_callback_sees_progress_and_may_end_it():
    model = perceptron()
    x, y = batch()
    seen = []

    def stop(progress):
        seen.append((progress.restart, progress.step, progress.loss, progress.images.shape))
        return progress.step >= 10

    result = found(model, x, y, check_every=5, restarts=3, callback=stop)
    assert [each[:2] for each in seen] == [(0, 5), (0, 10)]
    assert result.loss == seen[-1][2]
    assert (result.status, result.steps) == ("max_steps", 10)
    assert "callback ended it after 10" in result.message


def test_reconstruct_is_the_class_in_one_call():
    model = perceptron()
    x, y = batch()
    one = reconstruct(
        model, LOSS, shared(model, x, y), labels=y, input_shape=x.shape, max_iters=40, tolerance=0.0, lr=0.05
    )
    assert torch.equal(one.trace["loss"], found(model, x, y).trace["loss"])
    assert "Sequential" in repr(attack(model))
