"""Scenes -> images: one, a batch, or a whole data set rendered by all cores."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from miniature.scenery.captions import Caption, caption
from miniature.scenery.scenes import (
    FREE,
    SIDE,
    Scene,
    SceneSpec,
    sample_scene,
)
from miniature.scenery.styles import paint
from runtime.cli import progress_bar
from runtime.device import len_cores
from runtime.seeds import derived_seed

CHUNK = 500  # pictures that a process renders at a time


Images = npt.NDArray[np.uint8]


class Batch(NamedTuple):
    """Pictures [N,64,64,3] uint8, their captions and scenes."""

    images: Images
    captions: list[Caption]
    scenes: list[Scene]


def render(scene: Scene) -> Images:
    """[64,64,3] uint8: the same scene gives the same picture on every machine, rounding aside (one grey level)."""
    return paint(scene)


def batch(seeds: Sequence[int], wish: SceneSpec = FREE) -> Batch:
    """One picture per seed (0 or more), with what `wish` fixes; raises ValueError where that can't be had."""
    scenes = [sample_scene(seed, wish) for seed in seeds]
    captions = [caption(scene, derived_seed(seed)) for seed, scene in zip(seeds, scenes, strict=True)]
    images = np.empty((len(scenes), SIDE, SIDE, 3), np.uint8)
    for image, scene in zip(images, scenes, strict=True):
        image[:] = render(scene)
    return Batch(images, captions, scenes)


def dataset(
    count: int, seed: int, wish: SceneSpec = FREE, file: Path | None = None, processes: int | None = None
) -> Batch:
    """`count` pictures, rendered by all cores: picture k depends on (seed, k) alone. 12 KiB each: in memory, or as a .npy
    `file` that the returned array maps."""
    shape = (count, SIDE, SIDE, 3)
    images = np.lib.format.open_memmap(file, "w+", np.uint8, shape) if file else np.empty(shape, np.uint8)
    captions: list[Caption] = []
    scenes: list[Scene] = []
    seeds = [derived_seed(seed, index) for index in range(count)]
    with progress_bar(count, "rendering") as bar:
        for done in stream(seeds, wish, processes):
            images[len(scenes) : len(scenes) + len(done.scenes)] = done.images
            captions += done.captions
            scenes += done.scenes
            bar.update(len(done.scenes))
    return Batch(images, captions, scenes)


def stream(seeds: Sequence[int], wish: SceneSpec = FREE, processes: int | None = None) -> Iterator[Batch]:
    """One picture per seed, in order, at most CHUNK at a time, rendered by all cores. Forked processes start at once; where CUDA is in
    use, and off Linux, they have to be fresh ones."""
    parts = [seeds[start : start + CHUNK] for start in range(0, len(seeds), CHUNK)]
    workers = min(processes or len_cores(), len(parts))
    if workers < 2:
        yield from (batch(part, wish) for part in parts)
        return
    start = "fork" if sys.platform == "linux" and not torch.cuda.is_initialized() else "spawn"
    with multiprocessing.get_context(start).Pool(workers) as pool:
        yield from pool.imap(partial(batch, wish=wish), parts)


def as_tensor(images: Images) -> Tensor:
    """[N,64,64,3] -> [N,3,64,64] uint8, as networks and figures want it."""
    return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
