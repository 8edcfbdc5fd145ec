"""A layout: what a picture shows as a whole, and which learned concept belongs where.

  {"prompt": "a photo of a dog next to a cat on a bench",
   "concepts": [{"token": "<new1>", "prompt": "a photo of a <new1> on a bench", "box": [0.05, 0.3, 0.45, 0.9]},
                {"token": "<cat>", "prompt": "a photo of a <cat> on a bench", "mask": "cat.png"},
                {"token": "<new2>", "style": true}]}

Boxes are left, top, right, bottom in shares of the picture; masks are pictures, white where the concept belongs. A style has neither: it
is added to all prompts. "joint", if given, is the prompt of the level of that name, which has all tokens in one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from P3_embeddings import TOKEN, tokens_in
from runtime.cli import BadInput, note
from runtime.figures import open_picture
from runtime.files import read_json

Box = tuple[float, float, float, float]
FINEST = 512  # positions along each side in which masks are kept
FIELDS = {"token", "prompt", "box", "mask", "style"}


@dataclass(frozen=True)
class Region:
    """A concept's token, its own prompt and its mask [512,512] float32, 0 or 1."""

    token: str
    prompt: str
    mask: Tensor


@dataclass(frozen=True)
class Layout:
    """The prompt in ordinary words, the regions, whose masks don't overlap, and all in one prompt, for comparison."""

    prompt: str
    regions: tuple[Region, ...]
    joint: str = ""

    def masks(self, height: int, width: int) -> Tensor:
        """[N,height,width] float32, 0 or 1, at another resolution; none of them overlap."""
        masks = torch.stack([region.mask for region in self.regions])
        return (F.interpolate(masks[:, None], size=(height, width), mode="area")[:, 0] > 0.5).float()

    @property
    def prompts(self) -> list[str]:
        """The base prompt, then one per region."""
        return [self.prompt, *(region.prompt for region in self.regions)]


def box_mask(box: Box) -> Tensor:
    """[512,512]: 1 where a position's middle lies in the box."""
    middles = (torch.arange(FINEST) + 0.5) / FINEST
    left, top, right, bottom = box
    return ((middles >= top) & (middles < bottom)).float()[:, None] * ((middles >= left) & (middles < right)).float()


def without_overlap(masks: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
    """Where two masks overlap the later one yields, with a line; raises BadInput where nothing is left of one."""
    taken = torch.zeros_like(masks[0])
    found: list[Tensor] = []
    for mask, name in zip(masks, names, strict=True):
        free = mask * (1 - taken)
        if not free.any():
            raise BadInput(f"{name}: its region is empty, or lies within those before it")
        if free.sum() < mask.sum():
            note(f"{name}: {1 - float(free.sum() / mask.sum()):.0%} of its region belongs to concepts before it")
        taken, found = taken + free, [*found, free]
    return found


def make_layout(
    prompt: str, regions: Sequence[tuple[str, str, Tensor]], styles: Sequence[str] = (), joint: str = ""
) -> Layout:
    """From (token, prompt, mask) per region; styles go to the end of every prompt. `joint`: all tokens in one prompt."""
    ending = "".join(f" in the style of {style}" for style in styles)
    masks = without_overlap([mask for *_, mask in regions], [token for token, *_ in regions]) if regions else []
    parts = [
        Region(token, text.rstrip(".") + ending, mask) for (token, text, _), mask in zip(regions, masks, strict=True)
    ]
    joint = joint or "a photo of " + " next to ".join(f"a {token}" for token, *_ in regions) + ending
    return Layout(prompt.rstrip(".") + ending, tuple(parts), joint)


def auto_layout(prompt: str, words: dict[str, str]) -> Layout:
    """The tokens of a prompt side by side, in its order; `words` says them in ordinary words, for the base prompt. A token after "style
    of" is a style. Raises BadInput for a prompt without any other."""
    tokens = tokens_in(prompt)
    styles = [token for token in tokens if f"style of {token}" in prompt]
    objects = [token for token in tokens if token not in styles]
    if not objects:
        raise BadInput(f"--layout auto: {prompt!r} names no object's token")
    plain = prompt
    for style in styles:
        plain = plain.replace(f" in the style of {style}", "")
    width = 1 / len(objects)
    regions = []
    for index, token in enumerate(objects):
        left = index * width
        box = (left + 0.05 * width, 0.15, left + 0.95 * width, 0.85)
        regions.append((token, f"a photo of a {token}", box_mask(box)))
    return make_layout(TOKEN.sub(lambda found: words.get(found[0], "object"), plain), regions, styles, prompt)


def layout_picture(layout: Layout, side: int = 256) -> Tensor:
    """[3,side,side] uint8: each region in a colour of its own on grey, in the layout's order: red, green, blue, yellow, purple, teal."""
    colours = torch.tensor(
        [(228, 87, 86), (84, 162, 75), (76, 120, 168), (238, 202, 59), (178, 121, 162), (114, 183, 178)]
    )
    chosen = colours[torch.arange(len(layout.regions)) % len(colours)].float()
    masks = layout.masks(side, side)
    picture = torch.einsum("nhw,nc->chw", masks, chosen) + 210 * (1 - masks.sum(0))
    return picture.to(torch.uint8)


# ---------------------------------------------------------------- the file


def read_layout(path: Path) -> Layout:
    """Raises BadInput with the file, the concept and the value."""
    content = read_json(path)
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise BadInput(f'{path}: wanted an object with "prompt" and "concepts"')
    entries = content.get("concepts")
    if not isinstance(entries, list) or not entries:
        raise BadInput(f"{path}: concepts must be a list of at least one concept")
    for number, entry in enumerate(entries):
        _check_entry(path, number, entry)
    styles = [entry["token"] for entry in entries if entry.get("style")]
    regions = [
        (entry["token"], entry.get("prompt") or f"a photo of a {entry['token']}", _mask(path, entry))
        for entry in entries
        if not entry.get("style")
    ]
    return make_layout(content["prompt"], regions, styles, str(content.get("joint", "")))


def _check_entry(path: Path, number: int, entry: Any) -> None:
    if not isinstance(entry, dict) or not isinstance(entry.get("token"), str) or not TOKEN.fullmatch(entry["token"]):
        raise BadInput(f"{path}, concept {number}: wants a token such as <new1>")
    name = f"{path}, {entry['token']}"
    if unknown := set(entry) - FIELDS:
        raise BadInput(f"{name}: {', '.join(sorted(unknown))} is not known; known are {', '.join(sorted(FIELDS))}")
    if entry.get("style"):
        return
    if ("box" in entry) == ("mask" in entry):
        raise BadInput(f"{name}: give it either a box or a mask")
    if entry["token"] not in str(entry.get("prompt", entry["token"])):
        raise BadInput(f"{name}: its prompt doesn't hold it: {entry['prompt']!r}")


def _mask(path: Path, entry: dict[str, Any]) -> Tensor:
    if "mask" in entry:
        picture = open_picture(path.parent / str(entry["mask"])).float().mean(0) / 255
        return (F.interpolate(picture[None, None], size=(FINEST, FINEST), mode="area")[0, 0] > 0.5).float()
    box = entry["box"]
    numbers = isinstance(box, list) and len(box) == 4 and all(isinstance(x, int | float) for x in box)
    if not numbers or not (0 <= box[0] < box[2] <= 1 and 0 <= box[1] < box[3] <= 1):
        raise BadInput(
            f"{path}, {entry['token']}: box {box} must be left, top, right, bottom in shares from 0 to 1, rising"
        )
    return box_mask(tuple(box))
