"""Draws the layers that miniature/face_world.py lays over one another, by DiceBear and resvg. The layers ship with the repository.

  pip install -r miniature/requirements.txt
  python miniature/face_parts.py                 checkpoints/miniature/face_parts: parts.npz, sheet.png, sheet.json

The design is "Toon Head" by Johan Melin (CC BY 4.0). Ours: glasses, the mouths "sad" and "smile", a nose that
moves with the head's turn, colours, crop.
"""

from __future__ import annotations

import copy
import io
import json
import re
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import repository_root  # noqa: F401  # isort: split
import torch
from PIL import Image
from torch import Tensor

from miniature.face_world import (
    ABSENT,
    COLOURS,
    LAYERS,
    PARTS,
    SHADE,
    SIDE,
    VALUES,
    face_seeds,
    name_factors,
    sample_factors,
)
from runtime.cli import BadInput, log, run_script
from runtime.files import atomic, output_folder, write_json
from runtime.images import image_grid, save_image

CROP = "54 44 660 660"  # of the style's 768 x 768 units
MOVES = {  # units by which a component moves to the right if the head turns right
    "rearHair": -6, "nose": 30, "mouth": 22, "beard": 8, "eyes": 22, "eyebrows": 22, "glasses": 20, "hair": 5
}  # fmt: skip
SIGN = dict(zip(VALUES["turn"], (-1, 0, 1), strict=True))
SLOT = {"skin": "skin", "hair colour": "hair", "clothes colour": "clothes"}  # factor: the style's name of its colour
SHEET = 16  # faces on the sheet

Pixels = npt.NDArray[np.float64]


@dataclass(frozen=True)
class DrawParts:
    """Draw all layers, and a sheet of whole faces, with which faces made of layers are compared."""

    output: Path = PARTS.parent
    """Folder for parts.npz, sheet.png and sheet.json."""


def load_style() -> dict[str, Any]:
    """Return the definition of "Toon Head" with our glasses, nose and mouths; raise BadInput if a package is absent."""
    try:
        import dicebear  # noqa: F401
        import resvg_py  # noqa: F401

        definition: dict[str, Any] = json.loads(files("dicebear_styles").joinpath("toon-head.json").read_text("utf-8"))
    except ImportError as error:
        raise BadInput(f"{error}: pip install -r miniature/requirements.txt") from None

    components = definition["components"]
    shadows = components["head"]["variants"]["head"]["elements"][1]["attributes"]
    ears, nose = re.fullmatch(r"(.*)(M197\.48 330.*)", shadows["d"]).groups()  # type: ignore[union-attr]
    shadows["d"] = ears
    size = {name: components["head"][name] for name in ("width", "height")}
    components["nose"] = size | {"variants": {"nose": {"elements": [_element("path", d=nose, fill_opacity=".3")]}}}

    lips = {"fill": "none", "stroke": "#6b1d20", "stroke_width": "11"}  # the style's two look alike at 64 pixels
    for shape, curve in {"sad": "M16 46Q58 4 100 46", "smile": "M12 12Q58 60 104 12"}.items():
        components["mouth"]["variants"][shape]["elements"] = [_element("path", d=curve, **lips)]

    frame = {"fill": "none", "stroke": "#26262e", "stroke_width": "13"}
    bridge = _element("path", d="M112 56q18 -14 36 0M-54 40L-18 50M314 40L278 50", **frame)
    square = {"y": "8", "width": "114", "height": "88", "rx": "12"}
    shapes = {
        "round": [_element("circle", cx=x, cy="56", r="54", **frame) for x in ("60", "200")],
        "square": [_element("rect", x=x, **square, **frame) for x in ("2", "144")],
    }
    variants = {name: {"elements": [*elements, bridge]} for name, elements in shapes.items()}
    components["glasses"] = {"width": 260, "height": 110, "variants": variants}

    elements = definition["canvas"]["elements"]
    places = {element["name"]: element["attributes"]["transform"] for element in elements}
    places |= {"nose": places["head"], "glasses": "translate(254 350)"}
    definition["canvas"]["elements"] = [
        {"name": name, "type": "component", "attributes": {"transform": places[name]}} for name in LAYERS
    ]
    return definition


def _element(kind: str, **attributes: str) -> dict[str, Any]:
    attributes = {"fill": "black"} | attributes
    return {
        "name": kind,
        "type": "element",
        "attributes": {name.replace("_", "-"): value for name, value in attributes.items()},
    }


def draw(style: dict[str, Any], shapes: dict[str, str], colours: dict[str, str], turn: str) -> Pixels:
    """Return components {name: shape} in colours {slot: hex}, without background: [64,64,4] in 0..255, RGB premultiplied by alpha."""
    import resvg_py
    from dicebear import Avatar, Style

    definition = copy.deepcopy(style)
    canvas = definition["canvas"]
    canvas["elements"] = [element for element in canvas["elements"] if element["name"] in shapes]
    for element in canvas["elements"]:
        right = MOVES.get(element["name"], 0) * SIGN[turn]
        element["attributes"]["transform"] += f" translate({right} 0)"
    options: dict[str, Any] = {f"{name}Variant": shape for name, shape in shapes.items()}
    options |= {f"{name}Probability": 100 for name in shapes} | {f"{slot}Color": c for slot, c in colours.items()}
    svg = str(Avatar(Style(definition), {"seed": "", **options}))
    svg = re.sub(r'viewBox="[^"]*"', f'viewBox="{CROP}"', svg, count=1)
    png = resvg_py.svg_to_bytes(svg_string=svg, width=2 * SIDE, height=2 * SIDE, skip_system_fonts=True)
    pixels = np.asarray(Image.open(io.BytesIO(bytes(png))).convert("RGBA")).astype(np.float64)
    pixels[..., :3] *= pixels[..., 3:] / 255
    halved: Pixels = pixels.reshape(SIDE, 2, SIDE, 2, 4).mean((1, 3))
    return halved


def draw_layer(style: dict[str, Any], component: str, shape: str, turn: str) -> npt.NDArray[np.uint8]:
    """Return a component as [5,64,64] in 0..255: alpha, fixed colour (RGB), and how much of its factor's colour is added."""
    black, white = (draw(style, {component: shape}, dict.fromkeys(SLOT.values(), c), turn) for c in ("000", "fff"))
    tint = (white - black)[..., :3].mean(2, keepdims=True)
    layer = np.concatenate([black[..., 3:], black[..., :3], tint], 2)
    return layer.round().astype(np.uint8).transpose(2, 0, 1)


def draw_face(style: dict[str, Any], face: dict[str, str]) -> Tensor:
    """Return the face [3,64,64] uint8 of {factor: value}, drawn as a whole; the layers must add up to it."""
    shapes = {component: face[factor] if factor else component for component, (factor, _) in LAYERS.items()}
    shapes = {component: shape for component, shape in shapes.items() if shape not in ABSENT}
    hexes = {factor: COLOURS[factor][VALUES[factor].index(face[factor])] for factor in COLOURS}
    pixels = draw(style, shapes, {slot: hexes[factor] for factor, slot in SLOT.items()}, face["turn"])
    background = np.array(list(bytes.fromhex(hexes["background"])))
    x = background * (1 - pixels[..., 3:] / 255) + pixels[..., :3]
    lost = np.linspace(0, SHADE, SIDE)
    light = {"left": 1 - lost, "even": np.ones(SIDE), "right": 1 - lost[::-1]}[face["light"]]
    return torch.from_numpy((x * light[:, None]).round().astype(np.uint8)).permute(2, 0, 1)


def main(settings: DrawParts) -> None:
    """Draw layers and sheet, and write them."""
    style = load_style()
    output_folder(settings.output)

    layers = {"": np.zeros((5, SIDE, SIDE), np.uint8)}
    for component, (factor, _) in LAYERS.items():
        for shape in VALUES[factor] if factor else (component,):
            for turn in VALUES["turn"]:
                if shape not in ABSENT:
                    layers[f"{component} {shape} {turn}"] = draw_layer(style, component, shape, turn)
    with atomic(settings.output / PARTS.name) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, names=np.array(list(layers)), layers=np.stack(list(layers.values())))

    faces = name_factors(sample_factors(face_seeds(0, SHEET)))
    images = torch.stack([draw_face(style, face) for face in faces])
    save_image(settings.output / "sheet.png", image_grid(images, SHEET // 2, gap=0))
    write_json(settings.output / "sheet.json", faces)
    log(f"{len(layers) - 1} layers, and {SHEET} whole faces: {settings.output}")


if __name__ == "__main__":
    run_script(main, DrawParts, __doc__)
