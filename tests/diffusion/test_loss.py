"""Loss weights."""

from __future__ import annotations

import pytest
import torch
from gaussian import gaussian
from torch import Tensor

from diffusion.loss import capped_v_weight, denoising_loss, min_snr_weight
from diffusion.schedule import Prediction


@pytest.mark.parametrize(
    ("prediction", "snr", "weight"),
    [("eps", 10.0, 5 / 10), ("eps", 2.0, 1.0), ("v", 10.0, 5 / 11), ("v", 2.0, 2 / 3)],
)
def test_min_snr_weight_with_gamma_5(prediction: Prediction, snr: float, weight: float) -> None:
    alpha_bar = torch.tensor([snr / (1 + snr)], dtype=torch.float64)
    assert float(min_snr_weight(alpha_bar, 5.0, prediction)) == pytest.approx(weight, rel=1e-9)


@pytest.mark.parametrize("maximum", [1.0, 3.0, 100.0])
def test_the_capped_weight_is_one_over_alpha_bar_at_most_the_maximum(maximum: float) -> None:
    alpha_bar = torch.tensor([0.9, 0.5, 0.02], dtype=torch.float64)
    assert capped_v_weight(alpha_bar, maximum).tolist() == pytest.approx(
        [min(1 / a, maximum) for a in (0.9, 0.5, 0.02)]
    )


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_is_the_weighted_mean_square_of_each_images_error_at_its_own_level(
    prediction: Prediction, weighted: bool
) -> None:
    alpha_bar, t = torch.tensor([0.9, 0.6, 0.1], dtype=torch.float64), torch.tensor([2, 0])
    x0, eps = gaussian(1), gaussian(2)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return 0.3 * x + 0.1 * t[:, None, None, None]

    expected = 0.0
    for index, (a, weight) in enumerate(((0.1, 7.0), (0.9, 2.0))):
        x = a**0.5 * x0[index] + (1 - a) ** 0.5 * eps[index]
        goal = eps[index] if prediction == "eps" else a**0.5 * eps[index] - (1 - a) ** 0.5 * x0[index]
        error = (0.3 * x + 0.1 * int(t[index]) - goal).square().mean()
        expected += float(error) * (weight if weighted else 1) / 2

    def weight_of(level: Tensor) -> Tensor:
        return torch.where(level < 0.5, 7.0, 2.0)

    loss = denoising_loss(network, x0, eps, t, alpha_bar, prediction, weight_of if weighted else None)
    assert float(loss) == pytest.approx(expected, rel=1e-5)
