"""Samples images of prompts with learned tokens, such as "a <new1> in the style of <new2>", by Stable Diffusion v1.

  python P3_inference.py --input input.json --model sd-v1-4.ckpt --output out        25 images per prompt, as hw2_3.sh and the grader want
  python P3_inference.py --prompt "a <new1> next to a <new2>" --model DIR --output out --count 4
  python P3_inference.py --input input.json --model DIR --output out --dry-run       checks everything in seconds, samples nothing
  python P3_inference.py --input input.json --model DIR --output out --candidates 50 --clip CLIP --references pictures
  python P3_inference.py --layout layout.json --model DIR --output out                concepts in their places
  python P3_inference.py --prompt "a <new1> on a bench" --model DIR --output out --attention "<new1>" bench      where these words act
  python P3_inference.py --between "<fish>" "<cup>" --prompt "a photo of a {}" --count 7 --model DIR --output out --figure row.png
  torchrun --nproc_per_node 4 P3_inference.py --input input.json --model DIR --output out      four GPUs share the images
  python P3_inference.py --layout auto --prompt "a <new1> next to a <new2>" --words dog cat --model DIR --output out --draw-layout a.png

Token embeddings are searched in --embeddings, then in checkpoints/p3. Guidance: uncond + scale * (cond - uncond). Image n of a prompt has
its own seed: it is the same in any batch. --candidates samples more and keeps the best by image + 2.5 x text score.
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import torch
from torch import Tensor

from concepts.attention import AttentionSampler, save_sheet, sheet_path
from concepts.clip_scores import Scorer, open_images, rank
from concepts.composition.layout import Layout, auto_layout, read_layout
from concepts.composition.multipath import ConductorConfig, LayoutRequest, Level, compose, passes
from concepts.composition.scores import (
    FIGURE_ROWS,
    attention_figure,
    draw_layout,
    levels_figure,
    mean_scores,
    scores_inside,
)
from concepts.course_format import IMAGES_PER_PROMPT, remove, stale_files
from concepts.embeddings import (
    TokenSearch,
    add_names,
    composed,
    install,
    require_width,
    tokenize,
    tokens_in,
    word_positions,
)
from concepts.jobs import Job, between_jobs, between_vectors, find_job_vectors, graded_jobs, layout_job, prompt_jobs
from concepts.sampling import Request, SamplerConfig, Solver, StableDiffusionSampler, generate_batches
from concepts.stable_diffusion import check_model, load_pipeline, load_tokenizer
from diffusion.guidance import Guidance
from runtime.cli import BadInput, Seed, check_fractions, check_positive, run_script
from runtime.device import (
    DTYPES,
    AutoOnOff,
    Device,
    Machine,
    Precision,
    detect,
    set_up,
    should_compile,
    to_channels_last,
)
from runtime.distributed import Shard, sharing
from runtime.files import ROOT, check_disk_space, check_writable_file, check_writable_folder, output_folder, read_json
from runtime.images import labelled_grid, open_image, save_image
from runtime.record import Record

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

SIZE = 512  # of Stable Diffusion v1's images
TIMESTEPS = 1000  # of its schedule
MOST_IMAGES = 100_000  # of a prompt, whose names and seeds are held in memory at once
MOST_BETWEEN = 100  # images between two tokens, which one figure shows
COMPILE_COUNT = 50  # images from which on compiling pays


@dataclass(frozen=True)
class Settings:
    """Flags of sampling with learned tokens, and of its outputs."""

    model: str
    """Stable Diffusion v1: a diffusers folder, a hub name, or a single file."""
    output: Path
    """Folder: {key}/{prompt}/source{key}_prompt{prompt}_{n}.png with --input, {prompt}_{n}.png with --prompt, {level}_{n}.png with
    --layout, between_{n}.png with --between."""
    input: Path | None = None
    """The course's input.json: tokens and prompts."""
    prompt: tuple[str, ...] = ()
    """Instead of --input: one or more prompts."""
    count: int = 4
    """Images of each --prompt, or of the --layout. With --between: images from the first token to the second, both included."""
    between: tuple[str, str] | None = None
    """Two learned tokens, which take the place of {} in the --prompt.
    The images change from the first to the second, all with one seed. None = off."""
    layout: str | None = None
    """JSON file that gives each concept its place (concepts/composition/layout.py). None = no layout.
    auto = the tokens of --prompt side by side."""
    level: Level = "conductor"
    """How a layout's concepts are kept apart. joint = not at all. regional = attention inside a region is only to its concept's prompt.
    conductor = also by a branch of the U-Net per concept."""
    words: tuple[str, ...] = ()
    """With --layout auto: ordinary words for the prompt's tokens, in their order. Default: object."""
    draw_layout: Path | None = None
    """PNG file for an image of the layout. None = not written."""
    config: ConductorConfig = ConductorConfig()
    figure: Path | None = None
    """PNG file for a figure. With --layout: layout, joint, regional, conductor side by side, with the regions' borders. None = not written.
    With --layout and --attention: joint and the --level, each with the words' maps. With --between: all images in a row."""
    attention: tuple[str, ...] = ()
    """Words or learned tokens of the prompt. Also write {image}_attention.png: the image, and where it attends to each of them, from blue
    (least) to red (most). () = off."""
    scores: bool = False
    """Also score each concept inside its mask with --clip: text, and similarity to its images if the layout names them."""
    embeddings: tuple[Path, ...] = ()
    """Files and folders with learned tokens, searched before checkpoints/p3."""
    sampler: Solver = "dpm"
    """dpm = DPM-Solver++ (2M). sde = its stochastic form, which mends errors of small models. ddim = DDIM at eta 0."""
    steps: int = 25
    """Sampling steps."""
    guidance: float = 7.5
    """Scale of classifier-free guidance."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Apply guidance only while t / T is in this range."""
    guidance_rescale: float = 0.0
    """0..1: reduces the contrast that guidance adds. 0 = off."""
    negative: str = ""
    """Negative prompt: what images should not show."""
    size: int | None = None
    """Height and width in pixels. None = the model's own."""
    candidates: int = 0
    """Images sampled per prompt, of which the best by --clip are kept: --count, or 25 with --input. 0 = as many as are kept."""
    clip: str = "openai/clip-vit-base-patch32"
    """The CLIP for --candidates and --scores: a transformers folder or a hub name."""
    references: Path = ROOT / "hw2_data" / "textual_inversion"
    """For --candidates with --input: folder with a folder of reference images per key."""
    batch: int = 0
    """Images at once. 0 = on a GPU 64, or as many as memory allows; 8 on a CPU."""
    seed: Seed = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """auto = bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    compile: AutoOnOff = "auto"
    """torch.compile of the U-Net. auto = on CUDA, for fifty images or more without --layout and --attention."""
    dry_run: bool = False
    """Check files, tokens, model and disk space, and sample nothing. Only --draw-layout is written."""
    record: Path = ROOT / "runs" / "p3_inference" / "record.json"
    """JSON record of the run."""


def main(settings: Settings) -> None:
    """Check everything before anything is written; sample; score; record."""
    check(settings)
    jobs = jobs_of(settings)
    layout = jobs[0].layout
    machine = detect(settings.device)
    texts = [*(text for job in jobs for text in job.texts), settings.negative]
    search = find_job_vectors(texts, settings.embeddings, settings.model, settings.input, settings.references)
    if settings.between:
        search.vectors |= between_vectors(search.vectors, settings.between, settings.count)
    files = [each for job in jobs for path in job.files for each in (path, sheet_path(path))]
    stale = stale_files(settings.output, files, bool(settings.input))
    check_disk_space(settings.output, bytes_needed(settings, jobs))
    for folder in {path.parent for job in jobs for path in job.files}:
        check_writable_folder(folder)
    record = Record(settings, machine)
    for flag, path in (("--draw-layout", settings.draw_layout), ("--figure", settings.figure)):
        if path:
            check_writable_file(path, flag, [".png"])
    if settings.dry_run:
        dry_run(settings, jobs, search, machine)
        return

    # the model with its tokens, and the CLIP
    count = sum(len(job.seeds) for job in jobs)
    with record.timed("loading"):
        pipe = load_pipeline(settings.model, machine.device, DTYPES[set_up(settings.precision, machine)])
        install(pipe, search.vectors)
        check_words(pipe.tokenizer, settings, jobs)
        sampler = StableDiffusionSampler(pipe, sampler_config(settings))
        if settings.attention:
            sampler = AttentionSampler.of(pipe, sampler.config, settings.attention)
        shape = sampler.shape  # raises BadInput for a size that the model doesn't support
        if layout:
            layout.check_resolution(*shape[1:])
        to_channels_last(pipe.unet, machine.device)
        can_compile = not layout and not settings.attention
        pays = settings.compile == "on" or machine.device.type == "cuda" and count >= COMPILE_COUNT and can_compile
        if pays and should_compile(settings.compile, machine):
            pipe.unet.compile()
        scorer = Scorer.load(settings.clip, machine.device) if settings.candidates or settings.scores else None

    def sample(requests: Sequence[Request]) -> Tensor:
        if layout is None:
            images = sampler.sample_images(requests)
        else:
            layout_requests = [LayoutRequest(layout, request.seed) for request in requests]
            images = compose(sampler, layout_requests, settings.level, settings.config)
        return sampler.with_maps(images) if isinstance(sampler, AttentionSampler) else images

    with sharing() as shard:
        if shard.main:
            remove(stale, settings.output)
        with record.timed("drawing"):
            output_folder(settings.output)
            if scorer and settings.candidates:
                mine = save_best(sample, scorer, jobs[shard.rank :: shard.world], settings.batch, machine)
            else:
                mine = save_all(sample, jobs, settings, machine, shard)
            shares = shard.gather([mine])

        if shard.main:
            seconds, kept = record.timings["drawing"] / count, sum(len(job.files) for job in jobs)
            record.metrics = {
                "pictures": kept,
                "seconds_per_picture": round(seconds, 4),
                "passes_per_picture": passes_per_image(settings, layout, settings.level),
                "processes": len(shares),
                "shares": shares,
                "embeddings": search.files,
            }
            if layout and scorer and settings.scores:
                record.metrics["concepts"] = score_concepts(scorer, layout, jobs[0].files)
            record.save(settings.record)
            print(f"{kept} pictures of {len(jobs)} prompts in {settings.output}, {seconds:.2f} s each", flush=True)
            if layout and settings.draw_layout:
                save_image(settings.draw_layout, draw_layout(layout))
            if settings.attention:
                print(f"where {', '.join(settings.attention)} act: {settings.output}/*_attention.png", flush=True)
            if layout and settings.figure and isinstance(sampler, AttentionSampler):
                levels = figure_levels(settings)
                attention_figure(settings.figure, sampler, layout, jobs[0].seeds[0], levels, settings.config)
            elif layout and settings.figure:
                levels_figure(settings.figure, sampler, layout, jobs[0].seeds, settings.config)
            if settings.between and settings.figure:
                images = torch.stack([open_image(job.files[0]) for job in jobs])
                fractions = [f"{n / (len(jobs) - 1):.2f}" for n in range(len(jobs))]
                labelled_grid(settings.figure, images, [""], fractions, " to ".join(settings.between), inch=1.2)


# ---------------------------------------------------------------- the flags


def check(settings: Settings) -> None:
    """Raise BadInput for flags that can't work, alone or together."""
    check_positive(settings, "count", "steps")
    if settings.between:
        words = " ".join(settings.between)
        if settings.input or settings.layout or settings.candidates:
            raise BadInput(f"--between {words}: not available with --input, --layout or --candidates")
        if len(settings.prompt) != 1 or "{}" not in settings.prompt[0]:
            raise BadInput(f"--between {words}: give a single --prompt, with {{}} in the place of the tokens")
        if composed(settings.between[0]) == composed(settings.between[1]):
            raise BadInput(f"--between {words}: give two different tokens")
        if not 2 <= settings.count <= MOST_BETWEEN:
            raise BadInput(f"--count {settings.count}: --between takes 2 to {MOST_BETWEEN} images")
    if settings.attention:
        words = " ".join(settings.attention)
        if settings.input or settings.between or settings.candidates:
            raise BadInput(f"--attention {words}: not available with --input, --between or --candidates")
        if settings.compile == "on":
            raise BadInput(f"--compile on is not available with --attention {words}, which changes the U-Net's layers")
    if settings.layout == "auto" and not settings.prompt:
        raise BadInput("--layout auto needs a --prompt that holds the concepts' tokens")
    from_file = settings.layout not in (None, "auto")
    if bool(settings.input) + bool(settings.prompt) + from_file != 1:
        raise BadInput("give either --input FILE or --prompt TEXT or --layout FILE")
    if settings.layout and (settings.input or len(settings.prompt) > 1):
        raise BadInput("--layout goes with a single --prompt, or with none")
    if settings.layout and settings.compile == "on":
        raise BadInput("--compile on is not available with --layout, which changes the U-Net between steps")
    figure = settings.figure and not settings.between
    if not settings.layout and (settings.draw_layout or figure or settings.scores):
        raise BadInput("--draw-layout, --figure and --scores need a --layout (--figure: or --between)")
    if settings.input and settings.count != Settings.count:
        raise BadInput(f"--count {settings.count}: --input takes {IMAGES_PER_PROMPT} images of every prompt")
    if not settings.layout and settings.level != Settings.level:
        raise BadInput(f"--level {settings.level} needs a --layout")
    if settings.words and settings.layout != "auto":
        raise BadInput("--words go with --layout auto")
    settings.config.check()
    if not settings.layout and settings.config != ConductorConfig():
        raise BadInput(
            "--inject, --focus, --sketch, --background-steps, --collage, --align and --refine need a --layout"
        )
    if not math.isfinite(settings.guidance):
        raise BadInput(f"--guidance {settings.guidance}: give a number")
    if min(settings.seed, settings.batch, settings.candidates) < 0:
        raise BadInput("--seed, --batch and --candidates: give zero or more")
    if not 0 <= settings.interval[0] < settings.interval[1] <= 1:
        raise BadInput(f"--interval {settings.interval}: give shares from 0 to 1, rising")
    check_fractions(settings, "guidance_rescale")
    for flag, images in (("--count", settings.count), ("--candidates", settings.candidates)):
        if images > MOST_IMAGES:
            raise BadInput(f"{flag} {images}: at most {MOST_IMAGES:,} of a prompt")
    kept = IMAGES_PER_PROMPT if settings.input else settings.count
    if 0 < settings.candidates < kept:
        raise BadInput(f"--candidates {settings.candidates}: {kept} are kept, so give more than that")


def jobs_of(settings: Settings) -> list[Job]:
    """Return a job per prompt; raise BadInput for a file or a prompt that can't be used."""
    output, count, candidates, seed = settings.output, settings.count, settings.candidates, settings.seed
    if settings.input:
        return graded_jobs(settings.input, output, settings.references, candidates, seed)
    if settings.between:
        return between_jobs(settings.prompt[0], settings.between, output, count, seed)
    if settings.layout is None:
        return prompt_jobs(settings.prompt, output, count, candidates, seed)
    if settings.layout != "auto":
        layout = read_layout(Path(settings.layout))
    else:
        tokens = tokens_in(settings.prompt[0])
        if len(settings.words) > len(tokens):
            raise BadInput(f"--words {' '.join(settings.words)}: the prompt has {len(tokens)} tokens")
        layout = auto_layout(settings.prompt[0], dict(zip(tokens, settings.words, strict=False)))
    return [layout_job(layout, settings.level, output, count, candidates, seed)]


def check_words(tokenizer: CLIPTokenizer, settings: Settings, jobs: Sequence[Job]) -> None:
    """Raise BadInput for a word of --attention that no prompt of a job contains.

    The prompts are those of the job's layout. At level joint, or without a layout, it is the job's one prompt.
    """
    for job in jobs if settings.attention else ():
        prompts = job.layout.prompts if job.layout and settings.level != "joint" else [job.prompt]
        present = word_positions(tokenizer, prompts, settings.attention).amax((0, 1))
        for word, is_present in zip(settings.attention, present.tolist(), strict=True):
            if not is_present:
                raise BadInput(f"--attention {word}: no such word in {' or '.join(map(repr, prompts))}")


def figure_levels(settings: Settings) -> list[Level]:
    """Return the levels that --figure shows of a layout: all of them, or with --attention only `joint` and that of --level."""
    return list(dict.fromkeys(("joint", settings.level))) if settings.attention else list(get_args(Level))


def sampler_config(settings: Settings) -> SamplerConfig:
    """Return the sampler that the flags describe."""
    guidance = Guidance(settings.guidance, settings.interval, settings.guidance_rescale)
    return SamplerConfig(settings.sampler, settings.steps, guidance, settings.negative, settings.size)


# ---------------------------------------------------------------- a dry run


def dry_run(settings: Settings, jobs: Sequence[Job], search: TokenSearch, machine: Machine) -> None:
    """Check model, texts, size, regions and CLIP without loading Stable Diffusion. Print plan and expected time, write --draw-layout."""
    layout = jobs[0].layout
    dims = check_model(settings.model)
    sampler_config(settings).check(TIMESTEPS)
    if dims:
        require_width(search.vectors, dims.text_width)
        shape = dims.latent_shape(settings.size)
        if layout:
            layout.check_resolution(*shape[1:])
    if tokenizer := load_tokenizer(settings.model):
        add_names(tokenizer, {token: len(rows) for token, rows in search.vectors.items()})
        tokenize(tokenizer, list(dict.fromkeys([*(text for job in jobs for text in job.texts), settings.negative])))
        check_words(tokenizer, settings, jobs)
    else:
        print(f"{settings.model}: its tokenizer is not on this machine, the texts' lengths are unchecked")
    if settings.candidates or settings.scores:
        Scorer.load(settings.clip, torch.device("cpu"))

    count, kept = sum(len(job.seeds) for job in jobs), sum(len(job.files) for job in jobs)
    print(f"{len(jobs)} prompts, {count} pictures to draw, {kept} to keep")
    for token, file in search.files.items():
        print(f"{token}: {len(search.vectors[token])} of width {search.vectors[token].shape[1]}, from {file}")
    print(f"{settings.model}: looks right; at most {bytes_needed(settings, jobs) / 1e6:.0f} MB of pictures")

    total = count * passes_per_image(settings, layout, settings.level)
    if settings.figure and layout:
        rows = 1 if settings.attention else min(FIGURE_ROWS, count)
        total += rows * sum(passes_per_image(settings, layout, level) for level in figure_levels(settings))
    expected = "how long they take the first run here will tell"
    if seconds := seconds_per_pass(settings, machine):
        expected = f"about {seconds * total / 60:.1f} minutes, as the last run here went"
    print(f"{total:,} passes of the U-Net, {expected}")

    if settings.draw_layout and layout:
        save_image(settings.draw_layout, draw_layout(layout))


def bytes_needed(settings: Settings, jobs: Sequence[Job]) -> int:
    """Return the most bytes that the images take on the disk, at three per pixel. With --attention it includes the sheets."""
    cells = 2 + len(settings.attention) if settings.attention else 1
    return 3 * (settings.size or SIZE) ** 2 * cells * sum(len(job.files) for job in jobs)


def passes_per_image(settings: Settings, layout: Layout | None, level: Level) -> int:
    """Return how many batch rows the U-Net computes for one image, over all steps.

    They are two per step with guidance, and one with guidance 1. A layout takes two or more: branches and a collage add rows.
    """
    if layout and level != "joint":
        return passes(layout, level, settings.steps, settings.config)
    return settings.steps * (2 if settings.guidance != 1 else 1)


def seconds_per_pass(settings: Settings, machine: Machine) -> float | None:
    """Return the last recorded run's seconds per row of the U-Net.

    None without a record, and for a run with another model, image size or machine.
    """
    if not settings.record.is_file():
        return None
    last = read_json(settings.record)
    try:
        flags, metrics = last["settings"], last["metrics"]
        seconds, counted = metrics["seconds_per_picture"], metrics.get("passes_per_picture")
        same_machine = (last["machine"], last["device"]) == (machine.name, str(machine.device))
        same_model = (flags["model"], flags["size"]) == (settings.model, settings.size)
    except (KeyError, TypeError):
        raise BadInput(f"--record {settings.record} is no record of this script's") from None
    return seconds / counted if same_machine and same_model and counted else None


# ---------------------------------------------------------------- sampling and scoring


def save_all(
    sample: Callable[[Sequence[Request]], Tensor],
    jobs: Sequence[Job],
    settings: Settings,
    machine: Machine,
    shard: Shard,
) -> int:
    """Sample and save this process's images; return how many.

    With --attention, `sample` returns each image with its maps, which are saved as a sheet.
    """
    files = {Request(job.prompt, seed): path for job in jobs for seed, path in zip(job.seeds, job.files, strict=True)}
    count = 0
    for request, image in generate_batches(sample, list(files), settings.batch, machine.device.type == "cuda", shard):
        path = files[request]
        if settings.attention:
            save_sheet(sheet_path(path), image, settings.attention, request.prompt)
            image = image[0]
        save_image(path, image)
        count += 1
    return count


def save_best(
    sample: Callable[[Sequence[Request]], Tensor], scorer: Scorer, jobs: Sequence[Job], batch: int, machine: Machine
) -> int:
    """Sample all candidates of each job, and save its best ones to its files, best first; return how many were sampled.

    The score is image + 2.5 x text score. The image score is 0 for a job without references.
    """
    for job in jobs:
        requests = [Request(job.prompt, seed) for seed in job.seeds]
        batches = generate_batches(sample, requests, batch, machine.device.type == "cuda")
        images = torch.stack([image for _, image in batches])
        features = scorer.encode(images)
        image_scores = torch.zeros(len(images))
        if job.references:
            image_scores = scorer.image_scores(features, scorer.encode(open_images(job.references)))
        best_first = rank(image_scores, scorer.text_scores(features, job.text)).tolist()
        for path, row in zip(job.files, best_first, strict=False):
            save_image(path, images[row])
    return sum(len(job.seeds) for job in jobs)


def score_concepts(scorer: Scorer, layout: Layout, files: Sequence[Path]) -> dict[str, object]:
    """Print each concept's mean scores inside its mask; return {file name: its scores}."""
    scores = scores_inside(scorer, layout, torch.stack([open_image(path) for path in files]))
    for token, values in mean_scores(scores).items():
        print(f"{token}: " + ", ".join(f"{kind} score {value:.2f}" for kind, value in values.items()))
    return {path.name: row for path, row in zip(files, scores, strict=True)}


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
