"""The command ``demo``: a network learns in one framework and answers alike in all of them.

The task is the paper's supervised coordinate classification on Not-so-Clevr: given the centre of
a 9x9 square on a 64x64 canvas as two numbers, name its pixel among the 4,096.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from coordconv import backends, load_weights, networks, save_weights
from coordconv import summary as summaries
from coordconv.cli.common import Output, installed_backends, table, writable_folder
from coordconv.grid import Array, coordinate_grid
from coordconv.weights import Weights

SECONDS = 180.0  # of training, at most
CANVAS = 64
SQUARE = 9
BATCH = 8
LEARNING_RATE = 0.005
DECAY_EPOCHS = 10
TRAINED_SHARE = 0.8
_PREDICT_BATCH = 112  # divides the 3,136 positions, so that a compiler sees one shape


def demo(
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
    writable_folder(out)
    console, data = Output().console, positions(seed)
    coord_weights, coord_losses, seconds = _train(
        console, "CoordConv", "coord_classifier", trainer, data, SECONDS, seed
    )
    conv_weights, conv_losses, _ = _train(
        console, "Conv", "deconv_classifier", trainer, data, seconds, seed
    )
    path = out / "coord_classifier.safetensors"
    save_weights(path, coord_weights)
    console.print(f"weights: {path}")

    weights, logits = load_weights(path), {}
    for name in dict.fromkeys((trainer, *others)):
        console.print(f"running all {len(data.labels):,} positions in {name} ...")
        logits[name] = predict("coord_classifier", name, weights, data)
    own = logits[trainer]
    answers = {name: values.argmax(axis=1) for name, values in logits.items()}
    columns = ("backend", "right", "other answers", "largest logit difference")
    shown = table("the same file in every backend", *columns)
    for name, found in answers.items():
        shown.add_row(
            name + (" (trained here)" if name == trainer else ""),
            f"{int((found == data.labels).sum()):,} of {len(found):,}",
            str(int((found != answers[trainer]).sum())),
            f"{np.abs(logits[name] - own).max():.1e} of {np.abs(own).max():.0f}",
        )
    console.print(shown)

    picture = out / "demo.png"
    plain = predict("deconv_classifier", trainer, conv_weights, data).argmax(axis=1)
    losses = {"CoordConv": coord_losses, "Conv": conv_losses}
    plot(picture, data, {"CoordConv": answers[trainer], "Conv": plain}, losses)
    console.print(f"picture: {picture}")
    wrong = answers[trainer] != data.labels
    if wrong[data.held_out].any() or any((a != answers[trainer]).any() for a in answers.values()):
        raise typer.Exit(1)


@dataclass(frozen=True)
class Positions:
    """The centres of all squares.

    ``coordinates (N, 2)`` are their x and y on the scale -1 to 1, ``labels (N,)`` the pixels at the
    centres, counted row by row; ``trained`` are the indices of those to train on, and ``held_out``
    of the others.
    """

    coordinates: Array
    labels: Array
    trained: Array
    held_out: Array

    def inputs(self, which: Array, shape: tuple[int, ...]) -> Array:
        """The network's input for some positions: x and y tiled over a canvas of ``shape``."""
        chosen = self.coordinates[which].reshape(-1, 2, *(1,) * len(shape))
        return np.tile(chosen, (1, 1, *shape))


def positions(seed: int = 0) -> Positions:
    """All centres of a square that fits on the canvas, a random 80% of them to train on.

    Example:
        >>> p = positions()
        >>> len(p.labels), len(p.trained), len(p.held_out)
        (3136, 2509, 627)

    Source:
        Liu et al., NeurIPS 2018, section 2 (uniform split).
    """
    margin = SQUARE // 2
    centres = np.arange(margin, CANVAS - margin)
    rows, columns = (index.ravel() for index in np.meshgrid(centres, centres, indexing="ij"))
    order = np.random.default_rng(seed).permutation(len(rows))
    trained, held_out = np.split(order, [round(TRAINED_SHARE * len(rows))])
    coordinates = np.ascontiguousarray(coordinate_grid((CANVAS, CANVAS))[:, rows, columns].T)
    return Positions(coordinates, rows * CANVAS + columns, trained, held_out)


def _train(
    console: Console,
    label: str,
    name: str,
    backend: str,
    data: Positions,
    seconds: float,
    seed: int,
) -> tuple[Weights, list[float], float]:
    """Train a network until every position is right, or time is up.

    The weights, the loss of each step, and the seconds that it took.
    """
    count = summaries.summary(name).parameters
    console.print(
        f"training {label} ({name}, {count:,} parameters) in {backend}, at most {seconds:.0f} s ..."
    )
    network, rng = networks.get(name), np.random.default_rng(seed)
    module = networks.build(network, backend)
    step, export = backends.load(backend).trainer(module, networks.initial_weights(network, seed))
    per_epoch = len(data.trained) // BATCH
    losses: list[float] = []
    epoch, solved, start = 0, False, time.monotonic()
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console) as progress:
        task = progress.add_task(label, total=seconds)
        while not solved and time.monotonic() - start < seconds:
            order = rng.permutation(data.trained)[: per_epoch * BATCH]
            for batch in order.reshape(per_epoch, BATCH):
                done = min(len(losses) / (per_epoch * DECAY_EPOCHS), 1)
                rate = LEARNING_RATE * (0.01 + 0.99 * (1 + np.cos(np.pi * done)) / 2)
                x = data.inputs(batch, network.input_shape[1:])
                losses.append(step(x, data.labels[batch], float(rate)))
                elapsed = time.monotonic() - start
                description = f"{label}: loss {losses[-1]:.4f}"
                progress.update(task, completed=elapsed, description=description)
                if elapsed > seconds:
                    break
            right = predict(name, backend, export(), data).argmax(axis=1) == data.labels
            epoch, solved = epoch + 1, bool(right.all())
            console.print(
                f"epoch {epoch}: loss {np.mean(losses[-per_epoch:]):.4f}, held out "
                f"{right[data.held_out].sum():,} of {len(data.held_out):,} right, trained on "
                f"{right[data.trained].sum():,} of {len(data.trained):,}"
            )
    return export(), losses, time.monotonic() - start


def predict(name: str, backend: str, weights: Mapping[str, Array], data: Positions) -> Array:
    """The logits ``(N, 4096)`` for every position."""
    network = networks.get(name)
    module = networks.build(network, backend)
    evaluate = backends.load(backend).evaluate
    every = np.arange(len(data.labels))
    batches = np.split(every, len(every) // _PREDICT_BATCH)
    inputs = (data.inputs(which, network.input_shape[1:]) for which in batches)
    return np.concatenate([evaluate(module, weights, x)[0] for x in inputs])


def plot(
    path: Path, data: Positions, panels: Mapping[str, Array], curves: Mapping[str, list[float]]
) -> None:
    """Write a picture: the true positions, each network's predictions, the loss curves.

    ``panels`` has by title the predicted pixel of every position, ``curves`` the loss of each step.
    """
    from matplotlib.figure import Figure  # only the picture needs it

    figure = Figure(figsize=(15, 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels) + 2)
    red, green = (data.coordinates.T - data.coordinates.min()) / np.ptp(data.coordinates)
    colours = np.column_stack([red, green, np.full(len(red), 0.5)])  # by the true position
    titled = {"true positions": data.labels, **panels}
    for axis, (title, pixels) in zip(axes, titled.items(), strict=False):
        wrong = pixels != data.labels
        if title in panels:
            title = f"{title}: {int((~wrong).sum()):,} of {len(pixels):,} right"
        x, y = pixels % CANVAS, pixels // CANVAS
        axis.scatter(x[~wrong], y[~wrong], s=3, c=colours[~wrong], linewidths=0)
        axis.scatter(x[wrong], y[wrong], s=9, c="black", marker="x", linewidths=0.7)
        axis.set(title=title, xlim=(0, CANVAS), ylim=(CANVAS, 0), aspect="equal", xlabel="x")
    axes[0].set_ylabel("y")
    for title, losses in curves.items():
        axes[-1].plot(np.linspace(0, 1, len(losses)), losses, label=title, linewidth=1)
    axes[-1].set(title="training loss", yscale="log", xlabel="share of the training time")
    axes[-1].set_ylabel("loss")
    axes[-1].legend()
    figure.savefig(path, dpi=110)
