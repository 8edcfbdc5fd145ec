"""What the small CLIP minimises: the contrastive loss without true captions of others as negatives, and two auxiliary losses.

A transformer without convolutions is slow to find shapes: by the contrastive loss alone 180,000 images taught it colours, styles and
positions, and hardly an object. So two heads, which are thrown away, classify as well: the object at every patch, from the states after
the last vision block but one, and the style of the image, from its features (captions name no held-out style).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from miniature.clip_batches import NONE
from miniature.scenery.scenes import ALL_STYLES


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, is_true: Tensor) -> Tensor:
    """Return CLIP's loss (Radford et al. 2021) of features [N,D] of length 1 and the logit scale.

    `is_true` [N,N] bool: caption j is true of image i. True captions of other images are no negatives.
    """
    others = is_true & ~torch.eye(len(is_true), dtype=torch.bool, device=is_true.device)
    mask = torch.zeros(is_true.shape, device=is_true.device).masked_fill(others, -math.inf)
    labels = torch.arange(len(images), device=images.device)
    per_image = F.cross_entropy(scale * images @ texts.T + mask, labels)
    per_text = F.cross_entropy(scale * texts @ images.T + mask.T, labels)
    return (per_image + per_text) / 2


class PatchLoss(nn.Module):
    """Cross-entropy of the object at each patch, from the states after the last vision block but one."""

    def __init__(self, visual: Any, width: int):
        super().__init__()
        self.head = nn.Linear(width, NONE + 1)
        self.states: Tensor | None = None
        blocks = visual.transformer.resblocks
        blocks[max(0, len(blocks) - 2)].register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, states: Tensor) -> None:
        self.states = states

    def forward(self, parts: Tensor, never: Tensor) -> Tensor:
        """Return the loss of the images of the tower's last forward pass; parts [N,P,P] int64, never [N,kinds] bool."""
        assert self.states is not None
        logits = self.head(self.states[:, 1:].float())  # the first is the image's own token
        logits[..., :NONE] = logits[..., :NONE].masked_fill(never[:, None], -math.inf)
        self.states = None
        weight = torch.ones(NONE + 1, device=logits.device)
        weight[NONE] = 0.3  # most patches hold no object
        return F.cross_entropy(logits.flatten(0, 1), parts.flatten(), weight)


class StyleLoss(nn.Module):
    """Cross-entropy of an image's style, held-out styles included, from its features alone."""

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, len(ALL_STYLES))

    def forward(self, features: Tensor, scale: Tensor, styles: Tensor) -> Tensor:
        """Return the loss of features [N,width] of length 1, the logit scale and styles [N] int64."""
        return F.cross_entropy(self.head(features * scale.detach()), styles)


def forward(model: Any, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return open_clip's image features, text features and logit scale, for prompts shorter than 77 tokens.

    Attention is causal: positions after the end token have no effect. Positions beyond the longest caption, about 35 tokens, are
    therefore never trained.
    """
    length = tokens.shape[1]
    shorter = {
        "positional_embedding": model.positional_embedding[:length],
        "attn_mask": model.attn_mask[:length, :length],
    }
    output: tuple[Tensor, Tensor, Tensor] = functional_call(model, shorter, (x, tokens))
    return output


def parameter_groups(model: Any, decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: weight decay for matrices that are no embeddings; locked parameters are left out."""
    spared = {"token_embedding.weight", *model.no_weight_decay()}
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in learning if p.ndim > 1 and name not in spared]
    others = [p for name, p in learning if p.ndim < 2 or name in spared]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
