"""Composition: an empty mask is the base model, a full mask the concept's branch, one batch equals calls one after the other.

Images are compared up to one grey level where batch shapes differ, since kernels round differently; elsewhere bit for bit.
"""

from __future__ import annotations

import copy
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.models.resnet import ResnetBlock2D
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from small_pipeline import WIDTH, save_pipeline
from torch import Tensor, nn

from concepts.composition.alignment import align_to_references, attention_keys, invert_references, key_distance
from concepts.composition.first_noise import remove_low, sketch, spot_contrast, with_sketch
from concepts.composition.layout import Layout, Region
from concepts.composition.masks import MASK_SIZE, box_mask
from concepts.composition.multipath import (
    ConductorConfig,
    LayoutRequest,
    Level,
    MultipathDenoiser,
    base,
    collage,
    collage_step,
    compose,
    contain,
    passes,
)
from concepts.composition.refinement import bounding_box, kmeans, record_self_attention, refine_masks
from concepts.embeddings import install
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from diffusion.guidance import Guidance
from diffusion.noise import generators
from diffusion.schedule import Schedule
from runtime.seeds import derived_seed

CPU = torch.device("cpu")
NOWHERE, EVERYWHERE = torch.zeros(MASK_SIZE, MASK_SIZE), torch.ones(MASK_SIZE, MASK_SIZE)
LEFT, RIGHT = box_mask((0, 0, 0.5, 1)), box_mask((0.5, 0, 1, 1))
INNER = box_mask((0.25, 0.25, 0.75, 0.75))
PIECES: Any = [("attention",), ("features",), ("noise",), ("attention", "features", "noise")]
ATTENTION = ("attn1", "attn2")
DEFAULT, PLAIN = ConductorConfig(), ConductorConfig(sketch=0, background_steps=0, collage=0)
GREY = torch.zeros(2, 4)  # a background
SCHEDULE = Schedule(torch.tensor([0.3], dtype=torch.float64))


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionSampler:
    pipe = load_pipeline(str(save_pipeline(tmp_path_factory.mktemp("model"))), CPU, torch.float32)
    install(pipe, {"<new1>": torch.randn(1, WIDTH), "<new2>": torch.randn(2, WIDTH)})
    return StableDiffusionSampler(pipe, SamplerConfig("dpm", 3, Guidance(3.0)))


def configured(sampler: StableDiffusionSampler, **changes: Any) -> StableDiffusionSampler:
    return StableDiffusionSampler(sampler.pipe, replace(sampler.config, **changes))


def times(sampler: StableDiffusionSampler) -> list[int]:
    return [t for t, _ in sampler.grid.pairs]


def layout(*masks: Tensor, **more: Any) -> Layout:
    regions = [Region(f"<new{k + 1}>", f"a photo of a <new{k + 1}>", mask) for k, mask in enumerate(masks)]
    return Layout("a red star", tuple(regions), "a red star", **more)


def with_prompt(plan: Layout, number: int, prompt: str) -> Layout:
    regions = list(plan.regions)
    regions[number] = replace(regions[number], prompt=prompt)
    return replace(plan, regions=tuple(regions))


def composed(
    sampler: StableDiffusionSampler, plan: Layout, seeds: list[int], level: Level, config: ConductorConfig = DEFAULT
) -> Tensor:
    """Images as int, so that differences have a sign."""
    return compose(sampler, [LayoutRequest(plan, seed) for seed in seeds], level, config).int()


def plain_images(sampler: StableDiffusionSampler, prompt: str, seeds: Sequence[int]) -> Tensor:
    return sampler.sample_images([Request(prompt, seed) for seed in seeds]).int()


def assert_same(first: Tensor, second: Tensor) -> None:
    """Up to rounding."""
    torch.testing.assert_close(first, second, rtol=0, atol=1)


def soft_masks(*masks: Tensor) -> Tensor:
    """[N,1,16,16]."""
    return layout(*masks).soft_masks(16, 16)[:, None]


def injecting(pieces: Any, **changes: Any) -> ConductorConfig:
    return replace(PLAIN, inject=pieces, **changes)


@contextmanager
def recorded(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """Record what every attention layer and residual block returns."""
    outputs: dict[str, Tensor] = {}
    with ExitStack() as stack:
        for name, module in unet.named_modules():
            if name.endswith(ATTENTION) or isinstance(module, ResnetBlock2D):
                hook = module.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out))
                stack.callback(hook.remove)
        yield outputs


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("level", ["regional", "conductor"])
def test_an_empty_mask_is_the_base_model(sampler: StableDiffusionSampler, level: Any) -> None:
    assert_same(composed(sampler, layout(NOWHERE), [1, 2], level), composed(sampler, layout(), [1, 2], "joint"))


@pytest.mark.parametrize("pieces", PIECES)
def test_the_prompt_of_an_empty_mask_changes_no_bit(sampler: StableDiffusionSampler, pieces: Any) -> None:
    for level in ("regional", "conductor"):
        images = [
            composed(sampler, with_prompt(layout(NOWHERE), 0, prompt), [1], level, injecting(pieces))
            for prompt in ("a photo of a <new1>", "a blue <new2>")
        ]
        assert torch.equal(*images)


@pytest.mark.parametrize("level", ["regional", "conductor"])
def test_composing_leaves_the_model_unchanged(sampler: StableDiffusionSampler, level: Any) -> None:
    before = plain_images(sampler, "a red star", [1])
    composed(sampler, layout(LEFT), [1], level)
    assert torch.equal(plain_images(sampler, "a red star", [1]), before)


@pytest.mark.parametrize(("pieces", "kinds"), [(("attention",), ATTENTION), (("features",), ("resnets",))])
def test_inside_a_mask_injected_layers_have_the_concepts_output(
    sampler: StableDiffusionSampler, pieces: Any, kinds: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, outputs = configured(sampler), {}
    network = other.network

    def recording(x: Tensor, t: int, text: Tensor) -> Tensor:
        with recorded(other.pipe.unet) as of_layers:
            eps = network(x, t, text)
        outputs.update(of_layers)
        return eps

    monkeypatch.setattr(other, "network", recording)
    with torch.no_grad():
        MultipathDenoiser.of(other, [layout(LEFT)], injecting(pieces, focus=False))(torch.randn(1, 4, 16, 16), 500)
    equal_inside = {name: torch.equal(out[:1], halves(out[1:2], out[:1])) for name, out in outputs.items()}
    equal = {name: torch.equal(out[0], out[1]) for name, out in outputs.items()}
    injected = {name for name in outputs if name.startswith("up_blocks") and any(kind in name for kind in kinds)}
    assert injected
    assert all(equal_inside[name] and not equal[name] for name in injected)
    assert not any(equal_inside[name] for name in outputs if name.startswith("mid_block"))


@pytest.mark.parametrize("config", [DEFAULT, injecting(("noise",))])
def test_a_full_mask_is_the_concepts_branch(sampler: StableDiffusionSampler, config: ConductorConfig) -> None:
    alone = composed(sampler, Layout("a photo of a <new1>", ()), [1], "conductor")
    assert_same(composed(sampler, layout(EVERYWHERE), [1], "conductor", config), alone)


def test_inside_its_mask_a_concept_does_not_depend_on_other_prompts(sampler: StableDiffusionSampler) -> None:
    """The predicted noise of one step: the right half does depend on the right concept's prompt."""
    x, plan = torch.randn(1, 4, 16, 16), layout(LEFT, RIGHT)
    config = replace(PLAIN, focus=False)
    with torch.no_grad():
        eps, other = (
            MultipathDenoiser.of(sampler, [one], config)(x, 500) for one in (plan, with_prompt(plan, 1, "a blue star"))
        )
    assert torch.equal(eps[..., :8], other[..., :8])
    assert not torch.equal(eps[..., 8:], other[..., 8:])


def test_a_single_focused_concept_is_what_regional_draws(sampler: StableDiffusionSampler) -> None:
    """Its branch attends to its prompt inside the mask and to the base prompt outside, as the base branch does by regions."""
    conductor, regional = (composed(sampler, layout(LEFT), [1], level, PLAIN) for level in ("conductor", "regional"))
    assert_same(conductor, regional)


# ---------------------------------------------------------------- batches


def test_a_batch_is_what_single_images_are(sampler: StableDiffusionSampler) -> None:
    """Of different layouts, too."""
    plans = [layout(LEFT, RIGHT), layout(RIGHT, LEFT)]
    together = compose(sampler, [LayoutRequest(plan, seed) for seed, plan in enumerate(plans)], "conductor").int()
    for seed, plan in enumerate(plans):
        assert_same(composed(sampler, plan, [seed], "conductor")[0], together[seed])


@pytest.mark.parametrize("config", [None, replace(PLAIN, focus=False), PLAIN])
@torch.no_grad()
def test_a_call_of_two_layouts_is_one_call_of_each(
    sampler: StableDiffusionSampler, config: ConductorConfig | None
) -> None:
    """They share neither base prompt nor regions nor regions' prompts."""
    other = replace(layout(RIGHT, INNER * LEFT), prompt="a blue moon")
    plans = [layout(LEFT, RIGHT), with_prompt(with_prompt(other, 0, "a green <new2>"), 1, "a moon")]
    x = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    together = MultipathDenoiser.of(sampler, plans, config)(x, 500)
    for row, plan in enumerate(plans):
        alone = MultipathDenoiser.of(sampler, [plan], config)(x[row : row + 1], 500)
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("focus", [False, True])
def test_the_batch_is_what_calls_one_after_the_other_are(
    sampler: StableDiffusionSampler, pieces: Any, focus: bool
) -> None:
    """The method's description: each concept's branch by itself, then the base branch with their outputs inside their masks.

    The negative prompt's prediction is a plain call, and takes the unconditional place.
    """
    unet, x = sampler.pipe.unet, torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    scene, *concepts = sampler.text(layout(LEFT, RIGHT).prompts)[:, None]

    def concept_and_scene(number: int) -> list[Tensor]:
        own = [concepts[number], scene] if number == 0 else [scene, concepts[number]]
        return own if focus else [concepts[number]] * 2

    with torch.no_grad():
        alone = []
        for number, text in enumerate(concepts):
            with recorded(unet) as outputs, text_by_region(unet, concept_and_scene(number)):
                noise = sampler.network(x, 500, text)
            alone.append(outputs | {"noise": noise})
        plain = sampler.network(x, 500, scene)
        with replaced(unet, alone, pieces), text_by_region(unet, concepts):
            expected = sampler.network(x, 500, scene)
        if "noise" in pieces:
            expected = halves(*(outputs["noise"] for outputs in alone))
        uncond = sampler.network(x, 500, sampler.text(["a green moon"]))
        guided = uncond + 5 * (expected - uncond)
        rescaled = rescale_noise_cfg(guided, expected, 0.5)
        for guidance, eps in (
            (Guidance(1.0), expected),
            (Guidance(5.0), guided),
            (Guidance(5.0, (0.5, 0.6)), guided),
            (Guidance(5.0, (0.4, 0.5)), expected),
            (Guidance(5.0, rescale=0.5), rescaled),
        ):
            one = configured(sampler, guidance=guidance, negative="a green moon")
            denoise = MultipathDenoiser.of(one, [layout(LEFT, RIGHT)], injecting(pieces, focus=focus))
            torch.testing.assert_close(denoise(x, 500), eps, rtol=1e-4, atol=1e-4)
    assert (rescaled - guided).abs().max() > 1e-3
    assert (expected - plain).abs().max() > 1e-3


def halves(left: Tensor, right: Tensor) -> Tensor:
    """Join the left half of one and the right half of the other; states [1,P,C] of square maps or maps [1,C,h,w]."""
    side = left.shape[-1] if left.dim() == 4 else round(left.shape[1] ** 0.5)
    is_left = torch.arange(side) < side // 2
    return torch.where(is_left if left.dim() == 4 else is_left.repeat(side)[:, None], left, right)


@contextmanager
def hooked(unet: nn.Module, hook_of: Callable[[str, nn.Module], Any]) -> Iterator[None]:
    """Hooks, with keyword arguments, on the modules for which there is one; they run before hooks that are there already."""
    with ExitStack() as stack:
        for name, module in unet.named_modules():
            if hook := hook_of(name, module):
                stack.callback(module.register_forward_hook(hook, with_kwargs=True, prepend=True).remove)
        yield


def text_by_region(unet: nn.Module, texts: Sequence[Tensor]) -> Any:
    """Cross-attention to the first text in the left half, to the second in the right half."""

    def hook(module: nn.Module, args: Any, kwargs: Any, _: Tensor) -> Tensor:
        return halves(*(module.forward(*args, **kwargs | {"encoder_hidden_states": text}) for text in texts))

    return hooked(unet, lambda name, _: hook if name.endswith("attn2") else None)


def replaced(unet: nn.Module, alone: Sequence[dict[str, Tensor]], pieces: Any) -> Any:
    """Replace outputs in the up blocks by those of the concepts' branches."""

    def hook_of(name: str, module: nn.Module) -> Any:
        injected = "attention" in pieces and name.endswith(ATTENTION)
        injected |= "features" in pieces and isinstance(module, ResnetBlock2D)
        if injected and name.startswith("up_blocks"):
            return lambda *_: halves(*(outputs[name] for outputs in alone))
        return None

    return hooked(unet, hook_of)


def test_the_order_of_concepts_does_not_matter(sampler: StableDiffusionSampler) -> None:
    one, two = layout(LEFT, RIGHT).regions
    first, second = (composed(sampler, Layout("a red star", r), [1], "conductor") for r in ((one, two), (two, one)))
    assert_same(first, second)


# ---------------------------------------------------------------- references


def picture(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_no_weight_is_no_alignment(sampler: StableDiffusionSampler) -> None:
    plain = composed(sampler, layout(LEFT), [1], "conductor")
    none = composed(sampler, layout(LEFT, reference=picture()), [1], "conductor", ConductorConfig(align=0))
    assert torch.equal(none, plain)


@pytest.mark.parametrize(("weight", "steps"), [(0.0, range(3)), (10.0, range(0)), (10.0, range(1, 3))])
def test_latents_are_aligned_in_the_given_steps_only(
    sampler: StableDiffusionSampler, weight: float, steps: range
) -> None:
    x = torch.randn(1, 4, 16, 16)
    nudge = align_to_references(sampler, [layout(LEFT, reference=picture())], weight, steps)
    assert torch.equal(nudge(x, times(sampler)[0]), x)


def test_a_step_of_alignment_brings_keys_nearer_to_the_references(sampler: StableDiffusionSampler) -> None:
    x, t, text = torch.randn(1, 4, 16, 16), times(sampler)[1], sampler.text(["a red star"])
    reference = sampler.encode(picture()[None] / 127.5 - 1)
    expected = attention_keys(sampler, invert_references(sampler, reference, text)[1], t, text)
    nudge = align_to_references(sampler, [layout(LEFT, reference=picture())], 1e-2, range(3))

    def distance(x: Tensor) -> float:
        return float((attention_keys(sampler, x, t, text) - expected).square().mean())

    moved = nudge(x, t)
    assert not moved.requires_grad
    assert distance(moved) < distance(x)


def test_in_fp16_latents_move_as_in_fp32(sampler: StableDiffusionSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """With gradients as small as those of large images, which fp16 does not hold."""
    monkeypatch.setattr("concepts.composition.alignment.key_distance", lambda *keys: key_distance(*keys) * 1e-4)
    x, moves = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0)), []
    plans = [layout(LEFT, reference=picture())]
    half = configured(sampler)
    half.pipe = copy.copy(sampler.pipe)
    for name in ("unet", "vae", "text_encoder"):
        setattr(half.pipe, name, copy.deepcopy(getattr(sampler.pipe, name)).half())
    for each in (sampler, half):
        moves.append(align_to_references(each, plans, 1e4, range(3))(x, times(each)[1]) - x)
    exact, near = moves
    assert exact.norm() > 0
    assert (near - exact).norm() < 0.02 * exact.norm()


def test_every_image_follows_its_own_reference_and_its_prompt(sampler: StableDiffusionSampler) -> None:
    """Two images of one layout have one reference."""
    first = layout(LEFT, reference=picture(1), reference_prompt="a green moon")
    plans, t = [first, layout(LEFT, reference=picture(2), reference_prompt="a <new2>"), first], times(sampler)[1]
    x = torch.randn(3, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    together = align_to_references(sampler, plans, 1e3, range(3))(x, t) - x
    for row, plan in enumerate(plans):
        alone = align_to_references(sampler, [plan], 1e3, range(3))(x[row : row + 1], t) - x[row]
        torch.testing.assert_close(together[row], alone[0], rtol=1e-3, atol=1e-4)


def test_no_image_is_aligned_where_a_layout_has_no_reference(sampler: StableDiffusionSampler) -> None:
    x, plans = torch.randn(2, 4, 16, 16), [layout(LEFT, reference=picture()), layout(LEFT)]
    assert torch.equal(align_to_references(sampler, plans, 10.0, range(3))(x, times(sampler)[0]), x)


@pytest.mark.parametrize(("solver", "steps"), [("dpm", 7), ("sde", 7), ("ddim", 7), ("dpm", 48)])
def test_every_timestep_of_the_solver_has_its_step(sampler: StableDiffusionSampler, solver: Any, steps: int) -> None:
    other, called = configured(sampler, solver=solver, steps=steps), []

    def denoise(x: Tensor, t: int) -> Tensor:
        called.append(other.step_of(t))
        return x

    other.solve(denoise, torch.randn(1, 4, 16, 16), generators([0]))
    assert called == list(range(steps))


def test_an_inverted_image_comes_back(sampler: StableDiffusionSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM there and back with the exact noise of images that are normal with standard deviation 0.5 around 1."""
    fine = configured(sampler, solver="ddim", steps=200)

    def exact(x: Tensor, t: int, text: Tensor) -> Tensor:
        alpha_bar = fine.schedule.alpha_bar_at(t)
        return math.sqrt(1 - alpha_bar) * (x - math.sqrt(alpha_bar)) / (0.25 * alpha_bar + 1 - alpha_bar)

    monkeypatch.setattr(fine, "network", exact)
    x0, no_text = 1 + 0.5 * torch.randn(1, 4, 16, 16), torch.empty(0)
    noise = invert_references(fine, x0, no_text)[0]
    assert abs(noise.std() - 1) < 0.1
    assert abs(noise.mean()) < 0.2
    back = fine.solve(lambda x, t: exact(x, t, no_text), noise, ())
    assert (back - x0).abs().max() < 0.05


# ---------------------------------------------------------------- a sketch in the first noise


def test_a_sketch_is_a_soft_spot_per_region_with_the_amplitude_that_training_leaves(
    sampler: StableDiffusionSampler,
) -> None:
    """A Gaussian with the variance of its box, which is n^2 / 12 for n positions, of mean 0 over the image."""
    masks = torch.zeros(2, 1, 16, 16)
    masks[0, 0, 2:8, 1:5] = 1
    masks[1, 0, 9:11, 6:16] = 1
    contrast = spot_contrast(sampler, masks, [3], GREY[:1])
    y, x = torch.arange(16.0)[:, None], torch.arange(16.0)
    spots = [
        torch.exp(-6 * ((y - 4.5) ** 2 / 6**2 + (x - 2.5) ** 2 / 4**2)),
        torch.exp(-6 * ((y - 9.5) ** 2 / 2**2 + (x - 10.5) ** 2 / 10**2)),
    ]
    expected = torch.stack([spot * contrast[k, 0][:, None, None] for k, spot in enumerate(spots)]).sum(0)
    signal = float(sampler.pipe.scheduler.alphas_cumprod[-1]) ** 0.5
    expected = signal * (expected - expected.mean((1, 2), keepdim=True))
    torch.testing.assert_close(sketch(sampler, masks, [3], GREY[:1])[0], expected, rtol=1e-3, atol=1e-4)


def test_a_spots_colour_is_the_farthest_of_four_from_the_background(sampler: StableDiffusionSampler) -> None:
    """Colours of the image's seed and the region's shape, as the autoencoder encodes them."""
    masks = soft_masks(LEFT, INNER).expand(-1, 2, -1, -1)
    backgrounds = torch.tensor([[0.5, -0.5, 0.0, 0.2], [-1.0, 0.3, 0.4, 0.0]])
    contrast = spot_contrast(sampler, masks, [1, 2], backgrounds)
    for n, image in ((n, image) for n in range(2) for image in range(2)):
        seed = derived_seed(image + 1, zlib.crc32(masks[n, image].contiguous().numpy().tobytes()))
        colours = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed))
        flat = (2 * colours - 1)[:, :, None, None].expand(-1, -1, 32, 32)
        differences = sampler.encode(flat).mean((2, 3)) - backgrounds[image]
        farthest = differences[differences.norm(dim=1).argmax()]
        torch.testing.assert_close(contrast[n, image], farthest, rtol=1e-4, atol=1e-5)


def test_a_sketch_of_nothing_is_nothing_and_of_a_seed_always_the_same(sampler: StableDiffusionSampler) -> None:
    nothing = torch.zeros(1, 1, *sampler.shape[1:])
    assert not sketch(sampler, nothing, [1], GREY[:1]).any()
    one = layout(LEFT).soft_masks(*sampler.shape[1:])[:, None]
    alone = sketch(sampler, one, [2], GREY[:1])
    both = sketch(sampler, one.expand(-1, 2, -1, -1), [1, 2], GREY)
    assert torch.allclose(alone[0], both[1], atol=1e-6)


def test_the_sketch_replaces_what_is_coarse_in_the_noise(sampler: StableDiffusionSampler) -> None:
    """Waves of 4 and 5 periods per side, across and down: the first go, the others stay."""
    wave = torch.arange(16) / 16 * 2 * torch.pi
    low, high = ((n * wave).sin().expand(1, 4, 16, 16) for n in (4, 5))
    for waves in (low, low.mT):
        assert torch.allclose(remove_low(waves + 1 + high + high.mT), high + high.mT, atol=1e-5)


def test_regions_that_are_nowhere_or_everywhere_keep_the_noise(sampler: StableDiffusionSampler) -> None:
    noise = torch.randn(2, *sampler.shape, generator=torch.Generator().manual_seed(0))
    nowhere, everywhere, left = (
        layout(mask).soft_masks(*sampler.shape[1:])[:, None] for mask in (NOWHERE, EVERYWHERE, LEFT)
    )
    for masks in (nowhere, everywhere):
        assert torch.equal(with_sketch(noise, sampler, masks.expand(-1, 2, -1, -1), [1, 2], GREY, 5.0), noise)
    mixed = with_sketch(noise, sampler, torch.cat([nowhere, left], 1), [1, 2], GREY, 5.0)
    assert torch.equal(mixed[0], noise[0])
    expected = remove_low(noise[1:]) + 5 * sketch(sampler, left, [2], GREY[:1])
    torch.testing.assert_close(mixed[1:], expected, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- containment


def test_outside_the_regions_a_blur_is_predicted_and_inside_nothing_changes() -> None:
    """The blur: means of 3x3 overlapping windows over what is outside, enlarged."""
    stream = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 1, 4, 16, 16, generator=stream)
    inner = soft_masks(box_mask((0.3, 0.25, 0.75, 0.7)))
    before, after = (SCHEDULE.x0_and_eps(noise, x, 0)[0] for noise in (eps, contain(x, eps, 0, SCHEDULE, inner)))
    outside = 1 - inner[0, 0]
    windows = (slice(0, 6), slice(5, 11), slice(10, 16))
    sums, weights = (
        torch.stack([torch.stack([part[..., r, c].mean((-1, -2)) for c in windows], -1) for r in windows], -2)
        for part in (before * outside, outside)
    )
    blur = F.interpolate(sums, (16, 16), mode="bilinear") / F.interpolate(
        weights[None, None], (16, 16), mode="bilinear"
    )
    torch.testing.assert_close(after, inner[0] * before + outside * blur, rtol=1e-4, atol=1e-4)


def test_the_inside_does_not_colour_the_outside() -> None:
    inner = soft_masks(LEFT)
    x = torch.where(inner[0] > 0, 5.0, 1.0).expand(1, 4, 16, 16)
    after, _ = SCHEDULE.x0_and_eps(contain(x, torch.zeros_like(x), 0, SCHEDULE, inner), x, 0)
    torch.testing.assert_close(after, x / 0.3**0.5)


def test_regions_that_are_nowhere_or_everywhere_contain_nothing() -> None:
    x, eps = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for mask in (NOWHERE, EVERYWHERE):
        assert torch.equal(contain(x, eps, 0, SCHEDULE, soft_masks(mask).expand(-1, 2, -1, -1)), eps)


def test_the_background_is_predicted_outside_the_regions() -> None:
    x, eps = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    background = torch.tensor([[1.0, -1, 0.5, 0], [2.0, 0, 0, 1]])
    regions = soft_masks(LEFT).expand(-1, 2, -1, -1)
    changed = contain(x, eps, 0, SCHEDULE, regions, background)
    clean, _ = SCHEDULE.x0_and_eps(changed, x, 0)
    torch.testing.assert_close(clean[..., 8:], background[:, :, None, None].expand(2, 4, 16, 8))
    assert torch.equal(changed[..., :8], eps[..., :8])


# ---------------------------------------------------------------- the collage


@pytest.mark.parametrize("solver", ["dpm", "ddim"])
def test_a_span_of_the_solver_is_that_part_of_all_its_steps(sampler: StableDiffusionSampler, solver: Any) -> None:
    """Like diffusers' scheduler from there on: DPM-Solver++ restarts at first order, DDIM looks at one step at a time."""
    other, config = configured(sampler, solver=solver, steps=7), sampler.pipe.scheduler.config
    x = torch.randn(1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for span in (slice(0, 3), slice(3, 7), slice(None)):
        scheduler: Any = (
            DPMSolverMultistepScheduler.from_config(config, timestep_spacing="trailing")
            if solver == "dpm"
            else DDIMScheduler.from_config(config, timestep_spacing="leading", clip_sample=False)
        )
        scheduler.set_timesteps(7)
        expected = x
        called: list[int] = []
        for t in scheduler.timesteps[span].tolist():
            expected = scheduler.step((expected + t / 1000).tanh(), t, expected + t / 1000).prev_sample

        def denoise(x: Tensor, t: int, called: list[int] = called) -> Tensor:
            called.append(t)
            return x.tanh()

        result = other.solve(denoise, x, (), lambda x, t: x + t / 1000, span)
        assert called == scheduler.timesteps[span].tolist()
        torch.testing.assert_close(result, expected, rtol=1e-4, atol=1e-4)


def test_the_stages_cover_all_steps(sampler: StableDiffusionSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the collage base prompt and no branches, after it all of them."""
    plan = layout(box_mask((0, 0, 0.4, 0.4)), box_mask((0.5, 0.5, 1, 1)))
    config = replace(DEFAULT, sketch=0, background_steps=0, collage=0.7)
    other = configured(sampler, steps=10)
    called: list[tuple[int, int]] = []
    network = other.network

    def counted(x: Tensor, t: int, text: Tensor) -> Tensor:
        called.append((t, len(x)))
        return network(x, t, text)

    monkeypatch.setattr(other, "network", counted)
    compose(other, [LayoutRequest(plan, 1)], "conductor", config)
    assert called[:8] == [(t, 2) for t in times(other)[:8]]
    assert called[8:] == [(t, 4) for t in times(other)[7:]]
    assert passes(plan, "conductor", 10, config) == sum(rows for _, rows in called) + 2 * 2 * 10  # each thing alone


def test_where_there_is_a_collage() -> None:
    """Not for a region that is everything or nothing, not without things, not with a reference to follow."""
    boxes = box_mask((0, 0, 0.4, 0.4)), box_mask((0.5, 0.5, 1, 1))
    plan, config = layout(*boxes), replace(DEFAULT, collage=0.7)
    assert collage_step([plan], 10, config) == 7
    assert collage_step([plan], 10, replace(config, collage=1)) == 9  # at least one step after it
    for without in (layout(EVERYWHERE), layout(NOWHERE), layout(*boxes, NOWHERE), replace(plan, regions=())):
        assert collage_step([without], 10, config) == 0
    assert collage_step([plan, layout(boxes[0], EVERYWHERE)], 10, config) == 0
    styled = replace(plan, regions=(*plan.regions, Region("<new2>", "a <new2>", RIGHT, thing=False)))
    assert collage_step([styled], 10, config) == 7
    led = replace(plan, reference=picture())
    assert collage_step([led], 10, config) == 0
    assert collage_step([led], 10, replace(config, align=0)) == 7


def test_a_collage_changes_only_what_its_regions_touch(sampler: StableDiffusionSampler) -> None:
    plan = layout(INNER)
    requests = [LayoutRequest(one, 1) for one in (plan, with_prompt(plan, 0, "a blue <new2>"))]
    x, x0 = base(sampler, requests[:1], PLAIN, 2)
    first, second = (collage(sampler, [request], PLAIN, x, x0, 2) for request in requests)
    touched = plan.soft_masks(16, 16)[0] > 0
    changed = (first != second).any(1)[0]
    assert changed.any()
    assert not changed[~touched].any()
    assert torch.equal(first[..., ~touched], x[..., ~touched])


# ---------------------------------------------------------------- refined masks


def test_refined_masks_follow_the_clusters_that_overlap_most() -> None:
    """Attention that sees a left third, a middle and a right third, where the masks were halves."""
    third = torch.arange(64) % 8 * 3 // 8
    seen = (third[:, None] == third).float()[None]
    new = refine_masks(soft_masks(LEFT, RIGHT), seen, seen.repeat(2, 1, 1, 1))[:, 0, ::2, ::2].flatten(1) > 0
    assert torch.equal(new[0], third == 0)
    assert torch.equal(new[1], third == 2)


def test_one_concept_may_be_one_of_three_clusters() -> None:
    third = torch.arange(64) % 8 * 3 // 8
    seen = (third[:, None] == third).float()[None]
    for number in range(3):
        old = (third == number).float().view(1, 1, 8, 8)
        new = refine_masks(old.repeat_interleave(2, 2).repeat_interleave(2, 3), seen, seen[None])
        assert torch.equal(new[..., ::2, ::2], old)


def test_a_mask_that_no_cluster_resembles_becomes_its_bounding_box() -> None:
    """An L of three positions, where attention knows only two halves."""
    left = torch.arange(64) % 8 < 4
    seen = (left[:, None] == left).float()[None]
    old = torch.zeros(1, 1, 8, 8)
    old[0, 0, 2, 2] = old[0, 0, 3, 2:4] = 1
    new = refine_masks(old.repeat_interleave(2, 2).repeat_interleave(2, 3), seen, seen[None])
    assert new[0, 0, ::2, ::2].nonzero().tolist() == [[2, 2], [2, 3], [3, 2], [3, 3]]


def test_a_refined_mask_unites_what_the_base_and_the_own_map_show() -> None:
    """The base's map shows columns 0..2 together, the concept's own map columns 1..4: of 8."""
    column = torch.arange(64) % 8
    in_base, own = ((part[:, None] == part).float()[None] for part in (column < 3, (column > 0) & (column < 5)))
    new = refine_masks(soft_masks(LEFT), in_base, own[None])[0, 0, ::2, ::2].flatten() > 0
    assert torch.equal(new, column < 5)
    new = refine_masks(soft_masks(LEFT), in_base, in_base[None])[0, 0, ::2, ::2].flatten() > 0
    assert torch.equal(new, column < 3)


@pytest.mark.parametrize("seed", range(8))
def test_refined_masks_never_overlap_and_never_vanish(seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    maps = (3 * torch.randn(4, 2, 64, 64, generator=stream)).softmax(-1)
    boxes = [LEFT * box_mask((0.1, 0.1, 0.4, 0.9)), RIGHT, LEFT - LEFT * box_mask((0.1, 0.1, 0.4, 0.9))]
    old = soft_masks(*boxes).repeat(1, 2, 1, 1)
    new = refine_masks(old, maps[0], maps[1:])
    assert new.shape == old.shape
    assert set(new.unique().tolist()) <= {0.0, 1.0}
    assert new.sum(0).max() == 1
    assert new.any(3).any(2).all()


def test_what_two_concepts_claim_stays_as_before() -> None:
    """Both find the whole picture in one cluster of their own maps."""
    nothing = torch.full((1, 64, 64), 1 / 64)
    old = soft_masks(LEFT, RIGHT)
    assert torch.equal(refine_masks(old, nothing, nothing.repeat(2, 1, 1, 1)), old)


def test_clusters_are_found_and_the_same_in_every_run() -> None:
    stream = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(3, 5)
    truth = torch.arange(60) % 3
    rows = centres[truth] + torch.randn(60, 5, generator=stream)
    labels = kmeans(rows, 3)
    assert all(len(labels[truth == k].unique()) == 1 for k in range(3))
    assert len(labels.unique()) == 3
    assert torch.equal(kmeans(rows, 3), labels)


def test_bounding_boxes() -> None:
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 1] = mask[2, 3] = True
    expected = torch.zeros(4, 5, dtype=torch.bool)
    expected[1:3, 1:4] = True
    assert torch.equal(bounding_box(mask), expected)
    assert not bounding_box(torch.zeros(4, 5, dtype=torch.bool)).any()


@pytest.mark.parametrize("heads", [1, 4])
def test_recorded_attention_is_the_layers(
    sampler: StableDiffusionSampler, heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same values in all heads, the mean of what the heads return is the mean of their probabilities times the values."""
    unet, text = sampler.pipe.unet, sampler.text(["a red star"])
    layer = unet.up_blocks[-2].attentions[-1].transformer_blocks[-1].attn1
    width = layer.to_v.out_features // heads
    values = layer.to_v.weight[:width].repeat(heads, 1)
    monkeypatch.setattr(layer, "heads", heads)
    monkeypatch.setitem(layer.to_v._parameters, "weight", nn.Parameter(values, requires_grad=False))
    ends: list[Tensor] = []
    hooks = [
        layer.register_forward_hook(lambda _, args, __: ends.append(args[0])),
        layer.to_out[0].register_forward_hook(lambda _, args, __: ends.append(args[0])),
    ]
    x = 3 * torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), record_self_attention(unet) as attention:
        sampler.network(x, 500, text.repeat(2, 1, 1))
    for hook in hooks:
        hook.remove()
    probabilities = attention.probabilities()
    torch.testing.assert_close(probabilities.sum(2), torch.ones(2, 64))
    of_heads, states = ends  # the projection comes before the layer's end
    expected = of_heads.unflatten(2, (heads, width)).mean(2)
    torch.testing.assert_close(probabilities @ (states @ values[:width].T), expected, rtol=1e-4, atol=1e-5)


def test_refinement_takes_the_maps_of_the_base_and_of_each_concept(
    sampler: StableDiffusionSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its steps only; the next call has the new masks."""
    plan, swapped = layout(LEFT, RIGHT), layout(RIGHT, LEFT)
    layer = sampler.pipe.unet.up_blocks[-2].attentions[-1].transformer_blocks[-1].attn1
    states: dict[str, Tensor] = {}
    received: list[Tensor] = []

    def swap(*maps: Tensor) -> Tensor:
        received.extend(maps)
        return maps[0].flip(0)

    monkeypatch.setattr("concepts.composition.multipath.refine_masks", swap)
    denoise = MultipathDenoiser.of(sampler, [plan, plan], PLAIN, range(1, 2))
    x, (first, second, third) = torch.randn(2, 4, 16, 16), times(sampler)
    hooks = [
        part.register_forward_hook(lambda _, __, out, name=name: states.__setitem__(name, out))
        for name, part in (("q", layer.to_q), ("k", layer.to_k))
    ]
    with torch.no_grad():
        denoise(x, first)
        assert not received
        denoise(x, second)
        rows = (states["q"] @ states["k"].mT / states["q"].shape[-1] ** 0.5).softmax(-1)
        for hook in hooks:
            hook.remove()
        old, base_map, concept_maps = received
        torch.testing.assert_close(old, torch.cat([soft_masks(LEFT, RIGHT)] * 2, 1))
        torch.testing.assert_close(base_map, rows[:2])  # of both images, then of the first concept in both, ..
        torch.testing.assert_close(concept_maps, rows[2:6].unflatten(0, (2, 2)))
        expected = MultipathDenoiser.of(sampler, [swapped, swapped], PLAIN)
        original = MultipathDenoiser.of(sampler, [plan, plan], PLAIN)
        assert not torch.equal(expected(x, third), original(x, third))
        # concept 1's prompt is in the right half now
        prompts = [with_prompt(with_prompt(swapped, 0, plan.prompts[1]), 1, plan.prompts[2])] * 2
        torch.testing.assert_close(denoise(x, third), MultipathDenoiser.of(sampler, prompts, PLAIN)(x, third))
    assert len(received) == 3
