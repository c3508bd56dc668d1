"""A dense task: a small SOLO-like head with and without coordinates, on shapes that overlap.

SOLO (Wang et al., ECCV 2020) cuts a picture into S by S cells. A branch says for each cell whether
an instance is centred there, and another predicts a mask for each cell, in S * S channels. A
convolution cannot know which of the channels a pixel belongs to unless it knows where the pixel is:
the paper appends coordinates to what the mask branch starts from. The network is in ``solo.py``.

The pictures are 64x64, of two to five circles, squares and triangles that look alike. Zero padding
tells a network where the border is, and with it positions; circular padding does not, so that the
variants with it have no positions but those of the coordinates.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common import Array
from evidence.study import Job, Run, Sheet, spread

SPLITS = ("",)
BACKENDS = ("torch",)
CANVAS, CELLS = 64, 8
CENTRE = 0.2  # of an instance's width and height: whose cells predict it (SOLO, section 3.3)
STEPS, BATCH, RATE, TESTED = 700, 16, 4e-3, 200
THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))  # of COCO's average precision


@dataclass(frozen=True)
class Variant:
    """Where coordinates are, in ``none``, the ``first`` convolution of the mask branch, ``all``."""

    label: str
    coords: str
    padding: str = "zeros"


VARIANTS = {
    "none": Variant("no coordinates", "none"),
    "first": Variant("in the mask branch's first convolution", "first"),
    "all": Variant("in every convolution", "all"),
    "none-circular": Variant("no coordinates, circular padding", "none", "circular"),
    "first-circular": Variant("in the first, circular padding", "first", "circular"),
}


@dataclass(frozen=True)
class Scene:
    """A picture ``(CANVAS, CANVAS)`` and the visible part of each instance, ``(n, *same)``."""

    picture: Array
    masks: Array


def scene(rng: np.random.Generator) -> Scene:
    """Two to five shapes, the later ones before the earlier, each at least half visible."""
    y, x = np.mgrid[:CANVAS, :CANVAS] + 0.5
    picture = np.zeros((CANVAS, CANVAS), np.float32)
    masks: list[Array] = []
    areas: list[int] = []
    wanted = rng.integers(2, 6)
    while len(masks) < wanted:
        radius = rng.uniform(6, 11)
        left, top = rng.uniform(radius, CANVAS - radius, 2)
        depth = _depth(rng.integers(3), x - left, y - top, radius, rng.uniform(0, 2 * np.pi))
        shape = depth > 0
        visible = [mask & ~shape for mask in masks]
        if any(2 * m.sum() < area for m, area in zip(visible, areas, strict=True)):
            continue  # it would hide another
        masks, areas = [*visible, shape], [*areas, int(shape.sum())]
        picture[shape] = np.where(depth[shape] > 1, 1.0, 0.4)  # the outline is darker
    noise = rng.normal(0, 0.05, picture.shape)
    return Scene((picture + noise).astype(np.float32), np.stack(masks))


def _depth(kind: int, x: Array, y: Array, radius: float, angle: float) -> Array:
    """How far within a circle, a square or a triangle a place is, in pixels."""
    if kind == 0:
        return np.asarray(radius - np.hypot(x, y))
    sides = 4 if kind == 1 else 3
    normals = angle + 2 * np.pi * np.arange(sides) / sides
    distance = np.max([x * np.cos(a) + y * np.sin(a) for a in normals], 0)
    return np.asarray((0.8 if kind == 1 else 0.62) * radius - distance)


def scenes(seed: int, count: int) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [scene(rng) for _ in range(count)]


def cells_of(mask: Array) -> list[int]:
    """The cells, counted row by row, that the middle of an instance touches."""
    rows, columns = np.nonzero(mask)
    sides = []
    for places in (rows, columns):
        centre, half = places.mean() + 0.5, CENTRE * (np.ptp(places) + 1) / 2
        ends = np.array([centre - half, centre + half]) * CELLS / CANVAS
        low, high = np.clip(np.floor(ends).astype(int), 0, CELLS - 1)
        sides.append(range(low, high + 1))
    return [row * CELLS + column for row in sides[0] for column in sides[1]]


def overlaps(first: Array, second: Array) -> Array:
    """Intersection over union of each mask of one ``(n, H, W)`` with each of another."""
    a, b = (masks.reshape(len(masks), -1).astype(np.float32) for masks in (first, second))
    common = a @ b.T
    union = a.sum(1)[:, None] + b.sum(1) - common
    return np.asarray(common / np.maximum(union, 1))


@dataclass(frozen=True)
class Found:
    """What a network found in a picture: masks ``(n, H, W)``, and a score ``(n,)`` for each."""

    masks: Array
    scores: Array


def average_precision(
    found: Sequence[Found], truth: Sequence[Array], thresholds: Sequence[float] = THRESHOLDS
) -> float:
    """Mask AP as COCO defines it, of one class: the mean over the thresholds of overlap.

    In the order of the scores each mask takes the instance of its picture that it overlaps most
    among those that are left, if by the threshold at least. The precision at a recall is the best
    at this recall or a higher one; the average is that over 101 recalls from 0 to 1.
    """
    scores = np.concatenate([each.scores for each in found])
    order = np.argsort(-scores, kind="stable")
    total = sum(map(len, truth))
    values = []
    for threshold in thresholds:
        right = np.concatenate(
            [_right(each, masks, threshold) for each, masks in zip(found, truth, strict=True)]
        )[order]
        hits = np.cumsum(right)
        precision = hits / np.arange(1, len(hits) + 1)
        best = np.append(np.maximum.accumulate(precision[::-1])[::-1], 0)
        values.append(best[np.searchsorted(hits / total, np.linspace(0, 1, 101))].mean())
    return float(np.mean(values))


def _right(found: Found, masks: Array, threshold: float) -> Array:
    right = np.zeros(len(found.scores), bool)
    left = overlaps(found.masks, masks)
    for i in np.argsort(-found.scores, kind="stable"):
        best = int(left[i].argmax())
        if left[i, best] >= threshold:
            right[i], left[:, best] = True, -1
    return right


def suppressed(found: Found, most: float = 0.5) -> Found:
    """Without the masks that overlap one of a higher score by more."""
    each = overlaps(found.masks, found.masks)
    kept: list[int] = []
    for i in np.argsort(-found.scores, kind="stable"):
        if not kept or each[i, kept].max() <= most:
            kept.append(int(i))
    return Found(found.masks[kept], found.scores[kept])
