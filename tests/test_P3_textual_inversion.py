"""Textual inversion: the gradient is the plain method's, only the new rows change, runs go on to the bit, pictures are read as they are
meant."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from small_pipeline import WIDTH, save_clip, save_pictures, save_pipeline

from concepts.dataset import ConceptSet, read_concepts, read_pictures, square, zoomed_out
from concepts.embeddings import install
from concepts.inversion import TextualInversion
from concepts.stable_diffusion import load_pipeline, suit_training
from concepts.training import InversionArgs, Run
from P3_textual_inversion import Settings, main
from runtime.cli import BadInput
from runtime.files import ROOT

CPU = torch.device("cpu")
TOKEN = "<new1>"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(save_pipeline(tmp_path_factory.mktemp("model")))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return save_pictures(tmp_path / "images", 3)


def settings(tmp_path: Path, model: str, images: Path | None, /, **changes: Any) -> Settings:
    given: dict[str, Any] = {
        "model": model,
        "images": images,
        "init": "star",
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
    return Settings(**given | changes)


def learner(model: str, concepts: list[ConceptSet], crops: bool = False) -> TextualInversion:
    return TextualInversion(load_pipeline(model, CPU, torch.float32), concepts, 0, crops, True)


def gradient(model: str, concepts: list[ConceptSet], parts: int = 1) -> Any:
    one = learner(model, concepts)
    sample = one.batch(3, slice(4), 4)
    one.backward(Accelerator(cpu=True), one.parameter, sample, parts)
    return one, sample, one.parameter.rows.grad


# ---------------------------------------------------------------- the gradient


@pytest.mark.parametrize("vectors", [1, 3])
def test_the_gradient_is_that_of_the_plain_method(model: str, images: Path, vectors: int) -> None:
    """Plain: the whole table is the parameter, and pictures go through the autoencoder."""
    one, sample, ours = gradient(model, [ConceptSet(TOKEN, images, "star", vectors=vectors)])
    pipe = load_pipeline(model, CPU, torch.float32)
    install(pipe, {TOKEN: one.parameter.rows.detach()})
    table = pipe.text_encoder.get_input_embeddings().weight.requires_grad_(True)
    noisy = pipe.scheduler.add_noise(sample.x0, sample.eps, sample.t)
    out = pipe.unet(noisy, sample.t, encoder_hidden_states=pipe.text_encoder(sample.tokens)[0]).sample
    torch.nn.functional.mse_loss(out, sample.eps).backward()
    assert table.grad is not None
    theirs = table.grad[one.first :]
    assert theirs.norm() > 0
    assert (ours - theirs).norm() <= 1e-5 * theirs.norm()


def test_the_cached_posterior_is_the_autoencoders(model: str, images: Path) -> None:
    one = learner(model, [ConceptSet(TOKEN, images, "star")])
    pipe = load_pipeline(model, CPU, torch.float32)
    x = square(read_pictures(images), 64)
    moments = one.lessons[0].moments
    assert moments is not None
    for flip, pictures in ((0, x), (1, x.flip(-1))):
        posterior = pipe.vae.encode(pictures).latent_dist
        scale = pipe.vae.config["scaling_factor"]
        torch.testing.assert_close(moments[:, flip, 0], posterior.mean * scale, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(moments[:, flip, 1], posterior.std * scale, rtol=1e-4, atol=1e-5)


def test_parts_of_a_batch_add_up(model: str, images: Path) -> None:
    concepts = [ConceptSet(TOKEN, images, "star")]
    whole, parts = gradient(model, concepts)[2], gradient(model, concepts, 2)[2]
    torch.testing.assert_close(whole, parts, rtol=1e-4, atol=1e-7)


def test_a_concept_learns_among_others_as_it_does_alone(model: str, images: Path) -> None:
    first, second = ConceptSet(TOKEN, images, "star"), ConceptSet("<new2>", images, "moon", "style", 2)
    alone = gradient(model, [second])[2]
    together = gradient(model, [first, second])[2]
    torch.testing.assert_close(together[1:], alone, rtol=1e-4, atol=1e-7)


def test_smaller_views_hold_the_whole_picture_on_its_own_edges() -> None:
    x = torch.full((6, 3, 64, 64), -0.5)
    x[:, :, 24:40, 24:40] = 1.0
    views = zoomed_out(x, torch.Generator().manual_seed(0))
    assert views.shape == x.shape
    shares = (views > 0.25).float().mean((1, 2, 3)) / (16 / 64) ** 2
    assert ((shares > 0.6**2 - 0.08) & (shares < 0.95**2 + 0.08)).all()
    assert len({round(float(share), 2) for share in shares}) > 3
    torch.testing.assert_close(views[:, :, 0], x[:, :, 0])


def test_a_share_of_an_objects_samples_is_smaller_and_none_of_a_styles(model: str, images: Path) -> None:
    """The same noise, so that samples differ where the view does; and half of them, by 400 draws."""
    for kind, low, high in (("object", 0.4, 0.6), ("style", 0.0, 0.0)):
        concepts = [ConceptSet(TOKEN, images, "star", kind)]  # type: ignore[arg-type]
        pipes = [load_pipeline(model, CPU, torch.float32) for _ in range(2)]
        whole, some = (
            TextualInversion(p, concepts, 0, False, True, share) for p, share in zip(pipes, (0.0, 0.5), strict=True)
        )
        first, second = (each.batch(0, slice(400), 400) for each in (whole, some))
        assert torch.equal(first.tokens, second.tokens)
        assert torch.equal(first.eps, second.eps)
        differ = (first.x0 - second.x0).abs().amax((1, 2, 3)) > 1e-3
        assert low <= float(differ.float().mean()) <= high


def test_blurred_rows_are_read_a_little_off_and_no_others(model: str, images: Path) -> None:
    """By noise as long as asked, of each sample's own, whatever share of a batch is asked for."""
    one = learner(model, [ConceptSet(TOKEN, images, "star", vectors=2)])
    plain = one.batch(0, slice(6), 6)
    one.embedding_noise = 0.5
    sample, part = one.batch(0, slice(6), 6), one.batch(0, slice(2, 4), 6)
    assert torch.equal(sample.x0, plain.x0)
    assert torch.equal(sample.tokens, plain.tokens)
    assert torch.equal(sample.embedding_noise[2:4], part.embedding_noise)
    before = one.table(sample.tokens).detach()
    one.table.embedding_noise = sample.embedding_noise
    off = (one.table(sample.tokens) - before).detach()
    new = sample.tokens >= one.first
    assert not off[~new].any()
    length = off[new].norm(dim=1) / before[new].norm(dim=1)
    assert 0.3 < float(length.mean()) < 0.7
    assert len({round(float(x), 5) for x in length}) == int(new.sum())
    quiet, loud = float(one.loss(plain, 1).detach()), float(one.loss(sample, 1).detach())
    assert quiet != loud
    one.embedding_noise = 0.0
    assert float(one.loss(plain, 1).detach()) == quiet


def test_random_crops_are_cut_from_the_picture(model: str, images: Path) -> None:
    one = learner(model, [ConceptSet(TOKEN, images, "star")], crops=True)
    sample = one.batch(0, slice(4), 4)
    assert sample.x0.shape == (4, 4, 16, 16)
    assert one.lessons[0].moments is None


def test_strong_noise_weighs_more_where_asked(model: str, images: Path) -> None:
    one = learner(model, [ConceptSet(TOKEN, images, "star")])
    sample = one.batch(3, slice(4), 4)
    one.max_loss_weight = 10.0
    noisy = one.pipe.scheduler.add_noise(sample.x0, sample.eps, sample.t)
    text = one.pipe.text_encoder(sample.tokens)[0]
    error = (one.pipe.unet(noisy, sample.t, encoder_hidden_states=text).sample - sample.eps).square().mean((1, 2, 3))
    weight = (1 / one.pipe.scheduler.alphas_cumprod[sample.t]).clamp(max=10)
    assert weight.max() > 2
    torch.testing.assert_close(one.loss(sample, 1), (weight * error).mean(), rtol=1e-4, atol=1e-6)


def test_low_memory_keeps_less_and_gives_the_same_gradient(tmp_path: Path, model: str, images: Path) -> None:
    kept, gradients = [], []
    for low in (False, True):
        run = Run(settings(tmp_path, model, images, low_memory=low), [ConceptSet(TOKEN, images, "star")])
        sample, sizes = run.learner.batch(0, slice(2), 2), []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.numel())
            return tensor

        run.learner.table.rows = run.learner.parameter.rows
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss = run.learner.loss(sample, 1)
            kept.append(sum(sizes))
        loss.backward()
        gradients.append(run.learner.parameter.rows.grad)
    assert kept[1] < 0.7 * kept[0]
    torch.testing.assert_close(*gradients, rtol=1e-4, atol=1e-7)


def test_attention_that_trains_quickly_says_the_same(model: str, images: Path) -> None:
    one = learner(model, [ConceptSet(TOKEN, images, "star")])
    sample, losses = one.batch(3, slice(4), 4), []
    for plain in (False, True):
        for network in (one.pipe.unet, one.pipe.text_encoder) if plain else ():
            suit_training(network, CPU, "bf16")
        losses.append(one.loss(sample, 1).detach())
    assert one.pipe.text_encoder.config._attn_implementation == "eager"
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- whole runs


def test_only_the_new_rows_change(tmp_path: Path, model: str, images: Path) -> None:
    run = Run(settings(tmp_path, model, images), [ConceptSet(TOKEN, images, "star", vectors=2)])
    before, fresh = run.learner.learned()[TOKEN], load_pipeline(model, CPU, torch.float32)
    run.train()
    assert not torch.equal(run.learner.learned()[TOKEN], before)
    pipe = run.learner.pipe
    for part in ("unet", "vae", "text_encoder"):
        now = {
            name.replace("token_embedding.table", "token_embedding"): x
            for name, x in getattr(pipe, part).state_dict().items()
        }
        for name, tensor in getattr(fresh, part).state_dict().items():
            assert torch.equal(now[name], tensor), name


def test_it_leaves_vectors_pictures_and_a_record(tmp_path: Path, model: str, images: Path) -> None:
    main(settings(tmp_path, model, images, vectors=2))
    saved = load_file(tmp_path / "learned" / "learned_new1.safetensors")
    assert saved[TOKEN].shape == (2, WIDTH)
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["metrics"]["step"] == 6
    for name in ("progress_new1.png", "loss.png"):
        assert Image.open(tmp_path / "run" / name).width > 100


def test_scores_choose_the_best_vectors(tmp_path: Path, model: str, images: Path) -> None:
    clip = save_clip(tmp_path / "clip")
    run = Run(settings(tmp_path, model, images, clip=str(clip)), [ConceptSet(TOKEN, images, "star")])
    run.train()
    scores = [look.scores[TOKEN] for look in run.looks.taken]
    assert len(scores) == 2
    assert run.looks.best[TOKEN][0] == max(scores)
    assert torch.equal(run.looks.chosen()[TOKEN], run.looks.best[TOKEN][1])


def test_rows_stay_as_long_as_words(tmp_path: Path, model: str, images: Path) -> None:
    run = Run(settings(tmp_path, model, images, lr=5.0, max_norm=0.9), [ConceptSet(TOKEN, images, "star")])
    run.train()
    assert run.learner.learned()[TOKEN].norm() <= 0.9 * run.learner.word_norms[0] * 1.0001


def test_every_token_has_a_run_folder_of_its_own(model: str, images: Path) -> None:
    names = []
    for tokens in (("<a>",), ("<b>",), ("<a>", "<b>")):
        concepts = [ConceptSet(token, images, "star") for token in tokens]
        run = Run(InversionArgs(model, device="cpu", precision="fp32", clip=None), concepts)
        names.append(run.folder.relative_to(ROOT).as_posix())
    assert names == [f"runs/p3_textual_inversion/{name}" for name in ("a", "b", "a+b")]


def test_an_end_of_memory_names_what_helps_and_keeps_the_checkpoint(
    tmp_path: Path, model: str, images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = settings(tmp_path, model, images, batch=6, accumulate=2, validate_every=0)
    original, calls = TextualInversion.backward, []

    def backward(self: TextualInversion, *arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(self, *arguments)

    monkeypatch.setattr(TextualInversion, "backward", backward)
    with pytest.raises(BadInput, match="at step 4 with --batch 6 in 2 parts: try --accumulate 3 or --low-memory"):
        main(given)
    assert torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)["step"] == 4


def command(given: Settings) -> list[str]:
    flags = [
        "--model",
        given.model,
        "--images",
        str(given.images),
        "--init",
        "star",
        "--device",
        "cpu",
        "--precision",
        "fp32",
    ]
    flags += [
        "--steps",
        str(given.steps),
        "--batch",
        "2",
        "--validate-every",
        "0",
        "--save-every",
        "1",
        "--log-every",
        "1",
    ]
    return [
        sys.executable,
        str(ROOT / "P3_textual_inversion.py"),
        *flags,
        "--run",
        str(given.run),
        "--output",
        str(given.output),
    ]


@pytest.mark.slow
def test_a_killed_run_goes_on_to_the_same_bits(tmp_path: Path, model: str, images: Path) -> None:
    """SIGKILL at some step, then the same command; against a run that nobody disturbed."""
    broken = settings(tmp_path, model, images, steps=40)
    process = subprocess.Popen(command(broken), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    checkpoint = broken.run / "checkpoint.pt"
    while not checkpoint.is_file() and process.poll() is None:
        pass
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (broken.output / "learned_new1.safetensors").exists()
    done = subprocess.run(command(broken), capture_output=True, text=True, timeout=900)
    assert "going on at step" in done.stderr
    whole = settings(tmp_path, model, images, steps=40, run=tmp_path / "run2", output=tmp_path / "learned2")
    subprocess.run(command(whole), capture_output=True, timeout=900, check=True)
    files = [folder / "learned_new1.safetensors" for folder in (broken.output, whole.output)]
    assert torch.equal(load_file(files[0])[TOKEN], load_file(files[1])[TOKEN])


@pytest.mark.slow
def test_two_processes_learn_like_one(tmp_path: Path, model: str, images: Path) -> None:
    one = settings(tmp_path, model, images, run=tmp_path / "run1", output=tmp_path / "learned1")
    two = settings(tmp_path, model, images, run=tmp_path / "run2", output=tmp_path / "learned2")
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "--",
    ]  # else it takes --run for a flag of its own
    for launch, given in (([sys.executable], one), (torchrun, two)):
        done = subprocess.run(launch + command(given)[1:], capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((two.run / "record.json").read_text())["metrics"]["processes"] == 2
    files = [folder / "learned_new1.safetensors" for folder in (one.output, two.output)]
    torch.testing.assert_close(*[load_file(file)[TOKEN] for file in files], rtol=1e-3, atol=1e-5)


# ---------------------------------------------------------------- pictures and bad input


def test_pictures_are_upright_and_opaque(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    Image.new("RGB", (40, 20)).save(folder / "b.jpg", exif=exif)
    Image.new("RGBA", (8, 8), (255, 0, 0, 0)).save(folder / "a.png")
    (folder / "notes.txt").write_text("no picture")
    clear, turned = read_pictures(folder)
    assert clear.getpixel((0, 0)) == (255, 255, 255)
    assert turned.size == (20, 40)


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
        ({"zoom_out": 1.5}, "--zoom-out 1.5"),
        ({"embedding_noise": -1.0}, "--embedding-noise -1.0"),
        ({"zoom_out": 0.5, "crop": "random"}, "--crop center"),
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
        read_pictures(folder)
    (folder / "x.png").write_bytes(b"nothing")
    with pytest.raises(BadInput, match=r"x\.png is not a readable picture"):
        read_pictures(folder)


def test_only_what_can_be_opened_counts_as_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_pictures(tmp_path / "images", 1)
    (folder / "paper.pdf").write_bytes(b"%PDF")
    assert len(read_pictures(folder)) == 1
    told = capsys.readouterr().err
    assert "paper.pdf is no picture: skipped" in told
    assert "one picture only" in told
    Image.new("I;16", (8, 8)).save(folder / "deep.png")
    with pytest.raises(BadInput, match=r"deep\.png has mode I;16"):
        read_pictures(folder)


def test_sentences_beside_a_picture_are_that_pictures_own(tmp_path: Path, model: str) -> None:
    folder = save_pictures(tmp_path / "images", 2)
    (folder / "0.txt").write_text("a red {} on a bench\n\n{} at night\n")
    one = learner(model, [ConceptSet(TOKEN, folder, "star")])
    lesson = one.lessons[0]
    assert lesson.counts.tolist() == [2, len(lesson.concept.sentences)]
    words = [one.pipe.tokenizer.decode(ids, skip_special_tokens=True) for ids in lesson.tokens[0, :3]]
    assert words[0] == words[2] != words[1]
    used = torch.cat([one.batch(step, slice(0, 8), 8).tokens for step in range(6)])
    own = (used[:, None] == lesson.tokens[0, :2]).all(-1).any(1)
    others = (used[:, None] == lesson.tokens[1]).all(-1).any(1)
    assert (own | others).all()
    assert 12 < own.sum() < 36
    (folder / "1.txt").write_text("no place for it\n")
    with pytest.raises(BadInput, match=r"1\.txt, line 1: 'no place for it' wants \{\} where <new1> stands"):
        learner(model, [ConceptSet(TOKEN, folder, "star")])


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
        ([{"token": "<a>"}], "entry 0: wants token, images and init"),
        ([{"token": "<a>", "images": "x", "init": "dog", "vectors": "2"}], "entry 0: vectors '2'"),
        ([{"token": "<a>", "images": "x", "init": "dog", "kind": "animal"}], "animal"),
        ([{"token": "<a>", "images": "x", "init": "dog"}] * 2, "<a> is there twice"),
    ],
)
def test_bad_lists_of_concepts_are_named(tmp_path: Path, content: Any, message: str) -> None:
    (tmp_path / "concepts.json").write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        read_concepts(tmp_path / "concepts.json")


def test_another_runs_checkpoint_is_not_taken(tmp_path: Path, model: str, images: Path) -> None:
    main(settings(tmp_path, model, images))
    with pytest.raises(BadInput, match="another run"):
        main(settings(tmp_path, model, images, seed=5))
    with pytest.raises(BadInput, match="another run, its pictures"):
        main(settings(tmp_path, model, save_pictures(tmp_path / "others", 3, seed=1)))
