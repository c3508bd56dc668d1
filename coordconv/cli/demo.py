"""The command ``demo``: a network learns in one framework and answers alike in all of them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from coordconv import load_weights, save_weights
from coordconv import summary as summaries
from coordconv.cli import demo_task
from coordconv.cli.common import Output, installed_backends, writable_folder
from coordconv.grid import Array

SECONDS = 180.0  # of training, at most


def run_demo(
    backend: Annotated[
        str | None, typer.Option(help="The framework to train in; the first installed by default.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The folder for weights and picture.")] = Path("demo"),
    seed: Annotated[
        int, typer.Option(help="What split, weights and batches are sampled with.")
    ] = 0,
) -> None:
    """Train a CoordConv network in one framework; run its weights in all of them.

    The task is the paper's: name the pixel at the centre of a square. Exits with 1 if the
    network does not get every held-out position right, or if another framework answers otherwise.
    """
    others = installed_backends(None)
    trainer = others[0] if backend is None else installed_backends(backend)[0]
    names = (trainer, *(name for name in others if name != trainer))
    writable_folder(out)
    console = Output().console
    data = demo_task.positions(seed)
    coord = _train(console, "CoordConv", "coord_classifier", trainer, data, SECONDS, seed)
    conv = _train(console, "Conv", "deconv_classifier", trainer, data, coord.seconds, seed)
    path = out / "coord_classifier.safetensors"
    save_weights(path, coord.weights)
    console.print(f"weights: {path}")

    weights = load_weights(path)
    logits = {}
    for name in names:
        console.print(f"running all {len(data.labels):,} positions in {name} ...")
        logits[name] = demo_task.predict("coord_classifier", name, weights, data)
    answers = {name: values.argmax(axis=1) for name, values in logits.items()}
    _print_answers(console, data, logits, trainer)

    picture = out / "demo.png"
    conv_logits = demo_task.predict("deconv_classifier", trainer, conv.weights, data)
    demo_task.plot(
        picture,
        data,
        {"CoordConv": answers[trainer], "Conv": conv_logits.argmax(axis=1)},
        {"CoordConv": coord.losses, "Conv": conv.losses},
    )
    console.print(f"picture: {picture}")
    solved = coord.epochs[-1].held_out_right == len(data.held_out)
    if not solved or any((found != answers[trainer]).any() for found in answers.values()):
        raise typer.Exit(1)


def _print_answers(
    console: Console,
    data: demo_task.Positions,
    logits: dict[str, Array],
    trainer: str,
) -> None:
    own = logits[trainer]
    table = Table(title="the same file in every backend", title_justify="left")
    for column in ("backend", "right", "other answers", "largest logit difference"):
        table.add_column(column, justify="left" if column == "backend" else "right")
    for name, values in logits.items():
        found = values.argmax(axis=1)
        table.add_row(
            name + (" (trained here)" if name == trainer else ""),
            f"{int((found == data.labels).sum()):,} of {len(found):,}",
            str(int((found != own.argmax(axis=1)).sum())),
            f"{np.abs(values - own).max():.1e} of {np.abs(own).max():.0f}",
        )
    console.print(table)


def _train(
    console: Console,
    label: str,
    name: str,
    backend: str,
    data: demo_task.Positions,
    seconds: float,
    seed: int,
) -> demo_task.Training:
    count = summaries.summary(name).parameters
    console.print(
        f"training {label} ({name}, {count:,} parameters) in {backend}, at most {seconds:.0f} s ..."
    )
    with Progress(
        TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn(), console=console
    ) as progress:
        task = progress.add_task(label, total=seconds)

        def on_step(elapsed: float, loss: float) -> None:
            progress.update(task, completed=elapsed, description=f"{label}: loss {loss:.4f}")

        def on_epoch(epoch: demo_task.Epoch) -> None:
            progress.console.print(
                f"epoch {epoch.number}: loss {epoch.loss:.4f}, held out "
                f"{epoch.held_out_right:,} of {len(data.held_out):,} right, trained on "
                f"{epoch.trained_right:,} of {len(data.trained):,}"
            )

        return demo_task.train(
            name, backend, data, seconds=seconds, seed=seed, on_step=on_step, on_epoch=on_epoch
        )
