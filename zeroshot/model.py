"""An open_clip model that encodes batches of images, and class names as a zero-shot classifier."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from runtime.cli import BadInput
from runtime.hub import hub
from zeroshot.weights import HUB, LOCAL, Source, is_openai_archive

DTYPES = {"fp32": torch.float32, "tf32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Classifier(NamedTuple):
    """A zero-shot classifier: text features [D,C] float32 of unit length, and the model's scale and bias of cosines."""

    weight: Tensor
    scale: float
    bias: float

    def logits(self, features: Tensor) -> Tensor:
        """Return the scaled cosines [N,C] of image features [N,D], as open_clip's models do."""
        return self.scale * (features @ self.weight) + self.bias


@dataclass
class Clip:
    """A loaded model with its tokenizer, and its transform in two halves: per image on the CPU, per batch on the device."""

    model: Any
    per_image: Callable[[Image.Image], Image.Image]
    mean: Tensor
    std: Tensor
    tokenizer: Callable[[list[str]], Tensor]
    device: torch.device
    dtype: torch.dtype

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Encode [B,3,H,W] uint8, resized and cropped, as [B,D] float32 of unit length, without waiting for the device."""
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        pixels = pixels.to(self.device, non_blocking=True).float().div_(255)
        pixels = pixels.sub_(self.mean).div_(self.std).to(self.dtype)  # torchvision's Normalize waits for the device
        features: Tensor = self.model.encode_image(pixels, normalize=True)
        return features.float()

    @torch.inference_mode()
    def classifier(self, classes: list[str], prompts: list[Callable[[str], str]]) -> Classifier:
        """Build open_clip's zero-shot classifier on the CPU. `prompts` are functions of the class name."""
        weight = open_clip.build_zero_shot_classifier(self.model, self.tokenizer, classes, prompts, 10, self.device)
        scale = float(self.model.logit_scale.detach().float().exp())
        bias = getattr(self.model, "logit_bias", None)  # SigLIP has one
        return Classifier(weight.float().cpu(), scale, 0.0 if bias is None else float(bias.detach()))


def load(source: Source, device: torch.device, precision: str = "fp32") -> Clip:
    """Load the model in evaluation mode; `precision` is fp32, tf32, bf16 or fp16.

    Raise BadInput if file and architecture don't fit.
    """
    whole = source.model.startswith((LOCAL, HUB))
    archive = not whole and is_openai_archive(source.weights)
    # an archive's weights follow, so "initialized randomly" misleads
    logging.disable(logging.WARNING if archive else logging.NOTSET)
    try:
        with hub(source.online):
            model, _, transform = open_clip.create_model_and_transforms(
                source.model,
                None if whole or archive else str(source.weights),
                precision="fp32" if precision == "tf32" else precision,
                device=device,
                force_quick_gelu=source.quick_gelu,
                pretrained_text=False,
                **source.preprocessing,
            )
            tokenizer = open_clip.get_tokenizer(source.model)
        if archive:
            model.load_state_dict(_openai_tensors(source.weights))
    except Exception as error:  # of any class, by open_clip, torch or transformers for a damaged or foreign file
        raise BadInput(f"--model {source.model} can't be loaded from {source.weights}: {_reason(error)}") from error
    finally:
        logging.disable(logging.NOTSET)
    *steps, _, normalize = transform.transforms  # .., to tensor, normalize
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (normalize.mean, normalize.std))
    return Clip(model.eval().requires_grad_(False), Compose(steps), mean, std, tokenizer, device, DTYPES[precision])


def _openai_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of OpenAI's archive, which torch's safe reader refuses. TorchScript runs no Python."""
    tensors = torch.jit.load(str(path), map_location="cpu").state_dict()
    return {name: t for name, t in tensors.items() if name not in ("input_resolution", "context_length", "vocab_size")}


def _reason(error: Exception) -> str:
    """Return an exception's message in one line; torch's list of wrong tensors is cut to the first."""
    text = re.sub(r"\s+", " ", str(error) or type(error).__name__)
    if "Error(s) in loading state_dict" in text or isinstance(error, AssertionError):  # open_clip asserts on widths
        return f"the file is of another architecture ({text.split(': ', 1)[-1].strip()[:160]} ..)"
    absent = "its tokenizer or text tower is not on this machine: name it by a tag or hf-hub:NAME once, with a network"
    return absent if "huggingface.co" in text else text[:240]
