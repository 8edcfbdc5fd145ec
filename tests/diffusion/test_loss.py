"""The loss and its weights."""

from __future__ import annotations

import pytest
import torch
from gaussian import gaussian
from torch import Tensor

from diffusion.loss import capped_v_weight, denoising_loss, min_snr_weight
from diffusion.schedule import Prediction, linear


@pytest.mark.parametrize(
    ("prediction", "snr", "weight"),
    [("eps", 10.0, 5 / 10), ("eps", 2.0, 1.0), ("v", 10.0, 5 / 11), ("v", 2.0, 2 / 3)],
)
def test_min_snr_weight_with_gamma_5(prediction: Prediction, snr: float, weight: float) -> None:
    alpha_bar = torch.tensor([snr / (1 + snr)], dtype=torch.float64)
    assert float(min_snr_weight(alpha_bar, 5.0, prediction)) == pytest.approx(weight, rel=1e-9)


def test_capped_v_weight_is_one_over_alpha_bar_up_to_its_maximum() -> None:
    assert capped_v_weight(torch.tensor([1.0, 0.5, 0.1, 0.01]), 5.0).tolist() == [1.0, 2.0, 5.0, 5.0]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_is_the_weighted_mean_of_squared_errors_at_each_images_step(
    prediction: Prediction, weighted: bool
) -> None:
    x0, eps, t = gaussian(1), gaussian(2), torch.tensor([3, 70])
    alpha_bar = linear(100).alpha_bar

    def network(x: Tensor, t: Tensor) -> Tensor:
        return x.tanh() + t.view(-1, 1, 1, 1) / 100

    expected = []
    for row, step in enumerate(t.tolist()):
        signal, noise = float(alpha_bar[step]) ** 0.5, float(1 - alpha_bar[step]) ** 0.5
        output = (signal * x0[row] + noise * eps[row]).tanh() + step / 100
        target = signal * eps[row] - noise * x0[row] if prediction == "v" else eps[row]
        weight = signal**-2 if weighted else 1.0
        expected.append(float((weight * (output - target) ** 2).mean()))
    loss = denoising_loss(network, x0, eps, t, alpha_bar, prediction, (lambda level: 1 / level) if weighted else None)
    assert float(loss) == pytest.approx(sum(expected) / 2, rel=1e-5)
