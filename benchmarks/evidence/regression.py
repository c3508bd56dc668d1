"""Given the picture of a square, say its centre's x and y (the paper's section 4.2).

The paper shows the networks a single white pixel. A mean over all positions hardly sees that one
(a public re-run of the paper, vfdev-5/CoordConvExperiments, could not train the paper's network on
it), so that the pictures here have the whole square. The scores are distances in pixels.

``CoordConv`` keeps the canvas's size, as the paper's network does; that one has no ReLUs in the
released code, and takes the maximum over the canvas, not the mean. The others halve it four times,
as networks in use do, and end in a linear layer over what is left or in a mean over it; each comes
without coordinates and with them in its first layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np

from coordconv import Coordinates
from coordconv.cli.demo import CANVAS
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array
from coordconv.networks import Conv, Flatten, Layer, Linear, MeanPool, Network, ReLU
from evidence import squares
from evidence.squares import BACKENDS, COORD, QUADRANT, SPLITS, UNIFORM, Problem, Results
from evidence.study import Job, Run, Sheet, spread

__all__ = ("BACKENDS", "SPLITS", "chosen", "draw", "jobs", "problem", "run", "sheets")

_LINEAR, _MEAN = "strided, linear", "strided, mean"
_WITH = " + xy"
_RATES, _WIDTHS = (0.001, 0.003, 0.01), (8, 16)
_RATE, _EPOCHS, _STRIDED_EPOCHS, _SEARCH_EPOCHS = 0.003, 10, 12, 4
_BATCH = 8
_SOLVED = 0.5  # pixels, of the mean distance


def jobs(split: str, backend: str, seeds: int, quick: bool) -> list[Job]:
    options = {"rate": _RATE, "epochs": 2 if quick else _EPOCHS}
    found = [
        Job("regression", split, COORD, seed, backend, quick, options) for seed in range(seeds)
    ]
    rates, widths = ((0.003,), (8,)) if quick else (_RATES, _WIDTHS)
    epochs = 2 if quick else _SEARCH_EPOCHS
    for variant in (_LINEAR, _MEAN, _LINEAR + _WITH, _MEAN + _WITH):
        job = Job("regression", split, variant, 0, backend, quick)
        found += squares.searches(job, rates, widths, epochs)
    return found


def chosen(runs: Sequence[Run], seeds: int) -> list[Job]:
    epochs = dict.fromkeys(SPLITS, _STRIDED_EPOCHS)
    return squares.chosen(runs, seeds, highest=False, epochs=epochs)


def network(variant: str, width: int) -> Network:
    """The network of a variant."""
    if variant not in (COORD, *(kind + xy for kind in (_LINEAR, _MEAN) for xy in ("", _WITH))):
        raise ValueError(f"variant must be one of the study's, got {variant!r}")
    one, three = ConvGeometry((1, 1)), ConvGeometry((3, 3), padding=1)
    layers: tuple[Layer, ...]
    if variant == COORD:
        layers = (
            *squares.chain("conv", (1, 8, 8, 8), one, Coordinates("xy"))[:-1],
            ReLU(),
            *squares.chain("smooth", (8, 8, 2), three)[:-1],
            MeanPool(),
        )
    else:
        coords = Coordinates("xy") if variant.endswith(_WITH) else None
        halving = ConvGeometry((3, 3), stride=2, padding=1)
        convs = squares.chain("conv", (1, *[width] * 4), halving, coords)[:-1]
        if variant.startswith(_MEAN):
            layers = (*convs, ReLU(), Conv("last", width, 2, three), MeanPool())
        else:
            size = width * (CANVAS // 2**4) ** 2
            linears = Linear("linear1", size, 64), ReLU(), Linear("linear2", 64, 2)
            layers = (*convs, ReLU(), Flatten(), *linears)
    return Network(variant, (1, CANVAS, CANVAS), layers)


def problem(job: Job) -> Problem:
    data = squares.split(job.split, job.seed)
    pixels = (CANVAS - 1) / 2  # of one unit of the coordinates

    def scores(outputs: Array, which: Array) -> Array:
        distances: Array = pixels * np.linalg.norm(outputs - data.coordinates[which], axis=1)
        return distances

    return Problem(
        network(job.variant.removeprefix(squares.SEARCH), int(job.options.get("width", 0))),
        data,
        lambda which: squares.pictures(data, which)[:, None],
        lambda which: data.coordinates[which],
        scores,
        lambda found: False,  # the error may always become smaller
        lambda found: 1 - np.log2(np.clip(found, 0.25, 32) / 0.25) / 7,
        _BATCH,
    )


def run(job: Job) -> Run:
    return squares.train(job, problem(job))


def sheets(runs: Sequence[Run]) -> list[Sheet]:
    results = Results(runs)
    return [
        results.table("Coordinate regression: the mean distance in pixels", _pixels),
        results.searched(_pixels, highest=False),
        squares.claims("coordinate regression", results, _claims(results)),
    ]


def draw(path: Path, runs: Sequence[Run]) -> None:
    squares.draw(path, Results(runs), "pixels", log=True)


def _pixels(distance: float) -> str:
    return f"{distance:.2f}"


def _claims(results: Results) -> list[tuple[str, str, str, bool | None]]:
    found = []
    for variant, part, paper, solves in (
        (COORD, UNIFORM, "solves it", True),
        (COORD, QUADRANT, "solves it", True),
        (_LINEAR, UNIFORM, "solves it", True),
        (_LINEAR, QUADRANT, "does not generalise", False),
        (_MEAN, QUADRANT, "generalises worse", False),
    ):
        distances = results.values(part, variant)
        confirmed = all((d <= _SOLVED) == solves for d in distances) if distances else None
        if variant == _MEAN and distances:
            confirmed = median(distances) > median(results.values(part, COORD) or [np.inf])
        measured = f"{spread(distances, _pixels)} pixels" if distances else ""
        found.append((f"{variant}, {part} split", paper, measured, confirmed))
    return found
