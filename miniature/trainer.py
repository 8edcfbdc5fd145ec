"""The loop that the trainings of the miniature's diffusion model share: accelerate, EMA, seeded draws, atomic checkpoints, signals."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from runtime.cli import check_not_negative, check_positive, log
from runtime.device import (
    AutoOnOff,
    Device,
    Precision,
    detect,
    set_up,
    should_compile,
    to_training_device,
)
from runtime.files import output_folder
from runtime.images import save_image
from runtime.record import Record
from training.checkpoint import load_state, require_finite, restore_weights, save_state, weights_state
from training.draws import Draws, process_rows
from training.ema import make_ema
from training.log import TrainingLog
from training.schedule import lr_factor
from training.signals import StopSignals, leave_stopped


@dataclass(frozen=True)
class Loop:
    """Settings of every such training."""

    run: Path
    """Run folder: checkpoint, TensorBoard, sheets, record.json."""
    steps: int
    batch: int
    """Pictures per step, over all processes."""
    lr: float
    """Peak learning rate of AdamW."""
    ema: float
    """Decay of the averaged weights, which are the ones that are kept."""
    log_every: int = 50
    save_every: int = 200
    """Steps between checkpoints."""
    show_every: int = 1000
    """Steps between sheets of pictures; 0: none."""
    seed: int = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """auto takes bf16 where the hardware has it."""
    compile: AutoOnOff = "auto"
    """torch.compile."""


class Trainer(ABC):
    """One run: what is set up once, and the loop. A subclass says what is trained, on what loss, and what shows its progress."""

    kind = "miniature training"  # told by the checkpoint

    def __init__(self, settings: Loop):
        check_numbers(settings, "steps", "batch", "log_every", "save_every")
        self.settings, self.machine = settings, detect(settings.device)
        self.precision = set_up(settings.precision, self.machine, training=True)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if self.precision == "bf16" else "no", cpu=self.machine.device.type == "cpu"
        )
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.rows = process_rows(settings.batch, self.accelerator.process_index, self.accelerator.num_processes)
        self.record = Record(settings, replace(self.machine, device=self.device))
        self.step = 0
        self.prepare()
        self._build()
        self._resume()

    # ------------------------------------------------ what a subclass gives

    def prepare(self) -> None:  # noqa: B027 - nothing to load is a good answer
        """Loads what the loss needs, before the network is built."""

    @abstractmethod
    def build(self) -> nn.Module:
        """The network, with random weights."""

    @abstractmethod
    def loss(self, draws: Draws) -> Tensor:
        """The loss of `self.model` on this process's rows of step `self.step`."""

    @abstractmethod
    def sheet(self) -> Tensor:
        """[3,H,W] uint8: a picture that shows what the averaged weights can do."""

    # ------------------------------------------------ set-up

    def _build(self) -> None:
        torch.manual_seed(self.settings.seed)
        network = to_training_device(self.build(), self.device)
        self.ema = make_ema(network, self.settings.ema)
        fused = self.device.type in ("cuda", "cpu")
        optimizer = torch.optim.AdamW(network.parameters(), self.settings.lr, weight_decay=0.01, fused=fused)
        if should_compile(self.settings.compile, self.machine):
            network.compile()
        self.model, self.optimizer = self.accelerator.prepare(network, optimizer)
        self.network = self.accelerator.unwrap_model(self.model)

    @property
    def parameters(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.network.parameters())

    @property
    def averaged(self) -> Any:
        """The network with its averaged weights, for looking at."""
        return self.ema.module.eval()

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.settings.steps

    # ------------------------------------------------ checkpoints

    @property
    def checkpoint(self) -> Path:
        """The training's own state."""
        return self.settings.run / "checkpoint.pt"

    def save(self) -> None:
        """Everything that going on needs; the random numbers follow from seed and step."""
        if not self.main:
            return
        state = {
            "kind": self.kind,
            "step": self.step,
            "timings": self.record.timings,
        }
        save_state(self.checkpoint, state | weights_state(self.network, self.ema, self.optimizer))

    def _resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        state = load_state(self.checkpoint, self.kind)
        self.ema = restore_weights(state, self.network, self.optimizer, self.settings.ema, self.checkpoint)
        self.step = state["step"]
        self.record.timings.update(state["timings"])
        if self.main:
            log(f"going on at step {self.step:,} from {self.checkpoint}")

    # ------------------------------------------------ the loop

    def train(self) -> None:
        """Steps until the end or a signal; a checkpoint is left either way."""
        settings = self.settings
        output_folder(settings.run)
        training_log = TrainingLog(settings.run / "tensorboard", self.kind, self.step, settings.steps, self.main)
        with StopSignals() as stop, self.record.timed("training"):
            while not self.done and not stop.asked:
                training_log.add(self.one_step(), settings.batch)
                if self._due(settings.log_every) or self._due(settings.save_every):
                    self._report(training_log)  # before saving: a checkpoint must not hold a broken network
                if self._due(settings.save_every):
                    self.save()
                if settings.show_every and self._due(settings.show_every):
                    self._show(training_log)
            if training_log.count:
                self._report(training_log)
        training_log.close()
        self.save()

    def one_step(self) -> Tensor:
        """One optimizer step; returns the loss, which stays on the device."""
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * lr_factor(self.step, s.steps, min(200, s.steps // 10), 0.6)
        draws = Draws(s.seed, self.step, self.rows, s.batch, self.device)
        with self.accelerator.autocast():
            loss = self.loss(draws)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.network)
        self.step += 1
        return loss

    def _due(self, every: int) -> bool:
        return self.done or self.step % every == 0

    def _report(self, training_log: TrainingLog) -> None:
        loss, speed = training_log.read()
        require_finite(loss, self.step, self.checkpoint, "a lower --lr or --precision fp32")
        if self.main and "loss" not in self.record.metrics:  # the first reading of this run
            minutes = (self.settings.steps - self.step) * self.settings.batch / speed / 60
            log(f"step {self.step:,}: loss {loss:.4f}, {speed:.0f} pictures/s, about {minutes:.0f} minutes to go")
        self.record.metrics |= {"loss": loss, "images_per_s": speed}
        training_log.show(self.step, loss=loss, images_s=speed)

    def _show(self, training_log: TrainingLog) -> None:
        if not self.main:
            return
        start = time.perf_counter()
        picture = self.sheet()
        save_image(self.settings.run / f"step-{self.step:06d}.png", picture)
        training_log.picture(self.step, "sheet", picture)
        training_log.pause(time.perf_counter() - start)

    def leave_if_stopped(self) -> None:
        """After a signal: the record, one line, and exit code 130."""
        if self.done:
            return
        if not self.main:
            raise SystemExit(130)
        self.save_record()
        leave_stopped(self.step, self.checkpoint)

    def save_record(self) -> None:
        """record.json of the run folder."""
        facts = {"step": self.step, "parameters": self.parameters, "processes": self.accelerator.num_processes}
        self.record.metrics |= facts
        self.record.save(self.settings.run / "record.json")


def check_numbers(settings: Any, *positive: str) -> None:
    """Raises BadInput for counts that are not above zero, and for a seed below zero."""
    check_positive(settings, *positive)
    check_not_negative(settings, "seed")
