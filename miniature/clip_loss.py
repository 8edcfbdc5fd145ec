"""The losses of the small CLIP: a contrastive loss whose negatives are never true captions, and two auxiliary losses.

A transformer without convolutions is slow to find shapes. By the contrastive loss alone, 180,000 images taught it colours, styles and
positions, and hardly an object. So two heads classify as well during training, and are then thrown away. One classifies the object at
every patch, from the states after the second-last vision block. The other classifies the style from the image's features, because
captions name no held-out style.
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
    """Return CLIP's loss (Radford et al. 2021) of image and text features [N,D] of length 1; `scale` is the factor of the logits.

    `is_true` [N,N] bool: caption j is true of image i. Captions of other images are negatives only if they are not true.
    """
    others = is_true & ~torch.eye(len(is_true), dtype=torch.bool, device=is_true.device)
    mask = torch.zeros(is_true.shape, device=is_true.device).masked_fill(others, -math.inf)
    labels = torch.arange(len(images), device=images.device)
    per_image = F.cross_entropy(scale * images @ texts.T + mask, labels)
    per_text = F.cross_entropy(scale * texts @ images.T + mask.T, labels)
    return (per_image + per_text) / 2


class PatchLoss(nn.Module):
    """Cross-entropy of the object at each patch, classified from the states after the second-last block of `visual`."""

    def __init__(self, visual: Any, width: int):
        super().__init__()
        self.head = nn.Linear(width, NONE + 1)
        self.states: Tensor | None = None
        blocks = visual.transformer.resblocks
        blocks[max(0, len(blocks) - 2)].register_forward_hook(self._keep)

    def _keep(self, _: nn.Module, __: Any, states: Tensor) -> None:
        self.states = states

    def forward(self, parts: Tensor, never: Tensor) -> Tensor:
        """Return the loss for the images of the last forward pass of `visual`. A second call needs another pass.

        `parts` [N,P,P] int64 are the labels. `never` [N,kinds] bool: kinds that are left out of the softmax.
        """
        assert self.states is not None
        logits = self.head(self.states[:, 1:].float())  # the first is the image's own token
        logits[..., :NONE] = logits[..., :NONE].masked_fill(never[:, None], -math.inf)
        self.states = None
        weight = torch.ones(NONE + 1, device=logits.device)
        weight[NONE] = 0.3  # most patches hold no object
        return F.cross_entropy(logits.flatten(0, 1), parts.flatten(), weight)


class StyleLoss(nn.Module):
    """Cross-entropy of an image's style, held-out styles included, classified from its features."""

    def __init__(self, width: int):
        super().__init__()
        self.head = nn.Linear(width, len(ALL_STYLES))

    def forward(self, features: Tensor, scale: Tensor, styles: Tensor) -> Tensor:
        """Return the loss for the labels `styles` [N] int64. The head's input is features [N,width] of length 1 times the logit scale."""
        return F.cross_entropy(self.head(features * scale.detach()), styles)


def forward(model: Any, x: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return open_clip's image features, text features and logit scale, for token ids [N,L] with L up to 77.

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
    """Return AdamW's groups: matrices with weight decay, embeddings and vectors without. Frozen parameters are left out."""
    spared = {"token_embedding.weight", *model.no_weight_decay()}
    learning = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    matrices = [p for name, p in learning if p.ndim > 1 and name not in spared]
    others = [p for name, p in learning if p.ndim < 2 or name in spared]
    return [{"params": matrices, "weight_decay": decay}, {"params": others, "weight_decay": 0.0}]
