"""One run of textual inversion: settings, loop, looks at the progress, checkpoints."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import Accelerator
from torch import Tensor

from concepts.clip_scores import Scorer
from concepts.dataset import ConceptSet
from concepts.inversion import TextualInversion
from concepts.stable_diffusion import load_pipeline, suit_training
from concepts.validation import Validator
from runtime.batches import is_out_of_memory
from runtime.cli import BadInput, log
from runtime.device import AutoOnOff, Device, Precision, detect, memory_format, set_up, should_compile
from runtime.files import ROOT, output_folder
from runtime.images import line_figure
from runtime.record import Record
from training.checkpoint import load_state, require_finite, save_state
from training.draws import process_rows
from training.log import TrainingLog
from training.schedule import lr_factor
from training.signals import StopSignals, leave_stopped

KIND = "textual inversion"
RUNS = ROOT / "runs" / "p3_textual_inversion"


@dataclass(frozen=True)
class InversionArgs:
    """What does not depend on the concepts."""

    model: str
    """Stable Diffusion v1: a diffusers folder, a hub name, or a single file."""
    steps: int = 500
    batch: int = 8
    """Pictures of every concept per step, over all processes."""
    accumulate: int = 1
    """Parts into which that is cut where memory is short."""
    lr: float = 5e-3
    """Peak learning rate of AdamW (without weight decay), on the new rows."""
    max_norm: float = 1.0
    """No row gets longer than this many times its initial word's, so that the rest of a prompt is still heard; 0: any length."""
    crop: Literal["center", "random"] = "center"
    """random cuts anew at every step, so that nothing can be encoded beforehand."""
    max_loss_weight: float = 1.0
    """Loss weight 1 + 1/SNR, up to this; 1: none. More hears more of what strong noise leaves open, such as shape and place."""
    flip: bool = True
    """Shows pictures mirrored half of the time."""
    zoom_out: float = 0.0
    """Share of an object's samples that show it smaller, somewhere in the frame (as Custom Diffusion does, Kumari et al. 2023): for
    pictures of several small ones. Goes with --crop center."""
    embedding_noise: float = 0.0
    """Length of the noise that is added to the new rows whenever they are read in training, in multiples of their own: what is learned
    so holds in other sentences too. 0: none; with it, more steps do no harm."""
    validate_every: int = 100
    """Steps between looks at the progress; 0: at the end only."""
    validate: tuple[str, ...] = ()
    """Prompts of these looks, with {} for the token; none given: one like the sentences it learns from, one that asks for more."""
    clip: str | None = None
    """A CLIP (transformers folder or hub name) that scores the looks: image + 2.5 x text; the best vectors are kept. None: the last."""
    seed: int = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """Of the frozen model; auto takes bf16 where the hardware has it. The rows are float32."""
    compile: AutoOnOff = "auto"
    """torch.compile of the U-Net; auto: on CUDA, for a hundred steps or more."""
    low_memory: bool = False
    """Gradient checkpointing in the U-Net: less memory, a third slower."""
    log_every: int = 25
    save_every: int = 50
    """Steps between checkpoints."""
    run: Path | None = None
    """Run folder: checkpoint, TensorBoard, pictures of the progress, record.json; None: runs/p3_textual_inversion/ and the tokens."""


class Run:
    """What is set up once, and the loop."""

    def __init__(self, settings: InversionArgs, concepts: Sequence[ConceptSet]):
        self.settings, self.machine = settings, detect(settings.device)
        self.precision = set_up(settings.precision, self.machine)
        self.accelerator = Accelerator(cpu=self.machine.device.type == "cpu")
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.rows = process_rows(settings.batch, self.accelerator.process_index, self.accelerator.num_processes)
        self.folder = settings.run or RUNS / "+".join(concept.token.strip("<>") for concept in concepts)
        self.record = Record(settings, replace(self.machine, device=self.device))
        with self.record.timed("loading"):
            dtype = torch.bfloat16 if self.precision == "bf16" else torch.float32
            pipe = load_pipeline(settings.model, self.device, dtype)
            scorer = Scorer.load(settings.clip, self.device) if settings.clip and self.main else None
            crops = settings.crop == "random"
            self.learner = TextualInversion(pipe, concepts, settings.seed, crops, settings.flip, settings.zoom_out)
        self.learner.max_loss_weight, self.learner.embedding_noise = settings.max_loss_weight, settings.embedding_noise
        self.looks = Validator(self.learner, settings.validate, scorer, self.folder)
        self._ready(pipe)
        self.step = 0
        self.losses: list[tuple[int, float]] = []
        self._resume()

    def _ready(self, pipe: Any) -> None:
        """Optimizer, memory and speed of the frozen network."""
        pipe.unet.to(memory_format=memory_format(self.device))
        for network in (pipe.unet, pipe.text_encoder):
            suit_training(network, self.device, self.precision)
        if self.settings.low_memory:
            pipe.unet.enable_gradient_checkpointing()
        worth = self.settings.compile == "on" or self.device.type == "cuda" and self.settings.steps >= 100
        if worth and should_compile(self.settings.compile, self.machine):
            pipe.unet.compile()
        optimizer = torch.optim.AdamW(
            self.learner.parameter.parameters(),
            self.settings.lr,
            weight_decay=0.0,
            fused=self.device.type in ("cuda", "cpu"),
        )
        self.parameter, self.optimizer = self.accelerator.prepare(self.learner.parameter, optimizer)

    @property
    def done(self) -> bool:
        """Whether all steps are made."""
        return self.step >= self.settings.steps

    # ------------------------------------------------ checkpoints

    @property
    def checkpoint(self) -> Path:
        """The run's own state."""
        return self.folder / "checkpoint.pt"

    @property
    def facts(self) -> dict[str, Any]:
        """What has to be the same for going on to make sense."""
        lessons = [(x.concept.token, x.concept.vectors, x.concept.init, x.concept.kind) for x in self.learner.lessons]
        return {
            "model": self.settings.model,
            "concepts": [list(lesson) for lesson in lessons],
            "pictures": [lesson.fingerprint for lesson in self.learner.lessons],
            "seed": self.settings.seed,
            "batch": self.settings.batch,
        }

    def save(self) -> None:
        """Everything that going on needs; the random numbers follow from seed and step."""
        if not self.main:
            return
        state = {"kind": KIND, "facts": self.facts, "step": self.step, "rows": self.learner.parameter.rows.detach()}
        state |= {"optimizer": self.optimizer.state_dict(), "losses": self.losses, "timings": self.record.timings}
        save_state(self.checkpoint, state | self.looks.state())

    def _resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        state = load_state(self.checkpoint, KIND)
        for name, value in self.facts.items():
            if state["facts"].get(name) != value:
                was = state["facts"].get(name)
                raise BadInput(
                    f"{self.checkpoint} is of another run, its {name} {was}, not {value}: name another --run"
                )
        with torch.no_grad():
            self.learner.parameter.rows.copy_(state["rows"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.losses = state["step"], state["losses"]
        self.looks.restore(state)
        self.record.timings.update(state["timings"])
        if self.main:
            log(f"going on at step {self.step:,} from {self.checkpoint}")

    # ------------------------------------------------ the loop

    def train(self) -> None:
        """Steps until the end or a signal; a checkpoint is left either way."""
        settings = self.settings
        output_folder(self.folder)
        log = TrainingLog(self.folder / "tensorboard", KIND, self.step, settings.steps, self.main)
        images = settings.batch * len(self.learner.lessons)
        with StopSignals() as stop, self.record.timed("training"):
            while not self.done and not stop.asked:
                log.add(self.one_step(), images)
                if self._due(settings.log_every) or self._due(settings.save_every):
                    self._report(log)
                if self.main and (self.done or settings.validate_every and self._due(settings.validate_every)):
                    self._look(log)
                if self._due(settings.save_every):
                    self.save()
        log.close()
        self.save()

    def one_step(self) -> Tensor:
        """One optimizer step; returns the loss, which stays on the device."""
        s = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * lr_factor(self.step, s.steps, max(1, s.steps // 20), 0.5)
        sample = self.learner.batch(self.step, self.rows, s.batch)
        try:
            loss = self.learner.backward(self.accelerator, self.parameter, sample, s.accumulate)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise BadInput(self._too_large()) from None
        self.optimizer.step()
        self.optimizer.zero_grad()
        if s.max_norm:
            self.learner.hold_norms(s.max_norm)
        self.step += 1
        return loss

    def _too_large(self) -> str:
        """What an end of memory says."""
        s = self.settings
        finer = [n for n in range(s.accumulate + 1, s.batch + 1) if s.batch % n == 0]
        ways = [f"--accumulate {finer[0]}"] * bool(finer) + ["--low-memory"] * (not s.low_memory)
        return (
            f"out of memory at step {self.step:,} with --batch {s.batch} in {s.accumulate} parts:"
            f" try {' or '.join(ways) or 'a smaller --batch'}; the same command goes on from the last checkpoint"
        )

    def _due(self, every: int) -> bool:
        return self.done or self.step % every == 0

    def _report(self, log: TrainingLog) -> None:
        loss, speed = log.read()
        require_finite(loss, self.step, self.checkpoint, "a lower --lr or --precision fp32")
        self.losses.append((self.step, loss))
        self.record.metrics |= {"loss": loss, "images_per_s": speed}
        norm = float((self.learner.parameter.rows.detach().norm(dim=1, keepdim=True) / self.learner.word_norms).mean())
        log.show(self.step, loss=loss, images_s=speed, norm=norm)

    def _look(self, log: TrainingLog) -> None:
        """Pictures and scores to TensorBoard; the time is not the training's."""
        start = time.perf_counter()
        look = self.looks.take(self.step)
        for token, images in look.images.items():
            log.picture(self.step, token, torch.cat(list(images), 2))
        log.show(self.step, **{f"score {token}": score for token, score in look.scores.items()})
        log.pause(time.perf_counter() - start)

    # ------------------------------------------------ what is left

    def leave_if_stopped(self) -> None:
        """After a signal: one line, and exit code 130."""
        if self.done:
            return
        if not self.main:
            raise SystemExit(130)
        leave_stopped(self.step, self.checkpoint)

    def save_record(self, facts: dict[str, Any]) -> None:
        """record.json and loss.png of the run folder."""
        facts = facts | {"step": self.step, "precision": self.precision, "losses": dict(self.losses)}
        facts["processes"] = self.accelerator.num_processes
        self.record.metrics |= facts | {"scores": self.looks.scores(), "pictures": self.looks.pictures()}
        if len(self.losses) > 1:
            steps, losses = zip(*self.losses, strict=True)
            line_figure(self.folder / "loss.png", steps, {"loss": {"mean": list(losses)}}, "step", "Textual inversion")
        self.record.save(self.folder / "record.json")
