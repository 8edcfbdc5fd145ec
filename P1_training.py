"""Train one conditional diffusion model for the digits of both domains, or for images of your own.

  python P1_training.py                              detects preset, precision and data; continues the run folder's checkpoint
  python P1_training.py --preset report              the report's recipe: T = 500, linear schedule, one-hot context, lr 1e-3
  python P1_training.py --data my/images --output runs/mine          a folder per class, or per domain and class (docs/p1.md)
  python P1_training.py --distill runs/p1/best.safetensors --output runs/fast       distills guidance into one call per step: half the cost
  python P1_training.py --distill runs/fast/best.safetensors --distill-steps 5 2 --output runs/faster      draws in 5 or 2 calls
  accelerate launch P1_training.py --batch 1024      several GPUs; torchrun works as well

Ctrl-C or SIGTERM stops after the current step and writes a checkpoint; the same command continues from it.
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import math
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import torch
from torch import Tensor

from diffusion.loss import Weight, denoising_loss, min_snr_weight
from diffusion.schedule import Prediction, Schedule, make_schedule
from digits.classifier import DigitClassifier, accuracy, choose_classifiers
from digits.distillation import StepTeacher, Teacher
from digits.recipes import RECIPES, TrainingRecipe, preset_values
from digits.sampling import DigitSampler, DigitSamplerConfig, graded_requests, labels_of
from P1_dataloader import BalancedIndex, Digits, load_digits
from P1_model import HOMEWORK, PRESETS, DataSpec, ModelConfig, Network, UNet, load_network, save_network
from runtime.cli import (
    BadInput,
    Seed,
    check_fractions,
    check_not_negative,
    check_positive,
    default_hint,
    log,
    run_script,
)
from runtime.device import AutoOnOff, Device, Precision, detect, set_up, should_compile, to_channels_last
from runtime.files import ROOT, file_fingerprint, output_folder
from runtime.images import decoration, image_grid, save_image, to_float, to_uint8
from runtime.record import Record
from training.best import BestCandidates
from training.cpu_layers import compile_network
from training.draws import Draws, process_rows
from training.ema import Ema
from training.loop import LoopConfig, Trained, TrainingRun
from training.schedule import LearningRate
from training.tracking import Track, check_tracker


@dataclass(frozen=True)
class Settings:
    """Flags of a training; None takes the preset's value."""

    data: Path = ROOT / "hw2_data" / "digits"
    """Folder with mnistm/ and svhn/ (see hw2_data/README.md). For your own images: with CLASS/ or DOMAIN/CLASS/ folders."""
    output: Path = Path("runs/p1")
    """Run folder: checkpoint, best weights, sample sheets, TensorBoard, record.json."""
    preset: Literal["auto", "report", "tiny", "cpu", "gpu", "large"] = "auto"
    """Network and recipe. auto = gpu if there is a GPU, else cpu."""
    steps: Annotated[int | None, default_hint(preset_values("steps"))] = None
    """Optimizer steps in total. A run that continues may be given more."""
    batch: Annotated[int | None, default_hint(preset_values("batch"))] = None
    """Images per step over all processes."""
    lr: Annotated[float | None, default_hint(preset_values("lr"))] = None
    """Peak learning rate of AdamW."""
    warmup: int = 200
    """Steps at the start over which the learning rate rises to --lr."""
    decay: float = 0.5
    """Share of the steps, at the end, over which the learning rate falls to zero."""
    decay_shape: Literal["linear", "cosine"] = "linear"
    schedule: Annotated[Literal["linear", "cosine"] | None, default_hint(preset_values("schedule"))] = None
    """Noise schedule."""
    prediction: Annotated[Prediction | None, default_hint(preset_values("prediction"))] = None
    """What the network predicts: the noise (eps), or v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x0."""
    min_snr: Annotated[float | None, default_hint(preset_values("min_snr"))] = None
    """Gamma of the min-SNR loss weight (Hang et al. 2023). 0 = off."""
    drop_digit: float = 0.15
    """Share of images trained with the null label as digit, 0..1. Guidance needs it above 0."""
    drop_domain: float = 0.1
    """Share of images trained with the null label as domain, 0..1."""
    svhn_share: float | None = 0.6
    """Expected share of SVHN, the harder domain, in a batch, 0..1. For other data: all domains equally often. None = as in the data."""
    balance_digits: bool = True
    """Sample SVHN's digits, which are unbalanced, equally often. For other data: the classes of each domain."""
    ema: Annotated[float | None, default_hint(preset_values("ema"))] = None
    """Decay per step of the weights' average (EMA), which is graded and saved."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm. inf = no clipping."""
    seed: Seed = 0
    """Seed of the initial weights and of all random numbers of the training."""
    device: Device = "auto"
    precision: Precision = "auto"
    """auto = bf16 where the hardware has it, else fp16 on CUDA, else fp32."""
    compile: AutoOnOff = "auto"
    """torch.compile. auto = on from 2,000 steps on CUDA, from 500 on a CPU with bf16, if a compiler works; else off."""
    classifiers: tuple[str, ...] = ("auto",)
    """Files of P1_classifier.py, one per domain, whose accuracy chooses the best weights. none = the validation loss chooses.
    auto = the shipped ones for the homework's digits, none for other data."""
    eval_every: int = 1000
    """Steps between two gradings of samples. 0 = only at the end."""
    eval_count: int = 10
    """Images per digit and domain in each of these gradings."""
    candidates: int = 3
    """Number of best-graded weights to grade again at the end, with more images."""
    final_count: int = 50
    """Images per digit and domain in that last grading."""
    save_every: int = 500
    """Steps between two checkpoints. 0 = only at the end."""
    log_every: int = 50
    """Steps between two reports of the loss."""
    track: Track = None
    init: Path | None = None
    """Checkpoint with weights to start from (best.safetensors or shipped), with a new optimizer. None = random weights."""
    distill: Path | None = None
    """Checkpoint to distill: the network starts from its weights and learns its guided output, at one call per step. None = off."""
    distill_steps: Annotated[tuple[int, ...], default_hint("off")] = ()
    """Numbers of sampling steps in which the network learns to draw what the checkpoint of --distill draws in all its steps of dpm.
    Each divides that number, which is 10 after --distill. The first becomes the default of sampling."""
    max_guidance: float = 7.0
    """Largest guidance scale that --distill learns; it trains on scales from 1 to this. A distilled checkpoint keeps its own."""
    resume: Literal["auto", "never"] = "auto"
    """auto = continue the run folder's checkpoint if there is one; never = start over."""


def resolve_recipe(settings: Settings, preset: str, source: Network | None = None) -> TrainingRecipe:
    """Return the preset's recipe, with the values replaced that flags set; raise BadInput for an invalid value.

    `source` is the network to distill, which decides schedule and prediction. None = no distillation.
    """
    flags = {f.name: value for f in fields(TrainingRecipe) if (value := getattr(settings, f.name, None)) is not None}
    recipe = replace(RECIPES[preset], **flags)
    if source:
        sampler = replace(recipe.sampler, guidance=min(recipe.sampler.guidance, largest_guidance(settings, source)))
        if settings.distill_steps:
            sampler = replace(sampler, steps=settings.distill_steps[0])
        decided: dict[str, Any] = {"schedule": source.schedule_name, "prediction": source.schedule.prediction}
        recipe = replace(recipe, sampler=sampler, **decided)
    check_positive(recipe, "steps", "batch", "lr")
    check_not_negative(recipe, "min_snr")
    check_positive(settings, "eval_count", "candidates", "final_count")
    check_not_negative(settings, "warmup", "eval_every", "save_every", "log_every")
    check_fractions(settings, "drop_digit", "drop_domain", "svhn_share", "ema", "decay")
    if not settings.max_grad_norm > 0:  # inf is fine
        raise BadInput(f"--max-grad-norm {settings.max_grad_norm}: must be above zero")
    return recipe


# ---------------------------------------------------------------- training


def main(settings: Settings) -> None:
    """Train, grade the averaged weights at intervals, and save the best ones as best.safetensors."""
    from accelerate import Accelerator  # slow to import

    # the machine and the recipe
    check_tracker(settings.track)
    machine = detect(settings.device)
    preset: str = settings.preset
    if preset == "auto":
        preset = "gpu" if machine.device.type == "cuda" else "cpu"
    source = None
    if settings.distill:
        preset = "distill-steps" if settings.distill_steps else "distill"
        source = network_to_distill(settings, settings.distill)
    elif settings.max_guidance != Settings.max_guidance:
        raise BadInput(f"--max-guidance {settings.max_guidance}: goes with --distill")
    elif settings.distill_steps:
        raise BadInput(f"--distill-steps {' '.join(map(str, settings.distill_steps))}: goes with --distill")
    recipe = resolve_recipe(settings, preset, source)
    precision = set_up(settings.precision, machine, training=True)
    accelerator = Accelerator(mixed_precision="no", cpu=machine.device.type == "cpu")  # devices and processes only
    device = accelerator.device
    share = process_rows(recipe.batch, accelerator.process_index, accelerator.num_processes)
    record = Record(settings, replace(machine, device=device))
    folder = output_folder(settings.output)

    # the data, and what the loss needs of the schedule
    with accelerator.main_process_first():  # the first decodes, the others read its cache
        data = load_digits(settings.data, "train").to(device)
    spec = data.spec
    if source and source.spec != spec:
        raise BadInput(f"--distill {settings.distill} draws {source.spec}; the data are {spec}")
    if spec != HOMEWORK and settings.svhn_share not in (None, Settings.svhn_share):
        raise BadInput(f"--svhn-share {settings.svhn_share}: the data are no digits of MNIST-M and SVHN, but {spec}")
    classifiers = choose_classifiers(settings.classifiers, spec, device)
    index = BalancedIndex(data, settings.svhn_share, settings.balance_digits)
    layout = source.unet.config if source else PRESETS[preset]
    max_guidance = largest_guidance(settings, source) if source else None
    config = replace(layout, spec=spec, max_guidance=max_guidance, distilled_steps=settings.distill_steps)
    schedule = make_schedule(recipe.schedule, config.timesteps, recipe.prediction)
    alpha_bar = schedule.alpha_bar.float().to(device)
    weight = partial(min_snr_weight, gamma=recipe.min_snr, prediction=recipe.prediction) if recipe.min_snr else None
    teacher: Teacher | None = None
    if source and max_guidance:
        teacher = Teacher(to_channels_last(source.unet, device), max_guidance)
        if settings.distill_steps:
            steps = DigitSamplerConfig.from_dict(source.sampler).steps
            teacher = StepTeacher(teacher.unet, max_guidance, schedule, steps, settings.distill_steps)
    validate = None
    if not classifiers:
        val = load_digits(settings.data, "val").to(device)
        validate = partial(validation_loss, data=val, weight=weight, teacher=teacher)

    # the network, its average and its optimizer
    torch.manual_seed(settings.seed)
    unet = UNet(config)
    if settings.init:
        unet.load_state_dict(initial_weights(settings.init, config, preset, recipe))
    if source:  # all but the embeddings of guidance scale and steps, which start at zero
        unet.load_state_dict(source.unet.state_dict(), strict=False)
    to_channels_last(unet, device)
    ema = Ema(unet, recipe.ema)
    fused = device.type in ("cuda", "cpu")
    adamw = torch.optim.AdamW(unet.parameters(), recipe.lr, betas=(0.9, 0.99), weight_decay=0.01, fused=fused)
    compiled = should_compile(settings.compile, machine, worthwhile=recipe.steps >= machine.compile_steps)
    for each in [unet, *([teacher.unet] if teacher else [])] if compiled else []:
        compile_network(each, device)
    model, optimizer = accelerator.prepare(unet, adamw)

    # the run: continues from its checkpoint if there is one
    facts = facts_of(settings, preset, recipe, spec) | {"data": data.fingerprint()}
    loop, trained = loop_config(settings, recipe, precision, compiled), Trained(unet, optimizer, ema)
    run = TrainingRun(loop, facts, trained, record, accelerator, resume=settings.resume == "auto")
    averaged = partial(averaged_network, ema, schedule, preset, recipe, settings)
    grading = Grading(settings, run, averaged, device, classifiers, validate)
    if run.is_main:
        log(
            f"preset {preset} ({sum(p.numel() for p in unet.parameters()) / 1e6:.1f} M parameters), {precision}, "
            f"{'compiled' if compiled else 'eager'}, on {machine.name}, {accelerator.num_processes} process(es)\n"
            f"{len(data):,} training images from {settings.data}; {recipe.steps:,} steps of {recipe.batch}; run folder {folder}"
        )
        if spec != HOMEWORK:
            log(
                f"the data are {spec}; {'--classifiers' if classifiers else 'the validation loss'} will choose the best weights"
            )

    for step in run:
        # a batch, with some labels dropped so that the network learns the unconditional prediction too
        draws = Draws(settings.seed, step, share, recipe.batch, device)
        rows = index(draws.uniform(), draws.uniform())
        digit = torch.where(draws.uniform() < settings.drop_digit, spec.no_class, data.digits[rows])
        domain = torch.where(draws.uniform() < settings.drop_domain, spec.no_domain, data.domains[rows])
        x0, t = to_float(data.images[rows]), draws.timesteps(len(schedule))
        eps = draws.normal(*x0.shape[1:])

        labels, lesson = [digit, domain], None
        if teacher:
            labels.append(guidance := teacher.scales(draws.uniform()))
            lesson = partial(teacher, digit=digit, domain=domain, guidance=guidance)

        # the loss, against the data or the teacher's guided output, and one optimizer step
        def network(x: Tensor, t: Tensor, labels: Sequence[Tensor] = labels) -> Tensor:
            output: Tensor = model(x.contiguous(memory_format=torch.channels_last), t, *labels)
            return output

        with run.autocast():
            loss = denoising_loss(network, x0, eps, t, alpha_bar, recipe.prediction, weight, lesson)
            if isinstance(teacher, StepTeacher):
                loss = loss + teacher.loss(model, draws.normal(*x0.shape[1:]), *labels)
        run.update(loss)

        # now and then: sample, grade, keep the weights if they are among the best
        if run.is_main and run.every(settings.eval_every):
            grading.evaluate()

    if run.is_main and run.done:
        with run.last_work(), record.timed("final_grading"):
            record.metrics |= grading.choose_best()
    run.finish(history=grading.history)
    best = str(settings.output / "best.safetensors")
    own = ["python", "P1_inference.py", "--model", best, "--output", "out/mine"]
    log(f"next: {shlex.join(['bash', 'hw2_1.sh', 'out', best] if spec == HOMEWORK else own)}")


def network_to_distill(settings: Settings, path: Path) -> Network:
    """Load the network to distill; raise BadInput if it is distilled already, or a flag does not fit it."""
    for name in ("preset", "schedule", "prediction", "init"):
        if (value := getattr(settings, name)) not in ("auto", None):
            raise BadInput(f"--{name} {value}: the checkpoint of --distill decides it, leave it out")
    if not 1 < settings.max_guidance < math.inf:
        raise BadInput(f"--max-guidance {settings.max_guidance}: must be above 1")
    network = load_network(path, torch.device("cpu"))
    config, sampler = network.unet.config, DigitSamplerConfig.from_dict(network.sampler)
    if config.distilled_steps or (config.max_guidance and not settings.distill_steps):
        raise BadInput(f"--distill {path} is distilled already: give the checkpoint that it was made from")
    if config.max_guidance and settings.max_guidance not in (Settings.max_guidance, config.max_guidance):
        raise BadInput(f"--max-guidance {settings.max_guidance}: the checkpoint of --distill decides it, leave it out")
    if settings.distill_steps and sampler.name != "dpm":
        raise BadInput(f"--distill {path}: its sampler is {sampler.name}, --distill-steps learns from dpm alone")
    if len({*settings.distill_steps}) < len(settings.distill_steps):
        raise BadInput(f"--distill-steps {' '.join(map(str, settings.distill_steps))}: give each number once")
    for steps in settings.distill_steps:
        if not 0 < steps < sampler.steps or sampler.steps % steps:
            raise BadInput(
                f"--distill-steps {steps}: give divisors of the {sampler.steps} steps of {path}, below that number"
            )
    return network


def largest_guidance(settings: Settings, source: Network) -> float:
    """Return the largest guidance scale that the student learns: that of a distilled `source`, else --max-guidance."""
    return source.unet.config.max_guidance or settings.max_guidance


def initial_weights(path: Path, config: ModelConfig, preset: str, recipe: TrainingRecipe) -> dict[str, Tensor]:
    """Return the weights of the checkpoint `path`; raise BadInput unless its images, layout and schedule are those of this training.

    The embeddings of guidance scale and steps are left out of a distilled checkpoint. The rest is the conditional network.
    """
    start = load_network(path, torch.device("cpu"))
    if start.spec != config.spec:
        raise BadInput(f"--init {path} draws {start.spec}; the data are {config.spec}")
    ours = (config, recipe.schedule, recipe.prediction)
    if (
        replace(start.unet.config, max_guidance=None, distilled_steps=()),
        start.schedule_name,
        start.schedule.prediction,
    ) != ours:
        raise BadInput(f"--init {path} is of another layout or schedule than preset {preset}")
    return {
        name: value for name, value in start.unet.state_dict().items() if not name.startswith(("guidance.", "steps."))
    }


def loop_config(settings: Settings, recipe: TrainingRecipe, precision: str, compiled: bool) -> LoopConfig:
    """Return the settings with which the shared training loop runs this training."""
    return LoopConfig(
        "P1 training",
        settings.output,
        recipe.steps,
        recipe.batch,
        LearningRate(recipe.lr, settings.warmup, settings.decay, settings.decay_shape),
        max_grad_norm=settings.max_grad_norm,
        log_every=settings.log_every,
        save_every=settings.save_every,
        compiled=compiled,
        elsewhere="--output OTHER (with --init to start from trained weights), or --resume never",
        precision=precision,
        track=settings.track,
    )


def facts_of(settings: Settings, preset: str, recipe: TrainingRecipe, spec: DataSpec) -> dict[str, Any]:
    """Return the settings that decide the weights, apart from the data. A run continues only if they are unchanged."""
    names = (
        "warmup", "decay", "decay_shape", "drop_digit", "drop_domain", "svhn_share", "balance_digits", "max_grad_norm", "seed",
    )  # fmt: skip
    chosen = {name: getattr(settings, name) for name in names}
    recipe_facts = {k: v for k, v in asdict(recipe).items() if k not in ("steps", "sampler")}
    init, distill = (file and file_fingerprint(file) for file in (settings.init, settings.distill))
    starts: dict[str, Any] = {
        "init": init, "distill": distill, "max_guidance": settings.max_guidance if distill else None,
    }  # fmt: skip
    if settings.distill_steps:
        starts["distill_steps"] = list(settings.distill_steps)
    # what ranks the candidates; None = the default
    files = (
        [] if {*settings.classifiers} <= {"auto", "none"} else [file_fingerprint(Path(f)) for f in settings.classifiers]
    )
    ungraded = settings.classifiers == ("none",) and spec == HOMEWORK
    grader = files or ("none" if ungraded else None)
    return {"preset": preset, **recipe_facts, **chosen, **starts, "classifiers": grader}


# ---------------------------------------------------------------- grading


def averaged_network(
    ema: Ema, schedule: Schedule, preset: str, recipe: TrainingRecipe, settings: Settings, step: int
) -> Network:
    """Return the averaged weights (no copy) as a Network with all that sampling needs."""
    plain = {k: v for k, v in asdict(settings).items() if not isinstance(v, Path) and k not in ("classifiers", "track")}
    origin = {"preset": preset, "step": step, "recipe": asdict(recipe), "settings": plain}
    return Network(cast(UNet, ema.module.eval()), schedule, recipe.schedule, asdict(recipe.sampler), origin)


SHEET = 10  # images per class and domain on a sheet of samples
NOISES = 8  # validation images per sampled image: a loss costs less than a sample


@torch.inference_mode()
def validation_loss(
    network: Network, count: int, seed: int, data: Digits, weight: Weight | None, teacher: Teacher | None = None
) -> float:
    """Return the mean loss over NOISES * count * classes * domains random validation images.

    The seed fixes all random numbers. With a teacher, the target is its guided output.
    With a StepTeacher, its loss is added, over count * classes * domains images.
    """
    schedule, device = network.schedule, data.images.device
    index, alpha_bar = BalancedIndex(data, 0.5, True), schedule.alpha_bar.float().to(device)
    noises, size = (1, 50) if isinstance(teacher, StepTeacher) else (NOISES, 500)  # its loss samples too
    total, loss = noises * count * len(data.spec.classes) * len(data.spec.domains), 0.0
    for start in range(0, total, size):
        draws = Draws(seed, start, slice(None), min(size, total - start), device)
        rows = index(draws.uniform(), draws.uniform())
        x0, t = to_float(data.images[rows]), draws.timesteps(len(schedule))
        eps, digit, domain = draws.normal(*x0.shape[1:]), data.digits[rows], data.domains[rows]
        guidance, lesson = None, None
        if teacher:
            guidance = teacher.scales(draws.uniform())
            lesson = partial(teacher, digit=digit, domain=domain, guidance=guidance)
        predict = partial(network.unet, digit=digit, domain=domain, guidance=guidance)
        mean = denoising_loss(predict, x0, eps, t, alpha_bar, schedule.prediction, weight, lesson)
        if guidance is not None and isinstance(teacher, StepTeacher):
            mean = mean + teacher.loss(network.unet, draws.normal(*x0.shape[1:]), digit, domain, guidance)
        loss += float(mean) * len(rows)
    return loss / total


class Grading:
    """The gradings of a training: samples of the averaged weights, their scores, and the best weights as files.

    The score is the classifiers' mean accuracy on the samples, or without classifiers the validation loss.
    """

    def __init__(
        self,
        settings: Settings,
        run: TrainingRun,
        averaged: Callable[[int], Network],
        device: torch.device,
        classifiers: list[DigitClassifier],
        validate: Callable[[Network, int, int], float] | None,
    ):
        """Delete the candidates of an earlier run, unless this run continues it.

        `averaged(step)` returns the network to grade, `validate(network, count, seed)` its loss (None = use classifiers).
        """
        self.settings, self.run, self.averaged, self.device = settings, run, averaged, device
        self.classifiers, self.validate = classifiers, validate
        self.history: list[dict[str, Any]] = run.history.setdefault("gradings", [])
        self.candidates = BestCandidates(settings.output / "candidates", settings.candidates)
        if run.is_main and not run.resumed:
            self.candidates.clear()
        self.started = time.perf_counter()

    def score(self, network: Network, count: int, seed: int) -> tuple[dict[str, float], Tensor]:
        """Sample `count` images per digit and domain; return the accuracies (per domain and mean) and the images [N,C,H,W] uint8.

        Without classifiers return the validation loss instead, and at most SHEET images per digit and domain.
        """
        requests = graded_requests(seed, min(count, SHEET) if self.validate else count, spec=network.spec)
        config = DigitSamplerConfig.from_dict(network.sampler)
        images = to_uint8(DigitSampler(network, config, min(100, len(requests))).images(requests, "grading"))
        if self.validate:
            return {"val_loss": self.validate(network, count, seed)}, images
        shares = accuracy(self.classifiers, images, *labels_of(requests))
        scores = dict(zip(network.spec.domains, shares, strict=True))
        return scores | {"accuracy": sum(shares) / len(shares)}, images

    def evaluate(self) -> None:
        """Grade the averaged weights of this step, save a sheet of their samples, and save the weights if they are among the best."""
        step, seconds = self.run.step, time.perf_counter() - self.started
        network = self.averaged(step)
        scores, images = self.score(network, self.settings.eval_count, self.settings.seed)
        self.history.append({"step": step, "seconds": round(seconds, 1), **scores})
        with decoration(path := self.settings.output / f"step-{step:06d}.png"):
            save_image(path, sheet := digit_sheet(images, network.spec))
            self.run.log.image(step, "sheet", sheet)
        self.run.log.show(step, **scores)
        if self.candidates.offer(step, rank(scores), partial(save_network, network=network)):
            save_network(self.settings.output / "best.safetensors", network, torch.float16)

    def choose_best(self) -> dict[str, float]:
        """Grade the candidates again with more images, save the best as best.safetensors, and return its scores.

        An accuracy over the 200 images of one grading has a standard error of 0.7 points, too much for a choice.
        """
        if not self.candidates.ranked():  # stopped between the last step and its grading
            self.candidates.offer(self.run.step, 0.0, partial(save_network, network=self.averaged(self.run.step)))
        results = []
        for path in self.candidates.ranked():
            network = load_network(path, self.device)
            scores, images = self.score(network, self.settings.final_count, self.settings.seed + 1)
            results.append((scores, network, images))
            shown = ", ".join(f"{name} {value:.4f}" for name, value in scores.items() if name != "accuracy")
            log(f"step {network.origin['step']:,}, {len(images):,} images: {shown}")

        scores, network, images = max(results, key=lambda result: rank(result[0]))
        best = self.settings.output / "best.safetensors"
        save_network(best, replace(network, origin=network.origin | scores), torch.float16)
        with decoration(sheet := self.settings.output / "best.png"):
            save_image(sheet, digit_sheet(images, network.spec))
        name, value = list(scores.items())[-1]  # the mean accuracy, or the validation loss
        log(f"best: step {network.origin['step']:,}, {name.replace('_', ' ')} {value:.4f}: {best}")
        return scores


def rank(scores: dict[str, float]) -> float:
    """Return the score that ranks weights, higher is better: the mean accuracy, or minus the validation loss."""
    return scores["accuracy"] if "accuracy" in scores else -scores["val_loss"]


def digit_sheet(images: Tensor, spec: DataSpec = HOMEWORK) -> Tensor:
    """Return samples [2*10*count,3,28,28] as one image: per digit a row of up to ten images of MNIST-M, then of SVHN."""
    sets = images.view(len(spec.domains), len(spec.classes), -1, *images.shape[1:])[:, :, :SHEET]
    return image_grid(torch.cat(list(sets), dim=1).flatten(0, 1), columns=len(sets) * sets.shape[2], scale=2)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
