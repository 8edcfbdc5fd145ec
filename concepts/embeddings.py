"""Learned tokens: their files, whatever wrote them, and their place in a pipeline's tokenizer and text encoder.

A token such as <new1> has one or more vectors. They are stored one token per file, {token: [vectors,width]}, as diffusers'
`load_textual_inversion` and the common web interfaces read it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runtime.cli import BadInput, log
from runtime.files import ROOT, load_safetensors, load_tensors, save_safetensors

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers import CLIPTokenizer

FOLDER = ROOT / "checkpoints" / "p3"  # where training puts them and generation looks for them
SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")
TOKEN = re.compile(r"<[^<>\s|/\\:]+>")
Vectors = dict[str, Tensor]  # token -> [vectors,width] float32


def tokens_in(text: str) -> list[str]:
    """The tokens of a prompt in order, each once: "a <new1> next to a <new2>" -> ["<new1>", "<new2>"]."""
    return list(dict.fromkeys(TOKEN.findall(text)))


def require_token(token: str, flag: str) -> str:
    """`token`, if it is one; else BadInput that names the flag."""
    if not TOKEN.fullmatch(token):
        raise BadInput(f"{flag} {token}: a token is a word in angle brackets, such as <new1>")
    return token


# ---------------------------------------------------------------- files


def file_of(folder: Path, token: str) -> Path:
    """learned_new1.safetensors for <new1>."""
    return folder / f"learned_{token.strip('<>')}.safetensors"


def save_vectors(path: Path, token: str, vectors: Tensor, origin: str) -> None:
    """{token: [vectors,width]} in float32; `origin` is told in the header."""
    tensors = {token: vectors.detach().float().cpu().contiguous()}
    save_safetensors(path, tensors, {"format": "pt", "origin": origin})


def read_vectors(path: Path) -> Vectors:
    """The tokens of a .safetensors, .bin, .pt or .ckpt file of one of four layouts: {token: [n,width]} or {token: [width]}; a bare
    tensor of these shapes; string_to_token with string_to_param, as the method's first code wrote it. Where a file doesn't say its
    token it is its name's. Raises BadInput."""
    if path.suffix == ".safetensors":
        content: Any = load_safetensors(path)[0]
    else:
        with torch.serialization.safe_globals([nn.ParameterDict]):  # harmless, and part of the last layout
            content = load_tensors(path)
    found = {token: _rows(path, token, value) for token, value in _named(path, content).items()}
    if not found:
        raise BadInput(f"{path} holds no embedding")
    return found


def _named(path: Path, content: Any) -> dict[str, Any]:
    if isinstance(content, Tensor):
        return {_token_of(path): content}
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds {type(content).__name__}, no embedding")
    if "string_to_param" not in content:
        if len(content) == 1 and not TOKEN.fullmatch(str(next(iter(content)))):  # such as emb_params
            return {_token_of(path): next(iter(content.values()))}
        return {token: value for token, value in content.items() if isinstance(value, Tensor)}
    given = dict(content["string_to_param"])
    if len(given) == 1:  # "*" stands for whatever the user calls it
        name = str(content.get("name") or next(iter(given)))
        return {name if TOKEN.fullmatch(name) else _token_of(path): next(iter(given.values()))}
    return given


def _token_of(path: Path) -> str:
    """<new1> for learned_new1.pt, <cat-toy> for cat-toy.bin."""
    return f"<{re.sub(r'[<>|:]|[^!-~]+', '', path.stem.removeprefix('learned_'))}>"


def _rows(path: Path, token: str, value: Any) -> Tensor:
    if not TOKEN.fullmatch(token):
        raise BadInput(f"{path}: {token!r} is no token; a token is a word in angle brackets, such as <new1>")
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.dim() not in (1, 2) or not len(value):
        shape = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise BadInput(f"{path}, {token}: {shape} is no embedding; wanted [vectors, width] of floating-point numbers")
    if not value.isfinite().all():
        raise BadInput(f"{path}, {token}: holds values that are NaN or infinite")
    return value.detach().float().reshape(-1, value.shape[-1])


def find_vectors(tokens: Iterable[str], places: Sequence[Path]) -> Vectors:
    """The vectors of these tokens from files and folders, of which the first that has a token counts; tokens without any are left
    out. Raises BadInput for a place that isn't there."""
    found: Vectors = {}
    for path in [file for place in places for file in _files(place)]:
        for token, rows in read_vectors(path).items():
            found.setdefault(token, rows)
    return {token: found[token] for token in tokens if token in found}


def _files(place: Path) -> list[Path]:
    if place.is_dir():
        return sorted(path for path in place.iterdir() if path.suffix in SUFFIXES)
    if place.is_file():
        return [place]
    raise BadInput(f"--embeddings {place}: no such file or folder")


# ---------------------------------------------------------------- in a pipeline


def names_of(token: str, vectors: int) -> list[str]:
    """<new1>, <new1>_1, <new1>_2, ..: diffusers' names for the vectors of a token."""
    return [token, *(f"{token}_{index}" for index in range(1, vectors))]


def add_names(tokenizer: CLIPTokenizer, token: str, vectors: int) -> None:
    """Makes room for a token; raises BadInput where the tokenizer knows it already."""
    names = names_of(token, vectors)
    known = tokenizer.get_vocab()
    if taken := [name for name in names if name in known]:
        raise BadInput(f"token {taken[0]} is in the model's vocabulary already: take another name")
    tokenizer.add_tokens(names)


def install(pipe: StableDiffusionPipeline, vectors: Vectors) -> None:
    """Gives the pipeline these tokens; raises BadInput for vectors of another width and for tokens that it has already."""
    tower = pipe.text_encoder
    require_width(vectors, text_width(pipe))
    for token, rows in vectors.items():
        add_names(pipe.tokenizer, token, len(rows))
    old = tower.get_input_embeddings().weight
    if len(pipe.tokenizer) > len(old):
        tower.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    table = tower.get_input_embeddings().weight
    with torch.no_grad():
        for token, rows in vectors.items():
            ids = pipe.tokenizer.convert_tokens_to_ids(names_of(token, len(rows)))
            table[ids] = rows.to(table)
    table.requires_grad_(False)


def require_width(vectors: Vectors, width: int | None) -> None:
    """Raises BadInput for vectors of another width; None: unknown."""
    for token, rows in vectors.items():
        if width and rows.shape[1] != width:
            raise BadInput(
                f"{token} was learned on another model: its vectors are {rows.shape[1]} wide, this one's {width}"
            )


def text_width(pipe: StableDiffusionPipeline) -> int:
    """Of a token's vector."""
    return pipe.text_encoder.config.hidden_size


def tokenize(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """[N,77] token ids; a token of several vectors takes as many places. What doesn't fit is cut off, with a line."""
    limit = pipe.tokenizer.model_max_length
    texts = [pipe.maybe_convert_prompt(prompt, pipe.tokenizer) for prompt in prompts]
    for prompt, ids in zip(prompts, pipe.tokenizer(texts).input_ids, strict=True):
        if len(ids) > limit:
            log(f"prompt of {len(ids)} tokens is cut at {limit}: {prompt}")
    return pipe.tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt").input_ids


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """[N,77,width]: the text encoder's last states, as the U-Net reads them."""
    return pipe.text_encoder(tokenize(pipe, prompts).to(pipe.text_encoder.device))[0]


class ExtendedTable(nn.Module):
    """A frozen embedding table, and `rows` [n,width] float32 for the ids from `first` on: only these are anybody's parameters, so
    no optimizer can move the others."""

    def __init__(self, table: nn.Embedding, first: int):
        super().__init__()
        self.table, self.first = table, first
        self.rows = torch.empty(0)
        self.embedding_noise: Tensor | None = None
        """[..,width], like the ids: what is added to new rows, as multiples of their length; None: nothing."""

    def forward(self, ids: Tensor) -> Tensor:
        """[..] ids -> [..,width]."""
        known = self.table(ids.clamp(max=self.first - 1))
        new = nn.functional.embedding((ids - self.first).clamp(min=0), self.rows)
        if self.embedding_noise is not None:
            new = new + self.embedding_noise * new.detach().norm(dim=-1, keepdim=True)
        return torch.where((ids >= self.first)[..., None], new.to(known.dtype), known)

    @property
    def weight(self) -> Tensor:
        """The frozen part, for those who ask a table for its dtype."""
        return self.table.weight
