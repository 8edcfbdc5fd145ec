"""The levels, written out as plain loops: which noise, prompt, mask and step each stage has.

The loops share with the product only what is tested elsewhere: the routing of one call, `contain`, `with_sketch`, `paste`. Schedulers and
rescaling are those of diffusers. Latents are compared, since images hide what is smaller than a grey level.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from small_pipeline import WIDTH, save_pipeline
from torch import Tensor

from concepts.composition.alignment import invert_references
from concepts.composition.collage import paste
from concepts.composition.first_noise import with_sketch
from concepts.composition.layout import Layout, Region
from concepts.composition.masks import box_mask
from concepts.composition.multipath import (
    ConductorConfig,
    LayoutRequest,
    Level,
    MultipathDenoiser,
    compose,
    contain,
)
from concepts.embeddings import encode, install
from concepts.sampling import SamplerConfig, StableDiffusionSampler
from concepts.stable_diffusion import load_pipeline
from diffusion.guidance import Guidance
from diffusion.noise import draw, generators
from runtime.seeds import derived_seed

CPU = torch.device("cpu")
SHAPE = (4, 16, 16)
BOXES = (0.05, 0.1, 0.45, 0.7), (0.55, 0.3, 1.0, 0.9)  # their edges share positions with the outside
ALL_NOISE = ConductorConfig(inject=("noise",), focus=False)
REFERENCE = torch.randint(0, 256, (3, 96, 96), generator=torch.Generator().manual_seed(5)).to(torch.uint8)

THINGS = Layout(
    "a red star near a moon",
    (Region("<new1>", "a <new1>", box_mask(BOXES[0])), Region("<new2>", "a blue <new2>", box_mask(BOXES[1]))),
    joint="a <new1> near a <new2>",
)
WITH_STYLE = replace(
    THINGS, regions=(*THINGS.regions, Region("<new2>", "a star by <new2>", box_mask((0, 0.9, 0.5, 1)), thing=False))
)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory: pytest.TempPathFactory) -> StableDiffusionSampler:
    pipe = load_pipeline(str(save_pipeline(tmp_path_factory.mktemp("model"))), CPU, torch.float32)
    stream = torch.Generator().manual_seed(0)
    install(pipe, {f"<new{n}>": torch.randn(n, WIDTH, generator=stream) for n in (1, 2)})
    return StableDiffusionSampler(pipe, SamplerConfig("dpm", 6, Guidance(3.0), negative="a green moon"))


def latents(sampler: StableDiffusionSampler, plan: Layout, seed: int, level: Level, config: ConductorConfig) -> Tensor:
    """Return the latents of the image that `compose` returns."""
    decode = StableDiffusionSampler.decode
    with patch.object(StableDiffusionSampler, "decode", autospec=True, side_effect=decode) as decoder:
        image = compose(sampler, [LayoutRequest(plan, seed)], level, config)
    last: Tensor = decoder.call_args.args[1]
    assert torch.equal(image, sampler.decode(last))
    return last


# ---------------------------------------------------------------- the loops


@dataclass
class ByHand:
    """A pipeline's parts, and the stages as plain loops for one image."""

    sampler: StableDiffusionSampler
    texts: dict[str, Tensor] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        return self.sampler.config.steps

    def scheduler(self, steps: int) -> Any:
        config, solver = self.sampler.pipe.scheduler.config, self.sampler.config.solver
        form = "sde-dpmsolver++" if solver == "sde" else "dpmsolver++"
        scheduler: Any = (
            DDIMScheduler.from_config(config, timestep_spacing="leading", clip_sample=False)
            if solver == "ddim"
            else DPMSolverMultistepScheduler.from_config(config, timestep_spacing="trailing", algorithm_type=form)
        )
        scheduler.set_timesteps(steps)
        return scheduler

    def alpha_bar(self, t: int) -> float:
        return float(self.sampler.pipe.scheduler.alphas_cumprod[t])

    def noise(self, seed: int) -> Tensor:
        return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))[None]

    def eps(self, x: Tensor, t: int, prompt: str) -> Tensor:
        pipe: Any = self.sampler.pipe
        if prompt not in self.texts:
            self.texts[prompt] = encode(pipe, [prompt])
        out: Tensor = pipe.unet(x, t, encoder_hidden_states=self.texts[prompt]).sample
        return out

    def clean(self, x: Tensor, t: int, eps: Tensor) -> Tensor:
        return (x - math.sqrt(1 - self.alpha_bar(t)) * eps) / math.sqrt(self.alpha_bar(t))

    def guide(self, cond: Tensor, uncond: Tensor, t: int) -> Tensor:
        guidance = self.sampler.config.guidance
        if not guidance.interval[0] <= t / 1000 < guidance.interval[1]:
            return cond
        out = uncond + guidance.scale * (cond - uncond)
        rescaled: Tensor = rescale_noise_cfg(out, cond, guidance.rescale)
        return rescaled

    def guided(self, x: Tensor, t: int, prompt: str) -> Tensor:
        return self.guide(self.eps(x, t, prompt), self.eps(x, t, self.sampler.config.negative), t)

    def images(self, latent: Tensor) -> Tensor:
        """Decode to -1..1, of 256 levels."""
        vae = self.sampler.pipe.vae
        image: Tensor = vae.decode(latent / vae.config.scaling_factor).sample.clamp(-1, 1)
        return ((image + 1) * 127.5).round() / 127.5 - 1

    def encoded(self, images: Tensor) -> Tensor:
        vae = self.sampler.pipe.vae
        latent: Tensor = vae.encode(images).latent_dist.mean * vae.config.scaling_factor
        return latent

    # the stages

    def first(self, plan: Layout, seed: int, masks: Tensor, strength: float) -> Tensor:
        """Draw the noise, with a sketch against the background that the base prompt implies."""
        noise = self.noise(seed)
        background = self.clean(noise, 999, self.eps(noise, 999, plan.prompt)).mean((2, 3))
        return with_sketch(noise, self.sampler, masks, [seed], background, strength)

    def base(self, plan: Layout, seed: int, config: ConductorConfig, start: int) -> tuple[Tensor, Tensor]:
        """Sample all but the things up to step `start`: x and the x0 that it predicts."""
        masks, scheduler = plan.only(things=True).soft_masks(16, 16)[:, None], self.scheduler(self.steps)
        styles = plan.only(things=False)

        def predict(x: Tensor, t: int) -> Tensor:
            if styles.regions:
                return MultipathDenoiser.of(self.sampler, [styles], config)(x, t)
            return self.guided(x, t, plan.prompt)

        x, stream = self.first(plan, seed, masks, config.sketch), generators([derived_seed(seed, 0)])
        times = scheduler.timesteps.tolist()
        for step, t in enumerate(times[:start]):
            eps = predict(x, t)
            if step < round(config.background_steps * self.steps):
                eps = contain(x, eps, t, self.sampler.schedule, masks)
            x = scheduler.step(eps, t, x, generator=stream).prev_sample
        t, eps = times[start], predict(x, times[start])
        if start < round(config.background_steps * self.steps):
            eps = contain(x, eps, t, self.sampler.schedule, masks)
        return x, self.clean(x, t, eps)

    def alone(self, prompt: str, seed: int, background: Tensor, config: ConductorConfig) -> Tensor:
        """Sample a thing in the middle, in ten steps at most."""
        steps = min(10, self.steps)
        scheduler, middle = self.scheduler(steps), box_mask((7 / 32, 7 / 32, 25 / 32, 25 / 32))
        masks = F.interpolate(middle[None, None], (16, 16), mode="area")
        stream = generators([seed])
        noise = draw(stream, SHAPE, CPU)
        x = with_sketch(noise, self.sampler, masks, [seed], background, config.sketch)
        for step, t in enumerate(scheduler.timesteps.tolist()):
            eps = self.guided(x, t, prompt)
            if step < round(config.background_steps * steps):
                eps = contain(x, eps, t, self.sampler.schedule, masks, background)
            x = scheduler.step(eps, t, x, generator=stream).prev_sample
        return self.images(x)

    def collage(self, plan: Layout, seed: int, config: ConductorConfig, start: int) -> Tensor:
        """Paste things, sampled alone, into the base's x0, noised to step `start` inside the regions."""
        x, x0 = self.base(plan, seed, config, start)
        things = plan.only(things=True)
        masks = things.soft_masks(16, 16)[:, None]
        outside = (1 - masks.sum(0)).clamp(0, 1)[:, None]
        background = (x0 * outside).sum((2, 3)) / outside.sum()
        alone = [
            self.alone(r.prompt, derived_seed(seed, zlib.crc32(r.mask.numpy().tobytes())), background, config)
            for r in things.regions
        ]
        pasted = self.encoded(paste(self.images(x0), alone, things.masks(64, 64)[:, None]))
        alpha_bar = self.alpha_bar(self.scheduler(self.steps).timesteps[start])
        noised = math.sqrt(alpha_bar) * pasted + math.sqrt(1 - alpha_bar) * self.noise(seed)
        return torch.where(masks.amax(0)[:, None] > 0, noised, x)

    def conductor(self, plan: Layout, seed: int, config: ConductorConfig, start: int) -> Tensor:
        """Sample all stages; `start` 0 = no collage."""
        masks, scheduler = plan.soft_masks(16, 16)[:, None], self.scheduler(self.steps)
        led = plan.reference is not None and config.align > 0
        x = self.collage(plan, seed, config, start) if start else self.first(plan, seed, masks, config.sketch)
        stage, stream = self.steps - start, generators([derived_seed(seed, start)])
        refined = range(start + round(0.25 * stage), start + round(0.4 * stage)) if config.refine else range(0)
        denoise = MultipathDenoiser.of(self.sampler, [plan], config, refined)
        for step, t in list(enumerate(scheduler.timesteps.tolist()))[start:]:
            if led and step < round(0.3 * self.steps):
                x = self.aligned(x, t, plan, config.align)
            eps = denoise(x, t)
            if step < round(config.background_steps * self.steps):
                eps = contain(x, eps, t, self.sampler.schedule, masks)
            x = scheduler.step(eps, t, x, generator=stream).prev_sample
        return x

    def aligned(self, x: Tensor, t: int, plan: Layout, weight: float) -> Tensor:
        """Take a step against the gradient of the keys' distance to the reference's: of the base prompt, plus the concepts' mean."""
        own = plan.reference_prompt or plan.prompt
        expected = self.keys(self.inverted(plan, own)[t], t, own)
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            base, *concepts = ((self.keys(x, t, prompt) - expected).square().mean() for prompt in plan.prompts)
            (gradient,) = torch.autograd.grad(base + torch.stack(concepts).mean(), x)
        return x.detach() - weight * gradient

    def keys(self, x: Tensor, t: int, prompt: str) -> Tensor:
        """Return the keys of the first self-attention in the second up block."""
        outputs: list[Tensor] = []
        layer = self.sampler.pipe.unet.up_blocks[1].attentions[0].transformer_blocks[0].attn1.to_k
        hook = layer.register_forward_hook(lambda _, __, out: outputs.append(out))
        self.eps(x, t, prompt)
        hook.remove()
        return outputs[0]

    def inverted(self, plan: Layout, prompt: str) -> dict[int, Tensor]:
        """Go DDIM backwards from the reference, without guidance; eps at the timestep that x has."""
        assert plan.reference is not None
        image = F.interpolate(plan.reference[None] / 127.5 - 1, (64, 64), mode="area")
        x, states, alpha_bar = self.encoded(image), {}, 1.0
        times = self.scheduler(self.steps).timesteps.tolist()
        current = times[-1]
        for t in reversed(times):
            eps = self.eps(x, current, prompt)
            x0 = (x - math.sqrt(1 - alpha_bar) * eps) / math.sqrt(alpha_bar)
            current, alpha_bar = t, self.alpha_bar(t)
            x = states[t] = math.sqrt(alpha_bar) * x0 + math.sqrt(1 - alpha_bar) * eps
        return states


# ---------------------------------------------------------------- the comparison

LED = replace(THINGS, reference=REFERENCE)
DEFAULT = ConductorConfig()
CONDUCTED: dict[
    str, tuple[Layout, ConductorConfig, dict[str, Any], int]
] = {  # .., the sampler, the step of the collage
    "default": (THINGS, DEFAULT, {}, 3),
    "ddim": (THINGS, DEFAULT, {"solver": "ddim"}, 3),
    "stochastic": (THINGS, DEFAULT, {"solver": "sde"}, 3),
    "stochastic without a collage": (THINGS, replace(DEFAULT, collage=0), {"solver": "sde"}, 0),
    "more steps than things alone take": (THINGS, DEFAULT, {"steps": 12}, 7),
    "without guidance": (THINGS, DEFAULT, {"guidance": Guidance(1.0)}, 3),
    "interval and rescale": (THINGS, DEFAULT, {"guidance": Guidance(4.0, (0.2, 0.7), 0.6)}, 3),
    "a style in a region": (WITH_STYLE, DEFAULT, {}, 3),
    "no sketch": (THINGS, replace(DEFAULT, sketch=0), {}, 3),
    "faint sketch": (THINGS, replace(DEFAULT, sketch=1), {}, 3),
    "no background steps": (THINGS, replace(DEFAULT, background_steps=0), {}, 3),
    "background steps beyond the collage": (THINGS, replace(DEFAULT, background_steps=0.75), {}, 3),
    "no collage": (THINGS, replace(DEFAULT, collage=0), {}, 0),
    "late collage": (THINGS, replace(DEFAULT, collage=1), {}, 5),
    "one piece without focus": (THINGS, ALL_NOISE, {}, 3),
    "refined masks": (THINGS, replace(DEFAULT, refine=True), {"steps": 12}, 7),
    "refined masks without a collage": (THINGS, replace(DEFAULT, refine=True, collage=0), {"steps": 12}, 0),
    "reference": (LED, DEFAULT, {}, 0),
    "reference with its own prompt": (replace(LED, reference_prompt="two <new1>"), DEFAULT, {}, 0),
    "reference, ddim, more weight": (LED, replace(DEFAULT, align=50), {"solver": "ddim"}, 0),
    "reference and style": (replace(WITH_STYLE, reference=REFERENCE), DEFAULT, {}, 0),
    "reference without alignment": (LED, replace(DEFAULT, align=0), {}, 3),
}


@pytest.mark.parametrize(("plan", "config", "changes", "start"), CONDUCTED.values(), ids=list(CONDUCTED))
@torch.no_grad()
def test_the_conductor_is_its_stages_written_out(
    sampler: StableDiffusionSampler, plan: Layout, config: ConductorConfig, changes: dict[str, Any], start: int
) -> None:
    other = StableDiffusionSampler(sampler.pipe, replace(sampler.config, **changes))
    expected = ByHand(other).conductor(plan, 3, config, start)
    torch.testing.assert_close(latents(other, plan, 3, "conductor", config), expected, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_joint_is_the_plain_image_of_the_prompt_with_all_tokens(sampler: StableDiffusionSampler) -> None:
    by_hand, scheduler = ByHand(sampler), ByHand(sampler).scheduler(6)
    x = by_hand.noise(3)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(by_hand.guided(x, t, THINGS.joint), t, x).prev_sample
    torch.testing.assert_close(latents(sampler, LED, 3, "joint", DEFAULT), x, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_layout_of_styles_only_is_the_plain_image_of_the_base_prompt(sampler: StableDiffusionSampler) -> None:
    by_hand, scheduler, plan = ByHand(sampler), ByHand(sampler).scheduler(6), replace(THINGS, regions=())
    x = by_hand.noise(3)
    for t in scheduler.timesteps.tolist():
        x = scheduler.step(by_hand.guided(x, t, plan.prompt), t, x).prev_sample
    for level in ("regional", "conductor"):
        torch.testing.assert_close(latents(sampler, plan, 3, level, DEFAULT), x, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_regional_replaces_what_cross_attention_returns_inside_the_masks(sampler: StableDiffusionSampler) -> None:
    """From plain noise: neither sketch nor collage, no branches; the unconditional half knows no regions."""
    by_hand, scheduler = ByHand(sampler), ByHand(sampler).scheduler(6)
    halves = box_mask((0, 0, 0.5, 1)), box_mask((0.5, 0, 1, 1))
    plan = replace(THINGS, regions=tuple(replace(r, mask=m) for r, m in zip(THINGS.regions, halves, strict=True)))
    own = [encode(sampler.pipe, [region.prompt]) for region in plan.regions]

    def by_half(module: Any, args: Any, kwargs: Any, _: Tensor) -> Tensor:
        left, right = (module.forward(*args, **kwargs | {"encoder_hidden_states": text}) for text in own)
        side = math.isqrt(left.shape[1])
        return torch.where((torch.arange(side) < side // 2).repeat(side)[:, None], left, right)

    x = by_hand.noise(3)
    for t in scheduler.timesteps.tolist():
        uncond = by_hand.eps(x, t, sampler.config.negative)
        layers = [m for name, m in sampler.pipe.unet.named_modules() if name.endswith("attn2")]
        hooks = [layer.register_forward_hook(by_half, with_kwargs=True) for layer in layers]
        cond = by_hand.eps(x, t, plan.prompt)
        for hook in hooks:
            hook.remove()
        x = scheduler.step(by_hand.guide(cond, uncond, t), t, x).prev_sample
    torch.testing.assert_close(latents(sampler, plan, 3, "regional", DEFAULT), x, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_a_reference_is_inverted_at_the_timestep_that_its_latent_has(
    sampler: StableDiffusionSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, by_hand = replace(sampler), ByHand(sampler)
    called: list[int] = []

    def recording(x: Tensor, t: int, text: Tensor) -> Tensor:
        called.append(t)
        return sampler.network(x, t, text)

    monkeypatch.setattr(own, "network", recording)
    expected = by_hand.inverted(LED, "two stars")
    x0 = by_hand.encoded(F.interpolate(REFERENCE[None] / 127.5 - 1, (64, 64), mode="area"))
    states = invert_references(own, x0, encode(sampler.pipe, ["two stars"]))
    assert called == [166, 166, 332, 499, 666, 832]  # where it has none yet, where it goes
    torch.testing.assert_close(torch.stack(states), torch.stack(list(expected.values())[::-1]), rtol=1e-3, atol=1e-3)
