"""The diffusion model's training data: posteriors of rendered pictures, encoded once and mapped from disk, and their captions."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor
from transformers import CLIPTokenizer

from miniature.diffusion_parts import tokenize
from miniature.judge_model import to_float
from miniature.scenes import FREE, SIDE, Wish
from miniature.world import as_tensor, captions_of, dataset
from runtime.cli import note, progress
from runtime.device import len_cores
from runtime.files import atomic, output_folder, read_json, write_json
from runtime.generation import derived_seed

RENDERED = 4000  # pictures that are in memory at a time
ENCODED = 125  # .. and that are encoded at once


@dataclass(frozen=True)
class Latents:
    """N pictures as posteriors, already in the U-Net's scale, and their captions as token ids."""

    moments: npt.NDArray[np.float16]  # [N,2,4,16,16]: mean and standard deviation
    tokens: Tensor  # [N,77] int32

    def __len__(self) -> int:
        return len(self.moments)

    def take(self, rows: Tensor, noise: Tensor) -> Tensor:
        """Latents [B,4,16,16] of pictures `rows`, drawn from their posteriors by standard normal `noise`."""
        moments = torch.from_numpy(self.moments[rows.cpu().numpy()]).to(noise)
        return moments[:, 0] + moments[:, 1] * noise


def cached_latents(
    folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, seed: int, wish: Wish = FREE
) -> Latents:
    """Posteriors from `folder`, where they are of the same pictures and autoencoder; else made now, at a few hundred pictures/s."""
    facts = {"count": count, "seed": seed, "wish": str(wish), "vae": _fingerprint(vae)}
    done = output_folder(folder) / "facts.json"
    if not done.is_file() or read_json(done) != facts:
        done.unlink(missing_ok=True)
        note(f"encoding {count:,} pictures once, into {folder}")
        _write(folder, vae, count, seed, wish)
        write_json(done, facts)
    texts = [text for start, size in _parts(count) for text in captions_of(size, derived_seed(seed, start), wish)]
    captions = tokenize(tokenizer, texts)
    return Latents(np.load(folder / "moments.npy", mmap_mode="r"), captions.int())


def _write(folder: Path, vae: AutoencoderKL, count: int, seed: int, wish: Wish) -> None:
    channels, side = vae.config["latent_channels"], SIDE // 2 ** (len(vae.config["block_out_channels"]) - 1)
    with atomic(folder / "moments.npy") as temporary:
        moments = np.lib.format.open_memmap(temporary, "w+", np.float16, (count, 2, channels, side, side))
        for start, size in progress(_parts(count), "encoding", leave=False):
            made = dataset(size, derived_seed(seed, start), wish, processes=len_cores() if size == RENDERED else 1)
            moments[start : start + size] = _encoded(vae, as_tensor(made.images))
        moments.flush()


def _parts(count: int) -> list[tuple[int, int]]:
    """(index of the first, how many) of the pictures that are in memory together."""
    return [(start, min(RENDERED, count - start)) for start in range(0, count, RENDERED)]


@torch.inference_mode()
def _encoded(vae: AutoencoderKL, images: Tensor) -> npt.NDArray[np.float16]:
    """[N,3,64,64] uint8 -> [N,2,4,16,16]."""
    device, scale, parts = next(vae.parameters()).device, vae.config["scaling_factor"], []
    for chunk in images.split(ENCODED):
        posterior = vae.encode(to_float(chunk.to(device))).latent_dist
        parts.append(torch.stack([posterior.mean, posterior.std], 1) * scale)
    return torch.cat(parts).half().cpu().numpy()


def _fingerprint(vae: AutoencoderKL) -> str:
    """Tells one autoencoder from another."""
    digest = hashlib.blake2b(str(vae.config["scaling_factor"]).encode(), digest_size=8)
    for tensor in vae.state_dict().values():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
