"""What the studies share: their runs, the processes that these take turns in, tables and files.

A study is a module of this folder with what :class:`Study` lists. Its jobs are trained in processes
of one thread each, as many as there are cores: small networks gain nothing from a second thread.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Protocol, cast

from rich.table import Table

import common

STUDIES = ("classification", "regression", "rendering", "frameworks", "article", "sizes", "dense")
_ONE_THREAD = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


@dataclass(frozen=True)
class Job:
    """One network to train: which study and part of it, which variant, and with which seed.

    ``options`` are the variant's further settings, as a learning rate and a width.
    """

    study: str
    split: str
    variant: str
    seed: int
    backend: str = "torch"
    quick: bool = False
    options: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """A job that was done.

    ``seconds`` are those of training alone, ``curve`` has what was measured after so many steps,
    ``measures`` what was measured at the end, ``details`` what only a picture needs.
    """

    job: Job
    parameters: int
    seconds: float
    curve: list[tuple[int, float]]
    measures: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Sheet:
    """A table for a terminal and for a page."""

    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]

    def rich(self) -> Table:
        made = common.table(self.title, *self.columns)
        for row in self.rows:
            made.add_row(*row)
        return made

    def markdown(self) -> str:
        rule = ("---",) + ("---:",) * (len(self.columns) - 1)
        rows = (self.columns, rule, *self.rows)
        return "\n".join(f"| {' | '.join(row)} |" for row in rows)


class Study(Protocol):
    """What a module of this folder offers to ``paper.py``.

    It may also have ``chosen(runs, seeds)``: further jobs, with what the first runs found best.
    """

    SPLITS: tuple[str, ...]
    """The parts of the study that can run alone; ``("",)`` where there is one."""

    BACKENDS: tuple[str, ...]
    """The frameworks in which it can train."""

    def jobs(self, split: str, backend: str, seeds: int, quick: bool) -> list[Job]:
        """What to train; ``quick`` jobs end within seconds, and show that all of it runs."""

    def run(self, job: Job) -> Run:
        """Train one, in a process of its own."""

    def sheets(self, runs: Sequence[Run]) -> list[Sheet]:
        """What was found, of any of the study's runs."""

    def draw(self, path: Path, runs: Sequence[Run]) -> None:
        """Draw it, as PNG or SVG."""


def load(name: str) -> Study:
    """The study of that name."""
    return cast(Study, importlib.import_module(f"evidence.{name}"))


def spread(values: Iterable[float], form: Callable[[float], str] = "{:.2g}".format) -> str:
    """The median, and in brackets the lowest and the highest, unless all are written alike."""
    found = sorted(values)
    low, high = form(found[0]), form(found[-1])
    return low if low == high else f"{form(statistics.median(found))} ({low}-{high})"


def train(jobs: Sequence[Job]) -> list[Run]:
    """Do all jobs, in the order given, as many at once as there are cores, behind a bar."""
    os.environ.update(dict.fromkeys(_ONE_THREAD, "1"))  # before a process imports a framework
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    done: dict[int, Run] = {}
    workers = min(len(jobs), os.cpu_count() or 1)
    context = multiprocessing.get_context("spawn")
    with common.progress() as bar, ProcessPoolExecutor(workers, context) as pool:
        task = bar.add_task("", total=len(jobs))
        waiting = {pool.submit(_run, job): i for i, job in enumerate(jobs)}
        try:
            for future in as_completed(waiting):
                job = jobs[waiting[future]]
                done[waiting[future]] = future.result()
                bar.update(task, description=f"{job.study} {job.split} {job.variant}", advance=1)
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [done[i] for i in range(len(jobs))]


def _run(job: Job) -> Run:
    if job.backend == "torch":
        import torch

        torch.set_num_threads(1)
    return load(job.study).run(job)


def save(path: Path, runs: Sequence[Run]) -> None:
    """Write the machine that the runs ran on, and each run in a line."""
    lines = ",\n".join(json.dumps(asdict(run)) for run in runs)
    machine = json.dumps(common.machine("cpu"))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'{{"machine": {machine},\n"runs": [\n{lines}\n]}}\n', encoding="utf-8")


def read(path: Path) -> tuple[dict[str, Any], list[Run]]:
    """The machine and the runs of such a file."""
    found = json.loads(path.read_text(encoding="utf-8"))
    runs = [
        Run(
            Job(**run["job"]),
            run["parameters"],
            run["seconds"],
            [(int(step), float(value)) for step, value in run["curve"]],
            run["measures"],
            run["details"],
        )
        for run in found["runs"]
    ]
    return found["machine"], runs
