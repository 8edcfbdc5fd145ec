"""The diffusion model's training data: posteriors of rendered pictures, encoded once and mapped from disk, and their captions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
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
from miniature.scenery.render import as_tensor, batch, stream
from miniature.scenery.scenes import FREE, SIDE, SceneSpec
from runtime.cli import log, progress_bar
from runtime.files import atomic, output_folder, read_json, write_json
from runtime.seeds import derived_seed

ENCODED = 125  # pictures at once


@dataclass(frozen=True)
class Latents:
    """N pictures as posteriors, already in the U-Net's scale, and their captions as token ids."""

    moments: Tensor  # [N,2,4,16,16] float16: mean and standard deviation
    tokens: Tensor  # [N,77] int32

    def __len__(self) -> int:
        return len(self.moments)

    def to(self, device: torch.device) -> Latents:
        """On a GPU 4 KB a picture, so that no step waits for the disk; on a CPU still in the file."""
        return Latents(self.moments.to(device), self.tokens.to(device))

    def take(self, rows: Tensor, noise: Tensor) -> Tensor:
        """Latents [B,4,16,16] of pictures `rows`, drawn from their posteriors by standard normal `noise`."""
        moments = self.moments[rows].to(noise)
        return moments[:, 0] + moments[:, 1] * noise


def cached_latents(
    folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, seed: int, wish: SceneSpec = FREE
) -> Latents:
    """Posteriors from `folder`, where they are of the same pictures and autoencoder; else made now: on a CPU some hundreds a second."""
    facts = {"count": count, "seed": seed, "wish": str(wish), "vae": _fingerprint(vae), "world": _look(wish)}
    done = output_folder(folder) / "facts.json"
    if not done.is_file() or read_json(done) != facts:
        done.unlink(missing_ok=True)
        log(f"encoding {count:,} pictures once, into {folder}")
        _write(folder, vae, [derived_seed(seed, index) for index in range(count)], wish)
        write_json(done, facts)
    moments = np.load(folder / "moments.npy", mmap_mode="c")  # never written to, but torch takes no read-only arrays
    return Latents(torch.from_numpy(moments), tokenize(tokenizer, read_json(folder / "captions.json")).int())


def _write(folder: Path, vae: AutoencoderKL, seeds: Sequence[int], wish: SceneSpec) -> None:
    channels, side = vae.config["latent_channels"], SIDE // 2 ** (len(vae.config["block_out_channels"]) - 1)
    with atomic(folder / "moments.npy") as temporary:
        moments = np.lib.format.open_memmap(temporary, "w+", np.float16, (len(seeds), 2, channels, side, side))
        captions: list[str] = []
        with progress_bar(len(seeds), "encoding") as bar:
            for made in stream(seeds, wish):
                done = slice(len(captions), len(captions) + len(made.images))
                moments[done] = _encoded(vae, as_tensor(made.images))
                captions += [caption.text for caption in made.captions]
                bar.update(len(made.images))
        moments.flush()
    write_json(folder / "captions.json", captions)


@torch.inference_mode()
def _encoded(vae: AutoencoderKL, images: Tensor) -> npt.NDArray[np.float16]:
    """[N,3,64,64] uint8 -> [N,2,4,16,16]."""
    device, scale, parts = next(vae.parameters()).device, vae.config["scaling_factor"], []
    for chunk in images.split(ENCODED):
        posterior = vae.encode(to_float(chunk.to(device))).latent_dist
        parts.append(torch.stack([posterior.mean, posterior.std], 1) * scale)
    return torch.cat(parts).half().cpu().numpy()


def _look(wish: SceneSpec) -> str:
    """Tells another way of rendering or of captioning, by a few pictures."""
    made = batch(range(8), wish)
    digest = hashlib.blake2b(made.images.tobytes(), digest_size=8)
    digest.update(str(made.captions).encode())
    return digest.hexdigest()


def _fingerprint(vae: AutoencoderKL) -> str:
    """Tells one autoencoder from another."""
    digest = hashlib.blake2b(str(vae.config["scaling_factor"]).encode(), digest_size=8)
    for tensor in vae.state_dict().values():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
