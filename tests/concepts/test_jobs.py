"""What P3_inference.py draws: every job's prompt, files, seeds, and what its candidates are scored by."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from concepts.composition.layout import Layout
from concepts.embeddings import tokens_in
from concepts.jobs import Job, between_tokens, between_vectors, graded_jobs, layout_job, learning_commands, prompt_jobs
from runtime.cli import BadInput

DOG: dict[str, Any] = {
    "src_image": "Corgi Dog",
    "token_name": "<new1>",
    "prompt": ["A <new1> on a bench.", "A <new1> next to a <new1>."],
    "prompt_4_clip_eval": ["A dog on a bench.", "A dog next to a dog."],
    "baseline": [[79, 34.5], [74, 35]],
}
STYLE: dict[str, Any] = {
    "src_image": "David Revoy",
    "token_name": "<new2>",
    "prompt": ["Paris in the style of <new2>."],
}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """Write input.json with two concepts, and two reference pictures of each."""
    for key in ("0", "style"):
        (tmp_path / "references" / key).mkdir(parents=True)
        for name in ("b.jpg", "a.png"):
            (tmp_path / "references" / key / name).touch()
    path = tmp_path / "input.json"
    path.write_text(json.dumps({"0": DOG, "style": STYLE}))
    return path


def graded(file: Path, candidates: int, seed: int = 0) -> list[Job]:
    return graded_jobs(file, Path("out"), file.parent / "references", candidates, seed)


def test_the_graded_jobs_follow_the_file(file: Path) -> None:
    """25 files each, and one seed for each; candidates are scored by the text without the token and by the concept's pictures."""
    jobs = graded(file, 40)
    assert [(job.prompt, job.text) for job in jobs] == [
        ("A <new1> on a bench.", "A dog on a bench."),
        ("A <new1> next to a <new1>.", "A dog next to a dog."),
        ("Paris in the style of <new2>.", "Paris in the style of David Revoy."),
    ]
    assert jobs[1].files == tuple(Path(f"out/0/1/source0_prompt1_{n}.png") for n in range(25))
    assert [len(job.seeds) for job in jobs] == [40] * 3
    references = file.parent / "references"
    assert [job.references for job in jobs] == [
        (references / key / "a.png", references / key / "b.jpg") for key in ("0", "0", "style")
    ]


def test_without_candidates_there_is_a_seed_for_each_file_and_no_reference_is_wanted(
    file: Path, tmp_path: Path
) -> None:
    jobs = graded_jobs(file, Path("out"), tmp_path / "nowhere", 0, 0)
    assert [(len(job.seeds), job.references) for job in jobs] == [(25, ())] * 3
    with pytest.raises(BadInput, match="no folder 0 with pictures"):
        graded_jobs(file, Path("out"), tmp_path / "nowhere", 30, 0)


def test_the_first_candidates_have_the_seeds_that_a_run_without_them_has(file: Path) -> None:
    for few, many in zip(graded(file, 0), graded(file, 40), strict=True):
        assert many.seeds[:25] == few.seeds


def test_a_concepts_images_do_not_depend_on_other_concepts(file: Path, tmp_path: Path) -> None:
    before = {job.prompt: job.seeds for job in graded(file, 0)}
    (tmp_path / "turned.json").write_text(json.dumps({"style": STYLE, "0": DOG}))
    jobs = graded_jobs(tmp_path / "turned.json", Path("out"), Path(), 0, 0)
    assert {job.prompt: job.seeds for job in jobs} == before


def test_no_two_images_of_neighbouring_runs_and_prompts_share_a_seed(file: Path) -> None:
    prompts = [job for seed in range(4) for job in prompt_jobs(["a", "b", "c"], Path("out"), 4, 0, seed)]
    course = [job for seed in range(4) for job in graded(file, 0, seed)]
    seeds = [seed for job in prompts + course for seed in job.seeds]
    assert len(set(seeds)) == len(seeds) == 4 * (3 * 4 + 3 * 25)


def test_every_prompt_is_a_job_with_its_number() -> None:
    first, second = prompt_jobs(["a <new1>", "a house"], Path("out"), 2, 5, 7)
    assert (first.prompt, first.text, first.files) == (
        "a <new1>",
        "a <new1>",
        (Path("out/0_0.png"), Path("out/0_1.png")),
    )
    assert (second.prompt, second.files) == ("a house", (Path("out/1_0.png"), Path("out/1_1.png")))
    assert [len(job.seeds) for job in (first, second)] == [5, 5]
    assert [len(job.seeds) for job in prompt_jobs(["a"], Path("out"), 8, 5, 7)] == [8]


def test_a_layout_is_one_job_that_draws_its_joint_prompt_and_is_scored_by_its_plain_one() -> None:
    layout = Layout("a dog and a cat", (), joint="a <new1> and a <new2>")
    job = layout_job(layout, "plan", Path("out"), 2, 5, 7)
    assert (job.prompt, job.text, job.layout) == ("a <new1> and a <new2>", "a dog and a cat", layout)
    assert job.files == (Path("out/plan_0.png"), Path("out/plan_1.png"))
    (plain,) = prompt_jobs(["any"], Path("out"), 2, 5, 7)
    assert job.seeds == plain.seeds  # the noises of the first prompt, for comparisons
    assert len(layout_job(layout, "plan", Path("out"), 8, 5, 7).seeds) == 8


def test_the_commands_that_learn_tokens_take_the_words_of_the_file(file: Path) -> None:
    commands = learning_commands(["<new1>", "<new2>", "<new3>"], "M", file, Path("pictures"))
    start = 'python P3_textual_inversion.py --model "M" --images'
    assert commands == [
        f'{start} "pictures/0" --token "<new1>" --init dog',
        f'{start} "pictures/style" --token "<new2>" --init painting --kind style',
        f'{start} "FOLDER" --token "<new3>" --init WORD',
    ]


def test_each_vector_turns_in_equal_angles_and_its_norm_changes_in_equal_steps() -> None:
    """One vector turns by a right angle and grows from 1 to 5, the other by half of that and shrinks from 4 to 2."""
    a, b = torch.tensor([[1.0, 0.0], [0.0, 4.0]]), torch.tensor([[0.0, 5.0], [2**0.5, 2**0.5]])
    vectors = between_vectors({"<a>": a, "<b>": b}, ("<a>", "<b>"), 5)
    assert list(vectors) == between_tokens(("<a>", "<b>"), 5)[1:-1]
    steps = torch.stack([a, *vectors.values(), b])
    angles = torch.atan2(steps[..., 1], steps[..., 0]).rad2deg()
    norms = steps.norm(dim=2)
    torch.testing.assert_close(angles[:, 0], torch.tensor([0.0, 22.5, 45, 67.5, 90]))
    torch.testing.assert_close(angles[:, 1], torch.tensor([90.0, 78.75, 67.5, 56.25, 45]))
    torch.testing.assert_close(norms, torch.tensor([[1.0, 4], [2, 3.5], [3, 3], [4, 2.5], [5, 2]]))


@pytest.mark.parametrize("other", [torch.zeros(1, 2), torch.tensor([[-2.0, 0.0]]), torch.tensor([[2.0, 0.0]])])
def test_vectors_without_a_plane_of_their_own_stay_finite(other: torch.Tensor) -> None:
    vectors = between_vectors({"<a>": torch.tensor([[1.0, 0.0]]), "<b>": other}, ("<a>", "<b>"), 3)
    assert all(rows.isfinite().all() for rows in vectors.values())


def test_tokens_between_are_no_names_of_learned_tokens() -> None:
    between = between_tokens(("<a>", "<b>"), 4)
    assert between == ["<a>", "<1|3|a|b>", "<2|3|a|b>", "<b>"]
    assert tokens_in(" ".join(between)) == ["<a>", "<b>"]
