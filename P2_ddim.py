"""Turns given noises into pictures by DDIM: the course's faces to rounding error, any eta, any step rule, any compatible model.

  python P2_ddim.py --noise face/noise --model face/UNet.pt --output out --reference face/GT
  python P2_ddim.py --seeds 0-9 --eta 0.5 --to-uint8 clamp              the shipped face model: no download needed
  python P2_ddim.py --model checkpoints/p1_digits.safetensors --digit 3
  python P2_ddim.py --model google/ddpm-ema-celebahq-256 --seeds 0-3   faces from the hub
  python P2_ddim.py --model face/UNet.pt --export face/diffusers       the same network as a diffusers folder
  torchrun --nproc_per_node 2 P2_ddim.py --noise face/noise --model face/UNet.pt       two GPUs share the noises

Step rules, for 50 of 1,000 steps: homework visits 981, 961 .. 1 and ends at abar[0], x0 clamped; ddim visits 980 .. 0 and ends at
abar 1, no clamp; diffusers is that with x0 clamped; trailing visits 999 .. 19, so it starts at pure noise.
Where eta > 0, picture NN draws its own noise stream from --seed and its name: alone, in any batch, it is the same picture.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from faces.models import Model, export
from faces.noises import Noise as Noise
from faces.noises import save_noises
from faces.noises import seeded_noises as seeded_noises
from faces.sampling import (
    PASS_BELOW,
    DdimConfig,
    SamplingArgs,
    compare,
    open_model,
    open_noises,
    resolve_recipe,
    sample_all,
    to_image,
)
from runtime.cli import BadInput, is_main_process, run_script
from runtime.device import Machine, detect
from runtime.distributed import Shard, sharing
from runtime.files import ROOT, output_folder, require_file
from runtime.images import open_image, save_image
from runtime.record import Record


@dataclass(frozen=True)
class Settings(SamplingArgs):
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
    record: Path = ROOT / "runs" / "p2_ddim" / "record.json"


# ---------------------------------------------------------------- sampling


# ---------------------------------------------------------------- comparison


def read_references(folder: Path, noises: Sequence[Noise]) -> dict[str, Tensor]:
    """{stem: [3,H,W] uint8}; raises BadInput when a picture has no partner or another size."""
    found = {}
    for noise in noises:
        path = folder / f"{noise.stem}.png"
        found[noise.stem] = open_image(require_file(path, "--reference needs a picture for every noise"))
        if found[noise.stem].shape != noise.x.shape:
            size, ours = found[noise.stem].shape, noise.x.shape
            raise BadInput(f"{path}: {size[2]}x{size[1]}, the noise makes {ours[2]}x{ours[1]}")
    return found


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


def check_folders(settings: Settings) -> None:
    """Raises BadInput where pictures or noises would land among what they come from or are compared with."""
    given = {"--noise": settings.noise, "--reference": settings.reference}
    for flag, folder in given.items():
        for target, path in (("--output", settings.output), ("--save-noise", settings.save_noise)):
            if folder and path and folder.resolve() == path.resolve():
                raise BadInput(f"{target} {path}: the same folder as {flag}, name another")


def main(settings: Settings) -> None:
    """Draws, writes each picture as its batch finishes, compares, records."""
    check_folders(settings)
    machine = detect(settings.device)
    model = open_model(settings, machine)
    if settings.export:
        if not is_main_process():
            return None
        export(model, settings.export)
        return print(f"{settings.export}: a diffusers folder; use it as --model")
    recipe = resolve_recipe(settings, model, settings.eta)
    noises = open_noises(settings, model)
    references = read_references(settings.reference, noises) if settings.reference else {}
    output_folder(settings.output)
    if settings.save_noise and is_main_process():
        save_noises(settings.save_noise, noises)
    with sharing() as shard:
        draw_share(settings, machine, model, recipe, noises, references, shard)
    return None


def draw_share(
    settings: Settings,
    machine: Machine,
    model: Model,
    recipe: DdimConfig,
    noises: Sequence[Noise],
    references: dict[str, Tensor],
    shard: Shard,
) -> None:
    """This process's pictures; the first one prints and records what all of them found."""
    record, table, stems = Record(settings, machine), {}, []
    with record.timed("drawing"):
        for noise, image in sample_all(model, noises, recipe, settings.batch, "drawing", shard):
            picture = to_image(image, settings.to_uint8)
            save_image(settings.output / f"{noise.stem}.png", picture)
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
