"""How the judge learns: fresh pictures at every step, made as imperfect as generated ones, with all questions asked at once."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from torch import Tensor

from miniature.judge_model import BOXED, EACH, KIND, NONE, SHIPPED, WHOLE, JudgeNetwork, Logits, erase, to_float
from miniature.scenes import ALL_KINDS, ALL_STYLES, BACKGROUNDS, COLOURS, GROUNDS, PLACES, SIDE, Box, Scene, Wish
from miniature.world import as_tensor, batch
from runtime.cli import BadInput, note
from runtime.device import detect
from runtime.generation import derived_seed
from training.checkpoint import load_state, save_state
from training.draws import Draws
from training.ema import make_ema
from training.log import TrainingLog
from training.rate import rate_factor
from training.signals import StopSignals

IGNORED = -100  # label of a question that has no answer here
ANY = Wish(pairs="any")  # a meter must know the held-out pairs as well as the others


@dataclass(frozen=True)
class Train:
    """Trains a judge on pictures rendered on the way; stops cleanly on Ctrl-C or SIGTERM, and goes on with the same command."""

    output: Path = SHIPPED
    """The judge file."""
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
    device: str = "auto"
    """auto, cpu, cuda, cuda:N."""
    run: Path = Path("runs/miniature/judge")
    """Run folder: checkpoint, TensorBoard, record.json."""


# ---------------------------------------------------------------- one batch


@dataclass(frozen=True)
class Truth:
    """Labels of N pictures and M boxes; IGNORED where a question has no answer."""

    whole: dict[str, Tensor]  # [N] long, [N,answers] float for the questions of EACH
    boxes: Tensor  # [M,4] float, pixels
    rows: Tensor  # [M], whose box it is
    boxed: dict[str, Tensor]  # [M] long
    erased: Tensor  # [N,4] float: the box that is painted over ..
    which: Tensor  # [N] bool: .. if any


def truth_of(scenes: Sequence[Scene], gone: Sequence[int | None], random: Random) -> Truth:
    """The labels of these scenes, from each of which object `gone` is painted over; boxes are off by a little, as a user's would be."""
    whole: dict[str, list[object]] = {question: [] for question in WHOLE}
    boxes: list[Sequence[float]] = []
    rows: list[int] = []
    answers: list[tuple[int, int]] = []
    for row, (scene, missing) in enumerate(zip(scenes, gone, strict=True)):
        for question, label in _labels(scene, missing).items():
            whole[question].append(label)
        for index, thing in enumerate(scene.things):
            boxes.append(_jittered(thing.box, random))
            seen = (ALL_KINDS.index(thing.kind), list(COLOURS).index(thing.colour))
            answers.append(seen if index != missing else (NONE, IGNORED))
        empty = [box for box in (_anywhere(random) for _ in range(3)) if not _touches(box, scene)][:1]
        boxes += empty
        answers += [(NONE, IGNORED)] * len(empty)
        rows += [row] * (len(scene.things) + len(empty))
    kinds, colours = zip(*answers, strict=True)
    erased = [scene.things[missing or 0].box for scene, missing in zip(scenes, gone, strict=True)]
    return Truth(
        {q: torch.tensor(labels, dtype=torch.float32 if q in EACH else torch.long) for q, labels in whole.items()},
        torch.tensor(boxes, dtype=torch.float32),
        torch.tensor(rows),
        {"kind": torch.tensor(kinds), "colour": torch.tensor(colours)},
        torch.tensor(erased, dtype=torch.float32),
        torch.tensor([missing is not None for missing in gone]),
    )


def _labels(scene: Scene, missing: int | None) -> dict[str, object]:
    """Answers to the questions of WHOLE."""
    left = [thing for index, thing in enumerate(scene.things) if index != missing]
    single = left[0] if len(left) == 1 else None
    kinds, colours = {thing.kind for thing in left}, {thing.colour for thing in left}
    return {
        "kind": ALL_KINDS.index(single.kind) if single else IGNORED,
        "colour": list(COLOURS).index(single.colour) if single else IGNORED,
        "present": [float(kind in kinds) for kind in ALL_KINDS],
        "paints": [float(colour in colours) for colour in COLOURS],
        "style": ALL_STYLES.index(scene.style),
        "background": list(BACKGROUNDS).index(scene.background.colour),
        "ground": GROUNDS.index(scene.background.ground),
        "place": PLACES.index(single.place) if single else IGNORED,
    }


def _jittered(box: Box, random: Random) -> list[float]:
    """Up to an eighth to either side, from a tenth smaller to two fifths larger."""
    size = box[2] - box[0]
    centres = [(box[axis] + box[axis + 2]) / 2 + size * random.uniform(-0.125, 0.125) for axis in (0, 1)]
    halves = [size / 2 * random.uniform(0.9, 1.4) for _ in range(2)]
    corners = [
        *(c - h for c, h in zip(centres, halves, strict=True)),
        *(c + h for c, h in zip(centres, halves, strict=True)),
    ]
    return [min(float(SIDE), max(0.0, corner)) for corner in corners]


def _anywhere(random: Random) -> list[float]:
    size = random.uniform(12, 36)
    left, top = random.uniform(0, SIDE - size), random.uniform(0, SIDE - size)
    return [left, top, left + size, top + size]


def _touches(box: Sequence[float], scene: Scene) -> bool:
    """Whether a box reaches more than two pixels into that of an object."""
    return any(
        min(box[2], thing.box[2]) - max(box[0], thing.box[0]) > 2
        and min(box[3], thing.box[3]) - max(box[1], thing.box[1]) > 2
        for thing in scene.things
    )


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


def loss_of(network: JudgeNetwork, x: Tensor, truth: Truth) -> Tensor:
    """The sum of all questions' mean losses."""
    features = network.features(x)
    return _loss(network.look(features), truth.whole, WHOLE) + _loss(
        network.look_into(features, truth.boxes.to(x), truth.rows.to(x.device)), truth.boxed, BOXED
    )


def _loss(logits: Logits, labels: dict[str, Tensor], questions: dict[str, tuple[str, ...]]) -> Tensor:
    total = torch.zeros((), device=next(iter(logits.values())).device)
    for question, answers in questions.items():
        label, found = labels[question].to(total.device), logits[question].float()
        if question in EACH:
            total = total + F.binary_cross_entropy_with_logits(found, label) * len(answers) / 4  # of many no's
        elif (label != IGNORED).any():
            total = total + F.cross_entropy(found, label, ignore_index=IGNORED)
    return total


# ---------------------------------------------------------------- the run


class Training:
    """One run: what is set up once, and the loop."""

    def __init__(self, settings: Train):
        for name in ("steps", "batch", "save_every", "grade"):
            if getattr(settings, name) < 1:
                raise BadInput(f"--{name.replace('_', '-')} {getattr(settings, name)}: must be above zero")
        self.settings, self.machine = settings, detect(settings.device)
        self.device = self.machine.device
        torch.manual_seed(settings.seed)
        self.network = JudgeNetwork().to(self.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), settings.lr, weight_decay=settings.weight_decay, fused=True
        )
        self.ema, self.step, self.seconds = make_ema(self.network, settings.ema), 0, 0.0
        self._resume()

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
            "model": self.network.state_dict(),
            "ema": self.ema.module.state_dict(),
            "averaged": int(self.ema.n_averaged),
            "optimizer": self.optimizer.state_dict(),
        }
        save_state(self.checkpoint, state)

    def _resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        state = load_state(self.checkpoint, KIND)
        self.network.load_state_dict(state["model"])
        self.ema = make_ema(self.network, self.settings.ema, max(0, state["averaged"] - 1))  # the first one is a copy
        self.ema.module.load_state_dict(state["ema"])
        self.ema.n_averaged.fill_(state["averaged"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        note(f"going on at step {self.step:,} from {self.checkpoint}")

    def train(self) -> JudgeNetwork:
        """Steps until the end or a signal; a checkpoint is left either way. Returns the averaged network."""
        settings, start = self.settings, time.perf_counter() - self.seconds
        log = TrainingLog(settings.run / "tensorboard", "judge", self.step, settings.steps, True)
        with StopSignals() as stop:
            while self.step < settings.steps and not stop.asked:
                log.add(self.one_step(), settings.batch)
                self.seconds = time.perf_counter() - start
                if self.step % settings.save_every == 0:
                    loss, speed = log.read()
                    if not math.isfinite(loss):
                        raise BadInput(
                            f"the loss is {loss} at step {self.step:,}; {self.checkpoint} is older: try a lower --lr"
                        )
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
            group["lr"] = s.lr * rate_factor(self.step, s.steps, max(1, s.steps // 10), 0.8)
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
