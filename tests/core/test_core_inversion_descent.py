"""The loop: Adam and plateaus as torch has them, the best iterate, stop rules, exact budgets, exact resumes."""

import copy
import io
import math

import pytest
import torch

from pullback.core.inversion_descent import Descent, Plan, Trial, best_of

TARGET = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


class Bowl:
    """A quadratic; every evaluated point is remembered."""

    def __init__(self, signed=(), spoil=None, loss=None):
        self.signed, self.spoil, self.loss = frozenset(signed), spoil, loss
        self.seen, self.losses = [], []

    def start(self, restart):
        return {
            "x": torch.zeros(3, dtype=torch.float64) + restart,
            "y": torch.full((2,), 3.0, dtype=torch.float64),
        }

    def evaluate(self, leaves):
        self.seen.append({name: leaf.detach().clone() for name, leaf in leaves.items()})
        loss = ((leaves["x"] - TARGET) ** 2).sum() + (leaves["y"] ** 4).sum()
        if self.loss is not None:
            loss = loss * 0 + self.loss(len(self.seen) - 1)
        if self.spoil is not None and len(self.seen) > self.spoil:
            loss = loss * math.nan
        self.losses.append(loss.item())
        return [loss, loss.detach() / 2]

    def project_(self, leaves):
        with torch.no_grad():
            leaves["x"].clamp_(-1.5, 1.5)


def settled(**changed):
    return Plan(**{"max_iters": 60, "tolerance": 0.0, "stop_patience": None, "check_every": 7, **changed})


def run(problem, plan, restart=0):
    descent = Descent(problem, plan, restart)
    while (trial := descent.advance()) is None:
        pass
    return trial


@pytest.mark.parametrize("signed", [(), ("x",)], ids=["plain", "signed"])
def test_adam_is_torchs_own(signed):
    problem = Bowl(signed)
    run(problem, settled(optimizer="adam", schedule="constant", lr=0.05))
    leaves = {name: leaf.requires_grad_() for name, leaf in Bowl().start(0).items()}
    adam = torch.optim.Adam(leaves.values(), lr=0.05)
    for seen in problem.seen:
        assert torch.allclose(seen["x"], leaves["x"], rtol=1e-12, atol=1e-13)
        assert torch.allclose(seen["y"], leaves["y"], rtol=1e-12, atol=1e-13)
        adam.zero_grad()
        Bowl().evaluate(leaves)[0].backward()
        if signed:
            leaves["x"].grad.sign_()
        adam.step()
        Bowl().project_(leaves)


def test_plateaus_are_torchs_own():
    losses = [
        1.0,
        0.9,
        0.89999,
        0.95,
        0.9,
        0.8,
        0.81,
        0.8,
        0.79995,
        0.82,
        0.9,
        0.9,
        0.9,
        0.1,
        0.1,
        0.1,
        0.1,
        0.1,
        0.1,
    ]
    problem = Bowl(loss=lambda step: losses[step])
    trial = run(problem, settled(optimizer="adam", max_iters=len(losses), patience=2, lr=0.3))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=0.3)
    scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=2)
    expected = []
    for loss in losses:
        expected.append(optimizer.param_groups[0]["lr"])
        scheduler.step(loss)
    assert trial.trace[:, -1].tolist() == pytest.approx(expected, rel=1e-12)
    assert expected[-1] < 0.3 * 0.02


def test_milestones_and_a_schedule_of_ones_own():
    trial = run(Bowl(), settled(optimizer="adam", schedule="milestones", max_iters=16, lr=1.0))
    assert trial.trace[:, -1].tolist() == pytest.approx([1.0] * 6 + [0.1] * 4 + [0.01] * 4 + [0.001] * 2)
    trial = run(
        Bowl(), settled(optimizer="adam", schedule=lambda step, steps: step / steps, max_iters=4, lr=2.0)
    )
    assert trial.trace[:, -1].tolist() == [0.0, 0.5, 1.0, 1.5]


def test_the_best_iterate_is_the_one_whose_loss_it_is():
    for signed in ((), ("x", "y")):
        moving = Bowl(signed)
        trial = run(moving, settled(optimizer="adam", max_iters=40, lr=0.9))
        best = min(range(len(moving.losses)), key=moving.losses.__getitem__)
        assert trial.loss == moving.losses[best]
        assert torch.equal(trial.leaves["x"], moving.seen[best]["x"])
        assert torch.equal(trial.leaves["y"], moving.seen[best]["y"])
        assert best < len(moving.losses) - 1  # else the last iterate would pass as well
    assert trial.trace[:, 0].tolist() == moving.losses
    assert trial.trace[:, 1].tolist() == [each / 2 for each in moving.losses]


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_nan_in_the_middle_gives_the_best_iterate_before_it(optimizer):
    problem = Bowl(spoil=10)
    trial = run(problem, settled(optimizer=optimizer, lr=0.1))
    assert trial.status == "diverged"
    assert trial.steps == 11
    assert trial.loss == min(problem.losses[:10])
    assert all(bool(leaf.isfinite().all()) for leaf in trial.leaves.values())
    assert "iteration 10" in trial.message


def test_nan_from_the_start_gives_the_start():
    trial = run(Bowl(spoil=0), settled(optimizer="adam"))
    assert (trial.status, trial.loss, trial.steps) == ("diverged", math.inf, 1)
    assert torch.equal(trial.leaves["x"], Bowl().start(0)["x"])


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
@pytest.mark.parametrize("budget", [1, 7, 20, 33])
def test_budgets_are_exact(optimizer, budget):
    problem = Bowl()
    trial = run(problem, settled(optimizer=optimizer, max_iters=budget, lr=0.01))
    assert (trial.status, trial.steps, len(problem.losses)) == ("max_steps", budget, budget)


def test_tolerance_and_patience_end_a_start():
    trial = run(Bowl(), settled(optimizer="lbfgs", lr=1.0, max_iters=300, tolerance=1e-6))
    assert trial.status == "converged"
    assert trial.loss <= 1e-6
    trial = run(Bowl(loss=lambda step: 1.0 + step), settled(optimizer="adam", stop_patience=15))
    assert (trial.status, trial.steps) == ("max_steps", 21)  # looked at after 7, 14 and 21
    assert "no better loss for 15" in trial.message


def test_lbfgs_solves_the_bowl():
    trial = run(Bowl(), settled(optimizer="lbfgs", lr=1.0, max_iters=200))
    assert torch.allclose(trial.leaves["x"], TARGET, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_an_interrupted_start_goes_on_bit_for_bit(optimizer):
    plan = settled(optimizer=optimizer, lr=0.05, patience=3)
    whole = run(Bowl(("y",)), plan)
    first = Descent(Bowl(("y",)), plan, 0)
    for _ in range(2):
        assert first.advance() is None
    file = io.BytesIO()
    torch.save(first.state(), file)
    first.advance()  # what goes on must not change what was saved
    file.seek(0)
    second = Descent(Bowl(("y",)), plan, 0)
    second.load(torch.load(file, weights_only=True))
    while (trial := second.advance()) is None:
        pass
    assert torch.equal(trial.trace, whole.trace)
    assert torch.equal(trial.leaves["x"], whole.leaves["x"])


def test_a_saved_state_does_not_change_when_the_descent_goes_on():
    descent = Descent(Bowl(), settled(optimizer="lbfgs"), 0)
    descent.advance()
    state = descent.state()
    before = copy.deepcopy(state)
    descent.advance()
    assert repr(state) == repr(before)


def test_the_best_of_several():
    def trial(loss):
        return Trial({}, loss, "max_steps", 1, "", torch.zeros(1, 1))

    assert best_of([trial(3.0), trial(1.0), trial(1.0), trial(math.inf)]) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_iters": 0}, "max_iters must be >= 1, got 0"),
        ({"lr": 0.0}, "lr must be > 0, got 0"),
        ({"optimizer": "sgd"}, "optimizer must be one of 'signed', 'adam', 'lbfgs', got 'sgd'"),
        ({"schedule": "cosine"}, "schedule must be one of"),
        ({"patience": 0}, "patience must be >= 1, got 0"),
        ({"stop_patience": 0}, "stop_patience must be >= 1, got 0. None never stops"),
        ({"tolerance": -1.0}, "tolerance must be >= 0, got -1"),
        ({"check_every": 0}, "check_every must be >= 1, got 0"),
        ({"max_iters": 2.5}, "max_iters must be an integer, got 2.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_plans_that_make_no_sense_are_refused(changed, message):
    with pytest.raises((TypeError, ValueError), match=message):
        settled(**changed)
