"""The figures of P1: one noise per column, the right moments, files where they belong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import torch
from PIL import Image

from diffusion.noise import draw, generators
from P1_inference import Picture
from P1_model import Network
from P1_report import reverse_process

ROOT = Path(__file__).resolve().parents[1]


def test_the_reverse_process_goes_from_the_seeds_noise_to_the_picture(tiny_network: Network) -> None:
    total = len(tiny_network.schedule)
    states = reverse_process(tiny_network, [Picture(0, 0, 5), Picture(0, 1, 6)])
    assert list(states)[0] == total
    assert list(states) == sorted(states, reverse=True)
    assert torch.equal(states[total], draw(generators([5, 6]), (3, 28, 28), torch.device("cpu")))
    assert states[min(states)].abs().max() < states[total].abs().max()


def test_the_command_writes_its_figures_and_a_record(tmp_path: Path) -> None:
    arguments = ["--output", str(tmp_path), "--figures", "sweep", "--scales", "1", "3", "--sweep-count", "1"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "P1_report.py"), *arguments], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads((tmp_path / "record.json").read_text())["metrics"]["sweep"]
    assert [row["scale"] for row in rows] == [1.0, 3.0]
    assert Image.open(tmp_path / "guidance_sweep.png").width > 500
