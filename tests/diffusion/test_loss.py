"""The denoising loss and its weights, against their formulas."""

from __future__ import annotations

from functools import partial

import pytest
import torch
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


ALPHA_BAR = torch.tensor([0.999, 0.9, 0.5, 0.1])
T = torch.tensor([3, 0, 1, 2, 1])


def samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    x0, eps = torch.randn(2, len(T), 2, 4, 4, generator=generator)
    return x0, eps


def halves(x: Tensor, t: Tensor) -> Tensor:
    """Stand for a network that depends on both of its inputs."""
    return 0.5 * x + 0.1 * t[:, None, None, None]


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("prediction", ["eps", "v"])
def test_the_loss_is_the_weighted_mean_of_squared_errors(prediction: Prediction, weighted: bool) -> None:
    (x0, eps), errors = samples(), []
    weight = partial(min_snr_weight, gamma=2.0, prediction=prediction) if weighted else None
    for k, t in enumerate(T.tolist()):
        signal, noise = float(ALPHA_BAR[t]) ** 0.5, (1 - float(ALPHA_BAR[t])) ** 0.5
        output = halves(signal * x0[k : k + 1] + noise * eps[k : k + 1], T[k : k + 1])
        target = eps[k] if prediction == "eps" else signal * eps[k] - noise * x0[k]
        snr = signal**2 / noise**2
        factor = min(snr, 2.0) / (snr + (prediction == "v")) if weighted else 1.0
        errors.append(factor * float((output[0] - target).square().mean()))
    loss = denoising_loss(halves, x0, eps, T, ALPHA_BAR, prediction, weight)
    assert float(loss) == pytest.approx(sum(errors) / len(errors), rel=1e-5)


def test_with_a_teacher_its_output_for_the_same_input_is_the_target() -> None:
    (x0, eps), level = samples(), ALPHA_BAR[T][:, None, None, None]
    x = level.sqrt() * x0 + (1 - level).sqrt() * eps
    weight = partial(min_snr_weight, gamma=2.0, prediction="v")

    def teacher(x: Tensor, t: Tensor) -> Tensor:
        return x.square() - 0.3 * t[:, None, None, None]

    error = (halves(x, T) - teacher(x, T)).square() * weight(level)
    ours = denoising_loss(halves, x0, eps, T, ALPHA_BAR, "v", weight, teacher)
    assert float(ours) == pytest.approx(float(error.mean()), rel=1e-5)


def test_without_a_cap_a_network_of_eps_has_the_loss_of_one_of_v() -> None:
    """Salimans & Ho 2022, appendix D; the cap limits the noisiest steps only."""
    x0, eps = samples()

    def as_v(x: Tensor, t: Tensor) -> Tensor:
        level = ALPHA_BAR[t][:, None, None, None]
        clean = (x - (1 - level).sqrt() * halves(x, t)) / level.sqrt()
        return level.sqrt() * halves(x, t) - (1 - level).sqrt() * clean

    ours = denoising_loss(halves, x0, eps, T, ALPHA_BAR, "eps", partial(capped_v_weight, maximum=1e9))
    assert float(ours) == pytest.approx(float(denoising_loss(as_v, x0, eps, T, ALPHA_BAR, "v")), rel=1e-4)
    assert capped_v_weight(ALPHA_BAR, 1.5).tolist() == pytest.approx([1 / 0.999, 1 / 0.9, 1.5, 1.5])
