"""Two processes started by torchrun share the images of a run and write the same bytes as one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from small_pipeline import save_clip, save_pipeline

from P1_model import Network, save_network
from runtime.distributed import Shard
from runtime.files import ROOT, load_safetensors
from runtime.images import save_image

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def both_ways(folder: Path, script: str, *flags: str) -> list[Path]:
    """Run a script as one process and as two; return the two folders with their files."""
    processes = []
    for name, start in (("one", ()), ("two", TORCHRUN)):
        (folder / name).mkdir()
        command = [sys.executable, *start, str(ROOT / script), *flags, "--device", "cpu"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        processes.append(
            subprocess.Popen(command, cwd=folder / name, stderr=subprocess.PIPE, text=True, env=environment)
        )
    for process in processes:
        _, errors = process.communicate(timeout=600)
        assert process.returncode == 0, errors[-3000:]
    return [folder / "one", folder / "two"]


def images(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.png"))}


def metrics(file: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(file.read_text())["metrics"]
    return values


@pytest.fixture
def digits(tiny_network: Network, tmp_path: Path) -> Path:
    save_network(tmp_path / "p1.safetensors", tiny_network)
    return tmp_path / "p1.safetensors"


@pytest.mark.slow
def test_digits_with_retries(digits: Path, tmp_path: Path) -> None:
    """A random network is misread nearly always, so that both processes redraw most images."""
    flags = ("--checkpoint", str(digits), "--count", "2", "--batch", "8", "--retries", "2", "--precision", "fp32")
    one, two = both_ways(
        tmp_path, "P1_inference.py", *flags, "--output", "out", "--record", "record.json", "--grid", "g.png"
    )
    assert len(images(one)) == 41
    assert images(one) == images(two)
    alone, shared = metrics(one / "record.json"), metrics(two / "record.json")
    assert (alone["processes"], alone["shares"]) == (1, [40])
    assert (shared["processes"], shared["shares"]) == (2, [24, 16])
    assert alone["misread"] == shared["misread"]


@pytest.mark.slow
def test_ddim_with_a_noise_stream_for_each_image(digits: Path, tmp_path: Path) -> None:
    flags = ("--model", str(digits), "--seeds", "0-4", "--batch", "2", "--steps", "4", "--eta", "1", "--output", "out")
    one, two = both_ways(tmp_path, "P2_ddim.py", *flags, "--record", "record.json", "--save-noise", "noise")
    assert len(images(one)) == 5
    assert images(one) == images(two)
    assert metrics(two / "record.json")["processes"] == 2
    assert metrics(two / "record.json")["shares"] == [3, 2]
    assert len(list((two / "noise").iterdir())) == 5


@pytest.mark.slow
def test_inversion_of_pictures(digits: Path, tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(5):
        save_image(tmp_path / "photos" / f"{number}.png", torch.full((3, 28, 28), 50 * number, dtype=torch.uint8))
    flags = ("--model", str(digits), "--invert", str(tmp_path / "photos"), "--batch", "2", "--steps", "4")
    one, two = both_ways(tmp_path, "P2_ddim.py", *flags, "--output", "noise", "--record", "record.json")
    names = sorted(path.name for path in (one / "noise").iterdir())
    assert len(names) == 10
    for name in names:
        alone, shared = (torch.load(folder / "noise" / name) if name.endswith(".pt") else
                         load_safetensors(folder / "noise" / name)[0]["x_next"] for folder in (one, two))  # fmt: skip
        assert torch.equal(alone, shared)
    assert list(metrics(two / "record.json")["length"]) == [str(number) for number in range(5)]
    assert metrics(two / "record.json")["processes"] == 2


@pytest.mark.slow
def test_zero_shot_features_and_predictions(tiny_clip: str, labelled: Path, tmp_path: Path) -> None:
    flags = ("--model", tiny_clip, "--images", str(labelled), "--batch", "4", "--precision", "fp32", "--output", "out")
    one, two = both_ways(
        tmp_path, "P3_clip_zeroshot.py", *flags, "--features", "features.safetensors", "--cache", "cache"
    )
    for name in ("out/predictions.csv", "out/per_class.csv", "out/cases.png", "out/confusion.png"):
        assert (one / name).read_bytes() == (two / name).read_bytes(), name
    alone, shared = (load_safetensors(folder / "features.safetensors")[0] for folder in (one, two))
    assert alone.keys() == shared.keys()
    assert all(torch.equal(alone[key], shared[key]) for key in alone)
    assert metrics(two / "out" / "record.json")["processes"] == 2


@pytest.mark.slow
@pytest.mark.parametrize(("more", "shares"), [((), [6, 4]), (("--candidates", "6"), [6, 6])])
def test_prompts_of_stable_diffusion(more: tuple[str, ...], shares: list[int], tmp_path: Path) -> None:
    """Images are shared in batches of 3, 3, 3 and 1, candidates by whole prompts."""
    model = str(save_pipeline(tmp_path / "model"))
    flags = ["--model", model, "--prompt", "a star", "a ring", "--count", "5", "--steps", "2", "--batch", "3"]
    flags += ["--output", "out", "--precision", "fp32", "--record", "record.json", *more]
    if more:
        flags += ["--clip", str(save_clip(tmp_path / "clip"))]
    one, two = both_ways(tmp_path, "P3_inference.py", *flags)
    assert len(images(one)) == 10
    assert images(one) == images(two)
    assert metrics(two / "record.json")["processes"] == 2
    assert metrics(two / "record.json")["shares"] == shares


@pytest.mark.parametrize(("count", "batch", "world"), [(10, 4, 2), (7, 3, 3), (4, 8, 2), (1000, 100, 4), (5, 1, 3)])
def test_every_row_belongs_to_one_process_in_whole_batches(count: int, batch: int, world: int) -> None:
    shares = [Shard(rank, world).rows(count, batch) for rank in range(world)]
    assert sorted(row for share in shares for row in share) == list(range(count))
    for share in shares:
        parts = [share[start : start + batch] for start in range(0, len(share), batch)]
        assert all(part == list(range(part[0], min(part[0] + batch, count))) and part[0] % batch == 0 for part in parts)


@pytest.mark.parametrize(("world", "batch"), [(1, 10), (2, 5), (3, 4), (5, 2), (20, 1)])
def test_batches_shrink_so_that_every_process_has_work(world: int, batch: int) -> None:
    shard = Shard(0, world)
    assert shard.largest(10, 100) == batch
    assert all(Shard(rank, world).rows(10, batch) for rank in range(min(world, 10)))
    assert shard.largest(10_000, 100) == 100
