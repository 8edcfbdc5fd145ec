"""How P3's benchmarks learn the miniature's held-out objects and styles, by P3_textual_inversion.py, and sample images of them."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from concepts.dataset import ConceptSet, Kind
from concepts.recipes import RECIPES
from concepts.sampling import SamplerConfig, Solver
from diffusion.guidance import Guidance
from miniature.scenery.concepts import write_concept_pictures
from miniature.scenery.scenes import HELD_OUT_KINDS, HELD_OUT_STYLES
from runtime.batches import even_batch, in_batches
from runtime.cli import BadInput, progress
from runtime.files import ROOT, read_json, write_json

MODEL = "runs/miniature/stable_diffusion"
NAMES: dict[Kind, tuple[str, ...]] = {"object": HELD_OUT_KINDS, "style": HELD_OUT_STYLES}
INITIAL: dict[Kind, str] = {"object": "object", "style": "unusual"}  # what the miniature's captions call them
RECIPE = RECIPES["small"]
BATCH = 10  # images sampled at once
SAMPLER = SamplerConfig("sde", 25, Guidance(3.0))  # by p3_shape.py named, which compares samplers


@dataclass(frozen=True)
class SamplerFlags:
    """How a benchmark samples the miniature's images."""

    solver: Solver = SAMPLER.solver
    sampling_steps: int = SAMPLER.steps
    """Sampling steps."""
    guidance: float = SAMPLER.guidance.scale
    """Scale of classifier-free guidance."""

    def sampler_config(self) -> SamplerConfig:
        """Return the sampler's settings that the flags describe."""
        return SamplerConfig(self.solver, self.sampling_steps, Guidance(self.guidance))


def sample(work: Callable[[list[Any]], Tensor], requests: Sequence[Any], title: str) -> Tensor:
    """Return the images [N,3,64,64] uint8 that `work` makes of the requests, batch by batch."""
    chunks = in_batches(work, requests, even_batch(len(requests), BATCH))
    return torch.cat([images[: len(chunk)] for chunk, images in progress(chunks, title, leave=False)])


def check_model(model: str) -> None:
    """Raise BadInput if `model` is the miniature's default folder and absent. The message names the commands that make it."""
    if model == MODEL and not Path(model).is_dir():
        convert = "python miniature/train_clip.py convert --output runs/miniature/clip"
        raise BadInput(
            f"--model {model} does not exist. The miniature's is made by `{convert}` and"
            " `python miniature/train_diffusion.py assemble`"
        )


def kind_of(name: str) -> Kind:
    """Return whether a held-out concept is an "object" or a "style"."""
    return "style" if name in HELD_OUT_STYLES else "object"


def write_images(name: str, folder: Path, captions: bool) -> Path:
    """Write five images of a concept to folder/name, as `world.py concept` does, and return that folder.

    `captions`: write sentences about what else each image shows, too.
    """
    write_concept_pictures(folder / name, name, 5, 0, captions)
    return folder / name


def learn(concepts: Sequence[ConceptSet], output: Path, **flags: object) -> dict[str, Any]:
    """Learn concepts of one kind in one run of P3_textual_inversion.py by its recipe for small models; return the run's record.

    Vectors are written to `output`. `flags` are further flags, by field name, and override the recipe.
    """
    flags = {"validate_every": 0} | flags
    with tempfile.TemporaryDirectory() as temporary:
        entries = [asdict(concept) | {"images": str(concept.images.absolute())} for concept in concepts]
        write_json(Path(temporary) / "concepts.json", entries)
        command = [sys.executable, str(ROOT / "P3_textual_inversion.py"), "--concepts", f"{temporary}/concepts.json"]
        command += ["--recipe", "small", "--output", str(output), "--run", f"{temporary}/run"]
        command += [part for name, value in flags.items() for part in (f"--{name.replace('_', '-')}", str(value))]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return dict(read_json(Path(temporary) / "run" / "record.json"))
