"""The report: steps that run once and say why they fail, the plan that names its sources, and the page in a real browser."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from browser import Tab, browser_tab, find_browser
from PIL import Image

from P1_model import Network, save_network
from pages.content import Figure, Gallery, Part, Score, Shown, Table
from pages.page import view_of, write_page
from report import Settings, main, parts_of, run_parts, sources_of
from runtime.cli import BadInput
from runtime.files import ROOT
from runtime.steps import Outcome, Runner, Step, reason_of


def counting(
    folder: Path, name: str = "a", code: int = 0, after: tuple[str, ...] = (), reads: tuple[Path, ...] = ()
) -> Step:
    """A step that adds a letter to a file beside its folder each time it runs, and ends with `code`."""
    script = f"open({str(folder / 'ran')!r}, 'a').write({name!r}); print('error: it broke'); raise SystemExit({code})"
    return Step(name, f"step {name}", (("-c", script),), reads, after)


def ran(folder: Path) -> str:
    return (folder / "ran").read_text()


# ---------------------------------------------------------------- steps


def test_a_step_runs_once_and_is_kept(tmp_path: Path) -> None:
    states = [Runner(tmp_path / "steps", 1).run(counting(tmp_path)).state for _ in range(2)]
    assert (states, ran(tmp_path)) == (["done", "kept"], "a")


def test_fresh_runs_it_again(tmp_path: Path) -> None:
    for fresh in (False, True):
        Runner(tmp_path / "steps", 1, fresh).run(counting(tmp_path))
    assert ran(tmp_path) == "aa"


def test_changed_input_runs_it_and_all_that_follows_again(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for content in ("one", "three"):
        data.write_text(content)
        runner = Runner(tmp_path / "steps", 2)
        first = runner.run(counting(tmp_path, "a", reads=(data,)))
        last = runner.run(counting(tmp_path, "b", after=("a",)))
        assert (first.state, last.state) == ("done", "done")
    assert ran(tmp_path) == "abab"


def test_a_failed_step_gives_its_reason_and_is_tried_again(tmp_path: Path) -> None:
    for _ in range(2):
        outcome = Runner(tmp_path / "steps", 1).run(counting(tmp_path, code=2))
        assert (outcome.state, outcome.reason, outcome.there) == ("failed", "it broke", False)
    assert ran(tmp_path) == "aa"


def test_what_needs_a_failed_step_says_so_and_does_not_run(tmp_path: Path) -> None:
    runner = Runner(tmp_path / "steps", 2)
    runner.run(counting(tmp_path, "a", code=2))
    outcome = runner.run(counting(tmp_path, "b", after=("a",)))
    assert (outcome.state, ran(tmp_path)) == ("lacking", "a")
    assert "needs a" in outcome.reason


def test_what_an_interrupted_step_left_is_there_for_the_next_try(tmp_path: Path) -> None:
    steps = tmp_path / "steps"
    Runner(steps, 1).run(counting(tmp_path, code=130))
    (steps / "a" / "checkpoint").touch()
    Runner(steps, 1).run(counting(tmp_path, code=130))
    assert (steps / "a" / "checkpoint").exists()
    Runner(steps, 1).run(replace(counting(tmp_path), title="step a", files=((steps / "a" / "x.json", 1),)))
    assert not (steps / "a" / "checkpoint").exists()


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("error: one\nerror: two\n  more", "two\n  more"),
        ("bar 1%\rbar 2%\rerror: short", "short"),
        ("Traceback\nKeyError: 'x'\n", "KeyError: 'x'"),
        ("", ""),
    ],
)
def test_the_reason_is_what_the_script_said_last(output: str, reason: str) -> None:
    assert reason_of(output) == reason


def test_an_ended_process_is_told_by_its_signal(tmp_path: Path) -> None:
    step = Step("a", "a", (("-c", "import os; os.kill(os.getpid(), 15)"),))
    assert Runner(tmp_path, 1).run(step).reason == "ended by SIGTERM"


# ---------------------------------------------------------------- the plan


def course_data(folder: Path) -> Path:
    """The names of the course's files, and an input.json."""
    for name in ("face/noise/00.pt", "face/GT/00.png", "face/UNet.pt", "Classifier.pth", "clip_zeroshot/val/0_0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    entry: dict[str, Any] = {"src_image": "corgi dog", "token_name": "<new1>", "prompt": ["A <new1> on a bench."]}
    style = {"src_image": "David Revoy", "token_name": "<new2>", "prompt": ["A cat in the style of <new2>."]}
    for key in ("0", "1", "cat"):
        (folder / "textual_inversion" / key).mkdir(parents=True)
    (folder / "textual_inversion" / "input.json").write_text(json.dumps({"0": entry, "1": style}))
    return folder


def planned(settings: Settings) -> dict[str, Part]:
    return {part.name: part for part in parts_of(settings, sources_of(settings))}


def words(part: Part) -> str:
    return " ".join(word for step in part.steps for command in step.commands for word in command)


def test_without_data_everything_is_made_with_shipped_weights_and_says_how_to_have_more(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    parts = planned(Settings(output=tmp_path, data=tmp_path / "empty"))
    assert not any(part.real for part in parts.values())
    assert {part.problem for part in parts.values()} == {"P1", "P2", "P3"}
    assert all("shipped" in part.source for part in parts.values())
    assert sum(bool(part.hint) for part in parts.values()) >= len(parts) - 1


def test_what_is_given_is_used_and_named(tmp_path: Path) -> None:
    data = course_data(tmp_path / "data")
    parts = planned(Settings(output=tmp_path, data=data, model="owner/name"))
    assert all(part.real for name, part in parts.items() if name != "p1-figures")
    assert f"--model {data / 'face/UNet.pt'}" in words(parts["p2-faces"])
    assert f"--reference {data / 'face/GT'}" in words(parts["p2-faces"])
    assert f"--mnistm-classifier {data / 'Classifier.pth'}" in words(parts["p1-scores"])
    assert "--preset report" in words(parts["p3-zeroshot"])
    assert "owner/name" in parts["p3-words"].source


def test_concepts_of_the_course_are_read_from_its_file(tmp_path: Path) -> None:
    data = course_data(tmp_path / "data")
    parts = planned(Settings(output=tmp_path, data=data, model="owner/name"))
    concepts = parts["p3-words"].steps[-1].files[0][1]
    found = [(one["token"], one["init"], one["kind"]) for one in concepts]
    assert found == [("<new1>", "dog", "object"), ("<new2>", "painting", "style"), ("<cat>", "cat", "object")]
    assert "a photo of a <new1> in the style of <new2>" in words(parts["p3-together"])
    assert "a <new1> next to a <cat>" in words(parts["p3-layout"])


def test_quick_leaves_data_alone(tmp_path: Path) -> None:
    data = course_data(tmp_path / "data")
    parts = planned(Settings(output=tmp_path, data=data, quick=True))
    assert not any(part.real for part in parts.values())
    assert str(data) not in " ".join(words(part) for part in parts.values())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"unet": Path("absent.pt")}, "--unet absent.pt"),
        ({"data": Path("absent")}, "--data absent"),
        ({"judge": Path("absent.pth")}, "--classifier absent.pth"),
        ({"digits": Path("absent.safetensors")}, "--digits absent.safetensors"),
        ({"quick": True, "model": "owner/name"}, "--quick"),
        ({"device": "cuda:99"}, "--device cuda:99"),
    ],
)
def test_bad_input_is_refused_before_any_work(tmp_path: Path, flags: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message):
        main(Settings(**{"output": tmp_path / "out", **flags}))
    assert not (tmp_path / "out").exists()


def test_a_model_without_concepts_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(BadInput, match=r"textual_inversion/input\.json"):
        main(Settings(output=tmp_path / "out", data=tmp_path / "data", model="owner/name"))


def test_bad_input_is_one_line_and_exit_code_2(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "report.py"), "--unet", "absent.pt", "--output", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=300)
    assert (done.returncode, done.stderr.splitlines()) == (2, ["error: --unet absent.pt does not exist"])


# ---------------------------------------------------------------- the page


def part_of(name: str, *steps: Step, shown: Shown | None = None, instead: Part | None = None) -> Part:
    return Part(
        name,
        "P1",
        f"Part {name}",
        "Text.",
        "shipped weights",
        False,
        steps,
        lambda _: shown or Shown(),
        instead=instead,
    )


def page_of(views: Any, tmp_path: Path) -> str:
    write_page(tmp_path / "index.html", views, "python report.py")
    return (tmp_path / "index.html").read_text()


def test_a_failed_part_is_on_the_page_with_its_reason(tmp_path: Path) -> None:
    part = part_of("x", counting(tmp_path, "a", code=2))
    runner = Runner(tmp_path / "steps", 1)
    runner.run(part.steps[0])
    html = page_of([view_of(part, tmp_path / "steps", runner.outcomes)], tmp_path)
    assert "Not shown." in html
    assert "step a: it broke" in html


def test_results_that_cannot_be_read_are_a_reason(tmp_path: Path) -> None:
    def broken(folder: Path) -> Shown:
        raise KeyError("accuracy")

    part = replace(part_of("x", Step("a", "step a", ())), show=broken)
    view = view_of(part, tmp_path, {"a": Outcome("done", "key")})
    assert "KeyError: 'accuracy'" in view.reason


def test_another_part_is_run_where_one_fails(tmp_path: Path) -> None:
    good = part_of("good", counting(tmp_path, "b"), shown=Shown([Score("right", "100 %")]))
    part = part_of("bad", counting(tmp_path, "a", code=2), instead=good)
    sources = replace(sources_of(Settings(output=tmp_path)), steps=tmp_path / "steps")
    views = run_parts([part], sources, fresh=False)
    assert [(view.part.name, bool(view.reason)) for view in views] == [("bad", True), ("good", False)]
    assert ran(tmp_path) == "ab"


def test_texts_are_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a.png")
    shown = Shown(
        [Score("<new1> & more", "1 < 2")],
        [Figure(tmp_path / "a.png", 'a "<new1>"'), Gallery((tmp_path / "a.png",) * 3, "three")],
        [Table("caption <b>", ("head",), (("PASS",),))],
    )
    part = part_of("x", shown=shown)
    html = page_of([view_of(part, tmp_path, {})], tmp_path)
    assert "<new1>" not in html
    assert html.count('<img src="data:image/png;base64,') == 4
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", html)
    assert "url(" not in html
    assert "@import" not in html


# ---------------------------------------------------------------- a whole report, in a browser


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """P1 with a random network, by the command itself, and a part that can't be had."""
    from small_digits import TINY

    from diffusion.schedule import cosine
    from P1_model import UNet

    folder = tmp_path_factory.mktemp("report")
    torch.manual_seed(0)
    network = Network(
        UNet(TINY).eval(), cosine(TINY.timesteps), "cosine", {"name": "ddim", "steps": 2}, {"preset": "tiny"}
    )
    save_network(folder / "p1.safetensors", network)
    command = [
        sys.executable,
        str(ROOT / "report.py"),
        "--problems",
        "P1",
        "--quick",
        "--output",
        "out",
        "--device",
        "cpu",
    ]
    done = subprocess.run(
        [*command, "--digits", "p1.safetensors"], capture_output=True, text=True, cwd=folder, timeout=600
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "digits read right" in done.stdout
    assert done.stdout.strip().endswith("index.html")
    return folder / "out" / "index.html"


@pytest.mark.slow
def test_one_command_makes_a_page_of_its_own(report_page: Path) -> None:
    html = report_page.read_text()
    record = json.loads((report_page.parent / "steps/p1_grades_retries/record.json").read_text())
    assert f"{100 * record['metrics']['mean']:.1f} %" in html
    assert html.count("<figure") == 3
    assert len(list((report_page.parent / "steps/p1_digits_retries/pictures").rglob("*.png"))) == 1000
    for told in ("torch", "P1_inference.py", "seed", "one noise for each whole column"):
        assert told in html


@pytest.fixture(scope="module")
def tab() -> Iterator[Tab]:
    program = find_browser()
    if not program:
        pytest.skip("no chromium is installed (Debian: apt install chromium)")
    with browser_tab(program) as opened:
        yield opened


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(report_page: Path, tab: Tab, scheme: str) -> None:
    """No complaint in the console, every picture there, ink and paper apart, a click enlarges and another puts it back."""
    tab.size(1100, 900)
    tab.scheme(scheme)
    tab.open(report_page.as_uri())
    assert (
        tab.evaluate("[...document.querySelectorAll('.zoom img')].filter(i => i.complete && i.naturalWidth).length")
        == 3
    )
    paper, ink = (
        tab.evaluate(
            f"getComputedStyle(document.body).{name}.match(/\\d+/g).slice(0, 3).map(Number).reduce((a, b) => a + b)"
        )
        for name in ("backgroundColor", "color")
    )
    assert (paper > ink + 450) if scheme == "light" else (ink > paper + 450)
    small = tab.evaluate("document.querySelector('.zoom img').getBoundingClientRect().width")
    tab.click(".zoom")
    assert tab.evaluate("document.getElementById('large').open")
    assert tab.evaluate("document.querySelector('#large img').naturalWidth") > 100
    assert tab.evaluate("document.querySelector('#large img').getBoundingClientRect().width") > small
    tab.click("#large img")
    assert not tab.evaluate("document.getElementById('large').open")
    assert tab.errors == []


@pytest.mark.slow
def test_the_page_on_a_phone(report_page: Path, tab: Tab) -> None:
    """390 pixels: nothing sticks out sideways, text is readable, what is pressed is large enough."""
    tab.size(390, 844)
    tab.open(report_page.as_uri())
    tab.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    assert tab.evaluate("parseFloat(getComputedStyle(document.querySelector('p')).fontSize)") >= 16
    assert tab.evaluate("document.querySelector('.zoom').getBoundingClientRect().width") > 300
    tab.click(".zoom")
    box = tab.evaluate("(({left, right}) => [left, right])(document.getElementById('large').getBoundingClientRect())")
    assert box[0] >= 0
    assert box[1] <= 390
    assert tab.errors == []
