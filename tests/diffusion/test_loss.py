"""Loss weights."""

from __future__ import annotations

import pytest
import torch

from diffusion.loss import min_snr_weight
from diffusion.schedule import Prediction


@pytest.mark.parametrize(
    ("prediction", "snr", "weight"),
    [("eps", 10.0, 5 / 10), ("eps", 2.0, 1.0), ("v", 10.0, 5 / 11), ("v", 2.0, 2 / 3)],
)
def test_min_snr_weight_with_gamma_5(prediction: Prediction, snr: float, weight: float) -> None:
    alpha_bar = torch.tensor([snr / (1 + snr)], dtype=torch.float64)
    assert float(min_snr_weight(alpha_bar, 5.0, prediction)) == pytest.approx(weight, rel=1e-9)
