"""Stable Diffusion v1 as published: the original names of all tensors, and files of that layout.

The names follow from the structure of the original code, not from the converter under test.
"""

from __future__ import annotations

import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from types import ModuleType
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from concepts.single_file import make_parts

NAMES = {
    "unet": {
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    },
    "resnet": {
        "norm1": "in_layers.0",
        "conv1": "in_layers.2",
        "norm2": "out_layers.0",
        "conv2": "out_layers.3",
        "time_emb_proj": "emb_layers.1",
        "conv_shortcut": "skip_connection",
    },
    "attention": {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"},
}


def unet_name(name: str) -> str:
    """Twelve input blocks, three in the middle, twelve output blocks; each is a list of layers."""
    module, _, leaf = name.rpartition(".")
    if module in NAMES["unet"]:
        return f"{NAMES['unet'][module]}.{leaf}"
    side, *rest = name.split(".")
    if side == "mid_block":
        index = 2 * int(rest[1]) if rest[0] == "resnets" else 1
        return f"middle_block.{index}.{inner(rest[0], '.'.join(rest[2:]))}"
    level, kind, place = int(rest[0]), rest[1], int(rest[2])
    tail = inner(kind, ".".join(rest[3:]))
    if kind == "downsamplers":
        return f"input_blocks.{3 * level + 3}.0.op.{leaf}"
    if kind == "upsamplers":  # after the attention, which the lowest level lacks
        return f"output_blocks.{3 * level + 2}.{1 if level == 0 else 2}.{tail}"
    block = f"input_blocks.{3 * level + 1 + place}" if side == "down_blocks" else f"output_blocks.{3 * level + place}"
    return f"{block}.{0 if kind == 'resnets' else 1}.{tail}"


def inner(kind: str, tail: str) -> str:
    """Return a layer's name within its block."""
    module, _, leaf = tail.rpartition(".")
    return f"{NAMES['resnet'][module]}.{leaf}" if kind == "resnets" else tail


def vae_name(name: str) -> str:
    """Levels are numbered by resolution on both sides: the decoder's first is its level 3."""
    name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
    if found := re.fullmatch(r"(.*)mid_block\.attentions\.0\.(.*)\.(\w+)", name):
        return f"{found[1]}mid.attn_1.{NAMES['attention'][found[2]]}.{found[3]}"
    name = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", name)
    name = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", name)
    name = re.sub(r"up_blocks\.(\d)\.resnets", lambda found: f"up.{3 - int(found[1])}.block", name)
    return re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda found: f"up.{3 - int(found[1])}.upsample", name)


def original_name(part: str, name: str) -> str:
    """Return the tensor's name in sd-v1-4.ckpt."""
    if part == "unet":
        return f"model.diffusion_model.{unet_name(name)}"
    if part == "vae":
        return f"first_stage_model.{vae_name(name)}"
    return f"cond_stage_model.transformer.text_model.{name.removeprefix('text_model.')}"


def layout() -> Iterator[tuple[str, str, str, torch.Size]]:
    """(part, its name here, original name, original shape) of all weights; the autoencoder's attention was made of 1x1 convolutions."""
    for part, module in make_parts().items():
        for name, tensor in module.state_dict().items():
            original = original_name(part, name)
            convolution = part == "vae" and "attn_1" in original and tensor.ndim == 2
            yield part, name, original, torch.Size([*tensor.shape, 1, 1] if convolution else tensor.shape)


def weight(original: str, shape: torch.Size) -> Tensor:
    """Random fp16, the same for the same name, so that a test needs no second copy."""
    draws = torch.Generator().manual_seed(zlib.crc32(original.encode()))
    return torch.randn(shape, generator=draws).half()


def hollow() -> dict[str, Tensor]:
    """All original names and shapes in fp16, each tensor one zero seen many times: files of it are small."""
    return {original: torch.zeros(1, dtype=torch.float16).expand(shape) for *_, original, shape in layout()}


def save_sparse(path: Path, tensors: dict[str, Tensor]) -> None:
    """Tensors of zeros in fp16 as safetensors, whose data is a hole in the file and takes no room on most disks."""
    header, end = {}, 0
    for name, tensor in tensors.items():
        start, end = end, end + 2 * tensor.numel()
        header[name] = {"dtype": "F16", "shape": list(tensor.shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


class Call:
    """Pickled as a call of anything: what a reader of pickles would run."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.parts = (function, arguments)

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return self.parts


@contextmanager
def pretended(*paths: str) -> Iterator[list[type]]:
    """Empty classes of these full names, which can be imported, and so pickled, within the block only."""
    classes = []
    with patch.dict(sys.modules):
        for path in paths:
            module, _, name = path.rpartition(".")
            classes.append(type(name, (), {"__module__": module}))
            for package in accumulate(module.split("."), "{}.{}".format):
                if package == module or package not in sys.modules:
                    sys.modules[package] = ModuleType(package)
            setattr(sys.modules[module], name, classes[-1])
        yield classes


def save_lightning(path: Path, tensors: dict[str, Tensor]) -> None:
    """As Lightning 1.4 wrote it: a callback's class as a key, scalars of numpy (1 and 2), an optimizer, a schedule, averages."""
    more = {"betas": torch.rand(1000), "model_ema.num_updates": torch.tensor(470000)}
    more |= {f"model_ema.diffusion_model{index}": torch.rand(3) for index in range(200)}
    more["cond_stage_model.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    with pretended("pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint", "numpy.core.multiarray.scalar") as (
        callback,
        scalar,
    ):
        old = Call(scalar, np.dtype("f8"), np.float64(1e-4).tobytes())
        content = {
            "epoch": 5,
            "global_step": 470000,
            "pytorch-lightning_version": "1.4.2",
            "state_dict": tensors | more,
            "callbacks": {callback: {"monitor": "val/loss", "best_model_score": np.float32(0.25), "self": callback()}},
            "optimizer_states": [{"state": {0: {"step": 1, "exp_avg": torch.rand(4)}}, "param_groups": [{"lr": old}]}],
            "lr_schedulers": [{"last_epoch": 7, "_last_lr": [np.float64(1e-4)], "lr_lambdas": [None]}],
        }
        torch.save(content, path)
