"""Personalization on the page: scores next to their baselines, baselines with their margin, each image under its prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from page_reader import commands_of, flag, inputs_of, rendered, section_named, write_image, write_record

from miniature.scenery.concepts import concept_scenes
from pages import inversion
from pages.elements import Section
from pages.personalization import WORLD
from pages.results import rows
from runtime.steps import Step


def case(
    key: str, text: str, scores: tuple[float, float], baseline: tuple[float, float], passed: bool
) -> dict[str, Any]:
    """Return a case as P3_evaluate.py records it."""
    image, words = scores
    prompt = 1 if "red" in text else 0
    pictures = [  # the later, the better
        {"file": f"source{key}_prompt{prompt}_{n}.png", "image_score": 80.0 + n, "text_score": 20.0 + n, "rank": 7 - n}
        for n in range(7)
    ]
    means = {"image_score": image, "text_score": words, "baseline": baseline, "passed": passed}
    return {"key": key, "prompt": prompt, "text": text, "pictures": pictures, **means}


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


def write_drawn(steps: Path, prefix: str, prompts: int, count: int) -> None:
    """Write images of every prompt; their widths are 10 x prompt + number + 10."""
    for prompt in range(prompts):
        for n in range(count):
            write_image(steps / f"{prefix}_drawn" / "images" / f"{prompt}_{n}.png", 10 + 10 * prompt + n)


def write_given(steps: Path, **widths: int) -> None:
    for name, width in widths.items():
        for index in range(2):
            write_image(steps / "miniature_concepts" / name / f"{index}.png", width + index)
        (steps / "miniature_concepts" / name / "captions.json").write_text("{}")


def write_strict(steps: Path, more: int = 0) -> None:
    """Write verdicts of three images each, and of `more` wrong ones; the second of both words is right, and cup's third."""
    entry = {"strict": [False, True, False, *[False] * more], "scene classifier": [True, True, False, *[False] * more]}
    write_record(
        steps / "miniature_strict", {"folders": [entry, entry | {"strict": [False, True, True, *[False] * more]}]}
    )
    for key, width in (("fish", 300), ("cup", 310)):
        for n in range(3 + more):
            write_image(steps / "miniature_graded" / "images" / key / "0" / f"source{key}_prompt0_{n}.png", width + n)


@pytest.mark.parametrize(("prefix", "whose"), [("miniature", "the"), ("p3", "the course's")])
def test_scores_baselines_and_best_images_of_every_prompt(prefix: str, whose: str, tmp_path: Path) -> None:
    changes = course(tmp_path / "data") if prefix == "p3" else {}
    for key in ("0", "1", "2"):
        write_image(tmp_path / "data" / key / "0.png", 5)
    write_given(tmp_path, fish=20, cup=30, ripple=40)
    write_drawn(tmp_path, prefix, 10, 4)
    write_strict(tmp_path, more=4)
    write_record(tmp_path / f"{prefix}_scores", {"passed": 1, "cases": CASES})
    write_record(tmp_path / f"{prefix}_plain_scores", {"passed": 3, "cases": CASES[:1]})  # those of ordinary words
    for key, prompt in (("fish", "0"), ("fish", "1"), ("cup", "0")):
        for n in range(7):
            path = tmp_path / f"{prefix}_graded" / "images" / key / prompt / f"source{key}_prompt{prompt}_{n}.png"
            write_image(path, 200 + n)
    page = rendered(section_named(inversion.sections(inputs_of(tmp_path, **changes)), f"{prefix}-drawn"), tmp_path)
    assert page.scores[f"prompts whose scores reach {whose} baselines"] == ("1 of 3", "all")
    assert page.tables["Mean scores of the best five images"] == [
        ("concept", "graded text", "image", "baseline", "text", "baseline", ""),
        ("fish", "a photo of an object", "81.13", "79.00", "30.25", "28.50", "PASS"),
        ("fish", "a photo of a red object", "76.50", "77.00", "27.75", "27.50", "FAIL"),
        ("cup", "a photo of a green object", "70.25", "69.75", "33.12", "34.00", "FAIL"),
    ]
    assert page.marks == [("pass", "PASS"), ("fail", "FAIL"), ("fail", "FAIL")]
    best = "“a photo of a red object”: the best five of 7 images."
    assert page.figures[best] == (206, 205, 204, 203, 202)
    assert page.labels[best][0] == "image 86.0, text 26.0"


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
    assert {"miniature_objects", "miniature_styles", "miniature_plain_scores"} <= set(step.after)
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
    sections = inversion.sections(inputs_of(tmp_path, quick=quick))
    name = "miniature_graded" if quick else "miniature_plain"  # the demo measures no baselines
    entries = step_named(sections, name).files[tmp_path / name / "input.json"]
    assert list(entries) == (["fish", "cup"] if quick else ["fish", "cup", "ripple"])
    assert entries["fish"]["prompt"][0] == "a photo of a green <new1> on a white background"
    assert entries["fish"]["prompt_4_clip_eval"][0] == "a photo of a green object on a white background"
    if not quick:
        assert entries["cup"]["prompt_4_clip_eval"][1] == "a photo of a green object on a grey background"
        assert entries["ripple"]["prompt_4_clip_eval"][1] == "a photo of a pink house in the style of something unusual"
    assert all(len(entry["prompt"]) == (1 if quick else 2) for entry in entries.values())


def test_prompts_of_objects_ask_for_colours_that_no_given_image_shows() -> None:
    for key in ("fish", "cup"):
        scenes = concept_scenes(key, 5, 0)  # as `world.py concept` renders them
        one = WORLD[key]
        colour, ground = one.colours
        assert colour not in {scene.things[0].colour for scene in scenes}
        assert ground not in {scene.background.colour for scene in scenes}
        assert one.graded[0] == "a photo of a {} {{}} on a {} background".format(*one.colours)
        assert all(text.count("{}") == 1 for text in (*one.graded, *one.prompts))
        assert {scene.style for scene in scenes} == {"flat"}


def test_ordinary_words_are_drawn_and_graded_by_themselves_and_learned_tokens_by_theirs(tmp_path: Path) -> None:
    sections = inversion.sections(inputs_of(tmp_path))
    section = section_named(sections, "miniature-drawn")
    keep, draw = commands_of(section, "miniature_plain")
    assert [flag(keep, name) for name in ("--steps", "--max-norm")] == ["1", "0"]  # a training that changes nothing
    assert float(flag(keep, "--lr")) <= 1e-12
    assert flag(draw, "--embeddings") == flag(keep, "--output") == str(tmp_path / "miniature_plain" / "vectors")
    (learned,) = commands_of(section, "miniature_graded")
    vectors = [str(tmp_path / f"miniature_{kind}s" / "vectors") for kind in ("object", "style")]
    assert flag(learned, "--embeddings", 0) == vectors
    assert flag(learned, "--input") == str(tmp_path / "miniature_graded" / "input.json")
    for name, images in (("plain_scores", "plain"), ("scores", "graded")):
        (grade,) = commands_of(section, f"miniature_{name}")
        assert flag(grade, "--images") == str(tmp_path / f"miniature_{images}" / "images")
        assert flag(grade, "--input") == str(tmp_path / f"miniature_{images}" / "input.json")
        assert flag(grade, "--references") == str(tmp_path / "miniature_concepts")
        assert flag(grade, "--output") == str(tmp_path / f"miniature_{name}")
        assert flag(grade, "--clip") == str(tmp_path / "miniature_model" / "clip")
    assert [(flag(x, "--sampler"), flag(x, "--guidance")) for x in (draw, learned)] == [("sde", "3")] * 2


@pytest.mark.parametrize("quick", [False, True])
def test_concepts_of_a_kind_are_learned_in_one_run_by_the_scripts_own_recipe(quick: bool, tmp_path: Path) -> None:
    section = section_named(inversion.sections(inputs_of(tmp_path, quick=quick)), "miniature-words")
    kinds = {"object": ["<new1>", "<new2>"]} | ({} if quick else {"style": ["<new3>"]})
    for kind, tokens in kinds.items():
        place = tmp_path / f"miniature_{kind}s"
        (learn,) = commands_of(section, place.name)
        assert flag(learn, "--output") == str(place / "vectors")
        assert not {"--recipe", "--lr", "--steps", "--batch"} & set(learn)
        concepts = step_named([section], place.name).files[place / "concepts.json"]
        assert [one["token"] for one in concepts] == tokens
        assert all("vectors" not in one for one in concepts)
    assert [step.name for step in section.steps][2:] == [f"miniature_{kind}s" for kind in kinds]


def test_the_strict_measure_judges_the_graded_images_by_what_their_prompts_name(tmp_path: Path) -> None:
    sections = inversion.sections(inputs_of(tmp_path, quick=True))
    section = section_named(sections, "miniature-drawn")
    (command,) = commands_of(section, "miniature_strict")
    folders = [str(tmp_path / "miniature_graded" / "images" / key / "0") for key in ("fish", "cup")]
    assert command[:4] == ["benchmarks/p3_strict.py", "images", *folders]
    assert flag(command, "--kind", 0) == ["fish", "cup"]
    assert flag(command, "--colour", 0) == ["green", "purple"]
    assert flag(command, "--background", 0) == ["white", "white"]
    assert [step.name for step in section.steps] == ["miniature_drawn", "miniature_graded", "miniature_strict"]


def test_strictly_right_images_are_marked_counted_and_compared_with_the_results(tmp_path: Path) -> None:
    write_given(tmp_path, fish=20, cup=30)
    write_drawn(tmp_path, "miniature", 8, 2)
    write_strict(tmp_path)
    sections = inversion.sections(inputs_of(tmp_path, quick=True))
    page = rendered(section_named(sections, "miniature-drawn"), tmp_path)
    assert page.scores == {
        "new word for a fish: images that are strictly right": ("33.3 % of 3", ""),
        "new word for a cup: images that are strictly right": ("66.7 % of 3", ""),
    }
    _, fish, _, cup = (f"{100 * float(value):.1f} %" for value in rows()["words-strict"][1].split(";"))
    assert page.quoted == {
        "new word for a fish: images that are strictly right": f"{fish} words-strict",
        "new word for a cup: images that are strictly right": f"{cup} words-strict",
    }
    (table,) = (cells for caption, cells in page.tables.items() if caption.startswith("Right images: strictly"))
    assert table[1:] == [
        ("<new1>, a fish", "a photo of a green <new1> on a white background", "1 of 3", "2 of 3", fish),
        ("<new2>, a cup", "a photo of a purple <new2> on a white background", "2 of 3", "2 of 3", cup),
    ]
    all_fish = "“a photo of a green <new1> on a white background”: all 3 images. Right ones are marked."
    assert (page.figures[all_fish], page.labels[all_fish]) == ((300, 301, 302), ["–", "✓", "–"])


def test_what_prompts_draw_stands_next_to_the_given_images_with_each_prompt_under_its_image(tmp_path: Path) -> None:
    write_given(tmp_path, fish=20, cup=30)
    write_drawn(tmp_path, "miniature", 8, 2)
    write_strict(tmp_path)
    sections = inversion.sections(inputs_of(tmp_path, quick=True))
    section = section_named(sections, "miniature-drawn")
    (command,) = commands_of(section, "miniature_drawn")
    prompts = flag(command, "--prompt", 0)
    assert flag(command, "--count") == "2"
    assert flag(command, "--embeddings") == str(tmp_path / "miniature_objects" / "vectors")
    page = rendered(section, tmp_path)
    for token, first, given in (("<new1>", 0, (20, 21)), ("<new2>", 4, (30, 31))):
        own = prompts[first : first + 4]
        assert all(token in prompt for prompt in own)
        drawn = f"{token}: what prompts draw, in 2 seeds."
        assert page.figures[f"{token}: the given images."] == given
        assert page.labels[drawn] == own * 2  # a row per seed
        assert page.figures[drawn] == tuple(10 + 10 * (first + k) + n for n in range(2) for k in range(4))
    assert page.strips == {"P3: a learned word: given, and drawn": (20, 21, 10, 20, 30, 40)}


def test_each_concepts_images_and_progress_stand_under_its_token(tmp_path: Path) -> None:
    times = {"loading": 2.0, "validation": 11.0}
    write_record(tmp_path / "miniature_objects", {}, timings_s={"training": 83.4} | times)
    write_record(tmp_path / "miniature_styles", {}, timings_s={"training": 16.6} | times)
    concepts = {"fish": ("<new1>", "object", 10), "cup": ("<new2>", "object", 20), "ripple": ("<new3>", "unusual", 30)}
    write_given(tmp_path, **{name: width for name, (_, _, width) in concepts.items()})
    for token, init, width in concepts.values():
        folder = "miniature_styles" if init == "unusual" else "miniature_objects"
        write_image(tmp_path / folder / f"progress_{token.strip('<>')}.png", width + 5)
    page = rendered(section_named(inversion.sections(inputs_of(tmp_path)), "miniature-words"), tmp_path)
    assert page.scores == {"words learned": ("3 in 100 s", "")}
    expected: dict[str, tuple[int, ...]] = {}
    for token, init, width in concepts.values():
        expected[f"{token}: all images that it is learned from, starting at “{init}”."] = (width, width + 1)
        expected[f"{token}: the same four noises after more and more steps."] = (width + 5,)
    assert page.figures == expected


@pytest.mark.parametrize(("quick", "count"), [(True, "2"), (False, "4")])
def test_composed_images_are_counted_and_timed(quick: bool, count: str, tmp_path: Path) -> None:
    section = section_named(inversion.sections(inputs_of(tmp_path, quick=quick)), "miniature-layout")
    (command,) = commands_of(section, "miniature_layout")
    assert flag(command, "--words", 0) == ["object", "object"]
    assert flag(command, "--prompt", 0) == ["a photo of a <new1> next to a <new2>"]
    assert flag(command, "--count") == count
    assert flag(command, "--figure") == str(tmp_path / "miniature_layout" / "levels.png")
    write_record(tmp_path / "miniature_layout", {"seconds_per_picture": 2.345, "pictures": 7})
    write_record(tmp_path / "miniature_drawn", {"seconds_per_picture": 9.0, "pictures": 9})
    write_image(tmp_path / "miniature_layout" / "levels.png", 20)
    page = rendered(section, tmp_path)
    assert page.scores == {"images with a concept in each place": ("7, 2.35 s each", "")}
    assert page.figures == {inversion.LEVELS: (20,)}


def test_the_courses_concepts_start_from_their_words_and_are_graded_by_its_own_baselines(tmp_path: Path) -> None:
    inputs = inputs_of(tmp_path / "steps", **course(tmp_path / "data"))
    sections = inversion.sections(inputs)
    learned = {kind: step_named(sections, f"p3_{kind}s") for kind in ("object", "style")}
    concepts = {kind: step.files[tmp_path / "steps" / step.name / "concepts.json"] for kind, step in learned.items()}
    named = [
        (one["token"], one["init"], one["kind"], Path(one["images"]).name) for own in concepts.values() for one in own
    ]
    assert named == [
        ("<new1>", "dog", "object", "0"),
        ("<new3>", "teapot", "object", "2"),
        ("<new2>", "painting", "style", "1"),
    ]
    drawn = section_named(sections, "p3-drawn")
    (together,) = commands_of(drawn, "p3_drawn")
    assert flag(together, "--prompt", 0) == [
        "a photo of a <new1> in the style of <new2>",
        "A <new1> perched on a park bench with the Taipei 101 behind in the style of <new2>",
    ]
    (layout,) = commands_of(section_named(sections, "p3-layout"), "p3_layout")
    assert flag(layout, "--words", 0) == ["dog", "teapot"]
    assert flag(layout, "--prompt") == "a <new1> next to a <new3>"
    assert flag(layout, "--guidance") == "7.5"
    assert [step.name for step in drawn.steps] == ["p3_drawn", "p3_graded", "p3_scores"]
    for name in ("p3_graded", "p3_scores"):
        (command,) = commands_of(drawn, name)
        assert flag(command, "--input") == str(tmp_path / "data" / "input.json")
    assert flag(command, "--clip") == "clip"
    assert flag(command, "--references") == str(tmp_path / "data")
