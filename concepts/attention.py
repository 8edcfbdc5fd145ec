"""Where words act in an image: maps of cross-attention, after DAAM (Tang et al. 2022, arXiv 2210.04885).

Cross-attention is softmax(Q K^T / sqrt(d)) V. With V = 1 at a word's tokens and 0 elsewhere it is the probability with which a position of
the image attends to the word. A word's map averages it over heads, steps and the layers of the down and up blocks (not the middle one, the
coarsest), each enlarged to the image by bicubic interpolation. With guidance only the conditional half counts.

These V are appended to the text embeddings as columns. Each cross-attention layer appends the probabilities to its output as channels, and
a hook removes and records them. A layout's routing (composition/routing.py) acts before the hook, so it mixes probabilities like outputs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from concepts.embeddings import encode, text_width, word_positions
from concepts.sampling import SamplerConfig, StableDiffusionSampler
from diffusion.guidance import Denoise
from diffusion.samplers import ALL, Generators, Nudge, unchanged
from runtime.images import pixel_grid

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline


@dataclass
class AttentionRecord:
    """Probabilities of attending to each word, per cross-attention layer of a U-Net, summed over its calls."""

    words: int
    rows: int = 0
    """How many batch rows of a call are recorded, counted from the first; 0 = none."""
    calls: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    """Layer name -> [rows,positions,words] float32."""

    def take_off(self, name: str, _layer: Any, _inputs: Any, out: Tensor) -> Tensor:
        """Return a layer's output [rows,positions,channels + words] without the words' channels, and add these to `sums`."""
        out, probabilities = out[..., : -self.words], out[: self.rows, :, -self.words :]
        if self.rows and not name.startswith("mid_block"):
            self.sums[name] = self.sums.get(name, 0) + probabilities.float()
        return out

    def maps(self, size: Sequence[int]) -> Tensor:
        """Return each word's map [rows,words,*size] float32 on the CPU: the mean over calls and layers."""
        layers = []
        for total in self.sums.values():
            side = round(total.shape[1] ** 0.5)  # images are square
            layer = (total / self.calls).mT.unflatten(2, (side, side))
            layers.append(F.interpolate(layer, tuple(size), mode="bicubic"))
        return torch.stack(layers).mean(0).cpu()


class WordAttention:
    """An attention processor that appends the words' probabilities to the output of the layer's original one."""

    def __init__(self, width: int, processor: Any):
        self.width, self.processor = width, processor

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Return [rows,positions,channels + words] for text [rows,77,width + words]. Without text (self-attention) nothing is appended."""
        if encoder_hidden_states is None:
            out: Tensor = self.processor(attn, hidden_states, **options)
            return out
        text, words = encoder_hidden_states[..., : self.width], encoder_hidden_states[..., self.width :]
        out = self.processor(attn, hidden_states, text, **options)
        return torch.cat([out, word_probabilities(attn, hidden_states, text, words).to(out)], -1)


def word_probabilities(attn: Attention, hidden_states: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """Return softmax(Q K^T / sqrt(d)) V, averaged over heads, [rows,positions,words] float32. V is `words` [rows,77,words]."""
    query, key = (
        states.float().unflatten(2, (attn.heads, -1)).transpose(1, 2)
        for states in (attn.to_q(hidden_states), attn.to_k(text))
    )
    value = words.float()[:, None].expand(-1, attn.heads, -1, -1)
    return F.scaled_dot_product_attention(query, key, value).mean(1)


@dataclass
class AttentionSampler(StableDiffusionSampler):
    """A sampler that also records where its images attend to `words`. The images are the same as without recording."""

    words: tuple[str, ...] = ()
    record: AttentionRecord = field(default_factory=lambda: AttentionRecord(0))

    @classmethod
    def of(cls, pipe: StableDiffusionPipeline, config: SamplerConfig, words: Sequence[str]) -> AttentionSampler:
        """Build the sampler. The pipeline's U-Net is changed: from then on it needs text embeddings from this sampler's `text`."""
        record = AttentionRecord(len(words))
        processors = {name: WordAttention(text_width(pipe), own) for name, own in pipe.unet.attn_processors.items()}
        pipe.unet.set_attn_processor(processors)
        for name, layer in pipe.unet.named_modules():
            if name.endswith(".attn2"):
                layer.register_forward_hook(partial(record.take_off, name))
        return cls(pipe, config, words=tuple(words), record=record)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Return text embeddings and a column per word, [N,77,width + words]. Each prompt is encoded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            states = encode(self.pipe, new)
            positions = word_positions(self.pipe.tokenizer, new, self.words).to(states)
            self._texts.update(zip(new, torch.cat([states, positions], -1), strict=True))
        return super().text(prompts)

    def solve(
        self, denoise: Denoise, x: Tensor, noise: Generators, nudge: Nudge = unchanged, span: slice = ALL
    ) -> Tensor:
        """Sample as the base class does, and record these steps in place of earlier ones.

        A composition samples in several stages; the record is then of the last, which has all words.
        """
        self.record.calls, self.record.sums = 0, {}

        def recorded(x: Tensor, t: int) -> Tensor:
            self.record.rows, self.record.calls = len(x), self.record.calls + 1
            eps = denoise(x, t)
            self.record.rows = 0
            return eps

        return super().solve(recorded, x, noise, nudge, span)

    def with_maps(self, images: Tensor) -> Tensor:
        """Return [N,1 + words,3,H,W] uint8: each image, then its overlay for each word. `images` [N,3,H,W] must be those sampled last."""
        maps = self.record.maps(images.shape[2:])
        return torch.cat([images[:, None], overlay(images[:, None], maps)], 1)


def overlay(images: Tensor, maps: Tensor) -> Tensor:
    """Return [..,3,H,W] uint8: images [..,3,H,W] in grey under maps [..,H,W] in colour. A map's minimum is blue, its maximum red."""
    low, high = (reduce(maps, (-2, -1), keepdim=True) for reduce in (torch.amin, torch.amax))
    heat = ((maps - low) / (high - low).clamp(min=1e-6))[..., None, :, :]
    centres = torch.tensor([0.75, 0.5, 0.25])[:, None, None]  # of red, green and blue, in a ramp like jet
    colour = (1.5 - 4 * (heat - centres).abs()).clamp(0, 1)
    grey = images.float().mean(-3, keepdim=True)
    return (0.5 * grey + 127.5 * colour).round().to(torch.uint8)


def sheet_path(image: Path) -> Path:
    """Return the path of an image's attention sheet, NAME_attention.png."""
    return image.with_name(f"{image.stem}_attention.png")


def save_sheet(path: Path, cells: Tensor, words: Sequence[str], prompt: str) -> None:
    """Write an image and its overlays [1 + words,3,H,W] uint8 in one row, labelled with words and prompt."""
    pixel_grid(path, cells, [""], ["image", *words], prompt)
