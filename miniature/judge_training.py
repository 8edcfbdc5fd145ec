"""How the judge learns: fresh images at every step, made as imperfect as generated ones, with all questions at once."""

from __future__ import annotations

from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.judge_model import NONE, Logits, SceneNetwork, erase
from miniature.judge_truth import IGNORED, Truth, truth_of
from miniature.scenery.render import as_tensor, render_batch
from miniature.scenery.scenes import ANY_PAIR, SIDE
from runtime.images import to_float
from runtime.seeds import derived_seed
from training.draws import Draws


def worsen(x: Tensor, draws: Draws) -> Tensor:
    """Make [N,3,64,64] in -1..1 as imperfect as generated images: bent, softened, of other contrast and tint, noisy."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * draws.uniform()[:, None, None, None]

    x = _bent(x, draws, between(0, 1.3))
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, between(0, 1).square())
    coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where(between(0, 1) < 0.2, torch.lerp(x, coarse, between(0.3, 0.9)), x)
    grey = x.mean(1, keepdim=True)
    x = (grey + between(0.8, 1.15) * (x - grey)) * between(0.85, 1.1) + 0.05 * draws.normal(3, 1, 1)
    x = x + between(0, 0.09) * draws.normal(3, SIDE, SIDE)
    return x.clamp(-1, 1)


def _bent(x: Tensor, draws: Draws, strength: Tensor) -> Tensor:
    """Move every point by about `strength` pixels, neighbours alike."""
    field = F.interpolate(draws.normal(2, 9, 9), size=(SIDE, SIDE), mode="bicubic", align_corners=True)
    axis = (torch.arange(SIDE, device=x.device) + 0.5) * (2 / SIDE) - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    shift = (field * strength * (2 / SIDE)).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid + shift, padding_mode="border", align_corners=False)


def loss_of(network: SceneNetwork, x: Tensor, truth: Truth) -> Tensor:
    """Return the sum of all questions' mean losses; cells with and without an object weigh equally, as the former are few."""
    features = network.features(x)
    whole, cells = network.classify(features)
    boxed = network.classify_boxes(features, truth.boxes.to(x), truth.rows.to(x.device))
    kinds = truth.cells["kind"]
    objects = torch.where(kinds == NONE, IGNORED, kinds)
    empty = torch.where(kinds == NONE, NONE, IGNORED)
    around = _loss(cells, truth.cells | {"kind": objects}) + _loss({"kind": cells["kind"]}, {"kind": empty})
    return _loss(whole, truth.whole) + _loss(boxed, truth.boxed) + around


def _loss(logits: Logits, labels: dict[str, Tensor]) -> Tensor:
    total = torch.zeros((), device=next(iter(logits.values())).device)
    for question, logit in logits.items():
        label = labels[question].to(total.device)
        if (label != IGNORED).any():
            total = total + F.cross_entropy(logit.float(), label, ignore_index=IGNORED)
    return total


def make_batch(seed: int, step: int, count: int, share: float, device: torch.device) -> tuple[Tensor, Truth]:
    """Render fresh images [count,3,64,64] in -1..1, some with an object painted over, and return them with their labels."""
    rendered = render_batch([derived_seed(seed, step, index) for index in range(count)], ANY_PAIR)
    random = Random(derived_seed(seed, step))
    erased = [random.randrange(len(s.things)) if random.random() < share else None for s in rendered.scenes]
    truth = truth_of(rendered.scenes, erased, random)
    x = to_float(as_tensor(rendered.images).to(device))
    return erase(x, truth.erased.to(device), truth.which.to(device)), truth
