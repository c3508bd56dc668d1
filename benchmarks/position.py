"""Where three networks get their position from: padding, nowhere, or coordinates.

python benchmarks/position.py --json position.json --picture position.png

A residual network in the manner of ResNet-18, four stages of two blocks, with random weights: what
is measured comes from how it is built, not from what it was taught. It is padded with zeros; then
circularly, so that it has no border; then circularly with x and y appended in its first layer. The
images are textures: noise whose amplitudes fall with frequency, as those of photographs do.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import typer

import common
from common import console
from coordconv.position_report import PositionReport, plot

TITLES = {
    "zeros": "zero padding",
    "circular": "circular padding",
    "coordinates": "circular padding, coordinates in the first layer",
}
LAYERS = ("stem", *(f"stage{stage}.{block}" for stage in range(1, 5) for block in (0, 1)))


def images(count: int, size: int, seed: int = 0) -> Any:
    """Images ``(count, 3, size, size)`` between 0 and 1, whose amplitudes fall with frequency."""
    noise = np.random.default_rng(seed).standard_normal((count, 3, size, size))
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    frequency[0, 0] = 1 / size
    made = np.fft.ifft2(np.fft.fft2(noise) / frequency).real
    made /= made.std((2, 3), keepdims=True)
    return np.clip(0.5 + 0.2 * made, 0, 1).astype(np.float32)


def network(kind: str, seed: int = 0) -> Any:
    """One of the three, with the same weights but for those of the coordinates."""
    import torch
    from torch import nn

    from coordconv.backends.torch import add_coords

    padding: Any = "zeros" if kind == "zeros" else "circular"

    def conv(channels: int, out: int, stride: int = 1) -> Any:
        return nn.Conv2d(channels, out, 3, stride, 1, bias=False, padding_mode=padding)

    class Block(nn.Module):
        def __init__(self, channels: int, out: int, stride: int) -> None:
            super().__init__()
            self.first = nn.Sequential(conv(channels, out, stride), nn.BatchNorm2d(out), nn.ReLU())
            self.second = nn.Sequential(conv(out, out), nn.BatchNorm2d(out))
            same = channels == out and stride == 1
            self.skip = nn.Identity() if same else nn.Conv2d(channels, out, 1, stride, bias=False)

        def forward(self, x: Any) -> Any:
            return (self.second(self.first(x)) + self.skip(x)).relu()

    torch.manual_seed(seed)
    model = nn.Sequential()
    model.add_module("stem", nn.Sequential(conv(3, 32), nn.BatchNorm2d(32), nn.ReLU()))
    channels = 32
    for stage, out in enumerate((32, 64, 96, 128), 1):
        stride = 1 if stage == 1 else 2
        blocks = nn.Sequential(Block(channels, out, stride), Block(out, out, 1))
        model.add_module(f"stage{stage}", blocks)
        channels = out
    model.add_module("head", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()))
    if kind == "coordinates":
        add_coords(model, "xy", layers="stem.0", init="fan_in")
    return model


@dataclass(frozen=True)
class Found:
    """The report of one network."""

    network: str
    report: dict[str, Any]


def main(
    size: Annotated[int, typer.Option(min=16, help="Of the images, in pixels.")] = 64,
    count: Annotated[int, typer.Option(min=1, help="How many images.")] = 8,
    draws: Annotated[int, typer.Option(min=2, help="How often each is shuffled.")] = 16,
    json_file: common.JsonOption = None,
    picture: common.PictureOption = None,
) -> None:
    """Report where a network gets its position from, with three kinds of borders."""
    import torch

    from coordconv.backends.torch import position_report

    given = torch.tensor(images(count, size))
    reports: dict[str, PositionReport] = {}
    with common.progress() as bar:
        task = bar.add_task("", total=len(TITLES))
        for kind, title in TITLES.items():
            bar.update(task, description=title)
            reports[title] = position_report(network(kind), given, draws=draws, layers=LAYERS)
            bar.advance(task)
    console.print(common.describe(common.machine("cpu")), soft_wrap=True)
    for title, report in reports.items():
        console.print(f"\n[bold]{title}[/]")
        console.print(str(report), highlight=False, markup=False)
    if json_file is not None:
        found = [Found(title, json.loads(each.to_json())) for title, each in reports.items()]
        common.write_json(json_file, "cpu", found)
    if picture is not None:
        plot(reports, picture)


if __name__ == "__main__":
    common.run(main)
