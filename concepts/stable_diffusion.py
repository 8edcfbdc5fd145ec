"""Stable Diffusion for P3's scripts, from whatever --model names, behind one function; recognised by content.

* a folder in diffusers' layout, or the name of a hub repository (the only case that may use a network)
* a single file in the original layout: sd-v1-4.ckpt, model.ckpt, .safetensors (concepts/single_file.py)
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.attention_processor import AttnProcessor
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from huggingface_hub import hf_hub_download
from torch import nn
from transformers import CLIPTextModel

from concepts.single_file import UNET, VAE, load_parts, make_scheduler, make_tokenizer, open_checkpoint
from runtime.cli import BadInput
from runtime.files import read_json
from runtime.hub import first_line, hub_answers, quiet_libraries

KINDS: dict[str, type[Any]] = {"unet": UNet2DConditionModel, "vae": AutoencoderKL, "text_encoder": CLIPTextModel}
FILES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
INDEX = "model_index.json"
VOCABULARY = ("vocab.json", "tokenizer.json")  # without them transformers makes an empty tokenizer
WITHOUT: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
WANTED = "give a diffusers folder, a hub name (owner/name) or a single file such as sd-v1-4.ckpt"


@dataclass(frozen=True)
class ModelDims:
    """What configurations tell of a model."""

    width: int
    """Of its text."""
    channels: int
    """Of its latents."""
    side: int
    """Latents along each side of its own pictures."""
    factor: int
    """Pixels along each side of a latent."""
    least: int
    """Latents along each side, of which a picture must have a multiple: the U-Net halves them so often."""

    @classmethod
    def of(cls, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> ModelDims:
        """From the configurations of both; what they lack is as in Stable Diffusion v1."""
        unet, vae = {**UNET, **unet}, {**VAE, **vae}
        return cls(
            width=unet["cross_attention_dim"],
            channels=unet["in_channels"],
            side=unet["sample_size"],
            factor=2 ** (len(vae["block_out_channels"]) - 1),
            least=2 ** (len(unet["block_out_channels"]) - 1),
        )

    def shape(self, size: int | None) -> tuple[int, int, int]:
        """Of the latent of a picture of `size` pixels along each side; None: the model's own. Raises BadInput where it can't be drawn."""
        if size is None:
            return (self.channels, self.side, self.side)
        step = self.factor * self.least
        if size < step or size % step:
            raise BadInput(f"--size {size}: must be a multiple of {step} for this model")
        return (self.channels, size // self.factor, size // self.factor)


def load_pipeline(model: str, device: torch.device, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Frozen, without safety checker and progress bar, all parts on `device` in `dtype`; latents [N,4,h,w], text [N,77,width].
    Raises BadInput for whatever is no Stable Diffusion with eps prediction."""
    path = Path(model)
    if path.is_file():
        parts = load_parts(path, device, dtype)
        # the constructor has no types: it is the same for all pipelines
        pipe = cast(Any, StableDiffusionPipeline)(
            **parts, tokenizer=make_tokenizer(), scheduler=make_scheduler(), **WITHOUT
        )
    else:
        pipe = _load_folder(path if path.is_dir() else _from_hub(model), dtype)
    try:
        for name in KINDS:
            getattr(pipe, name).to(device).eval().requires_grad_(False)
    except torch.OutOfMemoryError:
        raise BadInput(f"--model {model}: {device} has too little memory left for it; try --device cpu") from None
    pipe.set_progress_bar_config(disable=True)
    return pipe


def check_model(model: str) -> ModelDims | None:
    """What `load_pipeline` would refuse, as far as it shows without reading weights; raises the same BadInput. Takes seconds.
    A hub's index alone has no outline."""
    path = Path(model)
    if path.is_file():
        open_checkpoint(path)
        return ModelDims.of(UNET, VAE)
    if path.is_dir():
        return _check_folder(path)
    _check_index(model, read_json(_index_from_hub(model)))
    return None


def suit_training(network: UNet2DConditionModel | CLIPTextModel, device: torch.device, precision: str) -> None:
    """Attention whose gradient is quick. On CPUs in bf16 the fused kernel goes backward six times slower than in fp32, which is half
    of a whole step; plain products and a softmax don't."""
    if device.type != "cpu" or precision != "bf16":
        return
    if isinstance(network, CLIPTextModel):
        network.set_attn_implementation("eager")
    else:
        network.set_attn_processor(AttnProcessor())


# ---------------------------------------------------------------- the hub


def _index_from_hub(model: str) -> Path:
    """model_index.json alone."""
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", model) or Path(model).suffix in FILES:
        raise BadInput(f"--model {model} does not exist: {WANTED}")
    return _fetch(model, lambda **where: hf_hub_download(model, INDEX, **where))


def _from_hub(model: str) -> Path:
    """A local copy of the parts that are used."""
    _check_index(model, read_json(_index_from_hub(model)))
    return _fetch(model, lambda **where: StableDiffusionPipeline.download(model, **where, **WITHOUT))


def _fetch(model: str, get: Callable[..., str | os.PathLike[str]]) -> Path:
    """What `get` finds in the hub's cache or at the hub, where that answers."""
    online = hub_answers()
    try:
        return Path(get(local_files_only=not online))
    except Exception as error:  # the hub's client raises errors of a dozen unrelated classes
        reason = first_line(error) if online else "it is not in the cache, and the hub does not answer"
        raise BadInput(
            f"--model {model}: no such file or folder here, and the hub did not give it ({reason}); {WANTED}"
        ) from None


# ---------------------------------------------------------------- folders


def _load_folder(folder: Path, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Weights strictly, on the CPU; tokenizer and scheduler are whatever the folder has."""
    _check_folder(folder)
    quiet_libraries()
    parts = {name: _load_part(folder / name, kind, dtype) for name, kind in KINDS.items()}
    try:
        return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **parts, **WITHOUT)
    except Exception as error:  # whatever is wrong with the files, the libraries' own words are the best there are
        raise BadInput(f"--model {folder}: its tokenizer or scheduler is unreadable ({first_line(error)})") from None


def _load_part(folder: Path, kind: type[Any], dtype: torch.dtype) -> nn.Module:
    """The libraries only warn of tensors that are absent, and draw them at random."""
    name = (
        "dtype" if kind is CLIPTextModel else "torch_dtype"
    )  # the one of transformers, the one that all diffusers know
    given: dict[str, Any] = {name: dtype, "local_files_only": True, "output_loading_info": True}
    try:
        part, info = kind.from_pretrained(folder, **given)
    except Exception as error:  # as above
        raise BadInput(f"--model {folder.parent}: its {folder.name} is unreadable ({first_line(error)})") from None
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        strange = sorted(map(str, info[problem]))
        if strange:
            kinds = problem.replace("_keys", " tensors")
            raise BadInput(f"--model {folder.parent}: {len(strange)} {kinds} in {folder.name}, such as {strange[0]}")
    return part


def _check_folder(folder: Path) -> ModelDims:
    """Raises BadInput unless its configurations are those of a Stable Diffusion whose parts fit each other."""
    if not (folder / INDEX).is_file():
        raise BadInput(f"--model {folder}: no {INDEX} there, so this is no diffusers pipeline; {WANTED}")
    _check_index(str(folder), read_json(folder / INDEX))
    configs = {name: read_json(folder / name / "config.json") for name in KINDS}
    unet, vae, text = configs.values()
    channels, latents = unet.get("in_channels", 4), vae.get("latent_channels", 4)
    if channels != latents:
        raise BadInput(
            f"--model {folder}: its unet takes {channels} channels, {latents} are needed (made for inpainting?)"
        )
    if unet.get("cross_attention_dim") != text.get("hidden_size"):
        widths = f"{unet.get('cross_attention_dim')} wide, its text_encoder writes {text.get('hidden_size')}"
        raise BadInput(f"--model {folder}: its unet reads text {widths}")
    if not any((folder / "tokenizer" / name).is_file() for name in VOCABULARY):
        raise BadInput(f"--model {folder}: no {' or '.join(VOCABULARY)} in tokenizer; download the whole folder")
    predicts = read_json(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if predicts != "epsilon":
        raise BadInput(f"--model {folder}: predicts {predicts!r}, only epsilon is known; name another model")
    return ModelDims.of(unet, vae)


def _check_index(model: str, index: Any) -> None:
    """Raises BadInput where a part is of another class."""
    for name, kind in KINDS.items():
        found = index.get(name) if isinstance(index, dict) else None
        found = found[1] if isinstance(found, list) and len(found) == 2 else None
        if found != kind.__name__:
            has = f"{found} as {name}" if found else f"no {name}"
            raise BadInput(f"--model {model}: has {has}, {kind.__name__} is needed; name a Stable Diffusion v1")
