"""Stable Diffusion for P3's scripts: one loader for every kind of --model, recognised by content.

* a folder in diffusers' layout, or the name of a hub repository (the only case that may use a network)
* a single file in the original layout: sd-v1-4.ckpt, model.ckpt, .safetensors (concepts/single_file.py)
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from concepts.single_file import UNET, VAE, load_parts, make_scheduler, make_tokenizer, open_checkpoint
from runtime.cli import BadInput
from runtime.device import HALF
from runtime.files import foreign_file, header_error, list_files, read_json, read_object
from runtime.hub import first_line, hub_answers, is_hub_name, only_variant, quiet_libraries

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers import CLIPTextModel, CLIPTokenizer

KINDS = {"unet": "UNet2DConditionModel", "vae": "AutoencoderKL", "text_encoder": "CLIPTextModel"}  # part -> its class
FILES = (".ckpt", ".safetensors", ".pt", ".pth", ".bin")
INDEX = "model_index.json"
WEIGHTS = (".safetensors", ".bin")
VOCABULARY = ("vocab.json", "tokenizer.json")  # without them transformers makes an empty tokenizer
WITHOUT: dict[str, Any] = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
WANTED = (
    "give a diffusers folder, a hub name such as CompVis/stable-diffusion-v1-4, or a single file such as sd-v1-4.ckpt"
    " (of CompVis/stable-diffusion-v-1-4-original at huggingface.co)"
)


@dataclass(frozen=True)
class ModelDims:
    """Sizes that follow from a model's configurations."""

    text_width: int
    latent_channels: int
    latent_size: int
    """Height and width of the latent of an image of the model's own size."""
    vae_scale: int
    """Pixels along each side of a latent position."""
    size_multiple: int
    """Latent height and width must be multiples of this (U-Net downsampling)."""

    @classmethod
    def of(cls, unet: Mapping[str, Any], vae: Mapping[str, Any]) -> ModelDims:
        """Return the sizes that both configurations give; fields that they lack are those of Stable Diffusion v1."""
        unet, vae = {**UNET, **unet}, {**VAE, **vae}
        return cls(
            text_width=unet["cross_attention_dim"],
            latent_channels=unet["in_channels"],
            latent_size=unet["sample_size"],
            vae_scale=2 ** (len(vae["block_out_channels"]) - 1),
            size_multiple=2 ** (len(unet["block_out_channels"]) - 1),
        )

    def latent_shape(self, size: int | None) -> tuple[int, int, int]:
        """Return the latent's shape (channels, h, w) for an image of `size` pixels along each side; None = the model's own size.

        Raise BadInput for a size that the model doesn't support.
        """
        if size is None:
            return (self.latent_channels, self.latent_size, self.latent_size)
        step = self.vae_scale * self.size_multiple
        if size < step or size % step:
            raise BadInput(f"--size {size}: must be a multiple of {step} for this model")
        return (self.latent_channels, size // self.vae_scale, size // self.vae_scale)


def load_pipeline(model: str, device: torch.device, dtype: torch.dtype) -> StableDiffusionPipeline:
    """Load a frozen pipeline without safety checker and progress bar, all parts on `device` in `dtype`.

    Latents are [N,4,h,w], text [N,77,width]. Raise BadInput for a model that is no Stable Diffusion with eps prediction.
    """
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    path = Path(model)
    if path.is_file():
        parts = load_parts(path, device, dtype)
        make: Any = StableDiffusionPipeline  # an untyped constructor
        pipe: StableDiffusionPipeline = make(**parts, tokenizer=make_tokenizer(), scheduler=make_scheduler(), **WITHOUT)
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
    """Check a model in seconds, without its weights. Return its sizes, or None for a hub name, of which only the index is read.

    Raise the BadInput of `load_pipeline`, as far as this check shows it.
    """
    path = Path(model)
    if path.is_file():
        open_checkpoint(path)
        return ModelDims.of(UNET, VAE)
    if path.is_dir():
        dims = _check_folder(path)
        for name in KINDS:
            files = _weight_files(path / name)
            for file in [
                file for file in files if file.suffix.lower() == ".safetensors"
            ] or files:  # as the loader does
                if reason := header_error(file):
                    raise BadInput(f"--model {model}: its {name} is unreadable ({reason})")
        return dims
    _check_index(model, read_json(_index_from_hub(model)))
    return None


def load_tokenizer(model: str) -> CLIPTokenizer | None:
    """Return the model's tokenizer alone, or None for one that is neither on this machine nor at the hub.

    Raise BadInput for a folder without a readable one.
    """
    from transformers import CLIPTokenizer

    path = Path(model)
    if path.is_file():
        return make_tokenizer()
    if not path.is_dir() and not is_hub_name(model):
        return None
    local: Any = {"local_files_only": path.is_dir() or not hub_answers()}
    try:
        tokenizer: CLIPTokenizer = CLIPTokenizer.from_pretrained(model, subfolder="tokenizer", **local)
    except Exception as error:  # the hub's client and the libraries raise errors of a dozen unrelated classes
        if not path.is_dir():
            return None
        raise BadInput(f"--model {model}: its tokenizer is unreadable ({first_line(error)})") from None
    return tokenizer


def suit_training(network: UNet2DConditionModel | CLIPTextModel, device: torch.device, precision: str) -> None:
    """Replace the network's attention by plain products and a softmax, in place, but only on a CPU in half precision.

    There the fused kernel's backward pass in bf16 is six times slower than in fp32, and takes half of a whole training step.
    """
    from diffusers.models.attention_processor import AttnProcessor
    from transformers import CLIPTextModel

    if device.type != "cpu" or precision not in HALF:
        return
    if isinstance(network, CLIPTextModel):
        network.set_attn_implementation("eager")
    else:
        network.set_attn_processor(AttnProcessor())


def run_autoencoder(vae: AutoencoderKL, work: Callable[[AutoencoderKL, Tensor], Tensor], x: Tensor) -> Tensor:
    """Return work(vae, x) in float32, computed in the autoencoder's dtype; rows of x that overflow in fp16 are computed in fp32."""
    x = x.to(vae.device)
    result = work(vae, x.to(vae.dtype)).float()
    if vae.dtype == torch.float16 and (overflow := ~result.flatten(1).isfinite().all(1)).any():
        result[overflow] = work(copy.deepcopy(vae).float(), x[overflow].float())
    return result


# ---------------------------------------------------------------- the hub


def _index_from_hub(model: str) -> Path:
    if not is_hub_name(model) or Path(model).suffix in FILES:
        raise BadInput(f"--model {model} does not exist: {WANTED}")
    from huggingface_hub import hf_hub_download

    return _fetch(model, lambda **where: hf_hub_download(model, INDEX, **where))


def _from_hub(model: str) -> Path:
    """Return the folder in the hub's cache with the parts that are used. Fetch those that are absent."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    _check_index(model, read_json(_index_from_hub(model)))
    download = partial(StableDiffusionPipeline.download, model, **WITHOUT)
    folder = _fetch(model, download)
    if all(list_files(folder / name, WEIGHTS) for name in KINDS if (folder / name).is_dir()):
        return folder
    return _fetch(model, partial(download, variant="fp16"))  # the only weights that it has


def _fetch(model: str, get: Callable[..., str | os.PathLike[str]]) -> Path:
    """Return the path that `get` finds in the hub's cache, or at the hub if it answers."""
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
    """Load a folder's pipeline on the CPU. Raise BadInput unless it is a complete Stable Diffusion."""
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline

    _check_folder(folder)
    quiet_libraries()
    parts = {name: _load_part(folder / name, dtype) for name in KINDS}
    try:
        return StableDiffusionPipeline.from_pretrained(folder, local_files_only=True, **parts, **WITHOUT)
    except Exception as error:  # the libraries' own message is the clearest
        raise BadInput(f"--model {folder}: its tokenizer or scheduler is unreadable ({first_line(error)})") from None


def _load_part(folder: Path, dtype: torch.dtype) -> nn.Module:
    """Load one part. Raise BadInput for absent, unknown or misshapen tensors, of which the libraries only warn."""
    import diffusers
    import transformers

    kind: Any = getattr(diffusers, KINDS[folder.name], None) or getattr(transformers, KINDS[folder.name])
    # transformers' name for it, and the one that all versions of diffusers know
    dtype_name = "dtype" if kind is transformers.CLIPTextModel else "torch_dtype"
    options: dict[str, Any] = {dtype_name: dtype, "local_files_only": True, "output_loading_info": True}
    options |= only_variant(_weight_files(folder))
    try:
        part, info = kind.from_pretrained(folder, **options)
    except Exception as error:  # of any class, by the libraries
        raise BadInput(
            f"--model {folder.parent}: its {folder.name} is unreadable ({foreign_file(folder) or first_line(error)})"
        ) from None
    for problem in ("missing_keys", "mismatched_keys", "unexpected_keys"):
        if names := sorted(map(str, info[problem])):
            kinds = problem.replace("_keys", " tensors")
            raise BadInput(f"--model {folder.parent}: {len(names)} {kinds} in {folder.name}, such as {names[0]}")
    return cast(nn.Module, part)


def _weight_files(folder: Path) -> list[Path]:
    files = list_files(folder, WEIGHTS)
    if not files:
        raise BadInput(
            f"--model {folder.parent}: its {folder.name} is unreadable (no weights there; download the whole folder)"
        )
    return files


def _check_folder(folder: Path) -> ModelDims:
    """Return a folder's sizes. Raise BadInput unless its configurations are those of a Stable Diffusion whose parts fit each other."""
    if not (folder / INDEX).is_file():
        config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
        kind = config.get("_class_name") or ("LoRA" if any(folder.glob("*lora*.safetensors")) else "")
        alone = f" but a {kind}" if kind else ""
        raise BadInput(f"--model {folder}: no {INDEX} there, so this is no diffusers pipeline{alone}; {WANTED}")
    _check_index(str(folder), read_json(folder / INDEX))
    configs = {name: read_object(folder / name / "config.json") for name in KINDS}
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
    predicts = read_object(folder / "scheduler" / "scheduler_config.json").get("prediction_type", "epsilon")
    if predicts != "epsilon":
        raise BadInput(f"--model {folder}: predicts {predicts!r}, only epsilon is known; name another model")
    for name in KINDS:
        _weight_files(folder / name)
    return ModelDims.of(unet, vae)


def _check_index(model: str, index: Any) -> None:
    for name, expected in KINDS.items():
        entry = index.get(name) if isinstance(index, dict) else None
        kind = entry[1] if isinstance(entry, list) and len(entry) == 2 else None
        if kind != expected:
            has = f"{kind} as {name}" if kind else f"no {name}"
            raise BadInput(f"--model {model}: has {has}, {expected} is needed; name a Stable Diffusion v1")
