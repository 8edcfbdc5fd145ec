"""Print the table of docs/gpu.md: computed time and memory of each main command on common GPUs, and what was measured on an H100.

  python benchmarks/cards.py

seconds = max(FLOPs / peak, bytes / bandwidth) / efficiency
memory = weights, gradients and optimizer state + the most bytes alive in one call, without the libraries' work space

FLOPs are counted by torch.utils.flop_counter on the real networks, whose tensors hold no values. Bytes are what each operation reads and
writes. Peak and bandwidth are the card's published ones. The efficiency is max(..) for the H100, divided by the seconds in the command's
row of docs/results.md. Drawing by Stable Diffusion takes that of textual inversion. Without a row it is 1: the minutes are a lower bound.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import repository_root  # noqa: F401  # isort: split
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from concepts.single_file import make_parts
from digits.recipes import RECIPES
from faces.course_unet import CONFIG
from P1_model import PRESETS, UNet
from runtime.cli import run_script

META = torch.device("meta")
FITS = 0.9  # of a card's memory; the rest is CUDA's own and fragments


@dataclass(frozen=True)
class Card:
    """A GPU and its published figures: dense tensor cores in half precision with sums in fp32, and fp32 without TF32."""

    name: str
    memory: float  # GB
    half: float  # TFLOP/s
    fp32: float  # TFLOP/s
    bandwidth: float  # GB/s
    bf16: bool = True


CARDS = (
    Card("T4", 16, 65, 8.1, 320, bf16=False),
    Card("2080 Ti", 11, 53.8, 13.4, 616, bf16=False),
    Card("3060", 12, 25.5, 12.7, 360),
    Card("4090", 24, 165, 82.6, 1008),
    Card("A100", 40, 312, 19.5, 1555),
    Card("H100", 80, 989, 67, 3350),
)


@dataclass(frozen=True)
class Work:
    """What a call takes: FLOPs, bytes read and written, and as `memory` the most bytes alive apart from its inputs and weights."""

    flops: float
    traffic: float
    memory: float

    def times(self, calls: float) -> Work:
        """Return the work of so many calls in a row; the memory is that of one."""
        return Work(calls * self.flops, calls * self.traffic, self.memory)

    def __add__(self, other: Work) -> Work:
        """Return the work of one call after the other: FLOPs and traffic are sums, memory is the larger of the two."""
        return Work(self.flops + other.flops, self.traffic + other.traffic, max(self.memory, other.memory))


@dataclass(frozen=True)
class Command:
    """A main command: its work in batches of `batch` images, and what was measured of it on the H100."""

    line: str
    work: Work
    batch: int
    fixed: float  # bytes of weights, gradients and optimizer state
    half: bool  # precision
    measured: str = "-"
    seconds: float | None = None  # of the whole command, as measured
    like: Command | None = None  # the command whose efficiency is taken

    def limit(self, card: Card) -> float:
        """Return the seconds of the command at efficiency 1: the larger of computing time and memory time."""
        peak = card.half if self.half else card.fp32
        return max(self.work.flops / (peak * 1e12), self.work.traffic / (card.bandwidth * 1e9))

    def efficiency(self) -> float | None:
        """Return the limit on the H100 divided by the measured seconds; None = there is no measurement."""
        source = self.like or self
        return source.limit(CARDS[-1]) / source.seconds if source.seconds else None

    def memory(self, batch: int) -> float:
        """Return the GB of the command with batches of this size."""
        return (self.fixed + self.work.memory * batch / self.batch) / 1e9

    def fitting_batch(self, card: Card) -> int:
        """Return the command's batch, halved until it fits into 0.9 of the card's memory or is 1."""
        batch = self.batch
        while batch > 1 and self.memory(batch) > FITS * card.memory:
            batch //= 2
        return batch


# ---------------------------------------------------------------- counting


class Traffic(TorchDispatchMode):
    """Counter of the bytes that operations read and write, and of the most bytes of their results that are alive at once."""

    bytes: int = 0
    alive: int = 0
    peak: int = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the operation and count it; a view moves nothing."""
        out = func(*args, **(kwargs or {}))
        if func.is_view or func is torch.ops.aten._unsafe_view.default:
            return out
        results = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        self.bytes += sum(tensor.nbytes for tensor in (*inputs, *results))
        own = {tensor.untyped_storage()._cdata for tensor in inputs}  # of operations in place
        for tensor in results:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out

    def _free(self, size: int) -> None:
        self.alive -= size


class FusedAttention(TorchFunctionMode):
    """Context in which scaled_dot_product_attention is flash attention, which stores no attention matrix; masks are ignored."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Replace scaled_dot_product_attention."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            q, k, v = (*args, *(kwargs[name] for name in ("query", "key", "value") if name in kwargs))[:3]
            return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]
        return func(*args, **kwargs)


def count(call: Callable[[], Tensor], backward: bool = False) -> Work:
    """Return the work of a call on tensors of the device meta, with `backward` that of its gradients too."""
    traffic: Traffic = cast(Any, Traffic)()  # an untyped constructor
    with (
        FlopCounterMode(display=False) as flops,
        traffic,
        FusedAttention(),
        torch.set_grad_enabled(backward),
    ):
        out = call()
        if backward:
            out.float().square().mean().backward()
    return Work(flops.get_total_flops(), traffic.bytes, traffic.peak)


def empty(*shape: int, dtype: torch.dtype = torch.float16) -> Tensor:
    """Return a tensor of the device meta, which has no values."""
    return torch.empty(shape, dtype=dtype, device=META)


def parameters(*networks: nn.Module) -> int:
    """Return the number of parameters."""
    return sum(parameter.numel() for network in networks for parameter in network.parameters())


# ---------------------------------------------------------------- the commands


def commands() -> list[Command]:
    """Return the main commands with their defaults on a GPU. Textual inversion has the settings of its measurement."""
    large = RECIPES["large"]
    return [
        training("gpu", "`P1_training.py`", "103 s", 103),
        training("large", "`P1_training.py --preset large`", "7,171 images/s", large.steps * large.batch / 7171),
        *digits_and_faces(),
        *stable_diffusion(),
    ]


def training(preset: str, line: str, measured: str, seconds: float) -> Command:
    """Return the table's line `line` for P1's training by a preset. `seconds` were measured on the H100, quoted as `measured`.

    Memory: AdamW keeps two values per weight, the EMA one.
    """
    recipe = RECIPES[preset]
    with META:
        unet = UNet(PRESETS[preset])
    label, x = empty(recipe.batch, dtype=torch.long), empty(recipe.batch, 3, 28, 28, dtype=torch.float32)
    step = count(lambda: unet(x, label, label, label), backward=True)
    step = Work(step.flops, step.traffic / 2, step.memory / 2)  # autocast: half the bytes
    return Command(
        line,
        step.times(recipe.steps),
        recipe.batch,
        fixed=parameters(unet) * 4 * (2 + 2 + 1),
        half=True,
        measured=measured,
        seconds=seconds,
    )


def digits_and_faces() -> list[Command]:
    """Return the sampling of 1,000 digits and of ten faces. The digits are those of a network that is not distilled: two calls a step."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    sampler, digits, faces = RECIPES["cpu"].sampler, 1000, 10
    with META:
        digit_unet, face_unet = UNet(PRESETS["cpu"]), UNet2DModel(**CONFIG)
    label = empty(2 * digits, dtype=torch.long)
    digit_step = count(lambda: digit_unet(empty(2 * digits, 3, 28, 28, dtype=torch.float32), label, label, label))
    x, t = empty(faces, 3, 256, 256, dtype=torch.float32), empty(faces, dtype=torch.long)
    face_step = count(lambda: face_unet(x, t).sample)
    fixed = [4 * parameters(unet) for unet in (digit_unet, face_unet)]
    return [
        Command(
            "`hw2_1.sh`", digit_step.times(sampler.steps), digits, fixed[0], False, measured="0.55 s", seconds=0.55
        ),
        Command("`hw2_2.sh`, ten 256x256 noises", face_step.times(50), faces, fixed[1], False),
    ]


def stable_diffusion() -> list[Command]:
    """Return 3,000 steps of textual inversion at batch 4, and the 25 images of a prompt, each decoded alone."""
    parts = {name: part.half().requires_grad_(False) for name, part in make_parts().items()}
    unet, vae = parts["unet"], cast(Any, parts["vae"])

    def predict(batch: int, learned: bool) -> Tensor:
        text = empty(batch, 77, 768).requires_grad_(learned)
        output: Tensor = unet(
            empty(batch, 4, 64, 64), empty(batch, dtype=torch.long), encoder_hidden_states=text
        ).sample
        return output

    steps, batch, images = 3000, 4, 25
    inversion = Command(
        f"`P3_textual_inversion.py --steps {steps} --batch {batch}`",
        count(lambda: predict(batch, True), backward=True).times(steps),
        batch,
        fixed=2 * parameters(unet, parts["text_encoder"]),
        half=True,
        measured="12.1 steps/s, 5.35 GB",
        seconds=steps / 12.1,
    )
    decoding = count(lambda: vae.decode(empty(1, 4, 64, 64)).sample).times(images)
    drawing = count(lambda: predict(2 * images, False)).times(25) + decoding
    fixed = 2 * parameters(*parts.values())
    return [inversion, Command("`hw2_3.sh`, a prompt's 25 images", drawing, images, fixed, True, like=inversion)]


# ---------------------------------------------------------------- the table


def one_digit(value: float) -> str:
    """Return a number rounded to one significant digit, without an exponent."""
    return f"{float(f'{value:.0e}'):f}".rstrip("0").rstrip(".")


def table(entries: Sequence[Command]) -> str:
    """Return the table of docs/gpu.md: a row per command and card."""
    lines = [
        "| command | card | precision | batch | GB, computed | minutes, computed | measured |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for entry in entries:
        efficiency = entry.efficiency()
        for card in CARDS:
            batch = entry.fitting_batch(card)
            minutes = one_digit(entry.limit(card) / (efficiency or 1) / 60)
            cells = [
                entry.line if card is CARDS[0] else "",
                card.name,
                ("bf16" if card.bf16 else "fp16") if entry.half else "fp32",
                str(batch),
                one_digit(entry.memory(batch)),
                minutes if efficiency else f"at least {minutes}",
                entry.measured if card is CARDS[-1] else "-",
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


@dataclass(frozen=True)
class Settings:
    """No settings."""


def main(settings: Settings) -> None:
    """Print the table."""
    print(table(commands()))


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
