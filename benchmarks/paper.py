"""Do coordinates help, where, and at what size of test image: the studies behind docs/evidence.md.

python benchmarks/paper.py --task classification --split quadrant
python benchmarks/paper.py --all --quick
python benchmarks/paper.py --all --out benchmarks/results
python benchmarks/paper.py --report benchmarks/results --pictures docs

`classification`, `regression` and `rendering` are the paper's tasks, of a 9x9 square on a canvas
of 64x64 (Liu et al., NeurIPS 2018, sections 2 to 5), on its two splits of the positions;
`frameworks` trains one setting of each in every framework from the same start; `article` compares
the two networks of the article that this project started from; `sizes` tests at other sizes than it
trained at; `dense` trains a small SOLO-like head. Each file of results has the machine, and every
run with its curve; `--report` prints the same tables from the files.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import common
from common import console
from evidence import study
from evidence.study import STUDIES, Job, Run

SEEDS, QUICK_SEEDS = 5, 1


def _show(name: str, machine: str, runs: list[Run], markdown: bool) -> None:
    console.print(f"\n{name}: {len(runs)} runs on {machine}", soft_wrap=True, markup=False)
    for sheet in study.load(name).sheets(runs):
        if markdown:
            print(f"\n{sheet.title}\n\n{sheet.markdown()}")
        else:
            console.print(sheet.rich())


def main(
    task: Annotated[str | None, typer.Option(help=f"One of {', '.join(STUDIES)}.")] = None,
    split: Annotated[str | None, typer.Option(help="One part of the task; all by default.")] = None,
    backend: Annotated[str, typer.Option(help="The framework to train in.")] = "torch",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant.")] = SEEDS,
    every: Annotated[bool, typer.Option("--all", help="All tasks.")] = False,
    quick: Annotated[
        bool, typer.Option("--quick", help="Short runs of one seed, to see that all of it works.")
    ] = False,
    out: Annotated[Path | None, typer.Option(help="The folder for results, a file a task.")] = None,
    report: Annotated[
        Path | None, typer.Option(help="Train nothing: show the results in this folder.")
    ] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Tables for a page.")] = False,
    pictures: Annotated[Path | None, typer.Option(help="The folder for pictures.")] = None,
) -> None:
    """Train the networks of one task or of all, or report what a folder of results holds."""
    if sum((task is not None, every, report is not None)) != 1:
        raise common.fail("say one of --task NAME, --all and --report FOLDER")
    if task is not None and task not in STUDIES:
        raise common.fail(f"--task must be one of {', '.join(STUDIES)}, got {task!r}")
    if split is not None and task is None:
        raise common.fail("--split needs --task NAME")
    if split is not None and task and split not in (splits := study.load(task).SPLITS):
        raise common.fail(f"--split must be a part of --task, one of {splits}, got {split!r}")
    names = (task,) if task else STUDIES
    # All at once: a study that lacks something says so before another has trained.
    jobs = {} if report else {name: _jobs(name, split, backend, seeds, quick) for name in names}
    for name in names:
        if report is not None:
            path = report / f"{name}.json"
            if not path.exists():
                raise common.fail(f"--report: {path} is missing; --all --out {report} writes it")
            machine, runs = study.read(path)
        else:
            machine, runs = common.machine("cpu"), study.train(jobs[name])
            if chosen := getattr(study.load(name), "chosen", None):
                runs += study.train(chosen(runs, QUICK_SEEDS if quick else seeds))
            if out is not None:
                study.save(out / f"{name}.json", runs)
        _show(name, common.describe(machine), runs, markdown)
        if pictures is not None:
            pictures.mkdir(parents=True, exist_ok=True)
            study.load(name).draw(pictures / f"evidence-{name}.png", runs)


def _jobs(name: str, split: str | None, backend: str, seeds: int, quick: bool) -> list[Job]:
    found = study.load(name)
    if backend not in found.BACKENDS:
        wanted = ", ".join(found.BACKENDS)
        raise common.fail(f"--backend must be one of {wanted} for {name}, got {backend!r}")
    splits = found.SPLITS if split is None else (split,)
    seeds = QUICK_SEEDS if quick else seeds
    return [job for s in splits for job in found.jobs(s, backend, seeds, quick)]


if __name__ == "__main__":
    common.run(main)
