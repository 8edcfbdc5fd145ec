"""Learned tokens: their files, and their place in a pipeline's tokenizer and text encoder.

A token such as <new1> has one or more vectors. They are stored one token per file, {token: [vectors,width]}, as diffusers'
`load_textual_inversion` and the common web interfaces read it.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections.abc import Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runtime.cli import BadInput, log
from runtime.files import ROOT, list_files, load_tensors, save_safetensors

if TYPE_CHECKING:
    from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
    from transformers import CLIPTokenizer

FOLDER = ROOT / "checkpoints" / "p3"  # training writes here and generation reads here
SUFFIXES = (".safetensors", ".bin", ".pt", ".ckpt")
TOKEN = re.compile(r"<[^<>\s|/\\:]+>")
LONGEST = 200  # bytes of a token, which names files
WEB_TAG = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)  # of web interfaces
WEIGHT = re.compile(r"\([^()]+:\d+(?:\.\d+)?\)")  # likewise
# what may have been meant as a token: with blanks, a weight or a backslash in it, in other brackets, or escaped for the web
LIKE_TOKEN = re.compile(
    r"(?:[<＜〈‹]|&lt;)\s*[^\W\d_][^<>＜＞〈〉‹›]*?(?:[>＞〉›]|&gt;)|\bembedding:[^\s,]+", re.IGNORECASE
)
AROUND_NAME = re.compile(r"&[lg]t;|[:|][^:|]*$|[<>＜＞〈〉‹›\s\\/]", re.IGNORECASE)
Vectors = dict[str, Tensor]  # token -> [vectors,width] float32


def tokens_in(text: str) -> list[str]:
    """Return the tokens of a prompt in order, each once: "a <new1> next to a <new2>" -> ["<new1>", "<new2>"]."""
    return list(dict.fromkeys(TOKEN.findall(composed(text))))


def composed(text: str) -> str:
    """Return the text in the tokenizer's Unicode form, NFC. An accented token is then the same however the accent was typed."""
    return unicodedata.normalize("NFC", text)


def require_token(token: str, flag: str) -> str:
    """Return `token`; raise BadInput that names the flag unless it is a word in angle brackets that starts with a letter."""
    if not TOKEN.fullmatch(token) or not token[1].isalpha():
        raise BadInput(f"{flag} {token}: a token is a word in angle brackets that starts with a letter, such as <new1>")
    if len(token.encode()) > LONGEST:
        raise BadInput(f"{flag} {token[:20]}..: a token names files, give one of {LONGEST} bytes at most")
    return token


def require_known(texts: Iterable[str], tokens: Container[str], where: str = "") -> None:
    """Raise BadInput for a text with a token that is not in `tokens`, with a tag that loads a LoRA, or not in UTF-8.

    The message starts with `where`. A token that starts with no letter, such as <3>, counts as plain text.
    """
    for text in texts:
        if not text.isprintable() and any("\ud800" <= character <= "\udfff" for character in text):
            raise BadInput(f"{where}{text!r}: a text in UTF-8 is needed, and this one holds other bytes")
        if tag := WEB_TAG.search(text):
            raise BadInput(f"{where}{tag[0]} in {text!r}: LoRAs are not supported, only token embeddings; remove it")
        if absent := [token for token in tokens_in(text) if token not in tokens and token[1].isalpha()]:
            names = ", ".join(absent)
            raise BadInput(f"{where}{names} in {text!r}: no such token here; give its file, or write it without <>")


def log_plain_text(texts: Iterable[str], tokens: Collection[str]) -> None:
    """Log parts of the texts that look like a token or a weight but are read as plain text. `tokens` are those to suggest."""
    for text in dict.fromkeys(texts):
        for name in LIKE_TOKEN.findall(text):
            if TOKEN.fullmatch(composed(name)):
                continue
            squeezed = f"<{AROUND_NAME.sub('', name.removeprefix('embedding:'))}>"
            close = difflib.get_close_matches(squeezed.casefold(), [token.casefold() for token in tokens], 1)
            meant = next((token for token in tokens if token.casefold() in close), squeezed)
            if not name[1].isspace() or close:  # "a < b and c > d" is text
                log(
                    f"{name} is read as text, since a token has {'no blanks' if ' ' in name else 'the form <name>'}: did you mean {meant}?"
                )
        for name in tokens_in(text):
            if name not in tokens and not name[1].isalpha() and any(map(str.isalpha, name)):
                log(f"{name} is read as text: no file has such a token")
        for weight in WEIGHT.findall(text):
            log(f"{weight} is read as text: weights of words are not supported")


# ---------------------------------------------------------------- files


def file_of(folder: Path, token: str) -> Path:
    """Return the file of a token: learned_new1.safetensors for <new1>."""
    return folder / f"learned_{token.strip('<>')}.safetensors"


def save_vectors(path: Path, token: str, vectors: Tensor, origin: str) -> None:
    """Write {token: [vectors,width]} in float32, atomically. `origin`, any text, goes into the header."""
    tensors = {token: vectors.detach().float().cpu().contiguous()}
    save_safetensors(path, tensors, {"format": "pt", "origin": origin})


def read_vectors(path: Path) -> Vectors:
    """Return {token: [n,width] float32} from a .safetensors, .bin, .pt or .ckpt file. Raise BadInput for any other content.

    Layouts: {token: [n,width]}, {token: [width]}, a bare tensor of these shapes, and string_to_param of the method's first code.
    If a file names no token, the token is made from the file's name: <cat-toy> for cat-toy.bin.
    """
    with torch.serialization.safe_globals([nn.ParameterDict]):  # harmless, and part of the last layout
        content: Any = load_tensors(path)
    vectors = {
        composed(str(token)): _checked(path, str(token), value) for token, value in _named(path, content).items()
    }
    if not vectors:
        raise BadInput(f"{path} holds no embedding")
    return vectors


def _named(path: Path, content: Any) -> dict[str, Any]:
    """Return {token: tensor} from a file's content in any layout of `read_vectors`."""
    # <new1> for learned_new1.pt, <cat-toy> for cat-toy.bin
    stem = composed(path.stem).removeprefix("learned_")
    own_name = f"<{''.join(c for c in stem if c.isprintable() and not c.isspace() and c not in '<>|:')}>"
    if isinstance(content, Tensor):
        return {own_name: content}
    if not isinstance(content, dict):
        raise BadInput(f"{path} holds {type(content).__name__}, no embedding")
    if {"clip_g", "clip_l"} <= content.keys():
        raise BadInput(f"{path} is an embedding of Stable Diffusion XL, which no v1 model can use")
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


@dataclass
class TokenSearch:
    """The vectors of tokens and the file of each; also the tokens of every file that was read."""

    vectors: Vectors = field(default_factory=dict)
    files: dict[str, Path] = field(default_factory=dict)
    tokens_by_file: dict[Path, list[str]] = field(default_factory=dict)

    @property
    def tokens(self) -> list[str]:
        """Every token that the files define, sorted."""
        return sorted({token for tokens in self.tokens_by_file.values() for token in tokens})


def find_vectors(tokens: Iterable[str], places: Sequence[Path]) -> TokenSearch:
    """Search files and folders, in order, for these tokens; the first place that has a token counts.

    Tokens without vectors are left out. Raise BadInput for a place that does not exist, and for a named file that is no embedding.
    Raise it also for a token that several files of a folder define differently.
    """
    search, tokens = TokenSearch(), list(tokens)
    for place in places:
        if not place.exists():
            raise BadInput(f"--embeddings {place}: no such file or folder")
        missing = [token for token in tokens if token not in search.vectors]
        vectors = _read_folder(place, missing) if place.is_dir() else {place: read_vectors(place)}
        search.tokens_by_file |= {file: list(own) for file, own in vectors.items()}
        for token in missing:
            if by_file := {file: own[token] for file, own in vectors.items() if token in own}:
                search.files[token] = _preferred_file(token, by_file)
                search.vectors[token] = by_file[search.files[token]]
    return search


def _read_folder(folder: Path, tokens: Sequence[str]) -> dict[Path, Vectors]:
    """Return {file: vectors} of a folder. Other content is logged and skipped, but in the `file_of` one of `tokens` it raises BadInput."""
    needed, vectors = {file_of(folder, token) for token in tokens}, {}
    for file in list_files(folder, SUFFIXES):
        try:
            vectors[file] = read_vectors(file)
        except BadInput as error:
            if file in needed:
                raise
            log(f"{error}: skipped")
    return vectors


def _preferred_file(token: str, vectors: Mapping[Path, Tensor]) -> Path:
    """Return the file of a folder that a token is read from. `vectors` are the token's in each file that has it.

    Its own (`file_of`) comes first, then the last of diffusers' trainer (learned_embeds), then any.
    Raise BadInput if files of the same rank differ.
    """
    files = list(vectors)
    own = [file for file in files if file == file_of(file.parent, token)]
    final = [file for file in files if file.stem == "learned_embeds"]
    files = own or final or files
    if any(not torch.equal(vectors[files[0]], vectors[other]) for other in files):
        names = ", ".join(file.name for file in files)
        raise BadInput(f"{files[0].parent}: {token} differs between {names}; name one of them: --embeddings FILE")
    return files[0]


# ---------------------------------------------------------------- in a pipeline


def names_of(token: str, vectors: int) -> list[str]:
    """Return diffusers' names for the vectors of a token: <new1>, <new1>_1, <new1>_2, .."""
    token = composed(token)
    return [token, *(f"{token}_{index}" for index in range(1, vectors))]


def add_names(tokenizer: CLIPTokenizer, tokens: Mapping[str, int]) -> None:
    """Add tokens, {token: number of vectors}, to the tokenizer's vocabulary: a name per vector. <Dog> and <dog> are different tokens.

    Raise BadInput for a token that is there already, or that the tokenizer doesn't read as one token in a sentence.
    """
    from tokenizers import AddedToken

    vocabulary, first = tokenizer.get_vocab(), len(tokenizer)
    for token, vectors in tokens.items():
        names = names_of(token, vectors)
        if taken := [name for name in names if name in vocabulary]:
            raise BadInput(f"token {taken[0]} is in the model's vocabulary already: take another name")
        tokenizer.add_tokens(
            [AddedToken(name, normalized=False) for name in names]
        )  # otherwise <Dog> and <dog> are one

    pieces, index = ["a ", ", (", ")'s ", "."], count(first)
    plain = [tokenizer(piece, add_special_tokens=False).input_ids for piece in pieces]
    for token, vectors in tokens.items():
        for name in names_of(token, vectors):
            own = [next(index)]
            expected = plain[0] + own + plain[1] + own + plain[2] + own + plain[3]
            if tokenizer(name.join(pieces), add_special_tokens=False).input_ids != expected:
                raise BadInput(
                    f"token {token}: the model's tokenizer reads {name} as something else; take another name"
                )


def install(pipe: StableDiffusionPipeline, vectors: Vectors) -> None:
    """Add tokens and their vectors to a pipeline's tokenizer and text encoder.

    Raise BadInput for vectors of another width, and for tokens that the pipeline has already.
    """
    text_encoder = pipe.text_encoder
    require_width(vectors, text_width(pipe))
    add_names(pipe.tokenizer, {token: len(rows) for token, rows in vectors.items()})
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


def tokenize(tokenizer: CLIPTokenizer, prompts: Sequence[str]) -> Tensor:
    """Return the prompts' token ids [N,77], padded. A learned token takes one place per vector.

    A prompt that is too long is cut, and logged. Raise BadInput for a learned token that is not in the vocabulary.
    """
    limit, added = tokenizer.model_max_length, tokenizer.get_added_vocab()
    require_known(prompts, added)
    texts = [_with_all_names(composed(prompt), added) for prompt in prompts]
    for prompt, ids in zip(prompts, tokenizer(texts).input_ids, strict=True):
        if len(ids) > limit:
            log(
                f"prompt of {len(ids)} tokens is cut at {limit}: {prompt}; cut off: {tokenizer.decode(ids[limit - 1 : -1])}"
            )
    ids = tokenizer(texts, padding="max_length", truncation=True, max_length=limit, return_tensors="pt").input_ids
    return torch.as_tensor(ids)


def word_positions(tokenizer: CLIPTokenizer, prompts: Sequence[str], words: Sequence[str]) -> Tensor:
    """Return [N,77,words] float32: 1 where a prompt's token belongs to a word, else 0. All vectors of a learned token are one word."""
    ids, added = tokenize(tokenizer, prompts), tokenizer.get_added_vocab()
    positions = torch.zeros(*ids.shape, len(words))
    for column, word in enumerate(words):
        own = tokenizer(_with_all_names(composed(word), added), add_special_tokens=False).input_ids
        starts = (ids.unfold(1, len(own), 1) == torch.tensor(own)).all(2) if own else ids < 0
        for prompt, start in starts.nonzero().tolist():
            positions[prompt, start : start + len(own), column] = 1
    return positions


def _with_all_names(text: str, added: Collection[str]) -> str:
    """Return the text with the names of further vectors after each token that has several: "a <new1>" -> "a <new1> <new1>_1"."""
    several = sorted((token for token in added if f"{token}_1" in added), key=len, reverse=True)

    def names(match: re.Match[str]) -> str:
        further = takewhile(added.__contains__, (f"{match[0]}_{index}" for index in count(1)))
        return " ".join([match[0], *further])

    return re.sub("|".join(map(re.escape, several)), names, text) if several else text


@torch.no_grad()
def encode(pipe: StableDiffusionPipeline, prompts: Sequence[str]) -> Tensor:
    """Return the text encoder's last hidden states [N,77,width], which condition the U-Net."""
    states: Tensor = pipe.text_encoder(tokenize(pipe.tokenizer, prompts).to(pipe.text_encoder.device))[0]
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
        """Within the block, add `noise` [..,width] to the learned embeddings of ids [..], in multiples of each embedding's norm.

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
        """The frozen table's weight, from which transformers reads the dtype."""
        return self.table.weight
