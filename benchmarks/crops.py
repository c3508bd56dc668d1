"""What windows do for a network that is trained on crops, where it has to know absolute positions.

python benchmarks/crops.py --json crops.json --picture crops.png

A frame of 64x64 shows one target among eight distractors: the target is a plus, the others are
crosses. A network is trained on random crops of 32x32 that contain the target, and has to say where
in the frame the target is. A crop does not show that, its window does. The network is three
convolutions, a softmax over positions, and the mean, by its weights, of two maps: with coordinates,
without any, and with coordinates in its window. Five runs each; the error is that of new crops, in
pixels of the frame. The last row is what can be known without a window: the middle of the crop.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import common
from common import console
from coordconv import Coordinates, Window, coordinate_grid

FRAME, CROP, BATCH = 64, 32, 32
COORDS = Coordinates("xy", align="edges")
LABELS = {"none": "no coordinates", "own": "with coordinates", "window": "with windows"}
_PLUS = np.array([[0, 1, 0], [1, 1, 1], [0, 1, 0]], np.float32)
_CROSS = np.array([[1, 0, 1], [0, 1, 0], [1, 0, 1]], np.float32)


def sample(rng: np.random.Generator, count: int = BATCH) -> tuple[Any, Any, Any, Any]:
    """Frames, crops ``(N, 1, CROP, CROP)``, their boxes, and where the targets are, in pixels."""
    frames = np.zeros((count, FRAME, FRAME), np.float32)
    places = rng.integers(2, FRAME - 2, (count, 9, 2))
    for frame, each in zip(frames, places, strict=True):
        for shape, (y, x) in zip([*[_CROSS] * 8, _PLUS], each, strict=True):
            frame[y - 1 : y + 2, x - 1 : x + 2] = shape
    target = places[:, -1]
    low, high = np.maximum(0, target + 2 - CROP), np.minimum(FRAME - CROP, target - 2)
    corner = rng.integers(low, high + 1)
    crops = [f[y : y + CROP, x : x + CROP] for f, (y, x) in zip(frames, corner, strict=True)]
    boxes = np.concatenate([corner[:, ::-1], corner[:, ::-1] + CROP], 1)
    return frames, np.stack(crops)[:, None], boxes, target[:, ::-1] + 0.5


@dataclass(frozen=True)
class Run:
    """A network that was trained: its mean error on new crops after so many steps, in pixels."""

    variant: str
    seed: int
    steps: tuple[int, ...]
    errors: tuple[float, ...]


def train(variant: str, seed: int, steps: int, every: int = 50) -> Run:
    """Train one network."""
    import torch
    from torch import nn

    from coordconv.backends.torch import CoordConv2d

    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)

    def conv(channels: int, out: int) -> Any:
        if variant == "none":
            return nn.Conv2d(channels, out, 3, padding=1)
        return CoordConv2d(channels, out, 3, padding=1, coords=COORDS)

    body = nn.ModuleList([conv(1, 16), nn.Conv2d(16, 16, 3, padding=1), conv(16, 3)])
    optimizer = torch.optim.Adam(body.parameters(), 5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)

    def predicted(crops: Any, boxes: Any) -> Any:
        window = Window.from_boxes(boxes, (FRAME, FRAME)) if variant == "window" else None
        given = {} if variant == "none" else {"window": window}
        first, second, third = body
        maps = third(second(first(torch.tensor(crops), **given).relu()).relu(), **given)
        weights = maps[:, 2].flatten(1).softmax(1)
        return (maps[:, :2].flatten(2) * weights[:, None]).sum(-1)

    def error(count: int) -> float:
        _, crops, boxes, target = sample(np.random.default_rng(10_000), count)
        with torch.no_grad():
            off = (predicted(crops, boxes) + 1) * FRAME / 2 - torch.tensor(target)
        return float(off.norm(dim=1).mean())

    counts, errors = [], []
    for step in range(steps):
        _, crops, boxes, target = sample(rng)
        wanted = torch.tensor(target * 2 / FRAME - 1, dtype=torch.float32)
        loss = (predicted(crops, boxes) - wanted).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % every == 0:
            counts.append(step + 1)
            errors.append(error(512))
    return Run(variant, seed, tuple(counts), tuple(errors))


def draw(path: Path, runs: list[Run], crop_only: float) -> None:
    """Write the picture: a frame with its crop, what a layer sees, and the errors."""
    from matplotlib.figure import Figure  # only the picture needs it
    from matplotlib.patches import Rectangle

    figure = Figure(figsize=(12, 3.4), layout="constrained")
    shown, *maps, curves = figure.subplots(1, 4, width_ratios=[1, 1, 1, 1.5])
    frames, _, boxes, target = sample(np.random.default_rng(4), 1)
    (x0, y0, x1, y1), edges = boxes[0], (0, FRAME, FRAME, 0)
    shown.imshow(frames[0], cmap="Greys", extent=edges)
    shown.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, color="C1", linewidth=2))
    shown.plot(*target[0], "o", color="C0", markersize=16, fillstyle="none")
    shown.set_title("a frame, its target and a crop", fontsize=10)
    windows = (None, Window.from_boxes(boxes[0], (FRAME, FRAME)))
    for axes, given, title in zip(
        maps, windows, ("without a window", "in its window"), strict=True
    ):
        grid = coordinate_grid((CROP, CROP), COORDS, window=given).reshape(2, CROP, CROP)
        axes.imshow(np.zeros((FRAME, FRAME)), cmap="Greys", extent=edges)
        extent = (x0, x1, y1, y0)
        axes.imshow(grid[0], cmap="viridis", vmin=-1, vmax=1, extent=extent)
        axes.set(xlim=(0, FRAME), ylim=(FRAME, 0))
        ends = f"x from {grid[0, 0, 0]:.2f} to {grid[0, 0, -1]:.2f}"
        axes.set_title(f"{title}:\n{ends}", fontsize=10)
    for axes in (shown, *maps):
        axes.set(xticks=[], yticks=[])
    for place, variant in enumerate(LABELS):
        found = [run for run in runs if run.variant == variant]
        label = LABELS[variant]
        for run in found:
            curves.plot(run.steps, run.errors, color=f"C{place}", linewidth=0.8, alpha=0.5)
        median = np.median([run.errors for run in found], 0)
        curves.plot(found[0].steps, median, color=f"C{place}", linewidth=2, label=label)
    curves.axhline(crop_only, color="grey", linestyle="--", linewidth=1, label="middle of the crop")
    curves.set(yscale="log", xlabel="steps", ylabel="error, pixels of the frame")
    curves.set_title("where is the target?", fontsize=10)
    curves.legend(fontsize=8)
    figure.savefig(path, dpi=110)


def main(
    steps: Annotated[int, typer.Option(min=50, help="Of training, each of 32 crops.")] = 1000,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each network.")] = 5,
    json_file: common.JsonOption = None,
    picture: common.PictureOption = None,
) -> None:
    """Train the same network on crops, without coordinates, with them, and with windows."""
    runs: list[Run] = []
    with common.progress() as bar:
        task = bar.add_task("", total=len(LABELS) * seeds)
        for variant in LABELS:
            for seed in range(seeds):
                bar.update(task, description=f"{variant}, run {seed + 1}")
                runs.append(train(variant, seed, steps))
                bar.advance(task)
    _, _, boxes, target = sample(np.random.default_rng(10_000), 512)
    middle = (boxes[:, :2] + boxes[:, 2:]) / 2
    crop_only = float(np.linalg.norm(middle - target, axis=1).mean())
    console.print(common.describe(common.machine("cpu")), soft_wrap=True)
    shown = common.table(
        "error on new crops, in pixels of the frame", "coordinates", "median", "lowest", "highest"
    )
    for variant in LABELS:
        last = [run.errors[-1] for run in runs if run.variant == variant]
        numbers = float(np.median(last)), min(last), max(last)
        shown.add_row(LABELS[variant], *(f"{number:.2f}" for number in numbers))
    shown.add_row("(middle of the crop)", f"{crop_only:.2f}", "", "")
    console.print(shown)
    if json_file is not None:
        common.write_json(json_file, "cpu", runs)
    if picture is not None:
        draw(picture, runs, crop_only)


if __name__ == "__main__":
    common.run(main)
