"""Image features and zero-shot classifiers of a model, kept in files for the next run. Images are decoded while the model computes."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runtime.cli import BadInput, is_main_process, log, progress_bar
from runtime.device import len_cores
from runtime.distributed import ALONE, Shard
from runtime.files import load_safetensors, save_safetensors
from runtime.record import Record
from zeroshot.dataset import LabelledImages
from zeroshot.prompts import Names, Texts, fill, fillers

if TYPE_CHECKING:
    from zeroshot.model import Classifier, Clip
    from zeroshot.weights import Source

AHEAD = 3  # batches prepared while the model computes


def key_of(*parts: Any) -> str:
    """Return a hash of values that JSON can hold."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def iterate_batches(
    clip: Clip, images: LabelledImages, rows: Sequence[int], batch: int, workers: int
) -> Iterator[tuple[Tensor, int]]:
    """Yield (pixels [batch,3,H,W] uint8, resized and cropped; number of valid images) for the images `rows`, in order.

    The last batch is padded with invalid images. `workers` threads prepare batches ahead of the model.
    """
    from torchvision.transforms.functional import pil_to_tensor

    def pixels(index: int) -> Tensor:
        image: Tensor = pil_to_tensor(clip.per_image(images.open(index)))
        return image

    def stack(futures: Sequence[Future[Tensor]]) -> tuple[Tensor, int]:
        ready = [future.result() for future in futures]
        # the last batch is padded, so that every call has the same shape and kernels round alike
        return torch.stack(ready + ready[-1:] * (batch - len(ready))), len(ready)

    waiting: deque[list[Future[Tensor]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(rows), batch):
            waiting.append([pool.submit(pixels, row) for row in rows[start : start + batch]])
            if len(waiting) > AHEAD:
                yield stack(waiting.popleft())
        while waiting:
            yield stack(waiting.popleft())


def encode_all(clip: Clip, images: LabelledImages, batch: int, workers: int, shard: Shard = ALONE) -> Tensor:
    """Return the features of all images, [N,D] float32 of unit length, on the CPU.

    Several processes share the batches, and each returns all features. Raise BadInput for features that are not finite.
    """
    features: list[Tensor] = []
    batch = min(batch, len(images))
    rows = shard.rows(len(images), batch)
    with progress_bar(len(rows), "encoding") as bar:
        for pixels, valid in iterate_batches(clip, images, rows, batch, workers):
            features.append(clip.encode(pixels)[:valid])
            bar.update(valid)
        own = [(start, part.cpu()) for start, part in zip(rows[::batch], features, strict=True)]
    result = torch.cat([part for _, part in sorted(shard.gather(own), key=lambda pair: pair[0])])
    if not result.isfinite().all():
        raise BadInput(f"features are not finite in {clip.dtype} although the weights are: use --precision fp32")
    return result


@dataclass
class FeatureExtractor:
    """Image features and classifiers of one model. The model is loaded only if they are not in a file."""

    source: Source
    device: torch.device
    precision: str
    record: Record

    @cached_property
    def key(self) -> str:
        """A hash of model and precision, which decide the features of an image."""
        return key_of(self.source.identity, self.precision)

    @cached_property
    def clip(self) -> Clip:
        """The model, loaded at the first use."""
        from zeroshot.model import load

        with self.record.timed("model"):
            return load(self.source, self.device, self.precision)

    def features(
        self, images: LabelledImages, file: Path | None, batch: int, workers: int, shard: Shard = ALONE
    ) -> Tensor:
        """Return the images' features [N,D] float32: from `file` if it holds this model's, else computed and added to it.

        `file` None = not kept. `batch` 0 = 512 images at once on CUDA, else 32. `workers` 0 = one thread per core.
        Raise BadInput for a file with features of other images.
        """
        tensors: dict[str, Tensor] = {}
        metadata = {"pictures": images.fingerprint}  # and the label of each model, by key
        if file and file.exists():
            tensors, metadata = load_safetensors(file)
            if metadata.get("pictures") != images.fingerprint:
                raise BadInput(
                    f"--features {file} holds no features of the pictures in {images.folder}:"
                    " name another file or remove it"
                )
        if self.key in tensors:
            return tensors[self.key]
        if tensors:
            others = ", ".join(metadata[key] for key in tensors)
            log(f"{file} has features of {others}, none of {self.source.label} as set: computed and added")

        clip = self.clip
        batch = batch or shard.largest(len(images), 512 if self.device.type == "cuda" else 32)
        with self.record.timed("images"):
            features = encode_all(clip, images, batch, workers or len_cores(), shard)

        if file and is_main_process():
            save_safetensors(file, tensors | {self.key: features}, metadata | {self.key: self.source.label})
        return features

    def classifier(self, classes: list[str], texts: Texts, names: Names, cache: Path) -> Classifier:
        """Return the classifier from a file in the folder `cache`, else build it and write that file.

        `names` is the form of class names in templates, raw or clean. It does not apply to sentences.
        """
        from zeroshot.model import Classifier

        path = cache / f"classifier_{key_of(self.key, classes, names, texts)[:32]}.safetensors"
        if path.is_file():
            try:
                tensors, _ = load_safetensors(path)
                return Classifier(tensors["classifier"], *tensors["scale_and_bias"].tolist())
            except (BadInput, KeyError):
                pass  # a damaged file is replaced
        clip = self.clip
        with self.record.timed("text"):
            if isinstance(texts, dict):
                clip.log_cut(texts)
                classifier = clip.sentence_classifier(texts)
            else:
                clip.log_cut({name: [fill(template, names, name) for template in texts] for name in classes})
                classifier = clip.classifier(classes, fillers(texts, names))
        numbers = torch.tensor([classifier.scale, classifier.bias], dtype=torch.float64)
        tensors = {"classifier": classifier.weight.contiguous(), "scale_and_bias": numbers}
        try:
            save_safetensors(path, tensors, {"model": self.source.label})
        except OSError as error:  # only slower the next time
            log(f"warning: the classifier is not kept, {error}")
        return classifier
