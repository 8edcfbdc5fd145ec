"""The denoising loss that every diffusion training minimises, and its weights."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from diffusion.schedule import Prediction, add_noise, target

Weight = Callable[[Tensor], Tensor]  # alpha_bar [B,1,1,1] -> weight [B,1,1,1]


def denoising_loss(
    network: Callable[[Tensor, Tensor], Tensor],
    x0: Tensor,
    eps: Tensor,
    t: Tensor,
    alpha_bar: Tensor,
    prediction: Prediction = "eps",
    weight: Weight | None = None,
    teacher: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """Return the mean over all elements of weight(alpha_bar_t) (network(x_t, t) - target)^2 (Ho et al. 2020, eq. 14).

    x0 and eps [B,C,H,W], t [B] int, alpha_bar [T] float32, on one device.
    The target is eps or v, as `prediction` says; with a teacher it is teacher(x_t, t).
    """
    level = alpha_bar[t][:, None, None, None]
    x = add_noise(x0, eps, level)
    goal = teacher(x, t).float() if teacher else target(x0, eps, level, prediction)
    error = (network(x, t).float() - goal).square()
    return (error * weight(level) if weight else error).mean()


def min_snr_weight(alpha_bar: Tensor, gamma: float, prediction: Prediction) -> Tensor:
    """Return the loss weight min(SNR, gamma) / SNR for eps, min(SNR, gamma) / (SNR + 1) for v (Hang et al. 2023).

    SNR = alpha_bar / (1 - alpha_bar). alpha_bar has any shape, the result the same.
    """
    snr = alpha_bar / (1 - alpha_bar)
    return snr.clamp(max=gamma) / (snr + 1 if prediction == "v" else snr)


def capped_v_weight(alpha_bar: Tensor, maximum: float) -> Tensor:
    """Return the loss weight min(1 + 1/SNR, maximum) for a network that predicts eps; 1 + 1/SNR = 1 / alpha_bar.

    Without the cap, the loss equals the unweighted loss of a network that predicts v (Salimans & Ho 2022, appendix D).
    """
    return (1 / alpha_bar).clamp(max=maximum)


def damped_v_weight(alpha_bar: Tensor, gamma: float) -> Tensor:
    """Return the loss weight min(1, (1 + gamma) / (1 + SNR)) for v: 1 where SNR <= gamma, less at timesteps with less noise."""
    return ((1 + gamma) * (1 - alpha_bar)).clamp(max=1)
