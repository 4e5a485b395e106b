"""Figures: built-in ones from results, helpers for studies, and what may survive in their SVG."""

from __future__ import annotations

import re
import subprocess
import sys

import matplotlib as mpl
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from synthetic_results import HOSTILE, synthetic

from pullback.core.conflict_report import ConflictReport
from pullback.lab.figures import (
    INK,
    METHOD,
    NARROW,
    arm_colours,
    conflict_history,
    decision_regions,
    image_grid,
    panels,
    scatter_2d,
    style,
)
from pullback.lab.figures.builtin import curves, forest, overview, paired_seeds, tuning_scatter
from pullback.lab.figures.svg import FigureError, to_svg


def test_every_seed_of_every_arm_is_a_point_and_failures_are_crosses():
    result = synthetic()
    (ax,) = paired_seeds(result).axes
    points = [
        c for c in ax.collections if c.get_label() != "printed in the paper" and len(c.get_offsets()) > 1
    ]
    assert [len(c.get_offsets()) for c in points] == [8, 8, 7, 8]
    xs = sorted(np.asarray(points[0].get_offsets())[:, 0].tolist())
    assert xs == pytest.approx(sorted(result.scores("source only").values()))
    joined = [line for line in ax.lines if len(line.get_xdata()) == 4]
    assert len(joined) == 8  # one line per seed over four arms
    assert joined[0].get_xdata() == pytest.approx([result.scores(arm.name)[0] for arm in result.arms])


def test_the_papers_numbers_are_marks_of_their_own():
    (ax,) = paired_seeds(synthetic()).axes
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["printed in the paper"]
    assert paired_seeds(synthetic(None)).axes[0].get_legend() is None


def test_the_bold_curve_is_the_mean_over_seeds():
    result = synthetic(fail=None)
    figure = curves(result, "target_accuracy", arms=("dann",))
    assert figure is not None
    *thin, bold = figure.axes[0].lines
    assert len(thin) == 8
    each = [values for _, values in result.curve("dann", "target_accuracy").values()]
    assert bold.get_ydata() == pytest.approx(np.mean(each, axis=0))
    assert curves(result, "absent") is None


def test_the_forest_has_a_row_per_comparison_and_an_axis_per_metric():
    figure = forest(synthetic())
    assert figure is not None
    assert [len(ax.get_yticks()) for ax in figure.axes] == [2, 1]


def test_an_optimum_at_the_edge_is_said():
    figure = tuning_scatter(synthetic())
    assert figure is not None
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles.count("shuffled (at the edge)") == 1
    assert len(figure.axes) == 8


def test_the_overview_leaves_out_what_has_no_effect_size():
    result = synthetic()
    main = result.comparisons[0]
    assert overview([("a", main)]) is not None
    assert overview([]) is None


def test_the_method_wears_the_accent():
    colours = arm_colours(synthetic().arms)
    assert colours["dann"] == METHOD
    assert len(set(colours.values())) == 4


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_names_stay_text_in_an_svg(text):
    svg = to_svg(paired_seeds(synthetic(text=text), width=NARROW), prefix="x", label=text)
    assert not re.search(r"<(script|a|foreignObject|style|img|metadata|!)", svg)
    assert not re.search(r"\son\w+=", re.sub(r'aria-label="[^"]*"|>[^<]*<', "><", svg))
    assert svg.count("<svg") == svg.count("</svg>") == 1


def test_links_and_scripts_do_not_survive():
    figure = Figure(figsize=(2, 1))
    figure.text(0.1, 0.5, "linked", url="javascript:alert(1)")
    figure.add_axes((0, 0, 1, 1)).imshow(np.eye(3))
    svg = to_svg(figure, prefix="p", label="x")
    assert "javascript" not in svg
    assert "linked" in svg
    assert re.search(r'href="data:image/png;base64,[A-Za-z0-9+/=]+"', svg)
    assert all(name.startswith("p-") for name in re.findall(r'\bid="([^"]+)"', svg))


def test_an_svg_is_deterministic_and_undated():
    first, second = (to_svg(paired_seeds(synthetic()), prefix="p", label="x") for _ in range(2))
    assert first == second
    assert "date" not in first
    assert "var(--fig-method,#1d5fb4)" in first


@pytest.mark.parametrize(
    ("low", "high", "shown"),
    [(1e-7, 1e2, {"10⁻⁶", "0.01", "1"}), (0.12, 0.45, {"0.2", "0.3", "0.4"}), (1e5, 1e9, {"10⁶", "10⁸"})],
)
def test_powers_on_logarithmic_axes_are_plain_text(low, high, shown):
    figure, (left, right) = panels(2)
    left.plot([low, high], [low, high])
    left.set(xscale="log", yscale="log")
    right.plot([1, 64], [1, 2])
    right.set_xscale("log", base=2)
    svg = to_svg(figure, prefix="powers", label="powers")
    texts = set(re.findall(r"<(?:\w+:)?text[^>]*>([^<]*)<", svg))
    assert shown <= texts
    assert "2⁴" in texts
    assert "mathdefault" not in svg


def test_formatters_of_a_drawing_stay_and_other_text_is_left():
    figure, (ax,) = panels(1)
    ax.plot([1, 1000], [1, 2])
    ax.set(xscale="log", title=r"$\mathdefault{x}$")
    ax.xaxis.set_major_formatter(lambda value, _: f"<{value:g}>")
    svg = to_svg(figure, prefix="own", label="own")
    assert "&lt;100&gt;" in svg
    assert r"$\mathdefault{x}$" in svg


def test_a_drawing_must_be_a_figure():
    with pytest.raises(FigureError, match="must return a matplotlib Figure, got int"):
        to_svg(3, prefix="p", label="x")  # ty: ignore[invalid-argument-type]


def test_style_is_restored():
    before = dict(mpl.rcParams)
    with style():
        assert mpl.rcParams["text.parse_math"] is False
    assert dict(mpl.rcParams) == before


def test_drawing_needs_neither_pyplot_nor_a_display():
    code = (
        "import sys\nfrom pullback.lab.figures import panels\nfrom pullback.lab.figures.svg import to_svg\n"
        "to_svg(panels(2)[0], prefix='p', label='x')\nassert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run(
        [sys.executable, "-c", code], env={"PATH": "", "HOME": "/nonexistent"}, check=True, timeout=60
    )


def test_image_grids_take_grey_and_colour_and_refuse_the_rest():
    figure = image_grid(
        [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 3))], ["a"], columns=2, row_titles=["row"]
    )
    assert len(figure.axes) == 2
    with pytest.raises(ValueError, match=r"images must be \[height, width\].*got shape \[3, 5, 5\]"):
        image_grid([np.zeros((3, 5, 5))])
    with pytest.raises(ValueError, match="at least one image"):
        image_grid([])


def test_scatter_and_regions_draw_all_points_and_check_shapes():
    rng = np.random.default_rng(0)
    points, labels = rng.normal(size=(20, 2)), np.arange(20) % 3
    figure, (left, right) = panels(2)
    assert scatter_2d(points, labels, names={0: "zero"}, ax=left) is figure
    assert len(left.collections[0].get_offsets()) == 20
    decision_regions(lambda xy: (xy[:, 0] > 0).astype(int), points, labels, ax=right, resolution=5)
    grid = right.images[0].get_array()
    assert grid.shape == (5, 5)
    assert (grid[:, 0] == 0).all()
    assert (grid[:, -1] == 1).all()
    with pytest.raises(ValueError, match="one entry per point, got 3 for 20"):
        scatter_2d(points, labels[:3])
    with pytest.raises(ValueError, match=r"points must be \[n, 2\]"):
        scatter_2d(points[:, :1], labels)
    with pytest.raises(ValueError, match=r"must be \[height, width\], got shape \[2\]"):
        decision_regions(np.zeros(2), points, labels)


def test_panels_checks_its_counts():
    with pytest.raises(ValueError, match="count must be >= 1, got 0"):
        panels(0)
    with pytest.raises(ValueError, match="columns must be >= 1, got 0"):
        panels(2, columns=0)


def conflicts(cosines, *, tasks=("depth", "seg"), groups=("stem", "head", "(all)"), norms=(4.0, 1.0)):
    """One report per cosine; the second group never has a gradient of the second task."""
    a, b = norms
    reports = []
    for number, cosine in enumerate(cosines):
        stem = torch.tensor([[a * a, cosine * a * b], [cosine * a * b, b * b]], dtype=torch.float64)
        head = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
        gram = torch.stack([stem, head, stem + head])
        reports.append(ConflictReport(20 * number, tasks, groups, gram, torch.ones(2), 1))
    return reports


def test_conflicts_are_drawn_as_cosines_rates_and_ratios():
    cosines = [0.5, -0.25, float("nan"), -1.0]
    figure = conflict_history(conflicts(cosines))
    assert figure is not None
    curves, bars, ratios = figure.axes
    stem, everything = (line for line in curves.lines if not line.get_label().startswith("_"))
    assert stem.get_xdata().tolist() == [0, 20, 40, 60]
    assert stem.get_ydata() == pytest.approx(cosines, nan_ok=True)
    assert (everything.get_label(), everything.get_color()) == ("(all)", INK)
    assert [bar.get_width() for bar in bars.patches] == pytest.approx([2 / 3, 2 / 3])
    assert [text.get_text() for text in bars.texts] == ["2/3", "2/3"]
    assert [label.get_text() for label in bars.get_yticklabels()] == [
        "stem",
        "(all)",
    ]  # head was never compared
    assert ratios.get_yscale() == "log"
    assert ratios.lines[1].get_ydata()[:2] == pytest.approx([4.0, 4.0])
    assert conflict_history(conflicts(cosines, norms=(1.1, 1.0))).axes[2].get_yscale() == "linear"


def test_conflicts_choose_pairs_and_draw_nothing_out_of_nothing():
    reports = conflicts([0.5, -0.5])
    assert len(conflict_history(reports, pairs=[("depth", "seg")], width=NARROW).axes) == 3
    assert conflict_history([]) is None
    assert conflict_history(conflicts([float("nan")])) is None
    with pytest.raises(ValueError, match=r"pairs must be among .*, got \('seg', 'depth'\)"):
        conflict_history(reports, pairs=[("seg", "depth")])


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_tasks_and_groups_stay_text(text):
    groups = (text, "head", "(all)")
    figure = conflict_history(conflicts([0.5], tasks=(text, "seg"), groups=groups), width=NARROW)
    svg = to_svg(figure, prefix="x", label=text)
    assert not re.search(r"<(script|a|foreignObject|style|img|metadata|!)", svg)
    assert svg.count("<svg") == svg.count("</svg>") == 1
