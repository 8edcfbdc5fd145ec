"""An open_clip model that encodes batches of images, and turns prompts for each class into a zero-shot classifier."""

from __future__ import annotations

import logging
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import open_clip
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import Compose

from runtime.cli import BadInput, log
from runtime.device import DTYPES
from runtime.files import foreign_file, load_tensors
from runtime.hub import first_line, hub
from runtime.weights import describe, is_safetensors, named_tensors
from zeroshot.prompts import fillers
from zeroshot.weights import HUB, LOCAL, Source, is_openai_archive


class Classifier(NamedTuple):
    """A zero-shot classifier: a text feature of unit length per class, `weight` [D,C] float32; logits are scale * cosine + bias."""

    weight: Tensor
    scale: float
    bias: float

    def logits(self, features: Tensor) -> Tensor:
        """Return the logits [N,C] of image features [N,D] of unit length."""
        return self.scale * (features @ self.weight) + self.bias


@dataclass
class Clip:
    """A loaded model with its tokenizer and image transform.

    `per_image` resizes and crops on the CPU. Then `encode` normalizes by `mean` and `std` [3,1,1] on the device.
    """

    model: Any
    per_image: Callable[[Image.Image], Image.Image]
    mean: Tensor
    std: Tensor
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype

    @torch.inference_mode()
    def encode(self, pixels: Tensor) -> Tensor:
        """Return the features [B,D] float32, of unit length, of images [B,3,H,W] uint8, resized and cropped. They stay on the device."""
        if self.device.type == "cuda":
            pixels = pixels.pin_memory()
        pixels = pixels.to(self.device, non_blocking=True).float().div_(255)
        pixels = pixels.sub_(self.mean).div_(self.std).to(self.dtype)  # torchvision's Normalize waits for the device
        features: Tensor = self.model.encode_image(pixels, normalize=True)
        return features.float()

    @torch.inference_mode()
    def classifier(self, classes: list[str], prompts: list[Callable[[str], str]]) -> Classifier:
        """Build open_clip's zero-shot classifier, on the CPU: a class is the mean of its prompts' features, scaled to unit length.

        `prompts` are functions from a class name to a prompt.
        """
        weight = open_clip.build_zero_shot_classifier(self.model, self.tokenizer, classes, prompts, 10, self.device)
        scale = float(self.model.logit_scale.detach().float().exp())
        bias = getattr(self.model, "logit_bias", None)  # SigLIP has one
        return Classifier(weight.float().cpu(), scale, 0.0 if bias is None else float(bias.detach()))

    def log_cut(self, prompts: Mapping[str, Sequence[str]]) -> None:
        """Log how many of the prompts {class: prompts} are longer than the model reads, and the first. open_clip cuts them silently."""
        pairs = [(name, text) for name, texts in prompts.items() for text in texts]
        texts, most = [text for _, text in pairs], self.tokenizer.context_length
        cut = (self.tokenizer(texts) != self.tokenizer(texts, most + 1)[:, :most]).any(1)
        if count := int(cut.sum()):
            name, text = pairs[int(cut.int().argmax())]
            log(
                f"warning: {count} of {len(pairs)} prompts are cut at {most} tokens, the first of {name}: {text[:60]!r} .."
            )

    def sentence_classifier(self, sentences: Mapping[str, Sequence[str]]) -> Classifier:
        """Build a classifier from {class: sentences}: a class is the mean of its sentences' features, scaled to unit length."""
        classes = [self.classifier([name], fillers(texts, "raw")) for name, texts in sentences.items()]
        return classes[0]._replace(weight=torch.cat([each.weight for each in classes], dim=1))


def load(source: Source, device: torch.device, precision: str = "fp32") -> Clip:
    """Load the model in evaluation mode; `precision` is fp32, tf32, bf16 or fp16.

    Raise BadInput if the file is unreadable, holds NaN or infinity, or doesn't fit the architecture.
    """
    whole = source.model.startswith((LOCAL, HUB))
    archive = not whole and is_openai_archive(source.weights)
    # open_clip warns of random weights, but the archive's are loaded below
    logging.disable(logging.WARNING if archive else logging.NOTSET)
    try:
        with hub(source.online), _readable(source.weights, whole or archive) as weights:
            model, _, transform = open_clip.create_model_and_transforms(
                source.model,
                weights,
                precision="fp32" if precision == "tf32" else precision,
                device=device,
                force_quick_gelu=source.quick_gelu,
                pretrained_text=False,
                **source.preprocessing,
            )
            tokenizer = open_clip.get_tokenizer(source.model)
        if archive:
            model.load_state_dict(_openai_tensors(source.weights))
    except BadInput:
        raise
    except Exception as error:  # of any class, by open_clip, torch or transformers for a damaged or foreign file
        foreign = foreign_file(source.weights) if source.weights.is_dir() else ""
        raise BadInput(
            f"--model {source.model} can't be loaded from {source.weights}: {foreign or _reason(error)}"
        ) from error
    finally:
        logging.disable(logging.NOTSET)
    if bad := next((name for name, value in model.state_dict().items() if not value.isfinite().all()), ""):
        raise BadInput(f"--model {source.model}: in {source.weights}, {bad} holds values that are NaN or infinite")
    *steps, _, normalize = transform.transforms  # .., to tensor, normalize
    mean, std = (torch.tensor(v, device=device).view(3, 1, 1) for v in (normalize.mean, normalize.std))
    return Clip(model.eval().requires_grad_(False), Compose(steps), mean, std, tokenizer, device, DTYPES[precision])


@contextmanager
def _readable(path: Path, by_itself: bool) -> Iterator[str | None]:
    """Yield the path of weights that open_clip can read; None for a model that brings its weights `by_itself`.

    Weights in wrappers or under Lightning's names, and files with another format's suffix, become a temporary file.
    Raise BadInput for a file that holds something else, such as transformers' names.
    """
    if by_itself or path.suffix in (".npz", ".npy"):
        yield None if by_itself else str(path)
        return
    content = load_tensors(path, mapped=True)
    state = named_tensors(content, path, "logit_scale")
    names = [str(name) for name in state] if isinstance(state, dict) else []
    if not any("visual." in name for name in names) and (kind := describe(content)):
        raise BadInput(f"{path} is {kind}; weights under open_clip's names are needed: a file or tag of open_clip")
    known = content.get("state_dict", content) if isinstance(content, dict) else content
    plain = names == [str(name).removeprefix("module.") for name in known]  # open_clip removes that itself
    if plain and is_safetensors(path) == (path.suffix == ".safetensors"):
        yield str(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        torch.save(state, Path(folder) / "weights.pt")
        yield str(Path(folder) / "weights.pt")


def _openai_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of OpenAI's archive, which torch's safe reader refuses. TorchScript runs no Python."""
    tensors = torch.jit.load(str(path), map_location="cpu").state_dict()
    return {name: t for name, t in tensors.items() if name not in ("input_resolution", "context_length", "vocab_size")}


def _reason(error: Exception) -> str:
    """Return an exception's message in one line; torch's list of wrong tensors is cut to the first."""
    text = re.sub(r"\s+", " ", str(error) or type(error).__name__)
    if "Error(s) in loading state_dict" in text or isinstance(error, AssertionError):  # open_clip asserts on widths
        return f"the file is of another architecture ({text.split(': ', 1)[-1].strip()[:160]} ..)"
    if "weights_only" in text:
        return first_line(error)
    absent = "its tokenizer or text tower is not on this machine: name it by a tag or hf-hub:NAME once, with a network"
    return absent if "huggingface.co" in text else text[:240]
