"""Stable Diffusion v1 in one file of the original layout (sd-v1-4.ckpt, model.ckpt, .safetensors).

Files are read safely and offline: pickled code is never executed. Configuration and vocabulary, which such files lack, are built here.
Rombach et al. 2022, arXiv 2112.10752; the text encoder is CLIP ViT-L/14, Radford et al. 2021, arXiv 2103.00020.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.serialization import safe_globals

from runtime.cli import BadInput
from runtime.files import load_tensors
from runtime.weights import STABLE_DIFFUSION, describe, named_tensors

if TYPE_CHECKING:
    from diffusers.schedulers.scheduling_pndm import PNDMScheduler
    from transformers import CLIPTokenizer

Tensors = dict[str, Tensor]
PREFIXES = {
    "unet": "model.diffusion_model.",
    "vae": "first_stage_model.",
    "text_encoder": "cond_stage_model.transformer.",
}
LIGHTNING = (  # what PyTorch Lightning saves with the tensors: the best score so far, and its callback
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
    """Placeholder for an object that is not needed: accepts any pickled state and discards it."""

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: object) -> None: ...


# ---------------------------------------------------------------- what the file does not hold


def make_parts() -> dict[str, nn.Module]:
    """Build unet, vae and text_encoder of Stable Diffusion v1 with empty weights, which take no memory."""
    from accelerate import init_empty_weights
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with init_empty_weights():
        text = CLIPTextModel(CLIPTextConfig(**TEXT))
        return {"unet": UNet2DConditionModel(**UNET), "vae": AutoencoderKL(**VAE), "text_encoder": text}


def make_tokenizer() -> CLIPTokenizer:
    """Build CLIP's tokenizer from open_clip's vocabulary, which names the two special tokens differently; the ids are the same."""
    from open_clip.tokenizer import SimpleTokenizer
    from transformers import CLIPTokenizer

    installed = SimpleTokenizer()
    names = {"<start_of_text>": "<|startoftext|>", "<end_of_text>": "<|endoftext|>"}
    vocabulary = {names.get(token, token): index for token, index in installed.encoder.items()}
    merges = sorted(installed.bpe_ranks, key=installed.bpe_ranks.__getitem__)
    special = {"unk_token": names["<end_of_text>"], "pad_token": names["<end_of_text>"]}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=77, **special)


def make_scheduler() -> PNDMScheduler:
    """Build Stable Diffusion v1's scheduler: eps prediction, scaled-linear betas.

    Every option is set, since a scheduler converted from this one replaces unset options by its own defaults.
    """
    from diffusers.schedulers.scheduling_pndm import PNDMScheduler

    scheduler: PNDMScheduler = PNDMScheduler(**SCHEDULER)
    return scheduler


# ---------------------------------------------------------------- the file


def open_checkpoint(path: Path) -> tuple[dict[str, nn.Module], dict[str, Tensors]]:
    """Return parts with empty weights, and for each the file's tensors under the part's own names.

    Tensors are memory-mapped, except in torch files from before 1.6.
    Raise BadInput for files that are unreadable, hold code, or are no Stable Diffusion v1.
    """
    from diffusers.loaders.single_file_utils import infer_diffusers_model_type

    original = read_tensors(path)
    if (kind := describe(original)) not in ("", STABLE_DIFFUSION):
        raise BadInput(
            f"{path} is no Stable Diffusion v1 but {kind}; --model wants a whole v1 file, such as sd-v1-4.ckpt"
        )
    lacking = [part for part, prefix in PREFIXES.items() if not any(name.startswith(prefix) for name in original)]
    parts = make_parts()
    try:
        kind = infer_diffusers_model_type(original)
        if kind == "v1" and 0 < len(lacking) < len(PREFIXES):
            raise BadInput(f"{path} is a Stable Diffusion v1 without its {' and '.join(lacking)}; name a whole file")
        converted = _convert(original, parts)
    except (LookupError, AttributeError):  # names of the layout on tensors of other shapes
        raise BadInput(f"{path} is no Stable Diffusion v1: its tensors are laid out otherwise") from None
    if kind != "v1":
        raise BadInput(f"{path} is no Stable Diffusion v1 but {kind}; name a v1 file, such as sd-v1-4.ckpt")
    for name, part in parts.items():
        if error := shape_error(part.state_dict(), converted[name]):
            raise BadInput(f"{path} is no Stable Diffusion v1: its {name} {error}")
    return parts, converted


def load_parts(path: Path, device: torch.device, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Load unet, vae and text_encoder to `device` in `dtype`, tensor by tensor, so that memory holds them once."""
    parts, tensors = open_checkpoint(path)
    for name, part in parts.items():
        values = {key: value.to(device, dtype, copy=True) for key, value in tensors[name].items()}
        part.load_state_dict(values, assign=True)
    return parts


def read_tensors(path: Path) -> Tensors:
    """Return the named tensors of a safetensors, torch or Lightning file; raise BadInput if it is truncated or holds code."""
    with safe_globals([(Ignored, name) for name in LIGHTNING]):
        content = load_tensors(path, mapped=True)
    state = named_tensors(content, path, PREFIXES["unet"] + "input_blocks.0.0.weight")
    if not isinstance(state, dict):
        raise BadInput(f"{path} is no Stable Diffusion v1: it holds {type(state).__name__}, not named tensors")
    tensors = {name: value for name, value in state.items() if isinstance(name, str) and isinstance(value, Tensor)}
    if not tensors and (kind := describe(content)):
        raise BadInput(f"{path} is no Stable Diffusion v1 but {kind}")
    return tensors


# ---------------------------------------------------------------- from the original names to the parts' own


def _convert(original: Tensors, parts: dict[str, nn.Module]) -> dict[str, Tensors]:
    """Return the tensors of each part; averages (model_ema), the training's schedule and optimizers are left out."""
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

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
    """Return the text encoder's tensors under the names that `tower` has. Only prefixes differ; transformers before 5.6 kept text_model.

    Position ids in old files are left out, since they are no weights.
    """
    before = "text_model." if hasattr(tower, "text_model") else ""
    inner = {name.removeprefix(PREFIXES["text_encoder"]).removeprefix("text_model."): name for name in original}
    inner.pop("embeddings.position_ids", None)
    return {before + name: original[full] for name, full in inner.items()}


def shape_error(expected: Tensors, tensors: Tensors) -> str:
    """Return a message about the first tensor that is absent, unknown, of another shape or not floating point; "" if all fit."""
    errors = [f"lacks {name}" for name in expected if name not in tensors]
    errors += [f"has an unknown {name}" for name in tensors if name not in expected]
    for name in expected.keys() & tensors.keys():
        shape, expected_shape = list(tensors[name].shape), list(expected[name].shape)
        if shape != expected_shape:
            errors.append(f"has {name} of shape {shape}, not {expected_shape}")
        elif not tensors[name].is_floating_point():
            errors.append(f"has {name} as {tensors[name].dtype}")
    more = f", and {len(errors) - 1} more tensors do not fit" if len(errors) > 1 else ""
    return errors[0] + more if errors else ""
