"""CLIP scores of pictures, number for number as the course grades them: likeness to the references, fit to the prompt, and the ranking.

The grader decodes plainly (no rotation by EXIF) and calls transformers' CLIP in fp32. Image score: the mean over all references of
100 x cosine of the image features. Text score: logits_per_image, the cosine times the model's own logit scale, which is 100 for
OpenAI's models. Pictures rank by image + 2.5 x text. CLIP: Radford et al. 2021, arXiv 2103.00020.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from runtime.batches import even_batch, in_batches
from runtime.cli import BadInput, log
from runtime.device import len_cores
from runtime.files import read_json, require_file
from runtime.hub import first_line, hub, hub_answers, quiet_libraries
from runtime.images import open_image

Resizing = Literal["torchvision", "pillow"]
TEXT_WEIGHT = 2.5
OLD_END = 2  # the eos_token_id of configurations written before transformers knew the right one
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Scorer:
    """A CLIP in fp32 and its own preprocessing. Features are [N,D] float32 unit vectors on the CPU."""

    model: Any  # CLIPModel; transformers' types get in the way
    processor: Any  # CLIPProcessor

    @classmethod
    def load(cls, clip: str, device: torch.device, resizing: Resizing = "torchvision") -> Scorer:
        """From a transformers folder or a hub name; raises BadInput for what isn't a whole CLIP. Only a hub name that isn't in the hub's
        cache uses a network. `resizing`: with torchvision as transformers 5 does, or with Pillow as transformers 4 did."""
        quiet_libraries()
        model, processor = load_folder(clip) if Path(clip).is_dir() else load_from_hub(clip)
        if resizing == "pillow":
            processor.image_processor = CLIPImageProcessorPil(**processor.image_processor.to_dict())
        return cls(model.to(device), processor)

    @property
    def scale(self) -> float:
        """What a cosine is multiplied with for the text score."""
        return float(self.model.logit_scale.exp())

    def encode(self, pictures: Sequence[Image.Image | Tensor] | Tensor, batch: int = 0) -> Tensor:
        """Features of pictures, PIL or [3,H,W] uint8, of any sizes; `batch` at once, 0: 32 on a CPU, 256 on a GPU."""
        most = batch or (32 if self.model.device.type == "cpu" else 256)
        done = in_batches(self._encode, list(pictures), even_batch(len(pictures), most))
        return torch.cat([features[: len(chunk)] for chunk, features in done])

    @torch.inference_mode()
    def _encode(self, pictures: list[Image.Image | Tensor]) -> Tensor:
        pixels = self.processor(images=pictures, return_tensors="pt").pixel_values.to(self.model.device)
        return unit(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.inference_mode()
    def encode_text(self, text: str) -> Tensor:
        """[1,D]; what is over the model's length is cut off, which is told."""
        most = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(text, return_tensors="pt", truncation=True, max_length=most)
        if (length := len(self.processor.tokenizer(text).input_ids)) > most:
            log(f"{length} tokens, CLIP reads the first {most - 1} and the end: {text!r}")
        return unit(self.model.get_text_features(**tokens.to(self.model.device)).pooler_output)

    def image_scores(self, features: Tensor, references: Tensor) -> Tensor:
        """[N] from features [N,D] and [R,D]: the mean over the references of 100 x cosine."""
        return 100 * (features @ references.T).mean(1)

    def text_scores(self, features: Tensor, text: str) -> Tensor:
        """[N] from features [N,D]: CLIP's logits_per_image."""
        return (features @ self.encode_text(text).T)[:, 0] * self.scale


def unit(features: Tensor) -> Tensor:
    """[N,D] of length 1, on the CPU."""
    return (features / features.norm(dim=-1, keepdim=True)).cpu()


def rank(image_scores: Tensor, text_scores: Tensor) -> Tensor:
    """[N] int64, the indices of the pictures by image + 2.5 x text, best first; equals stay in their order."""
    return (image_scores + TEXT_WEIGHT * text_scores).argsort(descending=True, stable=True)


def open_pictures(paths: Sequence[Path]) -> list[Tensor]:
    """[3,H,W] uint8 each, in order, read in parallel; raises BadInput for the first that isn't a picture."""
    with ThreadPoolExecutor(len_cores()) as pool:
        return list(pool.map(open_image, paths))


# ---------------------------------------------------------------- loading


def load_folder(clip: str) -> tuple[Any, Any]:
    """Model and processor from what `save_pretrained` wrote; raises BadInput for anything else."""
    if (Path(clip) / "open_clip_config.json").is_file():
        raise BadInput(
            f"--clip {clip} is in open_clip's form, transformers' is needed (miniature/train_clip.py convert)"
        )
    config = read_json(require_file(Path(clip) / "config.json", "--clip wants a CLIPModel and its CLIPProcessor"))
    found = config.get("model_type") if isinstance(config, dict) else None
    if found != "clip":
        raise BadInput(
            f"--clip {clip}: config.json describes a model of type {found!r}, a CLIPModel ('clip') is needed"
        )
    try:
        return read_clip(clip)
    except Exception as error:  # whatever is wrong with the files, transformers' own words are the best there are
        raise BadInput(f"--clip {clip}: {first_line(error)}") from None


def load_from_hub(clip: str) -> tuple[Any, Any]:
    """From the hub's cache on this machine, else from the hub; raises BadInput where it is in neither."""
    if not HUB_NAME.fullmatch(clip):
        raise BadInput(f"--clip {clip} is not a folder")
    try:
        with hub(online=False):
            return read_clip(clip)
    except Exception:  # not in the cache, or not whole there
        if not hub_answers():
            raise BadInput(
                f"--clip {clip}: no such folder, it is not whole on this machine and the hub doesn't answer; name a"
                " folder of a CLIPModel and its CLIPProcessor: --clip FOLDER"
            ) from None
    try:
        return read_clip(clip)
    except Exception as error:  # the hub's client raises errors of a dozen unrelated classes
        raise BadInput(f"--clip {clip}: no such folder, and the hub did not give it ({first_line(error)})") from None


def read_clip(clip: str) -> tuple[Any, Any]:
    """In fp32, without gradients; raises ValueError where weights or words are missing or the tokenizer has more tokens than the model."""
    model, info = cast(Any, CLIPModel.from_pretrained)(clip, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"the weights lack {len(info['missing_keys'])} tensors, such as {min(info['missing_keys'])}")
    processor: Any = CLIPProcessor.from_pretrained(clip)
    words, known = len(processor.tokenizer), model.config.text_config.vocab_size
    if words == len(processor.tokenizer.get_added_vocab()):  # what transformers makes where there are no files
        raise ValueError("tokenizer.json or vocab.json is missing")
    if words > known:
        raise ValueError(f"the tokenizer has {words} tokens, the model knows {known}")
    pool_at_the_end(model, processor.tokenizer)
    return model.eval().requires_grad_(False), processor


def pool_at_the_end(model: Any, tokenizer: Any) -> None:
    """A model of an old configuration takes the largest id of a prompt for its end, which tokens added later would break."""
    added = max(tokenizer.get_added_vocab().values(), default=0)
    if model.text_model.eos_token_id == OLD_END and added > tokenizer.eos_token_id:
        model.text_model.eos_token_id = tokenizer.eos_token_id
