"""A layout: what an image shows as a whole, and which learned concept belongs where.

  {"prompt": "a photo of a dog next to a cat on a bench",
   "concepts": [{"token": "<new1>", "word": "dog", "box": [0.05, 0.3, 0.45, 0.9], "images": "pictures/dog"},
                {"token": "<cat>", "prompt": "a photo of a <cat> on a bench", "mask": "cat.png"},
                {"token": "<new2>", "style": true}],
   "reference": "two_dogs_on_a_bench.png", "reference_prompt": "two dogs on a bench"}

prompt     the whole scene in ordinary words, called the base prompt
token      a learned token; "word" is its ordinary word, which stands for it in the prompt
box        left, top, right, bottom as fractions of the image
mask       an image, white where the concept belongs; instead of a box
prompt     of a concept: a prompt for it alone. Default: "a photo of a <token>"
style      a style, not a thing. Without box or mask it is added to all prompts. With one, it is added to the prompts of the concepts
           mostly inside. In the rest of its region the base prompt applies, with the style
images     a folder of the concept's images, used only to score results
joint      the one prompt with all tokens, for level "joint". Default: the base prompt with tokens for their words
reference  a square image whose layout is followed. "reference_prompt" describes it; default: the base prompt

File names are relative to the layout file.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator
from torch import Tensor

from concepts.composition.masks import MASK_SIZE, box_mask
from concepts.embeddings import TOKEN, tokens_in
from runtime.cli import BadInput, log
from runtime.files import read_json
from runtime.images import image_file, open_image, to_rgb, to_tensor
from runtime.validation import validate

PREPOSITIONS = r"(?:of|to|and|or|with|in|on|at|by|near|above|below|under|behind|beside|from|over)\b"


@dataclass(frozen=True)
class Region:
    """A concept's token, the prompt for it alone, and its mask [512,512] float32, 0 or 1."""

    token: str
    prompt: str
    mask: Tensor
    word: str = "object"
    """An ordinary word for the token."""
    images: Path | None = None
    """Folder of the concept's images."""
    thing: bool = True
    """Whether it is a thing, which can be sampled alone. False for the rest of a style's region."""

    @property
    def plain_prompt(self) -> str:
        """The prompt with `word` for the token, and without learned styles."""
        return TOKEN.sub("", self.prompt.replace(self.token, self.word)).split(" in the style of ")[0].strip()


@dataclass(frozen=True)
class Style:
    """A style's token and its mask [512,512] float32, 0 or 1; None = the whole image."""

    token: str
    mask: Tensor | None = None


@dataclass(frozen=True)
class Layout:
    """The base prompt in ordinary words, the regions, whose masks don't overlap, and the joint prompt with all tokens."""

    prompt: str
    regions: tuple[Region, ...]
    joint: str = ""
    reference: Tensor | None = None
    """[3,S,S] uint8, the image whose layout is followed; None = none."""
    reference_prompt: str = ""
    """The prompt of the reference; "" = the base prompt."""

    def soft_masks(self, height: int, width: int) -> Tensor:
        """Return the N regions' masks resized, [N,height,width] float32 in 0..1: how much of a position belongs to a region."""
        if not self.regions:
            return torch.zeros(0, height, width)
        masks = torch.stack([region.mask for region in self.regions])
        return F.interpolate(masks[None], size=(height, width), mode="area")[0]

    def masks(self, height: int, width: int) -> Tensor:
        """Return the N regions' masks resized, [N,height,width] float32, 0 or 1; no two overlap."""
        return (self.soft_masks(height, width) > 0.5).float()

    @property
    def prompts(self) -> list[str]:
        """The base prompt, then one per region."""
        return [self.prompt, *(region.prompt for region in self.regions)]

    def only(self, things: bool) -> Layout:
        """Return the layout with only the regions that are things, or only those that aren't."""
        return replace(self, regions=tuple(region for region in self.regions if region.thing == things))

    def check_resolution(self, height: int, width: int) -> None:
        """Raise BadInput for a region that covers no position of latents of this size."""
        for region, mask in zip(self.regions, self.masks(height, width), strict=True):
            if not mask.any():
                raise BadInput(
                    f"{region.token}: its region is smaller than the {height}x{width} latents of this model resolve"
                )


def prompts_by_region(layouts: Sequence[Layout]) -> list[str]:
    """Return (1 + N) B prompts for B layouts: their base prompts, then the prompts of their first regions, and so on."""
    return [prompt for prompts in zip(*(layout.prompts for layout in layouts), strict=True) for prompt in prompts]


def stack_soft_masks(layouts: Sequence[Layout], height: int, width: int) -> Tensor:
    """Return [N,B,height,width], the soft masks of B layouts of N regions each."""
    return torch.stack([layout.soft_masks(height, width) for layout in layouts], 1)


# ---------------------------------------------------------------- making one


def make_layout(
    prompt: str, regions: Sequence[Region], styles: Sequence[Style] = (), joint: str = "", **reference: Any
) -> Layout:
    """Build a layout from regions that may overlap; an earlier region keeps the overlap.

    A style without a mask is appended to every prompt, one with a mask goes through `apply_style`. `joint` "" = derived from `prompt`.
    `reference` are the keywords reference and reference_prompt of `Layout`.
    """
    ending = "".join(f" in the style of {style.token}" for style in styles if style.mask is None)
    disjoint = [replace(region, prompt=_append(region.prompt, ending)) for region in remove_overlaps(regions)]
    for style in styles:
        if style.mask is not None:
            disjoint = apply_style(disjoint, _append(prompt, ending), style.token, style.mask)
    everything = "".join(f" in the style of {style.token}" for style in styles)
    joint = joint or _append(_joint_prompt(prompt, regions), everything)
    return Layout(_append(prompt, ending), tuple(disjoint), joint, **reference)


def remove_overlaps(regions: Sequence[Region]) -> list[Region]:
    """Return the regions with earlier masks cut out of later ones, and log it. Raise BadInput if nothing is left of a region."""
    taken = torch.zeros(MASK_SIZE, MASK_SIZE)
    disjoint: list[Region] = []
    for region in regions:
        free = region.mask * (1 - taken)
        if not free.any():
            raise BadInput(f"{region.token}: its region is empty, or lies within those before it")
        if free.sum() < region.mask.sum():
            share = 1 - float(free.sum() / region.mask.sum())
            log(f"{region.token}: {share:.0%} of its region belongs to concepts before it")
        taken, disjoint = taken + free, [*disjoint, replace(region, mask=free)]
    return disjoint


def apply_style(regions: Sequence[Region], prompt: str, token: str, mask: Tensor) -> list[Region]:
    """Return the regions, with the style added to the prompts of those mostly inside the mask.

    The rest of the mask becomes a further region, with the base prompt `prompt` in this style.
    """
    ending = f" in the style of {token}"
    within = [bool((region.mask * mask).sum() * 2 > region.mask.sum()) for region in regions]
    styled = [
        replace(region, prompt=region.prompt + ending) if inside else region
        for region, inside in zip(regions, within, strict=True)
    ]
    rest = mask * (1 - sum((region.mask for region in regions), torch.zeros(MASK_SIZE, MASK_SIZE)))
    return [*styled, Region(token, prompt + ending, rest, thing=False)] if rest.any() else styled


def _joint_prompt(prompt: str, regions: Sequence[Region]) -> str:
    """Return the prompt with every token in the place of its word, or if a word is missing "a photo of a <a> next to a <b>"."""
    for region in regions:
        prompt = replace_words(prompt, [region.word], region.token, 1)
    if all(region.token in prompt for region in regions):
        return prompt
    return "a photo of " + " next to ".join(f"a {region.token}" for region in regions)


def _append(prompt: str, ending: str) -> str:
    return prompt.rstrip(".") + ending


def replace_words(prompt: str, words: Sequence[str], token: str, count: int = 0) -> str:
    """Return the prompt with these words replaced by the token, at most `count` times (0 = all).

    With dog and cat: "a dog next to a cat" -> "a <new1> next to a <new1>".
    """
    either = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    pattern = re.compile(rf"(\ban )?(?<!\w)(?:{either})(?!\w)")
    return pattern.sub(lambda match: f"a {token}" if match[1] else token, prompt, count=count)


def auto_layout(prompt: str, words: dict[str, str]) -> Layout:
    """Return a layout with a prompt's tokens side by side, in its order.

    `words` maps tokens to ordinary words for the base prompt; the default is "object". A token after "style of" is a style.
    Raise BadInput for a prompt without a token that is no style.
    """
    tokens = tokens_in(prompt)
    styles = [token for token in tokens if f"style of {token}" in prompt]
    objects = [token for token in tokens if token not in styles]
    if not objects:
        raise BadInput(f"--layout auto: {prompt!r} names no object's token")
    if words and (without_word := [token for token in objects if token not in words]):
        log(f"--words has none for {', '.join(without_word)}, an object to the base prompt")
    plain = prompt
    for style in styles:
        plain = plain.replace(f" in the style of {style}", "")
    width = 1 / len(objects)
    regions = []
    for index, token in enumerate(objects):
        box = ((index + 0.05) * width, 0.15, (index + 0.95) * width, 0.85)
        regions.append(Region(token, f"a photo of {_phrase(prompt, token)}", box_mask(box), words.get(token, "object")))
    base = TOKEN.sub(lambda match: words.get(match[0], "object"), plain)
    return make_layout(base, regions, [Style(style) for style in styles], prompt)


def _phrase(prompt: str, token: str) -> str:
    """Return the token with its article and the adjectives between the two, as in "a red <key>"; without an article "a <key>"."""
    match = re.search(rf"\b(?:an?|the) (?:(?!{PREPOSITIONS})[\w-]+ ){{0,3}}{re.escape(token)}", prompt)
    return match[0] if match else f"a {token}"


# ---------------------------------------------------------------- the file

Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]


class ConceptEntry(BaseModel):
    """One concept of a layout file."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    token: Annotated[str, StringConstraints(pattern=f"^{TOKEN.pattern}$")]
    prompt: Text = ""
    box: Annotated[list[Fraction], Field(min_length=4, max_length=4)] = []
    mask: Text = ""
    style: Annotated[bool, Field(strict=True)] = False
    word: Text = "object"
    images: Text = ""

    @model_validator(mode="after")
    def check(self) -> ConceptEntry:
        """Refuse a concept with box and mask, one with neither that is no style, an empty box, and a prompt without the token."""
        if self.box and self.mask or not (self.style or self.box or self.mask):
            raise ValueError(f"{self.token}: give it either a box or a mask")
        if self.box and not (self.box[0] < self.box[2] and self.box[1] < self.box[3]):
            raise ValueError(f"{self.token}: box {self.box} must be left, top, right, bottom, rising")
        if self.prompt and self.token not in self.prompt:
            raise ValueError(f"{self.token}: its prompt doesn't hold it: {self.prompt!r}")
        return self


class LayoutFile(BaseModel):
    """The content of a layout file in JSON: the base prompt, the concepts, and optionally the joint prompt and a reference image.

    `joint` "" = derived from `prompt`. `reference` is a path relative to the file's folder, and "" = no reference.
    `reference_prompt` "" = the base prompt.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    prompt: Text
    concepts: Annotated[list[ConceptEntry], Field(min_length=1)]
    joint: Text = ""
    reference: Text = ""
    reference_prompt: Text = ""


def read_layout(path: Path) -> Layout:
    """Return the layout of a file. Raise BadInput that names the file, the entry and the value."""
    content = validate(LayoutFile, read_json(path), str(path))
    for entry in content.concepts:
        if "word" in entry.model_fields_set and replace_words(content.prompt, [entry.word], "") == content.prompt:
            log(f"{path}, {entry.token}: the prompt doesn't hold its word {entry.word!r}")
    regions, styles = [], []
    for entry in content.concepts:
        mask, images = _read_mask(path, entry), path.parent / entry.images if entry.images else None
        if images and not images.is_dir():
            raise BadInput(f"{path}, {entry.token}: images {images} is not a folder")
        if entry.style:
            styles.append(Style(entry.token, mask))
        else:
            assert mask is not None  # only a style may have none
            prompt = entry.prompt or f"a photo of a {entry.token}"
            regions.append(Region(entry.token, prompt, mask, entry.word, images))
    reference = _read_reference(path, content.reference) if content.reference else None
    return make_layout(
        content.prompt, regions, styles, content.joint, reference=reference, reference_prompt=content.reference_prompt
    )


def _read_mask(path: Path, entry: ConceptEntry) -> Tensor | None:
    if entry.mask:
        white = _whiteness(path.parent / entry.mask)
        mask = F.interpolate(white[None, None], size=(MASK_SIZE, MASK_SIZE), mode="area")[0, 0] > 0.5
        if not mask.any():
            raise BadInput(
                f"{entry.token}: its region is empty, no part of {path.parent / entry.mask} is white"
                f" (the brightest is {255 * float(white.max()):.0f} of 255)"
            )
        return mask.float()
    if entry.box:
        left, top, right, bottom = entry.box
        return box_mask((left, top, right, bottom))
    return None


def _whiteness(file: Path) -> Tensor:
    """Return a mask file's brightness [H,W] in 0..1.

    1 is white if a file holds only 0 and 1; 255 is white if a 16-bit file holds no larger value.
    Transparent parts are black if the others are white. Raise BadInput for other transparent images, such as a cut-out photograph.
    """
    with image_file(file) as image:
        if image.has_transparency_data:
            *colour, alpha = np.asarray(image.convert("RGBA"), np.float32).transpose(2, 0, 1)
            opaque = alpha > 127
            if not opaque.all() and (np.mean(colour, axis=0)[opaque] < 128).sum() > 0.05 * opaque.sum():
                raise BadInput(f"{file} is transparent and not white elsewhere: save the mask as white on black")
        levels = np.asarray(image)
        top, deep = levels.max(), image.mode[0] == "I"
        if image.mode == "L" and top == 1 or deep and top <= 255:
            image = Image.fromarray((levels * (255 if top == 1 else 1)).astype(np.uint8))
        return to_tensor(to_rgb(image, "black")).float().mean(0) / 255


def _read_reference(path: Path, file: str) -> Tensor:
    image = open_image(path.parent / file)
    height, width = image.shape[1:]
    if height != width:
        raise BadInput(f"{path}: reference {file} has {width}x{height} pixels, but pictures are square: crop it")
    return image
