"""What cannot work is refused with the fix, and leaves nothing changed."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch

from pullback.core.checks import NonFiniteError
from pullback.methods.eqprop import EnergyFunction, EquilibriumProp, HopfieldConvNet, HopfieldMLP, relax


def data(n=12):
    g = torch.Generator().manual_seed(0)
    return torch.rand(n, 6, generator=g), torch.arange(n) % 3


def network(activation="hard_sigmoid", **more):
    torch.manual_seed(1)
    return HopfieldMLP([6, 8, 3], activation, **more)


# --- beta -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, -0.1, float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(
        ValueError, match=rf"beta must be > 0, got {beta}.*Two equal states have no difference"
    ):
        EquilibriumProp(network(), beta=beta)


@pytest.mark.parametrize("estimator", ["negative", "random_sign", "centered"])
def test_a_nudge_that_outweighs_the_energy_is_refused(estimator):
    with pytest.raises(ValueError, match=r"beta must be < 1 .* got 1: E - beta C has no minimum"):
        EquilibriumProp(network(), estimator=estimator, beta=1.0)
    with pytest.raises(ValueError, match="beta must be < 2"):
        EquilibriumProp(network("half_hard_sigmoid"), estimator=estimator, beta=2.0)
    x, y = data()
    ep = EquilibriumProp(network(), estimator=estimator, beta=1.0, minimizer="euler", unsettled="ignore")
    assert torch.isfinite(torch.tensor(ep.backward(x, y).cost))  # few clipped steps, as in the paper of 2017


def test_a_lost_branch_is_reported():
    net = HopfieldMLP([2, 6, 2], "tanh")
    torch.manual_seed(0)
    for p in net.parameters():
        p.data.normal_(0.0, 1.5)
    x, y = torch.rand(32, 2), torch.arange(32) % 2
    settings: dict[str, Any] = {"free_steps": 200, "nudge_steps": 100, "beta": 0.9}
    with pytest.warns(
        RuntimeWarning, match=r"do not follow one branch: asymmetry .* above 0.8. Lower beta from 0.9"
    ):
        out = EquilibriumProp(net, **settings).backward(x, y)
    assert out.asymmetry > 0.8
    settings["beta"] = 0.01
    small = EquilibriumProp(net, **settings).backward(x, y)
    assert small.asymmetry < 0.5


def test_beta_below_rounding_is_reported():
    with pytest.warns(RuntimeWarning, match=r"beta=1e-05 is lost in the rounding of float32"):
        EquilibriumProp(network(), beta=1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        EquilibriumProp(network().double(), beta=1e-5)


# --- phases that do not settle ----------------------------------------------------------------------------------


def swinging():
    """E = 3 s^2 - s x w: a step of 0.5 goes three times too far, and back."""
    return EnergyFunction(lambda p, x, s: 3 * s[0].pow(2).sum(1) - (s[0] * (x @ p["w"])).sum(1),
                          {"w": torch.ones(6, 3)}, [(3,)])  # fmt: skip


def test_an_energy_that_does_not_settle_is_reported_once():
    x, y = data()
    ep = EquilibriumProp(swinging(), step_size=0.5)
    with pytest.warns(
        RuntimeWarning, match=r"has not settled: residual .* Raise free_steps .* lower step_size"
    ):
        ep.backward(x, y)
    ep.backward(x, y)  # once is enough
    ep = EquilibriumProp(swinging(), step_size=0.1)
    assert ep.backward(x, y).residual_free < 1e-3


def test_an_energy_that_does_not_settle_can_be_refused():
    x, y = data()
    model = swinging()
    ep = EquilibriumProp(model, step_size=0.5, unsettled="raise")
    with pytest.raises(RuntimeError, match="the free phase has not settled"):
        ep.backward(x, y)
    assert all(p.grad is None for p in model.parameters())
    assert ep.steps == 0


def test_a_short_free_phase_drifts_and_the_centred_rule_cancels_it():
    """Not at the fixed point: one nudge measures the drift over beta, two opposite ones do not."""
    torch.manual_seed(2)
    net = HopfieldMLP([6, 12, 12, 3]).double()
    x, y = data()
    found = {}
    for estimator in ("positive", "centered"):
        ep = EquilibriumProp(net, beta=0.02, minimizer="euler", free_steps=12, nudge_steps=12)
        check = ep.check_gradient(x.double(), y, betas=(0.04, 0.02), estimators=[estimator], settled=False)
        found[estimator] = check[estimator].errors[-1]
    assert found["positive"] > 2.0 * found["centered"]


def test_a_check_of_what_never_settles_is_refused():
    x, y = data()
    with pytest.raises(ValueError, match="states must be stationary"):
        EquilibriumProp(swinging(), step_size=0.5).check_gradient(x, y)


def test_clamps_inside_an_energy_freeze_units_and_are_named():
    """The derivative of clamp is 0 at the bound: the docstring says so, and the residual shows a dead start."""
    frozen = EnergyFunction(
        lambda p, x, s: 0.5 * s[0].pow(2).sum(1) - (s[0].clamp(0, 1) * (x @ p["w"])).sum(1),
        {"w": torch.ones(6, 3)}, [(3,)], bounds=(0.0, 1.0),
    )  # fmt: skip
    x, _ = data()
    free = relax(frozen, x, steps=30)
    alive = relax(swinging(), x, steps=30, step_size=0.1)
    assert float(alive.states[0].abs().min()) > 0.1
    assert "clamps out of the energy" in (EnergyFunction.__doc__ or "")
    assert float(free.states[0].max()) <= 1.0


# --- NaN --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("where", ["x", "parameter"])
def test_nan_is_refused_and_changes_nothing(where):
    net, (x, y) = network(), data()
    ep = EquilibriumProp(net, persistent=True, unsettled="ignore")
    index = torch.arange(len(x))
    ep.backward(x, y, index=index)
    kept, grads = ep.state_dict(), [p.grad.clone() for p in net.parameters()]
    if where == "x":
        x = x.clone()
        x[3, 2] = float("nan")
    else:
        net.connections[1].bias.data[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"step 1: the gradient of 'connections.\d.\w+' holds NaN"):
        ep.backward(x, y, index=index)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), grads, strict=True))
    assert torch.equal(kept["states"]["rows"][0], ep.store.rows[0])
    assert ep.steps == 1


def test_skip_leaves_everything_as_it_was():
    net, (x, y) = network(), data()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    ep = EquilibriumProp(net, optimizer, nonfinite="skip", unsettled="ignore", estimator="random_sign")
    ep.step((x, y))
    before = ep.state_dict()
    bad = x.clone()
    bad[0] = float("inf")
    ep.step((bad, y))
    after = ep.state_dict()
    assert before["steps"] == after["steps"] == 1
    assert all(torch.equal(before["model"][k], after["model"][k]) for k in before["model"])
    assert torch.equal(
        before["optimizer"]["state"][0]["momentum_buffer"], after["optimizer"]["state"][0]["momentum_buffer"]
    )


def test_warn_goes_on():
    net, (x, y) = network(), data()
    x[0] = float("nan")
    with pytest.warns(RuntimeWarning, match="goes on because nonfinite='warn'"):
        EquilibriumProp(net, nonfinite="warn").backward(x, y)
    assert net.connections[0].weight.grad.isnan().any()


# --- arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"x": torch.zeros(0, 6)}, ValueError, r"x must hold one example or more.*Leave empty batches out"),
        ({"x": torch.zeros(12, 6, dtype=torch.int64)}, TypeError, "x must be a floating tensor"),
        ({"x": torch.zeros(12, 6, requires_grad=True)}, ValueError, "x must not require a gradient"),
        ({"y": torch.arange(12)}, ValueError, r"y must hold class numbers in \[0, 3\), got 0 to 11"),
        ({"y": torch.zeros(11, dtype=torch.int64)}, ValueError, "y must have 12 rows as x has, got 11"),
        ({"y": torch.zeros(12, 4)}, ValueError, r"y must be floating \[12, 3\] or int64 \[12\]"),
        ({"weight": float("nan")}, ValueError, "weight must be finite"),
    ],
)
def test_bad_batches_are_refused(change, error, text):
    x, y = data()
    with pytest.raises(error, match=text):
        EquilibriumProp(network()).backward(**{"x": x, "y": y, **change})


def test_inputs_of_another_size_are_refused():
    x, y = torch.rand(4, 7), torch.tensor([0, 1, 2, 0])
    net, images = network(), HopfieldConvNet((2, 8, 8), [3], outputs=3)
    for act in (lambda: EquilibriumProp(net).backward(x, y), lambda: net.predict(x), lambda: relax(net, x)):
        with pytest.raises(ValueError, match=r"x must have 6 values for each example, got 7"):
            act()
    for wrong in (torch.rand(4, 3, 8, 8), torch.rand(4, 128)):
        with pytest.raises(
            ValueError, match=r"x must be images \[batch, 2, height, width\], got examples of"
        ):
            EquilibriumProp(images).backward(wrong, y)
    with pytest.raises(ValueError, match="x must have 48 values for each example, got 75"):
        images.predict(torch.rand(4, 2, 10, 10))


def test_complex_nudges_need_a_holomorphic_energy():
    for net in (network(), HopfieldConvNet((1, 4, 4), [2], 3, activation="sigmoid")):
        with pytest.raises(ValueError, match="activation must be holomorphic"):
            EquilibriumProp(net, estimator="holomorphic")
    EquilibriumProp(network(), estimator="holomorphic", n_points=2)  # both points are real
    x, y = data()
    for energy in (
        lambda p, x, s: 0.5 * s[0].abs().pow(2).sum(1) - (s[0] * (x @ p["w"])).sum(1),
        lambda p, x, s: 0.5 * s[0].pow(2).sum(1) - (s[0].clamp(0, 1) * (x @ p["w"])).sum(1),
    ):
        model = EnergyFunction(energy, {"w": torch.ones(6, 3)}, [(3,)])
        with pytest.raises(ValueError, match="energy must be holomorphic"):
            EquilibriumProp(model, estimator="holomorphic").backward(x, y)
    smooth = network("tanh")
    with pytest.raises(ValueError, match="cost must be holomorphic"):
        EquilibriumProp(smooth, estimator="holomorphic", cost=lambda out, y: (out - 1).abs().sum(1)).backward(
            x, y
        )


def test_half_precision_is_refused():
    for dtype in (torch.bfloat16, torch.float16):
        with pytest.raises(TypeError, match=r"parameters must be float32 or float64, got torch.*float16"):
            EquilibriumProp(network().to(dtype))


def test_models_and_costs_that_do_not_fit_are_refused():
    x, y = data()
    with pytest.raises(TypeError, match="model must be of type EnergyModel, got Linear"):
        EquilibriumProp(torch.nn.Linear(2, 1))
    with pytest.raises(ValueError, match="must have a read-out"):
        EquilibriumProp(network(), cost="cross_entropy")
    with pytest.raises(ValueError, match="minimizer must be 'euler' where layers have no closed-form"):
        EquilibriumProp(swinging(), minimizer="async")
    with pytest.raises(ValueError, match="cost must return one number for each of 24 examples"):
        EquilibriumProp(network(), cost=lambda out, y: out.sum()).backward(x, y)
    with pytest.raises(ValueError, match="energy must return one number for each of 12 examples"):
        EquilibriumProp(
            EnergyFunction(lambda p, x, s: s[0].sum() * p["w"], {"w": torch.ones(())}, [(3,)])
        ).backward(x, y)
    with pytest.raises(ValueError, match="y must be given where beta is not 0"):
        relax(network(), x, beta=0.1)
    with pytest.raises(ValueError, match="kernel must be odd"):
        HopfieldConvNet((1, 4, 4), [2], kernel=2)
    with pytest.raises(ValueError, match="channels must fit the image"):
        HopfieldConvNet((1, 2, 2), [2, 2, 2])
    with pytest.raises(ValueError, match="outputs must be > 0 where there is no read-out"):
        HopfieldConvNet((1, 4, 4), [2], 0)
    with pytest.raises(ValueError, match="sizes must hold inputs and outputs"):
        HopfieldMLP([4])
