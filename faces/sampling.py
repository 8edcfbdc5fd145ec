"""From noises to images by DDIM: the flags that P2's scripts share, batches, and the comparison with references."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion.noise import generators
from diffusion.samplers import ddim
from diffusion.steps import Rule, Steps, step_rule
from faces.models import SHIPPED_FACES, Labels, Model, load_model
from faces.noises import Noise as Noise
from faces.noises import parse_seeds, read_noises
from faces.noises import seeded_noises as seeded_noises
from runtime.batches import even_batch, in_batches
from runtime.cli import BadInput, progress_bar
from runtime.device import AutoOnOff, Device, Machine, set_up, should_compile
from runtime.distributed import ALONE, Shard
from runtime.seeds import derived_seed

ToUint8 = Literal["minmax", "clamp"]


PASS_BELOW = 20.0  # the grader's bar: mean squared error on 0..255


@dataclass(frozen=True)
class DdimConfig:
    """How every picture of a run is drawn."""

    steps: Steps
    eta: float
    seed: int


@dataclass(frozen=True)
class SamplingArgs:
    """The flags that P2_ddim.py and P2_report.py share."""

    model: str = str(SHIPPED_FACES)
    """The course's UNet.pt, a diffusers folder (the shipped faces of 64x64) or hub name with a UNet2DModel, or a P1 checkpoint."""
    noise: Path | None = None
    """Folder of NN.pt tensors, [C,H,W] or [1,C,H,W]; one picture per file, of the same stem."""
    seeds: str = "0-9"
    """Without --noise: the noises of these seeds, such as 0-9 or 3,5,8."""
    size: int | None = None
    """Height and width with --seeds; None: the model's own."""
    steps: int = 50
    rule: Rule = "homework"
    """Which timesteps are visited and how the last one ends (see above)."""
    to_uint8: ToUint8 = "minmax"
    """How a picture gets to 0..255: by its own least and largest value (the course), or from -1..1."""
    seed: int = 0
    """Of the noise that eta > 0 adds."""
    digit: int | None = None
    """P1 checkpoints: 0..9; None: any."""
    domain: Literal["mnistm", "svhn", "any"] = "any"
    """P1 checkpoints."""
    guidance: float | None = None
    """P1 checkpoints: uncond + scale * (cond - uncond); None: the checkpoint's own."""
    batch: int = 0
    """Pictures at once; 0: all on a GPU, halved when memory runs out; four of 256x256, or as many pixels, on a CPU."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """fp32 is what grading needs."""
    compile: AutoOnOff = "off"
    """torch.compile; a minute at the start, and in fp32 on a CPU no gain at all (measured)."""
    device: Device = "auto"


@torch.inference_mode()
def sample(
    noises: Sequence[Noise], model: Model, recipe: DdimConfig, callback: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """One batch: [B,C,H,W] float32 on the CPU, not yet scaled to a picture."""
    device = next(model.network.parameters()).device
    x = torch.stack([noise.x for noise in noises]).to(device, memory_format=torch.channels_last)
    streams = generators([derived_seed(recipe.seed, *noise.stem.encode()) for noise in noises])
    seen: dict[str, Any] = {"callback": callback} if callback else {}
    return ddim(model.denoiser(len(noises)), x, model.schedule, recipe.steps, streams, recipe.eta, **seen).cpu()


def sample_all(
    model: Model, noises: Sequence[Noise], recipe: DdimConfig, batch: int, title: str, shard: Shard = ALONE
) -> Iterator[tuple[Noise, Tensor]]:
    """(noise, [C,H,W] float32) one by one, as batches of one shape finish; 0 sizes them to the machine. Of several processes each gets
    its share of the batches."""
    batch = even_batch(len(noises), batch or shard.largest(len(noises), largest_batch(model, noises[0].x)))
    noises = [noises[row] for row in shard.rows(len(noises), batch)]
    total = -(-len(noises) // batch) * len(recipe.steps.pairs)
    with progress_bar(total, title, "step") as bar:
        work = partial(sample, model=model, recipe=recipe, callback=lambda t, x: bar.update() and None)
        for chunk, images in in_batches(work, noises, batch):
            yield from zip(chunk, images, strict=False)  # the padding has no partner


def largest_batch(model: Model, x: Tensor) -> int:
    """All at once on a GPU, where a batch too large is halved; on a CPU, which would swap, four pictures of 256x256."""
    on_cpu = next(model.network.parameters()).device.type == "cpu"
    return max(1, 4 * 256**2 // (x.shape[1] * x.shape[2])) if on_cpu else 10**9


def to_image(image: Tensor, rescale: ToUint8) -> Tensor:
    """[C,H,W] float -> uint8: to 0..1 by the picture's own least and largest value, or from -1..1; x 255 + 0.5, floor."""
    low, high = (image.min(), image.max()) if rescale == "minmax" else (image.new_tensor(-1.0), image.new_tensor(1.0))
    unit = (image.clamp(low, high) - low) / (high - low).clamp(min=1e-5)
    return (unit * 255 + 0.5).clamp(0, 255).to(torch.uint8)


def compare(image: Tensor, reference: Tensor) -> dict[str, float | bool]:
    """Mean squared error on 0..255, largest pixel difference, and whether the grader passes it; both uint8."""
    difference = image.double() - reference.double()
    mse = float(difference.square().mean())
    return {"mse": mse, "largest": float(difference.abs().max()), "pass": mse < PASS_BELOW}


def resolve_recipe(drawing: SamplingArgs, model: Model, eta: float) -> DdimConfig:
    """Steps, eta and seed; raises BadInput for those that make no sense."""
    if not 0 <= eta <= 1:
        raise BadInput(f"--eta {eta}: must lie in 0 .. 1")
    if drawing.batch < 0:
        raise BadInput(f"--batch {drawing.batch}: must be above zero, or 0 for automatic")
    try:
        return DdimConfig(step_rule(drawing.rule, len(model.schedule), drawing.steps), eta, drawing.seed)
    except ValueError as error:
        raise BadInput(f"--steps: {error}") from None


def open_model(drawing: SamplingArgs, machine: Machine) -> Model:
    """The model that the flags name, in their precision."""
    precision = set_up(drawing.precision, machine)
    labels = Labels(drawing.digit, drawing.domain, drawing.guidance)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = load_model(drawing.model, machine.device, dtype, labels)
    if should_compile(drawing.compile, machine):
        model.network.compile()
    return model


def open_noises(drawing: SamplingArgs, model: Model) -> list[Noise]:
    """Those of --noise, else those of --seeds."""
    if drawing.noise:
        return read_noises(drawing.noise, model)
    return seeded_noises(parse_seeds(drawing.seeds), model, drawing.size)
