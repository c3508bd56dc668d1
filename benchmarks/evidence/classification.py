"""Given the centre's x and y, name its pixel among the 4,096 (the paper's section 4.1).

CoordConv is the paper's network of 1x1 convolutions; what it is compared with are the paper's
transposed convolutions, without its batch normalisation and weight decay.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import isinf
from pathlib import Path
from statistics import median

from coordconv import networks
from coordconv.cli.demo import BATCH, LEARNING_RATE
from coordconv.grid import Array
from evidence import squares
from evidence.squares import BACKENDS, COORD, QUADRANT, SPLITS, UNIFORM, Problem, Results
from evidence.study import Job, Run, Sheet, spread

__all__ = ("BACKENDS", "SPLITS", "chosen", "draw", "jobs", "problem", "run", "sheets")

_DECONV = "deconvolutions"
_RATES, _WIDTHS = (0.002, 0.005, 0.01), (1, 2, 3)
_COORD_EPOCHS, _SEARCH_EPOCHS = 5, 5
_EPOCHS = {UNIFORM: 20, QUADRANT: 15}


def jobs(split: str, backend: str, seeds: int, quick: bool) -> list[Job]:
    epochs = 1 if quick else _COORD_EPOCHS
    options = {"rate": LEARNING_RATE, "epochs": epochs}
    first = [
        Job("classification", split, COORD, seed, backend, quick, options) for seed in range(seeds)
    ]
    plain = Job("classification", split, _DECONV, 0, backend, quick)
    rates, widths = ((0.005,), (1, 2)) if quick else (_RATES, _WIDTHS)
    return first + squares.searches(plain, rates, widths, 1 if quick else _SEARCH_EPOCHS)


def chosen(runs: Sequence[Run], seeds: int) -> list[Job]:
    return squares.chosen(runs, seeds, highest=True, epochs=_EPOCHS)


def problem(job: Job) -> Problem:
    coord = job.variant == COORD
    network = (
        networks.get("coord_classifier") if coord else squares.painter(int(job.options["width"]))
    )
    data = squares.split(job.split, job.seed)

    def scores(outputs: Array, which: Array) -> Array:
        right: Array = outputs.argmax(axis=1) == data.labels[which]
        return right

    return Problem(
        network,
        data,
        squares.tiled(data, network),
        lambda which: data.labels[which],
        scores,
        lambda found: bool(found.all()),
        lambda found: found,
        BATCH,
    )


def run(job: Job) -> Run:
    return squares.train(job, problem(job))


def sheets(runs: Sequence[Run]) -> list[Sheet]:
    results = Results(runs)
    return [
        results.table("Coordinate classification: the share of positions named right", _percent),
        results.searched(_percent, highest=True),
        squares.claims("coordinate classification", results, _claims(results)),
    ]


def draw(path: Path, runs: Sequence[Run]) -> None:
    squares.draw(path, Results(runs), "share right")


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%" if share < 1 else "100%"


def _claims(results: Results) -> list[tuple[str, str, str, bool | None]]:
    found = []
    for variant, part, paper, holds in (
        (COORD, UNIFORM, "100%", lambda share: share == 1),
        (COORD, QUADRANT, "100%", lambda share: share == 1),
        (_DECONV, UNIFORM, "at most 86%", lambda share: share <= 0.86),
        (_DECONV, QUADRANT, "about 0", lambda share: share <= 0.01),
    ):
        shares = results.values(part, variant)
        confirmed = all(map(holds, shares)) if shares else None
        measured = spread(shares, _percent) if shares else ""
        found.append((f"{variant}, {part} split", paper, measured, confirmed))
    coord, plain = (results.groups.get((UNIFORM, v), []) for v in (COORD, _DECONV))
    if coord and plain:
        ratio = plain[0].parameters / coord[0].parameters
        found.append(("times fewer parameters", "10 to 100", f"{ratio:.1f}", 10 <= ratio <= 100))
        found.append(("times faster", "150", *_faster(coord, plain)))
    return found


def _faster(coord: Sequence[Run], plain: Sequence[Run]) -> tuple[str, bool | None]:
    """How many times sooner CoordConv has the accuracy that the other network ends with."""
    reached = median(run.measures[squares.TEST] for run in plain)
    a, b = (median(squares.first_reached(run, reached) for run in of) for of in (coord, plain))
    if isinf(a):
        return "CoordConv did not get there", False
    return f"{b / a:.1f} ({a:.0f} s against {b:.0f} s to {_percent(reached)})", b / a >= 150
