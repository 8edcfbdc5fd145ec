"""Shared fixtures: a tiny data set in the homework's layout, small random models, and a full disk."""

from __future__ import annotations

import json
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_digits import TINY, write_images
from tqdm import tqdm

from benchmarks.plain_p2 import well_conditioned_weights
from diffusion.schedule import cosine
from P1_model import Network, UNet


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_logstart(nodeid: str) -> None:
    """Label the lines that `coverage` measures, when it does, with the test that runs (benchmarks/mutants.py)."""
    if (coverage := sys.modules.get("coverage")) and (measured := coverage.Coverage.current()):
        measured.switch_context(nodeid)


@pytest.fixture(autouse=True, scope="session")
def interruptible() -> None:
    """Let Ctrl-C reach the scripts that tests start, where a shell's background job ignores it and passes that on."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(
        1
    )  # tensors this small gain nothing from threads, which wait for each other on a busy machine


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Reset accelerate, which keeps its first precision for the life of a process."""
    yield
    if (state := sys.modules.get("accelerate.state")) and state.AcceleratorState._shared_state:
        state.AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture(autouse=True)
def bars_end_full(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let a progress bar that is not interrupted end at its total, in every test."""

    end: Any = tqdm.__exit__

    def ended(bar: Any, kind: type[BaseException] | None, *rest: Any) -> None:
        shown = not bar.disable
        end(bar, kind, *rest)
        assert kind or not shown or bar.n == bar.total, f"{bar.desc}: {bar.n} of {bar.total}"

    monkeypatch.setattr(tqdm, "__exit__", ended)


@pytest.fixture
def digits_folder(tmp_path: Path) -> Path:
    """Write both domains with train.csv (40 mnistm, 20 svhn) and val.csv (4 each); every digit is present."""
    root = tmp_path / "digits"
    for domain, (name, count) in enumerate({"mnistm": 40, "svhn": 20}.items()):
        train = [f"{index:05d}.png" for index in range(count)]
        val = [f"{index:05d}.png" for index in range(count, count + 4)]
        write_images(root / name, "train.csv", train, [index % 10 for index in range(count)], seed=domain)
        write_images(root / name, "val.csv", val, [3, 1, 4, 1], seed=10 + domain)
    return root


@pytest.fixture
def tiny_network() -> Network:
    """Return a small P1 network whose weights are all random, the zero-initialised ones too; cosine, v, T = 20."""
    torch.manual_seed(0)
    unet = UNet(TINY).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.05)
    sampler = {"name": "ddim", "steps": 5}
    return Network(unet, cosine(TINY.timesteps), "cosine", sampler, {"preset": "tiny", "step": 7})


@pytest.fixture
def distilled_network(tiny_network: Network) -> Network:
    """Return that network with the guidance scale, 1 .. 5, as an input that moves its output."""
    unet = UNet(replace(TINY, max_guidance=5.0)).eval().requires_grad_(False)
    unet.load_state_dict(tiny_network.unet.state_dict(), strict=False)
    assert unet.guidance
    for parameter in unet.guidance.perceptron.parameters():
        torch.nn.init.normal_(parameter)
    return replace(tiny_network, unet=unet)


@pytest.fixture
def few_step_network(distilled_network: Network) -> Network:
    """Return the distilled network with the number of steps, 2 or 4, as another input that moves its output."""
    unet = UNet(replace(TINY, max_guidance=5.0, distilled_steps=(4, 2))).eval().requires_grad_(False)
    unet.load_state_dict(distilled_network.unet.state_dict(), strict=False)
    assert unet.steps
    for parameter in unet.steps.perceptron.parameters():
        torch.nn.init.normal_(parameter)
    return replace(distilled_network, unet=unet, sampler={"name": "distilled", "steps": 4, "guidance": 2.0})


@pytest.fixture(scope="session")
def course_unet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Write a UNet.pt of full size in the course's layout: random weights that stay stable over 50 steps."""
    path = tmp_path_factory.mktemp("face") / "UNet.pt"
    torch.save(well_conditioned_weights(seed=0), path)
    yield path
    path.unlink()  # 455 MB


@pytest.fixture
def full_disk() -> Callable[[int], AbstractContextManager[None]]:
    """Return a context, `with full_disk(n):`, in which the kernel lets no file grow beyond n bytes."""
    resource = pytest.importorskip("resource", reason="file size limits need Unix")

    @contextmanager
    def limited(size: int) -> Iterator[None]:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))  # Python ignores SIGXFSZ: the write fails with EFBIG
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def tiny_clip(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Save a small random CLIP and register "tiny-clip" (GELU) and "tiny-clip-quickgelu" in open_clip; return the model's name."""
    import open_clip  # slow to import, and few tests need it
    import small_clip

    folder = tmp_path_factory.mktemp("clip")
    small_clip.save_model(folder / "tiny", seed=0)
    (folder / "archs").mkdir()
    for name, extra in (("tiny-clip", {}), ("tiny-clip-quickgelu", {"quick_gelu": True})):
        (folder / "archs" / f"{name}.json").write_text(json.dumps(small_clip.CONFIG | extra))
    open_clip.add_model_config(folder / "archs")
    return f"local-dir:{folder / 'tiny'}"


@pytest.fixture(scope="session")
def tiny_weights(tiny_clip: str) -> Path:
    """Return the weights file of that model."""
    return Path(tiny_clip.removeprefix("local-dir:")) / "open_clip_model.safetensors"


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write 30 images of 6 classes, numbered 7 to 11, and id2label.json next to their folder."""
    from small_clip import NAMES

    root = tmp_path_factory.mktemp("data")
    (root / "val").mkdir()
    random = np.random.default_rng(0)
    for number in range(len(NAMES)):
        for index in (7, 8, 9, 10, 11):
            pixels = random.integers(0, 256, 3) * 0.5 + random.integers(0, 256, (8, 8, 3)) * 0.5
            image = Image.fromarray(pixels.astype(np.uint8)).resize((32, 32), Image.Resampling.NEAREST)
            image.save(root / "val" / f"{number}_{index}.png")
    (root / "id2label.json").write_text(json.dumps({str(k): v for k, v in enumerate(NAMES)}))
    return root / "val"
