"""Zero-shot speed: ViT-B-32 with random weights on random 32x32 pictures of 50 classes, fp32 on a CPU.

  python benchmarks/p3_clip.py                     several minutes on a CPU core

1. images/s against a loop over single pictures, in two forms. "pair": model(image, texts) per picture, as the example of OpenAI's
   package does and most public solutions copy; the text of all classes is encoded again for every picture. "image": the text once.
   Decoding and transform are within all times; the time of our classifier is within the ratio to "pair" only.
2. The whole script a first time, and a second time with classifier and features cached; start of Python and imports excluded.
"""

from __future__ import annotations

import contextlib
import io
import json
import statistics
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

from P3_clip_zeroshot import main as zeroshot
from runtime.cli import run_script
from runtime.device import Device, Machine, allow_tf32, detect, len_cores
from runtime.files import ROOT, save_safetensors
from runtime.record import Record
from zeroshot.dataset import LabelledImages, list_pictures
from zeroshot.features import encode_all, logits_of
from zeroshot.model import Clip, load
from zeroshot.prompts import REPORT, fillers
from zeroshot.settings import Settings, precision_of
from zeroshot.weights import resolve

CLASSES = 50
MODEL = "ViT-B-32-quickgelu"


@dataclass(frozen=True)
class Benchmark:
    """Flags."""

    count: int = 256
    """Pictures of the two whole runs."""
    batched_count: int = 96
    """Pictures of our way, measured alone."""
    image_count: int = 32
    """Pictures of the loop that encodes the text once."""
    pair_count: int = 2
    """Pictures of the loop that encodes the text each time."""
    repeats: int = 2
    batch: int = 0
    device: Device = "auto"
    seed: int = 0
    record: Path = ROOT / "runs" / "bench" / "p3_clip.json"


def make_inputs(folder: Path, benchmark: Benchmark) -> Settings:
    """Random pictures, labels and weights (fp16, 300 MB) in `folder`, as settings of the script."""
    random = np.random.default_rng(benchmark.seed)
    (folder / "val").mkdir()
    for index in range(benchmark.count):
        picture = Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        picture.save(folder / "val" / f"{index % CLASSES}_{index}.png")
    (folder / "id2label.json").write_text(json.dumps([f"object_{number}" for number in range(CLASSES)]))
    torch.manual_seed(benchmark.seed)
    weights = open_clip.create_model(MODEL, load_weights=False).half().state_dict()
    save_safetensors(folder / "random.safetensors", weights, {})
    return Settings(
        images=folder / "val",
        model=MODEL,
        weights=str(folder / "random.safetensors"),
        labels=folder / "id2label.json",
        output=folder / "out",
        cache=folder / "cache",
        embeddings=folder / "features.safetensors",
        device=benchmark.device,
        batch=benchmark.batch,
    )


@torch.inference_mode()
def pair_loop(model: Any, preprocess: Any, pictures: LabelledImages, texts: torch.Tensor, count: int) -> list[int]:
    """model(image, texts) for one picture at a time."""
    predicted = []
    for path in pictures.paths[:count]:
        image = preprocess(Image.open(path)).unsqueeze(0).to(texts.device)
        features, heads, scale = model(image, texts)
        predicted.append(int((scale * features @ heads.T).softmax(-1).argmax()))
    return predicted


@torch.inference_mode()
def image_loop(model: Any, preprocess: Any, pictures: LabelledImages, heads: torch.Tensor, count: int) -> list[int]:
    """encode_image for one picture at a time, text features [D,C] given."""
    predicted = []
    for path in pictures.paths[:count]:
        image = preprocess(Image.open(path)).unsqueeze(0).to(heads.device)
        predicted.append(int((model.encode_image(image, normalize=True) @ heads).argmax()))
    return predicted


def batched(clip: Clip, paths: list[Path], like: LabelledImages, heads: torch.Tensor, batch: int) -> list[int]:
    """Our way: decoding, transform, features and logits of all pictures."""
    pictures = LabelledImages(paths, like.truth, like.classes)  # nothing decoded yet
    pictures.decode(len_cores())
    features = encode_all(clip, pictures, batch, len_cores())
    return logits_of(features, heads, clip.scale, clip.bias).argmax(1).tolist()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """(seconds, result) of one call, whose printing is dropped."""
    start = time.perf_counter()
    with contextlib.redirect_stdout(io.StringIO()):
        result = work()
    return time.perf_counter() - start, result


def speeds(settings: Settings, benchmark: Benchmark, machine: Machine) -> dict[str, Any]:
    """images/s of the three ways, every repeat; raises AssertionError where they don't predict the same."""
    assert settings.labels
    pictures = list_pictures(settings.images, settings.labels)
    clip = load(resolve(MODEL, settings.weights), machine.device, precision_of(settings, machine))
    plain, _, preprocess = open_clip.create_model_and_transforms(MODEL, settings.weights, device=machine.device)
    prompts = [REPORT[0].replace("{}", name) for name in pictures.names]
    texts = open_clip.get_tokenizer(MODEL)(prompts).to(machine.device)
    text_s, heads = timed(lambda: clip.classifier(pictures.names, fillers(REPORT, "raw")))
    batch = settings.batch or (512 if machine.device.type == "cuda" else 32)
    found: dict[str, Any] = {"text_s": text_s, "batched": [], "image": [], "pair": []}
    ways: dict[str, tuple[int, Callable[[int], list[int]]]] = {
        "batched": (
            min(benchmark.batched_count, len(pictures)),
            lambda n: batched(clip, pictures.paths[:n], pictures, heads, batch),
        ),
        "image": (
            benchmark.image_count,
            lambda n: image_loop(plain.eval(), preprocess, pictures, heads.to(machine.device), n),
        ),
        "pair": (benchmark.pair_count, lambda n: pair_loop(plain.eval(), preprocess, pictures, texts, n)),
    }
    for _, way in ways.values():
        way(1)  # warm
    for _ in range(benchmark.repeats):
        predicted = {}
        for name, (count, way) in ways.items():
            taken, predicted[name] = timed(lambda way=way, count=count: way(count))  # type: ignore[misc]
            found[name].append(count / taken)
        for name in ("image", "pair"):
            same = [a == b for a, b in zip(predicted[name], predicted["batched"], strict=False)]
            found[f"{name}_agreement"] = sum(same) / len(same)
    return found


def main(benchmark: Benchmark) -> None:
    """Prints images/s, seconds, and the ratios."""
    machine = detect(benchmark.device)
    allow_tf32(False)
    record = Record(benchmark, machine)
    with tempfile.TemporaryDirectory() as folder:
        settings = make_inputs(Path(folder), benchmark)
        first, second = (timed(lambda: zeroshot(settings))[0] for _ in range(2))
        print(f"{MODEL}, random weights, {precision_of(settings, machine)}, {machine.name}, torch {torch.__version__}")
        told = f"first {first:.2f} s, cached {second:.2f} s, ratio {first / second:.1f}"
        print(f"whole script, {benchmark.count} pictures: {told}", flush=True)
        found = speeds(settings, benchmark, machine)
    count = min(benchmark.batched_count, benchmark.count)
    with_text = [count / (count / rate + found["text_s"]) for rate in found["batched"]]
    ratios = {
        "pair": [a / b for a, b in zip(with_text, found["pair"], strict=True)],
        "image": [a / b for a, b in zip(found["batched"], found["image"], strict=True)],
    }
    for name, title in (("batched", "ours"), ("image", "loop, text once"), ("pair", "loop, text each time")):
        print(f"{title:22s}{statistics.mean(found[name]):8.2f} images/s  (n = {benchmark.repeats})")
    print(f"classifier of {CLASSES} classes, once: {found['text_s']:.2f} s")
    for name, title in (
        ("pair", f"text each time ({count} pictures, our classifier included)"),
        ("image", "text once"),
    ):
        agreement = found[f"{name}_agreement"]
        mean, spread = statistics.mean(ratios[name]), statistics.pstdev(ratios[name])
        print(f"ratio to the loop, {title}: {mean:.2f} +- {spread:.2f}  (same predictions: {100 * agreement:.0f} %)")
    record.metrics["agreement"] = {name: found[f"{name}_agreement"] for name in ratios}
    record.add_repeats({f"{name}, images/s": found[name] for name in ("batched", *ratios)})
    record.add_repeats({f"times faster than one {name} at a time": values for name, values in ratios.items()})
    record.add_repeats({"classifier, s": [found["text_s"]], "first run, s": [first], "cached run, s": [second]})
    record.add_repeats({"second run, times faster": [first / second]})
    record.save(benchmark.record)


if __name__ == "__main__":
    run_script(main, Benchmark, __doc__)
