"""The loop that every training runs in: an iterator over steps with resume, signals, logging, checks and checkpoints.

run = TrainingRun(config, facts, Trained(network, optimizer, ema), record)
for step in run:                    # stops on a signal, saves, measures the speed
    with run.autocast():            # to bf16 or fp16
        loss = ...                  # its random numbers a function of (seed, step, rank): training/draws.py
    run.update(loss)                # backward, clip, learning rate, optimizer step, EMA, finite check
    if run.every(1000):
        ...                         # evaluation; its time does not count as training
run.finish(accuracy=0.9)            # record.json; exit code 130 after a signal

In fp16 the loss is scaled, and a step whose gradients overflow changes neither weights, optimizer nor EMA. It still counts as a step:
so data, noise and learning rate stay functions of the step number.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

from runtime.cli import BadInput, log
from runtime.device import autocast
from runtime.record import Record
from training.checkpoint import load_state, save_state
from training.ema import Ema
from training.log import TrainingLog
from training.loss_scaling import LossScaler
from training.schedule import LearningRate
from training.signals import stop_signals
from training.tracking import Track, Tracker

if TYPE_CHECKING:
    from accelerate import Accelerator

MEASURED = ("loss", "images_per_s", "loss_scale", "skipped_steps")  # metrics that the checkpoint keeps


@dataclass(frozen=True)
class LoopConfig:
    """How a training runs: where, how long, at which learning rate, and how often it reports and saves."""

    kind: str  # of training, such as "textual inversion": a checkpoint of another kind is refused
    folder: Path  # for checkpoint.pt, tensorboard/ and record.json
    steps: int
    batch: int  # images per step over all processes, for the speed
    lr: LearningRate
    max_grad_norm: float = math.inf
    log_every: int = 50
    save_every: int = 200
    compiled: bool = False  # then the first step's time is logged, and excluded from the speed
    elsewhere: str = "--output OTHER"  # advice in errors: the flag that starts a new run in another folder
    show: bool = True  # progress bar, TensorBoard, and the estimate of the time to go
    precision: str = "fp32"  # fp32, tf32, bf16 or fp16: of `TrainingRun.autocast`; fp16 scales the loss
    track: Track = None


@dataclass
class Trained:
    """The objects that a training changes; its checkpoint holds their states. `extra`: {name: further object with a `state_dict`}."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    ema: Ema | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    average_gradients: bool = False  # `update` averages them over processes: for a network that DDP does not wrap

    def parts(self) -> dict[str, Any]:
        """Return {name in the checkpoint: object with a `state_dict`}."""
        parts = {"model": self.network, "optimizer": self.optimizer, **self.extra}
        return parts | ({"ema": self.ema} if self.ema else {})


class TrainingRun:
    """An iterator over the remaining steps, which does everything that a training needs except computing the loss."""

    def __init__(
        self,
        config: LoopConfig,
        facts: dict[str, Any],
        trained: Trained,
        record: Record,
        accelerator: Accelerator | None = None,
        resume: bool = True,
    ):
        """Resume from checkpoint.pt in the run's folder, if it exists. With `resume` off, delete it and start at step 0.

        `facts`: everything that decides what is learned (plain values). Raise BadInput if they differ from the checkpoint's.
        """
        self.config, self.trained, self.record, self.accelerator = config, trained, record, accelerator
        self.facts: dict[str, Any] = json.loads(json.dumps(facts))
        self.is_main = accelerator is None or accelerator.is_main_process
        self.checkpoint = config.folder / "checkpoint.pt"
        self.history: dict[str, Any] = {}  # plain values of the script that the checkpoint keeps
        self.precisions: dict[str, int] = {}  # steps by precision
        self.announced = False  # whether the time to go has been logged
        several = accelerator is not None and accelerator.num_processes > 1
        # the processes agree on stops through their CPUs; while the main one grades, the others may wait for long
        agreement = dist.new_group(timeout=timedelta(days=7), backend="gloo") if several else None
        self.agreement = cast(dist.ProcessGroup | None, agreement)
        self.interrupted = False
        self.device = next(trained.network.parameters()).device
        self.scaler = LossScaler(self.device, config.precision)
        self.step, self.resumed = 0, resume and self.checkpoint.is_file()
        if self.resumed:
            self._restore(load_state(self.checkpoint, config.kind))
        elif self.is_main:
            self.checkpoint.unlink(missing_ok=True)
        shown = config.show and self.is_main
        run = config.folder.resolve().name
        tracker = Tracker(config.track, config.kind, run, record.settings) if config.track else None
        self.log = TrainingLog(config.folder / "tensorboard", config.kind, self.step, config.steps, shown, tracker)
        self.step_started = 0.0

    # ------------------------------------------------ checkpoint

    def save(self) -> None:
        """Write checkpoint.pt, in the main process only. It needs no random states, which follow from seed and step."""
        if self.is_main:
            parts = {name: part.state_dict() for name, part in self.trained.parts().items()}
            parts |= {"scaler": self.scaler.state_dict()} if self.scaler.is_enabled() else {}
            state = {"kind": self.config.kind, "facts": self.facts, "step": self.step, "steps": self.config.steps}
            measured = {name: self.record.metrics[name] for name in MEASURED if name in self.record.metrics}
            state |= {"timings": self.record.timings, "measured": measured, "precisions": self.precisions}
            save_state(self.checkpoint, state | {"history": self.history, "parts": parts})

    def _restore(self, state: dict[str, Any]) -> None:
        if not {"facts", "step", "steps", "history", "timings", "parts"} <= set(state):
            raise BadInput(
                f"{self.checkpoint} was written by an earlier version or is damaged: move it away, or give {self.config.elsewhere}"
            )
        now = self.facts | {"steps": min(self.config.steps, state["steps"])}  # more steps are fine
        before = state["facts"] | {"steps": state["steps"]}
        for name, value in now.items():
            if before.get(name) != value:
                raise BadInput(
                    f"{self.checkpoint} was trained with {name} {_short(before.get(name))}, not {_short(value)}:"
                    f" give that again, or {self.config.elsewhere}"
                )
        try:
            for name, part in self.trained.parts().items():
                part.load_state_dict(state["parts"][name])
            if self.scaler.is_enabled():
                self.scaler.load_state_dict(state["parts"].get("scaler", {}))
        except (KeyError, RuntimeError, ValueError):
            raise BadInput(
                f"{self.checkpoint} is of another layout or damaged: move it away, or give {self.config.elsewhere}"
            ) from None
        self.step, self.history = state["step"], state["history"]
        self.record.timings.update(state["timings"])
        self.record.metrics.update(state.get("measured", {}))  # which a finished run does not measure again
        self.precisions = dict(state.get("precisions", {}))
        if self.is_main:
            log(f"going on at step {self.step:,} from {self.checkpoint}")

    # ------------------------------------------------ the loop

    @property
    def done(self) -> bool:
        """Return whether all steps are taken."""
        return self.step >= self.config.steps

    def every(self, steps: int) -> bool:
        """Return whether the number of steps taken is a multiple of `steps`, or all are taken; with 0 only the latter."""
        return self.done or bool(steps) and self.step % steps == 0

    def __iter__(self) -> Iterator[int]:
        """Yield the number of each remaining step, until a signal comes; the body of the loop calls `update` once.

        A checkpoint is written every `save_every` steps and at the end, after a signal too.
        """
        if self.done:
            return
        self.log.start()
        with stop_signals() as signals:
            with self.record.timed("training"):
                while not self.done and not self._any_process(bool(signals)):
                    self.step_started = time.perf_counter()
                    step = self.step
                    yield step
                    assert self.step == step + 1, "call update once in every step"
                    self.log.resume()
                    if self.every(self.config.save_every):
                        self.save()
                if self.log.count:
                    self._report()
            self.log.close()
            self.save()
        self.interrupted = not self.done or self._any_process(bool(signals))
        if self.interrupted and self.done:  # the signal came during the work of the last step, such as grading
            self.finish()

    def _any_process(self, flag: bool) -> bool:
        """Return whether the flag is set in any process, so that all of them stop after the same step."""
        if self.agreement is None:
            return flag
        flags = torch.tensor(int(flag))
        dist.all_reduce(flags, dist.ReduceOp.MAX, self.agreement)
        return bool(flags)

    def autocast(self) -> torch.autocast:
        """Return a context in which networks compute in the configured precision."""
        return autocast(self.device, self.config.precision)

    def update(self, losses: Tensor | Iterable[Tensor], after_step: Callable[[], None] | None = None) -> None:
        """Backpropagate, and take an optimizer step and an EMA update, unless the gradients overflow in fp16.

        Of several `losses`, each is computed and backpropagated in turn, and the gradients add up.
        `after_step` runs between the optimizer step and the EMA update, to constrain the weights.
        Raise BadInput when a mean loss to be logged is not finite, or gradients keep overflowing.
        """
        config, trained = self.config, self.trained
        total = torch.zeros(())
        for loss in [losses] if isinstance(losses, Tensor) else losses:
            scaled: Tensor = self.scaler.scale(loss)
            self.accelerator.backward(scaled) if self.accelerator else scaled.backward()
            total = total.to(loss.device) + loss.detach()
        if self.accelerator and trained.average_gradients:
            for parameter in trained.network.parameters():
                parameter.grad = cast(Tensor, self.accelerator.reduce(parameter.grad, "mean"))

        for group in trained.optimizer.param_groups:
            group["lr"] = config.lr.at(self.step, config.steps)
        self.scaler.unscale_(trained.optimizer)
        if math.isfinite(config.max_grad_norm):
            nn.utils.clip_grad_norm_(trained.network.parameters(), config.max_grad_norm)
        taken = self.scaler.take_step(trained.optimizer)
        trained.optimizer.zero_grad()
        if after_step and taken:
            after_step()
        if trained.ema and taken:
            trained.ema.update_parameters(trained.network)

        self.step += 1
        self.precisions[config.precision] = self.precisions.get(config.precision, 0) + 1
        self.log.add(total if taken else None, config.batch)
        if not taken and self.scaler.get_scale() < 1:
            self._stop("in fp16 the gradients overflow")
        if config.compiled and self.step == self.log.first + 1:  # this step compiled: exclude it from the speed
            loss, seconds = float(total), time.perf_counter() - self.step_started  # float() waits for the device
            self.record.timings["first_step"] = seconds
            self.log.exclude_so_far()
            log(f"compiled: the first step took {seconds:.0f} s (loss {loss:.3f})")
        due = self.every(config.log_every) or self.every(config.save_every)
        if due and self.log.count:  # not only skipped steps
            self._report()  # before saving: a checkpoint must not hold a broken network
        self.log.pause()

    def _report(self) -> None:
        """Show loss and speed; raise BadInput where the loss is not finite."""
        loss, speed = self.log.read()
        if not math.isfinite(loss):
            self._stop(f"the loss is {loss}")
        if self.log.shown and not self.announced and speed and not self.done:  # speed 0: only a compiling step so far
            self.announced = True
            minutes = (self.config.steps - self.step) * self.config.batch / speed / 60
            log(f"step {self.step:,}: loss {loss:.4f}, {speed:.0f} images/s, about {minutes:.0f} minutes to go")
        scaling = self._scaling()
        self.record.metrics |= {"loss": loss, "images_per_s": speed} | scaling
        self.log.show(
            self.step, loss=loss, images_s=speed, lr=self.config.lr.at(self.step, self.config.steps), **scaling
        )

    def _scaling(self) -> dict[str, float]:
        if not self.scaler.is_enabled():
            return {}
        return {"loss_scale": self.scaler.get_scale(), "skipped_steps": self.scaler.skipped}

    def _stop(self, reason: str) -> NoReturn:
        left = f"{self.checkpoint} keeps the last good state" if self.checkpoint.is_file() else "nothing is written"
        raise BadInput(f"{reason} at step {self.step:,}: stopped; {left}. Try a lower --lr or --precision fp32")

    # ------------------------------------------------ the end

    @contextmanager
    def last_work(self) -> Iterator[None]:
        """Run work that follows the last step, such as an evaluation, in a `with` block.

        Ctrl-C or SIGTERM in it ends the script by `finish`, with exit code 130; the same command repeats the block.
        """
        try:
            yield
        except KeyboardInterrupt:
            self.interrupted, self.agreement = True, None  # the other processes have left
            self.finish()

    def finish(self, **metrics: Any) -> None:
        """Write record.json with these metrics.

        After a signal, log the checkpoint's path and exit with code 130, once all processes have called this.
        """
        if self.is_main:
            processes = self.accelerator.num_processes if self.accelerator else 1
            steps = {"step": self.step, "steps_by_precision": self.precisions}
            self.record.metrics |= steps | {"processes": processes, **self._scaling(), **metrics}
            self.record.save(self.config.folder / "record.json")
            if self.scaler.skipped:
                log(f"{self.scaler.skipped:,} of {self.step:,} steps skipped: their gradients overflowed in fp16")
            if self.interrupted:
                log(f"stopped at step {self.step:,}; the same command goes on from {self.checkpoint}")
        if self.interrupted:
            # when one process exits, the launcher ends all: none may leave before the record is written
            self._any_process(True)
        if self.accelerator:
            self.accelerator.end_training()  # ends the process group, whose threads could else abort a process at its exit
        if self.interrupted:
            raise SystemExit(130)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
