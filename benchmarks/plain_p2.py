"""The course's face network and its DDIM rule, written from their description, without code of this repository.

Baseline of benchmarks/p2_ddim.py (one image at a time, eager) and independent reference of the tests (in float64).
Tensor names are those of UNet.pt.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DOWN = (  # module number, outputs (None: halve the size), attention
    [(2, 128, False), (3, 128, False), (4, None, False), (5, 128, False), (6, 128, False), (7, None, False)]
    + [(8, 256, False), (9, 256, False), (10, None, False), (11, 256, False), (12, 256, False), (13, None, False)]
    + [(14, 512, True), (15, 512, True), (16, None, False), (17, 512, False), (18, 512, False)]
)
UP = (  # module number, inputs and outputs (None: double the size), attention
    [(1, (1024, 512), False), (2, (1024, 512), False), (3, (1024, 512), False), (4, None, False)]
    + [(5, (1024, 512), True), (6, (1024, 512), True), (7, (768, 512), True), (8, None, False)]
    + [(9, (768, 256), False), (10, (512, 256), False), (11, (512, 256), False), (12, None, False)]
    + [(13, (512, 256), False), (14, (512, 256), False), (15, (384, 256), False), (16, None, False)]
    + [(17, (384, 128), False), (18, (256, 128), False), (19, (256, 128), False), (20, None, False)]
    + [(21, (256, 128), False), (22, (256, 128), False), (23, (256, 128), False)]
)


class Sinusoid(nn.Module):
    """Embedding of integer timesteps [B] as [B,128]: sines, then cosines."""

    def __init__(self) -> None:
        super().__init__()
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", torch.exp(-math.log(10_000) * torch.arange(0, 128, 2) / 128))

    def forward(self, t: Tensor) -> Tensor:
        angles = t[:, None] * self.inv_freq[None]
        return torch.cat([angles.sin(), angles.cos()], 1)


class PlainResidualBlock(nn.Module):
    """GroupNorm, SiLU, conv, plus the time embedding; GroupNorm, SiLU, conv; plus the input."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(32, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(512, outputs))
        self.norm2, self.conv2 = nn.GroupNorm(32, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x))) + self.time(time)[:, :, None, None]
        out: Tensor = self.conv2(F.silu(self.norm2(h))) + self.skip(x)
        return out


class Attention(nn.Module):
    """One attention head over all positions, its attention matrix computed as a whole; plus the input."""

    def __init__(self, channels: int):
        super().__init__()
        self.norm, self.qkv = nn.GroupNorm(32, channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).flatten(2).chunk(3, 1)
        weights = torch.einsum("bci,bcj->bij", q, k).div(math.sqrt(x.shape[1])).softmax(-1)
        h: Tensor = self.out(torch.einsum("bij,bcj->bci", weights, v).view_as(x))
        return x + h


class Unit(nn.Module):
    """A residual block and, if `attend`, attention."""

    def __init__(self, inputs: int, outputs: int, attend: bool):
        super().__init__()
        self.resblocks = PlainResidualBlock(inputs, outputs)
        self.attention = Attention(outputs) if attend else nn.Identity()

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h: Tensor = self.attention(self.resblocks(x, time))
        return h


class PlainFaceUNet(nn.Module):
    """The face network: x [B,3,H,W] and t [B] to eps [B,3,H,W]. H and W are multiples of 32."""

    def __init__(self) -> None:
        super().__init__()
        self.time = nn.Sequential(Sinusoid(), nn.Linear(128, 512), nn.SiLU(), nn.Linear(512, 512))
        self.down1, width = nn.Conv2d(3, 128, 3, padding=1), 128
        for number, outputs, attend in DOWN:
            halve = nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1))
            setattr(self, f"down{number}", Unit(width, outputs, attend) if outputs else halve)
            width = outputs or width
        self.mid1, self.mid2 = Unit(512, 512, True), Unit(512, 512, False)
        for number, sizes, attend in UP:
            double = nn.Sequential(nn.Upsample(scale_factor=2.0, mode="nearest"), nn.Conv2d(width, width, 3, padding=1))
            setattr(self, f"up{number}", Unit(*sizes, attend) if sizes else double)
            width = sizes[1] if sizes else width
        self.out = nn.Sequential(nn.GroupNorm(32, 128), nn.SiLU(), nn.Conv2d(128, 3, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        time = self.time(t)
        h: Tensor = self.down1(x)
        skips = [h]
        for number, outputs, _ in DOWN:
            module = getattr(self, f"down{number}")
            h = module(h, time) if outputs else module(h)
            skips.append(h)
        h = self.mid2(self.mid1(h, time), time)
        for number, sizes, _ in UP:
            module = getattr(self, f"up{number}")
            h = module(torch.cat([h, skips.pop()], 1), time) if sizes else module(h)
        eps: Tensor = self.out(h)
        return eps


def plain_homework_ddim(
    network: Callable[[Tensor, Tensor], Tensor],
    x: Tensor,
    steps: int = 50,
    eta: float = 0.0,
    noises: tuple[Tensor, ...] = (),
) -> Tensor:
    """Return the images [B,3,H,W] of the course's DDIM rule from noise x, about in -1..1, a line per formula.

    `noises` [B,3,H,W], one per step, are what eta > 0 adds; without them it adds nothing.
    """
    alpha_bars = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0).float()
    times = list(range(1, 1000, 1000 // steps))[:steps][::-1]
    for index, t in enumerate(times):
        alpha_bar = alpha_bars[t].to(x.dtype)
        alpha_bar_prev = alpha_bars[times[index + 1] if index + 1 < steps else 0].to(x.dtype)
        eps = network(x, torch.full((len(x),), t, device=x.device))
        x0 = ((x - (1 - alpha_bar).sqrt() * eps) / alpha_bar.sqrt()).clamp(-1, 1)
        sigma = eta * ((1 - alpha_bar_prev) / (1 - alpha_bar)).sqrt() * (1 - alpha_bar / alpha_bar_prev).sqrt()
        x = alpha_bar_prev.sqrt() * x0 + (1 - alpha_bar_prev - sigma**2).sqrt() * eps
        if noises:
            x = x + sigma * noises[index]
    return x


def well_conditioned_weights(seed: int) -> dict[str, Tensor]:
    """Return a random state dict in UNet.pt's layout whose images stay stable over 50 steps, for end-to-end comparisons.

    A clean path carries the image past the random rest. down1 copies +x and -x of each colour into one group of channels.
    up23.skip passes them to out, which subtracts them (silu(x) - silu(-x) = x). The random rest weighs about a quarter.
    """
    torch.manual_seed(seed)
    state = PlainFaceUNet().state_dict()
    first, last, skip = (state[f"{name}.weight"] for name in ("down1", "out.2", "up23.resblocks.skip"))
    last.mul_(0.25)
    for colour in range(3):
        for channel in range(4 * colour, 4 * colour + 4):  # a group of out.0 holds four channels
            sign = -1.0 if channel % 2 else 1.0
            first[channel], state["down1.bias"][channel] = 0, 0
            first[channel, colour, 1, 1] = sign
            skip[channel], state["up23.resblocks.skip.bias"][channel] = 0, 0
            skip[channel, 128 + channel] = 1
            last[:, channel] = 0
            last[colour, channel, 1, 1] = sign / 2
    return state
