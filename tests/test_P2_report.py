"""The figures of P2 exist, say what was measured, and refuse what they can't show."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

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
