"""A network is tested at other sizes than it was trained at: 64 to train, 48 to 128 to test.

The picture has one disc among rings; where is it, relative to the frame? A larger test picture can
mean three things. It is the same scene at more pixels (``resized``), with objects that grow with
it. It shows more of the world (``canvas``), with objects of as many pixels as before. Or it is a
larger part of one frame of 128x128 (``crops``), and the answer is the place in that frame, which
only a window tells. The first two test the same trained networks, with no coordinates and with each
alignment; the third trains on crops: without coordinates, with those of the crop, and in windows.

Answers and errors are in percent of the frame's side: 0 is its left or upper edge, 100 the other.
The network is in ``pointer.py``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common import Array
from evidence.study import Job, Run, Sheet, spread

SPLITS = ("frames", "crops")
BACKENDS = ("torch",)
TRAINED, SIZES, FRAME = 64, (48, 64, 96, 128), 128
RADII, RADIUS = (2.0, 8.0), 3.5  # of objects in training and, at the size of training, in tests
RINGS = 3  # on 64x64
STEPS, BATCH, RATE, TESTED, EVERY = 800, 16, 5e-3, 256, 100
QUICK_STEPS = 60
VARIANTS = {
    "frames": {
        "none": "no coordinates",
        "wide": "none, looking farther",
        "corners": 'align="corners"',
        "edges": 'align="edges"',
        "start": 'align="start"',
    },
    "crops": {
        "none": "no coordinates",
        "edges": "those of the crop",
        "window": "those of its window",
    },
}
_LABELS = dict.fromkeys(label for each in VARIANTS.values() for label in each.values())
COLOURS = {label: f"C{i}" for i, label in enumerate(_LABELS)}
READINGS = {"frames": ("resized", "canvas"), "crops": ("crops",)}


@dataclass(frozen=True)
class Scenes:
    """Discs among rings: the middles ``(n, k, 2)`` as x and y in pixels, the disc's first.

    ``radius (n,)`` is that of all objects of a picture, ``frame`` the side of the frame.
    """

    middles: Array
    radius: Array
    frame: int

    @property
    def answers(self) -> Array:
        """Where the discs are, ``(n, 2)``, on -1 to 1 between the edges of the frame."""
        return np.asarray(self.middles[:, 0] * 2 / self.frame - 1, np.float32)

    def pictures(self, size: int, corner: Array | int = 0) -> Array:
        """The part ``(n, 1, size, size)`` with this upper left corner, ``(n, 2)`` as x and y."""
        at = np.broadcast_to(corner, (len(self.middles), 2))
        steps = np.arange(size) + 0.5
        x, y = (
            ((at[:, axis, None] + steps)[:, None] - self.middles[..., axis, None]).astype("f4")
            for axis in (0, 1)
        )
        far = np.sqrt(np.square(x)[:, :, None, :] + np.square(y)[..., None])
        radius = self.radius.astype("f4")[:, None, None, None]
        shown = np.clip(radius + 0.5 - far, 0, 1)  # soft over a pixel at the rim
        hole = np.clip(radius / 2 + 0.5 - far[:, 1:], 0, 1)
        shown[:, 1:] -= np.minimum(hole, shown[:, 1:])
        return np.asarray(shown.max(1, keepdims=True))


def scenes(rng: np.random.Generator, count: int, frame: int, radius: Array, rings: int) -> Scenes:
    """Random places; no ring touches the disc, and no object reaches beyond the frame."""
    reach = radius[:, None, None]
    middles = rng.uniform(reach, frame - reach, (count, 1 + rings, 2))
    while True:
        near = np.linalg.norm(middles - middles[:, :1], axis=2) < 2 * radius[:, None] + 1
        near[:, 0] = False
        if not near.any():
            return Scenes(middles, radius, frame)
        again = rng.uniform(reach, frame - reach, middles.shape)
        middles = np.where(near[..., None], again, middles)


def corners(rng: np.random.Generator, found: Scenes, size: int) -> Array:
    """Upper left corners ``(n, 2)``, x and y, of random crops that have the whole disc in them."""
    disc, reach = found.middles[:, 0], found.radius[:, None]
    low = np.maximum(0, np.ceil(disc + reach) - size)
    high = np.minimum(found.frame - size, np.floor(disc - reach))
    return np.asarray(rng.integers(low.astype(int), high.astype(int) + 1))


@dataclass(frozen=True)
class Batch:
    """Pictures, answers ``(n, 2)`` on -1 to 1, and the boxes of crops in their frame."""

    pictures: Array
    answers: Array
    boxes: Array | None = None


def batch(rng: np.random.Generator, reading: str, size: int, count: int, radius: Array) -> Batch:
    """Pictures of that size; ``radius`` is that of objects in a picture of 64x64."""
    if reading == "crops":
        found = scenes(rng, count, FRAME, radius, RINGS * (FRAME // TRAINED) ** 2)
        corner = corners(rng, found, size)
        return Batch(
            found.pictures(size, corner), found.answers, np.concatenate([corner, corner + size], 1)
        )
    if reading == "resized":
        found = scenes(rng, count, size, radius * size / TRAINED, RINGS)
    else:
        found = scenes(rng, count, size, radius, max(1, round(RINGS * (size / TRAINED) ** 2)))
    return Batch(found.pictures(size), found.answers)


def jobs(split: str, backend: str, seeds: int, quick: bool) -> list[Job]:
    return [
        Job("sizes", split, variant, seed, backend, quick)
        for variant in VARIANTS[split]
        for seed in range(seeds)
    ]


def run(job: Job) -> Run:
    """Train one network at 64x64, and test it at every size."""
    from evidence import pointer  # which imports torch

    readings, rng = READINGS[job.split], np.random.default_rng(job.seed)
    train = pointer.Training(job.variant, job.seed, steps := QUICK_STEPS if job.quick else STEPS)

    def error(reading: str, size: int) -> float:
        # In parts, as a frame of 128 has many rings.
        test, off = np.random.default_rng(10_000), []
        for _ in range(4):
            part = batch(test, reading, size, TESTED // 4, np.full(TESTED // 4, RADIUS))
            off.append(np.linalg.norm(train.answers(part) - part.answers, axis=1))
        return float(np.mean(off)) * 50  # of -1 to 1, in percent

    curve, seconds = [], 0.0
    for done in range(1, steps + 1):
        drawn = batch(rng, readings[-1], TRAINED, BATCH, rng.uniform(*RADII, BATCH))
        began = time.perf_counter()
        train.step(drawn)
        seconds += time.perf_counter() - began
        if done % EVERY == 0:
            curve.append((done, error(readings[-1], TRAINED)))
    measures = {f"{reading} {size}": error(reading, size) for reading in readings for size in SIZES}
    return Run(job, train.parameters, seconds, curve, {**measures, "steps": steps})


def _of(runs: Sequence[Run], split: str, variant: str) -> list[Run]:
    return [run for run in runs if (run.job.split, run.job.variant) == (split, variant)]


def _each(runs: Sequence[Run]) -> list[tuple[str, list[tuple[str, list[Run]]]]]:
    """By reading, the label of each variant and its runs, where there are any."""
    found = []
    for split, readings in READINGS.items():
        lines = [
            (label, own)
            for name, label in VARIANTS[split].items()
            if (own := _of(runs, split, name))
        ]
        found += [(reading, lines) for reading in readings if lines]
    return found


TITLES = {
    "resized": "resized: the same scene at other numbers of pixels",
    "canvas": "canvas: frames of other sizes, objects of as many pixels",
    "crops": f"crops: parts of a frame of {FRAME}x{FRAME}",
}


def sheets(runs: Sequence[Run]) -> list[Sheet]:
    """The error at each size, a sheet for each meaning of a larger picture."""
    found = []
    for reading, lines in _each(runs):
        rows: list[tuple[str, ...]] = []
        for label, own in lines:
            errors = [spread(run.measures[f"{reading} {size}"] for run in own) for size in SIZES]
            rows.append((label, *errors))
        steps = lines[0][1][0].measures["steps"]
        parameters = [own[0].parameters for _, own in lines]
        least, most = min(parameters), max(parameters)
        found.append(
            Sheet(
                f"sizes, {reading}: error in percent of the frame's side, by the picture's;\n"
                f"trained at {TRAINED}, {steps:.0f} steps of {BATCH}, "
                f"{least:,} to {most:,} parameters",
                ("coordinates", *map(str, SIZES)),
                rows,
            )
        )
    return found


def draw(path: Path, runs: Sequence[Run]) -> None:
    """The error against the size of the test picture, with the range of the seeds."""
    import matplotlib as mpl  # only the picture needs it
    from matplotlib.figure import Figure

    each = _each(runs)
    with mpl.rc_context({"font.size": 16}):
        figure = Figure(figsize=(9, 1 + 5 * len(each)), layout="constrained")
        for axes, (reading, lines) in zip(
            figure.subplots(len(each), 1, squeeze=False)[:, 0], each, strict=True
        ):
            for place, (label, own) in enumerate(lines):
                values = np.array(
                    [[run.measures[f"{reading} {size}"] for size in SIZES] for run in own]
                )
                middle = np.median(values, 0)
                ranges = [middle - values.min(0), values.max(0) - middle]
                shifted = np.array(SIZES) + 1.2 * (place - 2)  # so that the ranges stand apart
                options = {"label": label, "color": COLOURS[label], "lw": 2.5, "capsize": 5}
                axes.errorbar(shifted, middle, ranges, marker="o", **options)
            axes.axvline(TRAINED, color="black", lw=1, ls=":")
            axes.set(xticks=SIZES, yscale="log", ylim=(0.003, 60), ylabel="error, % of the side")
            axes.set_yticks(ticks := (0.1, 0.3, 1, 3, 10, 30), map("{:g}".format, ticks))
            axes.minorticks_off()
            axes.set_title(TITLES[reading].replace(": ", ":\n"))
            axes.grid(alpha=0.3)
            axes.legend(fontsize=14, ncols=2, loc="lower center")
        axes.set_xlabel(f"side of the test picture, pixels; trained at {TRAINED}")
        figure.savefig(path, dpi=100)
