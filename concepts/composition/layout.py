"""A layout: what a picture shows as a whole, and which learned concept belongs where.

  {"prompt": "a photo of a dog next to a cat on a bench",
   "concepts": [{"token": "<new1>", "word": "dog", "box": [0.05, 0.3, 0.45, 0.9], "images": "pictures/dog"},
                {"token": "<cat>", "prompt": "a photo of a <cat> on a bench", "mask": "cat.png"},
                {"token": "<new2>", "style": true}],
   "reference": "two_dogs_on_a_bench.png", "reference_prompt": "two dogs on a bench"}

Boxes are left, top, right, bottom in shares of the picture; masks are pictures, white where the concept belongs. A style without either
is added to all prompts; with one, to those of the concepts there, and to the base prompt in the rest of its region. "word" says a token
in ordinary words. A concept without a prompt of its own has "a photo of a <token>"; it should name that thing alone. "images", a folder
of a concept's pictures, serves scores only.
"joint", if given, is the prompt of the level of that name, which has all tokens in one. A "reference" is a square picture whose layout
is followed. Files are relative to the layout's own.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from concepts.embeddings import TOKEN, tokens_in
from runtime.cli import BadInput, log
from runtime.files import read_json
from runtime.images import open_image

Box = tuple[float, float, float, float]
FINEST = 512  # positions along each side in which masks are kept
KNOWN = {"prompt", "concepts", "joint", "reference", "reference_prompt"}
PREPOSITIONS = r"(?:of|to|and|or|with|in|on|at|by|near|above|below|under|behind|beside|from|over)\b"
FIELDS = {"token", "prompt", "box", "mask", "style", "word", "images"}


@dataclass(frozen=True)
class Region:
    """A concept's token, its own prompt and its mask [512,512] float32, 0 or 1."""

    token: str
    prompt: str
    mask: Tensor
    word: str = "object"
    """The token in ordinary words."""
    images: Path | None = None
    """Folder of the concept's pictures."""
    thing: bool = True
    """Can be drawn alone; what is left of a style's region can't."""

    @property
    def plain(self) -> str:
        """Its prompt in ordinary words, without learned styles."""
        return TOKEN.sub("", self.prompt.replace(self.token, self.word)).split(" in the style of ")[0].strip()


@dataclass(frozen=True)
class Style:
    """A style's token, and where it belongs: [512,512] float32, 0 or 1, or everywhere."""

    token: str
    mask: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """The prompt in ordinary words, the regions, whose masks don't overlap, and all in one prompt, for comparison."""

    prompt: str
    regions: tuple[Region, ...]
    joint: str = ""
    reference: Tensor | None = None
    """[3,S,S] uint8, the picture whose layout is followed."""
    reference_prompt: str = ""
    """What it shows; none given: the base prompt."""

    def shares(self, height: int, width: int) -> Tensor:
        """[N,height,width] float32, how much of each position belongs to a region, 0..1."""
        if not self.regions:
            return torch.zeros(0, height, width)
        masks = torch.stack([region.mask for region in self.regions])
        return F.interpolate(masks[None], size=(height, width), mode="area")[0]

    def masks(self, height: int, width: int) -> Tensor:
        """[N,height,width] float32, 0 or 1, at another resolution; none of them overlap."""
        return (self.shares(height, width) > 0.5).float()

    @property
    def prompts(self) -> list[str]:
        """The base prompt, then one per region."""
        return [self.prompt, *(region.prompt for region in self.regions)]

    def only(self, things: bool) -> Layout:
        """The same with those regions alone that are things, or are not."""
        return replace(self, regions=tuple(region for region in self.regions if region.thing == things))

    def check_resolution(self, height: int, width: int) -> None:
        """Raises BadInput for a region in which no latent of this size lies."""
        for region, mask in zip(self.regions, self.masks(height, width), strict=True):
            if not mask.any():
                raise BadInput(
                    f"{region.token}: its region is smaller than the {height}x{width} latents of this model resolve"
                )


def inside(shares: Tensor, height: int, width: int) -> Tensor:
    """Shares [N,B,h,w] -> masks [N,B,height,width] float32, 0 or 1: the positions that belong to a concept more than to any other, and at
    least half as much as the one that does most. A region smaller than a position keeps the one that it fills best."""
    found = F.interpolate(shares, size=(height, width), mode="area")
    first, second = torch.cat([found, found.new_zeros(2, *found.shape[1:])]).topk(2, 0).values
    return ((found == first) & (first > second) & (found > found.amax((2, 3), keepdim=True) / 2)).float()


def bounds(mask: Tensor) -> tuple[slice, slice]:
    """Rows and columns of what isn't zero in a mask [H,W], which must not be empty."""
    rows, columns = (mask.any(axis).nonzero().flatten() for axis in (1, 0))
    return slice(int(rows[0]), int(rows[-1]) + 1), slice(int(columns[0]), int(columns[-1]) + 1)


def key_of(mask: Tensor) -> int:
    """A place as a number, so that what is random about it doesn't depend on its rank among others."""
    return zlib.crc32(mask.numpy().tobytes())


def box_mask(box: Box) -> Tensor:
    """[512,512]: 1 where a position's middle lies in the box."""
    middles = (torch.arange(FINEST) + 0.5) / FINEST
    left, top, right, bottom = box
    return ((middles >= top) & (middles < bottom)).float()[:, None] * ((middles >= left) & (middles < right)).float()


# ---------------------------------------------------------------- making one


def without_overlap(regions: Sequence[Region]) -> list[Region]:
    """Where two masks overlap the later one yields, with a line; raises BadInput where nothing is left of one."""
    taken = torch.zeros(FINEST, FINEST)
    found: list[Region] = []
    for region in regions:
        free = region.mask * (1 - taken)
        if not free.any():
            raise BadInput(f"{region.token}: its region is empty, or lies within those before it")
        if free.sum() < region.mask.sum():
            log(
                f"{region.token}: {1 - float(free.sum() / region.mask.sum()):.0%} of its region belongs to concepts before it"
            )
        taken, found = taken + free, [*found, replace(region, mask=free)]
    return found


def make_layout(
    prompt: str, regions: Sequence[Region], styles: Sequence[Style] = (), joint: str = "", **reference: Any
) -> Layout:
    """Regions may overlap; whole-picture styles go to the end of every prompt. `joint`: all tokens in one prompt. `reference`: the
    layout's fields of these names."""
    ending = "".join(f" in the style of {style.token}" for style in styles if style.mask is None)
    apart = [replace(region, prompt=_ended(region.prompt, ending)) for region in without_overlap(regions)]
    for style in styles:
        if style.mask is not None:
            apart = styled(apart, _ended(prompt, ending), style.token, style.mask)
    everything = "".join(f" in the style of {style.token}" for style in styles)
    joint = joint or _ended(_together(prompt, regions), everything)
    return Layout(_ended(prompt, ending), tuple(apart), joint, **reference)


def _together(prompt: str, regions: Sequence[Region]) -> str:
    """The prompt with every word as its token, where it has all words; else the tokens next to each other."""
    for region in regions:
        prompt = slots(prompt, [region.word], region.token, 1)
    if all(region.token in prompt for region in regions):
        return prompt
    return "a photo of " + " next to ".join(f"a {region.token}" for region in regions)


def _ended(prompt: str, ending: str) -> str:
    return prompt.rstrip(".") + ending


def styled(regions: Sequence[Region], prompt: str, token: str, mask: Tensor) -> list[Region]:
    """The regions, those mostly inside the mask in this style, and what is left of the mask as a region of the base prompt in it."""
    ending = f" in the style of {token}"
    within = [bool((region.mask * mask).sum() * 2 > region.mask.sum()) for region in regions]
    found = [
        replace(region, prompt=region.prompt + ending) if yes else region
        for region, yes in zip(regions, within, strict=True)
    ]
    left = mask * (1 - sum((region.mask for region in regions), torch.zeros(FINEST, FINEST)))
    return [*found, Region(token, prompt + ending, left, thing=False)] if left.any() else found


def slots(prompt: str, words: Sequence[str], token: str, most: int = 0) -> str:
    """The prompt with the token in the place of every one of these words (of the first `most`): "a dog next to a cat" -> "a <new1> next
    to a <new1>"."""
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    found = re.compile(rf"(\ban )?(?<!\w)(?:{either})(?!\w)")
    return found.sub(lambda match: f"a {token}" if match[1] else token, prompt, count=most)


def auto_layout(prompt: str, words: dict[str, str]) -> Layout:
    """The tokens of a prompt side by side, in its order; `words` says them in ordinary words, for the base prompt. A token after "style
    of" is a style. Raises BadInput for a prompt without any other."""
    tokens = tokens_in(prompt)
    styles = [token for token in tokens if f"style of {token}" in prompt]
    objects = [token for token in tokens if token not in styles]
    if not objects:
        raise BadInput(f"--layout auto: {prompt!r} names no object's token")
    if words and (silent := [token for token in objects if token not in words]):
        log(f"--words has none for {', '.join(silent)}, an object to the base prompt")
    plain = prompt
    for style in styles:
        plain = plain.replace(f" in the style of {style}", "")
    width = 1 / len(objects)
    regions = []
    for index, token in enumerate(objects):
        box = ((index + 0.05) * width, 0.15, (index + 0.95) * width, 0.85)
        regions.append(Region(token, f"a photo of {_phrase(prompt, token)}", box_mask(box), words.get(token, "object")))
    base = TOKEN.sub(lambda found: words.get(found[0], "object"), plain)
    return make_layout(base, regions, [Style(style) for style in styles], prompt)


def _phrase(prompt: str, token: str) -> str:
    """The token with its article and the adjectives between the two, as in "a red <key>"; without an article "a <key>"."""
    found = re.search(rf"\b(?:an?|the) (?:(?!{PREPOSITIONS})[\w-]+ ){{0,3}}{re.escape(token)}", prompt)
    return found[0] if found else f"a {token}"


# ---------------------------------------------------------------- the file


def read_layout(path: Path) -> Layout:
    """Raises BadInput with the file, the concept and the value."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise BadInput(f'{path}: wanted an object with a text "prompt" and a list "concepts"')
    _check_texts(f"{path}", content, ("prompt", "joint", "reference", "reference_prompt"))
    if unknown := set(content) - KNOWN:
        raise BadInput(f"{path}: {', '.join(sorted(unknown))} is not known; known are {', '.join(sorted(KNOWN))}")
    entries = content.get("concepts")
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{path}: concepts must be a list of at least one concept")
    for number, entry in enumerate(entries):
        _check_entry(path, number, entry)
    for entry in entries:
        if "word" in entry and slots(content["prompt"], [entry["word"]], "") == content["prompt"]:
            log(f"{path}, {entry['token']}: the prompt doesn't hold its word {entry['word']!r}")
    regions = [_region(path, entry) for entry in entries if not entry.get("style")]
    styles = [Style(entry["token"], _mask(path, entry)) for entry in entries if entry.get("style")]
    reference = {name: content[name] for name in ("reference", "reference_prompt") if name in content}
    if "reference" in reference:
        reference["reference"] = _reference(path, reference["reference"])
    return make_layout(content["prompt"], regions, styles, content.get("joint", ""), **reference)


def _check_texts(name: str, values: dict[str, Any], fields: Sequence[str]) -> None:
    for field in fields:
        if field in values and not (isinstance(values[field], str) and values[field].strip()):
            raise BadInput(f"{name}: {field} {values[field]!r} must be a text")


def _check_entry(path: Path, number: int, entry: Any) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str) or not TOKEN.fullmatch(entry["token"]):
        given = entry.get("token") if isinstance(entry, dict) else entry
        raise BadInput(f"{path}, concept {number + 1}: its token {given!r} must be one such as <new1>")
    name = f"{path}, {entry['token']}"
    if unknown := set(entry) - FIELDS:
        raise BadInput(f"{name}: {', '.join(sorted(unknown))} is not known; known are {', '.join(sorted(FIELDS))}")
    _check_texts(name, entry, ("prompt", "word", "images", "mask"))
    if not isinstance(entry.get("style", False), bool):
        raise BadInput(f"{name}: style {entry['style']!r} must be true or false")
    if "box" in entry and "mask" in entry or not entry.get("style") and not {"box", "mask"} & set(entry):
        raise BadInput(f"{name}: give it either a box or a mask")
    if entry["token"] not in str(entry.get("prompt", entry["token"])):
        raise BadInput(f"{name}: its prompt doesn't hold it: {entry['prompt']!r}")


def _region(path: Path, entry: dict[str, Any]) -> Region:
    token, word = entry["token"], entry.get("word", "object")
    prompt = str(entry.get("prompt", f"a photo of a {token}"))
    images = path.parent / entry["images"] if "images" in entry else None
    if images and not images.is_dir():
        raise BadInput(f"{path}, {token}: images {images} is not a folder")
    mask = _mask(path, entry)
    assert mask is not None  # only a style may have none
    return Region(token, prompt, mask, word, images)


def _mask(path: Path, entry: dict[str, Any]) -> Tensor | None:
    if "mask" in entry:
        picture = open_image(path.parent / entry["mask"]).float().mean(0) / 255
        return (F.interpolate(picture[None, None], size=(FINEST, FINEST), mode="area")[0, 0] > 0.5).float()
    if "box" not in entry:
        return None
    box = entry["box"]
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
    if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise BadInput(
            f"{path}, {entry['token']}: box {box} must be left, top, right, bottom in shares from 0 to 1, rising"
        )
    return box_mask(tuple(box))


def _reference(path: Path, file: str) -> Tensor:
    picture = open_image(path.parent / file)
    height, width = picture.shape[1:]
    if height != width:
        raise BadInput(f"{path}: reference {file} has {width}x{height} pixels, but pictures are square: crop it")
    return picture
