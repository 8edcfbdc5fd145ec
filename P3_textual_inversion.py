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
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch

from concepts.dataset import Augmentation, ConceptData, ConceptSet, Crop, InversionBatch, Kind, read_concepts
from concepts.embeddings import FOLDER, file_of, save_vectors
from concepts.inversion import TextualInversion, prepare_frozen, weights_fingerprint
from concepts.recipes import RECIPES, V1_WIDTH, InversionRecipe, RecipeName, recipe_name, recipe_values, resolve_recipe
from concepts.stable_diffusion import check_model, load_pipeline
from concepts.validation import Validator
from runtime.batches import is_out_of_memory
from runtime.cli import (
    BadInput,
    Seed,
    check_not_negative,
    check_positive,
    default_hint,
    log,
    run_script,
)
from runtime.device import DTYPES, AutoOnOff, Device, Precision, detect, set_up, should_compile
from runtime.files import ROOT, output_folder
from runtime.images import decoration, line_figure
from runtime.record import Record
from training.draws import process_rows
from training.loop import LoopConfig, Trained, TrainingRun
from training.schedule import LearningRate
from training.tracking import Track, check_tracker

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
    """Selects the training sentences and the recipe's values."""
    vectors: Annotated[int | None, default_hint(recipe_values("vectors"))] = None
    """Number of the token's vectors. More represent the images better and leave the prompt's other words less influence."""
    concepts: Path | None = None
    """JSON list of objects with images, token, init, kind and vectors, to learn several concepts in one run."""
    output: Path = FOLDER
    """Folder for learned_NAME.safetensors, one per token; other files there stay."""
    run: Path | None = None
    """Run folder: checkpoint, TensorBoard, validation images, record.json. None = runs/p3_textual_inversion/TOKENS."""
    recipe: RecipeName = "auto"
    """Values for the flags that you leave out. auto = v1 for Stable Diffusion v1 and hub names, small for narrower text encoders."""
    steps: Annotated[int | None, default_hint(recipe_values("steps"))] = None
    """Optimizer steps in all; a run may continue with more."""
    batch: Annotated[int | None, default_hint(recipe_values("batch"))] = None
    """Images of every concept per step, over all processes."""
    accumulate: int = 1
    """Parts that a batch is computed in, to save memory. 1 = all at once."""
    lr: Annotated[float | None, default_hint(recipe_values("lr"))] = None
    """Peak learning rate of AdamW, without weight decay."""
    max_norm: Annotated[float | None, default_hint(recipe_values("max_norm"))] = None
    """Limit each embedding's norm to this multiple of its initial word's, so that the rest of the prompt keeps its influence.
    0 = no limit."""
    crop: Crop = "center"
    """center = the middle square of each image, encoded once. random = another square at every step, encoded each time, which is slower."""
    max_loss_weight: Annotated[float | None, default_hint(recipe_values("max_loss_weight"))] = None
    """Cap on the loss weight 1 + 1/SNR (1 = unweighted). Higher values emphasise noisy steps, which decide shape and position."""
    flip: Annotated[bool | None, default_hint(recipe_values("flip"))] = None
    """Mirror half of the samples."""
    embedding_noise: Annotated[float | None, default_hint(recipe_values("embedding_noise"))] = None
    """Norm of the noise on the learned embeddings during training, as a multiple of their own norm (0 = off).
    With noise they work in more sentences and bear longer training."""
    validate_every: int = 100
    """Steps between two validations; 0 = only at the end."""
    validate: tuple[str, ...] = ()
    """Validation prompts, {} = token. Default: one like the training sentences, and one that adds an attribute."""
    clip: str | None = None
    """CLIP (transformers folder or hub name) that scores the validations by image + 2.5 x text, to keep the best vectors. None = keep the
    last ones."""
    seed: Seed = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """Precision of the frozen model. auto = bf16 where the hardware has it, else fp16 on CUDA, else fp32. Embeddings are float32."""
    compile: AutoOnOff = "auto"
    """torch.compile of the U-Net. auto = on CUDA, for a hundred steps or more."""
    low_memory: bool = False
    """Gradient checkpointing in the U-Net: less memory, a third slower."""
    log_every: int = 25
    """Steps between two readings of the loss."""
    save_every: int = 50
    """Steps between two checkpoints."""
    track: Track = None


def main(settings: Settings) -> None:
    """Learn the tokens and save their vectors. Stopped by a signal, leave only the checkpoint."""
    check(settings)
    output_folder(settings.output)
    dims = (
        check_model(settings.model) if Path(settings.model).exists() else None
    )  # a hub is asked once, when it is loaded
    name = recipe_name(settings.recipe, dims.text_width if dims else V1_WIDTH)
    concepts = concepts_of(settings, name)
    recipe = recipe_of(settings, name, concepts)
    from accelerate import Accelerator  # slow to import

    from concepts.clip_scores import Scorer

    folder = output_folder(settings.run or RUNS / "+".join(concept.token.strip("<>") for concept in concepts), "--run")

    # the machine
    machine = detect(settings.device)
    precision = set_up(settings.precision, machine)
    accelerator = Accelerator(mixed_precision="no", cpu=machine.device.type == "cpu")
    device = accelerator.device
    share = process_rows(recipe.batch, accelerator.process_index, accelerator.num_processes)
    record = Record(settings, replace(machine, device=device))

    # the frozen model with its new tokens, and the images and sentences to learn from
    with record.timed("loading"):
        pipe = load_pipeline(settings.model, device, DTYPES[precision])
        scorer = Scorer.load(settings.clip, device) if settings.clip and accelerator.is_main_process else None
        inversion = TextualInversion(pipe, concepts, settings.seed)
        augmentation = Augmentation(settings.crop, recipe.flip, recipe.embedding_noise)
        data = [ConceptData(pipe, concept, settings.seed, augmentation) for concept in concepts]
    if settings.crop == "center":
        pipe.vae.to("cpu")  # all images are encoded
    worthwhile = settings.compile == "on" or device.type == "cuda" and recipe.steps >= 100
    compiled = worthwhile and should_compile(settings.compile, machine)
    prepare_frozen(pipe, precision, compiled, settings.low_memory)
    embeddings, fused = inversion.embeddings.learned, device.type in ("cuda", "cpu")
    optimizer = torch.optim.AdamW(embeddings.parameters(), recipe.lr, weight_decay=0.0, fused=fused)

    # the run: continues from its checkpoint where there is one
    config = LoopConfig(
        "textual inversion",
        folder,
        recipe.steps,
        recipe.batch * len(concepts),
        LearningRate(recipe.lr, warmup=max(1, recipe.steps // 20), decay=0.5),
        log_every=settings.log_every,
        save_every=settings.save_every,
        compiled=compiled,
        elsewhere="--run OTHER",
        precision=precision,
        track=settings.track,
    )
    log(f"recipe {name}, with the flags: " + ", ".join(f"{key} {value}" for key, value in asdict(recipe).items()))
    validator = Validator(inversion, data, settings.validate, scorer, folder)
    facts = facts_of(settings, recipe, data) | {"model": weights_fingerprint(Path(pipe.name_or_path or settings.model))}
    trained = Trained(embeddings, optimizer, extra={"validator": validator}, average_gradients=True)
    run = TrainingRun(config, facts, trained, record, accelerator)
    losses: list[tuple[int, float]] = run.history.setdefault("losses", [])

    for step in run:
        # samples of every concept: latents, noise, timesteps, sentences
        batch = InversionBatch.concatenate([each.batch(step, share, recipe.batch) for each in data])

        # the loss, a mean over each concept's samples and a sum over the concepts, and one optimizer step
        per_concept = len(batch) / len(concepts)
        parts = batch.split(settings.accumulate)
        part_losses = (inversion.loss(part, recipe.max_loss_weight) * (len(part) / per_concept) for part in parts)
        with out_of_memory_advice(settings, recipe.batch, step):
            run.update(part_losses, after_step=partial(inversion.cap_norms, recipe.max_norm or math.inf))

        # now and then: read the loss; sample images with the tokens and keep the best vectors
        if run.every(settings.log_every) and "loss" in record.metrics:  # not if all steps so far were skipped
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
    run.finish(
        concepts=learned,
        recipe={"name": name} | asdict(recipe),
        precision=precision,
        losses=dict(losses),
        scores=validator.scores(),
    )


def check(settings: Settings) -> None:
    """Raise BadInput for flags that don't go together, and for numbers out of range unless a recipe sets them."""
    for name in ("images", "token", "init", "kind", "vectors"):
        if settings.concepts and getattr(settings, name) != getattr(Settings, name):
            raise BadInput(f"--{name} and --concepts: give one of them")
    if not settings.concepts and not (settings.images and settings.init):
        raise BadInput("name the pictures and a word for what they show: --images DIR --init WORD (or --concepts FILE)")
    check_tracker(settings.track)
    check_positive(settings, "accumulate", "save_every", "log_every")
    check_not_negative(settings, "seed", "validate_every")


def recipe_of(settings: Settings, name: str, concepts: Sequence[ConceptSet]) -> InversionRecipe:
    """Return the recipe of this run, overridden by the flags that are set. Raise BadInput for numbers out of range."""
    flags = {f.name: value for f in fields(InversionRecipe) if (value := getattr(settings, f.name)) is not None}
    recipe = resolve_recipe(name, {concept.kind for concept in concepts}, flags)
    check_positive(recipe, "steps", "batch", "lr")
    check_not_negative(recipe, "max_norm", "embedding_noise")
    if recipe.batch % settings.accumulate:
        raise BadInput(f"--accumulate {settings.accumulate}: does not divide --batch {recipe.batch}")
    if recipe.max_loss_weight < 1:
        raise BadInput(f"--max-loss-weight {recipe.max_loss_weight}: give 1 (none) or more")
    return recipe


def concepts_of(settings: Settings, recipe: str) -> list[ConceptSet]:
    """Return the concepts of the file, or the one that the flags describe. Without a number of vectors, it is the recipe's for the kind."""
    vectors = {kind: each.vectors for kind, each in RECIPES[recipe].items()}
    if settings.concepts:
        return read_concepts(settings.concepts, vectors)
    assert settings.images  # see `check`
    assert settings.init
    count = vectors[settings.kind] if settings.vectors is None else settings.vectors
    return [ConceptSet(settings.token, settings.images, settings.init, settings.kind, count)]


def facts_of(settings: Settings, recipe: InversionRecipe, data: list[ConceptData]) -> dict[str, Any]:
    """Return the settings and data that decide the learned vectors, apart from the model. A run may only continue with the same."""
    names = ("batch", "lr", "max_norm", "max_loss_weight", "flip", "embedding_noise")
    concepts = [each.concept for each in data]
    return {name: getattr(recipe, name) for name in names} | {
        "seed": settings.seed,
        "crop": settings.crop,
        "concepts": [[concept.token, concept.vectors, concept.init, concept.kind] for concept in concepts],
        "images and sentences": [each.fingerprint for each in data],
    }


@contextmanager
def out_of_memory_advice(settings: Settings, batch: int, step: int) -> Iterator[None]:
    """Raise BadInput, which names flags to try, if memory ends within the block."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        finer = [n for n in range(settings.accumulate + 1, batch + 1) if batch % n == 0]
        ways = [f"--accumulate {finer[0]}"] * bool(finer) + ["--low-memory"] * (not settings.low_memory)
        raise BadInput(
            f"out of memory at step {step:,} with --batch {batch} in {settings.accumulate} parts:"
            f" try {' or '.join(ways) or 'a smaller --batch'}; the same command goes on from the last checkpoint"
        ) from None


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
