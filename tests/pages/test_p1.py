"""P1 on the page: every number of the records stands next to its name, with retries and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from page_reader import commands_of, flag, inputs_of, rendered, section_named, write_image, write_record

from P1_model import Network, save_network
from pages import p1
from pages.results import quoted_percent

FIRST = "first try"
RETRIED = "after retries"
CLOSENESS = (
    "Closeness to real digits in the classifier's features: Frechet distance (lower is closer), share of realistic images (precision), "
    "share of the real variety (recall), share of copies of training images"
)


def grades(mnistm: float, svhn: float, distance: float) -> dict[str, Any]:
    """Return metrics as `P1_classifier.py grade` records them; no two numbers are equal."""

    def domain(accuracy: float, pictures: int, distance: float) -> dict[str, Any]:
        shares = {"precision": distance / 10, "recall": distance / 20, "copies": distance / 40}
        return {"accuracy": accuracy, "pictures": pictures, "quality": {"frechet": distance, **shares}}

    return {"mnistm": domain(mnistm, 500, distance), "svhn": domain(svhn, 400, distance + 2), "mean": 0.111}


@pytest.fixture
def steps(tmp_path: Path) -> Path:
    """Write the records of all P1 steps."""
    write_record(tmp_path / "p1_grades_plain", grades(0.9123, 0.8345, 4.0))
    write_record(tmp_path / "p1_grades_retries", grades(0.9876, 0.9564, 8.0))
    misread = {"first_try": {"mnistm": 7, "svhn": 34}, "left": {"mnistm": 1, "svhn": 2}}
    sampler = {"name": "ddim", "steps": 47, "guidance": 3.25}
    write_record(tmp_path / "p1_digits_retries", {"pictures": 900, "sampler": sampler, "misread": misread})
    for width, name in enumerate(p1.STRIP, 11):
        write_image(tmp_path / "p1_digits_retries" / "images" / f"{name}.png", width)
    other = {"pictures": 901, "sampler": {"name": "ddpm", "steps": 48}, "misread": None}
    write_record(tmp_path / "p1_digits_plain", other)
    return tmp_path


def scores_page(steps: Path, **changes: Any) -> Any:
    return rendered(section_named(p1.sections(inputs_of(steps, **changes)), "p1-scores"), steps)


BARS = "90 % simple, 95 % strong"


def test_accuracies_of_both_domains_and_their_mean_before_and_after_the_retries(steps: Path) -> None:
    page = scores_page(steps)
    assert page.scores == {
        f"MNIST-M digits read right, {FIRST}": ("91.2 %", BARS),
        f"SVHN digits read right, {FIRST}": ("83.5 %", BARS),
        f"mean of both, {FIRST}": ("87.3 %", BARS),
        f"mean of both, {RETRIED}, selected by the shipped classifiers (graded)": ("97.2 %", ""),
    }
    assert page.tables["Share of digits that the classifiers read right"] == [
        ("", "MNIST-M", "SVHN", "mean"),
        (FIRST, "0.9123", "0.8345", "0.8734"),
        (RETRIED, "0.9876", "0.9564", "0.9720"),
    ]
    assert page.strips == {"P1: digits on demand": (11, 12, 13, 14, 15)}


@pytest.mark.parametrize("course", [False, True])
def test_the_first_try_stands_next_to_its_row_of_the_results(course: bool, steps: Path) -> None:
    page = scores_page(steps, mnistm_classifier=steps / "Classifier.pth" if course else None)
    mnistm = "p1-accuracy-mnistm" + "-course" * course
    names = {
        "MNIST-M digits read right": mnistm,
        "SVHN digits read right": "p1-accuracy-svhn",
        "mean of both": "p1-accuracy-mean",
    }
    assert page.quoted == {f"{what}, {FIRST}": f"{quoted_percent(row)} {row}" for what, row in names.items()}


def test_your_own_network_is_not_compared_with_the_shipped_ones_results(steps: Path, tiny_network: Network) -> None:
    save_network(steps / "p1.safetensors", tiny_network)
    assert scores_page(steps, digits=steps / "p1.safetensors").quoted == {}


def test_the_quality_measures_stand_in_their_columns(steps: Path) -> None:
    assert scores_page(steps).tables[CLOSENESS] == [
        ("", "", "frechet", "precision", "recall", "copies"),
        ("MNIST-M", FIRST, "4", "0.4", "0.2", "0.1"),
        ("SVHN", FIRST, "6", "0.6", "0.3", "0.15"),
        ("MNIST-M", RETRIED, "8", "0.8", "0.4", "0.2"),
        ("SVHN", RETRIED, "10", "1", "0.5", "0.25"),
    ]


def test_the_demos_first_try_is_what_the_retries_began_with(steps: Path) -> None:
    """7 of 500 and 34 of 400 were misread before the first retry; the demo grades no second folder."""
    page = scores_page(steps, quick=True)
    assert page.tables["Share of digits that the classifiers read right"][1:] == [
        (FIRST, "0.9860", "0.9150", "0.9505"),
        (RETRIED, "0.9876", "0.9564", "0.9720"),
    ]
    assert page.scores[f"SVHN digits read right, {FIRST}"] == ("91.5 %", BARS)
    assert page.scores[f"MNIST-M digits read right, {FIRST}"] == ("98.6 %", BARS)
    assert page.scores[f"mean of both, {FIRST}"][0] == "95.0 %"
    assert {row[1] for row in page.tables[CLOSENESS][1:]} == {RETRIED}


def test_the_training_of_the_shipped_network_has_all_its_stages(steps: Path) -> None:
    head, *stages = scores_page(steps).tables["Training of the network: every stage, from its card"]
    assert head[:4] == ("stage", "starts from", "steps x batch", "peak lr")
    assert [stage[1:4] for stage in stages] == [
        ("random weights", "4,750 x 64", "1e-3"),
        ("stage 1", "3,500 x 64", "1e-3"),
        ("stage 2", "3,000 x 64", "1e-3"),
        ("stage 3", "1,500 x 16", "1e-3"),
    ]


def test_settings_of_sampling_and_training_are_the_graded_networks(steps: Path, tiny_network: Network) -> None:
    recipe = {"steps": 1234, "batch": 56, "lr": 0.00078, "ema": 0.99, "drop_digit": 0.1, "drop_domain": 0.2}
    origin = {"preset": "tiny", "settings": {"seed": 9}, "recipe": recipe}
    save_network(steps / "p1.safetensors", replace(tiny_network, origin=origin))
    page = scores_page(steps, digits=steps / "p1.safetensors")
    assert page.tables["Sampling"][1:] == [("name", "ddim"), ("steps", "47"), ("guidance", "3.25"), ("images", "900")]
    trained = page.pairs("Training of the network, from its file")
    assert trained == {
        "preset": "tiny",
        "T": "20",
        "seed": "9",
        **{name: f"{value:g}" for name, value in recipe.items()},
    }


@pytest.mark.parametrize(("mode", "retries"), [("plain", "0"), ("retries", "3")])
def test_each_folder_of_digits_is_drawn_with_its_retries_and_graded_by_itself(
    mode: str, retries: str, tmp_path: Path
) -> None:
    inputs = inputs_of(tmp_path, digits=tmp_path / "mine.safetensors", mnistm_classifier=tmp_path / "Classifier.pth")
    section = section_named(p1.sections(inputs), "p1-scores")
    ((draw,), (grade,)) = commands_of(section, f"p1_digits_{mode}"), commands_of(section, f"p1_grades_{mode}")
    images = str(tmp_path / f"p1_digits_{mode}" / "images")
    assert (draw[0], flag(draw, "--retries"), flag(draw, "--output")) == ("P1_inference.py", retries, images)
    assert flag(draw, "--model") == str(tmp_path / "mine.safetensors")
    assert flag(draw, "--record") == str(tmp_path / f"p1_digits_{mode}" / "record.json")
    assert (grade[:3], flag(grade, "--device")) == (["P1_classifier.py", "grade", images], "cpu")
    assert flag(grade, "--record") == str(tmp_path / f"p1_grades_{mode}" / "record.json")
    assert flag(grade, "--mnistm-classifier") == str(tmp_path / "Classifier.pth")


def test_the_demo_draws_once_and_leaves_the_sweep_out(tmp_path: Path) -> None:
    whole, demo = (p1.sections(inputs_of(tmp_path, quick=quick)) for quick in (False, True))
    assert [step.name for step in demo[0].steps] == ["p1_digits_retries", "p1_grades_retries"]
    assert len(whole[0].steps) == 4
    kinds = [flag(commands_of(section, "p1_figures")[0], "--figures", 0) for _, section in (whole, demo)]
    assert kinds == [["grid", "reverse", "animation", "diagnose", "sweep"], ["grid", "reverse"]]


def test_each_figure_of_p1_has_its_own_caption(tmp_path: Path) -> None:
    names = (
        "grid_mnistm.png", "grid_svhn.png", "reverse_process.png", "guidance_sweep.png", "denoising.webp", "label_effects.png",
    )  # fmt: skip
    for width, name in enumerate(names, 10):
        write_image(tmp_path / "p1_figures" / name, width)
    figures = rendered(section_named(p1.sections(inputs_of(tmp_path)), "p1-figures"), tmp_path).figures
    starts = {" ".join(caption.split()[:2]): widths for caption, widths in figures.items()}
    assert starts == {
        "MNIST-M, a": (10,), "SVHN, a": (11,), "From noise": (12,), "With more": (13,), "The animation:": (14,), "Another digit": (15,),
    }  # fmt: skip
