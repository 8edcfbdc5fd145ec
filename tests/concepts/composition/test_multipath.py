"""Composition: empty masks are the base model, full masks the concept's branch, one batch is what calls one after the other are, references
and refined masks do what they say."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from small_pipeline import WIDTH, save_pipeline
from torch import Tensor, nn

from concepts.composition.alignment import Alignment, inverted, keys
from concepts.composition.first_noise import apart, sketches, with_sketch, without_low
from concepts.composition.layout import FINEST, Layout, Region, box_mask
from concepts.composition.multipath import (
    BranchRouting,
    ConductorConfig,
    LayoutRequest,
    Level,
    collage,
    collage_step,
    compose,
    keep_inside_regions,
    passes,
    routed,
)
from concepts.composition.refinement import bounding_box, fitted, kmeans, watched
from concepts.embeddings import install
from concepts.sampling import Request, SamplerConfig, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from diffusion.guidance import Guidance
from diffusion.schedule import Schedule

CPU = torch.device("cpu")
NOWHERE, EVERYWHERE = torch.zeros(FINEST, FINEST), torch.ones(FINEST, FINEST)
LEFT, RIGHT = box_mask((0, 0, 0.5, 1)), box_mask((0.5, 0, 1, 1))
PIECES: Any = [("attention",), ("features",), ("noise",), ("attention", "features", "noise")]
ATTENTION = ("attn1", "attn2")
DEFAULT, PLAIN = ConductorConfig(), ConductorConfig(sketch=0, background_steps=0, collage=0)
GREY = torch.zeros(2, 4)  # a ground
SCHEDULE = Schedule(torch.tensor([0.3], dtype=torch.float64))


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionSampler:
    pipe = load_pipeline(str(save_pipeline(tmp_path_factory.mktemp("model"))), CPU, torch.float32)
    install(pipe, {"<new1>": torch.randn(1, WIDTH), "<new2>": torch.randn(2, WIDTH)})
    return StableDiffusionSampler(pipe, SamplerConfig("dpm", 3, Guidance(3.0)))


def times(painter: StableDiffusionSampler) -> list[int]:
    return [t for t, _ in painter.grid.pairs]


def layout(*masks: Tensor, **more: Any) -> Layout:
    regions = [Region(f"<new{k + 1}>", f"a photo of a <new{k + 1}>", mask) for k, mask in enumerate(masks)]
    return Layout("a red star", tuple(regions), "a red star", **more)


def drawn(
    painter: StableDiffusionSampler, plan: Layout, seeds: list[int], level: Level, means: ConductorConfig = DEFAULT
) -> Tensor:
    """Whole numbers, so that differences have a sign."""
    return compose(painter, [LayoutRequest(plan, seed) for seed in seeds], level, means).int()


def same(first: Tensor, second: Tensor) -> None:
    """Up to rounding."""
    torch.testing.assert_close(first, second, rtol=0, atol=1)


def shares(*masks: Tensor) -> Tensor:
    """[N,1,16,16]."""
    return layout(*masks).shares(16, 16)[:, None]


@contextmanager
def recorded(unet: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What every attention layer and residual block returns."""
    found: dict[str, Tensor] = {}
    modules = [
        (name, module)
        for name, module in unet.named_modules()
        if name.endswith(ATTENTION) or isinstance(module, ResnetBlock2D)
    ]
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: found.__setitem__(name, out))
        for name, module in modules
    ]
    yield found
    for hook in hooks:
        hook.remove()


# ---------------------------------------------------------------- masks


@pytest.mark.parametrize("level", ["regional", "conductor"])
def test_an_empty_mask_is_the_base_model(painter: StableDiffusionSampler, level: Any) -> None:
    same(drawn(painter, layout(NOWHERE), [1, 2], level), drawn(painter, layout(), [1, 2], "joint"))


@pytest.mark.parametrize("pieces", PIECES)
def test_an_empty_mask_changes_no_bit_of_a_call(painter: StableDiffusionSampler, pieces: Any) -> None:
    """Base and unconditional rows; the concept's hear the base prompt wherever their mask isn't."""
    unet, x = painter.pipe.unet, torch.randn(3, 4, 16, 16)
    texts = painter.text(["a red star", "a photo of a <new1>", ""])
    plain = painter.network(x, 500, texts)
    now = BranchRouting(shares(NOWHERE), True, pieces, texts[:1], texts[1:2, None])
    with torch.no_grad(), routed(unet, now):
        made = painter.network(x, 500, texts)
    assert torch.equal(made[[0, 2]], plain[[0, 2]])
    assert torch.equal(painter.network(x, 500, texts), plain)  # processors and hooks are gone again


@pytest.mark.parametrize(("pieces", "kinds"), [(("attention",), ATTENTION), (("features",), ("resnets",))])
def test_a_full_mask_gives_every_injected_layer_the_concepts_output(
    painter: StableDiffusionSampler, pieces: Any, kinds: Any
) -> None:
    unet, x = painter.pipe.unet, torch.randn(1, 4, 16, 16).repeat(3, 1, 1, 1)
    texts = painter.text(["a red star", "a photo of a <new1>", ""])
    now = BranchRouting(shares(EVERYWHERE), True, pieces)
    with torch.no_grad(), routed(unet, now), recorded(unet) as outputs:
        painter.network(x, 500, texts)
    equal = {name: torch.equal(out[0], out[1]) for name, out in outputs.items()}
    injected = {name for name in outputs if name.startswith("up_blocks") and any(kind in name for kind in kinds)}
    assert injected
    assert all(equal[name] for name in injected)
    assert not any(equal[name] for name in outputs if name.startswith("mid_block"))


def test_a_full_mask_gives_the_concepts_noise(painter: StableDiffusionSampler) -> None:
    alone = drawn(painter, Layout("a photo of a <new1>", ()), [1], "conductor")
    same(drawn(painter, layout(EVERYWHERE), [1], "conductor"), alone)


def test_every_level_draws_something_else(painter: StableDiffusionSampler) -> None:
    levels: tuple[Level, ...] = ("joint", "regional", "conductor")
    made = [drawn(painter, layout(LEFT, RIGHT), [1, 2, 3], level, ConductorConfig(focus=False)) for level in levels]
    assert len({images.numpy().tobytes() for images in made}) == 3


def test_a_single_focused_concept_is_heard_as_by_region(painter: StableDiffusionSampler) -> None:
    """Its branch hears its prompt inside the mask and the base prompt outside, which is what the base branch hears by regions."""
    same(drawn(painter, layout(LEFT), [1], "conductor", PLAIN), drawn(painter, layout(LEFT), [1], "regional", PLAIN))


def test_joint_is_the_plain_picture(painter: StableDiffusionSampler) -> None:
    same(drawn(painter, layout(LEFT), [3], "joint"), painter.sample_images([Request("a red star", 3)]).int())


def test_a_layout_of_styles_only_is_the_plain_picture(painter: StableDiffusionSampler) -> None:
    same(drawn(painter, layout(), [3], "conductor"), painter.sample_images([Request("a red star", 3)]).int())


# ---------------------------------------------------------------- batches


def test_a_batch_is_what_single_pictures_are(painter: StableDiffusionSampler) -> None:
    """Of different layouts, too."""
    plans = [layout(LEFT, RIGHT), layout(RIGHT, LEFT)]
    together = compose(painter, [LayoutRequest(plan, seed) for seed, plan in enumerate(plans)], "conductor").int()
    for seed, plan in enumerate(plans):
        same(drawn(painter, plan, [seed], "conductor")[0], together[seed])


@pytest.mark.parametrize("pieces", PIECES)
def test_the_batch_is_what_calls_one_after_the_other_are(painter: StableDiffusionSampler, pieces: Any) -> None:
    """The method as it is told: first each concept's branch on its own, then the base with what those had inside their masks."""
    unet, x = painter.pipe.unet, torch.randn(1, 4, 16, 16)
    texts = painter.text(["a red star", "a photo of a <new1>", "a <new2>", ""])
    with torch.no_grad():
        alone = []
        for text in texts[1:3]:
            with recorded(unet) as outputs:
                noise = painter.network(x, 500, text[None])
            alone.append(outputs | {"noise": noise})
        plain = painter.network(x, 500, texts[:1])
        with replaced(unet, alone, pieces):
            base = painter.network(x, 500, texts[:1])
        if "noise" in pieces:
            base = mixed(base, [outputs["noise"] for outputs in alone])
        now = BranchRouting(shares(LEFT, RIGHT), True, pieces)
        with routed(unet, now):
            rows = painter.network(x.repeat(4, 1, 1, 1), 500, texts)
    mine = now.blended(*now.parts(rows)[:2]) if "noise" in pieces else rows[:1]
    torch.testing.assert_close(mine, base, rtol=1e-4, atol=1e-4)
    assert (base - plain).abs().max() > 1e-3


def mixed(base: Tensor, concepts: list[Tensor]) -> Tensor:
    """The first concept's left half beside the second's right half; states [1,P,C] of square maps or maps [1,C,h,w]."""
    side = base.shape[-1] if base.dim() == 4 else round(base.shape[1] ** 0.5)
    left = torch.arange(side) < side // 2
    where = left if base.dim() == 4 else left.repeat(side)[:, None]
    first, second = concepts
    return torch.where(where, first, second)


@contextmanager
def replaced(unet: nn.Module, alone: list[dict[str, Tensor]], pieces: Any) -> Iterator[None]:
    """The U-Net, its up blocks' layers mixed from these outputs."""
    hooks = []
    for name, module in unet.named_modules():
        wanted = "attention" in pieces and name.endswith(ATTENTION)
        wanted |= "features" in pieces and isinstance(module, ResnetBlock2D)
        if wanted and name.startswith("up_blocks"):
            mine = [outputs[name] for outputs in alone]
            hooks.append(module.register_forward_hook(lambda _, __, out, mine=mine: mixed(out, mine)))
    yield
    for hook in hooks:
        hook.remove()


def test_the_order_of_concepts_does_not_matter(painter: StableDiffusionSampler) -> None:
    one, two = layout(LEFT, RIGHT).regions
    there, back = (drawn(painter, Layout("a red star", r), [1], "conductor") for r in ((one, two), (two, one)))
    same(there, back)


# ---------------------------------------------------------------- references


def picture(seed: int = 0) -> Tensor:
    return torch.randint(0, 256, (3, 64, 64), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def test_no_weight_is_no_alignment(painter: StableDiffusionSampler) -> None:
    plain = drawn(painter, layout(LEFT), [1], "conductor")
    none = drawn(painter, layout(LEFT, reference=picture()), [1], "conductor", ConductorConfig(align=0))
    assert torch.equal(none, plain)


def alignment(painter: StableDiffusionSampler, plans: list[Layout], weight: float) -> Alignment:
    texts = painter.text([plans[0].prompt, "a photo of a <new1>"])[:, None].repeat(1, len(plans), 1, 1)
    found = Alignment.of(painter, plans, texts, weight)
    assert found
    return found


def test_alignment_of_weight_zero_changes_no_bit(painter: StableDiffusionSampler) -> None:
    x, plans = torch.randn(1, 4, 16, 16), [layout(LEFT, reference=picture())]
    assert torch.equal(alignment(painter, plans, 0.0).aligned(x, times(painter)[0]), x)


def test_a_step_of_alignment_brings_keys_nearer_to_the_references(painter: StableDiffusionSampler) -> None:
    x, t = torch.randn(1, 4, 16, 16), times(painter)[1]
    one = alignment(painter, [layout(LEFT, reference=picture())], 1e-2)

    def distance(x: Tensor) -> float:
        base = keys(painter.pipe.unet, lambda: painter.network(x, t, one.texts[0]))
        wanted = keys(painter.pipe.unet, lambda: painter.network(one.references[t], t, one.prompts))
        return float((base - wanted).square().mean())

    moved = one.aligned(x, t)
    assert not moved.requires_grad
    assert distance(moved) < distance(x)


def test_every_picture_follows_its_own_reference(painter: StableDiffusionSampler) -> None:
    plans = [layout(LEFT, reference=picture(seed)) for seed in (1, 2)]
    x = torch.randn(2, 4, 16, 16)
    together = alignment(painter, plans, 10.0).aligned(x, times(painter)[0])
    for row, plan in enumerate(plans):
        alone = alignment(painter, [plan], 10.0).aligned(x[row : row + 1], times(painter)[0])
        torch.testing.assert_close(together[row], alone[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("solver", ["dpm", "ddim"])
def test_the_reference_is_known_at_every_step_of_the_sampler(painter: StableDiffusionSampler, solver: Any) -> None:
    asked: list[int] = []

    def denoise(x: Tensor, t: int) -> Tensor:
        asked.append(t)
        return x

    other = StableDiffusionSampler(painter.pipe, SamplerConfig(solver, 7))
    other.solve(denoise, torch.randn(1, 4, 16, 16))
    assert times(other) == asked


def test_an_inverted_picture_comes_back(painter: StableDiffusionSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    """DDIM there and back with the exact noise of pictures that are normal with standard deviation 0.5 around 1."""
    fine = StableDiffusionSampler(painter.pipe, SamplerConfig("ddim", 200))

    def exact(x: Tensor, t: int, text: Tensor) -> Tensor:
        alpha = fine.schedule.alpha_bar_at(t)
        return (1 - alpha) ** 0.5 * (x - alpha**0.5) / (0.25 * alpha + 1 - alpha)

    monkeypatch.setattr(fine, "network", exact)
    x = 1 + 0.5 * torch.randn(1, 4, 16, 16)
    known = inverted(fine, x, torch.empty(0))
    last = known[times(fine)[0]]
    assert abs(last.std() - 1) < 0.1
    assert abs(last.mean()) < 0.2
    back = fine.solve(lambda z, t: exact(z, t, torch.empty(0)), last)
    assert (back - x).abs().max() < 0.05


def test_a_reference_changes_the_picture(painter: StableDiffusionSampler) -> None:
    plain = drawn(painter, layout(LEFT), [1], "conductor")
    led = drawn(painter, layout(LEFT, reference=picture()), [1], "conductor", ConductorConfig(align=100))
    assert not torch.equal(led, plain)


# ---------------------------------------------------------------- a sketch in the first noise


def test_a_sketch_has_the_amplitude_that_training_leaves_and_sets_regions_apart(
    painter: StableDiffusionSampler,
) -> None:
    shares = layout(LEFT, RIGHT).shares(*painter.shape[1:])[:, None].expand(-1, 2, -1, -1)
    vae = painter.pipe.vae
    corners = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)[..., None, None].expand(
        -1, -1, 64, 64
    )  # of all colours
    colours = vae.encode(corners).latent_dist.mean.mean((2, 3)) * vae.config.scaling_factor
    widest = float((colours.amax(0) - colours.amin(0)).max())
    left = float(painter.pipe.scheduler.alphas_cumprod[-1]) ** 0.5
    found = sketches(painter, shares, [1, 2], colours.mean(0).expand(2, -1))
    assert found.shape == (2, *painter.shape)
    assert found.mean((2, 3)).abs().max() < 1e-6
    assert 0 < found.abs().max() < 2 * left * widest
    half = painter.shape[2] // 2
    for picture in found:
        assert (picture[:, :, :half].mean((1, 2)) - picture[:, :, half:].mean((1, 2))).abs().max() > 0
    assert not torch.equal(found[0], found[1])


def test_a_sketch_of_nothing_is_nothing_and_of_a_seed_always_the_same(painter: StableDiffusionSampler) -> None:
    nothing = torch.zeros(1, 1, *painter.shape[1:])
    assert not sketches(painter, nothing, [1], GREY[:1]).any()
    one = layout(LEFT).shares(*painter.shape[1:])[:, None]
    alone = sketches(painter, one, [2], GREY[:1])
    both = sketches(painter, one.expand(-1, 2, -1, -1), [1, 2], GREY)
    assert torch.allclose(alone[0], both[1], atol=1e-6)


def test_spots_have_the_colour_farthest_from_the_ground(painter: StableDiffusionSampler) -> None:
    box = layout(box_mask((0.25, 0.25, 0.75, 0.75))).shares(*painter.shape[1:])[:, None]
    away = apart(painter, box, [1], GREY[:1])[0]
    colour = away + GREY[:1]
    other = apart(painter, box, [1], colour)[0]  # were the ground of that colour
    assert other.norm() > 0.1 * away.norm()
    assert (other + colour - GREY[:1]).norm() < away.norm()


def test_the_sketch_stands_in_for_what_is_coarse_in_the_noise(painter: StableDiffusionSampler) -> None:
    """Waves of 3 and 5 periods per side: the first goes, the second stays."""
    wave = torch.arange(16) / 16 * 2 * torch.pi
    low, high = ((n * wave).sin().expand(1, 4, 16, 16) for n in (3, 5))
    assert torch.allclose(without_low(low + 1 + high), high, atol=1e-5)


def test_spots_lie_in_the_middle_of_their_regions(painter: StableDiffusionSampler) -> None:
    """Seen by what a sketch of a box alone differs from its corners: most at its centre, the same in all four directions."""
    shares = torch.zeros(1, 1, *painter.shape[1:])
    shares[:, :, 4:9, 6:11] = 1
    found = sketches(painter, shares, [3], GREY[:1])[0].abs().sum(0)
    ground = found[-1, 0]
    away = (found - ground).abs()
    assert divmod(int(away.argmax()), away.shape[1]) == (6, 8)
    assert float(away[6, 6]) == pytest.approx(float(away[6, 10]), rel=1e-3)
    assert float(away[4, 8]) == pytest.approx(float(away[8, 8]), rel=1e-3)
    assert away[4, 6] < away[6, 6]


def test_regions_that_are_nowhere_or_everywhere_leave_the_noise_as_it_is(painter: StableDiffusionSampler) -> None:
    noise = torch.randn(2, *painter.shape, generator=torch.Generator().manual_seed(0))
    nowhere, everywhere, left = (
        layout(mask).shares(*painter.shape[1:])[:, None] for mask in (NOWHERE, EVERYWHERE, LEFT)
    )
    for shares in (nowhere, everywhere):
        assert torch.equal(with_sketch(noise, painter, shares.expand(-1, 2, -1, -1), [1, 2], GREY, 5.0), noise)
    mixed = with_sketch(noise, painter, torch.cat([nowhere, left], 1), [1, 2], GREY, 5.0)
    assert torch.equal(mixed[0], noise[0])
    assert not torch.equal(mixed[1], noise[1])


def test_a_sketch_moves_the_picture_and_can_be_left_out(painter: StableDiffusionSampler) -> None:
    with_it, without = (
        drawn(painter, layout(LEFT, RIGHT), [1], "conductor", ConductorConfig(sketch=s)) for s in (2.0, 0.0)
    )
    assert not torch.equal(with_it, without)


# ---------------------------------------------------------------- containment


def test_outside_the_regions_a_blur_is_predicted_and_inside_nothing_changes() -> None:
    stream = torch.Generator().manual_seed(0)
    x, eps = torch.randn(2, 1, 4, 16, 16, generator=stream)
    inner = shares(box_mask((0.25, 0.25, 0.75, 0.75)))
    held = keep_inside_regions(x, eps, 0, SCHEDULE, inner)
    before, after = (SCHEDULE.x0_and_eps(noise, x, 0)[0] for noise in (eps, held))
    inside = inner[0, 0] > 0
    assert torch.equal(held[..., inside], eps[..., inside])
    neighbours = (after[..., 1:] - after[..., :-1]).abs()[..., :4, :]  # above the region
    assert neighbours.max() < (before[..., 1:] - before[..., :-1]).abs()[..., :4, :].mean()
    outside = ~inside
    assert after[..., outside].mean() == pytest.approx(float(before[..., outside].mean()), abs=0.05)


def test_what_is_inside_does_not_colour_the_outside() -> None:
    inner = shares(LEFT)
    x = torch.where(inner[0] > 0, 5.0, 1.0).expand(1, 4, 16, 16)
    after, _ = SCHEDULE.x0_and_eps(keep_inside_regions(x, torch.zeros_like(x), 0, SCHEDULE, inner), x, 0)
    torch.testing.assert_close(after, x / 0.3**0.5)


def test_regions_that_are_nowhere_or_everywhere_contain_nothing() -> None:
    x, eps = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    for mask in (NOWHERE, EVERYWHERE):
        assert torch.equal(keep_inside_regions(x, eps, 0, SCHEDULE, shares(mask).expand(-1, 2, -1, -1)), eps)


def test_a_ground_is_predicted_outside_the_regions() -> None:
    x, eps = torch.randn(2, 2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    ground = torch.tensor([[1.0, -1, 0.5, 0], [2.0, 0, 0, 1]])
    regions = shares(LEFT).expand(-1, 2, -1, -1)
    changed = keep_inside_regions(x, eps, 0, SCHEDULE, regions, ground)
    clean, _ = SCHEDULE.x0_and_eps(changed, x, 0)
    torch.testing.assert_close(clean[..., 8:], ground[:, :, None, None].expand(2, 4, 16, 8))
    assert torch.equal(changed[..., :8], eps[..., :8])


def test_containment_changes_the_picture_and_can_be_left_out(painter: StableDiffusionSampler) -> None:
    inner = box_mask((0.25, 0.25, 0.75, 0.75))
    with_it, without = (
        drawn(painter, layout(inner), [1], "conductor", ConductorConfig(sketch=0, background_steps=c))
        for c in (1.0, 0.0)
    )
    assert not torch.equal(with_it, without)


# ---------------------------------------------------------------- the collage


@pytest.mark.parametrize("solver", ["dpm", "ddim"])
def test_two_spans_of_the_solver_visit_all_steps(painter: StableDiffusionSampler, solver: Any) -> None:
    """DDIM looks at one step at a time, so its pieces are the whole; the other starts anew at first order."""
    other, asked = StableDiffusionSampler(painter.pipe, SamplerConfig(solver, 7)), []

    def denoise(x: Tensor, t: int) -> Tensor:
        asked.append(t)
        return x.tanh()

    x = torch.randn(1, 4, 16, 16)
    whole = other.solve(denoise, x)
    once = asked.copy()
    pieces = other.solve(denoise, other.solve(denoise, x, span=slice(0, 3)), span=slice(3, 7))
    assert asked[7:] == once
    assert pieces.shape == whole.shape
    assert solver == "dpm" or torch.equal(pieces, whole)


def test_steps_before_and_after_the_collage_make_a_whole(painter: StableDiffusionSampler) -> None:
    """Before it base prompt and no branches, after it all of them; a region that is everything, or no thing, has none."""
    manner = replace(painter.manner, steps=10)
    boxes = box_mask((0, 0, 0.4, 0.4)), box_mask((0.5, 0.5, 1, 1))
    plan, means = layout(*boxes), replace(DEFAULT, sketch=0, background_steps=0, collage=0.7)
    asked: list[tuple[int, int]] = []
    other = StableDiffusionSampler(painter.pipe, manner)
    network = other.network

    def counted(x: Tensor, t: int, text: Tensor) -> Tensor:
        asked.append((t, len(x)))
        return network(x, t, text)

    other.network = counted  # type: ignore[method-assign]
    assert collage_step([plan], 10, means) == 7
    compose(other, [LayoutRequest(plan, 1)], "conductor", means)
    grid = [t for t, _ in other.grid.pairs]
    assert asked[:8] == [(t, 2) for t in grid[:8]]
    assert asked[8:] == [(t, 4) for t in grid[7:]]
    assert passes(plan, "conductor", 10, means) == sum(rows for _, rows in asked) + 2 * 2 * 10  # each thing alone
    for without in (layout(EVERYWHERE), layout(NOWHERE), layout(*boxes, NOWHERE), replace(plan, regions=())):
        assert collage_step([without], 10, means) == 0
    assert collage_step([plan, layout(boxes[0], EVERYWHERE)], 10, means) == 0
    led = replace(plan, reference=picture())
    assert collage_step([led], 10, means) == 0
    assert collage_step([led], 10, replace(means, align=0)) == 7
    assert collage_step([plan], 10, replace(means, collage=1)) == 9  # at least one step after it


def test_a_collage_changes_only_what_its_regions_touch(painter: StableDiffusionSampler) -> None:
    plan, means, noise = (
        layout(box_mask((0.25, 0.25, 0.75, 0.75))),
        replace(PLAIN, collage=0.5),
        torch.randn(1, 4, 16, 16),
    )
    made = collage(painter, [plan], [1], means, noise, 2)
    touched = plan.shares(16, 16)[0] > 0
    other = replace(plan, regions=(replace(plan.regions[0], prompt="a blue <new2>"),))
    told_otherwise = collage(painter, [other], [1], means, noise, 2)
    changed = (made != told_otherwise).any(1)[0]
    assert changed.any()
    assert not changed[~touched].any()


def test_a_style_of_a_region_is_heard_before_the_collage(painter: StableDiffusionSampler) -> None:
    """Its region is no thing, and has a branch from the first step on."""
    boxes = box_mask((0, 0, 0.4, 0.4)), box_mask((0.5, 0.5, 1, 1))
    plan = layout(boxes[0])
    styled = replace(plan, regions=(*plan.regions, Region("<new2>", "a <new2>", boxes[1], thing=False)))
    noise = torch.randn(1, 4, 16, 16)
    assert collage_step([styled], 3, DEFAULT) == 2
    with_style, without = (collage(painter, [each], [1], PLAIN, noise, 2) for each in (styled, plan))
    assert not torch.equal(with_style, without)


# ---------------------------------------------------------------- refined masks


def test_refined_masks_follow_the_clusters_that_overlap_most() -> None:
    """Attention that sees a left third, a middle and a right third, where the masks were halves."""
    third = torch.arange(64) % 8 * 3 // 8
    seen = (third[:, None] == third).float()[None]
    new = fitted(shares(LEFT, RIGHT), seen, seen.repeat(2, 1, 1, 1))[:, 0, ::2, ::2].flatten(1) > 0
    assert torch.equal(new[0], third == 0)
    assert torch.equal(new[1], third == 2)


@pytest.mark.parametrize("seed", range(8))
def test_refined_masks_never_overlap_and_never_vanish(seed: int) -> None:
    stream = torch.Generator().manual_seed(seed)
    maps = (3 * torch.randn(4, 2, 64, 64, generator=stream)).softmax(-1)
    boxes = [LEFT * box_mask((0.1, 0.1, 0.4, 0.9)), RIGHT, LEFT - LEFT * box_mask((0.1, 0.1, 0.4, 0.9))]
    old = shares(*boxes).repeat(1, 2, 1, 1)
    new = fitted(old, maps[0], maps[1:])
    assert new.shape == old.shape
    assert set(new.unique().tolist()) <= {0.0, 1.0}
    assert new.sum(0).max() == 1
    assert new.any(3).any(2).all()


def test_what_two_concepts_claim_stays_as_it_was() -> None:
    """Both find the whole picture in one cluster of their own maps."""
    nothing = torch.full((1, 64, 64), 1 / 64)
    old = shares(LEFT, RIGHT)
    assert torch.equal(fitted(old, nothing, nothing.repeat(2, 1, 1, 1)), old)


def test_clusters_are_found_and_the_same_in_every_run() -> None:
    stream = torch.Generator().manual_seed(0)
    centres = 10 * torch.eye(3, 5)
    truth = torch.arange(60) % 3
    rows = centres[truth] + torch.randn(60, 5, generator=stream)
    found = kmeans(rows, 3)
    assert all(len(found[truth == k].unique()) == 1 for k in range(3))
    assert len(found.unique()) == 3
    assert torch.equal(kmeans(rows, 3), found)


def test_bounding_boxes() -> None:
    mask = torch.zeros(4, 5, dtype=torch.bool)
    mask[1, 1] = mask[2, 3] = True
    wanted = torch.zeros(4, 5, dtype=torch.bool)
    wanted[1:3, 1:4] = True
    assert torch.equal(bounding_box(mask.flatten(), (4, 5)), wanted.flatten())


def test_watched_attention_is_what_the_layer_does(painter: StableDiffusionSampler) -> None:
    unet, text = painter.pipe.unet, painter.text(["a red star"])
    layer = unet.up_blocks[-2].attentions[-1].transformer_blocks[-1].attn1
    given: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, args, out: given.extend((args[0], out)))
    with torch.no_grad(), watched(unet) as seen:
        painter.network(torch.randn(1, 4, 16, 16), 500, text)
    hook.remove()
    found = seen.probabilities()
    torch.testing.assert_close(found.sum(2), torch.ones(1, 64))
    if layer.heads == 1:
        torch.testing.assert_close(layer.to_out[0](found @ layer.to_v(given[0])), given[1], rtol=1e-4, atol=1e-5)


def test_masks_are_refined_on_the_way(painter: StableDiffusionSampler) -> None:
    more = replace(painter.manner, steps=8)
    busy = StableDiffusionSampler(painter.pipe, more)
    plain = drawn(busy, layout(LEFT, RIGHT), [1], "conductor")
    fit = drawn(busy, layout(LEFT, RIGHT), [1], "conductor", ConductorConfig(refine=True))
    assert not torch.equal(fit, plain)
