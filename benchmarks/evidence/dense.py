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

import textwrap
import time
from collections.abc import Sequence
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
STEPS, BATCH, RATE, TESTED, EVERY = 800, 16, 4e-3, 200, 200
QUICK_STEPS, QUICK_TESTED = 60, 50
EXAMPLES, SHOWN_SCORE = 5, 0.3  # of the pictures of one run; what is drawn of its answers
THRESHOLDS = tuple(0.5 + 0.05 * i for i in range(10))  # of COCO's average precision


@dataclass(frozen=True)
class Variant:
    """Where coordinates are, in ``none``, the ``first`` convolution of the mask branch, ``all``."""

    label: str
    coords: str
    padding: str = "zeros"


VARIANTS = {
    "none": Variant("none", "none"),
    "first": Variant("in the mask branch's first", "first"),
    "all": Variant("in every one", "all"),
    "none-circular": Variant("none, circular padding", "none", "circular"),
    "first-circular": Variant("in its first, circular padding", "first", "circular"),
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
        depth = _depth(int(rng.integers(3)), x - left, y - top, radius, rng.uniform(0, 2 * np.pi))
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
    a, b = (m.reshape(len(m), m.shape[1] * m.shape[2]).astype("f4") for m in (first, second))
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


def jobs(split: str, backend: str, seeds: int, quick: bool) -> list[Job]:
    return [
        Job("dense", split, variant, seed, backend, quick)
        for variant in VARIANTS
        for seed in range(seeds)
    ]


def run(job: Job) -> Run:
    """Train one network on new pictures in each step; measure its AP on those of another seed."""
    from evidence import solo  # which imports torch

    steps, tested = (QUICK_STEPS, QUICK_TESTED) if job.quick else (STEPS, TESTED)
    train = solo.Training(VARIANTS[job.variant], job.seed, steps)
    rng, test = np.random.default_rng(job.seed), scenes(10_000, tested)
    truth = [each.masks for each in test]
    curve, seconds = [], 0.0
    for done in range(1, steps + 1):
        drawn = [scene(rng) for _ in range(BATCH)]
        began = time.perf_counter()
        train.step(drawn)
        seconds += time.perf_counter() - began
        if done % min(EVERY, steps) == 0:
            curve.append((done, 100 * average_precision(train.answers(test), truth)))
    found = train.answers(test)
    measures = {"AP": 100 * average_precision(found, truth), "steps": float(steps)}
    for at in (0.5, 0.75):
        measures[f"AP{at * 100:.0f}"] = 100 * average_precision(found, truth, [at])
    details = {"examples": [_painted(each) for each in found[:EXAMPLES]]} if job.seed == 0 else {}
    return Run(job, train.parameters, seconds, curve, measures, details)


def _painted(found: Found) -> list[str]:
    """A digit for each pixel: that of its best instance, or 0."""
    canvas = np.zeros((CANVAS, CANVAS), int)
    best = np.argsort(-found.scores, kind="stable")[:9]
    for i, each in reversed([*enumerate(best, 1)]):
        if found.scores[each] >= SHOWN_SCORE:
            canvas[found.masks[each]] = i
    return ["".join(map(str, row)) for row in canvas]


def _of(runs: Sequence[Run], variant: str) -> list[Run]:
    return [run for run in runs if run.job.variant == variant]


def sheets(runs: Sequence[Run]) -> list[Sheet]:
    """AP of each variant, and what coordinates add to it, seed by seed."""
    form = "{:.1f}".format
    rows: list[tuple[str, ...]] = []
    gains: list[tuple[str, ...]] = []
    for name, variant in VARIANTS.items():
        if own := _of(runs, name):
            aps = [
                spread((run.measures[key] for run in own), form) for key in ("AP", "AP50", "AP75")
            ]
            rows.append((variant.label, f"{own[0].parameters:,}", *aps))
    for name, without in (
        ("first", "none"),
        ("all", "none"),
        ("first-circular", "none-circular"),
    ):
        plain = {run.job.seed: run.measures["AP"] for run in _of(runs, without)}
        more = [
            run.measures["AP"] - plain[run.job.seed]
            for run in _of(runs, name)
            if run.job.seed in plain
        ]
        if more:
            gains.append((VARIANTS[name].label, spread(more, form)))
    steps = runs[0].measures["steps"]
    return [
        Sheet(
            f"dense: mask AP in percent after {steps:.0f} steps of {BATCH} pictures",
            ("coordinates in convolutions", "parameters", "AP", "AP50", "AP75"),
            rows,
        ),
        Sheet(
            "dense: AP above none, same padding and seed\n(SOLO on COCO: +3.6)",
            ("coordinates in convolutions", "more AP"),
            gains,
        ),
    ]


def draw(path: Path, runs: Sequence[Run]) -> None:
    """AP over the steps, and what one run of each variant finds in some pictures."""
    import matplotlib as mpl  # only the picture needs it
    from matplotlib.figure import Figure

    shown = [name for name in VARIANTS if any(run.details for run in _of(runs, name))]
    test = scenes(10_000, EXAMPLES)
    with mpl.rc_context({"font.size": 16}):
        figure = Figure(figsize=(9, 14), layout="constrained")
        parts: Any = figure.subfigures(2, 1, height_ratios=[1, 1.75])
        top, bottom = parts
        axes = top.subplots()
        for place, (name, variant) in enumerate(VARIANTS.items()):
            if own := [run for run in _of(runs, name) if run.curve]:
                steps = [step for step, _ in own[0].curve]
                values = np.array([[value for _, value in run.curve] for run in own])
                style = "--" if variant.padding == "circular" else "-"
                label = variant.label
                axes.plot(steps, np.median(values, 0), style, color=f"C{place}", lw=3, label=label)
                axes.fill_between(steps, values.min(0), values.max(0), color=f"C{place}", alpha=0.2)
        axes.set(xlabel="steps", ylabel="mask AP, percent", ylim=(0, 100))
        axes.grid(alpha=0.3)
        if axes.lines:
            top.legend(loc="outside upper center", fontsize=15, ncols=2, title="coordinates")
        panels = bottom.subplots(2 + len(shown), EXAMPLES, squeeze=False)
        pictures = [each.picture for each in test]
        truth = [_painted(Found(each.masks, np.ones(len(each.masks)))) for each in test]
        rows: dict[str, Any] = {"picture": pictures, "truth": truth}
        for name in shown:
            (first, *_) = (run for run in _of(runs, name) if run.details)
            rows[textwrap.fill(VARIANTS[name].label, 15)] = first.details["examples"]
        for line, (label, each) in zip(panels, rows.items(), strict=True):
            for axes, one in zip(line, each, strict=True):
                _show(axes, one)
            line[0].set_ylabel(label, rotation=0, ha="right", va="center")
        figure.savefig(path, dpi=100)


def _show(axes: Any, picture: Any) -> None:
    if isinstance(picture, list):
        labels = np.array([[int(digit) for digit in row] for row in picture])
        axes.imshow(np.ma.masked_equal(labels, 0), cmap="tab10", vmin=1, vmax=10)
    else:
        axes.imshow(picture, cmap="Greys")
    axes.set(xticks=[], yticks=[])
