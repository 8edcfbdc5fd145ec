"""Zero-shot classification on a small open_clip model with random weights on disk: exact, cached, and clear about bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import P3_clip_weights
from P3_clip import load
from P3_clip_features import encode_all, logits_of
from P3_clip_weights import find_weights, matching_activation, resolve, tag_of_file
from P3_clip_zeroshot import main
from P3_pictures import Pictures, list_pictures, read_labels
from P3_prompts import CIFAR, fill, fillers, templates_of
from P3_zeroshot_report import PUBLISHED, Result, accuracies, cases, confused_pairs, per_class, published
from P3_zeroshot_settings import PRESETS, Choice, Settings, parse_choice
from runtime.cli import BadInput

ROOT = Path(__file__).resolve().parents[1]
STANDIN = ROOT.parent / "shared" / "data" / "clip_zeroshot_standin.tar.gz"
CPU = torch.device("cpu")
CONFIG = {
    "embed_dim": 32,
    "vision_cfg": {"image_size": 48, "layers": 2, "width": 64, "patch_size": 16, "head_width": 32},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
PREPROCESSING = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.25, 0.3]}  # unlike the default, so that ignoring it shows
NAMES = ["apple", "oak_tree", "willow_tree", "streetcar", "bee", "sweet_pepper"]


def save_model(folder: Path, seed: int) -> None:
    """A random model in open_clip's folder form; weights large enough that pictures and prompts differ."""
    torch.manual_seed(seed)
    model = open_clip.CLIP(**CONFIG)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    folder.mkdir()
    config = {"model_cfg": CONFIG, "preprocess_cfg": PREPROCESSING}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")


def save_archive(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The tensors as a TorchScript module with their names, as OpenAI published its models."""
    root = torch.nn.Module()
    for name, tensor in tensors.items():
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if parent not in dict(module.named_children()):
                module.add_module(parent, torch.nn.Module())
            module = module.get_submodule(parent)
        module.register_buffer(leaf, tensor)
    torch.jit.script(root).save(path)


@pytest.fixture(scope="session")
def clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The model's name; "tiny-clip" (GELU) and "tiny-clip-quickgelu" are known to open_clip as architectures as well."""
    folder = tmp_path_factory.mktemp("clip")
    save_model(folder / "tiny", seed=0)
    (folder / "archs").mkdir()
    for name, extra in (("tiny-clip", {}), ("tiny-clip-quickgelu", {"quick_gelu": True})):
        (folder / "archs" / f"{name}.json").write_text(json.dumps(CONFIG | extra))
    open_clip.add_model_config(folder / "archs")
    return f"local-dir:{folder / 'tiny'}"


@pytest.fixture(scope="session")
def weights(clip: str) -> Path:
    """The weights file of that model."""
    return Path(clip.removeprefix("local-dir:")) / "open_clip_model.safetensors"


@pytest.fixture(scope="session")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 pictures of 6 classes and id2label.json beside them; class 5 has no picture of number 10 or more."""
    root = tmp_path_factory.mktemp("data")
    (root / "val").mkdir()
    random = np.random.default_rng(0)
    for number in range(len(NAMES)):
        for index in (7, 8, 9, 10, 11):
            pixels = random.integers(0, 256, 3) * 0.5 + random.integers(0, 256, (8, 8, 3)) * 0.5
            picture = Image.fromarray(pixels.astype(np.uint8)).resize((32, 32), Image.Resampling.NEAREST)
            picture.save(root / "val" / f"{number}_{index}.png")
    (root / "id2label.json").write_text(json.dumps({str(k): v for k, v in enumerate(NAMES)}))
    return root / "val"


def run(tmp_path: Path, images: Path, clip: str, **more: Any) -> dict[str, Any]:
    """The script's main with a folder of its own; returns record.json."""
    given = {"images": images, "model": clip, "output": tmp_path / "out", "cache": tmp_path / "cache", **more}
    main(Settings(**given))
    record = given["output"] / "record.json"
    return json.loads(record.read_text()) if record.is_file() else {}


def pictures_of(images: Path) -> Pictures:
    return list_pictures(images, images.parent / "id2label.json")


def relative(left: torch.Tensor, right: torch.Tensor) -> float:
    return float((left - right).abs().max() / right.abs().max())


# ---------------------------------------------------------------- exactness


@pytest.mark.parametrize(("prompts", "names"), [("report", "raw"), ("cifar", "clean")])
def test_logits_equal_open_clips_plain_api(prompts: str, names: Any, clip: str, images: Path) -> None:
    ours, pictures = load(resolve(clip, None), CPU), pictures_of(images)
    templates = templates_of(prompts)
    classifier = ours.classifier(pictures.names, fillers(templates, names))
    logits = logits_of(encode_all(ours, pictures, 8, 2), classifier, ours.scale, ours.bias)

    model, _, preprocess = open_clip.create_model_and_transforms(clip)
    model.eval()
    texts = [t.replace("{}", "{0}") for t in templates]
    named = [name.replace("_", " ") for name in NAMES] if names == "clean" else NAMES
    if names == "clean":
        texts = [(lambda c, t=t: re.sub(r"\ba (?=[aeiou])", "a" + "n ", t.format(c))) for t in texts]
    with torch.no_grad():
        heads = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(clip), named, texts)
        batch = torch.stack([preprocess(Image.open(path)) for path in pictures.paths])
        plain = model.logit_scale.exp() * model.encode_image(batch, normalize=True) @ heads
    assert relative(logits, plain) <= 1e-5
    assert torch.equal(logits.argmax(1), plain.argmax(1))
    assert len(set(plain.argmax(1).tolist())) > 1  # the model tells pictures apart, so agreement means something


def test_logits_equal_an_independent_loop_over_pictures_and_prompts(clip: str, weights: Path, images: Path) -> None:
    """No open_clip transform, classifier builder or loader: Pillow, numpy and the two towers."""
    ours, pictures = load(resolve(clip, None), CPU), pictures_of(images)
    classifier = ours.classifier(pictures.names, fillers(CIFAR, "raw"))
    logits = logits_of(encode_all(ours, pictures, 8, 2), classifier, ours.scale, ours.bias)

    model = open_clip.CLIP(**CONFIG).eval()
    model.load_state_dict(load_file(weights))
    mean, std = np.array(PREPROCESSING["mean"]), np.array(PREPROCESSING["std"])
    with torch.no_grad():
        heads = []
        for name in NAMES:
            vectors = [model.encode_text(open_clip.tokenize([t.replace("{}", name)]))[0] for t in CIFAR]
            mean_vector = torch.stack([v / v.norm() for v in vectors]).mean(0)
            heads.append(mean_vector / mean_vector.norm())
        for row, path in enumerate(pictures.paths):
            pixels = np.asarray(Image.open(path).resize((48, 48), Image.Resampling.BICUBIC)) / 255
            image = torch.tensor(((pixels - mean) / std).transpose(2, 0, 1), dtype=torch.float32)
            vector = model.encode_image(image[None])[0]
            expected = torch.stack([model.logit_scale.exp() * (vector / vector.norm()) @ head for head in heads])
            assert relative(logits[row], expected) <= 1e-5


def test_the_run_predicts_what_the_plain_api_predicts(clip: str, images: Path, tmp_path: Path) -> None:
    run(tmp_path, images, clip, prompts="single", names="raw")
    model, _, preprocess = open_clip.create_model_and_transforms(clip)
    texts = open_clip.get_tokenizer(clip)([f"a photo of a {name}." for name in NAMES])
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert len(table) == 30
    with torch.no_grad():
        for row in table.itertuples():
            logits = model.eval()(preprocess(Image.open(images / row.file))[None], texts)
            shares = (logits[0] @ logits[1].T * logits[2]).softmax(1)[0]
            assert row.predicted == NAMES[int(shares.argmax())]
            assert row.probability == pytest.approx(float(shares.max()), abs=1e-5)
            assert row.truth == NAMES[int(row.file.split("_")[0])]
            assert row.top5.split("|") == [NAMES[i] for i in shares.topk(5).indices]


def test_the_batch_changes_no_feature(clip: str, images: Path) -> None:
    ours, pictures = load(resolve(clip, None), CPU), pictures_of(images)
    one, seven, all_at_once = (encode_all(ours, pictures, batch, 2) for batch in (1, 7, 64))
    torch.testing.assert_close(one, seven, rtol=0, atol=1e-6)
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-6)
    assert one.norm(dim=1) == pytest.approx(torch.ones(30))


def test_a_weights_file_on_an_architecture_equals_the_whole_folder(clip: str, weights: Path, images: Path) -> None:
    from_file, pictures = load(resolve("tiny-clip", str(weights)), CPU), pictures_of(images)
    whole = load(resolve(clip, None), CPU)
    named = [fillers(templates_of("single"), "raw")] * 2
    left, right = (m.classifier(NAMES, t) for m, t in zip((from_file, whole), named, strict=True))
    assert torch.equal(left, right)
    assert not torch.equal(encode_all(from_file, pictures, 8, 1), encode_all(whole, pictures, 8, 1))  # its transform


def test_openais_archive_is_read_without_pickle(weights: Path, tmp_path: Path) -> None:
    """A TorchScript file in half precision, as ViT-B-32.pt is; it has QuickGELU without being told."""
    halves = {name: tensor.half() for name, tensor in load_file(weights).items()}
    save_archive(tmp_path / "tiny.pt", halves | {"input_resolution": torch.tensor(48)})
    source = resolve("tiny-clip", str(tmp_path / "tiny.pt"))
    assert source.quick_gelu
    ours = load(source, CPU)
    assert all(torch.equal(tensor, halves[name].float()) for name, tensor in ours.model.state_dict().items())
    assert type(ours.model.visual.transformer.resblocks[0].mlp.gelu).__name__ == "QuickGELU"


# ---------------------------------------------------------------- prompts, names, settings


def test_the_prompt_sets() -> None:
    assert templates_of("report") == ("A photo of {}",)
    assert templates_of("single") == ("a photo of a {}.",)
    assert len(set(CIFAR)) == 18
    assert {"a photo of a {}.", "a low contrast photo of the {}.", "a photo of the big {}."} <= set(CIFAR)
    assert [t.replace("{}", "cat") for t in templates_of("imagenet")] == [
        template("cat") for template in open_clip.OPENAI_IMAGENET_TEMPLATES
    ]


@pytest.mark.parametrize(
    ("template", "name", "raw", "clean"),
    [
        ("A photo of {}", "oak_tree", "A photo of oak_tree", "A photo of an oak tree"),
        ("A photo of {}", "bee", "A photo of bee", "A photo of a bee"),
        ("a photo of a {}.", "apple", "a photo of a apple.", "a photo of an apple."),
        ("a photo of a {}.", "willow_tree", "a photo of a willow_tree.", "a photo of a willow tree."),
        (
            "a photo of the big {}.",
            "sweet_pepper",
            "a photo of the big sweet_pepper.",
            "a photo of the big sweet pepper.",
        ),
        ("A {} here", "unicorn", "A unicorn here", "A unicorn here"),
        ("{}", "orchid", "orchid", "an orchid"),
    ],
)
def test_names_as_given_or_as_english(template: str, name: str, raw: str, clean: str) -> None:
    assert fill(template, "raw", name) == raw
    assert fill(template, "clean", name) == clean


def test_a_prompt_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_text("# mine\n\na drawing of {object}\n  {c}, seen from above \n")
    assert templates_of(str(path)) == ("a drawing of {}", "{}, seen from above")


def test_what_compare_understands(tmp_path: Path) -> None:
    base = Choice("ViT-B-32", "openai", "report", "raw")
    mine = tmp_path / "p.txt"
    mine.write_text("{}")
    assert parse_choice("cifar,clean", base) == Choice("ViT-B-32", "openai", "cifar", "clean")
    assert parse_choice("ViT-B-16:openai", base) == Choice("ViT-B-16", "openai", "report", "raw")
    assert parse_choice("report", PRESETS["best"]).prompts == "report"
    assert parse_choice("preset=report", PRESETS["best"]) == PRESETS["report"]
    assert parse_choice("best,single", base) == Choice("EVA02-L-14", PRESETS["best"].weights, "single", "clean")
    assert parse_choice(f"local-dir:x,{mine}", base) == Choice("local-dir:x", None, str(mine), "raw")


def test_presets_and_published_figures_are_tags_that_open_clip_knows() -> None:
    known = {f"{model}:{tag}" for model, tag in open_clip.list_pretrained()}
    assert set(PUBLISHED) <= known
    figures = {name: published(f"{choice.model}:{choice.weights}") for name, choice in PRESETS.items()}
    assert figures == {"report": 64.2, "fast": 80.3, "best": 90.7}
    assert published("ViT-B-32-quickgelu:openai") == 64.2
    assert published("tiny-clip:mine.pt") is None


# ---------------------------------------------------------------- caches


def test_a_second_run_needs_no_model_and_no_picture_and_says_the_same(clip: str, images: Path, tmp_path: Path) -> None:
    more: dict[str, Any] = {"embeddings": tmp_path / "features.safetensors", "prompts": "cifar"}
    first = run(tmp_path, images, clip, **more)
    table = (tmp_path / "out" / "predictions.csv").read_bytes()
    second = run(tmp_path, images, clip, **more)
    assert set(first["timings_s"]) == {"decoding", "model", "images", "text", "writing"}
    assert set(second["timings_s"]) == {"writing"}
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == table
    assert first["metrics"] == second["metrics"]


def test_the_classifier_cache_knows_names_prompts_labels_and_weights(clip: str, images: Path, tmp_path: Path) -> None:
    def built(**more: Any) -> bool:
        return "text" in run(tmp_path, images, more.pop("model", clip), **{"names": "raw", **more})["timings_s"]

    save_model(tmp_path / "other", seed=1)
    other = tmp_path / "other.json"
    other.write_text(json.dumps([*NAMES[:-1], "otter"]))
    assert built()
    assert not built()
    assert built(names="clean")
    assert built(prompts="single")
    assert built(labels=other)
    assert built(model=f"local-dir:{tmp_path / 'other'}")
    assert not built(names="clean")


def test_a_damaged_classifier_is_built_anew(clip: str, images: Path, tmp_path: Path) -> None:
    first = run(tmp_path, images, clip)
    (cached,) = (tmp_path / "cache").glob("classifier_*")
    cached.write_bytes(cached.read_bytes()[:100])
    again = run(tmp_path, images, clip)
    assert again["metrics"] == first["metrics"]
    assert "text" in again["timings_s"]


def test_embeddings_of_other_pictures_are_refused_and_kept(clip: str, images: Path, tmp_path: Path) -> None:
    file = tmp_path / "features.safetensors"
    run(tmp_path, images, clip, embeddings=file)
    before = file.read_bytes()
    other = tmp_path / "val"
    other.mkdir()
    for path in images.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (32, 32)).save(other / "0_7.png")  # one picture of thirty is another
    with pytest.raises(BadInput, match="no features of the pictures"):
        run(tmp_path, other, clip, embeddings=file, labels=images.parent / "id2label.json")
    assert file.read_bytes() == before


def test_embeddings_of_another_model_are_told_and_added(
    clip: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "features.safetensors"
    save_model(tmp_path / "other", seed=1)
    run(tmp_path, images, clip, embeddings=file)
    other = run(tmp_path, images, f"local-dir:{tmp_path / 'other'}", embeddings=file)
    assert f"features of {clip}, none of local-dir:{tmp_path / 'other'}" in capsys.readouterr().err
    assert "images" in other["timings_s"]
    assert "images" not in run(tmp_path, images, clip, embeddings=file)["timings_s"]


def test_skip_existing_skips_the_same_and_nothing_else(clip: str, images: Path, tmp_path: Path) -> None:
    first = run(tmp_path, images, clip)
    assert run(tmp_path, images, clip, skip_existing=True)["started"] == first["started"]
    (tmp_path / "out" / "record.json").write_text(json.dumps(first | {"started": "before"}))
    assert run(tmp_path, images, clip, skip_existing=True)["started"] == "before"
    assert run(tmp_path, images, clip, skip_existing=True, prompts="single")["started"] != "before"


def test_compare_encodes_pictures_once_and_prints_one_table(
    clip: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(tmp_path, images, clip, compare=("report", "cifar,clean", "imagenet"))
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("*/record.json")]
    assert len(records) == 3
    assert sorted("images" in record["timings_s"] for record in records) == [False, False, True]
    table = pd.read_csv(tmp_path / "out" / "compare.csv")
    assert table.prompts.tolist() == ["report", "cifar", "imagenet"]
    assert table.names.tolist() == ["raw", "clean", "raw"]
    alone = run(tmp_path / "alone", images, clip, prompts="cifar", names="clean")
    assert table.top1[1] == pytest.approx(alone["metrics"]["top1"])
    assert len(re.findall(r"local-dir:\S+ +(?:report|cifar|imagenet) +(?:raw|clean)", capsys.readouterr().out)) == 3
    main(Settings(collect=tmp_path))
    assert len(pd.read_csv(tmp_path / "runs.csv")) == 4


# ---------------------------------------------------------------- results


def result_of(rows: list[list[float]], truth: list[int]) -> Result:
    classes = dict(enumerate(["ant", "bee", "cat", "dog", "elk", "fox", "gnu"]))
    paths = [Path(f"{t}_{n}.png") for n, t in enumerate(truth)]
    return Result(Pictures(paths, torch.tensor(truth), classes), torch.tensor(rows))


def test_accuracies_recall_and_pairs_of_a_known_case() -> None:
    def certain(best: int, *rest: int) -> list[float]:
        order = [best, *rest, *(c for c in range(7) if c not in (best, *rest))]
        return [(7 - order.index(c)) / 28 for c in range(7)]

    rows = [certain(0), certain(0), certain(0), certain(1, 2, 3, 4, 5, 6, 0), certain(0), certain(2)]
    result = result_of(rows, [0, 0, 0, 0, 1, 1])
    found = accuracies(result)
    assert found["top1"] == pytest.approx(3 / 6)
    assert found["top5"] == pytest.approx(5 / 6)  # the fourth picture's class comes last
    assert found["mean_recall"] == pytest.approx((3 / 4 + 0) / 2)
    assert confused_pairs(result) == [("ant", "bee", 1, 4), ("bee", "ant", 1, 2), ("bee", "cat", 1, 2)]
    table = per_class(result).set_index("name")
    assert table.right.tolist() == [3, 0, 0, 0, 0, 0, 0]
    assert table.precision["ant"] == pytest.approx(3 / 4)
    assert table.taken_for["ant"] == "bee"


def test_fewer_than_five_classes_have_a_top_five() -> None:
    pictures = Pictures([Path("0_1.png")], torch.tensor([1]), {0: "cat", 1: "dog"})
    assert accuracies(Result(pictures, torch.tensor([[0.9, 0.1]])))["top5"] == 1


def test_cases_by_seed_and_by_confidence() -> None:
    rows = [[0.5 + n / 100, 0.5 - n / 100] + [0.0] * 5 for n in range(40)]
    result = result_of(rows, [n % 2 for n in range(40)])
    right, wrong = cases(result, "confidence", 0)
    assert right == [38, 36, 34, 32, 30]
    assert wrong == [39, 37, 35, 33, 31]
    assert cases(result, "seed", 1) == cases(result, "seed", 1)
    assert cases(result, "seed", 1) != cases(result, "seed", 2)
    right, wrong = cases(result, "seed", 1)
    assert {n % 2 for n in right} == {0}
    assert {n % 2 for n in wrong} == {1}


def test_the_lines_of_the_report(clip: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run(tmp_path, images, clip)
    lines = capsys.readouterr().out.splitlines()
    table = pd.read_csv(tmp_path / "out" / "predictions.csv").set_index("file")
    right = int((table.truth == table.predicted).sum())
    assert f"Accuracy: {100 * right / 30:.2f}%" in lines
    assert record["metrics"]["top1"] == pytest.approx(right / 30)
    good = [re.fullmatch(r"Successful Cases: \('(\d+_\d+\.png)', '(\w+)'\)", line) for line in lines]
    bad = [re.fullmatch(r"Failed Cases: \('(\d+_\d+\.png)', 'GT:(\w+)', 'Predicted:(\w+)'\)", line) for line in lines]
    assert len([m for m in good if m]) == min(5, right)
    assert len([m for m in bad if m]) == 5
    assert all(table.predicted[m[1]] == table.truth[m[1]] == m[2] for m in good if m)
    assert all((table.truth[m[1]], table.predicted[m[1]]) == (m[2], m[3]) for m in bad if m)


def test_what_a_run_leaves_behind(clip: str, images: Path, tmp_path: Path) -> None:
    metrics = run(tmp_path, images, clip, prompts="cifar", names="clean")["metrics"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "cases.png", "confusion.png", "per_class.csv", "predictions.csv", "record.json"
    }  # fmt: skip
    assert metrics["templates"] == list(CIFAR)
    assert metrics["model"] == clip
    assert set(metrics["weights_sha256"]) == {"open_clip_config.json", "open_clip_model.safetensors"}
    assert 0 <= metrics["top1"] <= metrics["top5"] <= 1
    assert pd.read_csv(tmp_path / "out" / "per_class.csv").name.tolist() == NAMES
    assert all(Image.open(tmp_path / "out" / name).width > 300 for name in ("cases.png", "confusion.png"))


@pytest.mark.skipif(not STANDIN.is_file(), reason=f"{STANDIN.name} is not beside the repository")
def test_the_layout_of_the_homework(clip: str, tmp_path: Path) -> None:
    with tarfile.open(STANDIN) as archive:
        archive.extractall(tmp_path, filter="data")
    record = run(tmp_path, tmp_path / "clip_zeroshot" / "val", clip)
    assert record["metrics"]["pictures"] == 200
    assert record["metrics"]["classes"] == 10
    table = pd.read_csv(tmp_path / "out" / "per_class.csv")
    assert table.pictures.tolist() == [20] * 10
    assert table.name[0] == "airplane"


# ---------------------------------------------------------------- weights: where they lie, and their activation


def test_weights_of_a_tag_are_found_where_a_user_put_them(
    weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(P3_clip_weights, "PLACED", tmp_path)
    assert find_weights("ViT-B-32", "openai") is None
    placed = tmp_path / "ViT-B-32.openai.safetensors"
    placed.write_bytes(weights.read_bytes())
    assert find_weights("ViT-B-32", "openai") == placed
    assert find_weights("ViT-B-32-quickgelu", "openai") == placed
    source = resolve("ViT-B/32", "openai")
    assert (source.model, source.tag, source.weights, source.quick_gelu) == ("ViT-B-32", "openai", placed, True)
    assert source.label == "ViT-B-32:openai"


def test_absent_weights_are_one_line_with_place_and_origin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(P3_clip_weights, "PLACED", tmp_path)
    monkeypatch.setattr(P3_clip_weights, "OPENAI_CACHE", tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(BadInput) as error:
        resolve("ViT-B-32", "openai")
    assert "timm/vit_base_patch32_clip_224.openai/resolve/main/open_clip_model.safetensors" in str(error.value)
    assert str(tmp_path / "ViT-B-32.openai.safetensors") in str(error.value)
    assert "--weights openai" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("model", "tag", "expected", "told"),
    [
        ("ViT-B-32", "openai", ("ViT-B-32", True), "QuickGELU"),
        ("ViT-B-32-quickgelu", "openai", ("ViT-B-32-quickgelu", False), ""),
        ("ViT-B-32-quickgelu", "laion2b_s34b_b79k", ("ViT-B-32", False), "GELU"),
        ("ViT-B-32", "laion2b_s34b_b79k", ("ViT-B-32", False), ""),
        ("roberta-ViT-B-32", "laion2b_s12b_b32k", ("roberta-ViT-B-32", False), ""),
        ("ViT-B-32", None, ("ViT-B-32", False), "warning: nothing tells"),
        ("EVA02-L-14", "merged2b_s4b_b131k", ("EVA02-L-14", False), ""),
    ],
)
def test_the_activation_follows_the_weights_and_a_mismatch_is_named(
    model: str,
    tag: str | None,
    expected: tuple[str, bool],
    told: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert matching_activation(model, tag, tmp_path / "w.pt") == expected
    printed = capsys.readouterr().err
    assert (told in printed) if told else not printed


def test_a_forced_activation_is_that_of_the_quickgelu_variant(weights: Path, images: Path) -> None:
    source = resolve("tiny-clip", str(weights))
    forced = load(P3_clip_weights.Source("tiny-clip", None, weights, (weights,), quick_gelu=True), CPU)
    variant = load(resolve("tiny-clip-quickgelu", str(weights)), CPU)
    pictures = pictures_of(images)
    left, right, plain = (encode_all(m, pictures, 8, 1) for m in (forced, variant, load(source, CPU)))
    assert torch.equal(left, right)
    assert not torch.allclose(left, plain, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "tag"),
    [
        ("ViT-B-32.pt", "openai"),
        ("ViT-B-32.datacomp_xl_s13b_b90k.safetensors", "datacomp_xl_s13b_b90k"),
        ("vit_b_32-quickgelu-laion400m_e32-46683a32.pt", "laion400m_e32"),
        ("models--timm--vit_base_patch32_clip_224.openai/snapshots/1/open_clip_model.safetensors", "openai"),
        ("mine.safetensors", None),
    ],
)
def test_the_tag_of_a_file_is_known_by_its_published_name(name: str, tag: str | None) -> None:
    assert tag_of_file("ViT-B-32", Path("/somewhere") / name) == tag


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ({"1": "cat", "0": "dog"}, {0: "dog", 1: "cat"}),
        (["dog", "cat"], {0: "dog", 1: "cat"}),
        ({"dog": 4, "cat": 2}, {2: "cat", 4: "dog"}),
    ],
)
def test_labels_of_any_flat_form(content: Any, expected: dict[int, str], tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text(json.dumps(content))
    assert read_labels(tmp_path / "l.json") == expected
    assert list(read_labels(tmp_path / "l.json")) == sorted(expected)


@pytest.mark.parametrize(
    ("content", "named"),
    [
        ('{"0": "oak_tree", "1": "Oak tree"}', "same name"),
        ('{"0": "cat", "00": "dog"}', "same name or number"),
        ('{"a": "cat"}', "class id must be a whole number"),
        ('{"0": ["cat"]}', "name must be text"),
        ('{"0": ""}', "name must be text"),
        ("{}", "no labels"),
        ("7", "no labels"),
        ("{", "not valid JSON"),
    ],
)
def test_bad_labels_are_named(content: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "l.json").write_text(content)
    with pytest.raises(BadInput, match=named):
        read_labels(tmp_path / "l.json")


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("cat.png", b"", "cat.png: the name holds no class id"),
        ("9_1.png", b"", "9_1.png: class 9 is not in"),
        ("1_1.png", b"not a picture", "1_1.png is not a readable picture"),
    ],
)
def test_bad_pictures_are_named(name: str, content: bytes, named: str, clip: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / name).write_bytes(content)
    with pytest.raises(BadInput, match=named):
        run(tmp_path, tmp_path / "val", clip, labels=images.parent / "id2label.json")
    assert not (tmp_path / "out").exists()


def test_a_truncated_picture_is_named(clip: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "0_1.png").write_bytes((images / "0_7.png").read_bytes()[:300])
    with pytest.raises(BadInput, match="0_1.png is not a readable picture"):
        run(tmp_path, tmp_path / "val", clip, labels=images.parent / "id2label.json")


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_other_modes_are_converted_and_told(
    mode: str, clip: str, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "val").mkdir()
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.open(images / "0_7.png").convert(mode).save(tmp_path / "val" / f"0_1.{suffix}")
    pictures = list_pictures(tmp_path / "val", images.parent / "id2label.json")
    pictures.decode(1)
    assert pictures.open(0).mode == "RGB"
    assert f"mode {mode}" in capsys.readouterr().err


def test_deep_pictures_are_named(images: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    Image.fromarray(np.full((8, 8), 40_000, np.uint16)).save(tmp_path / "val" / "0_1.png")
    with pytest.raises(BadInput, match="0_1.png has mode I;16"):
        list_pictures(tmp_path / "val", images.parent / "id2label.json").decode(1)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"model": "ViT-B-23", "weights": "openai"}, "nearest: ViT-B-32"),
        ({"model": "ViT-B-32", "weights": "opnai"}, "nearest: openai"),
        ({"model": "ViT-L-14"}, "ViT-L-14 needs --weights: a file or one of openai"),
        ({"model": "local-dir:nowhere"}, "nowhere is not a folder"),
        ({"weights": "openai"}, "brings its own weights"),
        ({"prompts": "cifr"}, "did you mean cifar"),
        ({"prompts": str(ROOT / "LICENSE")}, "line 1: no placeholder"),
        ({"images": Path("nowhere"), "labels": ROOT / "pyproject.toml"}, "not a folder|not valid JSON"),
        ({"labels": Path("nowhere.json")}, "nowhere.json does not exist"),
        ({"batch": -1}, "--batch -1"),
        ({"precision": "fp16", "device": "cpu"}, "fp16 needs a GPU"),
        ({"embeddings": ROOT / "LICENSE"}, "not a safetensors file"),
        ({"compare": ("cifar", "nonsense")}, "--model nonsense is not known"),
        ({"collect": ROOT / "tests"}, "no record.json"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(
    given: dict[str, Any], named: str, clip: str, images: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=named):
        run(tmp_path, given.pop("images", images), given.pop("model", clip), **given)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_and_absent_labels_are_named(clip: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    with pytest.raises(BadInput, match="no id2label.json or id.json"):
        run(tmp_path, tmp_path / "val", clip)
    with pytest.raises(BadInput, match="holds no picture"):
        run(tmp_path, tmp_path / "val", clip, labels=images.parent / "id2label.json")


def test_weights_of_another_architecture_are_named(weights: Path, images: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="the file is of another architecture"):
        run(tmp_path, images, "RN50", weights=str(weights))
    (tmp_path / "bad.pt").write_bytes(b"junk")
    with pytest.raises(BadInput, match="can't be loaded from"):
        run(tmp_path, images, "tiny-clip", weights=str(tmp_path / "bad.pt"))


def test_the_command_ends_with_one_line_and_code_2(images: Path) -> None:
    command = [sys.executable, str(ROOT / "P3_clip_zeroshot.py"), "--images", str(images), "--model", "ViT-B-23"]
    done = subprocess.run([*command, "--weights", "openai"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --model ViT-B-23 is not known")
