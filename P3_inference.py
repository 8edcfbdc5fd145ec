"""Draws prompts with learned tokens, such as "a <new1> in the style of <new2>", by Stable Diffusion v1.

  python P3_inference.py --input input.json --model sd-v1-4.ckpt --output out        25 pictures per prompt, as hw2_3.sh and the grader want
  python P3_inference.py --prompt "a <new1> next to a <new2>" --model DIR --output out --count 4
  python P3_inference.py --input input.json --model DIR --output out --dry-run       checks everything in seconds, draws nothing
  python P3_inference.py --input input.json --model DIR --output out --candidates 50 --clip CLIP --references pictures
  python P3_inference.py --layout layout.json --model DIR --output out                concepts in their places
  torchrun --nproc_per_node 4 P3_inference.py --input input.json --model DIR --output out      four GPUs share the pictures
  python P3_inference.py --layout auto --prompt "a <new1> next to a <new2>" --words dog cat --model DIR --output out --draw-layout a.png

Vectors of tokens are looked for in --embeddings, then in checkpoints/p3. Guidance: uncond + scale * (cond - uncond). Picture n of a prompt
has a seed of its own: it is the same in any batch. --candidates draws more and keeps the best by image + 2.5 x text score.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import get_args

import torch
from torch import Tensor

from concepts.clip_scores import Scorer, open_pictures, rank
from concepts.composition.layout import Layout
from concepts.composition.multipath import LayoutRequest, Level, compose, passes
from concepts.composition.scores import MOST, layout_picture, levels_figure, means_of, scores_inside
from concepts.course_format import remove, stale_files
from concepts.embeddings import Vectors, install, require_width
from concepts.jobs import Job, Settings, check, jobs_of, vectors_of
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler, generate_batches
from concepts.stable_diffusion import check_model, load_pipeline
from diffusion.guidance import Guidance
from runtime.cli import BadInput, run_script
from runtime.device import Machine, detect, set_up, should_compile
from runtime.distributed import Shard, sharing
from runtime.files import check_disk_space, check_writable_file, output_folder, read_json
from runtime.images import open_image, save_image
from runtime.record import Record

SIDE = 512  # of Stable Diffusion v1's pictures
TIMESTEPS = 1000  # of its schedule


def main(settings: Settings) -> None:
    """Checks all, then draws, then records; raises BadInput before anything is written."""
    check(settings)
    jobs = jobs_of(settings)
    machine = detect(settings.device)
    vectors = vectors_of(settings, jobs)
    stale = stale_files(settings.output, [path for job in jobs for path in job.files], bool(settings.input))
    check_disk_space(settings.output, bytes_needed(settings, jobs))
    check_figures(settings)
    if settings.dry_run:
        check_outline(settings, jobs, vectors)
        if settings.needs_clip:
            Scorer.load(settings.clip, torch.device("cpu"))
        print_plan(settings, machine, jobs, vectors)
        if settings.draw_layout and jobs[0].layout:
            save_image(settings.draw_layout, layout_picture(jobs[0].layout))
        return
    record = Record(settings, machine)
    with record.timed("loading"):
        painter, scorer = prepare(settings, machine, vectors, sum(len(job.seeds) for job in jobs))
    if jobs[0].layout:
        jobs[0].layout.check_resolution(*painter.shape[1:])
    with sharing() as shard:
        if shard.main:
            remove(stale, settings.output)
        with record.timed("drawing"):
            shares = shard.gather([draw_share(settings, painter, scorer, jobs, shard)])
        if shard.main:
            finish(settings, painter, scorer, jobs, record, shares)


def check_figures(settings: Settings) -> None:
    """Raises BadInput where a figure can't be written."""
    for flag, path in (("--draw-layout", settings.draw_layout), ("--figure", settings.figure)):
        if path:
            check_writable_file(path, flag)


def finish(
    settings: Settings,
    painter: StableDiffusionSampler,
    scorer: Scorer | None,
    jobs: Sequence[Job],
    record: Record,
    shares: list[int],
) -> None:
    """What the first process tells when all pictures are there."""
    drawn, kept = sum(len(job.seeds) for job in jobs), sum(len(job.files) for job in jobs)
    seconds = record.timings["drawing"] / drawn
    record.metrics = {
        "pictures": kept,
        "seconds_per_picture": round(seconds, 4),
        "passes_per_picture": passes_of(settings, jobs),
    }
    record.metrics |= {"processes": len(shares), "shares": shares}
    if jobs[0].layout:
        record.metrics |= about_layout(settings, painter, scorer, jobs[0], jobs[0].layout)
    record.save(settings.record)
    print(f"{kept} pictures of {len(jobs)} prompts in {settings.output}, {seconds:.2f} s each")


# ---------------------------------------------------------------- a dry run


def bytes_needed(settings: Settings, jobs: Sequence[Job]) -> int:
    """At most: three bytes per pixel."""
    return 3 * (settings.size or SIDE) ** 2 * sum(len(job.files) for job in jobs)


def check_outline(settings: Settings, jobs: Sequence[Job], vectors: Vectors) -> None:
    """Raises BadInput for vectors, a size, a number of steps or a region that don't suit the model."""
    outline = check_model(settings.model)
    manner_of(settings).check(TIMESTEPS)
    if outline:
        require_width(vectors, outline.width)
        shape = outline.shape(settings.size)
        if jobs[0].layout:
            jobs[0].layout.check_resolution(*shape[1:])


def print_plan(settings: Settings, machine: Machine, jobs: Sequence[Job], vectors: Vectors) -> None:
    """What a dry run found."""
    drawn = sum(len(job.seeds) for job in jobs)
    print(f"{len(jobs)} prompts, {drawn} pictures to draw, {sum(len(job.files) for job in jobs)} to keep")
    for token, rows in vectors.items():
        print(f"{token}: {len(rows)} of width {rows.shape[1]}")
    print(f"{settings.model}: looks right; at most {bytes_needed(settings, jobs) / 1e6:.0f} MB of pictures")
    passes = drawn * passes_of(settings, jobs)
    if settings.figure:
        passes += min(MOST, drawn) * sum(passes_of(replace(settings, level=level), jobs) for level in get_args(Level))
    print(f"{passes:,} passes of the U-Net, {expected_time(settings, machine, passes)}")


def passes_of(settings: Settings, jobs: Sequence[Job]) -> int:
    """Of the U-Net, for one picture; guidance and layouts take two per step, conductor has branches and a collage too."""
    layout = jobs[0].layout if settings.level != "joint" else None
    if layout:
        return passes(layout, settings.level, settings.steps, settings.means)
    return settings.steps * (2 if settings.guidance != 1 else 1)


def expected_time(settings: Settings, machine: Machine, passes: int) -> str:
    """As the last run of this model on this machine went."""
    if settings.record.is_file():
        last = read_json(settings.record)
        try:
            before, metrics = last["settings"], last["metrics"]
            seconds, counted = metrics["seconds_per_picture"], metrics.get("passes_per_picture")
        except (KeyError, TypeError):
            raise BadInput(f"--record {settings.record} is no record of this script's") from None
        same = (last["machine"], last["device"]) == (machine.name, str(machine.device))
        if same and counted and (before["model"], before["size"]) == (settings.model, settings.size):
            return f"about {seconds * passes / counted / 60:.1f} minutes, as the last run here went"
    return "how long they take the first run here will tell"


# ---------------------------------------------------------------- drawing


def manner_of(settings: Settings) -> SamplerConfig:
    """How the flags want it."""
    guidance = Guidance(settings.guidance, settings.interval, settings.guidance_rescale)
    return SamplerConfig(settings.solver, settings.steps, guidance, settings.negative, settings.size)


def prepare(
    settings: Settings, machine: Machine, vectors: Vectors, drawn: int
) -> tuple[StableDiffusionSampler, Scorer | None]:
    """The model with its tokens, and the CLIP that chooses among candidates."""
    half = set_up(settings.precision, machine) == "bf16"
    pipe = load_pipeline(settings.model, machine.device, torch.bfloat16 if half else torch.float32)
    install(pipe, vectors)
    painter = StableDiffusionSampler(pipe, manner_of(settings))
    assert painter.shape  # a size that the model can't draw shows here
    pipe.unet.to(memory_format=torch.channels_last)
    worth = settings.compile == "on" or machine.device.type == "cuda" and drawn >= 50 and not settings.layout
    if worth and should_compile(settings.compile, machine):
        pipe.unet.compile()
    return painter, Scorer.load(settings.clip, machine.device) if settings.needs_clip else None


def draw_share(
    settings: Settings, painter: StableDiffusionSampler, scorer: Scorer | None, jobs: Sequence[Job], shard: Shard
) -> int:
    """Draws and saves this process's pictures; returns how many it drew. Where there are candidates it has whole prompts."""
    output_folder(settings.output)
    on_gpu = painter.pipe.unet.device.type == "cuda"
    layout = jobs[0].layout
    paint = partial(composed_pictures, painter, layout, settings) if layout else painter.sample_images
    if not scorer or not settings.candidates:
        orders = [Request(job.prompt, seed) for job in jobs for seed in job.seeds]
        files = dict(zip(orders, (path for job in jobs for path in job.files), strict=True))
        drawn = 0
        for order, image in generate_batches(paint, orders, settings.batch, on_gpu, shard):
            save_image(files[order], image)
            drawn += 1
        return drawn
    mine = jobs[shard.rank :: shard.world]
    for job in mine:
        orders = [Request(job.prompt, seed) for seed in job.seeds]
        images = torch.stack([image for _, image in generate_batches(paint, orders, settings.batch, on_gpu)])
        for path, row in zip(job.files, best(scorer, job, images), strict=False):
            save_image(path, images[row])
    return sum(len(job.seeds) for job in mine)


def composed_pictures(
    painter: StableDiffusionSampler, layout: Layout, settings: Settings, orders: Sequence[Request]
) -> Tensor:
    """[N,3,H,W] uint8 of these seeds, concepts in their places."""
    composed = [LayoutRequest(layout, order.seed) for order in orders]
    return compose(painter, composed, settings.level, settings.means)


def about_layout(
    settings: Settings, painter: StableDiffusionSampler, scorer: Scorer | None, job: Job, layout: Layout
) -> dict[str, object]:
    """Plan and figure as files, where asked for; scores per picture and concept."""
    if settings.draw_layout:
        save_image(settings.draw_layout, layout_picture(layout))
    if settings.figure:
        levels_figure(settings.figure, painter, layout, job.seeds, settings.means)
    if not scorer or not settings.scores:
        return {}
    found = scores_inside(scorer, layout, torch.stack([open_image(path) for path in job.files]))
    for token, values in means_of(found).items():
        print(f"{token}: " + ", ".join(f"{kind} score {value:.2f}" for kind, value in values.items()))
    return {"concepts": {path.name: row for path, row in zip(job.files, found, strict=True)}}


def best(scorer: Scorer, job: Job, images: Tensor) -> list[int]:
    """Rows of images [N,3,H,W], best first."""
    features = scorer.encode(images)
    likeness = torch.zeros(len(images))
    if job.references:
        likeness = scorer.image_scores(features, scorer.encode(open_pictures(job.references)))
    return rank(likeness, scorer.text_scores(features, job.text)).tolist()


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
