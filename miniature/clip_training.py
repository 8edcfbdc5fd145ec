"""How the small CLIP learns: open_clip's model and loss, fresh pictures at every step, true captions of others no negatives.

A transformer without convolutions is slow to find shapes: by the contrastive loss alone 180,000 pictures taught it colours, styles and
places, and hardly an object. So the patches after the last block but one are asked which object they belong to, and the features of the
picture which style it is in, as captions name no held-out one; the heads that ask are thrown away.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.data import DataLoader

from miniature.clip_batches import FAMILY, NONE, Batch, Batches
from miniature.clip_grading import held_out_pairs
from miniature.clip_model import PREPROCESSING, SHIPPED, Size, SmallClip, load_clip, model_config
from miniature.judge_model import to_float
from miniature.scenery.render import as_tensor
from miniature.scenery.scenes import ALL_STYLES
from miniature.scenery.vocabulary import LENGTH, make_tokenizer
from runtime.cli import BadInput, check_not_negative, check_positive, log
from runtime.device import Device, Precision, detect, len_cores, set_up
from runtime.files import check_writable_folder
from training.checkpoint import load_state, require_finite, restore_weights, save_state, weights_state
from training.ema import make_ema
from training.log import TrainingLog
from training.schedule import lr_factor
from training.signals import StopSignals

KIND = "miniature clip"
GLANCE = 240  # pictures on which the training looks at its accuracy on the way
STEEPEST = math.log(100)  # of the logit scale, as in the CLIP paper


@dataclass(frozen=True)
class Train:
    """Trains on pictures rendered on the way; stops cleanly on Ctrl-C or SIGTERM, and goes on with the same command."""

    output: Path = SHIPPED
    """Folder of the model, in open_clip's form."""
    steps: int = 6500
    batch: int = 64
    """Pictures per step, in families of four."""
    lr: float = 1.5e-3
    """Peak learning rate of AdamW."""
    weight_decay: float = 0.1
    """Of matrices; embeddings, gains and biases have none."""
    ema: float = 0.998
    """Decay of the averaged weights, which are the ones that are kept."""
    parts: float = 0.5
    """Weight of the question which object a patch belongs to; 0: it is not asked."""
    styles: float = 0.25
    """Weight of the question which style a picture is in; 0: it is not asked."""
    init: Path | None = None
    """Folder of a model of the same size to start from, such as the shipped one."""
    lock_text: bool = False
    """Leaves the text tower's states as they are in --init, which the U-Net is told by; its projection, which only CLIP uses, learns."""
    size: Size = field(default_factory=Size)
    save_every: int = 100
    """Steps between checkpoints."""
    grade: int = 1200
    """Fresh pictures per question on which the finished model is graded."""
    seed: int = 0
    workers: int = -1
    """Processes that render; -1: one less than there are cores, at most 8; 0: render between the steps."""
    device: Device = "auto"
    precision: Precision = "auto"
    """Of the towers; auto takes bf16 where the hardware has it. The loss is in fp32."""
    run: Path = Path("runs/miniature/clip")
    """Run folder: checkpoint, TensorBoard, record.json."""


class PartsLoss(nn.Module):
    """Cross-entropy of the object that each patch belongs to, from the states after the last vision block but one."""

    def __init__(self, visual: nn.Module, width: int):
        super().__init__()
        self.head = nn.Linear(width, NONE + 1)
        self.states: Tensor | None = None
        blocks: Any = visual.transformer.resblocks  # type: ignore[union-attr]
        blocks[max(0, len(blocks) - 2)].register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, states: Tensor) -> None:
        self.states = states

    def forward(self, parts: Tensor, never: Tensor) -> Tensor:
        """parts [N,P,P] int64 and never [N,kinds] bool, of the pictures that the tower saw last -> scalar."""
        assert self.states is not None
        logits = self.head(self.states[:, 1:].float())  # the first is the picture's own token
        logits[..., :NONE] = logits[..., :NONE].masked_fill(never[:, None], -math.inf)
        self.states = None
        weight = torch.ones(NONE + 1, device=logits.device)
        weight[NONE] = 0.3  # most patches hold no object
        return nn.functional.cross_entropy(logits.flatten(0, 1), parts.flatten(), weight)


class StyleLoss(nn.Module):
    """Cross-entropy of the style that a picture is in, told by its features alone; the held-out ones, which no caption names, are asked
    for as well."""

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, len(ALL_STYLES))

    def forward(self, features: Tensor, scale: Tensor, styles: Tensor) -> Tensor:
        """features [N,width] of length 1, the logit scale and styles [N] int64 -> scalar."""
        return nn.functional.cross_entropy(self.head(features * scale.detach()), styles)


class ClipLoss(open_clip.ClipLoss):
    """open_clip's loss, with a matrix as `logit_bias` [pictures, captions]: -inf takes a pair out."""

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Both [N,N]: a row per picture, a row per caption."""
        per_image, per_text = super().get_logits(image_features, text_features, logit_scale)
        return per_image + logit_bias, per_text + logit_bias.T


def negatives_only(also: Tensor) -> Tensor:
    """[N,N] bool, captions that are true -> [N,N] float: 0, but -inf where the caption of another picture is true as well."""
    others = also & ~torch.eye(len(also), dtype=torch.bool, device=also.device)
    return torch.zeros(also.shape, device=also.device).masked_fill(others, -math.inf)


def forward(model: nn.Module, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """open_clip's forward for prompts shorter than 77: attention looks back only, so what would follow the end token has no effect.
    The positions beyond the longest caption, about 35 tokens, are never trained therefore."""
    length = tokens.shape[1]
    shorter = {
        "positional_embedding": model.positional_embedding[:length],  # type: ignore[index]
        "attn_mask": model.attn_mask[:length, :length],  # type: ignore[index]
    }
    return functional_call(model, shorter, (x, tokens))


def parameter_groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Weight decay for matrices that are no embeddings; what is locked is left out."""
    kept = {"token_embedding.weight", *model.no_weight_decay()}  # type: ignore[operator]
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in learning if p.ndim > 1 and name not in kept]
    others = [p for name, p in learning if p.ndim < 2 or name in kept]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]


def start_from(model: nn.Module, folder: Path) -> None:
    """Copies the weights of a folder; raises BadInput where it is of another size or vocabulary."""
    try:
        model.load_state_dict(load_clip(folder).model.state_dict())
    except RuntimeError:
        raise BadInput(f"--init {folder} is of another size or vocabulary than --size asks for") from None


def text_tower(model: nn.Module) -> list[nn.Parameter]:
    """All parameters that prompts go through, but the projection into the space that they share with pictures."""
    names = ("transformer.", "token_embedding.", "positional_embedding", "ln_final.")
    return [parameter for name, parameter in model.named_parameters() if name.startswith(names)]


def quiet_worker(_: int) -> None:
    """The main process alone answers signals: it ends the others."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)


def check(settings: Train) -> None:
    """Raises BadInput for numbers that can't work."""
    check_positive(settings, "steps", "batch", "save_every", "grade")
    if settings.batch % FAMILY:
        raise BadInput(f"--batch {settings.batch}: must be a multiple of {FAMILY}, the pictures of a family")
    check_not_negative(settings, "seed")
    if settings.lock_text and not settings.init:
        raise BadInput("--lock-text: name the model with that tower by --init")
    check_writable_folder(settings.output)


class Training:
    """One run: what is set up once, and the loop."""

    def __init__(self, settings: Train):
        check(settings)
        self.settings, self.machine = settings, detect(settings.device)
        self.half = set_up(settings.precision, self.machine, training=True) == "bf16"
        self.device = self.machine.device
        self.tokenizer = make_tokenizer()
        self.config = model_config(settings.size, self.tokenizer)
        torch.manual_seed(settings.seed)
        self.model: nn.Module = open_clip.CLIP(**self.config).to(self.device)
        if settings.init:
            start_from(self.model, settings.init)
        if settings.lock_text:
            for parameter in text_tower(self.model):
                parameter.requires_grad_(False)
        self.ema, self.step, self.seconds = make_ema(self.model, settings.ema), 0, 0.0  # copied before anybody looks in
        self.loss, self.parts = ClipLoss(), PartsLoss(self.model.visual, settings.size.vision_width).to(self.device)
        self.styles = StyleLoss(settings.size.embedding).to(self.device)
        heads = [*self.parts.parameters(), *self.styles.parameters()]
        groups = parameter_groups(self.model, settings.weight_decay) + [{"params": heads}]
        self.optimizer = torch.optim.AdamW(groups, settings.lr, betas=(0.9, 0.98), fused=True)
        self._resume()

    @property
    def checkpoint(self) -> Path:
        """The training's own state."""
        return self.settings.run / "checkpoint.pt"

    def save(self) -> None:
        """Everything that going on needs; the random numbers follow from seed and step."""
        state = {
            "kind": KIND,
            "config": self.config,
            "step": self.step,
            "seconds": self.seconds,
            "parts": self.parts.state_dict(),
            "styles": self.styles.state_dict(),
        }
        save_state(self.checkpoint, state | weights_state(self.model, self.ema, self.optimizer))

    def _resume(self) -> None:
        if not self.checkpoint.is_file():
            return
        state = load_state(self.checkpoint, KIND)
        if state["config"] != self.config:
            raise BadInput(f"{self.checkpoint} is of another size or vocabulary: give its flags, or name another --run")
        self.ema = restore_weights(state, self.model, self.optimizer, self.settings.ema, self.checkpoint)
        self.parts.load_state_dict(state["parts"])
        self.styles.load_state_dict(state["styles"])
        self.step, self.seconds = state["step"], state["seconds"]
        log(f"going on at step {self.step:,} from {self.checkpoint}")

    def batches(self) -> Iterator[Batch]:
        """Those of the steps that are left, rendered ahead by other processes."""
        workers = self.settings.workers if self.settings.workers >= 0 else min(8, len_cores() - 1)
        made = Batches(self.settings.seed, self.settings.batch, self.settings.size.patch)
        steps = range(self.step, self.settings.steps)
        return iter(
            DataLoader(
                made,  # type: ignore[arg-type]
                sampler=steps,
                batch_size=None,
                num_workers=workers,
                collate_fn=same,  # type: ignore[arg-type]
                worker_init_fn=quiet_worker,
            )
        )

    def train(self) -> SmallClip:
        """Steps until the end or a signal; a checkpoint is left either way. Returns the averaged model."""
        settings, start = self.settings, time.perf_counter() - self.seconds
        log = TrainingLog(settings.run / "tensorboard", "clip", self.step, settings.steps, True)
        with StopSignals() as stop:
            batches = self.batches()
            while self.step < settings.steps and not stop.asked:
                log.add(self.one_step(next(batches)), settings.batch)
                self.seconds = time.perf_counter() - start
                if self.step % settings.save_every == 0:
                    self._report(log)
                    self.save()
        log.close()
        self.save()
        return self.averaged()

    def _report(self, log: TrainingLog) -> None:
        """Raises BadInput where the loss is no number any more; the checkpoint is older then."""
        loss, speed = log.read()
        require_finite(loss, self.step, self.checkpoint)
        start = time.perf_counter()
        accuracy = held_out_pairs(self.averaged(), GLANCE, self.settings.seed)
        scale = float(self.model.logit_scale.detach().exp())  # type: ignore[operator]
        log.show(self.step, loss=loss, images_s=speed, accuracy=accuracy, scale=scale)
        log.pause(time.perf_counter() - start)

    def averaged(self) -> SmallClip:
        """The model as it would be kept now."""
        return SmallClip(self.ema.module.eval(), self.tokenizer, self.config, PREPROCESSING)

    def one_step(self, batch: Batch) -> Tensor:
        """One optimizer step; returns the loss."""
        s = self.settings
        encoded = self.tokenizer(batch.texts, padding=True, truncation=True, max_length=LENGTH, return_tensors="pt")
        x = to_float(as_tensor(batch.images).to(self.device))
        for group in self.optimizer.param_groups:
            group["lr"] = s.lr * lr_factor(self.step, s.steps, max(1, s.steps // 20), 0.9, "cosine")
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.half):
            pictures, texts, scale = forward(self.model, x, encoded["input_ids"].to(self.device))
        loss = self.loss(pictures.float(), texts.float(), scale, negatives_only(batch.also.to(self.device)))
        if s.parts:
            loss = loss + s.parts * self.parts(batch.parts.to(self.device), batch.never.to(self.device))
        if s.styles:
            loss = loss + s.styles * self.styles(pictures.float(), scale, batch.styles.to(self.device))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=STEEPEST)  # type: ignore[operator]
        self.ema.update_parameters(self.model)
        self.step += 1
        return loss


def same(batch: Batch) -> Batch:
    """A batch comes whole: nothing to collate."""
    return batch
