"""Drawing: the grader's tree and nothing else in it, seeds that belong to pictures, solvers as diffusers has them, clear refusals."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from PIL import Image
from small_pipeline import WIDTH, save_clip, save_pictures, save_pipeline
from torch import Tensor

from concepts import jobs
from concepts.attention import AttentionSampler
from concepts.clip_scores import Scorer, open_images
from concepts.composition.layout import Layout, Region, auto_layout, read_layout
from concepts.composition.masks import box_mask
from concepts.composition.multipath import ConductorConfig, LayoutRequest, Level, compose
from concepts.composition.scores import draw_layout, draw_outlines, scores_inside
from concepts.embeddings import file_of, find_vectors, install, save_vectors
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from diffusion.guidance import Guidance
from diffusion.noise import draw, generators
from P3_inference import Settings, main
from runtime.cli import BadInput, run_script
from runtime.files import ROOT
from runtime.images import open_image
from runtime.seeds import derived_seed

CPU, DEFAULT = torch.device("cpu"), ConductorConfig()
CASES = {
    "0": {"src_image": "star", "token_name": "<new1>", "prompt": ["A <new1>.", "A <new1> in the style of <new2>."]},
    "cat": {"src_image": "David Revoy", "token_name": "<new2>", "prompt": ["A star in the style of <new2>."]},
}
PAIR = ("<new1>", "<new2>")  # of one and two vectors
MOON: dict[str, Any] = {"input": None, "prompt": ("a moon", "a red star"), "attention": ("moon",)}
IN_LAYOUT: dict[str, Any] = {"input": None, "prompt": ("a <new1> and a <new2>",), "layout": "auto"}
BETWEEN: dict[str, Any] = {"input": None, "prompt": ("a {}",), "between": PAIR}


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


@pytest.fixture
def script(folder: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> Script:
    return Script(folder, model, monkeypatch)


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


def test_the_sheet_of_an_image_that_is_replaced_goes_and_no_other(script: Script) -> None:
    flags: dict[str, Any] = {"output": script.folder / "out", "steps": 1}
    script.run(**flags, count=2, attention=("star",))
    assert files_in(script.folder / "out") == ["0_0.png", "0_0_attention.png", "0_1.png", "0_1_attention.png"]
    script.run(**flags)
    assert files_in(script.folder / "out") == ["0_0.png", "0_1.png", "0_1_attention.png"]


def test_a_file_that_does_not_belong_is_named_and_kept(folder: Path, model: str) -> None:
    foreign = folder / "out" / "0" / "0" / "mine.png"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"mine")
    with pytest.raises(BadInput, match=r"mine\.png does not belong"):
        main(settings(folder, model))
    assert files_in(folder / "out") == ["0/0/mine.png"]


@pytest.mark.parametrize("solver", ["dpm", "sde"])
def test_a_picture_is_the_same_in_any_batch_and_company(folder: Path, model: str, solver: Any) -> None:
    sampler = StableDiffusionSampler(load_pipeline(model, CPU, torch.float32), SamplerConfig(solver, 3, Guidance(3.0)))
    requests = [Request(f"a {colour} star", seed) for seed, colour in enumerate(("red", "blue", "green"))]
    together = sampler.sample_images(requests).int()
    for request, image in zip(requests, together, strict=True):
        assert (sampler.sample_images([request])[0].int() - image).abs().max() <= 1
    assert (together[0] - together[1]).abs().max() > 20


# ---------------------------------------------------------------- solvers


@pytest.mark.parametrize("solver", ["ddim", "dpm", "sde"])
def test_latents_are_those_of_diffusers(model: str, solver: Any) -> None:
    """The pipeline's own call, on the same noise and with the same generator for the noise of the steps."""
    pipe = load_pipeline(model, CPU, torch.float32)
    ours = StableDiffusionSampler(pipe, SamplerConfig(solver, 5, Guidance(3.0))).latents([Request("a red star", 4)])
    if solver == "ddim":
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, timestep_spacing="leading")
    else:
        form = {"dpm": "dpmsolver++", "sde": "sde-dpmsolver++"}[solver]
        scheduler = DPMSolverMultistepScheduler.from_config(
            pipe.scheduler.config, timestep_spacing="trailing", algorithm_type=form
        )
    pipe.scheduler = scheduler
    stream = generators([4])
    start = {"latents": draw(stream, (4, 16, 16), CPU), "generator": stream}
    theirs = pipe("a red star", **start, num_inference_steps=5, guidance_scale=3.0, output_type="latent").images
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
        ({"candidates": 10**9}, "--candidates 1000000000: at most 100,000"),
        ({"input": None, "prompt": ("a",), "count": 10**9}, "--count 1000000000: at most 100,000"),
        ({"count": 2}, "--count 2: --input takes 25"),
        ({"level": "joint"}, "--level joint needs a --layout"),
        ({"interval": (0.5, 0.5)}, "--interval"),
        ({"size": 65}, "--size 65"),
        ({"config": ConductorConfig(sketch=-1.0)}, "--sketch -1"),
        ({"config": ConductorConfig(align=float("inf"))}, "--align inf"),
        ({"config": ConductorConfig(background_steps=1.5)}, "--background-steps 1.5"),
        ({"config": ConductorConfig(collage=-0.1)}, "--collage -0.1"),
        ({"config": ConductorConfig(inject=())}, "--inject"),
        ({"config": ConductorConfig(refine=True)}, "need a --layout"),
        ({"words": ("dog",)}, "--words"),
        ({"between": PAIR}, "--between <new1> <new2>: not available with --input, --layout or --candidates"),
        (BETWEEN | {"layout": "auto"}, "--between <new1> <new2>: not available"),
        (BETWEEN | {"candidates": 9}, "--between <new1> <new2>: not available"),
        (BETWEEN | {"prompt": ()}, "a single --prompt, with {} in"),
        (BETWEEN | {"prompt": ("a <new1>",)}, "a single --prompt, with {} in"),
        (BETWEEN | {"prompt": ("a {}", "one {}")}, "a single --prompt, with {} in"),
        (BETWEEN | {"count": 1}, "--count 1: --between takes 2 to 100"),
        (BETWEEN | {"count": 101}, "--count 101: --between takes 2 to 100"),
        (BETWEEN | {"between": ("<new1>", "<new1>")}, "--between <new1> <new1>: give two different tokens"),
        (BETWEEN | {"between": ("<caf\u00e9>", "<cafe\u0301>")}, "give two different tokens"),
        (BETWEEN | {"between": ("<new1>", "star")}, "--between star: give two learned tokens"),
        (BETWEEN | {"between": ("<3>", "<new1>")}, "--between <3>: give two learned tokens"),
        (BETWEEN, r"--between <new1> <new2>: vectors \[1, 32\] and \[2, 32\]"),
        (BETWEEN | {"dry_run": True}, "--between <new1> <new2>: vectors"),
        ({"attention": ("star",)}, "--attention star: not available with --input, --between or --candidates"),
        (BETWEEN | {"attention": ("a",)}, "--attention a: not available"),
        ({"input": None, "prompt": ("a",), "attention": ("a",), "candidates": 9}, "--attention a: not available"),
        ({"input": None, "prompt": ("a",), "attention": ("a",), "compile": "on"}, "--compile on .* --attention a"),
        (MOON, "--attention moon: no such word in 'a red star'"),
        (MOON | {"dry_run": True}, "--attention moon: no such word in 'a red star'"),
        (MOON | {"attention": ("",)}, "--attention : no such word"),
        (MOON | {"attention": ("<new1>",)}, "--attention <new1>: no such word in 'a moon'"),
        (
            IN_LAYOUT | {"attention": ("<new1>", "cup")},
            "--attention cup: no such word in 'a object and a object' or 'a ph",
        ),
        (
            IN_LAYOUT | {"attention": ("photo",), "level": "joint"},
            "--attention photo: no such word in 'a <new1> and a <",
        ),
        ({"figure": Path("a.png")}, r"--figure and --scores need a --layout \(--figure: or --between\)"),
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


def test_an_unknown_token_between_names_the_command_that_learns_it(folder: Path, model: str) -> None:
    with pytest.raises(BadInput, match="no vectors of <other>"):
        main(settings(folder, model, **BETWEEN | {"between": ("<new1>", "<other>")}))
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
    main(settings(folder, model, **more, steps=10, count=6, figure=folder / "figure.png", attention=("<new1>",)))
    assert f"{6 * conductor + 10 * 2 + conductor} passes" in capsys.readouterr().out
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


def test_a_layouts_token_without_vectors_is_named(folder: Path, model: str) -> None:
    more = {"input": None, "layout": "auto", "prompt": ("a <new1> next to a <other>",)}
    with pytest.raises(BadInput, match="no vectors of <other>"):
        main(settings(folder, model, **more))


# ---------------------------------------------------------------- every flag and its effect


@dataclass(frozen=True)
class Script:
    """The script on a small model: four steps of one image of "a red star", where flags say nothing else."""

    folder: Path
    model: str
    patch: pytest.MonkeyPatch

    def run(self, **changes: Any) -> dict[str, Tensor]:
        """Return the images by name, as int."""
        flags: dict[str, Any] = {
            "input": None,
            "prompt": ("a red star",),
            "embeddings": (),
            "count": 1,
            "steps": 4,
            "guidance": 7.5,
        }
        output = self.folder / f"out{len(list(self.folder.glob('out*')))}"
        main(settings(self.folder, self.model, **flags | {"batch": 0, "output": output} | changes))
        return {name: open_image(output / name).int() for name in files_in(output)}

    @property
    def record(self) -> Any:
        return json.loads((self.folder / "record.json").read_text())

    def layout(self, **more: Any) -> Path:
        """Write a layout of two things."""
        concepts = [{"token": "<new1>", "box": [0, 0, 0.5, 0.7]}, {"token": "<new2>", "box": [0.5, 0.2, 1, 1]}]
        path = self.folder / "layout.json"
        path.write_text(json.dumps({"prompt": "a red star", "concepts": concepts} | more))
        return path

    def composing(self) -> dict[str, Any]:
        """Return the flags of a layout."""
        return {"prompt": (), "layout": str(self.layout()), "embeddings": (self.folder / "learned",)}

    def sampler(self, **changes: Any) -> StableDiffusionSampler:
        """Return the sampler of these flags, which knows both tokens."""
        pipe = load_pipeline(self.model, CPU, torch.float32)
        install(pipe, find_vectors(["<new1>", "<new2>"], [self.folder / "learned"]).vectors)
        return StableDiffusionSampler(pipe, replace(SamplerConfig("dpm", 4, Guidance(7.5)), **changes))

    def attention_sampler(self, words: tuple[str, ...], **changes: Any) -> AttentionSampler:
        """Return the same sampler, which maps words."""
        plain = self.sampler(**changes)
        return AttentionSampler.of(plain.pipe, plain.config, words)

    def composed(self, layout: Layout, level: Any = "conductor", config: ConductorConfig = DEFAULT) -> Tensor:
        return compose(self.sampler(), [LayoutRequest(layout, derived_seed(0, 0, 0))], level, config)[0].int()


def assert_near(image: Tensor, expected: Tensor) -> None:
    """Up to rounding."""
    torch.testing.assert_close(image, expected.int(), rtol=0, atol=1)


@cache
def pipeline(model: str) -> Any:
    return load_pipeline(model, CPU, torch.float32)


@torch.no_grad()
def by_diffusers(
    model: str,
    prompt: str,
    seed: int,
    sampler: str = "dpm",
    steps: int = 4,
    guidance: float = 7.5,
    interval: tuple[float, float] = (0, 1),
    guidance_rescale: float = 0.0,
    negative: str = "",
    size: int = 64,
) -> Tensor:
    """Sample [3,size,size] int by the library's parts: text encoder, U-Net, scheduler, rescaling and decoder."""
    pipe = pipeline(model)
    kinds = {
        "dpm": DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing"),
        "ddim": DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading", clip_sample=False),
    }
    scheduler: Any = kinds[sampler]
    scheduler.set_timesteps(steps)
    texts = torch.cat(pipe.encode_prompt(prompt, CPU, 1, True, negative))
    x = torch.randn(4, size // 4, size // 4, generator=torch.Generator().manual_seed(seed))[None]
    for t in scheduler.timesteps:
        cond, uncond = (pipe.unet(x, t, encoder_hidden_states=text[None]).sample for text in texts)
        eps = uncond + guidance * (cond - uncond)
        eps = rescale_noise_cfg(eps, cond, guidance_rescale)
        x = scheduler.step(eps if interval[0] <= t / 1000 < interval[1] else cond, t, x).prev_sample
    image: Tensor = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample[0].clamp(-1, 1)
    return ((image + 1) * 127.5).round().int()


SAMPLED: dict[str, dict[str, Any]] = {  # flags of single images, whose names by_diffusers shares
    "sampler": {"sampler": "ddim"},
    "steps": {"steps": 7},
    "guidance": {"guidance": 3.0},
    "interval": {"interval": (0.3, 0.7)},
    "guidance_rescale": {"guidance_rescale": 0.7, "guidance": 20.0},
    "negative": {"negative": "a green moon"},
    "size": {"size": 128},
}


@pytest.mark.parametrize("flag", SAMPLED)
def test_sampling_flags_do_what_diffusers_does(script: Script, flag: str) -> None:
    flags, seed = SAMPLED[flag], derived_seed(0, 0, 0)
    without = {name: value for name, value in flags.items() if name != flag}
    expected, other = (by_diffusers(script.model, "a red star", seed, **options) for options in (flags, without))
    assert expected.shape != other.shape or (expected - other).abs().max() > 10
    assert_near(script.run(**flags)["0_0.png"], expected)


def test_the_conductors_flags_reach_the_image_from_the_command_line(
    script: Script, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What each of them does is written out in test_stages.py."""
    options = "--inject noise features --no-focus --sketch 1 --background-steps 0.8 --collage 0.3 --align 3 --refine"
    config = ConductorConfig(("noise", "features"), False, 1.0, 0.8, 0.3, 3.0, True)
    assert all(getattr(config, field.name) != getattr(DEFAULT, field.name) for field in fields(ConductorConfig))
    monkeypatch.setattr("sys.argv", ["P3_inference.py", "--model", "m", "--output", "o", *options.split()])
    read: list[Settings] = []
    with pytest.raises(SystemExit):
        run_script(read.append, Settings, None)
    assert read[0].config == config

    Image.new("RGB", (64, 64), (200, 30, 90)).save(script.folder / "reference.png")
    flags, plan = (
        script.composing(),
        read_layout(script.layout(reference="reference.png", reference_prompt="two stars")),
    )
    image = script.run(**flags, config=read[0].config)["conductor_0.png"]
    assert_near(image, script.composed(plan, config=config))


def prompts_have_numbers_and_seeds(script: Script) -> None:
    """Image n of prompt k: its seed is derived from both."""
    prompts = ("a red star", "a blue moon")
    images = script.run(prompt=prompts, count=2)
    assert list(images) == ["0_0.png", "0_1.png", "1_0.png", "1_1.png"]
    for name, image in images.items():
        k, n = int(name[0]), int(name[2])
        assert_near(image, by_diffusers(script.model, prompts[k], derived_seed(0, k, n)))


def the_seed_starts_all_seeds(script: Script) -> None:
    images = script.run(seed=7, count=2)
    for n in range(2):
        assert_near(images[f"0_{n}.png"], by_diffusers(script.model, "a red star", derived_seed(7, 0, n)))


def the_file_gives_keys_tokens_and_prompts(script: Script) -> None:
    """Tokens with the vectors of ordinary words draw what these words draw."""
    words_as_tokens(script, {"<new1>": "star", "<new2>": "moon"})
    flags = {
        "input": script.folder / "input.json",
        "prompt": (),
        "count": 4,
        "embeddings": (script.folder / "words",),
        "batch": 25,
    }
    images = script.run(**flags, steps=2, seed=6)
    for key, k, prompt in (
        ("0", 0, "A star."),
        ("0", 1, "A star in the style of moon."),
        ("cat", 0, "A star in the style of moon."),
    ):
        for n in (0, 24):
            seed = derived_seed(6, zlib.crc32(key.encode()), k, n)
            image = images[f"{key}/{k}/source{key}_prompt{k}_{n}.png"]
            assert_near(image, by_diffusers(script.model, prompt, seed, steps=2))


def words_as_tokens(script: Script, words: dict[str, str], name: str = "words") -> None:
    """Save the model's own vectors of words as vectors of tokens."""
    pipe = pipeline(script.model)
    for token, word in words.items():
        (row,) = pipe.tokenizer(word, add_special_tokens=False).input_ids
        vectors = pipe.text_encoder.get_input_embeddings().weight[[row]].detach().clone()
        save_vectors(file_of(script.folder / name, token), token, vectors, "test")


def the_first_place_with_a_token_counts(script: Script) -> None:
    words_as_tokens(script, {"<new1>": "star"}, "a")
    words_as_tokens(script, {"<new1>": "moon", "<new2>": "blue"}, "b")
    image = script.run(
        prompt=("a red <new1>",), negative="<new2>", embeddings=(script.folder / "a", script.folder / "b")
    )["0_0.png"]
    assert_near(image, by_diffusers(script.model, "a red star", derived_seed(0, 0, 0), negative="blue"))
    files = {"<new1>": script.folder / "a", "<new2>": script.folder / "b"}
    found = script.record["metrics"]["embeddings"]
    assert found == {token: str(file_of(folder, token)) for token, folder in files.items()}


def the_model_draws(script: Script) -> None:
    pipe = load_pipeline(script.model, CPU, torch.float32)
    pipe.unet.conv_out.weight.mul_(-1)
    pipe.save_pretrained(script.folder / "other")
    image = script.run(model=str(script.folder / "other"))["0_0.png"]
    assert_near(image, by_diffusers(str(script.folder / "other"), "a red star", derived_seed(0, 0, 0)))
    assert (image - by_diffusers(script.model, "a red star", derived_seed(0, 0, 0))).abs().max() > 20


def a_layout_is_composed_at_its_level(script: Script) -> None:
    flags, plan, sampler = script.composing(), read_layout(script.layout()), script.sampler(steps=2)
    for level in ("joint", "regional", "conductor"):
        images = script.run(**flags, level=level, count=2, batch=1, steps=2)
        assert list(images) == [f"{level}_0.png", f"{level}_1.png"]
        for n in range(2):
            request = LayoutRequest(plan, derived_seed(0, 0, n))
            assert_near(images[f"{level}_{n}.png"], compose(sampler, [request], level)[0])


def one_token_turns_into_another(script: Script) -> None:
    """Draw the ends as --prompt draws them, to the bit, and between them tokens of the formula's vectors, all with one seed."""
    a, b = torch.randn(2, 2, WIDTH, generator=torch.Generator().manual_seed(0))
    a, b = a * torch.tensor([[1.0], [4.0]]), torch.stack([3 * b[0], a[1] + 0.3 * b[1]])  # one turns far, one little
    norms = [rows.norm(dim=1, keepdim=True) for rows in (a, b)]
    theta = (a / norms[0] * b / norms[1]).sum(1, keepdim=True).arccos()
    vectors = {"<a>": a, "<b>": b}
    for n, alpha in ((1, 0.25), (2, 0.5), (3, 0.75)):
        direction = ((1 - alpha) * theta).sin() * a / norms[0] + (alpha * theta).sin() * b / norms[1]
        vectors[f"<step{n}>"] = ((1 - alpha) * norms[0] + alpha * norms[1]) * direction / theta.sin()
    for token, rows in vectors.items():
        save_vectors(file_of(script.folder / "pair", token), token, rows, "test")
    grids: list[Any] = []
    script.patch.setattr("P3_inference.labelled_grid", lambda *args, **_: grids.append(args))

    flags: dict[str, Any] = {"embeddings": (script.folder / "pair",), "batch": 1, "seed": 5}
    row: dict[str, Any] = {
        "prompt": ("a red {}, one {}",),
        "between": ("<a>", "<b>"),
        "figure": script.folder / "a.png",
    }
    assert script.run(**flags, **row, count=5, dry_run=True) == {}
    images = script.run(**flags, **row, count=5)
    assert list(images) == [f"between_{n}.png" for n in range(5)]
    assert list(script.record["metrics"]["embeddings"]) == ["<a>", "<b>"]
    for n, token in enumerate(("<a>", "<step1>", "<step2>", "<step3>", "<b>")):
        (expected,) = script.run(**flags, prompt=(f"a red {token}, one {token}",)).values()
        difference = int((images[f"between_{n}.png"] - expected).abs().max())
        assert difference <= (1 if token.startswith("<step") else 0)
    path, cells, rows, fractions, title = grids[0]
    assert (path, rows, title) == (script.folder / "a.png", [""], "<a> to <b>")
    assert fractions == ["0.00", "0.25", "0.50", "0.75", "1.00"]
    assert torch.equal(cells.int(), torch.stack(list(images.values())))
    assert len(script.run(**flags, **row, count=2)) == 2


def words_stand_for_tokens_in_the_base_prompt(script: Script) -> None:
    prompt = "a <new1> next to a <new2>"
    flags = script.composing() | {"prompt": (prompt,), "layout": "auto", "words": ("star", "moon")}
    regions = [
        Region("<new1>", "a photo of a <new1>", box_mask((0, 0, 0.5, 1))),
        Region("<new2>", "a photo of a <new2>", box_mask((0.5, 0, 1, 1))),
    ]
    boxes = auto_layout(prompt, {}).regions
    plan = Layout("a star next to a moon", tuple(replace(r, mask=b.mask) for r, b in zip(regions, boxes, strict=True)))
    assert_near(script.run(**flags)["conductor_0.png"], script.composed(plan))


def the_layout_is_drawn(script: Script) -> None:
    script.run(**script.composing(), draw_layout=script.folder / "plan.png", dry_run=True)
    expected = draw_layout(read_layout(script.layout()))
    assert torch.equal(open_image(script.folder / "plan.png"), expected)
    (script.folder / "plan.png").unlink()
    script.run(**script.composing(), draw_layout=script.folder / "plan.png")
    assert torch.equal(open_image(script.folder / "plan.png"), expected)


def the_figure_shows_all_levels(script: Script) -> None:
    """Draw a row per image: the layout, joint, regional, conductor."""
    grids: list[Any] = []
    script.patch.setattr("concepts.composition.scores.pixel_grid", lambda *args: grids.append(args))
    config, flags = ConductorConfig(background_steps=0.8), script.composing() | {"count": 5, "steps": 2}
    script.run(**flags, config=config, figure=script.folder / "figure.png")
    path, cells, rows, columns, title = grids[0]
    assert path == script.folder / "figure.png"
    assert rows == [""] * 4
    assert columns == ["layout", "joint", "regional", "conductor"]
    plan, sampler = read_layout(script.layout()), script.sampler(steps=2)
    requests = [LayoutRequest(plan, derived_seed(0, 0, n)) for n in range(4)]
    assert title == plan.joint
    for column, level in enumerate(get_args(Level), 1):
        expected = draw_outlines(compose(sampler, requests, level, config), plan)
        assert (cells[column::4].int() - expected.int()).abs().max() <= 1
    assert all(torch.equal(cell, draw_layout(plan, 256)) for cell in cells[::4])


def words_are_mapped_next_to_the_images(script: Script) -> None:
    """Write a sheet per image: the image and an overlay per word; images stay as they are, to the byte."""
    sheets: dict[Path, Any] = {}
    script.patch.setattr("concepts.attention.pixel_grid", lambda path, *args: sheets.update({path: args}))
    flags: dict[str, Any] = {"prompt": ("a red star", "a star"), "count": 2}
    plain, images = script.run(**flags), script.run(**flags, attention=("star", "a"), batch=3)
    for n, (path, (cells, *labels)) in enumerate(sheets.items()):
        prompt, image = divmod(n, 2)
        assert path.name == f"{prompt}_{image}_attention.png"
        assert labels == [[""], ["image", "star", "a"], flags["prompt"][prompt]]
        sampler = script.attention_sampler(("star", "a"))
        request = Request(flags["prompt"][prompt], derived_seed(0, prompt, image))
        assert_near(cells.int(), sampler.with_maps(sampler.sample_images([request]))[0])
        assert torch.equal(cells[0].int(), images[f"{prompt}_{image}.png"])
    assert len(sheets) == 4
    for name, expected in plain.items():
        assert_near(images[name], expected)


def words_are_mapped_in_a_layout_and_its_figure(script: Script) -> None:
    """Draw the figure of joint and the level, of the first image; `red` is in the base prompt."""
    grids: list[Any] = []
    script.patch.setattr("concepts.composition.scores.pixel_grid", lambda *args: grids.append(args))
    words, config, plan = ("<new1>", "red"), ConductorConfig(background_steps=0.8), read_layout(script.layout())
    flags = script.composing() | {"steps": 2, "config": config, "figure": script.folder / "figure.png"}
    files = script.run(**flags, count=2, attention=words)
    assert list(files) == [f"conductor_{n}{sheet}.png" for n in range(2) for sheet in ("", "_attention")]
    path, cells, rows, columns, title = grids[0]
    assert (path, rows, columns) == (script.folder / "figure.png", ["joint", "conductor"], ["image", *words])
    assert title == plan.joint
    sampler, request = script.attention_sampler(words, steps=2), [LayoutRequest(plan, derived_seed(0, 0, 0))]
    levels: tuple[Level, Level] = ("joint", "conductor")
    for level, row in zip(levels, cells.split(3), strict=True):
        expected = draw_outlines(sampler.with_maps(compose(sampler, request, level, config))[0], plan)
        assert_near(row.int(), expected)
    script.run(**flags, level="joint", attention=("<new1>",))
    assert grids[1][2] == ["joint"]


def concepts_are_scored_inside_their_masks(script: Script) -> None:
    clip = str(save_clip(script.folder / "clip"))
    images = script.run(**script.composing(), count=2, clip=clip, scores=True)
    whole = torch.stack(list(images.values())).to(torch.uint8)
    expected = scores_inside(Scorer.load(clip, CPU), read_layout(script.layout()), whole)
    assert script.record["metrics"]["concepts"] == dict(zip(images, expected, strict=True))


def candidates_are_ranked_by_clip_with_the_references(script: Script) -> None:
    """Image + 2.5 x text score, by the file's text for CLIP, or with the ordinary words in the token's place."""
    one = {"src_image": "star", "token_name": "<new1>", "prompt": ["A <new1>."], "prompt_4_clip_eval": ["A blue moon."]}
    (script.folder / "input.json").write_text(json.dumps({"0": one, "cat": CASES["cat"]}))
    for number, key in enumerate(("0", "cat")):
        save_pictures(script.folder / "pictures" / key, 2, seed=number)
    clip, flags = (
        str(save_clip(script.folder / "clip")),
        {"input": script.folder / "input.json", "prompt": (), "count": 4},
    )
    places = {"embeddings": (script.folder / "learned",), "references": script.folder / "pictures"}
    images = script.run(**flags, **places, steps=1, candidates=27, clip=clip, batch=27)
    scorer, sampler = Scorer.load(clip, CPU), script.sampler(steps=1)
    for key, prompt, text in (
        ("0", "A <new1>.", "A blue moon."),
        ("cat", "A star in the style of <new2>.", "A star in the style of David Revoy."),
    ):
        seeds = [derived_seed(0, zlib.crc32(key.encode()), 0, n) for n in range(27)]
        all_images = sampler.sample_images([Request(prompt, seed) for seed in seeds])
        features = scorer.encode(all_images)
        references = scorer.encode(open_images(sorted((script.folder / "pictures" / key).iterdir())))
        text_scores = (features @ scorer.encode_text(text).T * scorer.scale)[:, 0]
        total = 100 * (features @ references.T).mean(1) + 2.5 * text_scores
        best = total.argsort(descending=True, stable=True).tolist()
        for n, row in enumerate(best[:25]):
            assert_near(images[f"{key}/0/source{key}_prompt0_{n}.png"], all_images[row])


def the_batch_limits_images_at_once_and_changes_none(script: Script) -> None:
    sizes, sample = [], StableDiffusionSampler.sample_images

    def recording(sampler: StableDiffusionSampler, requests: Any) -> Tensor:
        sizes.append(len(requests))
        return sample(sampler, requests)

    script.patch.setattr(StableDiffusionSampler, "sample_images", recording)
    whole, pairs = script.run(count=4), script.run(count=4, batch=2)
    assert sizes == [4, 2, 2]
    for name, image in whole.items():
        assert_near(pairs[name], image)


def another_precision_stays_near(script: Script) -> None:
    """bf16 has 8 bits of precision, fp16 11: within 5 and 1 grey levels on average; fp32 is exact."""
    precisions, load = [], load_pipeline

    def recording(model: str, device: Any, dtype: Any) -> Any:
        precisions.append((device, dtype))
        return load(model, device, dtype)

    script.patch.setattr("P3_inference.load_pipeline", recording)
    exact, rough, near = (script.run(precision=precision)["0_0.png"] for precision in ("fp32", "bf16", "fp16"))
    assert precisions == [(CPU, torch.float32), (CPU, torch.bfloat16), (CPU, torch.float16)]
    assert_near(exact, by_diffusers(script.model, "a red star", derived_seed(0, 0, 0)))
    assert (exact - rough).abs().float().mean() < 5
    assert (exact - near).abs().float().mean() < 1


def the_device_is_used_and_recorded(script: Script) -> None:
    script.run(device="cpu")
    assert script.record["device"] == "cpu"
    with pytest.raises(BadInput, match="--device cuda:99"):
        script.run(device="cuda:99")


def compiling_is_a_choice(script: Script) -> None:
    """On a CPU only "on" compiles, and only the U-Net."""
    compiled: list[Any] = []
    script.patch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    script.patch.setattr("P3_inference.should_compile", lambda choice, machine: choice != "off")
    for choice in ("off", "auto", "on"):
        script.run(compile=choice, count=50 if choice == "auto" else 1, steps=1, size=16)
        assert compiled == (["UNet2DConditionModel"] if choice == "on" else [])


def a_dry_run_writes_nothing(script: Script) -> None:
    before = files_in(script.folder)
    assert script.run(dry_run=True) == {}
    assert files_in(script.folder) == before


def the_record_has_flags_and_results(script: Script) -> None:
    script.run(count=3, record=script.folder / "a" / "b.json")
    record = json.loads((script.folder / "a" / "b.json").read_text())
    assert record["settings"]["count"] == 3
    assert record["metrics"]["pictures"] == 3
    assert record["metrics"]["passes_per_picture"] == 4 * 2
    seconds = record["timings_s"]["drawing"]
    assert record["metrics"]["seconds_per_picture"] == pytest.approx(seconds / 3, abs=1e-3)


EFFECTS: dict[str, Callable[[Script], None]] = {  # of the other flags
    "model": the_model_draws,
    "output": prompts_have_numbers_and_seeds,
    "input": the_file_gives_keys_tokens_and_prompts,
    "prompt": prompts_have_numbers_and_seeds,
    "count": prompts_have_numbers_and_seeds,
    "between": one_token_turns_into_another,
    "layout": a_layout_is_composed_at_its_level,
    "level": a_layout_is_composed_at_its_level,
    "words": words_stand_for_tokens_in_the_base_prompt,
    "draw_layout": the_layout_is_drawn,
    "figure": the_figure_shows_all_levels,
    "attention": words_are_mapped_next_to_the_images,
    "attention in a layout": words_are_mapped_in_a_layout_and_its_figure,
    "scores": concepts_are_scored_inside_their_masks,
    "embeddings": the_first_place_with_a_token_counts,
    "candidates": candidates_are_ranked_by_clip_with_the_references,
    "clip": candidates_are_ranked_by_clip_with_the_references,
    "references": candidates_are_ranked_by_clip_with_the_references,
    "batch": the_batch_limits_images_at_once_and_changes_none,
    "seed": the_seed_starts_all_seeds,
    "device": the_device_is_used_and_recorded,
    "precision": another_precision_stays_near,
    "compile": compiling_is_a_choice,
    "dry_run": a_dry_run_writes_nothing,
    "record": the_record_has_flags_and_results,
}


@pytest.mark.parametrize("effect", list(dict.fromkeys(EFFECTS.values())), ids=lambda effect: effect.__name__)
def test_flags_have_their_effect(script: Script, effect: Callable[[Script], None]) -> None:
    effect(script)


def test_the_tables_have_a_line_for_every_flag() -> None:
    assert {*SAMPLED, *(line.split()[0] for line in EFFECTS), "config"} == {field.name for field in fields(Settings)}
