"""Composition: empty masks are the base model, full masks the concept's branch, one batch is what several calls are; layouts are read
as they are meant."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from small_pipeline import WIDTH, save_pipeline
from torch import Tensor

from diffusion.guidance import Guidance
from P3_composition import Composition, compose, composed
from P3_drawing import Manner, Order, Painter
from P3_embeddings import install
from P3_layout import FINEST, Layout, Region, auto_layout, box_mask, make_layout, read_layout
from P3_model import load_pipeline
from runtime.cli import BadInput

CPU = torch.device("cpu")
NOWHERE, EVERYWHERE = torch.zeros(FINEST, FINEST), torch.ones(FINEST, FINEST)
LEFT, RIGHT = box_mask((0, 0, 0.5, 1)), box_mask((0.5, 0, 1, 1))


@pytest.fixture(scope="module")
def painter(tmp_path_factory: pytest.TempPathFactory) -> Painter:
    pipe = load_pipeline(str(save_pipeline(tmp_path_factory.mktemp("model"))), CPU, torch.float32)
    install(pipe, {"<new1>": torch.randn(1, WIDTH), "<new2>": torch.randn(2, WIDTH)})
    return Painter(pipe, Manner("dpm", 3, Guidance(3.0)))


def layout(*masks: Tensor) -> Layout:
    regions = [Region(f"<new{k + 1}>", f"a photo of a <new{k + 1}>", mask) for k, mask in enumerate(masks)]
    return Layout("a red star", tuple(regions), "a red star")


def pixels(x: Tensor) -> Tensor:
    return x.int()


@pytest.mark.parametrize("level", ["regional", "conductor"])
def test_an_empty_mask_is_the_base_model(painter: Painter, level: Any) -> None:
    made = compose(painter, layout(NOWHERE), [1, 2], level)
    plain = compose(painter, Layout("a red star", (), "a red star"), [1, 2], "joint")
    torch.testing.assert_close(pixels(made), pixels(plain), rtol=0, atol=1)


def test_an_empty_mask_changes_no_bit_of_a_call(painter: Painter) -> None:
    unet, x = painter.pipe.unet, torch.randn(3, 4, 16, 16)
    texts = painter.text(["a red star", "a photo of a <new1>", ""])
    plain = painter.network(x, 500, texts)
    with torch.no_grad(), composed(unet, Composition(layout(NOWHERE), 1, (16, 16), True, texts[1:2])):
        assert torch.equal(painter.network(x, 500, texts), plain)
    assert torch.equal(painter.network(x, 500, texts), plain)  # the processors are gone again


def test_joint_is_the_plain_picture(painter: Painter) -> None:
    plain = painter.paint([Order("a red star", 3)])
    made = compose(painter, layout(LEFT), [3], "joint")
    torch.testing.assert_close(pixels(made), pixels(plain), rtol=0, atol=1)


def test_a_full_mask_gives_every_injected_layer_the_concepts_output(painter: Painter) -> None:
    unet = painter.pipe.unet
    x = torch.randn(1, 4, 16, 16).repeat(3, 1, 1, 1)
    texts = painter.text(["a red star", "a photo of a <new1>", ""])
    outputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_hook(lambda _, __, out, name=name: outputs.__setitem__(name, out))
        for name, module in unet.named_modules()
        if name.endswith(("attn1", "attn2"))
    ]
    with torch.no_grad(), composed(unet, Composition(layout(EVERYWHERE), 1, (16, 16), True)):
        painter.network(x, 500, texts)
    for hook in hooks:
        hook.remove()
    up = [out for name, out in outputs.items() if name.startswith("up_blocks")]
    assert up
    assert all(torch.equal(out[0], out[1]) for out in up)
    assert any(not torch.equal(out[0], out[1]) for name, out in outputs.items() if name.startswith("down_blocks"))


def test_a_batch_is_what_single_pictures_are(painter: Painter) -> None:
    both = layout(LEFT, RIGHT)
    together = compose(painter, both, [1, 2], "conductor")
    for index, seed in enumerate((1, 2)):
        alone = compose(painter, both, [seed], "conductor")
        torch.testing.assert_close(pixels(alone[0]), pixels(together[index]), rtol=0, atol=1)


def test_the_order_of_concepts_does_not_matter(painter: Painter) -> None:
    one, two = layout(LEFT, RIGHT).regions
    there, back = (compose(painter, Layout("a red star", r), [1], "conductor") for r in ((one, two), (two, one)))
    torch.testing.assert_close(pixels(there), pixels(back), rtol=0, atol=1)


def test_concepts_act_on_their_own_side(painter: Painter) -> None:
    base = pixels(compose(painter, layout(LEFT), [1], "joint"))
    made = pixels(compose(painter, layout(LEFT), [1], "conductor"))
    assert (made - base).abs().float().mean() > 0


# ---------------------------------------------------------------- layouts


def written(folder: Path, content: Any) -> Path:
    (folder / "layout.json").write_text(json.dumps(content))
    return folder / "layout.json"


def test_boxes_masks_and_styles_are_read(tmp_path: Path) -> None:
    Image.new("L", (64, 32), 255).save(tmp_path / "mask.png")
    concepts = [
        {"token": "<new1>", "box": [0, 0, 0.5, 1]},
        {"token": "<new2>", "mask": "mask.png", "prompt": "my <new2>."},
        {"token": "<new3>", "style": True},
    ]
    found = read_layout(written(tmp_path, {"prompt": "two things.", "concepts": concepts}))
    assert found.prompts == [f"{x} in the style of <new3>" for x in ("two things", "a photo of a <new1>", "my <new2>")]
    assert found.joint == "a photo of a <new1> next to a <new2> in the style of <new3>"
    assert torch.equal(found.masks(2, 4), torch.tensor([[[1.0, 1, 0, 0]] * 2, [[0.0, 0, 1, 1]] * 2]))


def test_the_later_mask_yields_with_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    regions = [("<a>", "a <a>", LEFT), ("<b>", "a <b>", EVERYWHERE)]
    masks = make_layout("x", regions).masks(8, 8)
    assert masks.sum(0).max() == 1
    assert "<b>: 50%" in capsys.readouterr().err


def test_tokens_are_laid_side_by_side() -> None:
    found = auto_layout("a <new1> next to a <new2> in the style of <new3>", {"<new1>": "dog", "<new2>": "cat"})
    assert found.prompt == "a dog next to a cat in the style of <new3>"
    masks = found.masks(16, 16)
    assert masks[0, :, 8:].sum() == 0
    assert masks[1, :, :8].sum() == 0


@pytest.mark.parametrize(
    ("concepts", "message"),
    [
        ([], "at least one concept"),
        ([{"token": "new1", "box": [0, 0, 1, 1]}], "concept 0"),
        ([{"token": "<a>"}], "<a>: give it either a box or a mask"),
        ([{"token": "<a>", "box": [0, 0, 1.2, 1]}], r"<a>: box \[0, 0, 1.2, 1\]"),
        ([{"token": "<a>", "box": [0.5, 0, 0.5, 1]}], "<a>: box"),
        ([{"token": "<a>", "mask": "none.png"}], "none.png"),
        ([{"token": "<a>", "box": [0, 0, 1, 1], "prompt": "a dog"}], "doesn't hold it"),
        ([{"token": "<a>", "box": [0, 0, 1, 1], "weight": 2}], "weight is not known"),
        ([{"token": "<a>", "box": [0, 0, 1, 1]}, {"token": "<b>", "box": [0, 0, 1, 1]}], "<b>: its region is empty"),
    ],
)
def test_bad_layouts_are_named(tmp_path: Path, concepts: Any, message: str) -> None:
    with pytest.raises(BadInput, match=message):
        read_layout(written(tmp_path, {"prompt": "x", "concepts": concepts}))
