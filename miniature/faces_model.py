"""The miniature's face model: its network, sampling, and its folder in diffusers' form."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from diffusion.noise import draw, generators
from diffusion.samplers import ddim
from diffusion.schedule import Schedule
from diffusion.step_rules import step_rule
from miniature.diffusion_parts import save_atomically
from miniature.face_world import SIDE
from runtime.cli import BadInput
from runtime.device import to_training_device
from runtime.files import ROOT, write_json

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

SHIPPED = ROOT / "checkpoints" / "miniature" / "faces"
WEIGHTS = "unet/diffusion_pytorch_model.safetensors"
ORIGIN = "training.json"  # in the model's folder: how it was trained, and on which faces
STEPS = 1000
CHUNK = 64  # images sampled at a time


def make_network(channels: Sequence[int], blocks: int) -> UNet2DModel:
    """Return an untrained U-Net like the course's (Ho et al. 2020) but smaller: [B,3,64,64], t [B] -> v.

    `channels` are those of each level, finest first; `blocks` is the number of residual blocks per level. Raise BadInput for bad numbers.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel

    if len(channels) < 2 or any(width < 8 or width % 8 for width in channels) or blocks < 1:
        raise BadInput(
            f"--channels {channels}, --blocks {blocks}: two levels or more, multiples of 8, one block or more"
        )
    plain = len(channels) - 1
    network: UNet2DModel = UNet2DModel(
        sample_size=SIDE,
        block_out_channels=tuple(channels),
        layers_per_block=blocks,
        down_block_types=("DownBlock2D",) * plain + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * plain,
        attention_head_dim=None,  # one head
        freq_shift=0,
        flip_sin_to_cos=False,
        downsample_padding=1,
        norm_eps=1e-5,
        norm_num_groups=8,
    )
    return network


@torch.inference_mode()
def sample_faces(unet: UNet2DModel, schedule: Schedule, seeds: Sequence[int]) -> Tensor:
    """Sample faces [N,3,64,64] in -1..1 by DDIM at eta 0 in 50 steps, on the CPU. Face k starts from the noise of `seeds[k]`."""

    def denoise(x: Tensor, t: int) -> Tensor:
        v: Tensor = unet(x, torch.full((len(x),), t, device=x.device), return_dict=False)[0]
        return v

    rule, parts = step_rule("homework", len(schedule), 50), []
    for start in range(0, len(seeds), CHUNK):
        noise = draw(generators(seeds[start : start + CHUNK]), (3, SIDE, SIDE), unet.device)
        parts.append(ddim(denoise, noise, schedule, rule).clamp(-1, 1).cpu())
    return torch.cat(parts)


def save_folder(network: UNet2DModel, folder: Path, origin: dict[str, Any]) -> None:
    """Write a DDIMPipeline folder: fp16 weights, the course's schedule, and `origin` (how it was trained) as json. Keep other files."""
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    scheduler = DDIMScheduler(  # linear, 1e-4 .. 0.02
        num_train_timesteps=STEPS, steps_offset=1, set_alpha_to_one=False, prediction_type="v_prediction"
    )
    half: Any = to_training_device(deepcopy(network).half(), torch.device("cpu"))
    save_atomically(DDIMPipeline(half, scheduler), folder)
    write_json(folder / ORIGIN, origin)
