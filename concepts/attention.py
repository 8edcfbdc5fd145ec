"""Where words act in an image: maps of cross-attention, after DAAM (Tang et al. 2022, arXiv 2210.04885).

Cross-attention is softmax(Q K^T / sqrt(d)) V. With V = 1 at a word's tokens and 0 elsewhere it is the probability with which a position of
the image attends to the word. A word's map averages it over heads, steps and the layers of the down and up blocks (not the middle one, the
coarsest), each enlarged to the image by bicubic interpolation. With guidance only the conditional half counts.

Text embeddings carry these V as further columns, and attention layers return the probabilities as further channels, which are taken off
again. So a layout's routing (composition/routing.py) mixes the probabilities as it mixes the outputs.
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
    """Words' probabilities in the layers of a U-Net, summed over calls."""

    words: int
    rows: int = 0
    """How many rows of a call are recorded, the first ones; 0 = none."""
    calls: int = 0
    sums: dict[str, Tensor] = field(default_factory=dict)
    """[rows,positions,words] float32 per layer."""

    def take_off(self, name: str, _layer: Any, _inputs: Any, out: Tensor) -> Tensor:
        """Return a layer's output [rows,positions,channels + words] without the words, and add them up."""
        out, probabilities = out[..., : -self.words], out[: self.rows, :, -self.words :]
        if self.rows and not name.startswith("mid_block"):
            self.sums[name] = self.sums.get(name, 0) + probabilities.float()
        return out

    def maps(self, size: Sequence[int]) -> Tensor:
        """Return the means over calls and layers [rows,words,height,width] float32, on the CPU."""
        layers = []
        for total in self.sums.values():
            side = round(total.shape[1] ** 0.5)  # images are square
            layer = (total / self.calls).mT.unflatten(2, (side, side))
            layers.append(F.interpolate(layer, tuple(size), mode="bicubic"))
        return torch.stack(layers).mean(0).cpu()


class WordAttention:
    """An attention processor that appends the words' probabilities to the output of the layer's own one."""

    def __init__(self, width: int, processor: Any):
        self.width, self.processor = width, processor

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor | None = None, **options: Any
    ) -> Tensor:
        """Return [rows,positions,channels + words] for text [rows,77,width + words], and for no text the output as it is."""
        if encoder_hidden_states is None:
            out: Tensor = self.processor(attn, hidden_states, **options)
            return out
        text, words = encoder_hidden_states[..., : self.width], encoder_hidden_states[..., self.width :]
        out = self.processor(attn, hidden_states, text, **options)
        return torch.cat([out, word_probabilities(attn, hidden_states, text, words).to(out)], -1)


def word_probabilities(attn: Attention, hidden_states: Tensor, text: Tensor, words: Tensor) -> Tensor:
    """Return softmax(Q K^T / sqrt(d)) words, [rows,positions,words] float32, averaged over heads; words [rows,77,words]."""
    query, key = (
        states.float().unflatten(2, (attn.heads, -1)).transpose(1, 2)
        for states in (attn.to_q(hidden_states), attn.to_k(text))
    )
    value = words.float()[:, None].expand(-1, attn.heads, -1, -1)
    return F.scaled_dot_product_attention(query, key, value).mean(1)


@dataclass
class AttentionSampler(StableDiffusionSampler):
    """A sampler that records where its images attend to words; images are those of a plain sampler."""

    words: tuple[str, ...] = ()
    record: AttentionRecord = field(default_factory=lambda: AttentionRecord(0))

    @classmethod
    def of(cls, pipe: StableDiffusionPipeline, config: SamplerConfig, words: Sequence[str]) -> AttentionSampler:
        """Prepare the pipeline, which from then on needs the text of this sampler."""
        record = AttentionRecord(len(words))
        processors = {name: WordAttention(text_width(pipe), own) for name, own in pipe.unet.attn_processors.items()}
        pipe.unet.set_attn_processor(processors)
        for name, layer in pipe.unet.named_modules():
            if name.endswith(".attn2"):
                layer.register_forward_hook(partial(record.take_off, name))
        return cls(pipe, config, words=tuple(words), record=record)

    def text(self, prompts: Sequence[str]) -> Tensor:
        """Return [N,77,width + words]; each prompt is encoded once."""
        new = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._texts]
        if new:
            states = encode(self.pipe, new)
            positions = word_positions(self.pipe.tokenizer, new, self.words).to(states)
            self._texts.update(zip(new, torch.cat([states, positions], -1), strict=True))
        return super().text(prompts)

    def solve(
        self, denoise: Denoise, x: Tensor, noise: Generators, nudge: Nudge = unchanged, span: slice = ALL
    ) -> Tensor:
        """Record these steps instead of those before: of a composition, the last stage, which has all words."""
        self.record.calls, self.record.sums = 0, {}

        def recorded(x: Tensor, t: int) -> Tensor:
            self.record.rows, self.record.calls = len(x), self.record.calls + 1
            eps = denoise(x, t)
            self.record.rows = 0
            return eps

        return super().solve(recorded, x, noise, nudge, span)

    def with_maps(self, images: Tensor) -> Tensor:
        """Return [N,1 + words,3,H,W] uint8: the images [N,3,H,W] that were sampled last, and each under the map of each word."""
        maps = self.record.maps(images.shape[2:])
        return torch.cat([images[:, None], overlay(images[:, None], maps)], 1)


def overlay(images: Tensor, maps: Tensor) -> Tensor:
    """Return [..,3,H,W] uint8: images [..,3,H,W] in grey under maps [..,H,W] from blue to red, each from its least value to its largest."""
    low, high = (reduce(maps, (-2, -1), keepdim=True) for reduce in (torch.amin, torch.amax))
    heat = ((maps - low) / (high - low).clamp(min=1e-6))[..., None, :, :]
    centres = torch.tensor([0.75, 0.5, 0.25])[:, None, None]  # of red, green and blue, in a ramp like jet
    colour = (1.5 - 4 * (heat - centres).abs()).clamp(0, 1)
    grey = images.float().mean(-3, keepdim=True)
    return (0.5 * grey + 127.5 * colour).round().to(torch.uint8)


def sheet_path(image: Path) -> Path:
    """Return where the sheet of an image lies."""
    return image.with_name(f"{image.stem}_attention.png")


def save_sheet(path: Path, cells: Tensor, words: Sequence[str], prompt: str) -> None:
    """Write an image and its overlays [1 + words,3,H,W] uint8 in one row, labelled."""
    pixel_grid(path, cells, [""], ["image", *words], prompt)
