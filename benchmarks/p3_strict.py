"""The strict measure of images of several objects, and its calibration.

  python benchmarks/p3_strict.py styles --count 40         renders of each style, other styles, half a style, turned, enlarged
  python benchmarks/p3_strict.py composition --count 60    right, malformed, collapsed and leaking renders of the composition's cases
  python benchmarks/p3_strict.py named --count 48          images drawn in each style that captions name, and renders of all styles
  python benchmarks/p3_strict.py images DIR --kind fish --colour green --background white       images of one prompt, by shape and colours

An image is right, strictly, if the scene classifier reads every object in its box, and every silhouette there reaches its bar. The bar is
0.9 of the mean fidelity (p3_shape.py) of renders of that kind, size and style that passed through the autoencoder. The style must pass as
well (miniature/style_fidelity.py).
Collapse: a box holds another of the case's objects. Leak: an object's kind lies outside its box, or its colour if all are named and differ.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import repository_root  # noqa: F401  # isort: split
import torch
import torch.nn.functional as F
import tyro
from torch import Tensor

from benchmarks.p3_composition_cases import CASES, CaseName, LayoutCase, case_of, scene_of
from benchmarks.p3_learning import MODEL, SamplerFlags, check_model, sample
from benchmarks.p3_shape import SHOWN, STYLE, Through, open_autoencoder, passing_fidelity, renders
from benchmarks.timing import BENCH
from concepts.sampling import Request, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from miniature.diffusion_parts import PARTS
from miniature.judge_model import SceneClassifier, erase, load_scene_classifier
from miniature.scenery.captions import with_article
from miniature.scenery.malformed import MALFORMED, drawn_as
from miniature.scenery.render import render_scenes
from miniature.scenery.scenes import (
    ALL_KINDS,
    ALL_STYLES,
    BACKGROUNDS,
    COLOURS,
    GROUNDS,
    KINDS,
    SIDE,
    STYLES,
    Scene,
    Thing,
)
from miniature.silhouettes import PASSING, shape_fidelity
from miniature.style_fidelity import StyleMeasure, blend, sample_scenes
from runtime.cli import BadInput, check_positive, log, run_script
from runtime.device import Device, detect, set_up
from runtime.files import list_files
from runtime.images import SUFFIXES, labelled_grid, open_image
from runtime.record import Record
from runtime.seeds import derived_seed

MARGIN = 5  # pixels of the ground around a box in which a silhouette is sought
BUCKET = 8  # pixels; sizes that share a bar
RENDERS = 400  # images of a case's scenes from which its bars come, at least
STYLE_RENDERS = 150  # per style and ground, which is the background's pattern
BARS, STYLE_IMAGES, CASE, GRADED = range(4)  # domains of seeds
Key = tuple[str, int, str]  # kind, bucket of sizes, style


@dataclass(frozen=True)
class Verdict:
    """Whether one image is right by the scene classifier alone, is right strictly, collapses, leaks."""

    classifier: bool
    strict: bool
    collapse: bool
    leak: bool


class StrictMeasure:
    """Grades images of the given layouts. The thresholds come from rendered images with the same layouts."""

    def __init__(
        self,
        classifier: SceneClassifier,
        through: Through,
        cases: Sequence[LayoutCase],
        renders: int = RENDERS,
        style_renders: int = STYLE_RENDERS,
    ):
        """Set the bars from `renders` scenes or more, and `style_renders` per style and ground, that pass `through` the autoencoder."""
        self.classifier, self.through, self.cases = classifier, through, cases
        styled = any("style" in case.whole for case in cases)
        self.styles = StyleMeasure(through, style_renders, objects=len(cases[0].kinds)) if styled else None
        repeated = list(cases) * math.ceil(renders / len(cases))
        images = through(render_scenes([scene_of(case, derived_seed(BARS, k)) for k, case in enumerate(repeated)]))
        values: dict[Key, list[float]] = defaultdict(list)
        for case, image in zip(repeated, images, strict=True):
            for key, value in zip(keys_of(case), box_fidelity(image, case), strict=True):
                values[key].append(value)
        self.bars = {key: PASSING * sum(each) / len(each) for key, each in values.items()}

    def ceiling(self) -> dict[str, float]:
        """Grade new renders of the cases, encoded and decoded by the autoencoder. Return the share of images for each verdict."""
        images = self.through(
            render_scenes([scene_of(case, derived_seed(GRADED, k)) for k, case in enumerate(self.cases)])
        )
        return shares_of([self.verdict(case, image) for case, image in zip(self.cases, images.split(1), strict=True)])

    def verdict(self, case: LayoutCase, image: Tensor) -> Verdict:
        """Return the verdict on an image [1,3,64,64] uint8."""
        image = image.cpu()
        right = is_right(self.classifier, case, image)
        strict = right and (self.styles is None or bool(self.styles.passes(image, [case.whole["style"]])))
        if strict:
            fidelities = box_fidelity(image[0], case)
            strict = all(value >= self.bars[key] for key, value in zip(keys_of(case), fidelities, strict=True))
        if None in case.colours or len(set(case.colours)) < len(case.colours):
            case = replace(case, colours=(None,) * len(case.kinds))
        return Verdict(right, strict, collapses(self.classifier, case, image), leaks(self.classifier, case, image))


class PartMeasure:
    """Grades images of one object or one style. The thresholds come from rendered images of single objects in the same style."""

    def __init__(self, classifier: SceneClassifier, through: Through, renders: int = 60):
        self.classifier, self.through, self.renders = classifier, through, renders
        self.bars: dict[tuple[str, str], float] = {}  # by kind and style
        self.styles: StyleMeasure | None = None

    def verdicts(self, images: Tensor, answers: Sequence[dict[str, str]]) -> dict[str, Tensor]:
        """Return {"strict", "scene classifier": right or not, [N] bool} for images [N,3,64,64] uint8 and the answers expected of each.

        Where no style is expected, shapes are compared with those of flat renders.
        """
        images, columns = images.cpu(), {name: [own[name] for own in answers] for name in answers[0]}
        right = self.classifier.agrees(images, **columns).cpu()
        strict = right
        if "kind" in columns:
            styles = columns.get("style", [STYLE] * len(images))
            bars = torch.tensor([self._bar(*each) for each in zip(columns["kind"], styles, strict=True)])
            strict = strict & (shape_fidelity(images, columns["kind"]) >= bars)
        if "style" in columns:
            self.styles = self.styles or StyleMeasure(self.through)
            strict = strict & self.styles.passes(images, columns["style"])
        return {"strict": strict, "scene classifier": right}

    def _bar(self, kind: str, style: str) -> float:
        if (kind, style) not in self.bars:
            images = self.through(renders(kind, self.renders, derived_seed(BARS), style))
            self.bars[kind, style] = passing_fidelity(images, kind)
        return self.bars[kind, style]


def keys_of(case: LayoutCase) -> list[Key]:
    """Return what each object's bar depends on: kind, size in units of BUCKET pixels, style."""
    style = case.whole.get("style", "flat")
    return [(kind, (box[2] - box[0]) // BUCKET, style) for kind, box in zip(case.kinds, case.pixels, strict=True)]


def box_fidelity(image: Tensor, case: LayoutCase) -> list[float]:
    """Return each object's shape fidelity, 0..1 (`miniature.silhouettes`), in an image [3,64,64] uint8.

    It is measured in the object's enlarged box, with the other boxes erased.
    """
    values = []
    for index, (left, top, right, bottom) in enumerate(case.pixels):
        x = image[None].float()
        for other in case.pixels[:index] + case.pixels[index + 1 :]:
            x = erase(x, torch.tensor([other]))
        rows, columns = slice(max(0, top - MARGIN), bottom + MARGIN), slice(max(0, left - MARGIN), right + MARGIN)
        values.append(float(shape_fidelity(x[:, :, rows, columns].round().to(torch.uint8), [case.kinds[index]])[0]))
    return values


def is_right(classifier: SceneClassifier, case: LayoutCase, image: Tensor) -> bool:
    """Return whether the classifier reads everything in an image [1,3,64,64] uint8 as the case requires."""
    inside = all(bool(classifier.inside(image, *box_question)) for box_question in box_questions(case))
    return inside and (not case.whole or bool(classifier.agrees(image, **{k: [v] for k, v in case.whole.items()})))


def collapses(classifier: SceneClassifier, case: LayoutCase, image: Tensor) -> bool:
    """Return whether a box of an image [1,3,64,64] uint8 holds another of the case's kinds."""
    answers = classifier.boxed(image.expand(len(case.boxes), -1, -1, -1), torch.tensor(case.pixels))["kind"].argmax(1)
    kinds = [(*ALL_KINDS, "none")[index] for index in answers.tolist()]
    return any(kind != own and kind in case.kinds for kind, own in zip(kinds, case.kinds, strict=True))


def leaks(classifier: SceneClassifier, case: LayoutCase, image: Tensor) -> bool:
    """Return whether any object's kind or colour appears outside its box in an image [1,3,64,64] uint8."""
    return any(bool(classifier.leaked(image, *box_question)) for box_question in box_questions(case))


def box_questions(case: LayoutCase) -> Iterator[tuple[Tensor, list[str], list[str] | None]]:
    """Yield each object's box [1,4] in pixels, [kind] and [colour] (None = any), as the scene classifier takes them."""
    for box, kind, colour in zip(case.boxes, case.kinds, case.colours, strict=True):
        yield torch.tensor([box]) * SIDE, [kind], [colour] if colour else None


def shares_of(verdicts: Sequence[Verdict]) -> dict[str, float]:
    """Return {verdict: share of images in 0..1}, and the share that collapse or leak."""
    columns = {
        "scene classifier": [each.classifier for each in verdicts],
        "strict": [each.strict for each in verdicts],
        "collapse": [each.collapse for each in verdicts],
        "leak": [each.leak for each in verdicts],
        "collapse or leak": [each.collapse or each.leak for each in verdicts],
    }
    return {name: sum(values) / len(values) for name, values in columns.items()}


# ---------------------------------------------------------------- calibration


@dataclass(frozen=True)
class Styles:
    """Measure renders of each style through the autoencoder: right ones, other styles, half a style, turned and enlarged ones."""

    parts: Path = PARTS
    """Folder that holds vae/."""
    count: int = 40
    """Images per style and ground, the background's pattern."""
    objects: int = 1
    """Objects in an image."""
    seed: int = 1
    device: Device = "auto"
    record: Path = BENCH / "p3_strict_styles.json"


@tyro.conf.configure(tyro.conf.subcommand(name="named"))
@dataclass(frozen=True)
class NamedStyles(SamplerFlags):
    """Draw in the styles that the training captions name, and measure strict success: style and object. Renders show what can pass."""

    model: str = MODEL
    parts: Path = PARTS
    """Folder that holds vae/, the autoencoder: its copies of renders set the bars."""
    count: int = 48
    """Images per style."""
    seed: int = 0
    device: Device = "auto"
    sheet: Path = BENCH / "p3_strict_named.png"
    """PNG file with the first images drawn in each style."""
    record: Path = BENCH / "p3_strict_named.json"


@dataclass(frozen=True)
class Composition:
    """Measure right, malformed, collapsed and leaking renders of the composition's cases, through the autoencoder."""

    parts: Path = PARTS
    """Folder that holds vae/."""
    cases: tuple[CaseName, ...] = CASES
    count: int = 60
    """Layouts per case."""
    seed: int = 1
    device: Device = "auto"
    record: Path = BENCH / "p3_strict_composition.json"


@dataclass(frozen=True)
class Images:
    """Count right images of single objects, by the strict measure and by the scene classifier alone."""

    folders: tyro.conf.Positional[tuple[Path, ...]]
    """Folders of 64x64 images; all images of a folder have one prompt."""
    kind: tuple[str, ...]
    """Object of each folder's prompt."""
    colour: tuple[str, ...]
    """Colour of each folder's object."""
    background: tuple[str, ...]
    """Colour of each folder's background."""
    parts: Path = PARTS
    """Folder that holds vae/, the autoencoder: its copies of renders set the bar for shapes."""
    device: Device = "auto"
    record: Path = BENCH / "p3_strict_images.json"


def grade_images(settings: Images, record: Record) -> None:
    """Add an entry per folder to the record: the verdicts on its images in the order of their names."""
    columns = {"kind": settings.kind, "colour": settings.colour, "background": settings.background}
    words = {"kind": ALL_KINDS, "colour": COLOURS, "background": BACKGROUNDS}
    for name, values in columns.items():
        if len(values) != len(settings.folders):
            raise BadInput(f"--{name} {' '.join(values)}: give one for each of the {len(settings.folders)} folders")
        if unknown := [value for value in values if value not in words[name]]:
            raise BadInput(f"--{name} {unknown[0]}: the miniature has {', '.join(words[name])}")
    files = {folder: list_files(folder, SUFFIXES) for folder in settings.folders}
    if empty := [folder for folder, paths in files.items() if not paths]:
        raise BadInput(f"{empty[0]} holds no images")
    images = [torch.stack([open_image(path) for path in paths]) for paths in files.values()]
    if wrong := [folder for folder, own in zip(files, images, strict=True) if own.shape[2:] != (SIDE, SIDE)]:
        raise BadInput(f"{wrong[0]}: the images are not {SIDE}x{SIDE}, as the miniature's are")

    device = record.machine.device
    measure = PartMeasure(load_scene_classifier(device), open_autoencoder(settings.parts, device))
    entries = record.metrics["folders"] = []
    for own, *answer in zip(images, *columns.values(), strict=True):
        answers = dict(zip(columns, answer, strict=True))
        verdicts = {name: each.tolist() for name, each in measure.verdicts(own, [answers] * len(own)).items()}
        entries.append(answers | verdicts)
        counts = ", ".join(f"{name} {sum(values)} of {len(values)}" for name, values in verdicts.items())
        print(f"{' '.join(answer)}: {counts}", flush=True)


def calibrate_styles(settings: Styles, record: Record) -> None:
    """Add {group: {style: share of images that pass for this style}} to the record, and print it."""
    through = open_autoencoder(settings.parts, record.machine.device)
    measure = StyleMeasure(through, objects=settings.objects)
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for index, style in enumerate(ALL_STYLES):
        scenes: list[Scene] = []
        for place, ground in enumerate(GROUNDS):
            seed = derived_seed(settings.seed, STYLE_IMAGES, index, place)
            scenes += sample_scenes(style, ground, settings.count, seed, settings.objects)
        clean, flat = render_scenes(scenes), render_scenes([replace(scene, style="flat") for scene in scenes])
        centre = F.interpolate(clean[:, :, 10:54, 10:54].float(), size=SIDE, mode="bicubic", antialias=True)
        for name, images in {
            "its renders": clean,
            "half as strong": blend(flat, clean, 0.5),
            "turned by 90 degrees": clean.rot90(1, (2, 3)).contiguous(),
            "enlarged by 1.45": centre.clamp(0, 255).round().to(torch.uint8),
        }.items():
            groups[name][style] = measure.verdicts(through(images)).float().mean(0)
    own = {name: {s: float(v[ALL_STYLES.index(s)]) for s, v in shares.items()} for name, shares in groups.items()}
    table = torch.stack(list(groups["its renders"].values()))
    own["other styles"] = {
        s: float((table[:, k].sum() - table[k, k]) / (len(table) - 1)) for k, s in enumerate(ALL_STYLES)
    }
    print(" " * 22 + "".join(f"{style:>13s}" for style in ALL_STYLES))
    for name, shares in own.items():
        print(f"{name:22s}" + "".join(f"{share:13.3f}" for share in shares.values()))
    record.metrics["passing"] = own


def draw_named_styles(settings: NamedStyles, record: Record) -> None:
    """Add {"rendered", "drawn": {style: {measure: share of images}}} to the record, print it, and write the sheet."""
    check_positive(settings, "sampling_steps")
    check_model(settings.model)
    device = record.machine.device
    set_up("fp32", record.machine)
    measure = PartMeasure(load_scene_classifier(device), open_autoencoder(settings.parts, device))
    sampler = StableDiffusionSampler(load_pipeline(settings.model, device, torch.float32), settings.sampler_config())
    shown: list[Tensor] = []
    results: dict[str, dict[str, dict[str, float]]] = {"rendered": {}, "drawn": {}}
    for index, style in enumerate(ALL_STYLES):
        seeds = [derived_seed(settings.seed, STYLE_IMAGES, index, k) for k in range(settings.count)]
        kinds = [Random(seed).choice(KINDS) for seed in seeds]
        rendered = torch.cat([renders(kind, 1, seed, style) for kind, seed in zip(kinds, seeds, strict=True)])
        groups = {"rendered": measure.through(rendered)}
        if style in STYLES:
            prompts = [f"a photo of {with_article(kind)} in the style of {style}" for kind in kinds]
            requests = [Request(prompt, seed) for prompt, seed in zip(prompts, seeds, strict=True)]
            groups["drawn"] = sample(sampler.sample_images, requests, style)
            shown.append(groups["drawn"][:SHOWN])
        for group, images in groups.items():
            verdicts = measure.verdicts(images, [{"kind": kind, "style": style} for kind in kinds])
            results[group][style] = {name: float(values.float().mean()) for name, values in verdicts.items()}
            shares = "   ".join(f"{name} {share:.2f}" for name, share in results[group][style].items())
            print(f"{style:14s}{group:10s}{shares}", flush=True)
    record.metrics["passing"] = results
    labelled_grid(settings.sheet, torch.cat(shown), list(STYLES), [""] * len(shown[0]), "Styles drawn by name", 1.0)


def calibrate_composition(settings: Composition, record: Record) -> None:
    """Add a row per case and group of renders to the record: the shares of verdicts."""
    through, classifier = (
        open_autoencoder(settings.parts, record.machine.device),
        load_scene_classifier(record.machine.device),
    )
    rows: list[dict[str, Any]] = []
    for name in settings.cases:
        cases = [case_of(name, derived_seed(settings.seed, CASE, index)) for index in range(settings.count)]
        measure = StrictMeasure(classifier, through, cases)
        for group, render in GROUPS.items():
            pairs = [
                (case, image)
                for index, case in enumerate(cases)
                if (image := render(case, derived_seed(settings.seed, GRADED, index))) is not None
            ]
            if not pairs:
                continue
            images = through(torch.cat([image for _, image in pairs])).split(1)
            verdicts = [measure.verdict(case, image) for (case, _), image in zip(pairs, images, strict=True)]
            rows.append({"case": name, "images": group, "count": len(pairs)} | shares_of(verdicts))
            shares = "".join(f"{key} {value:.3f}   " for key, value in shares_of(verdicts).items())
            print(f"{name:7s}{group:22s}{len(pairs):4d}   {shares}", flush=True)
    record.metrics["rows"] = rows


def rendered(case: LayoutCase, seed: int) -> Tensor:
    """Render an image [1,3,64,64] uint8 as the case requires."""
    return render_scenes([scene_of(case, seed)])


def malformed(case: LayoutCase, seed: int) -> Tensor:
    """Render the case with one held-out object malformed."""
    random = Random(seed)
    kind = random.choice([kind for kind in case.kinds if kind in MALFORMED])
    with drawn_as(kind, random.choice(MALFORMED[kind])):
        return rendered(case, seed)


def collapsed(case: LayoutCase, seed: int) -> Tensor:
    """Render the case with its second object also in the place of its first."""
    return rendered(replace(case, kinds=(case.kinds[1], *case.kinds[1:])), seed)


def leaking(case: LayoutCase, seed: int) -> Tensor | None:
    """Render the case with its first object once more, small, outside the boxes. Return None if no free place is large enough."""
    scene, side = scene_of(case, seed), 18
    free = [
        (left, top, left + side, top + side)
        for left in range(0, SIDE - side + 1, 2)
        for top in range(0, SIDE - side + 1, 2)
        if all(left + side < a or c < left or top + side < b or d < top for a, b, c, d in case.pixels)
    ]
    if not free:
        return None
    extra = Thing(case.kinds[0], scene.things[0].colour, Random(seed).choice(free))
    return render_scenes([replace(scene, things=(*scene.things, extra))])


def half_styled(case: LayoutCase, seed: int) -> Tensor | None:
    """Render the case with its style at half strength. Return None if it has no style."""
    scene = scene_of(case, seed)
    if scene.style == "flat":
        return None
    return blend(render_scenes([replace(scene, style="flat")]), render_scenes([scene]), 0.5)


GROUPS: dict[str, Callable[[LayoutCase, int], Tensor | None]] = {
    "rendered": rendered,
    "one malformed": malformed,
    "one twice": collapsed,
    "one more": leaking,
    "half the style": half_styled,
}


def main(command: Styles | NamedStyles | Composition | Images) -> None:
    """Run the chosen calibration or measurement, and write the record."""
    record = Record(command, detect(command.device))
    if isinstance(command, Images):
        grade_images(command, record)
    else:
        check_positive(command, "count")
        if isinstance(command, Styles):
            calibrate_styles(command, record)
        elif isinstance(command, NamedStyles):
            draw_named_styles(command, record)
        else:
            calibrate_composition(command, record)
    record.save(command.record)
    log(f"record: {command.record}")


if __name__ == "__main__":
    command: Any = Styles | NamedStyles | Composition | Images  # tyro makes a subcommand of each
    run_script(main, command, __doc__)
