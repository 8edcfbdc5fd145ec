"""Turn noises into images by DDIM, or pictures into noises, with the course's face model or another: any eta and step rule.

  python P2_ddim.py --noise hw2_data/face/noise --model hw2_data/face/UNet.pt --output out --reference hw2_data/face/GT
  python P2_ddim.py --seeds 0-9 --eta 0.5 --to-uint8 clamp              the shipped face model: no download needed
  python P2_ddim.py --model checkpoints/p1_digits.safetensors --digit 3
  python P2_ddim.py --model google/ddpm-ema-celebahq-256 --seeds 0-3   faces from the hub
  python P2_ddim.py --model hw2_data/face/UNet.pt --export out/diffusers       the same network as a diffusers folder
  torchrun --nproc_per_node 2 P2_ddim.py --noise hw2_data/face/noise --model hw2_data/face/UNet.pt       two GPUs share the noises
  python P2_ddim.py --invert photos --output out/noise                  pictures into noises, which the next line draws again
  python P2_ddim.py --noise out/noise --rule bdia --to-uint8 clamp
  python P2_ddim.py --mix 0=0.5,1=0.3,2=0.2 --to-uint8 clamp            the face of a weighted mean of three noises

Step rules, for 50 of 1,000 steps:
  homework    visits 981, 961 .. 1 and ends at alpha_bar[0], x0 clamped
  ddim        visits 980, 960 .. 0 and ends at alpha_bar = 1, no clamp
  diffusers   as ddim, x0 clamped
  trailing    visits 999, 979 .. 19 and so starts at pure noise, x0 clamped
  bdia        visits the timesteps of homework, no clamp. Each step starts from the last two states, and can be undone

--invert runs the steps of a rule in reverse, at guidance 1. It starts from the picture (-1..1) as the state at alpha_bar[0].
  bdia, or no --rule   exact: writes x_T as NN.pt, and x_T with the state after it as NN.pair.safetensors.
                       --noise --rule bdia reads both. Without the pair, x_T does not lead back to the picture.
  ddim                 approximate: writes x_T as NN.pt. --noise --rule ddim needs nothing else.

To draw these noises, give the --steps of the inversion and --to-uint8 clamp.

With eta > 0, each image has a stream of random numbers, seeded by --seed and the noise's name. The batch does not change an image.
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from faces.inversion import at_guidance_1, invert_all, read_pictures
from faces.models import Model, export
from faces.noises import SEEDS, Noise, mix, open_noises, save_noises, with_pairs
from faces.sampling import PASS_BELOW, SamplingArgs, compare, make_config, open_model, sample_all, to_image
from runtime.cli import BadInput, check_not_negative, is_main_process, log, run_script
from runtime.device import detect
from runtime.distributed import sharing
from runtime.files import ROOT, check_writable_folder, list_files, output_folder, require_file
from runtime.images import open_image, save_image
from runtime.record import Record


@dataclass(frozen=True)
class Settings(SamplingArgs):
    """Flags of sampling, inversion and their outputs."""

    output: Path = Path("runs/p2_ddim/pictures")
    """Folder for one PNG per noise, or with --invert for the noises. Files of the same names are replaced, others stay."""
    eta: float = 0.0
    """Fresh noise per step, 0..1: 0 = none, so the first noise decides the image; 1 = as random as DDPM."""
    reference: Path | None = None
    """Folder of PNGs named as the noises, to compare with: MSE on 0..255 (PASS below 20), largest difference. None = no comparison."""
    save_noise: Path | None = None
    """Folder for the noises as NN.pt, as --noise reads them. None = not saved."""
    invert: Path | None = None
    """Folder of pictures to turn into noises in --output; no image is drawn. Other sizes are resized. None = draw images."""
    mix: str | None = None
    """Draw only mix.png, from the mean of noises with weights such as 0=0.5,1=0.3,2=0.2 (any sum). None = draw each noise."""
    export: Path | None = None
    """New folder to save the face model to in diffusers' format (safetensors), without sampling. None = sample."""
    record: Path = ROOT / "runs" / "p2_ddim" / "record.json"
    """JSON file for settings, versions, timings and metrics."""


def main(settings: Settings) -> None:
    """Sample an image for each noise, write it as its batch finishes, compare it with its reference, record the run."""
    # Outputs must not mix with what they come from or are compared with
    check_not_negative(settings, "batch")
    sources = {"--noise": settings.noise, "--reference": settings.reference, "--invert": settings.invert}
    for source, folder in sources.items():
        for flag, path in (("--output", settings.output), ("--save-noise", settings.save_noise)):
            if folder and path and folder.resolve() == path.resolve():
                raise BadInput(f"{flag} {path}: the same folder as {source}, name another")
    if settings.invert:
        settings = settings_of_inversion(settings)

    # The model, which --export saves under diffusers' names
    machine = detect(settings.device)
    record = Record(settings, machine)
    model = open_model(settings, machine)
    if settings.export:
        if is_main_process():
            export(model, settings.export)
            print(f"{settings.export}: a diffusers folder; use it as --model")
        return
    if settings.invert:
        invert(settings, settings.invert, model, record)
        return

    # All input is read before the first file is written
    config = make_config(model, settings.rule, settings.steps, settings.eta, settings.seed)
    noises = open_noises(model, settings.noise, settings.seeds, settings.size)
    if settings.noise and config.steps.two_states:
        noises = with_pairs(noises, settings.noise, config.steps)
    if settings.mix is not None:
        noises = [mix(noises, settings.mix)]
    references = read_references(settings.reference, noises) if settings.reference else {}
    if settings.save_noise:
        check_writable_folder(settings.save_noise, "--save-noise")
    output_folder(settings.output)
    if settings.save_noise and is_main_process():
        save_noises(settings.save_noise, noises, config.steps)

    # Every process samples its share of the noises; the first one reports for all
    rows: dict[str, dict[str, float | bool]] = {}
    count = 0
    with sharing() as shard:
        with record.timed("drawing"):
            for noise, x0 in sample_all(model, noises, config, settings.batch, "drawing", shard):
                image = to_image(x0, settings.to_uint8)
                save_image(settings.output / f"{noise.stem}.png", image)
                count += 1
                if references:
                    rows[noise.stem] = compare(image, references[noise.stem])
            shares = shard.gather([count])
        rows = dict(sorted(shard.gather(list(rows.items()))))
        record.metrics = {"pictures": len(noises), "shape": list(noises[0].x.shape), "reference": rows}
        record.metrics |= {"processes": shard.world, "shares": shares}
        if shard.main:
            record.save(settings.record)
            if rows:
                print_table(rows)
            print(f"{len(noises)} pictures in {settings.output} ({record.timings['drawing']:.1f} s)")


def settings_of_inversion(settings: Settings) -> Settings:
    """Return the settings for --invert: rule ddim if given, else bdia; guidance 1. Raise BadInput for flags that do not go with it."""
    if settings.eta:
        raise BadInput(
            f"--eta {settings.eta} and --invert: fresh noise in every step leaves no way back, leave --eta out"
        )
    for name in ("noise", "mix", "reference", "save_noise", "export"):
        if getattr(settings, name) is not None:
            raise BadInput(f"--{name.replace('_', '-')} and --invert, which draws nothing: give one of them")
    if settings.seeds != SEEDS:
        raise BadInput(f"--seeds {settings.seeds} and --invert {settings.invert}: give one of them")
    if settings.rule in ("diffusers", "trailing"):
        raise BadInput(f"--rule {settings.rule} clamps x0, which can't be undone: --invert takes bdia or ddim")
    return at_guidance_1(replace(settings, rule="ddim" if settings.rule == "ddim" else "bdia"))


def invert(settings: Settings, folder: Path, model: Model, record: Record) -> None:
    """Write the noise of each picture in `folder` as its batch finishes, record the run, and print the command for the way back."""
    config = make_config(model, settings.rule, settings.steps, 0.0, settings.seed)
    pictures = read_pictures(folder, model, settings.size)
    output_folder(settings.output)
    if settings.rule == "bdia" and settings.precision != "fp32":
        log(f"warning: --precision {settings.precision}: the way back is some grey levels off; in fp32 it is exact")
    lengths: dict[str, float] = {}
    with sharing() as shard:
        with record.timed("inverting"):
            for noise in invert_all(model, pictures, config, settings.batch, "inverting", shard):
                save_noises(settings.output, [noise], config.steps)
                lengths[noise.stem] = float(noise.x.square().mean().sqrt())
            lengths = dict(sorted(shard.gather(list(lengths.items()))))
        record.metrics = {"noises": len(lengths), "length": lengths, "processes": shard.world}
        if shard.main:
            record.save(settings.record)
            flags = ["--noise", str(settings.output), "--rule", settings.rule, "--to-uint8", "clamp"]
            for name in ("model", "steps", "digit", "domain", "guidance", "precision"):
                if (value := getattr(settings, name)) != getattr(Settings, name):
                    flags += [f"--{name}", str(value)]
            print(f"{len(lengths)} noises in {settings.output} ({record.timings['inverting']:.1f} s)")
            print(f"to draw them: python P2_ddim.py {shlex.join(flags)}")


def read_references(folder: Path, noises: Sequence[Noise]) -> dict[str, Tensor]:
    """Return {stem: reference image [3,H,W] uint8}; raise BadInput for a noise without a reference or with one of another size."""
    references = {}
    files = {path.stem: path for path in list_files(folder, {".png"})} if folder.is_dir() else {}
    for noise in noises:
        path = files.get(noise.stem, folder / f"{noise.stem}.png")
        image = open_image(require_file(path, "--reference needs a picture for every noise"))
        if image.shape != noise.x.shape:
            _, height, width = image.shape
            raise BadInput(f"{path}: {width}x{height}, the noise makes {noise.x.shape[2]}x{noise.x.shape[1]}")
        references[noise.stem] = image
    return references


def print_table(rows: dict[str, dict[str, float | bool]]) -> None:
    """Print a line per image, and the mean MSE."""
    print(f"{'picture':<12}{'MSE':>12}{'largest':>9}  below {PASS_BELOW:.0f}")
    for stem, row in rows.items():
        print(f"{stem:<12}{row['mse']:>12.4f}{row['largest']:>9.0f}  {'PASS' if row['pass'] else 'FAIL'}")
    mean = sum(row["mse"] for row in rows.values()) / len(rows)
    passed = sum(bool(row["pass"]) for row in rows.values())
    print(f"{'mean':<12}{mean:>12.4f}{'':>9}  {passed} of {len(rows)} pass")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
