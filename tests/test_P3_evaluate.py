"""The course's grading on a small random CLIP: number for number what a plain loop over transformers' own calls gives."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from figure_layout import assert_readable
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

import P3_evaluate
from concepts import clip_scores
from concepts.clip_scores import Scorer, open_images, pool_at_the_end, rank
from miniature.clip_model import PREPROCESSING, ClipSize, SmallClip, make_processor, model_config, to_transformers
from miniature.scenery.vocabulary import make_tokenizer
from P3_evaluate import Settings, main
from runtime.cli import BadInput
from runtime.files import ROOT, write_json
from runtime.images import read_as_graded

CPU = torch.device("cpu")
SIZE = ClipSize(embedding=32, vision_width=32, vision_layers=2, text_width=32, text_layers=2, head=16)
INPUT: dict[str, Any] = {
    "0": {
        "src_image": "star",
        "token_name": "<s>",
        "prompt": ["a <s> on a red background", "a photo of a <s>"],
        "prompt_4_clip_eval": ["a star on a red background", "a photo of a star"],
        "baseline": [[-100, -1000], [-100, 1000]],
    },
    "ring": {
        "src_image": "ring",
        "token_name": "<r>",
        "prompt": ["a <r>"],
        "prompt_4_clip_eval": ["a ring"],
        "baseline": [[101, -1000]],
    },
}


def random_picture(random: np.random.Generator, width: int, height: int) -> Image.Image:
    """Coarse random blocks: they differ also at small sizes."""
    pixels = random.integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Save a CLIP in transformers' format, with weights large enough that images and prompts differ."""
    import open_clip

    folder, tokenizer = tmp_path_factory.mktemp("clip"), make_tokenizer()
    config = model_config(SIZE, tokenizer)
    torch.manual_seed(0)
    model = open_clip.CLIP(**config)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    small = SmallClip(model, tokenizer, config, PREPROCESSING)
    to_transformers(small).save_pretrained(folder)
    make_processor(small).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def graded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """input.json, out/ with 25 pictures for each prompt, and references/ of several sizes, one turned by EXIF, one with transparency."""
    root, random = tmp_path_factory.mktemp("graded"), np.random.default_rng(0)
    write_json(root / "input.json", INPUT)
    for key, entry in INPUT.items():
        for prompt in range(len(entry["prompt"])):
            (root / "out" / key / str(prompt)).mkdir(parents=True)
            for n in range(25):
                picture = random_picture(random, 96, 96)
                picture.save(root / "out" / key / str(prompt) / f"source{key}_prompt{prompt}_{n}.png")
        (root / "references" / key).mkdir(parents=True)
        for index, (width, height) in enumerate([(80, 120), (200, 70)]):
            exif = Image.Exif()
            exif[0x0112] = 6  # stored lying on its side
            random_picture(random, width, height).save(root / "references" / key / f"{index}.jpg", exif=exif)
    random_picture(random, 64, 64).convert("RGBA").save(root / "references" / "0" / "2.PNG")
    return root


@pytest.fixture
def copy(graded: Path, tmp_path: Path) -> Path:
    return shutil.copytree(graded, tmp_path / "graded")


def run(root: Path, clip: Path | str, **more: Any) -> dict[str, Any]:
    """Run the script; return the record's metrics."""
    paths = {"images": root / "out", "input": root / "input.json", "references": root / "references"}
    settings = Settings(**{**paths, "clip": str(clip), "output": root / "runs", "device": "cpu", **more})
    main(settings)
    metrics: dict[str, Any] = json.loads((settings.output / "record.json").read_text())["metrics"]
    return metrics


def plain_scores(root: Path, clip: Path, key: str, prompt: int, pillow: bool = False) -> list[tuple[float, float]]:
    """Image and text score of each picture, straight from the grader's description: one picture and one reference at a time."""
    model, processor = CLIPModel.from_pretrained(clip).eval(), CLIPProcessor.from_pretrained(clip)
    if pillow:
        processor.image_processor = CLIPImageProcessorPil(**processor.image_processor.to_dict())
    text = INPUT[key]["prompt_4_clip_eval"][prompt]
    scores = []
    for n in range(25):
        picture = Image.open(root / "out" / key / str(prompt) / f"source{key}_prompt{prompt}_{n}.png").convert("RGB")
        inputs = processor(text=[text], images=picture, return_tensors="pt", padding=True)
        cosines = []
        with torch.no_grad():
            answer = model(**inputs)
            for path in (root / "references" / key).iterdir():
                reference = processor(images=Image.open(path).convert("RGB"), return_tensors="pt")
                theirs = model.get_image_features(**reference).pooler_output
                ours = model.get_image_features(inputs.pixel_values).pooler_output
                cosines.append(100 * torch.nn.functional.cosine_similarity(ours, theirs).item())
        scores.append((sum(cosines) / len(cosines), answer.logits_per_image.item()))
    return scores


# --------------------------------------------------------------- the grader, number for number


@pytest.fixture(scope="module")
def metrics(graded: Path, clip: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run(graded, clip, output=tmp_path_factory.mktemp("runs"))


@pytest.mark.parametrize(("row", "key", "prompt"), [(0, "0", 0), (1, "0", 1), (2, "ring", 0)])
def test_scores_ranks_and_averages_are_those_of_a_plain_loop(
    row: int, key: str, prompt: int, metrics: dict[str, Any], graded: Path, clip: Path
) -> None:
    case, scores = metrics["cases"][row], plain_scores(graded, clip, key, prompt)
    assert (case["key"], case["prompt"]) == (key, prompt)
    assert len(case["pictures"]) == 25
    for picture, (image, text) in zip(case["pictures"], scores, strict=True):
        assert picture["image_score"] == pytest.approx(image, abs=1e-4)
        assert picture["text_score"] == pytest.approx(text, abs=1e-4)
    by_value = sorted(range(25), key=lambda n: scores[n][0] + 2.5 * scores[n][1], reverse=True)
    assert [case["pictures"][n]["rank"] for n in by_value] == list(range(1, 26))
    assert case["image_score"] == pytest.approx(sum(scores[n][0] for n in by_value[:5]) / 5, abs=1e-4)
    assert case["text_score"] == pytest.approx(sum(scores[n][1] for n in by_value[:5]) / 5, abs=1e-4)


def test_the_model_tells_pictures_apart(metrics: dict[str, Any]) -> None:
    """So that agreement with the plain loop means something."""
    for case in metrics["cases"]:
        for name in ("image_score", "text_score"):
            values = [picture[name] for picture in case["pictures"]]
            assert max(values) - min(values) > 1


def test_both_scores_must_reach_the_baseline(metrics: dict[str, Any]) -> None:
    assert [case["passed"] for case in metrics["cases"]] == [True, False, False]
    assert metrics["passed"] == 1


def test_a_score_that_just_reaches_the_baseline_passes(metrics: dict[str, Any], copy: Path, clip: Path) -> None:
    reached = [metrics["cases"][2][name] for name in ("image_score", "text_score")]
    above = [reached[0], float(np.nextafter(reached[1], 1000))]
    for baseline, passed in ((reached, True), (above, False)):
        write_json(copy / "input.json", {"ring": INPUT["ring"] | {"baseline": [baseline]}})
        assert run(copy, clip)["cases"][0]["passed"] is passed


def test_a_default_folder_that_cannot_be_written_is_a_warning(
    graded: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    flags: dict[str, Any] = {
        "input": graded / "input.json",
        "images": graded / "out",
        "references": graded / "references",
    }
    with pytest.raises(BadInput, match="^--output .* a file is in the way"):
        main(Settings(**flags, clip=str(clip), output=tmp_path / "file" / "out"))
    monkeypatch.setattr(Settings, "output", tmp_path / "file" / "out")
    main(Settings(**flags, clip=str(clip), output=Settings.output))
    out, err = capsys.readouterr()
    assert "cases passed" in out
    assert "warning: no best.png and record.json, --output" in err


def test_every_file_is_decoded_once(graded: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[Path] = []

    def counted(path: Path) -> Image.Image:
        opened.append(path)
        return read_as_graded(path)

    monkeypatch.setattr(clip_scores, "read_as_graded", counted)
    run(graded, clip, output=tmp_path)
    assert len(opened) == len(set(opened)) == 3 * 25 + 3 + 2


def test_no_network_is_used_for_a_folder(
    graded: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    run(graded, clip, output=tmp_path)
    assert not asked


# --------------------------------------------------------------- every flag


@dataclass
class Trial:
    """Runs of the script on a copy of the files that may be changed, and the scores of the unchanged ones."""

    root: Path
    clip: Path
    before: dict[str, Any]
    patch: pytest.MonkeyPatch

    def scores(self, name: str, metrics: dict[str, Any] | None = None) -> list[float]:
        """Return the image or text scores of all pictures, by default those of the unchanged files."""
        cases = (metrics or self.before)["cases"]
        return [picture[name] for case in cases for picture in case["pictures"]]

    def run(self, **more: Any) -> dict[str, Any]:
        return run(self.root, more.pop("clip", self.clip), **more)


@pytest.fixture
def trial(copy: Path, clip: Path, metrics: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> Trial:
    return Trial(copy, clip, metrics, monkeypatch)


def images_flag(trial: Trial) -> None:
    """Give every picture another name in another folder, where it keeps its scores."""
    names = [f"source0_prompt1_{n}.png" for n in range(25)]
    other = shutil.copytree(trial.root / "out", trial.root / "other")
    for name, backwards in zip(names, names[::-1], strict=True):
        shutil.copy(trial.root / "out" / "0" / "1" / name, other / "0" / "1" / backwards)
    turned = trial.run(images=other)["cases"][1]["pictures"]
    for name in ("image_score", "text_score"):
        expected = [picture[name] for picture in trial.before["cases"][1]["pictures"][::-1]]
        assert [picture[name] for picture in turned] == pytest.approx(expected, abs=1e-4)


def input_flag(trial: Trial) -> None:
    """Name another concept, another text and another baseline."""
    ring = INPUT["0"] | {"prompt": ["a <s>"], "prompt_4_clip_eval": ["a photo of a star"], "baseline": [[1, 2]]}
    write_json(trial.root / "other.json", {"0": ring})
    shutil.copytree(trial.root / "out" / "0" / "0", trial.root / "one" / "0" / "0")
    (case,) = trial.run(input=trial.root / "other.json", images=trial.root / "one")["cases"]
    assert (case["text"], case["baseline"]) == ("a photo of a star", [1, 2])
    scorer = Scorer.load(str(trial.clip), CPU)
    paths = [trial.root / "out" / "0" / "0" / f"source0_prompt0_{n}.png" for n in range(25)]
    texts = scorer.text_scores(scorer.encode(open_images(paths, as_graded=True)), "a photo of a star").tolist()
    assert [picture["text_score"] for picture in case["pictures"]] == pytest.approx(texts, abs=1e-4)


def references_flag(trial: Trial) -> None:
    """Score by some references and by the rest; the score by all of them is the mean."""
    other = shutil.copytree(trial.root / "references", trial.root / "other")
    for name in ("0.jpg", "1.jpg"):
        (other / "0" / name).unlink()
    last = trial.run(references=other)["cases"][0]["pictures"]
    (trial.root / "references" / "0" / "2.PNG").unlink()
    first = trial.run()["cases"][0]["pictures"]
    whole = [(2 * a["image_score"] + b["image_score"]) / 3 for a, b in zip(first, last, strict=True)]
    assert trial.scores("image_score")[:25] == pytest.approx(whole, abs=1e-3)


def clip_flag(trial: Trial) -> None:
    """With twice the logit scale the text scores are twice as high, the image scores the same."""
    other = shutil.copytree(trial.clip, trial.root / "clip")
    weights = load_file(other / "model.safetensors")
    weights["logit_scale"] += math.log(2)
    save_file(weights, other / "model.safetensors", {"format": "pt"})
    after = trial.run(clip=other)
    assert after["clip"] == str(other)
    assert trial.scores("image_score", after) == pytest.approx(trial.scores("image_score"), abs=1e-4)
    doubled = [2 * score for score in trial.scores("text_score")]
    assert trial.scores("text_score", after) == pytest.approx(doubled, rel=1e-4)


def resizing_flag(trial: Trial) -> None:
    """Pillow's pixels give the scores that transformers' own processor with Pillow gives."""
    case = trial.run(resizing="pillow")["cases"][2]
    plain = plain_scores(trial.root, trial.clip, "ring", 0, pillow=True)
    for picture, (image, text) in zip(case["pictures"], plain, strict=True):
        assert picture["image_score"] == pytest.approx(image, abs=1e-4)
        assert picture["text_score"] == pytest.approx(text, abs=1e-4)
    others = trial.scores("text_score")[50:]
    assert any(abs(p["text_score"] - other) > 1e-3 for p, other in zip(case["pictures"], others, strict=True))


def batch_flag(trial: Trial) -> None:
    sizes: list[int] = []
    original = CLIPModel.get_image_features

    def recorded(model: CLIPModel, pixel_values: Any) -> Any:
        sizes.append(len(pixel_values))
        return original(model, pixel_values=pixel_values)

    trial.patch.setattr(CLIPModel, "get_image_features", recorded)
    few = trial.run(batch=2)
    assert max(sizes) == 2
    for name in ("image_score", "text_score"):
        assert trial.scores(name, few) == pytest.approx(trial.scores(name), abs=1e-4)
    sizes.clear()
    trial.run()
    assert max(sizes) == 25  # all pictures of a prompt


def device_flag(trial: Trial) -> None:
    with pytest.raises(BadInput, match="--device cuda:99"):
        trial.run(device="cuda:99")


def output_flag(trial: Trial) -> None:
    trial.run(output=trial.root / "results" / "one")
    assert {path.name for path in (trial.root / "results" / "one").iterdir()} == {"record.json", "best.png"}


EFFECTS: dict[str, Callable[[Trial], None]] = {
    "images": images_flag,
    "input": input_flag,
    "references": references_flag,
    "clip": clip_flag,
    "resizing": resizing_flag,
    "batch": batch_flag,
    "device": device_flag,
    "output": output_flag,
}


@pytest.mark.parametrize("flag", [field.name for field in fields(Settings)])
def test_every_flag_has_its_effect(flag: str, trial: Trial) -> None:
    EFFECTS[flag](trial)


# --------------------------------------------------------------- the scorer


def test_best_first_and_equals_in_their_order() -> None:
    image, text = torch.tensor([10.0, 0.0, 12.5, 10.0, 50.0]), torch.tensor([1.0, 5.0, 0.0, 1.0, -20.0])
    assert rank(image, text).tolist() == [0, 1, 2, 3, 4]  # 12.5 four times, then 0
    assert rank(image, text + torch.tensor([0, 0, 0.1, 0, 0])).tolist() == [2, 0, 1, 3, 4]


def test_tensors_and_pil_pictures_have_the_same_features(graded: Path, clip: Path) -> None:
    scorer = Scorer.load(str(clip), CPU)
    paths = sorted((graded / "references" / "0").iterdir())
    pictures = [Image.open(path).convert("RGB") for path in paths]
    assert torch.equal(scorer.encode(pictures), scorer.encode(open_images(paths, as_graded=True)))


def test_pillow_resizes_as_transformers_did(graded: Path, clip: Path) -> None:
    paths = sorted((graded / "references" / "0").iterdir())
    scorer, picture = Scorer.load(str(clip), CPU, "pillow"), Image.open(paths[0]).convert("RGB")
    small = picture.resize((64, 96), Image.Resampling.BICUBIC).crop((0, 16, 64, 80))
    expected = torch.from_numpy(np.array(small)).permute(2, 0, 1)[None] / 127.5 - 1
    pixels = scorer.processor(images=open_images(paths[:1], as_graded=True), return_tensors="pt").pixel_values
    torch.testing.assert_close(pixels, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("cached", "answers"), [(True, False), (False, False), (False, True)])
def test_a_clip_comes_from_the_hubs_cache_else_from_the_hub_if_it_answers(
    cached: bool, answers: bool, clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tries: list[bool] = []
    read_clip = clip_scores.read_clip

    def read(name: str) -> Any:
        assert name == "openai/clip"
        tries.append(constants.HF_HUB_OFFLINE)
        if cached or not constants.HF_HUB_OFFLINE:
            return read_clip(str(clip))
        raise OSError("not in the cache")

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(clip_scores, "hub_answers", lambda: answers)
    monkeypatch.setattr(clip_scores, "read_clip", read)
    if not cached and not answers:
        with pytest.raises(BadInput, match="it is not whole on this machine and the hub doesn't answer"):
            Scorer.load("openai/clip", CPU)
    else:
        assert Scorer.load("openai/clip", CPU).model.config.model_type == "clip"
    assert tries == ([True, False] if answers else [True])


def test_a_text_too_long_is_cut_and_reported(clip: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scorer = Scorer.load(str(clip), CPU)
    long = scorer.encode_text("a star " * 60)
    assert "122 tokens, CLIP reads the first 76" in capsys.readouterr().err
    torch.testing.assert_close(long, scorer.encode_text("a star " * 37 + "a"))
    assert not capsys.readouterr().err


def test_tokens_added_to_an_old_configuration_leave_the_pooling_at_the_end(clip: Path, tmp_path: Path) -> None:
    model: Any = CLIPModel.from_pretrained(clip)
    processor: Any = CLIPProcessor.from_pretrained(clip)
    processor.tokenizer.add_tokens(["<new1>"])
    model.text_model.resize_token_embeddings(len(processor.tokenizer))
    model.config.text_config.eos_token_id = 2
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    modern = Scorer(CLIPModel.from_pretrained(clip).eval(), processor)
    modern.model.text_model.set_input_embeddings(model.text_model.get_input_embeddings())
    text = "a photo of a <new1> on a red background"
    torch.testing.assert_close(Scorer.load(str(tmp_path), CPU).encode_text(text), modern.encode_text(text).detach())


@pytest.mark.parametrize(
    ("added", "old_end", "end"), [({}, 2, 2), ({"<a>": 9}, 2, 7), ({"<a>": 7}, 2, 2), ({"<a>": 9}, 5, 5)]
)
def test_only_an_old_end_token_that_added_tokens_exceed_is_replaced(
    added: dict[str, int], old_end: int, end: int
) -> None:
    model = SimpleNamespace(text_model=SimpleNamespace(eos_token_id=old_end))
    pool_at_the_end(model, SimpleNamespace(get_added_vocab=lambda: added, eos_token_id=7))
    assert model.text_model.eos_token_id == end


# --------------------------------------------------------------- results


def test_the_lines_of_a_run(graded: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = run(graded, clip, output=tmp_path)["cases"]
    lines = capsys.readouterr().out.splitlines()
    for case, verdict in zip(cases, ("PASS", "FAIL", "FAIL"), strict=True):
        image, text = f"{case['image_score']:.2f}", f"{case['text_score']:.2f}"
        start = lines.index(f"{case['key']}/{case['prompt']}: {case['text']}")
        assert lines[start + 1 : start + 4] == [f"CLIP Image Score: {image}", f"CLIP Text Score: {text}", verdict]
        numbers = [image, f"{case['baseline'][0]:.2f}", text, f"{case['baseline'][1]:.2f}"]
        assert [f"{case['key']}/{case['prompt']}", *numbers, verdict] in [line.split() for line in lines]
    assert lines[-1] == "1 of 3 cases passed"


def test_what_a_run_leaves_behind(graded: Path, clip: Path, tmp_path: Path) -> None:
    metrics = run(graded, clip, output=tmp_path / "runs")
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"record.json", "best.png"}
    assert Image.open(tmp_path / "runs" / "best.png").height > 600
    assert metrics["references"] == {"0": ["0.jpg", "1.jpg", "2.PNG"], "ring": ["0.jpg", "1.jpg"]}
    assert metrics["logit_scale"] == pytest.approx(CLIPModel.from_pretrained(clip).logit_scale.exp().item())


def test_the_figure_shows_each_prompts_five_best_with_their_scores(
    graded: Path, clip: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures: list[Any] = []
    monkeypatch.setattr(P3_evaluate, "save_figure", lambda _path, figure, _dpi: figures.append(figure))
    cases = run(graded, clip, output=tmp_path)["cases"]
    (figure,) = figures
    assert_readable(figure, used=0.85)
    assert figure.get_suptitle() == f"{clip}: 1 of 3 cases passed; image / text score"
    rows = [figure.axes[start : start + 5] for start in (0, 5, 10)]
    for case, row, verdict in zip(cases, rows, ("PASS", "FAIL", "FAIL"), strict=True):
        best = sorted(range(25), key=lambda n: case["pictures"][n]["rank"])[:5]
        means = f"image {case['image_score']:.2f}, text {case['text_score']:.2f}: {verdict}"
        assert row[0].get_title(loc="left") == f"{case['key']}/{case['prompt']}  {means}\n{case['text']}"
        for axis, n in zip(row, best, strict=True):
            picture = case["pictures"][n]
            assert axis.get_xlabel() == f"{n}: {picture['image_score']:.2f} / {picture['text_score']:.2f}"
            file = Image.open(graded / "out" / case["key"] / str(case["prompt"]) / picture["file"])
            difference = (
                np.asarray(file.resize((256, 256), Image.Resampling.BILINEAR), float) - axis.images[0].get_array()
            )
            assert np.abs(difference).mean() < 2


def test_another_logit_scale_than_the_courses_is_reported(
    graded: Path, clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scale = run(graded, clip, output=tmp_path)["logit_scale"]
    assert f"{scale:.2f} x cosine with this CLIP" in capsys.readouterr().err


# --------------------------------------------------------------- bad input


def test_a_missing_picture_is_named_with_the_count(copy: Path, clip: Path) -> None:
    (copy / "out" / "0" / "1" / "source0_prompt1_7.png").unlink()
    with pytest.raises(BadInput, match=r"out/0/1 holds 24 files, .*25 pictures; missing: source0_prompt1_7\.png"):
        run(copy, clip)


def test_a_file_too_many_is_named_with_the_count(copy: Path, clip: Path) -> None:
    (copy / "out" / "ring" / "0" / "notes.txt").touch()
    with pytest.raises(BadInput, match=r"out/ring/0 holds 26 files, .*25 pictures; not wanted: notes\.txt"):
        run(copy, clip)


def test_what_a_file_browser_leaves_is_skipped_with_a_line(
    copy: Path, clip: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("._source0_prompt1_7.png", ".DS_Store", "Thumbs.db"):
        (copy / "out" / "0" / "1" / name).touch()
        (copy / "references" / "0" / name).touch()
    (copy / "references" / "0" / "folder.png").mkdir()
    run(copy, clip)
    assert "Thumbs.db is skipped, but belongs in no graded folder" in capsys.readouterr().err


def test_a_folder_with_a_pictures_name_is_no_picture(copy: Path, clip: Path) -> None:
    (copy / "out" / "0" / "1" / "source0_prompt1_7.png").unlink()
    (copy / "out" / "0" / "1" / "source0_prompt1_7.png").mkdir()
    with pytest.raises(BadInput, match=r"missing: source0_prompt1_7.png, not wanted: source0_prompt1_7.png/"):
        run(copy, clip)


def test_a_prompt_without_pictures_is_named(copy: Path, clip: Path) -> None:
    shutil.rmtree(copy / "out" / "0" / "1")
    with pytest.raises(BadInput, match=r"out/0/1 is not a folder; prompt 1 of concept '0'"):
        run(copy, clip)


def test_a_broken_picture_is_named(copy: Path, clip: Path) -> None:
    path = copy / "out" / "0" / "0" / "source0_prompt0_3.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(BadInput, match=r"source0_prompt0_3\.png is not a readable picture"):
        run(copy, clip)


def test_a_concept_without_references_is_named(copy: Path, clip: Path) -> None:
    for path in (copy / "references" / "ring").iterdir():
        path.rename(path.with_suffix(".txt"))
    with pytest.raises(BadInput, match="references: folder ring holds no picture"):
        run(copy, clip)
    shutil.rmtree(copy / "references" / "ring")
    with pytest.raises(BadInput, match="references: no folder ring"):
        run(copy, clip)


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"clip": "no/such/folder"}, "--clip no/such/folder is not a folder"),
        ({"clip": str(ROOT / "tests")}, r"config\.json does not exist; --clip wants a CLIPModel"),
        ({"batch": -1}, "--batch -1"),
        ({"device": "cuda:99"}, "--device cuda:99"),
        ({"input": ROOT / "LICENSE"}, "LICENSE is not valid JSON"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(
    more: dict[str, Any], named: str, graded: Path, clip: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=named):
        run(graded, more.pop("clip", clip), output=tmp_path / "runs", **more)
    assert not (tmp_path / "runs").exists()


def test_results_never_go_among_the_graded_pictures(graded: Path, clip: Path) -> None:
    with pytest.raises(BadInput, match="lies in --images"):
        run(graded, clip, output=graded / "out" / "runs")


def without_a_tensor(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop("visual_projection.weight")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def not_finite(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["visual_projection.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def pointer(folder: Path) -> None:
    (folder / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1\n")


def truncated(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])


def changed(folder: Path, part: str | None, **values: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (config[part] if part else config).update(values)
    write_json(folder / "config.json", config)


def without_words(folder: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink()


SPOILED: dict[str, Callable[[Path], object]] = {
    "the weights lack 1 tensors, such as visual_projection.weight": without_a_tensor,
    "--clip .*clip: ": truncated,
    "visual_projection.weight holds values that are NaN": not_finite,
    "model.safetensors is a Git LFS pointer": pointer,
    "type 'siglip'": lambda folder: changed(folder, None, model_type="siglip"),
    "tokenizer.json or vocab.json is missing": without_words,
    "--clip .*: .*size": lambda folder: changed(folder, "text_config", hidden_size=64),
    "open_clip's form": lambda folder: (folder / "open_clip_config.json").touch(),
}


@pytest.mark.parametrize("named", SPOILED)
def test_a_clip_that_is_not_whole_is_named(named: str, clip: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(clip, tmp_path / "clip")
    SPOILED[named](folder)
    with pytest.raises(BadInput, match=named) as caught:
        Scorer.load(str(folder), CPU)
    assert "\n" not in str(caught.value)


def test_the_command_offline_ends_with_one_line_and_code_2(graded: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "P3_evaluate.py"), "--images", str(graded / "out")]
    command += ["--input", str(graded / "input.json"), "--references", str(graded / "references")]
    offline = {"PATH": "", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "HF_ENDPOINT": "http://127.0.0.1:9"}
    done = subprocess.run(command, capture_output=True, text=True, env=offline, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --clip openai/clip-vit-base-patch32: no such folder")
    assert "--clip FOLDER" in done.stderr
