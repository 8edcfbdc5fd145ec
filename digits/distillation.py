"""Distillation: a student learns a teacher's guided output, or to take several steps of the teacher's sampler at once.

Guidance: Meng et al. 2023 (arXiv 2210.03142), stage 1. Steps: after Salimans & Ho 2022 (arXiv 2202.00512), but on the states that
the teacher's sampler visits from pure noise. So the student learns this sampler's images, and needs no images for this part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from diffusion import samplers
from diffusion.schedule import Schedule
from diffusion.step_rules import step_rule
from P1_model import UNet


@dataclass(frozen=True)
class Teacher:
    """The conditional or guidance-distilled network whose guided output a student learns, and the largest guidance scale to learn."""

    unet: UNet
    max_guidance: float

    def scales(self, uniform: Tensor) -> Tensor:
        """Map numbers [B] of 0 .. 1 to guidance scales [B] of 1 .. max_guidance."""
        return 1 + (self.max_guidance - 1) * uniform

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, digit: Tensor, domain: Tensor, guidance: Tensor) -> Tensor:
        """Return the guided output uncond + guidance (cond - uncond), float32 [B,C,H,W], with one scale per image.

        uncond has the same domain, and the null label as digit. A guidance-distilled network returns this in one call.
        """
        if self.unet.config.max_guidance:
            guided: Tensor = self.unet(x, t, digit, domain, guidance)
            return guided.float()
        null = torch.full_like(digit, self.unet.config.spec.no_class)
        labels = torch.cat([digit, null]), torch.cat([domain, domain])
        output: Tensor = self.unet(torch.cat([x, x]), torch.cat([t, t]), *labels)
        cond, uncond = output.float().chunk(2)
        return uncond + guidance[:, None, None, None] * (cond - uncond)


@dataclass(frozen=True)
class StepTeacher(Teacher):
    """A teacher with its sampler, `teacher_steps` of DPM-Solver++, and the smaller numbers of steps in which a student shall do the same.

    Each of `student_steps` divides `teacher_steps`.
    """

    schedule: Schedule
    teacher_steps: int
    student_steps: tuple[int, ...]

    def states(self, noise: Tensor, digit: Tensor, domain: Tensor, guidance: Tensor) -> dict[int, Tensor]:
        """Return {t: x_t} of the teacher's sampler from noise [B,C,H,W] at t = T-1 to images at -1; labels and scales are [B]."""

        def denoise(x: Tensor, t: int) -> Tensor:
            return self(x, torch.full((len(x),), t, device=x.device), digit, domain, guidance)

        visited: list[Tensor] = []
        images = samplers.dpm_solver(denoise, noise, self.schedule, self.teacher_steps, lambda _, x: visited.append(x))
        times = [t for t, _ in step_rule("trailing", len(self.schedule), self.teacher_steps).pairs]
        return dict(zip([*times, -1], [noise, *visited[:-1], images], strict=True))

    def loss(
        self, student: Callable[..., Tensor], noise: Tensor, digit: Tensor, domain: Tensor, guidance: Tensor
    ) -> Tensor:
        """Return the mean squared distance of the student's outputs from those whose steps lead to the teacher's states.

        student(x, t, digit, domain, guidance, steps) is called once, for all steps of every number of steps.
        """
        states = self.states(noise, digit, domain, guidance)
        pairs = [(n, *pair) for n in self.student_steps for pair in step_rule("trailing", len(self.schedule), n).pairs]
        x = torch.cat([states[t] for _, t, _ in pairs])
        goal = torch.cat([self.schedule.step_output(states[t], t, states[end], end) for _, t, end in pairs])
        steps, times = (torch.tensor(column, device=x.device) for column in list(zip(*pairs, strict=True))[:2])
        labels = (each.repeat(len(pairs)) for each in (digit, domain, guidance))
        output = student(x, times.repeat_interleave(len(noise)), *labels, steps.repeat_interleave(len(noise)))
        return (output.float() - goal).square().mean()
