"""The training recipe of each preset of the network, and of a distillation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusion.schedule import Prediction
from digits.sampling import DigitSamplerConfig


@dataclass(frozen=True)
class TrainingRecipe:
    """Schedule, optimizer settings and default sampler that go with a preset of the network."""

    schedule: Literal["linear", "cosine"] = "cosine"
    prediction: Prediction = "v"
    steps: int = 8_000  # optimizer steps
    batch: int = 64  # over all processes
    lr: float = 1e-3
    min_snr: float = 0.0
    ema: float = 0.999
    sampler: DigitSamplerConfig = DigitSamplerConfig()


SHIPPED = DigitSamplerConfig(steps=10, guidance=5.0)
RECIPES = {
    "report": TrainingRecipe("linear", "eps", 30_000, 256, 1e-3, 0.0, sampler=DigitSamplerConfig("dpm", 20)),
    "tiny": TrainingRecipe(steps=2_000),
    "cpu": TrainingRecipe(sampler=SHIPPED),
    "gpu": TrainingRecipe(steps=1_600, batch=1024, lr=2e-3, ema=0.998, sampler=SHIPPED),
    "large": TrainingRecipe(steps=20_000, batch=512, ema=0.9995),
    "distill": TrainingRecipe(steps=3_000, sampler=SHIPPED),
    "distill-steps": TrainingRecipe(steps=1_500, batch=16, sampler=DigitSamplerConfig("distilled", 5, 5.0)),
}


def preset_values(name: str) -> str:
    """Return a field's value in every recipe, for --help: `report 30000, tiny 2000, ..`, or one value if all are equal."""
    values = {preset: getattr(recipe, name) for preset, recipe in RECIPES.items()}
    if len(set(values.values())) == 1:
        return str(values["cpu"])
    return ", ".join(f"{preset} {value}" for preset, value in values.items())
