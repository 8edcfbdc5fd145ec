"""Image features and zero-shot classifiers: computed in a pipeline sized to the machine, and kept for the next run."""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

from runtime.cli import BadInput, is_main_process, log, progress_bar
from runtime.device import Machine, len_cores
from runtime.distributed import ALONE, Shard
from runtime.files import load_safetensors, save_safetensors
from runtime.record import Record
from zeroshot.dataset import LabelledImages
from zeroshot.model import Clip, load
from zeroshot.prompts import fillers
from zeroshot.settings import Settings, ZeroShotConfig
from zeroshot.weights import Source

AHEAD = 3  # batches prepared while the model computes


def key_of(*parts: Any) -> str:
    """A hash of anything that json can write."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def prepared(
    clip: Clip, pictures: LabelledImages, rows: Sequence[int], batch: int, workers: int
) -> Iterator[tuple[Tensor, int]]:
    """([B,3,H,W] uint8 resized and cropped, how many count) of these pictures, a few batches ahead of the model, in order."""

    def pixels(index: int) -> Tensor:
        return pil_to_tensor(clip.per_picture(pictures.open(index)))

    waiting: deque[list[Future[Tensor]]] = deque()
    with ThreadPoolExecutor(workers) as pool:
        for start in range(0, len(rows), batch):
            waiting.append([pool.submit(pixels, row) for row in rows[start : start + batch]])
            if len(waiting) > AHEAD:
                yield _stacked(waiting.popleft(), batch)
        while waiting:
            yield _stacked(waiting.popleft(), batch)


def _stacked(futures: Sequence[Future[Tensor]], batch: int) -> tuple[Tensor, int]:
    """The last batch is padded, so that every call has the same shape and kernels round alike."""
    ready = [future.result() for future in futures]
    return torch.stack(ready + ready[-1:] * (batch - len(ready))), len(ready)


def encode_all(clip: Clip, pictures: LabelledImages, batch: int, workers: int, shard: Shard = ALONE) -> Tensor:
    """[N,D] float32 of length 1, on the CPU; nothing waits for the device before the end. Several processes share the batches, and each
    gets all features. Raises BadInput for overflow."""
    found = []
    batch = min(batch, len(pictures))
    rows = shard.rows(len(pictures), batch)
    with progress_bar(len(rows), "encoding") as bar:
        for pixels, valid in prepared(clip, pictures, rows, batch, workers):
            found.append(clip.encode(pixels)[:valid])
            bar.update(valid)
        own = [(start, part.cpu()) for start, part in zip(rows[::batch], found, strict=True)]
    features = torch.cat([part for _, part in sorted(shard.gather(own), key=lambda pair: pair[0])])
    if not features.isfinite().all():
        raise BadInput(f"features are not finite in {clip.dtype}: use --precision bf16 or fp32")
    return features


class FeatureFile:
    """Image features of one set of pictures, by model, in memory and (with a path) in a safetensors file."""

    def __init__(self, path: Path | None, pictures: LabelledImages):
        self.path, self.pictures = path, pictures
        self.tensors: dict[str, Tensor] = {}
        self.labels: dict[str, str] = {}
        if path and path.exists():
            self.tensors, metadata = load_safetensors(path)
            self.labels = {key: label for key, label in metadata.items() if key in self.tensors}
            if metadata.get("pictures") != pictures.fingerprint:
                folder = pictures.paths[0].parent
                raise BadInput(
                    f"--embeddings {path} holds no features of the pictures in {folder}: name another file or remove it"
                )

    def get(self, key: str, label: str) -> Tensor | None:
        """The features of a model, if they are there."""
        if key not in self.tensors and self.labels and self.path:
            log(
                f"{self.path} has features of {', '.join(self.labels.values())}, none of {label} as set: computed and added"
            )
        return self.tensors.get(key)

    def add(self, key: str, label: str, features: Tensor) -> None:
        """Keeps them; the file is replaced as a whole."""
        self.tensors[key], self.labels[key] = features, label
        if self.path and is_main_process():
            save_safetensors(self.path, self.tensors, {"pictures": self.pictures.fingerprint, **self.labels})


@dataclass
class FeatureExtractor:
    """Everything that several settings share: pictures, features, and the model in use, which is loaded only if needed."""

    settings: Settings
    machine: Machine
    precision: str
    pictures: LabelledImages
    store: FeatureFile
    shard: Shard = ALONE
    loaded: tuple[str, Clip] | None = None

    @property
    def digests(self) -> Path:
        """Where the hashes of weight files are remembered."""
        return self.settings.cache / "digests.json"

    def model_key(self, source: Source) -> str:
        """What features depend on beside the pictures."""
        return key_of(source.identity(self.digests), self.precision)

    def clip(self, source: Source, record: Record) -> Clip:
        """The loaded model; the one before is let go."""
        key = self.model_key(source)
        if not self.loaded or self.loaded[0] != key:
            self.loaded = None
            with record.timed("model"):
                self.loaded = (key, load(source, self.machine.device, self.precision))
        return self.loaded[1]

    def features(self, source: Source, record: Record) -> Tensor:
        """[N,D] float32: from the store, or computed."""
        key = self.model_key(source)
        known = self.store.get(key, source.label)
        if known is not None:
            return known
        workers = self.settings.workers or len_cores()
        with record.timed("decoding"):
            self.pictures.decode(workers)
        clip = self.clip(source, record)
        most = 512 if self.machine.device.type == "cuda" else 32
        batch = self.settings.batch or self.shard.largest(len(self.pictures), most)
        with record.timed("images"):
            features = encode_all(clip, self.pictures, batch, workers, self.shard)
        self.store.add(key, source.label, features)
        return features

    def classifier(
        self, source: Source, choice: ZeroShotConfig, templates: Sequence[str], record: Record
    ) -> tuple[Tensor, float, float]:
        """([D,C] float32, scale, bias) from the cache, or built."""
        key = key_of(self.model_key(source), self.pictures.names, choice.names, templates)
        path = self.settings.cache / f"classifier_{key[:32]}.safetensors"
        if path.is_file():
            try:
                tensors, _ = load_safetensors(path)
                return tensors["classifier"], *tensors["scale_and_bias"].tolist()
            except (BadInput, KeyError):
                pass  # a damaged cache is made anew
        clip = self.clip(source, record)
        with record.timed("text"):
            classifier = clip.classifier(self.pictures.names, fillers(templates, choice.names))
        numbers = torch.tensor([clip.scale, clip.bias], dtype=torch.float64)
        save_safetensors(
            path, {"classifier": classifier.contiguous(), "scale_and_bias": numbers}, {"model": source.label}
        )
        return classifier, clip.scale, clip.bias


def logits_of(features: Tensor, classifier: Tensor, scale: float, bias: float) -> Tensor:
    """[N,D] and [D,C] of length 1 -> [N,C]: scaled cosines, as open_clip's models return them."""
    return scale * (features @ classifier) + bias
