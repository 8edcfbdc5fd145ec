"""Zero-shot speed: ViT-B-32 with random weights on random 32x32 images of 50 classes, fp32 on a CPU.

  python benchmarks/p3_clip.py                     several minutes on a CPU core

1. P3_clip_zeroshot.py a first time, and a second time with classifier and features cached. The start of Python and imports are excluded.
2. images/s of batches against two loops over single images. "pair" calls model(image, texts) for each image, as in the example of
   OpenAI's package: it encodes the text of all classes again each time. "image" encodes the text once.
   Reading and transforming the images counts everywhere. Our encoding of the text counts in the ratio to "pair" only.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import repository_root  # noqa: F401  # isort: split
import torch
from PIL import Image

from benchmarks.timing import BENCH, ratios, report, timed
from runtime.cli import check_not_negative, check_positive, run_script
from runtime.device import Device, Machine, allow_tf32, detect, len_cores
from runtime.files import ROOT, read_json, save_safetensors
from runtime.record import Record
from zeroshot.dataset import LabelledImages, list_images
from zeroshot.prompts import REPORT, fillers

CLASSES = 50
MODEL = "ViT-B-32-quickgelu"


@dataclass(frozen=True)
class Settings:
    """Settings of the comparison of our zero-shot classification with plain code."""

    count: int = 256
    """Images of each run of the whole script."""
    batched_count: int = 96
    """Images of the batches."""
    image_count: int = 32
    """Images of the loop that encodes the text once."""
    pair_count: int = 2
    """Images of the loop that encodes the text each time."""
    repeats: int = 2
    batch: int = 0
    """Images per batch. 0 = 32 on a CPU, 512 on a GPU."""
    device: Device = "auto"
    seed: int = 0
    record: Path = BENCH / "p3_clip.json"


def make_inputs(folder: Path, settings: Settings) -> None:
    """Write random images (val/), labels (id2label.json) and weights (random.safetensors, fp16, 300 MB)."""
    import open_clip  # slow to import

    random = np.random.default_rng(settings.seed)
    (folder / "val").mkdir()
    for index in range(settings.count):
        image = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        image.save(folder / "val" / f"{index % CLASSES}_{index}.png")
    (folder / "id2label.json").write_text(json.dumps([f"object_{number}" for number in range(CLASSES)]))
    torch.manual_seed(settings.seed)
    weights = open_clip.create_model(MODEL, load_weights=False).half().state_dict()
    save_safetensors(folder / "random.safetensors", weights, {})


def whole_run(folder: Path, settings: Settings) -> tuple[float, str]:
    """Run P3_clip_zeroshot.py on the inputs of `folder`; return its seconds after the imports, and its precision."""
    command = [sys.executable, str(ROOT / "P3_clip_zeroshot.py"), "--images", "val", "--model", MODEL]
    command += ["--weights", "random.safetensors", "--output", "out", "--cache", "cache"]
    command += ["--features", "features.safetensors", "--device", settings.device, "--batch", str(settings.batch)]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    record = read_json(folder / "out" / "record.json")
    return sum(record["timings_s"].values()), record["metrics"]["precision"]


@torch.inference_mode()
def measure(folder: Path, settings: Settings, machine: Machine, precision: str) -> dict[str, list[float]]:
    """Return images/s of batches and both loops, the ratios, and for each loop the share of predictions that equal those of the batches."""
    import open_clip  # slow to import, also below zeroshot/

    from zeroshot.features import encode_all
    from zeroshot.model import load
    from zeroshot.weights import resolve

    device, weights = machine.device, str(folder / "random.safetensors")
    images = list_images(folder / "val")
    clip = load(resolve(MODEL, weights), device, precision)
    model, _, preprocess = open_clip.create_model_and_transforms(MODEL, weights, device=device)
    model.eval()
    texts = open_clip.get_tokenizer(MODEL)([REPORT[0].replace("{}", name) for name in images.names]).to(device)
    text_s, classifier = timed(lambda: clip.classifier(images.names, fillers(REPORT, "raw")), device)
    class_features, batch = classifier.weight.to(device), settings.batch or (512 if device.type == "cuda" else 32)

    def batched(count: int) -> list[int]:
        part = LabelledImages(images.paths[:count], images.truth[:count], images.classes)
        predictions: list[int] = classifier.logits(encode_all(clip, part, batch, len_cores())).argmax(1).tolist()
        return predictions

    def image_loop(count: int) -> list[int]:
        inputs = (preprocess(Image.open(path)).unsqueeze(0).to(device) for path in images.paths[:count])
        return [int((model.encode_image(image, normalize=True) @ class_features).argmax()) for image in inputs]

    def pair_loop(count: int) -> list[int]:
        predictions = []
        for path in images.paths[:count]:
            features, text_features, scale = model(preprocess(Image.open(path)).unsqueeze(0).to(device), texts)
            predictions.append(int((scale * features @ text_features.T).softmax(-1).argmax()))
        return predictions

    ways: dict[str, tuple[int, Callable[[int], list[int]]]] = {
        "batched": (min(settings.batched_count, len(images)), batched),
        "image": (settings.image_count, image_loop),
        "pair": (settings.pair_count, pair_loop),
    }
    for _, way in ways.values():
        way(1)  # warm-up
    times: dict[str, list[float]] = {name: [] for name in ways}  # seconds per image
    predictions: dict[str, list[int]] = {}
    for _ in range(settings.repeats):
        for name, (count, way) in ways.items():
            time, predictions[name] = timed(partial(way, count), device)
            times[name].append(time / count)

    with_text = [time + text_s / ways["batched"][0] for time in times["batched"]]
    results = {f"{name}, images/s": [1 / time for time in values] for name, values in times.items()}
    results["classifier, s"] = [text_s]
    results["times faster than one pair at a time"] = ratios(times["pair"], with_text)
    results["times faster than one image at a time"] = ratios(times["image"], times["batched"])
    for name in ("pair", "image"):
        same = [a == b for a, b in zip(predictions[name], predictions["batched"], strict=False)]
        results[f"{name}, same predictions"] = [sum(same) / len(same)]
    return results


def main(settings: Settings) -> None:
    """Print seconds, images/s and the ratios."""
    check_positive(settings, "count", "batched_count", "image_count", "pair_count", "repeats")
    check_not_negative(settings, "batch")
    machine = detect(settings.device)
    allow_tf32(False)
    record = Record(settings, machine)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_inputs(folder, settings)
        (first, precision), (second, _) = whole_run(folder, settings), whole_run(folder, settings)
        record.add_repeats({"first run, s": [first], "cached run, s": [second]})
        record.add_repeats({"second run, times faster": [first / second]})
        record.add_repeats(measure(folder, settings, machine, precision))

    print(f"{MODEL}, random weights, {precision}, {machine.name}, torch {torch.__version__}")
    report(record, settings.record)


if __name__ == "__main__":
    run_script(main, Settings, __doc__)
