"""Whether a figure can be read: all of it lies on the page, texts cover neither images nor each other, and most of the page is used."""

from __future__ import annotations

from itertools import combinations
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.text import Text
from matplotlib.transforms import Bbox


def assert_readable(figure: Any, used: float = 0.5) -> None:
    """Assert that all is on the page and nothing in the way of a text; axes and texts span at least the share `used` of each side."""
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    page, renderer = figure.bbox.padded(1), canvas.get_renderer()
    axes = [axis.get_window_extent(renderer) for axis in figure.axes]
    shown = [box for axis, box in zip(figure.axes, axes, strict=True) if axis.axison]
    artists = figure.findobj(lambda artist: isinstance(artist, Text) and artist.get_visible() and artist.get_text())
    hidden = {id(label) for axis in figure.axes for label in hidden_labels(axis)}
    texts = [(text.get_text(), text.get_window_extent(renderer)) for text in artists if id(text) not in hidden]
    for name, box in [*texts, *(("axis", box) for box in axes)]:
        inside = page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1
        assert inside, f"{name!r} lies outside the page: {box} of {page}"
    for (one, box), (other, second) in combinations(texts, 2):
        assert not overlap(box, second), f"{one!r} covers {other!r}"
    labels = [label for axis in figure.axes for label in (axis.title, axis.xaxis.label, axis.yaxis.label)]
    for label in [label for label in labels if label.get_text() and label.get_visible()]:
        box = label.get_window_extent(renderer)
        assert not any(overlap(box, second) for second in shown), f"{label.get_text()!r} covers an image"
    for box, second in combinations(axes, 2):
        assert not overlap(box, second), "two axes cover each other"
    whole = Bbox.union([*axes, *(box for _, box in texts)])
    assert whole.width >= used * page.width
    assert whole.height >= used * page.height


def hidden_labels(axis: Any) -> list[Text]:
    """Return the labels of ticks that lie beyond the axes, and of all ticks of axes that are switched off."""
    hidden: list[Text] = []
    for line in (axis.xaxis, axis.yaxis):
        low, high = sorted(line.get_view_interval())
        for tick in line.get_major_ticks():
            if not (axis.axison and low <= tick.get_loc() <= high):
                hidden += [tick.label1, tick.label2]
    return hidden


def overlap(one: Bbox, other: Bbox) -> bool:
    """Return whether two boxes share more than a rim of one pixel."""
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return bool(width > 1 and height > 1)
