"""The page in a browser: no error, hostile texts as texts, filters, keys, colors, widths from a telephone to a desk."""

from __future__ import annotations

import os
import shutil

import pytest

from steepest.report import write_report
from steepest.report.compare import write_comparison
from tests.support.report_run import CONFIG, HOSTILE, make_run

BROWSER = os.environ.get("STEEPEST_BROWSER") or shutil.which("chromium") or shutil.which("google-chrome")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(BROWSER is None, reason="no chromium on the PATH; STEEPEST_BROWSER may name one"),
]
playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")

FOCUS = """() => {
  const e = document.activeElement;
  const shown = e.type === "radio" ? e.nextSibling : e;
  return [e.id || e.name || e.className || e.tagName, getComputedStyle(shown).outlineStyle];
}"""
"""The element with the focus, and the style of the line around it."""
CONTRASTS = """() => {
  const numbers = (text) => (text.match(/[\\d.]+/g) ?? []).map(Number);
  const over = (top, below) => below.map((value, i) => top[i] * top[3] + value * (1 - top[3]));
  const linear = (v) => (v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
  const light = (rgb) => rgb.reduce((sum, v, i) => sum + linear(v / 255) * [.2126, .7152, .0722][i], 0);
  const ratio = (a, b) => (Math.max(light(a), light(b)) + .05) / (Math.min(light(a), light(b)) + .05);
  const fill = (e) => [...numbers(getComputedStyle(e).backgroundColor), 1].slice(0, 4);
  const behind = (e) => (e === null ? [255, 255, 255] : over(fill(e), behind(e.parentElement)));
  const texts = [...document.querySelectorAll("main *, header *")]
    .filter((e) => [...e.childNodes].some((node) => node.nodeType === 3 && node.data.trim()) && e.checkVisibility());
  return texts.map((e) => [e.className || e.id || e.tagName, ratio(numbers(getComputedStyle(e).color), behind(e))]);
}"""
"""Each element with a text of its own, and the contrast of the text against what lies behind it."""
WIDTHS = (1280, 390)
SCHEMES = ("light", "dark")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield made
        made.close()


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    return write_report(make_run(tmp_path_factory.mktemp("runs") / "run")).as_uri()


@pytest.fixture(scope="module")
def comparison(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    short = make_run(folder / "short", steps=6, config=CONFIG.replace("32", "64"))
    return write_comparison([make_run(folder / "long"), short], folder / "both.html").as_uri()


@pytest.fixture
def open_page(browser, address):
    """Opens a page; the test fails if it said anything on the console or asked for anything but itself."""
    said: list[str] = []
    asked: list[str] = []
    contexts, opened = [], set()

    def call(width: int = 1280, scheme: str = "light", page_address: str = address, wait_for: str = ".chart"):
        opened.add(page_address)
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(page_address)
        page.wait_for_selector(wait_for)
        return page

    yield call
    for context in contexts:
        context.close()
    assert said == [] and {url for url in asked if not url.startswith("data:")} == opened


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_it_fits_and_says_nothing_on_the_console(open_page, width, scheme):
    page = open_page(width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    assert page.locator("#charts figure").count() == 5  # validation, score, entropy, length, gradient norm
    assert page.locator("#time-charts figure").count() == 1
    drawn = page.evaluate("[...document.querySelectorAll('.chart canvas')].map(c => new Set(c.getContext('2d')"
                          ".getImageData(0, 0, c.width, c.height).data).size)")  # fmt: skip
    assert len(drawn) == 6 and min(drawn) > 5  # lines and letters, not one color


@pytest.mark.parametrize("rows", ["", '{"step": 0, "time": 9.0, "val/accuracy": 0.25}\n'])
def test_a_run_before_its_first_step(open_page, tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text(rows)
    page = open_page(page_address=write_report(tmp_path).as_uri(), wait_for="#keys p")
    assert page.locator("#charts figure").count() == bool(rows)
    assert page.locator("#samples-note").inner_text().startswith("This run has kept no training samples")
    assert page.locator("#tiles b").all_inner_texts() == ["0.25", "no problem"][not rows :]


def test_hostile_texts_are_shown_and_run_nothing(open_page):
    page = open_page()
    assert page.locator("#samples script, #samples img, #samples b, #samples i").count() == 0
    page.evaluate("for (const button of document.querySelectorAll('#list button')) button.click()")
    shown = set()
    for place in range(page.locator("#list button").count()):
        page.locator("#list button").nth(place).click()
        shown |= set(page.locator(".tokens bdi[data-at='3']").all_inner_texts())
    assert {HOSTILE[0], HOSTILE[1], HOSTILE[2], HOSTILE[5]} <= shown
    assert "U+202EoverrideU+202C U+200FU+FEFF" in shown
    assert "U+D83D half of a character, NUL U+0000, escape U+001B[31m" in shown
    assert page.title() == "run: report of a run"
    assert page.locator(".card .parts").nth(3).inner_text() == "score \u2013 · 5 tokens · <b>boom</b>"
    directions = page.evaluate(
        "[...document.querySelectorAll('.tokens bdi')].map(e => getComputedStyle(e).unicodeBidi)"
    )
    assert set(directions) == {"isolate"}


def fits(page) -> tuple[int, int]:
    """Groups and answers that fit the filters, as the page says."""
    words = page.locator("#samples-note").inner_text().split()
    return int(words[0]), int(words[4])


def test_filters_and_search(open_page):
    page = open_page()
    assert fits(page) == (12, 48)  # 6 steps of 2 groups of 4
    for select, value, found in (
        ("#f-step", "4", (2, 8)), ("#f-outcome", "right", (12, 12)), ("#f-outcome", "wrong", (12, 24)),
        ("#f-outcome", "failed", (12, 12)), ("#f-cut", "cut", (12, 12)), ("#f-source", "<i>words</i>", (6, 24)),
    ):  # fmt: skip
        page.select_option(select, value)
        assert fits(page) == found, (select, value)
        page.select_option(select, "")
    page.fill("#f-query", "ANSWER\n</script><img")  # across tokens; step + number is 1 or 7 modulo 6
    page.fill("#f-query", "</SCRIPT><IMG")
    assert fits(page) == (2, 8)  # steps 6 and 12 of group 1
    page.select_option("#f-outcome", "right")
    assert fits(page) == (2, 2) and page.locator(".card.other").count() == 3
    page.fill("#f-query", "nowhere")
    assert fits(page) == (0, 0) and page.locator(".card").count() == 0


def test_one_validation_prompt_over_the_steps(open_page):
    page = open_page()
    page.locator("input[value=val]").check(force=True)
    assert fits(page) == (2, 8)
    assert page.locator(".card h3").all_inner_texts() == ["step 3", "step 6", "step 9", "step 12"]
    assert page.locator(".card .badge").all_inner_texts() == ["wrong", "wrong", "right", "right"]
    assert page.locator("#list button").all_inner_texts()[0].startswith("val:0 · 2/4 right")
    assert page.locator("#measure-label").is_hidden()


def test_keys_walk_over_prompts_tokens_and_curves(open_page):
    page = open_page()
    page.locator("#list button").first.focus()
    for key in ("ArrowDown", "ArrowDown", "ArrowUp"):
        page.keyboard.press(key)
    assert page.locator("#group-head p").inner_text() == "prompt train:1, data source <i>words</i>, ground truth 4"
    assert page.evaluate("document.activeElement.dataset.at") == "1"
    page.locator(".tokens").nth(1).focus()
    page.keyboard.press("End")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert (
        page.locator("#token-line").inner_text() == "token 3 ↵ advantage 0 · value 0.5 · ratio, trainer to engine 1.5"
    )
    chart = page.locator("#charts figure", has_text="Score").first
    chart.focus()
    legend = chart.locator(".u-value")
    assert legend.all_inner_texts() == ["12", "1"]
    page.keyboard.press("Home")
    page.keyboard.press("ArrowRight")
    page.wait_for_timeout(50)
    assert legend.all_inner_texts() == ["2", "0.1667"]
    score = "Score: score 0.08333 at step 1, 1 at step 12"
    assert chart.get_attribute("aria-label") == score
    other = page.locator("#charts figure", has_text="Validation").locator(".u-value")
    assert other.all_inner_texts()[:2] == ["2", "\u2013"]  # the cursors stand at one step; no validation was before


def test_every_control_can_be_reached_by_tab_and_shows_where_the_focus_is(open_page):
    page = open_page()
    reached = []
    for _ in range(80):
        page.keyboard.press("Tab")
        place, outline = page.evaluate(FOCUS)
        if place == "BODY":
            break
        assert outline != "none", place
        reached.append(place)
    expected = {
        "axis",
        "smoothing",
        "more-curves",
        "chart",
        "split",
        "f-step",
        "f-query",
        "measure",
        "tokens",
        "key-query",
    }
    assert expected <= set(reached)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_texts_have_contrast_on_every_color(open_page, scheme):
    """At least 4.5 to 1 (WCAG AA) for text on cards, on pages and on the strongest color of a token."""
    page = open_page(1280, scheme)
    page.select_option("#measure", "advantage")
    found = page.evaluate(CONTRASTS)
    assert len(found) > 100
    assert [pair for pair in found if pair[1] < 4.5] == []


def test_axis_smoothing_and_more_curves(open_page):
    page = open_page()
    page.select_option("#axis", "hours")
    chart = page.locator("#charts figure", has_text="Score").first
    assert chart.locator(".u-label").first.inner_text().startswith("hour")
    page.select_option("#smoothing", "0.9")
    label = chart.locator("tr:not(.raw) .u-value").nth(1)
    smooth = 1 / 12
    for step in range(2, 13):
        smooth = 0.9 * smooth + 0.1 * step / 12
    assert label.inner_text() == f"{smooth:.4g}"
    page.select_option("#more-curves", "timing_s/gen")
    assert page.locator("#charts figure").last.locator("h3").inner_text() == "timing_s/gen"


def test_health_time_and_configuration(open_page):
    page = open_page()
    assert page.locator(".lane").all_inner_texts() == ["entropy collapse\nstep 4 to 5"]
    shares = page.locator(".share").all_inner_texts()
    # 12 steps of 2 s: 1 s of generation, 0.75 of update, 0.25 of neither; 4 validations of 1 s
    assert [text.replace("\n", " ") for text in shares] == [
        "gen 42.9 % · 12 s", "update actor 32.1 % · 9 s", "testing 14.3 % · 4 s", "other 10.7 % · 3 s",
    ]  # fmt: skip
    assert page.locator("#keys summary").all_inner_texts() == ["Given (4)", "Derived (1)", "Default (2)"]
    page.fill("#key-query", "hugging")
    assert page.locator("#keys summary").all_inner_texts() == ["Given (0)", "Derived (1)", "Default (0)"]
    row = page.locator("#keys details[open] tr td").all_inner_texts()
    assert row == ["data.hub", "huggingface", "derived from actor_rollout_ref.model.hub"]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_runs_are_compared_on_one_page(open_page, comparison, width, scheme):
    page = open_page(width, scheme, comparison)
    assert page.evaluate("document.documentElement.scrollWidth") == width
    rows = [row.split("\t") for row in page.locator("#runs tr").all_inner_texts()]
    assert rows[:5] == [
        ["", "long", "short"], ["last step", "12", "6"], ["time", "23 s", "11 s"],
        ["validation, last (95 %)", "0.5 (0.4 to 0.6)", "0.5 (0.4 to 0.6)"],
        ["validation, best", "0.5 at step 3", "0.5 at step 3"],
    ]  # fmt: skip
    assert page.locator("#differences-note").inner_text() == "1 of 7 keys differ."
    assert page.locator("#keys-table tbody tr").all_inner_texts() == ["data.train_batch_size\t32\t64"]
    chart = page.locator("#charts figure", has_text="Score").first
    assert chart.get_attribute("aria-label") == (
        "Score: score: long 0.08333 at step 1, 1 at step 12; short 0.1667 at step 1, 1 at step 6"
    )
    page.select_option("#axis", "hours")
    assert chart.locator(".u-label").first.inner_text().startswith("hour")
    assert [found for found in page.evaluate(CONTRASTS) if found[1] < 4.5] == []


def test_answers_of_runs_stand_side_by_side(open_page, comparison):
    page = open_page(1280, "light", comparison)
    titles = page.locator("#responses h3")
    assert titles.all_inner_texts() == ["long, step 12", "short, step 6"]
    assert page.locator("#list button").all_inner_texts()[0].startswith("val:0 \u00b7 right: 1 / 0")
    page.select_option("#f-step", "9")
    assert titles.all_inner_texts() == ["long, step 9", "short"]  # which has no step 9
    page.fill("#f-query", "validation 1")
    assert page.locator("#samples-note").inner_text() == "1 of 2 validation prompts."
    assert page.locator("#samples script, #samples img, #samples b").count() == 0
