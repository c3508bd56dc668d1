"""Given the centre's x and y, paint the square (the paper's section 4.3).

CoordConv is a network of 1x1 convolutions, as in the paper's own runs; what it is compared with are
the transposed convolutions of coordinate classification. All learn the canvas by the squared error,
one of the two losses that the paper's convolutions were given; its CoordConv had a softmax inside
and the cross-entropy of each pixel. A pixel counts as painted where the output is above 0.5; the
score is the intersection over the union with the true square.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from coordconv import Coordinates
from coordconv.cli.demo import CANVAS
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array
from coordconv.networks import Network
from evidence import squares
from evidence.squares import BACKENDS, COORD, QUADRANT, SPLITS, UNIFORM, Problem, Results
from evidence.study import Job, Run, Sheet, spread

__all__ = ("BACKENDS", "SPLITS", "chosen", "draw", "jobs", "problem", "run", "sheets")

_DECONV = "deconvolutions"
_RATES, _WIDTHS = (0.001, 0.003, 0.01), (1, 2)
_RATE, _EPOCHS, _SEARCH_EPOCHS = 0.01, 4, 5
_PLAIN_EPOCHS = {UNIFORM: 20, QUADRANT: 12}
_BATCH = 8
_CHANNELS = (2, 32, 32, 32, 1)


def jobs(split: str, backend: str, seeds: int, quick: bool) -> list[Job]:
    options = {"rate": _RATE, "epochs": 1 if quick else _EPOCHS}
    found = [Job("rendering", split, COORD, seed, backend, quick, options) for seed in range(seeds)]
    plain = Job("rendering", split, _DECONV, 0, backend, quick)
    rates, widths = ((0.003,), (1,)) if quick else (_RATES, _WIDTHS)
    return found + squares.searches(plain, rates, widths, 1 if quick else _SEARCH_EPOCHS)


def chosen(runs: Sequence[Run], seeds: int) -> list[Job]:
    return squares.chosen(runs, seeds, highest=True, epochs=_PLAIN_EPOCHS)


def problem(job: Job) -> Problem:
    if job.variant == COORD:
        layers = squares.chain("conv", _CHANNELS, ConvGeometry((1, 1)), Coordinates("xy"))
        network = Network("coord_painter", (2, CANVAS, CANVAS), layers)
    else:
        network = squares.painter(int(job.options["width"]))
    data = squares.split(job.split, job.seed)

    def canvases(which: Array) -> Array:
        return squares.pictures(data, which).reshape(len(which), -1)

    def scores(outputs: Array, which: Array) -> Array:
        painted, wanted = outputs > 0.5, canvases(which) > 0.5
        shared, either = painted & wanted, painted | wanted
        ratio: Array = shared.sum(axis=1) / either.sum(axis=1)
        return ratio

    return Problem(
        network,
        data,
        squares.tiled(data, network),
        canvases,
        scores,
        lambda found: bool((found == 1).all()),
        lambda found: found,
        _BATCH,
    )


def run(job: Job) -> Run:
    return squares.train(job, problem(job))


def sheets(runs: Sequence[Run]) -> list[Sheet]:
    results = Results(runs)
    return [
        results.table("Rendering: the mean intersection over union", _iou),
        results.searched(_iou, highest=True),
        squares.claims("rendering", results, _claims(results)),
    ]


def draw(path: Path, runs: Sequence[Run]) -> None:
    squares.draw(path, Results(runs), "IoU")


def _iou(share: float) -> str:
    return f"{share:.3f}"


def _claims(results: Results) -> list[tuple[str, str, str, bool | None]]:
    """What the paper says of both splits; "better" is: the worst CoordConv above the best other."""
    found: list[tuple[str, str, str, bool | None]] = []
    for part in SPLITS:
        coord, plain = (results.values(part, variant) for variant in (COORD, _DECONV))
        if coord and plain:
            measured = f"{spread(coord, _iou)} against {spread(plain, _iou)}"
            better = min(coord) > max(plain)
            found.append((f"{part} split", "CoordConv paints better", measured, better))
    return found
