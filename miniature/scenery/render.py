"""Scenes -> images: one, a batch, or a whole data set rendered by all cores."""

from __future__ import annotations

import hashlib
import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from miniature.scenery.captions import Caption, caption
from miniature.scenery.scenes import FREE, SIDE, Scene, SceneSpec, sample_scene
from miniature.scenery.styles import render as render
from runtime.cli import progress_bar
from runtime.device import len_cores
from runtime.seeds import derived_seed

CHUNK = 500  # images that a process renders at a time

Images = npt.NDArray[np.uint8]


class RenderedBatch(NamedTuple):
    """Images [N,64,64,3] uint8, their captions and scenes."""

    images: Images
    captions: list[Caption]
    scenes: list[Scene]


def render_batch(seeds: Sequence[int], spec: SceneSpec = FREE) -> RenderedBatch:
    """Draw and render one scene per seed (0 or more); raise ValueError if none fits `spec`."""
    scenes = [sample_scene(seed, spec) for seed in seeds]
    captions = [caption(scene, derived_seed(seed)) for seed, scene in zip(seeds, scenes, strict=True)]
    images = np.empty((len(scenes), SIDE, SIDE, 3), np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = render(scene)
    return RenderedBatch(images, captions, scenes)


def dataset(count: int, seed: int, spec: SceneSpec = FREE, processes: int | None = None) -> RenderedBatch:
    """Render `count` images on all cores, 12 KiB each in memory; image k depends on (seed, k) and `spec` alone."""
    images = np.empty((count, SIDE, SIDE, 3), np.uint8)
    captions: list[Caption] = []
    scenes: list[Scene] = []
    with progress_bar(count, "rendering") as bar:
        for part in stream([derived_seed(seed, index) for index in range(count)], spec, processes):
            images[len(scenes) : len(scenes) + len(part.scenes)] = part.images
            captions += part.captions
            scenes += part.scenes
            bar.update(len(part.scenes))
    return RenderedBatch(images, captions, scenes)


def stream(seeds: Sequence[int], spec: SceneSpec = FREE, processes: int | None = None) -> Iterator[RenderedBatch]:
    """Render one image per seed, in order, and yield batches of at most CHUNK images. `processes`: None = one per core.

    Processes are forked, which is fast. Where CUDA is in use, and off Linux, they are spawned.
    """
    parts = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    workers = min(processes or len_cores(), len(parts))
    if workers < 2:
        yield from (render_batch(part, spec) for part in parts)
        return
    start = "fork" if sys.platform == "linux" and not torch.cuda.is_initialized() else "spawn"
    with multiprocessing.get_context(start).Pool(workers) as pool:
        yield from pool.imap(partial(render_batch, spec=spec), parts)


def world_fingerprint(spec: SceneSpec) -> str:
    """Return a hash of a few images and captions, which changes with the rendering or the wording."""
    batch = render_batch(range(8), spec)
    digest = hashlib.blake2b(batch.images.tobytes(), digest_size=8)
    digest.update("\n".join(caption.text for caption in batch.captions).encode())
    return digest.hexdigest()


def render_scenes(scenes: Sequence[Scene]) -> Tensor:
    """Render [N,3,64,64] uint8, an image per scene."""
    return as_tensor(np.stack([render(scene) for scene in scenes]))


def as_tensor(images: Images) -> Tensor:
    """Return images [N,64,64,3] as a tensor [N,3,64,64] uint8."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
