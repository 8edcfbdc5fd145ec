"""The models that P2 can sample from, behind one interface, recognised by content and not by name.

* The course's UNet.pt: a bare state dict with the tensors of diffusers' UNet2DModel under other names.
* A folder or hub repository in diffusers' layout: a UNet2DModel, and the schedule of its scheduler if it has one.
* A P1 checkpoint: digits of 28x28, or the images that it was trained on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from diffusion.guidance import Denoise, Guidance
from diffusion.schedule import Prediction, Schedule, linear
from faces.course_unet import load_course_unet
from P1_model import Network, load_network
from runtime.cli import BadInput
from runtime.device import to_channels_last
from runtime.files import ROOT, foreign_file, list_files, output_folder, read_object, safetensors_metadata
from runtime.hub import first_line, is_hub_name, only_variant, quiet_libraries

if TYPE_CHECKING:
    from diffusers.models.unets.unet_2d import UNet2DModel

SHIPPED_FACES = ROOT / "checkpoints" / "miniature" / "faces"
PREDICTIONS: dict[str, Prediction] = {"epsilon": "eps", "v_prediction": "v"}


@dataclass(frozen=True)
class Labels:
    """Labels and guidance scale for a P1 checkpoint; other models take none. Digit None and domain "any" are null labels."""

    digit: int | None = None
    domain: str = "any"
    guidance: float | None = None  # None = the checkpoint's


@dataclass(frozen=True)
class Model:
    """A network ready to sample from.

    `denoiser(batch)` returns a function (x [batch,C,H,W], t) -> prediction, eps or v, of the shape of x. Both are float32.
    """

    name: str
    network: nn.Module
    denoiser: Callable[[int], Denoise]
    schedule: Schedule
    shape: tuple[int, int, int]  # of the noise that a seed draws
    stride: int  # height and width must be multiples of it; 0: exactly `shape`

    def shape_error(self, shape: tuple[int, ...]) -> str:
        """Return why noise of shape [C,H,W] does not fit, or an empty string."""
        if not self.stride:
            return "" if shape == self.shape else f"the model takes {list(self.shape)}"
        if len(shape) != 3 or shape[0] != self.shape[0]:
            return f"the model takes [{self.shape[0]},H,W] or [1,{self.shape[0]},H,W]"
        fits = all(side > 0 and side % self.stride == 0 for side in shape[1:])
        return "" if fits else f"height and width must be multiples of {self.stride}"


def load_model(source: str, device: torch.device, dtype: torch.dtype, labels: Labels | None = None) -> Model:
    """Load the file, folder or hub repository `source`, to compute in `dtype` (float32, bfloat16 or float16), without gradients.

    Raise BadInput for a file of another kind, and for labels that the model does not take.
    """
    path = Path(source)
    if not path.exists() and is_hub_name(source) and not path.suffix.startswith((".p", ".s")):
        path = download(source)
    if path.is_dir():
        unet, schedule = load_folder(path)
    elif is_digit_network(path):
        return digit_model(source, load_network(path, device), dtype, labels or Labels())
    else:
        unet, schedule = load_course_unet(path), linear(1000)
    if labels and labels != Labels():
        raise BadInput(f"--digit, --domain and --guidance are for P1 checkpoints, {source} takes no labels")
    return face_model(source, unet, device, dtype, schedule)


def is_digit_network(path: Path) -> bool:
    """Return whether a file is a P1 checkpoint, by its header; raise BadInput if it does not exist."""
    if not path.is_file():
        raise BadInput(
            f"--model {path} does not exist: give UNet.pt, a diffusers folder, a hub name or a P1 checkpoint"
        )
    return "network" in safetensors_metadata(path)


def face_model(name: str, unet: UNet2DModel, device: torch.device, dtype: torch.dtype, schedule: Schedule) -> Model:
    """Return a UNet2DModel as a Model; it is moved to `device` and `dtype` in place."""
    unet.eval().requires_grad_(False)
    to_channels_last(unet, device, dtype)

    def denoise(x: Tensor, t: int) -> Tensor:
        times = torch.full((len(x),), t, device=device)  # filled on the device: no copy, no sync
        output: Tensor = unet(x.to(dtype), times, return_dict=False)[0]
        return output.float()

    side = int(unet.config["sample_size"] or 256)
    stride = 2 ** (len(unet.config["block_out_channels"]) - 1)
    return Model(name, unet, lambda batch: denoise, schedule, (int(unet.config["in_channels"]), side, side), stride)


def digit_model(name: str, network: Network, dtype: torch.dtype, labels: Labels) -> Model:
    """Return a P1 checkpoint as a Model that gives all images the same labels; raise BadInput for labels that it lacks."""
    spec = network.spec
    if labels.digit is not None and not 0 <= labels.digit < len(spec.classes):
        raise BadInput(f"--digit {labels.digit}: must be 0..{len(spec.classes) - 1}")
    if labels.domain not in ("any", *spec.domains):
        raise BadInput(f"--domain {labels.domain}: must be any or among {', '.join(spec.domains)}")
    device = next(network.unet.parameters()).device
    digit = spec.no_class if labels.digit is None else labels.digit
    domain = spec.no_domain if labels.domain == "any" else spec.domains.index(labels.domain)
    scale = network.sampler.get("guidance", 1.0) if labels.guidance is None else labels.guidance
    guidance = Guidance(1.0 if labels.digit is None else scale)  # without a digit there is no condition to strengthen
    network.check_guidance(guidance)

    def denoiser(batch: int) -> Denoise:
        digits, domains = (torch.full((batch,), n, device=device) for n in (digit, domain))
        inner = network.guided(digits, domains, guidance)

        def denoise(x: Tensor, t: int) -> Tensor:
            with torch.autocast(device.type, dtype, dtype != torch.float32):
                return inner(x, t).float()

        return denoise

    return Model(name, network.unet, denoiser, network.schedule, spec.shape, 0)


# ---------------------------------------------------------------- diffusers folders


def download(name: str) -> Path:
    """Download a hub repository's configuration and weights, and return their folder. Nothing else in P2 uses the internet."""
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors"]))
        if not any(folder.rglob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin"]))
    except Exception as error:  # the hub's client raises errors of a dozen unrelated classes
        raise BadInput(
            f"--model {name}: no such file or folder here, and the hub did not give it ({first_line(error)})"
        ) from None
    return folder


def load_folder(folder: Path) -> tuple[UNet2DModel, Schedule]:
    """Load the UNet2DModel in `folder` or folder/unet, and its noise schedule; raise BadInput for another model or faulty weights."""
    from diffusers.models.unets.unet_2d import UNet2DModel

    places = [place for place in (folder, folder / "unet") if (place / "config.json").is_file()]
    if not places:
        raise BadInput(f"--model {folder}: no config.json there or in unet/, so this is no diffusers folder")
    class_name = read_object(places[0] / "config.json").get("_class_name")
    if class_name != "UNet2DModel":
        raise BadInput(f"--model {folder}: holds a {class_name}, a UNet2DModel is needed")
    quiet_libraries()
    options: dict[str, Any] = {"local_files_only": True, "output_loading_info": True}
    options |= only_variant(list_files(places[0], (".safetensors", ".bin")))
    try:
        unet, info = cast(Any, UNet2DModel.from_pretrained)(places[0], **options)
    except Exception as error:  # diffusers raises many classes; its messages name the file
        raise BadInput(f"--model {folder}: {foreign_file(places[0]) or first_line(error)}") from None
    for problem in ("missing_keys", "unexpected_keys"):
        if info[problem]:
            names = sorted(info[problem])
            raise BadInput(
                f"--model {folder}: {len(names)} {problem.replace('_', ' ')} in the weights, such as {names[0]}"
            )
    if unet.config["out_channels"] != unet.config["in_channels"]:
        raise BadInput(
            f"--model {folder}: gives {unet.config['out_channels']} channels (a learned variance?), which DDIM has no use for"
        )
    return unet, read_schedule(folder)


def read_schedule(folder: Path) -> Schedule:
    """Return the noise schedule of scheduler_config.json in float64; without that file, the course's (linear, 1,000 steps, eps)."""
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    places = [folder / "scheduler", folder, folder.parent / "scheduler"]
    configs = [place / "scheduler_config.json" for place in places]
    config: dict[str, Any] = next((read_object(path) for path in configs if path.is_file()), {})
    kind = config.get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        raise BadInput(f"--model {folder}: predicts {kind!r}, only {' and '.join(PREDICTIONS)} are known")
    try:
        scheduler = DDIMScheduler.from_config(config)
    except Exception as error:  # of many classes, for values of other types
        raise BadInput(f"--model {folder}: its scheduler_config.json makes no schedule ({first_line(error)})") from None
    options = scheduler.config
    if options["trained_betas"] is not None and not options["rescale_betas_zero_snr"]:
        betas = torch.tensor(options["trained_betas"], dtype=torch.float64)
    elif options["beta_schedule"] == "linear" and not options["rescale_betas_zero_snr"]:
        steps, ends = options["num_train_timesteps"], (options["beta_start"], options["beta_end"])
        return linear(steps, *ends, prediction=PREDICTIONS[kind])
    else:
        betas = scheduler.betas.double()
    return Schedule((1 - betas).cumprod(0), PREDICTIONS[kind])


def export(model: Model, folder: Path) -> None:
    """Save a face model and the homework's rule as a diffusers DDIMPipeline folder (safetensors), all or nothing.

    Raise BadInput for a P1 checkpoint or a folder that is not empty.
    """
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.pipelines.ddim.pipeline_ddim import DDIMPipeline
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    if not isinstance(model.network, UNet2DModel):
        raise BadInput(f"--export: {model.name} is a P1 checkpoint, only face models can be exported")
    if any(output_folder(folder, "--export").iterdir()):
        raise BadInput(f"--export {folder}: the folder is not empty")
    scheduler = DDIMScheduler(
        num_train_timesteps=len(model.schedule),
        trained_betas=model.schedule.betas.tolist(),
        prediction_type={"eps": "epsilon", "v": "v_prediction"}[model.schedule.prediction],
        steps_offset=1,
        set_alpha_to_one=False,
    )
    folder = folder.absolute()
    with tempfile.TemporaryDirectory(prefix=".export-", dir=folder.parent) as temporary:
        try:
            DDIMPipeline(model.network, scheduler).save_pretrained(Path(temporary) / "whole")
        except SafetensorError as error:
            raise OSError(f"could not write {folder} (disk full?): {error}") from None
        folder.rmdir()
        (Path(temporary) / "whole").replace(folder)
