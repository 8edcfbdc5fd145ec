"""The small CLIP of the miniature: its words, its truth, its two forms, and a training that can be stopped and resumed."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import socket
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import pytest
import torch
import torch.nn.functional as F
from first_step import first_loss
from PIL import Image
from small_clip import run as run_zeroshot
from torch import Tensor
from transformers import AutoTokenizer, CLIPModel, CLIPProcessor, CLIPTextModel, CLIPTokenizer

from miniature.clip_batches import (
    FAMILY,
    NONE,
    ClipBatches,
    bare_kinds,
    greyed,
    never_seen,
    parts_of,
    relative,
    restyled,
    true_of,
)
from miniature.clip_grading import encode_images, encode_texts, held_out_pairs, matching, measure_rates
from miniature.clip_loss import StyleLoss, contrastive_loss, forward, parameter_groups
from miniature.clip_model import (
    SHIPPED,
    WEIGHTS,
    ClipSize,
    SmallClip,
    convert,
    load_clip,
    model_config,
    save_clip,
    to_transformers,
)
from miniature.scenery.captions import ALONE, Caption, caption
from miniature.scenery.render import as_tensor, dataset, render, render_batch
from miniature.scenery.scenes import (
    ALL_KINDS,
    ALL_STYLES,
    HELD_OUT_KINDS,
    HELD_OUT_PAIRS,
    KINDS,
    Background,
    Scene,
    SceneSpec,
    Thing,
    sample_scene,
)
from miniature.scenery.vocabulary import END, LENGTH, START, learn_merges, make_tokenizer, save_tokenizer
from miniature.train_clip import ConvertClip, GradeClip, TrainClip, main
from miniature.world import RenderZeroshot, render_zeroshot
from runtime.cli import BadInput
from runtime.seeds import derived_seed
from training.log import TrainingLog

TINY = ClipSize(embedding=32, vision_width=32, vision_layers=2, text_width=32, text_layers=2, head=16)
PROMPTS = [
    "a photo of a star.",
    "a red key, next to a mushroom",
    "Watercolour style: a blue ring on a textured red backdrop",
]


def small(folder: Path, **more: Any) -> TrainClip:
    values = {"steps": 4, "batch": 8, "save_every": 2, "grade": 12, "size": TINY, "workers": 0}
    return TrainClip(**{**values, "run": folder / "run", "output": folder / "clip", **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a model in open_clip's form, with weights large enough that images and prompts differ."""
    folder = tmp_path_factory.mktemp("clip") / "clip"
    config = model_config(TINY, make_tokenizer())
    model = open_clip.CLIP(**config)
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=1.5 * parameter.shape[-1] ** -0.5)
    save_clip(folder, model, config, {"steps": 0})
    return folder


@pytest.fixture(scope="module")
def clip(folder: Path) -> SmallClip:
    return load_clip(folder)


@pytest.fixture(scope="module")
def tokenizer() -> CLIPTokenizer:
    return make_tokenizer()


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    """[6,3,64,64] uint8."""
    return as_tensor(render_batch(range(6)).images)


# ---------------------------------------------------------------- words


def test_every_word_of_a_caption_is_one_token(tokenizer: CLIPTokenizer) -> None:
    texts = [caption(sample_scene(seed), seed).text for seed in range(50_000, 51_500)]
    words = {word for text in texts for word in tokenizer.tokenize(text)}
    assert len(words) > 70
    assert all(word.endswith("</w>") for word in words)
    assert tokenizer.tokenize("A Star, close-up.") == [
        "a</w>",
        "star</w>",
        ",</w>",
        "close</w>",
        "-</w>",
        "up</w>",
        ".</w>",
    ]


@pytest.mark.parametrize("text", [*HELD_OUT_KINDS, "zebra", "naïve", "東京", "🙂", "x_7"])
def test_unknown_words_are_spelled(text: str, tokenizer: CLIPTokenizer) -> None:
    ids = tokenizer(text).input_ids
    assert len(ids) > 3
    assert ids.count(tokenizer.eos_token_id) == 1  # which is also what the unknown would become
    assert str(tokenizer.decode(ids, skip_special_tokens=True)).replace(" ", "") == text.replace(" ", "")


def test_ids_are_laid_out_as_in_clip(tokenizer: CLIPTokenizer) -> None:
    assert tokenizer.eos_token_id == len(tokenizer) - 1 == tokenizer.bos_token_id + 1
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (START, END, END)
    assert tokenizer.eos_token_id != 2  # on which transformers would pool at the largest id
    ids = tokenizer("red " * 100, truncation=True).input_ids  # the length is the tokenizer's own
    assert tokenizer.model_max_length == LENGTH == len(ids)
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)


def test_merges_make_every_word_whole_in_any_order() -> None:
    words = ["star", "tar", "tree", "a", "stare", "art"]
    merges = learn_merges(words)
    assert merges == learn_merges(words[::-1])
    assert {a + b for a, b in merges} >= {word + "</w>" for word in words if len(word) > 1}
    assert learn_merges(["a"]) == []


def test_files_give_the_same_ids(tokenizer: CLIPTokenizer, tmp_path: Path) -> None:
    save_tokenizer(tmp_path)
    wanted = tokenizer(PROMPTS, padding="max_length").input_ids
    for kind in (CLIPTokenizer, AutoTokenizer):
        assert kind.from_pretrained(tmp_path)(PROMPTS, padding="max_length").input_ids == wanted
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    save_tokenizer(tmp_path)
    assert written == {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(written) == {"vocab.json", "merges.txt", "tokenizer_config.json"}


# ---------------------------------------------------------------- truth


def scene(*things: tuple[str, str], background: str = "white", style: str = "flat", column: bool = False) -> Scene:
    boxes = [(4, 4, 24, 24), (4, 40, 24, 60) if column else (40, 4, 60, 24)]
    laid = tuple(Thing(kind, colour, box) for (colour, kind), box in zip(things, boxes, strict=False))
    return Scene(laid, Background(background), style)


RED_STAR, BLUE_RING, BLUE_STAR, RED_RING = ("red", "star"), ("blue", "ring"), ("blue", "star"), ("red", "ring")


@pytest.mark.parametrize(
    ("other", "named", "true"),
    [
        (scene(RED_STAR), "kind0 colour0", True),
        (scene(BLUE_STAR), "kind0 colour0", False),
        (scene(BLUE_STAR), "kind0", True),
        (scene(RED_RING), "kind0", False),
        (scene(BLUE_RING), "", True),  # "an object"
        (scene(RED_STAR, BLUE_RING), "", False),  # but these are two
        (scene(RED_STAR, background="blue"), "kind0", True),
        (scene(RED_STAR, background="blue"), "kind0 background", False),
        (scene(RED_STAR, style="dots"), "colour0 style", False),
        (scene(("red", "key")), "kind0", False),
        (scene(("red", "heart")), "pointed0 colour0", True),
        (scene(("red", "key")), "pointed0", False),
        (scene(RED_STAR, style="relief"), "smooth", True),
        (scene(RED_STAR, style="dots"), "smooth", False),
    ],
)
def test_a_caption_is_true_of_what_has_all_that_it_names(other: Scene, named: str, true: bool) -> None:
    caption = Caption("", frozenset(named.split()))
    also = true_of([scene(RED_STAR), other], [caption, Caption("", frozenset({"background"}))])
    assert also.diagonal().all()
    assert bool(also[1, 0]) is true


@pytest.mark.parametrize(
    ("other", "named", "true"),
    [
        (scene(BLUE_RING, RED_STAR), "kind0 kind1 colour0 colour1", True),
        (scene(BLUE_RING, RED_STAR), "kind0 kind1 colour0 colour1 place", False),  # the other way round
        (scene(RED_STAR, BLUE_RING, column=True), "kind0 kind1 place", False),
        (scene(RED_STAR, BLUE_RING, column=True), "kind0 kind1", True),
        (scene(RED_RING, BLUE_STAR), "kind0 kind1 colour0 colour1", False),  # swapped colours
        (scene(RED_RING, BLUE_STAR), "kind0 kind1", True),
        (scene(RED_STAR), "kind0", False),  # "a star and an object"
    ],
)
def test_two_objects_may_come_in_any_order_unless_their_places_are_named(other: Scene, named: str, true: bool) -> None:
    caption = Caption("", frozenset(named.split()))
    assert bool(true_of([scene(RED_STAR, BLUE_RING), other], [caption] * 2)[1, 0]) is true


def test_relatives_share_all_but_objects_and_places() -> None:
    heads = [sample_scene(seed) for seed in range(60)]
    swapped = 0
    for seed, head in enumerate(heads):
        for member in (1, 2, 3):
            other = relative(head, member, 1000 + seed)
            assert {t.colour for t in other.things} == {t.colour for t in head.things}
            assert (other.style, other.background.colour) == (head.style, head.background.colour)
            assert other.background.ground == head.background.ground
            assert not {(t.colour, t.kind) for t in other.things} & set(HELD_OUT_PAIRS)
        first = relative(head, 1, 1000 + seed)
        same = [t.kind for t in first.things] == [t.kind for t in head.things]
        swapped += same and [t.colour for t in first.things] != [t.colour for t in head.things]
    assert swapped >= 10


def test_a_restyled_family_has_four_styles_and_all_else_in_common() -> None:
    for seed in range(16):
        family = [sample_scene(seed)]
        for member in (1, 2, 3):
            family.append(restyled(family[0], member, 1000 + seed))
        assert len({scene.style for scene in family}) == 4
        assert len({(scene.things, scene.background) for scene in family}) == 1


def test_a_batch_holds_families_of_both_sorts_and_knows_their_styles() -> None:
    styles = torch.stack([ClipBatches(0, 32, 8)[step].styles for step in range(5)]).view(-1, FAMILY)
    counts = {len(set(family.tolist())) for family in styles}
    assert counts == {1, 4}
    assert 0.2 < sum(len(set(family.tolist())) == 4 for family in styles) / len(styles) < 0.6


def test_a_batch_depends_on_seed_and_step_alone() -> None:
    first, again = ClipBatches(3, 8, 8)[5], ClipBatches(3, 8, 8)[5]
    assert (first.images == again.images).all()
    assert first.texts == again.texts
    for other in (ClipBatches(3, 8, 8)[6], ClipBatches(4, 8, 8)[5]):
        assert first.texts != other.texts
        assert (first.images != other.images).any()
    stops = [text.endswith(".") for step in range(5) for text in ClipBatches(0, 32, 8)[step].texts]
    assert 0.1 < sum(stops) / len(stops) < 0.4


# ---------------------------------------------------------------- loss and forward pass


def features(seed: int) -> Tensor:
    return F.normalize(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_without_true_captions_of_others_the_loss_is_open_clips() -> None:
    x, y, scale = features(0), features(1), torch.tensor(5.0)
    ours = contrastive_loss(x, y, scale, torch.eye(4, dtype=torch.bool))
    torch.testing.assert_close(ours, open_clip.ClipLoss()(x, y, scale))


def test_a_true_caption_of_another_is_no_negative() -> None:
    x, y = features(0), features(1)
    also = torch.eye(4, dtype=torch.bool)
    also[0, 2] = True  # caption 2 is true of picture 0; caption 0 is not of picture 2
    logits = 5.0 * x @ y.T
    total = 0.0
    for k in range(4):
        row = [logits[k, j] for j in range(4) if (k, j) != (0, 2)]
        column = [logits[i, k] for i in range(4) if (i, k) != (0, 2)]
        total += float(torch.stack(row).logsumexp(0) + torch.stack(column).logsumexp(0) - 2 * logits[k, k]) / 8
    assert float(contrastive_loss(x, y, torch.tensor(5.0), also)) == pytest.approx(total, abs=1e-5)


def test_the_style_is_read_from_the_features() -> None:
    loss, x = StyleLoss(8), features(0).requires_grad_()
    value = loss(x, torch.tensor(5.0), torch.tensor([0, 1, 6, 7]))
    wanted = F.cross_entropy(5.0 * x @ loss.head.weight.T + loss.head.bias, torch.tensor([0, 1, 6, 7]))
    torch.testing.assert_close(value, wanted)
    value.backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0


def test_shorter_prompts_have_the_same_features(clip: SmallClip, pictures: Tensor) -> None:
    x = pictures[:3].float() / 127.5 - 1
    long, short = (clip.tokenizer(PROMPTS, padding=p, return_tensors="pt").input_ids for p in ("max_length", True))
    assert short.shape[1] < long.shape[1] == LENGTH
    texts = forward(clip.model, x, short)[1]
    torch.testing.assert_close(texts, clip.model.encode_text(long, normalize=True), atol=1e-5, rtol=0)


def test_weight_decay_spares_embeddings_gains_and_biases(clip: SmallClip) -> None:
    clip = clip._replace(model=copy.deepcopy(clip.model).requires_grad_(True))
    decayed, spared = parameter_groups(clip.model, 0.1)
    assert len(decayed["params"]) + len(spared["params"]) == len(list(clip.model.parameters()))
    embeddings = (clip.model.token_embedding.weight, clip.model.positional_embedding, clip.model.visual.class_embedding)
    assert all(any(p is e for p in spared["params"]) for e in embeddings)
    assert all(p.ndim > 1 for p in decayed["params"])


# ---------------------------------------------------------------- the two forms


def test_both_forms_give_the_same_features_and_logits(
    folder: Path, clip: SmallClip, pictures: Tensor, tmp_path: Path
) -> None:
    main(ConvertClip(tmp_path / "hf", folder))
    model, processor = (kind.from_pretrained(tmp_path / "hf") for kind in (CLIPModel, CLIPProcessor))
    images = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in pictures]
    theirs = processor(text=PROMPTS, images=images, return_tensors="pt", padding=True)
    ours, _, transform = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(PROMPTS)
    x = torch.stack([transform(image) for image in images])
    assert tokens[:, : theirs.input_ids.shape[1]].tolist() == theirs.input_ids.tolist()
    torch.testing.assert_close(theirs.pixel_values, x, atol=1e-6, rtol=0)
    with torch.inference_mode():
        out = model(**theirs)
        image_logits, text_logits = ours.eval().get_logits(x, tokens)
    for name, wanted in (
        ("image_embeds", encode_images(clip, pictures)),
        ("text_embeds", encode_texts(clip, PROMPTS)),
        ("logits_per_image", image_logits),
        ("logits_per_text", text_logits),
    ):
        torch.testing.assert_close(out[name], wanted, atol=1e-4, rtol=0)
    assert out.text_embeds.std(0).mean() > 0.01  # else anything would agree
    assert out.image_embeds.std(0).mean() > 0.01


def test_added_tokens_leave_the_features_right_in_both_forms(folder: Path) -> None:
    """As textual inversion adds them: above the end token, so that pooling at the largest id would read the wrong place."""
    clip = load_clip(folder)
    base, prompts = len(clip.tokenizer), ["a photo of a <new1> on a red background", "<new1>, in the style of <new2>"]
    assert clip.tokenizer.add_tokens(["<new1>", "<new2>"]) == 2
    tokens = clip.tokenizer(prompts, padding="max_length", return_tensors="pt").input_ids
    assert int(tokens.max()) == base + 1 > clip.tokenizer.eos_token_id
    model = to_transformers(clip)
    model.text_model.resize_token_embeddings(base + 2)
    ours = clip.model.token_embedding
    added = torch.randn(2, ours.embedding_dim, generator=torch.Generator().manual_seed(0))
    clip.model.token_embedding = torch.nn.Embedding.from_pretrained(torch.cat([ours.weight, added]))
    with torch.inference_mode():
        model.text_model.get_input_embeddings().weight[base:] = added
        theirs = F.normalize(model.get_text_features(tokens).pooler_output, dim=-1)
        wanted = clip.model.encode_text(tokens, normalize=True)
        torch.testing.assert_close(theirs, wanted, atol=1e-4, rtol=0)
        clip.model.text_pool_type = "argmax"
        assert (clip.model.encode_text(tokens, normalize=True) - wanted).abs().max() > 0.01


def test_the_text_tower_is_a_separate_text_encoder(clip: SmallClip, tmp_path: Path) -> None:
    """As a Stable Diffusion pipeline saves and loads it."""
    tower = to_transformers(clip).text_model
    tower.save_pretrained(tmp_path)
    again = CLIPTextModel.from_pretrained(tmp_path)
    tokens = clip.tokenizer(PROMPTS, padding="max_length", return_tensors="pt")
    with torch.inference_mode():
        states, wanted = again(tokens.input_ids).last_hidden_state, tower(tokens.input_ids).last_hidden_state
    assert states.shape == (3, LENGTH, TINY.text_width)
    assert (states == wanted).all()
    assert again.config.eos_token_id == clip.tokenizer.eos_token_id
    ends = tokens.attention_mask.sum(1) - 1
    features = F.normalize(states[torch.arange(3), ends] @ clip.model.text_projection, dim=1)
    torch.testing.assert_close(features, encode_texts(clip, PROMPTS), atol=1e-4, rtol=0)


def test_the_added_tokens_own_vectors_matter(folder: Path) -> None:
    clip = load_clip(folder)
    clip.tokenizer.add_tokens(["<new1>"])
    model = to_transformers(clip)
    model.text_model.resize_token_embeddings(len(clip.tokenizer))
    tokens = clip.tokenizer(["a photo of a <new1>"], return_tensors="pt").input_ids
    vectors = model.text_model.get_input_embeddings().weight
    found = []
    for name in ("star", "ring"):
        word = clip.tokenizer.convert_tokens_to_ids(f"{name}</w>")
        with torch.inference_mode():
            vectors[-1] = vectors[word]
            found.append(F.normalize(model.get_text_features(tokens).pooler_output, dim=-1))
        torch.testing.assert_close(
            found[-1], encode_texts(load_clip(folder), [f"a photo of a {name}"]), atol=1e-4, rtol=0
        )
    assert (found[0] - found[1]).abs().max() > 0.01


def test_the_folder_can_be_moved_and_needs_no_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = shutil.copytree(folder, tmp_path / "with a space" / "clip")
    asked: list[Any] = []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **_: asked.append(address))
    monkeypatch.chdir(tmp_path)
    open_clip.create_model_and_transforms(f"local-dir:{moved}")
    assert open_clip.get_tokenizer("local-dir:with a space/clip")(PROMPTS).shape == (3, LENGTH)
    convert(moved, tmp_path / "hf")
    assert not asked


def test_p3_measures_what_grading_measures(folder: Path, clip: SmallClip, tmp_path: Path) -> None:
    render_zeroshot(RenderZeroshot(tmp_path / "data", count=24, seed=9))
    metrics = run_zeroshot(
        tmp_path, tmp_path / "data" / "val", f"local-dir:{folder}", prompts="single", precision="fp32"
    )["metrics"]
    assert metrics["classes"] == len(KINDS)
    assert metrics["top1"] == pytest.approx(held_out_pairs(clip, 24, 9), abs=1e-4)


def test_matching_accepts_any_true_caption(clip: SmallClip) -> None:
    class Parrot:
        """Sees everything alike: the first caption is always the best."""

        logit_scale = torch.zeros(())

        def encode_image(self, x: Tensor, normalize: bool) -> Tensor:
            return torch.ones(len(x), 1)

        def encode_text(self, tokens: Tensor, normalize: bool) -> Tensor:
            return torch.arange(len(tokens), 0, -1.0)[:, None]

    made = dataset(200, 4)
    also = [true_of(made.scenes[i : i + 100], made.captions[i : i + 100])[:, 0].float().mean() for i in (0, 100)]
    assert matching(clip._replace(model=Parrot()), 200, 4) == pytest.approx(float(sum(also)) / 2, abs=1e-4)


# ---------------------------------------------------------------- training


def test_the_first_steps_loss_is_that_of_a_plain_loop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Images in -1..1; contrastive, 0.7 x objects at patches, 0.3 x style; random weights and batch 0 of the seed."""
    settings = small(tmp_path, parts=0.7, styles=0.3, seed=3, precision="fp32", device="cpu")
    loss = first_loss(lambda: main(settings), monkeypatch)

    tokenizer, batch = make_tokenizer(), ClipBatches(3, 8, TINY.patch)[0]
    torch.manual_seed(3)
    model = open_clip.CLIP(**model_config(TINY, tokenizer))
    objects, styles = torch.nn.Linear(32, NONE + 1), torch.nn.Linear(32, len(ALL_STYLES))
    states: list[Tensor] = []
    model.visual.transformer.resblocks[-2].register_forward_hook(lambda *values: states.append(values[2]))
    with torch.no_grad():
        x = model.encode_image(batch.images.float() / 127.5 - 1, normalize=True)
        tokens = tokenizer(batch.texts, padding="max_length", return_tensors="pt").input_ids
        y, scale = model.encode_text(tokens, normalize=True), model.logit_scale.exp()
        logits, contrastive = scale * x @ y.T, 0.0
        for k in range(8):
            row = [logits[k, j] for j in range(8) if j == k or not batch.is_true[k, j]]
            column = [logits[i, k] for i in range(8) if i == k or not batch.is_true[i, k]]
            contrastive += float(torch.stack(row).logsumexp(0) + torch.stack(column).logsumexp(0) - 2 * logits[k, k])

        total, weights = 0.0, 0.0
        for k, answers in enumerate(objects(states[0][:, 1:])):
            answers[:, :NONE][:, batch.never[k]] = -torch.inf
            for answer, kind in zip(answers.log_softmax(1), batch.parts[k].flatten().tolist(), strict=True):
                weight = 0.3 if kind == NONE else 1.0
                total, weights = total - weight * float(answer[kind]), weights + weight
        style = F.cross_entropy(styles(scale * x), batch.styles)
    assert loss == pytest.approx(contrastive / 16 + 0.7 * total / weights + 0.3 * float(style), rel=1e-4)


def test_a_batch_is_made_of_families_whose_images_texts_and_labels_are_of_the_same_scenes() -> None:
    """Every fourth scene is drawn freely, the three after it are relatives, or itself in other styles; grey families have no colour."""
    kinds = set()
    for step in range(6):
        batch, scenes, captions = ClipBatches(7, 16, 8)[step], list[Scene](), list[Caption]()
        for row in range(16):
            seed, member = derived_seed(7, step, row // 4, row % 4), row % 4
            if not member:
                scenes.append(sample_scene(seed))
            else:
                others = [similar(scenes[row - member], member, seed) for similar in (relative, restyled)]
                one_style = len(set(batch.styles[row - member : row - member + 4].tolist())) == 1
                scenes.append(others[0] if one_style else others[1])
            text = caption(scenes[row], derived_seed(7, step, row // 4, row % 4, 1))
            pixels = render(scenes[row])
            grey = bool((batch.images[row] == batch.images[row][:1]).all())
            if grey:
                pixels, text = greyed(pixels, text)
            captions.append(text)
            kinds.add((grey, member))
            assert torch.equal(batch.images[row], as_tensor(pixels[None])[0])
            assert batch.texts[row].removesuffix(".") == text.text
            assert ALL_STYLES[batch.styles[row]] == scenes[row].style
        assert torch.equal(batch.parts, parts_of(scenes, 8))
        assert torch.equal(batch.never, never_seen(scenes))
        by_colour = batch.never.float() @ bare_kinds(scenes, captions).float().T > 0
        assert torch.equal(batch.is_true, true_of(scenes, captions) | by_colour)
    assert len(kinds) == 8  # both sorts occur


class Knowing:
    """Image and text features that agree on all questions but one."""

    def __init__(self, count: int, seed: int, wrong: str):
        self.texts: list[str] = []
        self.wrong = wrong
        held_out = [
            sample_scene(derived_seed(seed, k), SceneSpec(kinds=(KINDS[k % len(KINDS)],), pairs="held_out"))
            for k in range(count)
        ]
        whole = dataset(count, seed + 1)
        singles = dataset(count, seed, SceneSpec(count=1, among=KINDS)).scenes
        self.known = {render(scene).tobytes(): (scene, "") for scene in [*held_out, *singles]}
        self.held_out = {render(scene).tobytes() for scene in held_out}
        self.known |= {
            image.tobytes(): (scene, each.text)
            for image, scene, each in zip(whole.images, whole.scenes, whole.captions, strict=True)
        }

    def encode_texts(self, _: Any, texts: Any) -> Tensor:
        self.texts += [text for text in texts if text not in self.texts]
        return F.one_hot(torch.tensor([self.texts.index(text) for text in texts]), 400).float()

    def encode_images(self, _: Any, images: Tensor) -> Tensor:
        rows = []
        for image in images.permute(0, 2, 3, 1).contiguous().numpy():
            scene, text = self.known[image.tobytes()]
            thing = scene.things[0]
            right = {
                "object": f"a photo of a {thing.kind}.",
                "colour": f"a photo of a {thing.colour} object.",
                "background": f"a photo of an object on a {scene.background.colour} background.",
                "style": f"a photo of an object in the style of {scene.style}.",
                "place": f"a photo of an object {ALONE[thing.place][0]}.",
                "caption": text,
            }
            single = "held out" if image.tobytes() in self.held_out else "object"
            wrong = "object" if self.wrong == single else "" if self.wrong == "object" else self.wrong
            right = {name: words for name, words in right.items() if name != wrong}
            rows.append(sum(self.encode_texts(None, [*right.values()])))
        return torch.stack([torch.as_tensor(row) for row in rows])


@pytest.mark.parametrize("wrong", ["", "object", "colour", "background", "style", "place", "held out", "caption"])
def test_a_clips_mistakes_show_in_the_line_of_their_question_alone(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    oracle: Any = Knowing(24, 3, wrong)
    for name in ("encode_images", "encode_texts"):
        monkeypatch.setattr(f"miniature.clip_grading.{name}", getattr(oracle, name))
    rates = measure_rates(oracle, 24, 3)
    lines = {"held out": "object, held-out pairs", "caption": "caption, of 100"}
    below = {line for line, rate in rates.items() if rate < 1}
    assert below == ({lines.get(wrong, wrong)} if wrong else set())
    assert len(rates) == 7


def test_a_question_is_answered_for_all_its_images_together(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mixture is a recorder that turns every answer into the next one: all questions are wrong, captions are not."""
    calls: list[tuple[int, ...]] = []

    def next_answer(features: Tensor, logits: Tensor) -> Tensor:
        calls.append((*features.shape, *logits.shape))
        assert logits.max() == pytest.approx(5.0)  # scaled as the model scales its cosines
        return logits.roll(1, 1)

    oracle: Any = Knowing(24, 3, "")
    oracle.model = type("Model", (), {"logit_scale": torch.tensor(5.0).log()})
    for name in ("encode_images", "encode_texts"):
        monkeypatch.setattr(f"miniature.clip_grading.{name}", getattr(oracle, name))
    monkeypatch.setattr("miniature.clip_grading.transduce", next_answer)
    rates = measure_rates(oracle, 24, 3, together=True)
    assert rates.pop("caption, of 100") == 1
    assert set(rates.values()) == {0}
    assert [call[0] == call[2] for call in calls] == [True] * 6
    assert all(call[0] == 24 for call in [*calls[:4], calls[5]])


def test_training_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    losses: list[float] = []
    monkeypatch.setattr(
        TrainingLog, "show", lambda _, step, **values: losses.extend(v for k, v in values.items() if k == "loss")
    )
    main(small(tmp_path, batch=16, steps=40, size=replace(TINY, patch=16), log_every=1, save_every=50))
    assert sum(losses[-8:]) < 0.9 * sum(losses[:8])


def test_a_signal_leaves_a_checkpoint_and_the_same_command_ends_with_the_very_same_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The signal comes while the second step's images are being made; who renders doesn't matter either."""
    main(small(tmp_path / "straight", workers=1))
    getitem = ClipBatches.__getitem__

    def interrupting(self: ClipBatches, step: int) -> Any:
        if step == 1 and not (tmp_path / "run" / "checkpoint.pt").exists():
            os.kill(os.getpid(), signal.SIGTERM)
        return getitem(self, step)

    monkeypatch.setattr(ClipBatches, "__getitem__", interrupting)
    with pytest.raises(SystemExit, match="130"):
        main(small(tmp_path))
    assert not (tmp_path / "clip").exists()
    main(small(tmp_path))
    straight, resumed = (load_clip(folder / "clip").model.state_dict() for folder in (tmp_path / "straight", tmp_path))
    assert all((resumed[name] == value).all() for name, value in straight.items())
    printed = capsys.readouterr().out
    assert "object, held-out pairs" in printed
    record = json.loads((tmp_path / "run" / "record.json").read_text())
    assert record["settings"]["size"] == asdict(TINY)
    main(GradeClip(tmp_path / "clip", count=12, record=tmp_path / "grade.json"))
    again = json.loads((tmp_path / "grade.json").read_text())["metrics"]["rates"]
    assert again == record["metrics"]["rates"]  # the file holds what was graded


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("command", "named"),
    [
        (lambda p: GradeClip(count=0), "--count 0"),
        (lambda p: GradeClip(seed=-1), "--seed -1"),
        (lambda p: GradeClip(model=p / "none"), "none/open_clip_config.json does not exist; train one"),
        (lambda p: ConvertClip(p / "hf", p / "none"), "none/open_clip_config.json does not exist"),
        (lambda p: small(p, steps=0), "--steps 0"),
        (lambda p: small(p, batch=6), "--batch 6"),
        (lambda p: small(p, seed=-1), "--seed -1"),
        (lambda p: small(p, device="cuda:99"), "--device cuda:99"),
        (lambda p: small(p, output=Path(__file__)), "a file is in the way"),
    ],
)
def test_bad_input_is_named(
    command: Callable[[Path], TrainClip | GradeClip | ConvertClip], named: str, tmp_path: Path
) -> None:
    with pytest.raises(BadInput, match=named):
        main(command(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("size", "named"),
    [({"patch": 10}, "--patch 10"), ({"text_width": 40}, "--text-width 40"), ({"head": 0}, "--head 0")],
)
def test_sizes_that_cannot_be_built_are_named(size: dict[str, int], named: str) -> None:
    with pytest.raises(BadInput, match=named):
        ClipSize(**size)


def test_damaged_folders_are_refused(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "clip")
    config = json.loads((copy / "open_clip_config.json").read_text())
    (copy / WEIGHTS).write_bytes((copy / WEIGHTS).read_bytes()[:500])
    with pytest.raises(BadInput, match="truncated"):
        load_clip(copy)
    shutil.copy(folder / WEIGHTS, copy)
    config["model_cfg"]["text_cfg"]["width"] = 48
    (copy / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(BadInput, match="don't fit"):
        load_clip(copy)
    (copy / "merges.txt").unlink()
    with pytest.raises(BadInput, match=r"merges\.txt does not exist"):
        load_clip(copy)


def test_a_convolutional_tower_is_not_converted(clip: SmallClip) -> None:
    config = clip.config | {"vision_cfg": {**clip.config["vision_cfg"], "layers": [1, 1, 1, 1]}}
    with pytest.raises(BadInput, match="vision transformer"):
        to_transformers(clip._replace(config=config))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"size": replace(TINY, text_layers=1)}, "size"),
        ({"styles": 0.0}, "styles 0.25, not 0.0"),
        ({"steps": 1}, "steps 2, not 1"),
    ],
)
def test_a_run_goes_on_with_the_same_facts_only(more: dict[str, Any], named: str, tmp_path: Path) -> None:
    main(small(tmp_path, steps=2))
    with pytest.raises(BadInput, match=f"was trained with {named}.* --run OTHER"):
        main(small(tmp_path, **{"steps": 2, **more}))


def test_a_full_disk_keeps_the_old_model(
    clip: SmallClip, tmp_path: Path, full_disk: Callable[[int], AbstractContextManager[None]]
) -> None:
    (tmp_path / WEIGHTS).write_text("old")
    with full_disk(20_000), pytest.raises(OSError, match=WEIGHTS):
        save_clip(tmp_path, clip.model, clip.config, {})
    assert (tmp_path / WEIGHTS).read_text() == "old"


# ---------------------------------------------------------------- the shipped model


@pytest.mark.skipif(not (SHIPPED / WEIGHTS).is_file(), reason="checkpoints/miniature/clip holds no weights")
def test_the_shipped_model_knows_objects_in_colours_it_never_saw() -> None:
    """The card says 0.988, of which 500 pictures leave a standard error of 0.5 points; chance is 0.08."""
    assert held_out_pairs(load_clip(), 500, seed=77) >= 0.95
    assert sum(path.stat().st_size for path in SHIPPED.iterdir()) <= 6e6
    assert (SHIPPED / "README.md").is_file()


def test_a_locked_text_towers_states_stay_as_they_were_and_the_rest_learns(folder: Path, tmp_path: Path) -> None:
    before = load_clip(folder).model.state_dict()
    main(small(tmp_path, init=folder, lock_text=True))
    after = load_clip(tmp_path / "clip").model.state_dict()
    changed = {name for name, tensor in before.items() if not torch.equal(tensor, after[name])}
    assert "visual.conv1.weight" in changed
    assert all(name.startswith(("visual.", "logit_scale", "text_projection")) for name in changed)


def test_patches_know_whose_they_are() -> None:
    """Of an object 32 wide at the left top, all but a tenth on each side: the middles 4, 12, 20 and 28 all lie in 3.2 .. 28.8."""
    scene = Scene((Thing("star", "red", (0, 0, 32, 32)),), Background("blue"))
    parts = parts_of([scene], 8)[0]
    assert (parts[:4, :4] == ALL_KINDS.index("star")).all()
    assert (parts != NONE).sum() == 16


def test_without_colours_a_caption_stays_true_and_a_sentence() -> None:
    scene = Scene((Thing("star", "red", (0, 0, 32, 32)), Thing("ring", "orange", (32, 32, 60, 60))), Background("blue"))
    text = "an orange ring and the red star with red object on a textured blue background"
    caption = Caption(text, frozenset({"kind0", "kind1", "colour0", "colour1", "background", "ground"}))
    image, grey = greyed(render(scene), caption)
    assert (image == image[..., :1]).all()
    assert image.std() > 10
    assert grey.text == "a ring and the star with object on a textured background"
    assert grey.named == {"kind0", "kind1", "ground"}


def test_what_only_the_colour_could_answer_is_not_asked() -> None:
    """No red three in training, so "a three" is no wrong caption of a red star: that it is none would follow from its colour."""
    colour, kind = HELD_OUT_PAIRS[0]
    scenes = [
        Scene((Thing("star", colour, (0, 0, 32, 32)),), Background("blue")),
        Scene((Thing(kind, "white", (0, 0, 32, 32)),), Background("blue")),
    ]
    bare, coloured = frozenset({"kind0"}), frozenset({"kind0", "colour0"})
    assert never_seen(scenes)[0, ALL_KINDS.index(kind)]
    assert not never_seen(scenes)[1, ALL_KINDS.index(kind)]
    assert bare_kinds(scenes, [Caption("", bare), Caption("", coloured)]).nonzero().tolist() == [
        [0, ALL_KINDS.index("star")]
    ]
