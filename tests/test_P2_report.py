"""The figures of P2 exist, say what was measured, and refuse what they can't show."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence
from torch import Tensor

from diffusion.noise import slerp
from diffusion.samplers import bdia, ddim
from diffusion.step_rules import Rule, step_rule
from faces.models import Labels, Model, load_model
from faces.noises import Noise, open_noises
from faces.sampling import DdimConfig, SamplingArgs, make_config, psnr, sample_all, to_image
from P1_model import Network, save_network
from P2_report import Settings, main
from runtime.cli import BadInput
from runtime.images import open_image, save_image, to_float

CPU = torch.device("cpu")
RULES: tuple[Rule, ...] = ("bdia", "ddim")


@pytest.fixture
def checkpoint(tiny_network: Network, tmp_path: Path) -> str:
    save_network(tmp_path / "p1.safetensors", tiny_network)
    return str(tmp_path / "p1.safetensors")


def metrics(folder: Path) -> dict[str, Any]:
    recorded: dict[str, Any] = json.loads((folder / "record.json").read_text())["metrics"]
    return recorded


def test_all_figures_are_drawn_and_their_numbers_recorded(checkpoint: str, tmp_path: Path) -> None:
    out = tmp_path / "report"
    main(Settings(model=checkpoint, output=out, steps=3, etas=(0.0, 1.0), frames=5, digit=3))
    names = {"eta.png", "eta_mse.png", "slerp.png", "linear.png", "interpolation.png", "noise_norm.png"}
    assert {path.name for path in out.glob("*.png")} == names
    assert all(Image.open(out / name).size[0] > 300 for name in names)
    found = metrics(out)
    assert set(found["eta"]) == {"00", "01", "02", "03"}
    assert all(first == 0 and last > 0 for first, last in found["eta"].values())


def test_slerp_keeps_the_length_of_the_noise_and_linear_loses_it(checkpoint: str, tmp_path: Path) -> None:
    main(Settings(model=checkpoint, output=tmp_path / "r", steps=2, figures=("interpolation",)))
    norms = metrics(tmp_path / "r")["interpolation"]
    assert len(norms["slerp"]) == 11
    assert min(norms["slerp"]) > 0.95
    assert 0.65 < norms["linear"][5] < 0.78
    assert not (tmp_path / "r" / "eta.png").exists()


class Drawings:
    """What is sampled and shown, recorded in the place of the network and the figures; an image is its noise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sampled: list[tuple[Any, ...]] = []
        self.grids: dict[str, tuple[Any, ...]] = {}
        self.lines: dict[str, tuple[Any, ...]] = {}
        monkeypatch.setattr("P2_report.sample_all", self.sample_all)
        monkeypatch.setattr("P2_report.pixel_grid", lambda path, *rest: self.grids.update({path.stem: rest}))
        monkeypatch.setattr("P2_report.line_figure", lambda path, *rest: self.lines.update({path.stem: rest}))

    def sample_all(self, model: Model, noises: list[Noise], config: DdimConfig, batch: int, title: str) -> Any:
        self.sampled.append((config.eta, config.seed, config.steps.pairs, batch, [noise.stem for noise in noises]))
        return [(noise, noise.x + config.eta * noise.x.roll(1)) for noise in noises]


def noise_of(seed: int) -> Tensor:
    return torch.randn(3, 28, 28, generator=torch.Generator().manual_seed(seed))


def test_the_eta_grid_has_a_row_per_eta_and_a_column_per_noise(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = Drawings(monkeypatch)
    flags: dict[str, Any] = {"seeds": "4-9", "columns": 3, "etas": (0.5, 0.0), "seed": 8, "batch": 2}
    flags |= {"rule": "trailing", "to_uint8": "clamp", "figures": ("eta",)}
    main(Settings(model=checkpoint, output=tmp_path, steps=5, device="cpu", **flags))
    pairs, stems = step_rule("trailing", 20, 5).pairs, ["04", "05", "06"]
    assert drawings.sampled == [(eta, 8, pairs, 2, stems) for eta in (0.5, 0.0)]
    images, rows, columns, *_ = drawings.grids["eta"]
    assert (rows, columns) == (["eta 0.5", "eta 0"], stems)
    expected = [to_image(x + eta * x.roll(1), "clamp") for eta in (0.5, 0.0) for x in map(noise_of, (4, 5, 6))]
    assert torch.equal(images, torch.stack(expected))
    distances = metrics(tmp_path)["eta"]
    for column, stem in enumerate(stems):
        difference = expected[3 + column].double() - expected[column].double()
        assert distances[stem] == pytest.approx([0, float(difference.square().mean())])
    x, panels, *_ = drawings.lines["eta_mse"]
    assert (x, list(panels.values())) == ((0.5, 0.0), [distances])


def test_interpolation_goes_from_the_first_noise_to_the_second_in_equal_steps_without_fresh_noise(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = Drawings(monkeypatch)
    more: dict[str, Any] = {"figures": ("interpolation",), "seeds": "2,7", "frames": 5, "to_uint8": "clamp"}
    main(Settings(model=checkpoint, output=tmp_path, steps=5, device="cpu", **more))
    assert [eta for eta, *_ in drawings.sampled] == [0, 0]
    a, b, alphas = noise_of(2), noise_of(7), [0, 0.25, 0.5, 0.75, 1]
    theta = torch.arccos((a * b).sum() / (a.norm() * b.norm()))
    frames = {
        "linear": [(1 - alpha) * a + alpha * b for alpha in alphas],
        "slerp": [((1 - p) * theta).sin() / theta.sin() * a + (p * theta).sin() / theta.sin() * b for p in alphas],
    }
    for name, expected in frames.items():
        images, rows, columns, title, *_ = drawings.grids[name]
        assert (rows, columns) == ([name], ["0", "0.25", "0.5", "0.75", "1"])
        assert title == f"{name} from 02 to 07"
        shown = torch.stack([to_image(x, "clamp") for x in expected])
        assert (images.int() - shown.int()).abs().max() <= 1
        norms = [float(x.square().mean().sqrt()) for x in expected]
        assert metrics(tmp_path)["interpolation"][name] == pytest.approx(norms, rel=1e-4)
    both, rows, columns, *_ = drawings.grids["interpolation"]
    assert (rows, columns) == (["slerp", "linear"], ["0", "0.25", "0.5", "0.75", "1"])
    assert torch.equal(both, torch.cat([drawings.grids["slerp"][0], drawings.grids["linear"][0]]))
    assert drawings.lines["noise_norm"][0] == alphas


# ---------------------------------------------------------------- pictures


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Save three pictures of the model's size."""
    for number in range(3):
        picture = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(number))
        pixels = (picture.repeat_interleave(7, 1).repeat_interleave(7, 2) * 255).byte()
        (tmp_path / "photos").mkdir(exist_ok=True)
        save_image(tmp_path / "photos" / f"p{number}.png", pixels)
    return tmp_path / "photos"


def inverted(checkpoint: str, photo: Path, rule: Rule, steps: int, digit: int | None) -> Noise:
    """Return the noise of a picture at guidance 1, by the sampler along the grid in reverse."""
    model = load_model(checkpoint, CPU, torch.float32, Labels(digit, "any", None if digit is None else 1.0))
    x, grid = to_float(open_image(photo))[None], step_rule(rule, len(model.schedule), steps).backwards()
    with torch.inference_mode():
        if rule == "ddim":
            return Noise(photo.stem, ddim(model.denoiser(1), x, model.schedule, grid)[0])
        return Noise(photo.stem, *(state[0] for state in bdia(model.denoiser(1), x, model.schedule, grid)))


def test_between_two_pictures_the_direction_is_slerps_and_the_length_goes_linearly(
    checkpoint: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = Drawings(monkeypatch)
    more: dict[str, Any] = {
        "figures": ("interpolation",),
        "frames": 3,
        "digit": 3,
        "ends": (photos / "p2.png", photos / "p0.png"),
    }
    main(Settings(model=checkpoint, output=tmp_path / "r", steps=5, device="cpu", **more))
    assert {pairs for _, _, pairs, *_ in drawings.sampled} == {step_rule("ddim", 20, 5).pairs}
    a, b = (inverted(checkpoint, photos / name, "ddim", 5, 3).x for name in ("p2.png", "p0.png"))
    middle = slerp(a, b, 0.5)
    middle *= (a.norm() + b.norm()) / 2 / middle.norm()
    images, _, _, title = drawings.grids["slerp"]
    assert title == "slerp from p2 to p0"
    assert (images.int() - torch.stack([to_image(x, "clamp") for x in (a, middle, b)]).int()).abs().max() <= 1
    images = drawings.grids["linear"][0]
    assert (images.int() - torch.stack([to_image(x, "clamp") for x in (a, (a + b) / 2, b)]).int()).abs().max() <= 1
    lengths = [float(x.square().mean().sqrt()) for x in (a, middle, b)]
    assert metrics(tmp_path / "r")["interpolation"]["slerp"] == pytest.approx(lengths, rel=1e-3)
    ends = {stem: float((to_image(x, "clamp").double() - open_image(photos / f"{stem}.png")).square().mean())
            for stem, x in (("p2", a), ("p0", b))}  # fmt: skip
    assert metrics(tmp_path / "r")["ends"] == pytest.approx(ends, rel=0.01)


def test_inversion_shows_pictures_noises_what_they_lead_to_and_errors_for_both_rules(
    checkpoint: str, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = Drawings(monkeypatch)
    more: dict[str, Any] = {"figures": ("inversion",), "columns": 2, "invert": photos}
    main(Settings(model=checkpoint, output=tmp_path / "r", steps=5, device="cpu", **more))
    images, rows, columns, title = drawings.grids["inversion"]
    assert rows == ["picture", *(row for rule in ("bdia", "ddim") for row in (f"{rule}: noise", "drawn", "error x 8"))]
    assert columns == ["p0", "p1"]
    originals = [open_image(photos / f"p{number}.png") for number in range(2)]
    assert [pairs for _, _, pairs, *_ in drawings.sampled] == [step_rule(rule, 20, 5).pairs for rule in RULES]
    for row, rule in ((1, "bdia"), (4, "ddim")):
        mse = {}
        for column, original in enumerate(originals):
            x = inverted(checkpoint, photos / f"p{column}.png", RULES[row // 4], 5, None).x
            shown = [images[2 * k + column].int() for k in (0, row, row + 1, row + 2)]
            drawn = to_image(x, "clamp").int()
            expected = [
                original.int(),
                to_image(x / 3, "clamp").int(),
                drawn,
                (8 * (drawn - original).abs()).clamp(max=255),
            ]
            assert max(int((a - b).abs().max()) for a, b in zip(shown, expected, strict=True)) <= 8
            mse[f"p{column}"] = float((shown[2] - original.int()).double().square().mean())
        assert metrics(tmp_path / "r")["inversion"][rule] == pytest.approx(mse)
        assert f"{rule} {psnr((mse['p0'] + mse['p1']) / 2):.1f} dB" in title


def test_the_exact_rule_draws_the_pictures_themselves(checkpoint: str, photos: Path, tmp_path: Path) -> None:
    main(
        Settings(model=checkpoint, output=tmp_path / "r", steps=5, device="cpu", figures=("inversion",), invert=photos)
    )
    assert metrics(tmp_path / "r")["inversion"]["bdia"] == {"p0": 0, "p1": 0, "p2": 0}
    assert Image.open(tmp_path / "r" / "inversion.png").width > 300


def test_a_mix_shows_its_noises_the_renormalised_and_the_plain_mean(
    checkpoint: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawings = Drawings(monkeypatch)
    more: dict[str, Any] = {"figures": ("eta",), "etas": (0.0,), "seeds": "0-2", "to_uint8": "clamp", "mix": "2=4,0=6"}
    main(Settings(model=checkpoint, output=tmp_path, steps=5, device="cpu", **more))
    images, _, columns, _ = drawings.grids["mix"]
    assert columns == ["00: 6", "02: 4", "mean", "plain"]
    a, b = noise_of(0), noise_of(2)
    plain = 0.6 * a + 0.4 * b
    shown = [a, b, plain / 0.52**0.5, plain]
    assert (images.int() - torch.stack([to_image(x, "clamp") for x in shown]).int()).abs().max() <= 1
    lengths = {name: float(x.square().mean().sqrt()) for name, x in (("mean", shown[2]), ("plain", plain))}
    assert metrics(tmp_path)["mix"] == pytest.approx(lengths, rel=1e-4)


def test_as_many_steps_as_a_rule_takes_need_no_other_rule_to_take_them(checkpoint: str, tmp_path: Path) -> None:
    more: dict[str, Any] = {"figures": ("interpolation",), "frames": 2, "seeds": "0-1"}
    main(Settings(model=checkpoint, output=tmp_path / "r", rule="trailing", steps=20, device="cpu", **more))
    assert (tmp_path / "r" / "interpolation.png").exists()


def test_animations_lead_from_noises_to_their_images_and_from_each_noise_to_the_next(
    checkpoint: str, tmp_path: Path
) -> None:
    more: dict[str, Any] = {"figures": ("animation",), "columns": 2, "frames": 4, "to_uint8": "clamp"}
    main(Settings(model=checkpoint, output=tmp_path, steps=5, device="cpu", **more))
    model = load_model(checkpoint, CPU, torch.float32)
    noises = open_noises(model, None, "0-1", None)
    between = Noise("between", slerp(noises[1].x, noises[0].x, 2 / 3))
    config = make_config(model, "homework", 5, 0.0, 0)
    drawn = [to_image(image, "clamp") for _, image in sample_all(model, [*noises, between], config, 3, "")]

    def frames(name: str) -> Tensor:
        with Image.open(tmp_path / name) as animation:
            images = [np.array(frame.convert("RGB")) for frame in ImageSequence.Iterator(animation)]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)

    denoising, walk = frames("denoising.webp"), frames("walk.webp")
    assert (len(denoising), len(walk)) == (6, 6)
    for column, noise in enumerate(noises):
        place = (..., slice(2, 30), slice(2 + 30 * column, 30 + 30 * column))
        assert torch.equal(denoising[0][place], to_image(noise.x, "clamp"))
        assert (denoising[5][place].int() - drawn[column].int()).abs().max() <= 1
    for frame, image in ((0, drawn[0]), (3, drawn[1]), (5, drawn[2])):
        assert (walk[frame].int() - image.int()).abs().max() <= 1


HELD_BY = {
    "figures": test_slerp_keeps_the_length_of_the_noise_and_linear_loses_it,
    "output": test_all_figures_are_drawn_and_their_numbers_recorded,
    "etas": test_the_eta_grid_has_a_row_per_eta_and_a_column_per_noise,
    "columns": test_the_eta_grid_has_a_row_per_eta_and_a_column_per_noise,
    "ends": test_between_two_pictures_the_direction_is_slerps_and_the_length_goes_linearly,
    "invert": test_inversion_shows_pictures_noises_what_they_lead_to_and_errors_for_both_rules,
    "mix": test_a_mix_shows_its_noises_the_renormalised_and_the_plain_mean,
    "frames": test_interpolation_goes_from_the_first_noise_to_the_second_in_equal_steps_without_fresh_noise,
}


def test_the_effect_of_every_flag_is_tested() -> None:
    """Those that it shares with P2_ddim.py are tested there."""
    assert {*HELD_BY} == {field.name for field in fields(Settings)} - {field.name for field in fields(SamplingArgs)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"frames": 1}, "--frames 1"),
        ({"columns": 0}, "--columns 0"),
        ({"etas": (0.0, 2.0)}, "--etas 2"),
        ({"seeds": "4"}, "two noises"),
        ({"steps": 20}, "--steps"),
        ({"figures": ("inversion",)}, "--figures inversion: name a folder of pictures with --invert"),
        ({"invert": Path("a")}, "--invert has no effect without --figures inversion"),
        ({"ends": (Path("a.png"), Path("b.png")), "figures": ("eta",)}, "--ends has no effect without"),
        ({"ends": (Path("a.png"), Path("b.png"))}, "a.png does not exist"),
        ({"ends": (Path("a.png"), Path("b.png")), "guidance": 2.0}, "--guidance 2.0: inversion runs at guidance 1"),
        ({"mix": "0=0.5,12=0.5"}, "--mix .*no noise '12'"),
        ({"rule": "bdia"}, "rule bdia takes no fresh noise"),
    ],
)
def test_figures_with_nothing_to_show_are_refused(
    checkpoint: str, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        main(Settings(**{"model": checkpoint, "output": tmp_path / "r", "steps": 3, **flags}))
    assert not (tmp_path / "r").exists()
