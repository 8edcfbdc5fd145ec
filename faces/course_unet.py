"""Load the course's UNet.pt as diffusers' UNet2DModel: the configuration, and which tensor becomes which.

Both are the U-Net of Ho et al. 2020 for 256x256, with different tensor names. Every tensor of a file is checked before any is used.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runtime.cli import BadInput
from runtime.files import load_tensors
from runtime.weights import describe, named_tensors

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

LEVELS = (128, 128, 256, 256, 512, 512)  # channels, finest first; attention on the fifth
BLOCKS = 2  # residual blocks per level on the way down, one more on the way up
CONFIG: dict[str, Any] = {
    "sample_size": 256,
    "block_out_channels": LEVELS,
    "layers_per_block": BLOCKS,
    "down_block_types": ("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    "attention_head_dim": None,  # one head; the default of 8 channels a head would be another network
    "freq_shift": 0,
    "flip_sin_to_cos": False,
    "downsample_padding": 1,
    "norm_eps": 1e-5,
    "norm_num_groups": 32,
}
RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "time.1": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
ENDS = {
    "time.1": "time_embedding.linear_1",
    "time.3": "time_embedding.linear_2",
    "down1": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
FREQUENCIES = "time.0.inv_freq"  # a buffer that UNet2DModel computes
HALF = LEVELS[0] // 2


def load_course_unet(path: Path) -> UNet2DModel:
    """Load the network of a UNet.pt, float32 on the CPU; raise BadInput for a file that is not exactly this network."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    state = named_tensors(load_tensors(path), path, "down1.weight")
    with torch.device("meta"):
        unet: UNet2DModel = UNet2DModel(**CONFIG)
    shapes = {name: tensor.shape for name, tensor in unet.state_dict().items()}
    layout = course_layout(shapes)
    check(path, state, {name: shape for name, (shape, _) in layout.items()} | {FREQUENCIES: torch.Size([HALF])})
    renamed: dict[str, Tensor] = {}
    for name, (_, targets) in layout.items():
        renamed |= zip(targets, state[name].float().chunk(len(targets)), strict=True)
    unet.load_state_dict({name: tensor.reshape(shapes[name]) for name, tensor in renamed.items()}, assign=True)
    return unet


def check(path: Path, state: Any, expected: dict[str, torch.Size]) -> None:
    """Raise BadInput unless `state` holds finite floating-point tensors of the names and shapes in `expected`, and no others."""
    if not (isinstance(state, dict) and "down1.weight" in state) and (kind := describe(state)):
        raise BadInput(f"{path} is {kind}, not the bare state dict of UNet.pt")
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise BadInput(f"{path}: a {type(state).__name__} of other things than tensors, UNet.pt is a bare state dict")
    for kind, names in (("lacks", expected.keys() - state.keys()), ("has unknown", state.keys() - expected.keys())):
        if names:
            raise BadInput(
                f"{path} is another network than UNet.pt: {kind} {len(names)} tensor(s), such as {min(names)}"
            )
    for name, shape in expected.items():
        if state[name].shape != shape:
            raise BadInput(f"{path}: {name} is {list(state[name].shape)}, UNet.pt has {list(shape)}")
        if not state[name].is_floating_point() or not state[name].isfinite().all():
            raise BadInput(f"{path}: {name} holds integers, infinities or NaN")
    frequencies = torch.exp(-math.log(10_000) * torch.arange(HALF) / HALF)
    if not torch.allclose(state[FREQUENCIES].float(), frequencies, rtol=1e-3):
        raise BadInput(f"{path}: {FREQUENCIES} are other frequencies than UNet.pt's")


# ---------------------------------------------------------------- which tensor is which


def course_layout(shapes: dict[str, torch.Size]) -> dict[str, tuple[torch.Size, list[str]]]:
    """Return {tensor of UNet.pt: (its shape, the tensors of UNet2DModel that it becomes)}.

    `shapes` gives the shape of every tensor of UNet2DModel. A qkv tensor of UNet.pt becomes three tensors.
    The attention's projections are 1x1 convolutions in UNet.pt and linear layers in UNet2DModel.
    """
    layout = {}
    for ours, theirs in module_names().items():
        for kind in ("weight", "bias"):
            parts = "qkv" if "*" in theirs else "*"
            targets = [f"{theirs.replace('*', part)}.{kind}" for part in parts]
            if targets[0] in shapes:  # not every block has a shortcut or attention
                rows, *rest = shapes[targets[0]]
                convolution = [1, 1] if ours.endswith((".qkv", "attention.out")) and kind == "weight" else []
                layout[f"{ours}.{kind}"] = (torch.Size([rows * len(targets), *rest, *convolution]), targets)
    return layout


def module_names() -> dict[str, str]:
    """Return {module of UNet.pt: module of UNet2DModel}; "*" stands for q, k and v.

    It lists a shortcut and an attention for every block, although some have none.
    """
    names = ENDS | _block("mid1", "mid_block", 0) | _block("mid2", "mid_block", 1)
    down = up = 1
    for level in range(len(LEVELS)):
        for block in range(BLOCKS):
            names |= _block(f"down{(down := down + 1)}", f"down_blocks.{level}", block)
        names[f"down{(down := down + 1)}.0"] = f"down_blocks.{level}.downsamplers.0.conv"
        for block in range(BLOCKS + 1):
            names |= _block(f"up{up}", f"up_blocks.{level}", block)
            up += 1
        names[f"up{up}.1"] = f"up_blocks.{level}.upsamplers.0.conv"
        up += 1
    return names


def _block(ours: str, theirs: str, block: int) -> dict[str, str]:
    """Return the same for one residual block and the attention that may follow it."""
    attention = f"{theirs}.attentions.{block}"
    return {f"{ours}.resblocks.{a}": f"{theirs}.resnets.{block}.{b}" for a, b in RESIDUAL.items()} | {
        f"{ours}.attention.norm": f"{attention}.group_norm",
        f"{ours}.attention.qkv": f"{attention}.to_*",
        f"{ours}.attention.out": f"{attention}.to_out.0",
    }
