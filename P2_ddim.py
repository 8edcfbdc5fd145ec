"""Turns given noises into pictures by DDIM: the course's faces to rounding error, any eta, any step rule, any compatible model.

  python P2_ddim.py --noise face/noise --model face/UNet.pt --output out --reference face/GT
  python P2_ddim.py --seeds 0-9 --eta 0.5 --rescale clamp              the shipped face model: no download needed
  python P2_ddim.py --model checkpoints/p1_digits.safetensors --digit 3
  python P2_ddim.py --model google/ddpm-ema-celebahq-256 --seeds 0-3   faces from the hub
  python P2_ddim.py --model face/UNet.pt --export face/diffusers       the same network as a diffusers folder
  torchrun --nproc_per_node 2 P2_ddim.py --noise face/noise --model face/UNet.pt       two GPUs share the noises

Step rules, for 50 of 1,000 steps: homework visits 981, 961 .. 1 and ends at abar[0], x0 clamped; ddim visits 980 .. 0 and ends at
abar 1, no clamp; diffusers is that with x0 clamped; trailing visits 999 .. 19, so it starts at pure noise.
Where eta > 0, picture NN draws its own noise stream from --seed and its name: alone, in any batch, it is the same picture.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from diffusion.noise import generators
from diffusion.samplers import ddim
from diffusion.steps import Rule, Steps, step_rule
from P2_model import SHIPPED_FACES, Labels, Model, export, load_model
from P2_noises import Noise as Noise  # for miniature/train_faces.py, as the next one
from P2_noises import parse_seeds, read_noises, save_noises
from P2_noises import seeded_noises as seeded_noises
from runtime.cli import BadInput, leads, progress, run_script
from runtime.device import Choice, Device, Machine, detect, set_up, should_compile
from runtime.figures import open_picture, save_picture
from runtime.files import output_folder, require_file
from runtime.generation import ALONE, Shard, derived_seed, even_batch, in_batches, sharing
from runtime.record import Record

Rescale = Literal["minmax", "clamp"]
HERE = Path(__file__).resolve().parent
PASS_BELOW = 20.0  # the grader's bar: mean squared error on 0..255


@dataclass(frozen=True)
class Recipe:
    """How every picture of a run is drawn."""

    steps: Steps
    eta: float
    seed: int


@dataclass(frozen=True)
class Drawing:
    """The flags that P2_ddim.py and P2_report.py share."""

    model: str = str(SHIPPED_FACES)
    """The course's UNet.pt, a diffusers folder (the shipped faces of 64x64) or hub name with a UNet2DModel, or a P1 checkpoint."""
    noise: Path | None = None
    """Folder of NN.pt tensors, [C,H,W] or [1,C,H,W]; one picture per file, of the same stem."""
    seeds: str = "0-9"
    """Without --noise: the noises of these seeds, such as 0-9 or 3,5,8."""
    size: int | None = None
    """Height and width with --seeds; None: the model's own."""
    steps: int = 50
    rule: Rule = "homework"
    """Which timesteps are visited and how the last one ends (see above)."""
    rescale: Rescale = "minmax"
    """How a picture gets to 0..255: by its own least and largest value (the course), or from -1..1."""
    seed: int = 0
    """Of the noise that eta > 0 adds."""
    digit: int | None = None
    """P1 checkpoints: 0..9; None: any."""
    domain: Literal["mnistm", "svhn", "any"] = "any"
    """P1 checkpoints."""
    guidance: float | None = None
    """P1 checkpoints: uncond + scale * (cond - uncond); None: the checkpoint's own."""
    batch: int = 0
    """Pictures at once; 0: all on a GPU, halved when memory runs out; four of 256x256, or as many pixels, on a CPU."""
    precision: Literal["fp32", "tf32", "bf16"] = "fp32"
    """fp32 is what grading needs."""
    compile: Choice = "off"
    """torch.compile; a minute at the start, and in fp32 on a CPU no gain at all (measured)."""
    device: Device = "auto"


@dataclass(frozen=True)
class Settings(Drawing):
    """Flags."""

    output: Path = Path("runs/p2_ddim/pictures")
    """Folder for one PNG per noise; files of the same names are replaced, others stay."""
    eta: float = 0.0
    """0: the noise alone decides; 1: as random as DDPM."""
    reference: Path | None = None
    """Folder of pictures of the same stems to compare with: MSE, largest difference, PASS below 20."""
    save_noise: Path | None = None
    """Also writes the noises there as NN.pt, as --noise reads them."""
    export: Path | None = None
    """Only saves the face model there as a diffusers folder (safetensors), and draws nothing."""
    record: Path = HERE / "runs" / "p2_ddim" / "record.json"


# ---------------------------------------------------------------- sampling


@torch.inference_mode()
def sample(
    noises: Sequence[Noise], model: Model, recipe: Recipe, watch: Callable[[int, Tensor], None] | None = None
) -> Tensor:
    """One batch: [B,C,H,W] float32 on the CPU, not yet scaled to a picture."""
    device = next(model.network.parameters()).device
    x = torch.stack([noise.x for noise in noises]).to(device, memory_format=torch.channels_last)
    streams = generators([derived_seed(recipe.seed, *noise.stem.encode()) for noise in noises])
    seen: dict[str, Any] = {"watch": watch} if watch else {}
    return ddim(model.denoiser(len(noises)), x, model.schedule, recipe.steps, streams, recipe.eta, **seen).cpu()


def sample_all(
    model: Model, noises: Sequence[Noise], recipe: Recipe, batch: int, title: str, shard: Shard = ALONE
) -> Iterator[tuple[Noise, Tensor]]:
    """(noise, [C,H,W] float32) one by one, as batches of one shape finish; 0 sizes them to the machine. Of several processes each gets
    its share of the batches."""
    batch = even_batch(len(noises), batch or shard.largest(len(noises), largest_batch(model, noises[0].x)))
    noises = [noises[row] for row in shard.rows(len(noises), batch)]
    total = -(-len(noises) // batch) * len(recipe.steps.pairs)
    with progress(None, title, total=total, unit="step", leave=False) as bar:  # type: ignore[arg-type]
        work = partial(sample, model=model, recipe=recipe, watch=lambda t, x: bar.update() and None)
        for chunk, images in in_batches(work, noises, batch):
            yield from zip(chunk, images, strict=False)  # the padding has no partner


def largest_batch(model: Model, x: Tensor) -> int:
    """All at once on a GPU, where a batch too large is halved; on a CPU, which would swap, four pictures of 256x256."""
    on_cpu = next(model.network.parameters()).device.type == "cpu"
    return max(1, 4 * 256**2 // (x.shape[1] * x.shape[2])) if on_cpu else 10**9


def to_picture(image: Tensor, rescale: Rescale) -> Tensor:
    """[C,H,W] float -> uint8: to 0..1 by the picture's own least and largest value, or from -1..1; x 255 + 0.5, floor."""
    low, high = (image.min(), image.max()) if rescale == "minmax" else (image.new_tensor(-1.0), image.new_tensor(1.0))
    unit = (image.clamp(low, high) - low) / (high - low).clamp(min=1e-5)
    return (unit * 255 + 0.5).clamp(0, 255).to(torch.uint8)


# ---------------------------------------------------------------- comparison


def read_references(folder: Path, noises: Sequence[Noise]) -> dict[str, Tensor]:
    """{stem: [3,H,W] uint8}; raises BadInput when a picture has no partner or another size."""
    found = {}
    for noise in noises:
        path = folder / f"{noise.stem}.png"
        found[noise.stem] = open_picture(require_file(path, "--reference needs a picture for every noise"))
        if found[noise.stem].shape != noise.x.shape:
            size, ours = found[noise.stem].shape, noise.x.shape
            raise BadInput(f"{path}: {size[2]}x{size[1]}, the noise makes {ours[2]}x{ours[1]}")
    return found


def compare(image: Tensor, reference: Tensor) -> dict[str, float | bool]:
    """Mean squared error on 0..255, largest pixel difference, and whether the grader passes it; both uint8."""
    difference = image.double() - reference.double()
    mse = float(difference.square().mean())
    return {"mse": mse, "largest": float(difference.abs().max()), "pass": mse < PASS_BELOW}


def print_table(rows: dict[str, dict[str, float | bool]]) -> None:
    """A line per picture, and the mean."""
    print(f"{'picture':<12}{'MSE':>12}{'largest':>9}  below {PASS_BELOW:.0f}")
    for stem, row in rows.items():
        print(f"{stem:<12}{row['mse']:>12.4f}{row['largest']:>9.0f}  {'PASS' if row['pass'] else 'FAIL'}")
    passed = sum(bool(row["pass"]) for row in rows.values())
    print(
        f"{'mean':<12}{sum(row['mse'] for row in rows.values()) / len(rows):>12.4f}{'':>9}  {passed} of {len(rows)} pass"
    )


# ---------------------------------------------------------------- the command


def resolve_recipe(drawing: Drawing, model: Model, eta: float) -> Recipe:
    """Steps, eta and seed; raises BadInput for those that make no sense."""
    if not 0 <= eta <= 1:
        raise BadInput(f"--eta {eta}: must lie in 0 .. 1")
    if drawing.batch < 0:
        raise BadInput(f"--batch {drawing.batch}: must be above zero, or 0 for automatic")
    try:
        return Recipe(step_rule(drawing.rule, len(model.schedule), drawing.steps), eta, drawing.seed)
    except ValueError as error:
        raise BadInput(f"--steps: {error}") from None


def check_folders(settings: Settings) -> None:
    """Raises BadInput where pictures or noises would land among what they come from or are compared with."""
    given = {"--noise": settings.noise, "--reference": settings.reference}
    for flag, folder in given.items():
        for target, path in (("--output", settings.output), ("--save-noise", settings.save_noise)):
            if folder and path and folder.resolve() == path.resolve():
                raise BadInput(f"{target} {path}: the same folder as {flag}, name another")


def open_model(drawing: Drawing, machine: Machine) -> Model:
    """The model that the flags name, in their precision."""
    precision = set_up(drawing.precision, machine)
    labels = Labels(drawing.digit, drawing.domain, drawing.guidance)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model = load_model(drawing.model, machine.device, dtype, labels)
    if should_compile(drawing.compile, machine):
        model.network.compile()
    return model


def open_noises(drawing: Drawing, model: Model) -> list[Noise]:
    """Those of --noise, else those of --seeds."""
    if drawing.noise:
        return read_noises(drawing.noise, model)
    return seeded_noises(parse_seeds(drawing.seeds), model, drawing.size)


def main(settings: Settings) -> None:
    """Draws, writes each picture as its batch finishes, compares, records."""
    check_folders(settings)
    machine = detect(settings.device)
    model = open_model(settings, machine)
    if settings.export:
        if not leads():
            return None
        export(model, settings.export)
        return print(f"{settings.export}: a diffusers folder; use it as --model")
    recipe = resolve_recipe(settings, model, settings.eta)
    noises = open_noises(settings, model)
    references = read_references(settings.reference, noises) if settings.reference else {}
    output_folder(settings.output)
    if settings.save_noise and leads():
        save_noises(settings.save_noise, noises)
    with sharing() as shard:
        draw_share(settings, machine, model, recipe, noises, references, shard)
    return None


def draw_share(
    settings: Settings,
    machine: Machine,
    model: Model,
    recipe: Recipe,
    noises: Sequence[Noise],
    references: dict[str, Tensor],
    shard: Shard,
) -> None:
    """This process's pictures; the first one prints and records what all of them found."""
    record, table, stems = Record(settings, machine), {}, []
    with record.timed("drawing"):
        for noise, image in sample_all(model, noises, recipe, settings.batch, "drawing", shard):
            picture = to_picture(image, settings.rescale)
            save_picture(settings.output / f"{noise.stem}.png", picture)
            stems.append(noise.stem)
            if references:
                table[noise.stem] = compare(picture, references[noise.stem])
        shares = shard.gather([len(stems)])
    table = dict(sorted(shard.gather(list(table.items()))))
    record.metrics = {"pictures": len(noises), "shape": list(noises[0].x.shape), "reference": table}
    record.metrics |= {"processes": shard.world, "shares": shares}
    if not shard.main:
        return
    record.save(settings.record)
    if table:
        print_table(table)
    print(f"{len(noises)} pictures in {settings.output} ({record.timings['drawing']:.1f} s)")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
