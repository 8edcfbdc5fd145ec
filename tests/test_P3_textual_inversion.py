"""Textual inversion: the plain method's gradient, only new embeddings change, runs continue exactly, images are read upright."""

from __future__ import annotations

import json
import pkgutil
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from PIL import Image
from plain_inversion import PlainInversion
from safetensors import safe_open
from safetensors.torch import load_file
from small_pipeline import WIDTH, save_clip, save_pictures, save_pipeline
from stand_in_tracker import stand_in, without
from torch import Tensor

import P3_textual_inversion
from concepts.dataset import (
    Augmentation,
    ConceptData,
    ConceptSet,
    InversionBatch,
    read_concepts,
    read_images,
)
from concepts.embeddings import install
from concepts.inversion import TextualInversion, prepare_frozen
from concepts.recipes import InversionRecipe
from concepts.stable_diffusion import load_pipeline, suit_training
from P3_textual_inversion import Settings, concepts_of, main, recipe_of
from runtime.cli import BadInput
from runtime.files import ROOT

CPU = torch.device("cpu")
TOKEN = "<new1>"
LANCZOS = Image.Resampling.LANCZOS


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "images", 3)


def settings(tmp_path: Path, model: str, images: Path | None, /, **changes: Any) -> Settings:
    fields: dict[str, Any] = {
        "model": model,
        "images": images,
        "init": "star",
        "recipe": "v1",
        "steps": 6,
        "batch": 2,
        "validate_every": 3,
        "save_every": 2,
        "log_every": 2,
        "precision": "fp32",
        "device": "cpu",
        "run": tmp_path / "run",
        "output": tmp_path / "learned",
    }
    return Settings(**fields | changes)


def vectors_of(output: Path, token: str = TOKEN) -> Tensor:
    return load_file(output / f"learned_{token.strip('<>')}.safetensors")[token]


def record_of(run: Path) -> Any:
    return json.loads((run / "record.json").read_text())


def checkpoint_of(run: Path) -> Any:
    return torch.load(run / "checkpoint.pt", weights_only=True)


def prepared(model: str, *concepts: ConceptSet, **augmentation: Any) -> tuple[TextualInversion, list[ConceptData]]:
    pipe = load_pipeline(model, CPU, torch.float32)
    inversion = TextualInversion(pipe, concepts, 0)
    return inversion, [ConceptData(pipe, concept, 0, Augmentation(**augmentation)) for concept in concepts]


def batch_of(data: list[ConceptData], step: int = 3, rows: slice = slice(4), total: int = 4) -> InversionBatch:
    return InversionBatch.concatenate([each.batch(step, rows, total) for each in data])


def gradient(model: str, *concepts: ConceptSet) -> tuple[TextualInversion, InversionBatch, Tensor]:
    inversion, data = prepared(model, *concepts)
    batch = batch_of(data)
    (inversion.loss(batch) * len(concepts)).backward()
    grad = inversion.embeddings.learned.weight.grad
    assert grad is not None
    return inversion, batch, grad


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_gradient_is_that_of_the_plain_method(model: str, images: Path, vectors: int) -> None:
    """Plain: the whole table is the parameter, and images go through the autoencoder."""
    inversion, batch, ours = gradient(model, ConceptSet(TOKEN, images, "star", vectors=vectors))
    pipe = load_pipeline(model, CPU, torch.float32)
    install(pipe, inversion.learned())
    table = pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    noisy = pipe.scheduler.add_noise(batch.x0, batch.eps, batch.t)
    out = pipe.unet(noisy, batch.t, encoder_hidden_states=pipe.text_encoder(batch.tokens)[0]).sample
    torch.nn.functional.mse_loss(out, batch.eps).backward()
    assert table.grad is not None
    theirs = table.grad[-vectors:]
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_cached_posterior_is_the_autoencoders(tmp_path: Path, model: str) -> None:
    """Pictures reach it as diffusers' own processor prepares them: -1..1, the centre of a wide and of a tall one."""
    folder = save_pictures(tmp_path / "images", 2)
    Image.open(folder / "0.png").transpose(Image.Transpose.ROTATE_90).save(folder / "tall.png")
    inversion, (data,) = prepared(model, ConceptSet(TOKEN, folder, "star"))
    wide, plain, tall = read_images(folder)
    centres = [wide.resize((80, 64), LANCZOS).crop((8, 0, 72, 64)), plain.resize((64, 64), LANCZOS)]
    centres.append(tall.resize((64, 80), LANCZOS).crop((0, 8, 64, 72)))
    x = VaeImageProcessor(vae_scale_factor=4).preprocess(centres)
    vae, moments = inversion.pipe.vae, data.moments
    assert moments is not None
    for flip, pixels in ((0, x), (1, x.flip(-1))):
        posterior = vae.encode(pixels).latent_dist
        torch.testing.assert_close(
            moments[:, flip, 0], posterior.mean * vae.config.scaling_factor, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(moments[:, flip, 1], posterior.std * vae.config.scaling_factor, rtol=1e-4, atol=1e-5)


def test_a_concept_learns_among_others_as_it_does_alone(model: str, images: Path) -> None:
    first, second = ConceptSet(TOKEN, images, "star"), ConceptSet("<new2>", images, "moon", "style", 2)
    alone = gradient(model, second)[2]
    together = gradient(model, first, second)[2]
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("crop", ["center", "random"])
def test_a_process_draws_its_rows_of_the_whole_batch(model: str, images: Path, crop: Any) -> None:
    _, (data,) = prepared(model, ConceptSet(TOKEN, images, "star"), crop=crop, embedding_noise=0.5)
    whole, part = vars(data.batch(7, slice(6), 6)), vars(data.batch(7, slice(2, 4), 6))
    for name, tensor in part.items():
        torch.testing.assert_close(tensor, whole[name][2:4], msg=name)


def test_embedding_noise_acts_on_learned_embeddings_only_and_inside_the_block_only(model: str, images: Path) -> None:
    """Its length, relative to the embedding's own, has the given root mean square, for each embedding by itself."""
    inversion, data = prepared(model, ConceptSet(TOKEN, images, "star", vectors=2), embedding_noise=0.5)
    batch, embeddings = batch_of(data, 0, slice(64), 64), inversion.embeddings
    before = embeddings(batch.tokens).detach()
    with embeddings.noise(batch.embedding_noise):
        change = (embeddings(batch.tokens) - before).detach()
    assert torch.equal(embeddings(batch.tokens), before)
    new = batch.tokens >= embeddings.first
    assert not change[~new].any()
    relative = change[new] / before[new].norm(dim=1, keepdim=True)
    assert float(relative.square().sum(1).mean().sqrt()) == pytest.approx(0.5, rel=0.05)
    assert len(relative.unique(dim=0)) == int(new.sum())


def test_noisy_steps_weigh_more_up_to_the_cap(model: str, images: Path) -> None:
    inversion, data = prepared(model, ConceptSet(TOKEN, images, "star"))
    batch, pipe = batch_of(data), inversion.pipe
    noisy = pipe.scheduler.add_noise(batch.x0, batch.eps, batch.t)
    text = pipe.text_encoder(batch.tokens)[0]
    error = (pipe.unet(noisy, batch.t, encoder_hidden_states=text).sample - batch.eps).square().mean((1, 2, 3))
    weight = (1 / pipe.scheduler.alphas_cumprod[batch.t]).clamp(max=10)
    assert weight.max() > 2
    torch.testing.assert_close(inversion.loss(batch, 10.0), (weight * error).mean(), rtol=1e-4, atol=1e-6)


def test_low_memory_keeps_less_and_gives_the_same_gradient(model: str, images: Path) -> None:
    kept, gradients = [], []
    for low in (False, True):
        inversion, data = prepared(model, ConceptSet(TOKEN, images, "star"))
        prepare_frozen(inversion.pipe, "fp32", low_memory=low)
        sizes: list[int] = []

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = inversion.loss(batch_of(data, 0, slice(2), 2))
            kept.append(sum(sizes))
        loss.backward()
        gradients.append(inversion.embeddings.learned.weight.grad)
    assert kept[1] < 0.7 * kept[0]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_attention_that_trains_quickly_gives_the_same_loss(model: str, images: Path) -> None:
    inversion, data = prepared(model, ConceptSet(TOKEN, images, "star"))
    batch, losses = batch_of(data), []
    for plain in (False, True):
        for network in (inversion.pipe.unet, inversion.pipe.text_encoder) if plain else ():
            suit_training(network, CPU, "bf16")
        losses.append(inversion.loss(batch).detach())
    assert inversion.pipe.text_encoder.config._attn_implementation == "eager"
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- every flag


@dataclass
class Trial:
    """Runs of the script with what it was patched with, each in its own folders."""

    folder: Path
    model: str
    images: Path
    patch: pytest.MonkeyPatch
    count: int = 0

    def train(self, **changes: Any) -> Settings:
        """Run the script in this process; return its settings."""
        self.count += 1
        folders = {"run": self.folder / f"run{self.count}", "output": self.folder / f"learned{self.count}"}
        images = None if "concepts" in changes else self.images
        four: dict[str, Any] = {"steps": 4, "batch": 4, "validate_every": 0, **folders}
        chosen = settings(self.folder, self.model, images, **four | changes)
        main(chosen)
        return chosen

    def record_calls(self, place: str, of: Callable[..., Any]) -> list[Any]:
        """Return a list that grows by `of(*arguments)` with every call of the function at `place`, which works as before."""
        calls: list[Any] = []
        owner, name = place.rsplit(".", 1)
        target: Any = pkgutil.resolve_name(owner)
        original = getattr(target, name)

        def recorded(*arguments: Any, **named: Any) -> Any:
            calls.append(of(*arguments, **named))
            return original(*arguments, **named)

        self.patch.setattr(target, name, recorded)
        return calls

    def assert_plain(self, chosen: Settings) -> None:
        """Assert that a run's files hold what a plain loop learns, within a thousandth, and the means of its losses."""
        concepts = concepts_of(chosen, "v1")
        plain = PlainInversion(chosen, recipe_of(chosen, "v1", concepts), concepts)
        start = {each.concept.token: each.vectors.detach().clone() for each in plain.concepts}
        for token, vectors in plain.train().items():
            assert (vectors_of(chosen.output, token) - vectors).norm() < 1e-3 * (vectors - start[token]).norm()
        every, losses = chosen.log_every, plain.losses
        parts = {str(min(k + every, len(losses))): losses[k : k + every] for k in range(0, len(losses), every)}
        means = {step: sum(part) / len(part) for step, part in parts.items()}
        assert chosen.run
        assert record_of(chosen.run)["metrics"]["losses"] == pytest.approx(means, rel=1e-3)


@pytest.fixture
def trial(tmp_path: Path, model: str, images: Path, monkeypatch: pytest.MonkeyPatch) -> Trial:
    return Trial(tmp_path, model, images, monkeypatch)


LEARNING: list[tuple[str, dict[str, Any]]] = [
    ("model", {}),  # all others by default
    ("token", {"token": "<cat-toy>"}),
    ("init", {"init": "moon"}),
    ("kind", {"kind": "style"}),
    ("vectors", {"vectors": 3}),
    ("steps", {"steps": 40, "batch": 1}),  # two of them are warm-up
    ("batch", {"batch": 6}),
    ("accumulate", {"accumulate": 2}),
    ("lr", {"lr": 0.05}),
    ("max_norm", {"max_norm": 0.9, "vectors": 2}),
    ("max_norm", {"max_norm": 1.0, "lr": 1.0}),
    ("max_norm", {"max_norm": 0.0, "lr": 1.0}),
    ("crop", {"crop": "random"}),
    ("max_loss_weight", {"max_loss_weight": 5.0}),
    ("flip", {"flip": False}),
    ("embedding_noise", {"embedding_noise": 0.5, "vectors": 2}),
    ("seed", {"seed": 5, "vectors": 2}),
]


@pytest.mark.parametrize(("flag", "changes"), LEARNING)
def test_a_run_learns_what_a_plain_loop_learns(flag: str, changes: dict[str, Any], trial: Trial) -> None:
    """Every flag that decides the vectors reaches the place where the method has it."""
    trial.assert_plain(trial.train(**changes))


def images_flag(trial: Trial) -> None:
    trial.images = save_pictures(trial.folder / "others", 2, seed=1)
    trial.assert_plain(trial.train())


def concepts_flag(trial: Trial) -> None:
    """Several concepts have their own pictures, words, kinds and vectors, and the loss is their sum."""
    save_pictures(trial.folder / "others", 2, seed=1)
    entries = [
        {"token": "<a>", "images": "images", "init": "star"},
        {"token": "<b>", "images": "others", "init": "moon", "kind": "style", "vectors": 2},
    ]
    (trial.folder / "concepts.json").write_text(json.dumps(entries))
    chosen = trial.train(concepts=trial.folder / "concepts.json", init=None, accumulate=2)
    trial.assert_plain(chosen)
    assert chosen.run
    learned = [(entry["token"], entry["init"]) for entry in record_of(chosen.run)["metrics"]["concepts"]]
    assert learned == [("<a>", "star"), ("<b>", "moon")]


def recipe_flag(trial: Trial) -> None:
    """Expect the vectors of the recipe's values as flags; a given flag has priority; auto is small for this narrow model."""
    small = {"flip": False}
    explicit = trial.train(**small)
    for recipe in ("small", "auto"):
        chosen = trial.train(recipe=recipe)
        torch.testing.assert_close(vectors_of(chosen.output), vectors_of(explicit.output), rtol=0, atol=0)
    assert chosen.run
    assert record_of(chosen.run)["metrics"]["recipe"] == {
        "name": "small", "steps": 4, "batch": 4, "vectors": 1, "lr": 5e-3, "max_norm": 1.0,
        "max_loss_weight": 1.0, "embedding_noise": 0.0, **small,
    }  # fmt: skip
    trial.assert_plain(trial.train(recipe="small", **{name: getattr(InversionRecipe, name) for name in small}))


def output_flag(trial: Trial) -> None:
    (trial.folder / "vectors").mkdir()
    (trial.folder / "vectors" / "other").touch()
    chosen = trial.train(output=trial.folder / "vectors", seed=3)
    assert sorted(path.name for path in chosen.output.iterdir()) == ["learned_new1.safetensors", "other"]
    with safe_open(chosen.output / "learned_new1.safetensors", "pt") as file:
        assert file.metadata()["origin"] == f"{trial.model}, 4 steps, seed 3"


def run_flag(trial: Trial) -> None:
    trial.train(run=trial.folder / "own")
    names = ["checkpoint.pt", "loss.png", "progress_new1.png", "record.json", "tensorboard"]
    assert sorted(path.name for path in (trial.folder / "own").iterdir()) == names


def accumulate_flag(trial: Trial) -> None:
    sizes = trial.record_calls("concepts.inversion.TextualInversion.loss", lambda _, part, *__: len(part))
    trial.train(accumulate=3, batch=6, steps=2)
    assert sizes == [2] * 6


def validate_every_flag(trial: Trial) -> None:
    for every, steps in ((2, [2, 4, 5]), (0, [5])):
        run = trial.train(steps=5, validate_every=every).run
        assert run
        assert [step for step, *_ in checkpoint_of(run)["parts"]["validator"]["validations"]] == steps


def validate_flag(trial: Trial) -> None:
    calls = trial.record_calls(SAMPLE, lambda _, requests: [request.prompt for request in requests])
    trial.train(validate=("{} at night", "a red {} on a bench, {}", "snow on a {}"))
    trial.train(kind="style", steps=1)
    prompts = ["<new1> at night", "a red <new1> on a bench, <new1>", "snow on a <new1>", "<new1> at night"]
    style = ["a picture in the style of <new1>", "a red house in the style of <new1>"]
    assert calls == [prompts, style * 2]


def clip_flag(trial: Trial) -> None:
    clip = str(save_clip(trial.folder / "clip"))
    loads = trial.record_calls("concepts.clip_scores.Scorer.load", lambda *arguments: arguments)
    chosen = trial.train(clip=clip, validate_every=2)
    assert loads == [(clip, CPU)]
    assert chosen.run
    assert list(record_of(chosen.run)["metrics"]["scores"][TOKEN]) == ["2", "4"]
    assert (chosen.run / "scores.png").is_file()


def device_flag(trial: Trial) -> None:
    with pytest.raises(BadInput, match="--device cuda:99"):
        trial.train(device="cuda:99")


def precision_flag(trial: Trial) -> None:
    """In bf16 and fp16, the frozen parts are in it and the vectors float32; they move the same way."""
    pipes: list[Any] = []

    def load(*arguments: Any) -> Any:
        pipes.append(load_pipeline(*arguments))
        return pipes[-1]

    trial.patch.setattr(P3_textual_inversion, "load_pipeline", load)
    start, changes = prepared(trial.model, ConceptSet(TOKEN, trial.images, "star"))[0].learned()[TOKEN], []
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16)):
        chosen = trial.train(precision=precision, lr=0.1)
        pipe = pipes[-1]
        frozen = [pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.get_input_embeddings().weight.dtype]
        assert frozen == [dtype] * 3
        assert chosen.run
        metrics = record_of(chosen.run)["metrics"]
        assert metrics["precision"] == precision
        assert ("loss_scale" in metrics) == (precision == "fp16")
        assert vectors_of(chosen.output).dtype == torch.float32
        changes.append((vectors_of(chosen.output) - start).flatten())
    exact, rounded, near = changes
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.9
    assert torch.cosine_similarity(exact, near, dim=0) > 0.99


def compile_flag(trial: Trial) -> None:
    """Compiled is the U-Net alone, and its first step is timed apart; the compiler itself is left out here."""
    trial.patch.setattr(P3_textual_inversion, "should_compile", lambda choice, *_: choice == "on")
    compiled: list[str] = []
    trial.patch.setattr(torch.nn.Module, "compile", lambda self: compiled.append(type(self).__name__))
    learned = []
    for choice, names in (("off", []), ("auto", []), ("on", ["UNet2DConditionModel"])):
        chosen = trial.train(compile=choice)
        assert compiled == names
        assert chosen.run
        assert ("first_step" in record_of(chosen.run)["timings_s"]) == (choice == "on")
        learned.append(vectors_of(chosen.output))
    assert torch.equal(learned[0], learned[1])
    assert torch.equal(learned[0], learned[2])


def low_memory_flag(trial: Trial) -> None:
    calls = trial.record_calls("diffusers.UNet2DConditionModel.enable_gradient_checkpointing", lambda _: True)
    learned = [vectors_of(trial.train(low_memory=low).output) for low in (False, True)]
    assert calls == [True]
    torch.testing.assert_close(*learned, rtol=1e-4, atol=1e-5)


def log_every_flag(trial: Trial) -> None:
    """Expect the means of the losses since the last reading."""
    chosen = trial.train(steps=5, log_every=2, save_every=50)
    trial.assert_plain(chosen)
    assert chosen.run
    assert list(record_of(chosen.run)["metrics"]["losses"]) == ["2", "4", "5"]


def save_every_flag(trial: Trial) -> None:
    steps = trial.record_calls("training.loop.save_state", lambda _, state: state["step"])
    trial.train(steps=5, save_every=3)
    assert list(dict.fromkeys(steps)) == [3, 5]


SAMPLE = "concepts.sampling.StableDiffusionSampler.sample_images"


def track_flag(trial: Trial) -> None:
    """Expect the record's losses at the tracker; without one nothing is loaded or written."""
    with trial.patch.context() as patch:
        without("wandb", patch)
        loaded = trial.record_calls("P3_textual_inversion.load_pipeline", lambda *_: True)
        with pytest.raises(BadInput, match="--track wandb: .* pip install wandb"):
            trial.train(track="wandb")
    assert not loaded
    assert not (trial.folder / "run1").exists()
    tracker = stand_in(trial.folder, trial.patch)
    chosen = trial.train(track="wandb", log_every=2)
    trial.assert_plain(chosen)
    assert chosen.run
    assert tracker.calls[0][1]["project"] == "textual inversion"
    losses = {str(step): values["loss"] for _, step, values in tracker.calls[1:-1] if "loss" in values}
    assert losses == record_of(chosen.run)["metrics"]["losses"]


EFFECTS: dict[str, Callable[[Trial], None]] = {
    "images": images_flag,
    "concepts": concepts_flag,
    "recipe": recipe_flag,
    "output": output_flag,
    "run": run_flag,
    "accumulate": accumulate_flag,
    "validate_every": validate_every_flag,
    "validate": validate_flag,
    "clip": clip_flag,
    "device": device_flag,
    "precision": precision_flag,
    "compile": compile_flag,
    "low_memory": low_memory_flag,
    "log_every": log_every_flag,
    "track": track_flag,
    "save_every": save_every_flag,
}


@pytest.mark.parametrize("flag", EFFECTS)
def test_a_flag_has_its_effect(flag: str, trial: Trial) -> None:
    EFFECTS[flag](trial)


def test_no_flag_is_without_a_test() -> None:
    assert {field.name for field in fields(Settings)} == {flag for flag, _ in LEARNING} | EFFECTS.keys()


# ---------------------------------------------------------------- whole runs


def test_only_the_new_embeddings_change(model: str, images: Path) -> None:
    inversion, data = prepared(model, ConceptSet(TOKEN, images, "star", vectors=2))
    before = inversion.learned()[TOKEN]
    trainable = [
        parameter
        for part in (inversion.pipe.unet, inversion.pipe.vae, inversion.pipe.text_encoder)
        for parameter in part.parameters()
        if parameter.requires_grad
    ]
    assert [tuple(parameter.shape) for parameter in trainable] == [(2, WIDTH)]
    inversion.loss(batch_of(data)).backward()
    torch.optim.AdamW(trainable, 0.1).step()
    assert not torch.equal(inversion.learned()[TOKEN], before)
    fresh = load_pipeline(model, CPU, torch.float32)
    for part in ("unet", "vae", "text_encoder"):
        state = {
            name.replace("token_embedding.table", "token_embedding"): tensor
            for name, tensor in getattr(inversion.pipe, part).state_dict().items()
        }
        for name, tensor in getattr(fresh, part).state_dict().items():
            assert torch.equal(state[name], tensor), name


def test_it_leaves_vectors_images_and_a_record(tmp_path: Path, model: str, images: Path) -> None:
    main(settings(tmp_path, model, images, vectors=2))
    assert vectors_of(tmp_path / "learned").shape == (2, WIDTH)
    metrics = record_of(tmp_path / "run")["metrics"]
    assert metrics["step"] == 6
    assert list(metrics["losses"]) == ["2", "4", "6"]
    for name in ("progress_new1.png", "loss.png"):
        assert Image.open(tmp_path / "run" / name).width > 100


def test_every_step_averages_the_gradient_over_the_processes(trial: Trial) -> None:
    """Every process draws its own share of the rows, so that the mean of their gradients is that of the whole batch."""
    shares = trial.record_calls("concepts.dataset.ConceptData.batch", lambda _, step, rows, total: (step, rows, total))
    reductions = trial.record_calls("accelerate.Accelerator.reduce", lambda _, grad, how: (grad.shape, how))
    trial.patch.setattr(P3_textual_inversion, "process_rows", lambda batch, rank, world: slice(rank + 1, batch // 2))
    trial.train(vectors=2, steps=2)
    assert shares == [(step, slice(1, 2), 4) for step in (0, 1)]
    assert reductions == [((2, WIDTH), "mean")] * 2


def test_every_set_of_tokens_has_its_run_folder(
    tmp_path: Path, model: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(P3_textual_inversion, "RUNS", tmp_path / "runs")
    entries = [{"token": token, "images": str(images), "init": "star"} for token in ("<a>", "<b>")]
    (tmp_path / "concepts.json").write_text(json.dumps(entries))
    short: dict[str, Any] = {"run": None, "steps": 1, "validate_every": 0}
    main(settings(tmp_path, model, images, token="<a>", **short))
    main(settings(tmp_path, model, None, init=None, concepts=tmp_path / "concepts.json", **short))
    assert sorted(path.name for path in (tmp_path / "runs").iterdir()) == ["a", "a+b"]


def test_an_end_of_memory_names_what_helps_and_keeps_the_checkpoint(
    tmp_path: Path, model: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, calls = TextualInversion.loss, []

    def loss(self: TextualInversion, *arguments: Any) -> Tensor:
        calls.append(1)
        if len(calls) > 8:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *arguments)

    monkeypatch.setattr(TextualInversion, "loss", loss)
    with pytest.raises(BadInput, match="at step 4 with --batch 6 in 2 parts: try --accumulate 3 or --low-memory"):
        main(settings(tmp_path, model, images, batch=6, accumulate=2, validate_every=0))
    assert checkpoint_of(tmp_path / "run")["step"] == 4


# ---------------------------------------------------------------- going on


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"lr": 0.01}, "lr 0.005, not 0.01"),
        ({"seed": 5}, "seed 0, not 5"),
        ({"batch": 4}, "batch 2, not 4"),
        ({"max_norm": 2.0}, "max_norm 1.0, not 2.0"),
        ({"crop": "random"}, "crop center, not random"),
        ({"max_loss_weight": 5.0}, "max_loss_weight 1.0, not 5.0"),
        ({"flip": False}, "flip True, not False"),
        ({"embedding_noise": 1.0}, "embedding_noise 0.0, not 1.0"),
        ({"steps": 1}, "steps 2, not 1"),
        ({"init": "moon"}, r"concepts .*star.*, not .*moon"),
        ({"kind": "style"}, r"concepts .*object.*, not .*style"),
        ({"vectors": 2}, r"concepts .*1.*, not .*2"),
        ({"images": "others"}, "images and sentences"),
        ({"model": "others"}, "model"),
    ],
)
def test_a_finished_run_refuses_what_would_have_learned_something_else(
    tmp_path: Path, model: str, images: Path, changes: dict[str, Any], fact: str
) -> None:
    """Nothing is written again, neither the vectors nor the record with settings that were not used."""
    if changes == {"images": "others"}:
        changes = {"images": save_pictures(tmp_path / "others", 3, seed=1)}
    if changes == {"model": "others"}:
        other = load_pipeline(model, CPU, torch.float32)
        other.unet.conv_out.bias.data += 1
        other.save_pretrained(tmp_path / "others")
        changes = {"model": str(tmp_path / "others")}
    short: dict[str, Any] = {"steps": 2, "validate_every": 0}
    main(settings(tmp_path, model, images, **short))
    files = [tmp_path / "learned" / "learned_new1.safetensors", tmp_path / "run" / "record.json"]
    before = [file.read_bytes() for file in files]
    with pytest.raises(BadInput, match=f"was trained with {fact}.*: give that again, or --run OTHER") as error:
        main(settings(tmp_path, model, images, **short | changes))
    assert "\n" not in str(error.value)
    assert [file.read_bytes() for file in files] == before


def test_a_run_continues_with_moved_folders_and_everything_that_is_free(
    tmp_path: Path, model: str, images: Path
) -> None:
    main(settings(tmp_path, model, images, steps=2))
    moved = shutil.copytree(model, tmp_path / "moved")
    free: dict[str, Any] = {"accumulate": 2, "low_memory": True, "log_every": 1, "save_every": 3, "validate_every": 0}
    main(settings(tmp_path, f"{moved}/", images.rename(tmp_path / "elsewhere"), steps=4, **free))
    assert record_of(tmp_path / "run")["metrics"]["step"] == 4


def test_a_checkpoint_of_an_earlier_version_is_answered_in_one_line(tmp_path: Path, model: str, images: Path) -> None:
    (tmp_path / "run").mkdir()
    state = {"kind": "textual inversion", "facts": {}, "step": 3, "rows": torch.zeros(1, WIDTH)}
    torch.save(state, tmp_path / "run" / "checkpoint.pt")
    with pytest.raises(BadInput, match="earlier version or is damaged: move it away, or give --run OTHER"):
        main(settings(tmp_path, model, images))


def command(chosen: Settings, *more: str) -> list[str]:
    flags = (
        f"--init star --device cpu --precision fp32 --steps {chosen.steps} --batch 2 --validate-every 0 --log-every 1"
    )
    paths = [f"--model={chosen.model}", f"--images={chosen.images}", f"--run={chosen.run}", f"--output={chosen.output}"]
    return [str(ROOT / "P3_textual_inversion.py"), *flags.split(), "--save-every", "1", *paths, *more]


def start_and_stop(chosen: Settings, number: signal.Signals) -> tuple[int, str]:
    """Run the command and send a signal once it has written a checkpoint; return the exit code and stderr."""
    assert chosen.run is not None
    checkpoint, start = chosen.run / "checkpoint.pt", time.time()
    process = subprocess.Popen(
        [sys.executable, *command(chosen)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    while process.poll() is None and not (checkpoint.is_file() and checkpoint.stat().st_mtime > start):
        time.sleep(0.01)
    process.send_signal(number)
    errors = process.communicate()[1]
    return process.returncode, errors


@pytest.mark.slow
def test_a_stopped_and_a_killed_run_go_on_to_the_same_bits(tmp_path: Path, model: str, images: Path) -> None:
    """SIGTERM at some step, SIGKILL at another, then the same command; against a run that nobody disturbed."""
    broken = settings(tmp_path, model, images, steps=120)
    code, errors = start_and_stop(broken, signal.SIGTERM)
    assert code == 130
    assert f"stopped at step {checkpoint_of(tmp_path / 'run')['step']}; the same command goes on" in errors
    assert start_and_stop(broken, signal.SIGKILL)[0] == -signal.SIGKILL
    assert not broken.output.joinpath("learned_new1.safetensors").exists()
    done = subprocess.run([sys.executable, *command(broken)], capture_output=True, text=True, timeout=900)
    assert "going on at step" in done.stderr
    whole = settings(tmp_path, model, images, steps=120, run=tmp_path / "run2", output=tmp_path / "learned2")
    subprocess.run([sys.executable, *command(whole)], capture_output=True, timeout=900, check=True)
    assert torch.equal(vectors_of(broken.output), vectors_of(whole.output))

    other = subprocess.run([sys.executable, *command(whole, "--lr", "1")], capture_output=True, text=True, timeout=900)
    assert other.returncode == 2
    assert "was trained with lr 0.005, not 1.0" in other.stderr
    assert "Traceback" not in other.stderr


@pytest.mark.slow
def test_two_processes_learn_like_one(tmp_path: Path, model: str, images: Path) -> None:
    one = settings(tmp_path, model, images, run=tmp_path / "run1", output=tmp_path / "learned1")
    two = settings(tmp_path, model, images, run=tmp_path / "run2", output=tmp_path / "learned2")
    torchrun = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--",
    ]  # else --run is torchrun's
    for launch, chosen in (([], one), (torchrun, two)):
        done = subprocess.run([sys.executable, *launch, *command(chosen)], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    assert record_of(tmp_path / "run2")["metrics"]["processes"] == 2
    torch.testing.assert_close(vectors_of(one.output), vectors_of(two.output), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("fails", [False, True], ids=["a formula's sign", "figures that fail"])
def test_figures_cost_no_vectors(
    fails: bool,
    tmp_path: Path,
    model: str,
    images: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ValueError("no room")

    if fails:
        monkeypatch.setattr("concepts.validation.pixel_grid", fail)
        monkeypatch.setattr("P3_textual_inversion.line_figure", fail)
    main(settings(tmp_path, model, images, validate=("a {} for $x_{$",)))
    assert (tmp_path / "learned" / "learned_new1.safetensors").is_file()
    assert (tmp_path / "run" / "record.json").is_file()
    assert (tmp_path / "run" / "loss.png").exists() != fails
    assert ("warning: no figure " in capsys.readouterr().err) == fails


# ---------------------------------------------------------------- images and bad input


def test_pictures_are_upright_and_opaque(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (40, 20)).save(folder / "b.jpg", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "a.png")
    (folder / "notes.txt").write_text("no picture")
    clear, turned = read_images(folder)
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert turned.size == (20, 40)


@pytest.mark.parametrize(
    "flags", [{"images": Path("dog")}, {"init": "star"}, {"token": "<a>"}, {"kind": "style"}, {"vectors": 2}]
)
def test_what_a_file_of_concepts_says_is_not_said_by_flags_too(tmp_path: Path, flags: dict[str, Any]) -> None:
    with pytest.raises(BadInput, match=f"--{next(iter(flags))} and --concepts: give one of them"):
        main(settings(tmp_path, "model", None, **{"init": None, "concepts": tmp_path / "concepts.json"} | flags))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"images": None}, "--images DIR --init WORD"),
        ({"init": "zqxj"}, "--init 'zqxj'"),
        ({"token": "new1"}, "--token new1"),
        ({"vectors": 9}, "--vectors 9"),
        ({"steps": 0}, "--steps 0"),
        ({"accumulate": 3}, "--accumulate 3"),
        ({"seed": -1}, "--seed -1"),
        ({"max_loss_weight": 0.5}, "--max-loss-weight 0.5"),
        ({"embedding_noise": -1.0}, "--embedding-noise -1.0"),
        ({"images": Path("/nowhere")}, "/nowhere is not a folder"),
        ({"model": "/nowhere"}, "/nowhere"),
        ({"clip": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, model: str, images: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(BadInput, match=message) as caught:
        main(settings(tmp_path, model, images, **changes))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "learned" / "learned_new1.safetensors").exists()


def test_an_empty_folder_and_a_broken_picture_are_named(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    with pytest.raises(BadInput, match="holds no picture"):
        read_images(folder)
    (folder / "x.png").write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"x\.png is not a readable picture"):
        read_images(folder)


def test_only_what_can_be_opened_counts_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_pictures(tmp_path / "images", 1)
    (folder / "paper.pdf").write_bytes(b"%PDF")
    (folder / "phone.HEIC").write_bytes(b"....ftypheic")
    assert len(read_images(folder)) == 1
    stderr = capsys.readouterr().err
    assert "paper.pdf is no picture: skipped\n" in stderr
    assert "phone.HEIC is no picture: skipped, save it as JPEG\n" in stderr
    assert "one picture only" in stderr
    Image.new("F", (8, 8)).save(folder / "deep.tif")
    with pytest.raises(BadInput, match=r"deep\.tif is not a readable picture: it has mode F"):
        read_images(folder)


def test_sentences_next_to_an_image_are_that_images_own(tmp_path: Path, model: str) -> None:
    folder = save_pictures(tmp_path / "images", 2)
    (folder / "0.txt").write_text("a red {} on a bench\n\n{} at night\n")
    inversion, (data,) = prepared(model, ConceptSet(TOKEN, folder, "star"))
    assert data.counts.tolist() == [2, len(data.concept.sentences)]
    words = [inversion.pipe.tokenizer.decode(ids, skip_special_tokens=True) for ids in data.tokens[0, :3]]
    assert words[0] == words[2] != words[1]
    tokens = torch.cat([data.batch(step, slice(0, 8), 8).tokens for step in range(6)])
    own = (tokens[:, None] == data.tokens[0, :2]).all(-1).any(1)
    others = (tokens[:, None] == data.tokens[1]).all(-1).any(1)
    assert (own | others).all()
    assert 12 < own.sum() < 36
    (folder / "1.txt").write_text("no place for it\n")
    with pytest.raises(BadInput, match=r"1\.txt, line 1: 'no place for it' wants \{\} where <new1> stands"):
        prepared(model, ConceptSet(TOKEN, folder, "star"))


def test_capitals_are_learned_and_read_as_written(tmp_path: Path, model: str, images: Path) -> None:
    """Every vector of <Fish> and of <fish> has its own gradient."""
    concepts = [ConceptSet("<Fish>", images, "star", vectors=3), ConceptSet("<fish>", images, "moon", vectors=2)]
    _, batch, grad = gradient(model, *concepts)
    assert grad.abs().amax(1).gt(0).all()
    first = len(load_pipeline(model, CPU, torch.float32).tokenizer)
    learned = [sorted({index for index in ids.tolist() if index >= first}) for ids in batch.tokens]
    assert learned == [[first, first + 1, first + 2]] * 4 + [[first + 3, first + 4]] * 4


@pytest.mark.parametrize("where", ["validate", "sentences"])
def test_an_unknown_token_is_refused_before_training(tmp_path: Path, model: str, images: Path, where: str) -> None:
    more: dict[str, Any] = {"validate": ("a {} in the style of <nothing>",)} if where == "validate" else {}
    if where == "sentences":
        (images / "0.txt").write_text("a {} in the style of <nothing>\n")
    place = r"--validate: " if where == "validate" else r".*images/0\.txt: "
    with pytest.raises(BadInput, match=f"^{place}<nothing> in 'a <new1> in the style of <nothing>': no such token"):
        main(settings(tmp_path, model, images, **more))
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_validation_prompt_without_the_token_is_a_line(
    tmp_path: Path, model: str, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(settings(tmp_path, model, images, validate=("a house",), steps=1, seed=2**70))
    assert "--validate 'a house' has no {} for <new1>" in capsys.readouterr().err


def test_a_token_of_the_vocabulary_is_refused(tmp_path: Path, model: str, images: Path) -> None:
    pipe = load_pipeline(model, CPU, torch.float32)
    install(pipe, {TOKEN: torch.zeros(1, WIDTH)})
    pipe.save_pretrained(tmp_path / "extended")
    with pytest.raises(BadInput, match="<new1> is in the model's vocabulary"):
        main(settings(tmp_path, str(tmp_path / "extended"), images))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "wanted a list"),
        ([{"token": "<a>"}], r"concepts\.json, \[0\]\.images is missing"),
        ([{"token": "<a>", "images": "x", "init": "dog", "vectors": "2"}], r"\[0\]\.vectors: must .*, it is '2'"),
        ([{"token": "<a>", "images": "x", "init": "dog", "size": 2}], r"\[0\]\.size is not known here"),
        ([{"token": "a", "images": "x", "init": "dog"}], "--token a: a token is a word in angle brackets"),
        (
            [{"token": "<a>", "images": "x", "init": "dog", "kind": "animal"}],
            r"\[0\]\.kind: must be 'object' or 'style', it is 'animal'",
        ),
        ([{"token": "<a>", "images": "x", "init": "dog"}] * 2, "<a> is there twice"),
    ],
)
def test_bad_lists_of_concepts_are_named(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "concepts.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        read_concepts(tmp_path / "concepts.json", {"object": 1, "style": 1})
