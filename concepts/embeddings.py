"""Learned tokens: their files, and their place in a pipeline's tokenizer and text encoder.

A token such as <new1> has one or more vectors. They are stored one token per file, {token: [vectors,width]}, as diffusers'
`load_textual_inversion` and the common web interfaces read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runtime.cli import BadInput, log
from runtime.files import ROOT, load_safetensors, load_tensors, save_safetensors

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers import CLIPTokenizer

FOLDER = ROOT / "checkpoints" / "p3"  # training writes here and generation reads here
SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")
TOKEN = re.compile(r"<[^<>\s|/\\:]+>")
Vectors = dict[str, Tensor]  # token -> [vectors,width] float32


def tokens_in(text: str) -> list[str]:
    """Return the tokens of a prompt in order, each once: "a <new1> next to a <new2>" -> ["<new1>", "<new2>"]."""
    return list(dict.fromkeys(TOKEN.findall(text)))


def require_token(token: str, flag: str) -> str:
    """Return `token`; raise BadInput that names the flag unless it is a word in angle brackets."""
    if not TOKEN.fullmatch(token):
        raise BadInput(f"{flag} {token}: a token is a word in angle brackets, such as <new1>")
    return token


# ---------------------------------------------------------------- files


def file_of(folder: Path, token: str) -> Path:
    """Return the file of a token: learned_new1.safetensors for <new1>."""
    return folder / f"learned_{token.strip('<>')}.safetensors"


def save_vectors(path: Path, token: str, vectors: Tensor, origin: str) -> None:
    """Write {token: [vectors,width]} in float32, atomically, with `origin` in the header."""
    tensors = {token: vectors.detach().float().cpu().contiguous()}
    save_safetensors(path, tensors, {"format": "pt", "origin": origin})


def read_vectors(path: Path) -> Vectors:
    """Read the tokens of a .safetensors, .bin, .pt or .ckpt file; raise BadInput for any other content.

    Layouts: {token: [n,width]}, {token: [width]}, a bare tensor of these shapes, and string_to_param of the method's first code.
    A file that names no token has the token of its own name.
    """
    if path.suffix == ".safetensors":
        content: Any = load_safetensors(path)[0]
    else:
        with torch.serialization.safe_globals([nn.ParameterDict]):  # harmless, and part of the last layout
            content = load_tensors(path)
    vectors = {token: _checked(path, token, value) for token, value in _named(path, content).items()}
    if not vectors:
        raise BadInput(f"{path} holds no embedding")
    return vectors


def _named(path: Path, content: Any) -> dict[str, Any]:
    """Return {token: tensor} from a file's content in any of the four layouts."""
    # <new1> for learned_new1.pt, <cat-toy> for cat-toy.bin
    own_name = f"<{re.sub(r'[<>|:]|[^!-~]+', '', path.stem.removeprefix('learned_'))}>"
    if isinstance(content, Tensor):
        return {own_name: content}
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds {type(content).__name__}, no embedding")
    if "string_to_param" in content:
        values = dict(content["string_to_param"])
        if len(values) > 1:
            return values
        name, value = next(iter(values.items()))  # the name is often a placeholder, "*"
        name = str(content.get("name") or name)
        return {name if TOKEN.fullmatch(name) else own_name: value}
    if len(content) == 1 and not TOKEN.fullmatch(str(next(iter(content)))):  # such as emb_params
        return {own_name: next(iter(content.values()))}
    return {token: value for token, value in content.items() if isinstance(value, Tensor)}


def _checked(path: Path, token: str, value: Any) -> Tensor:
    """Return a token's vectors as [n,width] float32; raise BadInput for anything else."""
    if not TOKEN.fullmatch(token):
        raise BadInput(f"{path}: {token!r} is no token; a token is a word in angle brackets, such as <new1>")
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (1, 2) or not len(value):
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise BadInput(f"{path}, {token}: {shape} is no embedding; wanted [vectors, width] of floating-point numbers")
    if not value.isfinite().all():
        raise BadInput(f"{path}, {token}: holds values that are NaN or infinite")
    return value.detach().float().reshape(-1, value.shape[-1])


def find_vectors(tokens: Iterable[str], places: Sequence[Path]) -> Vectors:
    """Return the vectors of these tokens from files and folders; the first that has a token counts.

    Tokens without vectors are left out. Raise BadInput for a file or folder that does not exist.
    """
    vectors: Vectors = {}
    for place in places:
        if not place.exists():
            raise BadInput(f"--embeddings {place}: no such file or folder")
        files = sorted(file for file in place.iterdir() if file.suffix in SUFFIXES) if place.is_dir() else [place]
        for file in files:
            vectors = read_vectors(file) | vectors
    return {token: vectors[token] for token in tokens if token in vectors}


# ---------------------------------------------------------------- in a pipeline


def names_of(token: str, vectors: int) -> list[str]:
    """Return diffusers' names for the vectors of a token: <new1>, <new1>_1, <new1>_2, .."""
    return [token, *(f"{token}_{index}" for index in range(1, vectors))]


def add_names(tokenizer: CLIPTokenizer, token: str, vectors: int) -> None:
    """Add a token to the vocabulary; raise BadInput if it is there already."""
    names, vocabulary = names_of(token, vectors), tokenizer.get_vocab()
    if taken := [name for name in names if name in vocabulary]:
        raise BadInput(f"token {taken[0]} is in the model's vocabulary already: take another name")
    tokenizer.add_tokens(names)


def install(pipe: StableDiffusionPipeline, vectors: Vectors) -> None:
    """Add tokens and their vectors to a pipeline.

    Raise BadInput for vectors of another width, and for tokens that the pipeline has already.
    """
    text_encoder = pipe.text_encoder
    require_width(vectors, text_width(pipe))
    for token, rows in vectors.items():
        add_names(pipe.tokenizer, token, len(rows))
    if len(pipe.tokenizer) > len(text_encoder.get_input_embeddings().weight):
        text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    table = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for token, rows in vectors.items():
            ids = pipe.tokenizer.convert_tokens_to_ids(names_of(token, len(rows)))
            table[ids] = rows.to(table)
    table.requires_grad_(False)


def require_width(vectors: Vectors, width: int | None) -> None:
    """Raise BadInput for vectors of another width than `width`; None = unknown, accept any."""
    for token, rows in vectors.items():
        if width and rows.shape[1] != width:
            raise BadInput(
                f"{token} was learned on another model: its vectors are {rows.shape[1]} wide, this one's {width}"
            )


def text_width(pipe: StableDiffusionPipeline) -> int:
    """Return the width of the pipeline's token embeddings."""
    return int(pipe.text_encoder.config.hidden_size)


def tokenize(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Return token ids [N,77]; a token of several vectors takes as many places.

    A prompt that is too long is cut, and logged.
    """
    limit = pipe.tokenizer.model_max_length
    texts = [pipe.maybe_convert_prompt(prompt, pipe.tokenizer) for prompt in prompts]
    for prompt, ids in zip(prompts, pipe.tokenizer(texts).input_ids, strict=True):
        if len(ids) > limit:
            log(f"prompt of {len(ids)} tokens is cut at {limit}: {prompt}")
    ids = pipe.tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt").input_ids
    return torch.as_tensor(ids)


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Return the text encoder's last hidden states [N,77,width], which condition the U-Net."""
    states: Tensor = pipe.text_encoder(tokenize(pipe, prompts).to(pipe.text_encoder.device))[0]
    return states


class TokenEmbeddings(nn.Module):
    """A frozen embedding table, extended by `learned` [n,width] float32 for the ids from `first` on.

    Only `learned` has a gradient, so no optimizer can change the rest.
    """

    def __init__(self, table: nn.Embedding, first: int, start: Tensor):
        super().__init__()
        self.table, self.first = table.requires_grad_(False), first
        self.learned = nn.Embedding.from_pretrained(start, freeze=False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the embeddings [..,width] of ids [..], in the frozen table's dtype."""
        frozen: Tensor = self.table(ids.clamp(max=self.first - 1))
        learned = self.learned((ids - self.first).clamp(min=0))
        return torch.where((ids >= self.first)[..., None], learned.to(frozen.dtype), frozen)

    @contextmanager
    def noise(self, noise: Tensor) -> Iterator[None]:
        """Within the block, add `noise` [..,width], in multiples of an embedding's norm, to the learned embeddings of ids [..].

        NEFTune (Jain et al. 2023) adds such noise to all embeddings of a text.
        """

        def add(_module: nn.Module, _inputs: object, embeddings: Tensor) -> Tensor:
            norms: Tensor = embeddings.detach().norm(dim=-1, keepdim=True)
            return embeddings + noise * norms

        handle = self.learned.register_forward_hook(add)
        try:
            yield
        finally:
            handle.remove()

    @property
    def weight(self) -> Tensor:
        """The frozen table, of which transformers reads the dtype."""
        return self.table.weight
