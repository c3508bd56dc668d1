"""The commands that show what there is: ``info`` and ``summary``."""

from __future__ import annotations

import json
import platform
from dataclasses import asdict
from importlib import metadata
from typing import Annotated

import numpy as np
import typer
from rich.markup import escape
from rich.table import Table

from coordconv import __version__, backends, networks
from coordconv import summary as summaries
from coordconv.cli.common import JsonOption, Output, failures_shown


def info() -> None:
    """Show the backends, their versions, and what to install for those that are missing."""
    console = Output().console
    console.print(
        f"coordconv {__version__}, Python {platform.python_version()}, NumPy {np.__version__}, "
        f"safetensors {metadata.version('safetensors')}"
    )
    if (other := backends.other_coordconv()) is not None:
        console.print(f"[yellow]{escape(other)}[/]")
    table = Table("backend", "installed", "layers in, or how to install")
    for name, backend in backends.BACKENDS.items():
        if backend.missing:
            table.add_row(name, "[red]no[/]", escape(backend.install))
        else:
            versions = ", ".join(f"{k} {v}" for k, v in backend.versions().items())
            table.add_row(name, f"[green]{versions}[/]", f"coordconv.backends.{name}")
    console.print(table)


def summary(
    name: Annotated[str, typer.Argument(help=f"One of {', '.join(networks.NETWORKS)}.")],
    batch: Annotated[int, typer.Option(help="Samples in a batch.")] = 64,
    json_to: JsonOption = None,
) -> None:
    """Print a network's layers, parameters and memory.

    A CoordConv is two rows, as in its definition: the convolution inside, which sees the
    coordinate channels, and the layer around it. Both outputs count.
    """
    output = Output(json_to)
    with failures_shown():
        found = summaries.summary(name, batch)
    table = Table("layer", "kind", "input", "output", title=f"{found.network}, batch {found.batch}")
    table.add_column("parameters", justify="right")
    for row in found.rows:
        shapes = ("x".join(map(str, shape)) for shape in (row.input_shape, row.output_shape))
        table.add_row(row.layer, row.kind, *shapes, f"{row.parameters:,}")
    output.console.print(table)
    output.console.print(
        f"parameters: {found.parameters:,}",
        f"input: {found.input_mb:.2f} MB",
        f"forward and backward: {found.forward_backward_mb:.2f} MB",
        f"parameters: {found.parameters_mb:.2f} MB",
        f"total: {found.total_mb:.2f} MB",
        sep="\n",
    )
    output.write_json(json.dumps(asdict(found), indent=2))
