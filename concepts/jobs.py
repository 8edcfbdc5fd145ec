"""What P3_inference.py draws: prompts with the files and seeds of their images, and the token embeddings that they need."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from concepts.composition.layout import Layout
from concepts.course_format import IMAGES_PER_PROMPT, find_images, image_path, read_input
from concepts.embeddings import (
    FOLDER,
    TokenSearch,
    Vectors,
    composed,
    find_vectors,
    log_plain_text,
    require_known,
    require_token,
    tokens_in,
)
from concepts.stable_diffusion import load_tokenizer
from diffusion.noise import linear, slerp
from runtime.cli import BadInput, log
from runtime.seeds import distinct_seeds

MOST_LISTED = 20  # tokens in an error message


@dataclass(frozen=True)
class Job:
    """One prompt with the files of its images, in order; of candidates, the best goes into the first file."""

    prompt: str
    files: tuple[Path, ...]
    seeds: tuple[int, ...]
    """One per image that is sampled. With candidates these are more than the files."""
    text: str
    """The prompt in ordinary words, for the candidates' text score."""
    references: tuple[Path, ...] = ()
    """Reference images by which candidates are scored as well."""
    layout: Layout | None = None

    @property
    def texts(self) -> list[str]:
        """The job's prompts, its layout's included; the negative prompt is not among them."""
        layout = [*self.layout.prompts, self.layout.reference_prompt] if self.layout else []
        return [self.prompt, *layout]


def prompt_jobs(prompts: Sequence[str], output: Path, count: int, candidates: int, seed: int) -> list[Job]:
    """Return a job per prompt, with `count` files {number of the prompt}_{n}.png."""
    jobs = []
    for index, prompt in enumerate(prompts):
        files = tuple(output / f"{index}_{n}.png" for n in range(count))
        jobs.append(Job(prompt, files, _seeds(max(candidates, count), seed, index), prompt))
    return jobs


def between_tokens(words: Sequence[str], count: int) -> list[str]:
    """Return two tokens with count - 2 made-up ones between them, such as <1|6|fish|cup>: no file's token has such a bar."""
    first, last = map(composed, words)
    names = f"{first.strip('<>')}|{last.strip('<>')}"
    return [first, *(f"<{n}|{count - 1}|{names}>" for n in range(1, count - 1)), last]


def between_jobs(prompt: str, words: Sequence[str], output: Path, count: int, seed: int) -> list[Job]:
    """Return `count` jobs of one image each, between_{n}.png, all with one seed.

    In job n the prompt has the n-th of `between_tokens` in the place of {}.
    """
    prompts = [prompt.replace("{}", token) for token in between_tokens(words, count)]
    seeds = _seeds(1, seed, 0)  # that of the prompt's first image without --between
    return [Job(text, (output / f"between_{n}.png",), seeds, text) for n, text in enumerate(prompts)]


def between_vectors(vectors: Vectors, words: Sequence[str], count: int) -> Vectors:
    """Return vectors for the made-up tokens between two: directions by slerp between the two tokens' vectors, norms linear.

    Raise BadInput for a token that has no vectors here, and for tokens with different numbers or widths of vectors.
    """
    first, *tokens, last = between_tokens(words, count)
    for token in (first, last):
        if token not in vectors:
            raise BadInput(f"--between {token}: give two learned tokens with their files, such as <new1>")
    a, b = vectors[first], vectors[last]
    if a.shape != b.shape:
        shapes = f"{list(a.shape)} and {list(b.shape)}"
        raise BadInput(f"--between {first} {last}: vectors {shapes}; give tokens with as many of the same width")
    between = {}
    for n, token in enumerate(tokens, 1):
        alpha = n / (count - 1)
        # slerp() flattens, and weighs norms by sines: hence vector by vector, of length 1
        pairs = zip(F.normalize(a), F.normalize(b), strict=True)
        directions = torch.stack([slerp(u, v, alpha) for u, v in pairs])
        between[token] = linear(a.norm(dim=1), b.norm(dim=1), alpha)[:, None] * directions
    return between


def layout_job(layout: Layout, name: str, output: Path, count: int, candidates: int, seed: int) -> Job:
    """Return the job of a layout, with `count` files {name}_{n}.png."""
    files = tuple(output / f"{name}_{n}.png" for n in range(count))
    return Job(layout.joint, files, _seeds(max(candidates, count), seed, 0), layout.prompt, layout=layout)


def graded_jobs(file: Path, output: Path, references: Path, candidates: int, seed: int) -> list[Job]:
    """Return a job per prompt of the course's input.json, with 25 files each.

    Raise BadInput for an invalid token and, if `candidates` are to be chosen by their references, for a concept without images there.
    """
    jobs = []
    for concept in read_input(file):
        require_token(concept.token, f"{file}, {concept.key!r}: token_name")
        images = find_images(references / concept.key) if candidates else ()
        for k, prompt in enumerate(concept.prompts):
            files = tuple(image_path(output, concept.key, k, n) for n in range(IMAGES_PER_PROMPT))
            seeds = _seeds(max(candidates, IMAGES_PER_PROMPT), seed, zlib.crc32(concept.key.encode()), k)
            plain = prompt.replace(concept.token, concept.source)
            text = concept.clip_prompts[k] if concept.clip_prompts else plain
            jobs.append(Job(prompt, files, seeds, text, images))
    return jobs


def _seeds(count: int, *key: int) -> tuple[int, ...]:
    return tuple(distinct_seeds((*key, n) for n in range(count)))


def find_job_vectors(
    texts: Sequence[str], places: Sequence[Path], model: str, file: Path | None, references: Path
) -> TokenSearch:
    """Return the embeddings of all tokens in the texts, from `places` (files and folders), else from checkpoints/p3.

    Raise BadInput for tokens that neither these nor the model have, with the commands that learn them.
    Raise it also for a named file none of whose tokens stands in any text.
    """
    tokens = list(dict.fromkeys(token for text in texts for token in tokens_in(text)))
    require_known(texts, tokens)  # raises for tags of LoRAs
    everywhere = [*places, *([FOLDER] if FOLDER.is_dir() else [])]
    search = find_vectors(tokens, everywhere)
    absent = [token for token in tokens if token not in search.vectors and token[1].isalpha()]
    if absent and (tokenizer := load_tokenizer(model)):
        absent = [token for token in absent if token not in tokenizer.get_added_vocab()]
    if absent:
        where = ", ".join(map(str, everywhere)) or FOLDER
        held = f" (tokens there: {', '.join(search.tokens[:MOST_LISTED])})" if search.tokens else ""
        commands = "".join(f"\n  {command}" for command in learning_commands(absent, model, file, references))
        raise BadInput(f"no vectors of {', '.join(absent)} in {where}{held}; these commands learn them:{commands}")

    for place in places:
        files = [file for file in search.tokens_by_file if place in (file, file.parent)]
        own = [token for file in files for token in search.tokens_by_file[file]]
        if not set(own) & set(tokens):
            unused = f"--embeddings {place}: no text holds its token {', '.join(own[:MOST_LISTED])}"
            if place.is_file():
                raise BadInput(f"{unused}; write it with its brackets")
            log(unused)
        for token in own:
            if place.is_file() and token in tokens and search.files[token] != place:
                log(f"--embeddings {place}: {token} is taken from {search.files[token]}, which comes first")
    log_plain_text(texts, search.tokens)
    return search


def learning_commands(tokens: Sequence[str], model: str, file: Path | None, references: Path) -> list[str]:
    """Return a command per token that learns it, with FOLDER and WORD for what input.json doesn't describe."""
    concepts = {concept.token: concept for concept in read_input(file)} if file else {}
    commands = []
    for token in tokens:
        concept = concepts.get(token)
        style = concept is not None and any(f"style of {token}" in prompt for prompt in concept.prompts)
        images = references / concept.key if concept else "FOLDER"
        word = "painting" if style else concept.source.split()[-1].lower() if concept else "WORD"
        command = (
            f'python P3_textual_inversion.py --model "{model}" --images "{images}" --token "{token}" --init {word}'
        )
        commands.append(command + (" --kind style" if style else ""))
    return commands
