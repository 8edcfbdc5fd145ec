"""Turn noises into images by DDIM: the flags that P2's scripts share, batches, 8-bit images and their comparison."""

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
    """Height and width in pixels of seeded noises and of pictures. None = the model's."""
    steps: int = 50
    """Sampling steps per image."""
    rule: Rule = "homework"
    """Step rule: which timesteps are visited and where the last one leads. P2_ddim.py --help lists the rules."""
    to_uint8: ToUint8 = "minmax"
    """Range that is mapped to 0..255: minmax = from each image's minimum to its maximum, as in the course; clamp = -1..1."""
    seed: Seed = 0
    """Seed of the noise that eta > 0 adds."""
    digit: int | None = None
    """P1 checkpoints: 0..9, or the index of a class of other images. None = no label, without guidance."""
    domain: str = "any"
    """P1 checkpoints: domain of the images, such as mnistm or svhn. any = no label."""
    guidance: float | None = None
    """P1 checkpoints with --digit: guidance scale, uncond + scale * (cond - uncond). None = the checkpoint's."""
    batch: int = 0
    """Images at once. 0 = all on a GPU, halved when memory runs out; on a CPU as many pixels as four 256x256 images."""
    precision: Literal["fp32", "tf32", "bf16", "fp16"] = "fp32"
    """Grading needs fp32."""
    compile: AutoOnOff = "off"
    """torch.compile. It takes a minute and gains nothing in fp32 on a CPU."""
    device: Device = "auto"


@dataclass(frozen=True)
class DdimConfig:
    """Settings of the sampler: the timesteps, eta, and the seed of the noise that eta > 0 adds."""

    steps: Steps
    eta: float
    seed: int


def make_config(model: Model, rule: Rule, steps: int, eta: float, seed: int) -> DdimConfig:
    """Return the sampler's settings for the model's schedule; raise BadInput for an eta or number of steps that the rule does not allow."""
    if not 0 <= eta <= 1:
        raise BadInput(f"--eta {eta}: must lie in 0 .. 1")
    if eta and rule == "bdia":
        raise BadInput(f"--eta {eta}: rule bdia takes no fresh noise, leave it out")
    try:
        return DdimConfig(step_rule(rule, len(model.schedule), steps), eta, seed)
    except ValueError as error:
        raise BadInput(f"--steps: {error}") from None


def open_model(args: SamplingArgs, machine: Machine) -> Model:
    """Load the model that the flags name, with their labels, precision and torch.compile."""
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
    """Sample an image [C,H,W] float32 from each noise and yield (noise, image) one by one, as `walk_all` does."""
    for noise, states in walk_all(model, noises, config, batch, title, shard):
        yield noise, states[0]


def walk_all(
    model: Model, starts: Sequence[Noise], config: DdimConfig, batch: int, title: str, shard: Shard = ALONE
) -> Iterator[tuple[Noise, Tensor]]:
    """Run `walk` in batches of equal size. Yield (start, last state [1,C,H,W] float32) one by one, as batches finish.

    Rule bdia yields the last two states [2,C,H,W], as `walk` does.
    For eta > 0, each start has a stream of random numbers, seeded by config.seed and the start's stem.
    `batch` 0 = as large as fits the machine. With several processes, each yields its share of the starts.
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
    """Take all steps of config.steps, by DDIM or bdia, from one batch of (start, seed); return [B,1,C,H,W] float32 on the CPU.

    The result holds the last states. Rule bdia returns [B,2,C,H,W]: the last state, then the one before it.
    A seed starts the random stream of DDIM with eta above 0; bdia ignores it.
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
    """Return the largest batch of images of x's size [C,H,W]: as many pixels as 4 images of 256x256 on a CPU, which would swap.

    On a GPU there is no limit: `in_batches` halves a batch that is too large.
    """
    on_cpu = next(model.network.parameters()).device.type == "cpu"
    return max(1, 4 * 256**2 // (x.shape[1] * x.shape[2])) if on_cpu else 10**9


def to_image(image: Tensor, to_uint8: ToUint8) -> Tensor:
    """Return [C,H,W] float as uint8: map a range to u in 0..1, then take floor(255 u + 0.5). Raise BadInput for NaN.

    The range is from the image's minimum to its maximum (minmax), or -1..1 (clamp).
    """
    check_finite(image)
    low, high = (image.min(), image.max()) if to_uint8 == "minmax" else (image.new_tensor(-1.0), image.new_tensor(1.0))
    unit = (image.clamp(low, high) - low) / (high - low).clamp(min=1e-5)
    return (unit * 255 + 0.5).clamp(0, 255).to(torch.uint8)  # as torchvision.save_image, which made the ground truth


def compare(image: Tensor, reference: Tensor) -> dict[str, float | bool]:
    """Return "mse" (on 0..255), "largest" (absolute difference) and "pass" (mse below the grader's 20) of two uint8 images."""
    difference = image.double() - reference.double()
    mse = float(difference.square().mean())
    return {"mse": mse, "largest": float(difference.abs().max()), "pass": mse < PASS_BELOW}


def psnr(mse: float) -> float:
    """Return the peak signal-to-noise ratio in dB of a mean squared error on 0..255: infinite for equal images."""
    return 10 * math.log10(255**2 / mse) if mse else math.inf
