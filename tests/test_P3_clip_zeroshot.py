"""Zero-shot classification on a small open_clip model with random weights on disk: exact, cached, and clear about bad input."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
import tarfile
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import open_clip
import pandas as pd
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from small_clip import CONFIG, CPU, NAMES, PREPROCESSING, images_of, relative, run, save_model

from P3_clip_zeroshot import Settings, ZeroShotConfig, config_of, main, set_up_precision
from runtime.cli import BadInput
from runtime.device import detect
from runtime.files import ROOT
from zeroshot.features import encode_all
from zeroshot.model import Clip, load
from zeroshot.prompts import CIFAR, REPORT, fillers, templates_of
from zeroshot.transduction import NAME, transduce
from zeroshot.weights import resolve

STANDIN = ROOT.parent / "shared" / "data" / "clip_zeroshot_standin.tar.gz"


# --------------------------------------------------------------- exactness


@pytest.mark.parametrize(("prompts", "names"), [("report", "raw"), ("cifar", "clean")])
def test_logits_equal_open_clips_plain_api(prompts: str, names: Any, tiny_clip: str, labelled: Path) -> None:
    ours, images = load(resolve(tiny_clip, None), CPU), images_of(labelled)
    templates = templates_of(prompts)
    classifier = ours.classifier(images.names, fillers(templates, names))
    logits = classifier.logits(encode_all(ours, images, 8, 2))

    model, _, preprocess = open_clip.create_model_and_transforms(tiny_clip)
    model.eval()
    classes = [name.replace("_", " ") for name in NAMES] if names == "clean" else NAMES
    texts: list[Any] = [t.replace("{}", "{0}") for t in templates]
    if names == "clean":
        texts = [(lambda c, t=t: re.sub(r"\ba (?=[aeiou])", "a" + "n ", t.format(c))) for t in texts]
    with torch.no_grad():
        heads = open_clip.build_zero_shot_classifier(model, open_clip.get_tokenizer(tiny_clip), classes, texts)
        batch = torch.stack([preprocess(Image.open(path)) for path in images.paths])
        plain = model.logit_scale.exp() * model.encode_image(batch, normalize=True) @ heads
    assert relative(logits, plain) <= 1e-5
    assert torch.equal(logits.argmax(1), plain.argmax(1))
    assert len(set(plain.argmax(1).tolist())) > 1  # the model distinguishes images, so agreement means something


def test_logits_equal_an_independent_loop_over_pictures_and_prompts(
    tiny_clip: str, tiny_weights: Path, labelled: Path
) -> None:
    """No open_clip transform, classifier builder or loader: Pillow, numpy and the two towers."""
    ours, images = load(resolve(tiny_clip, None), CPU), images_of(labelled)
    classifier = ours.classifier(images.names, fillers(CIFAR, "raw"))
    logits = classifier.logits(encode_all(ours, images, 8, 2))

    model = open_clip.CLIP(**CONFIG).eval()
    model.load_state_dict(load_file(tiny_weights))
    mean, std = np.array(PREPROCESSING["mean"]), np.array(PREPROCESSING["std"])
    with torch.no_grad():
        heads = []
        for name in NAMES:
            vectors = [model.encode_text(open_clip.tokenize([t.replace("{}", name)]))[0] for t in CIFAR]
            mean_vector = torch.stack([v / v.norm() for v in vectors]).mean(0)
            heads.append(mean_vector / mean_vector.norm())
        for row, path in enumerate(images.paths):
            pixels = np.asarray(Image.open(path).resize((48, 48), Image.Resampling.BICUBIC)) / 255
            image = torch.tensor(((pixels - mean) / std).transpose(2, 0, 1), dtype=torch.float32)
            vector = model.encode_image(image[None])[0]
            expected = torch.stack([model.logit_scale.exp() * (vector / vector.norm()) @ head for head in heads])
            assert relative(logits[row], expected) <= 1e-5


def test_bf16_is_close_to_fp32(tiny_clip: str, labelled: Path) -> None:
    source, images = resolve(tiny_clip, None), images_of(labelled)
    fine, coarse = (encode_all(load(source, CPU, kind), images, 8, 2) for kind in ("fp32", "bf16"))
    assert coarse.dtype == torch.float32
    assert 0 < float((fine - coarse).abs().max()) < 0.05


def test_the_batch_changes_no_feature(tiny_clip: str, labelled: Path) -> None:
    ours, images = load(resolve(tiny_clip, None), CPU), images_of(labelled)
    one, seven, all_at_once = (encode_all(ours, images, batch, 2) for batch in (1, 7, 64))
    torch.testing.assert_close(one, seven, rtol=0, atol=1e-6)
    torch.testing.assert_close(one, all_at_once, rtol=0, atol=1e-6)
    assert one.norm(dim=1) == pytest.approx(torch.ones(30))


# --------------------------------------------------------------- every flag


@pytest.fixture
def without_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Figures take most of a run's time, and have a test of their own."""
    for figure in ("cases_figure", "confusion_figure"):
        monkeypatch.setattr(f"zeroshot.results.{figure}", lambda *_: None)


class Plain(NamedTuple):
    """What a run must equal: open_clip's model on one image and one text at a time."""

    model: Any = None
    """Arguments of open_clip's `create_model_and_transforms`; None = the tiny model."""
    names: Sequence[str] = NAMES
    texts: Callable[[str], list[str]] = lambda name: [f"A photo of {name}"]
    """The prompts of a class."""
    images: str = "*"


def english(name: str) -> list[str]:
    """Return CIFAR's prompts in which "a" becomes "an"."""
    return [re.sub(r"\ba (?=[aeiou])", "an ", text.replace("{}", name.replace("_", " "))) for text in CIFAR]


@torch.no_grad()
def plain_shares(plain: Plain, tiny_clip: str, folder: Path) -> dict[str, list[float]]:
    """Return file -> the probability of every class, by a loop over images, classes and prompts."""
    architecture = plain.model or (tiny_clip,)
    model, _, preprocess = open_clip.create_model_and_transforms(*architecture)
    tokenizer, heads = open_clip.get_tokenizer(architecture[0]), []
    for name in plain.names:
        vectors = [model.eval().encode_text(tokenizer([text]))[0] for text in plain.texts(name)]
        mean = torch.stack([vector / vector.norm() for vector in vectors]).mean(0)
        heads.append(mean / mean.norm())
    shares = {}
    for path in folder.glob(plain.images):
        vector = model.encode_image(preprocess(Image.open(path))[None])[0]
        cosines = torch.stack([head @ vector / vector.norm() for head in heads])
        shares[path.name] = (cosines * model.logit_scale.exp()).softmax(0).tolist()
    return shares


def check_equal(out: Path, plain: Plain, shares: dict[str, list[float]]) -> None:
    """Assert that tables and record hold what follows from these probabilities; each number is counted again here."""
    names, count = plain.names, len(shares)
    ranked = {file: sorted(range(len(names)), key=row.__getitem__, reverse=True) for file, row in shares.items()}
    truth = {file: int(file.split("_")[0]) for file in shares}
    table = pd.read_csv(out / "predictions.csv")
    assert table.file.tolist() == sorted(shares, key=lambda file: tuple(map(int, file[:-4].split("_"))))
    for row in table.itertuples():
        best = ranked[row.file][:5]
        assert (row.truth, row.predicted) == (names[truth[row.file]], names[best[0]])
        assert row.top5.split("|") == [names[index] for index in best]
        assert row.probability == pytest.approx(shares[row.file][best[0]], abs=2e-5)
        five = [float(share) for share in row.top5_probability.split("|")]
        assert five == pytest.approx([shares[row.file][index] for index in best], abs=2e-5)

    recalls = []
    for index, row in enumerate(pd.read_csv(out / "per_class.csv").itertuples()):
        own = [file for file in shares if truth[file] == index]
        taken = [file for file in shares if ranked[file][0] == index]
        right = len(set(own) & set(taken))
        assert (row[1], row.name, row.pictures, row.right) == (index, names[index], len(own), right)
        assert row.recall == pytest.approx(right / len(own), abs=1e-4)
        assert math.isnan(row.precision) if not taken else row.precision == pytest.approx(right / len(taken), abs=1e-4)
        mistakes = Counter(names[ranked[file][0]] for file in own if ranked[file][0] != index)
        assert mistakes[row.taken_for] == max(mistakes.values()) if mistakes else math.isnan(row.taken_for)
        recalls.append(right / len(own))

    metrics = json.loads((out / "record.json").read_text())["metrics"]
    assert metrics["top1"] == pytest.approx(sum(ranked[file][0] == truth[file] for file in shares) / count)
    assert metrics["top5"] == pytest.approx(sum(truth[file] in ranked[file][:5] for file in shares) / count)
    assert metrics["mean_recall"] == pytest.approx(sum(recalls) / len(recalls))
    assert metrics["pictures"] == count
    pairs = Counter((names[truth[file]], names[ranked[file][0]]) for file in shares if ranked[file][0] != truth[file])
    found = {(pair["truth"], pair["predicted"]): pair["times"] for pair in metrics["confused_pairs"]}
    assert all(pairs[pair] == times for pair, times in found.items())
    assert list(found.values()) == sorted(pairs.values(), reverse=True)[:10]


OTHERS = ["otter", "shark", "lamp", "house", "rose", "tiger"]
# flag -> other flags and its value (@ is a folder with the other files), and what open_clip then computes
FLAGS: dict[str, tuple[dict[str, Any], Plain]] = {
    "images": ({"images": "@/val", "labels": "@/others.json"}, Plain(names=OTHERS, images="[0-5]_[789].png")),
    "labels": ({"labels": "@/others.json"}, Plain(names=OTHERS)),
    "preset": ({"preset": "fast"}, Plain(texts=english)),
    "model": ({"model": "local-dir:@/other"}, Plain(model=("local-dir:@/other",))),
    "weights": (
        {"model": "tiny-clip", "weights": "@/other/open_clip_model.safetensors"},
        Plain(model=("tiny-clip", "@/other/open_clip_model.safetensors")),
    ),
    "prompts": ({"prompts": "@/mine.txt"}, Plain(texts=lambda name: [f"{name} in a box", f"two of {name}", name])),
    "names": ({"names": "clean", "prompts": "cifar"}, Plain(texts=english)),
    "prompts, sentences": ({"prompts": "@/mine.json"}, Plain(texts=lambda name: SENTENCES[name])),
    "batch": ({"batch": 7}, Plain()),
    "workers": ({"workers": 3}, Plain()),
    "device": ({"device": "cpu"}, Plain()),
    "precision": ({"precision": "fp32"}, Plain()),
}
OWN_TESTS = {"output", "features", "cache", "seed", "transduce"}
SENTENCES: dict[str, list[str]] = {
    name: [f"{name} of form {form}" for form in range(count)] for count, name in enumerate(NAMES[::-1], 1)
}  # one sentence of the last class, six of the first


def test_the_table_of_flags_is_whole() -> None:
    assert {field.name for field in fields(Settings)} == {*(flag.split(",")[0] for flag in FLAGS), *OWN_TESTS}


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("flag", FLAGS)
def test_a_run_equals_a_plain_loop_with_open_clip(flag: str, tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    """All columns of both tables, the shares in the record, and the confused pairs."""

    def filled(value: Any) -> Any:
        return value.replace("@", str(tmp_path)) if isinstance(value, str) else value

    save_model(tmp_path / "other", seed=1)
    (tmp_path / "others.json").write_text(json.dumps(OTHERS))
    (tmp_path / "mine.txt").write_text("{} in a box\ntwo of {c}\n{}\n")
    by_class = {name.replace("_", " ").title(): sentences for name, sentences in SENTENCES.items()}
    (tmp_path / "mine.json").write_text(json.dumps(by_class))
    (tmp_path / "val").mkdir()
    flags, plain = FLAGS[flag]
    for path in labelled.glob(plain.images):
        (tmp_path / "val" / path.name).write_bytes(path.read_bytes())
    plain = plain._replace(model=plain.model and tuple(map(filled, plain.model)))
    settings: dict[str, Any] = {"images": labelled, "model": tiny_clip, "precision": "fp32"}
    settings |= {name: filled(value) for name, value in flags.items()}
    settings |= {name: Path(settings[name]) for name in ("images", "labels") if name in settings}
    run(tmp_path, settings.pop("images"), settings.pop("model"), **settings)
    check_equal(tmp_path / "out", plain, plain_shares(plain, tiny_clip, labelled))


def predicted(out: Path) -> list[str]:
    names: list[str] = pd.read_csv(out / "predictions.csv").predicted.tolist()
    return names


@pytest.mark.parametrize(("batch", "size"), [(8, 8), (100, 30)])
def test_images_are_encoded_in_batches_of_the_asked_size_but_no_larger_than_the_data(
    batch: int, size: int, tiny_clip: str, labelled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes, encode = [], Clip.encode

    def recorded(self: Clip, pixels: torch.Tensor) -> torch.Tensor:
        sizes.append(len(pixels))
        return encode(self, pixels)

    monkeypatch.setattr(Clip, "encode", recorded)
    encode_all(load(resolve(tiny_clip, None), CPU), images_of(labelled), batch, 1)
    assert sizes == [size] * math.ceil(30 / batch)


@pytest.mark.usefixtures("without_figures")
def test_kept_features_are_those_of_the_images_in_their_order_and_are_believed(
    tiny_clip: str, labelled: Path, tmp_path: Path
) -> None:
    file = tmp_path / "features.safetensors"
    run(tmp_path, labelled, tiny_clip, features=file, precision="fp32")
    before, (key, kept) = predicted(tmp_path / "out"), next(iter(load_file(file).items()))
    images = images_of(labelled)
    torch.testing.assert_close(kept, encode_all(load(resolve(tiny_clip, None), CPU), images, 8, 2), rtol=0, atol=1e-6)
    metadata = {"pictures": images.fingerprint, key: tiny_clip}
    save_file({key: kept.roll(1, 0).contiguous()}, file, metadata)
    run(tmp_path, labelled, tiny_clip, features=file, precision="fp32")
    assert predicted(tmp_path / "out") == before[-1:] + before[:-1]


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0.0, 1e-6), ("bf16", 1e-5, 0.05)])
def test_images_are_encoded_in_the_precision_of_the_flag(
    precision: Any, least: float, most: float, tiny_clip: str, labelled: Path, tmp_path: Path
) -> None:
    file = tmp_path / "features.safetensors"
    metrics = run(tmp_path, labelled, tiny_clip, features=file, precision=precision)["metrics"]
    exact = encode_all(load(resolve(tiny_clip, None), CPU), images_of(labelled), 8, 2)
    assert metrics["precision"] == precision
    assert least <= float((next(iter(load_file(file).values())) - exact).abs().max()) <= most


@pytest.mark.usefixtures("without_figures")
def test_features_of_one_precision_do_not_serve_another(tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    file = tmp_path / "features.safetensors"
    for precision in ("fp32", "bf16"):
        assert "images" in run(tmp_path, labelled, tiny_clip, features=file, precision=precision)["timings_s"]
    assert len(load_file(file)) == 2


@pytest.mark.parametrize(
    ("precision", "device", "native", "expected"),
    [
        ("auto", "cuda", False, "fp16"),
        ("auto", "cuda", True, "bf16"),
        ("auto", "cpu", False, "fp32"),
        ("auto", "cpu", True, "bf16"),
        ("fp16", "cuda", True, "fp16"),
        ("fp32", "cuda", True, "fp32"),
    ],
)
def test_the_automatic_precision_is_the_fastest_that_the_hardware_has(
    precision: Any, device: str, native: bool, expected: str
) -> None:
    machine = replace(detect("cpu"), device=torch.device(device), native_bf16=native)
    assert set_up_precision(Settings(precision=precision), machine) == expected


@pytest.mark.usefixtures("without_figures")
def test_a_kept_classifier_is_believed(tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    run(tmp_path, labelled, tiny_clip, cache=tmp_path / "kept")
    before, (file,) = predicted(tmp_path / "out"), list((tmp_path / "kept").iterdir())
    tensors = load_file(file)
    classifier = tensors["classifier"]
    save_file(tensors | {"classifier": classifier.roll(1, 1).contiguous()}, file)
    run(tmp_path, labelled, tiny_clip, cache=tmp_path / "kept")
    assert predicted(tmp_path / "out") == [NAMES[(NAMES.index(name) + 1) % len(NAMES)] for name in before]


@pytest.mark.usefixtures("without_figures")
def test_the_seed_draws_the_first_five_right_and_wrong_cases_of_its_order(
    tiny_clip: str, labelled: Path, tmp_path: Path
) -> None:
    lines = run(tmp_path, labelled, tiny_clip, seed=4)["metrics"]["cases"]
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    order = torch.randperm(len(table), generator=torch.Generator().manual_seed(4)).tolist()
    right = [row for row in order if table.truth[row] == table.predicted[row]][:5]
    wrong = [row for row in order if table.truth[row] != table.predicted[row]][:5]
    expected = [f"Successful Cases: ('{table.file[row]}', '{table.predicted[row]}')" for row in right]
    for row in wrong:
        expected.append(
            f"Failed Cases: ('{table.file[row]}', 'GT:{table.truth[row]}', 'Predicted:{table.predicted[row]}')"
        )
    assert lines == expected


@pytest.mark.usefixtures("without_figures")
def test_the_results_go_to_the_output_or_to_a_folder_named_after_model_prompts_and_names(
    tiny_clip: str, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("P3_clip_zeroshot.ROOT", tmp_path)
    for output in (tmp_path / "mine", None):
        settings = Settings(images=labelled, model=tiny_clip, prompts="single", names="clean", cache=tmp_path / "c")
        main(replace(settings, output=output))
    label = re.sub("[^A-Za-z0-9.]+", "-", tiny_clip)
    named = tmp_path / "runs" / "p3_clip" / f"{label}-single-clean"
    assert (named / "predictions.csv").read_bytes() == (tmp_path / "mine" / "predictions.csv").read_bytes()
    assert {path.name for path in named.iterdir()} == {"per_class.csv", "predictions.csv", "record.json"}


@pytest.mark.usefixtures("without_figures")
def test_the_printed_shares_are_those_of_the_record(
    tiny_clip: str, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run(tmp_path, labelled, tiny_clip, prompts="cifar", names="clean", precision="fp32")["metrics"]
    lines = capsys.readouterr().out.splitlines()
    assert len({metrics["top1"], metrics["top5"], len(metrics["templates"])}) == 3
    assert f"Accuracy: {100 * metrics['top1']:.2f}%" in lines
    assert f"Top-5: {100 * metrics['top5']:.2f}%, mean per-class recall: {100 * metrics['mean_recall']:.2f}%" in lines
    assert f"Model: {tiny_clip}, fp32" in lines
    assert "Prompts: cifar (18, such as 'a photo of a {}.'), names clean" in lines
    assert "Pictures: 30 of 6 classes" in lines
    pair = metrics["confused_pairs"][0]
    assert f"confused: {pair['truth']} taken for {pair['predicted']}, {pair['times']} of 5" in lines


# --------------------------------------------------------------- all images together


@pytest.mark.usefixtures("without_figures")
def test_transduced_predictions_are_those_of_the_mixture_and_no_label_is_read(
    tiny_clip: str, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second run gives every image the next class's number; a third one reads kept features, and computes the same."""
    (tmp_path / "val").mkdir()
    for path in labelled.iterdir():
        number, rest = path.name.split("_", 1)
        (tmp_path / "val" / f"{(int(number) + 1) % 6}_{rest}").write_bytes(path.read_bytes())
    flags: dict[str, Any] = {"labels": labelled.parent / "id2label.json", "precision": "fp32", "transduce": True}
    features = tmp_path / "features.safetensors"
    alone = run(tmp_path / "alone", labelled, tiny_clip, **flags | {"transduce": False})["metrics"]
    metrics = run(tmp_path, labelled, tiny_clip, features=features, **flags)["metrics"]
    assert metrics["top1_one_by_one"] == alone["top1"]
    right = 100 * alone["top1"]
    assert f"Transduction: {NAME}; one by one: {right:.2f}%" in capsys.readouterr().out.splitlines()

    ours, images = load(resolve(tiny_clip, None), CPU), images_of(labelled)
    vectors = encode_all(ours, images, 8, 2)
    shares = transduce(vectors, ours.classifier(images.names, fillers(REPORT, "raw")).logits(vectors))
    table = pd.read_csv(tmp_path / "out" / "predictions.csv")
    assert table.predicted.tolist() == [NAMES[row] for row in shares.argmax(1)]
    assert table.probability.tolist() == pytest.approx(shares.max(1).values.tolist(), abs=2e-5)
    assert metrics["top1"] == pytest.approx((table.truth == table.predicted).mean())

    run(tmp_path / "renamed", tmp_path / "val", tiny_clip, **flags)
    other = pd.read_csv(tmp_path / "renamed" / "out" / "predictions.csv").set_index("file").predicted
    for row in table.itertuples():
        number, rest = row.file.split("_", 1)
        assert other[f"{(int(number) + 1) % 6}_{rest}"] == row.predicted
    again = run(tmp_path, labelled, tiny_clip, features=features, **flags)
    assert "images" not in again["timings_s"]
    assert again["metrics"] == metrics


# --------------------------------------------------------------- a folder per class, and sentences


@pytest.fixture
def by_class(labelled: Path, tmp_path: Path) -> Path:
    """Write the labelled images in a folder per class, under their class's name and as 7.png to 11.png."""
    for path in labelled.iterdir():
        number, rest = path.name.split("_", 1)
        target = tmp_path / "animals" / NAMES[int(number)] / rest
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    return tmp_path / "animals"


def test_a_folder_per_class_gives_what_the_homeworks_names_give(
    tiny_clip: str, labelled: Path, by_class: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags: dict[str, Any] = {"precision": "fp32", "features": tmp_path / "own.safetensors"}
    metrics = run(tmp_path / "own", by_class, tiny_clip, **flags)["metrics"]
    lines = capsys.readouterr().out
    plain = run(tmp_path, labelled, tiny_clip, precision="fp32")["metrics"]
    assert (metrics["top1"], metrics["pictures"], metrics["classes"]) == (plain["top1"], 30, 6)
    own, homework = (pd.read_csv(folder / "out" / "predictions.csv") for folder in (tmp_path / "own", tmp_path))
    names = {f"{NAMES[int(file.split('_')[0])]}/{file.split('_')[1]}": file for file in homework.file}
    both = own.assign(file=own.file.map(names)).set_index("file").join(homework.set_index("file"), rsuffix="_homework")
    assert (both.predicted == both.predicted_homework).all()
    assert (both.truth == both.truth_homework).all()
    assert both.probability.tolist() == pytest.approx(both.probability_homework.tolist(), abs=2e-6)
    assert pd.read_csv(tmp_path / "own" / "out" / "per_class.csv").name.tolist() == sorted(NAMES)
    assert re.search(
        r"Failed Cases: \('(apple|bee|oak_tree|streetcar|sweet_pepper|willow_tree)/\d+\.png', 'GT:\1'", lines
    )

    (by_class / "bee" / "12.png").write_bytes((by_class / "bee" / "11.png").read_bytes())
    with pytest.raises(BadInput, match=f"holds no features of the pictures in {by_class}:"):
        run(tmp_path / "own", by_class, tiny_clip, **flags)


@pytest.mark.usefixtures("without_figures")
def test_sentences_are_named_and_kept_apart_from_other_sentences(
    tiny_clip: str, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.json").write_text(json.dumps(SENTENCES))
    first = run(tmp_path, labelled, tiny_clip, prompts=str(tmp_path / "mine.json"))
    assert f"Prompts: {tmp_path / 'mine.json'} (21 sentences, such as 'apple of form 0')" in capsys.readouterr().out
    assert first["metrics"]["sentences"] == {name: SENTENCES[name] for name in NAMES}
    assert "templates" not in first["metrics"]
    (tmp_path / "mine.json").write_text(json.dumps(SENTENCES | {"bee": ["a striped insect"]}))
    second = run(tmp_path, labelled, tiny_clip, prompts=str(tmp_path / "mine.json"))
    assert "text" in second["timings_s"]  # the classifier of the first is not taken
    assert "text" not in run(tmp_path, labelled, tiny_clip, prompts=str(tmp_path / "mine.json"))["timings_s"]


# --------------------------------------------------------------- caches


@pytest.mark.usefixtures("without_figures")
def test_a_second_run_needs_no_model_and_no_picture_and_says_the_same(
    tiny_clip: str, labelled: Path, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"features": tmp_path / "features.safetensors", "prompts": "cifar"}
    first = run(tmp_path, labelled, tiny_clip, **more)
    table = (tmp_path / "out" / "predictions.csv").read_bytes()
    second = run(tmp_path, labelled, tiny_clip, **more)
    assert set(first["timings_s"]) == {"inputs", "model", "images", "text", "writing"}
    assert set(second["timings_s"]) == {"inputs", "writing"}
    assert (tmp_path / "out" / "predictions.csv").read_bytes() == table
    assert first["metrics"] == second["metrics"]


@pytest.mark.usefixtures("without_figures")
def test_the_classifier_cache_knows_names_prompts_labels_and_weights(
    tiny_clip: str, labelled: Path, tmp_path: Path
) -> None:
    def built(**more: Any) -> bool:
        return "text" in run(tmp_path, labelled, more.pop("model", tiny_clip), **{"names": "raw", **more})["timings_s"]

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


@pytest.mark.usefixtures("without_figures")
def test_a_damaged_classifier_is_built_again(tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    first = run(tmp_path, labelled, tiny_clip)
    (cached,) = (tmp_path / "cache").glob("classifier_*")
    cached.write_bytes(cached.read_bytes()[:100])
    again = run(tmp_path, labelled, tiny_clip)
    assert again["metrics"] == first["metrics"]
    assert "text" in again["timings_s"]


@pytest.mark.usefixtures("without_figures")
def test_embeddings_of_other_pictures_are_refused_and_kept(tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    file = tmp_path / "features.safetensors"
    run(tmp_path, labelled, tiny_clip, features=file)
    before = file.read_bytes()
    other = tmp_path / "val"
    other.mkdir()
    for path in labelled.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (32, 32)).save(other / "0_7.png")  # one picture of thirty is another
    with pytest.raises(BadInput, match="no features of the pictures"):
        run(tmp_path, other, tiny_clip, features=file, labels=labelled.parent / "id2label.json")
    assert file.read_bytes() == before


@pytest.mark.usefixtures("without_figures")
def test_embeddings_of_another_model_are_reported_and_added(
    tiny_clip: str, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "features.safetensors"
    save_model(tmp_path / "other", seed=1)
    run(tmp_path, labelled, tiny_clip, features=file)
    other = run(tmp_path, labelled, f"local-dir:{tmp_path / 'other'}", features=file)
    assert f"features of {tiny_clip}, none of local-dir:{tmp_path / 'other'}" in capsys.readouterr().err
    assert "images" in other["timings_s"]
    assert "images" not in run(tmp_path, labelled, tiny_clip, features=file)["timings_s"]


def test_flags_replace_those_of_the_preset() -> None:
    assert config_of(Settings()) == ZeroShotConfig("ViT-B-32", "openai", "report", "raw")
    assert config_of(Settings(preset="fast", prompts="single")) == ZeroShotConfig(
        "ViT-B-32", "datacomp_xl_s13b_b90k", "single", "clean"
    )
    assert config_of(Settings(preset="best", model="local-dir:x", names="raw")) == ZeroShotConfig(
        "local-dir:x", None, "cifar", "raw"
    )


@pytest.mark.usefixtures("without_figures")
def test_kept_features_serve_other_prompts(tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    run(tmp_path, labelled, tiny_clip, features=tmp_path / "features.safetensors")
    kept = run(tmp_path, labelled, tiny_clip, prompts="cifar", features=tmp_path / "features.safetensors")
    alone = run(tmp_path / "alone", labelled, tiny_clip, prompts="cifar")
    assert "images" not in kept["timings_s"]
    assert kept["metrics"] == alone["metrics"]


# --------------------------------------------------------------- results


def test_the_lines_of_the_report(
    tiny_clip: str, labelled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = run(tmp_path, labelled, tiny_clip)
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


def test_what_a_run_leaves_behind(tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    metrics = run(tmp_path, labelled, tiny_clip, prompts="cifar", names="clean")["metrics"]
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        "cases.png", "confusion.png", "per_class.csv", "predictions.csv", "record.json"
    }  # fmt: skip
    assert metrics["templates"] == list(CIFAR)
    assert metrics["model"] == tiny_clip
    assert set(metrics["weights_sha256"]) == {"open_clip_config.json", "open_clip_model.safetensors"}
    assert 0 <= metrics["top1"] <= metrics["top5"] <= 1
    assert pd.read_csv(tmp_path / "out" / "per_class.csv").name.tolist() == NAMES
    assert all(Image.open(tmp_path / "out" / name).width > 300 for name in ("cases.png", "confusion.png"))


@pytest.mark.skipif(not STANDIN.is_file(), reason=f"{STANDIN.name} is not next to the repository")
@pytest.mark.usefixtures("without_figures")
def test_the_layout_of_the_homework(tiny_clip: str, tmp_path: Path) -> None:
    with tarfile.open(STANDIN) as archive:
        archive.extractall(tmp_path, filter="data")
    record = run(tmp_path, tmp_path / "clip_zeroshot" / "val", tiny_clip)
    assert record["metrics"]["pictures"] == 200
    assert record["metrics"]["classes"] == 10
    table = pd.read_csv(tmp_path / "out" / "per_class.csv")
    assert table.pictures.tolist() == [20] * 10
    assert table.name[0] == "airplane"


# --------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("name", "content", "named"),
    [
        ("cat.png", b"", "cat.png: the name holds no class id"),
        ("9_1.png", b"", "9_1.png: class 9 is not in"),
        ("1_1.png", b"not a picture", "1_1.png is not a readable picture"),
    ],
)
def test_bad_pictures_are_named(
    name: str, content: bytes, named: str, tiny_clip: str, labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / name).write_bytes(content)
    with pytest.raises(BadInput, match=named):
        run(tmp_path, tmp_path / "val", tiny_clip, labels=labelled.parent / "id2label.json")
    assert not (tmp_path / "out").exists()


def test_a_truncated_picture_is_named(tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    (tmp_path / "val" / "0_1.png").write_bytes((labelled / "0_7.png").read_bytes()[:300])
    with pytest.raises(BadInput, match="0_1.png is not a readable picture"):
        run(tmp_path, tmp_path / "val", tiny_clip, labels=labelled.parent / "id2label.json")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"model": "ViT-B-23", "weights": "openai"}, "nearest: ViT-B-32"),
        ({"model": "ViT-B-32", "weights": "opnai"}, "nearest: openai"),
        ({"model": "ViT-L-14"}, "ViT-L-14 needs --weights: a file or one of openai"),
        ({"model": "local-dir:nowhere"}, "nowhere is not a folder"),
        ({"weights": "openai"}, "brings its own weights"),
        ({"prompts": "cifr"}, "did you mean cifar"),
        ({"prompts": str(ROOT / "LICENSE")}, "line 1: no placeholder"),
        ({"images": Path("nowhere")}, "--images nowhere is not a folder"),
        ({"labels": Path("nowhere.json")}, "nowhere.json does not exist"),
        ({"batch": -1}, "--batch -1"),
        ({"precision": "fp16", "device": "cpu"}, "fp16 needs a GPU"),
        ({"features": ROOT / "LICENSE"}, "is a text, not a file of tensors"),
    ],
)
def test_bad_settings_are_named_and_nothing_is_written(
    flags: dict[str, Any], message: str, tiny_clip: str, labelled: Path, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=message):
        run(tmp_path, flags.pop("images", labelled), flags.pop("model", tiny_clip), **flags)
    assert not (tmp_path / "out").exists()


def test_an_empty_folder_and_absent_labels_are_named(tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "val").mkdir()
    for labels in (None, labelled.parent / "id2label.json"):
        with pytest.raises(BadInput, match="val holds no picture"):
            run(tmp_path, tmp_path / "val", tiny_clip, labels=labels)
    shutil.copy(next(labelled.glob("*.png")), tmp_path / "val")
    with pytest.raises(BadInput, match="no id2label.json or id.json"):
        run(tmp_path, tmp_path / "val", tiny_clip)


@pytest.mark.parametrize(("transduce", "count"), [(False, 1), (True, 1), (True, 2)])
def test_one_class_has_all_results(transduce: bool, count: int, tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "val" / "cat").mkdir(parents=True)
    for picture in sorted(labelled.glob("*.png"))[:count]:
        shutil.copy(picture, tmp_path / "val" / "cat")
    run(tmp_path, tmp_path / "val", tiny_clip, transduce=transduce)
    assert predicted(tmp_path / "out") == ["cat"] * count


def test_prompts_longer_than_the_model_reads_are_one_warning(
    tiny_clip: str, by_class: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second, *others = sorted(path.name for path in by_class.iterdir())
    fits, long = "red " * 75, "blue " * 76  # with start and end 77 and 78 tokens
    sentences = {first: [fits], second: ["a cup", long], **{name: [long] for name in others}}
    (tmp_path / "s.json").write_text(json.dumps(sentences))
    (tmp_path / "t.txt").write_text(f"a {{}}\n{long} {{}}\n")
    (tmp_path / "short.txt").write_text("red " * 70 + "{}")
    lines = {}
    for name in ("s.json", "t.txt", "short.txt"):
        run(tmp_path, by_class, tiny_clip, prompts=str(tmp_path / name))
        lines[name] = [line for line in capsys.readouterr().err.splitlines() if "cut at" in line]
    count = len(others)
    assert lines["s.json"] == [
        f"warning: {count + 1} of {count + 3} prompts are cut at 77 tokens, the first of {second}: {long[:60]!r} .."
    ]
    assert lines["t.txt"] == [
        f"warning: {count + 2} of {2 * count + 4} prompts are cut at 77 tokens, the first of {first}: {long[:60]!r} .."
    ]
    assert not lines["short.txt"]


@pytest.mark.parametrize("flag", ["features", "cache"])
def test_places_that_cannot_be_written_are_named_before_the_work(
    flag: str, tiny_clip: str, labelled: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(BadInput, match=f"^--{flag} {tmp_path}/file/a"):
        run(tmp_path, labelled, tiny_clip, **{flag: tmp_path / "file" / "a"})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["for $x_{$", "猫", "very long " * 300], ids=["formula", "script", "long"])
def test_class_names_of_any_form_are_drawn(name: str, tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps([name, *NAMES[1:]]))
    run(tmp_path, labelled, tiny_clip, labels=labels, names="raw")
    assert {path.name for path in (tmp_path / "out").glob("*.png")} == {"cases.png", "confusion.png"}


def test_a_figure_that_fails_costs_no_results(
    tiny_clip: str, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any) -> None:
        raise ValueError("no room")

    monkeypatch.setattr("zeroshot.results.cases_figure", fail)
    run(tmp_path, labelled, tiny_clip)
    out, err = capsys.readouterr()
    assert "Accuracy: " in out
    assert f"warning: no figure {tmp_path / 'out' / 'cases.png'}: no room" in err
    assert (tmp_path / "out" / "confusion.png").is_file()


def test_an_output_that_is_a_file_is_refused_before_the_work(tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("precious")
    with pytest.raises(BadInput, match="a file is in the way"):
        run(tmp_path, labelled, tiny_clip, features=tmp_path / "features.safetensors")
    assert (tmp_path / "out").read_text() == "precious"
    assert not (tmp_path / "features.safetensors").exists()


def test_the_command_ends_with_one_line_and_code_2(labelled: Path) -> None:
    command = [sys.executable, str(ROOT / "P3_clip_zeroshot.py"), "--images", str(labelled), "--model", "ViT-B-23"]
    done = subprocess.run([*command, "--weights", "openai"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --model ViT-B-23 is not known")
