"""Guidance distillation: a student learns the guided output of a teacher (Meng et al. 2023, arXiv 2210.03142, stage 1)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from P1_model import UNet


@dataclass(frozen=True)
class Teacher:
    """The conditional network whose guided output a student learns, and the largest guidance scale to learn."""

    unet: UNet
    max_guidance: float

    def scales(self, uniform: Tensor) -> Tensor:
        """Map numbers [B] of 0 .. 1 to guidance scales [B] of 1 .. max_guidance."""
        return 1 + (self.max_guidance - 1) * uniform

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, digit: Tensor, domain: Tensor, guidance: Tensor) -> Tensor:
        """Return the guided output uncond + guidance (cond - uncond), float32 [B,C,H,W], with one scale per image.

        uncond has the same domain, and the null label as digit.
        """
        null = torch.full_like(digit, self.unet.config.spec.no_class)
        labels = torch.cat([digit, null]), torch.cat([domain, domain])
        output: Tensor = self.unet(torch.cat([x, x]), torch.cat([t, t]), *labels)
        cond, uncond = output.float().chunk(2)
        return uncond + guidance[:, None, None, None] * (cond - uncond)
