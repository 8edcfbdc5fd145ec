"""From noises to images by DDIM: the flags that P2's scripts share, batches, 8-bit images and their comparison."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from diffusion.noise import generators
from diffusion.samplers import Callback, bdia, ddim, ignore
from diffusion.step_rules import Rule, Steps, step_rule
from faces.models import SHIPPED_FACES, Labels, Model, load_model
from faces.noises import SEEDS, Noise
from runtime.batches import even_batch, in_batches
from runtime.cli import BadInput, Seed, progress_bar
from runtime.device import DTYPES, AutoOnOff, Device, Machine, set_up, should_compile
from runtime.distributed import ALONE, Shard
from runtime.images import check_finite
from runtime.seeds import distinct_seeds

ToUint8 = Literal["minmax", "clamp"]
PASS_BELOW = 20.0  # the grader's limit: mean squared error on 0..255


@dataclass(frozen=True)
class SamplingArgs:
    """The flags that P2_ddim.py and P2_report.py share."""

    model: str = str(SHIPPED_FACES)
    """UNet.pt, a P1 checkpoint, or a diffusers folder or hub name with a UNet2DModel. Default: the shipped 64x64 faces."""
    noise: Path | None = None
    """Folder of NN.pt tensors, [C,H,W] or [1,C,H,W]. Each gives one image of the same stem. None = --seeds."""
    seeds: str = SEEDS
    """Without --noise: the seeds of the noises, such as 0-9 or 3,5,8."""
    size: int | None = None
    """Height and width in pixels, of seeds and pictures. None = the model's."""
    steps: int = 50
    """Network calls per image."""
    rule: Rule = "homework"
    """Which timesteps are visited and where the last one leads (see above)."""
    to_uint8: ToUint8 = "minmax"
    """What becomes 0..255: the range of each image (minmax, as in the course) or -1..1 (clamp)."""
    seed: Seed = 0
    """Seed of the noise that eta > 0 adds."""
    digit: int | None = None
    """P1 checkpoints: 0..9, or the place of a class of other images. None = any."""
    domain: str = "any"
    """P1 checkpoints: the style of the digit, mnistm or svhn, or the domain of other images."""
    guidance: float | None = None
    """P1 checkpoints: guidance scale, uncond + scale * (cond - uncond). None = the checkpoint's."""
    batch: int = 0
    """Images at once. 0 = all on a GPU, halved when memory runs out; on a CPU as many pixels as four 256x256 images."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Grading needs fp32."""
    compile: AutoOnOff = "off"
    """torch.compile. It takes a minute and gains nothing in fp32 on a CPU."""
    device: Device = "auto"


@dataclass(frozen=True)
class DdimConfig:
    """Settings of the sampler: the step grid, eta, and the run seed of the noise that eta > 0 adds."""

    steps: Steps
    eta: float
    seed: int


def make_config(model: Model, rule: Rule, steps: int, eta: float, seed: int) -> DdimConfig:
    """Return the sampler's settings for the model's schedule; raise BadInput for an eta or number of steps that it lacks."""
    if not 0 <= eta <= 1:
        raise BadInput(f"--eta {eta}: must lie in 0 .. 1")
    if eta and rule == "bdia":
        raise BadInput(f"--eta {eta}: rule bdia takes no fresh noise, leave it out")
    try:
        return DdimConfig(step_rule(rule, len(model.schedule), steps), eta, seed)
    except ValueError as error:
        raise BadInput(f"--steps: {error}") from None


def open_model(args: SamplingArgs, machine: Machine) -> Model:
    """Load the model of the flags in their precision, compiled where they say so."""
    if args.guidance is not None and not math.isfinite(args.guidance):
        raise BadInput(f"--guidance {args.guidance}: must be a finite number")
    dtype = DTYPES[set_up(args.precision, machine)]
    model = load_model(args.model, machine.device, dtype, Labels(args.digit, args.domain, args.guidance))
    if should_compile(args.compile, machine):
        model.network.compile()
    return model


def sample_all(
    model: Model, noises: Sequence[Noise], config: DdimConfig, batch: int, title: str, shard: Shard = ALONE
) -> Iterator[tuple[Noise, Tensor]]:
    """Yield (noise, image [C,H,W] float32) one by one, as batches of one shape finish."""
    for noise, states in walk_all(model, noises, config, batch, title, shard):
        yield noise, states[0]


def walk_all(
    model: Model, starts: Sequence[Noise], config: DdimConfig, batch: int, title: str, shard: Shard = ALONE
) -> Iterator[tuple[Noise, Tensor]]:
    """Yield (start, last states [1 or 2,C,H,W] float32) of the walk along the grid, one by one, as batches of one shape finish.

    For eta > 0 each noise has its stream of random numbers, seeded by the run's seed and its stem.
    `batch` 0 fits the batch to the machine. Of several processes each samples its share of the batches.
    """
    batch = even_batch(len(starts), batch or shard.largest(len(starts), largest_batch(model, starts[0].x)))
    seeds = distinct_seeds([config.seed, *start.stem.encode()] for start in starts)
    items = [(starts[row], seeds[row]) for row in shard.rows(len(starts), batch)]
    batches = -(-len(items) // batch)
    with progress_bar(batches * len(config.steps.pairs), title, "step") as bar:

        def work(chunk: list[tuple[Noise, int]]) -> Tensor:
            return walk(model, chunk, config, lambda t, x: bar.update() and None)

        for chunk, states in in_batches(work, items, batch):
            yield from zip([start for start, _ in chunk], states, strict=False)  # the last batch is padded


@torch.inference_mode()
def walk(model: Model, starts: Sequence[tuple[Noise, int]], config: DdimConfig, callback: Callback = ignore) -> Tensor:
    """Walk along the grid from one batch of (start, seed of its stream): the last states [B,1,C,H,W] float32 on the CPU.

    Rule bdia gives [B,2,C,H,W]: the last state and the one before it.
    """
    device = next(model.network.parameters()).device

    def to_device(states: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(states)).to(device, memory_format=torch.channels_last)

    x, denoise = to_device([start.x for start, _ in starts]), model.denoiser(len(starts))
    if config.steps.two_states:
        seconds = [start.x_next for start, _ in starts if start.x_next is not None]
        x_next = to_device(seconds) if seconds else None
        return torch.stack(bdia(denoise, x, model.schedule, config.steps, x_next, callback), 1).cpu()
    streams = generators([seed for _, seed in starts])
    return ddim(denoise, x, model.schedule, config.steps, streams, config.eta, callback)[:, None].cpu()


def largest_batch(model: Model, x: Tensor) -> int:
    """Return no limit on a GPU, where in_batches halves a batch too large; on a CPU, which would swap, 4 images of 256x256."""
    on_cpu = next(model.network.parameters()).device.type == "cpu"
    return max(1, 4 * 256**2 // (x.shape[1] * x.shape[2])) if on_cpu else 10**9


def to_image(image: Tensor, to_uint8: ToUint8) -> Tensor:
    """Return [C,H,W] float as uint8: the image's range (minmax) or -1..1 (clamp) to 0..1, then floor(255 u + 0.5). NaN raises BadInput."""
    check_finite(image)
    low, high = (image.min(), image.max()) if to_uint8 == "minmax" else (image.new_tensor(-1.0), image.new_tensor(1.0))
    unit = (image.clamp(low, high) - low) / (high - low).clamp(min=1e-5)
    return (unit * 255 + 0.5).clamp(0, 255).to(torch.uint8)  # as torchvision.save_image, which made the ground truth


def compare(image: Tensor, reference: Tensor) -> dict[str, float | bool]:
    """Return the mean squared error on 0..255, the largest difference, and whether the grader passes; both images uint8."""
    difference = image.double() - reference.double()
    mse = float(difference.square().mean())
    return {"mse": mse, "largest": float(difference.abs().max()), "pass": mse < PASS_BELOW}


def psnr(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error on 0..255: infinite for equal images."""
    return 10 * math.log10(255**2 / mse) if mse else math.inf
