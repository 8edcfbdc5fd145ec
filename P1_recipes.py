"""The settings of P1_training.py, and the recipe (schedule, rate, batch ..) that goes with each preset of the network."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal

from diffusion.schedule import Prediction
from P1_inference import Sampler
from runtime.cli import BadInput, require_not_negative, require_positive, require_shares
from runtime.device import Choice, Device, Precision

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Recipe:
    """What goes with a preset of the network."""

    schedule: Literal["linear", "cosine"] = "cosine"
    prediction: Prediction = "v"
    steps: int = 8_000  # optimizer steps
    batch: int = 64  # global batch over all processes
    lr: float = 1e-3
    min_snr: float = 0.0
    ema: float = 0.999
    sampler: Sampler = Sampler()


RECIPES = {
    "report": Recipe("linear", "eps", 30_000, 256, 1e-3, 0.0, sampler=Sampler("dpm", 20)),
    "tiny": Recipe(steps=2_000),
    "cpu": Recipe(sampler=Sampler(steps=10, guidance=5.0)),
    "gpu": Recipe(steps=20_000, batch=512, ema=0.9995),
}


@dataclass(frozen=True)
class Settings:
    """Flags; those left out come from the preset's recipe or are found."""

    data: Path = HERE / "hw2_data" / "digits"
    """Folder with mnistm/ and svhn/ (see hw2_data/README.md)."""
    output: Path = Path("runs/p1")
    """Run folder: checkpoint, best weights, pictures, TensorBoard, record.json."""
    preset: Literal["auto", "report", "tiny", "cpu", "gpu"] = "auto"
    """auto: gpu where there is one, else cpu."""
    steps: int | None = None
    """Optimizer steps in all; may be changed when a run goes on."""
    batch: int | None = None
    """Pictures per step over all processes."""
    lr: float | None = None
    """Peak learning rate of AdamW."""
    warmup: int = 200
    """Steps over which the rate rises."""
    decay: float = 0.5
    """Share of the steps, at the end, over which the rate falls to zero."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    min_snr: float | None = None
    """Min-SNR loss weight's gamma (Hang et al. 2023); 0 switches it off."""
    drop_digit: float = 0.15
    """Share of pictures trained without their digit, which guidance needs."""
    drop_domain: float = 0.1
    """Share of pictures trained without their domain."""
    svhn_share: float | None = 0.5
    """Share of SVHN, the harder domain, among the pictures drawn; None: as in the data."""
    balance_digits: bool = True
    """SVHN's digits equally often (the set is unbalanced)."""
    ema: float | None = None
    """Decay of the averaged weights, which are the ones that are graded and kept."""
    clip: float = 1.0
    """Largest gradient norm; inf: any."""
    seed: int = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it, else fp32."""
    compile: Choice = "auto"
    """torch.compile; auto: where it pays (CUDA, or a CPU with bf16) and a compiler exists."""
    eval_every: int = 1000
    """Steps between two gradings; 0: only at the end."""
    eval_count: int = 10
    """Pictures per digit and domain in each of these gradings."""
    candidates: int = 3
    """How many of the best gradings are graded again, with more pictures, at the end."""
    final_count: int = 50
    """Pictures per digit and domain in that last grading."""
    save_every: int = 500
    """Steps between two checkpoints."""
    log_every: int = 50
    """Steps between two readings of the loss."""
    init: Path | None = None
    """Start from these weights (best.safetensors or shipped) instead of random ones, with a new optimizer."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the run folder's checkpoint where it has one; never: start anew."""


def resolve_recipe(settings: Settings, preset: str) -> Recipe:
    """The preset's recipe with the flags that were given; raises BadInput for numbers that make no sense."""
    given = {f.name: value for f in fields(Recipe) if (value := getattr(settings, f.name, None)) is not None}
    recipe = replace(RECIPES[preset], **given)
    require_positive(recipe, "steps", "batch", "lr")
    require_not_negative(recipe, "min_snr")
    require_positive(settings, "eval_count", "candidates", "final_count")
    require_not_negative(settings, "warmup", "eval_every", "save_every", "log_every")
    require_shares(settings, "drop_digit", "drop_domain", "svhn_share", "ema", "decay")
    if not settings.clip > 0:  # inf is fine
        raise BadInput(f"--clip {settings.clip}: must be above zero")
    return recipe
