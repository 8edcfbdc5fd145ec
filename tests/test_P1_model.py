"""P1's U-Net, its checkpoints, and samples that do not depend on their batch."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusion import samplers
from diffusion.noise import draw, generators
from diffusion.step_rules import step_rule
from digits.sampling import DigitRequest, DigitSampler, DigitSamplerConfig, graded_requests, sample
from P1_model import (
    NO_DIGIT,
    NO_DOMAIN,
    PRESETS,
    ModelConfig,
    Network,
    OneHotConditioning,
    UNet,
    load_network,
    save_network,
    sinusoid,
)
from runtime.cli import BadInput
from runtime.files import load_safetensors
from runtime.images import to_uint8
from runtime.validation import validate

CPU = torch.device("cpu")
FullDisk = Callable[[int], AbstractContextManager[None]]
TINY = {
    "embedding": ModelConfig((16, 32), (False, True), blocks=1, patch=2, embedding=32, head_channels=16),
    "onehot": ModelConfig((16, 32), (False, True), blocks=1, embedding=32, head_channels=16, conditioning="onehot"),
}


def inputs(batch: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return x, t, digit and domain."""
    x = torch.randn(batch, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    return x, torch.full((batch,), 400), torch.full((batch,), 3), torch.full((batch,), 1)


def without_zeros(unet: UNet) -> UNet:
    """Give the zero-initialised weights small random values; return the network."""
    for parameter in unet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return unet.eval().requires_grad_(False)


# ---------------------------------------------------------------- the network


@pytest.mark.parametrize("preset", PRESETS)
@torch.inference_mode()
def test_every_preset_maps_images_to_zero_outputs_of_their_shape(preset: str) -> None:
    x, *labels = inputs()
    assert torch.equal(UNet(PRESETS[preset])(x, *labels), torch.zeros(1, 3, 28, 28))


@pytest.mark.parametrize("conditioning", TINY)
@pytest.mark.parametrize(("position", "value"), [(1, 10), (2, 4), (2, NO_DIGIT), (3, 0), (3, NO_DOMAIN)])
def test_time_digit_and_domain_change_the_output(conditioning: str, position: int, value: int) -> None:
    unet, arguments = without_zeros(UNet(TINY[conditioning])), list(inputs())
    before = unet(*arguments)
    arguments[position] = torch.tensor([value])
    assert float((unet(*arguments) - before).abs().max()) > 1e-4


def test_every_image_of_a_batch_has_its_own_labels() -> None:
    unet, (x, *_) = without_zeros(UNet(TINY["embedding"])), inputs()
    t, digit, domain = torch.tensor([400, 10]), torch.tensor([3, NO_DIGIT]), torch.tensor([1, 0])
    together = unet(torch.cat([x, x]), t, digit, domain)
    alone = [unet(x, t[k : k + 1], digit[k : k + 1], domain[k : k + 1]) for k in range(2)]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-4, atol=1e-5)


def context_input(digit: int, domain: int) -> list[float]:
    """Return the input of the one-hot context's first layer."""
    conditioning = OneHotConditioning(TINY["onehot"])
    inputs = record_inputs(conditioning.context[0])
    conditioning(torch.tensor([5]), torch.tensor([digit]), torch.tensor([domain]))
    return inputs[0][0].tolist()


def record_inputs(layer: nn.Module) -> list[Tensor]:
    """Return a list that collects the layer's inputs."""
    inputs: list[Tensor] = []
    layer.register_forward_pre_hook(lambda _, arguments: inputs.append(arguments[0]))
    return inputs


@pytest.mark.parametrize(
    ("digit", "domain", "ones"), [(3, 1, {3, 11}), (0, 0, {0, 10}), (NO_DIGIT, 1, {11}), (3, NO_DOMAIN, {3})]
)
def test_one_hot_context_has_a_one_per_label(digit: int, domain: int, ones: set[int]) -> None:
    assert context_input(digit, domain) == [float(place in ones) for place in range(12)]


def test_one_hot_context_without_labels_is_all_zeros() -> None:
    assert context_input(NO_DIGIT, NO_DOMAIN) == [0.0] * 12


def test_one_hot_conditioning_receives_the_time_as_a_share_of_all_timesteps() -> None:
    conditioning = OneHotConditioning(replace(TINY["onehot"], timesteps=500))
    inputs = record_inputs(conditioning.time[0])
    conditioning(torch.tensor([125]), torch.tensor([0]), torch.tensor([0]))
    assert inputs[0].tolist() == [[0.25]]


def test_sinusoid_holds_sines_then_cosines_from_frequency_1_down() -> None:
    expected = torch.tensor([3.0, 0.03])
    torch.testing.assert_close(sinusoid(torch.tensor([3]), 4)[0], torch.cat([expected.sin(), expected.cos()]))


@pytest.mark.parametrize("preset", PRESETS)
def test_no_preset_has_batch_norm(preset: str) -> None:
    with torch.device("meta"):
        unet = UNet(PRESETS[preset])
    assert not [m for m in unet.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


def test_cpu_preset_stays_below_4_million_parameters() -> None:
    with torch.device("meta"):
        unet = UNet(PRESETS["cpu"])
    assert sum(parameter.numel() for parameter in unet.parameters()) < 4_000_000


def test_cpu_preset_stays_below_half_a_gflop_per_image() -> None:
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        labels = [torch.ones(1, dtype=torch.long) for _ in range(3)]
        UNet(PRESETS["cpu"])(torch.ones(1, 3, 28, 28), *labels)
    assert 0.1e9 < counter.get_total_flops() < 0.5e9


# ---------------------------------------------------------------- the guidance scale as an input


@pytest.mark.parametrize("conditioning", TINY)
def test_a_network_with_the_guidance_scale_as_an_input_starts_as_the_one_without(conditioning: str) -> None:
    plain, distilled = UNet(TINY[conditioning]), UNet(replace(TINY[conditioning], max_guidance=7.0))
    without_zeros(plain)
    distilled.load_state_dict(plain.state_dict(), strict=False)
    outputs = [distilled(*inputs(4), guidance=torch.tensor([1.0, 3.0, 5.5, 7.0])), distilled(*inputs(4))]
    assert all(torch.equal(output, plain(*inputs(4))) for output in outputs)


def test_a_trained_one_is_the_one_without_at_scale_1_and_another_at_every_other_scale(
    tiny_network: Network, distilled_network: Network
) -> None:
    outputs = distilled_network.unet(*inputs(3), guidance=torch.tensor([1.0, 3.0, 5.0]))
    plain = tiny_network.unet(*inputs(3))
    torch.testing.assert_close(outputs[0], plain[0], rtol=0, atol=1e-6)
    assert all((outputs[k] - other).abs().max() > 0.01 for k, other in ((1, plain[1]), (2, plain[2]), (2, outputs[1])))


def test_the_largest_scale_comes_back_from_a_file(tmp_path: Path, distilled_network: Network) -> None:
    save_network(tmp_path / "n.safetensors", distilled_network)
    loaded = load_network(tmp_path / "n.safetensors", CPU)
    assert loaded.unet.config.max_guidance == 5.0
    guidance = torch.tensor([4.0])
    expected = distilled_network.unet(*inputs(), guidance=guidance)
    torch.testing.assert_close(loaded.unet(*inputs(), guidance=guidance), expected, rtol=0, atol=1e-5)


def test_a_network_with_the_number_of_steps_as_an_input_is_the_one_without_it_when_none_is_given(
    distilled_network: Network, few_step_network: Network
) -> None:
    guidance = torch.tensor([1.0, 3.0, 5.0])
    usual = distilled_network.unet(*inputs(3), guidance=guidance)
    assert torch.equal(few_step_network.unet(*inputs(3), guidance=guidance), usual)
    two, four = (few_step_network.unet(*inputs(3), guidance=guidance, steps=torch.full((3,), n)) for n in (2.0, 4.0))
    assert all((left - right).abs().max() > 0.01 for left, right in ((two, usual), (four, usual), (two, four)))


def test_the_numbers_of_steps_come_back_from_a_file(tmp_path: Path, few_step_network: Network) -> None:
    save_network(tmp_path / "n.safetensors", few_step_network)
    loaded = load_network(tmp_path / "n.safetensors", CPU)
    assert loaded.unet.config.distilled_steps == (4, 2)
    numbers = {"guidance": torch.tensor([3.0]), "steps": torch.tensor([2.0])}
    expected = few_step_network.unet(*inputs(), **numbers)
    torch.testing.assert_close(loaded.unet(*inputs(), **numbers), expected, rtol=0, atol=1e-5)


def test_a_file_without_that_input_does_not_name_it(tmp_path: Path, tiny_network: Network) -> None:
    """Earlier versions refuse keys that they do not know."""
    save_network(tmp_path / "n.safetensors", tiny_network)
    assert {"max_guidance", "distilled_steps", "spec"}.isdisjoint(
        json.loads(header_of(tmp_path / "n.safetensors"))["model"]
    )


def header_of(path: Path) -> str:
    return load_safetensors(path)[1]["network"]


# ---------------------------------------------------------------- configuration and checkpoints


@pytest.mark.parametrize("preset", PRESETS)
def test_config_survives_json(preset: str) -> None:
    values = json.loads(json.dumps(asdict(PRESETS[preset])))
    assert validate(ModelConfig, values, "header") == PRESETS[preset]


def test_config_refuses_an_unknown_name() -> None:
    with pytest.raises(BadInput, match="depth is not known here"):
        validate(ModelConfig, {"channels": [16], "attention": [False], "depth": 3}, "header")


def test_a_network_is_loaded_back_unchanged(tmp_path: Path, tiny_network: Network) -> None:
    save_network(tmp_path / "n.safetensors", tiny_network)
    loaded = load_network(tmp_path / "n.safetensors", CPU)
    torch.testing.assert_close(loaded.unet.state_dict(), tiny_network.unet.state_dict(), rtol=0, atol=0)
    assert loaded.unet.config == tiny_network.unet.config


def test_schedule_sampler_and_origin_come_back(tmp_path: Path, tiny_network: Network) -> None:
    save_network(tmp_path / "n.safetensors", tiny_network)
    loaded = load_network(tmp_path / "n.safetensors", CPU)
    assert torch.equal(loaded.schedule.alpha_bar, tiny_network.schedule.alpha_bar)
    assert loaded.schedule.prediction == "v"
    assert (loaded.schedule_name, loaded.sampler, loaded.origin) == (
        "cosine",
        tiny_network.sampler,
        tiny_network.origin,
    )


def test_fp16_halves_the_file_and_loads_as_fp32(tmp_path: Path, tiny_network: Network) -> None:
    full, half = tmp_path / "full.safetensors", tmp_path / "half.safetensors"
    save_network(full, tiny_network)
    save_network(half, tiny_network, torch.float16)
    assert half.stat().st_size < 0.6 * full.stat().st_size
    loaded = load_network(half, CPU).unet.state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {torch.float32}
    torch.testing.assert_close(loaded, tiny_network.unet.state_dict(), rtol=1e-3, atol=1e-6)


def test_loaded_network_is_ready_to_sample(tmp_path: Path, tiny_network: Network) -> None:
    save_network(tmp_path / "n.safetensors", tiny_network)
    unet = load_network(tmp_path / "n.safetensors", CPU).unet
    assert not unet.training
    assert not any(parameter.requires_grad for parameter in unet.parameters())


def test_saving_on_a_full_disk_is_an_os_error_and_keeps_the_old_file(
    tmp_path: Path, tiny_network: Network, full_disk: FullDisk
) -> None:
    path = tmp_path / "n.safetensors"
    save_network(path, tiny_network)
    before = path.read_bytes()
    with full_disk(10_000), pytest.raises(OSError, match=r"n\.safetensors|too large"):
        save_network(path, tiny_network)
    assert path.read_bytes() == before


def damaged(path: Path, network: Network, change: Callable[[dict[str, Tensor], dict[str, str]], None]) -> Path:
    """Save a network, let `change` edit its weights and metadata, and return the path."""
    save_network(path, network)
    weights = load_file(path)
    metadata = {"network": json.dumps(saved_header(path))}
    change(weights, metadata)
    save_file(weights, path, metadata)
    return path


def saved_header(path: Path) -> dict[str, object]:
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header: dict[str, object] = json.loads(json.loads(content[8 : 8 + length])["__metadata__"]["network"])
    return header


def test_truncated_network_is_named(tmp_path: Path, tiny_network: Network) -> None:
    path = tmp_path / "n.safetensors"
    save_network(path, tiny_network)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(BadInput, match=r"n\.safetensors is not a safetensors file or is truncated"):
        load_network(path, CPU)


def test_missing_network_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match=r"n\.safetensors does not exist"):
        load_network(tmp_path / "n.safetensors", CPU)


def test_the_state_of_an_unfinished_training_is_named(tmp_path: Path) -> None:
    torch.save({"kind": "P1 training", "step": 3}, tmp_path / "checkpoint.pt")
    with pytest.raises(
        BadInput, match=r"checkpoint\.pt is a torch file, but not a P1 .*unfinished training .P1 training"
    ):
        load_network(tmp_path / "checkpoint.pt", CPU)


def test_safetensors_without_header_are_refused(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "n.safetensors")
    with pytest.raises(BadInput, match=r"n\.safetensors is a safetensors file, but not a P1 checkpoint"):
        load_network(tmp_path / "n.safetensors", CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda header: header.pop("prediction"), "prediction is missing"),
        (lambda header: header.pop("sampler"), "sampler is missing"),
        (lambda header: header.update(sampler=["dpm"]), "sampler: must be a valid dictionary"),
        (lambda header: header.update(prediction="x0"), "prediction: .*it is 'x0'"),
        (lambda header: header.update(schedule="sigmoid"), "schedule: .*it is 'sigmoid'"),
        (lambda header: header.update(timesteps=0), "timesteps: .*it is 0"),
        (lambda header: header["sampler"].update(name="unipc"), "sampler, name: .*it is 'unipc'"),
        (lambda header: header["sampler"].update(guidance=float("nan")), "sampler, guidance: .*it is nan"),
        (lambda header: header["sampler"].update(steps="many"), "sampler, steps: .*it is 'many'"),
        (lambda header: header["model"].update(channels=[]), "model: no network has this layout"),
        (lambda header: header["model"].update(channels=[16]), "model: no network has this layout"),
        (lambda header: header["model"].update(head_channels=0), "model: no network has this layout"),
    ],
)  # fmt: skip
def test_a_header_of_another_version_is_one_line(
    tmp_path: Path, tiny_network: Network, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    save_network(tmp_path / "n.safetensors", tiny_network)
    header: dict[str, Any] = saved_header(tmp_path / "n.safetensors")
    change(header)
    save_file(tiny_network.unet.state_dict(), tmp_path / "n.safetensors", {"network": json.dumps(header)})
    with pytest.raises(BadInput, match=rf"n\.safetensors, header of a P1 checkpoint, {message}") as error:
        load_network(tmp_path / "n.safetensors", CPU)
    assert "\n" not in str(error.value)


def test_a_header_that_is_no_json_is_one_line(tmp_path: Path) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "n.safetensors", {"network": "{"})
    with pytest.raises(BadInput, match=r"n\.safetensors, header of a P1 checkpoint is not valid JSON"):
        load_network(tmp_path / "n.safetensors", CPU)


def test_weights_that_are_not_finite_are_named(tmp_path: Path, tiny_network: Network) -> None:
    def spoil(weights: dict[str, Tensor], _: dict[str, str]) -> None:
        weights["first.bias"][0] = torch.nan

    with pytest.raises(BadInput, match=r"n\.safetensors: first\.bias holds values that are NaN"):
        load_network(damaged(tmp_path / "n.safetensors", tiny_network, spoil), CPU)


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({"kind": "something else"}, "kind: .* it is 'something else'"),
        (
            {"kind": "P1 digit diffusion", "model": {"channels": [16], "attention": [False], "depth": 3}},
            "model.depth is not known here",
        ),
        ({"kind": "P1 digit diffusion"}, "model is missing"),
    ],
    ids=["another kind", "an unknown setting", "a missing part"],
)
def test_headers_of_another_kind_are_refused(tmp_path: Path, header: dict[str, object], message: str) -> None:
    save_file({"w": torch.ones(3)}, tmp_path / "n.safetensors", {"network": json.dumps(header)})
    with pytest.raises(BadInput, match=rf"n\.safetensors, header of a P1 checkpoint, {message}"):
        load_network(tmp_path / "n.safetensors", CPU)


def test_weights_of_another_layout_are_refused(tmp_path: Path, tiny_network: Network) -> None:
    def widen(_: dict[str, Tensor], metadata: dict[str, str]) -> None:
        header = json.loads(metadata["network"])
        header["model"]["channels"] = [16, 48]
        metadata["network"] = json.dumps(header)

    path = damaged(tmp_path / "n.safetensors", tiny_network, widen)
    with pytest.raises(BadInput, match=r"n\.safetensors: .*size mismatch for"):
        load_network(path, CPU)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights, _: weights.pop("first.weight"), r"Missing key\(s\).*first\.weight"),
        (lambda weights, _: weights.update(extra=torch.ones(1)), r"Unexpected key\(s\).*extra"),
        (lambda weights, _: weights.update({"first.weight": torch.ones(2, 2)}), "size mismatch for first.weight"),
    ],
    ids=["missing", "unexpected", "misshaped"],
)
def test_wrong_weights_are_named(
    tmp_path: Path,
    tiny_network: Network,
    change: Callable[[dict[str, Tensor], dict[str, str]], None],
    message: str,
) -> None:
    path = damaged(tmp_path / "n.safetensors", tiny_network, change)
    with pytest.raises(BadInput, match=rf"n\.safetensors: {message}"):
        load_network(path, CPU)


# ---------------------------------------------------------------- sampling

SAMPLERS = {
    "dpm": DigitSamplerConfig("dpm", 4),
    "ddim": DigitSamplerConfig("ddim", 4),
    "ddim eta 1": DigitSamplerConfig("ddim", 4, eta=1.0),
    "ddpm": DigitSamplerConfig("ddpm"),
}
SEVEN = DigitRequest(7, 1, seed=123)
OTHERS = [DigitRequest(digit, 0, seed=digit) for digit in range(4)]


@pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
def test_an_image_is_the_same_alone_and_anywhere_in_a_batch(tiny_network: Network, sampler: DigitSamplerConfig) -> None:
    alone = sample(tiny_network, [SEVEN], sampler)[0]
    second_of_five = sample(tiny_network, [OTHERS[0], SEVEN, *OTHERS[1:]], sampler)[1]
    last_of_three = sample(tiny_network, [*OTHERS[:2], SEVEN], sampler)[2]
    for together in (second_of_five, last_of_three):
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-4)
        assert int((to_uint8(together).int() - to_uint8(alone).int()).abs().max()) <= 1


def test_samples_are_a_finite_batch_of_rgb_images(tiny_network: Network) -> None:
    images = sample(tiny_network, OTHERS, SAMPLERS["dpm"])
    assert tuple(images.shape) == (4, 3, 28, 28)
    assert bool(images.isfinite().all())


@pytest.mark.parametrize(
    "changes", [{"seed": 124}, {"digit": 6}, {"domain": 0}, {"digit": NO_DIGIT}, {"domain": NO_DOMAIN}]
)
def test_seed_digit_and_domain_change_the_image(tiny_network: Network, changes: dict[str, int]) -> None:
    first, second = (sample(tiny_network, [p], SAMPLERS["ddim"]) for p in (SEVEN, replace(SEVEN, **changes)))
    assert float((first - second).abs().max()) > 1e-3


def test_without_a_digit_guidance_changes_nothing(tiny_network: Network) -> None:
    unknown = DigitRequest(NO_DIGIT, 1, seed=5)
    plain, strong = (sample(tiny_network, [unknown], DigitSamplerConfig("ddim", 4, guidance=g)) for g in (1.0, 7.5))
    torch.testing.assert_close(plain, strong, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        DigitSamplerConfig("ddim", 4, guidance=7.5, eta=1.0),
        DigitSamplerConfig("ddim", 5, guidance=2.0, eta=0.3, rule="homework", interval=(0.2, 0.7)),
        DigitSamplerConfig("dpm", 5, guidance=3.0, rescale=0.6),
        DigitSamplerConfig("ddpm", guidance=1.5),
    ],
)
def test_samplers_get_the_guided_output_and_their_rule_eta_and_noise(
    tiny_network: Network, config: DigitSamplerConfig
) -> None:
    """Guidance goes from the prediction without a digit, of the same domain, towards the digit's and beyond."""

    def denoise(x: Tensor, t: int) -> Tensor:
        cond, uncond = (tiny_network(x, t, (torch.tensor([digit]), torch.tensor([1]))) for digit in (7, NO_DIGIT))
        out = rescale_noise_cfg(uncond + config.guidance * (cond - uncond), cond, config.rescale)
        return out if config.interval[0] <= t / 20 < config.interval[1] else cond

    streams, schedule = generators([123]), tiny_network.schedule
    x = draw(streams, (3, 28, 28), CPU)
    if config.name == "ddpm":
        expected = samplers.ddpm(denoise, x, schedule, streams)
    elif config.name == "dpm":
        expected = samplers.dpm_solver(denoise, x, schedule, config.steps)
    else:
        steps = step_rule(config.rule, 20, config.steps)
        expected = samplers.ddim(denoise, x, schedule, steps, streams, config.eta)
    torch.testing.assert_close(sample(tiny_network, [SEVEN], config), expected, rtol=0, atol=1e-3)


def test_a_run_in_batches_samples_the_same_images_as_one_batch(tiny_network: Network) -> None:
    requests = [*OTHERS, SEVEN]
    whole = sample(tiny_network, requests, SAMPLERS["ddim"])
    torch.testing.assert_close(
        DigitSampler(tiny_network, SAMPLERS["ddim"], 2).images(requests, "test"), whole, rtol=0, atol=1e-4
    )


def test_a_run_of_one_batch_shape_gives_the_same_bytes_however_many_images_follow(tiny_network: Network) -> None:
    few, many = (DigitSampler(tiny_network, SAMPLERS["ddim eta 1"], 4).images((OTHERS * 2)[:n], "test") for n in (5, 8))
    assert torch.equal(few, many[:5])


def test_graded_requests_come_by_domain_digit_and_index() -> None:
    order = [(request.domain, request.digit) for request in graded_requests(0, 2, digits=(3, 7))]
    assert order == [(0, 3), (0, 3), (0, 7), (0, 7), (1, 3), (1, 3), (1, 7), (1, 7)]


def test_the_seed_of_a_graded_request_does_not_depend_on_the_other_requests() -> None:
    whole = graded_requests(0, 50)
    assert len({p.seed for p in whole}) == 1000
    assert set(graded_requests(0, 5, digits=(7,), domains=(1,))) < set(whole)


def test_sampler_settings_survive_a_checkpoint_and_ignore_unknown_names() -> None:
    values = {"name": "ddim", "steps": 9, "interval": [0.1, 0.9], "from_the_future": 1}
    assert DigitSamplerConfig.from_dict(values) == DigitSamplerConfig("ddim", 9, interval=(0.1, 0.9))
