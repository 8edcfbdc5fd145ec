"""P1 on images of one's own: a folder per class, one domain or several, grey or RGB, from the data folder to files and figures."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_digits import TINY, write_classes, write_images
from torch import Tensor, nn

import P1_classifier
import P1_inference
import P1_report
import P1_training
from diffusion.schedule import make_schedule
from digits.classifier import ClassifierConfig, load_classifier, make_resnet
from digits.sampling import DigitRequest, DigitSamplerConfig, sample
from faces.models import Labels, load_model
from P1_dataloader import BalancedIndex, Digits, describe_data, load_digits
from P1_model import HOMEWORK, PRESETS, DataSpec, Network, UNet, load_network, save_network
from P1_training import validation_loss
from runtime.cli import BadInput, run_script
from runtime.seeds import derived_seed

CPU = torch.device("cpu")
GREY = DataSpec(("cat", "dog", "owl"), ("images",), 1, 32)
RGB = DataSpec(("cat", "dog", "owl"), ("day", "night"), 3, 24)
COUNTS = {"owl": 8, "cat": 20, "dog": 6}


def write_data(root: Path, spec: DataSpec) -> Path:
    """Write class folders: one grey domain in `root` itself, or a folder per domain."""
    for seed, domain in enumerate(spec.domains):
        folder = root if len(spec.domains) == 1 else root / domain
        write_classes(folder, COUNTS, spec.size, "L" if spec.channels == 1 else "RGB", seed)
    return root


@pytest.fixture(params=[GREY, RGB], ids=["grey", "RGB, two domains"])
def spec(request: pytest.FixtureRequest) -> DataSpec:
    chosen: DataSpec = request.param
    return chosen


@pytest.fixture
def data(spec: DataSpec, tmp_path: Path) -> Path:
    return write_data(tmp_path / "data", spec)


@pytest.fixture(autouse=True)
def tiny_preset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PRESETS, "tiny", TINY)


def train(data: Path, output: Path, **more: Any) -> dict[str, Any]:
    """Train a few steps of the tiny network; return the record."""
    flags: dict[str, Any] = {
        "preset": "tiny", "device": "cpu", "precision": "fp32", "compile": "off", "steps": 4, "batch": 8, "warmup": 1,
        "eval_every": 2, "eval_count": 2, "final_count": 2,
    }  # fmt: skip
    P1_training.main(P1_training.Settings(**{"data": data, "output": output, **flags, **more}))
    record: dict[str, Any] = json.loads((output / "record.json").read_text())
    return record


def draw(output: Path, **more: Any) -> dict[str, Any]:
    """Sample two images per class and domain; return the record."""
    record = output.parent / "record.json"
    flags: dict[str, Any] = {"output": output, "count": 2, "steps": 2, "record": record, "device": "cpu"}
    P1_inference.main(P1_inference.Settings(**{**flags, **more}))
    values: dict[str, Any] = json.loads(record.read_text())
    return values


def random_network(spec: DataSpec, **more: Any) -> Network:
    """Return a tiny network with random weights, the zero-initialised ones too."""
    torch.manual_seed(0)
    unet = UNet(replace(TINY, spec=spec, **more)).eval().requires_grad_(False)
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return Network(unet, make_schedule("cosine", TINY.timesteps, "v"), "cosine", {"name": "ddim", "steps": 5}, {})


def train_classifiers(data: Path, spec: DataSpec, output: Path) -> list[str]:
    """Train a classifier per domain; return their files."""
    for domain in spec.domains:
        settings = P1_classifier.Train(domain, data, output / domain, epochs=20, recolour=0.0, batch=16, device="cpu")
        P1_classifier.train(replace(settings, precision="fp32"))
    return [str(output / domain / "classifier.safetensors") for domain in spec.domains]


# ---------------------------------------------------------------- the data folder


def test_a_folder_is_described_by_what_lies_in_it(data: Path, spec: DataSpec) -> None:
    (data / ".DS_Store").write_text("")
    assert describe_data(data) == spec


def test_labels_are_the_places_of_class_and_domain_and_a_share_is_held_out(data: Path, spec: DataSpec) -> None:
    train, val = (load_digits(data, split) for split in ("train", "val"))
    assert (train.spec, val.spec) == (spec, spec)
    assert (len(train), len(val)) == (32 * len(spec.domains), 2 * len(spec.domains))  # 5 % of 34
    assert train.images.shape[1:] == spec.shape
    both = torch.cat([train.domains, val.domains]) * 3 + torch.cat([train.digits, val.digits])
    assert both.bincount().tolist() == [20, 6, 8] * len(spec.domains)
    greys = train.images.float().mean((1, 2, 3))
    assert torch.equal(((greys - 20) / 100).round().long(), train.digits)  # from dark to bright
    assert torch.equal(load_digits(data, "train").images, train.images)  # from the cache
    for number, domain in enumerate(spec.domains):
        folder = data if len(spec.domains) == 1 else data / domain
        files = [np.asarray(Image.open(path)) for path in folder.glob("*/*.png")]
        mine = [*train.images[train.domains == number], *val.images[val.domains == number]]
        assert {image.permute(1, 2, 0).numpy().tobytes() for image in mine} == {file.tobytes() for file in files}


def test_the_homeworks_layout_may_hold_other_domains_and_labels(tmp_path: Path) -> None:
    for name in ("paper", "cloth"):
        write_images(tmp_path / name, "train.csv", ["a.png", "b.png"], ["up", "down"], seed=0)
        write_images(tmp_path / name, "val.csv", ["c.png"], ["up"], seed=1)
    assert describe_data(tmp_path) == DataSpec(("down", "up"), ("cloth", "paper"))
    digits = load_digits(tmp_path, "train")
    assert (digits.digits.tolist(), digits.domains.tolist()) == ([1, 0, 1, 0], [0, 0, 1, 1])
    assert load_digits(tmp_path, "val").digits.tolist() == [1, 1]
    alone = load_digits(tmp_path / "cloth", "train")
    assert alone.spec == DataSpec(("down", "up"), ("images",))
    assert torch.equal(alone.images, digits.images[:2])


def test_the_homeworks_data_stay_the_homeworks(digits_folder: Path) -> None:
    (digits_folder / "notes").mkdir()
    assert describe_data(digits_folder) == HOMEWORK == load_digits(digits_folder, "train").spec
    shutil.rmtree(digits_folder / "mnistm")
    assert describe_data(digits_folder) == HOMEWORK


def test_class_folders_called_svhn_are_a_domain_of_ones_own(tmp_path: Path) -> None:
    write_classes(tmp_path / "svhn", {"0": 5, "1": 5}, size=16)
    assert describe_data(tmp_path) == DataSpec(("0", "1"), ("svhn",), 1, 16)


@pytest.mark.parametrize("mode", ["L", "1", "LA", "I;16"])
def test_grey_images_of_any_mode_have_one_channel(mode: str, tmp_path: Path) -> None:
    write_classes(tmp_path, {"a": 20, "b": 20})
    image = Image.fromarray(np.full((32, 32), 257 * 90, np.uint16)) if mode == "I;16" else Image.new("L", (32, 32), 90)
    (image if mode == "I;16" else image.convert(mode)).save(tmp_path / "a" / "000.png")
    assert load_digits(tmp_path, "train").images.shape[1:] == (1, 32, 32)


def test_domains_and_their_classes_are_sampled_equally_often() -> None:
    rows = [(d, c) for d in range(3) for c in range(2) for _ in range(1 + 10 * c + 40 * d)]
    domains, digits = torch.tensor(rows).T
    spec = DataSpec(("cat", "dog"), ("day", "dusk", "night"))
    data = Digits(torch.zeros(len(rows), 1, dtype=torch.uint8), digits, domains, spec)
    uniform = torch.rand(2, 60_000, generator=torch.Generator().manual_seed(0))

    def shares(share: float | None, balance: bool) -> list[float]:
        picked = BalancedIndex(data, share, balance)(*uniform)
        return (torch.bincount(domains[picked] * 2 + digits[picked], minlength=6) / 60_000).tolist()

    counts = torch.tensor([1.0, 11, 41, 51, 81, 91])
    assert shares(0.5, True) == pytest.approx([1 / 6] * 6, abs=0.01)
    assert shares(None, False) == pytest.approx((counts / counts.sum()).tolist(), abs=0.01)


# ---------------------------------------------------------------- from the folder to images


def test_a_training_ends_in_a_checkpoint_whose_images_have_class_names_and_the_datas_shape(
    data: Path, spec: DataSpec, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = train(data, tmp_path / "run")
    assert [entry["step"] for entry in record["metrics"]["history"]] == [2, 4]
    assert record["metrics"]["val_loss"] > 0
    best = tmp_path / "run" / "best.safetensors"
    assert load_network(best, CPU).spec == spec
    assert f"python P1_inference.py --model {best}" in capsys.readouterr().err

    metrics = draw(tmp_path / "out", model=best, grid=tmp_path / "grid.png")["metrics"]
    files = {str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")}
    assert files == {f"{domain}/{name}_00{k}.png" for domain in spec.domains for name in spec.classes for k in (1, 2)}
    for name in files:
        with Image.open(tmp_path / "out" / name) as image:
            assert (image.size, image.mode) == ((spec.size, spec.size), "L" if spec.channels == 1 else "RGB")
    assert metrics["misread"] is None
    assert Image.open(tmp_path / "grid.png").size == (
        2 + 2 * (2 * spec.size + 2),
        2 + len(files) // 2 * (2 * spec.size + 2),
    )
    assert Image.open(tmp_path / "run" / "best.png").height == 2 + 3 * (2 * spec.size + 2)  # a row per class

    draw(tmp_path / "some", model=best, digits=("owl",), domains=spec.domains[-1:])
    assert {path.name for path in (tmp_path / "some" / spec.domains[-1]).iterdir()} == {"owl_001.png", "owl_002.png"}


@pytest.mark.parametrize("conditioning", ["embedding", "onehot"])
def test_an_image_is_that_of_its_class_and_domain_guided_from_the_domain_without_class(
    spec: DataSpec, conditioning: Any
) -> None:
    network, config = random_network(spec, conditioning=conditioning), DigitSamplerConfig("ddim", 1, guidance=2.0)
    last = len(spec.domains) - 1
    x = torch.randn(1, *spec.shape, generator=torch.Generator().manual_seed(9))
    t, domain = torch.tensor([19]), torch.tensor([last])
    cond, uncond = (network.unet(x, t, torch.tensor([label]), domain) for label in (2, 3))
    alpha_bar = float(network.schedule.alpha_bar[19])
    v = uncond + 2 * (cond - uncond)
    expected = (alpha_bar**0.5 * x - (1 - alpha_bar) ** 0.5 * v).clamp(-1, 1)
    torch.testing.assert_close(sample(network, [DigitRequest(2, last, 9)], config), expected, rtol=0, atol=1e-4)
    assert float((cond - uncond).abs().max()) > 1e-4


def test_dropped_labels_are_the_null_labels(data: Path, spec: DataSpec, tmp_path: Path) -> None:
    labels: list[list[Tensor]] = []
    hook = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: labels.append(inputs[2:]) if isinstance(module, UNet) and module.training else None
    )
    try:
        train(data, tmp_path / "none", drop_digit=1.0, drop_domain=1.0, steps=1)
        train(data, tmp_path / "all", drop_digit=0.0, drop_domain=0.0, steps=1, batch=64)
    finally:
        hook.remove()
    (no_class, no_domain), (classes, domains) = labels
    assert (set(no_class.tolist()), set(no_domain.tolist())) == ({3}, {len(spec.domains)})
    assert (set(classes.tolist()), set(domains.tolist())) == ({0, 1, 2}, {*range(len(spec.domains))})


def test_figures_have_a_row_per_class_and_a_file_per_domain(spec: DataSpec, tmp_path: Path) -> None:
    save_network(tmp_path / "n.safetensors", random_network(spec))
    P1_report.main(P1_report.Settings(tmp_path / "figures", tmp_path / "n.safetensors", device="cpu"))
    names = {path.name for path in (tmp_path / "figures").glob("*.png")}
    with Image.open(tmp_path / "figures" / "denoising.webp") as film:
        assert film.size == (2 + 3 * (3 * spec.size + 2), 2 + len(spec.domains) * (3 * spec.size + 2))
    effects = json.loads((tmp_path / "figures" / "record.json").read_text())["metrics"]["diagnose"]
    assert set(effects) == {*spec.domains}
    assert ("another domain" in effects[spec.domains[0]]) == (len(spec.domains) == 2)
    assert min(effects[spec.domains[0]]["another digit"]) > 0
    assert names == {"reverse_process.png", "label_effects.png", *(f"grid_{domain}.png" for domain in spec.domains)}


def test_p2_samples_such_a_checkpoint_too(spec: DataSpec, tmp_path: Path) -> None:
    network, path = random_network(spec), tmp_path / "n.safetensors"
    save_network(path, network)
    x, t, last = torch.randn(1, *spec.shape), torch.tensor([7]), len(spec.domains) - 1
    model = load_model(str(path), CPU, torch.float32, Labels(2, spec.domains[last], 2.0))
    cond, uncond = (network.unet(x, t, torch.tensor([label]), torch.tensor([last])) for label in (2, 3))
    torch.testing.assert_close(model.denoiser(1)(x, 7), 2 * cond - uncond, rtol=1e-4, atol=1e-5)
    free = load_model(str(path), CPU, torch.float32, Labels())
    nothing = network.unet(x, t, torch.tensor([3]), torch.tensor([len(spec.domains)]))
    torch.testing.assert_close(free.denoiser(1)(x, 7), nothing)
    assert model.shape == spec.shape
    for labels, message in (
        (Labels(3), r"--digit 3: must be 0\.\.2"),
        (Labels(0, "svhn"), "--domain svhn: must be any or"),
    ):
        with pytest.raises(BadInput, match=message):
            load_model(str(path), CPU, torch.float32, labels)


# ---------------------------------------------------------------- without classifiers: the validation loss


def plain_validation_loss(network: Network, data: Digits, count: int, seed: int, gamma: float) -> float:
    """Return the mean loss over 8 noises of each image, in batches of 500."""
    total = 8 * count * len(data.spec.classes) * len(data.spec.domains)
    errors = []
    for start in range(0, total, 500):
        size = min(500, total - start)
        stream = torch.Generator().manual_seed(derived_seed(seed, start))
        group, member, offset = (torch.rand(size, generator=stream) for _ in range(3))
        rows, t = BalancedIndex(data, 0.5, True)(group, member), ((torch.arange(size) + offset) / size * 20).long()
        eps = torch.randn(size, *data.spec.shape, generator=stream)
        alpha_bar = network.schedule.alpha_bar[t].float()[:, None, None, None]
        x0, signal, noise = data.images[rows] / 127.5 - 1, alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        output = network.unet(signal * x0 + noise * eps, t, data.digits[rows], data.domains[rows])
        snr = alpha_bar / (1 - alpha_bar)
        weight = snr.clamp(max=gamma) / (snr + 1) if gamma else 1
        errors.append((output - (signal * eps - noise * x0)).square() * weight)
    return float(torch.cat(errors).mean())


@pytest.mark.parametrize("gamma", [0.0, 0.5])
def test_the_validation_loss_is_the_trainings_loss_with_all_labels(
    gamma: float, data: Path, spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With more draws than a batch of it holds."""
    losses: list[tuple[float, float]] = []

    def compare(network: Network, count: int, seed: int, data: Digits, weight: Any, teacher: Any) -> float:
        value = validation_loss(network, count, seed, data, weight, teacher)
        losses.append(
            (value, plain_validation_loss(network, load_digits(tmp_path / "data", "val"), count, seed, gamma))
        )
        return value

    monkeypatch.setattr(P1_training, "validation_loss", compare)
    metrics = train(data, tmp_path / "run", min_snr=gamma, eval_count=3, final_count=25)["metrics"]
    assert [value for value, _ in losses] == pytest.approx([expected for _, expected in losses], rel=1e-4)
    assert [entry["val_loss"] for entry in metrics["history"]] == [value for value, _ in losses[:2]]
    assert metrics["val_loss"] == min(value for value, _ in losses[2:])


# ---------------------------------------------------------------- classifiers of one's own


def test_classifiers_of_ones_own_grade_the_training_the_images_and_the_sweep(
    data: Path, spec: DataSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    files = train_classifiers(data, spec, tmp_path / "classifiers")
    train_images = load_digits(data, "train")
    for domain, file in enumerate(files):
        mine = train_images.domains == domain
        answers = load_classifier(Path(file), CPU).read(train_images.images[mine])
        assert float((answers == train_images.digits[mine]).float().mean()) > 0.9
    assert f"grade out --classifiers {files[0]}" in capsys.readouterr().err

    metrics = train(data, tmp_path / "run", classifiers=tuple(files))["metrics"]
    scores = [metrics[domain] for domain in spec.domains]
    assert metrics["accuracy"] == pytest.approx(sum(scores) / len(scores))
    assert set(metrics["history"][0]) == {"step", "seconds", "accuracy", *spec.domains}

    best = tmp_path / "run" / "best.safetensors"
    drawing = draw(tmp_path / "out", model=best, classifiers=tuple(files), retries=1)["metrics"]
    first = drawing["misread"]["first_try"]
    assert set(first) == {*spec.domains}
    assert 0 < sum(first.values()) <= 6 * len(spec.domains)

    report = P1_report.Settings(tmp_path / "figures", best, ("sweep",), (1.0,), 2, tuple(files), device="cpu")
    P1_report.main(report)
    row = json.loads((tmp_path / "figures" / "record.json").read_text())["metrics"]["sweep"][0]
    assert {f"{domain}_accuracy" for domain in spec.domains} < set(row)

    code, error = command(
        monkeypatch,
        capsys,
        P1_classifier,
        "grade",
        tmp_path / "out",
        "--classifiers",
        *files,
        "--record",
        tmp_path / "r.json",
    )
    assert code == 0, error
    result = json.loads((tmp_path / "r.json").read_text())["metrics"]
    left = drawing["misread"]["after_retries"]
    for name in spec.domains:
        assert result[name]["accuracy"] == pytest.approx(1 - left[name] / 6)
        assert np.array(result[name]["confusion"]).sum(1).tolist() == [2, 2, 2]


def test_the_homeworks_files_are_written_as_earlier_versions_read_them(tmp_path: Path) -> None:
    for spec in (HOMEWORK, GREY):
        save_network(tmp_path / "n.safetensors", random_network(spec))
        content = (tmp_path / "n.safetensors").read_bytes()
        header = json.loads(
            json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]["network"]
        )
        assert ("spec" in header["model"]) == (spec != HOMEWORK)
        assert load_network(tmp_path / "n.safetensors", CPU).spec == spec


def test_a_classifier_of_grey_images_has_one_channel_and_an_output_per_class() -> None:
    network = make_resnet(ClassifierConfig(spec=GREY))
    assert network(torch.zeros(2, 1, 32, 32)).shape == (2, 3)


# ---------------------------------------------------------------- bad input


def command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], script: Any, *arguments: object
) -> tuple[int, str]:
    """Run a script with these arguments; return its exit code and the last line of stderr."""
    monkeypatch.setattr("sys.argv", ["script.py", *map(str, arguments)])
    settings: Any = {P1_training: P1_training.Settings, P1_inference: P1_inference.Settings}.get(
        script, P1_classifier.Train | P1_classifier.Grade
    )
    capsys.readouterr()
    with pytest.raises(SystemExit) as leaving:
        run_script(script.main, settings, None)
    return int(leaving.value.code or 0), (capsys.readouterr().err.splitlines() or [""])[-1]


def write(root: Path, spec: DataSpec) -> Path:
    """Write other data in the place of those in `root`."""
    shutil.rmtree(root)
    return write_data(root, spec)


def draw_over(path: Path, width: int, height: int, mode: str = "L") -> None:
    Image.new(mode, (width, height)).save(path)


def keep(folder: Path, count: int) -> None:
    """Delete all but `count` images."""
    for path in sorted(folder.iterdir())[count:]:
        path.unlink()


def one_each(root: Path) -> None:
    for name in GREY.classes:
        keep(root / name, 1)


def empty(root: Path) -> None:
    for name in GREY.classes:
        shutil.rmtree(root / name)


def drop_classes(root: Path) -> None:
    shutil.rmtree(write(root, RGB) / "night")
    (root / "night").mkdir()


def name_splits(root: Path) -> None:
    for domain, split in {"day": "train", "night": "val"}.items():
        (root / domain).rename(root / split)


BAD_DATA: dict[str, tuple[Callable[[Path], object], str]] = {
    "an empty class folder": (lambda root: keep(root / "dog", 0), "data/dog holds no pictures"),
    "no multiple of 4": (lambda root: write(root, replace(GREY, size=30)), "data, size: must be a multiple of 4, it is 30"),
    "too large": (lambda root: write(root, replace(GREY, size=68)), "size: must be less than or equal to 64, it is 68"),
    "too small": (lambda root: write(root, replace(GREY, size=12)), "size: must be greater than or equal to 16, it is 12"),
    "not square": (lambda root: draw_over(root / "cat" / "000.png", 32, 28), "cat/000.png is 32x28: pictures must be square"),
    "mixed sizes": (lambda root: draw_over(root / "dog" / "003.png", 28, 28), "dog/003.png is 28x28 grey, not 32x32 grey"),
    "mixed channels": (
        lambda root: draw_over(root / "owl" / "003.png", 32, 32, "RGB"), "owl/003.png is 32x32 RGB, not 32x32 grey",
    ),
    "nothing": (empty, "mnistm/train.csv does not exist; make the data"),
    "no picture": (lambda root: (root / "owl" / "003.png").write_text("owl"), "owl/003.png is not a readable picture"),
    "a class in one domain only": (
        lambda root: shutil.rmtree(write(root, RGB) / "night" / "owl"), "data/night hold different classes, such as owl",
    ),
    "a domain without classes": (drop_classes, "data/night holds neither train.csv nor a folder per class"),
    "splits in the place of domains": (lambda root: name_splits(write(root, RGB)), "holds train and val: name one"),
    "a class that is held out": (one_each, "are held out for validation, give more"),
}  # fmt: skip


@pytest.mark.parametrize(("damage", "message"), BAD_DATA.values(), ids=BAD_DATA)
def test_bad_data_are_one_line_and_nothing_is_trained(
    damage: Callable[[Path], object], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    damage(write_data(tmp_path / "data", GREY))
    flags = ("--data", tmp_path / "data", "--output", tmp_path / "run", "--preset", "tiny", "--device", "cpu")
    code, error = command(monkeypatch, capsys, P1_training, *flags)
    assert (code, message in error) == (2, True), error
    assert error.rpartition("\x1b[A")[2].startswith("error: ")  # a progress bar may have been there
    assert not list((tmp_path / "run").iterdir())


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write data, a checkpoint and classifiers of grey and RGB images."""
    root = tmp_path_factory.mktemp("trained")
    for name, spec in {"grey": GREY, "rgb": RGB, "renamed": replace(GREY, classes=("ant", "bee", "fly"))}.items():
        save_network(root / f"{name}.safetensors", random_network(spec))
        if name != "renamed":
            write_data(root / name, spec)
            for domain in spec.domains:
                flags: dict[str, Any] = {"epochs": 1, "batch": 16, "device": "cpu", "precision": "fp32"}
                P1_classifier.train(P1_classifier.Train(domain, root / name, root / domain, **flags))
    return root


TRAIN = ("--data", "{root}/grey", "--output", "{run}", "--preset", "tiny", "--device", "cpu")
DRAW = ("--model", "{root}/rgb.safetensors", "--output", "{run}", "--device", "cpu")
FILE = "{root}/%s/classifier.safetensors"
BAD_FLAGS: dict[str, tuple[Any, tuple[str, ...], str]] = {
    "other classes": (
        P1_training, (*TRAIN, "--init", "{root}/renamed.safetensors"),
        "draws 3 classes (ant, bee, fly) in images, 32x32 grey; the data are 3 classes (cat, dog, owl) in images, 32x32 grey",
    ),
    "other images": (P1_training, (*TRAIN, "--init", "{root}/rgb.safetensors"), "in day, night, 24x24 RGB; the data are"),
    "a teacher of other images": (
        P1_training, (*TRAIN[:4], "--distill", "{root}/rgb.safetensors"), "in day, night, 24x24 RGB; the data are",
    ),
    "a share of SVHN": (P1_training, (*TRAIN, "--svhn-share", "0.7"), "--svhn-share 0.7: the data are no digits"),
    "a classifier of other images": (
        P1_training, (*TRAIN, "--classifiers", FILE % "day"), "reads 3 classes (cat, dog, owl) in day, night, 24x24 RGB; the images",
    ),
    "the shipped classifiers": (
        P1_training, (*TRAIN, "--classifiers", "checkpoints/judge_svhn.safetensors"), "reads 10 classes (0, 1, 2,",
    ),
    "too many classifiers": (
        P1_training, (*TRAIN, "--classifiers", FILE % "images", FILE % "images"), "give auto, none, or a file for each of images",
    ),
    "a classifier that is missing": (P1_training, (*TRAIN, "--classifiers", "nowhere"), "nowhere does not exist"),
    "classifiers exchanged": (
        P1_inference, (*DRAW, "--classifiers", FILE % "night", FILE % "day"), "is a classifier of night, not day",
    ),
    "a class that the checkpoint lacks": (P1_inference, (*DRAW, "--classes", "cat", "ant"), "--digits cat ant: must be among"),
    "a domain that the checkpoint lacks": (P1_inference, (*DRAW, "--domains", "svhn"), "--domains svhn: must be among day, night"),
    "a domain that the data lack": (
        P1_classifier, ("train", "--domain", "svhn", "--data", "{root}/grey", "--output", "{run}"), "--domain svhn: {root}/grey holds",
    ),
    "a classifier in the place of the course's": (
        P1_classifier, ("grade", "{run}", "--svhn-classifier", FILE % "night"), "24x24 RGB: name it with --classifiers",
    ),
    "two kinds of classifiers": (
        P1_classifier, ("grade", "{run}", "--classifiers", FILE % "day", "--svhn-classifier", FILE % "night"), "leave out --mnistm",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("script", "flags", "message"), BAD_FLAGS.values(), ids=BAD_FLAGS)
def test_what_does_not_fit_the_images_is_one_line(
    script: Any, flags: tuple[str, ...], message: str, trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    places = {"root": trained, "run": tmp_path / "run"}
    code, error = command(monkeypatch, capsys, script, *(flag.format(**places) for flag in flags))
    assert (code, message.format(**places) in error) == (2, True), error
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("name", ["../out", "a/b", "", ".", ".hidden"])
def test_a_checkpoints_names_lead_to_no_other_folder(name: str, tmp_path: Path) -> None:
    for spec in (replace(GREY, classes=(name,)), replace(GREY, domains=(name,))):
        save_network(tmp_path / "n.safetensors", random_network(spec))
        with pytest.raises(BadInput, match="n.safetensors, header of a P1 checkpoint, model.spec.*must match pattern"):
            load_network(tmp_path / "n.safetensors", CPU)


def test_a_run_goes_on_with_the_same_images_and_graders_only(trained: Path, tmp_path: Path) -> None:
    data, classifier = (
        shutil.copytree(trained / "grey", tmp_path / "data"),
        str(trained / "images" / "classifier.safetensors"),
    )
    train(data, tmp_path / "run")
    assert train(data, tmp_path / "run", steps=5, classifiers=("none",))["metrics"]["step"] == 5
    with pytest.raises(BadInput, match="was trained with classifiers None, not"):
        train(data, tmp_path / "run", steps=6, classifiers=(classifier,))
    (data / "dog").rename(data / "zebra")
    with pytest.raises(BadInput, match="was trained with data"):
        train(data, tmp_path / "run", steps=6)


def test_a_seed_depends_on_the_places_of_class_and_domain(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    many = DataSpec(tuple("abcdefghijkl"), ("x", "y", "z"))
    save_network(tmp_path / "n.safetensors", random_network(many))
    requested: list[DigitRequest] = []

    def images(self: Any, requests: list[DigitRequest], title: str) -> Tensor:
        requested.extend(requests)
        return torch.zeros(len(requests), *many.shape)

    monkeypatch.setattr("digits.sampling.DigitSampler.images", images)
    draw(tmp_path / "out", model=tmp_path / "n.safetensors", digits=("l", "a"), domains=("z",), count=1, seed=4)
    assert requested == [DigitRequest(11, 2, derived_seed(4, 2, 11, 0)), DigitRequest(0, 2, derived_seed(4, 2, 0, 0))]
    assert [path.name for path in sorted((tmp_path / "out" / "z").iterdir())] == ["a_001.png", "l_001.png"]
