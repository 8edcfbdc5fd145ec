"""The teachers of a distillation: guided output, guidance scales, and the steps of a sampler."""

from __future__ import annotations

import torch
from torch import Tensor

from diffusion.guidance import Denoise
from diffusion.noise import draw, generators
from diffusion.samplers import ddim
from diffusion.step_rules import Steps, step_rule
from digits.distillation import StepTeacher, Teacher
from digits.sampling import graded_requests, labels_of, sample
from P1_model import NO_DIGIT, NO_DOMAIN, DigitSamplerConfig, Network


def test_the_teacher_returns_each_images_guided_output_in_one_call(tiny_network: Network) -> None:
    """The prediction without a digit is of the same domain; an image without a digit has no guidance."""
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(4, 3, 28, 28, generator=generator), torch.tensor([3, 19, 7, 12])
    digit, domain = torch.tensor([3, 8, NO_DIGIT, 5]), torch.tensor([0, 1, 1, NO_DOMAIN])
    guidance, batches = torch.tensor([1.0, 3.0, 5.0, 7.0]), list[int]()
    tiny_network.unet.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    output = Teacher(tiny_network.unet, 7.0)(x, t, digit, domain, guidance)
    assert batches == [8]
    cond, uncond = (tiny_network.unet(x, t, d, domain) for d in (digit, torch.full_like(digit, NO_DIGIT)))
    expected = uncond + guidance[:, None, None, None] * (cond - uncond)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-5)
    assert torch.equal(cond[2], uncond[2])


def test_no_gradient_flows_into_the_teacher(tiny_network: Network) -> None:
    tiny_network.unet.requires_grad_(True)
    one = torch.ones(1, dtype=torch.long)
    assert not Teacher(tiny_network.unet, 7.0)(torch.zeros(1, 3, 28, 28), one, one, one, one.float()).requires_grad


def test_scales_go_from_1_to_the_largest(tiny_network: Network) -> None:
    assert Teacher(tiny_network.unet, 7.0).scales(torch.tensor([0.0, 0.25, 1.0])).tolist() == [1.0, 2.5, 7.0]


def test_a_distilled_teacher_returns_its_output_at_these_scales_in_one_call(distilled_network: Network) -> None:
    generator = torch.Generator().manual_seed(0)
    x, t = torch.randn(3, 3, 28, 28, generator=generator), torch.tensor([3, 19, 7])
    labels, guidance = (torch.tensor([3, 8, NO_DIGIT]), torch.tensor([0, 1, 1])), torch.tensor([1.0, 3.0, 5.0])
    expected = distilled_network.unet(x, t, *labels, guidance)
    batches = list[int]()
    distilled_network.unet.register_forward_hook(lambda module, inputs, output: batches.append(len(inputs[0])))
    assert torch.equal(Teacher(distilled_network.unet, 5.0)(x, t, *labels, guidance), expected)
    assert batches == [3]


def always(output: Tensor) -> Denoise:
    """Return a denoiser with this output for every x and t."""
    return lambda x, t: output


def test_steps_with_the_outputs_that_a_student_learns_lead_to_the_images_of_the_teachers_sampler(
    tiny_network: Network,
) -> None:
    """A student of zeros reveals them: the loss is mean (0 - goal)^2, and its gradient -2 goal / elements."""
    requests = graded_requests(0, 1)
    labels, guidance = labels_of(requests), torch.full((len(requests),), 3.0)
    noise = draw(generators([request.seed for request in requests]), (3, 28, 28), torch.device("cpu"))
    expected = sample(tiny_network, requests, DigitSamplerConfig("dpm", steps=4, guidance=3.0))
    inputs: list[tuple[Tensor, ...]] = []

    def student(*values: Tensor) -> Tensor:
        inputs.append((*values, output := torch.zeros_like(values[0], requires_grad=True)))
        return output

    teacher = StepTeacher(tiny_network.unet, 7.0, tiny_network.schedule, 4, (2, 1))
    teacher.loss(student, noise, *labels, guidance).backward()
    ((x, t, digit, domain, scale, steps, output),) = inputs  # one call
    assert output.grad is not None
    goals = (-output.grad * output.numel() / 2).split(len(noise))
    assert torch.equal(digit, labels[0].repeat(3))
    assert torch.equal(domain, labels[1].repeat(3))
    assert scale.tolist() == [3.0] * 60
    assert steps.tolist() == [2] * 40 + [1] * 20
    for first, count in ((0, 2), (2, 1)):
        state = noise
        for row, pair in enumerate(step_rule("trailing", 20, count).pairs, first):
            chunk = slice(20 * row, 20 * row + 20)
            torch.testing.assert_close(x[chunk], state, rtol=0, atol=1e-4)
            assert t[chunk].tolist() == [pair[0]] * 20
            state = ddim(always(goals[row]), state, tiny_network.schedule, Steps((pair,), clamp=False))
        torch.testing.assert_close(state.clamp(-1, 1), expected, rtol=0, atol=1e-3)


def test_the_states_are_those_that_the_teachers_sampler_visits(tiny_network: Network) -> None:
    requests = graded_requests(0, 1)
    noise = draw(generators([request.seed for request in requests]), (3, 28, 28), torch.device("cpu"))
    visited: list[Tensor] = [noise]
    sample(tiny_network, requests, DigitSamplerConfig("dpm", 4, 2.0), lambda t, x: visited.append(x))
    teacher = StepTeacher(tiny_network.unet, 7.0, tiny_network.schedule, 4, (2,))
    states = teacher.states(noise, *labels_of(requests), torch.full((len(requests),), 2.0))
    assert [*states] == [19, 14, 9, 4, -1]
    for state, expected in zip(states.values(), visited, strict=True):
        torch.testing.assert_close(state, expected.clamp(-1, 1) if state is states[-1] else expected, rtol=0, atol=1e-4)
