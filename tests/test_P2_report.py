"""The figures of P2 exist, say what was measured, and refuse what they can't show."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from diffusion.step_rules import step_rule
from faces.models import Model
from faces.noises import Noise
from faces.sampling import DdimConfig, SamplingArgs, to_image
from P1_model import Network, save_network
from P2_report import Settings, main
from runtime.cli import BadInput


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
    names = {"eta.png", "eta_mse.png", "slerp.png", "linear.png", "noise_norm.png"}
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
        monkeypatch.setattr("P2_report.labelled_grid", lambda path, *rest: self.grids.update({path.stem: rest}))
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
        assert "from noise 02 (0) to noise 07 (1)" in title
        shown = torch.stack([to_image(x, "clamp") for x in expected])
        assert (images.int() - shown.int()).abs().max() <= 1
        norms = [float(x.square().mean().sqrt()) for x in expected]
        assert metrics(tmp_path)["interpolation"][name] == pytest.approx(norms, rel=1e-4)
    assert drawings.lines["noise_norm"][0] == alphas


HELD_BY = {
    "figures": test_slerp_keeps_the_length_of_the_noise_and_linear_loses_it,
    "output": test_all_figures_are_drawn_and_their_numbers_recorded,
    "etas": test_the_eta_grid_has_a_row_per_eta_and_a_column_per_noise,
    "columns": test_the_eta_grid_has_a_row_per_eta_and_a_column_per_noise,
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
    ],
)
def test_figures_with_nothing_to_show_are_refused(
    checkpoint: str, tmp_path: Path, flags: dict[str, Any], message: str
) -> None:
    with pytest.raises(BadInput, match=message):
        main(Settings(**{"model": checkpoint, "output": tmp_path / "r", "steps": 3, **flags}))
    assert not (tmp_path / "r").exists()
