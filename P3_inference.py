"""Draws prompts with learned tokens, such as "a <new1> in the style of <new2>", by Stable Diffusion v1.

  python P3_inference.py --input input.json --model sd-v1-4.ckpt --output out        25 pictures per prompt, as hw2_3.sh and the grader want
  python P3_inference.py --prompt "a <new1> next to a <new2>" --model DIR --output out --count 4
  python P3_inference.py --input input.json --model DIR --output out --dry-run       checks everything in seconds, draws nothing
  python P3_inference.py --input input.json --model DIR --output out --candidates 50 --clip CLIP --references pictures
  python P3_inference.py --layout layout.json --model DIR --output out                concepts in their places (P3_layout.py has the form)
  python P3_inference.py --layout auto --prompt "a <new1> next to a <new2>" --words dog cat --model DIR --output out --draw-layout a.png

Vectors of tokens are looked for in --embeddings, then in checkpoints/p3. Guidance: uncond + scale * (cond - uncond). Picture n of a prompt
has a seed of its own: it is the same in any batch. --candidates draws more and keeps the best by image + 2.5 x text score.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusion.guidance import Guidance
from P3_composition import Composed, Level, Means, compose
from P3_composition_report import layout_picture, levels_figure, means_of, scores_inside
from P3_drawing import Manner, Order, Painter, Solver, in_turn
from P3_embeddings import FOLDER, Vectors, find_vectors, install, require_token, require_width, tokens_in
from P3_input import PICTURES, Concept, find_pictures, picture_path, read_input
from P3_layout import Layout, auto_layout, read_layout
from P3_model import check_model, load_pipeline
from P3_output import check_disk, remove, stale_files
from P3_scores import Scorer, open_pictures, rank
from runtime.cli import BadInput, require_positive, run_script
from runtime.device import Choice, Machine, Precision, detect, set_up, should_compile
from runtime.figures import open_picture, save_picture
from runtime.files import output_folder, read_json
from runtime.generation import derived_seed
from runtime.record import Record

HERE = Path(__file__).resolve().parent
SIDE = 512  # of Stable Diffusion v1's pictures


@dataclass(frozen=True)
class Settings:
    """Flags."""

    model: str
    """Stable Diffusion v1: a diffusers folder, a hub name, or a single file."""
    output: Path
    """Folder: {key}/{prompt}/source{key}_prompt{prompt}_{n}.png with --input, {prompt}_{n}.png with --prompt."""
    input: Path | None = None
    """The course's input.json: tokens and prompts."""
    prompt: tuple[str, ...] = ()
    """Instead of --input: any prompts."""
    count: int = 4
    """Pictures of each --prompt."""
    layout: str | None = None
    """A json file that says which concept belongs where, or auto: the tokens of --prompt side by side."""
    level: Level = "conductor"
    """How concepts are kept apart where there is a layout: not at all (joint), by their words (regional), by branches too (conductor)."""
    words: tuple[str, ...] = ()
    """With --layout auto: ordinary words for the prompt's tokens, in their order; none given: object."""
    draw_layout: Path | None = None
    """Also writes the layout as a picture."""
    means: Means = Means()
    figure: Path | None = None
    """Also writes a figure: layout, joint, regional, conductor side by side, masks shown."""
    scores: bool = False
    """Also scores each concept inside its mask with --clip: text, and likeness to its pictures where the layout names them."""
    embeddings: tuple[Path, ...] = ()
    """Files and folders with learned tokens; checkpoints/p3 comes last."""
    solver: Solver = "dpm"
    """dpm: DPM-Solver++; ddim: eta 0."""
    steps: int = 25
    guidance: float = 7.5
    """Scale of classifier-free guidance."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Guidance only while t / T is in this range."""
    rescale: float = 0.0
    """0..1: pulls the contrast of guided pictures back."""
    negative: str = ""
    """What pictures should not show."""
    size: int | None = None
    """Height and width; None: the model's own."""
    candidates: int = 0
    """Pictures drawn per prompt, of which the best are kept; 0: as many as are kept."""
    clip: str = "openai/clip-vit-base-patch32"
    """The CLIP that chooses among candidates: a transformers folder or a hub name."""
    references: Path = HERE / "hw2_data" / "textual_inversion"
    """For --candidates with --input: folder with a folder of pictures per key."""
    batch: int = 0
    """Pictures at once; 0: on a GPU 64, or as many as memory allows; 8 on a CPU."""
    seed: int = 0
    device: str = "auto"
    """auto, cpu, cuda, cuda:N."""
    precision: Precision = "auto"
    """auto takes bf16 where the hardware has it."""
    compile: Choice = "auto"
    """torch.compile of the U-Net; auto: on CUDA, for fifty pictures or more."""
    dry_run: bool = False
    """Checks file, tokens, model, disk; draws nothing but --draw-layout."""
    record: Path = HERE / "runs" / "p3_inference" / "record.json"


@dataclass(frozen=True)
class Job:
    """One prompt: the files of its pictures, in order, and what chooses among candidates."""

    prompt: str
    files: tuple[Path, ...]
    seeds: tuple[int, ...]
    text: str
    """The prompt in ordinary words."""
    references: tuple[Path, ...] = ()
    """Pictures that candidates should be like."""
    layout: Layout | None = None

    @property
    def tokens(self) -> list[str]:
        """All that vectors are needed of."""
        texts = [self.prompt, *(self.layout.prompts if self.layout else ())]
        return [token for text in texts for token in tokens_in(text)]


def main(settings: Settings) -> None:
    """Checks all, then draws, then records; raises BadInput before anything is written."""
    check(settings)
    jobs = jobs_of(settings)
    machine = detect(settings.device)
    vectors = vectors_of(settings, jobs)
    stale = stale_files(settings.output, [path for job in jobs for path in job.files], bool(settings.input))
    check_disk(settings.output, bytes_needed(settings, jobs))
    if settings.dry_run:
        require_width(vectors, check_model(settings.model))
        tell(settings, machine, jobs, vectors)
        if settings.draw_layout and jobs[0].layout:
            save_picture(settings.draw_layout, layout_picture(jobs[0].layout))
        return
    record = Record(settings, machine)
    with record.timed("loading"):
        painter, scorer = prepare(settings, machine, vectors, sum(len(job.seeds) for job in jobs))
    if jobs[0].layout:
        jobs[0].layout.require_room(*painter.shape[1:])
    remove(stale, settings.output)
    with record.timed("drawing"):
        kept = draw_all(settings, painter, scorer, jobs)
    seconds = record.timings["drawing"] / sum(len(job.seeds) for job in jobs)
    record.metrics = {"pictures": kept, "seconds_per_picture": round(seconds, 4)}
    if jobs[0].layout:
        record.metrics |= about_layout(settings, painter, scorer, jobs[0], jobs[0].layout)
    record.save(settings.record)
    print(f"{kept} pictures of {len(jobs)} prompts in {settings.output}, {seconds:.2f} s each")


# ---------------------------------------------------------------- what is asked for


def check(settings: Settings) -> None:
    """Raises BadInput for flags that can't work, alone or together."""
    require_positive(settings, "count", "steps")
    from_file = settings.layout not in (None, "auto")
    if bool(settings.input) + bool(settings.prompt) + from_file != 1:
        raise BadInput("give either --input FILE or --prompt TEXT or --layout FILE")
    if settings.layout and (settings.input or len(settings.prompt) > 1):
        raise BadInput("--layout goes with a single --prompt, or with none")
    if settings.layout and (settings.interval != (0.0, 1.0) or settings.rescale):
        raise BadInput("--interval and --rescale are not available with --layout")
    if settings.layout and settings.compile == "on":
        raise BadInput("--compile on is not available with --layout, which changes the U-Net between steps")
    if not settings.layout and (settings.draw_layout or settings.figure or settings.scores):
        raise BadInput("--draw-layout, --figure and --scores need a --layout")
    if not 0 <= settings.means.align < float("inf"):
        raise BadInput(f"--align {settings.means.align}: give zero or more")
    if min(settings.seed, settings.batch, settings.candidates) < 0:
        raise BadInput("--seed, --batch and --candidates: give zero or more")
    if not 0 <= settings.interval[0] < settings.interval[1] <= 1 or not 0 <= settings.rescale <= 1:
        raise BadInput(f"--interval {settings.interval}, --rescale {settings.rescale}: give shares from 0 to 1, rising")
    wanted = PICTURES if settings.input else settings.count
    if 0 < settings.candidates < wanted:
        raise BadInput(f"--candidates {settings.candidates}: {wanted} are kept, so give more than that")


def jobs_of(settings: Settings) -> list[Job]:
    """Every prompt; raises BadInput."""
    if settings.input:
        found = [(concept, k) for concept in read_input(settings.input) for k in range(len(concept.prompts))]
        return [_graded_job(settings, concept, k) for concept, k in found]
    if settings.layout:
        return [_layout_job(settings)]
    files = [
        tuple(settings.output / f"{k}_{n}.png" for n in range(settings.count)) for k in range(len(settings.prompt))
    ]
    drawn = max(settings.candidates, settings.count)
    return [Job(text, files[k], _seeds(settings, (k,), drawn), text) for k, text in enumerate(settings.prompt)]


def _graded_job(settings: Settings, concept: Concept, k: int) -> Job:
    require_token(concept.token, f"{settings.input}, {concept.key!r}: token_name")
    files = tuple(picture_path(settings.output, concept.key, k, n) for n in range(PICTURES))
    seeds = _seeds(settings, (zlib.crc32(concept.key.encode()), k), max(settings.candidates, PICTURES))
    words = (
        concept.clip_prompts[k] if concept.clip_prompts else concept.prompts[k].replace(concept.token, concept.source)
    )
    pictures = settings.references / concept.key if settings.candidates else None
    return Job(concept.prompts[k], files, seeds, words, find_pictures(pictures) if pictures else ())


def _layout_job(settings: Settings) -> Job:
    if settings.layout == "auto":
        words = dict(zip(tokens_in(settings.prompt[0]), settings.words, strict=False))
        layout = auto_layout(settings.prompt[0], words)
    else:
        layout = read_layout(Path(str(settings.layout)))
    files = tuple(settings.output / f"{settings.level}_{n}.png" for n in range(settings.count))
    seeds = _seeds(settings, (0,), max(settings.candidates, settings.count))
    return Job(layout.joint, files, seeds, layout.prompt, layout=layout)


def _seeds(settings: Settings, key: tuple[int, ...], count: int) -> tuple[int, ...]:
    return tuple(derived_seed(settings.seed, *key, n) for n in range(count))


def vectors_of(settings: Settings, jobs: Sequence[Job]) -> Vectors:
    """Of all tokens in the prompts; raises BadInput that names the commands which learn those that are absent."""
    tokens = list(dict.fromkeys(token for job in jobs for token in job.tokens))
    places = [*settings.embeddings, *([FOLDER] if FOLDER.is_dir() else [])]
    found = find_vectors(tokens, places)
    if absent := [token for token in tokens if token not in found]:
        where = ", ".join(map(str, places)) or FOLDER
        commands = "\n".join(f"  {command}" for command in commands_for(settings, absent))
        raise BadInput(f"no vectors of {', '.join(absent)} in {where}; these commands learn them:\n{commands}")
    return found


def commands_for(settings: Settings, tokens: Sequence[str]) -> list[str]:
    """What to run for each token, as far as input.json tells."""
    concepts = {concept.token: concept for concept in read_input(settings.input)} if settings.input else {}
    commands = []
    for token in tokens:
        concept = concepts.get(token)
        style = concept is not None and any(f"style of {token}" in prompt for prompt in concept.prompts)
        images = settings.references / concept.key if concept else "FOLDER"
        word = "painting" if style else concept.source.split()[-1].lower() if concept else "WORD"
        command = f'python P3_textual_inversion.py --model "{settings.model}" --images "{images}" --token "{token}" --init {word}'
        commands.append(command + (" --kind style" if style else ""))
    return commands


# ---------------------------------------------------------------- a dry run


def bytes_needed(settings: Settings, jobs: Sequence[Job]) -> int:
    """At most: three bytes per pixel."""
    return 3 * (settings.size or SIDE) ** 2 * sum(len(job.files) for job in jobs)


def tell(settings: Settings, machine: Machine, jobs: Sequence[Job], vectors: Vectors) -> None:
    """What a dry run found."""
    drawn = sum(len(job.seeds) for job in jobs)
    print(f"{len(jobs)} prompts, {drawn} pictures to draw, {sum(len(job.files) for job in jobs)} to keep")
    for token, rows in vectors.items():
        print(f"{token}: {len(rows)} of width {rows.shape[1]}")
    print(f"{settings.model}: looks right; at most {bytes_needed(settings, jobs) / 1e6:.0f} MB of pictures")
    print(f"{drawn * passes_of(settings):,} passes of the U-Net, {expected_time(settings, machine, drawn)}")


def passes_of(settings: Settings | dict[str, Any]) -> int:
    """Of the U-Net, for one picture; guidance takes two per step."""
    given = settings if isinstance(settings, dict) else vars(settings)
    return int(given["steps"]) * (1 + (given["guidance"] != 1))


def expected_time(settings: Settings, machine: Machine, drawn: int) -> str:
    """As the last run of this model on this machine went."""
    if settings.record.is_file():
        last = read_json(settings.record)
        before, seconds = last["settings"], last["metrics"]["seconds_per_picture"]
        same = (last["machine"], last["device"]) == (machine.name, str(machine.device))
        if same and (before["model"], before["size"]) == (settings.model, settings.size):
            seconds *= drawn * passes_of(settings) / passes_of(before)
            return f"about {seconds / 60:.1f} minutes, as the last run here went"
    return "how long they take the first run here will tell"


# ---------------------------------------------------------------- drawing


def manner_of(settings: Settings) -> Manner:
    """How the flags want it."""
    guidance = Guidance(settings.guidance, settings.interval, settings.rescale)
    return Manner(settings.solver, settings.steps, guidance, settings.negative, settings.size)


def prepare(settings: Settings, machine: Machine, vectors: Vectors, drawn: int) -> tuple[Painter, Scorer | None]:
    """The model with its tokens, and the CLIP that chooses among candidates."""
    half = set_up(settings.precision, machine) == "bf16"
    pipe = load_pipeline(settings.model, machine.device, torch.bfloat16 if half else torch.float32)
    install(pipe, vectors)
    painter = Painter(pipe, manner_of(settings))
    assert painter.shape  # a size that the model can't draw shows here
    pipe.unet.to(memory_format=torch.channels_last)
    worth = settings.compile == "on" or machine.device.type == "cuda" and drawn >= 50 and not settings.layout
    if worth and should_compile(settings.compile, machine):
        pipe.unet.compile()
    return painter, Scorer.load(settings.clip, machine.device) if settings.candidates or settings.scores else None


def draw_all(settings: Settings, painter: Painter, scorer: Scorer | None, jobs: Sequence[Job]) -> int:
    """Draws and saves; returns how many pictures are kept."""
    output_folder(settings.output)
    on_gpu = painter.pipe.unet.device.type == "cuda"
    orders = [Order(job.prompt, seed) for job in jobs for seed in job.seeds]
    files = [path for job in jobs for path in job.files]
    layout = jobs[0].layout
    paint = partial(composed_pictures, painter, layout, settings) if layout else painter.paint
    pictures = in_turn(paint, orders, settings.batch, on_gpu)
    if not scorer or not settings.candidates:
        for path, (_, image) in zip(files, pictures, strict=True):
            save_picture(path, image)
        return len(files)
    for job in jobs:
        drawn = torch.stack([next(pictures)[1] for _ in job.seeds])
        for path, row in zip(job.files, best(scorer, job, drawn), strict=False):
            save_picture(path, drawn[row])
    return len(files)


def composed_pictures(painter: Painter, layout: Layout, settings: Settings, orders: Sequence[Order]) -> Tensor:
    """[N,3,H,W] uint8 of these seeds, concepts in their places."""
    return compose(painter, [Composed(layout, order.seed) for order in orders], settings.level, settings.means)


def about_layout(
    settings: Settings, painter: Painter, scorer: Scorer | None, job: Job, layout: Layout
) -> dict[str, object]:
    """Plan and figure as files, where asked for; scores per picture and concept."""
    if settings.draw_layout:
        save_picture(settings.draw_layout, layout_picture(layout))
    if settings.figure:
        levels_figure(settings.figure, painter, layout, job.seeds, settings.means)
    if not scorer or not settings.scores:
        return {}
    found = scores_inside(scorer, layout, torch.stack([open_picture(path) for path in job.files]))
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
