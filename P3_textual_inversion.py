"""Textual inversion: learn new tokens, such as <new1>, from a few images each. The model's own weights do not change.

  python P3_textual_inversion.py --model MODEL --images dog --token "<new1>" --init dog
  python P3_textual_inversion.py --model MODEL --images revoy --token "<new2>" --init painting --kind style
  python P3_textual_inversion.py --model MODEL --concepts concepts.json              several in one run
  python P3_inference.py --model MODEL --prompt "a <new1> in the style of <new2>" --output DIR    images with the learned tokens

MODEL is a diffusers folder, a hub name or a single Stable Diffusion v1 file. Several GPUs: accelerate launch, or torchrun. Ctrl-C or
SIGTERM stops after the current step and writes a checkpoint; the same command continues from it. With --clip every validation is scored
as the course does, and the best vectors are kept. Next to 00.png, 00.txt may hold sentences about that image, one per line, with {} for
the token: "a {} on a bench". What the sentences describe, the token need not represent.
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from concepts.dataset import Augmentation, ConceptData, ConceptSet, Crop, InversionBatch, Kind, read_concepts
from concepts.embeddings import FOLDER, file_of, save_vectors
from concepts.inversion import TextualInversion, prepare_frozen, weights_fingerprint
from concepts.stable_diffusion import load_pipeline
from concepts.validation import Validator
from runtime.batches import is_out_of_memory
from runtime.cli import BadInput, Seed, check_fractions, check_not_negative, check_positive, log, run_script
from runtime.device import AutoOnOff, Device, Precision, detect, set_up, should_compile
from runtime.files import ROOT, output_folder
from runtime.images import decoration, line_figure
from runtime.record import Record
from training.draws import process_rows
from training.loop import LoopConfig, Trained, TrainingRun
from training.schedule import LearningRate

RUNS = ROOT / "runs" / "p3_textual_inversion"


@dataclass(frozen=True)
class Settings:
    """Flags of textual inversion."""

    model: str
    """Stable Diffusion v1: a diffusers folder, a hub name, or a single file."""
    images: Path | None = None
    """Folder of images of one concept; next to 00.png, 00.txt may hold sentences for that image, with {} for the token."""
    token: str = "<new1>"
    """The concept's name in prompts, in angle brackets."""
    init: str | None = None
    """A single ordinary word for the concept, such as dog or painting. The vectors start from its embedding."""
    kind: Kind = "object"
    """Selects the sentences to learn from."""
    vectors: int = 1
    """Vectors of the token. More represent the images better and leave the prompt's other words less influence."""
    concepts: Path | None = None
    """JSON list of objects with these five names, to learn several concepts in one run."""
    output: Path = FOLDER
    """Folder for learned_NAME.safetensors, one per token; other files there stay."""
    run: Path | None = None
    """Run folder: checkpoint, TensorBoard, validation images, record.json. None = runs/p3_textual_inversion/TOKENS."""
    steps: int = 500
    """Optimizer steps in all; a run may continue with more."""
    batch: int = 8
    """Images of every concept per step, over all processes."""
    accumulate: int = 1
    """Parts that a batch is computed in, to save memory."""
    lr: float = 5e-3
    """Peak learning rate of AdamW, without weight decay."""
    max_norm: float = 1.0
    """Limit each embedding's norm to this multiple of its initial word's, so that the rest of the prompt keeps its influence.
    0 = no limit."""
    crop: Crop = "center"
    """center encodes every image once; random crops it again at every step, which is slower."""
    max_loss_weight: float = 1.0
    """Cap on the loss weight 1 + 1/SNR (1 = unweighted). Higher values emphasise noisy steps, which decide shape and position."""
    flip: bool = True
    """Mirror half of the samples."""
    zoom_out: float = 0.0
    """Share of an object's samples that show it smaller in the frame (as Custom Diffusion, Kumari et al. 2023). It helps prompts with
    several objects. Requires --crop center."""
    embedding_noise: float = 0.0
    """Norm of the noise on the learned embeddings during training, in multiples of their own norm (0 = off). It makes them work in other
    sentences and in longer training."""
    validate_every: int = 100
    """Steps between two validations; 0 = only at the end."""
    validate: tuple[str, ...] = ()
    """Validation prompts, {} = token. Default: one training-style prompt, one with an added attribute."""
    clip: str | None = None
    """CLIP (transformers folder or hub name) that scores the validations by image + 2.5 x text, to keep the best vectors. None = keep the
    last ones."""
    seed: Seed = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """Precision of the frozen model; auto: bf16 where the hardware has it, else fp32. Embeddings are float32."""
    compile: AutoOnOff = "auto"
    """torch.compile of the U-Net; auto: on CUDA, for a hundred steps or more."""
    low_memory: bool = False
    """Gradient checkpointing in the U-Net: less memory, a third slower."""
    log_every: int = 25
    """Steps between two readings of the loss."""
    save_every: int = 50
    """Steps between two checkpoints."""


def main(settings: Settings) -> None:
    """Learn the tokens and save their vectors; after a signal, leave only the checkpoint. Raises BadInput."""
    check(settings)
    concepts = concepts_of(settings)
    from accelerate import Accelerator  # slow to import

    from concepts.clip_scores import Scorer

    output_folder(settings.output)
    folder = output_folder(settings.run or RUNS / "+".join(concept.token.strip("<>") for concept in concepts), "--run")

    # the machine
    machine = detect(settings.device)
    precision = set_up(settings.precision, machine)
    accelerator = Accelerator(cpu=machine.device.type == "cpu")
    device = accelerator.device
    share = process_rows(settings.batch, accelerator.process_index, accelerator.num_processes)
    record = Record(settings, replace(machine, device=device))

    # the frozen model with its new tokens, and the images and sentences to learn from
    with record.timed("loading"):
        pipe = load_pipeline(settings.model, device, torch.bfloat16 if precision == "bf16" else torch.float32)
        scorer = Scorer.load(settings.clip, device) if settings.clip and accelerator.is_main_process else None
        inversion = TextualInversion(pipe, concepts, settings.seed)
        augmentation = Augmentation(settings.crop, settings.flip, settings.zoom_out, settings.embedding_noise)
        data = [ConceptData(pipe, concept, settings.seed, augmentation) for concept in concepts]
    if settings.crop == "center":
        pipe.vae.to("cpu")  # all images are encoded
    worthwhile = settings.compile == "on" or device.type == "cuda" and settings.steps >= 100
    compiled = worthwhile and should_compile(settings.compile, machine)
    prepare_frozen(pipe, precision, compiled, settings.low_memory)
    embeddings, fused = inversion.embeddings.learned, device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(embeddings.parameters(), settings.lr, weight_decay=0.0, fused=fused)

    # the run: continues from its checkpoint where there is one
    config = LoopConfig(
        "textual inversion",
        folder,
        settings.steps,
        settings.batch * len(concepts),
        LearningRate(settings.lr, warmup=max(1, settings.steps // 20), decay=0.5),
        log_every=settings.log_every,
        save_every=settings.save_every,
        compiled=compiled,
        elsewhere="--run OTHER",
    )
    validator = Validator(inversion, data, settings.validate, scorer, folder)
    facts = facts_of(settings, data) | {"model": weights_fingerprint(Path(pipe.name_or_path or settings.model))}
    trained = Trained(embeddings, optimizer, extra={"validator": validator}, average_gradients=True)
    run = TrainingRun(config, facts, trained, record, accelerator)
    losses: list[tuple[int, float]] = run.history.setdefault("losses", [])

    for step in run:
        # samples of every concept: latents, noise, timesteps, sentences
        batch = InversionBatch.concatenate([each.batch(step, share, settings.batch) for each in data])

        # the loss, a mean over each concept's samples and a sum over the concepts, and one optimizer step
        per_concept = len(batch) / len(concepts)
        parts = batch.split(settings.accumulate)
        part_losses = (inversion.loss(part, settings.max_loss_weight) * (len(part) / per_concept) for part in parts)
        with out_of_memory_advice(settings, step):
            run.update(part_losses, after_step=partial(inversion.cap_norms, settings.max_norm or math.inf))

        # now and then: read the loss; sample images with the tokens and keep the best vectors
        if run.every(settings.log_every):
            losses.append((run.step, record.metrics["loss"]))
        if run.is_main and run.every(settings.validate_every):
            with record.timed("validation"):
                validator.run(run.step, run.log)

    if run.is_main and run.done:
        for token, vectors in validator.chosen().items():
            path = file_of(settings.output, token)
            save_vectors(path, token, vectors, f"{settings.model}, {run.step} steps, seed {settings.seed}")
            print(f"{token}: {path}")
        if len(losses) > 1:
            steps, means = zip(*losses, strict=True)
            with decoration(folder / "loss.png"):
                line_figure(folder / "loss.png", steps, {"loss": {"mean": list(means)}}, "step", "Textual inversion")
        log(f"progress and record: {folder}")
    learned = [asdict(concept) for concept in concepts]
    run.finish(concepts=learned, precision=precision, losses=dict(losses), scores=validator.scores())


def check(settings: Settings) -> None:
    """Raise BadInput for numbers that make no sense."""
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
    """Return the concepts of the file, or the one that the flags describe; raise BadInput."""
    if settings.concepts:
        for name in ("images", "token", "init", "kind", "vectors"):
            if getattr(settings, name) != getattr(Settings, name):
                raise BadInput(f"--{name} and --concepts: give one of them")
        return read_concepts(settings.concepts)
    if not settings.images or not settings.init:
        raise BadInput("name the pictures and a word for what they show: --images DIR --init WORD (or --concepts FILE)")
    return [ConceptSet(settings.token, settings.images, settings.init, settings.kind, settings.vectors)]


def facts_of(settings: Settings, data: list[ConceptData]) -> dict[str, Any]:
    """Return what decides the vectors, apart from the model: a run may only continue with the same."""
    names = (
        "seed", "batch", "lr", "max_norm", "crop", "max_loss_weight", "flip", "zoom_out", "embedding_noise",
    )  # fmt: skip
    concepts = [each.concept for each in data]
    return {name: getattr(settings, name) for name in names} | {
        "concepts": [[concept.token, concept.vectors, concept.init, concept.kind] for concept in concepts],
        "images and sentences": [each.fingerprint for each in data],
    }


@contextmanager
def out_of_memory_advice(settings: Settings, step: int) -> Iterator[None]:
    """Raise BadInput that names the ways on if memory ends within the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        finer = [n for n in range(settings.accumulate + 1, settings.batch + 1) if settings.batch % n == 0]
        ways = [f"--accumulate {finer[0]}"] * bool(finer) + ["--low-memory"] * (not settings.low_memory)
        raise BadInput(
            f"out of memory at step {step:,} with --batch {settings.batch} in {settings.accumulate} parts:"
            f" try {' or '.join(ways) or 'a smaller --batch'}; the same command goes on from the last checkpoint"
        ) from None


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
