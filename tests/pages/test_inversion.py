"""Personalization on the page: scores next to their baselines, baselines with their margin, each image under its prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from page_reader import commands_of, flag, inputs_of, rendered, section_named, write_image, write_record

from pages import inversion
from pages.elements import Section
from runtime.steps import Step


def case(
    key: str, text: str, scores: tuple[float, float], baseline: tuple[float, float], passed: bool
) -> dict[str, Any]:
    """Return a case as P3_evaluate.py records it."""
    image, words = scores
    return {"key": key, "text": text, "image_score": image, "text_score": words, "baseline": baseline, "passed": passed}


CASES = [
    case("fish", "a photo of an object", (81.126, 30.254), (79.0, 28.5), True),
    case("fish", "a photo of a red object", (76.5, 27.75), (77.0, 27.5), False),
    case("cup", "a photo of a green object", (70.25, 33.125), (69.75, 34.0), False),
]


def course(folder: Path) -> dict[str, Any]:
    """Write the course's input.json with two objects and a style; return the inputs that name it."""
    entries = {
        "0": {"src_image": "corgi dog", "token_name": "<new1>", "prompt": ["A <new1> on a bench."]},
        "1": {"src_image": "David Revoy", "token_name": "<new2>", "prompt": ["A cat in the style of <new2>."]},
        "2": {"src_image": "Teapot", "token_name": "<new3>", "prompt": ["A <new3>."]},
    }
    folder.mkdir(parents=True)
    (folder / "input.json").write_text(json.dumps(entries))
    return {"model": "owner/name", "textual_inversion": folder}


def step_named(sections: list[Section], name: str) -> Step:
    (step,) = (step for section in sections for step in section.steps if step.name == name)
    return step


@pytest.mark.parametrize(("prefix", "whose"), [("miniature", "the"), ("p3", "the course's")])
def test_scores_and_baselines_of_every_prompt(prefix: str, whose: str, tmp_path: Path) -> None:
    changes = course(tmp_path / "data") if prefix == "p3" else {}
    write_record(tmp_path / f"{prefix}_scores", {"passed": 1, "cases": CASES})
    write_record(tmp_path / f"{prefix}_plain_scores", {"passed": 3, "cases": CASES[:1]})  # those of ordinary words
    write_image(tmp_path / f"{prefix}_scores" / "best.png", 10)
    page = rendered(section_named(inversion.sections(inputs_of(tmp_path, **changes)), f"{prefix}-scores"), tmp_path)
    assert page.scores == {f"prompts whose scores reach {whose} baselines": ("1 of 3", "all")}
    assert page.tables["Mean scores of the best five images"] == [
        ("concept", "graded text", "image", "baseline", "text", "baseline", ""),
        ("fish", "a photo of an object", "81.13", "79.00", "30.25", "28.50", "PASS"),
        ("fish", "a photo of a red object", "76.50", "77.00", "27.75", "27.50", "FAIL"),
        ("cup", "a photo of a green object", "70.25", "69.75", "33.12", "34.00", "FAIL"),
    ]
    assert page.marks == [("pass", "PASS"), ("fail", "FAIL"), ("fail", "FAIL")]


def test_the_miniatures_baselines_are_the_ordinary_words_scores_with_the_margin_added(tmp_path: Path) -> None:
    """5 more in image similarity, where the learned token must be better, and 1 less in the text score, where it may be worse."""
    ordinary = [
        case("fish", "", (60.0, 25.0), (0.0, 0.0), True),
        case("fish", "", (61.5, 26.5), (0.0, 0.0), True),
        case("cup", "", (62.25, 27.25), (0.0, 0.0), True),
        case("cup", "", (63.0, 28.0), (0.0, 0.0), True),
        case("ripple", "", (64.0, 29.0), (0.0, 0.0), True),
        case("ripple", "", (65.0, 30.0), (0.0, 0.0), True),
    ]
    write_record(tmp_path / "miniature_plain_scores", {"cases": ordinary})
    write_record(tmp_path / "miniature_scores", {"cases": CASES})  # the learned tokens' own scores are no baseline
    step = step_named(inversion.sections(inputs_of(tmp_path)), "miniature_graded")
    ((place, content),) = step.files.items()
    assert place == tmp_path / "miniature_graded" / "input.json"
    assert {"miniature_words", "miniature_plain_scores"} <= set(step.after)
    entries = content()
    assert {name: entry["baseline"] for name, entry in entries.items()} == {
        "fish": [[65.0, 24.0], [66.5, 25.5]],
        "cup": [[67.25, 26.25], [68.0, 27.0]],
        "ripple": [[69.0, 28.0], [70.0, 29.0]],
    }
    assert {name: entry["token_name"] for name, entry in entries.items()} == {
        "fish": "<new1>", "cup": "<new2>", "ripple": "<new3>"
    }  # fmt: skip


@pytest.mark.parametrize("quick", [False, True])
def test_the_graded_text_is_the_prompt_in_ordinary_words(quick: bool, tmp_path: Path) -> None:
    step = step_named(inversion.sections(inputs_of(tmp_path, quick=quick)), "miniature_plain")
    entries = step.files[tmp_path / "miniature_plain" / "input.json"]
    assert list(entries) == (["fish"] if quick else ["fish", "cup", "ripple"])
    assert entries["fish"]["prompt"][0] == "a photo of a <new1> on a blue background"
    assert entries["fish"]["prompt_4_clip_eval"][0] == "a photo of an object on a blue background"
    if not quick:
        assert entries["cup"]["prompt_4_clip_eval"][1] == "a photo of a green object on a white background"
        assert entries["ripple"]["prompt_4_clip_eval"][1] == "a photo of a blue ring in the style of something unusual"
    assert all(len(entry["prompt"]) == (1 if quick else 2) for entry in entries.values())


def test_ordinary_words_are_drawn_and_graded_by_themselves_and_learned_tokens_by_theirs(tmp_path: Path) -> None:
    sections = inversion.sections(inputs_of(tmp_path))
    section = section_named(sections, "miniature-scores")
    keep, draw = commands_of(section, "miniature_plain")
    assert [flag(keep, name) for name in ("--steps", "--max-norm")] == ["1", "0"]  # a training that changes nothing
    assert float(flag(keep, "--lr")) <= 1e-12
    assert flag(draw, "--embeddings") == flag(keep, "--output") == str(tmp_path / "miniature_plain" / "vectors")
    (learned,) = commands_of(section, "miniature_graded")
    assert flag(learned, "--embeddings") == str(tmp_path / "miniature_words" / "vectors")
    assert flag(learned, "--input") == str(tmp_path / "miniature_graded" / "input.json")
    for name, images in (("plain_scores", "plain"), ("scores", "graded")):
        (grade,) = commands_of(section, f"miniature_{name}")
        assert flag(grade, "--images") == str(tmp_path / f"miniature_{images}" / "images")
        assert flag(grade, "--input") == str(tmp_path / f"miniature_{images}" / "input.json")
        assert flag(grade, "--references") == str(tmp_path / "miniature_concepts")
        assert flag(grade, "--output") == str(tmp_path / f"miniature_{name}")
        assert flag(grade, "--clip") == str(tmp_path / "miniature_model" / "clip")
    (learn,) = commands_of(sections[0], "miniature_words")
    assert flag(learn, "--output") == str(tmp_path / "miniature_words" / "vectors")
    assert (flag(learn, "--steps"), flag(learn, "--batch")) == ("400", "8")
    assert not {"--recipe", "--lr"} & set(map(str, learn))  # the script's own recipe
    assert [(flag(x, "--sampler"), flag(x, "--guidance")) for x in (draw, learned)] == [("sde", "3")] * 2


def test_each_concepts_images_and_progress_stand_under_its_token(tmp_path: Path) -> None:
    write_record(tmp_path / "miniature_words", {}, timings_s={"training": 83.4, "loading": 2.0, "validation": 11.0})
    concepts = {"fish": ("<new1>", "object", 10), "cup": ("<new2>", "object", 20), "ripple": ("<new3>", "unusual", 30)}
    for name, (token, _, width) in concepts.items():
        for index in range(2):
            write_image(tmp_path / "miniature_concepts" / name / f"{index}.png", width + index)
        (tmp_path / "miniature_concepts" / name / "captions.json").write_text("{}")
        write_image(tmp_path / "miniature_words" / f"progress_{token.strip('<>')}.png", width + 5)
    write_image(tmp_path / "miniature_words" / "loss.png", 40)
    page = rendered(section_named(inversion.sections(inputs_of(tmp_path)), "miniature-words"), tmp_path)
    assert page.scores == {"tokens learned": ("3 in 83 s", "")}
    expected: dict[str, tuple[int, ...]] = {
        "Loss over the steps; most of its ups and downs are those of noise and timestep.": (40,)
    }
    for token, init, width in concepts.values():
        expected[f"{token}: all images that it is learned from, starting at “{init}”."] = (width, width + 1)
        expected[f"{token}: the same four noises after more and more steps."] = (width + 5,)
    assert page.figures == expected


def test_the_images_of_a_prompt_stand_under_it(tmp_path: Path) -> None:
    sections = inversion.sections(inputs_of(tmp_path))
    section = section_named(sections, "miniature-together")
    (command,) = commands_of(section, "miniature_together")
    prompts = flag(command, "--prompt", 0)
    assert (prompts[0], prompts[-1]) == ("a photo of a <new1>", "a photo of a <new1> next to a <new2>")
    assert flag(command, "--embeddings") == str(tmp_path / "miniature_words" / "vectors")
    for index in range(len(prompts)):
        write_image(tmp_path / "miniature_together" / "images" / f"{index}_{len(prompts) - 1 - index}.png", 10 + index)
    figures = rendered(section, tmp_path).figures
    assert figures == {f"“{prompt}”": (10 + index,) for index, prompt in enumerate(prompts)}


def test_composed_images_are_counted_and_timed(tmp_path: Path) -> None:
    sections = inversion.sections(inputs_of(tmp_path))
    section = section_named(sections, "miniature-layout")
    (command,) = commands_of(section, "miniature_layout")
    assert flag(command, "--words", 0) == ["object", "object"]
    assert flag(command, "--prompt", 0) == ["a photo of a <new1> next to a <new2>"]
    assert flag(command, "--figure") == str(tmp_path / "miniature_layout" / "levels.png")
    write_record(tmp_path / "miniature_layout", {"seconds_per_picture": 2.345, "pictures": 7})
    write_record(tmp_path / "miniature_together", {"seconds_per_picture": 9.0, "pictures": 9})
    for index in range(2):
        write_image(tmp_path / "miniature_layout" / "images" / f"0_{index}.png", 10 + index)
    write_image(tmp_path / "miniature_layout" / "levels.png", 20)
    page = rendered(section, tmp_path)
    assert page.scores == {"composed images (conductor)": ("2, 2.35 s each", "")}
    assert page.figures == {
        inversion.LEVELS: (20,),
        "“a photo of a <new1> next to a <new2>”: conductor.": (10, 11),
    }


def test_the_courses_concepts_start_from_their_words_and_are_graded_by_its_own_baselines(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path / "steps", **course(tmp_path / "data"))
    sections = inversion.sections(inputs)
    words = step_named(sections, "p3_words")
    ((place, concepts),) = words.files.items()
    assert place == tmp_path / "steps" / "p3_words" / "concepts.json"
    assert [(one["token"], one["init"], one["kind"], Path(one["images"]).name) for one in concepts] == [
        ("<new1>", "dog", "object", "0"),
        ("<new2>", "painting", "style", "1"),
        ("<new3>", "teapot", "object", "2"),
    ]
    (together,) = commands_of(section_named(sections, "p3-together"), "p3_together")
    assert flag(together, "--prompt", 0) == [
        "a photo of a <new1> in the style of <new2>",
        "A <new1> perched on a park bench with the Taipei 101 behind in the style of <new2>",
        "a <new1> next to a <new3>",
    ]
    (layout,) = commands_of(section_named(sections, "p3-layout"), "p3_layout")
    assert flag(layout, "--words", 0) == ["dog", "teapot"]
    assert flag(layout, "--guidance") == "7.5"
    scores = section_named(sections, "p3-scores")
    assert [step.name for step in scores.steps] == ["p3_graded", "p3_scores"]
    for name in ("p3_graded", "p3_scores"):
        (command,) = commands_of(scores, name)
        assert flag(command, "--input") == str(tmp_path / "data" / "input.json")
    assert flag(command, "--clip") == "clip"
    assert flag(command, "--references") == str(tmp_path / "data")
