"""CLIP scores of images, number for number as the course grades them: similarity to the references, fit to the prompt, the ranking.

The course's grader uses transformers' CLIP in fp32. It ignores EXIF rotation and transparency; P3_evaluate.py does the same and logs it.
CLIP: Radford et al. 2021, arXiv 2103.00020.

image score   mean over all references of 100 x cosine of the image features
text score    logits_per_image: the cosine times the model's own logit scale, which is 100 for OpenAI's models
rank          by image + 2.5 x text score
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

from runtime.batches import even_batch, in_batches
from runtime.cli import BadInput, log
from runtime.device import len_cores
from runtime.files import foreign_file, read_json, require_file
from runtime.hub import first_line, hub, hub_answers, quiet_libraries
from runtime.images import read_as_graded, read_image, to_tensor

Resizing = Literal["torchvision", "pillow"]
TEXT_WEIGHT = 2.5
OLD_END = 2  # the wrong eos_token_id that transformers used to write
HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")


@dataclass(frozen=True)
class Scorer:
    """A CLIP in fp32 and its own preprocessing. Features are [N,D] float32 unit vectors on the CPU."""

    model: Any  # CLIPModel, whose types are incomplete
    processor: Any  # CLIPProcessor

    @classmethod
    def load(cls, clip: str, device: torch.device, resizing: Resizing = "torchvision") -> Scorer:
        """Load a CLIP from a transformers folder or by hub name; raise BadInput unless it is complete.

        Only a hub name that isn't in the hub's cache uses a network.
        `resizing` is done with torchvision, as transformers 5 does, or with Pillow, as transformers 4 did.
        """
        from transformers import CLIPImageProcessorPil

        quiet_libraries()
        model, processor = load_folder(clip) if Path(clip).is_dir() else load_from_hub(clip)
        if resizing == "pillow":
            processor.image_processor = CLIPImageProcessorPil(**processor.image_processor.to_dict())
        return cls(model.to(device), processor)

    @property
    def scale(self) -> float:
        """The factor of the cosine in the text score."""
        return float(self.model.logit_scale.exp())

    def encode(self, images: Sequence[Image.Image | Tensor] | Tensor, batch: int = 0) -> Tensor:
        """Return the features [N,D] of images of any sizes, PIL or [3,H,W] uint8. `batch` images at once; 0 = 32 on a CPU, 256 on a GPU."""
        most = batch or (32 if self.model.device.type == "cpu" else 256)
        batches = in_batches(self._encode, list(images), even_batch(len(images), most))
        return torch.cat([features[: len(chunk)] for chunk, features in batches])

    @torch.inference_mode()
    def _encode(self, images: list[Image.Image | Tensor]) -> Tensor:
        pixels = self.processor(images=images, return_tensors="pt").pixel_values.to(self.model.device)
        return normalized(self.model.get_image_features(pixel_values=pixels).pooler_output)

    @torch.inference_mode()
    def encode_text(self, text: str) -> Tensor:
        """Return a text's feature [1,D]. A text that is too long for the model is cut, which is logged."""
        most = self.model.config.text_config.max_position_embeddings
        tokens = self.processor.tokenizer(text, return_tensors="pt", truncation=True, max_length=most)
        if (length := len(self.processor.tokenizer(text).input_ids)) > most:
            log(f"{length} tokens, CLIP reads the first {most - 1} and the end: {text!r}")
        return normalized(self.model.get_text_features(**tokens.to(self.model.device)).pooler_output)

    def image_scores(self, features: Tensor, references: Tensor) -> Tensor:
        """Return image scores [N] from the features of images [N,D] and references [R,D]: the mean over references of 100 x cosine."""
        return 100 * (features @ references.T).mean(1)

    def text_scores(self, features: Tensor, text: str) -> Tensor:
        """Return text scores [N] of image features [N,D] for one text: CLIP's logits_per_image."""
        return (features @ self.encode_text(text).T)[:, 0] * self.scale


def normalized(features: Tensor) -> Tensor:
    """Return the features [N,D] scaled to length 1, on the CPU."""
    unit: Tensor = features / features.norm(dim=-1, keepdim=True)
    return unit.cpu()


def rank(image_scores: Tensor, text_scores: Tensor) -> Tensor:
    """Return [N] int64, the indices of the images by image + 2.5 x text score, best first; equals keep their order."""
    return (image_scores + TEXT_WEIGHT * text_scores).argsort(descending=True, stable=True)


def open_images(paths: Sequence[Path], as_graded: bool = False) -> list[Tensor]:
    """Return the images of files, in order, each [3,H,W] uint8. Raise BadInput for the first file that is no image.

    `as_graded` ignores rotation and transparency as the course's grader does.
    """
    with ThreadPoolExecutor(len_cores()) as pool:
        return [to_tensor(image) for image in pool.map(read_as_graded if as_graded else read_image, paths)]


# ---------------------------------------------------------------- loading


def load_folder(clip: str) -> tuple[Any, Any]:
    """Return (model, processor) from a folder that `save_pretrained` wrote. Raise BadInput for anything else."""
    if (Path(clip) / "open_clip_config.json").is_file():
        raise BadInput(
            f"--clip {clip} is in open_clip's form, transformers' is needed (miniature/train_clip.py convert)"
        )
    config = read_json(require_file(Path(clip) / "config.json", "--clip wants a CLIPModel and its CLIPProcessor"))
    kind = config.get("model_type") if isinstance(config, dict) else None
    if kind != "clip":
        raise BadInput(f"--clip {clip}: config.json describes a model of type {kind!r}, a CLIPModel ('clip') is needed")
    try:
        return read_clip(clip)
    except Exception as error:  # transformers' own message is the clearest
        raise BadInput(f"--clip {clip}: {foreign_file(Path(clip)) or first_line(error)}") from None


def load_from_hub(clip: str) -> tuple[Any, Any]:
    """Return (model, processor) from the hub's cache, else from the hub. Raise BadInput if it is in neither."""
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
    """Return (model, processor) of a folder or hub name, the model in fp32 and frozen.

    Raise ValueError for weights that are missing or not finite, a missing vocabulary, and more tokens than embeddings.
    """
    from transformers import CLIPModel, CLIPProcessor

    model, info = cast(Any, CLIPModel.from_pretrained)(clip, dtype=torch.float32, output_loading_info=True)
    if info["missing_keys"]:
        raise ValueError(f"the weights lack {len(info['missing_keys'])} tensors, such as {min(info['missing_keys'])}")
    if bad := next((name for name, value in model.state_dict().items() if not value.isfinite().all()), ""):
        raise ValueError(f"its weights are damaged: {bad} holds values that are NaN or infinite")
    processor: Any = CLIPProcessor.from_pretrained(clip)
    tokens, embeddings = len(processor.tokenizer), model.config.text_config.vocab_size
    if tokens == len(processor.tokenizer.get_added_vocab()):  # what transformers makes without files
        raise ValueError("tokenizer.json or vocab.json is missing")
    if tokens > embeddings:
        raise ValueError(f"the tokenizer has {tokens} tokens, the model knows {embeddings}")
    pool_at_the_end(model, processor.tokenizer)
    return model.eval().requires_grad_(False), processor


def pool_at_the_end(model: Any, tokenizer: Any) -> None:
    """Correct an old configuration's end token, in place, if added tokens have larger ids than the end token.

    With the old one, transformers takes the text feature at a prompt's largest id, which may be an added token's.
    """
    added = max(tokenizer.get_added_vocab().values(), default=0)
    if model.text_model.eos_token_id == OLD_END and added > tokenizer.eos_token_id:
        model.text_model.eos_token_id = tokenizer.eos_token_id
