"""How textual inversion learns (Gal et al. 2022, arXiv 2208.01618): the denoising loss of a frozen Stable Diffusion, down to the rows
of new tokens in its text encoder's table. Nothing else is a parameter, so nothing else can change."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from accelerate import Accelerator
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from PIL import Image
from torch import Tensor, nn

from concepts.dataset import (
    ConceptSet,
    picture_files,
    posteriors,
    scaled,
    sentences_beside,
    square,
    upright,
    zoomed_out,
)
from concepts.embeddings import ExtendedTable, add_names, names_of, tokenize
from diffusion.schedule import add_noise
from runtime.cli import BadInput
from runtime.device import memory_format
from runtime.seeds import derived_seed
from training.draws import Draws

ZOOMED = 8  # smaller views of every picture, where there are any


class TokenEmbeddings(nn.Module):
    """The one parameter, [all vectors of all tokens, width] float32; a module, so that accelerate averages its gradient."""

    def __init__(self, start: Tensor):
        super().__init__()
        self.rows = nn.Parameter(start)

    def forward(self) -> Tensor:
        """All rows."""
        return self.rows


# ---------------------------------------------------------------- one concept


@dataclass
class ConceptData:
    """A concept made ready: [N,S,77] token ids of each picture's sentences, of which the first `counts` [N] are different; either the
    posteriors of its pictures [N,V,2,4,h,w] (views: both flips of the whole picture, then those of smaller ones; mean and standard
    deviation) or, for random crops, the pictures themselves."""

    concept: ConceptSet
    rows: slice  # of the parameter
    tokens: Tensor
    counts: Tensor
    moments: Tensor | None
    pictures: list[Image.Image]

    @property
    def fingerprint(self) -> int:
        """Of pictures and sentences, wherever they lie."""
        return zlib.crc32(
            b"".join(picture.tobytes() for picture in self.pictures) + self.tokens.cpu().numpy().tobytes()
        )


@dataclass
class InversionBatch:
    """A part of a batch: clean latents [B,4,h,w], noise like it, t [B], token ids [B,77], and what their rows are blurred by:
    [B,77,width], or [B,0,width] where they are not."""

    x0: Tensor
    eps: Tensor
    t: Tensor
    tokens: Tensor
    embedding_noise: Tensor

    def __getitem__(self, rows: slice) -> InversionBatch:
        return InversionBatch(*(getattr(self, field.name)[rows] for field in fields(self)))


def concatenated(samples: Sequence[InversionBatch]) -> InversionBatch:
    """One behind the other."""
    return InversionBatch(*(torch.cat([getattr(s, field.name) for s in samples]) for field in fields(InversionBatch)))


# ---------------------------------------------------------------- all of them


class TextualInversion:
    """The frozen model with new tokens, their rows, and the loss. `pipe` holds all parts on one device in one dtype."""

    def __init__(
        self,
        pipe: StableDiffusionPipeline,
        concepts: Sequence[ConceptSet],
        seed: int,
        crops: bool,
        flips: bool,
        zoom_out: float = 0.0,
    ):
        self.pipe, self.seed, self.crops, self.flips, self.zoom_out = pipe, seed, crops, flips, zoom_out
        self.device, self.dtype = pipe.unet.device, pipe.unet.dtype
        self.max_loss_weight = 1.0  # of the loss, see `loss`
        self.embedding_noise = 0.0  # of the rows, in batches drawn from now on, see `loss`
        self.side = pipe.unet.config.sample_size * pipe.vae_scale_factor
        self.alphas = pipe.scheduler.alphas_cumprod.float().to(self.device)
        table = pipe.text_encoder.get_input_embeddings()
        self.first = len(pipe.tokenizer)
        words = [self._word(concept, table.weight) for concept in concepts]
        start = torch.cat([self._start(concept, word) for concept, word in zip(concepts, words, strict=True)])
        norms = [word.norm().expand(concept.vectors, 1) for concept, word in zip(concepts, words, strict=True)]
        self.word_norms = torch.cat(norms).to(self.device)  # [rows,1], of the words that they started from
        for concept in concepts:
            add_names(pipe.tokenizer, concept.token, concept.vectors)
        self.table = ExtendedTable(table, self.first)
        pipe.text_encoder.set_input_embeddings(self.table)
        self.parameter = TokenEmbeddings(start.to(self.device))
        self.table.rows = self.parameter.rows
        self.lessons = [self._lesson(concept) for concept in concepts]
        self._rest()

    def _word(self, concept: ConceptSet, weight: Tensor) -> Tensor:
        """[width]: the initial word's row; raises BadInput where it is no single word."""
        ids = self.pipe.tokenizer(concept.init, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise BadInput(
                f"--init {concept.init!r}: wanted a single word of the model's vocabulary, this takes {len(ids)} tokens"
            )
        return weight[ids[0]].float().cpu()

    def _start(self, concept: ConceptSet, word: Tensor) -> Tensor:
        """[vectors,width]: the initial word's row; further vectors a little off, since equal ones would stay so."""
        stream = torch.Generator().manual_seed(derived_seed(self.seed, concept.key))
        off = torch.randn(concept.vectors, len(word), generator=stream) * word.norm() / len(word) ** 0.5
        off[0] = 0
        return word + 0.1 * off

    def _lesson(self, concept: ConceptSet) -> ConceptData:
        files = picture_files(concept.images)
        pictures = [upright(file) for file in files]
        ids = self.pipe.tokenizer.convert_tokens_to_ids(names_of(concept.token, concept.vectors))
        rows = slice(ids[0] - self.first, ids[-1] - self.first + 1)
        moments = None if self.crops else self._moments(concept, square(pictures, self.side))
        sentences = [sentences_beside(file, concept.token) or concept.sentences for file in files]
        most = max(map(len, sentences))
        tokens = torch.stack([tokenize(self.pipe, (own * most)[:most]) for own in sentences])
        counts = torch.tensor([len(own) for own in sentences])
        return ConceptData(concept, rows, tokens.to(self.device), counts.to(self.device), moments, pictures)

    def _moments(self, concept: ConceptSet, x: Tensor) -> Tensor:
        """[N,V,2,4,h,w] of pictures [N,3,S,S]; a style, which smaller strokes would change, is seen whole only."""
        views = [x]
        if self.zoom_out and concept.kind == "object":
            stream = torch.Generator().manual_seed(derived_seed(self.seed, concept.key, 1))
            views += [zoomed_out(x, stream) for _ in range(ZOOMED)]
        return torch.cat([posteriors(self.pipe.vae, view) for view in views], 1)

    def _rest(self) -> None:
        """All that the autoencoder has to say of whole pictures is kept: it leaves the device."""
        if not self.crops:
            self.pipe.vae.to("cpu")

    @contextmanager
    def decoder(self) -> Iterator[None]:
        """The autoencoder on the device, for drawing."""
        self.pipe.vae.to(self.device)
        try:
            yield
        finally:
            self._rest()

    # ------------------------------------------------ batches

    def batch(self, step: int, rows: slice, total: int) -> InversionBatch:
        """Samples `rows` of `total` of every concept at this step, concept by concept."""
        return concatenated([self._sample(lesson, step, rows, total) for lesson in self.lessons])

    def _sample(self, lesson: ConceptData, step: int, rows: slice, total: int) -> InversionBatch:
        draws = Draws(derived_seed(self.seed, lesson.concept.key), step, rows, total, self.device)
        which, flip, sentence = draws.uniform(), draws.uniform(), draws.uniform()
        t = (draws.stratified() * len(self.alphas)).long().clamp(max=len(self.alphas) - 1)
        shape = (self.pipe.unet.config.in_channels, *[self.pipe.unet.config.sample_size] * 2)
        eps, noise = draws.normal(*shape), draws.normal(*shape)
        which = (which * len(lesson.pictures)).long()
        flip = ((flip < 0.5) & torch.tensor(self.flips, device=self.device)).long()
        if lesson.moments is None:
            moments = self._cropped(lesson, which, draws)[torch.arange(len(flip)), flip]
        else:
            moments = lesson.moments[which, self._view(lesson.moments, flip, draws)]
        mean, std = moments.unbind(1)
        said = lesson.tokens[which, (sentence * lesson.counts[which]).long()]
        width = self.parameter.rows.shape[1]
        embedding_noise = draws.normal(said.shape[1] if self.embedding_noise else 0, width) * (
            self.embedding_noise / width**0.5
        )
        return InversionBatch(mean + std * noise, eps, t, said, embedding_noise)

    def _view(self, moments: Tensor, flip: Tensor, draws: Draws) -> Tensor:
        """[B] int64: the flips of the whole pictures or, by the share `zoom_out`, of one of the smaller views."""
        if moments.shape[1] == 2:
            return flip
        zoom = draws.uniform() / self.zoom_out
        return flip + 2 * torch.where(zoom < 1, 1 + (zoom * ZOOMED).long(), 0)

    def _cropped(self, lesson: ConceptData, which: Tensor, draws: Draws) -> Tensor:
        """Posteriors [B,2,2,4,h,w] of squares cut at random, of at least seven tenths of the shorter side."""
        size, right, down = draws.uniform(), draws.uniform(), draws.uniform()
        cut = []
        for index, s, x, y in zip(which.tolist(), size.tolist(), right.tolist(), down.tolist(), strict=True):
            image = scaled(lesson.pictures[index], round(self.side / (0.7 + 0.3 * s)))
            top, left = (
                int(share * (length - self.side + 1)) for share, length in zip((y, x), image.shape[1:], strict=True)
            )
            cut.append(image[:, top : top + self.side, left : left + self.side])
        return posteriors(self.pipe.vae, torch.stack(cut))

    # ------------------------------------------------ the loss

    def loss(self, sample: InversionBatch, concepts: int) -> Tensor:
        """Mean of weight(t) |eps - eps_theta(x_t, t, text)|^2 over a concept's samples, summed over the concepts. The weight is
        1 + 1/SNR up to `max_loss_weight`: at 1 it is the plain loss, without a limit it were that of v (Salimans & Ho 2022). The rows are
        read with noise about `embedding_noise` times as long as they are (NEFTune, Jain et al. 2023, does so to all words):
        what is learned so means the same a little off, and in other sentences."""
        self.table.embedding_noise = sample.embedding_noise if sample.embedding_noise.numel() else None
        text = self.pipe.text_encoder(sample.tokens)[0]
        self.table.embedding_noise = None
        alpha = self.alphas[sample.t][:, None, None, None]
        x = add_noise(sample.x0, sample.eps, alpha)
        x = x.to(self.dtype).contiguous(memory_format=memory_format(self.device))
        error = self.pipe.unet(x, sample.t, encoder_hidden_states=text).sample.float() - sample.eps
        return ((1 / alpha).clamp(max=self.max_loss_weight) * error.square()).mean() * concepts

    def backward(self, accelerator: Accelerator, rows: nn.Module, sample: InversionBatch, parts: int) -> Tensor:
        """Leaves the gradient on the rows, of the samples in `parts` pieces; returns the loss, which stays on the device."""
        size, total = -(-len(sample.t) // parts), torch.zeros((), device=self.device)
        for start in range(0, len(sample.t), size):
            part = sample[start : start + size]
            last = start + size >= len(sample.t)
            with nullcontext() if last else accelerator.no_sync(rows):
                self.table.rows = rows()
                loss = self.loss(part, len(self.lessons)) * (len(part.t) / len(sample.t))
                accelerator.backward(loss)
            total += loss.detach()
        self.table.rows = self.parameter.rows
        return total

    @torch.no_grad()
    def hold_norms(self, most: float) -> None:
        """Rows longer than `most` times the word that they started from are brought back to that: long ones drown the rest of a prompt.
        The table's mean or median would say little: words that training never met lie in it, much shorter."""
        rows = self.parameter.rows
        rows.mul_((most * self.word_norms / rows.norm(dim=1, keepdim=True)).clamp(max=1))

    def learned(self) -> dict[str, Tensor]:
        """A copy of every concept's rows as they are now, on the CPU."""
        rows = self.parameter.rows.detach().cpu()
        return {lesson.concept.token: rows[lesson.rows].clone() for lesson in self.lessons}
