"""Flags of P3_clip_zeroshot.py, its presets, and the settings that --compare names."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Literal, get_args

from runtime.cli import BadInput
from runtime.device import Device, Machine, set_up
from runtime.files import ROOT
from zeroshot.prompts import SETS, Names
from zeroshot.results import Choosing
from zeroshot.weights import HUB, LOCAL, Activation


@dataclass(frozen=True)
class ZeroShotConfig:
    """One setting to measure."""

    model: str
    weights: str | None
    prompts: str
    names: Names


# CIFAR-100, published: 64.2, 80.3 and 90.7. "fast" costs what the report's model costs, "best" 12 times as much.
PRESETS = {
    "report": ZeroShotConfig("ViT-B-32", "openai", "report", "raw"),
    "fast": ZeroShotConfig("ViT-B-32", "datacomp_xl_s13b_b90k", "cifar", "clean"),
    "best": ZeroShotConfig("EVA02-L-14", "merged2b_s4b_b131k", "cifar", "clean"),
}


@dataclass(frozen=True)
class Settings:
    """Flags; --model, --weights, --prompts and --names replace what the preset says."""

    images: Path = ROOT / "hw2_data" / "clip_zeroshot" / "val"
    """Folder of {class}_{image}.png."""
    labels: Path | None = None
    """json with the class names, an object or a list; left out: id2label.json or id.json beside the pictures."""
    preset: Literal["best", "fast", "report"] | None = None
    """best: EVA02-L-14; fast: ViT-B-32 with better weights; report: ViT-B-32 as in the report, also what runs without any flag."""
    model: str | None = None
    """An architecture of open_clip (ViT-B-32), a folder (local-dir:PATH), or a hub model (hf-hub:NAME)."""
    weights: str | None = None
    """A tag of open_clip (openai, laion2b_s34b_b79k, ..) or a file."""
    activation: Activation = "match"
    """match: the activation (GELU or QuickGELU) that the weights are known to be trained with; named: the model's, whatever the weights."""
    prompts: str | None = None
    """report: "A photo of {}"; single: "a photo of a {}."; cifar: 18 for small photographs; imagenet: 80; or a text file, one a line."""
    names: Names | None = None
    """raw: underscores as given; clean: spaces, and articles ("a photo of an oak tree")."""
    compare: tuple[str, ...] = ()
    """Several settings in one run, each some of PRESET, MODEL, MODEL:WEIGHTS, PROMPTS, NAMES joined by commas; the rest as the flags say.
    The word report means the prompt; preset=report the preset."""
    output: Path | None = None
    """Folder of the results; left out: runs/p3_clip/(model_prompts_names). --compare makes a folder per setting in it."""
    embeddings: Path | None = None
    """safetensors file for the image features: read where it holds them, else written."""
    cache: Path = ROOT / "runs" / "p3_clip_cache"
    """Folder of the classifiers, by model, weights, names and prompts."""
    cases: Choosing = "seed"
    """How the five right and five wrong cases are chosen: by --seed, or the most confident."""
    seed: int = 0
    batch: int = 0
    """Pictures at once; 0: 32 on a CPU (more is slower), 512 on a GPU."""
    workers: int = 0
    """Threads that decode and resize; 0: one per core."""
    device: Device = "auto"
    precision: Literal["auto", "fp32", "tf32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the hardware has it, else fp16 on a GPU and fp32 on a CPU."""
    skip_existing: bool = False
    """Skip settings whose record.json says that the same was measured on the same pictures."""
    collect: Path | None = None
    """Write FOLDER/runs.csv from every record.json below this folder, print it, and do nothing else."""


def base_config(settings: Settings) -> ZeroShotConfig:
    """The preset with the flags that were given; another model doesn't keep the preset's weights."""
    choice = PRESETS[settings.preset or "report"]
    if settings.model and settings.model != choice.model:
        choice = replace(choice, model=settings.model, weights=None)
    given = {f.name: v for f in fields(ZeroShotConfig) if (v := getattr(settings, f.name)) is not None}
    return replace(choice, **given)


def parse_config(text: str, base: ZeroShotConfig) -> ZeroShotConfig:
    """One argument of --compare on top of `base`; raises BadInput for a word that is none of its kinds."""
    choice = base
    for word in text.split(","):
        key, _, value = word.partition("=")
        if key == "preset" and value in PRESETS:
            choice = PRESETS[value]
        elif key == "model" and value:
            choice = replace(choice, model=value, weights=None)
        elif key in ("prompts", "names", "weights") and value:
            choice = replace(choice, **{key: value})  # type: ignore[arg-type]
        elif word in SETS or word.endswith(".txt") or Path(word).is_file():
            choice = replace(choice, prompts=word)
        elif word in PRESETS:
            choice = PRESETS[word]
        elif word in get_args(Names):
            choice = replace(choice, names=word)  # type: ignore[arg-type]
        elif word.startswith((LOCAL, HUB)):
            choice = replace(choice, model=word, weights=None)
        else:
            model, _, weights = word.partition(":")
            choice = replace(choice, model=model, weights=weights or None)
    if choice.names not in get_args(Names):
        raise BadInput(f"--compare {text}: names={choice.names} must be {' or '.join(get_args(Names))}")
    return choice


def check(settings: Settings) -> None:
    """Raises BadInput for impossible numbers."""
    for name in ("batch", "workers"):
        if getattr(settings, name) < 0:
            raise BadInput(f"--{name} {getattr(settings, name)}: must be above zero, or 0 for automatic")


def precision_of(settings: Settings, machine: Machine) -> str:
    """fp32, tf32, bf16 or fp16, with the process readied for it; raises BadInput for fp16 on a CPU."""
    on_gpu = machine.device.type == "cuda"
    if settings.precision == "fp16":
        if machine.device.type == "cpu":
            raise BadInput("--precision fp16 needs a GPU, this is a CPU")
        return "fp16"
    if settings.precision == "auto" and on_gpu and not machine.native_bf16:
        return "fp16"
    return set_up(settings.precision, machine)
