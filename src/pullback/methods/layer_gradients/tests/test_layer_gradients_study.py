"""The study's numbers from gradients of an ordinary backward pass, and its drawings."""

import math

import numpy as np
import pytest
import torch

from pullback.lab.engine.worker import CellLog
from pullback.lab.models.adder import School
from pullback.lab.result import ArmResult, CellResult, TrialResult, Verdict
from pullback.methods.layer_gradients import study
from pullback.methods.layer_gradients.study import Real, Small

TINY = Small(School(steps=2, layers=3, width=16, heads=2, rows=2, texts=1, window=16, held=12), problems=5)
REAL = Real(tiny=True)


def by_hand(asked, response):
    """Loss and nuclear norms of q, k, v, o, one response at a time, without padding, with autograd and svdvals."""
    weights = {
        name: p
        for name, p in asked.model.named_parameters()
        if name.split(".")[-2] in {"q", "k", "v", "o", "q_proj", "k_proj", "v_proj", "o_proj"}
    }
    for p in weights.values():
        p.requires_grad_(True)
    try:
        logits = asked.logits(response.tokens[None])[0, :-1]
        logs = logits.log_softmax(-1).gather(1, response.tokens[1:, None])[:, 0]
        loss = -logs[response.scored[1:]].mean()
        grads = torch.autograd.grad(loss, list(weights.values()))
    finally:
        for p in weights.values():
            p.requires_grad_(False)
    norms = {name: [] for name in "qkvo"}
    for name, grad in zip(weights, grads, strict=True):
        norms[name.split(".")[-2][0]].append(float(torch.linalg.svdvals(grad).sum()))
    return float(loss.detach()), norms


@pytest.mark.parametrize("cfg", [TINY, REAL], ids=["small", "language"])
@pytest.mark.parametrize("kind", ["none", "few", "detailed/shuffled", "padded/text"])
def test_records_are_those_of_single_responses(cfg, kind):
    asked = study.answers(cfg, 100)
    records = study.seen(cfg, 100, kind)
    assert len(records) == len(asked.kinds[kind])
    for record, response in zip(records, asked.kinds[kind], strict=True):
        loss, norms = by_hand(asked, response)
        assert record.loss == pytest.approx(loss, rel=1e-4)
        for name, row in record.values["nuclear"].items():
            np.testing.assert_allclose(row, norms[name[0]], rtol=2e-3, atol=1e-6)


def test_metrics_are_the_logarithms_of_the_curves():
    log = CellLog()
    found = study.measure(TINY, "none", {}, 100, log)
    records, plain = study.seen(TINY, 100, "none"), study.seen(TINY, 100, "none/text")

    def curve(rows, p):
        return np.mean([r.values["nuclear"][p] for r in rows], axis=0)

    lines = {p: curve(records, p) for p in "qkvo"}
    for p, line in lines.items():
        assert log.curves[f"nuclear_{p}"] == ([0, 1, 2], pytest.approx(line.tolist()))
        assert found[f"log_nuclear_{p}"] == pytest.approx(math.log10(line.mean()))
        assert found[f"log_mad_{p}"] == pytest.approx(math.log10(np.abs(np.diff(line)).mean()))
    size = np.mean([math.log10(line.mean()) for line in lines.values()])
    text = np.mean([math.log10(curve(plain, p).mean()) for p in "qkvo"])
    mad = np.mean([math.log10(np.abs(np.diff(line)).mean()) for line in lines.values()])
    assert found["log_nuclear"] == pytest.approx(size)
    assert found["log_over_text"] == pytest.approx(size - text)
    assert found["log_unevenness"] == pytest.approx(mad - size)
    relative = [np.mean([np.mean(r.values["nuclear"][p]) / r.loss for r in records]) for p in "qkvo"]
    assert found["log_per_loss"] == pytest.approx(np.mean(np.log10(relative)))


def test_text_arms_are_their_own_text():
    for arm in ("text-short", "text-long"):
        assert study.measure(TINY, arm, {}, 100, CellLog())["log_over_text"] == 0.0


def test_auc_counts_pairs_and_ties():
    right, wrong = np.array([1.0, 2.0, 3.0]), np.array([2.5, 2.0, 0.5])
    table = study.larger(right, wrong)
    assert table.tolist() == [[1, 1, 0], [1, 0.5, 0], [0, 0, 0]]
    low, high = study.bootstrap(table, 0)
    assert 0 <= low <= table.mean() <= high <= 1
    assert study.bootstrap(np.ones((6, 6)), 0) == (1.0, 1.0)


def test_scores_of_arms_are_norms_or_losses():
    records = study.seen(TINY, 100, "detailed")
    norms = [np.mean([np.mean(row) for row in r.values["nuclear"].values()]) for r in records]
    np.testing.assert_allclose(study.scores(records, loss=False), norms)
    np.testing.assert_allclose(study.scores(records, loss=True), [r.loss for r in records])
    hp = {"auc": 0.8, "accuracy": 0.8}
    assert study.discriminate(TINY, "bar", hp, 100, CellLog()) == {**hp, "log_gap": 0.0}
    found = study.discriminate(TINY, "none-loss", {}, 100, CellLog())
    table = study.larger(
        *(study.scores(study.seen(TINY, 100, kind), loss=True) for kind in ("none", "none/shuffled"))
    )
    assert found["auc"] == pytest.approx(table.mean())
    assert found["paired"] == pytest.approx(table.diagonal().mean())


def test_the_drawings_show_every_arm_and_projection():
    for declared, cfg in ((study.STUDIES[0], TINY), (study.STUDIES[1], TINY)):
        cells = []
        for arm in declared.arms.names():
            for seed in (100, 101):
                log = CellLog()
                metrics = declared.run(cfg, arm, declared.hyperparameters(arm), seed, log)
                cells.append(
                    CellResult(arm, seed, {}, "done", metrics, 0.1, f"{arm}{seed}", curves=log.curves)
                )
        result = TrialResult(
            "layer_gradients", declared.name, "t", "full", "", "",
            {"primary": {"name": declared.primary.name}, "metrics": {}},
            [ArmResult(arm, declared.arms.role(arm), {}) for arm in declared.arms.names()],
            cells, [], Verdict("not tested", ""), {},
        )  # fmt: skip
        for figure in declared.figures:
            if hasattr(figure, "draw"):
                drawn = figure.draw(result)  # ty: ignore[not-callable]
                drawn.canvas.draw()
                text = " ".join(t.get_text() for t in drawn.findobj(lambda a: hasattr(a, "get_text")))
                shown = {"layers": study.FORMATS, "auc": declared.arms.names()}.get(figure.name)  # ty: ignore[missing-union-attribute]
                for word in shown or [arm for arm in declared.arms.names() if arm != "detailed"]:
                    assert word in text
                if figure.name == "layers":  # ty: ignore[missing-union-attribute]
                    lines = [len(ax.lines) for ax in drawn.axes]
                    assert lines == [12, 12, 12]  # four projections: a mean and two seeds each
