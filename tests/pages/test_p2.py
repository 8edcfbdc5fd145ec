"""P2 on the page: the errors of each face, what passes, and the lengths of the noise half way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from page_reader import commands_of, flag, inputs_of, rendered, section_named, write_image, write_record

from pages import p2
from pages.inputs import FACES
from pages.results import rows

ERRORS = {
    "00": {"mse": 1.25, "largest": 31.0, "pass": True},
    "01": {"mse": 23.5, "largest": 52.0, "pass": False},
    "02": {"mse": 19.75, "largest": 44.0, "pass": True},
}


def faces_page(steps: Path, errors: dict[str, Any]) -> Any:
    """Three faces of 12.6 s in all, in 47 steps."""
    times, settings = {"drawing": 12.6}, {"steps": 47}
    write_record(steps / "p2_faces", {"reference": errors}, timings_s=times, settings=settings)
    for number in range(3):
        write_image(steps / "p2_faces" / "images" / f"{number:02d}.png", 10 + number)
    return rendered(section_named(p2.sections(inputs_of(steps)), "p2-faces"), steps)


def test_errors_against_the_courses_faces_and_their_verdicts(tmp_path: Path) -> None:
    page = faces_page(tmp_path, ERRORS)
    assert page.scores == {
        "faces within the grader's error": ("2 of 3", "all"),
        "mean squared error against the course's faces": ("14.8333", "below 20"),
    }
    assert page.tables["Against the course's faces, on 0..255"] == [
        ("noise", "mean squared error", "largest difference", "below 20"),
        ("00", "1.2500", "31", "PASS"),
        ("01", "23.5000", "52", "FAIL"),
        ("02", "19.7500", "44", "PASS"),
    ]
    assert page.marks == [("pass", "PASS"), ("fail", "FAIL"), ("pass", "PASS")]
    assert page.figures == {"3 noises, 3 faces, eta 0, 47 steps.": (10, 11, 12)}
    assert page.strips == {"P2: faces from given noises": (10, 11, 12)}


def test_without_a_reference_the_faces_are_counted_and_timed(tmp_path: Path) -> None:
    page = faces_page(tmp_path, {})
    assert page.scores == {"faces drawn by DDIM in 47 steps": ("3, 4.20 s each", "")}
    assert "Against the course's faces, on 0..255" not in page.tables


def test_the_length_of_the_noise_half_way_on_both_ways(tmp_path: Path) -> None:
    norms = {"slerp": [1.0, 0.98, 0.97, 0.99, 1.01], "linear": [1.02, 0.84, 0.71, 0.85, 1.03]}
    write_record(tmp_path / "p2_figures", {"interpolation": norms})
    names = ("eta", "eta_mse", "interpolation", "noise_norm")
    for width, name in enumerate(names, 10):
        write_image(tmp_path / "p2_figures" / f"{name}.png", width)
    page = rendered(section_named(p2.sections(inputs_of(tmp_path)), "p2-figures"), tmp_path)
    assert page.scores == {
        "length of the noise half way, slerp": ("0.97", ""),
        "length of the noise half way, linear": ("0.71", ""),
    }
    linear, slerp = (value.strip() for value in rows()["p2-noise-halfway"][1].split(";"))
    assert page.quoted == {
        "length of the noise half way, slerp": f"{slerp} p2-noise-halfway",
        "length of the noise half way, linear": f"{linear} p2-noise-halfway",
    }
    starts = {caption.split()[0]: widths for caption, widths in page.figures.items()}
    assert starts == {"A": (10,), "Mean": (11,), "Above": (12,), "In": (13,)}


def test_the_courses_network_gets_the_courses_noises_and_the_shipped_one_seeds(tmp_path: Path) -> None:
    course = {"unet": tmp_path / "UNet.pt", "noise": tmp_path / "noise", "reference": tmp_path / "GT"}
    for section, step in zip(p2.sections(inputs_of(tmp_path, **course)), ("p2_faces", "p2_figures"), strict=True):
        (command,) = commands_of(section, step)
        assert (flag(command, "--model"), flag(command, "--noise")) == (str(course["unet"]), str(course["noise"]))
        assert not {"--seeds", "--to-uint8"} & set(command)
        assert ("--reference" in command) == (step == "p2_faces")
        assert set(section.steps[0].inputs) == set(course.values())
    for section, step in zip(p2.sections(inputs_of(tmp_path)), ("p2_faces", "p2_figures"), strict=True):
        (command,) = commands_of(section, step)
        assert (flag(command, "--model"), flag(command, "--seeds")) == (str(FACES), "0-9")
        assert flag(command, "--to-uint8") == "clamp"
        assert not {"--noise", "--reference"} & set(command)
