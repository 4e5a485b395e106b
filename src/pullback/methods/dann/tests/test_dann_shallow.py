"""Algorithm 1: one update against hand derivatives, the special cases, and scikit-learn's own contract."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.utils.estimator_checks import parametrize_with_checks

from pullback.methods.dann import ShallowDANN
from pullback.methods.dann.shallow import _with_one
from pullback.methods.dann.tests import reference


def update(model, x, y, xt):
    model._update(_with_one(x), np.eye(3)[y], _with_one(xt))


def started(seed=0, **kw):
    rng = np.random.default_rng(seed)
    x, y, xt = rng.normal(size=(6, 4)), np.array([0, 1, 2, 0, 1, 2]), rng.normal(size=(5, 4))
    model = ShallowDANN(hidden=3, **kw).fit(x, y, xt)
    model._set([rng.normal(size=w.shape) for w in model._weights()])
    return model, x, y, xt


@pytest.mark.parametrize("adversarial", [True, False])
@pytest.mark.parametrize("lam", [0.5, 6.0])
def test_one_update_is_algorithm_1(lam, adversarial):
    model, x, y, xt = started(lam=lam, lr=0.1, epochs=1, adversarial=adversarial)
    want = reference.algorithm_1(model._weights(), x[0], y[0], xt[0], lam, 0.1, adversarial)
    update(model, x[:1], y[:1], xt[:1])
    for got, expected in zip(model._weights(), want, strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-12, atol=1e-14)


def test_a_batch_is_the_mean_of_single_updates():
    model, x, y, xt = started(lam=0.7, lr=0.1, epochs=1)
    before = [w.copy() for w in model._weights()]
    singles = [reference.algorithm_1(before, x[i], y[i], xt[i], 0.7, 0.1) for i in range(4)]
    update(model, x[:4], y[:4], xt[:4])
    for k, got in enumerate(model._weights()):
        np.testing.assert_allclose(got, np.mean([s[k] for s in singles], axis=0), rtol=1e-10, atol=1e-13)


def test_zero_strength_is_no_adaptation_and_leaves_the_domain_head():
    rng = np.random.default_rng(1)
    x, y, xt = rng.normal(size=(30, 2)), rng.integers(0, 2, 30), rng.normal(size=(9, 2))
    zero = ShallowDANN(lam=0.0, epochs=3).fit(x, y, xt)
    watching = ShallowDANN(lam=1.0, epochs=3, adversarial=False).fit(x, y, xt)
    assert not zero.domain_weight_.any()
    assert watching.domain_weight_.any()
    # sums run over more rows: equal up to rounding
    np.testing.assert_allclose(zero.hidden_weight_, watching.hidden_weight_, rtol=0, atol=1e-12)


def test_start_and_validation():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(80, 2))
    y = np.where(x[:, 0] > 0, "right", "left")
    model = ShallowDANN(hidden=4, lr=0.5, epochs=30).fit(x, y, x, X_valid=x, y_valid=y)
    assert model.score(x, y) > 0.9
    assert set(model.predict(x)) == {"left", "right"}
    again = ShallowDANN(hidden=4, lr=1e-9, epochs=1).fit(x, y, x, start=model)
    np.testing.assert_allclose(again.hidden_weight_, model.hidden_weight_, atol=1e-6)
    with pytest.raises(ValueError, match="start must have the same sizes"):
        ShallowDANN(hidden=5).fit(x, y, x, start=model)
    with pytest.raises(ValueError, match="X_valid and y_valid must be given together"):
        ShallowDANN().fit(x, y, x, X_valid=x)
    assert model.predict_source(x).min() > 0
    assert model.features(x).shape == (80, 4)


@pytest.mark.parametrize("bad", [{"lam": -1.0}, {"lr": 0.0}, {"hidden": 0}, {"epochs": 0}, {"batch_size": 0}])
def test_bad_hyperparameters_are_named(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"{name} must be"):
        ShallowDANN(**bad).fit(np.eye(2), [0, 1])


@pytest.mark.filterwarnings("ignore")
@parametrize_with_checks([ShallowDANN(hidden=10, lr=0.1, epochs=60, batch_size=4)])
def test_scikit_learn_contract(estimator, check):
    check(estimator)
