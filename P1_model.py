"""The conditional U-Net of P1, its named presets, and its checkpoint files.

One network draws the digits of both domains (0 = MNIST-M, 1 = SVHN), or the classes and domains of other images (`DataSpec`).
It is conditioned on the timestep, the digit or class, and the domain.
Either label may be replaced by a null label, which classifier-free guidance needs (Ho & Salimans 2022, arXiv 2207.12598).
A distilled network takes the guidance scale as an input. So guidance costs one call per step (Meng et al. 2023, arXiv 2210.03142).
It may also take the number of sampling steps as an input, and then needs few of them (Salimans & Ho 2022, arXiv 2202.00512).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from pydantic import ConfigDict, Field, FiniteFloat, PositiveInt
from torch import Tensor, nn

from diffusion.guidance import Denoise, Guidance, guided
from diffusion.schedule import Prediction, Schedule, make_schedule
from diffusion.step_rules import OneStateRule
from runtime.cli import BadInput
from runtime.device import to_channels_last
from runtime.files import load_safetensors, load_tensors, safetensors_metadata, save_safetensors
from runtime.images import shorten
from runtime.validation import validate, validate_json
from runtime.weights import describe, is_safetensors

Module = TypeVar("Module", bound=nn.Module)
FolderName = Annotated[str, Field(pattern=r"^[^./\\\x00][^/\\\x00]*$")]  # sampled images get it as folder or file name


@dataclass(frozen=True)
class DataSpec:
    """Classes, domains, channels and size (height and width in pixels) of the images in a data folder.

    A domain is a set of images in one style. Labels are indices into `classes` and `domains`.
    """

    classes: Annotated[tuple[FolderName, ...], Field(min_length=1, max_length=256)]
    domains: Annotated[tuple[FolderName, ...], Field(min_length=1)]
    channels: Literal[1, 3] = 3
    size: Annotated[int, Field(ge=16, le=64, multiple_of=4)] = 28

    def __str__(self) -> str:
        classes, domains = (shorten(", ".join(names)) for names in (self.classes, self.domains))
        return f"{len(self.classes)} classes ({classes}) in {domains}, {self.size}x{self.size} {COLOURS[self.channels]}"

    @property
    def no_class(self) -> int:
        """The null label of the class: one more than the last index."""
        return len(self.classes)

    @property
    def no_domain(self) -> int:
        """The null label of the domain: one more than the last index."""
        return len(self.domains)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Channels, height and width of an image."""
        return self.channels, self.size, self.size


COLOURS = {1: "grey", 3: "RGB"}
HOMEWORK = DataSpec(tuple("0123456789"), ("mnistm", "svhn"))
# shorthands for the homework's data
DIGITS, DOMAINS = len(HOMEWORK.classes), HOMEWORK.domains
NO_DIGIT, NO_DOMAIN, IMAGE_SHAPE = HOMEWORK.no_class, HOMEWORK.no_domain, HOMEWORK.shape


@dataclass(frozen=True)
class ModelConfig:
    """Everything that fixes the network's layout; stored in every checkpoint."""

    __pydantic_config__ = ConfigDict(extra="forbid")
    channels: tuple[int, ...]  # one entry per resolution, finest first
    attention: tuple[bool, ...]  # self-attention at that resolution?
    blocks: int = 2  # residual blocks per resolution on the way down, one more on the way up
    patch: int = 1  # pixels per side folded into channels before the first convolution
    embedding: int = 256
    head_channels: int = 32
    conditioning: Literal["embedding", "onehot"] = "embedding"
    timesteps: int = 1000  # T; the one-hot conditioning receives t/T
    spec: DataSpec = HOMEWORK  # of the training images
    max_guidance: Annotated[FiniteFloat, Field(gt=1)] | None = None  # a distilled network takes scales 1 .. this
    distilled_steps: tuple[PositiveInt, ...] = ()  # numbers of sampling steps that it takes as an input


SHIPPED = ModelConfig((64, 160), (False, True), blocks=1, patch=2)  # on 14x14 patches of 2x2 pixels
PRESETS = {
    # the report's recipe: full resolution, 128 features, 12 one-hot label inputs times a mask, t/T as an input
    "report": ModelConfig((128, 256, 256), (False, False, True), conditioning="onehot", timesteps=500),
    # the shipped size, which two CPU cores can train
    "cpu": SHIPPED,
    "gpu": SHIPPED,
    # trains within minutes on a laptop: a first try, and the tests
    "tiny": ModelConfig((16, 32), (False, True), blocks=1, patch=2, embedding=64, head_channels=16),
    # for a data-centre GPU and hours
    "large": ModelConfig((128, 256, 256), (False, True, True), embedding=512, head_channels=64),
}


# ---------------------------------------------------------------- conditioning


def sinusoid(t: Tensor, width: int) -> Tensor:
    """Return [B, width] sines and cosines of t [B] at geometrically spaced frequencies (Vaswani et al. 2017)."""
    frequencies = torch.exp(-math.log(10_000) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def perceptron(inputs: int, outputs: int, activation: nn.Module) -> nn.Sequential:
    """Return two linear layers with an activation in between: [B,inputs] -> [B,outputs]."""
    return nn.Sequential(nn.Linear(inputs, outputs), activation, nn.Linear(outputs, outputs))


class EmbeddingConditioning(nn.Module):
    """Sum of a timestep embedding and of learned digit and domain embeddings. A null label has a learned embedding, too."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.width = config.channels[0] * 2
        self.time = perceptron(self.width, config.embedding, nn.SiLU())
        self.digit = nn.Embedding(len(config.spec.classes) + 1, config.embedding)
        self.domain = nn.Embedding(len(config.spec.domains) + 1, config.embedding)

    def forward(self, t: Tensor, digit: Tensor, domain: Tensor) -> Tensor:
        """Map t, digit, domain, each [B] int64, to [B,embedding]."""
        embedding: Tensor = self.time(sinusoid(t, self.width)) + self.digit(digit) + self.domain(domain)
        return embedding


class OneHotConditioning(nn.Module):
    """Conditioning of the preset `report`: perceptrons of t/T and of one-hot digit and domain. A null label is all zeros."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.timesteps, self.counts = config.timesteps, (len(config.spec.classes), len(config.spec.domains))
        self.time = perceptron(1, config.embedding, nn.GELU())
        self.context = perceptron(sum(self.counts), config.embedding, nn.GELU())

    def forward(self, t: Tensor, digit: Tensor, domain: Tensor) -> Tensor:
        """Map t, digit, domain, each [B] int64, to [B,embedding]."""
        # the null label, whose index is `count`, becomes all zeros
        labels = zip((digit, domain), self.counts, strict=True)
        ones = [F.one_hot(label, count + 1)[:, :count] for label, count in labels]
        context = self.context(torch.cat(ones, dim=1).float())
        embedding: Tensor = self.time((t.float() / self.timesteps)[:, None]) + context
        return embedding


class ScalarEmbedding(nn.Module):
    """Embedding u * perceptron(u) of a number u. It is zero at u = 0. Before training it is zero for every u."""

    def __init__(self, embedding: int):
        super().__init__()
        self.perceptron = perceptron(1, embedding, nn.SiLU())
        zero(self.perceptron[-1])

    def forward(self, u: Tensor) -> Tensor:
        """Map numbers [B] to [B,embedding]."""
        embedding: Tensor = u[:, None] * self.perceptron(u[:, None])
        return embedding


# ---------------------------------------------------------------- blocks


def zero(module: nn.Module) -> nn.Module:
    """Set the module's parameters to zero and return it. A residual branch that ends in it then starts at zero."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def group_norm(channels: int) -> nn.GroupNorm:
    """Return GroupNorm in at most 32 groups of at least four channels."""
    return nn.GroupNorm(min(32, channels // 4), channels)


class ResidualBlock(nn.Module):
    """Residual block: twice GroupNorm, SiLU, conv. The embedding scales and shifts the second norm's output (Dhariwal & Nichol 2021)."""

    def __init__(self, inputs: int, outputs: int, embedding: int):
        super().__init__()
        self.norm1, self.conv1 = group_norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.modulation = nn.Linear(embedding, 2 * outputs)
        self.norm2, self.conv2 = group_norm(outputs), zero(nn.Conv2d(outputs, outputs, 3, padding=1))
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Map x [B,inputs,H,W] and embedding [B,embedding] to [B,outputs,H,W]."""
        scale, shift = self.modulation(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h) * (1 + scale) + shift))
        out: Tensor = self.skip(x) + h
        return out


class SelfAttention(nn.Module):
    """Multi-head self-attention over all positions, as a residual branch."""

    def __init__(self, channels: int, head_channels: int):
        super().__init__()
        self.heads = channels // head_channels
        self.norm, self.qkv = group_norm(channels), nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero(nn.Conv2d(channels, channels, 1))
        self.attend: Callable[..., Tensor] = F.scaled_dot_product_attention  # training/cpu_layers.py may replace it

    def forward(self, x: Tensor) -> Tensor:
        """Map x [B,C,H,W] to the same shape."""
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).view(b, 3, self.heads, c // self.heads, h * w)
        q, k, v = qkv.transpose(-1, -2).unbind(1)  # each [B, heads, H*W, C/heads]
        attended = self.attend(q, k, v)  # [B, heads, H*W, C/heads]
        out: Tensor = x + self.out(attended.transpose(-1, -2).reshape(b, c, h, w))
        return out


class Upsample(nn.Conv2d):
    """Nearest-neighbour upsampling, then a 3x3 convolution: [B,inputs,H,W] -> [B,outputs,2H,2W]."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__(inputs, outputs, 3, padding=1)
        self.upsample: Callable[[Tensor], Tensor] = double  # training/cpu_layers.py may replace it

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.upsample(x))


def double(x: Tensor) -> Tensor:
    """Return x [B,C,H,W] as [B,C,2H,2W], by nearest neighbour."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Stage(nn.Module):
    """A sequence of modules that passes the embedding to its residual blocks only."""

    def __init__(self, *modules: nn.Module):
        super().__init__()
        self.layers = nn.ModuleList(modules)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """Apply all modules to x [B,C,H,W] with embedding [B,embedding]."""
        for layer in self.layers:
            x = layer(x, embedding) if isinstance(layer, ResidualBlock) else layer(x)
        return x


# ---------------------------------------------------------------- the network


class UNet(nn.Module):
    """The network: x [B,3,28,28], t [B] int, digit [B] int (10 = null), domain [B] int (2 = null) -> eps or v [B,3,28,28].

    For other images, config.spec gives the shape and the null labels. The network's schedule says which of eps and v it is.
    A distilled network (config.max_guidance is set) returns the guided output at the scales `guidance` [B]. None = scale 1.
    With `steps` [B], one of config.distilled_steps, the output leads to the next of so many sampling steps. None = the usual output.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        kinds = {"embedding": EmbeddingConditioning, "onehot": OneHotConditioning}
        self.conditioning = kinds[config.conditioning](config)

        def residual(inputs: int, outputs: int) -> ResidualBlock:
            return ResidualBlock(inputs, outputs, config.embedding)

        def attention(channels: int) -> SelfAttention:
            return SelfAttention(channels, config.head_channels)

        pixels = config.spec.channels * config.patch**2
        self.first = nn.Conv2d(pixels, config.channels[0], 3, padding=1)

        # down: every stage leaves a skip connection of `skips[k]` channels
        self.down, width = nn.ModuleList(), config.channels[0]
        skips = [width]
        for level, (channels, attend) in enumerate(zip(config.channels, config.attention, strict=True)):
            if level:
                self.down.append(Stage(nn.Conv2d(width, channels, 3, stride=2, padding=1)))
                skips.append(width := channels)
            for _ in range(config.blocks):
                attentions = [attention(channels)] if attend else []  # made first: weights are drawn in this order
                self.down.append(Stage(residual(width, channels), *attentions))
                skips.append(width := channels)

        self.middle = Stage(residual(width, width), attention(width), residual(width, width))

        # up: every stage takes one skip connection, the last of a level also doubles the resolution
        self.up = nn.ModuleList()
        for level, channels in reversed(list(enumerate(config.channels))):
            for block in range(config.blocks + 1):
                # a 1x1 convolution mixes the skip connection in, so that the 3x3 ones stay narrow
                merge = nn.Conv2d(width + skips.pop(), channels, 1)
                layers: list[nn.Module] = [merge, residual(channels, channels)]
                width = channels
                if config.attention[level]:
                    layers.append(attention(channels))
                if level and block == config.blocks:
                    layers.append(Upsample(channels, width := config.channels[level - 1]))
                self.up.append(Stage(*layers))

        self.last = nn.Sequential(
            group_norm(config.channels[0]),
            nn.SiLU(),
            zero(nn.Conv2d(config.channels[0], pixels, 3, padding=1)),
        )
        self.guidance = ScalarEmbedding(config.embedding) if config.max_guidance else None
        self.steps = ScalarEmbedding(config.embedding) if config.distilled_steps else None

    def forward(
        self,
        x: Tensor,
        t: Tensor,
        digit: Tensor,
        domain: Tensor,
        guidance: Tensor | None = None,
        steps: Tensor | None = None,
    ) -> Tensor:
        """Return the prediction [B,C,H,W], eps or v, for x [B,C,H,W]; the other inputs are [B]."""
        embedding = self.conditioning(t, digit, domain)
        if guidance is not None:
            assert self.guidance is not None, "the network takes no guidance scale"
            assert self.config.max_guidance is not None
            embedding = embedding + self.guidance((guidance - 1) / (self.config.max_guidance - 1))
        if steps is not None:
            assert self.steps is not None, "the network takes no number of steps"
            embedding = embedding + self.steps(1 / steps)
        embedding = F.silu(embedding)
        h = self.first(F.pixel_unshuffle(x, self.config.patch))
        skips = [h]
        for stage in self.down:
            skips.append(h := stage(h, embedding))
        h = self.middle(h, embedding)
        for stage in self.up:
            h = stage(torch.cat([h, skips.pop()], dim=1), embedding)
        return F.pixel_shuffle(self.last(h), self.config.patch)


# ---------------------------------------------------------------- checkpoints of the finished network


# DPM-Solver++ (2M); DDIM; DDPM over all T steps; the few steps that a network is distilled to
SamplerName = Literal["dpm", "ddim", "ddpm", "distilled"]


@dataclass(frozen=True)
class DigitSamplerConfig:
    """Settings of sampling. A checkpoint stores those that are the default for its network."""

    name: SamplerName = "dpm"
    steps: PositiveInt = 12
    guidance: FiniteFloat = 2.5  # scale: 0 ignores the digit, 1 is no guidance
    interval: tuple[FiniteFloat, FiniteFloat] = (0.0, 1.0)  # of t/T in which guidance is applied
    rescale: FiniteFloat = 0.0  # guidance rescale
    eta: FiniteFloat = 0.0  # of ddim
    rule: OneStateRule = "trailing"  # of ddim

    @staticmethod
    def from_dict(values: dict[str, Any]) -> DigitSamplerConfig:
        """Return the settings in a checkpoint's `sampler`. Unknown keys are ignored; raise BadInput for an unknown value."""
        return validate(DigitSamplerConfig, values, "sampler of the checkpoint")

    def passes(self, timesteps: int) -> int:
        """Return the number of sampling steps: all `timesteps` for ddpm, else `steps`."""
        return timesteps if self.name == "ddpm" else self.steps


@dataclass(frozen=True)
class Network:
    """A trained U-Net with its noise schedule, its default sampler settings, and facts about its training (`origin`)."""

    unet: UNet
    schedule: Schedule
    schedule_name: str
    sampler: dict[str, Any]
    origin: dict[str, Any]

    @property
    def spec(self) -> DataSpec:
        """The classes, domains, channels and size of the images it draws."""
        return self.unet.config.spec

    def __call__(
        self, x: Tensor, t: int, labels: tuple[Tensor, Tensor], guidance: float = 1.0, steps: int | None = None
    ) -> Tensor:
        """Return the prediction for x [B,C,H,W] at timestep t; labels are (digit, domain), each [B].

        Only a distilled network takes a `guidance` scale other than 1, and a number of `steps`.
        """
        numbers = {"guidance": None if guidance == 1 else guidance, "steps": steps}
        inputs = {k: torch.full((len(x),), float(n), device=x.device) for k, n in numbers.items() if n is not None}
        output: Tensor = self.unet(x, torch.full((len(x),), t, device=x.device), *labels, **inputs)
        return output

    def guided(self, digit: Tensor, domain: Tensor, guidance: Guidance, steps: int | None = None) -> Denoise:
        """Return a denoiser (x, t) -> guided prediction for the labels digit and domain, each [B].

        The unconditional prediction keeps the domain, but not the digit. It doubles a step's cost, except in a distilled network.
        `steps` goes to the network, see UNet. Raise BadInput as `check_guidance` does.
        """
        self.check_guidance(guidance)
        total, labels = len(self.schedule), (digit, domain)
        if self.unet.config.max_guidance:
            return lambda x, t: self(x, t, labels, guidance.scale if guidance.active(t, total) else 1.0, steps)
        both = torch.cat([digit, torch.full_like(digit, self.spec.no_class)]), torch.cat([domain, domain])
        return guided(self, labels, both, guidance, total)

    def check_guidance(self, guidance: Guidance, flag: str = "--guidance") -> None:
        """Raise BadInput if the network is distilled and the scale is outside 1 .. max_guidance, or rescale is not 0."""
        if not (largest := self.unet.config.max_guidance):
            return
        if not 1 <= guidance.scale <= largest:
            raise BadInput(
                f"{flag} {guidance.scale}: this checkpoint is distilled, it takes scales from 1 to {largest}"
            )
        if guidance.rescale:
            raise BadInput(
                f"--guidance-rescale {guidance.rescale}: this checkpoint is distilled, its one output can't be rescaled: give 0"
            )


@dataclass(frozen=True)
class NetworkHeader:
    """What a checkpoint holds besides the weights, as JSON."""

    kind: Literal["P1 digit diffusion"]
    model: ModelConfig
    schedule: Annotated[str, Field(pattern="^(linear|cosine)$")]
    timesteps: PositiveInt
    prediction: Prediction
    sampler: dict[str, Any]
    origin: dict[str, Any]


def save_network(path: Path, network: Network, dtype: torch.dtype = torch.float32) -> None:
    """Write one safetensors file: the weights in `dtype`, and everything else as JSON in its header."""
    schedule = network.schedule_name, len(network.schedule), network.schedule.prediction
    header = NetworkHeader("P1 digit diffusion", network.unet.config, *schedule, network.sampler, network.origin)
    weights = {k: v.to("cpu", dtype).contiguous() for k, v in network.unet.state_dict().items()}
    save_safetensors(path, weights, {"network": header_json(header)})


def header_json(header: Any) -> str:
    """Return the header of a network or classifier as JSON.

    `spec`, `max_guidance` and `distilled_steps` are left out at their defaults, because earlier versions refuse these keys.
    """
    values = asdict(header)
    if header.model.spec == HOMEWORK:
        del values["model"]["spec"]
    if values["model"].get("max_guidance", 0) is None:
        del values["model"]["max_guidance"]
    if not values["model"].get("distilled_steps", True):
        del values["model"]["distilled_steps"]
    return json.dumps(values)


def load_network(path: Path, device: torch.device) -> Network:
    """Load a checkpoint with fp32 weights, without gradients; raise BadInput for a file of another kind or layout."""
    if "network" not in safetensors_metadata(path):
        kind = describe(load_tensors(path)) or "no header"
        form = "safetensors" if is_safetensors(path) else "torch"
        raise BadInput(f"{path} is a {form} file, but not a P1 checkpoint ({kind})")
    weights, metadata = load_safetensors(path)
    where = f"{path}, header of a P1 checkpoint"
    header = validate_json(NetworkHeader, metadata["network"], where)
    validate(DigitSamplerConfig, header.sampler, f"{where}, sampler")
    try:
        unet = UNet(header.model)
    except (ValueError, RuntimeError, ArithmeticError, IndexError, TypeError) as error:
        raise BadInput(f"{where}, model: no network has this layout ({str(error).splitlines()[0]})") from None
    load_weights(unet, {k: v.float() for k, v in weights.items()}, path)
    to_channels_last(unet, device).eval().requires_grad_(False)
    schedule = make_schedule(header.schedule, header.timesteps, header.prediction)
    return Network(unet, schedule, header.schedule, header.sampler, header.origin)


def load_weights(network: Module, weights: dict[str, Tensor], path: Path) -> Module:
    """Load weights into the network and return it; raise BadInput that names a missing, unexpected, misshapen or non-finite one."""
    try:
        network.load_state_dict(weights)
    except (RuntimeError, AttributeError, TypeError) as error:  # torch's first line names only the class
        reason = str(error).splitlines()[:2][-1].strip()
        raise BadInput(f"{path}: {reason[:200]}") from None
    if bad := next((name for name, value in network.state_dict().items() if not value.isfinite().all()), ""):
        raise BadInput(f"{path}: {bad} holds values that are NaN or infinite")
    return network
