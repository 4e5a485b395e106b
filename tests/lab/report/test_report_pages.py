"""What the pages say, and that no stranger's text becomes markup."""

from __future__ import annotations

import dataclasses
import html
import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from matplotlib.figure import Figure
from synthetic_results import HOSTILE, MEANS, filled_with, light, several, synthetic

from pullback.lab.declare import Drawing, PairedSeeds
from pullback.lab.report import methods_table, pages, write_report
from pullback.lab.report.index import holm_words
from pullback.lab.report.model import section
from pullback.lab.report.text import file_stem


class Elements(HTMLParser):
    """Counts elements with their attribute names, and gathers the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags, self.outside, self.links, self.words, self.ids = Counter(), Counter(), [], [], Counter()
        self.drawing = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.outside[tag] += not self.drawing
        self.drawing = self.drawing or tag == "svg"
        self.links += [value for name, value in attrs if name in ("href", "src", "xlink:href", "action")]
        self.ids.update(value for name, value in attrs if name == "id")
        assert not [name for name, _ in attrs if name.startswith("on")]

    def handle_endtag(self, tag):
        self.drawing = self.drawing and tag != "svg"

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def read(folder, name):
    return (folder / name).read_text(encoding="utf-8")


def test_one_page_and_one_markdown_twin_per_room_and_trial(report_folder):
    names = sorted(p.name for p in report_folder.iterdir())
    stems = ["dann", "gradient_noise", "index", "my_rates", "weak_method"]
    assert names == sorted(f"{stem}.{end}" for stem in stems for end in ("html", "md"))


def test_a_study_page_tells_everything(report_folder):
    page = Elements(read(report_folder, "dann.html"))
    for words in ("supported", "36.00 percentage points", "95 % interval", "Refuted if", "52.2 %", "76.7 %", "10.0 ✕",
                  "diverged", "loss became NaN at step 120", "street view", "Adam instead of SGD", "shuffled", "lam",
                  "at an edge", "pullback study dann --size full", "c0ffee", "2.13.0", "inconclusive"):  # fmt: skip
        assert words in page.text
    assert page.tags["section"] >= 2  # one per study
    assert page.tags["script"] == 0
    assert "#study-digits8x8" in page.links


def test_every_seed_of_every_arm_is_in_the_table():
    result = synthetic()
    table = section(result).seeds
    assert len(table.rows) == 4
    assert all(len(row) == 3 + 8 for row in table.rows)
    dann = next(row for row in table.rows if row[0] == "dann")
    assert dann[3 + 5] == "10.0 ✕"
    assert dann[3] == f"{100 * result.scores('dann')[0]:.1f}"


def test_the_paper_and_the_run_stand_side_by_side_and_are_never_merged():
    table = section(synthetic(fail=None)).paper
    assert table is not None
    assert table.head == ("arm", "paper", "here")
    assert table.rows[1][1] == "76.7 %"
    assert table.rows[1][2] != "76.7 %"


def test_no_page_loads_anything(report_folder, hostile_folder):
    for folder in (report_folder, hostile_folder):
        for path in folder.glob("*.html"):
            text = path.read_text(encoding="utf-8")
            page = Elements(text)
            assert "default-src 'none'" in html.unescape(text)
            assert not page.tags["link"] + page.tags["iframe"] + page.tags["object"] + page.tags["base"]
            assert all(link.startswith(("#", "data:image/png")) or re.fullmatch(r"[a-z0-9_-]+\.(html|md)", link)
                       for link in page.links)  # fmt: skip
            assert [name for name, n in page.ids.items() if n > 1] == []
            assert not re.search(r"url\((?!#)", text.split("</style>", 1)[1])


def test_hostile_names_add_no_element(hostile_folder, tmp_path):
    write_report({None: [filled_with("plain")]}, tmp_path)
    expected = Elements(read(tmp_path, "plain.html"))
    drawn = {"svg", "g", "path", "use", "text", "clippath", "rect", "defs"}
    for text in HOSTILE:
        page = Elements(read(hostile_folder, f"{file_stem(text)}.html"))
        assert page.outside == expected.outside
        assert set(page.tags) - set(page.outside) <= drawn


def test_hostile_text_is_shown_not_obeyed(hostile_folder):
    raw = "".join(read(hostile_folder, path.name) for path in hostile_folder.glob("*.html"))
    assert "&lt;img src=x onerror=alert(1)&gt;" in raw
    assert "{{ 7 * 7 }}" in raw
    assert "\x1b" not in raw
    assert "\u202e" not in raw
    assert "A" * 5_000 not in raw
    assert "<svg onload" not in raw
    assert "<script>alert" not in raw


def test_a_verdict_that_does_not_survive_holm_is_marked(report_folder):
    mains = {room: trials[0] for room, trials in several().items() if room is not None}
    assert holm_words(mains) == {
        "dann": "supported",
        "gradient_noise": "refuted",
        "weak_method": "inconclusive",
    }
    row = read(report_folder, "index.html").split("weak_method.html", 1)[1].split("</tr>")[0]
    assert "inconclusive" in row


def test_rooms_without_evidence_are_listed(tmp_path):
    page = Elements(write_report({"dann": [light()]}, tmp_path).read_text(encoding="utf-8"))
    assert "gradient_noise" in page.text
    assert "not run yet" in page.text


def test_users_trials_have_their_own_section(report_folder):
    text = Elements(read(report_folder, "index.html")).text
    assert text.index("Your own trials") > text.index("gradient_noise")
    assert "my_rates" in text.split("Your own trials")[1]


def test_a_drawing_of_a_users_file_is_found_by_the_files_name(tmp_path):
    trial = light(None, "main")
    figures = {
        ("mine.py", "main"): (Drawing("good", lambda _: Figure(figsize=(2, 1)), caption="my picture"),)
    }
    write_report({None: [trial]}, tmp_path, figures=figures)
    assert "my picture" in read(tmp_path, "mine.html")
    assert "mine.py:main" in read(tmp_path, "index.html")


def test_a_drawing_of_a_users_file_outlives_a_report_without_the_file(tmp_path):
    trial = light(None, "main")
    drawn = (Drawing("good", lambda _: Figure(figsize=(2, 1)), caption="my picture"),)
    told = {**trial.declaration, "figures": [{"type": "Drawing", "name": "good", "caption": "my picture"}]}
    trial = dataclasses.replace(trial, declaration=told)
    write_report({None: [trial]}, tmp_path, figures={("mine.py", "main"): drawn})
    page = read(tmp_path, "mine.html")
    assert "could not be drawn" not in page
    write_report({None: [trial]}, tmp_path)
    assert read(tmp_path, "mine.html") == page
    write_report({None: [dataclasses.replace(trial, claim_hash="other")]}, tmp_path)
    assert "could not be drawn" in read(tmp_path, "mine.html")


def test_an_empty_report_says_how_to_start(tmp_path, monkeypatch):
    monkeypatch.setattr("pullback.lab.report.index._facts", dict)
    assert "Nothing has been run yet" in write_report({}, tmp_path).read_text(encoding="utf-8")


def test_the_same_results_give_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        write_report({"dann": [synthetic()]}, tmp_path / name)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_trial_named_like_a_room_gets_its_own_page(tmp_path):
    write_report({"dann": [light(fail=None)], None: [light(None, "dann", fail=None)]}, tmp_path)
    assert (tmp_path / "dann-2.html").is_file()


def test_a_drawing_that_fails_is_said_and_the_page_stands(tmp_path):
    def broken(_result):
        raise KeyError("<b>features</b>")

    def fine(_result):
        return Figure(figsize=(2, 1))

    figures = {("dann", "main"): (Drawing("<i>bad</i>", broken), Drawing("good", fine, caption="a picture"))}
    write_report({"dann": [light()]}, tmp_path, figures=figures)
    page = Elements(read(tmp_path, "dann.html"))
    assert "could not be drawn. KeyError" in page.text
    assert page.tags["i"] == page.tags["b"] == 0
    assert "a picture" in page.text


def test_a_result_without_comparisons_curves_or_tuning_is_drawn(tmp_path):
    whole = synthetic()
    arms = [dataclasses.replace(arm, tuning=[], at_edge=()) for arm in whole.arms]
    cells = [dataclasses.replace(cell, curves={}) for cell in whole.cells]
    bare = dataclasses.replace(whole, comparisons=[], arms=arms, cells=cells)
    write_report({"dann": [bare]}, tmp_path, figures={("dann", "main"): (PairedSeeds(),)})
    assert "not tuned" in Elements(read(tmp_path, "dann.html")).text


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    with pytest.raises(OSError, match=r"cannot write the report to .*file: .* Choose another folder"):
        write_report({"dann": [light(fail=None)]}, tmp_path / "file")


def test_old_pages_survive_a_failed_write(tmp_path, monkeypatch):
    index = write_report({"dann": [light(fail=None)]}, tmp_path)
    before = index.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left on device"):
        write_report({"dann": [light(means={**MEANS, "dann": 0.6})]}, tmp_path)
    assert index.read_bytes() == before
    assert not list(tmp_path.glob(".page-*"))


def test_markdown_says_the_same(report_folder, hostile_folder):
    text = read(report_folder, "dann.md")
    assert "● supported" in text
    assert "| dann | method |" in text
    assert "pullback study dann" in text
    for path in hostile_folder.glob("*.md"):
        prose = "\n".join(
            line for line in read(hostile_folder, path.name).splitlines() if not line.startswith("    ")
        )
        assert not re.search(r"(?<!\\)<(img|svg|script|b)", prose)
        assert not re.search(r"(?<!\\)\]\(http", prose)


def test_the_methods_table_comes_from_facts_and_evidence():
    table = methods_table({"dann": [synthetic()]})
    lines = table.strip().splitlines()
    assert lines[2].startswith("| `dann` | conflict |")
    assert "● supported" in lines[2]
    assert any("gradient_noise" in line and "not run yet" in line for line in lines)
    assert {line.count(" | ") for line in lines} == {5}


def test_an_unchanged_page_is_not_drawn_again(tmp_path, monkeypatch):
    def draw(results):
        drawn = []
        kept = pages.draw_all
        with monkeypatch.context() as patch:
            patch.setattr(pages, "draw_all", lambda *a: drawn.append(1) or kept(*a))
            write_report(results, tmp_path)
        return len(drawn)

    first, second = [light(fail=None)], [light(fail=None, name="other")]
    assert draw({"dann": first}) == 1
    whole = (tmp_path / "dann.html").read_bytes()
    assert draw({"dann": first}) == 0
    assert draw({"dann": second}) == 1
    assert draw({"dann": first}) == 1
    (tmp_path / "dann.html").write_bytes(whole.replace(b"supported", b"refuted"))
    assert draw({"dann": first}) == 1  # a page that someone edited is not trusted
    assert (tmp_path / "dann.html").read_bytes() == whole


def test_every_table_has_a_heading_per_column():
    told = section(synthetic())
    assert told.comparisons is not None
    for table in (told.paper, told.seeds, told.settings, told.comparisons):
        assert table is not None
        assert {len(row) for row in table.rows} == {len(table.head)}
        assert all(0 < column < len(table.head) for column in table.numeric)
    assert told.comparisons.rows[2][0] == "dann is no different from source only in source accuracy"
