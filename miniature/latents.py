"""The diffusion model's training data: rendered images as posteriors of the autoencoder, kept on disk, and their captions."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from miniature.diffusion_parts import tokenize
from miniature.scenery.render import as_tensor, stream, world_fingerprint
from miniature.scenery.scenes import FREE, SIDE, SceneSpec
from runtime.cli import log, progress_bar
from runtime.files import atomic, output_folder, read_json, write_json
from runtime.images import to_float
from runtime.seeds import derived_seed

if TYPE_CHECKING:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from transformers import CLIPTokenizer

CHUNK = 125  # images that are encoded at a time


@dataclass(frozen=True)
class Latents:
    """The autoencoder's posteriors of N images, in the U-Net's scale, and their captions as token ids."""

    moments: Tensor  # [N,2,4,16,16] float16: mean and standard deviation
    tokens: Tensor  # [N,77] int32

    def __len__(self) -> int:
        return len(self.moments)

    def to(self, device: torch.device) -> Latents:
        """Return a copy on a GPU, 4 KB an image, so that no step waits for the disk; on a CPU the posteriors stay in the file."""
        return Latents(self.moments.to(device), self.tokens.to(device))

    def sample(self, rows: Tensor, noise: Tensor) -> Tensor:
        """Return latents [B,4,16,16] of the images `rows` [B], drawn from their posteriors by standard normal `noise`."""
        moments = self.moments[rows].to(noise)
        return moments[:, 0] + moments[:, 1] * noise

    def captions(self, rows: Tensor, dropped: Tensor, no_text: Tensor) -> Tensor:
        """Return the captions' token ids [B,77] of images `rows`, or `no_text` [1,77] where `dropped` [B] is True."""
        return torch.where(dropped[:, None], no_text, self.tokens[rows].long())


def cached_latents(
    folder: Path, vae: AutoencoderKL, tokenizer: CLIPTokenizer, count: int, seed: int, spec: SceneSpec = FREE
) -> Latents:
    """Return the posteriors and captions of `count` images from the cache in `folder`.

    They are rendered and encoded first, unless the cache is of these images and this autoencoder. A CPU encodes some hundreds a second.
    """
    scaled = f"{weights_fingerprint(vae)} x {vae.config['scaling_factor']}"
    facts = {"count": count, "seed": seed, "spec": str(spec), "vae": scaled, "world": world_fingerprint(spec)}
    done = output_folder(folder) / "facts.json"
    if not done.is_file() or read_json(done) != facts:
        done.unlink(missing_ok=True)
        log(f"encoding {count:,} images once, into {folder}")
        _write(folder, vae, [derived_seed(seed, index) for index in range(count)], spec)
        write_json(done, facts)
    moments = np.load(folder / "moments.npy", mmap_mode="c")  # copy on write: torch takes no read-only arrays
    return Latents(torch.from_numpy(moments), tokenize(tokenizer, read_json(folder / "captions.json")).int())


def _write(folder: Path, vae: AutoencoderKL, seeds: Sequence[int], spec: SceneSpec) -> None:
    channels, side = vae.config["latent_channels"], SIDE // 2 ** (len(vae.config["block_out_channels"]) - 1)
    with atomic(folder / "moments.npy") as temporary:
        moments = np.lib.format.open_memmap(temporary, "w+", np.float16, (len(seeds), 2, channels, side, side))
        captions: list[str] = []
        with progress_bar(len(seeds), "encoding") as bar:
            for rendered in stream(seeds, spec):
                rows = slice(len(captions), len(captions) + len(rendered.images))
                moments[rows] = _encode(vae, as_tensor(rendered.images))
                captions += [caption.text for caption in rendered.captions]
                bar.update(len(rendered.images))
        moments.flush()
    write_json(folder / "captions.json", captions)


@torch.inference_mode()
def _encode(vae: AutoencoderKL, images: Tensor) -> npt.NDArray[np.float16]:
    """Return the scaled posteriors, mean and standard deviation [N,2,4,16,16], of images [N,3,64,64] uint8."""
    device, scale, parts = next(vae.parameters()).device, vae.config["scaling_factor"], []
    for chunk in images.split(CHUNK):
        posterior = vae.encode(to_float(chunk.to(device))).latent_dist
        parts.append(torch.stack([posterior.mean, posterior.std], 1) * scale)
    return torch.cat(parts).half().cpu().numpy()


def weights_fingerprint(network: nn.Module) -> str:
    """Return a hash of a network's weights, which is the same in every file format and on every device."""
    digest = hashlib.blake2b(digest_size=8)
    for tensor in network.state_dict().values():
        digest.update(tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
