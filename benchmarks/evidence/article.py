"""The article's two networks, which it describes and does not train, on a task of their size.

``plain_cnn`` and ``coord_cnn`` make one number of a picture of 32x32, with 158,913 and 160,065
parameters. Here they are trained to say where on the canvas a handwritten digit is, in two ways:
``x`` is its x, whatever digit it is; ``x or y`` is the x of a zero and the y of a one.
The digits are the 1,797 of scikit-learn's ``load_digits``, real and 8x8, in a random colour on a
dark ground of another. A third of them are for tests alone. So are some positions: a random fifth
(``uniform``), or those in the lower right quarter (``quadrant``).

Both networks end in Flatten and Linear, which know positions by themselves. Needs scikit-learn.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

import common
from common import Array
from coordconv import backends, networks, summary
from evidence.study import Job, Run, Sheet, spread

SPLITS = ("uniform", "quadrant")
BACKENDS = tuple(backends.BACKENDS)
NETWORKS = ("plain_cnn", "coord_cnn")
TASKS = ("x", "x or y")
CANVAS, DIGIT = 32, 8
PLACES = CANVAS - DIGIT + 1  # of a digit's left or upper edge
BINS = 4  # of the map of errors, on a side: two of them are a quadrant's
STEPS, BATCH, TESTED, EVERY = 600, 32, 1024, 100
QUICK_STEPS = 40
RATES = (1e-3, 2e-3, 4e-3, 8e-3)  # tried with the first seed of the uniform split, for each network
RATE = {"plain_cnn": 4e-3, "coord_cnn": 2e-3}  # the least sum of both tasks' errors


@dataclass(frozen=True)
class Digits:
    """Pictures ``(n, 8, 8)`` from 0 to 1, and which digits they are."""

    pictures: Array
    labels: Array


def digits() -> tuple[Digits, Digits]:
    """Scikit-learn's handwritten digits, to train and to test on."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise common.fail(
            "the study `article` takes its digits from scikit-learn: pip install scikit-learn"
        ) from None
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    pictures, labels = found.images[order] / 16, found.target[order]
    cut = len(order) * 2 // 3
    return Digits(pictures[:cut], labels[:cut]), Digits(pictures[cut:], labels[cut:])


def places(split: str) -> tuple[Array, Array]:
    """The y and x of a digit's upper left corner, to train and to test on."""
    every = np.stack(np.divmod(np.arange(PLACES**2), PLACES), 1)
    if split == "quadrant":
        held_out = (every > PLACES // 2).all(1)
    else:
        held_out = np.random.default_rng(0).random(len(every)) < 0.2
    return every[~held_out], every[held_out]


@dataclass(frozen=True)
class Data:
    """Pictures ``(n, 3, CANVAS, CANVAS)``, what to answer ``(n, 1)`` on -1 to 1, and the places."""

    pictures: Array
    answers: Array
    places: Array


def sample(rng: np.random.Generator, count: int, of: Digits, where: Array, task: str) -> Data:
    """Digits in random places of those given; zeros and ones alone if the answer asks which."""
    usable = np.flatnonzero(of.labels < (10 if task == "x" else 2))
    chosen, at = rng.choice(usable, count), where[rng.integers(len(where), size=count)]
    ground, ink = rng.uniform(0, 0.3, (count, 3, 1, 1)), rng.uniform(0.4, 1, (count, 3, 1, 1))
    shown = np.zeros((count, 1, CANVAS, CANVAS))
    for canvas, digit, (y, x) in zip(shown, of.pictures[chosen], at, strict=True):
        canvas[0, y : y + DIGIT, x : x + DIGIT] = digit
    pictures = (ground + (ink - ground) * shown).astype(np.float32)
    centres = (at + DIGIT / 2) * 2 / CANVAS - 1
    axis = 1 if task == "x" else np.where(of.labels[chosen] == 0, 1, 0)
    answers = centres[np.arange(count), axis, None].astype(np.float32)
    return Data(pictures, answers, at)


def jobs(split: str, backend: str, seeds: int, quick: bool) -> list[Job]:
    """Each network on each task, and with the first seed of the uniform split at every rate."""
    digits()  # refuses at once if scikit-learn is missing
    found = []
    for task in TASKS:
        for name in NETWORKS:
            for seed in range(seeds):
                chosen = RATE[name]
                tried = RATES if split == "uniform" and seed == 0 and not quick else (chosen,)
                found += [
                    Job("article", split, f"{name}, {task}", seed, backend, quick, {"rate": rate})
                    for rate in tried
                ]
    return found


def run(job: Job) -> Run:
    """Train one network on batches drawn anew; test it on digits and places it never had."""
    name, task = job.variant.split(", ")
    network, framework = networks.get(name), backends.load(job.backend)
    start = networks.initial_weights(network, job.seed)
    module = networks.build(network, job.backend)
    step, export = framework.trainer(module, start)
    rng = np.random.default_rng(job.seed)
    (seen, unseen), (trained, held_out) = digits(), places(job.split)
    tests = {
        "held out": sample(np.random.default_rng(10_000), TESTED, unseen, held_out, task),
        "trained": sample(np.random.default_rng(10_001), TESTED, unseen, trained, task),
    }

    def errors(test: Data) -> Array:
        weights = export()
        found = [
            framework.evaluate(module, weights, part)[0] for part in np.split(test.pictures, 8)
        ]
        return np.asarray(np.abs(np.concatenate(found) - test.answers)[:, 0] * CANVAS / 2)

    steps = QUICK_STEPS if job.quick else STEPS
    curve, seconds = [], 0.0
    for done in range(steps):
        batch = sample(rng, BATCH, seen, trained, task)
        rate = job.options["rate"] * (1 + np.cos(np.pi * done / steps)) / 2
        began = time.perf_counter()
        step(batch.pictures, batch.answers, rate)
        seconds += time.perf_counter() - began
        if (done + 1) % EVERY == 0:
            curve.append((done + 1, float(errors(tests["held out"]).mean())))
    last = {where: errors(test) for where, test in tests.items()}
    measures = {where: float(each.mean()) for where, each in last.items()}
    both = np.concatenate([test.places for test in tests.values()])
    return Run(
        job,
        summary.summary(name).parameters,
        seconds,
        curve,
        {**measures, "steps": steps},
        {"map": _map(both, np.concatenate(list(last.values())))},
    )


def _map(at: Array, errors: Array) -> list[list[float | None]]:
    """The mean error by position, in BINS by BINS."""
    total, count = np.zeros((BINS, BINS)), np.zeros((BINS, BINS))
    index = tuple((at * BINS // PLACES).T)
    np.add.at(total, index, errors)
    np.add.at(count, index, 1)
    return [
        [round(float(t / c), 3) if c else None for t, c in zip(*rows, strict=True)]
        for rows in zip(total, count, strict=True)
    ]


def _each(runs: Sequence[Run]) -> dict[tuple[str, str, str], list[Run]]:
    """The runs by task, split and network, at the rate of that network."""
    found: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        name, task = run.job.variant.split(", ")
        if run.job.options["rate"] == RATE[name]:
            found.setdefault((task, run.job.split, name), []).append(run)
    return found


def sheets(runs: Sequence[Run]) -> list[Sheet]:
    """Mean errors in pixels, and those of the learning rates that were tried."""
    form = "{:.2f}".format
    rows: list[tuple[str, ...]] = []
    each = _each(runs)
    order = [(task, split, name) for task in TASKS for split in SPLITS for name in NETWORKS]
    for task, split, name in filter(each.__contains__, order):
        own = each[task, split, name]
        errors = [
            spread((r.measures[where] for r in own), form) for where in ("trained", "held out")
        ]
        label = f"{task}, {split}, {name}"
        rows.append((label, f"{own[0].parameters:,}", *errors))
    steps = runs[0].measures["steps"]
    found = [
        Sheet(
            f"article: error in pixels on new digits, after {steps:.0f} steps of {BATCH}",
            ("answer, split, network", "parameters", "places trained on", "held out"),
            rows,
        )
    ]
    tried = {
        (run.job.variant, run.job.options["rate"]): run.measures["trained"]
        for run in runs
        if run.job.split == "uniform" and run.job.seed == 0
    }
    names = sorted({variant for variant, _ in tried})
    if len(tried) > len(names):
        found.append(
            Sheet(
                "article: error in pixels of the first seed, places trained on, by learning rate",
                ("network, answer", *map("{:g}".format, RATES)),
                [
                    (
                        name,
                        *(
                            form(tried[name, rate]) if (name, rate) in tried else ""
                            for rate in RATES
                        ),
                    )
                    for name in names
                ],
            )
        )
    return found


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Some pictures with their answers, every run's error, and where on the canvas errors are."""
    import matplotlib as mpl  # only the picture needs it
    from matplotlib.figure import Figure

    each = _each(runs)
    colours = dict(zip(NETWORKS, ("C1", "C0"), strict=True))
    with mpl.rc_context({"font.size": 16}):
        figure = Figure(figsize=(9, 14), layout="constrained")
        parts: Any = figure.subfigures(3, 1, height_ratios=[0.75, 1.3, 2])
        shown, dots, maps = parts
        _examples(shown)
        axes = dots.subplots()
        groups = [(task, split) for task in TASKS for split in SPLITS]
        for place, (task, split) in enumerate(groups):
            for shift, name in ((-0.15, "plain_cnn"), (0.15, "coord_cnn")):
                errors = [run.measures["held out"] for run in each.get((task, split, name), ())]
                label = name if place == 0 else None
                where = [place + shift] * len(errors)
                axes.plot(where, errors, "o", color=colours[name], ms=9, alpha=0.7, label=label)
        names = [f"{task},\n{split}" for task, split in groups]
        axes.set(xticks=range(len(groups)), xticklabels=names, yscale="log", ylim=(0.1, 20))
        axes.set_yticks(ticks := (0.1, 0.3, 1, 3, 10), map("{:g}".format, ticks))
        axes.minorticks_off()
        axes.set_ylabel("pixels")
        axes.set_title("error at the places held out, each run")
        axes.grid(alpha=0.3, axis="y")
        axes.legend()
        _maps(maps, each)
        figure.savefig(path, dpi=100)


def _examples(figure: Any) -> None:
    seen, _ = digits()
    drawn = sample(np.random.default_rng(3), 4, seen, places("uniform")[0], "x or y")
    for axes, picture, answer, at in zip(
        figure.subplots(1, 4), drawn.pictures, drawn.answers, drawn.places, strict=True
    ):
        axes.imshow(picture.transpose(1, 2, 0), extent=(0, CANVAS, CANVAS, 0))
        value = (answer[0] + 1) * CANVAS / 2
        is_x = value == at[1] + DIGIT / 2
        (axes.axvline if is_x else axes.axhline)(value, color="white", ls="--")
        axes.set(xticks=[], yticks=[], title=f"{'x' if is_x else 'y'} = {value:g}")
    figure.suptitle("x or y: the x of a zero, the y of a one")


def _maps(figure: Any, each: dict[tuple[str, str, str], list[Run]]) -> None:
    found = {
        (task, name): np.mean(
            [np.array(run.details["map"], float) for run in each[task, "quadrant", name]], 0
        )
        for task in TASKS
        for name in NETWORKS
        if (task, "quadrant", name) in each
    }
    if not found:
        return
    panels = figure.subplots(len(TASKS), len(NETWORKS))
    most = max(float(np.nanmax(values)) for values in found.values())
    for line, task in zip(panels, TASKS, strict=True):
        for axes, name in zip(line, NETWORKS, strict=True):
            if (task, name) in found:
                values = found[task, name]
                axes.imshow(values, cmap="viridis", vmin=0, vmax=most)
                for (y, x), value in np.ndenumerate(values):
                    colour = "black" if value > most * 0.7 else "white"
                    axes.text(x, y, f"{value:.1f}", ha="center", va="center", color=colour)
            axes.set(xticks=[], yticks=[], title=f"{task}: {name}")
    figure.suptitle("error in pixels by place; lower right held out")
