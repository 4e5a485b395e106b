"""What the contracts need to know of this room's component."""

import math

import torch
from torch.nn import functional

from pullback.methods.dia import DropoutInversion
from pullback.methods.dia.tests.victims import LOSS, client, perceptron, picture
from pullback.testing import Case

_X, _Y = picture(4), torch.tensor([2])


def _attack(**changed):
    settings = {
        "bounds": (0.0, 1.0),
        "max_iters": 250,
        "schedule": "milestones",
        "tv": 0.0,
        "tolerance": 1e-9,
    }
    return DropoutInversion(perceptron(0.25, width=32), LOSS, **{**settings, **changed})


def _informed():
    """The attack that is told the masks finds the image to many digits."""
    _, masks = client(perceptron(0.25, width=32), _X, _Y)
    return _attack(masks=masks, matching="euclidean", optimizer="lbfgs", lr=1.0, bounds=None, max_iters=120)


def _run(attack, budget, seed):
    gradients, _ = client(attack.model, _X, _Y)
    if budget is not None:
        attack = _attack(max_iters=budget)
    return attack.reconstruct(gradients, labels=_Y, input_shape=_X.shape, seed=seed)


def _run_informed(attack, budget, seed):
    gradients, masks = client(attack.model, _X, _Y)
    if budget is not None:
        attack = _attack(masks=masks, max_iters=budget)
    return attack.reconstruct(gradients, labels=_Y, input_shape=_X.shape, seed=seed)


def _hopeless(attack):
    """The attacker's loss is not finite anywhere."""
    gradients, _ = client(attack.model, _X, _Y)
    lost = DropoutInversion(
        attack.model, lambda out, labels: functional.cross_entropy(out, labels) * math.nan, max_iters=30
    )
    return lost.reconstruct(gradients, labels=_Y, input_shape=_X.shape)


_BAD = (
    lambda: _attack(lr=0.0),
    lambda: _attack(tv=-1.0),
    lambda: _attack(mask_reg=-1e-4),
    lambda: _attack(mask_init="ones"),
    lambda: _attack(masks="truth"),
    lambda: _attack(bounds=(1.0, 0.0)),
    lambda: _attack(max_iters=0),
)
CASES = (
    Case(
        name="DropoutInversion",
        kind="search",
        build=lambda: _attack(max_iters=60),
        run=_run,
        hopeless=_hopeless,
        bad=_BAD,
    ),
    Case(
        name="DropoutInversion[informed]",
        kind="search",
        build=_informed,
        run=_run_informed,
        solution=_X,
        tolerance=1e-4,
        hopeless=_hopeless,
        bad=_BAD,
    ),
)
