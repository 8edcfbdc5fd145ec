"""Zero-shot speed: ViT-B-32 with random weights on random 32x32 images of 50 classes, fp32 on a CPU.

  python benchmarks/p3_clip.py                     several minutes on a CPU core

1. images/s against a loop over single images, in two forms. "pair": model(image, texts) per image, as in the example of OpenAI's
   package, which most public solutions copy. It encodes the text of all classes again for every image. "image": the text once.
   Decoding and transform are within all times. The time of our classifier is within the ratio to "pair" only.
2. The whole script a first time, and a second time with classifier and features cached; start of Python and imports excluded.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import repository_root  # noqa: F401  # isort: split
import torch
from PIL import Image

from runtime.cli import run_script
from runtime.device import Device, Machine, allow_tf32, detect, len_cores
from runtime.files import ROOT, read_json, save_safetensors
from runtime.record import Record
from zeroshot.dataset import LabelledImages, list_images
from zeroshot.features import encode_all
from zeroshot.model import Classifier, Clip, load
from zeroshot.prompts import REPORT, fillers
from zeroshot.weights import resolve

CLASSES = 50
MODEL = "ViT-B-32-quickgelu"


@dataclass(frozen=True)
class Benchmark:
    """Flags."""

    count: int = 256
    """Images of the two whole runs."""
    batched_count: int = 96
    """Images of our way, measured alone."""
    image_count: int = 32
    """Images of the loop that encodes the text once."""
    pair_count: int = 2
    """Images of the loop that encodes the text each time."""
    repeats: int = 2
    batch: int = 0
    """Images at once. 0 = 32 on a CPU, 512 on a GPU."""
    device: Device = "auto"
    seed: int = 0
    record: Path = ROOT / "runs" / "bench" / "p3_clip.json"


def make_inputs(folder: Path, benchmark: Benchmark) -> None:
    """Write random images (val/), labels (id2label.json) and weights (random.safetensors, fp16, 300 MB)."""
    random = np.random.default_rng(benchmark.seed)
    (folder / "val").mkdir()
    for index in range(benchmark.count):
        image = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        image.save(folder / "val" / f"{index % CLASSES}_{index}.png")
    (folder / "id2label.json").write_text(json.dumps([f"object_{number}" for number in range(CLASSES)]))
    torch.manual_seed(benchmark.seed)
    weights = open_clip.create_model(MODEL, load_weights=False).half().state_dict()
    save_safetensors(folder / "random.safetensors", weights, {})


def whole_run(folder: Path, benchmark: Benchmark) -> tuple[float, str]:
    """Run the script on the inputs of `folder`; return its seconds after the imports, and its precision."""
    command = [sys.executable, str(ROOT / "P3_clip_zeroshot.py"), "--images", "val", "--model", MODEL]
    command += ["--weights", "random.safetensors", "--output", "out", "--cache", "cache"]
    command += ["--embeddings", "features.safetensors", "--device", benchmark.device, "--batch", str(benchmark.batch)]
    subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)
    record = read_json(folder / "out" / "record.json")
    return sum(record["timings_s"].values()), record["metrics"]["precision"]


@torch.inference_mode()
def pair_loop(model: Any, preprocess: Any, images: LabelledImages, texts: torch.Tensor, count: int) -> list[int]:
    """Classify one image at a time by model(image, texts)."""
    predicted = []
    for path in images.paths[:count]:
        image = preprocess(Image.open(path)).unsqueeze(0).to(texts.device)
        features, heads, scale = model(image, texts)
        predicted.append(int((scale * features @ heads.T).softmax(-1).argmax()))
    return predicted


@torch.inference_mode()
def image_loop(model: Any, preprocess: Any, images: LabelledImages, heads: torch.Tensor, count: int) -> list[int]:
    """Classify one image at a time by encode_image and text features [D,C]."""
    predicted = []
    for path in images.paths[:count]:
        image = preprocess(Image.open(path)).unsqueeze(0).to(heads.device)
        predicted.append(int((model.encode_image(image, normalize=True) @ heads).argmax()))
    return predicted


def batched(clip: Clip, images: LabelledImages, classifier: Classifier, batch: int, count: int) -> list[int]:
    """Classify as the script does: decoding, transform, features and logits."""
    part = LabelledImages(images.paths[:count], images.truth[:count], images.classes)
    predicted: list[int] = classifier.logits(encode_all(clip, part, batch, len_cores())).argmax(1).tolist()
    return predicted


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return (seconds, result) of one call."""
    start = time.perf_counter()
    result = work()
    return time.perf_counter() - start, result


def speeds(folder: Path, benchmark: Benchmark, machine: Machine, precision: str) -> dict[str, Any]:
    """Return images/s of the three ways for every repeat, and the shares of equal predictions."""
    weights = str(folder / "random.safetensors")
    images = list_images(folder / "val")
    clip = load(resolve(MODEL, weights), machine.device, precision)
    plain, _, preprocess = open_clip.create_model_and_transforms(MODEL, weights, device=machine.device)
    plain.eval()
    prompts = [REPORT[0].replace("{}", name) for name in images.names]
    texts = open_clip.get_tokenizer(MODEL)(prompts).to(machine.device)
    text_s, classifier = timed(lambda: clip.classifier(images.names, fillers(REPORT, "raw")))
    heads = classifier.weight.to(machine.device)
    batch = benchmark.batch or (512 if machine.device.type == "cuda" else 32)

    results: dict[str, Any] = {"text_s": text_s, "batched": [], "image": [], "pair": []}
    ways: dict[str, tuple[int, Callable[[int], list[int]]]] = {
        "batched": (
            min(benchmark.batched_count, len(images)),
            lambda count: batched(clip, images, classifier, batch, count),
        ),
        "image": (benchmark.image_count, lambda count: image_loop(plain, preprocess, images, heads, count)),
        "pair": (benchmark.pair_count, lambda count: pair_loop(plain, preprocess, images, texts, count)),
    }
    for _, way in ways.values():
        way(1)  # warm
    for _ in range(benchmark.repeats):
        predicted = {}
        for name, (count, way) in ways.items():
            start = time.perf_counter()
            predicted[name] = way(count)
            results[name].append(count / (time.perf_counter() - start))
        for name in ("image", "pair"):
            same = [a == b for a, b in zip(predicted[name], predicted["batched"], strict=False)]
            results[f"{name}_agreement"] = sum(same) / len(same)
    return results


def main(benchmark: Benchmark) -> None:
    """Print images/s, seconds, and the ratios."""
    machine = detect(benchmark.device)
    allow_tf32(False)
    record = Record(benchmark, machine)
    with tempfile.TemporaryDirectory() as name:
        make_inputs(Path(name), benchmark)
        first, precision = whole_run(Path(name), benchmark)
        second, _ = whole_run(Path(name), benchmark)
        print(f"{MODEL}, random weights, {precision}, {machine.name}, torch {torch.__version__}")
        ratio = f"first {first:.2f} s, cached {second:.2f} s, ratio {first / second:.1f}"
        print(f"whole script, {benchmark.count} images: {ratio}", flush=True)
        results = speeds(Path(name), benchmark, machine, precision)
    count = min(benchmark.batched_count, benchmark.count)
    with_text = [count / (count / rate + results["text_s"]) for rate in results["batched"]]
    ratios = {
        "pair": [a / b for a, b in zip(with_text, results["pair"], strict=True)],
        "image": [a / b for a, b in zip(results["batched"], results["image"], strict=True)],
    }
    for name, title in (("batched", "ours"), ("image", "loop, text once"), ("pair", "loop, text each time")):
        print(f"{title:22s}{statistics.mean(results[name]):8.2f} images/s  (n = {benchmark.repeats})")
    print(f"classifier of {CLASSES} classes, once: {results['text_s']:.2f} s")
    for name, title in (
        ("pair", f"text each time ({count} images, our classifier included)"),
        ("image", "text once"),
    ):
        agreement = results[f"{name}_agreement"]
        mean, spread = statistics.mean(ratios[name]), statistics.pstdev(ratios[name])
        print(f"ratio to the loop, {title}: {mean:.2f} +- {spread:.2f}  (same predictions: {100 * agreement:.0f} %)")
    record.metrics["agreement"] = {name: results[f"{name}_agreement"] for name in ratios}
    record.add_repeats({f"{name}, images/s": results[name] for name in ("batched", *ratios)})
    record.add_repeats({f"times faster than one {name} at a time": values for name, values in ratios.items()})
    record.add_repeats({"classifier, s": [results["text_s"]], "first run, s": [first], "cached run, s": [second]})
    record.add_repeats({"second run, times faster": [first / second]})
    record.save(benchmark.record)


if __name__ == "__main__":
    run_script(main, Benchmark, __doc__)
