"""Trains one conditional diffusion model for the digits of both domains.

  python P1_training.py                              preset, precision and data are found; resumes where the run folder has a checkpoint
  python P1_training.py --preset report              the report's recipe: T = 500, linear schedule, one-hot context, lr 1e-3
  accelerate launch P1_training.py --batch 1024      several GPUs; torchrun works as well

Stops cleanly on Ctrl-C or SIGTERM with its checkpoint written; the same command goes on from there.
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from diffusion.loss import min_snr_weight
from diffusion.schedule import Schedule, add_noise, make_schedule, target
from digits.classifier import DigitClassifier, accuracy, shipped_classifiers
from digits.recipes import RECIPES, TrainingRecipe
from digits.sampling import DigitSamplerConfig, graded_requests, labels_of, sample_all
from P1_dataloader import BalancedIndex, Digits, load_digits
from P1_model import DIGITS, NO_DIGIT, NO_DOMAIN, PRESETS, Network, UNet, load_network, save_network
from runtime.cli import BadInput, check_fractions, check_not_negative, check_positive, log, run_script
from runtime.device import AutoOnOff, Device, Precision, detect, set_up, should_compile, to_channels_last
from runtime.files import ROOT, output_folder
from runtime.images import image_grid, save_image, to_float, to_uint8
from runtime.record import Record
from training.best import BestCandidates
from training.checkpoint import load_state, require_finite, restore_weights, save_state, weights_state
from training.draws import Draws, process_rows
from training.ema import make_ema
from training.log import TrainingLog
from training.schedule import lr_factor
from training.signals import StopSignals

KIND = "P1 training"


@dataclass(frozen=True)
class Settings:
    """Flags; those left out come from the preset's recipe or are found."""

    data: Path = ROOT / "hw2_data" / "digits"
    """Folder with mnistm/ and svhn/ (see hw2_data/README.md)."""
    output: Path = Path("runs/p1")
    """Run folder: checkpoint, best weights, pictures, TensorBoard, record.json."""
    preset: Literal["auto", "report", "tiny", "cpu", "gpu"] = "auto"
    """auto: gpu where there is one, else cpu."""
    steps: int | None = None
    """Optimizer steps in all; may be changed when a run goes on."""
    batch: int | None = None
    """Pictures per step over all processes."""
    lr: float | None = None
    """Peak learning rate of AdamW."""
    warmup: int = 200
    """Steps over which the rate rises."""
    decay: float = 0.5
    """Share of the steps, at the end, over which the rate falls to zero."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    min_snr: float | None = None
    """Min-SNR loss weight's gamma (Hang et al. 2023); 0 switches it off."""
    drop_digit: float = 0.15
    """Share of pictures trained without their digit, which guidance needs."""
    drop_domain: float = 0.1
    """Share of pictures trained without their domain."""
    svhn_share: float | None = 0.5
    """Share of SVHN, the harder domain, among the pictures drawn; None: as in the data."""
    balance_digits: bool = True
    """SVHN's digits equally often (the set is unbalanced)."""
    ema: float | None = None
    """Decay of the averaged weights, which are the ones that are graded and kept."""
    max_grad_norm: float = 1.0
    """Largest gradient norm; inf: any."""
    seed: int = 0
    device: Device = "auto"
    precision: Precision = "auto"
    """auto: bf16 where the hardware has it, else fp32."""
    compile: AutoOnOff = "auto"
    """torch.compile; auto: where it pays (CUDA, or a CPU with bf16) and a compiler exists."""
    eval_every: int = 1000
    """Steps between two gradings; 0: only at the end."""
    eval_count: int = 10
    """Pictures per digit and domain in each of these gradings."""
    candidates: int = 3
    """How many of the best gradings are graded again, with more pictures, at the end."""
    final_count: int = 50
    """Pictures per digit and domain in that last grading."""
    save_every: int = 500
    """Steps between two checkpoints."""
    log_every: int = 50
    """Steps between two readings of the loss."""
    init: Path | None = None
    """Start from these weights (best.safetensors or shipped) instead of random ones, with a new optimizer."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the run folder's checkpoint where it has one; never: start anew."""


def resolve_recipe(settings: Settings, preset: str) -> TrainingRecipe:
    """The preset's recipe with the flags that were given; raises BadInput for numbers that make no sense."""
    given = {f.name: value for f in fields(TrainingRecipe) if (value := getattr(settings, f.name, None)) is not None}
    recipe = replace(RECIPES[preset], **given)
    check_positive(recipe, "steps", "batch", "lr")
    check_not_negative(recipe, "min_snr")
    check_positive(settings, "eval_count", "candidates", "final_count")
    check_not_negative(settings, "warmup", "eval_every", "save_every", "log_every")
    check_fractions(settings, "drop_digit", "drop_domain", "svhn_share", "ema", "decay")
    if not settings.max_grad_norm > 0:  # inf is fine
        raise BadInput(f"--max-grad-norm {settings.max_grad_norm}: must be above zero")
    return recipe


# ---------------------------------------------------------------- one step


@dataclass(frozen=True)
class Problem:
    """All that the loss needs besides the network."""

    data: Digits
    index: BalancedIndex
    schedule: Schedule
    alphas: Tensor  # [T] float32 on the device
    min_snr: float
    drop_digit: float
    drop_domain: float


def batch_of(problem: Problem, draws: Draws) -> tuple[Tensor, Tensor, Tensor]:
    """Pictures [B,3,28,28] float, digits [B] and domains [B], some of the labels withheld."""
    rows = problem.index(draws.uniform(), draws.uniform())
    digit, domain = problem.data.digits[rows], problem.data.domains[rows]
    digit = torch.where(draws.uniform() < problem.drop_digit, NO_DIGIT, digit)
    domain = torch.where(draws.uniform() < problem.drop_domain, NO_DOMAIN, domain)
    return to_float(problem.data.images[rows]), digit, domain


def diffusion_loss(unet: nn.Module, problem: Problem, draws: Draws) -> Tensor:
    """Mean over the batch of weight(t) |output - target|^2 (Ho et al. 2020, eq. 14), t stratified over the batch."""
    x0, digit, domain = batch_of(problem, draws)
    t = (draws.stratified() * len(problem.schedule)).long().clamp(max=len(problem.schedule) - 1)
    eps = draws.normal(*x0.shape[1:])
    alpha = problem.alphas[t][:, None, None, None]
    x = add_noise(x0, eps, alpha).contiguous(memory_format=torch.channels_last)
    wanted = target(x0, eps, alpha, problem.schedule.prediction)
    error = (unet(x, t, digit, domain).float() - wanted).square()
    if problem.min_snr:
        error = error * min_snr_weight(alpha, problem.min_snr, problem.schedule.prediction)
    return error.mean()


# ---------------------------------------------------------------- the run


class Trainer:
    """One run: everything that is set up once, and the loop."""

    def __init__(self, settings: Settings):
        self.settings, self.started = settings, time.perf_counter()
        self.machine = detect(settings.device)
        self.preset = self._preset()
        self.recipe = resolve_recipe(settings, self.preset)
        precision = set_up(settings.precision, self.machine, training=True)
        self.accelerator = Accelerator(
            mixed_precision="bf16" if precision == "bf16" else "no",
            cpu=self.machine.device.type == "cpu",
        )
        self.device, self.main = self.accelerator.device, self.accelerator.is_main_process
        self.rows = process_rows(self.recipe.batch, self.accelerator.process_index, self.accelerator.num_processes)
        self.record = Record(settings, replace(self.machine, device=self.device))
        self.folder = output_folder(settings.output)
        self.problem = self._problem()
        self._build_networks()
        self.judges = shipped_classifiers(self.device) if self.main else []
        self.best = BestCandidates(self.folder / "candidates", settings.candidates)
        self.step = 0
        self.history: list[dict[str, Any]] = []  # one entry per grading; seconds: since the start of this process's run
        self._resume()
        self._say(precision)

    def _preset(self) -> str:
        if self.settings.preset != "auto":
            return self.settings.preset
        return "gpu" if self.machine.device.type == "cuda" else "cpu"

    def _problem(self) -> Problem:
        settings, config = self.settings, PRESETS[self.preset]
        schedule = make_schedule(self.recipe.schedule, config.timesteps, self.recipe.prediction)
        with self.accelerator.main_process_first():  # the first decodes, the others read its cache
            data = load_digits(settings.data, "train").to(self.device)
        index = BalancedIndex(data, settings.svhn_share, settings.balance_digits)
        alphas = schedule.alpha_bar.float().to(self.device)
        drops = (settings.drop_digit, settings.drop_domain)
        return Problem(data, index, schedule, alphas, self.recipe.min_snr, *drops)

    def _build_networks(self) -> None:
        torch.manual_seed(self.settings.seed)
        unet = UNet(PRESETS[self.preset])
        if self.settings.init:
            unet.load_state_dict(self._start(self.settings.init, unet).state_dict())
        to_channels_last(unet, self.device)
        self.ema = make_ema(unet, self.recipe.ema)
        fused = self.device.type in ("cuda", "cpu")
        optimizer = torch.optim.AdamW(
            unet.parameters(), self.recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused
        )
        self.compiled = should_compile(self.settings.compile, self.machine)
        if self.compiled:
            unet.compile()
        self.model, self.optimizer = self.accelerator.prepare(unet, optimizer)
        self.unet = self.accelerator.unwrap_model(self.model)

    def _start(self, path: Path, unet: UNet) -> UNet:
        """The network to start from; its layout must be the preset's and its schedule the recipe's."""
        found = load_network(path, torch.device("cpu"))
        ours = (unet.config, self.recipe.schedule, self.recipe.prediction)
        if (found.unet.config, found.schedule_name, found.schedule.prediction) != ours:
            raise BadInput(f"--init {path} is of another layout or schedule than preset {self.preset}")
        return found.unet

    def _say(self, precision: str) -> None:
        if not self.main:
            return
        size = sum(p.numel() for p in self.unet.parameters()) / 1e6
        log(
            f"preset {self.preset} ({size:.1f} M parameters), {precision}, "
            f"{'compiled' if self.compiled else 'eager'}, on {self.machine.name}"
            f"{f', {self.accelerator.num_processes} processes' if self.accelerator.num_processes > 1 else ''}\n"
            f"{len(self.problem.data):,} training pictures from {self.settings.data}; "
            f"{self.recipe.steps:,} steps of {self.recipe.batch}; run folder {self.folder}"
            + (f"; going on at step {self.step:,}" if self.step else "")
        )

    # ------------------------------------------------ checkpoints

    @property
    def checkpoint(self) -> Path:
        """The training's own state; `best.safetensors` beside it is what one samples from."""
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Everything that going on needs; the random numbers follow from seed and step."""
        if not self.main:
            return
        state = {
            "kind": KIND,
            "preset": self.preset,
            "recipe": asdict(self.recipe),
            "step": self.step,
            "history": self.history,
            "timings": self.record.timings,
        }
        save_state(self.checkpoint, state | weights_state(self.unet, self.ema, self.optimizer))

    def _resume(self) -> None:
        if self.settings.resume == "never" or not self.checkpoint.is_file():
            if self.main:
                self.best.clear()
                self.checkpoint.unlink(missing_ok=True)  # without its candidates it must not be gone on from
            return
        state = load_state(self.checkpoint, KIND)
        if state["preset"] != self.preset:
            raise BadInput(
                f"{self.checkpoint} is of preset {state['preset']}, not {self.preset}: "
                "name another --output, that --preset, or --resume never"
            )
        self.ema = restore_weights(state, self.unet, self.optimizer, self.recipe.ema, self.checkpoint)
        self.step, self.history = state["step"], state["history"]
        self.record.timings.update(state["timings"])

    # ------------------------------------------------ training

    def train(self) -> None:
        """Steps until the end or a signal; a checkpoint is left either way."""
        recipe, settings = self.recipe, self.settings
        training_log = TrainingLog(self.folder / "tensorboard", "training", self.step, recipe.steps, self.main)
        with StopSignals() as stop, self.record.timed("training"):
            if self.compiled and self.step < recipe.steps:
                self._compile_apart(training_log)
            while self.step < recipe.steps and not stop.asked:
                training_log.add(self.one_step(), recipe.batch)
                if self._due(settings.log_every) or self._due(settings.save_every):
                    self._report(training_log)  # before saving: a checkpoint must not hold a broken network
                if self._due(settings.save_every):
                    self.save()
                if self._due(settings.eval_every):
                    training_log.pause(self.grade(training_log))
            if training_log.count:
                self._report(training_log)
        training_log.close()
        self.save()

    def _compile_apart(self, training_log: TrainingLog) -> None:
        """The first step compiles for about a minute: its time is told and kept out of the speed."""
        with self.record.timed("first_step"):
            loss = float(self.one_step().detach())
        seconds = self.record.timings["first_step"]
        training_log.bar.update()
        training_log.pause(seconds)
        log(f"compiled: the first step took {seconds:.0f} s (loss {loss:.3f})")

    def _due(self, every: int) -> bool:
        return self.step == self.recipe.steps or bool(every) and self.step % every == 0

    def _report(self, training_log: TrainingLog) -> None:
        loss, speed = training_log.read()
        require_finite(loss, self.step, self.checkpoint, "a lower --lr or --precision fp32")
        if self.main and "loss" not in self.record.metrics:  # the first reading of this run
            minutes = (self.recipe.steps - self.step) * self.recipe.batch / speed / 60
            log(f"about {minutes:.0f} minutes to go, grading apart")
        self.record.metrics |= {"loss": loss, "images_per_s": speed}
        training_log.show(self.step, loss=loss, images_s=speed, lr=self.rate())

    def rate(self) -> float:
        """The learning rate of the step in hand."""
        s, r = self.settings, self.recipe
        return r.lr * lr_factor(self.step, r.steps, s.warmup, s.decay, s.decay_shape)

    def one_step(self) -> Tensor:
        """One optimizer step; returns the loss, which stays on the device."""
        draws = Draws(self.settings.seed, self.step, self.rows, self.recipe.batch, self.device)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        with self.accelerator.autocast():
            loss = diffusion_loss(self.model, self.problem, draws)
        self.accelerator.backward(loss)
        self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.unet)
        self.step += 1
        return loss

    # ------------------------------------------------ grading

    def network(self) -> Network:
        """The averaged weights with all that sampling needs."""
        origin = {"preset": self.preset, "step": self.step, "recipe": asdict(self.recipe)}
        return Network(
            cast(UNet, self.ema.module.eval()),
            self.problem.schedule,
            self.recipe.schedule,
            asdict(self.recipe.sampler),
            origin | {"settings": {k: v for k, v in asdict(self.settings).items() if not isinstance(v, Path)}},
        )

    def grade(self, training_log: TrainingLog) -> float:
        """Draws and judges 10 pictures per digit and domain, keeps the best; returns the seconds it took."""
        start = time.perf_counter()
        if self.main:
            network = self.network()
            scores, images = graded(network, self.judges, self.settings.eval_count, self.settings.seed)
            entry = {"mnistm": scores[0], "svhn": scores[1], "accuracy": sum(scores) / len(scores)}
            save_image(self.folder / f"step-{self.step:06d}.png", digit_sheet(images))
            training_log.show(self.step, **entry)
            self.history.append({"step": self.step, "seconds": round(start - self.started, 1), **entry})
            if self.best.offer(self.step, entry["accuracy"], partial(save_network, network=network)):
                save_network(self.folder / "best.safetensors", network, torch.float16)
        return time.perf_counter() - start

    def finish(self) -> None:
        """Grades the candidates again with more pictures, since 200 carry a standard error of 0.7 points; the best one wins."""
        if not self.best.ranked():  # stopped between the last step and its grading
            self.best.offer(self.step, 0.0, partial(save_network, network=self.network()))
        results = []
        for path in self.best.ranked():
            network = load_network(path, self.device)
            scores, images = graded(network, self.judges, self.settings.final_count, self.settings.seed + 1)
            results.append((sum(scores) / len(scores), scores, network, images))
            log(f"step {path.stem}, {len(images):,} pictures: mnistm {scores[0]:.4f}, svhn {scores[1]:.4f}")
        mean, scores, network, images = max(results, key=lambda r: r[0])
        self.record.metrics |= {"accuracy": mean, "mnistm": scores[0], "svhn": scores[1]}
        origin = network.origin | {"accuracy": mean, "mnistm": scores[0], "svhn": scores[1]}
        save_network(self.folder / "best.safetensors", replace(network, origin=origin), torch.float16)
        save_image(self.folder / "best.png", digit_sheet(images))
        step = network.origin["step"]
        log(f"best: step {step:,}, accuracy {mean:.4f}: {self.folder / 'best.safetensors'}")


def graded(network: Network, judges: list[DigitClassifier], count: int, seed: int) -> tuple[list[float], Tensor]:
    """Accuracy per domain of `count` pictures per digit and domain, and the pictures [N,3,28,28] uint8."""
    pictures = graded_requests(seed, count)
    images = to_uint8(
        sample_all(network, pictures, DigitSamplerConfig.from_dict(network.sampler), min(100, len(pictures)), "grading")
    )
    return accuracy(judges, images, *labels_of(pictures)), images


def digit_sheet(images: Tensor) -> Tensor:
    """[2*10*count,3,28,28] -> at most ten pictures per digit: rows are digits, MNIST-M left and SVHN right."""
    sets = images.view(2, DIGITS, -1, *images.shape[1:])[:, :, :10]
    columns = 2 * sets.shape[2]
    return image_grid(torch.cat(list(sets), dim=1).flatten(0, 1), columns, scale=2)


def main(settings: Settings) -> None:
    """Trains, grades, records."""
    trainer = Trainer(settings)
    trainer.train()
    if not trainer.main:
        return
    if trainer.step >= trainer.recipe.steps:
        with trainer.record.timed("final_grading"):
            trainer.finish()
    else:
        without = " without --resume never" if settings.resume == "never" else ""
        log(f"stopped at step {trainer.step:,}; the same command{without} goes on from {trainer.checkpoint}")
    processes = trainer.accelerator.num_processes
    trainer.record.metrics |= {"step": trainer.step, "processes": processes, "history": trainer.history}
    trainer.record.save(trainer.folder / "record.json")
    if trainer.step < trainer.recipe.steps:
        raise SystemExit(130)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
