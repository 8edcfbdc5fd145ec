"""How the face model learns: one small U-Net of the course's kind, the course's schedule, and few photographs cut anew at every step."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn

from diffusion.loss import min_snr_weight
from diffusion.schedule import add_noise, linear
from miniature.faces import Faces, held_out_people, load_faces, random_cuts
from miniature.faces_model import ORIGIN, SHIPPED, STEPS, draw_faces, make_network, start_from
from runtime.cli import BadInput, check_positive, log
from runtime.device import Device, detect, memory_format, set_up, to_training_device
from runtime.files import ROOT, output_folder, read_json
from runtime.images import image_grid, save_image
from training.checkpoint import load_state, require_finite, restore_weights, save_state, weights_state
from training.draws import Draws
from training.ema import make_ema
from training.log import TrainingLog
from training.schedule import lr_factor
from training.signals import StopSignals

FACES = ROOT / "hw2_data" / "faces_orl.tar.gz"
KIND = "face model"
MIN_SNR = 5.0


@dataclass(frozen=True)
class Train:
    """Trains a face model; stops cleanly on Ctrl-C or SIGTERM, and goes on with the same command."""

    faces: Path = FACES
    """Folder of pictures, one subfolder per person, or a tar archive of one."""
    output: Path = SHIPPED
    """Folder for the model, as diffusers lays out a DDIMPipeline, weights in half precision."""
    init: Path | None = None
    """Diffusers folder of the same network to start from, such as the shipped one."""
    held_out: int = 4
    """People whom training never sees: what `grade` compares with."""
    steps: int = 3500
    batch: int = 32
    """Pictures per step."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    ema: float = 0.999
    """Decay of the averaged weights, which are the ones that are kept."""
    channels: tuple[int, ...] = (16, 32, 64, 128)
    """Channels per level, finest first; attention on the last."""
    blocks: int = 1
    """Residual blocks per level on the way down, one more on the way up."""
    save_every: int = 200
    """Steps between checkpoints."""
    draw_every: int = 1000
    """Steps between sheets of drawn faces, in the run folder and TensorBoard; 0: at the end only."""
    seed: int = 0
    device: Device = "auto"
    run: Path = Path("runs/miniature/faces")
    """Run folder: checkpoint, TensorBoard, record.json."""


# ---------------------------------------------------------------- loss


def diffusion_loss(unet: nn.Module, images: Tensor, alphas: Tensor, draws: Draws) -> Tensor:
    """Mean of min(SNR, 5) / SNR |eps - output|^2 (Hang et al. 2023), t stratified over the batch; `images` [N,3,80,80] uint8,
    `alphas` [T] abar."""
    x0 = random_cuts(images, draws)
    t = (draws.stratified() * len(alphas)).long().clamp(max=len(alphas) - 1)
    eps = draws.normal(*x0.shape[1:])
    alpha = alphas[t][:, None, None, None]
    x = add_noise(x0, eps, alpha).contiguous(memory_format=memory_format(x0.device))
    error = (unet(x, t, return_dict=False)[0] - eps).square()
    return (error * min_snr_weight(alpha, MIN_SNR, "eps")).mean()


# ---------------------------------------------------------------- the run


class Training:
    """One run: what is set up once, and the loop."""

    def __init__(self, settings: Train):
        check_positive(settings, "steps", "batch", "save_every")
        self.settings, self.machine = settings, detect(settings.device)
        self.device = self.machine.device
        set_up("fp32", self.machine)
        faces = load_faces(settings.faces)
        self.held_out = self._held_out(faces)
        self.images = faces.of(sorted(set(faces.people) - set(self.held_out))).to(self.device)
        self.schedule = linear(STEPS)
        self.alphas = self.schedule.alpha_bar.float().to(self.device)
        self._build()
        output_folder(settings.output)
        output_folder(settings.run)
        self._resume()
        self._say()

    def _held_out(self, faces: Faces) -> list[str]:
        """Those of the model that one starts from, since it never saw them; else chosen by the seed."""
        chosen = held_out_people(faces, self.settings.held_out, self.settings.seed)
        before = self.settings.init and self.settings.init / ORIGIN
        known = read_json(before).get("held_out", []) if before and before.is_file() else []
        return known if known and set(known) < set(faces.people) else chosen

    def _build(self) -> None:
        settings = self.settings
        torch.manual_seed(settings.seed)
        network = make_network(settings.channels, settings.blocks)
        if settings.init:
            start_from(network, settings.init)
        to_training_device(network, self.device)
        self.network = network
        self.optimizer = torch.optim.AdamW(
            network.parameters(), settings.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=True
        )
        self.ema, self.step, self.seconds, self.told = make_ema(network, settings.ema), 0, 0.0, False

    def _say(self) -> None:
        size = sum(p.numel() for p in self.network.parameters()) / 1e6
        log(
            f"{size:.1f} M parameters on {self.machine.name}; {len(self.images)} pictures, without those of "
            f"{', '.join(self.held_out)}; {self.settings.steps:,} steps of {self.settings.batch}; run folder {self.settings.run}"
            + (f"; going on at step {self.step:,}" if self.step else "")
        )

    @property
    def checkpoint(self) -> Path:
        """The training's own state."""
        return self.settings.run / "checkpoint.pt"

    def save(self) -> None:
        """Everything that going on needs; the random numbers follow from seed and step."""
        state = {
            "kind": KIND,
            "layout": [list(self.settings.channels), self.settings.blocks],
            "held_out": self.held_out,
            "step": self.step,
            "seconds": self.seconds,
        }
        save_state(self.checkpoint, state | weights_state(self.network, self.ema, self.optimizer))

    def _resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        state = load_state(self.checkpoint, KIND)
        ours = {"layout": [list(self.settings.channels), self.settings.blocks], "held_out": self.held_out}
        for name, value in ours.items():
            if state[name] != value:
                raise BadInput(f"{self.checkpoint}: its {name} is {state[name]}, not {value}: name another --run")
        self.ema = restore_weights(state, self.network, self.optimizer, self.settings.ema, self.checkpoint)
        self.step, self.seconds = state["step"], state["seconds"]

    def train(self) -> UNet2DModel:
        """Steps until the end or a signal; a checkpoint is left either way. Returns the averaged network."""
        settings, start = self.settings, time.perf_counter() - self.seconds
        training_log = TrainingLog(settings.run / "tensorboard", "faces", self.step, settings.steps, True)
        with StopSignals() as stop:
            while self.step < settings.steps and not stop.asked:
                training_log.add(self.one_step(), settings.batch)
                self.seconds = time.perf_counter() - start
                if self._due(50) or self._due(settings.save_every):
                    self._report(training_log)  # before saving: a checkpoint must not hold a broken network
                if self._due(settings.save_every):
                    self.save()
                if self._due(settings.draw_every):
                    training_log.pause(self._show(training_log))
        training_log.close()
        self.save()
        return cast(UNet2DModel, self.ema.module.eval())

    def _report(self, training_log: TrainingLog) -> None:
        loss, speed = training_log.read()
        require_finite(loss, self.step, self.checkpoint)
        if not self.told:
            minutes = (self.settings.steps - self.step) * self.settings.batch / speed / 60
            log(f"{speed:.1f} pictures/s: about {minutes:.0f} minutes to go")
            self.told = True
        training_log.show(self.step, loss=loss, images_s=speed, lr=self.rate())

    def _show(self, training_log: TrainingLog) -> float:
        """A sheet of faces as they come out now; returns the seconds it took."""
        start = time.perf_counter()
        sheet = image_grid(draw_faces(cast(UNet2DModel, self.ema.module.eval()), self.schedule, range(16)), 8, 2)
        save_image(self.settings.run / f"step-{self.step:06d}.png", sheet)
        training_log.picture(self.step, "faces", sheet)
        return time.perf_counter() - start

    def _due(self, every: int) -> bool:
        return self.step == self.settings.steps or bool(every) and self.step % every == 0

    def rate(self) -> float:
        """The learning rate of the step in hand."""
        s = self.settings
        return s.lr * lr_factor(self.step, s.steps, max(1, min(200, s.steps // 10)), 0.7)

    def one_step(self) -> Tensor:
        """One optimizer step; returns the loss."""
        draws = Draws(self.settings.seed, self.step, slice(self.settings.batch), self.settings.batch, self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        loss = diffusion_loss(self.network, self.images, self.alphas, draws)
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.network)
        self.step += 1
        return loss

    def origin(self) -> dict[str, Any]:
        """What the saved model learned from."""
        s = self.settings
        names = ("steps", "batch", "lr", "ema", "seed")
        facts = {name: getattr(s, name) for name in names}
        return facts | {"faces": s.faces.name, "pictures": len(self.images), "held_out": self.held_out}
