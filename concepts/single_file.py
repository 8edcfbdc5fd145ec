"""Stable Diffusion v1 in one file of the original layout (sd-v1-4.ckpt, model.ckpt, .safetensors), read without running what a file may
carry and without a network: configuration and vocabulary, which such files lack, are made here.

Rombach et al. 2022, arXiv 2112.10752; the text tower is CLIP ViT-L/14, Radford et al. 2021, arXiv 2103.00020.
"""

from __future__ import annotations

import contextlib
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers.loaders.single_file_utils import (
    convert_ldm_unet_checkpoint,
    convert_ldm_vae_checkpoint,
    infer_diffusers_model_type,
)
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor, nn
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from runtime.cli import BadInput
from runtime.files import load_safetensors, load_tensors

Tensors = dict[str, Tensor]
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
LIGHTNING = (  # what files of PyTorch Lightning hold beside tensors: the best score so far, and whose it is
    "pytorch_lightning.callbacks.model_checkpoint.ModelCheckpoint",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",  # numpy 2
    "numpy.dtype",
)
UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "attention_head_dim": 8,  # diffusers' name for the number of heads
    "cross_attention_dim": 768,
}
VAE: dict[str, Any] = {
    "sample_size": 512,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "scaling_factor": 0.18215,
}
TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "projection_dim": 768,
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
SCHEDULER: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "trained_betas": None,
    "skip_prk_steps": True,
    "set_alpha_to_one": False,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 1,
}


class Ignored:
    """Stands for an object that is of no use here: takes whatever its pickle gives it, keeps and does nothing."""

    def __init__(self, *given: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# ---------------------------------------------------------------- what the file does not hold


def make_parts() -> dict[str, nn.Module]:
    """unet, vae and text_encoder of Stable Diffusion v1, without memory for their weights."""
    with init_empty_weights():
        text = CLIPTextModel(CLIPTextConfig(**TEXT))
        return {"unet": UNet2DConditionModel(**UNET), "vae": AutoencoderKL(**VAE), "text_encoder": text}


def make_tokenizer() -> CLIPTokenizer:
    """CLIP's own, from the vocabulary that open_clip installs, which has other names for the two special tokens and the same ids."""
    known = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in known.encoder.items()}
    merges = sorted(known.bpe_ranks, key=known.bpe_ranks.__getitem__)
    special = {"unk_token": names["<end_of_text>"], "pad_token": names["<end_of_text>"]}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, **special)


def make_scheduler() -> PNDMScheduler:
    """Stable Diffusion v1's: eps prediction, scaled-linear betas. All is told: schedulers made from one that leaves something to
    its defaults take their own."""
    return PNDMScheduler(**SCHEDULER)


# ---------------------------------------------------------------- the file


def open_checkpoint(path: Path) -> tuple[dict[str, nn.Module], dict[str, Tensors]]:
    """Empty parts, and for each its tensors under the part's own names. Tensors are mapped, not read, but for torch files from before
    1.6. Raises BadInput for files that are unreadable, hold code, or are no Stable Diffusion v1."""
    original, parts = read_tensors(path), make_parts()
    try:
        kind = infer_diffusers_model_type(original)
        converted = _convert(original, parts)
    except (LookupError, AttributeError):  # names of the layout on tensors of other shapes
        raise BadInput(f"{path} is no Stable Diffusion v1: its tensors are laid out otherwise") from None
    if kind != "v1":
        raise BadInput(f"{path} is no Stable Diffusion v1 but {kind}; name a v1 file, such as sd-v1-4.ckpt")
    for name, part in parts.items():
        _require_fit(path, name, part.state_dict(), converted[name])
    return parts, converted


def load_parts(path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """unet, vae and text_encoder on `device`, in `dtype`: copied tensor by tensor, so that memory holds them once."""
    parts, tensors = open_checkpoint(path)
    for name, part in parts.items():
        values = {key: value.to(device, dtype, copy=True) for key, value in tensors[name].items()}
        part.load_state_dict(values, assign=True)
    return parts


def read_tensors(path: Path) -> Tensors:
    """All tensors of a safetensors or torch file, Lightning's included. Raises BadInput when it is truncated or holds code."""
    with path.open("rb") as file:
        begins = file.read(9)[8:] == b"{"  # as safetensors' header does
    if begins or path.suffix == ".safetensors":  # torch.load goes by the suffix as well
        return load_safetensors(path)[0]
    with safe_globals([(Ignored, name) for name in LIGHTNING]):
        _require_harmless(path)
        found = load_tensors(path, mapped=zipfile.is_zipfile(path))
    found = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(found, dict):
        raise BadInput(f"{path} is no Stable Diffusion v1: it holds {type(found).__name__}, not named tensors")
    return {name: value for name, value in found.items() if isinstance(name, str) and isinstance(value, Tensor)}


def _require_harmless(path: Path) -> None:
    """Names what a pickle would call; the reader that follows refuses it as well, but not by name."""
    with contextlib.suppress(
        RuntimeError, ValueError, EOFError, LookupError, pickle.UnpicklingError
    ):  # the reader's to tell
        if refused := sorted(get_unsafe_globals_in_checkpoint(path)):
            raise BadInput(
                f"{path} is refused: besides tensors it calls {', '.join(refused[:3])}, which may run anything;"
                " if you trust it, save its state_dict as .safetensors where it was made"
            )


# ---------------------------------------------------------------- from the original names to the parts' own


def _convert(original: Tensors, parts: dict[str, nn.Module]) -> dict[str, Tensors]:
    """The tensors of each part. What belongs to none is left out: averages (model_ema), the training's schedule, optimizers."""
    chosen = {
        part: {name: value for name, value in original.items() if name.startswith(prefix)}
        for part, prefix in PREFIXES.items()
    }
    return {
        "unet": convert_ldm_unet_checkpoint(chosen["unet"], parts["unet"].config),
        "vae": convert_ldm_vae_checkpoint(chosen["vae"], parts["vae"].config),
        "text_encoder": _convert_text(chosen["text_encoder"], parts["text_encoder"]),
    }


def _convert_text(original: Tensors, tower: nn.Module) -> Tensors:
    """Only prefixes differ; transformers before 5.6 kept text_model. Old files also hold the positions' numbers, which are no weights."""
    before = "text_model." if hasattr(tower, "text_model") else ""
    inner = {name.removeprefix(PREFIXES["text_encoder"]).removeprefix("text_model."): name for name in original}
    inner.pop("embeddings.position_ids", None)
    return {before + name: original[full] for name, full in inner.items()}


def _require_fit(path: Path, part: str, wanted: Tensors, found: Tensors) -> None:
    """Same names, same shapes, floating point; else BadInput that names the first that differs."""
    problems = [f"lacks {name}" for name in wanted if name not in found]
    problems += [f"has an unknown {name}" for name in found if name not in wanted]
    for name in wanted.keys() & found.keys():
        if found[name].shape != wanted[name].shape:
            shapes = f"{list(found[name].shape)}, not {list(wanted[name].shape)}"
            problems.append(f"has {name} of shape {shapes}")
        elif not found[name].is_floating_point():
            problems.append(f"has {name} as {found[name].dtype}")
    if problems:
        more = f", and {len(problems) - 1} more tensors do not fit" if len(problems) > 1 else ""
        raise BadInput(f"{path} is no Stable Diffusion v1: its {part} {problems[0]}{more}")
