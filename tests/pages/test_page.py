"""The page as a whole: scores in the order of the sections, where each comes from, and how each step was made."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from page_reader import PageReader, read_page, write_image, write_record

from pages.elements import Element, Figure, Score, Section, Strip, Table, percent, plain, settings_table
from pages.page import pending_section, render_section, write_page
from runtime.files import ROOT
from runtime.steps import Outcome, Step


def section_of(name: str, *steps: Step, problem: str = "P1", elements: list[Element] | None = None) -> Section:
    shipped = name.startswith("shipped")
    return Section(
        name, problem, f"Title of {name}", "Text.", f"inputs of {name}", shipped, steps, lambda: elements or []
    )


def page_of(tmp_path: Path, sections: list[Section], outcomes: dict[str, Outcome]) -> PageReader:
    rendered = [render_section(section, tmp_path / "steps", outcomes) for section in sections]
    write_page(tmp_path / "page.html", rendered, "python report.py --data mine")
    return read_page(tmp_path / "page.html")


def test_the_table_at_the_top_has_each_score_its_target_and_where_it_comes_from(tmp_path: Path) -> None:
    mine: list[Element] = [
        Score("digits", "91 %", "90 %"),
        Table("t", ("a",), (("1",),)),
        Score("noise", "0.7", row="a-row", quoted="0.72"),
    ]
    shipped: list[Element] = [Score("faces", "10")]
    sections = [
        section_of("mine", elements=mine),
        section_of("shipped", elements=shipped, problem="P2"),
        section_of("bad", Step("x", "step x", ()), problem="P3"),
    ]
    page = page_of(tmp_path, sections, {"x": Outcome("failed", "key", reason="it broke")})
    assert page.tables["Scores"] == [
        ("", "what", "measured", "bar", "docs/results.md", "from"),
        ("P1", "digits", "91 %", "90 %", "", "given"),
        ("P1", "noise", "0.7", "", "0.72 a-row", "given"),
        ("P2", "faces", "10", "", "", "shipped"),
        ("P3", "Title of bad", "not there: see below", "given"),
    ]
    assert page.marks == [("fail", "not there: see below")]
    html = (tmp_path / "page.html").read_text()
    assert 'class="badge real">given<' in html
    assert 'class="badge shipped">shipped<' in html
    assert not re.search('class="badge (real">shipped|shipped">given)<', html)
    assert "2 of 3 sections have results, made by 1 steps." in page.text
    assert "Not shown. step x: it broke" in page.text
    assert "python report.py --data mine" in page.text


def test_a_gallery_shows_its_images_in_their_order_under_its_caption(tmp_path: Path) -> None:
    for width in (10, 11, 12):
        write_image(tmp_path / f"{width}.png", width)
    figures: list[Element] = [
        Figure("two", (tmp_path / "11.png", tmp_path / "10.png")),
        Figure("one", (tmp_path / "12.png",)),
    ]
    assert page_of(tmp_path, [section_of("x", elements=figures)], {}).figures == {"two": (11, 10), "one": (12,)}


def test_a_step_shows_its_seconds_commands_settings_and_seed(tmp_path: Path) -> None:
    step = Step("draw", "drawing", (("P1_inference.py", "--output", ROOT / "report" / "images"),))
    settings = {"steps": 50, "model": f"{ROOT}/checkpoints/a", "grid": None, "digits": [], "eta": 0.0}
    settings |= {
        "config": {"inject": [0.1, 0.5], "align": {"on": True, "to": None}},
        "files": [f"{ROOT}/a", f"{ROOT}/b"],
    }
    facts = {"seed": 17, "device": "cpu", "started": "2026-01-02T03:04:05", "revision": None, "settings": settings}
    write_record(tmp_path / "steps" / "draw", {}, script="P1_inference.py", **facts)
    page = page_of(tmp_path, [section_of("x", step)], {"draw": Outcome("kept", "key", 83.4)})
    assert "drawing 83 s" in page.text
    assert "python P1_inference.py --output report/images" in page.text
    assert page.tables["P1_inference.py, settings and seed"] == [
        ("seed", "17"),
        ("device", "cpu"),
        ("started", "2026-01-02T03:04:05"),
        ("steps", "50"),
        ("model", "checkpoints/a"),
        ("eta", "0"),
        ("config.inject", "0.1, 0.5"),
        ("config.align.on", "yes"),
        ("files", "a, b"),
    ]
    assert "{" not in page.text.split("Do it again")[-1].split('"use strict"')[0]  # no Python values


def test_what_has_not_had_its_turn_is_still_to_come(tmp_path: Path) -> None:
    done = render_section(section_of("one", elements=[Score("digits", "91 %")]), tmp_path, {})
    waiting = pending_section(section_of("two", Step("x", "step x", ()), problem="P2"))
    write_page(tmp_path / "page.html", [done, waiting], "python report.py", "about 4 minutes on this machine")
    page = read_page(tmp_path / "page.html")
    assert page.tables["Scores"][1:] == [
        ("P1", "digits", "91 %", "", "", "given"),
        ("P2", "Title of two", "still to come", "given"),
    ]
    assert "1 of 2 sections are still to come. The run takes about 4 minutes on this machine." in page.text
    assert "1 of 2 sections have results" in page.text
    assert "Still to come." in page.text
    assert "step x" not in page.text
    write_page(tmp_path / "page.html", [done], "python report.py")
    assert "still to come" not in read_page(tmp_path / "page.html").text


def test_a_strip_at_the_top_comes_before_the_scores_and_settings_come_last(tmp_path: Path) -> None:
    for width in (10, 11):
        write_image(tmp_path / f"{width}.png", width)
    elements: list[Element] = [
        Table("Settings of x", ("a",), (("1",),), settings=True),
        Table("Result of x", ("a",), (("2",),)),
        Score("digits", "91 %"),
        Strip("digits", (tmp_path / "10.png",), before=(tmp_path / "11.png",)),
    ]
    page = page_of(tmp_path, [section_of("x", elements=elements)], {})
    assert page.strips == {"P1: digits": (11, 10)}
    assert list(page.tables) == ["Scores", "Result of x", "Settings of x", "Versions"]
    html = (tmp_path / "page.html").read_text()
    assert html.index('class="strip"') < html.index('id="scores"') < html.index('id="x"') < html.index('id="settings"')
    assert html.index("<details") < html.index("Settings of x")


def test_every_section_is_in_the_table_of_contents_and_names_its_question(tmp_path: Path) -> None:
    sections = [section_of("x"), replace(section_of("y", problem="P2"), question="eta and slerp")]
    page = page_of(tmp_path, sections, {})
    html = (tmp_path / "page.html").read_text()
    contents = html[html.index("<nav") : html.index("</nav>")]
    targets = re.findall('href="#([^"]+)"', contents)
    assert targets == ["P1", "x", "P2", "y", "scores", "again", "settings"]
    assert all(f'id="{target}"' in html for target in targets)
    assert "The report's question: eta and slerp." in page.text


@pytest.mark.parametrize(("state", "reason"), [("failed", "it broke"), ("lacking", "it needs a")])
def test_a_step_without_a_result_shows_its_state_and_no_settings(state: Any, reason: str, tmp_path: Path) -> None:
    write_record(tmp_path / "steps" / "draw", {})  # an older run's
    section = replace(section_of("x", Step("draw", "drawing", ())), elements=lambda: [Score("never", "1")])
    page = page_of(tmp_path, [section], {"draw": Outcome(state, "key", reason=reason)})
    assert f"drawing {state}" in page.text
    assert f"drawing: {reason}" in page.text
    assert "script.py, settings and seed" not in page.tables
    assert "never" not in page.text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.98765, "0.98765"),
        (12345678.9, "1.23457e+07"),
        ((1.5, "a", 2), "1.5, a, 2"),
        (True, "yes"),
        ({"a": 1, "b": [2, False]}, "a 1, b 2, no"),
        (7, "7"),
    ],
)
def test_values_as_text(value: Any, text: str) -> None:
    assert plain(value) == text


@pytest.mark.parametrize(("share", "text"), [(0.98765, "98.8 %"), (0.5, "50.0 %"), (1.0, "100.0 %"), (0.0, "0.0 %")])
def test_shares_in_percent(share: float, text: str) -> None:
    assert percent(share) == text


def test_a_table_of_settings_leaves_out_what_was_not_set() -> None:
    values: dict[str, Any] = {"a": 0, "b": None, "c": "", "d": [], "e": False, "f": 0.5}
    table = settings_table("Settings", values)
    assert (table.caption, table.head, table.rows) == (
        "Settings",
        ("setting", "value"),
        (("a", "0"), ("e", "no"), ("f", "0.5")),
    )
