"""Drawing: the grader's tree and nothing else in it, seeds that belong to pictures, solvers as diffusers has them, clear refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from PIL import Image
from small_pipeline import WIDTH, save_clip, save_pipeline

from concepts import jobs
from concepts.clip_scores import Scorer
from concepts.composition.multipath import ConductorConfig
from concepts.embeddings import file_of, install, save_vectors
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from diffusion.guidance import Guidance
from diffusion.noise import draw, generators
from P3_inference import Settings, main
from runtime.cli import BadInput
from runtime.files import ROOT
from runtime.images import open_image

CPU = torch.device("cpu")
CASES = {
    "0": {"src_image": "star", "token_name": "<new1>", "prompt": ["A <new1>.", "A <new1> in the style of <new2>."]},
    "cat": {"src_image": "David Revoy", "token_name": "<new2>", "prompt": ["A star in the style of <new2>."]},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """input.json, and vectors of its tokens."""
    (tmp_path / "input.json").write_text(json.dumps(CASES))
    for index, token in enumerate(("<new1>", "<new2>")):
        rows = torch.randn(index + 1, WIDTH, generator=torch.Generator().manual_seed(index))
        save_vectors(file_of(tmp_path / "learned", token), token, rows, "test")
    return tmp_path


def settings(folder: Path, model: str, /, **changes: Any) -> Settings:
    flags: dict[str, Any] = {
        "model": model,
        "output": folder / "out",
        "input": folder / "input.json",
        "embeddings": (folder / "learned",),
        "steps": 1,
        "guidance": 2.0,
        "batch": 25,
        "precision": "fp32",
        "device": "cpu",
        "record": folder / "record.json",
    }
    return Settings(**flags | changes)


def files_in(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# ---------------------------------------------------------------- the tree


def test_the_graded_tree_holds_25_pictures_per_prompt_and_nothing_else(folder: Path, model: str) -> None:
    main(settings(folder, model))
    expected = [
        f"{key}/{k}/source{key}_prompt{k}_{n}.png" for key, k in (("0", 0), ("0", 1), ("cat", 0)) for n in range(25)
    ]
    assert files_in(folder / "out") == sorted(expected)
    assert Image.open(folder / "out" / expected[0]).size == (64, 64)
    assert json.loads((folder / "record.json").read_text())["metrics"]["pictures"] == 75


def test_pictures_of_an_earlier_run_are_replaced(folder: Path, model: str) -> None:
    old = folder / "out" / "0" / "7" / "source0_prompt7_3.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    main(settings(folder, model))
    assert not old.parent.exists()
    assert len(files_in(folder / "out")) == 75


def test_a_file_that_does_not_belong_is_named_and_kept(folder: Path, model: str) -> None:
    foreign = folder / "out" / "0" / "0" / "mine.png"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"mine")
    with pytest.raises(BadInput, match=r"mine\.png does not belong"):
        main(settings(folder, model))
    assert files_in(folder / "out") == ["0/0/mine.png"]


def test_a_picture_is_the_same_in_any_batch_and_company(folder: Path, model: str) -> None:
    sampler = StableDiffusionSampler(load_pipeline(model, CPU, torch.float32), SamplerConfig("dpm", 3, Guidance(3.0)))
    requests = [Request(f"a {colour} star", seed) for seed, colour in enumerate(("red", "blue", "green"))]
    together = sampler.sample_images(requests).int()
    for request, image in zip(requests, together, strict=True):
        assert (sampler.sample_images([request])[0].int() - image).abs().max() <= 1
    assert (together[0] - together[1]).abs().max() > 20


def test_any_prompts_without_a_file(folder: Path, model: str) -> None:
    main(settings(folder, model, input=None, prompt=("a red star", "a <new1>"), count=2))
    assert files_in(folder / "out") == ["0_0.png", "0_1.png", "1_0.png", "1_1.png"]


def test_the_best_of_many_are_kept(folder: Path, model: str) -> None:
    clip, prompt = str(save_clip(folder / "clip")), "a red star"
    flags: dict[str, Any] = {"input": None, "prompt": (prompt,), "clip": clip}
    main(settings(folder, model, **flags, count=2, candidates=5))
    main(settings(folder, model, **flags, count=5, output=folder / "all"))
    every = [open_image(folder / "all" / f"0_{n}.png") for n in range(5)]
    scorer = Scorer.load(clip, CPU)
    order = scorer.text_scores(scorer.encode(every), prompt).argsort(descending=True).tolist()
    for n in range(2):
        assert torch.equal(open_image(folder / "out" / f"0_{n}.png"), every[order[n]])


# ---------------------------------------------------------------- solvers


@pytest.mark.parametrize("solver", ["ddim", "dpm"])
def test_latents_are_those_of_diffusers(model: str, solver: Any) -> None:
    """The pipeline's own call, on the same noise."""
    pipe = load_pipeline(model, CPU, torch.float32)
    ours = StableDiffusionSampler(pipe, SamplerConfig(solver, 5, Guidance(3.0))).latents([Request("a red star", 4)])
    if solver == "ddim":
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="leading")
    else:
        scheduler = DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.scheduler = scheduler
    noise = draw(generators([4]), (4, 16, 16), CPU)
    theirs = pipe("a red star", latents=noise, num_inference_steps=5, guidance_scale=3.0, output_type="latent").images
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


# ---------------------------------------------------------------- refusals


def test_a_token_without_vectors_names_the_commands_that_learn_it(
    folder: Path, model: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "FOLDER", folder / "none")
    with pytest.raises(BadInput) as caught:
        main(settings(folder, model, embeddings=()))
    lines = str(caught.value).splitlines()
    assert "<new1>, <new2>" in lines[0]
    assert '--token "<new1>" --init star' in lines[1]
    assert '--token "<new2>" --init painting --kind style' in lines[2]
    assert not (folder / "out").exists()


def test_the_refusal_lists_the_tokens_that_the_files_hold(folder: Path, model: str) -> None:
    with pytest.raises(BadInput, match=r"no vectors of <New1> in .*\(tokens there: <new1>, <new2>.*\)"):
        main(settings(folder, model, input=None, prompt=("a <New1>",)))


@pytest.mark.parametrize(
    "texts",
    [
        {"prompt": ("a house",), "negative": "<nothing>"},
        {"prompt": ("a <new1>", "a <nothing> <3 you")},
        {"layout": "base"},
        {"layout": "region"},
        {"layout": "reference"},
    ],
)
@pytest.mark.parametrize("dry_run", [False, True])
def test_an_unknown_token_is_refused_in_every_text(
    folder: Path, model: str, texts: dict[str, Any], dry_run: bool
) -> None:
    if where := texts.get("layout"):
        Image.new("RGB", (64, 64)).save(folder / "reference.png")
        region = {"token": "<new1>", "box": [0, 0, 1, 1], "prompt": f"a <new1>{' <nothing>' * (where == 'region')}"}
        layout: dict[str, Any] = {"prompt": f"a star{' <nothing>' * (where == 'base')}", "concepts": [region]}
        if where == "reference":
            layout |= {"reference": "reference.png", "reference_prompt": "a <nothing>"}
        (folder / "layout.json").write_text(json.dumps(layout))
        texts = {"layout": str(folder / "layout.json")}
    with pytest.raises(BadInput, match="no vectors of <nothing>"):
        main(settings(folder, model, **{"input": None, **texts, "dry_run": dry_run}))
    assert not (folder / "out").exists()


def test_a_token_in_the_negative_prompt_counts(folder: Path, model: str) -> None:
    images = []
    for index, negative in enumerate(("", "<new2>")):
        output = folder / f"out{index}"
        main(settings(folder, model, input=None, prompt=("a star",), negative=negative, count=1, output=output))
        images.append(open_image(output / "0_0.png"))
    assert not torch.equal(*images)
    files = json.loads((folder / "record.json").read_text())["metrics"]["embeddings"]
    assert files == {"<new2>": str(folder / "learned" / "learned_new2.safetensors")}


def test_a_token_of_the_models_own_vocabulary_needs_no_file(folder: Path, model: str) -> None:
    pipe = load_pipeline(model, CPU, torch.float32)
    install(pipe, {"<Own>": torch.randn(2, WIDTH)})
    pipe.save_pretrained(folder / "extended")
    more = {"input": None, "prompt": ("a <Own> and a <new1>",), "count": 1}
    for dry_run in (True, False):
        main(settings(folder, str(folder / "extended"), **more, dry_run=dry_run))
    assert files_in(folder / "out") == ["0_0.png"]


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("learned_new1, a house", "--embeddings .*learned_new1.safetensors: no text holds its token <new1>"),
        ("a house <lora:foo:0.8>", "<lora:foo:0.8> .* not supported"),
    ],
)
def test_input_without_effect_is_refused(folder: Path, model: str, prompt: str, message: str) -> None:
    file = file_of(folder / "learned", "<new1>")
    with pytest.raises(BadInput, match=message):
        main(settings(folder, model, input=None, prompt=(prompt,), embeddings=(file,)))
    assert not (folder / "out").exists()


def test_what_is_read_as_text_is_a_line(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(torch.zeros(1, WIDTH), folder / "learned" / "Easynegative.pt")
    more = {"input": None, "prompt": ("a (red:1.3) <new1>, a <3 b, <3>, <80s>",), "dry_run": True}
    main(settings(folder, model, **more, negative="<EasyNegative v2>"))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "<80s> is read as text: no file has such a token",
        "(red:1.3) is read as text: weights of words are not supported",
        "<EasyNegative v2> is read as text, since a token has no blanks: did you mean <Easynegative>?",
    ]


def test_a_file_that_comes_second_is_a_line(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"<new1>": torch.zeros(1, WIDTH)}, folder / "b.pt")
    first = file_of(folder / "learned", "<new1>")
    more = {"input": None, "prompt": ("a <new1>",), "dry_run": True}
    main(settings(folder, model, **more, embeddings=(first, folder / "b.pt")))
    output = capsys.readouterr()
    assert output.err == f"--embeddings {folder / 'b.pt'}: <new1> is taken from {first}, which comes first\n"
    assert f"<new1>: 1 of width {WIDTH}, from {first}" in output.out


def test_a_dry_run_names_what_a_run_would_cut(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(settings(folder, model, input=None, prompt=("red " * 74 + "<new2> moon",), dry_run=True))
    assert "prompt of 79 tokens is cut at 77" in (line := capsys.readouterr().err)
    assert "cut off: <new2>_1" in line


def test_a_dry_run_refuses_a_model_without_weights(folder: Path, model: str) -> None:
    shutil.copytree(model, folder / "model")
    (folder / "model" / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(BadInput, match="its unet is unreadable .no weights there"):
        main(settings(folder, str(folder / "model"), dry_run=True))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"input": None}, "either --input FILE or --prompt TEXT"),
        ({"prompt": ("a",)}, "either --input FILE or --prompt TEXT"),
        ({"steps": 0}, "--steps 0"),
        ({"steps": 1001}, "--steps 1001"),
        ({"candidates": 3}, "--candidates 3"),
        ({"interval": (0.5, 0.5)}, "--interval"),
        ({"size": 65}, "--size 65"),
        ({"config": ConductorConfig(sketch=-1.0)}, "--sketch -1"),
        ({"config": ConductorConfig(align=float("inf"))}, "--align inf"),
        ({"config": ConductorConfig(background_steps=1.5)}, "--background-steps 1.5"),
        ({"config": ConductorConfig(collage=-0.1)}, "--collage -0.1"),
        ({"config": ConductorConfig(inject=())}, "--inject"),
        ({"config": ConductorConfig(refine=True)}, "need a --layout"),
        ({"words": ("dog",)}, "--words"),
        ({"guidance": float("nan")}, "--guidance nan"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"embeddings": (Path("/nowhere"),)}, "/nowhere"),
    ],
)
def test_bad_input_is_one_line_and_writes_nothing(
    folder: Path, model: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        main(settings(folder, model, **changes))
    assert "\n" not in str(caught.value)
    assert not (folder / "out").exists()


def test_nothing_old_is_lost_when_the_model_is_refused(folder: Path, model: str) -> None:
    old = folder / "out" / "0" / "0" / "source0_prompt0_0.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    with pytest.raises(BadInput):
        main(settings(folder, "/nowhere"))
    assert old.read_bytes() == b"old"


def test_vectors_of_another_width_are_refused(folder: Path, model: str) -> None:
    save_vectors(file_of(folder / "learned", "<new1>"), "<new1>", torch.zeros(1, 768), "test")
    with pytest.raises(BadInput, match="768 wide"):
        main(settings(folder, model))


def test_a_dry_run_draws_nothing(folder: Path, model: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(settings(folder, model, dry_run=True))
    assert "3 prompts, 75 pictures" in capsys.readouterr().out
    assert not (folder / "out").exists()


def test_a_dry_run_tells_the_time_of_the_last_run_and_refuses_what_a_run_would(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"input": None, "prompt": ("a <new1>",)}
    main(settings(folder, model, **more, dry_run=True))
    assert "the first run here will tell" in capsys.readouterr().out
    main(settings(folder, model, **more, count=1))
    main(settings(folder, model, **more, steps=2, count=600, dry_run=True))
    seconds = json.loads((folder / "record.json").read_text())["metrics"]["seconds_per_picture"]
    assert f"2,400 passes of the U-Net, about {seconds * 600 * 2 / 60:.1f} minutes" in capsys.readouterr().out
    older = json.loads((folder / "record.json").read_text())
    del older["metrics"]["passes_per_picture"]  # as records were before
    (folder / "record.json").write_text(json.dumps(older))
    main(settings(folder, model, **more, dry_run=True))
    assert "the first run here will tell" in capsys.readouterr().out
    save_vectors(file_of(folder / "learned", "<new1>"), "<new1>", torch.zeros(1, 768), "test")
    with pytest.raises(BadInput, match="768 wide"):
        main(settings(folder, model, **more, dry_run=True))


def test_a_dry_run_refuses_a_clip_and_counts_the_figures_passes(
    folder: Path, model: str, capsys: pytest.CaptureFixture[str]
) -> None:
    more = {"input": None, "layout": "auto", "prompt": ("a <new1> next to a <new2>",), "dry_run": True}
    main(settings(folder, model, **more, steps=10, count=6, figure=folder / "figure.png"))
    conductor = 7 * 2 + 4 * 4 + 2 * 10 * 2  # around the things, the branches, each thing alone
    expected = 6 * conductor + 4 * (10 * (2 + 2) + conductor)
    assert f"{expected} passes" in capsys.readouterr().out
    with pytest.raises(BadInput, match="--clip /nowhere"):
        main(settings(folder, model, **more, scores=True, clip="/nowhere"))


def test_a_word_that_is_no_token_is_refused(folder: Path, model: str) -> None:
    (folder / "input.json").write_text(json.dumps({"0": {**CASES["0"], "token_name": "new1"}}))
    with pytest.raises(BadInput, match=r"input\.json, '0': token_name new1: a token is a word in angle brackets"):
        main(settings(folder, model))


def test_candidates_want_pictures_before_anything_is_drawn(folder: Path, model: str) -> None:
    old = folder / "out" / "0" / "0" / "source0_prompt0_0.png"
    old.parent.mkdir(parents=True)
    old.write_bytes(b"old")
    with pytest.raises(BadInput, match="--references .*: no folder 0"):
        main(settings(folder, model, candidates=30, references=folder / "absent"))
    assert old.read_bytes() == b"old"


@pytest.mark.slow
def test_the_grading_script_from_another_folder(folder: Path, model: str) -> None:
    """Relative paths mean the caller's; a token without vectors exits with 2 and two commands."""
    done = subprocess.run(
        ["bash", str(ROOT / "hw2_3.sh"), "input.json", "out put/", os.path.relpath(model, folder)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 2
    assert done.stderr.count("python P3_textual_inversion.py") == 2
    assert not (folder / "out put").exists()


# ---------------------------------------------------------------- layouts


@pytest.mark.parametrize("level", ["joint", "regional", "conductor"])
def test_a_layout_is_drawn_at_every_level(folder: Path, model: str, level: Any) -> None:
    concepts = [{"token": "<new1>", "box": [0, 0, 0.5, 1]}, {"token": "<new2>", "style": True}]
    (folder / "layout.json").write_text(json.dumps({"prompt": "a star", "concepts": concepts}))
    more = {"input": None, "layout": str(folder / "layout.json"), "level": level, "count": 2}
    main(settings(folder, model, **more, draw_layout=folder / "layout.png"))
    assert files_in(folder / "out") == [f"{level}_0.png", f"{level}_1.png"]
    assert Image.open(folder / "layout.png").size == (256, 256)


def test_a_layout_is_made_of_a_prompt(folder: Path, model: str) -> None:
    more = {"input": None, "layout": "auto", "prompt": ("a <new1> next to a <new2>",), "words": ("star", "moon")}
    main(settings(folder, model, **more, count=1))
    assert files_in(folder / "out") == ["conductor_0.png"]


def test_a_layouts_token_without_vectors_is_told(folder: Path, model: str) -> None:
    more = {"input": None, "layout": "auto", "prompt": ("a <new1> next to a <other>",)}
    with pytest.raises(BadInput, match="no vectors of <other>"):
        main(settings(folder, model, **more))
