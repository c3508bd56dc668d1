"""The commands that prove that backends agree: ``parity``, ``exchange`` and ``training``."""

from __future__ import annotations

import os
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape

from coordconv import networks
from coordconv import parity as proofs
from coordconv.cli.common import (
    BackendsOption,
    JsonOption,
    Output,
    failures_shown,
    installed_backends,
    table,
    writable_folder,
)
from coordconv.parity import exchange as exchange_proof
from coordconv.parity import training as training_proof
from coordconv.parity.bounds import PRECISIONS

FEW_CASES = 30  # so many are done before a second process has started

# The values are the names in small letters.
Mode = StrEnum("Mode", ["USUAL", "EAGER", "COMPILED"])
Way = StrEnum("Way", ["APPEND", "MAP"])
Report: TypeAlias = (
    proofs.CaseReport | exchange_proof.ExchangeReport | training_proof.TrainingReport
)


def parity(
    wanted: BackendsOption = None,
    cases: Annotated[int, typer.Option(min=1, help="Layers to generate.")] = 100,
    seed: Annotated[int, typer.Option(min=0, help="What layers and data are sampled with.")] = 0,
    dtype: Annotated[str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.")] = "float32",
    mode: Annotated[
        Mode, typer.Option(help="Usual: JAX compiled, torch and Paddle eager.")
    ] = Mode.USUAL,
    way: Annotated[
        Way | None, typer.Option(hidden=True, help="Compute all layers in this way.")
    ] = None,
    windows: Annotated[
        bool, typer.Option("--windows", help="Inputs show random parts of their frames.")
    ] = False,
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
    with failures_shown():
        generated = proofs.generate(cases, seed, dtype=dtype, windows=windows)
    if workers is None:
        workers = (os.cpu_count() or 1) if cases > FEW_CASES else 1
    title = f"cases through {', '.join(names)}"
    with output.progress(title, len(generated)) as advance, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a framework's advice on speed is not for this table
        report = proofs.check_layers(
            generated,
            names,
            advance,
            compiled={Mode.EAGER: False, Mode.COMPILED: True}.get(mode),
            way=None if way is None else way.value,
            workers=workers,
        )
    _print_layers(report, output.console)
    _finish(report, output)


def _print_layers(report: proofs.CaseReport, console: Console) -> None:
    columns = ("backend", "layers", "networks", "bitwise", "forward", "gradients", "failed")
    errors = table("largest error in units of the bound", *columns)
    for tally in report.tallies:
        errors.add_row(
            tally.backend,
            str(tally.layers),
            str(tally.networks),
            f"{tally.bitwise}/{tally.exact}",
            f"{tally.forward_error:.3f}",
            f"{tally.gradient_error:.3f}",
            _coloured(not tally.failures, str(len(tally.failures))),
        )
    console.print(errors)
    console.print("bitwise: of the cases in exact arithmetic, those equal to the last bit")
    names = [tally.backend for tally in report.tallies]
    for title, first, counts in (
        ("layers by kind", "kind", [tally.kinds for tally in report.tallies]),
        ("cases by mode", "mode", [tally.modes for tally in report.tallies]),
    ):
        counted = table(title, first, *names)
        for row in sorted(set().union(*counts)):
            counted.add_row(row, *(str(count[row]) for count in counts))
        console.print(counted)
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
    seed: Annotated[int, typer.Option(min=0, help="What weights and inputs are sampled with.")] = 0,
    json_to: JsonOption = None,
) -> None:
    """Save a network in each backend, load the file in every other, and compare their answers.

    Exits with 1 if two do not give every input the same answer, or if an output is farther from
    the float64 reference than its bound, or than rounding makes likely.
    """
    names = installed_backends(wanted)
    with failures_shown():
        chosen = [networks.get(name) for name in dict.fromkeys(network.split(","))]
    output = Output(json_to)
    steps = exchange_proof.count_steps(names, inputs) * len(chosen)
    with output.progress("batches", steps) as advance:
        report = proofs.check_exchange(chosen, names, inputs, seed, advance=advance)
    _print_exchange(report, names, output.console)
    _finish(report, output)


def _print_exchange(
    report: exchange_proof.ExchangeReport, names: tuple[str, ...], console: Console
) -> None:
    for network in dict.fromkeys(pair.network for pair in report.pairs):
        title = f"{network}, loaded in: largest error in units of what is likely, same answers"
        shown = table(title, "saved in", *names)
        pairs = [pair for pair in report.pairs if pair.network == network]
        for saved in names:
            found = [pair for pair in pairs if pair.saved == saved]
            shown.add_row(saved, *(_coloured(p.ok, f"{p.likely:.2g}, {p.same:,}") for p in found))
        console.print(shown)
        largest = max(pair.error for pair in pairs)
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
    with output.progress("steps", len(tasks) * (1 + len(names)) * steps) as advance:
        report = proofs.check_training(tasks, names, steps, advance)
    _print_training(report, output.console)
    training_proof.plot_training(picture, report)
    output.console.print(f"picture: {picture}", soft_wrap=True)
    _finish(report, output)


def _print_training(report: training_proof.TrainingReport, console: Console) -> None:
    console.print("largest deviation of a weight in units of the bound, after so many steps")
    for name in report.exact_losses:
        outcomes = [outcome for outcome in report.outcomes if outcome.task == name]
        shown = table(name, "backend", *map(str, outcomes[0].errors))
        for outcome in outcomes:
            errors = outcome.errors.values()
            shown.add_row(outcome.backend, *(_coloured(e <= 1, f"{e:.2g}") for e in errors))
        console.print(shown)
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


def _finish(report: Report, output: Output) -> None:
    """Write the report as JSON if that is asked for; exit with 1 if the report is not good."""
    output.write_json(report.to_json())
    if not report.ok:
        raise typer.Exit(1)
