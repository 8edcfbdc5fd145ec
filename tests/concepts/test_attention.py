"""Maps of words: softmax(Q K^T / sqrt(d)) by hand, averaged as DAAM averages, for the branch and the prompt that act at each position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.nn.functional as F
from small_pipeline import WIDTH, save_pipeline
from torch import Tensor

from concepts.attention import AttentionSampler, overlay
from concepts.composition.layout import Layout, Region, prompts_by_region
from concepts.composition.masks import box_mask
from concepts.composition.multipath import ConductorConfig, LayoutRequest, compose, soft_masks_of
from concepts.composition.routing import RegionMasks
from concepts.embeddings import install, word_positions
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from diffusion.guidance import Guidance

CPU = torch.device("cpu")
CONFIG = SamplerConfig("dpm", 3, Guidance(3.0, (0.0, 0.7)))  # without guidance in the first step
LAYOUT = Layout(
    "a red moon",
    (
        Region("<new1>", "a blue <new1>", box_mask((0, 0, 0.5, 0.75))),
        Region("<new2>", "a <new2> and a star", box_mask((0.5, 0.25, 1, 1))),
    ),
    "a <new1> next to a <new2>",
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_pipeline(tmp_path_factory.mktemp("model"))


@pytest.fixture
def pipe(model: Path) -> Any:
    """Return a pipeline with tokens of one and two vectors, two heads, and queries large enough for attention to differ."""
    pipe = load_pipeline(str(model), CPU, torch.float32)
    generator = torch.Generator().manual_seed(0)
    install(pipe, {f"<new{n}>": 20 * torch.randn(n, WIDTH, generator=generator) for n in (1, 2)})
    for layer in cross_attention(pipe.unet).values():
        layer.to_q.weight.mul_(20)
        layer.heads = 2
    return pipe


def cross_attention(unet: Any) -> dict[str, Any]:
    return {name: layer for name, layer in unet.named_modules() if name.endswith(".attn2")}


def recorded_queries(unet: Any) -> dict[str, list[Tensor]]:
    """Return the queries of each layer of the down and up blocks, call by call, once images are sampled."""
    queries: dict[str, list[Tensor]] = {}
    for name, layer in cross_attention(unet).items():
        if "mid" not in name:
            calls = queries[name] = []
            layer.to_q.register_forward_hook(lambda _, __, out, calls=calls: calls.append(out.clone()))
    return queries


def by_hand(layer: Any, query: Tensor, text: Tensor, positions: Tensor) -> Tensor:
    """Return the probability of words [P,words] for one image's queries [P,C], text [77,width], tokens of words [77,words]."""
    heads = []
    for q, k in zip(query.chunk(layer.heads, 1), layer.to_k(text).chunk(layer.heads, 1), strict=True):
        heads.append((q @ k.T / q.shape[1] ** 0.5).softmax(1) @ positions)
    return torch.stack(heads).mean(0)


def to_image(probabilities: Sequence[Tensor], size: int = 64) -> Tensor:
    """Return the mean over layers and steps [words,size,size] of probabilities [P,words]."""
    maps = []
    for layer in probabilities:
        side = int(len(layer) ** 0.5)
        maps.append(F.interpolate(layer.T.view(1, -1, side, side), (size, size), mode="bicubic")[0])
    return torch.stack(maps).mean(0)


def assert_maps_of(sampler: AttentionSampler, expected: Tensor) -> None:
    """Up to rounding; expected [N,words,64,64] are neither even nor alike."""
    maps = sampler.record.maps((64, 64))
    torch.testing.assert_close(maps, expected, rtol=1e-3, atol=1e-5)
    assert maps.std((2, 3)).min() > 1e-3


def test_a_map_is_the_attention_of_the_conditional_half_averaged_over_heads_layers_and_steps(pipe: Any) -> None:
    prompts, words = ["a red <new2>", "a <new2> next to a star"], ("<new2>", "a")
    plain, queries = StableDiffusionSampler(pipe, CONFIG), recorded_queries(pipe.unet)
    requests = [Request(prompt, seed) for seed, prompt in enumerate(prompts)]
    images, texts = plain.sample_images(requests), plain.text(prompts)
    assert [len(query) for query in next(iter(queries.values()))] == [2, 4, 4]
    positions = word_positions(pipe.tokenizer, prompts, words)
    layers = cross_attention(pipe.unet)
    expected = [
        to_image(
            [
                by_hand(layers[name], query[n], texts[n], positions[n])
                for name, calls in queries.items()
                for query in calls
            ]
        )
        for n in range(2)
    ]

    sampler = AttentionSampler.of(pipe, CONFIG, words)
    assert torch.equal(sampler.sample_images(requests), images)
    assert_maps_of(sampler, torch.stack(expected))


@pytest.mark.parametrize("level", ["regional", "conductor"])
def test_in_a_layout_a_map_is_of_the_prompt_and_the_branch_that_act_at_each_position(
    pipe: Any, level: Literal["regional", "conductor"]
) -> None:
    """Inside a mask the concept's prompt, outside the base prompt; in the conductor's up blocks the concept's own queries, too."""
    config, words = ConductorConfig(collage=0, sketch=0), ("<new1>", "<new2>", "red", "a")
    plain, queries = StableDiffusionSampler(pipe, CONFIG), recorded_queries(pipe.unet)
    requests = [LayoutRequest(LAYOUT, seed) for seed in (0, 1)]
    images = compose(plain, requests, level, config)
    prompts = prompts_by_region([LAYOUT])
    texts, positions = plain.text(prompts), word_positions(pipe.tokenizer, prompts, words)
    masks = RegionMasks(soft_masks_of(plain, [LAYOUT, LAYOUT]))
    calls_per_step = {"regional": 2, "conductor": 3}[
        level
    ]  # the branches, the regions' prompts, the base prompt outside

    expected = []
    for n in range(2):
        probabilities = []
        for name, calls in queries.items():
            own = level == "conductor" and name.startswith("up")
            for query in calls[::calls_per_step]:
                branches = query.unflatten(0, (-1, 2))[:, n]  # base, concepts, unconditional
                one = by_hand(cross_attention(pipe.unet)[name], branches[0], texts[0], positions[0])
                for region, mask in enumerate(masks.like(query)[:, n], 1):
                    q = branches[region] if own else branches[0]
                    inside = by_hand(cross_attention(pipe.unet)[name], q, texts[region], positions[region])
                    one = torch.where(mask > 0, inside, one)
                probabilities.append(one)
        expected.append(to_image(probabilities))

    sampler = AttentionSampler.of(pipe, CONFIG, words)
    assert torch.equal(compose(sampler, requests, level, config), images)
    assert_maps_of(sampler, torch.stack(expected))


def test_a_composition_is_mapped_over_its_last_stage(pipe: Any) -> None:
    """Things are sampled alone before it, and the scene without things."""
    request = [LayoutRequest(LAYOUT, 0)]
    images = compose(StableDiffusionSampler(pipe, CONFIG), request, "conductor")
    sampler = AttentionSampler.of(pipe, CONFIG, ("<new1>",))
    assert torch.equal(compose(sampler, request, "conductor"), images)
    assert sampler.record.calls == 1  # of three steps, the collage is made after two
    corner = sampler.record.maps((64, 64))[0, 0, -12:, -12:]  # in the other region
    assert corner.abs().max() < 1e-6


@pytest.mark.parametrize("level", ["joint", "regional", "conductor"])
@pytest.mark.parametrize("reference", [None, torch.full((3, 64, 64), 90, dtype=torch.uint8)], ids=["alone", "aligned"])
def test_maps_of_all_tokens_add_up_to_one(
    pipe: Any, level: Literal["joint", "regional", "conductor"], reference: Tensor | None
) -> None:
    """With a reference the conductor calls the U-Net between its steps as well."""
    words = (
        "<|startoftext|>",
        "<|endoftext|>",
        "a",
        "next to",
        "red",
        "blue",
        "moon",
        "star",
        "and",
        "<new1>",
        "<new2>",
    )
    sampler = AttentionSampler.of(pipe, replace(CONFIG, steps=6), words)  # of which two are aligned
    compose(sampler, [LayoutRequest(replace(LAYOUT, reference=reference), 0)], level)
    total = sampler.record.maps((64, 64)).sum(1)
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_word_is_mapped_where_it_was_planted(pipe: Any) -> None:
    """In the left upper quarter queries are the key of "moon". Other queries and keys are zero: there all 77 tokens count alike."""

    def plant_query(_: object, __: object, out: Tensor) -> Tensor:
        side = int(out.shape[1] ** 0.5)
        quarter = F.pad(torch.ones(side // 2, side // 2), (0, side // 2, 0, side // 2)).flatten()
        return quarter[:, None].expand_as(out)

    def plant_key(_: object, __: object, out: Tensor) -> Tensor:
        return 100 * F.one_hot(torch.tensor(3), 77)[:, None].expand_as(out).to(out)

    sampler = AttentionSampler.of(pipe, CONFIG, ("moon", "red"))
    for layer in cross_attention(pipe.unet).values():
        layer.to_q.register_forward_hook(plant_query)
        layer.to_k.register_forward_hook(plant_key)
    sampler.sample_images([Request("a red moon", 0)])
    moon, red = sampler.record.maps((64, 64))[0]
    assert moon[:20, :20].min() > 0.9
    assert red[:20, :20].max() < 0.01
    for word in (moon, red):
        torch.testing.assert_close(word[60:, 60:], torch.full((4, 4), 1 / 77))


def test_all_vectors_of_a_learned_word_and_all_its_places_are_one_word(pipe: Any) -> None:
    prompts = ["a <new2> and a <new2>", "a red star, a red moon", "Red Star"]
    positions = word_positions(pipe.tokenizer, prompts, ["<new2>", "red star", "red", "cup", ""])
    places = [[positions[n, :, word].nonzero()[:, 0].tolist() for word in range(5)] for n in range(3)]
    assert places == [
        [[2, 3, 6, 7], [], [], [], []],
        [[], [2, 3], [2, 6], [], []],
        [[], [1, 2], [1], [], []],
    ]


def test_an_overlay_is_blue_where_a_map_is_least_and_red_where_it_is_largest() -> None:
    maps = torch.tensor([[0.02, 0.03], [0.04, 0.06]])
    colours = overlay(torch.full((3, 2, 2), 100, dtype=torch.uint8), maps).int() - 50
    assert colours[:, 0, 0].tolist() == [0, 0, 64]  # dark blue
    assert colours[:, 1, 0].tolist() == [64, 128, 64]  # green, half way
    assert colours[:, 1, 1].tolist() == [64, 0, 0]
    even = overlay(torch.full((3, 2, 2), 100, dtype=torch.uint8), torch.full((2, 2), 0.3))
    assert even.unique().tolist() == [50, 114]
