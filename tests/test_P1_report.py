"""P1's figures: the reverse process, the guidance sweep, and their record."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_digits import TINY
from torch import Tensor

from diffusion.noise import draw, generators
from diffusion.schedule import Schedule, cosine
from digits.classifier import DigitClassifier
from digits.sampling import DigitRequest, DigitSampler, DigitSamplerConfig, graded_requests, sample
from P1_model import Network, save_network
from P1_report import Settings, label_effects, main, reverse_process
from runtime.cli import BadInput
from runtime.images import image_grid, to_uint8
from runtime.seeds import derived_seed


def test_the_reverse_process_goes_from_the_noise_of_the_seed_to_the_image(tiny_network: Network) -> None:
    total = len(tiny_network.schedule)
    states = reverse_process(tiny_network, [DigitRequest(0, 0, 5), DigitRequest(0, 1, 6)])
    assert list(states)[0] == total
    assert list(states) == sorted(states, reverse=True)
    assert torch.equal(states[total], draw(generators([5, 6]), (3, 28, 28), torch.device("cpu")))
    assert states[min(states)].abs().max() < states[total].abs().max()


def test_the_command_writes_its_figures_and_a_record(tmp_path: Path) -> None:
    main(Settings(output=tmp_path, figures=("sweep",), scales=(1.0, 3.0), sweep_count=1, batch=20))
    rows = json.loads((tmp_path / "record.json").read_text())["metrics"]["sweep"]
    assert [row["scale"] for row in rows] == [1.0, 3.0]
    assert Image.open(tmp_path / "guidance_sweep.png").width > 500


class Figures:
    """Recorders in the place of the drawing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, module: str) -> None:
        self.grids: dict[str, tuple[Any, ...]] = {}
        self.lines: dict[str, tuple[Any, ...]] = {}
        monkeypatch.setattr(f"{module}.pixel_grid", lambda path, *rest: self.grids.update({path.stem: rest}))
        monkeypatch.setattr(f"{module}.line_figure", lambda path, *rest: self.lines.update({path.stem: rest}))


@pytest.fixture
def checkpoint(tiny_network: Network, tmp_path: Path) -> Path:
    save_network(tmp_path / "p1.safetensors", tiny_network)
    return tmp_path / "p1.safetensors"


def test_the_grid_has_a_row_per_digit_and_one_noise_per_column(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures, requested = Figures(monkeypatch, "P1_report"), {}

    def images(self: DigitSampler, requests: Any, title: str) -> Tensor:
        requested[title] = (list(requests), self.batch)
        return torch.zeros(len(requests), 3, 28, 28)

    monkeypatch.setattr(DigitSampler, "images", images)
    main(Settings(output=tmp_path, model=checkpoint, figures=("grid",), seed=3, batch=9, device="cpu"))
    for domain, title in enumerate(("MNIST-M", "SVHN")):
        expected = [DigitRequest(d, domain, derived_seed(3, column)) for d in range(10) for column in range(10)]
        assert requested[f"grid {title}"] == (expected, 9)
        _, rows, columns, *_ = figures.grids[f"grid_{('mnistm', 'svhn')[domain]}"]
        assert [*rows] == columns == [str(number) for number in range(10)]


def test_the_reverse_process_shows_mnistm_above_svhn_from_noise_to_image(
    checkpoint: Path, tiny_network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = Figures(monkeypatch, "P1_report")
    main(Settings(output=tmp_path, model=checkpoint, figures=("reverse",), seed=3, device="cpu"))
    images, rows, columns, *_ = figures.grids["reverse_process"]
    assert (rows, columns[0]) == (("MNIST-M", "SVHN"), "t = 20")
    requests = [DigitRequest(0, domain, derived_seed(3, domain, 0, 0)) for domain in (0, 1)]
    states = reverse_process(tiny_network, requests)
    expected = [to_uint8(states[int(name[4:])][domain]) for domain in (0, 1) for name in columns]
    assert (images.int() - torch.stack(expected).int()).abs().max() <= 1


def test_the_animation_goes_from_the_noise_of_the_seeds_to_every_digit(
    checkpoint: Path, tiny_network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames: dict[str, Tensor] = {}
    monkeypatch.setattr("P1_report.save_animation", lambda path, images: frames.update({path.name: images}))
    main(Settings(output=tmp_path, model=checkpoint, figures=("animation",), seed=3, device="cpu"))
    requests = graded_requests(3, 1)
    noise = draw(generators([request.seed for request in requests]), (3, 28, 28), torch.device("cpu"))
    images = sample(tiny_network, requests, DigitSamplerConfig("ddim", steps=20))
    assert len(frames["denoising.webp"]) == 21  # as many steps as T, which is below 30
    for frame, expected in ((0, noise), (-1, images)):
        grid = image_grid(to_uint8(expected), 10, scale=3)  # MNIST-M above, SVHN below
        assert (frames["denoising.webp"][frame].int() - grid.int()).abs().max() <= 1


class KnownImages(torch.nn.Module):
    """A network that predicts v as if the clean image had the grey of the labels: digit / 20 + domain / 4, none counts 10 and 2."""

    def __init__(self, schedule: Schedule):
        super().__init__()
        self.config = TINY
        self.schedule, self.digits, self.noises = schedule, list[Tensor](), list[Tensor]()
        self.device_of = torch.nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, t: Tensor, digit: Tensor, domain: Tensor) -> Tensor:
        self.digits.append(digit)
        alpha_bar = self.schedule.alpha_bar_at(int(t[0]))
        self.noises.append(x / math.sqrt(1 - alpha_bar))  # of grey images, which are 0
        x0 = (digit / 20 + domain / 4)[:, None, None, None]
        return (math.sqrt(alpha_bar) * x - x0) / math.sqrt(1 - alpha_bar)


def test_the_effects_of_labels_are_distances_between_predicted_images() -> None:
    schedule = cosine(100)
    unet: Any = KnownImages(schedule)
    requests = graded_requests(0, 2)
    digits = torch.tensor([request.digit for request in requests])
    effects = label_effects(Network(unet, schedule, "cosine", {}, {}), torch.zeros(40, 3, 28, 28), requests)

    def distance(greys: Tensor) -> list[Any]:
        return [pytest.approx(float(greys.double().square().mean().sqrt()), rel=1e-3)] * 10

    one_domain = torch.arange(10)
    for domain, name in enumerate(("mnistm", "svhn")):
        assert effects[name]["t"] == [5, 15, 25, 35, 45, 55, 65, 75, 85, 95]
        assert effects[name]["another domain"] == distance(torch.tensor(0.25))
        assert effects[name]["no domain"] == distance(torch.tensor((2 - domain) / 4))
        assert effects[name]["no digit"] == distance((10 - one_domain) / 20)
        assert effects[name]["error"] == distance(one_domain / 20 + domain / 4)
        another = (unet.digits[1] - digits)[20 * domain : 20 * domain + 20]
        assert effects[name]["another digit"] == distance(another / 20)
        assert another.abs().min() > 0  # no digit is compared with itself
    assert {*unet.digits[1].tolist()} <= {*range(10)}
    noise = unet.noises[0]
    assert len(unet.noises) == 10 * 5
    assert all(torch.allclose(other, noise, atol=1e-4) for other in unet.noises)
    first = draw(generators([request.seed for request in requests]), (3, 28, 28), torch.device("cpu"))
    assert abs(float((noise * first).mean())) < 0.02 < float(noise.std())  # other noise than the images came from


def test_the_diagnosis_of_a_network_that_ignores_the_digit_is_zero(
    tiny_network: Network, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    figures = Figures(monkeypatch, "P1_report")
    torch.nn.init.zeros_(tiny_network.unet.conditioning.get_parameter("digit.weight"))
    save_network(tmp_path / "p1.safetensors", tiny_network)
    main(Settings(tmp_path, tmp_path / "p1.safetensors", ("diagnose",), seed=3, batch=20, device="cpu"))
    effects = json.loads((tmp_path / "record.json").read_text())["metrics"]["diagnose"]
    requests = graded_requests(3, 2)
    images = sample(tiny_network, requests, DigitSamplerConfig("ddim", steps=5))  # of the network itself
    expected = label_effects(tiny_network, images, requests)
    assert effects["svhn"]["error"] == pytest.approx(expected["svhn"]["error"], rel=1e-3)
    for columns in effects.values():
        assert columns["another digit"] == columns["no digit"] == [0] * 10
        assert min(columns["another domain"] + columns["no domain"] + columns["error"]) > 0
    timesteps, panels, *_ = figures.lines["label_effects"]
    assert timesteps == effects["svhn"]["t"]
    assert panels["SVHN"] == {name: values for name, values in effects["svhn"].items() if name != "t"}
    table = capsys.readouterr().out.splitlines()
    assert table[12].startswith("SVHN: ")
    assert table[14].split() == [str(timesteps[0]), *(f"{panels['SVHN'][name][0]:.3f}" for name in panels["SVHN"])]


class Reader(DigitClassifier):
    """A classifier that reads the grey of an image as its digit."""

    def __init__(self) -> None:
        torch.nn.Module.__init__(self)

    def read(self, images: Tensor) -> Tensor:
        return images[:, 0, 0, 0].long()


def test_the_sweep_names_each_domains_numbers_at_each_scale(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At scale s the first s digits of MNIST-M and the first 2 s of SVHN are drawn right; the others are greys of 100."""
    figures, counts = Figures(monkeypatch, "P1_report"), []

    def images(self: DigitSampler, requests: Any, title: str) -> Tensor:
        counts.append(len(requests))
        limit = [self.config.guidance, 2 * self.config.guidance]
        greys = [r.digit if r.digit < limit[r.domain] else 100 for r in requests]
        return (torch.tensor(greys) / 127.5 - 1)[:, None, None, None].expand(-1, 3, 28, 28)

    def quality(classifier: DigitClassifier, images: Tensor) -> dict[str, float]:
        domain = READERS.index(classifier)
        share = float((images[:, 0, 0, 0] < 100).double().mean())
        return {
            "frechet": domain + share,
            "recall": 10 + domain + share,
            "precision": 20 + domain + share,
            "copies": 9,
        }

    monkeypatch.setattr(DigitSampler, "images", images)
    monkeypatch.setattr("digits.classifier.shipped_classifiers", lambda device: READERS)
    monkeypatch.setattr("P1_report.quality", quality)
    main(Settings(tmp_path, checkpoint, ("sweep",), scales=(2.0, 4.0), sweep_count=3, device="cpu"))
    rows = json.loads((tmp_path / "record.json").read_text())["metrics"]["sweep"]
    assert counts == [60, 60]
    for row, (scale, mnistm, svhn) in zip(rows, ((2.0, 0.2, 0.4), (4.0, 0.4, 0.8)), strict=True):
        assert row == pytest.approx({
            "scale": scale, "mnistm_accuracy": mnistm, "svhn_accuracy": svhn,
            "mnistm_frechet": mnistm, "mnistm_recall": 10 + mnistm, "mnistm_precision": 20 + mnistm,
            "svhn_frechet": 1 + svhn, "svhn_recall": 11 + svhn, "svhn_precision": 21 + svhn,
        })  # fmt: skip
    x, panels, *_ = figures.lines["guidance_sweep"]
    assert x == [2.0, 4.0]
    expected = {"MNIST-M": [0.2, 0.4], "SVHN": [0.4, 0.8]}
    assert {name: pytest.approx(line) for name, line in panels["accuracy"].items()} == expected
    assert panels["Frechet distance"]["SVHN"] == pytest.approx([1.4, 1.8])
    assert panels["recall"]["MNIST-M"] == pytest.approx([10.2, 10.4])


def test_without_classifiers_there_is_no_sweep(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    figures = Figures(monkeypatch, "P1_report")
    main(Settings(tmp_path, checkpoint, ("reverse", "sweep"), classifiers=("none",), device="cpu"))
    assert (set(figures.grids), figures.lines) == ({"reverse_process"}, {})
    with pytest.raises(BadInput, match="--figures sweep: it needs --classifiers"):
        main(Settings(tmp_path, checkpoint, ("sweep",), classifiers=("none",), device="cpu"))


READERS: list[DigitClassifier] = [Reader(), Reader()]

HELD_BY = {
    "output": test_the_command_writes_its_figures_and_a_record,
    "figures": test_the_command_writes_its_figures_and_a_record,
    "model": test_the_reverse_process_shows_mnistm_above_svhn_from_noise_to_image,
    "seed": test_the_reverse_process_shows_mnistm_above_svhn_from_noise_to_image,
    "scales": test_the_sweep_names_each_domains_numbers_at_each_scale,
    "sweep_count": test_the_sweep_names_each_domains_numbers_at_each_scale,
    "classifiers": test_without_classifiers_there_is_no_sweep,
    "batch": test_the_grid_has_a_row_per_digit_and_one_noise_per_column,
}


def test_the_effect_of_every_flag_is_tested() -> None:
    assert {*HELD_BY, "device"} == {field.name for field in fields(Settings)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sweep_count": 0}, "--sweep-count 0"),
        ({"scales": ()}, "--scales"),
        ({"scales": (1.0, math.nan)}, "--scales 1.0 nan"),
        ({"figures": ()}, "--figures names none"),
        ({"device": "cuda:77"}, "--device cuda:77"),
    ],
)
def test_a_report_of_nothing_is_refused(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        main(Settings(output=tmp_path, **flags))


def test_a_sweep_over_scales_that_a_distilled_checkpoint_has_not_learned_is_refused(
    tmp_path: Path, distilled_network: Network
) -> None:
    save_network(path := tmp_path / "distilled.safetensors", distilled_network)
    with pytest.raises(BadInput, match="--scales 7.0: this checkpoint is distilled, it takes scales from 1 to 5.0"):
        main(Settings(tmp_path / "report", path, ("sweep",), scales=(1.0, 7.0)))
    assert not (tmp_path / "report").exists()
