"""The page of a report in headless Chromium: sorting, theme, keyboard, no request, no complaint, accessibility."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import Browser, Tab, find_chromium
from small_reports import settings, write_run

from distinit_plugin.cli import main

ROOT = Path(__file__).resolve().parents[1]
EVIL = "<img src=http://localhost:9/x onerror=alert(1)><script>alert(2)</script>"
AXE = "node_modules/axe-core/axe.min.js"

NAMES_AND_SCORES = {"ten": 0.1, "nine": 0.9, "a hundred": 1.0}
FIRST_COLUMN = "Array.from(document.querySelector('main table tbody').rows).map(row => row.cells[0].textContent)"
HEAD = "Array.from(document.querySelectorAll('main table')[0].tHead.rows[0].cells).find(c => c.textContent === '{}')"


@pytest.fixture(scope="module")
def browser(tmp_path_factory) -> Iterator[Browser]:
    program = find_chromium()
    if program is None:
        pytest.skip("Chromium is not installed (Debian: apt install chromium)")
    found = Browser(program, tmp_path_factory.mktemp("profile"))
    yield found
    found.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory) -> Path:
    """Runs with scores, one without, one with markup in its name and everywhere; a study; bad videos."""
    folder = tmp_path_factory.mktemp("report")
    for seed, (name, top1) in enumerate(NAMES_AND_SCORES.items()):
        write_run(
            folder / "runs" / name, top1=top1, config=settings(seed, SOLVER={"BASE_LR": top1}), epochs=2 * (seed == 0)
        )
    write_run(folder / "runs" / "unfinished", top1=None, state="running", epochs=1, config=settings(8))
    evil = EVIL.replace("/", "_")
    config = settings(9, MODEL={"MODEL_NAME": EVIL})
    write_run(folder / "runs" / evil, config=config, classes=(EVIL,), error=EVIL, state="failed", bad=((EVIL, EVIL),))
    rows = {"a": {"0": "ten", "1": "nine"}, "b": {"0": "nine", "1": "a hundred"}}
    study = {"name": "small", "baseline": "a", "rows": rows, "metric": "top1"}
    (folder / "runs" / "study.json").write_text(json.dumps(study))
    words = [folder / "runs", "--output", folder / "report.html"]
    assert main(["report", *map(str, words)]) == 0
    words = [folder / "runs", "--study", folder / "runs" / "study.json", "--output", folder / "study.html"]
    assert main(["report", *map(str, words)]) == 0
    return folder / "report.html"


@pytest.fixture(scope="module")
def tab(browser, report) -> Tab:
    return Tab(browser, report)


def test_tables_are_sorted_by_their_heads(tab):
    found = tab.evaluate(FIRST_COLUMN)
    assert "ten" in found
    head = HEAD.format("top-1, %")
    tab.evaluate(f"{head}.querySelector('button').click()")
    assert tab.evaluate(f"{head}.getAttribute('aria-sort')") == "descending"
    order = tab.evaluate(FIRST_COLUMN)
    assert [order[0], order[1], order[-2]] == ["a hundred", "nine", "ten"]  # by number: 100.0 is more than 90.0
    assert order[-1] == "unfinished"  # it has no score
    tab.evaluate(f"{head}.querySelector('button').click()")
    assert tab.evaluate(f"{head}.getAttribute('aria-sort')") == "ascending"
    order = tab.evaluate(FIRST_COLUMN)
    assert [order[0], order[-1]] == ["ten", "unfinished"]
    assert tab.evaluate("document.getElementById('told').textContent") == "Sorted by top-1, %, ascending"
    tab.evaluate(f"{HEAD.format('run')}.querySelector('button').click()")
    assert sorted(found, key=str.casefold) == tab.evaluate(FIRST_COLUMN)
    assert tab.evaluate("document.querySelectorAll('main table')[0].querySelectorAll('[aria-sort]').length") == 1


def test_the_keyboard_reaches_everything(browser, report):
    tab = Tab(browser, report)
    stops = []
    for _ in range(14):
        tab.press("Tab")
        stops.append(tab.evaluate("document.activeElement.textContent.trim().slice(0, 30)"))
    assert stops[:3] == ["To the content", "Dark colours", "Results"]
    assert "run" in stops
    outline = "getComputedStyle(document.activeElement).outlineStyle"
    assert tab.evaluate(outline) == "solid"
    tab.evaluate(f"{HEAD.format('top-1, %')}.querySelector('button').focus()")
    tab.press("Enter", "\r")
    assert tab.evaluate(FIRST_COLUMN)[0] == "a hundred"


def test_the_theme_is_the_systems_until_somebody_chooses(browser, report):
    background = "getComputedStyle(document.body).backgroundColor"
    light, dark = Tab(browser, report), Tab(browser, report, dark=True)
    colours = light.evaluate(background), dark.evaluate(background)
    assert colours[0] != colours[1]
    assert dark.evaluate("document.querySelector('.theme').textContent") == "Light colours"
    dark.evaluate("document.querySelector('.theme').click()")
    assert dark.evaluate(background) == colours[0]
    assert dark.evaluate("document.querySelector('.theme').textContent") == "Dark colours"
    dark.evaluate("document.querySelector('.theme').click()")
    assert dark.evaluate(background) == colours[1]
    dark.evaluate("localStorage.clear()")


@pytest.mark.parametrize("width", [390, 1280])
def test_only_boxes_scroll_sideways(browser, report, width):
    tab = Tab(browser, report, width=width, height=800)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    tab.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    # What is wider than its box can be scrolled to, by keyboard as well.
    wide = "Array.from(document.querySelectorAll('.scroll')).filter(box => box.scrollWidth > box.clientWidth)"
    assert tab.evaluate(f"{wide}.length") > 0 or width == 1280
    assert tab.evaluate(f"{wide}.every(box => box.tabIndex === 0)")


def test_markup_in_names_is_text(tab):
    assert tab.evaluate("document.querySelectorAll('main img').length") == tab.evaluate(
        "document.querySelectorAll('main img[src^=\"data:image/png\"]').length"
    )
    assert tab.evaluate("document.scripts.length") == 1
    assert tab.evaluate(f"document.body.innerText.includes({json.dumps(EVIL)})")


def test_no_request_and_no_complaint(browser, report):
    """Nothing but the file itself is asked for and nothing but its script is run; what tries is stopped."""
    for path in (report, report.with_name("study.html")):
        tab = Tab(browser, path, dark=True)
        tab.evaluate("document.querySelectorAll('thead button').forEach(button => button.click())")
        asked = [address for address in tab.requests() if not address.startswith("data:")]
        assert asked == [path.resolve().as_uri()]
        assert tab.complaints() == []
    tab.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=\"data:,\" onerror=\"window.ran = 1\">')")
    tab.evaluate("new Promise(done => setTimeout(done, 100))")
    assert tab.evaluate("window.ran") is None  # what would get into the page all the same is not run
    assert len(tab.complaints()) == 1
    tab.evaluate("fetch('http://localhost:9/').catch(() => 'stopped')")  # the control
    assert any("Content Security Policy" in json.dumps(entry) for entry in tab.complaints()[1:])


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_accessibility(browser, report, dark):
    """All rules of axe-core, of WCAG 2.2 AA and of good practice, with everything unfolded."""
    axe = Path(os.environ.get("DISTINIT_AXE", ROOT / AXE))
    if not axe.is_file():
        pytest.skip("axe-core is not installed (npm install --no-save axe-core, or DISTINIT_AXE names axe.min.js)")
    tab = Tab(browser, report.with_name("study.html"), dark=dark, width=390 if dark else 1280)
    tab.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true; })")
    tab.evaluate(f"{axe.read_text('utf-8')}; undefined")
    nodes = "rule.nodes.map(node => node.html.slice(0, 200))"
    check = f"axe.run(document).then(found => found.{{}}.map(rule => [rule.id, {nodes}]))"
    assert tab.evaluate(check.format("violations")) == []
    assert len(tab.evaluate(check.format("passes"))) > 20
    if not dark:  # the control: a button without a name, and grey on white
        tab.evaluate(
            "document.querySelector('.theme').textContent = ''; document.querySelector('h1').style.color = '#bbb'"
        )
        assert {"button-name", "color-contrast"} <= {rule for rule, _ in tab.evaluate(check.format("violations"))}
