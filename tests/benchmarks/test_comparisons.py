"""Every comparison of the benchmarks: whose time is whose, ratios the right way up, each number under its name. Clocks are scripted."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import tyro
from small_clip import NAMES as CLASSES

import P1_training
from benchmarks import (
    outside_view,
    p1_accuracy,
    p1_sampling,
    p1_time,
    p1_training,
    p2_ddim,
    p2_round_trip,
    p3_clip,
    p3_composition,
    p3_strict,
)
from benchmarks import p3_textual_inversion as inversion
from benchmarks.p3_learning import RECIPE
from concepts.dataset import ConceptSet
from diffusion.samplers import bdia, ddim
from diffusion.step_rules import Rule, step_rule
from digits.recipes import RECIPES
from faces.models import load_model
from P1_model import DigitSamplerConfig, Network, load_network, save_network
from runtime.cli import BadInput
from runtime.device import detect
from runtime.images import save_image
from runtime.record import Record

CPU = detect("cpu")
WAYS: tuple[tuple[str, Rule], ...] = (("bdia from x_T alone", "bdia"), ("plain ddim", "ddim"))


def scripted(*times: float) -> Callable[..., tuple[float, Any]]:
    """Return a `timed` that does the work and says that it took the next of these times."""
    clock: Iterator[float] = iter(times)
    return lambda work, device: (next(clock), work())


def repeats(record: Path) -> dict[str, list[float]]:
    measured: dict[str, list[float]] = json.loads(record.read_text())["metrics"]["repeats"]
    return measured


@pytest.fixture
def digits(tiny_network: Network, tmp_path: Path) -> Path:
    save_network(tmp_path / "p1.safetensors", tiny_network)
    return tmp_path / "p1.safetensors"


def test_p1_sampling_compares_the_default_sampler_with_two_pass_ddpm(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(p1_sampling, "timed", scripted(2.0, 4.0, 12.0))
    monkeypatch.setattr(
        p1_sampling, "two_pass_ddpm", lambda network, requests, *_: torch.zeros(len(requests), 3, 28, 28)
    )
    monkeypatch.setattr(
        p1_sampling, "accuracy", lambda _, images, *__: [0.9, 0.7] if images.float().std() else [0.1, 0.3]
    )
    record = tmp_path / "record.json"
    p1_sampling.main(p1_sampling.Settings(model=digits, count=1, repeats=2, steps=6, device="cpu", record=record))
    assert repeats(record) == {
        "default sampler, s": [2.0, 4.0],
        "DDPM, two passes, s": [12.0],
        "times faster": [6.0, 3.0],
        "accuracy, default": [pytest.approx(0.8)],
        "accuracy, DDPM": [pytest.approx(0.2)],
    }


def test_p1_accuracy_grades_before_the_retries_and_after(
    digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configs = []

    def redraw(sampler: Any, classifiers: Any, requests: Any, images: dict[int, torch.Tensor], count: int) -> None:
        configs.append((sampler.config.steps, sampler.config.guidance))
        images.update({row: torch.full_like(image, 100 + count) for row, image in images.items()})

    def accuracy(classifiers: Any, images: torch.Tensor, *_: Any) -> list[float]:
        redrawn = bool((images == 102).all())
        return [0.5] if len(classifiers) == 1 else [0.75, 1.0] if redrawn else [0.25, 0.5]

    monkeypatch.setattr(p1_accuracy, "redraw", redraw)
    for module in (p1_accuracy, outside_view):
        monkeypatch.setattr(module, "accuracy", accuracy)
    monkeypatch.setattr(p1_accuracy, "shipped_classifiers", lambda _: ["mnistm", "svhn"])
    monkeypatch.setattr(p1_accuracy, "outside_classifiers", lambda data, _: [f"mnistm {data}", f"svhn {data}"])
    monkeypatch.setattr(p1_accuracy, "load_classifier", lambda path, _: path)
    monkeypatch.setattr(outside_view, "quality", lambda who, images: {"pictures": len(images), "who": len(who)})
    record = tmp_path / "record.json"
    settings = p1_accuracy.Settings(model=digits, seeds=(0, 1), count=1, retries=2, device="cpu", record=record)
    p1_accuracy.main(settings)
    measured = repeats(record)
    own = load_network(digits, torch.device("cpu")).sampler
    p1_accuracy.main(replace(settings, seeds=(0,), steps=3, guidance=0.0))
    assert configs == [(own["steps"], own.get("guidance", DigitSamplerConfig.guidance))] * 2 + [(3, 0.0)]
    with pytest.raises(BadInput, match="--steps: 0 steps: give 1 to"):
        p1_accuracy.main(replace(settings, steps=0))
    p1_accuracy.main(replace(settings, data=Path("real"), mnistm_classifier=Path("Classifier.pth")))
    more = {name: values[0] for name, values in repeats(record).items() if name not in measured}
    assert {name: value for name, value in more.items() if "accuracy" in name and "with retries" in name} == {
        "with retries: mnistm accuracy by the course's classifier": 0.5,
        "with retries: mnistm outside accuracy": 0.75,
        "with retries: svhn outside accuracy": 1.0,
        "with retries: mean outside accuracy": 0.875,
    }
    assert (more["without retries: mnistm outside who"], more["with retries: svhn outside who"]) == (11, 9)
    assert {name: values[0] for name, values in measured.items() if "accuracy" in name} == {
        "without retries: mnistm accuracy": 0.25,
        "without retries: svhn accuracy": 0.5,
        "without retries: mean accuracy": 0.375,
        "with retries: mnistm accuracy": 0.75,
        "with retries: svhn accuracy": 1.0,
        "with retries: mean accuracy": 0.875,
    }
    assert {len(values) for values in measured.values()} == {2}
    assert (measured["with retries: mnistm who"], measured["with retries: svhn who"]) == ([6, 6], [4, 4])
    assert measured["with retries: svhn pictures"] == [10, 10]


def test_p1_training_compares_images_per_second_each_way_in_its_own_precision(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    took, setups, own = {"plain": 4.0, "ours": 1.0, "slower": 2.0}, [], {"fp32": "slower"}
    monkeypatch.setattr(p1_training, "plain_step", lambda *_: lambda: "plain")
    monkeypatch.setattr(p1_training, "our_step", lambda *arguments: lambda: own.get(arguments[4], "ours"))
    monkeypatch.setattr(p1_training, "seconds", lambda step, _, count=1: count * took[step()])
    monkeypatch.setattr(p1_training, "set_up", lambda kind, machine, training: setups.append((kind, training)))
    monkeypatch.setattr(p1_training, "keep_freed_memory", setups.append)
    record = tmp_path / "record.json"
    settings = p1_training.Settings(preset="tiny", steps=3, rounds=2, precisions=("bf16",), device="cpu", record=record)
    p1_training.main(settings)
    batch = RECIPES["tiny"].batch
    assert repeats(record) == {
        "plain, images/s": [batch / 4] * 2,
        "ours, images/s": [batch] * 2,
        "times faster": [4.0] * 2,
    }
    assert setups == [("fp32", False), False, ("bf16", True), True] * 2

    p1_training.main(replace(settings, rounds=1, precisions=("fp32", "bf16", "fp32")))
    assert repeats(record) == {
        "plain, images/s": [batch / 4],
        "ours, fp32, images/s": [batch / 2],
        "ours, bf16, images/s": [batch],
        "times faster, fp32": [2.0],
        "times faster, bf16": [4.0],
    }


def test_p1_training_runs_in_every_precision_of_a_gpu(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(RECIPES, "tiny", replace(RECIPES["tiny"], batch=4))
    kinds: Any = ("fp32", "bf16", "fp16")
    small: Any = {"preset": "tiny", "steps": 1, "rounds": 1, "compile": "off", "device": "cpu"}
    record = tmp_path / "record.json"
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    p1_training.main(p1_training.Settings(digits_folder, precisions=kinds, record=record, **small))
    gc.collect()  # its loops stay open, and hold the signals
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert {f"ours, {kind}, images/s" for kind in kinds} < set(repeats(record))


class AnyNetwork:
    """Something that can be loaded and moved."""

    def __getattr__(self, name: str) -> Any:
        return [0] * 1000 if name == "schedule" else lambda *_, **__: self


def test_p2_compares_times_memory_and_images_of_every_precision_with_the_baseline(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A turn of baseline, fp32 and bf16, twice; the record is written after every one."""
    memory = iter([1.0, 5.0, 1.0, 3.0, 1.0, 2.0] * 2)
    times, saved = iter([12.0, 3.0, 2.0, 10.0, 5.0, 4.0]), []

    def sample_all(model: Any, noises: Any, config: Any, batch: int, kind: str) -> Any:
        return [(noise, torch.tensor([1.0, 2.0 if kind == "fp32" else 5.0])) for noise in noises]

    monkeypatch.setattr(p2_ddim, "timed", lambda work, _: (next(times), work()))
    monkeypatch.setattr(p2_ddim, "peak_memory", lambda device, reset=False: next(memory))
    for name in ("PlainFaceUNet", "load_tensors", "load_model"):
        monkeypatch.setattr(p2_ddim, name, lambda *_: AnyNetwork())
    monkeypatch.setattr(p2_ddim, "plain_homework_ddim", lambda *_: torch.tensor([[0.0, 2.0]]))
    monkeypatch.setattr(p2_ddim, "sample_all", sample_all)
    monkeypatch.setattr(p2_ddim, "to_image", lambda image, _: image)
    noises: Any = [SimpleNamespace(x=torch.zeros(2))]
    record = Record(p2_ddim.Settings(repeats=2, record=tmp_path / "record.json"), CPU)
    save = record.save

    def save_and_count(path: Path) -> None:
        saved.append(len(record.metrics["repeats"]))
        save(path)

    monkeypatch.setattr(record, "save", save_and_count)
    p2_ddim.side_by_side(Path("x"), ("fp32", "bf16"), noises, 5, record)
    assert repeats(tmp_path / "record.json") == {
        "baseline, s": [12.0, 10.0],
        "baseline, GB": [4.0, 4.0],
        "fp32, s": [3.0, 5.0],
        "fp32, GB": [2.0, 2.0],
        "fp32, times faster": [4.0, 2.0],
        "fp32, MSE on 0..255": [0.5],
        "fp32, largest difference on 0..255": [1.0],
        "bf16, s": [2.0, 4.0],
        "bf16, GB": [1.0, 1.0],
        "bf16, times faster": [6.0, 2.5],
        "bf16, MSE on 0..255": [5.0],
        "bf16, largest difference on 0..255": [3.0],
    }
    assert saved == [2, 7, 12, 12, 12, 12]


def test_p1s_time_is_that_of_the_first_grading_that_reaches_the_accuracy(
    digits_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The command is P1_training's; it starts over, in a folder that does not stay."""
    history = [
        {"seconds": 40.0, "accuracy": 0.9},
        {"seconds": 80.5, "accuracy": 0.99},
        {"seconds": 120.0, "accuracy": 0.995},
    ]
    flags: list[P1_training.Settings] = []

    run = subprocess.run

    def train(command: list[str], **options: Any) -> Any:
        if command[0] == "git":  # of the record
            return run(command, **options)
        assert Path(command[1]).name == "P1_training.py"
        flags.append(tyro.cli(P1_training.Settings, args=command[2:]))
        (flags[-1].output / "record.json").write_text(json.dumps({"metrics": {"history": history}}))
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr("benchmarks.p1_time.subprocess.run", train)
    settings = p1_time.Settings(digits_folder, device="cpu", record=tmp_path / "record.json")
    p1_time.main(settings)
    measured = repeats(tmp_path / "record.json")
    assert measured.pop("whole run, s")[0] < 60
    assert measured == {"best mean accuracy": [0.995], "to a mean accuracy of 0.99, s": [80.5]}
    (used,) = flags
    assert (used.data, used.steps, used.batch, used.preset, used.resume) == (digits_folder, 1600, 1024, "gpu", "never")
    assert (used.eval_every, used.eval_count, used.final_count, used.candidates) == (200, 50, 50, 1)
    assert not used.output.exists()
    with pytest.raises(BadInput, match="--accuracy 1 was not reached in 1600 steps: the best is 0.9950"):
        p1_time.main(replace(settings, accuracy=1.0))


def test_p1s_time_needs_digits(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no data folder nowhere"):
        p1_time.main(p1_time.Settings(Path("nowhere"), device="cpu", record=tmp_path / "record.json"))


def test_p2_round_trip_takes_the_first_pictures_each_way_and_back(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    originals = {f"{number}.png": torch.full((3, 28, 28), 60 + 40 * number, dtype=torch.uint8) for number in range(3)}
    (tmp_path / "pictures").mkdir()
    for name, image in originals.items():
        save_image(tmp_path / "pictures" / name, image)
    record = tmp_path / "record.json"
    options: dict[str, Any] = {"pictures": tmp_path / "pictures", "model": str(digits), "steps": 5, "device": "cpu"}
    p2_round_trip.main(p2_round_trip.Settings(count=2, record=record, **options))
    errors = json.loads(record.read_text())["metrics"]
    assert list(errors) == ["bdia with its pair", "bdia from x_T alone", "plain ddim"]
    assert errors["bdia with its pair"]["MSE, 8 bit"] == [0, 0]
    assert 0 < max(errors["bdia with its pair"]["MSE, float"]) < 1e-4
    for way, rule in WAYS:
        expected, schedule = [], load_network(digits, torch.device("cpu")).schedule
        for image in list(originals.values())[:2]:
            denoise = load_model(str(digits), torch.device("cpu"), torch.float32).denoiser(1)
            grid, x = step_rule(rule, len(schedule), 5), image[None] / 127.5 - 1
            with torch.inference_mode():
                for steps in (grid.backwards(), grid):
                    x = bdia(denoise, x, schedule, steps)[0] if rule == "bdia" else ddim(denoise, x, schedule, steps)
            back = (x.clamp(-1, 1) + 1) * 127.5
            expected.append(float((back - image).square().mean()))
        assert errors[way]["MSE, float"] == pytest.approx(expected, rel=1e-2)
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("bdia with")]
    assert lines[0].split()[4:7] == ["inf", "inf", "2"]


def test_p2_round_trip_needs_as_many_pictures_as_it_counts(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    save_image(tmp_path / "pictures" / "a.png", torch.zeros(3, 28, 28, dtype=torch.uint8))
    with pytest.raises(BadInput, match="holds 1, --count 2 needs more"):
        p2_round_trip.main(
            p2_round_trip.Settings(tmp_path / "pictures", str(digits), count=2, record=tmp_path / "r.json")
        )


def test_p3_clip_counts_the_classifiers_time_against_pairs_only(
    tiny_clip: str, tiny_weights: Path, labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The classifier takes 3 s; batched 6 images in 6 s, alone 2 in 4 s, with all texts 1 in 10 s."""
    (tmp_path / "random.safetensors").symlink_to(tiny_weights)
    (tmp_path / "val").symlink_to(labelled)
    (tmp_path / "id2label.json").write_text(json.dumps(CLASSES))
    monkeypatch.setattr(p3_clip, "MODEL", "tiny-clip")
    monkeypatch.setattr(p3_clip, "timed", scripted(3.0, 6.0, 4.0, 10.0))
    settings = p3_clip.Settings(batched_count=6, image_count=2, pair_count=1, repeats=1, device="cpu")
    assert p3_clip.measure(tmp_path, settings, CPU, "fp32") == {
        "batched, images/s": [1.0],
        "image, images/s": [0.5],
        "pair, images/s": [0.1],
        "classifier, s": [3.0],
        "times faster than one pair at a time": [pytest.approx(10 / 1.5)],
        "times faster than one image at a time": [2.0],
        "pair, same predictions": [1.0],
        "image, same predictions": [1.0],
    }


def test_p3_clips_second_run_is_compared_with_its_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = iter([(8.0, "fp32"), (2.0, "fp32")])
    monkeypatch.setattr(p3_clip, "make_inputs", lambda *_: None)
    monkeypatch.setattr(p3_clip, "whole_run", lambda *_: next(runs))
    monkeypatch.setattr(p3_clip, "measure", lambda *_: {})
    p3_clip.main(p3_clip.Settings(device="cpu", record=tmp_path / "record.json"))
    expected = {"first run, s": [8.0], "cached run, s": [2.0], "second run, times faster": [4.0]}
    assert repeats(tmp_path / "record.json") == expected


def test_inversions_speed_is_the_plain_time_over_ours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    took, clock = {"plain": 6.0, "fp32": 2.0, "fp16": 3.0}, iter([0.0, 20.0, 30.0, 35.0] * 6)
    monkeypatch.setattr(inversion, "write_images", lambda *_: Path("x"))
    monkeypatch.setattr(inversion, "gradient_difference", lambda *_: 1e-5)
    monkeypatch.setattr(inversion, "samples_of", lambda *_: [])
    monkeypatch.setattr(inversion, "plain_step", lambda *_: lambda: "plain")
    monkeypatch.setattr(inversion, "our_step", lambda *arguments: lambda: arguments[3])
    monkeypatch.setattr(inversion, "seconds", lambda step, _, count=1: count * took[step()])
    monkeypatch.setattr(inversion, "time", SimpleNamespace(process_time=lambda: next(clock)))
    settings = inversion.Speed(steps=5, repeats=2, device="cpu", precisions=("fp32",), record=tmp_path / "record.json")
    inversion.compare_speed(settings, Record(settings, CPU))
    same = {"gradient, relative difference": [1e-5], "plain, s per step, fp32": [6.0, 6.0]}
    assert repeats(settings.record) == same | {
        "ours, s per step, fp32": [2.0, 2.0],
        "times faster": [3.0, 3.0],
        "times faster, by processor time": [4.0, 4.0],
    }
    settings = replace(settings, precisions=("fp16", "fp32"))
    inversion.compare_speed(settings, Record(settings, CPU))
    assert repeats(settings.record) == same | {
        "ours, s per step, fp16": [3.0, 3.0],
        "times faster, fp16": [2.0, 2.0],
        "times faster, by processor time, fp16": [4.0, 4.0],
        "ours, s per step, fp32": [2.0, 2.0],
        "times faster, fp32": [3.0, 3.0],
        "times faster, by processor time, fp32": [4.0, 4.0],
    }


def test_shares_of_learned_and_of_initial_words_are_kept_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def outcome(facts: dict[str, Any], *_: Any) -> dict[str, Any]:
        learned = facts["vectors"] / 10 + facts["seed"] / 100
        words = {"learned": learned} | ({"initial": 0.05} if facts["initial"] else {})
        shares = {word: {"strict": share, "scene classifier": share + 0.5} for word, share in words.items()}
        return {"shares": {"object": shares}, "seconds": float(facts["vectors"])}

    monkeypatch.setattr(inversion, "outcome", outcome)
    monkeypatch.setattr(inversion, "weights_fingerprint", lambda _: "w")
    monkeypatch.setattr(inversion, "open_autoencoder", lambda *_: None)
    record = tmp_path / "record.json"
    settings = inversion.Concepts(
        model="model", names=("fish",), seeds=2, more_vectors=(4,), device="cpu", record=record
    )
    inversion.main(settings)
    assert repeats(record) == {
        "object, strict: 1 vector": [0.1, 0.11],
        "object, strict: initial word": [0.05],
        "object, strict: 4 vectors": [0.4],
        "object, scene classifier: 1 vector": [0.6, 0.61],
        "object, scene classifier: initial word": [0.55],
        "object, scene classifier: 4 vectors": [0.9],
        "training of one object, s": [1.0, 1.0, 4.0],
    }


def test_an_ablation_learns_every_object_with_one_change_of_the_recipe_at_a_time() -> None:
    settings = inversion.Concepts(names=("fish", "relief", "cup"), seeds=2, ablation=True)
    trials = inversion.trials_of(settings)
    assert [trial[:3] for trial in trials[:4]] == [
        (name, seed, "the recipe") for name in ("fish", "cup") for seed in (0, 1)
    ]
    recipe = asdict(RECIPE["object"])
    changes = {label: change for _, _, label, change in trials}
    assert len(trials) == 4 * len(changes)
    assert changes.pop("the recipe") == {}
    assert all(len(change) == 1 and not change.items() <= recipe.items() for change in changes.values())
    assert all(change.keys() <= recipe.keys() for change in changes.values())
    with pytest.raises(BadInput, match="--ablation"):
        inversion.measure_concepts(replace(settings, method="plain"), None)  # type: ignore[arg-type]


def test_an_outcome_grades_the_token_and_the_initial_word_and_leaves_out_the_time_of_validation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The images of the token all hold what was asked for and copy one; of those of the initial word one in four does."""
    save_image(tmp_path / "images" / "0.png", torch.full((3, 8, 8), 250, dtype=torch.uint8))

    def sample(requests: Any) -> torch.Tensor:
        right = [1 if "<new>" in request.prompt else index % 4 == 0 for index, request in enumerate(requests)]
        return (torch.tensor(right, dtype=torch.uint8) * 255)[:, None, None, None].expand(-1, 3, 8, 8)

    def verdicts(images: torch.Tensor, answers: Any) -> dict[str, torch.Tensor]:
        assert all(each["kind"] == "fish" for each in answers)
        assert len(answers) == len(images) == 8
        return {"strict": images[:, 0, 0, 0] > 0, "scene classifier": torch.ones(8, dtype=torch.bool)}

    learnt: dict[str, Any] = {}
    monkeypatch.setattr(inversion, "write_images", lambda *_: tmp_path / "images")
    monkeypatch.setattr(
        inversion,
        "learn",
        lambda *_, **flags: learnt.update(flags) or {"timings_s": {"training": 90.0, "validation": 20.0}},
    )
    for name in ("load_pipeline", "install", "read_vectors"):
        monkeypatch.setattr(inversion, name, lambda *_: None)
    monkeypatch.setattr(inversion, "StableDiffusionSampler", lambda *_: SimpleNamespace(sample_images=sample))
    measure: Any = SimpleNamespace(classifier=SimpleNamespace(device="cpu"), verdicts=verdicts)
    facts = {"name": "fish", "vectors": 2, "seed": 3, "steps": 7, "batch": 5, "count": 8, "initial": True}
    facts |= {"method": "ours", "captions": False, "limit": 0, "flip": False, "change": {"flip": False, "vectors": 2}}
    settings = inversion.Concepts(folder=tmp_path, model="model", device="cpu")
    result = inversion.outcome(facts, settings, measure)
    assert learnt == {"model": "model", "device": "cpu", "steps": 7, "batch": 5, "seed": 3, "flip": False}
    assert result["seconds"] == 70.0
    assert set(result["shares"]) == {
        "object",
        "object and colour",
        "object and background",
        "object, colour and background",
        "object, colour, background and style",
    }
    learned, initial = ({"strict": x, "scene classifier": 1.0, "copies": x} for x in (1.0, 0.25))
    assert all(shares == {"learned": learned, "initial": initial} for shares in result["shares"].values())
    assert (tmp_path / "fish-2-3-bare-flip_False" / "images.png").is_file()
    assert json.loads((tmp_path / "fish-2-3-bare-flip_False" / "outcome.json").read_text()) == result


def test_a_copy_is_nearer_to_a_given_image_than_twenty_decibels() -> None:
    """An error of 25 grey levels everywhere is 20.2 dB, one of 26 is 19.8."""
    originals = torch.stack([torch.full((3, 4, 4), level, dtype=torch.uint8) for level in (0, 100)])
    images = torch.stack([torch.full((3, 4, 4), level, dtype=torch.uint8) for level in (25, 26, 125, 126)])
    assert inversion.is_copy(images, originals).tolist() == [True, False, True, False]


def test_the_plain_method_stops_after_its_steps_or_its_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes the batches of the first steps, in order, and keeps the vector that the last one left."""
    from safetensors.torch import load_file

    taken: list[int] = []

    class Plain:
        table = torch.zeros(5, 2)

        def __init__(self, *_: Any) -> None:
            taken.clear()

        def step(self, batch: int) -> None:
            taken.append(batch)
            self.table = torch.full((5, 2), float(len(taken)))

    monkeypatch.setattr(inversion, "Plain", Plain)
    for name in ("load_pipeline", "TextualInversion"):
        monkeypatch.setattr(inversion, name, lambda *_: None)
    monkeypatch.setattr(inversion, "ConceptData", lambda *_: SimpleNamespace(batch=lambda step, *_: step))
    ticks = iter(range(100))
    monkeypatch.setattr(inversion, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    facts = {"seed": 0, "batch": 2, "flip": True, "steps": 3}
    concept = ConceptSet("<new>", tmp_path, "star")
    for limit, steps in ((0, 3), (5, 4)):
        inversion.learn_plainly("m", concept, tmp_path, facts | {"limit": limit}, torch.device("cpu"))
        assert taken == list(range(steps))
        assert load_file(tmp_path / "learned_new.safetensors")["<new>"].tolist() == [[float(steps)] * 2]


@pytest.mark.parametrize("name", ["fish", "ripple"])
def test_a_question_names_the_answers_that_are_right(name: str) -> None:
    for question, (prompts, answers) in inversion.questions_of(name, 12, 5).items():
        assert len(prompts) == 12
        assert answers["style" if name == "ripple" else "kind"] == [name] * 12
        for index, prompt in enumerate(prompts):
            words = prompt.split()
            if "colour" in answers:
                assert answers["colour"][index] in words[: words.index("{}")]
            if "background" in answers:
                assert f"{answers['background'][index]} background" in prompt
            if name == "ripple":
                assert answers["kind"][index] in words
        assert ("colour" in question) == ("colour" in answers)
        assert ("background" in question) == ("background" in answers)


def test_the_baselines_are_the_ordinary_words_over_several_seeds_and_the_grades_the_learned_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from concepts.embeddings import file_of, read_vectors, save_vectors

    calls: list[tuple[str, int]] = []

    def grade(settings: inversion.Graded, vectors: str, seed: int) -> list[dict[str, Any]]:
        calls.append((vectors, seed))
        (image, text) = (90.0, 40.0) if vectors == "learned" else (60.0 + 2 * (seed % 2), 30.0)
        passed = {"key": "fish", "image_score": image, "text_score": text}
        return [{**passed, "passed": True}, {**passed, "image_score": image - 10, "passed": False}]

    pipe = SimpleNamespace(
        text_encoder=SimpleNamespace(get_input_embeddings=lambda: SimpleNamespace(weight=torch.eye(4))),
        tokenizer=lambda word, add_special_tokens: SimpleNamespace(input_ids=[{"house": 2}[word]]),
    )
    monkeypatch.setattr(inversion, "grade", grade)
    monkeypatch.setattr(inversion, "load_pipeline", lambda *_: pipe)
    monkeypatch.setattr(inversion, "write_images", lambda *_: None)
    learned = torch.tensor([[0.5, 0.25, 0.0, 1.0]])
    save_vectors(file_of(tmp_path / "concepts" / "fish-1-3", "<new>"), "<new>", learned, "here")
    places: dict[str, Path] = {
        "concepts": tmp_path / "concepts",
        "folder": tmp_path / "out",
        "record": tmp_path / "r.json",
    }
    inversion.main(
        inversion.Graded(model="model", names=("fish",), repeats=2, seed=3, device="cpu", **cast_any(places))
    )
    assert calls == [("ordinary", 4), ("ordinary", 5), ("learned", 3)]
    assert repeats(tmp_path / "r.json") == {"share of cases passed": [1.0, 0.0]}
    entry = json.loads((tmp_path / "out" / "input.json").read_text())["fish"]
    deviation = 2 * 2**0.5  # of 60 and 62, twice
    assert entry["baseline"] == [
        [pytest.approx(61 + deviation, abs=0.01), 30.0],
        [pytest.approx(51 + deviation, abs=0.01), 30.0],
    ]
    for folder, row in (("learned", learned[0]), ("ordinary", torch.eye(4)[2])):
        assert torch.equal(read_vectors(file_of(tmp_path / "out" / folder, "<fish>"))["<fish>"][0], row)


def cast_any(value: Any) -> Any:
    return value


def test_levels_of_composition_are_timed_over_a_plain_image(monkeypatch: pytest.MonkeyPatch) -> None:
    took = {"plain": 2.0, "joint": 3.0, "regional": 5.0, "conductor": 14.0}
    memory = {"plain": 1.0, "joint": 2.0, "regional": 3.0, "conductor": 4.0}
    last = ["plain"]

    def compose(sampler: Any, requests: Any, level: str, config: Any) -> str:
        last[0] = level
        return level

    def plain(requests: Any) -> str:
        last[0] = "plain"
        return "plain"

    monkeypatch.setattr(p3_composition, "compose", compose)
    monkeypatch.setattr(p3_composition, "seconds", lambda way, _: took[way()])
    monkeypatch.setattr(p3_composition, "peak_memory", lambda _, reset=False: 0.0 if reset else memory[last[0]])
    settings = replace(p3_composition.Settings(), levels=("joint", "regional", "conductor"), repeats=2)
    sampler: Any = SimpleNamespace(sample_images=plain, device=torch.device("cpu"))
    layout: Any = SimpleNamespace(joint="a prompt")
    results = p3_composition.times(settings, sampler, layout)
    assert {name: values for name, values in results.items() if name.endswith(", s")} == {
        f"{way}, s": [time, time] for way, time in took.items()
    }
    assert [results[f"{level}, s over plain"] for level in ("joint", "regional", "conductor")] == [
        [1.5, 1.5], [2.5, 2.5], [7.0, 7.0]
    ]  # fmt: skip
    assert {name: results[f"{name}, GB"] for name in memory} == {name: [peak] for name, peak in memory.items()}


@pytest.mark.parametrize(
    ("inside", "whole", "leaked", "right", "leak"),
    [
        ((True, True), True, (False, False), True, False),
        ((True, False), True, (False, True), False, True),
        ((True, True), False, (True, False), False, True),
    ],
)
def test_a_composition_is_right_if_every_box_and_the_whole_are_and_leaks_if_any_box_does(
    inside: tuple[bool, bool], whole: bool, leaked: tuple[bool, bool], right: bool, leak: bool
) -> None:
    boxes = {(0.0, 0.0, 32.0, 64.0): 0, (32.0, 0.0, 64.0, 64.0): 1}

    def about(answers: tuple[bool, bool]) -> Callable[..., torch.Tensor]:
        def answer(image: Any, box: torch.Tensor, kinds: list[str], colours: list[str] | None) -> torch.Tensor:
            index = boxes[tuple(box[0].tolist())]
            assert (kinds, colours) == ((["fish"], None), (["cup"], ["red"]))[index]
            return torch.tensor([answers[index]])

        return answer

    def agrees(image: Any, **expected: Any) -> torch.Tensor:
        assert expected == {"style": ["ripple"]}
        return torch.tensor([whole])

    classifier: Any = SimpleNamespace(inside=about(inside), leaked=about(leaked), agrees=agrees)
    case: Any = SimpleNamespace(
        boxes=[(0, 0, 0.5, 1), (0.5, 0, 1, 1)], kinds=["fish", "cup"], colours=[None, "red"], whole={"style": "ripple"}
    )
    assert p3_strict.is_right(classifier, case, torch.zeros(1, 3, 64, 64)) is right
    assert p3_strict.leaks(classifier, case, torch.zeros(1, 3, 64, 64)) is leak
