"""Draw the picture of the README from the committed evidence: python docs/picture.py."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from pullback.lab.evidence import read_evidence
from pullback.lab.figures import arm_colours
from pullback.lab.figures.style import style
from pullback.lab.result import TrialResult

ROOT = Path(__file__).resolve().parents[1]
EVIDENCE = ROOT / "evidence" / "dann.json"
PICTURE = ROOT / "docs" / "assets" / "dann.svg"
NAMES = {
    "source": "source only",
    "lam0": "no reversal",
    "dann": "reversed gradient",
    "target": "with target labels",
}


def draw(result: TrialResult) -> Figure:
    """Digits of both domains on the left, accuracy of every seed on the right."""
    figure = Figure(figsize=(9.6, 3.4), layout="constrained", facecolor="white")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.5))
    rows = [result.array("source", f"{name}_digits") for name in ("source", "test")]
    left.imshow(np.concatenate([_block(row) for row in rows if row is not None]), interpolation="nearest")
    left.set_title("labelled digits above, no labels below", fontsize=9)
    left.set_axis_off()
    colours = arm_colours(result.arms)
    seeds = sorted(result.scores(result.arms[0].name))
    scores = {arm.name: result.scores(arm.name) for arm in result.arms}
    for seed in seeds:
        right.plot([100 * scores[a.name][seed] for a in result.arms], color="0.85", linewidth=0.8, zorder=1)
    for place, arm in enumerate(result.arms):
        values = [100 * scores[arm.name][seed] for seed in seeds]
        right.scatter([place] * len(values), values, color=colours[arm.name], s=22, zorder=2)
        right.annotate(
            f"{np.mean(values):.0f} %",
            (place, np.mean(values)),
            (10, -3),
            textcoords="offset points",
            fontsize=9,
        )
    right.set_xticks(range(len(result.arms)), [NAMES.get(arm.name, arm.name) for arm in result.arms])
    right.set(
        ylabel="accuracy on digits without labels, %", ylim=(0, 100), xlim=(-0.4, len(result.arms) - 0.4)
    )
    right.spines[["top", "right"]].set_visible(False)
    right.set_title(f"{len(seeds)} paired seeds, every one shown", fontsize=9)
    return figure


def _block(images: np.ndarray) -> np.ndarray:
    """Ten images [10, h, w, 3] as two rows of five."""
    return np.concatenate([np.concatenate(list(images[i : i + 5]), axis=1) for i in (0, 5)])


def source() -> str:
    """What the picture was drawn from; it stands in the picture, so that a stale one is noticed."""
    return f"evidence/dann.json, SHA-256 {hashlib.sha256(EVIDENCE.read_bytes()).hexdigest()}"


if __name__ == "__main__":
    with style():
        drawn = draw(read_evidence(EVIDENCE.parent)["dann"][0])
        PICTURE.parent.mkdir(exist_ok=True)
        drawn.savefig(PICTURE, metadata={"Date": None, "Source": source()})
