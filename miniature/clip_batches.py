"""What the small CLIP learns from: relatives in one batch, and which captions of it are true of which pictures.

Pictures drawn at random differ in colours and style, which are seen at a glance, so a batch of them hardly asks for shapes. A batch is
therefore made of small families that share colours, background and style and differ in objects and places; some only swap the colours
of the same objects, and others differ in nothing but the style. And as the world's captions leave things out, one is often true of
several pictures of a batch: of 64 pictures, 98 % have a true caption besides their own. Which these are is known, so they aren't taken
for wrong ones.

Every object has a colour that it is never seen in. From that follows what an object of this colour is not: a shortcut, which fails on
just the pairs that are held out. So some families have no colours at all, and nothing is asked whose answer the colour alone would give.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from itertools import permutations
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from miniature.scenery.captions import STYLE_TRAITS, TRAITS, Caption, caption
from miniature.scenery.render import Images, render
from miniature.scenery.scenes import (
    ALL_KINDS,
    ALL_STYLES,
    BACKGROUNDS,
    COLOURS,
    GROUNDS,
    HELD_OUT_PAIRS,
    PLACES,
    SIDE,
    Scene,
    SceneSpec,
    allowed,
    sample_scene,
)
from runtime.seeds import derived_seed
from zeroshot.prompts import article

FAMILY = 4  # pictures
NONE = len(ALL_KINDS)  # of a patch without an object
GREY = 0.5  # share of families without colours, in picture and caption: see above
RESTYLED = 0.4  # share of families that differ in style alone
STOP = 0.25  # share of captions with a full stop, which prompts often have and the world's captions never
UNNAMED, ABSENT = -1, -2
COLOURED = re.compile(rf"\b(an? )?(?:{'|'.join(dict.fromkeys([*COLOURS, *BACKGROUNDS]))}) (?=(\w+))")
MOST = 3  # objects in a picture


class Batch(NamedTuple):
    """N pictures [N,64,64,3] uint8, their captions, `also` [N,N] bool: caption j is true of picture i, or false for its colour alone;
    `parts` [N,P,P] int64: the kind of the object that a patch belongs to; `never` [N,kinds] bool: kinds that no patch is compared with;
    `styles` [N] int64."""

    images: Images
    texts: list[str]
    also: Tensor
    parts: Tensor
    never: Tensor
    styles: Tensor


@dataclass(frozen=True)
class Batches:
    """Batch k of a training, for every k: map-style, as torch's DataLoader takes it."""

    seed: int
    count: int
    """Pictures in a batch."""
    patch: int
    """Pixels, height and width."""

    def __getitem__(self, step: int) -> Batch:
        seeds = [(step, index // FAMILY, index % FAMILY) for index in range(self.count)]
        scenes: list[Scene] = []
        for key in seeds:
            place, member = derived_seed(self.seed, *key), key[-1]
            akin = restyled if self._share(RESTYLED, step, key[1], 0, 4) else relative
            scenes.append(akin(scenes[-member], member, place) if member else sample_scene(place))
        captions = [caption(scene, derived_seed(self.seed, *key, 1)) for key, scene in zip(seeds, scenes, strict=True)]
        images = np.stack([render(scene) for scene in scenes])
        for row, (_, family, _) in enumerate(seeds):
            if self._share(GREY, step, family, 0, 3):
                images[row], captions[row] = greyed(images[row], captions[row])
        stops = [self._share(STOP, *key, 2) for key in seeds]
        texts = [each.text + "." * stop for each, stop in zip(captions, stops, strict=True)]
        never = never_seen(scenes)
        also = true_of(scenes, captions) | (never.float() @ bare_kinds(scenes, captions).float().T > 0)
        styles = torch.tensor([ALL_STYLES.index(scene.style) for scene in scenes])
        return Batch(images, texts, also, parts_of(scenes, self.patch), never, styles)

    def _share(self, share: float, *key: int) -> bool:
        """True for this share of keys."""
        return derived_seed(self.seed, *key) % 1000 < 1000 * share


def relative(head: Scene, member: int, seed: int) -> Scene:
    """A scene that shares colours, background and style with the head of its family; of several objects the first relative keeps the
    kinds too, with their colours moved on by one, unless that makes a held-out pair."""
    kinds = tuple(thing.kind for thing in head.things)
    colours = tuple(thing.colour for thing in head.things)
    moved = colours[1:] + colours[:1]
    swap = member == 1 and len(kinds) > 1
    swap = swap and all(allowed(c, k, "trained") for c, k in zip(moved, kinds, strict=True))
    wish = SceneSpec(
        kinds=kinds if swap else None,
        colours=moved if swap else colours,
        background=head.background.colour,
        ground=head.background.ground,
        style=head.style,
    )
    return sample_scene(seed, wish)


def restyled(head: Scene, member: int, seed: int) -> Scene:
    """The head of a family in another style; the four of a family have four, their differences any."""
    stride = (1, 3, 5, 7)[head.grain % 4]  # odd, as the styles are eight
    style = ALL_STYLES[(ALL_STYLES.index(head.style) + member * stride) % len(ALL_STYLES)]
    return replace(head, style=style, grain=seed % 2**31)


def greyed(image: Images, caption: Caption) -> tuple[Images, Caption]:
    """A picture [64,64,3] and its caption without any colour."""
    luma = (image @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
    named = frozenset(name for name in caption.named if not name.startswith(("colour", "background")))
    text = COLOURED.sub(lambda found: f"{article(found[2])} " if found[1] else "", caption.text)
    return np.repeat(luma[..., None], 3, 2), Caption(text, named)


def parts_of(scenes: list[Scene], patch: int) -> Tensor:
    """[N,P,P] int64: for every patch whose middle lies in an object's box, a tenth of it left out all round, that object's kind;
    NONE for the others."""
    middles = (torch.arange(SIDE // patch) + 0.5) * patch
    found = torch.full((len(scenes), len(middles), len(middles)), NONE)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            across, down = ((middles - (thing.box[a] + thing.box[a + 2]) / 2).abs() < 0.4 * thing.size for a in (0, 1))
            found[row][down[:, None] & across] = ALL_KINDS.index(thing.kind)
    return found


def never_seen(scenes: list[Scene]) -> Tensor:
    """[N,kinds] bool: kinds, none of the scene's own, that are never seen in a colour of its objects."""
    found = torch.zeros(len(scenes), len(ALL_KINDS), dtype=torch.bool)
    for row, scene in enumerate(scenes):
        own, colours = {thing.kind for thing in scene.things}, {thing.colour for thing in scene.things}
        for colour, kind in HELD_OUT_PAIRS:
            found[row, ALL_KINDS.index(kind)] |= colour in colours and kind not in own
    return found


def bare_kinds(scenes: list[Scene], captions: list[Caption]) -> Tensor:
    """[N,kinds] bool: kinds that a caption, of this scene, names without a colour."""
    found = torch.zeros(len(scenes), len(ALL_KINDS), dtype=torch.bool)
    for row, (scene, each) in enumerate(zip(scenes, captions, strict=True)):
        for index, thing in enumerate(scene.things):
            if f"kind{index}" in each.named and f"colour{index}" not in each.named:
                found[row, ALL_KINDS.index(thing.kind)] = True
    return found


# ---------------------------------------------------------------- which captions are true


def true_of(scenes: list[Scene], captions: list[Caption]) -> Tensor:
    """[N,M] bool: whether all that caption j (of scene j, whose own it may leave out) names is so in scene i."""
    facts = torch.tensor([_facts(scene) for scene in scenes])
    things = torch.tensor([_things(scene) for scene in scenes])
    named = [each.named for each in captions]
    told = torch.tensor([_told(facts[i].tolist(), names) for i, names in enumerate(named)])
    said = torch.tensor([_said(things[i].tolist(), names) for i, names in enumerate(named)])
    around = _fits(facts[:, None], told[None])
    in_order = _fits(things[:, None], said[None]).all(-1)
    anyhow = torch.stack([_fits(things[:, None], said[None, :, p]).all(-1) for p in permutations(range(MOST))]).any(0)
    ordered = torch.tensor(["place" in names for names in named])
    return around & torch.where(ordered, in_order, anyhow)


def _fits(is_so: Tensor, said: Tensor) -> Tensor:
    """Equal, or left out, along the last axis."""
    return ((is_so == said) | (said == UNNAMED)).all(-1)


FACTS = ("count", "background", "ground", "style", "place", *STYLE_TRAITS)
ABOUT = ("kind", "colour", *TRAITS)  # what can be named of an object


def _facts(scene: Scene) -> list[int]:
    """In the order of FACTS; the place of several objects is whether they form a row or a column."""
    spans = [max(t.box[axis] for t in scene.things) - min(t.box[axis] for t in scene.things) for axis in (0, 1)]
    place = PLACES.index(scene.things[0].place) if len(scene.things) == 1 else len(PLACES) + (spans[1] > spans[0])
    back = scene.background
    return [
        len(scene.things),
        list(BACKGROUNDS).index(back.colour),
        GROUNDS.index(back.ground),
        ALL_STYLES.index(scene.style),
        place,
        *(scene.style in holders for holders in STYLE_TRAITS.values()),
    ]


def _things(scene: Scene) -> list[list[int]]:
    """What ABOUT lists of each, in order of place (the world lays them so)."""
    found = [
        [
            ALL_KINDS.index(thing.kind),
            list(COLOURS).index(thing.colour),
            *(thing.kind in holders for holders in TRAITS.values()),
        ]
        for thing in scene.things
    ]
    return found + [[ABSENT] * len(ABOUT)] * (MOST - len(found))


def _told(facts: list[int], named: frozenset[str]) -> list[int]:
    return [value if name in named or name == "count" else UNNAMED for name, value in zip(FACTS, facts, strict=True)]


def _said(things: list[list[int]], named: frozenset[str]) -> list[list[int]]:
    return [
        [
            value if value == ABSENT or f"{word}{index}" in named else UNNAMED
            for word, value in zip(ABOUT, thing, strict=True)
        ]
        for index, thing in enumerate(things)
    ]
