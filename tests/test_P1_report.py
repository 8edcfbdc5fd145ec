"""P1's figures: the reverse process, the guidance sweep, and their record."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from diffusion.noise import draw, generators
from digits.sampling import DigitRequest
from P1_model import Network
from P1_report import Settings, main, reverse_process
from runtime.cli import BadInput


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


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"sweep_count": 0}, "--sweep-count 0"),
        ({"scales": ()}, "--scales"),
        ({"scales": (1.0, math.nan)}, "--scales 1.0 nan"),
        ({"figures": ()}, "--figures names none"),
    ],
)
def test_a_report_of_nothing_is_refused(flags: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=message):
        main(Settings(output=tmp_path, **flags))
