"""The miniature's CLIP tokenizer: each word of the captions is one token, any other word is split into smaller tokens.

The ids are laid out as CLIP's: bytes, bytes that end a word, merges, start, end. The end token has the largest id, but tokens that are
added later have larger ones. Old code takes a prompt's feature at the largest id, which is then an added token. The miniature's models
take it at the end token's id, see miniature/clip_model.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from miniature.scenery.captions import caption
from miniature.scenery.scenes import sample_scene
from runtime.files import atomic, write_json

if TYPE_CHECKING:
    from transformers import CLIPTokenizer

LENGTH = 77  # tokens of a prompt, start and end included, as in Stable Diffusion
START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
CAPTIONS = 3000  # captions whose words are taken; in so many, the rarest word occurs several times
TOKENIZER = {
    "tokenizer_class": "CLIPTokenizer",
    "model_max_length": LENGTH,
    "bos_token": START,
    "eos_token": END,
    "pad_token": END,
    "unk_token": END,
}
Merge = tuple[str, str]


def caption_words() -> list[str]:
    """Return all words that captions use, sorted."""
    texts = (caption(sample_scene(seed), seed).text for seed in range(CAPTIONS))
    return sorted({word for text in texts for word in re.findall("[a-z]+", text)})


def learn_merges(words: Iterable[str]) -> list[Merge]:
    """Return the merges of byte-pair encoding (Sennrich et al. 2016, arXiv 1508.07909) that make every word one token.

    Each word counts once.
    """
    split = [[*word[:-1], word[-1] + WORD_END] for word in words]
    merges: list[Merge] = []
    while pairs := Counter(pair for word in split for pair in pairwise(word)):
        most = max(pairs.values())
        best = min(pair for pair, times in pairs.items() if times == most)  # the same on all machines
        merges.append(best)
        split = [merge_pair(word, best) for word in split]
    return merges


def merge_pair(word: list[str], pair: Merge) -> list[str]:
    """Return the word's tokens with every occurrence of the pair joined, from the left."""
    tokens: list[str] = []
    for token in word:
        if tokens and (tokens[-1], token) == pair:
            tokens[-1] += token
        else:
            tokens.append(token)
    return tokens


@cache
def build_vocabulary() -> tuple[dict[str, int], list[Merge]]:
    """Return {token: id}, and the merges in order."""
    from tokenizers.pre_tokenizers import ByteLevel

    alphabet, merges = sorted(ByteLevel.alphabet()), learn_merges(caption_words())
    tokens = [*alphabet, *(byte + WORD_END for byte in alphabet), *(a + b for a, b in merges), START, END]
    return {token: index for index, token in enumerate(tokens)}, merges


def make_tokenizer() -> CLIPTokenizer:
    """Return the tokenizer of the world's captions; truncation keeps 77 tokens."""
    from transformers import CLIPTokenizer

    vocabulary, merges = build_vocabulary()
    options: dict[str, Any] = {name: value for name, value in TOKENIZER.items() if name != "tokenizer_class"}
    return CLIPTokenizer(vocab=vocabulary, merges=merges, **options)  # type: ignore[arg-type]  # it takes pairs


def save_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, which `CLIPTokenizer` and `AutoTokenizer` read."""
    vocabulary, merges = build_vocabulary()
    with atomic(folder / "vocab.json") as temporary:
        temporary.write_text(json.dumps(vocabulary, ensure_ascii=False) + "\n", encoding="utf-8")
    with atomic(folder / "merges.txt") as temporary:
        lines = ["#version: 0.2", *(" ".join(merge) for merge in merges)]
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(folder / "tokenizer_config.json", TOKENIZER)
