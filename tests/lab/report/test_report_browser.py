"""The pages in a real browser: nothing runs or loads that should not, everything fits and can be read."""

from __future__ import annotations

import itertools
import re
import shutil

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")

CHROMIUM = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
             "--disable-sync", "--no-first-run"]  # fmt: skip

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium found: install the system package chromium"),
]

CONTRAST = """() => {
  const channel = v => { v /= 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; };
  const light = c => 0.2126 * channel(c[0]) + 0.7152 * channel(c[1]) + 0.0722 * channel(c[2]);
  const parse = s => (s.match(/[\\d.]+/g) || []).map(Number);
  const ground = e => {
    for (; e; e = e.parentElement) {
      const c = parse(getComputedStyle(e).backgroundColor);
      if (c.length === 3 || (c.length === 4 && c[3] > 0)) return c;
    }
    return [255, 255, 255];
  };
  const bad = [];
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || ["STYLE", "SCRIPT"].includes(e.tagName)) continue;
    const style = getComputedStyle(e);
    const ink = parse(e.tagName === "text" || e.tagName === "tspan" ? style.fill : style.color);
    const [a, b] = [light(ink), light(ground(e))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) bad.push([e.tagName, e.textContent.trim().slice(0, 30), ratio.toFixed(2)]);
  }
  return bad;
}"""


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


@pytest.fixture
def visit(browser):
    """Open a page and watch it; at the end nothing may have been asked for or popped up."""
    contexts, seen = [], []

    def open_page(path, *, width=1280, scheme="light", **more):
        context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme, **more)
        contexts.append(context)
        page = context.new_page()
        page.on("dialog", lambda dialog: (seen.append(f"dialog {dialog.message}"), dialog.dismiss()))
        page.on("request", lambda r: seen.append(r.url) if not r.url.startswith(("file:", "data:")) else None)
        page.on("pageerror", lambda error: seen.append(str(error)))
        page.on("console", lambda m: seen.append(m.text) if m.type in ("error", "warning") else None)
        page.goto(path.as_uri())
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert seen == []


def test_hostile_pages_show_text_and_run_nothing(hostile_folder, visit):
    page = visit(hostile_folder / "index.html", width=390)
    for path in sorted(hostile_folder.glob("*.html")):
        page.goto(path.as_uri())
        assert page.evaluate("document.querySelectorAll('img, b, script:not(:last-child)').length") == 0
        assert page.evaluate("document.documentElement.scrollWidth") <= 390


@pytest.mark.parametrize("width", [390, 768, 1280])
def test_no_page_scrolls_sideways(report_folder, visit, width):
    for name in ("index.html", "dann.html"):
        page = visit(report_folder / name, width=width)
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_enough_contrast(report_folder, visit, scheme):
    for name in ("index.html", "dann.html"):
        assert visit(report_folder / name, scheme=scheme).evaluate(CONTRAST) == []


def test_dark_and_light_differ_in_figures_too(report_folder, visit):
    colours = []
    for scheme in ("light", "dark"):
        page = visit(report_folder / "dann.html", scheme=scheme)
        texts = page.eval_on_selector_all(
            "figure .wide svg text", "all => all.map(e => getComputedStyle(e).fill)"
        )
        colours.append((page.evaluate("getComputedStyle(document.body).backgroundColor"), texts[0]))
    assert len(set(itertools.chain(*colours))) == 4


def test_a_phone_gets_narrow_figures_that_can_be_read(report_folder, visit):
    page = visit(report_folder / "dann.html", width=390)
    shown = page.eval_on_selector_all(
        "figure svg", "all => all.filter(e => e.checkVisibility()).map(e => e.getBoundingClientRect().width)"
    )
    assert shown
    assert all(width <= 360 for width in shown)
    sizes = page.eval_on_selector_all(
        "figure.both .narrow svg text", "all => all.map(e => e.getBoundingClientRect().height)"
    )
    assert min(sizes) >= 10


def test_search_and_filters_work(report_folder, visit):
    page = visit(report_folder / "index.html")

    def rows():
        return page.eval_on_selector_all(
            "#methods tbody tr",
            "all => all.filter(e => !e.hidden).map(e => e.querySelector('a').textContent)",
        )

    assert rows() == ["dann", "gradient_noise", "weak_method"]
    page.fill("#search", "NOISE gradient")
    assert rows() == ["gradient_noise"]
    assert page.inner_text("#count") == "1 of 3 methods"
    page.fill("#search", "")
    page.select_option("#verdict", "supported")
    assert rows() == ["dann", "weak_method"]
    page.select_option("#capability", "conflict")
    assert rows() == ["dann"]
    page.fill("#search", "zzz")
    assert rows() == []
    assert page.is_visible("#none")


def test_the_index_is_whole_without_javascript(report_folder, visit):
    page = visit(report_folder / "index.html", java_script_enabled=False)
    assert not page.is_visible("#search")
    assert page.locator("#methods tbody tr").count() == 3
    page.click("#methods a >> text=gradient_noise")
    assert page.url.endswith("/gradient_noise.html")


def test_the_keyboard_reaches_everything_in_order(report_folder, visit):
    page = visit(report_folder / "index.html")
    stops = []
    for _ in range(7):
        page.keyboard.press("Tab")
        stops.append(page.evaluate("document.activeElement.id || document.activeElement.textContent"))
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    assert stops == [
        "Skip to the content",
        "search",
        "capability",
        "verdict",
        "dann",
        "gradient_noise",
        "weak_method",
    ]


def test_pictures_have_a_name_and_headings_do_not_skip_a_level(report_folder, visit):
    page = visit(report_folder / "dann.html")
    names = page.eval_on_selector_all(
        "svg", "all => all.map(e => [e.getAttribute('role'), e.getAttribute('aria-label')])"
    )
    assert all(role == "img" and re.search(r"\w{4}", label) for role, label in names)
    levels = page.eval_on_selector_all("h1, h2, h3, h4", "all => all.map(e => Number(e.tagName[1]))")
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_a_page_prints(report_folder, visit):
    page = visit(report_folder / "dann.html")
    page.emulate_media(media="print")
    assert page.evaluate("document.querySelector('nav').checkVisibility()") is False
    assert page.evaluate("document.documentElement.scrollWidth") <= 1280
