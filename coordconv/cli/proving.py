"""The commands that prove that backends agree: ``parity``, ``exchange`` and ``training``."""

from __future__ import annotations

import os
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Protocol

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from coordconv import networks
from coordconv import parity as proofs
from coordconv.cli.common import (
    BackendsOption,
    JsonOption,
    Output,
    failure,
    installed_backends,
    writable_folder,
)
from coordconv.parity import exchange as exchange_proof
from coordconv.parity import training as training_proof
from coordconv.parity.bounds import PRECISIONS

FEW_CASES = 30  # so many are done before a second process has started


class Mode(StrEnum):
    """How ``coordconv parity`` runs the frameworks."""

    USUAL = "usual"
    EAGER = "eager"
    COMPILED = "compiled"


class Way(StrEnum):
    """The two ways to compute a layer: see :mod:`coordconv.position_bias`."""

    APPEND = "append"
    MAP = "map"


class _Report(Protocol):
    @property
    def ok(self) -> bool: ...

    def to_json(self) -> str: ...


def parity(
    wanted: BackendsOption = None,
    cases: Annotated[int, typer.Option(min=1, help="Layers to generate.")] = 100,
    seed: Annotated[int, typer.Option(help="What layers and data are sampled with.")] = 0,
    dtype: Annotated[
        str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.", show_default=True)
    ] = "float32",
    mode: Annotated[
        Mode, typer.Option(help="Usual: JAX compiled, torch and Paddle eager.")
    ] = Mode.USUAL,
    way: Annotated[
        Way | None, typer.Option(hidden=True, help="Compute all layers in this way.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one a core by default.")
    ] = None,
    json_to: JsonOption = None,
) -> None:
    """Run the same weights and inputs through every backend and the float64 reference.

    Exits with 1 if an output or a gradient is off by more than its bound, or if a case of exact
    arithmetic is not equal to the last bit.
    """
    names = installed_backends(wanted)
    output = Output(json_to)
    try:
        generated = proofs.generate(cases, seed, dtype=dtype)
    except ValueError as error:
        raise failure(str(error)) from error
    if workers is None:
        workers = (os.cpu_count() or 1) if cases > FEW_CASES else 1
    with output.progress() as progress, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a framework's advice on speed is not for this table
        task = progress.add_task(f"cases through {', '.join(names)}", total=len(generated))
        report = proofs.check_layers(
            generated,
            names,
            lambda: progress.advance(task),
            compiled={Mode.EAGER: False, Mode.COMPILED: True}.get(mode),
            way=None if way is None else way.value,
            workers=workers,
        )
    _print_layers(report, output.console)
    _finish(report, output)


def _print_layers(report: proofs.CaseReport, console: Console) -> None:
    table = Table(title="largest error in units of the bound", title_justify="left")
    for column in ("backend", "layers", "networks", "bitwise", "forward", "gradients", "failed"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for tally in report.tallies:
        colour = "red" if tally.failures else "green"
        table.add_row(
            tally.backend,
            str(tally.layers),
            str(tally.networks),
            f"{tally.bitwise}/{tally.exact}",
            f"{tally.forward_error:.3f}",
            f"{tally.gradient_error:.3f}",
            f"[{colour}]{len(tally.failures)}[/]",
        )
    console.print(table)
    console.print("bitwise: of the cases in exact arithmetic, those equal to the last bit")
    for title, counts in (
        ("layers by kind", [tally.kinds for tally in report.tallies]),
        ("cases by mode", [tally.modes for tally in report.tallies]),
    ):
        table = Table(title.split()[-1], title=title, title_justify="left")
        for tally in report.tallies:
            table.add_column(tally.backend, justify="right")
        for row in sorted(set().union(*counts)):
            table.add_row(row, *(str(count[row]) for count in counts))
        console.print(table)
    for tally in report.tallies:
        for reason, times in tally.excluded.items():
            count = "1 case" if times == 1 else f"{times} cases"
            console.print(f"excluded in {tally.backend}: {count}: {reason}", highlight=False)
    for tally in report.tallies:
        for line in tally.failures:
            console.print(f"[red]failed[/] in {tally.backend}: {escape(line)}", soft_wrap=True)


def exchange(
    wanted: BackendsOption = None,
    network: Annotated[str, typer.Option(help="Comma-separated names of networks.")] = ",".join(
        exchange_proof.NETWORKS
    ),
    inputs: Annotated[int, typer.Option(min=1, help="Random inputs.")] = 1000,
    seed: Annotated[int, typer.Option(help="What weights and inputs are sampled with.")] = 0,
    json_to: JsonOption = None,
) -> None:
    """Save a network in each backend, load the file in every other, and compare their answers.

    Exits with 1 if two do not give every input the same answer, or if an output is farther from
    the float64 reference than its bound, or than rounding makes likely.
    """
    names = installed_backends(wanted)
    chosen = network.split(",")
    try:
        steps = exchange_proof.count_steps(names, inputs) * len(list(map(networks.get, chosen)))
    except ValueError as error:
        raise failure(str(error)) from error
    output = Output(json_to)
    with output.progress() as progress:
        task = progress.add_task("batches", total=steps)
        report = proofs.check_exchange(
            chosen, names, inputs, seed, advance=lambda: progress.advance(task)
        )
    _print_exchange(report, names, output.console)
    _finish(report, output)


def _print_exchange(
    report: exchange_proof.ExchangeReport, names: tuple[str, ...], console: Console
) -> None:
    for network in dict.fromkeys(pair.network for pair in report.pairs):
        title = f"{network}, loaded in: largest error in units of what is likely, same answers"
        table = Table("saved in", *names, title=title, title_justify="left")
        pairs = {(p.saved, p.loaded): p for p in report.pairs if p.network == network}
        for saved in names:
            found = [pairs[saved, loaded] for loaded in names]
            table.add_row(saved, *(_coloured(p.ok, f"{p.likely:.2g}, {p.same:,}") for p in found))
        console.print(table)
        largest = max(pair.error for pair in pairs.values())
        console.print(f"largest error in units of the proven bound: {largest:.1e}")


def training(
    wanted: BackendsOption = None,
    steps: Annotated[
        int, typer.Option(min=training_proof.EVERY, help="Steps; every tenth is compared.")
    ] = training_proof.STEPS,
    out: Annotated[Path, typer.Option(help="The folder for the picture, training.png.")] = Path(),
    json_to: JsonOption = None,
) -> None:
    """Train the same networks on the same batches in every backend, and in float64 beside them.

    Exits with 1 if a weight is farther from the float64 run's than rounding may have led it.
    """
    names = installed_backends(wanted)
    output = Output(json_to)
    picture = writable_folder(out) / "training.png"
    tasks = training_proof.TASKS
    with output.progress() as progress:
        task = progress.add_task("steps", total=len(tasks) * (1 + len(names)) * steps)
        report = proofs.check_training(tasks, names, steps, lambda: progress.advance(task))
    _print_training(report, output.console)
    training_proof.plot_training(picture, report)
    output.console.print(f"picture: {picture}", soft_wrap=True)
    _finish(report, output)


def _print_training(report: training_proof.TrainingReport, console: Console) -> None:
    console.print("largest deviation of a weight in units of the bound, after so many steps")
    for name in report.exact_losses:
        outcomes = [outcome for outcome in report.outcomes if outcome.task == name]
        table = Table("backend", title=name, title_justify="left")
        for count in outcomes[0].errors:
            table.add_column(str(count), justify="right")
        for outcome in outcomes:
            errors = outcome.errors.values()
            table.add_row(outcome.backend, *(_coloured(e <= 1, f"{e:.2g}") for e in errors))
        console.print(table)
    for outcome in report.outcomes:
        for count, error in outcome.errors.items():
            if error > 1:
                console.print(
                    f"[red]failed[/] in {outcome.backend}: {outcome.task}: {outcome.worst[count]} "
                    f"after {count} steps: {error:.3g} times the bound",
                    soft_wrap=True,
                )


def _coloured(ok: bool, text: str) -> str:
    return f"[{'green' if ok else 'red'}]{text}[/]"


def _finish(report: _Report, output: Output) -> None:
    """Write the report as JSON if that is asked for; exit with 1 if the report is not good."""
    output.write_json(report.to_json())
    if not report.ok:
        raise typer.Exit(1)
