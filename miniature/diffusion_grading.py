"""Asks the miniature's diffusion model for pictures and the judge what they hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import StableDiffusionPipeline
from torch import Tensor

from miniature.diffusion_parts import CLIP, PARTS, draw
from miniature.judge_model import SHIPPED, WHOLE, SceneClassifier
from miniature.scenery.captions import an
from miniature.scenery.scenes import ALL_KINDS, BACKGROUNDS, COLOURS, HELD_OUT_PAIRS, KINDS, STYLES, allowed, fits
from runtime.device import Device
from runtime.seeds import derived_seed

Pair = tuple[str, str]  # colour, kind
ANSWERS = {**WHOLE, "present": ALL_KINDS, "paints": tuple(COLOURS)}  # what the judge's `whole` tells, by question


@dataclass(frozen=True)
class Grade:
    """Draws pictures of prompts and has them judged."""

    clip: Path = CLIP
    """The small CLIP as a transformers folder."""
    parts: Path = PARTS
    """The folder that holds vae/ and unet/."""
    judge: Path = SHIPPED
    """The judge file."""
    count: int = 500
    """Prompts with one object of a trained (colour, object) pair."""
    held_out: int = 240
    """.. of a held-out pair."""
    scenes: int = 120
    """.. with colour, background and style told."""
    couples: int = 120
    """Prompts with two objects."""
    guidance: float = 5.0
    steps: int = 25
    """Of DPM-Solver++."""
    batch: int = 8
    seed: int = 1
    device: Device = "auto"
    output: Path = Path("runs/miniature/diffusion/grade")
    """For record.json and sheet.png."""


@dataclass(frozen=True)
class PromptCase:
    """A prompt and what its picture must hold: answers to the judge's questions."""

    group: str
    prompt: str
    wanted: Mapping[str, tuple[str, ...]]  # question: the answers, several only for "present" and "paints"


# ---------------------------------------------------------------- prompts


def cases_of(settings: Grade) -> list[PromptCase]:
    """All prompts, group by group; the same for the same seed. Pairs come in turn, so that none is missed."""
    random = Random(settings.seed)
    trained = [(c, k) for c in COLOURS for k in KINDS if allowed(c, k, "trained")]
    random.shuffle(trained)
    singles = [_single("trained pairs", trained[i % len(trained)]) for i in range(settings.count)]
    held_out = HELD_OUT_PAIRS
    rare = [_single("held-out pairs", held_out[i % len(held_out)]) for i in range(settings.held_out)]
    scenes = [_scene(trained[i % len(trained)], random) for i in range(settings.scenes)]
    return [*singles, *rare, *scenes, *(_couple(trained, random) for _ in range(settings.couples))]


def named(pair: Pair) -> str:
    """ "a red star", "an orange ring"."""
    return an(" ".join(pair))


def _single(group: str, pair: Pair) -> PromptCase:
    return PromptCase(group, f"a photo of {named(pair)}", {"kind": pair[1:], "colour": pair[:1]})


def _scene(pair: Pair, random: Random) -> PromptCase:
    background = random.choice([b for b in BACKGROUNDS if fits(pair[0], b)])
    style = random.choice(STYLES)
    prompt = f"a photo of {named(pair)} on a {background} background in the style of {style}"
    wanted = {"kind": pair[1:], "colour": pair[:1], "background": (background,), "style": (style,)}
    return PromptCase("whole scenes", prompt, wanted)


def _couple(pairs: Sequence[Pair], random: Random) -> PromptCase:
    first = random.choice(pairs)
    second = random.choice([p for p in pairs if p[0] != first[0] and p[1] != first[1]])
    wanted = {"present": (first[1], second[1]), "paints": (first[0], second[0])}
    return PromptCase("two objects", f"a photo of {named(first)} next to {named(second)}", wanted)


# ---------------------------------------------------------------- pictures and answers


def pictures_of(pipe: StableDiffusionPipeline, cases: Sequence[PromptCase], settings: Grade) -> Tensor:
    """[N,3,64,64] uint8; every picture has a seed of its own."""
    seeds = [derived_seed(settings.seed, index) for index in range(len(cases))]
    prompts = [case.prompt for case in cases]
    return draw(pipe, prompts, seeds, settings.steps, settings.guidance, settings.batch)


def rates_of(judge: SceneClassifier, images: Tensor, cases: Sequence[PromptCase]) -> dict[str, dict[str, float]]:
    """{group: {question: share of pictures with the wanted answers, .., "all": with all of them}}."""
    seen = judge.whole(images)
    groups: dict[str, dict[str, list[bool]]] = {}
    for row, case in enumerate(cases):
        right = {question: holds(seen[question][row], question, words) for question, words in case.wanted.items()}
        columns = groups.setdefault(case.group, {})
        for question, yes in (right | {"all": all(right.values())}).items():
            columns.setdefault(question, []).append(yes)
    return {g: {q: round(sum(yes) / len(yes), 4) for q, yes in columns.items()} for g, columns in groups.items()}


def holds(answers: Tensor, question: str, words: Sequence[str]) -> bool:
    """Whether the judge's probabilities [answers] say so: each of several words above one half, a single one above all others."""
    if question in ("present", "paints"):
        return all(float(answers[ANSWERS[question].index(word)]) > 0.5 for word in words)
    return ANSWERS[question][int(answers.argmax())] == words[0]


def table(rates: dict[str, dict[str, float]]) -> str:
    """A line per group and question."""
    titles = {"kind": "object", "present": "both objects", "paints": "both colours"}
    lines = [f"{'share of pictures that are right':<40}{'':>8}"]
    for group, columns in rates.items():
        lines += [
            f"{group + ': ' + titles.get(question, question):<40}{rate:>8.3f}" for question, rate in columns.items()
        ]
    return "\n".join(lines)


def shown(cases: Sequence[PromptCase], each: int = 12) -> torch.Tensor:
    """Indices of the first few cases of every group."""
    groups = list(dict.fromkeys(case.group for case in cases))
    return torch.tensor([i for g in groups for i in [k for k, case in enumerate(cases) if case.group == g][:each]])
