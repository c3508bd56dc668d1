"""The commands on files of weights: ``weights`` and ``convert``."""

from __future__ import annotations

import json
import warnings
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.table import Table

from coordconv import convert as conversion
from coordconv import networks
from coordconv.cli.common import JsonOption, Output, failures_shown, plain

_FORMAT = f"One of {', '.join(conversion.FORMATS)}; by default what the suffix says."


class Position(StrEnum):
    """Where a kernel has its coordinates: behind the features or before them."""

    LAST = "last"
    FIRST = "first"


def weights(
    file: Annotated[Path, typer.Argument(help="A file or folder of any of the formats.")],
    form: Annotated[str | None, typer.Option("--format", help=_FORMAT)] = None,
    json_to: JsonOption = None,
) -> None:
    """Show what is in a file of weights, of whatever network.

    Names and shapes are the file's own; bfloat16 shows as the float32 that it is
    read as; smallest and largest are of the finite values.
    """
    output = Output(json_to)
    with failures_shown():
        found = conversion.describe(file, format=form)
    table = Table(title=plain(f"{file}, {found.format}"))
    for column in ("name", "shape"):
        table.add_column(column, overflow="fold")  # whole: rows may differ in the last letter only
    table.add_column("dtype", no_wrap=True)
    for column in ("parameters", "smallest", "largest"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in found.arrays:
        bounds = ("" if b is None else f"{b:.4g}" for b in (row.smallest, row.largest))
        shape = "x".join(map(str, row.shape))
        table.add_row(plain(row.name), shape, row.dtype, f"{row.parameters:,}", *bounds)
    console = output.console
    console.print(table)
    for row in found.arrays:
        if row.nan or row.infinite:
            counts = f"{row.nan:,} NaN, {row.infinite:,} inf"
            console.print(f"[red]not finite[/] in {plain(row.name)}: {counts}", soft_wrap=True)
    for layer, coords in found.coordinates.items():
        console.print(f"coordinates{layer and ' of '}{plain(layer)}: {plain(str(coords))}")
    for name, text in found.metadata.items():
        console.print(f"metadata: {plain(name)}: {plain(text)}", soft_wrap=True)
    console.print(f"parameters: {found.parameters:,}")
    output.write_json(json.dumps(asdict(found), indent=2))


def convert(
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
    position: Annotated[
        Position,
        typer.Option(
            help="Where the kernels of IN have their coordinates: behind the features, or before "
            "them, as SparseInst, CondInst and CAM-Convs save them."
        ),
    ] = Position.LAST,
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
    with failures_shown(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the warning below names values that are not finite
        converted = conversion.convert(
            source,
            target,
            network,
            source_format=source_format,
            target_format=target_format,
            position=position.value,
        )
    strange = [name for name, array in converted.items() if not np.isfinite(array).all()]
    if strange:
        message = f"[yellow]warning:[/] NaN or infinity in {', '.join(strange)}"
        Console(stderr=True).print(message, soft_wrap=True)
    count = sum(array.size for array in converted.values())
    name = converted.metadata["network"]
    Output().console.print(f"{name}, {count:,} parameters: {plain(str(target))}", soft_wrap=True)
