"""The studies attack what they say: pairing, equal budgets, knowledge of arms, rivals, defences, drawings."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pullback.lab.figures import audit_pictures
from pullback.lab.models import inverted
from pullback.lab.models.victims import victim
from pullback.methods.dia import audit
from pullback.methods.dia import study as studies
from pullback.methods.dia.study import Config, Defended, run, run_defended, shared_gradient
from pullback.methods.dia.tests import cases

TINY = Config("mlp", 0.5, 30, width=16)


class Kept:
    def __init__(self):
        self.curves, self.arrays = {}, {}

    def value(self, name, value, step):
        self.curves.setdefault(name, []).append((step, value))

    def array(self, name, array):
        self.arrays[name] = array


def ran(cfg, arm, seed=100, lr=0.1):
    log = Kept()
    return run(cfg, arm, {"lr": lr}, seed, log), log


# --- the client ----------------------------------------------------------------------------------------------


def test_all_attackers_of_a_seed_see_one_gradient_of_one_set_of_masks():
    x, y = inverted.private_batch(100)
    before = torch.get_rng_state()
    (first, masks), (second, again) = (shared_gradient(victim("cnn", 0.25, 100), x, y, 100) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert list(masks) == ["2#0", "5#0", "8#0"]
    assert all(torch.equal(masks[name], again[name]) for name in masks)
    kept = torch.cat([mask.flatten() for mask in masks.values()]).mean()
    assert float(kept) == pytest.approx(0.75, abs=0.03)
    other = shared_gradient(victim("cnn", 0.25, 100), x, y, 101)[1]
    assert not torch.equal(masks["2#0"], other["2#0"])


def test_clients_drop_and_keep_the_statistics_of_batch_normalisation():
    x, y = inverted.private_batch(100)
    net = victim("resnet", 0.25, 100)
    before = {name: buffer.clone() for name, buffer in net.named_buffers()}
    gradients, masks = shared_gradient(net, x, y, 100)
    assert all(torch.equal(before[name], buffer) for name, buffer in net.named_buffers())
    assert len(masks) == 3
    plain, none = shared_gradient(victim("resnet", 0.0, 100), x, y, 100)
    assert none == {}
    assert not torch.allclose(gradients[0], plain[0])


# --- attacks -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arm", ["ig", "fresh", "dia", "wiig", "p0"])
def test_every_attack_spends_its_iterations_from_one_start(arm, monkeypatch):
    seen = []
    search = studies.DropoutInversion

    class Watched(search):
        def reconstruct(self, *args, **kwargs):
            found = super().reconstruct(*args, **kwargs)
            seen.append((self, found, kwargs["seed"]))
            return found

    monkeypatch.setattr(studies, "DropoutInversion", Watched)
    metrics, log = ran(TINY, arm)
    ((attack, found, seed),) = seen
    assert found.steps == 30
    assert len(found.trace["loss"]) == 30
    assert seed == 100
    assert (attack.plan.lr, attack.plan.patience, attack.plan.tolerance) == (0.1, 1, 0.0)
    assert {"dia": attack.masks == "search", "wiig": isinstance(attack.masks, dict)}.get(
        arm, attack.masks is None
    )
    drops = [m for m in attack.model.modules() if isinstance(m, nn.Dropout)]
    assert len(drops) == (0 if arm == "fresh" else 3)
    assert all(m.p == (0.0 if arm == "p0" else 0.5) for m in drops)
    assert len(log.curves["log10_mismatch"]) == 30
    assert metrics["log10_loss"] == pytest.approx(np.log10(found.loss))
    x, _ = inverted.private_batch(100)
    assert np.array_equal(log.arrays["original"], inverted.to_bytes(x).numpy())
    assert metrics["psnr"] == pytest.approx(inverted.decibels(found.images, x))
    assert metrics == ran(TINY, arm)[0]  # seeded, also where masks are drawn in every iteration


def test_who_is_told_the_masks_matches_better_and_who_guesses_none_knows_the_share():
    cfg = replace(TINY, iterations=150)
    told, blind = (ran(cfg, arm)[0] for arm in ("wiig", "ig"))
    assert told["log10_loss"] < blind["log10_loss"] - 1
    assert told["psnr"] > blind["psnr"] + 5
    assert told["mask_accuracy"] == 1.0
    assert blind["mask_accuracy"] == 0.5


def test_masks_are_found_in_a_perceptron_and_batches_come_back_in_order():
    metrics, log = ran(Config("mlp", 0.25, 200, batch=3, width=128), "dia")
    assert metrics["mask_accuracy"] > 0.97
    assert metrics["psnr"] > 25
    assert metrics["identified"] == 1.0
    assert log.arrays["image"].shape == (3, 28, 28)


def test_the_first_layer_of_a_perceptron_needs_no_search_and_others_none_of_it():
    metrics, _ = ran(TINY, "first-layer")
    assert metrics["psnr"] == inverted.EXACT
    assert metrics["log10_loss"] == 0.0
    blind = ran(TINY, "constant")[0]
    assert blind["psnr"] == inverted.decibels(
        *(f(inverted.private_batch(100)[0]) for f in (inverted.constant_images, lambda x: x))
    )
    assert ran(replace(TINY, architecture="cnn", width=4), "first-layer")[0]["psnr"] == blind["psnr"]
    assert ran(TINY, "nearest")[0]["psnr"] > blind["psnr"]


# --- defences ------------------------------------------------------------------------------------------------


def test_a_defence_is_scored_at_the_strongest_setting_that_keeps_the_accuracy(monkeypatch):
    scores = iter([0.8, 0.79, 0.77, 0.5])
    monkeypatch.setattr(studies, "federated_accuracy", lambda *args, **kwargs: next(scores))
    log = Kept()
    cfg = Defended({"noise": (0.001, 0.01, 10.0)}, 3, 1, 2)
    metrics = run_defended(cfg, "noise", {"lr": 0.1}, 100, log)
    table = log.arrays["trade"]
    assert table.shape == (4, 3)
    assert metrics["strength"] == 0.01
    assert metrics["accuracy"] == 0.77
    assert metrics["psnr"] == pytest.approx(table[2, 2], abs=1e-4)
    assert metrics["undefended_psnr"] == pytest.approx(table[0, 2], abs=1e-4)


def test_clipping_hides_nothing_and_each_defence_is_the_products_own(monkeypatch):
    monkeypatch.setattr(studies, "federated_accuracy", lambda *args, **kwargs: 0.8)
    cfg = Defended({"clip": (0.01,), "prune": (0.9,), "noise": (1.0,), "dropout": (0.5,)}, 12, 1, 2)
    rows = {}
    for arm in cfg.strengths:
        log = Kept()
        run_defended(cfg, arm, {"lr": 0.1}, 100, log)
        rows[arm] = log.arrays["trade"]
    assert all(np.array_equal(table[0], rows["clip"][0]) for table in rows.values())
    assert rows["clip"][1, 2] == pytest.approx(rows["clip"][0, 2], abs=0.5)  # the cosine does not see lengths
    assert all(rows[arm][1, 2] < rows[arm][0, 2] for arm in ("noise", "dropout"))
    names = {arm: type(studies.defence_of(arm, 0.5, 0)).__name__ for arm in cfg.strengths}
    assert names == {"clip": "Clip", "prune": "Prune", "noise": "GaussianNoise", "dropout": "Compose"}


# --- declarations and drawings -------------------------------------------------------------------------------


def test_arms_are_judged_by_what_an_attacker_sees_and_seeds_are_fresh():
    for study in studies.STUDIES:
        assert min(study.seeds.test) >= 200
        assert len(study.seeds.test) >= 5
        assert study.seeds.tune == (100,)
        if study.tune is not None:
            assert study.tune.select.name == "log10_loss"
            assert set(study.tune.only) == set()
            domain: Any = study.tune.shared["lr"]
            default: Any = study.hyperparameters("dia")["lr"]
            assert min(domain.values) < default < max(domain.values)


def test_drawings_show_what_ran():
    study = next(each for each in studies.STUDIES if each.name == "mlp")
    logs = {(arm, seed): ran(TINY, arm, seed) for arm in ("ig", "dia", "first-layer") for seed in (100, 101)}
    cells = [SimpleNamespace(arm=arm, seed=seed, arrays=log.arrays) for (arm, seed), (_, log) in logs.items()]
    result: Any = SimpleNamespace(
        cells=cells, scores=lambda arm, metric=None: {s: logs[arm, s][0]["psnr"] for s in (100, 101)}
    )
    axes = studies.draw_images(result).axes
    assert [ax.get_ylabel() for ax in axes[::2]] == ["original", "first-layer", "ig", "dia"]
    assert [figure.draw for figure in study.figures if hasattr(figure, "draw")] == [studies.draw_images]
    cells = [
        SimpleNamespace(arm="noise", seed=1, arrays={"trade": np.array([[0, 0.9, 30.0], [1, 0.8, 9.0]])})
    ]
    arms = [SimpleNamespace(name="noise", role="method")]
    traded: Any = SimpleNamespace(cells=cells, arms=arms)
    (ax,) = studies.draw_trade(traded).axes
    assert "PSNR" in ax.get_ylabel()


def test_an_audit_has_pictures_of_what_was_found_and_of_its_rivals():
    model = cases.perceptron(0.0, side=4)
    x, y = cases.picture(4, 2), torch.tensor([1, 3])
    report = audit(model, cases.LOSS, x, y, bounds=(0.0, 1.0), max_iters=3, reference=cases.picture(4, 5)[2:])
    figure = audit_pictures(report)
    assert len(figure.axes) == 2 * (1 + len(report.scores))
    shown = np.asarray(figure.axes[0].get_images()[0].get_array())
    low, high = float(x.min()), float(x.max())
    np.testing.assert_allclose(shown, (x[0, 0].double().numpy() - low) / (high - low), atol=1e-6)
    assert figure.axes[2].get_title(loc="left") == f"{float(report.scores[0].psnr[0]):.0f}"
    assert len(audit_pictures(report, limit=1).axes) == 1 + len(report.scores)
    flat = replace(report, truth=x.flatten(1))
    with pytest.raises(ValueError, match=r"report must be of images .* got inputs of shape \(2, 16\)"):
        audit_pictures(flat)
