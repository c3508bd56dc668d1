"""The ``coordconv`` command."""

from __future__ import annotations

import json
import logging
import os
import platform
import tempfile
import warnings
from dataclasses import asdict
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from coordconv import (
    __version__,
    available_backends,
    backends,
    convert,
    demo,
    load_weights,
    networks,
    save_weights,
)
from coordconv import parity as parity_check
from coordconv.parity import exchange as exchange_check
from coordconv.parity import training as training_check
from coordconv.parity.comparison import PRECISIONS
from coordconv.parity.report import CaseReport

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
console = Console(soft_wrap=False)

_FORMAT = f"One of {', '.join(convert.FORMATS)}; by default what the suffix says."
DEMO_SECONDS = 180.0
FEW_CASES = 30


class Mode(StrEnum):
    """How ``coordconv parity`` runs the frameworks."""

    USUAL = "usual"
    EAGER = "eager"
    COMPILED = "compiled"


class Maps(StrEnum):
    """How ``coordconv parity`` has position biases made."""

    USUAL = "usual"
    APART = "apart"
    TOGETHER = "together"


def _fail(message: str) -> typer.Exit:
    """Say what is wrong on standard error; to be raised."""
    # what a terminal would obey, in the name of a file or of an array, is shown as an escape
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    Console(stderr=True).print(f"[bold red]error:[/] {escape(shown)}", soft_wrap=True)
    return typer.Exit(2)


def _installed(wanted: str | None) -> tuple[str, ...]:
    """The backends asked for, comma-separated, or all that are installed."""
    names = available_backends() if wanted is None else tuple(wanted.split(","))
    if not names:
        commands = dict.fromkeys(backend.install for backend in backends.BACKENDS.values())
        raise _fail("no framework is installed; install at least one:\n  " + "\n  ".join(commands))
    for name in names:
        try:
            backends.load(name)
        except (ImportError, ValueError) as error:
            raise _fail(str(error)) from error
    return names


def _writable(folder: Path) -> Path:
    """Make a folder, and make sure before any work that a file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise _fail(f"cannot write to {folder}: {error.strerror}; choose another one") from error


@app.callback()
def quiet() -> None:
    """CoordConv for PyTorch, Paddle and Flax: one set of weights, identical outputs."""
    logging.disable(logging.INFO)  # frameworks say what they found, in the middle of our tables


@app.command()
def info() -> None:
    """Show the backends, their versions, and what to install for those that are missing."""
    console.print(
        f"coordconv {__version__}, Python {platform.python_version()}, NumPy {np.__version__}, "
        f"safetensors {metadata.version('safetensors')}"
    )
    table = Table("backend", "installed", "layers in, or how to install")
    for name, backend in backends.BACKENDS.items():
        if backend.missing:
            table.add_row(name, "[red]no[/]", escape(backend.install))
        else:
            versions = ", ".join(f"{k} {v}" for k, v in backend.versions().items())
            table.add_row(name, f"[green]{versions}[/]", f"coordconv.backends.{name}")
    console.print(table)


@app.command()
def summary(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(networks.NETWORKS)}.")],
    batch: Annotated[int, typer.Option(help="Samples in a batch.")] = 64,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print a network's layers, parameters and memory.

    A CoordConv is two rows, as in its definition: the convolution inside, which sees the
    coordinate channels, and the layer around it. Both outputs count.
    """
    try:
        found = networks.summary(name, batch)
    except ValueError as error:
        raise _fail(str(error)) from error
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    table = Table("layer", "kind", "input", "output", title=f"{found.network}, batch {found.batch}")
    table.add_column("parameters", justify="right")
    for row in found.rows:
        shapes = ("x".join(map(str, shape)) for shape in (row.input_shape, row.output_shape))
        table.add_row(row.layer, row.kind, *shapes, f"{row.parameters:,}")
    console.print(table)
    console.print(f"parameters: {found.parameters:,}")
    for label, size in (
        ("input", found.input_mb),
        ("forward and backward", found.forward_backward_mb),
        ("parameters", found.parameters_mb),
        ("total", found.total_mb),
    ):
        console.print(f"{label}: {size:.2f} MB")


@app.command("weights")
def weights_command(
    file: Annotated[Path, typer.Argument(help="A file or folder of any of the formats.")],
    form: Annotated[str | None, typer.Option("--format", help=_FORMAT)] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show what is in a file of weights, of whatever network.

    Names and shapes are the file's own; bfloat16 shows as the float32 that it is
    read as; smallest and largest are of the finite values.
    """
    try:
        found = convert.describe(file, format=form)
    except (ImportError, OSError, ValueError) as error:
        raise _fail(str(error)) from error
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    table = Table(title=_plain(f"{file}, {found.format}"))
    for column in ("name", "shape"):
        table.add_column(column, overflow="fold")  # whole: rows may differ in the last letter only
    table.add_column("dtype", no_wrap=True)
    for column in ("parameters", "smallest", "largest"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.arrays:
        bounds = ("" if b is None else f"{b:.4g}" for b in (row.smallest, row.largest))
        shape = "x".join(map(str, row.shape))
        table.add_row(_plain(row.name), shape, row.dtype, f"{row.parameters:,}", *bounds)
    console.print(table)
    for row in found.arrays:
        if row.nan or row.infinite:
            odd = f"[red]not finite[/] in {_plain(row.name)}: {row.nan:,} NaN, {row.infinite:,} inf"
            console.print(odd, soft_wrap=True)
    for layer, coords in found.coordinates.items():
        console.print(f"coordinates{layer and ' of '}{_plain(layer)}: {_plain(str(coords))}")
    for name, text in found.metadata.items():
        console.print(f"metadata: {_plain(name)}: {_plain(text)}", soft_wrap=True)
    console.print(f"parameters: {found.parameters:,}")


def _plain(text: str) -> str:
    """Text from a file, without what would make a terminal or rich do other things than show it."""
    return escape(text if text.isprintable() else repr(text))


@app.command("convert")
def convert_command(
    source: Annotated[Path, typer.Argument(metavar="IN", help="What to read.")],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="What to write.")],
    network: Annotated[
        str | None,
        typer.Option(
            help=f"One of {', '.join(networks.NETWORKS)}; by default the one that IN's metadata "
            "name, or the only one that its arrays fit."
        ),
    ] = None,
    source_format: Annotated[
        str | None, typer.Option("--from", help=f"The format of IN. {_FORMAT}")
    ] = None,
    target_format: Annotated[
        str | None, typer.Option("--to", help=f"The format of OUT. {_FORMAT}")
    ] = None,
) -> None:
    """Convert a network's weights from any framework's file to any other's.

    The formats, of which either of the last two reads both:
    safetensors, the canonical file, which alone has metadata;
    torch, the file of a state_dict;
    paddle, that of paddle.save;
    flax, an Orbax folder of an NNX state's pure dict;
    linen, an Orbax folder of the variables {"params": ...}.

    Nothing that is read can run code. So a .pdparams file must be one that
    paddle.save wrote with safetensors=True; the error says how to make it one.
    What is written as .pdparams is Paddle's usual pickle, for paddle.load, and
    is not read back here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what is not finite is told of below
            weights = convert.convert(
                source,
                target,
                network,
                source_format=source_format,
                target_format=target_format,
            )
    except (ImportError, NotImplementedError, OSError, ValueError) as error:
        raise _fail(str(error)) from error
    strange = [name for name, array in weights.items() if not np.isfinite(array).all()]
    if strange:
        told = f"[yellow]warning:[/] NaN or infinity in {', '.join(strange)}"
        Console(stderr=True).print(told, soft_wrap=True)
    count = sum(array.size for array in weights.values())
    name = weights.metadata["network"]
    console.print(f"{name}, {count:,} parameters: {_plain(str(target))}", soft_wrap=True)


@app.command()
def parity(
    wanted: Annotated[
        str | None, typer.Option("--backends", help="Comma-separated; all installed by default.")
    ] = None,
    cases: Annotated[int, typer.Option(min=1, help="Layers to generate.")] = 100,
    seed: Annotated[int, typer.Option(help="What they are drawn with.")] = 0,
    dtype: Annotated[
        str, typer.Option(help=f"One of {', '.join(PRECISIONS)}.", show_default=True)
    ] = "float32",
    mode: Annotated[
        Mode, typer.Option(help="Usual: JAX compiled, torch and Paddle eager.")
    ] = Mode.USUAL,
    maps: Annotated[
        Maps,
        typer.Option(
            help="Apart: made axis by axis, as large ones are. Together: from one table, as small "
            "ones, such as all of these."
        ),
    ] = Maps.USUAL,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Processes; one a core by default.")
    ] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the report here.")] = None,
) -> None:
    """Run the same weights and inputs through every backend and the float64 reference.

    Exits with 1 if an output or a gradient is off by more than its bound, or if a case of exact
    arithmetic is not equal to the last bit.
    """
    names = _installed(wanted)
    if json_file is not None:
        _writable(json_file.parent)
    try:
        drawn = parity_check.generate(cases, seed, dtype=dtype)
    except ValueError as error:
        raise _fail(str(error)) from error
    if workers is None:  # a few cases are done before another process has started
        workers = (os.cpu_count() or 1) if cases > FEW_CASES else 1
    with (
        Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
        ) as progress,
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # a framework's advice on speed is not for this table
        task = progress.add_task(f"cases through {', '.join(names)}", total=len(drawn))
        report = parity_check.check(
            drawn,
            names,
            lambda: progress.advance(task),
            compiled={Mode.EAGER: False, Mode.COMPILED: True}.get(mode),
            maps=None if maps is Maps.USUAL else maps.value,
            workers=workers,
        )
    _print_report(report)
    if json_file is not None:
        json_file.write_text(report.to_json())
        console.print(f"report: {json_file}")
    if not report.ok:
        raise typer.Exit(1)


def _print_report(report: CaseReport) -> None:
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
            console.print(f"excluded in {tally.backend}: {times} cases: {reason}", highlight=False)
    for tally in report.tallies:
        for failure in tally.failures:
            console.print(f"[red]failed[/] in {tally.backend}: {escape(failure)}", soft_wrap=True)


_Wanted = Annotated[
    str | None, typer.Option("--backends", help="Comma-separated; all installed by default.")
]
_JsonFile = Annotated[Path | None, typer.Option("--json", help="Write the report here.")]


@app.command()
def training(
    wanted: _Wanted = None,
    steps: Annotated[
        int, typer.Option(min=training_check.EVERY, help="Steps; every tenth is compared.")
    ] = training_check.STEPS,
    out: Annotated[Path, typer.Option(help="The picture to write.")] = Path("training.png"),
    json_file: _JsonFile = None,
) -> None:
    """Train the same networks on the same batches in every backend, and in float64 beside them.

    Exits with 1 if a weight is farther from the float64 run's than rounding may have led it.
    """
    names = _installed(wanted)
    for file in filter(None, (out, json_file)):
        _writable(file.parent)
    tasks = training_check.TASKS
    with _progress() as progress:
        task = progress.add_task("steps", total=len(tasks) * (1 + len(names)) * steps)
        report = training_check.check(tasks, names, steps, lambda: progress.advance(task))
    console.print("largest deviation of a weight in units of the bound, after so many steps")
    for name in report.references:
        outcomes = [outcome for outcome in report.outcomes if outcome.task == name]
        table = Table("backend", title=name, title_justify="left")
        for count in outcomes[0].errors:
            table.add_column(str(count), justify="right")
        for outcome in outcomes:
            errors = outcome.errors.values()
            cells = (f"[{'green' if error <= 1 else 'red'}]{error:.2g}[/]" for error in errors)
            table.add_row(outcome.backend, *cells)
        console.print(table)
    for outcome in report.outcomes:
        for count, error in outcome.errors.items():
            if error > 1:
                console.print(
                    f"[red]failed[/] in {outcome.backend}: {outcome.task}: {outcome.worst[count]} "
                    f"after {count} steps: {error:.3g} times the bound",
                    soft_wrap=True,
                )
    training_check.draw(out, report)
    console.print(f"picture: {out}")
    _finish(report, json_file)


@app.command()
def exchange(
    wanted: _Wanted = None,
    network: Annotated[str, typer.Option(help="Comma-separated names of networks.")] = ",".join(
        exchange_check.NETWORKS
    ),
    inputs: Annotated[int, typer.Option(min=1, help="Random inputs.")] = 1000,
    seed: Annotated[int, typer.Option(help="What weights and inputs are drawn with.")] = 0,
    json_file: _JsonFile = None,
) -> None:
    """Save a network in each backend, load the file in every other, and compare their answers.

    Exits with 1 if two do not give every input the same answer, or if an output is farther from
    the float64 reference than its bound, or than rounding makes likely.
    """
    names = _installed(wanted)
    chosen = network.split(",")
    try:
        total = sum(exchange_check.units(networks.get(name), names, inputs) for name in chosen)
    except ValueError as error:
        raise _fail(str(error)) from error
    if json_file is not None:
        _writable(json_file.parent)
    with _progress() as progress:
        task = progress.add_task("batches", total=total)
        report = exchange_check.check(
            chosen, names, inputs, seed, advance=lambda: progress.advance(task)
        )
    for name in dict.fromkeys(pair.network for pair in report.pairs):
        title = f"{name}, loaded in: largest error in units of what is likely, same answers"
        table = Table("saved in", *names, title=title, title_justify="left")
        pairs = {(p.saved, p.loaded): p for p in report.pairs if p.network == name}
        for saved in names:
            table.add_row(saved, *(_cell(pairs[saved, loaded]) for loaded in names))
        console.print(table)
        largest = max(pair.error for pair in pairs.values())
        console.print(f"largest error in units of the proven bound: {largest:.1e}")
    _finish(report, json_file)


def _cell(pair: exchange_check.Pair) -> str:
    return f"[{'green' if pair.ok else 'red'}]{pair.likely:.2g}, {pair.same:,}[/]"


def _progress() -> Progress:
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _finish(
    report: training_check.TrainingReport | exchange_check.ExchangeReport, json_file: Path | None
) -> None:
    """Write the report if it is asked for; exit with 1 if it is not good."""
    if json_file is not None:
        json_file.write_text(report.to_json())
        console.print(f"report: {json_file}")
    if not report.ok:
        raise typer.Exit(1)


@app.command("demo")
def demo_command(
    backend: Annotated[
        str | None, typer.Option(help="The framework to train in; the first installed by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for weights and picture.")] = Path("demo"),
    seed: Annotated[int, typer.Option(help="What split, weights and batches are drawn with.")] = 0,
) -> None:
    """Train a CoordConv network in one framework; run its weights in all of them.

    The task is the paper's: name the pixel at the centre of a square. Exits with 1 if the
    network does not get every held-out position right, or if another framework answers otherwise.
    """
    others = _installed(None)
    trainer = others[0] if backend is None else _installed(backend)[0]
    _writable(out)
    data = demo.positions(seed)
    coord = _train("CoordConv", "coord_classifier", trainer, data, DEMO_SECONDS, seed)
    conv = _train("Conv", "deconv_classifier", trainer, data, coord.seconds, seed)
    path = out / "coord_classifier.safetensors"
    save_weights(path, coord.weights)
    console.print(f"weights: {path}")

    weights = load_weights(path)
    table = Table(title="the same file in every backend", title_justify="left")
    for column in ("backend", "right", "other answers", "largest logit difference"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    own = demo.predict("coord_classifier", trainer, weights, data)
    answers, agree = own.argmax(axis=1), True
    for name in (trainer, *(other for other in others if other != trainer)):
        console.print(f"running all {len(answers):,} positions in {name} ...")
        logits = own if name == trainer else demo.predict("coord_classifier", name, weights, data)
        found = logits.argmax(axis=1)
        differing = int((found != answers).sum())
        agree = agree and differing == 0
        table.add_row(
            name + (" (trained here)" if name == trainer else ""),
            f"{int((found == data.labels).sum()):,} of {len(found):,}",
            str(differing),
            f"{np.abs(logits - own).max():.1e} of {np.abs(own).max():.0f}",
        )
    console.print(table)

    picture = out / "demo.png"
    conv_answers = demo.predict("deconv_classifier", trainer, conv.weights, data).argmax(axis=1)
    demo.draw(
        picture,
        data,
        {"CoordConv": answers, "Conv": conv_answers},
        {"CoordConv": coord.losses, "Conv": conv.losses},
    )
    console.print(f"picture: {picture}")
    held_out = coord.epochs[-1].held_out_right
    if held_out < len(data.held_out) or not agree:
        raise typer.Exit(1)


def _train(
    label: str, name: str, backend: str, data: demo.Positions, seconds: float, seed: int
) -> demo.Training:
    count = networks.summary(name).parameters
    console.print(
        f"training {label} ({name}, {count:,} parameters) in {backend}, at most {seconds:.0f} s ..."
    )
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task(label, total=seconds)

        def on_step(elapsed: float, loss: float) -> None:
            progress.update(task, completed=elapsed, description=f"{label}: loss {loss:.4f}")

        def on_epoch(epoch: demo.Epoch) -> None:
            progress.console.print(
                f"epoch {epoch.number}: loss {epoch.loss:.4f}, held out "
                f"{epoch.held_out_right:,} of {len(data.held_out):,} right, trained on "
                f"{epoch.trained_right:,} of {len(data.trained):,}"
            )

        return demo.train(
            name, backend, data, seconds=seconds, seed=seed, on_step=on_step, on_epoch=on_epoch
        )
