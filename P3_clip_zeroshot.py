"""Zero-shot classification of labelled pictures ({class}_{image}.png) with any open_clip model.

  python P3_clip_zeroshot.py                                        the report's model and prompt: ViT-B-32, openai, "A photo of {}"
  python P3_clip_zeroshot.py --preset best                          the best known setting (downloads its weights once)
  python P3_clip_zeroshot.py --model ViT-L-14 --weights openai --prompts cifar --names clean
  python P3_clip_zeroshot.py --compare report cifar imagenet        one model, several prompts, one table
  python P3_clip_zeroshot.py --compare best fast ViT-B-16:openai,cifar,clean local-dir:runs/mine,single
  python P3_clip_zeroshot.py --collect runs/p3_clip                 one csv of all runs in a folder
  torchrun --nproc_per_node 4 P3_clip_zeroshot.py                   four GPUs share the pictures

Nothing is downloaded unless you name a preset, a tag, or a hub model.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd

from runtime.cli import log, run_script
from runtime.device import detect
from runtime.distributed import sharing
from runtime.files import ROOT, check_writable_folder, output_folder, read_json
from runtime.record import Record
from zeroshot.dataset import list_pictures
from zeroshot.features import FeatureExtractor, FeatureFile, key_of, logits_of
from zeroshot.prompts import templates_of
from zeroshot.results import (
    COLUMNS,
    Result,
    accuracies,
    cases,
    cases_figure,
    collect,
    confused_pairs,
    confusion_figure,
    per_class,
    predictions,
    print_table,
    published,
    report_lines,
    summary,
    write_csv,
)
from zeroshot.settings import Settings, ZeroShotConfig, base_config, check, parse_config, precision_of
from zeroshot.weights import Source, resolve

PAIR = ("truth", "predicted", "times", "pictures")
RUNS = ROOT / "runs" / "p3_clip"


def folder_name(source: Source, choice: ZeroShotConfig) -> str:
    """A folder for the results of a setting: letters, digits and a few signs."""
    return re.sub(r"[^A-Za-z0-9.]+", "-", f"{source.label}_{choice.prompts}_{choice.names}").strip("-")


def measured_before(folder: Path, key: str) -> dict[str, Any] | None:
    """The metrics in the folder's record, if they are of the same model, prompts, labels and pictures."""
    path = folder / "record.json"
    metrics = read_json(path).get("metrics", {}) if path.is_file() else {}
    return metrics if metrics.get("key") == key else None


def measure(bench: FeatureExtractor, source: Source, choice: ZeroShotConfig, folder: Path) -> dict[str, Any]:
    """Runs one setting, writes its folder, prints its results; returns its metrics. Several processes share the pictures, and the first
    does the rest."""
    templates = templates_of(choice.prompts)
    key = key_of(bench.model_key(source), bench.pictures.fingerprint, bench.pictures.classes, choice.names, templates)
    if bench.settings.skip_existing and (before := measured_before(folder, key)):
        log(f"skipped: {folder / 'record.json'} has it, top-1 {100 * before['top1']:.2f}%")
        return before
    record = Record(replace(bench.settings, **vars(choice)), bench.machine)
    features = bench.features(source, record)
    if not bench.shard.main:
        return {}
    record.metrics["processes"] = bench.shard.world
    head = bench.classifier(source, choice, templates, record)
    result = Result(bench.pictures, logits_of(features, *head).softmax(1))
    record.metrics |= {**accuracies(result), "published_cifar100": published(source.label)}
    record.metrics |= describe(bench, source, choice, templates) | {"key": key}
    write_results(result, folder, source, choice, bench.settings, record)
    return record.metrics


def describe(
    bench: FeatureExtractor, source: Source, choice: ZeroShotConfig, templates: Sequence[str]
) -> dict[str, Any]:
    """All that is needed to do it again."""
    return {
        "model": source.label,
        "quickgelu_forced": source.quick_gelu,
        "weights_sha256": source.digests(bench.digests),
        "precision": bench.precision,
        "prompts": choice.prompts,
        "templates": list(templates),
        "names": choice.names,
        "classes": len(bench.pictures.classes),
        "pictures": len(bench.pictures),
        "pictures_sha256": bench.pictures.fingerprint,
    }


def write_results(
    result: Result, folder: Path, source: Source, choice: ZeroShotConfig, settings: Settings, record: Record
) -> None:
    """Tables, figures and record into the folder, results to stdout."""
    output_folder(folder)
    pairs = confused_pairs(result)
    right, wrong = cases(result, settings.cases, settings.seed)
    lines = report_lines(result, right, wrong)
    record.metrics |= {"confused_pairs": [dict(zip(PAIR, pair, strict=True)) for pair in pairs], "cases": lines[1:]}
    title = f"{source.label}\nprompts {choice.prompts}, names {choice.names}. {lines[0]}"
    with record.timed("writing"):
        write_csv(folder / "predictions.csv", predictions(result))
        write_csv(folder / "per_class.csv", per_class(result))
        cases_figure(folder / "cases.png", result, right, wrong, title)
        confusion_figure(folder / "confusion.png", result, title)
    record.save(folder / "record.json")
    print("\n".join([*summary(record.metrics), *lines]))
    for truth, predicted, times, pictures in pairs:
        print(f"confused: {truth} taken for {predicted}, {times} of {pictures}")
    log(f"tables, figures and record.json in {folder}")


def sources_of(settings: Settings, base: ZeroShotConfig, choices: Sequence[ZeroShotConfig]) -> list[Source]:
    """The files of every setting, so that what is absent is told before any work; what nobody named is not downloaded."""
    named = bool(settings.preset or settings.model or settings.weights)
    default = (base.model, base.weights)
    return [
        resolve(c.model, c.weights, settings.activation, download=named or (c.model, c.weights) != default)
        for c in choices
    ]


def output_folders(settings: Settings, sources: Sequence[Source], choices: Sequence[ZeroShotConfig]) -> list[Path]:
    """Where each setting's results go; raises BadInput where a file is in the way, before the work."""
    root, own = settings.output or RUNS, bool(settings.compare) or settings.output is None
    folders = [root / folder_name(*one) if own else root for one in zip(sources, choices, strict=True)]
    for folder in (root, *folders):
        check_writable_folder(folder)
    return folders


def main(settings: Settings) -> None:
    """Measures one setting or several."""
    check(settings)
    if settings.collect:
        return print_table(collect(settings.collect))
    machine = detect(settings.device)
    precision = precision_of(settings, machine)
    base = base_config(settings)
    choices = [parse_config(text, base) for text in settings.compare] or [base]
    for choice in choices:
        templates_of(choice.prompts)  # a bad one is told before the work
    pictures = list_pictures(settings.images, settings.labels)
    sources = sources_of(settings, base, choices)
    folders = output_folders(settings, sources, choices)
    with sharing() as shard:
        bench = FeatureExtractor(
            settings, machine, precision, pictures, FeatureFile(settings.embeddings, pictures), shard
        )
        rows = [measure(bench, *one) for one in zip(sources, choices, folders, strict=True)]
    if settings.compare and shard.main:
        table = pd.DataFrame(rows)[list(COLUMNS)]
        write_csv((settings.output or RUNS) / "compare.csv", table)
        print_table(table)
    return None


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
