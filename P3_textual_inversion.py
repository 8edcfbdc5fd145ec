"""Textual inversion: learns new words, such as <new1>, from a few pictures each; the model itself stays as it is, bit for bit.

  python P3_textual_inversion.py --model MODEL --images dog --token "<new1>" --init dog
  python P3_textual_inversion.py --model MODEL --images revoy --token "<new2>" --init painting --kind style
  python P3_textual_inversion.py --model MODEL --concepts concepts.json              several in one run
  python P3_inference.py --model MODEL --prompt "a <new1> in the style of <new2>" --output DIR    draws with what was learned

MODEL is a diffusers folder, a hub name or a single Stable Diffusion v1 file. Several GPUs: accelerate launch, or torchrun. Ctrl-C leaves
a checkpoint, and the same command goes on from it. With --clip every look at the progress is scored as the course does, and the best
vectors are kept. Beside 00.png, 00.txt may hold sentences, one per line, that tell what else that picture shows, with {} for the token:
"a {} on a bench". What the sentences tell, the token needn't hold.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from concepts.dataset import ConceptSet, Kind, read_concepts
from concepts.embeddings import FOLDER, file_of, save_vectors
from concepts.training import InversionArgs, Run
from runtime.cli import BadInput, check_fractions, check_not_negative, check_positive, log, run_script
from runtime.files import output_folder


@dataclass(frozen=True)
class Settings(InversionArgs):
    """Flags."""

    images: Path | None = None
    """Folder of pictures of one concept; beside 00.png, 00.txt may hold sentences for that picture, with {} for the token."""
    token: str = "<new1>"
    """Its name in prompts, in angle brackets."""
    init: str | None = None
    """A single ordinary word for it, such as dog or painting, which its vectors start from."""
    kind: Kind = "object"
    """Which sentences it is learned in."""
    vectors: int = 1
    """How many: more hold more of the pictures, and leave less of the prompt's other words."""
    concepts: Path | None = None
    """Instead of these five: a json list of objects with the same names."""
    output: Path = FOLDER
    """Folder for learned_NAME.safetensors, one per token; other files there stay."""


def main(settings: Settings) -> None:
    """Learns, saves, records; after a signal only the checkpoint is left. Raises BadInput."""
    check(settings)
    concepts = concepts_of(settings)
    output_folder(settings.output)
    run = Run(settings, concepts)
    run.train()
    run.leave_if_stopped()
    if not run.main:
        return
    for token, rows in run.looks.chosen().items():
        path = file_of(settings.output, token)
        save_vectors(path, token, rows, f"{settings.model}, {run.step} steps, seed {settings.seed}")
        print(f"{token}: {path}")
    run.save_record({"concepts": [asdict(concept) for concept in concepts]})
    log(f"progress and record: {run.folder}")


def check(settings: Settings) -> None:
    """Raises BadInput for numbers that can't work."""
    check_positive(settings, "steps", "batch", "lr", "accumulate", "save_every", "log_every")
    check_not_negative(settings, "seed", "max_norm", "embedding_noise", "validate_every")
    check_fractions(settings, "zoom_out")
    if settings.batch % settings.accumulate:
        raise BadInput(f"--accumulate {settings.accumulate}: does not divide --batch {settings.batch}")
    if settings.max_loss_weight < 1:
        raise BadInput(f"--max-loss-weight {settings.max_loss_weight}: give 1 (none) or more")
    if settings.zoom_out and settings.crop == "random":
        raise BadInput(f"--zoom-out {settings.zoom_out}: goes with --crop center, random cuts anew at every step")


def concepts_of(settings: Settings) -> list[ConceptSet]:
    """From the file, or the one that the flags name."""
    if settings.concepts:
        if settings.images:
            raise BadInput("--images and --concepts: give one of them")
        return read_concepts(settings.concepts)
    if not settings.images or not settings.init:
        raise BadInput("name the pictures and a word for what they show: --images DIR --init WORD (or --concepts FILE)")
    return [ConceptSet(settings.token, settings.images, settings.init, settings.kind, settings.vectors)]


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
