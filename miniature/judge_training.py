"""How the judge learns: fresh pictures at every step, made as imperfect as generated ones, with all questions asked at once."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.judge_model import KIND, NONE, SHIPPED, Logits, SceneNetwork, erase, to_float
from miniature.judge_truth import IGNORED, Truth, truth_of
from miniature.scenery.render import as_tensor, batch
from miniature.scenery.scenes import SIDE, SceneSpec
from runtime.cli import BadInput, check_positive, log
from runtime.device import Device, detect, to_channels_last
from runtime.files import load_safetensors
from runtime.seeds import derived_seed
from training.checkpoint import load_state, require_finite, restore_weights, save_state, weights_state
from training.draws import Draws
from training.ema import make_ema
from training.log import TrainingLog
from training.schedule import lr_factor
from training.signals import StopSignals

ANY = SceneSpec(pairs="any")  # a meter must know the held-out pairs as well as the others


@dataclass(frozen=True)
class Train:
    """Trains a judge on pictures rendered on the way; stops cleanly on Ctrl-C or SIGTERM, and goes on with the same command."""

    output: Path = SHIPPED
    """The judge file."""
    init: Path | None = None
    """A judge file to start from; layers that it lacks, or has in another shape, start anew."""
    steps: int = 2600
    batch: int = 64
    """Pictures per step."""
    lr: float = 3e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.05
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones that are kept."""
    erased: float = 0.25
    """Share of pictures in which one object is painted over."""
    save_every: int = 100
    """Steps between checkpoints."""
    grade: int = 1000
    """Fresh pictures on which the finished judge is graded."""
    seed: int = 0
    device: Device = "auto"
    run: Path = Path("runs/miniature/judge")
    """Run folder: checkpoint, TensorBoard, record.json."""


# ---------------------------------------------------------------- one batch


def worsen(x: Tensor, draws: Draws) -> Tensor:
    """[N,3,64,64] in -1..1 as generated pictures come: bent, softened, with other contrast and tint, noisy."""

    def between(low: float, high: float) -> Tensor:
        return low + (high - low) * draws.uniform()[:, None, None, None]

    x = _bent(x, draws, between(0, 1.3))
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    x = torch.lerp(x, soft, between(0, 1).square())
    coarse = F.interpolate(F.avg_pool2d(x, 2), scale_factor=2, mode="bilinear")
    x = torch.where(between(0, 1) < 0.2, torch.lerp(x, coarse, between(0.3, 0.9)), x)
    grey = x.mean(1, keepdim=True)
    x = (grey + between(0.8, 1.15) * (x - grey)) * between(0.85, 1.1) + 0.05 * draws.normal(3, 1, 1)
    x = x + between(0, 0.09) * draws.normal(3, SIDE, SIDE)
    return x.clamp(-1, 1)


def _bent(x: Tensor, draws: Draws, strength: Tensor) -> Tensor:
    """Every point moved by about `strength` pixels, neighbours alike."""
    field = F.interpolate(draws.normal(2, 9, 9), size=(SIDE, SIDE), mode="bicubic", align_corners=True)
    axis = (torch.arange(SIDE, device=x.device) + 0.5) * (2 / SIDE) - 1
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="xy"), -1)
    shift = (field * strength * (2 / SIDE)).permute(0, 2, 3, 1)
    return F.grid_sample(x, grid + shift, padding_mode="border", align_corners=False)


def loss_of(network: SceneNetwork, x: Tensor, truth: Truth) -> Tensor:
    """The sum of all questions' mean losses; cells with and without an object count equally, as the former are few."""
    features = network.features(x)
    whole, cells = network.look(features)
    boxed = network.look_into(features, truth.boxes.to(x), truth.rows.to(x.device))
    kinds = truth.cells["kind"]
    objects = torch.where(kinds == NONE, IGNORED, kinds)
    empty = torch.where(kinds == NONE, NONE, IGNORED)
    around = _loss(cells, truth.cells | {"kind": objects}) + _loss({"kind": cells["kind"]}, {"kind": empty})
    return _loss(whole, truth.whole) + _loss(boxed, truth.boxed) + around


def _loss(logits: Logits, labels: dict[str, Tensor]) -> Tensor:
    total = torch.zeros((), device=next(iter(logits.values())).device)
    for question, found in logits.items():
        label = labels[question].to(total.device)
        if (label != IGNORED).any():
            total = total + F.cross_entropy(found.float(), label, ignore_index=IGNORED)
    return total


# ---------------------------------------------------------------- the run


class Training:
    """One run: what is set up once, and the loop."""

    def __init__(self, settings: Train):
        check_positive(settings, "steps", "batch", "save_every", "grade")
        self.settings, self.machine = settings, detect(settings.device)
        self.device = self.machine.device
        torch.manual_seed(settings.seed)
        self.network = SceneNetwork()
        if settings.init:
            self._start(settings.init)
        to_channels_last(self.network, self.device)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.ema, self.step, self.seconds = make_ema(self.network, settings.ema), 0, 0.0
        self._resume()

    def _start(self, path: Path) -> None:
        ours, given = self.network.state_dict(), load_safetensors(path)[0]
        fitting = {name: x for name, x in given.items() if name in ours and x.shape == ours[name].shape}
        if not fitting:
            raise BadInput(f"--init {path} has no layer of a judge")
        self.network.load_state_dict(fitting, strict=False)
        log(f"{len(fitting)} of {len(ours)} tensors from {path}")

    @property
    def checkpoint(self) -> Path:
        """The training's own state."""
        return self.settings.run / "checkpoint.pt"

    def save(self) -> None:
        """Everything that going on needs; the random numbers follow from seed and step."""
        state = {
            "kind": KIND,
            "step": self.step,
            "seconds": self.seconds,
        }
        save_state(self.checkpoint, state | weights_state(self.network, self.ema, self.optimizer))

    def _resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        state = load_state(self.checkpoint, KIND)
        self.ema = restore_weights(state, self.network, self.optimizer, self.settings.ema, self.checkpoint)
        self.step, self.seconds = state["step"], state["seconds"]
        log(f"going on at step {self.step:,} from {self.checkpoint}")

    def train(self) -> SceneNetwork:
        """Steps until the end or a signal; a checkpoint is left either way. Returns the averaged network."""
        settings, start = self.settings, time.perf_counter() - self.seconds
        log = TrainingLog(settings.run / "tensorboard", "judge", self.step, settings.steps, True)
        with StopSignals() as stop:
            while self.step < settings.steps and not stop.asked:
                log.add(self.one_step(), settings.batch)
                self.seconds = time.perf_counter() - start
                if self.step % settings.save_every == 0:
                    loss, speed = log.read()
                    require_finite(loss, self.step, self.checkpoint)
                    log.show(self.step, loss=loss, images_s=speed)
                    self.save()
        log.close()
        self.save()
        return self.ema.module.eval()  # type: ignore[return-value]

    def one_step(self) -> Tensor:
        """One optimizer step; returns the loss."""
        s = self.settings
        draws = Draws(s.seed, self.step, slice(s.batch), s.batch, self.device)
        x, truth = make_batch(s.seed, self.step, s.batch, s.erased, self.device)
        x = worsen(x, draws).contiguous(memory_format=torch.channels_last)
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * lr_factor(self.step, s.steps, max(1, s.steps // 10), 0.8)
        loss = loss_of(self.network, x, truth)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update_parameters(self.network)
        self.step += 1
        return loss


def make_batch(seed: int, step: int, count: int, erased: float, device: torch.device) -> tuple[Tensor, Truth]:
    """Fresh pictures [count,3,64,64] in -1..1, some with an object painted over, and their labels."""
    made = batch([derived_seed(seed, step, index) for index in range(count)], ANY)
    random = Random(derived_seed(seed, step))
    gone = [random.randrange(len(s.things)) if random.random() < erased else None for s in made.scenes]
    truth = truth_of(made.scenes, gone, random)
    x = to_float(as_tensor(made.images).to(device))
    return erase(x, truth.erased.to(device), truth.which.to(device)), truth
