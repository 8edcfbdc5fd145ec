"""What P3_inference.py is asked for: its flags, the prompts with the files and seeds of their pictures, the vectors they need."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from concepts.composition.layout import Layout, auto_layout, read_layout
from concepts.composition.multipath import ConductorConfig, Level
from concepts.course_format import IMAGES_PER_PROMPT, CourseConcept, find_images, image_path, read_input
from concepts.embeddings import FOLDER, Vectors, find_vectors, require_token, tokens_in
from concepts.sampling import Solver
from runtime.cli import BadInput, check_positive
from runtime.device import AutoOnOff, Device, Precision
from runtime.files import ROOT
from runtime.seeds import derived_seed


@dataclass(frozen=True)
class Settings:
    """Flags."""

    model: str
    """Stable Diffusion v1: a diffusers folder, a hub name, or a single file."""
    output: Path
    """Folder: {key}/{prompt}/source{key}_prompt{prompt}_{n}.png with --input, {prompt}_{n}.png with --prompt, {level}_{n}.png with
    --layout."""
    input: Path | None = None
    """The course's input.json: tokens and prompts."""
    prompt: tuple[str, ...] = ()
    """Instead of --input: any prompts."""
    count: int = 4
    """Pictures of each --prompt, or of the --layout."""
    layout: str | None = None
    """A json file that says which concept belongs where, or auto: the tokens of --prompt side by side."""
    level: Level = "conductor"
    """How concepts are kept apart where there is a layout: not at all (joint), by their words (regional), by branches too (conductor)."""
    words: tuple[str, ...] = ()
    """With --layout auto: ordinary words for the prompt's tokens, in their order; none given: object."""
    draw_layout: Path | None = None
    """Also writes the layout as a picture."""
    means: ConductorConfig = ConductorConfig()
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
    guidance_rescale: float = 0.0
    """0..1: pulls the contrast of guided pictures back."""
    negative: str = ""
    """What pictures should not show."""
    size: int | None = None
    """Height and width; None: the model's own."""
    candidates: int = 0
    """Pictures drawn per prompt, of which the best are kept; 0: as many as are kept."""
    clip: str = "openai/clip-vit-base-patch32"
    """The CLIP that chooses among candidates and gives --scores: a transformers folder or a hub name."""
    references: Path = ROOT / "hw2_data" / "textual_inversion"
    """For --candidates with --input: folder with a folder of pictures per key."""
    batch: int = 0
    """Pictures at once; 0: on a GPU 64, or as many as memory allows; 8 on a CPU."""
    seed: int = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """auto takes bf16 where the hardware has it."""
    compile: AutoOnOff = "auto"
    """torch.compile of the U-Net; auto: on CUDA, for fifty pictures or more."""
    dry_run: bool = False
    """Checks file, tokens, model, disk; draws nothing but --draw-layout."""
    record: Path = ROOT / "runs" / "p3_inference" / "record.json"

    @property
    def needs_clip(self) -> bool:
        """Whether pictures are rated."""
        return bool(self.candidates or self.scores)


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


def check(settings: Settings) -> None:
    """Raises BadInput for flags that can't work, alone or together."""
    check_positive(settings, "count", "steps")
    if settings.layout == "auto" and not settings.prompt:
        raise BadInput("--layout auto needs a --prompt that holds the concepts' tokens")
    from_file = settings.layout not in (None, "auto")
    if bool(settings.input) + bool(settings.prompt) + from_file != 1:
        raise BadInput("give either --input FILE or --prompt TEXT or --layout FILE")
    if settings.layout and (settings.input or len(settings.prompt) > 1):
        raise BadInput("--layout goes with a single --prompt, or with none")
    if settings.layout and (settings.interval != (0.0, 1.0) or settings.guidance_rescale):
        raise BadInput("--interval and --guidance-rescale are not available with --layout")
    if settings.layout and settings.compile == "on":
        raise BadInput("--compile on is not available with --layout, which changes the U-Net between steps")
    if not settings.layout and (settings.draw_layout or settings.figure or settings.scores):
        raise BadInput("--draw-layout, --figure and --scores need a --layout")
    if settings.words and settings.layout != "auto":
        raise BadInput("--words go with --layout auto")
    settings.means.check()
    if not settings.layout and settings.means != ConductorConfig():
        raise BadInput(
            "--inject, --focus, --sketch, --background-steps, --collage, --align and --refine need a --layout"
        )
    if not math.isfinite(settings.guidance):
        raise BadInput(f"--guidance {settings.guidance}: give a number")
    if min(settings.seed, settings.batch, settings.candidates) < 0:
        raise BadInput("--seed, --batch and --candidates: give zero or more")
    if not 0 <= settings.interval[0] < settings.interval[1] <= 1 or not 0 <= settings.guidance_rescale <= 1:
        raise BadInput(
            f"--interval {settings.interval}, --guidance-rescale {settings.guidance_rescale}: give shares from 0 to 1, rising"
        )
    wanted = IMAGES_PER_PROMPT if settings.input else settings.count
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


def _graded_job(settings: Settings, concept: CourseConcept, k: int) -> Job:
    require_token(concept.token, f"{settings.input}, {concept.key!r}: token_name")
    files = tuple(image_path(settings.output, concept.key, k, n) for n in range(IMAGES_PER_PROMPT))
    seeds = _seeds(settings, (zlib.crc32(concept.key.encode()), k), max(settings.candidates, IMAGES_PER_PROMPT))
    words = (
        concept.clip_prompts[k] if concept.clip_prompts else concept.prompts[k].replace(concept.token, concept.source)
    )
    pictures = settings.references / concept.key if settings.candidates else None
    return Job(concept.prompts[k], files, seeds, words, find_images(pictures) if pictures else ())


def _layout_job(settings: Settings) -> Job:
    if settings.layout == "auto":
        tokens = tokens_in(settings.prompt[0])
        if len(settings.words) > len(tokens):
            raise BadInput(f"--words {' '.join(settings.words)}: the prompt has {len(tokens)} tokens")
        words = dict(zip(tokens, settings.words, strict=False))
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
