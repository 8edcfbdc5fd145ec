"""Zero-shot classification of labelled images, {class}_{image}.png or a folder per class, with any open_clip model.

  python P3_clip_zeroshot.py                           the report's model and prompt: ViT-B-32, openai, "A photo of {}"
  python P3_clip_zeroshot.py --preset best             the best known setting (downloads its weights once)
  python P3_clip_zeroshot.py --model ViT-L-14 --weights openai --prompts cifar --names clean
  python P3_clip_zeroshot.py --model local-dir:FOLDER --features features.safetensors     keeps image features for runs with other prompts
  python P3_clip_zeroshot.py --preset best --images DIR --prompts sentences.json --transduce     a folder per class, sentences of each
  torchrun --nproc_per_node 4 P3_clip_zeroshot.py      four GPUs share the images

Nothing is downloaded unless you name a preset, a tag, or a hub model.
"""

from __future__ import annotations

import runtime.interrupts  # noqa: F401

# isort: split
import re
import sys
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Literal

from runtime.cli import BadInput, Seed, check_not_negative, log, run_script
from runtime.device import Device, Machine, Precision, detect, set_up
from runtime.distributed import sharing
from runtime.files import ROOT, check_writable_file, check_writable_folder, output_folder
from runtime.images import decoration
from runtime.record import Record
from zeroshot import results
from zeroshot.dataset import list_images
from zeroshot.features import FeatureExtractor
from zeroshot.prompts import Names, texts_of
from zeroshot.transduction import NAME, transduce


@dataclass(frozen=True)
class ZeroShotConfig:
    """A model and the prompts that it compares images with."""

    model: str
    weights: str | None
    prompts: str
    names: Names


# Published top-1 on CIFAR-100: 64.2, 80.3 and 90.7 %. "fast" costs what the report's model costs, "best" 12 times as much.
PRESETS = {
    "report": ZeroShotConfig("ViT-B-32", "openai", "report", "raw"),
    "fast": ZeroShotConfig("ViT-B-32", "datacomp_xl_s13b_b90k", "cifar", "clean"),
    "best": ZeroShotConfig("EVA02-L-14", "merged2b_s4b_b131k", "cifar", "clean"),
}


@dataclass(frozen=True)
class Settings:
    """Flags; --model, --weights, --prompts and --names replace those of the preset."""

    images: Path = ROOT / "hw2_data" / "clip_zeroshot" / "val"
    """Folder of files {class}_{image}.png, or with a folder per class, whose names are then the classes."""
    labels: Path | None = None
    """JSON file with the class names: a list, or an object of ids and names. With a folder per class, leave it out.
    None = id2label.json or id.json in the parent of --images, else in --images."""
    preset: Literal["best", "fast", "report"] | None = None
    """report: ViT-B-32 as in the report. fast: ViT-B-32 with better weights. best: EVA02-L-14. None = report, without a download."""
    model: str | None = None
    """Architecture of open_clip (ViT-B-32), folder (local-dir:PATH), or hub model (hf-hub:NAME). None = the preset's."""
    weights: str | None = None
    """Tag of open_clip (openai, laion2b_s34b_b79k, ..) or file. None = the preset's, for the preset's model."""
    prompts: str | None = None
    """report: "A photo of {}". single: "a photo of a {}.". cifar: 18 templates for small photographs. imagenet: 80 templates.
    Or a text file, one template a line, or a .json file of sentences per class, {"class": ["sentence", ..]}. None = the preset's."""
    names: Names | None = None
    """raw: class names as in the file. clean: spaces and articles ("a photo of an oak tree"). None = the preset's."""
    transduce: bool = False
    """Classify all images together, by a Gaussian mixture whose prior is the text (see zeroshot/transduction.py). Reads no label."""
    output: Path | None = None
    """Folder of the results. None = runs/p3_clip/(model_prompts_names)."""
    features: Path | None = None
    """safetensors file of image features: read if it holds this model's, else these are computed and added. None = not kept."""
    cache: Path = ROOT / "runs" / "p3_clip_cache"
    """Folder that keeps classifiers (text features of the classes) for later runs."""
    seed: Seed = 0
    """Seed that draws the five right and five wrong cases."""
    batch: int = 0
    """Images at once. 0 = 32 on a CPU, where more is slower, and 512 on a GPU."""
    workers: int = 0
    """Threads that decode and resize. 0 = one per core."""
    device: Device = "auto"
    precision: Precision = "auto"
    """auto = bf16 where the hardware has it, else fp16 on CUDA, else fp32."""


def config_of(settings: Settings) -> ZeroShotConfig:
    """Return the preset, overridden by the flags that are set. With another --model the preset's weights are dropped."""
    config = PRESETS[settings.preset or "report"]
    if settings.model and settings.model != config.model:
        config = replace(config, model=settings.model, weights=None)
    flags = {field.name: getattr(settings, field.name) for field in fields(ZeroShotConfig)}
    return replace(config, **{name: value for name, value in flags.items() if value is not None})


def set_up_precision(settings: Settings, machine: Machine) -> str:
    """Return fp32, tf32, bf16 or fp16, and set torch up for it. Raise BadInput for fp16 on a CPU."""
    if settings.precision == "fp16" and machine.device.type == "cpu":
        raise BadInput("--precision fp16 needs a GPU, this is a CPU")
    return set_up(settings.precision, machine)


def main(settings: Settings) -> None:
    """Classify the images of a folder; write tables, figures and a record."""
    from zeroshot.weights import resolve  # imports open_clip, which is slow

    check_not_negative(settings, "batch", "workers")
    machine = detect(settings.device)
    precision = set_up_precision(settings, machine)
    config = config_of(settings)
    record = Record(replace(settings, **asdict(config)), machine)

    # all inputs first, so that an absent one is reported before the work; the defaults are never downloaded
    named = bool(settings.preset or settings.model or settings.weights)
    with record.timed("inputs"):
        images = list_images(settings.images, settings.labels)
        texts = texts_of(config.prompts, images.names)
        source = resolve(config.model, config.weights, download=named)
        label = f"{source.label}_{config.prompts}_{config.names}" + "_transduced" * settings.transduce
        label = re.sub(r"[^A-Za-z0-9.]+", "-", label).strip("-")
        output = settings.output or ROOT / "runs" / "p3_clip" / label
        check_writable_folder(output)
        if settings.features:
            check_writable_file(settings.features, "--features")
        if settings.cache != Settings.cache:
            check_writable_folder(settings.cache, "--cache")
        extractor = FeatureExtractor(source, machine.device, precision, record)
        record.metrics = {
            "model": source.label,
            "quickgelu_forced": source.quick_gelu,
            "weights_sha256": source.digests,
            "precision": precision,
            "prompts": config.prompts,
            **({"sentences": texts} if isinstance(texts, dict) else {"templates": list(texts)}),
            "names": config.names,
            "classes": len(images.classes),
            "pictures": len(images),
            "pictures_sha256": images.fingerprint,
        }

    # several processes share the images, and the first does the rest
    with sharing() as shard:
        features = extractor.features(images, settings.features, settings.batch, settings.workers, shard)
    if not shard.main:
        return
    logits = extractor.classifier(images.names, texts, config.names, settings.cache).logits(features)
    result = results.Result(images, logits.softmax(1))
    if settings.transduce:
        record.metrics["top1_one_by_one"] = results.accuracies(result)["top1"]
        result = results.Result(images, transduce(features, logits))

    right, wrong = results.cases(result, settings.seed)
    shares, pairs = results.accuracies(result), results.confused_pairs(result)
    lines = results.case_lines(result, right, wrong)
    record.metrics |= {"processes": shard.world, **shares, "confused_pairs": pairs, "cases": lines}
    top1, top5, recall = (f"{100 * share:.2f}%" for share in shares.values())
    together = ", transduced" * settings.transduce
    title = f"{source.label}\nprompts {config.prompts}, names {config.names}{together}. Accuracy: {top1}"

    output_folder(output)
    with record.timed("writing"):
        results.write_csv(output / "predictions.csv", results.predictions(result))
        results.write_csv(output / "per_class.csv", results.per_class(result))
    record.save(output / "record.json")

    print(f"Model: {source.label}, {precision}")
    if isinstance(texts, dict):
        sentences = [sentence for own in texts.values() for sentence in own]
        print(f"Prompts: {config.prompts} ({len(sentences)} sentences, such as {sentences[0]!r})")
    else:
        print(f"Prompts: {config.prompts} ({len(texts)}, such as {texts[0]!r}), names {config.names}")
    print(f"Pictures: {len(images)} of {len(images.classes)} classes")
    print(f"Top-5: {top5}, mean per-class recall: {recall}")
    if settings.transduce:
        print(f"Transduction: {NAME}; one by one: {100 * record.metrics['top1_one_by_one']:.2f}%")
    print(f"Accuracy: {top1}", *lines, sep="\n")
    for pair in pairs:
        print("confused: {truth} taken for {predicted}, {times} of {pictures}".format(**pair))
    sys.stdout.flush()
    with decoration(output / "cases.png"):
        results.cases_figure(output / "cases.png", result, right, wrong, title)
    with decoration(output / "confusion.png"):
        results.confusion_figure(output / "confusion.png", result, title)
    log(f"tables, figures and record.json in {output}")


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
