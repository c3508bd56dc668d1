"""The paper's squares: their two splits, and what the three studies of them share.

A study says its networks and how an output is judged. The CoordConv network has the settings of
``coordconv demo``; a network without coordinates is searched: short runs of the first seed at
every learning rate and width, judged on the very positions that are held out (a choice in its
favour), and then the best settings with all seeds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from coordconv import backends, networks
from coordconv.cli.demo import CANVAS, SQUARE, Positions, positions
from coordconv.geometry import ConvGeometry
from coordconv.grid import Array
from coordconv.networks import Conv, Flatten, Layer, Network, ReLU
from evidence.study import Job, Run, Sheet, spread

SPLITS = UNIFORM, QUADRANT = "uniform", "quadrant"
BACKENDS = ("torch", "paddle", "flax", "linen")
COORD = "CoordConv"
SEARCH = "search: "  # before the variant, of its short runs
TEST, TRAINED = "test", "trained"  # the measures: means over the held-out and the other positions
_DIGITS = "digits"
_CHUNK = 16  # positions that a network sees at once when it is judged: they fit into a cache
_TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500)
_LAST_RATE = 0.01  # of the first learning rate


def split(name: str, seed: int) -> Positions:
    """The positions: a random fifth held out, or all whose centre is in the fourth quadrant."""
    found = positions(seed)
    if name == UNIFORM:
        return found
    rows, columns = np.divmod(found.labels, CANVAS)
    tested = (rows >= CANVAS // 2) & (columns >= CANVAS // 2)
    return replace(found, trained=np.flatnonzero(~tested), held_out=np.flatnonzero(tested))


def pictures(data: Positions, which: Array) -> Array:
    """The canvases ``(N, 64, 64)``: 1 within a square, 0 beside it."""
    centres = np.divmod(data.labels[which], CANVAS)
    inside = [abs(np.arange(CANVAS) - c[:, None]) <= SQUARE // 2 for c in centres]
    return (inside[0][:, :, None] & inside[1][:, None, :]).astype(np.float32)


def tiled(data: Positions, network: Network) -> Callable[[Array], Array]:
    """The input of networks that are given x and y."""
    return lambda which: data.inputs(which, network.input_shape[1:])


def chain(
    prefix: str, channels: Sequence[int], geometry: ConvGeometry, coords: Any = None
) -> tuple[Layer, ...]:
    """Convolutions, the first with the coordinates, ReLUs between them, and Flatten."""
    layers: list[Layer] = []
    for i, (before, after) in enumerate(pairwise(channels), 1):
        layers += [Conv(f"{prefix}{i}", before, after, geometry, coords), ReLU()]
        coords = None
    return (*layers[:-1], Flatten())


def painter(width: int) -> Network:
    """The paper's transposed convolutions from x and y to a canvas; at 1 the demo's network."""
    doubling = ConvGeometry((2, 2), stride=2, transposed=True)
    sixty_four, thirty_two = 64 * width, 32 * width
    channels = (2, sixty_four, sixty_four, sixty_four, sixty_four, thirty_two, 1)
    return Network("deconvolutions", (2, 1, 1), chain("deconv", channels, doubling))


def parameters(network: Network) -> int:
    return sum(int(np.prod(shape)) for shape in network.weight_shapes().values())


@dataclass(frozen=True)
class Problem:
    """What a network is trained for.

    ``inputs`` and ``targets`` are those of positions given by their indices. ``scores`` judges each
    output, ``solved`` says of some scores whether there is nothing left to learn, ``shades`` makes
    of them how good a picture shows them to be, from 0 to 1.
    """

    network: Network
    data: Positions
    inputs: Callable[[Array], Array]
    targets: Callable[[Array], Array]
    scores: Callable[[Array, Array], Array]
    solved: Callable[[Array], bool]
    shades: Callable[[Array], Array]
    batch: int

    def batches(self, seed: int, epochs: float) -> Iterator[tuple[Array, Array]]:
        """The input and target of each step; whole batches, every epoch in another order."""
        rng, per_epoch = np.random.default_rng(seed), len(self.data.trained) // self.batch
        for step in range(round(epochs * per_epoch)):
            if step % per_epoch == 0:
                order = rng.permutation(self.data.trained)
            start = step % per_epoch * self.batch
            which = order[start : start + self.batch]
            yield self.inputs(which), self.targets(which)

    def steps(self, epochs: float) -> int:
        return round(epochs * (len(self.data.trained) // self.batch))


class Judge:
    """The scores that some weights get."""

    def __init__(self, problem: Problem, backend: str, weights: Mapping[str, Array]) -> None:
        self._problem, self._evaluate = problem, backends.load(backend).evaluate
        self._module = backends.load(backend).build(problem.network, weights)

    def scores(self, weights: Mapping[str, Array], which: Array) -> Array:
        """Of positions; chunks are of one size, so that a compiler sees one shape."""
        padded = np.append(which, np.repeat(which[-1:], -len(which) % _CHUNK))
        chunks = padded.reshape(-1, _CHUNK)
        outputs = [
            self._evaluate(self._module, weights, self._problem.inputs(chunk))[0]
            for chunk in chunks
        ]
        return self._problem.scores(np.concatenate(outputs)[: len(which)], which)


def rates(first: float, steps: int) -> Array:
    """A half cosine from the first rate down to a hundredth of it."""
    done = np.arange(steps) / steps
    return first * (_LAST_RATE + (1 - _LAST_RATE) * (1 + np.cos(np.pi * done)) / 2)


def train(job: Job, problem: Problem) -> Run:
    """Train for so many epochs, or until the problem is solved on all positions.

    Options of the job: ``rate``, ``epochs``. The curve has the mean score of the held-out
    positions; ``details`` has a digit for every position, row by row, from 0, bad, to 9, good.
    """
    start = networks.initial_weights(problem.network, job.seed)
    backend = backends.load(job.backend)
    step, export = backend.trainer(backend.build(problem.network, start), start)
    judge, data = Judge(problem, job.backend, start), problem.data
    epochs, steps = job.options["epochs"], problem.steps(job.options["epochs"])
    every, seconds, curve = max(1, steps // _evaluations(job)), 0.0, []
    schedule = rates(job.options["rate"], steps)
    begin = time.perf_counter()
    for count, (x, target) in enumerate(problem.batches(job.seed, epochs), 1):
        step(x, target, float(schedule[count - 1]))
        if count % every and count != steps:
            continue
        seconds += time.perf_counter() - begin
        weights = export()
        held_out = judge.scores(weights, data.held_out)
        curve.append((count, float(held_out.mean())))
        if count == steps or problem.solved(held_out):
            trained = judge.scores(weights, data.trained)
            if problem.solved(held_out) and problem.solved(trained):
                break
        begin = time.perf_counter()
    scores = np.zeros(len(data.labels))
    scores[data.held_out], scores[data.trained] = held_out, trained
    measures = {TEST: float(held_out.mean()), TRAINED: float(trained.mean()), "steps": count}
    digits = np.clip(np.round(9 * problem.shades(scores)), 0, 9).astype(int)
    details = {} if is_search(job) else {_DIGITS: "".join(map(str, digits))}
    return Run(job, parameters(problem.network), seconds, curve, measures, details)


def _evaluations(job: Job) -> int:
    """How often the held-out positions are judged; of a search only the end counts."""
    if is_search(job):
        return 1
    return 3 if job.quick else 12


def is_search(job: Job) -> bool:
    return job.variant.startswith(SEARCH)


def grouped(runs: Iterable[Run]) -> Iterable[tuple[tuple[str, str], list[Run]]]:
    """By split and variant, in the order in which these first appear."""
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        groups.setdefault((run.job.split, run.job.variant), []).append(run)
    return groups.items()


def searches(
    job: Job, learning_rates: Iterable[float], widths: Iterable[int], epochs: float
) -> list[Job]:
    """The short runs for a variant."""
    return [
        replace(
            job,
            variant=SEARCH + job.variant,
            options={"rate": rate, "width": width, "epochs": epochs},
        )
        for width in widths
        for rate in learning_rates
    ]


def best(runs: Iterable[Run], highest: bool) -> Run:
    """The run with the best score on the held-out positions; among equal ones, on the others."""
    sign = 1 if highest else -1
    return max(runs, key=lambda run: (sign * run.measures[TEST], sign * run.measures[TRAINED]))


def chosen(
    runs: Sequence[Run], seeds: int, highest: bool, epochs: Mapping[str, float]
) -> list[Job]:
    """After the searches, the best settings with all seeds; ``epochs`` by the split."""
    jobs = []
    for (part, variant), group in grouped(run for run in runs if is_search(run.job)):
        found = best(group, highest).job
        options = {
            **found.options,
            "epochs": found.options["epochs"] if found.quick else epochs[part],
        }
        name = variant.removeprefix(SEARCH)
        jobs += [replace(found, variant=name, seed=s, options=options) for s in range(seeds)]
    return jobs


class Results:
    """The runs of one study by split and variant, without the searches."""

    def __init__(self, runs: Sequence[Run]) -> None:
        self.runs = runs
        self.groups = dict(grouped(run for run in runs if not is_search(run.job)))

    @cached_property
    def splits(self) -> list[str]:
        return [s for s in SPLITS if any(part == s for part, _ in self.groups)]

    @cached_property
    def variants(self) -> list[str]:
        return list(dict.fromkeys(variant for _, variant in self.groups))

    def values(self, part: str, variant: str, measure: str = TEST) -> list[float]:
        return [run.measures[measure] for run in self.groups.get((part, variant), [])]

    def table(self, title: str, form: Callable[[float], str]) -> Sheet:
        """A row for each split and variant."""
        columns = ("split, network", "parameters", "test", "trained", "steps", "seconds")
        rows = []
        for part in self.splits:
            for variant in self.variants:
                if not (group := self.groups.get((part, variant))):
                    continue
                rows.append(
                    (
                        f"{part}, {variant}",
                        f"{group[0].parameters:,}",
                        *(spread(self.values(part, variant, m), form) for m in (TEST, TRAINED)),
                        f"{median(self.values(part, variant, 'steps')):,.0f}",
                        f"{median(run.seconds for run in group):.0f}",
                    )
                )
        return Sheet(title, columns, rows)

    def searched(self, form: Callable[[float], str], highest: bool) -> Sheet:
        """What the searches chose from how many runs."""
        rows: list[tuple[str, ...]] = []
        epochs = set()
        for (part, variant), group in grouped(run for run in self.runs if is_search(run.job)):
            found = best(group, highest)
            tried = {key: sorted({r.job.options[key] for r in group}) for key in ("rate", "width")}
            epochs.add(f"{found.job.options['epochs']:g}")
            rows.append(
                (
                    f"{part}, {variant.removeprefix(SEARCH)}",
                    str(len(group)),
                    ", ".join(f"{rate:g}" for rate in tried["rate"]),
                    ", ".join(f"{width:g}" for width in tried["width"]),
                    f"{found.job.options['rate']:g} and {found.job.options['width']:g}",
                    form(found.measures[TEST]),
                )
            )
        columns = ("split, network", "runs", "rates", "widths", "best", "its test")
        title = f"The search for a learning rate and a width, {' or '.join(epochs)} epochs each"
        return Sheet(title, columns, rows)

    def median_run(self, part: str, variant: str) -> Run | None:
        """The run in the middle by its score."""
        group = sorted(self.groups.get((part, variant), []), key=lambda run: run.measures[TEST])
        return group[len(group) // 2] if group else None


def first_reached(run: Run, value: float) -> float:
    """The seconds of training until the held-out positions first had this score, or infinity."""
    for count, score in run.curve:
        if score >= value:
            return run.seconds * count / run.measures["steps"]
    return inf


def claims(
    title: str, results: Results, rows: Iterable[tuple[str, str, str, bool | None]]
) -> Sheet:
    """What the paper reports beside what was measured; None where the runs cannot tell."""
    words = {True: "yes", False: "no", None: "not measured"}
    if any(run.job.quick for run in results.runs):
        words |= {True: "too short to tell", False: "too short to tell"}
    columns = (title, "the paper reports", "we measure", "confirmed")
    return Sheet("The paper's claims", columns, [(a, b, c or "-", words[d]) for a, b, c, d in rows])


def draw(
    path: Path,
    results: Results,
    label: str,
    log: bool = False,
) -> None:
    """For each split the map of the median run's scores, for every variant, and the curves."""
    from matplotlib.figure import Figure  # only the picture needs it

    variants, parts = results.variants, results.splits
    rows = len(variants) + 1
    figure = Figure(figsize=(2.7 * len(parts), 2.75 * rows), layout="constrained")
    axes = figure.subplots(rows, len(parts), squeeze=False)
    for column, part in zip(axes.T, parts, strict=True):
        for axis, variant in zip(column, variants, strict=False):
            _map(axis, results.median_run(part, variant))
            axis.set_title(f"{part} split\n{variant}", fontsize=10)
        curves = column[-1]
        for colour, variant in enumerate(variants):
            for i, run in enumerate(results.groups.get((part, variant), [])):
                seconds = [run.seconds * step / run.measures["steps"] for step, _ in run.curve]
                values = [value for _, value in run.curve]
                name = None if i else variant
                curves.plot(seconds, values, color=f"C{colour}", label=name, linewidth=1)
        curves.set_title(f"{part} split\nheld out", fontsize=10)
        curves.set(xlabel="seconds of training", ylabel=label)
        _log_scale(curves.set_xscale, curves.set_xticks, curves.get_xlim, curves.set_xlim)
        if log:
            _log_scale(curves.set_yscale, curves.set_yticks, curves.get_ylim, curves.set_ylim)
    handles, names = axes[-1][0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", fontsize=9)
    figure.savefig(path, dpi=130)


def _log_scale(scale: Any, ticks: Any, limits: Any, limit: Any) -> None:
    """A logarithmic axis with few plain numbers, whatever its range."""
    scale("log")
    found = limits()
    ticks([], minor=True)
    ticks(_TICKS, [f"{tick:g}" for tick in _TICKS])
    limit(found)


def _map(axis: Any, run: Run | None) -> None:
    axis.set(xticks=[], yticks=[], aspect="equal", xlim=(0, CANVAS), ylim=(CANVAS, 0))
    if run is None:
        return
    data = split(run.job.split, run.job.seed)
    shade = np.full((CANVAS, CANVAS), np.nan)
    rows, columns = np.divmod(data.labels, CANVAS)
    shade[rows, columns] = [int(digit) / 9 for digit in run.details[_DIGITS]]
    axis.imshow(shade, cmap="RdYlBu", vmin=0, vmax=1, extent=(0, CANVAS, CANVAS, 0))
    if run.job.split == QUADRANT:
        axis.plot([CANVAS / 2, CANVAS / 2, CANVAS], [CANVAS, CANVAS / 2, CANVAS / 2], "k--", lw=1)
