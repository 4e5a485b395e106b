"""The components of the room, as their contract needs them."""

from __future__ import annotations

import math
from typing import Any

import torch

from pullback.methods.lanton import LANTON, LayerNoise
from pullback.testing import Case

_lanton: Any = LANTON  # with arguments of wrong types, which must be refused
_noise: Any = LayerNoise


def _weight():
    return [torch.nn.Parameter(torch.zeros(2, 2))]


def measured(component, model, batch):
    """Two gradients of the model on shifted batches, measured without a trace in the model."""
    names, params = zip(*((n, p) for n, p in model.named_parameters() if p.requires_grad), strict=True)
    with torch.enable_grad():
        for shift in (0.0, 0.5):
            out = model(*(x + shift for x in batch))
            grads = torch.autograd.grad(out.square().sum(), params)
            held = {name: torch.nn.Parameter(grad.clone()) for name, grad in zip(names, grads, strict=True)}
            for param, grad in zip(held.values(), grads, strict=True):
                param.grad = grad
            component.update_(held)
    return component.report()


CASES: tuple[Case, ...] = (
    Case(
        name="LANTON",
        kind="optimizer",
        build=lambda params: LANTON(params, lr=0.02, alpha=0.1),
        bad=(
            lambda: LANTON(_weight(), lr=-0.1),
            lambda: LANTON([]),
            lambda: LANTON(_weight(), betas=(1.0, 0.9)),
            lambda: LANTON(_weight(), betas=(0.9, 1.0)),
            lambda: LANTON(_weight(), betas=(0.9, -0.1)),
            lambda: _lanton(_weight(), betas=0.9),
            lambda: LANTON(_weight(), alpha=0.0),
            lambda: LANTON(_weight(), alpha=-1.0),
            lambda: LANTON(_weight(), alpha=math.nan),
            lambda: _lanton(_weight(), alpha="automatic"),
            lambda: _lanton(_weight(), geometry="nuclear"),
            lambda: _lanton(_weight(), difference="last"),
            lambda: LANTON(_weight(), noise_every=0),
            lambda: LANTON(_weight(), ns_steps=0),
            lambda: LANTON(_weight(), ns_dtype="float8"),
            lambda: _lanton(_weight(), adjust_lr_fn="spectral"),
            lambda: _lanton(_weight(), nonfinite="ignore"),
            lambda: LANTON(_weight(), capturable=True),
            lambda: LANTON(_weight(), differentiable=True),
            lambda: LANTON(_weight(), fused=True),
        ),
    ),
    Case(
        name="LANTON[every 2, Nesterov, auto]",
        kind="optimizer",
        build=lambda params: LANTON(params, lr=0.02, noise_every=2, nesterov=True, weight_decay=0.1),
    ),
    Case(
        name="LANTON[sign, no host read]",
        kind="optimizer",
        build=lambda params: LANTON(params, lr=0.02, alpha=0.1, geometry="sign", nonfinite=None),
    ),
    Case(
        name="LayerNoise",
        kind="probe",
        build=LayerNoise,
        run=measured,
        bad=(
            lambda: LayerNoise(beta=1.0),
            lambda: LayerNoise(every=0),
            lambda: _noise(difference="last"),
            lambda: _noise({"weight": "nuclear"}),
        ),
    ),
)
