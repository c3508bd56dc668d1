"""The task of the demonstration: its data, training, prediction and picture.

The task is the paper's supervised coordinate classification on Not-so-Clevr: given the centre of
a 9x9 square on a 64x64 canvas as two numbers, name its pixel among the 4,096.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from coordconv import backends, networks
from coordconv.grid import Array, coordinate_grid
from coordconv.weights import Weights

CANVAS = 64
SQUARE = 9
BATCH = 8
LEARNING_RATE = 0.005
DECAY_EPOCHS = 10
TRAINED_SHARE = 0.8
_PREDICT_BATCH = 112  # divides the 3,136 positions, so that a compiler sees one shape


@dataclass(frozen=True)
class Positions:
    """The centres of all squares.

    Args:
        coordinates: x and y on the scale -1 to 1, shape ``(N, 2)``.
        labels: the pixel at the centre, counted row by row, shape ``(N,)``.
        trained: the indices of the positions to train on, a random choice.
        held_out: the indices of the others.
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
    """All centres of a square that fits on the canvas, 80% of them to train on.

    Args:
        seed: what the split is sampled with.

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
    cut = round(TRAINED_SHARE * len(rows))
    return Positions(
        np.ascontiguousarray(coordinate_grid((CANVAS, CANVAS))[:, rows, columns].T),
        rows * CANVAS + columns,
        order[:cut],
        order[cut:],
    )


@dataclass(frozen=True)
class Epoch:
    """Where training stands after an epoch: the mean loss, and the number of right answers."""

    number: int
    loss: float
    trained_right: int
    held_out_right: int


@dataclass(frozen=True)
class Training:
    """The result of training: weights, the loss of each step, each epoch, and the time taken."""

    weights: Weights
    losses: list[float]
    epochs: list[Epoch]
    seconds: float


def train(
    name: str,
    backend: str,
    data: Positions,
    *,
    seconds: float,
    seed: int = 0,
    on_step: Callable[[float, float], Any] = lambda elapsed, loss: None,
    on_epoch: Callable[[Epoch], Any] = lambda epoch: None,
) -> Training:
    """Train a network of ``networks.NETWORKS`` until every position is right, or time is up.

    Args:
        name: the network.
        backend: the framework to train in.
        data: the positions.
        seconds: the time limit.
        seed: what the initial weights and the batches are sampled with.
        on_step: called with the time taken so far and the step's loss.
        on_epoch: called after each epoch.
    """
    network, rng = networks.get(name), np.random.default_rng(seed)
    shape = network.input_shape[1:]
    module = networks.build(network, backend)
    step, export = backends.load(backend).trainer(module, networks.initial_weights(network, seed))
    per_epoch = len(data.trained) // BATCH
    losses: list[float] = []
    epochs: list[Epoch] = []
    start, solved = time.monotonic(), False
    while not solved and time.monotonic() - start < seconds:
        order = rng.permutation(data.trained)
        for i in range(per_epoch):
            batch = order[i * BATCH : (i + 1) * BATCH]
            done = min(len(losses) / (per_epoch * DECAY_EPOCHS), 1)
            rate = LEARNING_RATE * (0.01 + 0.99 * (1 + np.cos(np.pi * done)) / 2)
            losses.append(step(data.inputs(batch, shape), data.labels[batch], float(rate)))
            elapsed = time.monotonic() - start
            on_step(elapsed, losses[-1])
            if elapsed > seconds:
                break
        right = predict(name, backend, export(), data).argmax(axis=1) == data.labels
        solved = bool(right.all())
        loss = float(np.mean(losses[-per_epoch:]))
        counts = (int(right[which].sum()) for which in (data.trained, data.held_out))
        epochs.append(Epoch(len(epochs) + 1, loss, *counts))
        on_epoch(epochs[-1])
    return Training(export(), losses, epochs, time.monotonic() - start)


def predict(name: str, backend: str, weights: Mapping[str, Array], data: Positions) -> Array:
    """The logits ``(N, 4096)`` for every position."""
    network = networks.get(name)
    module = networks.build(network, backend)
    evaluate = backends.load(backend).evaluate
    return np.concatenate(
        [
            evaluate(module, weights, data.inputs(which, network.input_shape[1:]))[0]
            for which in np.split(np.arange(len(data.labels)), len(data.labels) // _PREDICT_BATCH)
        ]
    )


def plot(
    path: Path, data: Positions, panels: Mapping[str, Array], curves: Mapping[str, list[float]]
) -> None:
    """Write a picture: the true positions, each network's predictions, the loss curves.

    Args:
        path: a file that matplotlib can write.
        data: the positions.
        panels: by title, the predicted pixel of every position.
        curves: by the same titles, the loss of every step.
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
    axes[-1].set(
        title="training loss", yscale="log", xlabel="share of the training time", ylabel="loss"
    )
    axes[-1].legend()
    figure.savefig(path, dpi=110)
