"""One setting of each of the paper's tasks in every framework, from the same start.

``parity``: fifty steps beside a run in float64, on two of the paper's samples a step, since the
float64 run with its bounds takes seconds a step. How far each weight may be off is what training
parity derives (``coordconv training`` does the same with networks and data of its own); 1 is the
bound. ``whole``: the task trained to its end, after which roundings have led the weights far apart,
and only the results can be compared.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from coordconv.grid import Array
from coordconv.parity.training import EVERY, Task, exact_run
from evidence import squares
from evidence.squares import COORD, UNIFORM, Problem
from evidence.study import Job, Run, Sheet

SPLITS = PARITY, WHOLE = "parity", "whole"
BACKENDS = ("torch",)  # the others are trained beside it
FRAMEWORKS = ("torch", "paddle", "flax")
_BATCH, _STEPS, _QUICK_STEPS = 2, 50, 10
# As in training parity: with the usual epsilon Adam divides gradients that are 0 but for rounding
# by their own size, and two runs of one framework would differ.
_RATE, _EPSILON = 0.001, 1e-4
_TASKS = {
    "classification": (COORD, {"rate": 0.005, "epochs": 1}),
    "regression": ("strided, linear + xy", {"rate": 0.003, "width": 16, "epochs": 4}),
    "rendering": (COORD, {"rate": 0.01, "epochs": 2}),
}
_QUICK_EPOCHS = 0.2


def jobs(split: str, backend: str, seeds: int, quick: bool) -> list[Job]:
    """``seeds`` is not asked for: this is one setting from one start."""
    if split == PARITY:
        return [Job("frameworks", split, task, 0, backend, quick) for task in _TASKS]
    return [
        Job("frameworks", split, task, 0, framework, quick)
        for task in _TASKS
        for framework in FRAMEWORKS
    ]


def _setting(job: Job) -> Job:
    """The job of the task's own study."""
    variant, options = _TASKS[job.variant]
    options = options | ({"epochs": _QUICK_EPOCHS} if job.quick else {})
    return replace(job, study=job.variant, split=UNIFORM, variant=variant, options=options)


def _problem(job: Job) -> Problem:
    found: Problem = importlib.import_module(f"evidence.{job.study}").problem(job)
    return found


@dataclass(frozen=True)
class _PapersTask(Task):
    """Training parity on the samples of one of the paper's tasks."""

    problem: Problem | None = None

    def batches(self, steps: int) -> Iterator[tuple[Array, Array]]:
        assert self.problem is not None
        for _, batch in zip(range(steps), self.problem.batches(self.seed, 1), strict=False):
            yield batch

    @property
    def _regresses(self) -> bool:
        assert self.problem is not None
        return bool(np.issubdtype(self.problem.targets(np.arange(1)).dtype, np.floating))


def run(job: Job) -> Run:
    if job.split == WHOLE:
        found = squares.train(_setting(job), _problem(_setting(job)))
        return replace(found, job=job, details={})
    problem = replace(_problem(_setting(job)), batch=_BATCH)
    task = _PapersTask(problem.network, "adam", _RATE, _BATCH, job.seed, _EPSILON, problem=problem)
    exact = exact_run(task, _QUICK_STEPS if job.quick else _STEPS)
    curve: list[tuple[int, float]] = []
    details: dict[str, Any] = {}
    measures: dict[str, float] = {"steps": len(exact.losses)}
    for name in FRAMEWORKS:
        outcome = exact.check_backend(name)
        beyond = [step for step, error in outcome.errors.items() if error > 1]
        measures[f"{name} holds"] = min(beyond) - EVERY if beyond else len(exact.losses)
        off = np.abs(np.subtract(outcome.losses, exact.losses))
        measures[f"{name} losses"] = float((off / np.abs(exact.losses)).max())
        details[name] = {str(step): error for step, error in outcome.errors.items()}
    return Run(job, squares.parameters(problem.network), 0.0, curve, measures, details)


def sheets(runs: Sequence[Run]) -> list[Sheet]:
    parity = [run for run in runs if run.job.split == PARITY]
    whole = {(run.job.variant, run.job.backend): run for run in runs if run.job.split == WHOLE}
    found = []
    if parity:
        steps = list(parity[0].details[FRAMEWORKS[0]])
        columns = (
            "task",
            "framework",
            *(f"step {step}" for step in steps),
            "holds for",
            "losses off by",
        )
        rows = [
            (
                run.job.variant,
                name,
                *(f"{run.details[name][step]:.3f}" for step in steps),
                f"{run.measures[f'{name} holds']:g} steps",
                f"{run.measures[f'{name} losses']:.1e}",
            )
            for run in parity
            for name in FRAMEWORKS
        ]
        title = "Training parity: the largest error of a weight, in units of its bound"
        found.append(Sheet(title, columns, rows))
    if whole:
        columns = ("task", "parameters", "measure", *FRAMEWORKS)
        rows = []
        for task in _TASKS:
            of = [whole.get((task, name)) for name in FRAMEWORKS]
            first = next((run for run in of if run), None)
            if first is None:
                continue
            for measure in (squares.TEST, squares.TRAINED, "steps"):
                values = (f"{run.measures[measure]:.5g}" if run else "-" for run in of)
                rows.append((task, f"{first.parameters:,}", measure, *values))
        title = "Trained to the end: share right, pixels off, IoU"
        found.append(Sheet(title, columns, rows))
    return found


def draw(path: Path, runs: Sequence[Run]) -> None:
    """Of each task, above the errors in units of the bound, below what whole training gave."""
    from matplotlib.figure import Figure  # only the picture needs it

    figure = Figure(figsize=(6, 2.6 * len(_TASKS)), layout="constrained")
    axes = figure.subplots(len(_TASKS), 2, squeeze=False)
    for (left, right), task in zip(axes, _TASKS, strict=True):
        for i, name in enumerate(FRAMEWORKS):
            for run in runs:
                if run.job.variant != task:
                    continue
                style: dict[str, Any] = {"color": f"C{i}", "linestyle": ("-", "--", ":")[i]}
                if run.job.split == PARITY:
                    errors = run.details[name]
                    left.plot([*map(int, errors)], [*errors.values()], marker="o", **style)
                elif run.job.backend == name:
                    right.plot(*zip(*run.curve, strict=True), label=name, **style)
        left.axhline(1, color="black", linewidth=1, linestyle="--")
        left.set(yscale="log", xlabel="step", ylabel="error / bound")
        left.set_title(f"{task}: parity", fontsize=9)
        right.set(xlabel="step")
        right.set_title("whole training, held out", fontsize=9)
    handles, labels = axes[0][1].get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper center", ncols=3)
    figure.savefig(path, dpi=130)
