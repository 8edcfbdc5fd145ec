"""Fresh layouts of every case of benchmarks/p3_composition.py, and prompts for one part of a case alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod
from random import Random
from typing import Literal, get_args

from concepts.composition.layout import Layout, Region, Style, make_layout
from concepts.composition.masks import Box, box_mask
from miniature.scenery.captions import with_article
from miniature.scenery.render import as_tensor, render
from miniature.scenery.scenes import (
    ANGLES,
    BACKGROUNDS,
    COLOURS,
    GROUNDS,
    HELD_OUT_KINDS,
    HELD_OUT_STYLES,
    KINDS,
    MIRRORED,
    SIDE,
    Background,
    Scene,
    Thing,
    allowed,
    fits,
)

CaseName = Literal["two", "three", "scene", "leak", "alike", "four", "five"]
CASES: tuple[CaseName, ...] = get_args(CaseName)
SIZES = {2: (26, 30), 3: (20, 20)}  # sides of the boxes in pixels, by the number of objects in a row or column
COUNTS = {"three": 3, "four": 4, "five": 5}  # objects; two in the other cases
ASIDE = 5  # pixels by which boxes lie off the middle, at most
WORDS = {
    (2, False): "{0} to the left of {1}",
    (2, True): "{0} above {1}",
    (3, False): "{0}, {1} and {2} in a row",
    (3, True): "{0}, {1} and {2} in a column",
    (4, False): "{0}, {1}, {2} and {3}",
    (5, False): "{0}, {1}, {2}, {3} and {4}",
}


@dataclass(frozen=True)
class LayoutCase:
    """A layout, and what its image should show: kinds and colours (None = any) in boxes, style and background of the `whole`."""

    layout: Layout
    boxes: tuple[Box, ...]
    kinds: tuple[str, ...]
    colours: tuple[str | None, ...]
    whole: dict[str, str]
    column: bool
    parts: tuple[str, ...]
    """What the image needs for success, in the form that `question` takes."""

    @property
    def title(self) -> str:
        """Text that names the objects with their colours, and the style, a line each."""
        objects = [f"{colour or ''} {kind}".strip() for colour, kind in zip(self.colours, self.kinds, strict=True)]
        return "\n".join([*objects, *([f"in {style}"] if (style := self.whole.get("style")) else [])])

    @property
    def pixels(self) -> list[tuple[int, int, int, int]]:
        """Boxes in pixels: left, top, right, bottom."""
        return [(round(a * SIDE), round(b * SIDE), round(c * SIDE), round(d * SIDE)) for a, b, c, d in self.boxes]


# ---------------------------------------------------------------- layouts


def case_of(name: CaseName, seed: int) -> LayoutCase:
    """Draw objects, colours and boxes of a case from a seed."""
    random = Random(seed)
    count, column = COUNTS.get(name, 2), random.random() < 0.5
    column = column and count < 4  # these stand in two rows
    boxes = boxes_of(count, column, random) if count < 4 else rows_of(count, random)
    kinds = random.sample(HELD_OUT_KINDS, min(count, len(HELD_OUT_KINDS)))
    if name == "scene":
        return scene_case(kinds[0], random.choice(HELD_OUT_STYLES), boxes, column, random)
    colours: list[str | None] = [None] * count
    if name == "leak":
        colours = list(random.sample(list(COLOURS), count))
    if name == "alike":
        colours = [random.choice(list(COLOURS))] * count
    tokens = [f"<{kind}>" for kind in kinds]
    if count > len(kinds):  # an ordinary object
        kinds.append(random.choice(KINDS))
        tokens.append(kinds[-1])
    phrases = [phrase(token, colour) for token, colour in zip(tokens, colours, strict=True)]
    bases = [phrase("object", colour) for colour in colours]
    layout = layout_of(bases, phrases, tokens, boxes, column)
    parts = tuple(f"kind {kind}" if kind in HELD_OUT_KINDS else f"ordinary {kind}" for kind in kinds)
    if name == "alike":
        parts = tuple(f"coloured {colours[0]} {kind}" for kind in kinds)
    return LayoutCase(layout, tuple(boxes), tuple(kinds), tuple(colours), {}, column, parts)


def scene_case(kind: str, style: str, boxes: Sequence[Box], column: bool, random: Random) -> LayoutCase:
    """Draw a case "scene" with the learned object `kind`, an ordinary object in a colour, a background colour and the learned `style`."""
    other = random.choice([word for word in KINDS if word != kind])
    pairs = [(c, g) for g in BACKGROUNDS for c in COLOURS if fits(c, g) and allowed(c, other, "trained")]
    colour, ground = random.choice(pairs)
    both = [("an object", f"a <{kind}>", kind, None), (phrase(other, colour),) * 2 + (other, colour)]
    random.shuffle(both)
    bases, phrases, kinds, colours = zip(*both, strict=True)
    layout = layout_of(bases, phrases, kinds, boxes, column, f" on a {ground} background", [Style(f"<{style}>")])
    parts = (f"kind {kind}", f"thing {colour} {other}", f"background {ground}", f"style {style}")
    return LayoutCase(layout, tuple(boxes), kinds, colours, {"style": style, "background": ground}, column, parts)


def layout_of(
    bases: Sequence[str],
    phrases: Sequence[str],
    names: Sequence[str],
    boxes: Sequence[Box],
    column: bool,
    behind: str = "",
    styles: Sequence[Style] = (),
) -> Layout:
    """Return a layout. Its base prompt joins `bases`, its joint prompt joins `phrases`, each region's prompt has one of them.

    `behind` follows the objects in all of them: " on a blue background". The joint prompt names the styles as well.
    """
    words = "a photo of " + WORDS[len(boxes), column] + behind
    regions = [
        Region(name, f"a photo of {mine}{behind}", box_mask(box))
        for name, mine, box in zip(names, phrases, boxes, strict=True)
    ]
    joint = words.format(*phrases) + "".join(f" in the style of {style.token}" for style in styles)
    return make_layout(words.format(*bases), regions, styles, joint)


def phrase(noun: str, colour: str | None) -> str:
    """Return the noun with an article and its colour, if any: "a star", "an orange <key>"."""
    return with_article(f"{colour} {noun}" if colour else noun)


def boxes_of(count: int, column: bool, random: Random) -> list[Box]:
    """Draw square boxes in a row or a column: left, top, right, bottom in 0..1."""
    slot, boxes = SIDE / count, []
    for index in range(count):
        size = 2 * random.randint(SIZES[count][0] // 2, SIZES[count][1] // 2)
        along = int(index * slot) + random.randint(0, int(slot) - size)
        aside = (SIDE - size) // 2 + random.randint(-ASIDE, ASIDE)
        left, top = (aside, along) if column else (along, aside)
        boxes.append((left / SIDE, top / SIDE, (left + size) / SIDE, (top + size) / SIDE))
    return boxes


def rows_of(count: int, random: Random) -> list[Box]:
    """Draw four or five square boxes in two rows: two or three above, two below."""
    boxes: list[Box] = []
    for row, number in enumerate((count - 2, 2)):
        for left, _, right, _ in boxes_of(number, False, random):
            size = round((right - left) * SIDE)
            top = row * SIDE // 2 + random.randint(0, SIDE // 2 - size)
            boxes.append((left, top / SIDE, right, (top + size) / SIDE))
    return boxes


# ---------------------------------------------------------------- scenes


def scene_of(case: LayoutCase, seed: int) -> Scene:
    """Draw a scene that shows what the case requires. Colours that it leaves open differ and stand out from the background."""
    random = Random(seed)
    grounds = (
        [case.whole["background"]] if "background" in case.whole else random.sample(list(BACKGROUNDS), len(BACKGROUNDS))
    )
    background, colours = next(
        (ground, colours) for ground in grounds if (colours := _colours_on(ground, case, random)) is not None
    )
    things = tuple(
        Thing(kind, colour, box, random.choice(ANGLES), kind in MIRRORED and random.random() < 0.5)
        for kind, colour, box in zip(case.kinds, colours, case.pixels, strict=True)
    )
    laid = Background(background, random.choice(GROUNDS))
    return Scene(things, laid, case.whole.get("style", "flat"), random.getrandbits(31))


def _colours_on(background: str, case: LayoutCase, random: Random) -> list[str] | None:
    """Return the objects' colours on this background, or None if too few stand out from it."""
    colours: list[str] = []
    for kind, colour in zip(case.kinds, case.colours, strict=True):
        taken = {*colours, *case.colours}
        free = [c for c in COLOURS if c not in taken and fits(c, background) and allowed(c, kind, "trained")]
        if not free and not colour:
            return None
        colours.append(colour or random.choice(free))
    return colours


def with_reference(case: LayoutCase, seed: int) -> LayoutCase:
    """Return the case with a reference image in its layout, which shows other, ordinary objects in the boxes."""
    random = Random(seed)
    kinds = tuple(random.sample([kind for kind in KINDS if kind not in case.kinds], len(case.boxes)))
    scene = scene_of(replace(case, kinds=kinds, colours=(None,) * len(kinds), whole={}), random.getrandbits(32))
    names = [phrase(thing.kind, thing.colour) for thing in scene.things]
    prompt = f"a photo of {WORDS[len(kinds), case.column].format(*names)} on a {scene.background.colour} background"
    reference = as_tensor(render(scene)[None])[0]
    return replace(case, layout=replace(case.layout, reference=reference, reference_prompt=prompt))


# ---------------------------------------------------------------- parts


def question(part: str, random: Random) -> tuple[str, dict[str, str]]:
    """Draw a prompt for one part alone; return it and the answers that the scene classifier should give.

    Parts: "kind key" and "coloured red key" (learned), "ordinary star" and "thing red star", "background blue", "style relief".
    """
    name, words = part.split(" ", 1)
    token, kind = f"<{words}>", random.choice(KINDS)
    if name == "kind":
        return f"a photo of {phrase(token, None)}", {"kind": words}
    if name == "ordinary":
        return f"a photo of {phrase(words, None)}", {"kind": words}
    if name == "coloured":
        colour, noun = words.split(" ")
        return f"a photo of {phrase(f'<{noun}>', colour)}", {"kind": noun, "colour": colour}
    if name == "thing":
        colour, noun = words.split(" ")
        return f"a photo of {phrase(noun, colour)}", {"kind": noun, "colour": colour}
    if name == "style":
        return f"a photo of {phrase(kind, None)} in the style of {token}", {"style": words}
    return f"a photo of {phrase(kind, None)} on a {words} background", {"background": words}


def possible(cases: Sequence[LayoutCase], rates: dict[str, float]) -> float:
    """Return the success rate to expect if parts succeed independently: the product of a case's rates, averaged over the cases."""
    return sum(prod(rates[part] for part in case.parts) for case in cases) / len(cases)
