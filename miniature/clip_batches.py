"""Training batches of the small CLIP: families of similar images, and which captions of a batch are true of which images.

Random images differ in colours and style, so a batch of them hardly teaches shapes. A batch is therefore made of families of four images.
The images of a family share object colours, background and style, and differ in objects and positions. In some families, two images
have the same objects with exchanged colours. Other families differ in nothing but the style.

Captions leave facts out: of 64 images, 98 % have a true caption in the batch besides their own. Such captions are not used as negatives.

Every object that captions name has one colour that it never has in training. A model can learn that the colour rules the object out,
and then fails on just these held-out pairs. So half of the families are grey in image and caption, and no loss has an answer that
follows from the colour alone.
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
from miniature.scenery.render import Images, as_tensor, render
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

FAMILY = 4  # images in a family
NONE = len(ALL_KINDS)  # label of a patch without an object
GREY = 0.5  # share of families that are grey, in image and caption: see above
RESTYLED = 0.4  # share of families that differ in style alone
STOP = 0.25  # share of captions that get a full stop, which prompts often have and the world's captions never
UNNAMED, ABSENT = -1, -2  # values of a fact that a caption leaves out, and of an object that a scene lacks
COLOURED = re.compile(rf"\b(an? )?(?:{'|'.join(dict.fromkeys([*COLOURS, *BACKGROUNDS]))}) (?=(\w+))")
MOST = 3  # most objects in an image


class ClipBatch(NamedTuple):
    """N images with their captions and labels. Field `parts` labels each of an image's P x P patches."""

    images: Tensor  # [N,3,64,64] uint8
    texts: list[str]
    is_true: Tensor  # [N,N] bool: caption j is true of image i, or colour alone shows that it is false
    parts: Tensor  # [N,P,P] int64: the kind of the object at each patch, see `parts_of`
    never: Tensor  # [N,kinds] bool: kinds that the patch loss leaves out, see `never_seen`
    styles: Tensor  # [N] int64, indices in ALL_STYLES


@dataclass(frozen=True)
class ClipBatches:
    """A map-style dataset for torch's DataLoader: item k is the whole batch of step k."""

    seed: int
    count: int  # images in a batch
    patch: int  # pixels, height and width

    def __getitem__(self, step: int) -> ClipBatch:
        keys = [(step, index // FAMILY, index % FAMILY) for index in range(self.count)]
        scenes: list[Scene] = []
        for key in keys:
            seed, member = derived_seed(self.seed, *key), key[-1]
            similar = restyled if self._happens(RESTYLED, step, key[1], 0, 4) else relative
            scenes.append(similar(scenes[-member], member, seed) if member else sample_scene(seed))
        captions = [caption(scene, derived_seed(self.seed, *key, 1)) for key, scene in zip(keys, scenes, strict=True)]
        images = np.stack([render(scene) for scene in scenes])
        for row, (_, family, _) in enumerate(keys):
            if self._happens(GREY, step, family, 0, 3):
                images[row], captions[row] = greyed(images[row], captions[row])
        stops = [self._happens(STOP, *key, 2) for key in keys]
        texts = [each.text + "." * stop for each, stop in zip(captions, stops, strict=True)]
        never = never_seen(scenes)
        is_true = true_of(scenes, captions) | (never.float() @ bare_kinds(scenes, captions).float().T > 0)
        styles = torch.tensor([ALL_STYLES.index(scene.style) for scene in scenes])
        return ClipBatch(as_tensor(images), texts, is_true, parts_of(scenes, self.patch), never, styles)

    def _happens(self, share: float, *key: int) -> bool:
        """Return True for about this share of all keys, always for the same ones."""
        return derived_seed(self.seed, *key) % 1000 < 1000 * share


def relative(head: Scene, member: int, seed: int) -> Scene:
    """Draw a scene with the object colours, background and style of `head`, the first scene of its family.

    A family is a group of scenes that are hard to tell apart. If `head` has several objects, member 1 has the same kinds with exchanged
    colours, unless a (colour, kind) pair is then one held out from training.
    """
    kinds = tuple(thing.kind for thing in head.things)
    colours = tuple(thing.colour for thing in head.things)
    moved = colours[1:] + colours[:1]
    swap = member == 1 and len(kinds) > 1
    swap = swap and all(allowed(c, k, "trained") for c, k in zip(moved, kinds, strict=True))
    spec = SceneSpec(
        kinds=kinds if swap else None,
        colours=moved if swap else colours,
        background=head.background.colour,
        ground=head.background.ground,
        style=head.style,
    )
    return sample_scene(seed, spec)


def restyled(head: Scene, member: int, seed: int) -> Scene:
    """Return `head`, the first scene of a family, in another style, with noise from `seed`. The four members have four styles."""
    stride = (1, 3, 5, 7)[head.noise_seed % 4]  # odd, so that four steps give four of the eight styles
    style = ALL_STYLES[(ALL_STYLES.index(head.style) + member * stride) % len(ALL_STYLES)]
    return replace(head, style=style, noise_seed=seed % 2**31)


def greyed(image: Images, caption: Caption) -> tuple[Images, Caption]:
    """Return an image [64,64,3] in grey levels, and its caption without the colours of objects and background."""
    luma = (image @ np.array([0.299, 0.587, 0.114])).round().astype(np.uint8)
    named = frozenset(name for name in caption.named if not name.startswith(("colour", "background")))
    text = COLOURED.sub(lambda match: f"{article(match[2])} " if match[1] else "", caption.text)
    return np.repeat(luma[..., None], 3, 2), Caption(text, named)


def parts_of(scenes: list[Scene], patch: int) -> Tensor:
    """Return [N,P,P] int64: for each patch of `patch` x `patch` pixels, the index of its object in ALL_KINDS, or NONE.

    A patch belongs to an object if its centre lies in the middle 80 % of the object's box, along both axes.
    """
    centres = (torch.arange(SIDE // patch) + 0.5) * patch
    kinds = torch.full((len(scenes), len(centres), len(centres)), NONE)
    for row, scene in enumerate(scenes):
        for thing in scene.things:
            across, down = ((centres - (thing.box[a] + thing.box[a + 2]) / 2).abs() < 0.4 * thing.size for a in (0, 1))
            kinds[row][down[:, None] & across] = ALL_KINDS.index(thing.kind)
    return kinds


def never_seen(scenes: list[Scene]) -> Tensor:
    """Return [N,kinds] bool: the kinds, except a scene's own, that training never shows in a colour of the scene's objects."""
    rows = []
    for scene in scenes:
        own = {thing.kind for thing in scene.things}
        never = {kind for thing in scene.things for colour, kind in HELD_OUT_PAIRS if colour == thing.colour}
        rows.append([kind in never - own for kind in ALL_KINDS])
    return torch.tensor(rows)


def bare_kinds(scenes: list[Scene], captions: list[Caption]) -> Tensor:
    """Return [N,kinds] bool: the kinds that caption i, of scene i, names without their colour."""
    rows = []
    for scene, each in zip(scenes, captions, strict=True):
        names = [(f"kind{i}", f"colour{i}", thing.kind) for i, thing in enumerate(scene.things)]
        bare = {kind for name, colour, kind in names if name in each.named and colour not in each.named}
        rows.append([kind in bare for kind in ALL_KINDS])
    return torch.tensor(rows)


# ---------------------------------------------------------------- which captions are true

FACTS = ("count", "background", "ground", "style", "place", *STYLE_TRAITS)  # what a caption can name of a scene
ABOUT = ("kind", "colour", *TRAITS)  # what a caption can name of an object


def true_of(scenes: list[Scene], captions: list[Caption]) -> Tensor:
    """Return [N,N] bool: whether caption j, of scene j, is true of scene i.

    The scenes must agree in the number of objects, and in all facts that the caption names.
    """
    facts, things = [_facts(scene) for scene in scenes], [_things(scene) for scene in scenes]
    named = [each.named for each in captions]
    named_facts = torch.tensor([_named_facts(facts[j], names) for j, names in enumerate(named)])
    named_things = torch.tensor([_named_things(things[j], names) for j, names in enumerate(named)])
    scene_facts, scene_things = torch.tensor(facts)[:, None], torch.tensor(things)[:, None]
    around = _agree(scene_facts, named_facts[None])
    in_order = _agree(scene_things, named_things[None]).all(-1)
    orders = [_agree(scene_things, named_things[None, :, order]).all(-1) for order in permutations(range(MOST))]
    ordered = torch.tensor(["place" in names for names in named])
    return around & torch.where(ordered, in_order, torch.stack(orders).any(0))


def _agree(value: Tensor, named: Tensor) -> Tensor:
    """Return whether all values along the last axis equal the named ones; UNNAMED equals any."""
    return ((value == named) | (named == UNNAMED)).all(-1)


def _facts(scene: Scene) -> list[int]:
    """Return the scene's values of FACTS; the place of several objects is whether they form a row or a column."""
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
    """Return three lists of the values of ABOUT: one per object, in order of position; those of absent objects hold ABSENT."""
    values = [
        [
            ALL_KINDS.index(thing.kind),
            list(COLOURS).index(thing.colour),
            *(thing.kind in holders for holders in TRAITS.values()),
        ]
        for thing in scene.things
    ]
    return values + [[ABSENT] * len(ABOUT)] * (MOST - len(values))


def _named_facts(facts: list[int], named: frozenset[str]) -> list[int]:
    return [value if name in named or name == "count" else UNNAMED for name, value in zip(FACTS, facts, strict=True)]


def _named_things(things: list[list[int]], named: frozenset[str]) -> list[list[int]]:
    return [
        [
            value if value == ABSENT or f"{word}{index}" in named else UNNAMED
            for word, value in zip(ABOUT, thing, strict=True)
        ]
        for index, thing in enumerate(things)
    ]
