"""Textual inversion (Gal et al. 2022, arXiv 2208.01618): the loss of a frozen Stable Diffusion as a function of new token embeddings."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from concepts.dataset import ConceptSet, InversionBatch
from concepts.embeddings import SUFFIXES, TokenEmbeddings, add_names
from concepts.stable_diffusion import KINDS, suit_training
from diffusion.loss import capped_v_weight, denoising_loss
from runtime.cli import BadInput
from runtime.device import autocast, memory_format, to_training_device
from runtime.files import file_fingerprint, list_files
from runtime.seeds import derived_seed

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline


class TextualInversion:
    """A frozen pipeline with new tokens. Their embeddings are the only trainable parameters."""

    def __init__(self, pipe: StableDiffusionPipeline, concepts: Sequence[ConceptSet], seed: int):
        """Add the concepts' tokens to the pipeline, in place. Its parts must be on one device in one dtype.

        Raise BadInput for a token that is taken, and for an initial word that is not a single token.
        """
        self.pipe, self.concepts, self.device = pipe, concepts, pipe.unet.device
        self.alpha_bar = pipe.scheduler.alphas_cumprod.float().to(self.device)
        table, first = pipe.text_encoder.get_input_embeddings(), len(pipe.tokenizer)
        words = [self._initial_embedding(concept, table.weight) for concept in concepts]
        add_names(pipe.tokenizer, {concept.token: concept.vectors for concept in concepts})
        start = [starting_embeddings(concept, word, seed) for concept, word in zip(concepts, words, strict=True)]
        self.embeddings = TokenEmbeddings(table, first, torch.cat(start).to(self.device))
        pipe.text_encoder.set_input_embeddings(self.embeddings)
        norms = [word.norm().expand(concept.vectors, 1) for concept, word in zip(concepts, words, strict=True)]
        self.initial_norms = torch.cat(norms).to(self.device)  # [vectors of all tokens,1]

    def _initial_embedding(self, concept: ConceptSet, weight: Tensor) -> Tensor:
        ids = self.pipe.tokenizer(concept.init, add_special_tokens=False).input_ids
        if len(ids) != 1:
            raise BadInput(
                f"--init {concept.init!r}: wanted a single word of the model's vocabulary, this takes {len(ids)} tokens"
            )
        return weight[ids[0]].float().cpu()

    def loss(self, batch: InversionBatch, max_loss_weight: float = 1.0) -> Tensor:
        """Return the mean of weight(t) |eps - eps_theta(x_t, t, text)|^2 (Gal et al. 2022, eq. 2) over the batch.

        weight = 1 + 1/SNR, at most `max_loss_weight`; 1 = unweighted.
        """

        def network(x: Tensor, t: Tensor) -> Tensor:
            x = x.to(self.pipe.unet.dtype).contiguous(memory_format=memory_format(self.device))
            eps: Tensor = self.pipe.unet(x, t, encoder_hidden_states=text).sample
            return eps

        weight, fp16 = partial(capped_v_weight, maximum=max_loss_weight), self.pipe.unet.dtype == torch.float16
        with autocast(self.device, "fp16" if fp16 else "fp32"):  # with weights in fp16, norms and softmax stay in fp32
            with self.embeddings.noise(batch.embedding_noise):
                text = self.pipe.text_encoder(batch.tokens)[0]
            return denoising_loss(network, batch.x0, batch.eps, batch.t, self.alpha_bar, weight=weight)

    @torch.no_grad()
    def cap_norms(self, max_norm: float) -> None:
        """Limit each learned embedding's norm, in place, to `max_norm` times its initial word's. Long ones suppress the rest of a prompt.

        The table's mean norm is no suitable limit: many of its tokens hardly occurred in pretraining and are much shorter.
        """
        learned = self.embeddings.learned.weight
        learned.mul_((max_norm * self.initial_norms / learned.norm(dim=1, keepdim=True)).clamp(max=1))

    def learned(self) -> dict[str, Tensor]:
        """Return {token: a copy of its vectors [vectors,width]} on the CPU."""
        vectors = self.embeddings.learned.weight.detach().cpu().split([concept.vectors for concept in self.concepts])
        return {concept.token: own.clone() for concept, own in zip(self.concepts, vectors, strict=True)}


def starting_embeddings(concept: ConceptSet, word: Tensor, seed: int) -> Tensor:
    """Return a concept's vectors [vectors,width] before training, from its initial word's embedding [width].

    The first one equals it. Further ones differ by a tenth of its norm, at random, since equal ones would stay equal.
    """
    generator = torch.Generator().manual_seed(derived_seed(seed, concept.key))
    offsets: Tensor = torch.randn(concept.vectors, len(word), generator=generator) * word.norm() / len(word) ** 0.5
    offsets[0] = 0
    return word + 0.1 * offsets


def prepare_frozen(
    pipe: StableDiffusionPipeline, precision: str, compiled: bool = False, low_memory: bool = False
) -> None:
    """Prepare the frozen networks, in place, for fast gradients; `compiled` compiles the U-Net.

    `low_memory` is gradient checkpointing in the U-Net, a third slower.
    """
    unet = to_training_device(pipe.unet, pipe.unet.device)
    for network in (unet, pipe.text_encoder):
        suit_training(network, unet.device, precision)
    if low_memory:
        unet.enable_gradient_checkpointing()
    if compiled:
        unet.compile()


def weights_fingerprint(model: Path) -> str:
    """Return a hash of a model's weight files: those of a diffusers folder, or a single file.

    It depends neither on where they lie nor on the precision that they are loaded in.
    """
    if model.is_file():
        return file_fingerprint(model)
    files = [file for part in KINDS for file in list_files(model / part, SUFFIXES)]
    return hashlib.blake2b("".join(map(file_fingerprint, files)).encode(), digest_size=12).hexdigest()
