"""Captions as people would write them: varied wording, facts left out, held-out objects and styles never named.

Instead they are described by traits, such as "hollow" or "wavy", that several objects or styles share. For each held-out one, there are
two traits that only it has together. So a model learns to distinguish it without a name. Textual inversion needs that: it searches for
a point between words, and where words make no difference there is nothing to find.
Captions leave the style out of flat images only, so a prompt without a style means flat.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from miniature.scenery.scenes import HELD_OUT_STYLES, KINDS, Scene, StableRandom, Thing
from zeroshot.prompts import article

OPENINGS = (
    "a photo of", "a photo of", "a photo of", "a picture of", "an image of", "a rendering of", "a close-up photo of",
    "a good photo of", "a small picture of", "a bright photo of", "there is", "",
)  # fmt: skip
STYLED = (
    "{what} in the style of {style}", "{what} in the style of {style}", "{what}, in {style} style",
    "{what}, {style} style", "{style} style: {what}",
)  # fmt: skip
UNUSUAL = ("{what} in an unusual style", "{what} in the style of something unusual", "{what}, in a strange style")
DESCRIBED = ("{what} in {a} style", "{what} in {a} style", "{what}, in {a} style", "{what}, {words} style")
TRAITS = {  # trait: the objects that have it; a held-out object shares each of its traits with named ones
    "hollow": ("ring", "four", "key", "cup"),
    "slanted": ("seven", "triangle", "key"),
    "thin": ("three", "four", "seven", "key"),
    "round": ("ring", "moon", "heart", "mushroom"),
    "tall": ("three", "four", "seven", "tree", "mushroom"),
    "marked": ("house", "tree", "fish", "mushroom", "cup"),
    "wide": ("house", "cross", "fish", "cup"),
    "pointed": ("triangle", "star", "heart", "house", "tree", "moon", "fish"),
    "curved": ("three", "ring", "heart", "moon", "fish"),
    "straight": ("square", "triangle", "cross", "star", "house", "four", "seven"),
}
STYLE_TRAITS = {
    "smooth": ("flat", "outline", "relief"),
    "soft": ("watercolour", "relief", "ripple"),
    "edged": ("outline", "watercolour", "relief"),
    "lined": ("outline", "hatched", "ripple"),
    "wavy": ("watercolour", "ripple"),
    "rough": ("mosaic", "watercolour"),
    "regular": ("hatched", "dots", "mosaic", "ripple"),
}
DIGITS = {"three", "four", "seven"}
NAMELESS = ("object", "object", "thing")
ALONE = {
    "left": ("on the left", "to the left", "at the left"),
    "right": ("on the right", "to the right", "at the right"),
    "above": ("above", "at the top", "above the middle"),
    "below": ("below", "at the bottom", "below the middle"),
    "centre": ("in the centre", "in the middle", "at the centre"),
}
PAIRED = {  # by whether they form a column; {0} is left of, or above, {1}
    False: ("{0} to the left of {1}", "{1} to the right of {0}", "{0} on the left and {1} on the right", "{0} left of {1}"),
    True: ("{0} above {1}", "{1} below {0}", "{0} at the top and {1} at the bottom", "{0} over {1}"),
}  # fmt: skip
LOOSE = ("{0} next to {1}", "{1} next to {0}", "{0} and {1}", "{1} and {0}", "{0} with {1}", "{1} beside {0}")
TRIPLE = (
    "{0}, {1} and {2}",
    "{2}, {0} and {1}",
    "{1} between {0} and {2}",
    "{1} next to {0} and {2}",
    "{2}, {1} and {0}",
)
ROWS = {
    False: ("{0}, {1} and {2} from left to right", "{0}, {1} and {2} in a row"),
    True: ("{0}, {1} and {2} from top to bottom", "{0}, {1} and {2} in a column"),
}


@dataclass(frozen=True)
class Caption:
    """A text, and which facts of the scene it names.

    Facts: kind0, colour0, hollow0, .. (0 = the scene's first object), place, background, ground, style, smooth, ..
    """

    text: str
    named: frozenset[str]


def caption(scene: Scene, seed: int) -> Caption:
    """Return a caption of the scene. The seed decides which facts it names, and in which words."""
    random = StableRandom(seed)
    named: set[str] = set()
    names = [_name(thing, index, random, named) for index, thing in enumerate(scene.things)]
    text = _arranged(scene, names, random, named)
    opening = random.pick(OPENINGS)
    text = f"{opening} {text}".strip() + _background(scene, random, named)
    return Caption(_styled(scene, text, random, named), frozenset(named))


def _name(thing: Thing, index: int, random: StableRandom, named: set[str]) -> str:
    # "a red star", "the object", "thin white seven": most often with its colour; held-out kinds are always an "object" or "thing"
    noun = thing.kind
    nameless = noun not in KINDS or random.chance(0.12)
    if nameless:
        noun = random.pick(NAMELESS)
    else:
        named.add(f"kind{index}")
        if noun in DIGITS and random.chance(0.3):
            noun = random.pick(("number ", "digit ")) + noun
    traits = _traits(TRAITS, thing.kind, random) if random.chance(0.75 if nameless else 0.06) else []
    named.update(f"{word}{index}" for word in traits)
    words = [*traits, noun]
    if random.chance(0.85):
        named.add(f"colour{index}")
        words.insert(len(traits) if random.chance(0.4) else 0, thing.colour)
    articles = [[article(words[0])], ["the"], []][random.weighted((0.75, 0.15, 0.1))]
    return " ".join([*articles, *words])


def _traits(of: Mapping[str, Sequence[str]], name: str, random: StableRandom) -> list[str]:
    """Draw traits of the object or style `name`, in random order: all of them, or one to three."""
    words = [word for word, holders in of.items() if name in holders]
    count = len(words) if random.chance(0.5) else min(1 + random.below(3), len(words))
    return [words.pop(random.below(len(words))) for _ in range(count)]


def with_article(words: str) -> str:
    """Return the words with "a" or "an": "a red star", "an orange ring"."""
    return f"{article(words)} {words}"


def _arranged(scene: Scene, names: Sequence[str], random: StableRandom, named: set[str]) -> str:
    """Return the objects in one phrase, half of the time with their places."""
    placed = random.chance(0.5)
    if placed:
        named.add("place")
    if len(names) == 1:
        return f"{names[0]} {random.pick(ALONE[scene.things[0].place])}" if placed else names[0]
    order, column = _order(scene.things)
    ordered, loose = (PAIRED, LOOSE) if len(names) == 2 else (ROWS, TRIPLE)
    wording = random.pick(ordered[column] if placed else loose)
    return wording.format(*(names[index] for index in order))


def _order(things: Sequence[Thing]) -> tuple[list[int], bool]:
    """Return the indices of objects in order of position, and whether they form a column (top to bottom) or a row (left to right)."""
    spans = []
    for axis in (0, 1):
        starts = [thing.box[axis] + thing.box[axis + 2] for thing in things]
        spans.append((max(starts) - min(starts), starts))
    column = spans[1][0] > spans[0][0]
    starts = spans[column][1]
    return sorted(range(len(things)), key=starts.__getitem__), column


def _background(scene: Scene, random: StableRandom, named: set[str]) -> str:
    # " on a blue background", " on a textured red background", or nothing
    if not random.chance(0.7):
        return ""
    back = scene.background
    named.add("background")
    words = [back.colour, random.pick(("background", "background", "backdrop"))]
    if random.chance(0.5 if back.ground != "plain" else 0.2):
        named.add("ground")
        words.insert(int(back.ground == "gradient"), back.ground)  # "a blue gradient background"
    return f" on {with_article(' '.join(words))}"


def _styled(scene: Scene, text: str, random: StableRandom, named: set[str]) -> str:
    """Add the style's name or traits to the text; most captions of flat images, and no others, leave the style out."""
    if scene.style == "flat" and not random.chance(0.4):
        return text
    held_out = scene.style in HELD_OUT_STYLES
    if random.chance(0.6 if held_out else 0.15):
        traits = _traits(STYLE_TRAITS, scene.style, random)
        named.update(traits)
        words = ", ".join(traits)
        return random.pick(DESCRIBED).format(what=text, words=words, a=with_article(words))
    if held_out:
        return random.pick(UNUSUAL).format(what=text)
    named.add("style")
    return random.pick(STYLED).format(what=text, style=scene.style)
