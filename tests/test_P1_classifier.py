"""Classifiers and grading: the course's rule to the letter, its classifiers' files, and metrics beyond accuracy."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
import signal
import tarfile
from collections.abc import Callable
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import IO, Any, cast

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from stand_in_tracker import stand_in, without
from torch import Tensor
from torchvision import transforms

import P1_classifier
from digits import metrics
from digits.classifier import (
    SHIPPED,
    ClassifierConfig,
    DigitClassifier,
    accuracy,
    grade_folder,
    hub_classifier,
    load_classifier,
    make_lenet,
    make_resnet,
    make_resnet34,
    quality,
    read_graded,
    round_weights,
    shipped_classifiers,
)
from digits.metrics import Reference, copies, coverage, frechet, make_reference, measure
from P1_classifier import Grade, Train, train, warp
from P1_dataloader import BalancedIndex, load_digits, read_digit
from P1_model import DOMAINS
from runtime.cli import BadInput, run_script
from runtime.files import load_safetensors
from training.draws import Draws

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
CPU = torch.device("cpu")
BARS = {"mnistm": 0.98, "svhn": 0.94}  # on real validation images; measured 0.991 and 0.956


# ---------------------------------------------------------------- fixtures


@pytest.fixture(scope="module")
def real_images() -> dict[str, tuple[Tensor, Tensor]]:
    """Load 1,000 validation images per domain from the packed data: images [N,3,28,28] uint8 and digits [N]."""
    archive = SHARED / "digits.tar.gz"
    if not archive.is_file():
        pytest.skip("the real digits are not on this machine")
    with tarfile.open(archive) as packed:
        files = {
            member.name: cast(IO[bytes], packed.extractfile(member)).read() for member in packed if member.isfile()
        }
    result = {}
    for name in DOMAINS:
        rows = list(csv.DictReader(io.StringIO(files[f"digits/{name}/val.csv"].decode())))
        rows = rows[:: len(rows) // 1000][:1000]
        contents: list[Any] = [io.BytesIO(files[f"digits/{name}/data/{row['image_name']}"]) for row in rows]
        images = torch.stack([torch.from_numpy(read_digit(content).copy()) for content in contents])
        result[name] = (images, torch.tensor([int(row["label"]) for row in rows]))
    return result


@pytest.fixture(scope="module")
def shipped() -> list[DigitClassifier]:
    """Load the classifiers in checkpoints/."""
    return shipped_classifiers(CPU)


@pytest.fixture
def graded(tmp_path: Path) -> Path:
    """Write a folder as hw2_1.sh does: 3 images per digit and domain, some larger, grey or with a palette."""
    for domain in DOMAINS:
        (tmp_path / "out" / domain).mkdir(parents=True)
        for index in range(30):
            size = 40 if index % 7 == 0 else 28
            pixels = patches(1, size, seed=index)[0].permute(1, 2, 0)
            image = Image.fromarray(pixels.numpy())
            image = image.convert("L") if index % 5 == 1 else image.convert("P") if index % 5 == 2 else image
            image.save(tmp_path / "out" / domain / f"{index % 10}_{index // 10 + 1:03d}.png")
    return tmp_path / "out"


def patches(count: int, size: int = 28, seed: int = 0) -> Tensor:
    """Draw [count,3,size,size] uint8: large patches of random colour, which even a random network distinguishes."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return torch.nn.functional.interpolate(coarse.float(), size=(size, size)).to(torch.uint8)


def random_classifier(domain: int) -> DigitClassifier:
    """Return the course's LeNet with random weights, centred so that it predicts every digit, and a reference of patches."""
    torch.manual_seed(domain)
    classifier = DigitClassifier(make_lenet(), domain)
    classifier.network[-1].bias -= classifier(patches(200)).mean(0)
    features = classifier.features(patches(200))
    classifier.reference = make_reference(features[:100], features[100:], 100, 100)
    return classifier


def course_file(path: Path) -> Path:
    """Write a file with the layout of Classifier.pth and random weights."""
    torch.save({"state_dict": make_lenet().state_dict(), "optimizer": {"state": {}}}, path)
    return path


# ---------------------------------------------------------------- the rule


def course_confusion(folder: Path, classifier: DigitClassifier) -> list[list[int]]:
    """Grade as the course does, written a second time with torchvision's transforms, one image at a time."""
    prepare = transforms.Compose(
        [transforms.Resize((28, 28)), transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    )
    counts = [[0] * 10 for _ in range(10)]
    for path in folder.iterdir():
        image = prepare(Image.open(path).convert("RGB"))
        with torch.no_grad():
            counts[int(path.name[0])][int(classifier.network(image[None]).argmax())] += 1
    return counts


def test_a_folder_is_graded_as_the_course_grades_it(graded: Path) -> None:
    classifiers = [random_classifier(0), random_classifier(1)]
    result = grade_folder(graded, classifiers)
    for name, classifier in zip(DOMAINS, classifiers, strict=True):
        expected = course_confusion(graded / name, classifier)
        assert sum(any(column) for column in zip(*expected, strict=True)) > 2  # else a constant would pass
        assert result[name]["confusion"] == expected
        assert result[name]["accuracy"] == pytest.approx(sum(expected[d][d] for d in range(10)) / 30)


def test_the_mean_is_over_the_two_domains_and_not_over_the_images(graded: Path) -> None:
    for path in (graded / "svhn").glob("*_00[23].png"):
        path.unlink()
    result = grade_folder(graded, [random_classifier(0), random_classifier(1)])
    assert result["mean"] == pytest.approx((result["mnistm"]["accuracy"] + result["svhn"]["accuracy"]) / 2)


def test_accuracy_uses_the_classifier_of_each_domain() -> None:
    classifiers = [random_classifier(0), random_classifier(1)]
    images = patches(40)
    domains = torch.arange(40) % 2
    digits = torch.where(domains == 0, classifiers[0](images).argmax(1), (classifiers[1](images).argmax(1) + 1) % 10)
    assert accuracy(classifiers, images, digits, domains) == [1.0, 0.0]


@pytest.mark.parametrize("domain", [0, 1])
def test_a_classifier_reads_in_fp32_inside_a_block_of_lower_precision(
    shipped: list[DigitClassifier], domain: int
) -> None:
    """P1_inference.py samples in such a block; what it redraws must be what the grader misreads."""
    expected = shipped[domain](patches(20))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(shipped[domain](patches(20)), expected)
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16  # the rest of the block is unchanged


def test_accuracy_of_no_images_is_nan() -> None:
    classifiers = [DigitClassifier(make_resnet(ClassifierConfig()), domain) for domain in (0, 1)]
    images = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    shares = accuracy(classifiers, images, torch.zeros(2), torch.zeros(2))
    assert shares[1] != shares[1]


# ---------------------------------------------------------------- the course's classifiers


def test_the_courses_mnistm_classifier_reads_real_digits(real_images: dict[str, tuple[Tensor, Tensor]]) -> None:
    path = SHARED / "homework" / "Classifier.pth"
    if not path.is_file():
        pytest.skip("the course's Classifier.pth is not on this machine")
    images, digits = real_images["mnistm"]
    assert accuracy([load_classifier(path, CPU)], images, digits, torch.zeros(len(images)))[0] >= 0.93


def test_timms_resnet34_is_the_svhn_classifier(tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    network = timm.create_model("resnet34", num_classes=10).eval()
    network.conv1, network.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()
    save_file(network.state_dict(), tmp_path / "resnet34.safetensors")
    classifier = load_classifier(tmp_path / "resnet34.safetensors", CPU)
    images = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8)
    with torch.no_grad():
        expected = network(images / 127.5 - 1)
    assert classifier.domain == 1
    torch.testing.assert_close(classifier(images), expected, rtol=1e-4, atol=1e-4)


def test_a_hub_out_of_reach_is_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("timm.models")

    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no route to the hub")

    monkeypatch.setattr(models, "load_state_dict_from_hf", unreachable)
    with pytest.raises(BadInput, match=r"edadaltocg/resnet34_svhn can't be loaded \(no route"):
        hub_classifier(CPU)


def test_the_hubs_weights_are_read_without_code_as_the_svhn_classifier(monkeypatch: pytest.MonkeyPatch) -> None:
    models = pytest.importorskip("timm.models")
    state, requests = make_resnet34().state_dict(), []

    def from_hub(name: str, **options: Any) -> dict[str, Tensor]:
        requests.append((name, options))
        return state

    monkeypatch.setattr(models, "load_state_dict_from_hf", from_hub)
    classifier = hub_classifier(CPU)
    assert requests == [("edadaltocg/resnet34_svhn", {"weights_only": True})]
    assert classifier.domain == 1
    assert all(torch.equal(value, state[name]) for name, value in classifier.network.state_dict().items())


def test_a_weight_of_another_shape_is_named(tmp_path: Path) -> None:
    state = make_lenet().state_dict()
    state["fc1.weight"] = state["fc1.weight"][:, :200].clone()
    torch.save({"state_dict": state, "optimizer": {}}, tmp_path / "odd.pth")
    with pytest.raises(BadInput, match=r"odd\.pth.*fc1\.weight"):
        load_classifier(tmp_path / "odd.pth", CPU)


def test_a_missing_classifier_says_where_the_courses_is(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"Classifier\.pth does not exist; .* ntudlcv/DLCV-Fall-2024-HW2"):
        load_classifier(tmp_path / "Classifier.pth", CPU)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_a_wrapped_classifier_is_read_under_any_name(tmp_path: Path, suffix: str) -> None:
    state = make_lenet().state_dict()
    torch.save({"model": {f"module.{name}": value for name, value in state.items()}}, tmp_path / f"w.{suffix}")
    loaded = load_classifier(tmp_path / f"w.{suffix}", CPU)
    assert loaded.domain == 0
    torch.testing.assert_close(dict(loaded.network.state_dict()), dict(state))


def test_a_classifier_of_another_version_is_one_line(tmp_path: Path, shipped: list[DigitClassifier]) -> None:
    path = tmp_path / "c.safetensors"
    weights = {f"network.{name}": value for name, value in round_weights(shipped[0].network).items()}
    header = {"kind": "P1 digit judge", "domain": 0, "model": asdict(ClassifierConfig(fold=1)), "origin": {}}
    for changes, message in (
        ({"domain": 7}, "domain: .*it is 7"),
        ({"model": {"channels": [], "blocks": []}}, "no network has this layout"),
        ({}, "lacks reference.mean"),
    ):
        save_file(weights, path, {"judge": json.dumps(header | changes)})
        with pytest.raises(BadInput, match=rf"c\.safetensors.*{message}"):
            load_classifier(path, CPU)
    save_file(weights, path, {"judge": "{"})
    with pytest.raises(BadInput, match=r"c\.safetensors, header of a digit classifier is not valid JSON"):
        load_classifier(path, CPU)


@pytest.mark.parametrize("count", [1, 3])
def test_a_reference_of_few_validation_images_has_no_precision(count: int) -> None:
    features = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    result = measure(features, make_reference(features, features[:count], 20, 20))
    assert math.isnan(result["precision"])
    assert math.isfinite(result["frechet"])


@pytest.mark.parametrize("content", [{"weight": torch.zeros(1)}, [torch.zeros(1)], torch.zeros(3), {"state_dict": 3}])
def test_a_file_without_a_classifier_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(BadInput, match=r"other\.pth is no digit classifier"):
        load_classifier(tmp_path / "other.pth", CPU)


# ---------------------------------------------------------------- our classifiers


@pytest.mark.parametrize("domain", [0, 1])
def test_a_shipped_classifier_reaches_its_bar_on_real_images(
    shipped: list[DigitClassifier], real_images: dict[str, tuple[Tensor, Tensor]], domain: int
) -> None:
    images, digits = real_images[DOMAINS[domain]]
    assert accuracy([shipped[domain]], images, digits, torch.zeros(len(images)))[0] >= BARS[DOMAINS[domain]]


@pytest.mark.parametrize("domain", [0, 1])
def test_a_shipped_classifier_distinguishes_real_images_from_noise_and_from_five_repeated_images(
    shipped: list[DigitClassifier], real_images: dict[str, tuple[Tensor, Tensor]], domain: int
) -> None:
    images, _ = real_images[DOMAINS[domain]]
    noise = torch.randint(0, 256, (300, 3, 28, 28), dtype=torch.uint8)
    few = images[:5].repeat(60, 1, 1, 1)
    real, strange, repeated = (quality(shipped[domain], sample) for sample in (images[:300], noise, few))
    assert real["copies"] < 0.03
    assert min(real["precision"], real["recall"]) > 0.85
    assert strange["frechet"] > 10 * real["frechet"]
    assert repeated["recall"] < 0.05


def test_a_shipped_classifier_recognises_its_training_images(shipped: list[DigitClassifier]) -> None:
    for classifier in shipped:
        assert classifier.reference
        assert copies(classifier.reference.train[:200], classifier.reference) == 1


@pytest.mark.parametrize(("domain", "fold"), [(0, 1), (1, 2)])
def test_training_writes_a_classifier_that_loads_and_the_same_seed_gives_the_same_file(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], domain: int, fold: Any
) -> None:
    name_of: Any = DOMAINS[domain]
    for name in ("a", "b"):
        train(Train(name_of, data=digits_folder, output=tmp_path / name, epochs=2, batch=10, fold=fold, device="cpu"))
    first, second = (load_classifier(tmp_path / name / "classifier.safetensors", CPU) for name in "ab")
    assert f"{name_of} validation accuracy: " in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "record.json").read_text())["seed"] == 0
    assert first.domain == domain
    for one, other in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(one, other)
    assert first.reference
    assert second.reference
    assert torch.equal(first.reference.train, second.reference.train)


def test_augmented_images_stay_in_range_and_differ() -> None:
    draws = Draws(0, 0, slice(0, 8), 8, CPU)
    x = P1_classifier.augment(torch.rand(1, 3, 28, 28).expand(8, -1, -1, -1) * 2 - 1, draws, recolour=1)
    assert x.abs().max() <= 1
    assert torch.cdist(x.flatten(1), x.flatten(1)).fill_diagonal_(1).min() > 0.1


# ---------------------------------------------------------------- every flag of a training, against a plain loop


class Fixed:
    """Draws for two images, which take these uniform numbers, and what they lack to one. Normal numbers are those of NORMAL."""

    def __init__(self, *values: float):
        self.values = list(values)

    def uniform(self) -> Tensor:
        value = self.values.pop(0)
        return torch.tensor([value, 1 - value])

    def normal(self, *shape: int) -> Tensor:
        return NORMAL[: shape[0]].expand(2, *shape)


NORMAL = torch.tensor([1.0, 0.5, -1.0]).view(3, 1, 1)
UNMOVED = (0.5,) * 5


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("draws", [UNMOVED, (0.9, 0.8, 0.3, 0.7, 0.2), (1, 0, 1, 0, 1), (0, 0.9, 0.4, 1, 0.3)])
def test_a_warp_reads_turned_scaled_and_shifted_points(draws: tuple[float, ...]) -> None:
    """By up to 12 degrees, 15 % and 3 of 28 pixels; the images hold their coordinates -1..1, so that values are the points."""
    y, x = torch.meshgrid(*[(torch.arange(28) + 0.5) / 14 - 1] * 2, indexing="ij")
    warped = warp(torch.stack([x, y]).expand(2, -1, -1, -1), cast(Draws, Fixed(*draws)))
    for image, sign in zip(warped, (1, -1), strict=True):
        angle, wide, high, right, down = (sign * (2 * draw - 1) for draw in draws)
        turn, x_scale, y_scale = math.radians(12 * angle), math.exp(0.15 * wide), math.exp(0.15 * high)
        x_point = math.cos(turn) * x_scale * x - math.sin(turn) * y_scale * y + right * 3 / 14
        y_point = math.sin(turn) * x_scale * x + math.cos(turn) * y_scale * y + down * 3 / 14
        points = torch.stack([x_point, y_point])
        inside = points.abs().amax(0) < 0.96
        torch.testing.assert_close(image[:, inside], points[:, inside], rtol=0, atol=1e-5)
        assert inside.float().mean() > 0.5
    white = torch.ones(2, 3, 28, 28)
    torch.testing.assert_close(warp(white, cast(Draws, Fixed(*draws))), white)  # nothing dark comes in from outside


@pytest.mark.parametrize("recolour", [0.0, 0.2, 1.0])
@pytest.mark.parametrize("draws", [(0.0, 0, 0, 0, 0), (0.49, 1, 0, 1, 0.5), (0.5, 0, 1, 0, 0.25)])
def test_colours_are_inverted_or_not_then_strengthened_shifted_and_noised(
    recolour: float, draws: tuple[float, ...]
) -> None:
    """Each within a range that `recolour` scales; the noise has a standard deviation of up to 0.12."""
    x = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0)) * 2 - 1
    augmented = P1_classifier.augment(x, cast(Draws, Fixed(*UNMOVED, *draws)), recolour)
    for image, before, values in zip(augmented, x, (draws, [1 - draw for draw in draws]), strict=True):
        inverted, saturation, contrast, shift, noise = values
        expected = -before if inverted < 0.5 else before
        grey = sum(expected) / 3
        expected = grey + (1 + recolour * (1.2 * saturation - 1)) * (expected - grey)
        expected = (1 + recolour * (0.9 * contrast - 0.5)) * expected
        expected = expected + recolour * (0.6 * shift - 0.3 + 0.1 * NORMAL) + 0.12 * noise * NORMAL
        torch.testing.assert_close(image, expected.clamp(-1, 1), rtol=0, atol=1e-5)


def plain_classifier(**flags: Any) -> dict[str, Tensor]:
    """Train as the help says, in a plain loop; return the averaged weights as the file stores them."""
    values: dict[str, Any] = {
        "epochs": 2,
        "recolour": 0.2,
        "fold": 2,
        "batch": 10,
        "lr": 4e-3,
        "weight_decay": 0.05,
    } | flags
    values = {"smoothing": 0.1, "ema": 0.998, "seed": 0} | values
    data = load_digits(values["data"], "train", [DOMAINS.index(values["domain"])])
    torch.manual_seed(values["seed"])
    network = make_resnet(ClassifierConfig(fold=values["fold"])).to(memory_format=torch.channels_last)
    average = {name: value.clone() for name, value in network.state_dict().items()}
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=values["weight_decay"], fused=True)
    batch = values["batch"]
    total = values["epochs"] * len(data) // batch
    for step in range(total):
        draws = Draws(values["seed"], step, slice(batch), batch, CPU)
        groups, members = draws.stratified(), draws.uniform()
        rows = BalancedIndex(data, None, False)(groups, members)  # as the digits come
        x = P1_classifier.augment(data.images[rows] / 127.5 - 1, draws, values["recolour"])
        logits = network(x.contiguous(memory_format=torch.channels_last))
        F.cross_entropy(logits, data.digits[rows], label_smoothing=values["smoothing"]).backward()
        rise, fall = min(1, (step + 1) / max(1, total // 5)), min(1, (total - step) / (0.8 * total))
        optimizer.param_groups[0]["lr"] = values["lr"] * rise * fall
        optimizer.step()
        optimizer.zero_grad()
        decay = min(values["ema"], (1 + step) / (10 + step)) if step else 0
        for name, value in network.state_dict().items():
            learned = name in dict(network.named_parameters())
            average[name] = decay * average[name] + (1 - decay) * value if learned else value.clone()
    return average


def distance(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """Return the length of the difference of all weights."""
    return math.sqrt(sum(float((one[name].float() - other[name].float()).square().sum()) for name in one))


DECIDES_WEIGHTS: dict[str, Any] = {
    "domain": "svhn", "data": "other", "epochs": 3, "recolour": 0.9, "fold": 1, "batch": 7, "lr": 1e-3,
    "weight_decay": 20.0, "smoothing": 0.5, "ema": 0.1, "seed": 2,
}  # fmt: skip


@pytest.mark.parametrize("flag", DECIDES_WEIGHTS)
def test_every_flag_that_decides_the_classifier_does_what_a_plain_loop_does_with_it(
    flag: str, digits_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(digits_folder, tmp_path / "other")
    csv_file = tmp_path / "other" / "mnistm" / "train.csv"
    csv_file.write_text("".join(csv_file.read_text().splitlines(keepends=True)[:-10]))
    usual: dict[str, Any] = {
        "domain": "mnistm",
        "data": digits_folder,
        "epochs": 2,
        "recolour": 0.2,
        "fold": 2,
        "batch": 10,
    }
    changed = usual | {flag: tmp_path / "other" if flag == "data" else DECIDES_WEIGHTS[flag]}
    train(Train(**changed, output=tmp_path / "run", device="cpu", precision="fp32"))
    file = load_classifier(tmp_path / "run" / "classifier.safetensors", CPU)
    assert DOMAINS[file.domain] == changed["domain"]
    expected = plain_classifier(**changed)
    stored = {name: value.half() if value.dim() > 1 else value for name, value in expected.items()}
    assert distance(file.network.state_dict(), stored) < 1e-3  # these values of the flags move the weights by 0.2 to 30


@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)])
def test_half_precision_computes_in_it_and_stores_fp32_vectors(
    precision: Any, dtype: torch.dtype, digits_folder: Path, tmp_path: Path
) -> None:
    types = set()

    def record_type(module: torch.nn.Module, _: Any, output: Any) -> None:
        if isinstance(module, torch.nn.Conv2d) and module.training:
            types.add(output.dtype)

    hook = torch.nn.modules.module.register_module_forward_hook(record_type)
    try:
        settings = Train("svhn", data=digits_folder, output=tmp_path, epochs=1, batch=10, device="cpu")
        train(replace(settings, precision=precision))
    finally:
        hook.remove()
    assert types == {dtype}
    metrics = json.loads((tmp_path / "record.json").read_text())["metrics"]
    assert ("loss_scale" in metrics) == (precision == "fp16")
    assert load_safetensors(tmp_path / "classifier.safetensors")[0]["network.1.bias"].dtype == torch.float32


@pytest.mark.parametrize(("domain", "defaults"), [("mnistm", (24, 0.2, 1)), ("svhn", (43, 1.0, 2))])
def test_defaults_depend_on_the_domain(
    domain: Any, defaults: tuple[float, ...], digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(config: Any, facts: dict[str, Any], *_: object) -> None:
        raise BadInput(json.dumps([config.steps, facts["recolour"], facts["fold"]]))

    images = {"mnistm": 40, "svhn": 20}[domain]
    monkeypatch.setattr(P1_classifier, "TrainingRun", stop)
    with pytest.raises(BadInput) as stopped:
        train(Train(domain, data=digits_folder, output=tmp_path, batch=images, device="cpu"))
    assert json.loads(str(stopped.value)) == list(defaults)


@pytest.mark.parametrize(("save_every", "steps"), [(3, [3, 6, 8]), (0, [8])])
def test_checkpoints_come_as_often_as_asked(
    save_every: int, steps: list[int], digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved: list[int] = []
    monkeypatch.setattr("training.loop.save_state", lambda path, state: saved.append(state["step"]))
    more: dict[str, Any] = {"epochs": 2, "batch": 10, "save_every": save_every, "device": "cpu"}
    train(Train("mnistm", data=digits_folder, output=tmp_path, **more))
    assert sorted(set(saved)) == steps


def test_the_curves_go_to_a_tracker_whose_absence_is_named_first(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Train(
        "svhn", data=digits_folder, output=tmp_path / "run", epochs=1, batch=10, device="cpu", track="trackio"
    )
    with monkeypatch.context() as patch:
        without("trackio", patch)
        with pytest.raises(BadInput, match="--track trackio: .* pip install trackio"):
            train(settings)
    assert not (tmp_path / "run").exists()
    tracker = stand_in(tmp_path, monkeypatch, "trackio")
    train(settings)
    (_, options), (_, step, values), finish = tracker.calls
    assert (options["project"], options["name"]) == ("P1 classifier of svhn", "run")
    assert step == 2
    assert "loss" in values
    assert finish == ("finish",)


def test_the_validation_accuracy_is_that_of_the_file_on_val_csv(
    digits_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(Train("svhn", data=digits_folder, output=tmp_path, epochs=30, batch=10, device="cpu", precision="fp32"))
    val = load_digits(digits_folder, "val", [1])
    answers = load_classifier(tmp_path / "classifier.safetensors", CPU).read(val.images)
    right = float((answers == val.digits).double().mean())
    assert f"svhn validation accuracy: {right:.4f}\n" in capsys.readouterr().out
    metrics = json.loads((tmp_path / "record.json").read_text())["metrics"]
    assert (metrics["val_accuracy"], metrics["pictures"]) == (right, {"train": 20, "val": 4})


# ---------------------------------------------------------------- measures


def test_the_frechet_distance_of_equal_sets_is_zero() -> None:
    mean, covariance = metrics.moments(torch.randn(300, 16))
    assert frechet(mean, covariance, mean, covariance) == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("weighted", [False, True])
def test_moments_are_numpys_also_of_weighted_features(weighted: bool) -> None:
    features = torch.randn(30, 4, generator=torch.Generator().manual_seed(0))
    weights = torch.arange(1.0, 31) if weighted else None
    mean, covariance = metrics.moments(features, weights)
    numbers = None if weights is None else weights.numpy()
    expected = np.average(features.double().numpy(), 0, numbers), np.cov(features.double().numpy().T, aweights=numbers)
    np.testing.assert_allclose(mean, expected[0])
    np.testing.assert_allclose(covariance, expected[1])


def test_the_frechet_distance_of_two_gaussians_is_the_closed_form() -> None:
    one = torch.diag(torch.tensor([1.0, 4.0, 9.0]))
    other = torch.diag(torch.tensor([4.0, 4.0, 1.0]))
    shift = torch.tensor([3.0, 0.0, 4.0])
    # |shift|^2 + sum (sqrt a - sqrt b)^2
    assert frechet(torch.zeros(3), one, shift, other) == pytest.approx(25 + 1 + 0 + 4)


def test_the_frechet_distance_turns_with_the_axes() -> None:
    turn = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    one, other = torch.diag(torch.tensor([1.0, 2.0, 3.0, 4.0])).double(), torch.eye(4).double()
    spread = torch.diag(torch.tensor([5.0, 1.0, 1.0, 2.0])).double()
    plain = frechet(torch.zeros(4), one, torch.ones(4), spread)
    turned = frechet(torch.zeros(4), turn @ one @ turn.T, turn @ torch.ones(4).double(), turn @ spread @ turn.T)
    assert turned == pytest.approx(plain)
    assert frechet(torch.zeros(4), one, torch.zeros(4), other) > 0


def test_coverage_counts_queries_inside_the_balls_around_the_manifold() -> None:
    manifold = torch.tensor([[0.0], [1.0], [3.0], [7.0]])  # distances to the nearest other: 1, 1, 2, 4
    queries = torch.tensor([[-1.0], [-1.1], [2.5], [11.0], [11.1]])
    assert coverage(queries, manifold, k=1) == pytest.approx(3 / 5)


def test_precision_falls_for_strangers_and_recall_for_missing_variety() -> None:
    torch.manual_seed(0)
    left, right = torch.randn(300, 2), torch.randn(300, 2) + 100
    reference = make_reference(torch.cat([left, right]), torch.cat([left, right])[torch.randperm(600)], 600, 600)
    half = measure(left + 0.01, reference)
    strange = measure(torch.cat([left, right, torch.randn(600, 2) + 1000]), reference)
    assert half["precision"] > 0.95
    assert half["recall"] == pytest.approx(0.5, abs=0.03)
    assert strange["precision"] == pytest.approx(0.5, abs=0.03)
    assert strange["recall"] > 0.95


def test_training_images_are_copies_and_new_ones_are_not() -> None:
    torch.manual_seed(0)
    train, val, new = torch.randn(3, 1000, 8).unbind()
    reference = make_reference(train, val, 1000, 1000)
    assert copies(train, reference) == 1
    assert copies(new, reference) < 0.03


def test_a_reference_survives_its_file(tmp_path: Path) -> None:
    reference = make_reference(torch.randn(50, 8), torch.randn(20, 8), 40, 20)
    back = Reference.from_tensors(reference.tensors(), CPU)
    assert torch.equal(back.train, reference.train)
    assert copies(back.train, back) == 1


def test_quality_of_a_handful_of_images_is_nan() -> None:
    classifier = random_classifier(0)
    assert all(value != value for value in quality(classifier, torch.zeros(3, 3, 28, 28, dtype=torch.uint8)).values())


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"batch": 0}, "--batch 0"),
        ({"epochs": 0}, "--epochs 0"),
        ({"lr": math.nan}, "--lr nan"),
        ({"lr": 1e30}, "the loss is (nan|inf)"),
        ({"smoothing": 3.0}, "--smoothing 3.0"),
        ({"recolour": math.nan}, "--recolour nan"),
        ({"ema": math.nan}, "--ema nan"),
    ],
)
def test_a_classifier_of_bad_numbers_is_not_written(
    flags: dict[str, Any], message: str, digits_folder: Path, tmp_path: Path
) -> None:
    settings = Train("svhn", data=digits_folder, output=tmp_path / "run", epochs=8, batch=10, device="cpu")
    with pytest.raises(BadInput, match=message):
        train(replace(settings, **flags))
    assert not (tmp_path / "run" / "classifier.safetensors").exists()


def test_an_output_that_is_a_folder_is_refused_before_the_work(digits_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "classifier.safetensors").mkdir()
    with pytest.raises(BadInput, match="--output .* is a folder"):
        train(Train("svhn", data=digits_folder, output=tmp_path))


def test_training_needs_no_data_of_the_other_domain(digits_folder: Path, tmp_path: Path) -> None:
    shutil.rmtree(digits_folder / "mnistm")
    train(Train("svhn", data=digits_folder, output=tmp_path / "run", epochs=1, batch=10, device="cpu"))
    assert (tmp_path / "run" / "classifier.safetensors").is_file()


def test_a_stopped_training_goes_on_to_the_same_classifier(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = Train("mnistm", data=digits_folder, epochs=4, batch=10, device="cpu", precision="fp32")
    train(replace(settings, output=tmp_path / "whole"))
    plain, calls = P1_classifier.augment, []

    def stopping(x: Tensor, draws: Draws, recolour: float, invert: bool) -> Tensor:
        calls.append(x)
        if len(calls) == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return plain(x, draws, recolour, invert)

    monkeypatch.setattr(P1_classifier, "augment", stopping)
    with pytest.raises(SystemExit, match="130"):
        train(replace(settings, output=tmp_path / "parts"))
    assert not (tmp_path / "parts" / "classifier.safetensors").exists()
    train(replace(settings, output=tmp_path / "parts"))
    whole, parts = (
        load_classifier(tmp_path / name / "classifier.safetensors", CPU).state_dict() for name in ("whole", "parts")
    )
    assert all(torch.equal(whole[key], parts[key]) for key in whole)
    with pytest.raises(BadInput, match=r"was trained with lr 0.004, not 0.1"):
        train(replace(settings, output=tmp_path / "parts", lr=0.1))


@pytest.mark.parametrize("command", [Train("svhn", device="cuda:77"), Grade(Path("out"), device="cuda:77")])
def test_an_absent_device_is_named(command: Train | Grade, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(BadInput, match="--device cuda:77"):
        P1_classifier.main(command)


def grade_command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Run `P1_classifier.py grade ..`; return its exit code."""
    monkeypatch.setattr("sys.argv", ["P1_classifier.py", "grade", *map(str, arguments)])
    command: Any = Train | Grade
    with pytest.raises(SystemExit) as leaving:
        run_script(P1_classifier.main, command, None)
    return int(leaving.value.code or 0)


def test_grading_prints_three_numbers_with_four_decimals_and_leaves_the_folder_unchanged(
    graded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    before, record = sorted(graded.rglob("*")), tmp_path / "record.json"
    course = course_file(tmp_path / "Classifier.pth")
    assert grade_command(monkeypatch, graded, "--mnistm-classifier", course, "--record", record, "--device", "cpu") == 0
    output, logged = capsys.readouterr()
    lines = output.splitlines()
    assert logged.splitlines()[-1] == f"record: {record}"
    metrics = json.loads(record.read_text())["metrics"]
    assert lines[-3:] == [
        f"mnistm accuracy: {metrics['mnistm']['accuracy']:.4f}",
        f"svhn accuracy: {metrics['svhn']['accuracy']:.4f}",
        f"mean accuracy: {metrics['mean']:.4f}",
    ]
    assert set(metrics["mnistm"]["quality"]) == {"frechet", "precision", "recall", "copies"}
    assert sorted(graded.rglob("*")) == before


@pytest.mark.parametrize("named", [(), ("mnistm",), ("svhn",), DOMAINS])
def test_shipped_classifiers_are_not_independent_of_redrawn_digits_which_a_line_says(
    named: tuple[str, ...], graded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    flags = [word for name in named for word in (f"--{name}-classifier", SHIPPED / f"judge_{name}.safetensors")]
    assert grade_command(monkeypatch, graded, *flags, "--record", tmp_path / "r.json", "--device", "cpu") == 0
    assert ("selected by the shipped classifiers" in capsys.readouterr().err) == (len(named) < 2)


def break_png(folder: Path) -> None:
    path = folder / "svhn" / "4_001.png"
    path.write_bytes(path.read_bytes()[:60])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: shutil.rmtree(folder / "svhn"), "svhn does not exist"),
        (lambda folder: [p.unlink() for p in (folder / "svhn").iterdir()], "svhn is empty"),
        (lambda folder: (folder / "svhn" / "0_001.png").rename(folder / "svhn" / "a_001.png"), "a_001.png: the name"),
        (lambda folder: (folder / "svhn" / "7_more").mkdir(), "7_more is a folder, not a picture"),
        (break_png, "4_001.png is not a readable picture"),
    ],
    ids=["missing", "empty", "name", "folder", "broken"],
)
def test_a_folder_that_cannot_be_graded_is_refused_in_one_line(
    graded: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    damage: Callable[[Path], object],
    message: str,
) -> None:
    damage(graded)
    assert grade_command(monkeypatch, graded, "--record", tmp_path / "record.json") == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_hidden_names_and_thumbnails_do_not_count_in_a_graded_folder(graded: Path) -> None:
    for name in ("._0_001.png", ".DS_Store", "Thumbs.db"):
        (graded / "svhn" / name).write_bytes(b"\0")
    assert len(read_graded(graded / "svhn")[0]) == 30


def test_a_record_inside_the_graded_folder_is_refused(
    graded: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert grade_command(monkeypatch, graded, "--record", graded / "record.json") == 2
    assert "inside the graded folder" in capsys.readouterr().err


def test_a_classifier_of_the_other_domain_is_refused(
    graded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    course = course_file(tmp_path / "Classifier.pth")
    assert grade_command(monkeypatch, graded, "--svhn-classifier", course, "--record", tmp_path / "r.json") == 2
    assert "is a classifier of mnistm" in capsys.readouterr().err


@pytest.mark.parametrize("chosen", DOMAINS)
def test_a_named_classifier_grades_its_domain_alone(
    chosen: str, graded: Path, tmp_path: Path, shipped: list[DigitClassifier], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is our shipped file with its answers turned by one digit, so that it reads every image as another digit."""
    domain = DOMAINS.index(chosen)
    path = SHIPPED / f"judge_{chosen}.safetensors"
    tensors, metadata = load_safetensors(path)
    for name in [name for name in tensors if name.startswith(f"network.{len(shipped[domain].network) - 1}.")]:
        tensors[name] = tensors[name].roll(1, 0).contiguous()
    save_file(tensors, tmp_path / "turned.safetensors", metadata)
    flags = (f"--{chosen}-classifier", tmp_path / "turned.safetensors", "--device", "cpu")
    assert grade_command(monkeypatch, graded, *flags, "--record", tmp_path / "record.json") == 0
    metrics = json.loads((tmp_path / "record.json").read_text())["metrics"]
    for name, classifier in zip(DOMAINS, shipped, strict=True):
        confusion = torch.tensor(course_confusion(graded / name, classifier))
        expected = confusion.roll(1, 1) if name == chosen else confusion
        assert metrics[name]["confusion"] == expected.tolist()


def test_the_hubs_classifier_grades_svhn(graded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = random_classifier(1)
    monkeypatch.setattr(P1_classifier, "hub_classifier", lambda device: hub)
    flags = ("--svhn-classifier", "hub", "--device", "cpu", "--record", tmp_path / "record.json")
    assert grade_command(monkeypatch, graded, *flags) == 0
    metrics = json.loads((tmp_path / "record.json").read_text())["metrics"]
    assert metrics["svhn"]["confusion"] == course_confusion(graded / "svhn", hub)


def test_classifiers_of_all_domains_may_be_named_at_once(
    graded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    course, svhn = course_file(tmp_path / "Classifier.pth"), SHIPPED / "judge_svhn.safetensors"
    rows = []
    for flags in (("--classifiers", course, svhn), ("--mnistm-classifier", course, "--svhn-classifier", svhn)):
        assert grade_command(monkeypatch, graded, *flags, "--record", tmp_path / "r.json", "--device", "cpu") == 0
        rows.append(json.loads((tmp_path / "r.json").read_text())["metrics"])
    assert rows[0] == rows[1]
    assert "selected by the shipped classifiers" not in capsys.readouterr().err


HELD_BY = {
    "output": test_training_writes_a_classifier_that_loads_and_the_same_seed_gives_the_same_file,
    "save_every": test_checkpoints_come_as_often_as_asked,
    "precision": test_half_precision_computes_in_it_and_stores_fp32_vectors,
    "device": test_an_absent_device_is_named,
    "track": test_the_curves_go_to_a_tracker_whose_absence_is_named_first,
    "folder": test_grading_prints_three_numbers_with_four_decimals_and_leaves_the_folder_unchanged,
    "record": test_grading_prints_three_numbers_with_four_decimals_and_leaves_the_folder_unchanged,
    "classifiers": test_classifiers_of_all_domains_may_be_named_at_once,
    "mnistm_classifier": test_a_named_classifier_grades_its_domain_alone,
    "svhn_classifier": test_a_named_classifier_grades_its_domain_alone,
}


def test_the_effect_of_every_flag_is_tested() -> None:
    assert {*DECIDES_WEIGHTS, *HELD_BY} == {field.name for command in (Train, Grade) for field in fields(command)}
