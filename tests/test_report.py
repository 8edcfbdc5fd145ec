"""The report: steps that run once and say why they fail, the plan that names its sources, and the page in a real browser."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image

from P1_model import Network, save_network
from pages import duration
from pages.elements import Element, Figure, Score, Section, Table
from pages.page import RenderedSection, render_section, write_page
from report import Settings, find_inputs, main, print_scores, run_sections, sections_of
from runtime.cli import BadInput
from runtime.files import ROOT
from runtime.steps import Outcome, Runner, Step, failure_reason

if TYPE_CHECKING:
    from playwright.sync_api import Browser, FloatRect, Page


def counting(
    folder: Path, name: str = "a", code: int = 0, after: tuple[str, ...] = (), inputs: tuple[Path, ...] = ()
) -> Step:
    """Return a step that adds a letter to a file next to its folder each time it runs, and ends with `code`."""
    script = f"open({str(folder / 'ran')!r}, 'a').write({name!r}); print('error: it broke'); raise SystemExit({code})"
    return Step(name, f"step {name}", (("-c", script),), inputs, after)


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
        first = runner.run(counting(tmp_path, "a", inputs=(data,)))
        last = runner.run(counting(tmp_path, "b", after=("a",)))
        assert (first.state, last.state) == ("done", "done")
    assert ran(tmp_path) == "abab"


def test_a_failed_step_gives_its_reason_and_is_tried_again(tmp_path: Path) -> None:
    for _ in range(2):
        outcome = Runner(tmp_path / "steps", 1).run(counting(tmp_path, code=2))
        assert (outcome.state, outcome.reason) == ("failed", "it broke")
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
    Runner(steps, 1).run(replace(counting(tmp_path), title="step a", files={steps / "a" / "x.json": 1}))
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
    assert failure_reason(output) == reason


def test_an_ended_process_is_described_by_its_signal(tmp_path: Path) -> None:
    step = Step("a", "a", (("-c", "import os; os.kill(os.getpid(), 15)"),))
    assert Runner(tmp_path, 1).run(step).reason == "ended by SIGTERM"


# ---------------------------------------------------------------- the plan


def course_data(folder: Path) -> Path:
    """Write files of the course's names, and an input.json."""
    for name in ("face/noise/00.pt", "face/GT/00.png", "face/UNet.pt", "Classifier.pth", "clip_zeroshot/val/0_0.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    entry: dict[str, Any] = {"src_image": "corgi dog", "token_name": "<new1>", "prompt": ["A <new1> on a bench."]}
    style = {"src_image": "David Revoy", "token_name": "<new2>", "prompt": ["A cat in the style of <new2>."]}
    for key in ("0", "1", "cat"):
        (folder / "textual_inversion" / key).mkdir(parents=True)
    (folder / "textual_inversion" / "input.json").write_text(json.dumps({"0": entry, "1": style}))
    return folder


def planned(settings: Settings) -> dict[str, Section]:
    return {section.name: section for section in sections_of(settings, find_inputs(settings))}


def words(section: Section) -> str:
    return " ".join(str(word) for step in section.steps for command in step.commands for word in command)


def test_without_data_everything_is_made_with_shipped_weights_and_hints_at_more(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sections = planned(Settings(output=tmp_path, data=tmp_path / "empty"))
    assert all(section.shipped for section in sections.values())
    assert {section.problem for section in sections.values()} == {"P1", "P2", "P3"}
    assert all("checkpoints/" in section.inputs for section in sections.values())
    assert sum(bool(section.hint) for section in sections.values()) >= len(sections) - 1


def test_what_is_given_is_used_and_named(tmp_path: Path) -> None:
    data = course_data(tmp_path / "data")
    sections = planned(Settings(output=tmp_path, data=data, model="owner/name"))
    assert all(not section.shipped for name, section in sections.items() if name != "p1-figures")
    assert f"--model {data / 'face/UNet.pt'}" in words(sections["p2-faces"])
    assert f"--reference {data / 'face/GT'}" in words(sections["p2-faces"])
    assert f"--mnistm-classifier {data / 'Classifier.pth'}" in words(sections["p1-scores"])
    assert "--preset report" in words(sections["p3-zeroshot"])
    assert "owner/name" in sections["p3-words"].inputs


def test_concepts_of_the_course_are_read_from_its_file(tmp_path: Path) -> None:
    data = course_data(tmp_path / "data")
    sections = planned(Settings(output=tmp_path, data=data, model="owner/name"))
    concepts = [one for step in sections["p3-words"].steps for own in step.files.values() for one in own]
    assert [(one["token"], one["init"], one["kind"]) for one in concepts] == [
        ("<new1>", "dog", "object"),
        ("<cat>", "cat", "object"),
        ("<new2>", "painting", "style"),
    ]
    assert "a photo of a <new1> in the style of <new2>" in words(sections["p3-drawn"])
    assert "a <new1> next to a <cat>" in words(sections["p3-layout"])


def test_quick_leaves_data_alone_and_takes_less_of_everything(tmp_path: Path) -> None:
    data = course_data(tmp_path / "data")
    sections = planned(Settings(output=tmp_path, data=data, quick=True))
    assert all(section.shipped for section in sections.values())
    assert str(data) not in " ".join(words(section) for section in sections.values())
    assert "zeroshot --count 340" in words(sections["miniature-zeroshot"])
    assert "--retries 0" not in words(sections["p1-scores"])
    assert words(sections["p1-figures"]).endswith("--figures grid reverse")
    assert "ripple" not in words(sections["miniature-words"])


def everything(folder: Path) -> Settings:
    """Return settings with the course's data, a model, and files of one's own."""
    for name in ("my.pt", "my.safetensors", "my.pth"):
        (folder / name).touch()
    return Settings(output=folder / "out", data=course_data(folder / "data"), model="owner/name", device="cpu")


# flag -> its value, and for a section what a command of it then says; @ is the folder
FLAGS: dict[str, tuple[Any, dict[str, str]]] = {
    "output": (
        "@/mine",
        {
            "p1-scores": "--output @/mine/steps/p1_digits_plain/images",
            "p2-figures": "--output @/mine/steps/p2_figures",
            "p3-zeroshot": "--output @/mine/steps/p3_zeroshot",
            "p3-words": "--output @/mine/steps/p3_objects/vectors",
        },
    ),
    "data": (
        "@/data",
        {
            "p1-scores": "--mnistm-classifier @/data/Classifier.pth",
            "p2-faces": "--model @/data/face/UNet.pt --device cpu --noise @/data/face/noise --output",
            "p3-zeroshot": "--images @/data/clip_zeroshot/val",
            "p3-drawn": "--input @/data/textual_inversion/input.json --references @/data/textual_inversion",
        },
    ),
    "model": (
        "other/model",
        {
            "p3-words": "--model other/model --concepts",
            "p3-drawn": "--model other/model --embeddings",
            "p3-layout": "--model other/model --embeddings",
        },
    ),
    "unet": ("@/my.pt", {"p2-faces": "--model @/my.pt", "p2-figures": "--model @/my.pt"}),
    "digits": ("@/my.safetensors", {"p1-scores": "--model @/my.safetensors", "p1-figures": "--model @/my.safetensors"}),
    "mnistm_classifier": ("@/my.pth", {"p1-scores": "--mnistm-classifier @/my.pth"}),
    "clip": ("other/clip", {"p3-drawn": "--clip other/clip"}),
    "device": (
        "cpu",
        {
            "p1-scores": "P1_inference.py --output @/out/steps/p1_digits_plain/images --model "
            f"{ROOT}/checkpoints/p1_digits.safetensors --device cpu",
            **dict.fromkeys(("p1-figures", "p2-faces", "p2-figures", "p3-zeroshot", "p3-words"), "--device cpu"),
            **dict.fromkeys(("p3-drawn", "p3-layout"), "--device cpu"),
        },
    ),
}


def test_the_table_of_flags_is_whole() -> None:
    """The others have a test of their own below: which sections there are, what is run again."""
    assert {field.name for field in fields(Settings)} == {*FLAGS, "problems", "quick", "fresh"}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_flag_reaches_the_commands_that_it_is_for(flag: str, tmp_path: Path) -> None:
    value, expected = FLAGS[flag]
    value = value.replace("@", str(tmp_path))
    kind = str if flag in ("model", "clip", "device") else Path
    changes: dict[str, Any] = {flag: kind(value)}
    settings: Settings = replace(everything(tmp_path), **changes)
    sections = planned(settings)
    for name, text in expected.items():
        assert text.replace("@", str(tmp_path)) in words(sections[name]), name


@pytest.mark.parametrize("course", [False, True])
def test_every_step_follows_all_steps_whose_results_it_reads_and_writes_into_its_own_folder(
    course: bool, tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    settings = everything(tmp_path) if course else Settings(output=tmp_path / "out", data=tmp_path / "empty")
    inputs = find_inputs(settings)
    steps = {step.name: step for section in sections_of(settings, inputs) for step in section.steps}
    written = ("--output", "--record", "--run", "--cache", "--figure")
    before: dict[str, set[str]] = {}
    for name, step in steps.items():
        before[name] = set(step.after).union(*(before[other] for other in step.after))  # in the order of the page
        for command in step.commands:
            for flag, word in zip(("", *command), command, strict=False):
                path = Path(word)
                if inputs.steps in path.parents:
                    owner = path.relative_to(inputs.steps).parts[0]
                    assert owner == name or (owner in before[name] and flag not in written), (name, flag, word)


@pytest.mark.parametrize("problems", [("P1",), ("P3", "P2"), ("P3", "P2", "P1")])
def test_only_the_requested_problems_are_on_the_page_in_its_own_order(problems: Any, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    settings = Settings(output=tmp_path, data=tmp_path / "empty", problems=problems)
    order = [section.problem for section in sections_of(settings, find_inputs(settings))]
    assert order == sorted(order)
    assert set(order) == set(problems)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"unet": Path("absent.pt")}, "--unet absent.pt"),
        ({"data": Path("absent")}, "--data absent"),
        ({"mnistm_classifier": Path("absent.pth")}, "--mnistm-classifier absent.pth"),
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


def section_of(
    name: str, *steps: Step, elements: list[Element] | None = None, fallback: Section | None = None
) -> Section:
    return Section(
        name, "P1", f"Section {name}", "Text.", "weights", True, steps, lambda: elements or [], fallback=fallback
    )


def page_of(rendered: list[RenderedSection], tmp_path: Path) -> str:
    write_page(tmp_path / "index.html", rendered, "python report.py")
    return (tmp_path / "index.html").read_text()


def test_a_failed_section_is_on_the_page_with_its_reason(tmp_path: Path) -> None:
    section = section_of("x", counting(tmp_path, "a", code=2))
    runner = Runner(tmp_path / "steps", 1)
    runner.run(section.steps[0])
    html = page_of([render_section(section, tmp_path / "steps", runner.outcomes)], tmp_path)
    assert "Not shown." in html
    assert "step a: it broke" in html


def test_results_that_cannot_be_read_are_a_reason(tmp_path: Path) -> None:
    def broken() -> list[Element]:
        raise KeyError("accuracy")

    section = replace(section_of("x", Step("a", "step a", ())), elements=broken)
    assert "KeyError: 'accuracy'" in render_section(section, tmp_path, {"a": Outcome("done", "key")}).reason


def test_the_fallback_is_run_when_a_section_fails_and_stands_next_to_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = section_of("good", counting(tmp_path, "b"), elements=[Score("right", "100 %")])
    section = section_of("bad", counting(tmp_path, "a", code=2), fallback=good)
    other = section_of("other", counting(tmp_path, "c"))
    pages: list[list[tuple[str, bool]]] = []

    def write(rendered: Sequence[RenderedSection]) -> None:
        pages.append([(one.section.name, one.pending) for one in rendered])

    rendered = run_sections([section, other], Runner(tmp_path / "steps", 2), write)
    states = [(one.section.name, bool(one.reason)) for one in rendered]
    assert states == [("bad", True), ("good", False), ("other", False)]
    assert ran(tmp_path) == "abc"
    assert re.findall(r"== (\d/\d)", capsys.readouterr().err) == ["1/2", "2/3", "3/3"]
    assert pages == [  # the page is written after every section, with what is still to come
        [("bad", False), ("good", True), ("other", True)],
        [("bad", False), ("good", False), ("other", True)],
        [("bad", False), ("good", False), ("other", False)],
    ]


def test_the_scores_are_printed_with_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores: list[Element] = [Score("digits read right", "91.2 %", "90 %"), Table("t", ("a",), ()), Score("faces", "7")]
    lacking = replace(section_of("y", Step("a", "step a", ())), problem="P2")
    failed = {"a": Outcome("failed", "key", reason="it broke\nsecond line")}
    print_scores(
        [
            render_section(section_of("x", elements=scores), tmp_path, {}),
            render_section(lacking, tmp_path, failed),
        ]
    )
    assert [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()] == [
        "P1 digits read right 91.2 %",
        "P1 faces 7",
        "P2 Section y: not there. step a: it broke",
    ]


def test_the_command_ends_with_its_scores_its_minutes_and_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    section = section_of("x", counting(tmp_path, "a"), elements=[Score("right", "97 %")])
    clock = iter([1000.0, 1090.0])
    monkeypatch.setattr("report.sections_of", lambda *_: [section])
    monkeypatch.setattr("report.time", SimpleNamespace(perf_counter=lambda: next(clock)))
    main(Settings(output=tmp_path / "out"))
    score, end = capsys.readouterr().out.splitlines()
    assert score.split() == ["P1", "right", "97", "%"]
    assert end == f"1.5 minutes. The page: {tmp_path / 'out' / 'index.html'}"
    assert "97 %" in (tmp_path / "out" / "index.html").read_text()


def test_the_start_says_how_many_minutes_the_steps_will_take_that_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "report.sections_of",
        lambda *_: [section_of("x", counting(tmp_path, "a"), counting(tmp_path, "b", after=("a",)))],
    )
    monkeypatch.setattr(
        "report.minutes_text", lambda steps, own, quick: f"{[step.name for step in steps]} {own} {quick}"
    )
    main(Settings(output=tmp_path / "out", quick=True))
    assert capsys.readouterr().err.startswith("2 of 2 steps to run: ['a', 'b'] 0 True\n")
    (tmp_path / "out" / "steps" / "b" / "step.json").unlink()
    main(Settings(output=tmp_path / "out", quick=True))
    assert capsys.readouterr().err.startswith("1 of 2 steps to run: ['b'] 0 True\n")
    main(Settings(output=tmp_path / "out", quick=True))
    assert capsys.readouterr().err.startswith("0 of 2 steps to run: all are kept\n")
    own = replace(section_of("x", counting(tmp_path, "a"), counting(tmp_path, "b", after=("a",))), shipped=False)
    monkeypatch.setattr("report.sections_of", lambda *_: [own])
    main(Settings(output=tmp_path / "out", fresh=True))
    assert capsys.readouterr().err.startswith("2 of 2 steps to run: [] 2 False\n")


@pytest.mark.parametrize(
    ("times_here", "quick", "text"),
    [
        (1.0, True, "about 2 minutes on this machine"),
        (0.4, True, "about 1 minute on this machine"),
        (1.0, False, "about 3 minutes on this machine"),
    ],
)
def test_minutes_are_those_of_a_known_machine_times_what_a_probe_measures_here(
    times_here: float, quick: bool, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(duration, "slowness", lambda: times_here)
    monkeypatch.setattr(duration, "SECONDS", {"a": (50, 100), "b": (45, 60), "c": (1000, 1000)})
    steps = [Step(name, name, ()) for name in ("a", "b")]
    assert duration.minutes_text(steps, 0, quick) == text
    assert duration.minutes_text(steps, 1, quick) == f"{text}, without 1 step on your own models or data"


@pytest.mark.parametrize("quick", [True, False])
def test_the_time_of_every_step_with_shipped_weights_is_known(quick: bool, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    sections = planned(Settings(output=tmp_path, data=tmp_path / "empty", quick=quick))
    steps = [step.name for section in sections.values() for step in section.steps]
    assert all(duration.SECONDS[name][not quick] > 0 for name in steps)
    if not quick:
        assert set(duration.SECONDS) == set(steps)


def test_the_probe_is_about_one_where_it_takes_as_long_as_there(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    monkeypatch.setattr(duration, "time", SimpleNamespace(perf_counter=lambda: duration.PROBE * next(ticks)))
    monkeypatch.setattr(duration, "PROBE_SECONDS", 9.5 * duration.PROBE)
    assert duration.slowness() == pytest.approx(1, rel=0.3)


@pytest.mark.parametrize(("fresh", "times"), [(False, "a"), (True, "aa")])
def test_the_same_command_runs_a_step_again_only_if_it_must(
    fresh: bool, times: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("report.sections_of", lambda *_: [section_of("x", counting(tmp_path, "a"))])
    for again in (False, fresh):
        main(Settings(output=tmp_path / "out", fresh=again))
    assert ran(tmp_path) == times


def test_a_section_without_results_is_exit_code_1_and_the_page_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sections = [section_of("x", counting(tmp_path, "a", code=2)), section_of("y", counting(tmp_path, "b"))]
    monkeypatch.setattr("report.sections_of", lambda *_: sections)
    with pytest.raises(SystemExit) as error:
        main(Settings(output=tmp_path / "out"))
    assert (error.value.code, ran(tmp_path)) == (1, "ab")
    assert "1 of 2 sections have results" in (tmp_path / "out" / "index.html").read_text()


def test_texts_are_escaped_and_nothing_is_fetched(tmp_path: Path) -> None:
    Image.new("RGB", (28, 28), "red").save(tmp_path / "a.png")
    elements: list[Element] = [
        Score("<new1> & more", "1 < 2"),
        Figure('a "<new1>"', (tmp_path / "a.png",)),
        Figure("three", (tmp_path / "a.png",) * 3),
        Table("caption <b>", ("head",), (("PASS",),)),
    ]
    html = page_of([render_section(section_of("x", elements=elements), tmp_path, {})], tmp_path)
    assert "<new1>" not in html
    assert html.count('<img src="data:image/png;base64,') == 4
    assert not re.search(r"(?:src|href)=\"(?!#|data:)", html)
    assert "url(" not in html
    assert "@import" not in html


# ---------------------------------------------------------------- a whole report, in a browser


@pytest.fixture(scope="module")
def report_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """P1 with a random network, by the command itself, and a part whose input is missing."""
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
    assert "digits read right, first try" in done.stdout
    assert done.stdout.index("first try") < done.stdout.index("after retries, selected by the shipped classifiers")
    assert done.stdout.strip().endswith("index.html")
    return folder / "out" / "index.html"


@pytest.mark.slow
def test_one_command_makes_its_page(report_page: Path) -> None:
    html = report_page.read_text()
    record = json.loads((report_page.parent / "steps/p1_grades_retries/record.json").read_text())
    assert f"{100 * record['metrics']['mean']:.1f} %" in html
    assert html.count("<figure") == 3
    assert len(list((report_page.parent / "steps/p1_digits_retries/images").rglob("*.png"))) == 1000
    for text in ("torch", "P1_inference.py", "seed", "One noise serves a whole column"):
        assert text in html


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Debian's chromium without a window and without a connection."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (requirements-dev.txt)")
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not program:
        pytest.skip("no chromium is installed (Debian: apt install chromium)")
    flags = "--no-sandbox --disable-gpu --disable-background-networking --disable-component-update --disable-sync --no-first-run"
    with playwright.sync_playwright() as driver:
        opened = driver.chromium.launch(executable_path=program, args=flags.split(), timeout=120_000)
        yield opened
        opened.close()


@contextmanager
def opened(browser: Browser, path: Path, **options: Any) -> Iterator[Page]:
    """Open the page in a fresh profile; its console must stay without errors."""
    context = browser.new_context(**options)
    page, errors = context.new_page(), []
    page.on("console", lambda message: errors.append(message.text) if message.type in ("error", "assert") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(path.as_uri())
    yield page
    context.close()
    assert errors == []


def box_of(page: Page, selector: str) -> FloatRect:
    box = page.locator(selector).first.bounding_box()
    assert box, f"{selector} is not visible"
    return box


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_in_a_browser(report_page: Path, browser: Browser, scheme: str) -> None:
    """Every image is loaded, text and background contrast, a click enlarges an image and another closes it."""
    with opened(browser, report_page, viewport={"width": 1100, "height": 900}, color_scheme=scheme) as page:
        assert (
            page.evaluate(
                "[...document.querySelectorAll('.zoom img')].filter(i => i.complete && i.naturalWidth).length"
            )
            == 3
        )
        paper, ink = (
            sum(map(int, re.findall(r"\d+", page.evaluate(f"getComputedStyle(document.body).{name}"))[:3]))
            for name in ("backgroundColor", "color")
        )
        assert (paper > ink + 450) if scheme == "light" else (ink > paper + 450)
        scales = page.evaluate(
            "[...document.querySelectorAll('img')].filter(i => i.src).map(i => [i.width / i.naturalWidth, i.naturalWidth])"
        )
        assert len(scales) == 3 + 5  # and the strip
        assert all(
            scale <= (1 if width >= 200 else 2) + 0.01 for scale, width in scales
        )  # only small images, pixel by pixel
        grids = [box_of(page, f"figure.half >> nth={n}") for n in range(2)]
        assert grids[0]["y"] == grids[1]["y"]
        assert grids[1]["x"] > grids[0]["x"] + grids[0]["width"]
        small = box_of(page, ".zoom img")
        page.locator(".zoom").first.click()
        assert page.locator("#large").is_visible()
        assert page.evaluate("document.querySelector('#large img').naturalWidth") > 100
        assert box_of(page, "#large img")["width"] > small["width"]
        page.locator("#large img").click()
        assert not page.locator("#large").is_visible()


@pytest.mark.slow
def test_the_page_on_a_phone(report_page: Path, browser: Browser) -> None:
    """390 pixels: nothing sticks out sideways, text is readable, what is pressed is large enough."""
    with opened(browser, report_page, viewport={"width": 390, "height": 844}, is_mobile=True) as page:
        page.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("parseFloat(getComputedStyle(document.querySelector('p')).fontSize)") >= 16
        assert box_of(page, ".zoom")["width"] > 300
        grids = [box_of(page, f"figure.half >> nth={n}") for n in range(2)]
        assert grids[1]["y"] > grids[0]["y"] + grids[0]["height"]
        page.locator(".zoom").first.click()
        large = box_of(page, "#large")
        assert large["x"] >= 0
        assert large["x"] + large["width"] <= 390
