"""What the commands have in common: errors, output, and the options of several commands."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, TypeAlias

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from coordconv import available_backends, backends

STANDARD_OUTPUT = Path("-")

BackendsOption: TypeAlias = Annotated[
    str | None, typer.Option("--backends", help="Comma-separated; all installed by default.")
]
JsonOption: TypeAlias = Annotated[
    Path | None,
    typer.Option(
        "--json",
        metavar="FILE",
        help="Write JSON to FILE; - is standard output, and tables then go to standard error.",
    ),
]


class Output:
    """Where a command writes: tables and progress to ``console``, JSON to what ``--json`` says.

    On standard output JSON is alone, so that a program can read it; the console is standard error
    then. A file that cannot be written is refused here, before a command does any work.
    """

    def __init__(self, json_to: Path | None = None) -> None:
        self.json_to = json_to
        self.console = Console(stderr=json_to == STANDARD_OUTPUT)
        if json_to in (None, STANDARD_OUTPUT):
            return
        writable_folder(json_to.parent)
        if json_to.is_dir():
            raise failure(f"cannot write to {json_to}: it is a folder; name a file in it")

    def write_json(self, text: str) -> None:
        """Write the JSON, if it is asked for."""
        if self.json_to == STANDARD_OUTPUT:
            typer.echo(text)
        elif self.json_to is not None:
            self.json_to.write_text(text, encoding="utf-8")
            self.console.print(f"JSON: {plain(str(self.json_to))}", soft_wrap=True)

    @contextmanager
    def progress(self, title: str, total: int) -> Iterator[Callable[[], None]]:
        """Show a bar that goes on by one step whenever the function that it gives is called."""
        description, time = TextColumn("{task.description}"), TimeElapsedColumn()
        columns = description, BarColumn(), MofNCompleteColumn(), time
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task(title, total=total)
            yield lambda: progress.advance(task)


def table(title: str, first: str, *others: str) -> Table:
    """A table whose columns but the first have their text, mostly numbers, on the right."""
    made = Table(first, title=title, title_justify="left")
    for name in others:
        made.add_column(name, justify="right")
    return made


def failure(message: str) -> typer.Exit:
    """Print an error on standard error; the result is to be raised."""
    # A name in a file may hold characters that a terminal obeys: they are shown as escapes.
    shown = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in message)
    Console(stderr=True).print(f"[bold red]error:[/] {escape(shown)}", soft_wrap=True)
    return typer.Exit(2)


@contextmanager
def failures_shown() -> Iterator[None]:
    """Show as :func:`failure` what this package says of wrong arguments and files."""
    try:
        yield
    except (ImportError, NotImplementedError, OSError, ValueError) as error:
        raise failure(str(error)) from error


def plain(text: str) -> str:
    """Text from a file, as a terminal and rich show it without obeying any character in it."""
    return escape(text if text.isprintable() else repr(text))


def installed_backends(wanted: str | None) -> tuple[str, ...]:
    """The backends of ``--backends``, or all that are installed; each of them is loaded."""
    names = available_backends() if wanted is None else tuple(dict.fromkeys(wanted.split(",")))
    if not names:
        commands = dict.fromkeys(backend.install for backend in backends.BACKENDS.values())
        raise failure(
            "no framework is installed; install at least one:\n  " + "\n  ".join(commands)
        )
    with failures_shown():
        for name in names:
            backends.load(name)
    return names


def writable_folder(folder: Path) -> Path:
    """Make the folder, and make sure before any work that a file can be written there."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise failure(f"cannot write to {folder}: {error.strerror}; choose another one") from error
